"""One spelling for arithmetic in running text: English, Markdown and LaTeX written with + - * / ^ % ( ) = and ≈.

What is no mathematics stays. What cannot be worked out here (a logarithm, a sum over i) becomes UNREAD, so that
nothing is read out of its parts. Linear in the text's length.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from pkv.rewards.lexicon import lexicon

UNREAD = "\ue000"  # of the private use area; one that stands in a text is dropped first
BREAK = " ; "  # ends a stretch of mathematics
MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6}

_TRANSLATION = str.maketrans(
    {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full width
    | dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff\u00ad\ufe0f\ue000"))
    | dict.fromkeys(map(ord, "×·⋅∗∙•⨯✕✖⋆"), "*")
    | dict.fromkeys(map(ord, "÷∕⁄"), "/")
    | dict.fromkeys(map(ord, "−–‐‑‒"), "-")
    | dict.fromkeys(map(ord, "≡≅﹦"), "=")
    | dict.fromkeys(map(ord, "∼～≃≒"), "≈")
    | dict.fromkeys(map(ord, "\u00a0\u2009\u202f\t"), " ")
    | {0x00B2: "^2", 0x00B3: "^3", 0x00BD: " 1/2", 0x00BC: " 1/4", 0x00BE: " 3/4", 0x221A: "\\sqrt "}
    | dict.fromkeys(map(ord, "∑∏∫π"), UNREAD)
)
_UNITS: dict[str, int] = dict(zip("one two three four five six seven eight nine".split(), range(1, 10), strict=True))  # noqa: SIM905
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
_PLAIN = r"\d{1,12}(?:\.\d{1,12})?"
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT = re.compile(r"(?<=[\d)])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]{1,6}")
_FRACTION_PART = r"(?:\{([^{}]{1,60})\}|(\d))"


class Rewrite(NamedTuple):
    """needs: in small letters; a text that holds none of them is not searched, for most hold few of all spellings."""

    pattern: re.Pattern[str]
    replacement: str | Callable[[re.Match[str]], str]
    needs: tuple[str, ...] = ("",)


def normalise(text: str) -> str:
    """The text with LaTeX's, Markdown's and English's mathematics written as signs."""
    text = _SUPERSCRIPT.sub(_raise, text).translate(_TRANSLATION)
    small = text.lower()
    for pattern, replacement, needs in _REWRITES:
        if any(need in text or need in small for need in needs):
            text = pattern.sub(replacement, text)
    return text


def _raise(match: re.Match[str]) -> str:
    return f"^({match[0].translate(_SUPERSCRIPTS)})"


def _say_number(match: re.Match[str]) -> str:
    """Digits for a number in words: "twenty-four", "six"."""
    numbers = lexicon().numbers
    if match["word"]:
        return str(numbers[match["word"].lower()])
    tens, unit = match[0].lower().replace("-", " ").split()
    return str(numbers[tens] + _UNITS[unit])


def _multiply(match: re.Match[str]) -> str:
    """Digits for "2 dozen" or "3.5 thousand"."""
    value = Fraction(match[1].replace(",", "")) * MULTIPLIERS[match[2].lower()]
    return str(value) if value.denominator == 1 else match[0]


def _mixed(match: re.Match[str]) -> str:
    """A mixed number as a sum in brackets; what is none stays."""
    whole, top, bottom = match.groups()
    return f"({whole}+{top}/{bottom})" if int(top[:12]) < int(bottom[:12]) else match[0]


def _repeating(match: re.Match[str]) -> str:
    """A repeating decimal as an exact fraction in brackets."""
    whole, head, period = match.groups()
    top = int(whole + head + period) - int(whole + head)
    return f"({top}/{(10 ** len(period) - 1) * 10 ** len(head)})"


def _fraction(match: re.Match[str]) -> str:
    top, bottom = match[1] or match[2], match[3] or match[4]
    return f"(({top})/({bottom}))"


