"""Word problems from generators, each with three different ways to solve it.

Not a benchmark: a small world in which a model of a few million parameters can learn to compete on a laptop. Which
split a question falls on is decided by a hash of its text, so that the held-out split shares no question with training;
the same numbers may stand in both, about other people and things.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from pkv.config import UserError
from pkv.records import Problem

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 8  # one question in so many is held out

NAMES = ("Ann", "Tom", "Mia", "Ben", "Eva", "Sam", "Ida", "Leo")
GOODS = ("shells", "coins", "books", "apples", "stones", "cards", "nuts", "pens")
MAKERS = (
    ("hives", "candles"),
    ("bakers", "pies"),
    ("hens", "eggs"),
    ("smiths", "swords"),
    ("looms", "cloaks"),
    ("ovens", "loaves"),
    ("cows", "cheeses"),
    ("mints", "medals"),
    ("monks", "scrolls"),
    ("mills", "sacks"),
)


@dataclass(frozen=True)
class Step:
    """One equation of a solution, `left = value`, and what it finds."""

    finds: str
    left: str
    value: int


@dataclass(frozen=True)
class Working:
    """One way to solve a problem: its name, and its steps, the last of which gives the answer."""

    method: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of problem: draws numbers, words the question, solves it in three ways."""

    draw: Callable[[random.Random], tuple[int, ...]]
    word: Callable[[random.Random, tuple[int, ...]], tuple[str, str]]  # question, unit of the answer
    recite: Callable[[tuple[int, ...], str], str]  # what the question gives, from its numbers and the answer's unit
    solve: Callable[[tuple[int, ...]], tuple[Working, ...]]


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """`count` different problems of one split; the same arguments give the same problems. Raises UserError."""
    if split not in SPLITS:
        raise UserError(f"arithmetic:{split}: no such split; expected {' or '.join(SPLITS)}")
    draw = random.Random(f"{split}/{seed}")
    found: dict[str, Problem] = {}
    misses = 0
    while len(found) < count:
        problem = _draw_problem(draw)
        if split_of(problem.question) == split and problem.question not in found:
            found[problem.question] = problem
            misses = 0
        else:
            misses += 1
        if misses > 10_000:
            raise UserError(f"arithmetic:{split}: asked for {count} problems, but there are only about {len(found)}")
    return list(found.values())


def workings(problem: Problem) -> tuple[Working, ...]:
    """The three ways to solve a problem made by `problems`."""
    return KINDS[problem.extra["kind"]].solve(tuple(problem.extra["numbers"]))


def givens(problem: Problem) -> str:
    """What the question of a problem made by `problems` gives, in short."""
    return KINDS[problem.extra["kind"]].recite(tuple(problem.extra["numbers"]), problem.extra["unit"])


def split_of(question: str) -> str:
    """The split that a question belongs to, whatever the seed."""
    return SPLITS[hashlib.sha256(question.encode()).digest()[0] % HELDOUT_SHARE == 0]


def _draw_problem(draw: random.Random) -> Problem:
    kind = draw.choice(sorted(KINDS))
    numbers = KINDS[kind].draw(draw)
    question, unit = KINDS[kind].word(draw, numbers)
    answer = KINDS[kind].solve(numbers)[0].steps[-1].value
    digest = hashlib.sha256(question.encode()).hexdigest()[:12]
    extra = {"kind": kind, "numbers": list(numbers), "unit": unit}
    return Problem(f"{kind}-{digest}", question, str(answer), "arithmetic", extra)


# Rate: a makers make a*r things; how many do a*k makers make?


def _draw_rate(draw: random.Random) -> tuple[int, ...]:
    return draw.randint(2, 3), draw.randint(2, 4), draw.randint(2, 3)


def _word_rate(draw: random.Random, numbers: tuple[int, ...]) -> tuple[str, str]:
    a, r, k = numbers
    makers, things = draw.choice(MAKERS)
    question = draw.choice(
        (
            f"{a} {makers} make {a * r} {things}. How many {things} do {a * k} {makers} make?",
            f"If {a} {makers} make {a * r} {things}, how many {things} come from {a * k} {makers}?",
            f"{a} {makers} need a day for {a * r} {things}. How many {things} do {a * k} {makers} finish?",
        )
    )
    return question, things


