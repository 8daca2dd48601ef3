"""A run on a slice: programs compiled, memory by kind, time by roofline, the rounds' hours and money."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies
from jax.sharding import Mesh
from jaxlib import xla_client

from pkv.config import Config, RoundConfig, UserError
from pkv.mesh import BATCH_AXES, make_mesh
from pkv.plan.arithmetic import SLACK, by_arithmetic
from pkv.plan.chips import Slice, read_slice
from pkv.plan.compiled import Program, compile_program
from pkv.plan.models import model_shape
from pkv.plan.programs import Gpu, Programs, Task, Work, work_of
from pkv.plan.roofline import Seconds, Spread, rows_at_once, step_seconds
from pkv.sampling.engine import SHARE_OF_FREE
from pkv.tracking import Progress

FIRST = ("gradient", "apply", "decode")  # what is likeliest not to fit, and costs least to know early
AT_REST = "sampling at rest"  # all that is there before a row is, and what one row needs


@dataclass(frozen=True)
class Round:
    """What a round takes: seconds of a step by phase, on average over the round's budgets, and hours."""

    name: str
    steps: int
    seconds: Seconds

    @property
    def hours(self) -> float:
        return self.steps * self.seconds.total / 3600


@dataclass(frozen=True)
class Plan:
    """What was found. kv_bytes: of a chip, for keys and values. rows: that a shard decodes at the same time.

    micro: rows and tokens of a micro-batch. whole: every program was compiled; a plan that fails may stop early.
    """

    work: Work
    wanted: Slice
    mesh: Mapping[str, int]
    programs: tuple[Program, ...]
    kv_bytes: float
    rows: float
    micro: tuple[int, int]
    rounds: tuple[Round, ...]
    whole: bool
    took_s: float

    @property
    def fits(self) -> bool:
        return self.whole and all(program.fits for program in self.programs)

    @property
    def tightest(self) -> Program:
        """The program that lacks the most, or has the least to spare."""
        return max(self.programs, key=lambda program: program.lacks)

    @property
    def hours(self) -> float:
        return sum(round_.hours for round_ in self.rounds)

    @property
    def dollars(self) -> float:
        return self.hours * self.wanted.chips * self.wanted.chip.dollars


def plan(config: Config, topology: str, prompt_tokens: int | None = None) -> Plan:
    """The plan of a config's run on a slice such as v5e:4x8. Raises UserError as `make_plan` does."""
    return make_plan(
        work_of(config, model_shape(config.model.path, config.model.context), prompt_tokens), read_slice(topology)
    )


def described_mesh(config: Config, wanted: Slice) -> Mesh:
    """The config's mesh over a slice that need not be there; CPU devices stand in for GPUs, and compile nothing.

    Raises UserError without libtpu, for a mesh, or for a machine that would have nothing to sample.
    """
    mesh = make_mesh(config.mesh, _devices(wanted))
    ways = mesh.shape["sequence"] * mesh.shape["tensor"]
    if wanted.host_chips % ways:
        raise UserError(
            f"mesh: sequence × tensor = {ways}, and a machine of {wanted.name} has {wanted.host_chips} chips and "
            "samples by itself; make them a divisor of that"
        )
    if wanted.machines > config.grpo.prompts:
        raise UserError(
            f"grpo.prompts: {config.grpo.prompts} a step are too few for the {wanted.machines} machines of "
            f"{wanted.name}, each of which samples prompts of its own; raise it"
        )
    return mesh


def _devices(wanted: Slice) -> Sequence[Any]:
    if not wanted.compiles:
        return _stand_ins(wanted.chips)
    more: dict[str, Any] = {"num_slices": wanted.slices} if wanted.slices > 1 else {}
    if wanted.chip.kind == "v4":
        more["chip_config_name"] = "megacore"  # one device a chip, as on such machines; libtpu's default has two here
    if max(wanted.grid) == 1:
        more["chips_per_host_bounds"] = (1, 1, 1)  # or a machine of four is meant
    try:
        with _no_tpu_here():
            devices = topologies.get_topology_desc(platform="tpu", topology_name=wanted.topology, **more).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"--topology {wanted.name}: cannot be described here ({lines[0][:160]}); install pkv[tpu], which brings "
            "libtpu, or name another grid"
        ) from None
    return devices


@contextlib.contextmanager
def _no_tpu_here() -> Iterator[None]:
    """While libtpu starts: no TPU that two processes could fight for, nor a metadata server to be asked."""
    before = dict(os.environ)
    for name in ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY"):
        os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


