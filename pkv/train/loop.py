"""The whole of GRPO: problem, prompt, rollout, trace, scorecard, advantages, batch, update, log, checkpoint."""

from __future__ import annotations

from pathlib import Path

from pkv import hosts
from pkv.config import Config
from pkv.evaluate import evaluate, measured
from pkv.grpo import TrainState, learning_rate
from pkv.grpo.losses import Supervised
from pkv.rewards import ScoringPool
from pkv.tracking import Clock, Progress
from pkv.train.credit import assign_credit
from pkv.train.interrupts import stop_requests
from pkv.train.journal import check_scored, check_stepped, own_part, rollout_rows, shown, step_metrics
from pkv.train.rollouts import gather
from pkv.train.rounds import Stage, before, check_requirement, stages
from pkv.train.run import Run
from pkv.train.setup import Setup, build, open_training
from pkv.train.warmup import demonstrations, warmup_learning_rate


def train(config: Config, folder: Path, fresh: bool = False) -> Run:
    """Warm-up, then the rounds, into a run directory; a run that was stopped goes on where its last checkpoint is.

    Raises KeyboardInterrupt after the step, and its checkpoint, in which it was asked to stop.
    """
    hosts.join()
    with hosts.watched():
        return run_stages(build(config), folder, fresh)


def run_stages(setup: Setup, folder: Path, fresh: bool) -> Run:
    """All that is left of a run's stages."""
    config = setup.config
    run, state = open_training(setup, folder, fresh)
    seen_at = None  # the limits of the last evaluation: a stage with others is measured when it starts
    with run, stop_requests() as asked_to_stop:
        for stage in stages(config):
            last, seen_at = seen_at, stage.limits
            if run.step >= stage.stop:
                continue
            if stage.round is not None and run.step == stage.first:
                check_requirement(stage.round, run.evaluations())
            with (
                ScoringPool(stage.weights, stage.length_optimum, config.rewards) as scoring,
                progress_of(stage.stop - stage.first, stage.name, initial=run.step - stage.first) as progress,
            ):
                setup.warm_up(state, stage, run.step)
                if stage.round is not None and run.step == stage.first and last != stage.limits:
                    measure(setup, run, state, stage, scoring, before(stage.name))
                for step in range(run.step, stage.stop):
                    if run.step == step and any(hosts.gather(asked_to_stop())):  # saved: nothing is lost
                        raise hosts.StoppedTogetherError
                    state, seen = (grpo_step if stage.round else warmup_step)(setup, run, state, stage, step, scoring)
                    progress.advance(1, **seen)
                    if step + 1 == stage.stop:
                        measure(setup, run, state, stage, scoring, f"after {stage.name}")
                    due = (step + 1) % config.checkpoint.every == 0 or step + 1 == stage.stop
                    if due or any(hosts.gather(asked_to_stop())):
                        run.save(step + 1, state, config.checkpoint.keep)
    return run


def grpo_step(
    setup: Setup, run: Run, state: TrainState, stage: Stage, step: int, scoring: ScoringPool
) -> tuple[TrainState, dict[str, float]]:
    """One step of judge-assisted GRPO."""
    grpo, clock = setup.config.grpo, Clock()
    groups, sampled = gather(setup, run, state, stage, step, scoring, clock)
    rows = hosts.together(measured(groups))
    check_scored(rows, setup.config.rewards.max_unscored_share)
    with clock("credit"):
        credit = assign_credit(groups, stage.weights, stage.whole_trace, setup.grpo, stage.budget(step))
        minibatches = setup.pack(credit.sequences, stage.budget(step), grpo.minibatches)
    with clock("update"):
        rate = learning_rate(stage.required_round, step - stage.first)
        state, policy = setup.learner.update(state, minibatches, grpo.loss, rate, grpo.epochs)
    check_stepped(policy, run, step)
    parts = hosts.gather(own_part(sampled, groups, credit))
    metrics = step_metrics(setup, stage, step, rows, parts, policy, rate, clock.seconds)
    run.log(step, metrics, rollout_rows(stage, groups, credit), rows)
    if step % setup.TEXT_EVERY == 0:
        run.show(step, f"competition/{stage.name}", groups[0].traces[0].text)
    return state, shown(metrics)


def warmup_step(
    setup: Setup, run: Run, state: TrainState, stage: Stage, step: int, scoring: ScoringPool
) -> tuple[TrainState, dict[str, float]]:
    """One supervised step on synthetic competitions."""
    config, clock = setup.config, Clock()
    with clock("update"):
        sequences = hosts.share(demonstrations(config, step, setup.problems, setup.policy))
        rate = warmup_learning_rate(config, step)
        state, policy = setup.learner.update(state, setup.pack(sequences), Supervised(), rate)
    check_stepped(policy, run, step)
    trained = sum(hosts.gather(sum(len(sequence.response) for sequence in sequences))) / clock.seconds["update"]
    metrics = {"round": stage.name, "phase": "warmup", "loss": policy["loss"], "policy/entropy": policy["entropy"]}
    metrics |= {"policy/gradient_norm": policy["gradient_norm"], "policy/learning_rate": rate}
    metrics |= {"perf/update_s": clock.seconds["update"], "perf/update_tokens_per_s": trained}
    run.log(step, metrics)
    return state, {"loss": policy["loss"], "tokens_per_s": trained}


def measure(setup: Setup, run: Run, state: TrainState, stage: Stage, scoring: ScoringPool, name: str) -> None:
    """Held-out accuracy, format and judge metrics at a stage's start or end."""
    config = setup.config
    if any(evaluation["name"] == name for evaluation in run.evaluations()):  # by the run that was stopped here
        return
    step = stage.stop if name.startswith("after") else stage.first
    source = setup.source(state, stage, step, heldout=True)
    with progress_of(len(hosts.share(setup.heldout)) * config.evaluate.samples, f"held-out, {name}") as progress:
        evaluation = evaluate(
            source,
            setup.heldout,
            scoring,
            samples=config.evaluate.samples,
            max_new_tokens=stage.max_new_tokens,
            seed=config.seed,
            on_rollout=lambda _: progress.advance(),
        )
    run.add_evaluation(step, name, evaluation, config.evaluate.shown)


def progress_of(total: int, description: str, initial: int = 0) -> Progress:
    """A bar, on one host."""
    return Progress(total, description, initial=initial, quiet=not hosts.leads())
