"""What a step leaves behind: its line of metrics, its rollouts as rows, what the bar shows."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pkv.config import UserError
from pkv.evaluate import Row, summarise
from pkv.model.arithmetic import peak_flops, update_flops
from pkv.records import Group
from pkv.train.credit import Credit
from pkv.train.rounds import Stage
from pkv.train.run import Run
from pkv.train.setup import Setup

MOST_SKIPPED = 5


def own_part(sampled: int, groups: Sequence[Group], credit: Credit) -> dict[str, Any]:
    """What a host tells the others of its part of a step, beside its rollouts' rows."""
    sizes: dict[str, list[float]] = {}
    for owners in (owners for group in credit.by_owner for owners in group):
        for owner, value in owners.items():
            count, total = sizes.get(owner, (0, 0.0))
            sizes[owner] = [count + 1, total + abs(value)]
    return {
        "sampled": sampled,
        "groups": len(groups),
        "silent": credit.silent,
        "trained": [(sequence.size, len(sequence.response)) for sequence in credit.sequences],
        "advantages": sizes,
    }


def step_metrics(
    setup: Setup,
    stage: Stage,
    step: int,
    rows: Sequence[Row],
    parts: Sequence[Mapping[str, Any]],
    policy: Mapping[str, float],
    learning_rate: float,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """One line of metrics.jsonl, of all hosts together; seconds are this one's. parts: by host, from `own_part`.

    reward/<name>: the mean of a reward as it is; weighted/<name>: times its weight. advantage/<owner>: the mean size of
    what the owner's tokens got. policy/steps_behind: how many steps old the weights were that the rollouts come from.
    perf/tokens_per_s: of the tokens `sampled` in this step, from resharding the weights to the last score.
    perf/update_*: of all epochs, see `update_rates`. What is of the tokens trained on is left out where there are none.
    """
    summary = summarise(rows)
    behind = [step - row["policy_step"] for row in rows]
    sampled, groups = (sum(part[name] for part in parts) for name in ("sampled", "groups"))
    sampling = sum(seconds.get(phase, 0.0) for phase in ("reshard", "sample", "score"))
    trained = [(size, response) for part in parts for size, response in part["trained"]] * setup.grpo.epochs
    owners: Counter[str] = Counter()
    magnitude: Counter[str] = Counter()
    for part in parts:
        for owner, (count, total) in part["advantages"].items():
            owners[owner] += count
            magnitude[owner] += total
    paid = {name: weight for name, weight in stage.weights.items() if weight and f"reward/{name}" in summary}
    return {
        "round": stage.name,
        "phase": "grpo",
        **summary,
        **{f"weighted/{name}": weight * summary[f"reward/{name}"] for name, weight in paid.items()},
        **{name if name == "loss" else f"policy/{name}": value for name, value in policy.items()},
        "policy/learning_rate": learning_rate,
        "policy/steps_behind": sum(behind) / len(behind),
        "groups/silent": sum(part["silent"] * part["groups"] for part in parts) / groups,
        "groups/sampled": groups,
        **{f"advantage/{owner}": magnitude[owner] / count for owner, count in owners.items()},
        **({"perf/tokens_per_s": sampled / sampling} if sampled else {}),
        **(update_rates(setup, trained, seconds["update"]) if trained else {}),
        **{f"perf/{phase}_s": value for phase, value in seconds.items()},
        "perf/step_s": sum(seconds.values()),
        "perf/host_memory_gb": peak_memory_gb(),
        **({"perf/device_memory_gb": max(peaks)} if (peaks := device_peaks_gb()) else {}),
    }


def update_rates(setup: Setup, trained: Sequence[tuple[int, int]], seconds: float) -> dict[str, float]:
    """How fast an update went on sequences of so many tokens, with so many of them responses'.

    update_mfu: the model's own arithmetic over what the chips could do at most, where that is known.
    """
    flops = update_flops(setup.policy.arch, trained, setup.frozen is not None) / seconds
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "perf/update_tokens_per_s": sum(response for _, response in trained) / seconds,
        "perf/update_tflops": flops / 1e12,
        **({"perf/update_mfu": flops / peak / jax.device_count()} if peak else {}),
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


def check_scored(rows: Sequence[Row], most: float) -> None:
    """Raise UserError when too many rollouts have a reward that failed; the message holds the commonest failure."""
    failed = [row["failed"] for row in rows if row["failed"]]
    if len(failed) <= most * len(rows):
        return
    details = Counter(f"{name}: {why}" for each in failed for name, why in each.items())
    worst, times = details.most_common(1)[0]
    raise UserError(
        f"rewards.max_unscored_share: {len(failed)} of {len(rows)} rollouts have a reward that failed, more than "
        f"{most:.0%}; the commonest, {times} times: {worst}"
    )


def check_stepped(policy: Mapping[str, float], run: Run, step: int) -> None:
    """Raise UserError when in too many steps in a row no gradient was finite; such a step changes nothing."""
    run.skipped = run.skipped + 1 if policy["skipped"] == 1 else 0
    if run.skipped >= MOST_SKIPPED:
        raise UserError(
            f"step {step}: the gradient was not finite {run.skipped} times in a row, and nothing is learnt any more; "
            "train in another --run directory from what `pkv export` gives of this one, with a lower learning rate or "
            "optimizer.clip_norm"
        )


def shown(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What the progress bar says of a step."""
    return {
        "reward": metrics["reward/total"],
        "accuracy": metrics.get("accuracy", np.nan),
        "format": metrics.get("format", np.nan),
        "tokens": metrics["length/tokens"],
        "tokens_per_s": metrics.get("perf/tokens_per_s", np.nan),
        **({"silent": metrics["groups/silent"]} if metrics["groups/silent"] else {}),  # at 1 nothing is learnt
    }


def device_peaks_gb() -> list[float]:
    """The most memory in use on each device of this process that keeps count, GiB; a CPU doesn't."""
    found = (device.memory_stats() or {} for device in jax.local_devices())
    return [stats["peak_bytes_in_use"] / 2**30 for stats in found if "peak_bytes_in_use" in stats]


def peak_memory_gb() -> float:
    """The most memory that this process has held, GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
