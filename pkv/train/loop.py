"""The whole of GRPO: problem, prompt, rollout, trace, scorecard, advantages, batch, update, log, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pkv.config import Config
from pkv.evaluate import collect_groups, evaluate, summarise
from pkv.grpo import TrainState, pack
from pkv.grpo.losses import ClippedSurrogate, Supervised
from pkv.rewards import ScoringPool
from pkv.tracking import Progress
from pkv.train.credit import assign_credit
from pkv.train.interrupts import stop_requests
from pkv.train.journal import check_scored, rollout_rows, shown, step_metrics
from pkv.train.rounds import Stage, check_requirement, stages
from pkv.train.run import Run
from pkv.train.setup import Setup, build, open_training
from pkv.train.warmup import demonstration_batch, warmup_learning_rate


def train(config: Config, folder: Path, fresh: bool = False) -> Run:
    """Warm-up, then the rounds, into a run directory; a run that was stopped goes on where its last checkpoint is.

    Raises KeyboardInterrupt after the step, and its checkpoint, in which it was asked to stop.
    """
    setup = build(config)
    run, state = open_training(setup, folder, fresh)
    with run, stop_requests() as asked_to_stop:
        for stage in stages(config):
            if run.step >= stage.stop:
                continue
            if stage.round is not None:
                check_requirement(stage.round, run.evaluations())
            with (
                ScoringPool(stage.weights, stage.length_optimum, config.rewards) as scoring,
                Progress(stage.stop - stage.first, stage.name, initial=run.step - stage.first) as progress,
            ):
                setup.warm_up(state, stage, run.step)
                for step in range(run.step, stage.stop):
                    if asked_to_stop() and run.step == step:  # saved: nothing is lost
                        raise KeyboardInterrupt
                    state, seen = (grpo_step if stage.round else warmup_step)(setup, run, state, stage, step, scoring)
                    progress.advance(1, **seen)
                    if step + 1 == stage.stop:
                        measure(setup, run, state, stage, scoring)
                    if (step + 1) % config.checkpoint.every == 0 or step + 1 == stage.stop or asked_to_stop():
                        run.save(step + 1, state, config.checkpoint.keep)
    return run


def grpo_step(
    setup: Setup, run: Run, state: TrainState, stage: Stage, step: int, scoring: ScoringPool
) -> tuple[TrainState, dict[str, float]]:
    """One step of judge-assisted GRPO."""
    config, clock, round_ = setup.config, Clock(), stage.required_round
    prompts = setup.draw_prompts(step)
    with clock("sample"):
        groups = collect_groups(
            setup.source(state, stage, step),
            prompts,
            samples=config.grpo.samples,
            max_new_tokens=round_.max_new_tokens,
            seed=config.seed,
            purpose="train",
            scoring=scoring,
        )
    generated = sum(len(rollout.tokens) for group in groups for rollout in group.rollouts)
    check_scored(groups, config.rewards.max_unscored_share)
    credit = assign_credit(groups, stage.weights, stage.whole_trace, config.grpo)
    with clock("update"):
        batch = pack(credit.sequences, config.grpo.row_tokens)
        loss = ClippedSurrogate(config.grpo.clip_low, config.grpo.clip_high, config.grpo.importance_cap)
        state, policy = setup.learner.update(
            state, batch, loss, round_.learning_rate, config.grpo.micro_rows, config.grpo.epochs
        )
    metrics = step_metrics(stage, summarise(groups), policy, credit, generated, clock.seconds)
    run.tracker.log(step, metrics)
    run.tracker.rollouts(step, rollout_rows(stage, groups, credit))
    if step % setup.TEXT_EVERY == 0:
        run.tracker.text(step, f"competition/{stage.name}", groups[0].traces[0].text)
    return state, shown(metrics)


def warmup_step(
    setup: Setup, run: Run, state: TrainState, stage: Stage, step: int, scoring: ScoringPool
) -> tuple[TrainState, dict[str, float]]:
    """One supervised step on synthetic competitions."""
    config, clock = setup.config, Clock()
    with clock("update"):
        batch = demonstration_batch(config, step, setup.problems, setup.policy)
        rate = warmup_learning_rate(config, step)
        state, policy = setup.learner.update(state, batch, Supervised(), rate, config.grpo.micro_rows)
    tokens = float(batch.mask.sum())
    metrics = {"round": stage.name, "phase": "warmup", "loss": policy["loss"], "policy/entropy": policy["entropy"]}
    metrics |= {"perf/update_s": clock.seconds["update"], "perf/update_tokens_per_s": tokens / clock.seconds["update"]}
    run.tracker.log(step, metrics)
    return state, {"loss": policy["loss"], "tokens_per_s": metrics["perf/update_tokens_per_s"]}


def measure(setup: Setup, run: Run, state: TrainState, stage: Stage, scoring: ScoringPool) -> None:
    """Held-out accuracy, format and judge metrics at a stage's end."""
    config = setup.config
    source = setup.source(state, stage, stage.stop, heldout=True)
    with Progress(len(setup.heldout) * config.evaluate.samples, f"held-out, after {stage.name}") as progress:
        evaluation = evaluate(
            source,
            setup.heldout,
            scoring,
            samples=config.evaluate.samples,
            max_new_tokens=stage.max_new_tokens,
            seed=config.seed,
            on_rollout=lambda _: progress.advance(),
        )
    run.add_evaluation(stage.stop, f"after {stage.name}", evaluation, config.evaluate.shown)


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
