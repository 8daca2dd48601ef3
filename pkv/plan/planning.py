"""A run on a slice: programs compiled, memory by kind, time by roofline, the rounds' hours and money."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from pkv.config import Config, UserError
from pkv.mesh import BATCH_AXES, make_mesh
from pkv.plan.arithmetic import by_arithmetic
from pkv.plan.chips import Slice, read_slice
from pkv.plan.compiled import Program, compile_program
from pkv.plan.models import model_shape
from pkv.plan.programs import Programs, Task, Work, bytes_on_chip, work_of
from pkv.plan.roofline import ASSUMED as ASSUMED
from pkv.plan.roofline import (
    Layout,
    Seconds,
    again,
    compute_seconds,
    decode_step_seconds,
    link_seconds,
    micro_batches,
    rollout_flops,
    rows_at_once,
    step_flops,
)
from pkv.sampling.engine import SHARE_OF_FREE
from pkv.tracking import Progress

FIRST = ("gradient", "apply", "decode")  # what is likeliest not to fit, and costs least to know early


AT_REST = "sampling at rest"  # all that is there without a single page


@dataclass(frozen=True)
class Round:
    """What a round takes: seconds of a step by phase, and hours."""

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

    wanted: Slice
    mesh: Mapping[str, int]
    programs: tuple[Program, ...]
    kv_bytes: float
    rows: float
    micro: tuple[int, int]
    rounds: tuple[Round, ...]
    whole: bool

    @property
    def fits(self) -> bool:
        return self.whole and all(program.fits for program in self.programs)

    @property
    def tightest(self) -> Program:
        """The program with the most bytes on a chip."""
        return max(self.programs, key=lambda program: program.bytes_per_chip)

    @property
    def hours(self) -> float:
        return sum(round_.hours for round_ in self.rounds)

    @property
    def dollars(self) -> float:
        return self.hours * self.wanted.chips * self.wanted.chip.dollars


def plan(config: Config, topology: str, prompt_tokens: int | None = None) -> Plan:
    """The plan of a config's run on a slice such as v5e:4x8. Raises UserError as `make_plan` does."""
    return make_plan(work_of(config, model_shape(config.model.path), prompt_tokens), read_slice(topology))


def described_mesh(config: Config, wanted: Slice) -> Mesh:
    """The config's mesh over a slice that need not be there; CPU devices stand in for GPUs, and compile nothing.

    Raises UserError without libtpu, or for a mesh.
    """
    if not wanted.compiles:
        return make_mesh(config.mesh, _stand_ins(wanted))
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # there is no TPU here that two processes could fight for
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor a metadata server to be asked
    more: dict[str, Any] = {"num_slices": wanted.slices} if wanted.slices > 1 else {}
    if max(wanted.grid) == 1:
        more["chips_per_host_bounds"] = (1, 1, 1)  # or a machine of four is meant
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=wanted.topology, **more).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"--topology {wanted.name}: cannot be described here ({lines[0][:160]}); install pkv[tpu], which brings "
            "libtpu, or name another grid"
        ) from None
    return make_mesh(config.mesh, devices)


def _stand_ins(wanted: Slice) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # devices are there already: as many as there are
        jax.config.update("jax_num_cpu_devices", max(wanted.chips, 1))
    found = jax.devices("cpu")
    if len(found) < wanted.chips:
        raise UserError(f"--topology {wanted.name}: only {len(found)} devices can be stood in for here; start anew")
    return found[: wanted.chips]


