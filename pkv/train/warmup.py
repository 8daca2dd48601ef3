"""Round 0: a short supervised start on synthetic competitions, so that there is something to reward."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from pkv.competition import render
from pkv.config import Config, UserError
from pkv.evaluate import Policy
from pkv.grpo import Sequence as TrainingSequence
from pkv.records import Problem
from pkv.train.demonstrations import can_demonstrate, demonstrate

MOST_DRAWS = 20  # of one problem's demonstration


def demonstrations(config: Config, step: int, problems: Sequence[Problem], policy: Policy) -> list[TrainingSequence]:
    """The demonstrations of one warm-up step, a function of seed and step only. Raises UserError.

    One that is too long for a row, which is rare, is drawn anew.
    """
    draw = random.Random(f"{config.seed}/warm-up/{step}")
    solvable = [problem for problem in problems if can_demonstrate(problem)]
    if not solvable:
        raise UserError(
            f"warmup.steps: competitions can be written for arithmetic problems only, not {config.data.train}"
        )
    chosen = draw.choices(solvable, k=config.warmup.demonstrations)
    return [_fitting(problem, draw, config, policy) for problem in chosen]


def _fitting(problem: Problem, draw: random.Random, config: Config, policy: Policy) -> TrainingSequence:
    prompt = render(policy.tokenizer, problem.question, policy.system)
    sizes = []
    for _ in range(MOST_DRAWS):
        response = policy.tokenizer.encode(demonstrate(problem, draw, config.warmup))
        response = np.append(response, policy.tokenizer.turn_end).astype(np.int32)
        ones = np.ones(len(response), np.float32)
        sequence = TrainingSequence(prompt, response, ones, np.zeros_like(ones))
        if sequence.size <= config.grpo.row_tokens:
            return sequence
        sizes.append(sequence.size)
    raise UserError(
        f"grpo.row_tokens: {config.grpo.row_tokens} is too short for a demonstration, the shortest of {MOST_DRAWS} of "
        f"one problem has {min(sizes)} tokens with its prompt: raise it"
    )


def warmup_learning_rate(config: Config, step: int) -> float:
    """Linear up over the first steps, then linear down to the final rate."""
    warmup = config.warmup
    ramp = min(1.0, (step + 1) / max(1, warmup.ramp_steps))
    share = step / max(1, warmup.steps - 1)
    return ramp * (warmup.learning_rate + share * (warmup.final_learning_rate - warmup.learning_rate))
