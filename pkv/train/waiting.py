"""Rollouts that wait for their step, as arrays: kept beside a checkpoint, so that a run resumes with the very ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pkv.config import UserError
from pkv.evaluate import Sampled
from pkv.records import Problem, Rollout

_BY_TOKEN = ("tokens", "logprobs", "policy_logprobs", "forced")


def as_arrays(waiting: Sampled) -> dict[str, np.ndarray]:
    """The rollouts of P prompts and G samples; their scores are left out, for they are found again.

    ids, questions: [P] text. stopped, policy_step, length: [P, G]. tokens, logprobs, policy_logprobs, forced: of all
    rollouts, one after the other.
    """
    flat = [rollout for rollouts in waiting.rollouts for rollout in rollouts]
    shape = len(waiting.prompts), -1
    return {
        "ids": np.array([prompt.problem.id for prompt in waiting.prompts]),
        "questions": np.array([prompt.problem.question for prompt in waiting.prompts]),
        "stopped": np.array([rollout.finish == "stop" for rollout in flat]).reshape(shape),
        "policy_step": np.array([rollout.policy_step for rollout in flat], np.int32).reshape(shape),
        "length": np.array([len(rollout.tokens) for rollout in flat], np.int32).reshape(shape),
        "tokens": np.concatenate([rollout.tokens for rollout in flat]),
        "logprobs": np.concatenate([rollout.logprobs for rollout in flat]),
        "policy_logprobs": np.concatenate([rollout.policy_logprobs for rollout in flat]),
        "forced": np.concatenate([_forced(rollout) for rollout in flat]),
    }


def from_arrays(
    arrays: Mapping[str, np.ndarray], problems: Sequence[Problem]
) -> tuple[list[Problem], list[list[Rollout]]]:
    """The problems and their rollouts. Raises UserError for a problem that `problems` doesn't have any more."""
    known = {(problem.id, problem.question): problem for problem in problems}
    asked = list(zip(arrays["ids"].tolist(), arrays["questions"].tolist(), strict=True))
    if gone := [name for name in asked if name not in known]:
        raise UserError(f"data.train: the run goes on with problem {gone[0][0]!r}, which is not there any more")
    stops = np.cumsum(arrays["length"]).reshape(arrays["length"].shape)
    found: list[list[Rollout]] = []
    for p, name in enumerate(asked):
        found.append([])
        for g, stop in enumerate(stops[p]):
            start = stop - arrays["length"][p, g]
            tokens, logprobs, policy_logprobs, forced = (arrays[part][start:stop] for part in _BY_TOKEN)
            found[p].append(
                Rollout(
                    known[name].id,
                    g,
                    tokens,
                    logprobs,
                    policy_logprobs,
                    "stop" if arrays["stopped"][p, g] else "length",
                    int(arrays["policy_step"][p, g]),
                    forced if forced.any() else None,
                )
            )
    return [known[name] for name in asked], found


def _forced(rollout: Rollout) -> np.ndarray:
    return np.zeros(len(rollout.tokens), bool) if rollout.forced is None else rollout.forced
