"""Everything a run needs before its first step, built from its config."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import itertools
import json
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from pkv import hosts
from pkv.compiling import keep_compiled
from pkv.config import Config, GrpoConfig, UserError, as_plain
from pkv.data import open_source
from pkv.evaluate import Policy, Source, load_policy, render_prompts, requests_for
from pkv.grpo import Learner, TrainState, pack, reference_weights
from pkv.grpo import Sequence as TrainingSequence
from pkv.hub import pinned
from pkv.mesh import make_mesh
from pkv.model import Params, join, read_config, split
from pkv.records import Batch, Problem, Prompt
from pkv.sampling import Engine, WarmUp, common_beginning
from pkv.train.rounds import Stage, signal_rewards, stages
from pkv.train.run import Run, made_with, open_run

SOME = 64  # prompts of training that tell, with the held-out ones, what all begin with and how long they get


@dataclass(frozen=True)
class Setup:
    """The compiled parts and the data of one run. `engine` samples for training, `heldout_engine` for evaluation.

    grpo: the config's, with families of signal rewards resolved. compile_ahead: for each engine, what it will be asked.
    frozen: what is not trained, laid out for both engines; None
    when everything is.
    """

    TEXT_EVERY: ClassVar[int] = 10  # steps between two competitions shown in TensorBoard

    config: Config
    grpo: GrpoConfig
    policy: Policy
    engine: Engine
    heldout_engine: Engine
    compile_ahead: Mapping[Engine, WarmUp]
    learner: Learner
    frozen: Params | None
    problems: list[Problem]
    heldout: list[Prompt]
    model_config: dict[str, Any]

    def weights(self, state: TrainState) -> Params:
        """The policy as both engines sample from it."""
        return join(self.engine.load(state.params), self.frozen)

    def draw_prompts(
        self,
        step: int,
        count: int,
        pass_rates: Callable[[], Mapping[str, float]],
        refill: int = 0,
        asked: Collection[str] = (),
    ) -> list[Prompt]:
        """`count` prompts of a GRPO step: the problems in a new order each epoch, a function of seed and step only.

        None comes twice in a step: its rollouts would be the same ones. What is left of an epoch has its chance in the
        next one's order.
        Refills, and with a curriculum all prompts, are drawn at random instead, without those that were `asked`, by id.
        pass_rates: by problem id, of the last group of each; read by the curriculum only.
        """
        data = self.config.data
        curriculum = (data.hardest, data.easiest) != (0.0, 1.0)
        if refill or curriculum:
            rates = pass_rates() if curriculum else {}
            drawn = self._draw_at_random((self.config.seed, step, refill), count, rates, asked)
        else:
            epoch, at = divmod(step - self.config.warmup.steps, len(self.problems) // count)
            order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.problems))
            drawn = [self.problems[place] for place in order[at * count : (at + 1) * count]]
        return render_prompts(self.policy.tokenizer, drawn, self.policy.system)

    def _draw_at_random(
        self, seed: tuple[int, ...], count: int, rates: Mapping[str, float], asked: Collection[str]
    ) -> list[Problem]:
        data = self.config.data
        left = [problem for problem in self.problems if problem.id not in asked]
        fits = [data.hardest <= rates.get(problem.id, data.hardest) <= data.easiest for problem in left]
        chances = np.where(fits, 1.0, data.revisit)
        if not left:
            return []
        draw, count = np.random.default_rng(seed), min(count, len(left))
        return [left[at] for at in draw.choice(len(left), count, replace=False, p=chances / chances.sum())]

    def pack(
        self, sequences: Sequence[TrainingSequence], budget: int | None = None, minibatches: int = 1
    ) -> list[list[Batch]]:
        """The micro-batches of each of an update's minibatches; budget: max_new_tokens, or None for demonstrations."""
        layout = self.learner.layout(self.grpo, budget)
        ends = [len(sequences) * part // minibatches for part in range(minibatches + 1)]
        return [pack(sequences[start:stop], layout, hosts.gather) for start, stop in itertools.pairwise(ends)]

    def source(self, state: TrainState, stage: Stage, step: int, *, heldout: bool = False) -> Source:
        """Where a stage's rollouts come from: the weights before `step`."""
        engine = self.heldout_engine if heldout else self.engine
        limits = self.config.sampling.stop, stage.fighter_tokens
        return Source(engine, self.weights(state), self.policy.tokenizer, step, *limits, policy_step=step)

    def warm_up(self, state: TrainState, stage: Stage, step: int) -> None:
        """Compile what a stage's rollouts and evaluations will ask, the longest first: what doesn't fit fails now."""
        if not self.config.sampling.warm_up:
            return
        source = self.source(state, stage, step)
        measuring = dataclasses.replace(source, engine=self.heldout_engine)
        asked = [(measuring, self.heldout, self.config.evaluate.samples)]
        if stage.round is not None:
            prompts = self.draw_prompts(step, self.grpo.prompts, dict)
            samples = stage.round.samples or self.grpo.samples
            asked.insert(0, (source, prompts, samples))
            for halvings in range(1, len(prompts).bit_length() if self.grpo.refills else 1):
                asked.append((source, prompts[: len(prompts) >> halvings], samples))  # as many may lack a signal
        for place, prompts, samples in asked:
            of_host = hosts.share(prompts)
            requests = requests_for(place, of_host, samples, stage.max_new_tokens, self.config.seed, "compile ahead")
            self.compile_ahead[place.engine](place.weights, requests)


def build(config: Config) -> Setup:
    """Load data and model, lay out the mesh. Raises UserError."""
    if not config.model.path:
        raise UserError("model.path: missing; name a Hugging Face directory or a hub id")
    if not stages(config):
        raise UserError("rounds: nothing to do; give warmup.steps or a round with steps")
    if not config.sampling.temperature and any(round_.steps for round_ in config.rounds):
        raise UserError("sampling.temperature: at 0 a group's rollouts are all the same, and teach nothing; give 1")
    problems = open_source(config.data.train)
    heldout = open_source(config.data.heldout, config.evaluate.problems)
    _check_apart(problems, heldout)
    if len(problems) < config.grpo.prompts and any(round_.steps for round_ in config.rounds):
        raise UserError(
            f"grpo.prompts: {config.grpo.prompts} a step, and data.train has {len(problems)} problems; lower it"
        )
    longest = max(stage.max_new_tokens for stage in stages(config))
    if longest >= config.grpo.row_tokens:  # said before a large model is fetched
        raise UserError(
            f"grpo.row_tokens: {config.grpo.row_tokens} tokens hold no prompt and {longest} tokens of max_new_tokens: "
            "raise it or lower them"
        )
    keep_compiled()
    _check_alike(config, problems, heldout)
    mesh = make_mesh(config.mesh)
    policy = load_policy(config.model.path, mesh, system=config.prompt.system, model=config.model, seed=config.seed)
    prompts = render_prompts(policy.tokenizer, heldout, policy.system)
    limits = {"grpo.row_tokens": config.grpo.row_tokens, "the model's context": policy.arch.max_positions}
    room = min(limits.values()) - longest - len(prompts[0].tokens)
    wordy = render_prompts(policy.tokenizer, _wordiest(problems, policy, room), policy.system)
    needed = max(len(prompt.tokens) for prompt in (*prompts, *wordy)) + longest
    for name, limit in limits.items():
        if needed > limit:
            raise UserError(f"{name}: {limit} tokens; prompts and max_new_tokens need {needed}: raise it or lower them")
    stops, dtype = policy.tokenizer.stop_ids, config.model.dtype
    arch = policy.arch.for_context(config.grpo.row_tokens)  # nothing is longer
    at_test = dataclasses.replace(
        config.sampling, temperature=config.evaluate.temperature, top_p=1.0, top_k=0, min_p=0.0
    )
    some = render_prompts(policy.tokenizer, problems[:: -(-len(problems) // SOME)], policy.system)
    beginning = common_beginning([prompt.tokens for prompt in (*prompts, *some)])
    engine = Engine(arch, config.sampling, stops, mesh, dtype, beginning)
    heldout_engine = engine if at_test == config.sampling else Engine(arch, at_test, stops, mesh, dtype, beginning)
    _, frozen = split(policy.params)
    reference = reference_weights(policy.params, config.model.dtype) if config.grpo.loss.kl_weight else None
    return Setup(
        config,
        dataclasses.replace(config.grpo, signal=signal_rewards(config)),
        policy,
        engine,
        heldout_engine,
        {each: WarmUp(each) for each in (engine, heldout_engine)},
        Learner(arch, config.model, config.optimizer, mesh, frozen, reference),
        None if frozen is None else engine.load(frozen),
        problems,
        prompts,
        read_config(config.model.path, config.model.context),
    )


def _wordiest(problems: Sequence[Problem], policy: Policy, room: int) -> list[Problem]:
    """The problems of the most tokens, of those that may take more than `room`: no text takes more than its bytes.

    Letters don't tell: a short line of Chinese or of figures takes more tokens than a long one of prose.
    """
    long = [problem for problem in problems if len(problem.question.encode("utf-8", "surrogatepass")) > room]
    return heapq.nlargest(SOME, long, key=lambda problem: len(policy.tokenizer.encode(problem.question)))


def open_training(setup: Setup, folder: Path, fresh: bool) -> tuple[Run, TrainState]:
    """The run's directory and the state to go on from; what is trained of `setup.policy` is used up."""
    run = open_run(setup.config, folder, setup.policy, setup.model_config, fresh)
    if not run.step:
        return run, setup.learner.init(setup.policy.params)
    template = setup.learner.template(setup.policy.params)
    for array in jax.tree.leaves(split(setup.policy.params)[0]):
        array.delete()  # or the weights would be held twice until the run ends
    return run, run.restore(template)


def _check_alike(config: Config, problems: Sequence[Problem], heldout: Sequence[Problem]) -> None:
    """Raise UserError where hosts would compute different things, or one of them would have nothing to sample."""
    count, model = jax.process_count(), Path(config.model.path)
    if count == 1:
        return
    if count > config.grpo.prompts:
        raise UserError(f"grpo.prompts: {config.grpo.prompts} a step are too few for {count} hosts; raise it")
    own = [*config.rewards.user_files, *([config.prompt.system] if Path(config.prompt.system).is_file() else [])]
    weights = {file.name: file.stat().st_size for file in sorted(model.glob("*.safetensors"))}
    read = {
        "config": as_plain(config),
        "data": [[problem.id, problem.question, problem.answer] for problem in (*problems, *heldout)],
        "rewards.user_files or prompt.system": [Path(file).read_text(encoding="utf-8") for file in own],
        "the model": [read_config(config.model.path), weights] if model.is_dir() else pinned(config.model.path),
    }
    digests = {name: hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12] for name, of in read.items()}
    hosts.compare({"python": platform.python_version(), **made_with(), **digests})


def _check_apart(train: list[Problem], heldout: list[Problem]) -> None:
    shared = {problem.question for problem in train} & {problem.question for problem in heldout}
    if shared:
        raise UserError(f"data.heldout: {len(shared)} questions are in data.train too, such as {min(shared)[:80]!r}")
