"""The groups of a GRPO step: sampled, scored, and those without a signal replaced by others (dynamic sampling)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from pkv.evaluate import collect_groups
from pkv.grpo import TrainState
from pkv.records import Group
from pkv.rewards import ScoringPool
from pkv.tracking import Clock
from pkv.train.credit import with_signal
from pkv.train.rounds import Stage
from pkv.train.setup import Setup


def gather(
    setup: Setup,
    state: TrainState,
    stage: Stage,
    step: int,
    scoring: ScoringPool,
    pass_rates: Callable[[], Mapping[str, float]],
    clock: Clock,
) -> list[Group]:
    """All groups that were sampled, silent ones too: at most `grpo.refills` times as many new ones as lack a signal.

    DAPO (arXiv 2503.14476, section 3.2) goes on until the batch is full; here a step's length is bounded.
    """
    with clock("reshard"):
        source = setup.source(state, stage, step)
        jax.block_until_ready(source.weights)
    groups: list[Group] = []
    missing = setup.grpo.prompts
    for refill in range(setup.grpo.refills + 1):
        asked = {group.prompt.problem.id for group in groups}
        prompts = setup.draw_prompts(step, missing, pass_rates, refill, asked)
        if prompts:
            groups += collect_groups(
                source,
                prompts,
                samples=stage.required_round.samples or setup.grpo.samples,
                max_new_tokens=stage.budget(step),
                seed=setup.config.seed,
                purpose="train",
                scoring=scoring,
                clock=clock,
            )
        missing = setup.grpo.prompts - int(with_signal(groups, stage.weights, setup.grpo).sum())
        if missing <= 0:
            break
    return groups
