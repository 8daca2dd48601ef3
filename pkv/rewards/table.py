"""The table of all rewards: name, family, owner, range, function. What is not here is no reward of pkv's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pkv.records import FIGHTERS
from pkv.rewards.context import Context
from pkv.rewards.format import competition_format, tag_structure
from pkv.rewards.judge import judge_accuracy, judge_reasoning
from pkv.rewards.length import length
from pkv.rewards.originality import originality
from pkv.rewards.outcome import correctness, fighter_correctness, winner
from pkv.rewards.reflection import reflection


@dataclass(frozen=True)
class Rule:
    """One reward: `measure` gives a value in [low, high], or None where it doesn't apply; `owner`: of REWARD_OWNERS."""

    name: str
    family: str
    owner: str
    low: float
    high: float
    measure: Callable[[Context], float | None]


_RULES = (
    Rule("tag_structure", "format", "tags", 0, 1, tag_structure),
    Rule("competition_format", "format", "tags", 0, 1, competition_format),
    *(Rule(f"length_{name}", "length", name, 0, 1, partial(length, name)) for name in FIGHTERS),
    *(Rule(f"reflection_{name}", "reflection", name, 0, 1, partial(reflection, name)) for name in FIGHTERS),
    Rule("originality_knight", "originality", "knight", -0.5, 0.5, partial(originality, "knight", ("pirate",))),
    Rule(
        "originality_viking", "originality", "viking", -0.5, 0.5, partial(originality, "viking", ("pirate", "knight"))
    ),
    Rule("winner", "outcome", "judge", 0, 1, winner),
    Rule("correctness", "outcome", "answer", -1, 1, correctness),
    *(
        Rule(f"fighter_correctness_{name}", "fighter_correctness", name, 0, 1, partial(fighter_correctness, name))
        for name in FIGHTERS
    ),
    Rule("judge_accuracy", "judge", "judge", 0, 1, judge_accuracy),
    Rule("judge_reasoning", "judge", "judge", 0, 1, judge_reasoning),
)
RULES: dict[str, Rule] = {rule.name: rule for rule in _RULES}
FAMILIES: dict[str, tuple[str, ...]] = {
    family: tuple(rule.name for rule in _RULES if rule.family == family)
    for family in dict.fromkeys(rule.family for rule in _RULES)
}
# SPEC's scale, with one exception: a right answer weighs 12, because all the others together swing by 11 (format 2,
# length 3, reflection 3, originality 2, winner 1), and being right must outweigh them. pkv's own rewards are off.
DEFAULT_WEIGHTS: dict[str, float] = {
    "format": 1.0,
    "length": 1.0,
    "reflection": 1.0,
    "originality": 1.0,
    "winner": 1.0,
    "correctness": 12.0,
}
