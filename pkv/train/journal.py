"""What a step leaves behind: its line of metrics, its rollouts as rows, what the bar shows."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pkv.config import UserError
from pkv.records import Group
from pkv.train.credit import Credit
from pkv.train.rounds import Stage


def step_metrics(
    stage: Stage,
    summary: Mapping[str, float],
    policy: Mapping[str, float],
    credit: Credit,
    generated: int,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """One line of metrics.jsonl. perf/tokens_per_s: generated tokens a second of sampling, scoring included."""
    trained = sum(len(sequence.response) for sequence in credit.sequences)
    owners = Counter(owner for group in credit.by_owner for sample in group for owner in sample)
    magnitude: Counter[str] = Counter()
    for group in credit.by_owner:
        for sample in group:
            magnitude.update({owner: abs(value) for owner, value in sample.items()})
    return {
        "round": stage.name,
        "phase": "grpo",
        **summary,
        "loss": policy["loss"],
        **{f"policy/{name}": value for name, value in policy.items() if name != "loss"},
        "policy/learning_rate": stage.required_round.learning_rate,
        "groups/silent": credit.silent,
        **{f"advantage/{owner}": magnitude[owner] / count for owner, count in owners.items()},
        "perf/tokens_per_s": generated / seconds["sample"],
        "perf/update_tokens_per_s": trained / seconds["update"],
        **{f"perf/{phase}_s": value for phase, value in seconds.items()},
        "perf/step_s": sum(seconds.values()),
        "perf/host_memory_gb": peak_memory_gb(),
    }


def rollout_rows(stage: Stage, groups: Sequence[Group], credit: Credit) -> list[dict[str, Any]]:
    """The step's rollouts, one row each, as `tracking.rollout_table` takes them."""
    rows = []
    for group, owners in zip(groups, credit.by_owner, strict=True):
        problem = group.prompt.problem
        for rollout, trace, card, advantages in zip(group.rollouts, group.traces, group.cards, owners, strict=True):
            rows.append(
                {
                    "round": stage.name,
                    "problem_id": problem.id,
                    "question": problem.question,
                    "gold": problem.answer,
                    "sample": rollout.sample,
                    "text": trace.text,
                    "total": card.total,
                    "rewards": {name: reward.value for name, reward in card.rewards.items()},
                    "advantages": advantages,
                    "errors": [error.code for error in trace.errors],
                    "unscored": list(card.unscored),
                    "final_answer": card.final_answer,
                    "finish": rollout.finish,
                    "tokens": rollout.tokens,
                    "policy_step": rollout.policy_step,
                    "facts": card.facts,
                }
            )
    return rows


def check_scored(groups: Sequence[Group], most: float) -> None:
    """Raise UserError when too many rollouts have a reward that failed; the message holds the commonest failure."""
    cards = [card for group in groups for card in group.cards]
    failed = [card for card in cards if card.unscored]
    if len(failed) <= most * len(cards):
        return
    details = Counter(f"{name}: {card.rewards[name].detail}" for card in failed for name in card.unscored)
    worst, times = details.most_common(1)[0]
    raise UserError(
        f"rewards.max_unscored_share: {len(failed)} of {len(cards)} rollouts have a reward that failed, more than "
        f"{most:.0%}; the commonest, {times} times: {worst}"
    )


def shown(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What the progress bar says of a step."""
    return {
        "reward": metrics["reward/total"],
        "accuracy": metrics.get("accuracy", np.nan),
        "format": metrics.get("format", np.nan),
        "tokens": metrics["length/tokens"],
        "tokens_per_s": metrics["perf/tokens_per_s"],
    }


def peak_memory_gb() -> float:
    """The most memory that this process has held, GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
