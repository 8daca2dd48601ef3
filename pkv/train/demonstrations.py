"""Synthetic competitions for the warm-up: whole responses written by rule, right and wrong, honest and copied.

Three fighters solve the problem in three different ways; at times one copies another, errs and mends it, or stops a
step too early and is passed over by the judge; and the layout is not always the exact one. The warm-up shows the model
what a competition is. Which competitions are good is left for GRPO to find out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pkv.competition import compose
from pkv.config import WarmupConfig
from pkv.data.arithmetic import KINDS, Step, Working, givens, workings
from pkv.records import FIGHTERS, Problem


@dataclass(frozen=True)
class Voice:
    """How a character talks; {given}, {finds}, {left}, {value}, {answer} and {rival} are filled in.

    One wording for each thing: what a model of this size gains from a choice of words is noise in its gradients, in
    the warm-up and, much more, in GRPO.
    """

    opening: str
    jab: str
    recital: str
    step: str
    cue: str
    check: str
    closing: str


VOICES: dict[str, Voice] = {
    "pirate": Voice(
        "Arr, mateys!",
        "The {rival} is shark food!",
        "I spy this: {given}.",
        "I plunder {finds}: {left}={value}.",
        "Arr, no, that be wrong!",
        "I sail back: {left}={value}, aye.",
        "Me answer is {answer}.",
    ),
    "knight": Voice(
        "By my honour!",
        "I shall unhorse the {rival}.",
        "We are told: {given}.",
        "I seek {finds}: {left}={value}.",
        "Alas, I erred, I must amend it!",
        "I verify: {left}={value}, as is just.",
        "Thus the answer is {answer}.",
    ),
    "viking": Voice(
        "Thor, guide me!",
        "The {rival} rows like a child.",
        "The runes say: {given}.",
        "I hew {finds}: {left}={value}.",
        "By Loki, a mistake, I strike again!",
        "I row back: {left}={value}, strong.",
        "The saga ends: the answer is {answer}.",
    ),
}
# The shares of fighters that jab at a rival, that say first what is given, and that check every step of their own.
JABS, RECITALS, CHECKS = 0.15, 0.4, 0.15
MENDED = 0.25  # the share of mistakes that the fighter notices; the others are left for the judge to see
UNDONE = {"+": "-", "-": "+", "*": "/", "/": "*"}


@dataclass(frozen=True)
class Attempt:
    """What a fighter does: the steps it writes, the slip that it mends (step index, wrong value), and its answer."""

    steps: tuple[Step, ...]
    slip: tuple[int, int] | None
    answer: int
    source: str  # the fighter whose voice the steps are written in: another one's when they are copied


def demonstrate(problem: Problem, draw: random.Random, config: WarmupConfig) -> str:
    """A whole response to `problem`, a different one for each state of `draw`."""
    attempts = _attempt_all(problem, draw, config)
    gold = int(problem.answer)
    texts = {name: _speak(name, attempts, givens(problem), draw) for name in FIGHTERS}
    right = [name for name in FIGHTERS if attempts[name].answer == gold]
    winner = min(right, key=lambda name: len(texts[name].split()))
    answer = f"There are {gold} {problem.extra['unit']}.\nAnswer: {gold}"
    text = compose(texts, _judge(attempts, winner, gold), winner, answer)
    return _loosen(text, draw) if draw.random() < config.loose_layout else text


def can_demonstrate(problem: Problem) -> bool:
    """Whether the problem came from a generator that knows how to solve it."""
    return problem.extra.get("kind") in KINDS and "numbers" in problem.extra


def _attempt_all(problem: Problem, draw: random.Random, config: WarmupConfig) -> dict[str, Attempt]:
    ways = list(workings(problem))
    draw.shuffle(ways)
    attempts = {name: _try(name, way, draw, config.mistakes) for name, way in zip(FIGHTERS, ways, strict=True)}
    if draw.random() < config.copying:
        thief, victim = draw.choice((("knight", "pirate"), ("viking", "pirate"), ("viking", "knight")))
        attempts[thief] = attempts[victim]
    if all(attempt.answer != int(problem.answer) for attempt in attempts.values()):
        attempts["pirate"] = _attempt("pirate", ways[0])
    return attempts


def _try(name: str, way: Working, draw: random.Random, mistakes: float) -> Attempt:
    if draw.random() >= mistakes:
        return _attempt(name, way)
    return _mend(name, way, draw) if draw.random() < MENDED else _err(name, way, draw)


def _attempt(name: str, way: Working) -> Attempt:
    return Attempt(way.steps, None, way.steps[-1].value, name)


def _mend(name: str, way: Working, draw: random.Random) -> Attempt:
    at = draw.randrange(len(way.steps))
    return Attempt(way.steps, (at, _wrong(way.steps[at].value, draw)), way.steps[-1].value, name)


def _err(name: str, way: Working, draw: random.Random) -> Attempt:
    """An attempt that takes a step for the answer which isn't the last; where there is but one, it goes wrong."""
    *before, last = way.steps
    if before:
        return Attempt(tuple(before), None, before[-1].value, name)
    wrong = Step(last.finds, last.left, _wrong(last.value, draw))
    return Attempt((wrong,), None, wrong.value, name)