def make_plan(work: Work, wanted: Slice, patient: bool = True) -> Plan:
    """Compile everything, with a bar, and look whether it fits.

    patient: goes on when a program doesn't fit. Raises UserError for a mesh or a config that can't be.
    """
    mesh = described_mesh(work.config, wanted)
    limit = wanted.chip.hbm_gib * 2**30
    probe = Programs(work, mesh, limit)
    always = sum(probe.state_bytes.values()) + probe.sampled_bytes
    kv = work.config.sampling.kv_memory_gb * 1e9 or max(0.0, SHARE_OF_FREE * (limit - always))
    found: list[Program] = []
    whole = kv > 0
    if not whole:  # not even the state leaves room for anything
        kinds = probe.state_bytes | {"sampled weights": probe.sampled_bytes}
        found.append(Program(AT_REST, "sample", kinds, limit, 0.0, {}, 0.0))
    programs = Programs(work, mesh, kv) if whole else probe
    if not wanted.compiles:
        found += by_arithmetic(programs, work, wanted, mesh, kv) if whole else []
    tasks = _in_order(programs, whole) if wanted.compiles else []
    with Progress(len(tasks), f"compiling for {wanted.name}") as progress:
        for task in tasks:
            found.append(program := compile_program(task, wanted))
            progress.advance(1, program=task.name, gib_a_chip=program.bytes_per_chip / 2**30)
            if not patient and not program.fits:
                whole = False
                break
    layout = _layout(work, wanted, mesh, programs, kv)
    rounds = tuple(_round(work, layout, wanted, programs.micro, found, number) for number in range(len(_rounds(work))))
    rows = rows_at_once(work, layout, work.longest)
    return Plan(wanted, dict(mesh.shape), tuple(found), kv, rows, programs.micro, rounds, whole)


def _in_order(programs: Programs, rollouts: bool) -> list[Task]:
    tasks = list(programs.update())
    if rollouts:
        tasks += programs.rollout()
    return sorted(tasks, key=lambda task: FIRST.index(task.name) if task.name in FIRST else len(FIRST))


def _rounds(work: Work) -> list[Any]:
    return [round_ for round_ in work.config.rounds if round_.steps]


def _layout(work: Work, wanted: Slice, mesh: Mesh, programs: Programs, kv: float) -> Layout:
    shape = mesh.shape
    page = programs.engine.programs.page_bytes() / programs.engine.programs.page
    shards = math.prod(shape[name] for name in BATCH_AXES)
    weights = bytes_on_chip(programs.sampled)
    return Layout(wanted.chips, shards, shape["tensor"], shape["sequence"], weights, page / shape["sequence"], kv)


def _round(
    work: Work, layout: Layout, wanted: Slice, micro: tuple[int, int], programs: list[Program], number: int
) -> Round:
    """A round's step by roofline, with what the compiled programs send."""
    round_, chip = _rounds(work)[number], wanted.chip
    config = dataclasses.replace(work.config, rounds=(round_,))
    work = dataclasses.replace(work, config=config)
    budget, by_name = round_.max_new_tokens, {program.name: program for program in programs}
    sent = {name: sum(program.sent.values()) for name, program in by_name.items()}
    rows = rows_at_once(work, layout, budget)
    mean = ASSUMED["mean_response"] * budget
    length = work.prompt_tokens + mean / 2
    queue = config.grpo.prompts * work.samples / layout.shards
    steps = max(float(budget), queue * mean / rows)
    # A decode program is a segment of so many steps.
    step_sent = sent.get("decode", 0.0) / config.sampling.segment
    decode = steps * decode_step_seconds(work, layout, chip, rows, length, step_sent)
    prompts = rollout_flops(work, 0)
    count = micro_batches(work, *micro, budget) * config.grpo.epochs
    update = compute_seconds(step_flops(work, budget) * again(work), wanted.chips, chip)
    update += count * link_seconds(sent.get("gradient", 0.0), chip)
    update += sum(by_name[name].seconds_estimate for name in ("apply",) if name in by_name) * work.steps
    reshard = by_name["reshard"].seconds_estimate if "reshard" in by_name else 0.0
    prefill = compute_seconds(prompts, wanted.chips, chip)
    return Round(round_.name, round_.steps, Seconds(prefill, decode, reshard, update))
