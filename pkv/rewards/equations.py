"""Equations in running text, English or LaTeX: where they stand, what they say, whether they hold.

Not a judge of answers (that is mathcheck): this reads the arithmetic that a fighter shows, so that a correction can be
seen to change something, a copied method to be the same one, and a judge's check to be a check. Linear in the text's
length.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from pkv.mathcheck import unit_of
from pkv.rewards.arithmetic import MAX_SIDE_TOKENS, Fact, evaluate, read_number
from pkv.rewards.notation import UNREAD

MAX_UNIT_WORDS = 3  # between a number and the sign behind it: "20 fine candles / 5 good hives"

# A number, a sign, a variable (one letter; "a", "i" and "I" are English words), or one unit word that is passed over.
_TOKEN = re.compile(
    rf"(?P<number>\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?|\d+(?:\.\d{{3}}){{2,}}(?!\d)|\d+(?:\.\d+)?|(?<![\d.])\.\d+)"
    rf"|(?P<sign>[-+*/^()=≈%{UNREAD}]|sqrt(?=\())"
    r"|(?P<letter>[A-Za-z]_\w{1,8}|[b-hj-zB-HJ-Z](?![^\W_]))|(?P<call>[A-Za-z]{2,12}(?=\())|(?P<word>[^\W\d_]+)"
    r"|(?P<space>\s+)|(?P<other>.)",
    re.S,
)
_RELATIONS = "=≈"
_OPERATORS = "+-*/^"
# Said between two numbers they are an equals sign; the first ones also behind a number's unit.
_EQUALS = frozenset("is are equals gives totals leaves yields".split())  # noqa: SIM905
_EQUALS_BARE = _EQUALS | frozenset("be make makes become becomes get gets give have".split())  # noqa: SIM905
_OPERATES = {"times": "*", "plus": "+", "minus": "-"}
# "Half of 20 + 4": they change the number behind them.
_CHANGES_NEXT = frozenset("half twice double triple thrice third quarter fifth tenth root negative than".split())  # noqa: SIM905
# "5 + 1 is 2 more than 4": the number before them is a part of the right side.
_COMPARES = frozenset("more less fewer times greater smaller larger bigger older longer short".split())  # noqa: SIM905
# "4 boxes of 6 + 3", "2 apples at 3 + 1": the first number belongs to the second.
_SHARES = frozenset({"of", "at", "by"})
# "Day 2 - 8 + 3 = 11", "pages 10 - 20": the number behind is a name, or a range's end.
_LABELS = frozenset("step day week year month hour chapter part page pages ages from room case question".split())  # noqa: SIM905
# What mathcheck has no sizes for: the units of a line are of different sizes.
_SIZES = {
    unit: group
    for group, units in {
        "weight": "pound lb ounce oz",
        "volume": "gallon quart pint cup",
        "span": "year month",
        "coin": "cent quarter dime nickel penny pennie",
    }.items()
    for unit in units.split()
}
_GROUPED = re.compile(r"\d{1,3}(?:\.\d{3})+")  # 5.000 for five thousand


@dataclass(frozen=True)
class Equation:
    """`left = right`, the working on the left: `4 = 20 / 5` is turned round.

    left_value, right_value: None where a side has a variable or can't be read. near: it is said to hold about.
    doubtful: something around it may change what it says, so that it is never taken for false. at, stop: its
    characters in the normalised text.
    """

    left: tuple[str, ...]
    right: tuple[str, ...]
    left_value: Fraction | None
    right_value: Fraction | None
    near: bool
    doubtful: bool
    at: int
    stop: int

    @functools.cached_property
    def holds(self) -> bool | None:
        """Whether both sides are equal (to the decimals that the right one is given in); None: not known."""
        if self.left_value is None:
            return None
        if self.right_value is None:
            return False if not self.doubtful and _is_arithmetic(self.right) else None
        if any(_agree(left, right, self.right, self.near) for left, right in self._readings()):
            return True
        return None if self.doubtful or self._is_rounded() else False

    def _is_rounded(self) -> bool:
        """Whether rounded numbers on the left may be why the sides differ: 0.333 * 3 = 1."""
        assert self.left_value is not None and self.right_value is not None
        rounded = any(len(token.partition(".")[2]) > 1 for token in self.left)
        return rounded and abs(self.left_value - self.right_value) <= abs(self.left_value) / 100

    def _readings(self) -> list[tuple[Fraction, Fraction]]:
        """What the sides may say: 25% is 1/4, and the 25 of `1 / 4 * 100 = 25%`; 5.000 may be five thousand."""
        assert self.left_value is not None and self.right_value is not None
        readings = [(self.left_value, self.right_value)]
        for change in (_without_percent, _ungrouped):
            sides = change(self.left), change(self.right)
            if sides != (self.left, self.right):
                values = [evaluate(side) for side in sides]
                readings += [
                    (left, right)
                    for left in (self.left_value, values[0])
                    for right in (self.right_value, values[1])
                    if left is not None and right is not None
                ]
        if len(self.left) == 4 and self.left[1] in "+-" and self.left[3] == "%":  # 200 + 15% = 230
            whole, part = read_number(self.left[0]), read_number(self.left[2])
            if whole is not None and part is not None:
                readings.append((whole * (1 + (part if self.left[1] == "+" else -part) / 100), self.right_value))
        return readings

    @property
    def operands(self) -> frozenset[Fraction]:
        """The numbers on the left."""
        return frozenset(value for token in self.left if (value := read_number(token)) is not None)

    @property
    def facts(self) -> frozenset[Fact]:
        """What is worked out, whatever the wording: 20 / 5, 4 * 5 and 5 * 4 are one fact, as are 7 + 5 and 12 - 5.

        A formula of several operations is as many facts: (20 / 5) * 6 is 20 / 5 and 4 * 6. The right side does not
        count, so that a slip and its correction are the same step; but with a variable on the left it does.
        """
        steps: list[Fact] = []
        if self.left_value is not None:
            evaluate(self.left, steps)
        return frozenset(steps or [("".join(self.left), *(() if self.left_value is not None else self.right))])


def numbers(text: str) -> list[Fraction]:
    """The numbers in a text, in order."""
    found = (read_number(match["number"]) for match in _TOKEN.finditer(text) if match["number"])
    return [value for value in found if value is not None]


def find_equations(normalised: str) -> list[Equation]:
    """The equations of a normalised text in order; `a = b = c` is two of them. A left side without working is none."""
    return [equation for run in _runs(normalised) for equation in _equations_of(run)]


Token = tuple[str, int, int]  # with its characters


@dataclass
class _Run:
    """A stretch of mathematics. headless: what its first side starts with can't be read."""

    headless: bool
    joined: bool = False  # a number with a unit stands right before it: "2 hours 30 minutes"
    tokens: list[Token] = field(default_factory=list)
    units: set[str] = field(default_factory=set)
    doubtful: bool = False

    @property
    def last(self) -> str:
        return self.tokens[-1][0] if self.tokens else ""

    @property
    def ends_a_value(self) -> bool:
        return self.last[:1].isdigit() or self.last[:1] == "." or self.last in (")", "%")