def _wrong(value: int, draw: random.Random) -> int:
    return value + draw.choice((1, 2, 10)) * (1 if value < 3 else draw.choice((-1, 1)))


def _speak(name: str, attempts: dict[str, Attempt], given: str, draw: random.Random) -> str:
    attempt, own = attempts[name], VOICES[name]
    voice = VOICES[attempt.source]
    said = [own.opening]
    if draw.random() < JABS:
        said.append(own.jab.format(rival=draw.choice([other for other in FIGHTERS if other != name])))
    if draw.random() < RECITALS:
        said.append(own.recital.format(given=given))
    checks = draw.random() < CHECKS
    for at, step in enumerate(attempt.steps):
        value = step.value
        if attempt.slip and attempt.slip[0] == at:
            said.append(voice.step.format(finds=step.finds, left=step.left, value=attempt.slip[1]))
            said.append(f"{own.cue} {step.left}={value}.")
        else:
            said.append(voice.step.format(finds=step.finds, left=step.left, value=value))
        if checks:
            said.append(voice.check.format(**_reverse(step)))
    said.append(own.closing.format(answer=attempt.answer))
    return " ".join(said)


def _reverse(step: Step) -> dict[str, str | int]:
    """The equation that undoes a step's operation: 20/5=4 gives 4*5=20."""
    known, operator, operand = _parts(step)
    return {"left": f"{step.value}{UNDONE[operator]}{operand}", "value": known}


def _worked_out(step: Step) -> int:
    """What a step's left side comes to, whatever its writer said."""
    known, operator, operand = _parts(step)
    return {"+": known + operand, "-": known - operand, "*": known * operand, "/": known // operand}[operator]


def _parts(step: Step) -> tuple[int, str, int]:
    at = next(at for at, sign in enumerate(step.left) if sign in UNDONE)
    return int(step.left[:at]), step.left[at], int(step.left[at + 1 :])


def _judge(attempts: dict[str, Attempt], winner: str, gold: int) -> str:
    """What each fighter ends with, worked out once more, before it is called right or wrong; then the choice.

    So every word that is hard to say follows from what stands right before it: a small model can learn to look.
    """
    said = ["Beep."]
    for name in FIGHTERS:
        last = attempts[name].steps[-1]
        verdict = "right" if attempts[name].answer == gold else "wrong"
        said.append(f"The {name} ends with {last.finds}: {last.left}={_worked_out(last)}, {verdict}.")
    wrong = [name for name in FIGHTERS if attempts[name].answer != gold]
    said.append(f"The {wrong[0]} cannot count." if wrong else "How dull.")
    said.append(f"I name the {winner}.")
    return " ".join(said)


def _loosen(text: str, draw: random.Random) -> str:
    """The same tags in the same order, laid out carelessly: one or two line breaks become spaces or blank lines."""
    head, end, tail = text.partition("</competition>")
    lines = head.split("\n")
    for at in draw.sample(range(len(lines) - 1), draw.randint(1, 2)):
        lines[at] += draw.choice((" ", "\n\n"))
    breaks = ["" if line.endswith((" ", "\n")) else "\n" for line in lines[:-1]] + [""]
    return "".join(line + ending for line, ending in zip(lines, breaks, strict=True)) + end + tail
