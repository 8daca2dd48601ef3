"""Scores long competitions and says where the time goes: `python benchmarks/rewards.py [--count N --tokens T]`.

Prints one JSON object: competitions a second with all workers, and milliseconds a competition by reward in one process
(work that several rewards share is charged to the first that asks for it).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from functools import partial

from pkv.competition import compose, parse
from pkv.config import RewardConfig
from pkv.mathcheck import VerifyPool, is_right
from pkv.records import FIGHTERS, Problem
from pkv.rewards import RULES, ScoringPool
from pkv.rewards.context import Context

OPTIMUM = 3000  # a fighter's tokens that earn the most
SPEECH = {
    "pirate": ("Arr, by the tide", "Wait, matey, that be wrong", "Aye, the treasure adds up"),
    "knight": ("By my honour", "Alas, I erred there", "Thus is it proven"),
    "viking": ("By Odin's beard", "Hold, that was a mistake", "The axe falls true"),
}
SUBJECTS = ("the first chest", "one more share", "what is left", "the whole convoy", "the second half", "each barrel")
VERBS = ("comes to", "must be", "works out as", "is", "gives us", "can only be")
REASONS = (
    "because every ship carries the same load and none may be counted twice",
    "since the remainder was given away before the others arrived",
    "which follows when the whole is split into parts of equal size",
    "and the same number appears if we walk through the sum backwards",
    "so that nothing is lost between the harbour and the market",
)


def competition(problem: Problem, tokens: int, draw: random.Random) -> str:
    """A response of about `tokens` words and signs: three fighters of equal length and a judge of a tenth."""
    fights = {name: fight(name, problem, int(0.29 * tokens), draw) for name in FIGHTERS}
    judged = " ".join(line("pirate", draw) for _ in range(tokens // 350))
    verdict = f"Beep. {judged} The knight is right, the answer {problem.answer} checks."
    return compose(fights, verdict, "knight", f"The total is {problem.answer}.\nAnswer: {problem.answer}")


def fight(name: str, problem: Problem, tokens: int, draw: random.Random) -> str:
    """A fighter's working, with a mistake mended now and then, and its answer."""
    lines: list[str] = []
    said = 0
    while said < tokens:
        lines.append(line(name, draw))
        said += 34
    return " ".join([*lines, f"So the answer is {problem.answer}."])


def line(name: str, draw: random.Random) -> str:
    """Some 34 words and signs: a step, at times in LaTeX, at times wrong and mended."""
    a, b = draw.randint(3, 99), draw.randint(3, 99)
    sign, value = draw.choice((("+", a + b), ("*", a * b)))
    opening, cue, closing = SPEECH[name]
    step = f"\\({a} \\times {b} = {a * b}\\)" if sign == "*" and draw.random() < 0.5 else f"{a} {sign} {b} = {value}"
    said = f"{opening}, {draw.choice(SUBJECTS)} {draw.choice(VERBS)} {step}, {draw.choice(REASONS)}."
    if draw.random() < 0.15:
        said += f" {a} {sign} {b} = {value + 1}. {cue}: {a} {sign} {b} = {value}."
    return f"{said} {closing}." if draw.random() < 0.3 else said


def throughput(pairs: list[tuple[Problem, str]], workers: int) -> float:
    """Competitions a second, parsed and scored in `workers` processes, their start left out."""
    with ScoringPool({"correctness": 1.0}, OPTIMUM, RewardConfig(workers=workers)) as pool:
        for future in [pool.submit(*pairs[0]) for _ in range(4 * workers)]:
            future.result()
        began = time.perf_counter()
        cards = [future.result()[1] for future in [pool.submit(*pair) for pair in pairs]]
        seconds = time.perf_counter() - began
    if any(card.unscored for card in cards):
        raise SystemExit("some rewards failed: the figures would mean nothing")
    return len(pairs) / seconds


def by_reward(pairs: list[tuple[Problem, str]]) -> dict[str, float]:
    """Median milliseconds of the parser and of each reward, dearest first."""
    spent: dict[str, list[float]] = {}
    with VerifyPool(workers=1) as pool:
        for problem, text in pairs:
            began = time.perf_counter()
            context = Context(problem, parse(text), OPTIMUM, partial(is_right, pool=pool))
            spent.setdefault("parse", []).append(time.perf_counter() - began)
            for name, rule in RULES.items():
                began = time.perf_counter()
                rule.measure(context)
                spent.setdefault(name, []).append(time.perf_counter() - began)
    medians = {name: round(1e3 * statistics.median(seconds), 3) for name, seconds in spent.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def main() -> None:
    arguments = argparse.ArgumentParser(description="Scores long competitions and says where the time goes.")
    arguments.add_argument("--count", type=int, default=1000)
    arguments.add_argument("--tokens", type=int, default=11_000)
    arguments.add_argument("--workers", type=int, default=2)
    chosen = arguments.parse_args()
    draw = random.Random(0)
    problems = [Problem(str(i), f"How many barrels are {i} and {i + 7}?", str(2 * i + 7)) for i in range(chosen.count)]
    pairs = [(problem, competition(problem, chosen.tokens, draw)) for problem in problems]
    sizes = [parse(text).token_owners.size for _, text in pairs[:50]]
    print(
        json.dumps(
            {
                "competitions": chosen.count,
                "tokens_mean": round(statistics.mean(sizes)),
                "characters_mean": round(statistics.mean(len(text) for _, text in pairs)),
                "workers": chosen.workers,
                "competitions_per_s": round(throughput(pairs, chosen.workers), 2),
                "milliseconds": by_reward(pairs[: min(100, chosen.count)]),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
