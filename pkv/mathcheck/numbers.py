"""Reads a number as an exact rational in an own strict grammar. Never float(), never Fraction() on raw text.

`float("٤٢")` is 42 and `Fraction("1e99999999")` hangs; so: ASCII, at most 64 characters, exponents of two digits.
Known: signs, thousands separators, decimals, repeating decimals, fractions, mixed numbers, powers of ten, percent,
currency, units, LaTeX spellings of these, and one variable in front (`x = 5`). All else is not a number: None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from pkv.mathcheck.latex import flatten, split_assignment

MAX_CHARACTERS = 64

_DECIMAL = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"""
    (?P<sign>[+-]?)\s?(?:(?P<currency>\$|USD\b|EUR\b|GBP\b)\s?(?P<inner_sign>-?))?
    (?:
        10\s?\^\s?(?:\{{(?P<power>-?\d{{1,2}})\}}|(?P<digit_power>\d{{1,2}}))
      | (?P<whole>\d+)?\s?\\frac\s?
        (?:\{{(?P<top>-?(?:{_DECIMAL}))\}}|(?P<top_digit>\d))\s?(?:\{{(?P<bottom>{_DECIMAL})\}}|(?P<bottom_digit>\d))
      | (?P<mixed>\d+)[ ](?P<mixed_top>\d+)/(?P<mixed_bottom>\d+)
      | (?P<slash_top>{_DECIMAL})\s?/\s?(?P<slash_bottom>{_DECIMAL})
      | (?P<head>\d*\.\d*)\\overline\s?\{{(?P<period>\d{{1,12}})\}}
      | (?P<decimal>{_DECIMAL})
        (?:[eE](?P<e>[+-]?\d{{1,2}})(?!\d)
          |\s?(?:\\times|\*)\s?10\s?\^\s?(?:\{{(?P<times>-?\d{{1,2}})\}}|(?P<digit_times>\d{{1,2}})))?
    )
    (?P<rest>(?![\d.,/^\\({{]).*)
    """,
    re.VERBOSE | re.ASCII,
)

_MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_CURRENCIES = {"$": "USD", "USD": "USD", "EUR": "EUR", "GBP": "GBP"}
# What a unit measures, and how many of the base unit it is. "pound" is left out: money to some, mass to others.
_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (kind, Fraction(size))
    for kind, units in {
        "USD": {"usd dollar dollars": "1", "cent cents": "1/100"},
        "EUR": {"eur euro euros": "1"},
        "GBP": {"gbp": "1"},
        "length": {
            "mm millimeter millimeters millimetre millimetres": "1/1000",
            "cm centimeter centimeters centimetre centimetres": "1/100",
            "m meter meters metre metres": "1",
            "km kilometer kilometers kilometre kilometres": "1000",
            "in inch inches": "127/5000",
            "ft foot feet": "381/1250",
            "yd yard yards": "1143/1250",
            "mi mile miles": "201168/125",
        },
        "mass": {
            "mg milligram milligrams": "1/1000",
            "g gram grams": "1",
            "kg kilogram kilograms": "1000",
        },
        "time": {
            "s sec second seconds": "1",
            "min minute minutes": "60",
            "h hr hrs hour hours": "3600",
            "day days": "86400",
            "week weeks": "604800",
        },
        "volume": {
            "ml milliliter milliliters millilitre millilitres": "1/1000",
            "l liter liters litre litres": "1",
        },
        "angle": {"deg degree degrees": "1"},
        "radian": {"rad radian radians": "1"},
    }.items()
    for names, size in units.items()
    for name in names.split()
}
_UNITS |= {"mph": ("length/time", Fraction(1397, 3125)), "kph": ("length/time", Fraction(5, 18))}
_POWERS = {"square": 2, "sq": 2, "cubic": 3}
_SHORT_WORDS = frozenset({"a", "am", "an", "at", "in", "is", "of", "on", "pm"})
# Words that make another number, a range or a list out of what stands before them.
_NOT_UNITS = frozenset(
    """
    or and to not nor but than minus plus over divided by squared cubed factorial root mod modulo pi sqrt sin cos tan
    log exp inf infinity from between versus either if half halves third thirds quarter quarters fourth fourths fifth
    fifths sixth sixths eighth eighths tenth tenths hundredth hundredths lakh lakhs crore crores score scores gross
    hundreds thousands millions billions too because since which
    """.split()  # noqa: SIM905 - fifty words read better as text
)
_WORD = re.compile(r"(?P<name>[A-Za-z][A-Za-z'-]*)(?:\s?\^\s?\{?(?P<power>[23])\}?)?\.?")
_MAX_WORDS = 5


@dataclass(frozen=True)
class Number:
    """A number as it was stated: `value` in `scale` base units of `kind`; percent not yet applied to `value`.

    kind: what a known unit measures ("length", "USD", "length/time", "length^2"); "" without a known one.
    variable: the one that stood before an equals sign, or "".
    quotient: it was written as one, `96/4`, which leaves a whole number to be worked out.
    """

    value: Fraction
    percent: bool = False
    kind: str = ""
    scale: Fraction = Fraction(1)
    variable: str = ""
    quotient: bool = False

    @property
    def exact(self) -> Fraction:
        """The value with percent applied."""
        return self.value / 100 if self.percent else self.value


def unit_of(word: str) -> tuple[str, Fraction] | None:
    """What a known unit measures and its size in base units, or None: "hours" is ("time", 3600)."""
    return _UNITS.get(word.lower())


def parse_number(text: str) -> Fraction | None:
    """The exact value of a number (50% is 1/2, units are dropped), or None for anything else."""
    number = read_number(text)
    return None if number is None else number.exact


def read_number(text: str) -> Number | None:
    """The number that a text of at most 64 characters states, with its unit, or None for anything else."""
    if len(text) > MAX_CHARACTERS:
        return None
    text = flatten(text)
    variable, text = split_assignment(text)
    if text.startswith("(") and text.endswith(")") and text[:2] != "()":
        text = text[1:-1]
    match = _NUMBER.fullmatch(text) if text.isascii() else None
    if match is None:
        return None
    magnitude = _magnitude(match)
    suffix = _read_suffix(match["rest"], _CURRENCIES.get(match["currency"] or "", ""))
    if magnitude is None or suffix is None:
        return None
    multiplier, percent, kind, scale = suffix
    sign = -1 if (match["sign"] == "-") != (match["inner_sign"] == "-") else 1
    quotient = bool(match["slash_top"] or ((match["top"] or match["top_digit"]) and not match["whole"]))
    return Number(sign * magnitude * multiplier, percent, kind, scale, variable, quotient)


def same_number(answer: Number, gold: Number) -> bool:
    """Whether two numbers are the same, as the gold one is to be understood.

    Known units are converted and differing kinds are wrong; a unit that only one side states was understood.
    Percent: equal values are right always (50% and 0.5). A gold "50%" may also be answered as 50, its sign left out;
    and a gold 50 as "50%", since then the question asks for percents. A gold 0.5 says a share, so "0.5%" is wrong.
    A whole number that is answered by a quotient (24 by `96/4`) was not worked out.
    """
    if answer.variable and gold.variable and answer.variable != gold.variable:
        return False
    if answer.quotient and not gold.quotient and gold.exact.denominator == 1:
        return False
    if answer.percent or gold.percent:
        if answer.exact == gold.exact:
            return True
        if answer.percent == gold.percent or answer.kind or gold.kind:
            return False
        return answer.value == gold.value and (gold.percent or abs(gold.value) > 1)
    if answer.kind and gold.kind and ("/" in answer.kind) == ("/" in gold.kind):
        return answer.kind == gold.kind and answer.value * answer.scale == gold.value * gold.scale
    # "$24 per hour" for a gold "$24": what the money is for was understood.
    return answer.value == gold.value and (not (answer.kind and gold.kind) or _over(answer) == _over(gold))


def _over(number: Number) -> str:
    return number.kind.partition("/")[0]


def _magnitude(match: re.Match[str]) -> Fraction | None:
    """The number's core without sign and suffix; None for a division by zero."""
    if match["power"] or match["digit_power"]:
        return Fraction(10) ** int(match["power"] or match["digit_power"])
    if match["mixed"]:
        part = _divide(match["mixed_top"], match["mixed_bottom"])
        return None if part is None or part >= 1 else int(match["mixed"]) + part
    if match["slash_top"]:
        return _divide(match["slash_top"], match["slash_bottom"])
    if match["period"]:
        period = match["period"]
        places = len(match["head"].partition(".")[2])
        return _decimal(match["head"]) + Fraction(int(period), (10 ** len(period) - 1) * 10**places)
    if match["decimal"]:
        power = match["e"] or match["times"] or match["digit_times"] or "0"
        return _decimal(match["decimal"]) * Fraction(10) ** int(power)
    part = _divide(match["top"] or match["top_digit"], match["bottom"] or match["bottom_digit"])
    if part is None or not match["whole"]:
        return part
    return int(match["whole"]) + part if 0 <= part < 1 else None


def _divide(top: str, bottom: str) -> Fraction | None:
    divisor = _decimal(bottom)
    return _decimal(top) / divisor if divisor else None


def _decimal(text: str) -> Fraction:
    """A run of ASCII digits with an optional sign, separators and point, as the grammar has let it through."""
    negative, text = text.startswith("-"), text.lstrip("-").replace(",", "")
    whole, _, places = text.partition(".")
    value = Fraction(int(whole + places or "0"), 10 ** len(places))
    return -value if negative else value


def _read_suffix(rest: str, currency: str) -> tuple[int, bool, str, Fraction] | None:
    """(multiplier, percent, kind, scale) of what stands around the number; None where that is more than a unit."""
    glued = rest[:1].isalpha()
    rest = rest.strip()
    if rest == "$" and not currency:  # "5$"
        currency, rest = "USD", ""
    percent = rest.startswith("%")
    rest = rest.removeprefix("%").strip()
    words: list[tuple[str, int]] = []
    for part in rest.replace("/", " per ").replace("^ ", "^").replace(" ^", "^").split():
        match = _WORD.fullmatch(part)
        if match is None or len(words) == 2 * _MAX_WORDS:
            return None
        words.append((match["name"].lower(), int(match["power"] or 1)))
    if words and words[0][0] in ("percent", "percentage", "pct") and not percent:
        percent, words = True, words[1:]
    multiplier = 1
    if words and words[0][0] in _MULTIPLIERS and not percent:
        multiplier, words = _MULTIPLIERS[words[0][0]], words[1:]
    if len(words) > _MAX_WORDS or any(name in _NOT_UNITS or name in _MULTIPLIERS for name, _ in words):
        return None
    if any(len(name) < 3 and name not in _UNITS and name not in _SHORT_WORDS for name, _ in words):
        return None  # `5 x`, `3 ab`: algebra rather than a unit
    # Glued on, only a unit of two letters or more is one: `5cm` but not `5m`, which is a product.
    if glued and not percent and multiplier == 1 and (len(words[0][0]) < 2 or words[0][0] not in _UNITS):
        return None
    if currency:
        if percent:
            return None
        stated = words and _UNITS.get(words[0][0], ("",))[0] == currency  # "$5 dollars"
        words = words if stated else [(currency.lower(), 1), *words]
    kind, scale = _measure(words)
    return multiplier, percent, kind, scale


def _measure(words: list[tuple[str, int]]) -> tuple[str, Fraction]:
    """What the words measure and in which size: `square meters`, `km per hour`; ("", 1) for other words."""
    kinds, scale, sign, power = [], Fraction(1), 1, 1
    for name, stated_power in words:
        if name == "per" and kinds and sign == 1:
            sign = -1
        elif name in _POWERS and power == 1:
            power = _POWERS[name]
        elif name in _UNITS and len(kinds) < (1 if sign == 1 else 2):
            kind, size = _UNITS[name]
            power *= stated_power
            kinds.append(kind if power == 1 else f"{kind}^{power}")
            scale *= size ** (sign * power)
            power = 1
        else:
            return "", Fraction(1)
    if not kinds or power != 1 or len(kinds) != (1 if sign == 1 else 2):
        return "", Fraction(1)
    return "/".join(kinds), scale