def _recite_rate(numbers: tuple[int, ...], unit: str) -> str:
    a, r, k = numbers
    return f"{a} make {a * r} {unit}, now come {a * k}"


def _solve_rate(numbers: tuple[int, ...]) -> tuple[Working, ...]:
    a, r, k = numbers
    total, many = a * r, a * k
    sums = tuple(Step("one more", f"{i * total}+{total}", (i + 1) * total) for i in range(1, k))
    return (
        Working(
            "unit rate",
            (Step("one share", f"{total}/{a}", r), Step("all", f"{many}*{r}", many * r)),
        ),
        Working(
            "scale factor",
            (Step("the factor", f"{many}/{a}", k), Step("the lots", f"{k}*{total}", k * total)),
        ),
        Working("adding lots", sums),
    )


# Left: a boxes of b, c of them given away.


def _draw_left(draw: random.Random) -> tuple[int, ...]:
    return draw.randint(2, 4), draw.randint(4, 6), draw.randint(1, 2)


def _word_left(draw: random.Random, numbers: tuple[int, ...]) -> tuple[str, str]:
    a, b, c = numbers
    name, things = draw.choice(NAMES), draw.choice(GOODS)
    question = draw.choice(
        (
            f"{name} has {a} boxes of {b} {things} and gives {c} away. How many {things} are left?",
            f"{name} fills {a} bags with {b} {things} each, then loses {c}. How many {things} remain?",
        )
    )
    return question, things


def _recite_left(numbers: tuple[int, ...], unit: str) -> str:
    a, b, c = numbers
    return f"{a} hold {b} {unit}, gone are {c}"


def _solve_left(numbers: tuple[int, ...]) -> tuple[Working, ...]:
    a, b, c = numbers
    full, kept = (a - 1) * b, b - c
    return (
        Working("all, then less", (Step("all", f"{a}*{b}", a * b), Step("the rest", f"{a * b}-{c}", a * b - c))),
        Working(
            "the open one apart",
            (
                Step("the open one", f"{b}-{c}", kept),
                Step("the full ones", f"{a - 1}*{b}", full),
                Step("both", f"{full}+{kept}", full + kept),
            ),
        ),
        Working(
            "one by one",
            (
                Step("the full ones", f"{a - 1}*{b}", full),
                Step("one more", f"{full}+{b}", full + b),
                Step("the rest", f"{full + b}-{c}", a * b - c),
            ),
        ),
    )


# Together: one has x, another k times as many; how many together?


def _draw_together(draw: random.Random) -> tuple[int, ...]:
    return draw.randint(2, 6), draw.randint(2, 3)


def _word_together(draw: random.Random, numbers: tuple[int, ...]) -> tuple[str, str]:
    x, k = numbers
    (name, other), things = draw.sample(NAMES, 2), draw.choice(GOODS)
    question = draw.choice(
        (
            f"{name} has {x} {things} and {other} has {k} times as many. How many {things} are there?",
            f"{name} finds {x} {things}, {other} {k} times as many. How many {things} do both have?",
        )
    )
    return question, things


def _recite_together(numbers: tuple[int, ...], unit: str) -> str:
    x, k = numbers
    return f"one has {x} {unit}, the other {k} times"


def _solve_together(numbers: tuple[int, ...]) -> tuple[Working, ...]:
    x, k = numbers
    sums = tuple(Step("one more", f"{i * x}+{x}", (i + 1) * x) for i in range(1, k + 1))
    return (
        Working("the larger share", (Step("the others", f"{k}*{x}", k * x), Step("both", f"{k * x}+{x}", k * x + x))),
        Working("parts", (Step("the parts", f"{k}+1", k + 1), Step("all", f"{k + 1}*{x}", (k + 1) * x))),
        Working("adding shares", sums),
    )


KINDS: dict[str, Kind] = {
    "rate": Kind(_draw_rate, _word_rate, _recite_rate, _solve_rate),
    "left": Kind(_draw_left, _word_left, _recite_left, _solve_left),
    "together": Kind(_draw_together, _word_together, _recite_together, _solve_together),
}