def _runs(text: str) -> list[_Run]:
    """The runs that hold a relation; units after a number ("20 candles / 5") are passed over."""
    runs = [_Run(headless=False)]
    unit = 0  # words since the last number
    word = before = ""  # the last one, as long as only blanks and "of" follow; the last one of all
    spoken = False  # the last relation is a word
    for match in _TOKEN.finditer(text):
        kind, token, run = match.lastgroup, match[0], runs[-1]
        low = token.lower()
        if kind == "space":
            word = "" if "\n" in token else word
        elif kind in ("number", "sign", "letter", "call"):
            goes_on = (kind == "sign" and token != "(") if unit else not (kind == "number" and run.ends_a_value)
            if run.tokens and not goes_on:
                joined = kind == "number" and unit > 0
                run.doubtful |= joined and bool(_sized(run.units))
                run = _Run(headless=joined and before in _SHARES, joined=joined)
                runs.append(run)
            if not run.tokens:
                run.headless |= word in _CHANGES_NEXT or word in _LABELS or (bool(word) and token in _OPERATORS)
            spoken = spoken and token not in _RELATIONS
            unit, word = 0, ""
            run.tokens.append((UNREAD if kind == "call" else token, match.start(), match.end()))
        elif kind == "word" and run.ends_a_value and (sign := _sign_of(low, unit)) and _value_at(text, match.end()):
            spoken = sign == "="
            unit, word = 0, ""
            run.tokens.append((sign, match.start(), match.end()))
        elif kind == "word" and unit < MAX_UNIT_WORDS and run.ends_a_value:
            run.doubtful |= (spoken and unit == 0 and low in _COMPARES) or low in ("times", "am", "pm")
            run.units.add(low)
            unit, word, before = unit + 1, low, low
        else:
            unit = 0
            if run.tokens:
                runs.append(_Run(headless=False))
            word = (word if low == "of" else low) if kind == "word" else ""
            before = low
    return [run for run in runs if any(token in _RELATIONS for token, _, _ in run.tokens)]


def _sign_of(word: str, unit: int) -> str | None:
    """The sign that a word says between two numbers, or behind so many words of the first one's unit."""
    if word in (_EQUALS if unit else _EQUALS_BARE):
        return "="
    return _OPERATES.get(word)


_VALUE = re.compile(r"\s+-?[\d(]")


def _value_at(text: str, at: int) -> bool:
    return _VALUE.match(text, at) is not None


