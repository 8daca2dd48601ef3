"""Equations in running text, English or LaTeX: where they stand, what they say, whether they hold.

Not a judge of answers (that is mathcheck): this reads the arithmetic that a fighter shows, so that a correction can be
seen to change something, a copied method to be the same one, and a judge's check to be a check. Exact rationals, an own
small grammar, linear in the text's length.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 12
MAX_EXPONENT = 12
MAX_BITS = 256  # of a value's numerator and denominator; powers of powers would take for ever
MAX_SIDE_TOKENS = 60  # of one side of an equation; a longer one is no line of working
MAX_DEPTH = 20
MAX_UNIT_WORDS = 3  # between a number and the sign behind it: "20 fine candles / 5 good hives"

_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:d|t)?frac\{([^{}]{1,40})\}\{([^{}]{1,40})\}", r"((\1)/(\2))"),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])|[×·⋅∗]", "*"),
        (r"\\div(?![A-Za-z])|[÷∕]", "/"),
        (r"\\approx(?![A-Za-z])|≈|==", "="),
        (r"[−–]", "-"),
        (r"\\(?:left|right|quad|qquad|boxed|mathbf|displaystyle)(?![A-Za-z])|\\[,;:!() \[\]]|[$&{}%€£]", " "),
        (r"(?<=[\d)])\s+(?:divided by|over)\s+(?=[\d(])", " / "),
        (r"(?<=[\d)])\s+(?:times|multiplied by)\s+(?=[\d(])", " * "),
        (r"(?<=[\d)])\s+plus\s+(?=[\d(])", " + "),
        (r"(?<=[\d)])\s+minus\s+(?=[\d(])", " - "),
        (r"(?<=[\d)])\s+(?:equals|is equal to|makes|gives|is)\s+(?=[-\d(])", " = "),
        (r"(?<=[\d)])\s*(?:[-=]>|[→⟶⇒]|\\(?:to|[Rr]ightarrow)(?![A-Za-z]))\s*(?=[-\d(])", " = "),
        (r"\*\*(?=\s*\d)(?<=\d\*\*)", "^"),
    )
)
# A number, a sign, a variable (one letter; "a", "i" and "I" are English words), or one unit word that is passed over.
_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?)|(?P<sign>[-+*/^()=])"
    r"|(?P<letter>[b-hj-zB-HJ-Z](?![^\W_]))|(?P<word>[^\W\d_]+)|(?P<space>\s+)|(?P<other>.)",
    re.S,
)


Fact = tuple[object, ...]


@dataclass(frozen=True)
class Equation:
    """`left = right`, the working on the left: `4 = 20 / 5` is turned round.

    left_value, right_value: None where a side has a variable. at, stop: its characters in the normalised text.
    """

    left: tuple[str, ...]
    right: tuple[str, ...]
    left_value: Fraction | None
    right_value: Fraction | None
    at: int
    stop: int

    @property
    def holds(self) -> bool | None:
        """Whether both sides are equal (to the decimals that the right one is given in); None: not known."""
        if self.left_value is None or self.right_value is None:
            return None
        if self.left_value == self.right_value:
            return True
        _, point, decimals = self.right[-1].partition(".")
        rounding = Fraction(1, 2 * 10 ** len(decimals)) if point and len(self.right) == 1 else Fraction(0)
        return rounding > 0 and abs(self.left_value - self.right_value) <= rounding

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


def normalise(text: str) -> str:
    """The text with LaTeX's and English's operators written as signs; what is no mathematics stays."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def read_number(token: str) -> Fraction | None:
    """A plain ASCII decimal as an exact rational, or None."""
    bare = token.replace(",", "")
    if len(bare) > MAX_DIGITS or not bare.isascii() or not re.fullmatch(r"\d+(?:\.\d+)?", bare):
        return None
    return Fraction(bare)


def numbers(text: str) -> list[Fraction]:
    """The numbers in a text, in order."""
    found = (read_number(match["number"]) for match in _TOKEN.finditer(text) if match["number"])
    return [value for value in found if value is not None]


def find_equations(normalised: str) -> list[Equation]:
    """The equations of a normalised text in order; `a = b = c` is two of them. A left side without working is none."""
    found: list[Equation] = []
    for run in _runs(normalised):
        sides = _split_sides(run)
        for left, right in itertools.pairwise(sides):
            first, second = tuple([token for token, _, _ in left]), tuple([token for token, _, _ in right])
            if len(first) == 1 and first[0][0].isdigit() and len(second) > 1:
                first, second = second, first
            worked = len(first) > 1 or "".join(first).isalpha()
            if worked and len(first) <= MAX_SIDE_TOKENS and len(second) <= MAX_SIDE_TOKENS:
                found.append(Equation(first, second, evaluate(first), evaluate(second), left[0][1], right[-1][2]))
    return found


