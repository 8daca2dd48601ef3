"""Settings that fit: meshes and micro-batches, those that send the least first, and what to change when none does."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pkv.config import Config, MeshConfig, UserError
from pkv.plan.chips import Slice
from pkv.plan.compiled import Program
from pkv.plan.planning import AT_REST, Plan, make_plan
from pkv.plan.programs import Work

Say = Callable[[str], None]
MOST_CHANGES = 6  # that `nearest` makes
LIGHTER = {"float32": "bfloat16", "bfloat16": "float8"}  # moments
TRIED_TENSOR = (1, 2, 4, 8)  # wider than a machine of 8, sums over tensor cost more than they save


@dataclass(frozen=True)
class Change:
    """Flags that differ from the config's, in words that its command line takes."""

    flags: tuple[str, ...]
    work: Work


def search(work: Work, wanted: Slice, say: Say, before: tuple[str, ...] = ()) -> tuple[Plan, tuple[str, ...]] | None:
    """The first plan that fits among `candidates`; None when none does. before: flags that `work` has already."""
    for change in candidates(work, wanted):
        flags = _merged(before, change.flags)
        plan = _try(Change(flags, change.work), wanted, say)
        if plan is not None and plan.fits:
            return plan, flags
    return None


def nearest(work: Work, wanted: Slice, failed: Plan, say: Say) -> tuple[Plan, tuple[str, ...]] | None:
    """What to change so that it fits, found by trying: one setting more at a time, those that cost least first, then
    other meshes with all of them; where nothing is compiled, which takes minutes, without them first."""
    asked, flags = work, ()
    for _ in range(MOST_CHANGES):
        change = _relief(work, failed)
        if change is None:
            break
        flags, work = _merged(flags, change.flags), change.work
        plan = _try(Change(flags, work), wanted, say)
        if plan is None:
            break
        if plan.fits:
            return plan, flags
        failed = plan
    found = None if wanted.compiles and flags else search(asked, wanted, say)
    return found or (search(work, wanted, say, flags) if flags else None)


def candidates(work: Work, wanted: Slice) -> Iterator[Change]:
    """Meshes of the whole slice, and the rows of a micro-batch as the config has them, then as few as there may be.

    Small tensor axes come first: what is sent for them is sent in every layer; fsdp takes the rest of a slice, since it
    holds the state; slices are data parallel. Rows are spread further by position when nothing else is left.
    """
    chips, arch, spread = wanted.chips // wanted.slices, work.arch, max(1, work.config.mesh.sequence)  # -1: the rest
    for sequence, rows in itertools.product(
        (spread, 2 * spread, 4 * spread), dict.fromkeys((work.config.grpo.micro_rows, 1))
    ):
        for tensor in TRIED_TENSOR:
            ways = tensor * sequence
            if (
                chips % ways
                or wanted.host_chips % ways
                or arch.heads % ways
                or arch.ffn % tensor
                or arch.vocab_size % tensor
            ):
                continue
            fsdp = math.gcd(chips // ways, arch.hidden)
            if fsdp * ways != chips:
                continue
            mesh = MeshConfig(data=wanted.slices, fsdp=fsdp, sequence=sequence, tensor=tensor)
            flags = [f"--mesh.{name} {size}" for name, size in dataclasses.asdict(mesh).items()]
            config = dataclasses.replace(
                work.config, mesh=mesh, grpo=dataclasses.replace(work.config.grpo, micro_rows=rows)
            )
            yield Change((*flags, f"--grpo.micro_rows {rows}"), dataclasses.replace(work, config=config))


def _try(change: Change, wanted: Slice, say: Say) -> Plan | None:
    """A plan that stops at the first program that doesn't fit; None where the mesh can't be."""
    try:
        plan = make_plan(change.work, wanted, patient=False)
    except UserError as error:
        say(f"{' '.join(change.flags)}: {error}")
        return None
    tight, spare = plan.tightest, plan.tightest.limit_bytes - plan.tightest.bytes_per_chip
    verdict = "fits" if plan.fits else f"{tight.name} needs {-spare / 2**30:.2f} GiB more"
    say(f"{' '.join(change.flags)}: {verdict}")
    return plan


def _relief(work: Work, failed: Plan) -> Change | None:
    """One change that takes memory off the program that lacks the most; None when nothing is left to change."""
    config, worst = work.config, failed.tightest
    first = next(_reliefs(config, worst), None)
    return None if first is None else Change(first[:1], dataclasses.replace(work, config=first[1]))


def _reliefs(config: Config, worst: Program) -> Iterator[tuple[str, Config]]:
    """Flags that take memory off a program, those that cost the least first."""
    model, grpo, optimizer = config.model, config.grpo, config.optimizer
    at_rest = worst.name == AT_REST
    pages = worst.kinds.get("keys and values", 0.0) + worst.kinds.get("keys and values, others", 0.0)
    eight_bit = dataclasses.replace(config.sampling, kv_cache="int8")
    # Of a row's bytes they take a little more than half, for their scales.
    if at_rest and config.sampling != eight_bit and worst.bytes_per_chip - 0.45 * pages <= worst.limit_bytes:
        yield "--sampling.kv_cache int8", dataclasses.replace(config, sampling=eight_bit)
    if worst.phase == "sample" and not at_rest:
        gigabytes = math.floor(0.95 * (worst.limit_bytes - worst.bytes_per_chip + pages) / 1e8) / 10
        if 0 < gigabytes != config.sampling.kv_memory_gb:
            changed = dataclasses.replace(config.sampling, kv_memory_gb=gigabytes)
            yield f"--sampling.kv_memory_gb {gigabytes:g}", dataclasses.replace(config, sampling=changed)
    if worst.name in ("gradient", "old_logprobs", "reference_logprobs"):
        if model.remat in ("none", "cheap"):
            yield "--model.remat all", dataclasses.replace(config, model=dataclasses.replace(model, remat="all"))
        if grpo.micro_rows > 1:
            smaller = dataclasses.replace(grpo, micro_rows=1)
            yield "--grpo.micro_rows 1", dataclasses.replace(config, grpo=smaller)
    if optimizer.name == "adamw" and optimizer.moments in LIGHTER:
        changed = dataclasses.replace(optimizer, moments=LIGHTER[optimizer.moments])
        yield f"--optimizer.moments {changed.moments}", dataclasses.replace(config, optimizer=changed)
    if worst.name == "gradient" and model.remat == "all":
        offload = dataclasses.replace(model, remat="offload")
        yield "--model.remat offload", dataclasses.replace(config, model=offload)
    if model.lora.rank and model.lora.base == "plain":
        lora = dataclasses.replace(model.lora, base="int8")
        yield "--model.lora.base int8", dataclasses.replace(config, model=dataclasses.replace(model, lora=lora))


def _merged(before: tuple[str, ...], after: tuple[str, ...]) -> tuple[str, ...]:
    """Later flags in the place of earlier ones of the same name."""
    found = {flag.split()[0]: flag for flag in (*before, *after)}
    return tuple(found.values())
