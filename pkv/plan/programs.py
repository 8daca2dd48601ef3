"""The real programs of a run, lowered from shapes alone for devices that need not be there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pkv.config import Config, SamplingConfig, UserError
from pkv.grpo import Learner
from pkv.mesh import TRAINING_RULES, shardings
from pkv.model import (
    Arch,
    Kernel,
    Params,
    choose_kernel,
    choose_page_kernel,
    freezer,
    init_adapters,
    join,
    param_shapes,
    split,
    weight_axes,
)
from pkv.model.arithmetic import forward_flops, update_flops
from pkv.model.linear import Flat
from pkv.sampling import Engine, Request, rehearse, row_keys
from pkv.sampling.laying import apart_on_gpu
from pkv.sampling.programs import page_tokens

STOPS = (0,)  # which token ends a response changes no shape
# Of each program of the trainer, which of a run's kinds are its arguments; `gradient` is there in these alone.
ARGUMENTS = {
    "init": (),  # reads the weights' shapes alone; they are there beside it
    "old_logprobs": ("weights", "base"),
    "reference_logprobs": ("reference", "base"),  # whichever there is: of LoRA the base
    "gradient": ("weights", "base", "gradient"),
    "apply": ("weights", "optimizer", "gradient"),
}


@dataclass(frozen=True)
class Work:
    """What is to be planned: the config with the mesh's sizes in it, the model, and the tokens of a prompt."""

    config: Config
    arch: Arch
    prompt_tokens: int

    @property
    def longest(self) -> int:
        """The most new tokens of any round."""
        return max(round_.max_new_tokens for round_ in self.config.rounds)

    @property
    def samples(self) -> int:
        """The most rollouts of a prompt in any round."""
        return max(round_.samples or self.config.grpo.samples for round_ in self.config.rounds)

    @property
    def steps(self) -> int:
        """Of the optimizer on one rollout batch."""
        return self.config.grpo.epochs * self.config.grpo.minibatches


def work_of(config: Config, arch: Arch, prompt_tokens: int | None = None) -> Work:
    """prompt_tokens: of the longest prompt; None: all that a row has room for. Raises UserError."""
    if not any(round_.steps for round_ in config.rounds):
        raise UserError("rounds: nothing to plan; give a round with steps")
    longest = max(round_.max_new_tokens for round_ in config.rounds)
    room = config.grpo.row_tokens - longest
    if room < 1:
        raise UserError(
            f"grpo.row_tokens: {config.grpo.row_tokens} tokens hold no prompt and {longest} tokens of max_new_tokens: "
            "raise it or lower them"
        )
    if prompt_tokens is not None and not 1 < prompt_tokens <= room:
        raise UserError(f"--prompt-tokens {prompt_tokens}: grpo.row_tokens leaves room for 2 to {room}")
    return Work(config, arch, prompt_tokens or room)


@dataclass(frozen=True)
class Task:
    """A program before it is compiled.

    phase: of a step. given: bytes a chip of its arguments, by kind. beside: of what else is there meanwhile.
    flops: of one call, on all chips, by the model's own arithmetic. times: it is done for so many parts of this size.
    """

    name: str
    phase: str
    lowered: jax.stages.Lowered
    given: Mapping[str, float]
    beside: Mapping[str, float]
    flops: float = 0.0
    times: float = 1.0


class Gpu(NamedTuple):
    """A GPU that isn't here: bytes that a run may take of its memory, and its compute capability."""

    memory: float
    capability: float

    def mesh(self, stand_ins: Mesh) -> SimpleNamespace:
        """As much of a mesh of such GPUs as a kernel is chosen by."""
        device = SimpleNamespace(platform="gpu", compute_capability=str(self.capability))
        return SimpleNamespace(devices=np.array([device]), shape=stand_ins.shape)