def _runs(text: str) -> list[list[tuple[str, int, int]]]:
    """Stretches of mathematics: tokens with their characters; a unit after a number ("20 candles / 5") is left out."""
    runs: list[list[tuple[str, int, int]]] = [[]]
    unit = 0  # words since the last number
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup
        if kind in ("number", "sign", "letter"):
            if unit and not (kind == "sign" and match[0] != "("):
                runs.append([])
            unit = 0
            runs[-1].append((match[0], match.start(), match.end()))
        elif kind == "word" and unit < MAX_UNIT_WORDS and runs[-1] and runs[-1][-1][0][0].isdigit():
            unit += 1
        elif kind != "space":
            unit = 0
            if runs[-1]:
                runs.append([])
    return [run for run in runs if any(token == "=" for token, _, _ in run)]


def _split_sides(run: list[tuple[str, int, int]]) -> list[list[tuple[str, int, int]]]:
    """The sides of a run between its equals signs, without operators that hang over; empty ones are left out."""
    sides: list[list[tuple[str, int, int]]] = [[]]
    for token in run:
        if token[0] == "=":
            sides.append([])
        else:
            sides[-1].append(token)
    for side in sides:
        while side and side[-1][0] in "+-*/^(":
            side.pop()
        start = next((i for i, token in enumerate(side) if token[0] not in "*/^)+"), len(side))
        del side[:start]
    return [side for side in sides if side]


def evaluate(tokens: tuple[str, ...], steps: list[Fact] | None = None) -> Fraction | None:
    """The value of + - * / ^ and brackets over plain numbers, exactly; None where it has none or is too large.

    steps: takes the operations, in the order in which they are worked out.
    """
    if len(tokens) > MAX_SIDE_TOKENS:
        return None
    try:
        value, at = _sum(tokens, 0, 0, [] if steps is None else steps)
    except (ValueError, ZeroDivisionError):
        return None
    return value if at == len(tokens) else None


def _sum(tokens: tuple[str, ...], at: int, depth: int, steps: list[Fact]) -> tuple[Fraction, int]:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    value, at = _product(tokens, at, depth, steps)
    while at < len(tokens) and tokens[at] in "+-":
        other, after = _product(tokens, at + 1, depth, steps)
        value = _work_out(value, tokens[at], other, steps)
        at = after
    return value, at


def _product(tokens: tuple[str, ...], at: int, depth: int, steps: list[Fact]) -> tuple[Fraction, int]:
    value, at = _power(tokens, at, depth, steps)
    while at < len(tokens) and tokens[at] in "*/":
        other, after = _power(tokens, at + 1, depth, steps)
        value = _work_out(value, tokens[at], other, steps)
        at = after
    return value, at


def _power(tokens: tuple[str, ...], at: int, depth: int, steps: list[Fact]) -> tuple[Fraction, int]:
    if at < len(tokens) and tokens[at] == "-":
        value, at = _power(tokens, at + 1, depth + 1, steps) if depth < MAX_DEPTH else _fail()
        return -value, at
    value, at = _atom(tokens, at, depth, steps)
    if at < len(tokens) and tokens[at] == "^":
        exponent, at = _atom(tokens, at + 1, depth, steps)
        value = _work_out(value, "^", exponent, steps)
    return value, at


def _work_out(first: Fraction, sign: str, second: Fraction, steps: list[Fact]) -> Fraction:
    """One operation, and the fact that it is: + and - say the same about three numbers, as do * and /."""
    if sign == "^":
        if second.denominator != 1 or not 0 <= second <= MAX_EXPONENT:
            _fail()
        value = first**second.numerator
        fact: Fact = ("^", first, second)
    elif sign in "+*":
        value = first + second if sign == "+" else first * second
        fact = (sign, frozenset((first, second)), value)
    else:
        value = first - second if sign == "-" else first / second
        fact = ("+" if sign == "-" else "*", frozenset((value, second)), first)
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("too large")
    steps.append(fact)
    return value


def _atom(tokens: tuple[str, ...], at: int, depth: int, steps: list[Fact]) -> tuple[Fraction, int]:
    if at >= len(tokens):
        _fail()
    if tokens[at] == "(":
        value, at = _sum(tokens, at + 1, depth + 1, steps)
        if at >= len(tokens) or tokens[at] != ")":
            _fail()
        return value, at + 1
    value = read_number(tokens[at])
    return (value, at + 1) if value is not None else _fail()


def _fail() -> tuple[Fraction, int]:
    raise ValueError("not arithmetic")
