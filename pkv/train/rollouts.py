"""The groups of a GRPO step: sampled, scored, and those without a signal replaced by others (dynamic sampling).

All hosts draw the same problems, and each samples and scores its share of them.

With `grpo.one_step_off` the next step's rollouts are sampled before this step's are waited for, so that the devices
work while the host scores. They come from the weights before this step's update: one step off the policy, which the
importance weights of the loss correct (arXiv 2410.18252 studies how far off is harmless).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from pkv import hosts
from pkv.evaluate import Sampled, render_prompts, sample_groups, submit
from pkv.grpo import TrainState
from pkv.records import Group, Prompt
from pkv.rewards import ScoringPool
from pkv.tracking import Clock
from pkv.train.credit import with_signal
from pkv.train.rounds import Stage
from pkv.train.run import Run
from pkv.train.setup import Setup


def gather(
    setup: Setup, run: Run, state: TrainState, stage: Stage, step: int, scoring: ScoringPool, clock: Clock
) -> tuple[list[Group], int]:
    """All groups of a step that are this host's, silent ones too, and how many tokens it sampled meanwhile.

    At most `grpo.refills` times as many new groups are sampled as lack a signal: DAPO (arXiv 2503.14476, section 3.2)
    goes on until the batch is full; here a step's length is bounded. `run.waiting` is used up, and filled again.
    """
    grpo, sampled = setup.grpo, 0
    with clock("reshard"):
        source = setup.source(state, stage, step)
        jax.block_until_ready(source.weights)

    def sample(step: int, prompts: Sequence[Prompt]) -> Sampled:
        nonlocal sampled
        found = sample_groups(
            dataclasses.replace(source, step=step),
            hosts.share(prompts),
            samples=stage.required_round.samples or grpo.samples,
            max_new_tokens=stage.budget(step),
            seed=setup.config.seed,
            purpose="train",
            scoring=scoring,
            clock=clock,
        )
        sampled += sum(len(rollout.tokens) for rollouts in found.rollouts for rollout in rollouts)
        return found

    def first(step: int) -> Sampled:
        return sample(step, setup.draw_prompts(step, grpo.prompts, run.pass_rates))

    now = run.waiting or _kept(setup, run, step, scoring) or first(step)
    run.waiting = first(step + 1) if grpo.one_step_off and step + 1 < stage.stop else None
    groups = now.scored(clock)
    for refill in range(1, grpo.refills + 1):
        signal = int(with_signal(groups, stage.weights, grpo).sum())
        told = hosts.gather([signal, [group.prompt.problem.id for group in groups]])
        missing, asked = grpo.prompts - sum(found for found, _ in told), {name for _, names in told for name in names}
        prompts = setup.draw_prompts(step, missing, run.pass_rates, refill, asked) if missing > 0 else []
        if prompts:
            groups += sample(step, prompts).scored(clock)
    return groups, sampled


def _kept(setup: Setup, run: Run, step: int, scoring: ScoringPool) -> Sampled | None:
    """What waited for `step` where the run was stopped, handed to the scoring again."""
    if not setup.grpo.one_step_off or not step == run.step > 0:
        return None
    problems, rollouts = run.kept(setup.problems)
    if not problems:
        return None
    tokenizer = setup.policy.tokenizer
    scores = [
        [submit(scoring, tokenizer, problem, rollout) for rollout in group]
        for problem, group in zip(problems, rollouts, strict=True)
    ]
    return Sampled(render_prompts(tokenizer, problems, setup.policy.system), rollouts, scores)