class Programs:
    """Learner and engine of a run on a mesh of devices that may be described only.

    gpu: what the mesh's devices only stand in for; None: nothing is stood in for. `kernel` is the run's, of whole rows.
    Raises UserError as a run does, for kernels that can't be too.
    """

    def __init__(self, work: Work, mesh: Mesh, gpu: Gpu | None = None) -> None:
        config = work.config
        for_rows, for_pages = config.model.attention, config.sampling.attention
        if gpu is not None:  # whose kernels no stand-in has
            model = dataclasses.replace(config.model, attention="auto")
            config = dataclasses.replace(
                config, model=model, sampling=dataclasses.replace(config.sampling, attention="auto")
            )
        self._work, self._mesh, self._arch = work, mesh, work.arch.for_context(config.grpo.row_tokens)
        self.policy, reference = policy_shapes(self._arch, config, mesh), None
        trained, frozen = split(self.policy)
        if config.grpo.loss.kl_weight > 0:
            reference = reference_shapes(self.policy, config.model.dtype)
        self.engine = self._engine(config.sampling)
        self.learner = Learner(self._arch, config.model, config.optimizer, mesh, frozen, reference)
        self.state = self.learner.template(self.policy)
        self.sampled = sampling_shapes(self.engine, self.policy)
        self._trained = trained
        there: Any = mesh if gpu is None else gpu.mesh(mesh)
        self.kernel: Kernel = choose_kernel(for_rows, there, self._arch, config.model.dtype)
        page = page_tokens(config.sampling, there.devices.flat[0].platform)
        of_pages = self.engine.programs.arch, page, config.model.dtype, config.sampling.kv_cache == "int8"
        choose_page_kernel(for_pages, there, *of_pages)
        sizes = self.engine.programs.arch, config.model.dtype, mesh.shape["tensor"]
        # Then they are copies.
        apart = gpu is not None and apart_on_gpu(*sizes, gpu.memory, eight_bit=config.sampling.weights == "int8")
        lies_right = lambda params: not apart and self.engine.lies_right(params)  # noqa: E731
        layout = self.learner.layout(config.grpo, work.longest)
        length = layout.rounded(layout.row_tokens)
        self.micro = layout.rows(length), length
        held: dict[str, float] = {}
        if frozen is not None:
            held["base"] = bytes_on_chip(frozen)
            if not lies_right(frozen):  # it is there in both layouts
                held["sampled base"] = bytes_on_chip(split(self.sampled)[1])
        if reference is not None and frozen is None:
            held["reference"] = bytes_on_chip(reference)
        self.state_bytes = {
            "weights": bytes_on_chip(self.state.params),
            "optimizer": bytes_on_chip(self.state.optimizer),
            **held,
        }
        # Of what is always there, what the sampler reads: the base, in its own layout if there are two.
        self._sampled_kinds = [kind for kind in ("sampled base", "base") if kind in held][:1]
        copied = not lies_right(trained)
        if not copied:
            self._sampled_kinds.append("weights")
        pages = self.engine.programs
        in_a_row = -(-(work.prompt_tokens + work.longest) // (pages.page * mesh.shape["sequence"]))
        # Of a row, its pages: of the prompt and its own; and a segment ahead.
        self.row_bytes = pages.page_bytes() * (in_a_row + 2)
        self.sampled_bytes = copied * bytes_on_chip(split(self.sampled)[0])

    @property
    def whole(self) -> bool:
        """Whether every chip holds all weights."""
        return self._mesh.size == self._mesh.shape["data"]

    def weights_bytes(self) -> tuple[float, float]:
        """Of a chip, of the weights that are sampled from: those that lie in their own dtype, and those in 8 bits, as
        many as they would be in the dtype of compute."""
        nodes = jax.tree.leaves(self.sampled, is_leaf=_is_rounded)
        rounded = [node for node in nodes if _is_rounded(node)]
        codes = bytes_on_chip([node.table for node in rounded])
        return bytes_on_chip([node for node in nodes if not _is_rounded(node)]), codes * jnp.dtype(
            self._work.config.model.dtype
        ).itemsize

    def update(self) -> Iterator[Task]:
        """The trainer's programs, on whole micro-batches of the longest rows."""
        grpo, frozen = self._work.config.grpo, self._work.config.model.lora.rank > 0
        rows = [(self.micro[1], self.micro[1])] * self.micro[0]
        flops = {"gradient": update_flops(self._arch, rows, frozen)}
        flops |= dict.fromkeys(("old_logprobs", "reference_logprobs"), forward_flops(self._arch, rows))
        there = self.state_bytes | {"gradient": self.state_bytes["weights"]}
        for name, lowered in self.learner.lower(self.state, *self.micro, grpo.loss, self._work.steps).items():
            given = {kind: there[kind] for kind in ARGUMENTS[name] if kind in there}
            beside = {kind: size for kind, size in self.state_bytes.items() if kind not in given}
            if name == "init":
                beside.pop("optimizer")  # what it makes
            yield Task(name, "update", lowered, given, beside, flops.get(name, 0.0))

    def rollout(self, kv: float) -> Iterator[Task]:
        """The sampler's programs, each in the largest shape that a step's rollouts ask for.

        kv: bytes of a chip for keys and values. Raises UserError for a request that the memory can't hold.
        """
        programs = self.engine.programs
        if self.sampled_bytes:
            yield self._reshard()
        done = set()
        limited = dataclasses.replace(self._work.config.sampling, kv_memory_gb=kv / 1e9)
        for call in rehearse(self._engine(limited), requests(self._work)):
            if call.name in done:
                continue
            done.add(call.name)
            sampled = {"sampled weights": self.sampled_bytes}
            pages = min(call.bytes, kv)
            there = self.state_bytes | sampled
            read = [*sampled, *self._sampled_kinds] if call.of_weights else []
            given = {"keys and values": pages} | {kind: there[kind] for kind in read}
            beside = {kind: size for kind, size in there.items() if kind not in given}
            made = call.keywords["pages"] * programs.page_bytes() if call.name == "empty" else 0
            beside["keys and values, others"] = max(0.0, kv - pages - made)
            yield Task(call.name, "sample", call.lower(programs, self.sampled), given, beside, self._flops(call))

    def _engine(self, sampling: SamplingConfig) -> Engine:
        engine = Engine(self._arch, sampling, STOPS, self._mesh, self._work.config.model.dtype)
        engine.programs.fixed = True  # a slice is of accelerators, whatever stands in for them here
        return engine

    def _reshard(self) -> Task:
        """The largest array of the weights into the sampling layout, when all others are there already."""
        programs, arrays = self.engine.programs, jax.tree.leaves(self._trained)
        both = list(zip(arrays, programs.lay.ways(self._trained), strict=True))
        array, how = max(both, key=lambda pair: bytes_on_chip(pair[0]))
        result = bytes_on_chip(_placed(jax.eval_shape(lambda array: programs.lay(array, how), array), how.places))
        own = bytes_on_chip(array)
        beside = self.state_bytes | {"weights": self.state_bytes["weights"] - own}
        beside["sampled weights"] = self.sampled_bytes - result
        lowered = programs.lay.lower(array, how)
        # By bytes: what is to lie in 8 bits is rounded before it is sent.
        times = self.sampled_bytes / result
        return Task("reshard", "reshard", lowered, {"weights": own}, beside, times=times)

    def _flops(self, call: Any) -> float:
        if call.name == "decode":
            rows, steps = call.arguments[-1].forced.shape
            length = self._work.prompt_tokens + self._work.longest
            return (
                rows * steps * (forward_flops(self._arch, [(length, 1)]) - forward_flops(self._arch, [(length - 1, 0)]))
            )
        if call.name == "prefill":
            rows, tokens = call.arguments[2].shape
            return forward_flops(self._arch, [(tokens, 0)] * rows)
        if call.name == "prefix":
            return forward_flops(self._arch, [(call.arguments[0].shape[0], 0)])
        return 0.0


def policy_shapes(arch: Arch, config: Config, mesh: Mesh) -> Params:
    """What `load_policy` would give for training: every array's shape, dtype and place."""
    model = config.model
    if not model.lora.rank:
        params = param_shapes(arch)
    else:
        keep = freezer(arch, model.lora.base)

        def frozen(path: Any, shape: jax.ShapeDtypeStruct) -> Any:
            return jax.eval_shape(partial(keep, jax.tree_util.keystr(path, simple=True, separator=".")), shape)

        base = jax.tree_util.tree_map_with_path(frozen, param_shapes(arch, jnp.dtype(model.dtype)))
        params = join(jax.eval_shape(lambda: init_adapters(arch, model.lora, jax.random.key(0))), base)
    return _placed(params, shardings(weight_axes(params, arch), params, mesh, TRAINING_RULES))


def reference_shapes(policy: Params, dtype: str) -> Params:
    """What `reference_weights` would give."""
    _, base = split(policy)
    one = lambda a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype), sharding=a.sharding)  # noqa: E731
    return jax.tree.map(one, policy) if base is None else base


