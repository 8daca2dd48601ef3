"""Whether an answer is right: exact rationals first, then text, and math-verify only for what these cannot decide.

An equation chain (`41=42`) is wrong, which math-verify would let pass as 42, unless it is working that holds
(`6 * 4 = 24`), and so is a list of answers (`3 or 5`)
where the gold answer is none.
"""

from __future__ import annotations

import re

from pkv.mathcheck.latex import flatten, spell_signs, split_assignment, unwrap
from pkv.mathcheck.numbers import Number, read_number, same_number
from pkv.mathcheck.pool import VerifyError, VerifyPool

# A longer text than this is not an answer, unless the gold one is long itself (a matrix).
MAX_CHARACTERS = 400

_RELATION = re.compile(
    r"[<>!]=|[=<>\u2248\u2260\u2264\u2265\u2261]|\\(?:leq?|geq?|neq?|lt|gt|approx|equiv|sim|implies|to|rightarrow)(?![A-Za-z])"
)
_EQUATION = re.compile(r"(?<![<>!])=|\\(?:approx|equiv|sim|implies|to|rightarrow)(?![A-Za-z])|\u2248|\u2261")
_SET = re.compile(r"(?:[A-Za-z]\s?\\in\s?)?[(\[].*,.*[)\]]$")
_INEQUALITY = re.compile(r"[<>\u2264\u2265]|\\(?:leq?|geq?|lt|gt)(?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SEPARATOR = re.compile(r"[,;]|(?<=\d) (?=\d+(?![\d/]))|\b(?:and|or|vs|versus)\b|\\pm(?![A-Za-z])|\u00b1|\\\\")
# A comma before exactly three digits is a thousands separator, unless brackets say that this is a tuple.
_SPLIT_BARE = re.compile(r"\s*(?:,\s*)?\b(?:and|or)\b\s*|;\s*|,\s+|,(?!\d{3}(?!\d))")
# Something left to be worked out: `17 \times 23`, `4!`, `24 + 0x`, `\sqrt{576}` are no answers where 391 or 24 is one.
_UNFINISHED = re.compile(
    r"[+*!^|]|(?<=\d)_|(?<=[\w)}\]])\s?[-/]"
    r"|\\(?:times|div|sqrt|int|sum|prod|lim|binom|log|ln|exp|sin|cos|tan|max|min|gcd|[bp]?mod|Gamma)(?![A-Za-z])"
    r"|\\[lr](?:floor|ceil)|[\u2217\u2219\u2022]"
)
# What a number is stated in, and is none of it: `= 24`, `exactly 24`, `(B) 24`, `24 because ...`,
# a sign for the unit, a minus as a dash, 4,5 and 1 234 as they are written outside English.
_DRESS = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"^(?:=|\\approx(?![A-Za-z])|\u2248)\s*(?=[\d$.-])", ""),
        (r"^(?:about|exactly|precisely|approximately|roughly|around|only|just|a total of)\s+(?=[\d$.-])", ""),
        (r"^(?:\([A-Z]\)|[A-Z]\))\s*(?=[\d$.-])", ""),
        (r"(?<=\w),?\s(?:because|since)\s.*$", ""),
        (r"^\u2013\s?(?=\d)", "-"),
        (r"(?<=[\w*])[*_]*\s*[^\x00-\x7f\w]+$", ""),
        (r"(?<=\d)\s?[\u3041-\u30ff\u3400-\u9fff]{1,4}$", ""),
        (r"^(-?\d{1,12}),(\d{1,2})$", r"\1.\2"),
        (r"^(-?\d{1,3}) (\d{3})(?: (\d{3}))?$", r"\1\2\3"),
    )
)
_OTHER_NUMBERS = re.compile(r"[\u5341\u767e\u5343\u4e07\u842c\u5104\u4ebf]")  # ten to a hundred million in Chinese
_UNDECIDED = re.compile(r"\b(?:or|ou|oder|not|maybe|perhaps|possibly|wrong|incorrect)\b", re.IGNORECASE)
_WORKING = re.compile(r"(?:[\d\s+*/().-]|\\(?:times|div)(?![A-Za-z]))*\d\s*(?:[-+*/]|\\(?:times|div))[^=]*")
_PLAIN = re.compile(r"[^\W\d_](?:[^\W\d_]|[ .'-])*")
_CHOICE = re.compile(r"\([A-Z]\)")
_CHOSEN = re.compile(r"\(?([A-Z])[).:](?!.*\b[A-Z][).:])(?:\s.*)?")  # `C) 24`, with what the choice says
_TIME = re.compile(r"\d{1,2}:(?:00|\d\d ?[ap]\.?m\.?)", re.IGNORECASE)  # `3:20` may be a ratio, `3:00` is none
_UPRIGHT = re.compile(r"\\mathrm\s?\{([ei])\}")  # e and i as constants, which math-verify does not read
_LAYOUT = re.compile(r"(?<!\d)\s+|\s+(?!\d)|(?<!\\)\\[,!;: ]|\\(?:left|right|displaystyle)(?![A-Za-z])")


