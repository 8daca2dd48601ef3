"""Strips the dress off a short mathematical text: delimiters, spacing, text commands. Not a LaTeX parser.

Every function here is meant for texts of at most some hundred characters; callers cap the length first.
"""

from __future__ import annotations

import re

# Typographic signs that mean the same as an ASCII one. Digits are not among them: "٤٢" and "４２" are no numbers here.
_SIGNS = str.maketrans(
    {
        "\u2212": "-",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u00d7": "\\times ",
        "\u00b7": "\\times ",
        "\u22c5": "\\times ",
        "\u00f7": "/",
        "\u00b0": "^\\circ",
        "\u00b2": "^2",
        "\u00b3": "^3",
        "\u03c0": "\\pi ",
        "\u221e": "\\infty ",
        "\u00bd": "\\frac{1}{2}",
        "\u00bc": "\\frac{1}{4}",
        "\u00be": "\\frac{3}{4}",
        "\u2153": "\\frac{1}{3}",
        "\u2154": "\\frac{2}{3}",
        "\u20ac": " EUR ",
        "\u00a3": " GBP ",
    }
)
_PAIRS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|up|normal)?|math(?:rm|bf|it|sf)|mbox|hbox|operatorname)\s?\{([^{}]*)\}"
)
_ROOT = re.compile(r"(?:\u221a|(?<![A-Za-z\\])sqrt(?=\())\s?(?:(\w+)|\(([^()]*)\))")
_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_NEGATIVE = re.compile(r"^(?:minus|negative) (?=\d)", re.IGNORECASE)
_FUNCTION = re.compile(r"(?<![A-Za-z\\])(ln|log|sin|cos|tan)(?= ?[\d(])")
_BOLD_END = re.compile(r"(?<=[\w%)}$])\*\*(?=\s)")  # of `24** candles`, whose beginning is gone
_GROUPING = re.compile(r"\{,\s?\}|,\s?\\!\s?")  # a comma that groups digits: `1{,}000`, `1,\!000`
_APART = re.compile(r"(?<=\d)\\[,!](?=\d)(?!\d{3}(?!\d))")  # `2\,4` is no grouping
_NO_SPACE = re.compile(r"(?<!\\)\\[,!]|\\(?:left|right|displaystyle)(?![A-Za-z])")
_SPACE = re.compile(r"(?<!\\)\\[;: ]|\\q?quad(?![A-Za-z])|~")
_DEGREE = re.compile(r"\^\s?\{?\s?\\circ\s?\}?|\\degree(?![A-Za-z])")
# One variable, with an index or arguments if it has them, and an equals sign: `x =`, `a_1=`, `f(x) =`; or a tuple of
# variables before one of values: `(x, y) = (1, 2)`.
_ASSIGNMENT = re.compile(
    r"(?P<name>(?:[A-Za-z]|\\[a-z]{2,8})'?(?:_(?:\w|\{\w{1,8}\}))?(?:\([A-Za-z](?:,\s?[A-Za-z]){0,2}\))?)\s*=(?!=)\s*"
    r"|(?P<names>\([A-Za-z](?:,\s?[A-Za-z]){1,3}\))\s*=\s*(?=(?:\\left\s?)?\([^()=]*,)"
)


def unwrap(text: str) -> str:
    """The text without the delimiters around all of it (`$..$`, `\\(..\\)`, `**..**`) and a closing full stop."""
    while True:
        text = text.strip()
        bare = text[:-1] if text.endswith((".", ",", ";")) else text
        if bare.endswith("\\"):  # `\\,` and `\\;` are spaces, not punctuation
            bare = text
        for opening, closing in _PAIRS:
            inner = bare[len(opening) : -len(closing)]
            encloses = len(bare) > len(opening) + len(closing) and bare.startswith(opening) and bare.endswith(closing)
            if encloses and opening not in inner and closing not in inner and not inner.endswith("\\"):
                bare = inner
                break
        if bare == text:
            return text
        text = bare


def spell_signs(text: str) -> str:
    """Typographic signs as LaTeX or ASCII writes them, on one line."""
    text = _ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", _BOLD_END.sub("", text)).translate(_SIGNS)
    text = _NEGATIVE.sub("-", _PI.sub(r"\\pi ", " ".join(text.split())))
    return _FUNCTION.sub(r"\\\1", text)


def flatten(text: str) -> str:
    """One spelling for what LaTeX spells in many ways: spacing, text commands, fractions, percent, dollar, degrees."""
    text = unwrap(spell_signs(text))
    text = _GROUPING.sub(",", text)
    text = _APART.sub(" ", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cfrac", "\\frac")
    text = text.replace("\\%", "%").replace("\\$", "$").replace("\\cdot", "\\times")
    text = _SPACE.sub(" ", _NO_SPACE.sub("", text))
    text = _TEXT_COMMAND.sub(r" \1 ", text)
    text = _DEGREE.sub(" degrees ", text)
    return unwrap(" ".join(text.split()))


def split_assignment(text: str) -> tuple[str, str]:
    """("x", "5") for `x = 5`; ("", text) where the text does not start with variables and an equals sign."""
    match = _ASSIGNMENT.match(text)
    return (match["name"] or match["names"].replace(" ", ""), text[match.end() :]) if match else ("", text)
