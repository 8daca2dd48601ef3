"""The value of written arithmetic, exactly, and the operations in it: rationals, an own small grammar, no eval."""

from __future__ import annotations

import math
import re
from fractions import Fraction

MAX_DIGITS = 30
MAX_EXPONENT = 12
MAX_BITS = 256  # of a value's numerator and denominator; powers of powers would take for ever
MAX_SIDE_TOKENS = 60  # of one side of an equation; a longer one is no line of working
MAX_DEPTH = 20

Fact = tuple[object, ...]  # an operation, whichever way round it is written


def read_number(token: str) -> Fraction | None:
    """A plain ASCII decimal as an exact rational, or None."""
    bare = token.replace(",", "")
    if len(bare) > MAX_DIGITS or not bare.isascii() or not re.fullmatch(r"\d+(?:\.\d+)?|\.\d+", bare):
        return None
    return Fraction(bare)


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
    while at < len(tokens) and tokens[at] in ("*", "/", "("):
        sign, start = ("*", at) if tokens[at] == "(" else (tokens[at], at + 1)
        other, after = _power(tokens, start, depth, steps)
        value = _work_out(value, sign, other, steps)
        at = after
    return value, at


def _power(tokens: tuple[str, ...], at: int, depth: int, steps: list[Fact]) -> tuple[Fraction, int]:
    if at < len(tokens) and tokens[at] == "-":
        value, at = _power(tokens, at + 1, depth + 1, steps) if depth < MAX_DEPTH else _fail()
        return -value, at
    value, at = _atom(tokens, at, depth, steps)
    if at < len(tokens) and tokens[at] == "^":
        sign = -1 if tokens[at + 1 : at + 2] == ("-",) else 1
        exponent, at = _atom(tokens, at + 1 + (sign < 0), depth, steps)
        exponent *= sign
        value = _work_out(value, "^", exponent, steps)
    return value, at


def _work_out(first: Fraction, sign: str, second: Fraction, steps: list[Fact]) -> Fraction:
    """One operation, and the fact that it is: + and - say the same about three numbers, as do * and /."""
    if sign == "^":
        if (
            second.denominator != 1
            or abs(second) > MAX_EXPONENT
            or max(first.numerator.bit_length(), first.denominator.bit_length()) > MAX_BITS // 2
        ):
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
    if tokens[at] == "sqrt":
        square, at = _atom(tokens, at + 1, depth + 1, steps) if depth < MAX_DEPTH else _fail()
        return _root(square), at
    if tokens[at] == "(":
        value, at = _sum(tokens, at + 1, depth + 1, steps)
        if at >= len(tokens) or tokens[at] != ")":
            _fail()
    else:
        number = read_number(tokens[at])
        value = _fail()[0] if number is None else number
    if tokens[at + 1 : at + 2] == ("%",):
        return value / 100, at + 2
    return value, at + 1


def _root(square: Fraction) -> Fraction:
    """The square root of what is a square; ValueError for anything else."""
    if square < 0:
        _fail()
    root = Fraction(math.isqrt(square.numerator), math.isqrt(square.denominator))
    return root if root * root == square else _fail()[0]


def _fail() -> tuple[Fraction, int]:
    raise ValueError("not arithmetic")