def is_right(answer: str, gold: str, pool: VerifyPool | None = None) -> bool:
    """Whether `answer` states what `gold` states, both as extracted: a number, a formula or some words.

    Raises VerifyError when the comparison needs math-verify and there is no pool, or when it fails or takes too long.
    """
    answer, gold = answer.strip(), gold.strip()
    if not answer or not gold or len(answer) > max(MAX_CHARACTERS, 4 * len(gold)):
        return False
    answer_number, gold_number = read_number(answer), read_number(gold)
    if gold_number and not answer_number:
        answer = _undress(answer)
        answer_number = read_number(answer)
    if answer_number and gold_number:
        return same_number(answer_number, gold_number)
    if _normal(answer) == _normal(gold):
        return True
    answer_flat, gold_flat = flatten(answer), flatten(gold)
    chosen = _CHOSEN.fullmatch(answer_flat)
    if chosen and chosen[1] == gold_flat.strip("()"):
        return True
    answer_items, gold_items = _items(answer_flat), _items(gold_flat)
    if answer_items and gold_items and answer_items[0] == gold_items[0]:
        names = {split_assignment(flat)[0] for flat in (answer_flat, gold_flat)} - {""}
        return answer_items[1] == gold_items[1] and len(names) < 2
    worked, _, result = answer_flat.rpartition("=")
    if gold_number and _WORKING.fullmatch(worked) and (number := read_number(result)):
        return same_number(number, gold_number) and pool is not None and _check(worked, result, pool)
    if _chained(answer_flat, gold_flat) or _lists_more(answer_flat, gold_flat):
        return False
    answer_plain, gold_plain = _is_plain(answer_flat), _is_plain(gold_flat)
    if (answer_plain and (gold_plain or gold_number)) or (gold_plain and answer_number):
        return False
    if gold_number and _is_unfinished(answer_flat, gold_number):
        return False
    if pool is None:
        raise VerifyError(
            "no_pool", f"comparing {answer[:80]!r} with {gold[:80]!r} needs math-verify: pass a VerifyPool"
        )
    answer, gold = (_UPRIGHT.sub(r" \1", unwrap(spell_signs(text))) for text in (answer, gold))
    return _check(answer if "=" in gold_flat else split_assignment(answer)[1], gold, pool)


def _undress(answer: str) -> str:
    """The number in an answer that says no more than it, as `_DRESS` has it; any other answer as it is."""
    if _UNDECIDED.search(answer) or _OTHER_NUMBERS.search(answer):
        return answer
    bare = flatten(answer)
    for pattern, replacement in _DRESS:
        bare = pattern.sub(replacement, bare)
    return bare if read_number(bare) else answer


def _is_unfinished(answer: str, gold: Number) -> bool:
    """Whether an answer that isn't read as a number leaves something to be worked out, where the gold one is one."""
    return bool(_UNFINISHED.search(answer)) or (gold.exact.denominator == 1 and "\\frac" in answer)


def _check(answer: str, gold: str, pool: VerifyPool) -> bool:
    """math-verify's word; where it comes to none although it can read the gold answer, the answer is wrong."""
    try:
        return pool.check(gold, answer)
    except VerifyError:
        pool.check(gold, gold)
        return False


def _normal(text: str) -> str:
    """A text such that equal ones mean the same: layout gone from formulas, case and article gone from words."""
    flat = flatten(text)
    if _PLAIN.fullmatch(flat):
        return re.sub(r"^(?:the|an?) (?=.)", "", flat.casefold())
    if _TIME.fullmatch(flat):
        return flat.casefold().replace(".", "").replace(" ", "")
    if _CHOICE.fullmatch(flat):  # (B) is B
        return flat[1].casefold()
    return _LAYOUT.sub("", flat)


def _is_plain(flat: str) -> bool:
    """Whether it is words, the letter of a choice or a time of day, which nothing but equal text can match."""
    return any(pattern.fullmatch(flat) for pattern in (_PLAIN, _CHOICE, _TIME))


def _chained(answer: str, gold: str) -> bool:
    """Whether the answer relates more things than the gold one does; `x =` in front and `1 < x < 2` for a set aside."""
    if "=" not in gold:
        answer = split_assignment(answer)[1]
    if _SET.match(gold) and not _EQUATION.search(answer):
        return False
    return len(_RELATION.findall(answer)) > len(_RELATION.findall(gold))


def _lists_more(answer: str, gold: str) -> bool:
    """Whether the answer is a list where the gold one is none; an interval for a gold `1 < x < 2` is no list."""
    if _listed(gold) or not _listed(answer):
        return False
    return not (_SET.match(answer) and _INEQUALITY.search(gold))


def _listed(text: str) -> bool:
    return bool(_SEPARATOR.search(_THOUSANDS.sub("", text)))


def _items(text: str) -> tuple[str, tuple] | None:
    """("set", sorted values) of a bare list or {..}, (brackets, values in order) of a tuple or interval; else None."""
    text = split_assignment(text)[1] if text.count("=") == 1 else text
    text = text.replace("\\{", "{").replace("\\}", "}")
    brackets = text[:1] + text[-1:]
    if brackets in ("{}", "()", "[]", "(]", "[)"):
        parts = [part.strip() for part in text[1:-1].split(",")]
    else:
        brackets, parts = "{}", _SPLIT_BARE.split(text)
    if len(parts) < 2:
        return None
    numbers = [read_number(part) for part in parts]
    values = [number.exact for number in numbers if number is not None and not number.kind]
    variables = {number.variable for number in numbers if number is not None and number.variable}
    if len(values) < len(parts) or len(variables) > 1:
        return None
    return ("set", tuple(sorted(values))) if brackets == "{}" else (brackets, tuple(values))