def sampling_shapes(engine: Engine, policy: Params) -> Params:
    """What `Engine.load` would give, of what is trained and of what isn't."""
    trained, frozen = split(policy)
    return join(_loaded(engine, trained), None if frozen is None else _loaded(engine, frozen))


def _loaded(engine: Engine, params: Params) -> Params:
    programs = engine.programs
    if engine.lies_right(params):
        return params
    laid = programs.lay.described(params)
    if programs.stacked:
        return laid
    embedding, lowered = laid.pop("embedding"), programs.lay.unstack.lower(laid)
    return programs.lay.joined(_placed(lowered.out_info, lowered.compile().output_shardings), embedding)


def _is_rounded(node: Any) -> bool:
    return isinstance(node, Flat) and node.steps is not None


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, places)


def bytes_on_chip(tree: Any) -> float:
    """What arrays that are described by shape, dtype and place take of each device; one that stands twice is one."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return float(sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves))


def requests(work: Work) -> list[Request]:
    """A step's, of the longest round: prompts that begin alike for half of their length."""
    draw, prompts = np.random.default_rng(0), work.config.grpo.prompts
    drawn = draw.integers(1, 1000, (prompts, work.prompt_tokens)).astype(np.int32)
    drawn[:, : work.prompt_tokens // 2] = drawn[0, : work.prompt_tokens // 2]
    keys = row_keys(0, "plan", 0, [str(number) for number in range(prompts)], work.samples)
    return [Request(prompt, key, work.longest) for prompt, key in zip(drawn, keys, strict=True)]
