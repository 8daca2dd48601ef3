"""Everything a run needs before its first step, built from its config."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from pkv.compiling import keep_compiled
from pkv.config import Config, UserError
from pkv.data import open_source
from pkv.evaluate import Policy, Source, load_policy, render_prompts, requests_for
from pkv.grpo import Learner, TrainState
from pkv.mesh import make_mesh
from pkv.model import Params, join, read_config, split
from pkv.records import Problem, Prompt
from pkv.sampling import Engine, WarmUp
from pkv.train.rounds import Stage, stages
from pkv.train.run import Run, open_run


@dataclass(frozen=True)
class Setup:
    """The compiled parts and the data of one run. `engine` samples for training, `heldout_engine` for evaluation.

    compile_ahead: what `engine` will be asked in a stage. frozen: what is not trained, laid out for both engines; None
    when everything is.
    """

    TEXT_EVERY: ClassVar[int] = 10  # steps between two competitions shown in TensorBoard

    config: Config
    policy: Policy
    engine: Engine
    heldout_engine: Engine
    compile_ahead: WarmUp
    learner: Learner
    frozen: Params | None
    problems: list[Problem]
    heldout: list[Prompt]
    model_config: dict[str, Any]

    def weights(self, state: TrainState) -> Params:
        """The policy as both engines sample from it."""
        return join(self.engine.load(state.params), self.frozen)

    def draw_prompts(self, step: int) -> list[Prompt]:
        """The prompts of a GRPO step: the problems in a new order each epoch, a function of seed and step only."""
        count = self.config.grpo.prompts
        first = (step - self.config.warmup.steps) * count
        drawn = []
        for place in range(first, first + count):
            epoch, at = divmod(place, len(self.problems))
            drawn.append(
                self.problems[np.random.default_rng((self.config.seed, epoch)).permutation(len(self.problems))[at]]
            )
        return render_prompts(self.policy.tokenizer, drawn, self.policy.system)

    def source(self, state: TrainState, stage: Stage, step: int, *, heldout: bool = False) -> Source:
        """Where a stage's rollouts come from."""
        engine = self.heldout_engine if heldout else self.engine
        limits = self.config.sampling.stop, stage.fighter_tokens
        return Source(engine, self.weights(state), self.policy.tokenizer, step, *limits)

    def warm_up(self, state: TrainState, stage: Stage, step: int) -> None:
        """Compile what a stage's rollouts will ask, the longest first: what doesn't fit fails now."""
        if stage.round is None or not self.config.sampling.warm_up:
            return
        source, grpo = self.source(state, stage, step), self.config.grpo
        asked = source, self.draw_prompts(step), grpo.samples, stage.max_new_tokens, self.config.seed, "train"
        self.compile_ahead(source.weights, requests_for(*asked))


def build(config: Config) -> Setup:
    """Load data and model, lay out the mesh. Raises UserError."""
    if not config.model.path:
        raise UserError("model.path: missing; name a Hugging Face directory or a hub id")
    if not stages(config):
        raise UserError("rounds: nothing to do; give warmup.steps or a round with steps")
    problems = open_source(config.data.train)
    heldout = open_source(config.data.heldout, config.evaluate.problems)
    _check_apart(problems, heldout)
    longest = max(stage.max_new_tokens for stage in stages(config))
    if longest >= config.grpo.row_tokens:  # said before a large model is fetched
        raise UserError(
            f"grpo.row_tokens: {config.grpo.row_tokens} tokens hold no prompt and {longest} tokens of max_new_tokens: "
            "raise it or lower them"
        )
    keep_compiled()
    mesh = make_mesh(config.mesh)
    policy = load_policy(config.model.path, mesh, system=config.prompt.system, model=config.model, seed=config.seed)
    prompts = render_prompts(policy.tokenizer, heldout, policy.system)
    needed = max(len(prompt.tokens) for prompt in prompts) + longest
    for name, limit in (
        ("grpo.row_tokens", config.grpo.row_tokens),
        ("the model's context", policy.arch.max_positions),
    ):
        if needed > limit:
            raise UserError(f"{name}: {limit} tokens; prompts and max_new_tokens need {needed}: raise it or lower them")
    stops, dtype = policy.tokenizer.stop_ids, config.model.dtype
    arch = policy.arch.for_context(config.grpo.row_tokens)  # nothing is longer
    at_test = dataclasses.replace(
        config.sampling, temperature=config.evaluate.temperature, top_p=1.0, top_k=0, min_p=0.0
    )
    engine = Engine(arch, config.sampling, stops, mesh, dtype)
    heldout_engine = engine if at_test == config.sampling else Engine(arch, at_test, stops, mesh, dtype)
    _, frozen = split(policy.params)
    return Setup(
        config,
        policy,
        engine,
        heldout_engine,
        WarmUp(engine),
        Learner(arch, config.model, config.optimizer, mesh, frozen),
        None if frozen is None else engine.load(frozen),
        problems,
        prompts,
        read_config(config.model.path),
    )


def open_training(setup: Setup, folder: Path, fresh: bool) -> tuple[Run, TrainState]:
    """The run's directory and the state to go on from; what is trained of `setup.policy` is used up."""
    run = open_run(setup.config, folder, setup.policy, setup.model_config, fresh)
    if not run.step:
        return run, setup.learner.init(setup.policy.params)
    template = setup.learner.template(setup.policy.params)
    for array in jax.tree.leaves(split(setup.policy.params)[0]):
        array.delete()  # or the weights would be held twice until the run ends
    return run, run.restore(template)


def _check_apart(train: list[Problem], heldout: list[Problem]) -> None:
    shared = {problem.question for problem in train} & {problem.question for problem in heldout}
    if shared:
        raise UserError(f"data.heldout: {len(shared)} questions are in data.train too, such as {min(shared)[:80]!r}")