def _equations_of(run: _Run) -> list[Equation]:
    found: list[Equation] = []
    sides, nears = _split_sides(run.tokens)
    doubtful = run.doubtful or _mixes_units(run.units)
    ran_on = False
    for index, (left, right) in enumerate(itertools.pairwise(sides)):
        left, right = _trim_left(left), _trim_right(right)
        if not left or not right:
            continue
        first, second = tuple([token for token, _, _ in left]), tuple([token for token, _, _ in right])
        is_part = run.joined and index == 0 and len(first) == 1
        if len(first) == 1 and "".join(first)[0].isdigit() and len(second) > 1 and "%" not in second[1]:
            first, second = second, first
        worked = len(first) > 1 or "".join(first)[0].isalpha()
        if not worked or len(first) > MAX_SIDE_TOKENS or len(second) > MAX_SIDE_TOKENS:
            continue
        runs_on = _runs_on(first, second)
        doubt = doubtful or runs_on or ran_on or is_part or (run.headless and index == 0)
        doubt = doubt or _holds_a_remark(left) or _holds_a_remark(right)
        ran_on = runs_on
        values = evaluate(first), evaluate(second)
        found.append(Equation(first, second, *values, nears[index], doubt, left[0][1], right[-1][2]))
    return found


def _split_sides(tokens: list[Token]) -> tuple[list[list[Token]], list[bool]]:
    """The sides between the relations, and whether each relation is "about"; empty sides are left out."""
    sides: list[list[Token]] = [[]]
    nears: list[bool] = []
    for token in tokens:
        if token[0] not in _RELATIONS:
            sides[-1].append(token)
        elif sides[-1]:
            sides.append([])
            nears.append(token[0] == "≈")
        elif nears:
            nears[-1] |= token[0] == "≈"
    return [side for side in sides if side], nears


def _trim_left(side: list[Token]) -> list[Token]:
    """A left side from its innermost unclosed bracket on, without operators that hang over."""
    depth, start = 0, 0
    for at in range(len(side) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(side[at][0], 0)
        if depth < 0:
            start = at + 1
            break
    side = side[start:]
    while side and side[-1][0] in _OPERATORS:
        side = side[:-1]
    at = next((i for i, token in enumerate(side) if token[0] not in ("*", "/", "^", "+", "%")), len(side))
    return side[at:]


def _trim_right(side: list[Token]) -> list[Token]:
    """A right side up to a bracket that closes none of its own, without operators that hang over."""
    depth = 0
    for at, token in enumerate(side):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth < 0:
            side = side[:at]
            break
    while side and side[-1][0] in ("+", "-", "*", "/", "^", "("):
        side = side[:-1]
    at = next((i for i, token in enumerate(side) if token[0] not in ("*", "/", "^", "+", "%")), len(side))
    return side[at:]


def _mixes_units(words: set[str]) -> bool:
    """Whether units of one kind and different sizes were passed over: 3 hours + 30 minutes; coins beside $, a sign."""
    known = _sized(words)
    return len(known) > len({kind for kind, _ in known}) or any(kind == "coin" for kind, _ in known)


def _sized(words: set[str]) -> set[tuple[str, object]]:
    """The units among some words, by what they measure and their size."""
    found: set[tuple[str, object]] = set()
    for word in words:
        one = word.removesuffix("s")
        if one in _SIZES:
            found.add((_SIZES[one], one))
        elif unit := unit_of(word):
            found.add(unit)
    return found


def _runs_on(left: tuple[str, ...], right: tuple[str, ...]) -> bool:
    """Whether what is on the right goes on with the result: `20 / 5 = 4 * 6 = 24`, `20 / 5 = 4 - 6 * 4 = 24`."""
    if len(right) < 3 or right[1] not in _OPERATORS:
        return False
    value, first = evaluate(left), read_number(right[0])
    return value is not None and value == first


def _holds_a_remark(side: list[Token]) -> bool:
    """Whether a bracket stands behind a value and a blank: 4 (20 / 5) may be one; 4(5) is a product."""
    return any(
        token == "(" and start > stop and (before == ")" or before[0].isdigit())
        for (before, _, stop), (token, start, _) in itertools.pairwise(side)
    )


def _is_arithmetic(tokens: Sequence[str]) -> bool:
    """Whether a side is numbers and signs only, so that it should have a value: 18 / 0 has none."""
    return all(token[0].isdigit() or token in "+-*/^()%" for token in tokens)


def _without_percent(tokens: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(token for token in tokens if token != "%")


def _ungrouped(tokens: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(token.replace(".", "") if _GROUPED.fullmatch(token) else token for token in tokens)


def _agree(left: Fraction, right: Fraction, said: tuple[str, ...], near: bool) -> bool:
    """Whether two values are equal, or the right one is the left one rounded or cut to the places it is given in."""
    if left == right:
        return True
    bare = _without_percent(said)
    if bare[:1] == ("-",):
        bare = bare[1:]
    number = bare[0] if len(bare) == 1 else ""
    if not number[:1].isdigit():
        return near and abs(left - right) <= abs(left) / 1000
    whole, point, decimals = number.replace(",", "").partition(".")
    place = Fraction(1, 10 ** len(decimals)) / (100 if "%" in said and right != read_number(number) else 1)
    gap = abs(left - right)
    if near and not point:
        zeros = len(whole) - len(whole.rstrip("0")) if whole.strip("0") else 0
        return gap <= place / 2 or gap <= min(place * 10**zeros / 2, abs(left) / 20)
    if not point and not ("%" in said and near):
        return False
    return gap <= place / 2 or (abs(left) > abs(right) and gap < place)
