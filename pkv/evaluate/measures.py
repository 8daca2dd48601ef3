"""What scored groups say about a model, as numbers by the names that logs and files use."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pkv.evaluate.groups import Source, sample_groups
from pkv.records import FIGHTERS, Group, Prompt, Scorecard
from pkv.rewards import ScoringPool

JUDGE = ("any_right", "majority_right", "right", "disagree", "gain")


@dataclass(frozen=True)
class Evaluation:
    """metrics: by name. groups: what was said."""

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
    """Answer every prompt `samples` times and measure the answers."""
    groups = sample_groups(
        source,
        prompts,
        samples=samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        purpose="evaluate",
        scoring=scoring,
        on_rollout=on_rollout,
    ).scored()
    return Evaluation(summarise(groups), groups)


def summarise(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all rollouts; a reward's mean is over those that it applies to, and a name without any is left out.

    accuracy: share of right final answers. format: share with all tags in order. overlap/<fighter>: with what it
    could have copied. length/*: tokens; length/terminated: of
    responses that ended by themselves. judge/*: see `rewards.judge.measure`; judge/winner_entropy: bits.
    judge/position_bias: how far the winners are from an even draw where merit doesn't tell the fighters apart, all of
    them being right or all wrong (total variation; 0 even, 2/3 always the same one).
    """
    cards = [card for group in groups for card in group.cards]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    found: dict[str, float | None] = {
        "accuracy": _mean(_at_least(card, "correctness", 1.0) for card in cards),
        "format": _mean(_at_least(card, "competition_format", 0.5) for card in cards),
        "reward/total": _mean(card.total for card in cards),
        "unscored": _mean(float(bool(card.unscored)) for card in cards),
        "length/tokens": _mean(len(rollout.tokens) for rollout in rollouts),
        "length/terminated": _mean(len(rollout.tokens) for rollout in rollouts if rollout.finish != "length"),
        "truncated": _mean(float(rollout.finish == "length") for rollout in rollouts),
        "overlap/knight": _mean(card.facts["overlap/knight_pirate"] for card in cards),
        "overlap/viking": _mean(
            max(card.facts["overlap/viking_pirate"], card.facts["overlap/viking_knight"]) for card in cards
        ),
        "sampler/kl_policy": _mean(float(np.mean(r.logprobs - r.policy_logprobs)) for r in rollouts),
    }
    for name in cards[0].rewards if cards else ():
        found[f"reward/{name}"] = _mean(card.rewards[name].value for card in cards)
    for name in (*FIGHTERS, "result", "answer"):
        found[f"length/{name}"] = _mean(card.facts[f"length/{name}"] for card in cards)
    for name in JUDGE:
        found[f"judge/{name}"] = _mean(card.facts[f"judge/{name}"] for card in cards)
    winners = Counter(card.facts["winner"] for card in cards if card.facts["winner"])
    for name in FIGHTERS:
        found[f"judge/winner_{name}"] = winners[name] / winners.total() if winners else None
    found["judge/winner_entropy"] = _entropy(winners)
    found["judge/position_bias"] = _position_bias(card for card in cards if card.facts["judge/disagree"] is False)
    return {name: value for name, value in found.items() if value is not None}


def _at_least(card: Scorecard, name: str, least: float) -> float | None:
    value = card.rewards[name].value
    return None if value is None else float(value >= least)


def _mean(values: Iterable[float | bool | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _entropy(counts: Counter[str]) -> float:
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if total else 0.0


def _position_bias(cards: Iterable[Scorecard]) -> float | None:
    winners = Counter(card.facts["winner"] for card in cards if card.facts["winner"])
    total = winners.total()
    return sum(abs(winners[name] / total - 1 / len(FIGHTERS)) for name in FIGHTERS) / 2 if total else None