@functools.cache
def _stand_ins(count: int) -> Sequence[Any]:
    """CPU devices of a client of their own, so that neither how many JAX has here nor what it has done limits them.

    JAX itself makes them only before anything else was done, and for the whole process.
    """
    return xla_client.make_cpu_client(num_devices=count).devices()


def make_plan(work: Work, wanted: Slice, patient: bool = True, by_formula: bool = False) -> Plan:
    """Compile everything, with a bar, and look whether it fits.

    patient: goes on when something doesn't fit. by_formula: nothing is compiled, as for GPUs. Raises UserError for a
    mesh or a config that can't be.
    """
    began = time.perf_counter()
    context, needed = work.arch.max_positions, work.prompt_tokens + work.longest
    if needed > context:
        raise UserError(
            f"the model's context: {context} tokens; prompts and max_new_tokens need {needed}: lower max_new_tokens or "
            "say --prompt-tokens, or stretch the model with model.context"
        )
    mesh = described_mesh(work.config, wanted)
    limit = wanted.chip.hbm_gib * 2**30
    gpu = None if wanted.compiles else Gpu((1 - SLACK) * limit, wanted.chip.capability)
    programs = Programs(work, mesh, gpu)
    always = sum(programs.state_bytes.values()) + programs.sampled_bytes
    kv = work.config.sampling.kv_memory_gb * 1e9 or max(0.0, SHARE_OF_FREE * (limit - always))
    found: list[Program] = []
    whole = kv >= programs.row_bytes
    if not whole:  # nothing can be said before there is room for one row
        kinds = programs.state_bytes | {
            "sampled weights": programs.sampled_bytes,
            "keys and values": programs.row_bytes,
        }
        found.append(Program(AT_REST, "sample", kinds, min(limit, always + kv), 0.0, {}, 0.0))
    spread = _spread(wanted, mesh, programs, kv)
    compiles = wanted.compiles and not by_formula
    if whole and not compiles:
        found += by_arithmetic(programs, work, wanted, spread)
    tasks = _in_order(programs, kv if whole else None) if compiles and (whole or patient) else []
    with Progress(len(tasks), f"compiling for {wanted.name}") as progress:
        for task in tasks:
            found.append(program := compile_program(task, wanted, work.config.model.dtype))
            progress.advance(1, program=task.name, gib_a_chip=program.bytes_per_chip / 2**30)
            if not patient and not program.fits:
                whole = False
                break
    sent = {program.name: program.sent for program in found}
    rounds = [
        Round(round_.name, round_.steps, _round_seconds(work, round_, spread, wanted, sent))
        for round_ in work.config.rounds
        if round_.steps
    ]
    rows = rows_at_once(work, spread, work.longest)
    took = time.perf_counter() - began
    return Plan(work, wanted, dict(mesh.shape), tuple(found), kv, rows, programs.micro, tuple(rounds), whole, took)


def _round_seconds(
    work: Work, round_: RoundConfig, spread: Spread, wanted: Slice, sent: Mapping[str, Mapping[str, float]]
) -> Seconds:
    """A step's, as a mean over the round's budgets, each of which has an equal part of its steps (`Stage.budget`)."""
    found = []
    for budget in (*round_.budgets, round_.max_new_tokens)[-round_.steps :]:
        alone = dataclasses.replace(round_, max_new_tokens=budget, budgets=())
        part = dataclasses.replace(work, config=dataclasses.replace(work.config, rounds=(alone,)))
        found.append(dataclasses.astuple(step_seconds(part, spread, wanted, sent)))
    return Seconds(*map(statistics.fmean, zip(*found, strict=True)))


def _in_order(programs: Programs, kv: float | None) -> list[Task]:
    """The trainer's programs and, where there is room for rows, the sampler's."""
    tasks = list(programs.update())
    if kv is not None:
        tasks += programs.rollout(kv)
    return sorted(tasks, key=lambda task: FIRST.index(task.name) if task.name in FIRST else len(FIRST))


def _spread(wanted: Slice, mesh: Mesh, programs: Programs, kv: float) -> Spread:
    shape, pages = mesh.shape, programs.engine.programs
    plain, in_8_bits = programs.weights_bytes()
    return Spread(
        wanted.chips,
        math.prod(shape[name] for name in BATCH_AXES),
        shape["fsdp"],
        shape["tensor"],
        shape["sequence"],
        plain + in_8_bits,
        plain + wanted.chip.int8_weights * in_8_bits,
        programs.sampled_bytes,
        programs.state_bytes["weights"],
        pages.page_bytes() / pages.page / shape["sequence"],
        kv,
        programs.micro,
    )