_SMALL_NUMBERS = "|".join(sorted((w for w in lexicon().numbers if w not in MULTIPLIERS), key=len, reverse=True))
_FRAC = (rf"\\[dtc]?frac\s*{_FRACTION_PART}\s*{_FRACTION_PART}", _fraction, ("frac",))
_REWRITES = tuple(
    Rewrite(re.compile(pattern), replacement, *needs)
    for pattern, replacement, *needs in (
        # Markdown: bullets, emphasis around what starts with a number or holds one.
        (r"(?:^|\n)[ ]{0,8}(?:[-*+]|\d{1,3}[.)])[ ]+", "\n" + BREAK),
        (r"(?<![\w)*])\*\*(?=\S)((?:(?!\*\*)[^\n]){1,200})(?<=\S)\*\*(?![\w(*])", r"\1", ("**",)),
        (r"(?<![\w)*])(?<![\d)] )\*(?=[^\s*])([^*\n]{1,200})(?<=\S)\*(?![\w(*])", r"\1", ("*",)),
        (r"(?<!\w)(_{1,2})(?=\d)([^_\n]{1,200})(?<=\S)\1(?!\w)", r"\2", ("_",)),
        (r"`+", " ", ("`",)),
        (r"(?<=[\d)])\s?\*\*\s?(?=[\d(])", "^", ("**",)),
        # LaTeX: layout, words, line ends.
        (
            r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox|hbox|operatorname\*?)\s?\{([^{}]*)\}",
            r" \1 ",
            ("{",),
        ),
        (r"\\\\(?:\[\w{1,8}\])?\s*&?\s*(?==)", " ", ("\\\\",)),
        (r"\\\\", BREAK, ("\\\\",)),
        (r"\\(?:left|right|[bB]igg?[lr]?|quad|qquad|boxed|displaystyle|limits)(?![A-Za-z])|\\[,;:! ]", " ", ("\\",)),
        (r"\\[()\[\]]", " ", ("\\",)),
        (r"(?<!\d)(\d{1,6})\.(\d{0,6})\\overline\s?\{(\d{1,6})\}", _repeating, ("\\overline",)),
        (r"\\[dt]?binom\s?\{[^{}]{0,40}\}\s?\{[^{}]{0,40}\}", UNREAD, ("binom",)),
        (
            r"\\sqrt\s?\[[^\]\n]{1,8}\]\s?(?:\{[^{}]{0,60}\}|\d)|[∛∜]\s?(?:\d{1,12}|\([^()\n]{1,40}\))?",
            UNREAD,
            ("\\sqrt", "∛", "∜"),
        ),
        (r"=(?=\s*-?\d{1,12}\s*\(?\s*mod\b)", UNREAD, ("mod",)),
        (r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3})", ",", ("{,}", "\\!")),
        (r"(?<=\d)\s*\\l?dots|(?<=\d)\s*\\cdots", " … ", ("dots",)),
        _FRAC,
        _FRAC,
        _FRAC,
        (r"_\s?\{(\w{1,8})\}", r"_\1", ("_",)),
        (r"(?:\\[A-Za-z]+|\ue000)\s?_\s?(?:\{[^{}]{0,40}\}|\w)", UNREAD, ("_",)),
        (r"\ue000\s?\^\s?(?:\{[^{}]{0,40}\}|\w)", UNREAD, ("^",)),
        (r"\^\s?\{([^{}]{1,40})\}", r"^(\1)", ("^",)),
        (r"\\sqrt\s?\{([^{}]{1,60})\}", r"sqrt(\1)", ("\\sqrt",)),
        (r"\\sqrt\s?(\d+)|(?<![A-Za-z\\])sqrt\s(\d+)", r"sqrt(\1\2)", ("sqrt",)),
        (r"\\(?:times|cdot|ast|bullet)(?![A-Za-z])", "*", ("\\",)),
        (r"\\div(?![A-Za-z])", "/", ("\\div",)),
        (r"\\(?:approx|sim|simeq|thickapprox)(?![A-Za-z])", "≈", ("\\",)),
        (r"\\(?:equiv|cong)(?![A-Za-z])|==", "=", ("\\", "==")),
        (r"\\%|(?<=\d)\s?percent\b", "%", ("\\%", "percent")),
        (
            rf"(?<=[\d)])\s*(?:[-=]>|[→⟶⇒]|\\(?:to|[Rr]ightarrow|implies)(?![A-Za-z]))\s*(?=-?{_NUMBER}\s*(?:[^\s\d+*/^=-]|$))",
            " = ",
            ("->", "=>", "→", "⟶", "⇒", "\\"),
        ),
        (
            r"[-=]>|[→⟶⇒]|\\(?:to|[Rr]ightarrow|implies|iff|therefore)(?![A-Za-z])",
            BREAK,
            ("->", "=>", "→", "⟶", "⇒", "\\"),
        ),
        (r"\\(?:circ|degree)(?![A-Za-z])", " ", ("\\",)),
        (
            r"\\(?:item|begin|end|hline|par|newline|because|leq?|geq?|neq?|lt|gt|in|mid)(?![A-Za-z])|=/=",
            BREAK,
            ("\\", "=/="),
        ),
        (r"\\sqrt\s?(?=\()", "sqrt", ("\\sqrt",)),
        (r"\\[A-Za-z]+", UNREAD, ("\\",)),
        (r"[$&{}€£¥₹]", " "),
        # Numbers.
        (
            rf"(?i)\b(?:(?P<tens>{'|'.join(_TENS)})[ -](?P<unit>{'|'.join(_UNITS)})|(?P<word>{_SMALL_NUMBERS}))\b(?!')",
            _say_number,
        ),
        (
            r"(?i)(?<![\d.,])(\d[\d,]{0,11}(?:\.\d{1,6})?)\s(dozen|hundred|thousand|million)\b",
            _multiply,
            ("dozen", "hundred", "thousand", "million"),
        ),
        (rf"[(\[]\s?(?!\d{{1,3}}(?:,\d{{3}})+\s?[)\]])-?{_PLAIN}(?:,\s?-?{_PLAIN}){{1,5}}\s?[)\]]", UNREAD),  # a pair
        (r"(?<![\d,.])(\d{1,12}),(\d{1,2})(?![\d,])", r"\1.\2", (",",)),  # 1,5 as written outside English
        (r"(?<![\d.,/])(\d{1,12}) (\d{1,12})/(\d{1,12})(?![\d/.])", _mixed, ("/",)),
        (r"(\d{1,12})\s?\(\((\d{1,12})\)/\((\d{1,12})\)\)", _mixed, ("((",)),
        (r"(?<![\w.])(\d{1,12}(?:\.\d{1,12})?)[eE]([+-]?\d{1,2})(?![\w.])", r"(\1*10^(\2))"),
        (r"(?<!\d)\d{1,2}:\d\d(?!\d)", UNREAD, (":",)),  # a time of day
        (r"(?<=\d)\s?!(?=\s?[-+*/^=)])", UNREAD, ("!",)),  # a factorial
        (r"(?<=[A-Za-z][A-Za-z])\s?\^\s?\(?[23]\)?", "", ("^",)),  # cm^2
        (r"(?<=\d)_\(?\w{1,8}\)?", UNREAD, ("_",)),  # the base of a number
        (
            r"(?i)(?<=\d)[ ,(]{1,4}(?:[a-z]{2,20}[ ,(]{1,3}){0,2}(?:with |leaving |and )?(?:an? )?(?:remainder|rem\.?)"
            r"[ :]{0,3}(?:of |is )?(?=\d)",
            UNREAD,
            ("rem",),
        ),
        (r"(?i)(?<=\d) r\s?(?=\d)", UNREAD),
        (
            r"(?i)(?<=\d)[ ,(]{1,4}(?:[a-z]{2,20}[ ,(]{1,3}){0,2}(?:with|and|leaving) \d{1,12} (?:[a-z]{2,20} )?"
            r"(?:left over|leftover|remaining|remains?|left)\b",
            UNREAD,
            ("left", "remain"),
        ),
        (r"(?i)(?<![\d.])(\d{1,12})\s*\(?(?:rounded|rounding)\b", rf"\1 {UNREAD} ", ("rounded", "rounding")),
        # Operators and relations in words, between numbers.
        (r"[\[\]]", lambda match: "(" if match[0] == "[" else ")", ("[", "]")),
        (r"(?<=[\d)]) [xX] (?=[\d(])|(?<=\d)[xX](?=\d)", " * ", ("x", "X")),
        (r"(?<=[\d)]) : (?=[\d(])|(?<=\d):(?=\d{1,12}\s?=)", " / ", (":",)),
        (r"(?<=[\d)])\s+squared\b", "^2", ("squared",)),
        (r"(?<=[\d)])\s+cubed\b", "^3", ("cubed",)),
        (r"(?<=[\d)])\s+(?:divided by|over)\s+(?=[\d(])", " / ", ("divided by", "over")),
        (r"(?<=[\d)])\s+multiplied by\s+(?=[\d(])", " * ", ("multiplied by",)),
        (r"(?:(?<=[%)])|(?<=/\d)|(?<=/\d\d))\s+of\s+(?=[\d(])", " * ", ("%", "/")),
        (r"(?<=[\d)])\s+~\s+(?=[\d(-])", " ≈ ", ("~",)),
        (r"~", " ", ("~",)),
        (
            r"(?:(?<=[\d)%])\s+(?:is|are|equals|gives|makes|leaves)|=)\s*(?:about|approximately|approx\.?|roughly|nearly|almost|around)\s+(?=[\d(-])",
            " ≈ ",
        ),
        (
            r"\b(?:comes? to|adds? up to|amounts? to|results? in|(?:will|must|should|would) be|gives? (?:us|me|you)"
            r"|(?:is |are )?equals? to)\b",
            "equals",
        ),
        (r"(?<=[\d)]),?\s+which\s+(?:is|equals|gives|makes)\s+(?=[\d(-])", " equals ", ("which",)),
        (r"(\b(?:equals|is|are|gives|makes|leaves)|=):?\s+(?:(?:exactly|only|just|a total of)\s+)?(?=[\d(-])", r"\1 "),
        (r":=", "=", (":=",)),
        (r"[\"“”](\d[\d,.]{0,12})[\"“”]", r"\1", ('"', "“", "”")),
        (r"(?<=[A-Za-z])\s?/\s?(?=[A-Za-z]{2})", " per ", ("/",)),
    )
)
