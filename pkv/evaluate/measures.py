"""What scored groups say about a model, as numbers by the names that logs and files use."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pkv.evaluate.groups import Source, sample_groups
from pkv.hosts import share, together
from pkv.records import FIGHTERS, Group, Prompt, Rollout
from pkv.rewards import ScoringPool

JUDGE = ("any_right", "majority_right", "right", "disagree", "gain")
OVERLAPS = ("overlap/knight_pirate", "overlap/viking_pirate", "overlap/viking_knight")
LENGTHS = tuple(f"length/{name}" for name in (*FIGHTERS, "result", "answer"))
RIGHT = tuple(f"right/{name}" for name in FIGHTERS)
FACTS = ("winner", *RIGHT, *OVERLAPS, *LENGTHS, *(f"judge/{name}" for name in JUDGE))

Row = Mapping[str, Any]  # of one rollout, from `measured`


@dataclass(frozen=True)
class Evaluation:
    """metrics: by name, of all prompts. groups: what was said to this host's share of them."""

    metrics: dict[str, float]
    groups: list[Group]


def evaluate(
    source: Source,
    prompts: Sequence[Prompt],
    scoring: ScoringPool,
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    on_rollout: Any = None,
) -> Evaluation:
    """Answer every prompt `samples` times and measure the answers; each host has its share of the prompts."""
    groups = sample_groups(
        source,
        share(prompts),
        samples=samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        purpose="evaluate",
        scoring=scoring,
        on_rollout=on_rollout,
    ).scored()
    return Evaluation(summarise(together(measured(groups))), groups)


def measured(groups: Sequence[Group]) -> list[Row]:
    """Plain numbers of every rollout: all that metrics need of it, and what hosts tell each other.

    rewards: name -> value or None. failed: name -> why. facts: some of the scorecard's. kl_policy: see `policy_kl`.
    """
    return [
        {
            "problem": group.prompt.problem.id,
            "total": card.total,
            "rewards": {name: reward.value for name, reward in card.rewards.items()},
            "failed": {name: card.rewards[name].detail for name in card.unscored},
            "facts": {name: card.facts[name] for name in FACTS},
            "tokens": len(rollout.tokens),
            "finish": rollout.finish,
            "policy_step": rollout.policy_step,
            "kl_policy": policy_kl(rollout),
        }
        for group in groups
        for rollout, card in zip(group.rollouts, group.cards, strict=True)
    ]


def policy_kl(rollout: Rollout) -> float | None:
    """How far what was sampled from lies from the policy, nats a token that was drawn; None where all were forced."""
    drawn = np.ones(len(rollout.tokens), bool) if rollout.forced is None else ~rollout.forced
    return float(np.mean((rollout.logprobs - rollout.policy_logprobs)[drawn])) if drawn.any() else None


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Means over all rollouts; a reward's mean is over those that it applies to, and a name without any is left out.

    accuracy: share of right final answers. format: share with all tags in order. overlap/<fighter>: with what it
    could have copied. length/*: tokens; length/terminated: of
    responses that ended by themselves. judge/*: see `rewards.judge.measure`; judge/winner_entropy: bits.
    judge/position_bias: how far the winners are from an even draw where merit doesn't tell the fighters apart, all of
    them being right or all wrong (total variation; 0 even, 2/3 always the same one).
    judge/lift: how much more often the named fighter was right, where fighters disagree, than the same names would have
    been if dealt out at random among those responses: what the judge sees, beyond whom it trusts.
    """
    facts = [row["facts"] for row in rows]
    found: dict[str, float | None] = {
        "accuracy": _mean(_at_least(row, "correctness", 1.0) for row in rows),
        "format": _mean(_at_least(row, "competition_format", 0.5) for row in rows),
        "reward/total": _mean(row["total"] for row in rows),
        "unscored": _mean(float(bool(row["failed"])) for row in rows),
        "length/tokens": _mean(row["tokens"] for row in rows),
        "length/terminated": _mean(row["tokens"] for row in rows if row["finish"] != "length"),
        "truncated": _mean(float(row["finish"] == "length") for row in rows),
        "overlap/knight": _mean(fact["overlap/knight_pirate"] for fact in facts),
        "overlap/viking": _mean(max(fact["overlap/viking_pirate"], fact["overlap/viking_knight"]) for fact in facts),
        "sampler/kl_policy": _mean(row["kl_policy"] for row in rows),
    }
    for name in rows[0]["rewards"] if rows else ():
        found[f"reward/{name}"] = _mean(row["rewards"][name] for row in rows)
    for name in (*LENGTHS, *(f"judge/{name}" for name in JUDGE)):
        found[name] = _mean(fact[name] for fact in facts)
    winners = _winners(facts)
    for name in FIGHTERS:
        found[f"judge/winner_{name}"] = winners[name] / winners.total() if winners else None
    found["judge/winner_entropy"] = _entropy(winners)
    found["judge/position_bias"] = _position_bias([fact for fact in facts if fact["judge/disagree"] is False])
    found["judge/lift"] = _lift([fact for fact in facts if fact["judge/disagree"] and fact["winner"]])
    return {name: value for name, value in found.items() if value is not None}


def _at_least(row: Row, name: str, least: float) -> float | None:
    value = row["rewards"][name]
    return None if value is None else float(value >= least)


def _mean(values: Iterable[float | bool | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _winners(facts: Sequence[Row]) -> Counter[str]:
    return Counter(fact["winner"] for fact in facts if fact["winner"])


def _entropy(counts: Counter[str]) -> float:
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if total else 0.0


def _position_bias(facts: Sequence[Row]) -> float | None:
    winners = _winners(facts)
    total = winners.total()
    return sum(abs(winners[name] / total - 1 / len(FIGHTERS)) for name in FIGHTERS) / 2 if total else None


def _lift(facts: Sequence[Row]) -> float | None:
    if not facts:
        return None
    winners = _winners(facts)
    rates = {name: sum(bool(fact[f"right/{name}"]) for fact in facts) / len(facts) for name in FIGHTERS}
    by_chance = sum(winners[name] / len(facts) * rates[name] for name in FIGHTERS)
    return sum(bool(fact["judge/right"]) for fact in facts) / len(facts) - by_chance
