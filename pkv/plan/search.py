"""Settings that fit: meshes and micro-batches, by formulas the fastest first, and what to change when none does."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pkv.config import Config, MeshConfig, UserError
from pkv.model import Arch
from pkv.model.kernels import LANES
from pkv.plan.chips import Slice
from pkv.plan.compiled import Program
from pkv.plan.planning import AT_REST, Plan, described_mesh, make_plan
from pkv.plan.programs import Work

Say = Callable[[str], None]
MOST_CHANGES = 6  # that `nearest` makes
LIGHTER = {"float32": "bfloat16", "bfloat16": "float8"}  # moments
UNSURE = 1.2  # times a chip's memory by formulas may fit: they had up to 1.17 of what was compiled for a gradient
CLEARLY = 0.9  # of its hours a plan has to take with what is said to be quicker
ADAPTERS, ADAPTER_RANK = "--model.lora.rank", 32  # as the shipped configs have it
TRIED_TENSOR = (1, 2, 4, 8)  # wider than a machine of 8, sums over tensor cost more than they save


@dataclass(frozen=True)
class Change:
    """Flags that differ from the config's, in words that its command line takes."""

    flags: tuple[str, ...]
    work: Work


def search(work: Work, wanted: Slice, say: Say, before: tuple[str, ...] = ()) -> tuple[Plan, tuple[str, ...]] | None:
    """The first plan that fits, of the lists of `candidates` as they come and in each the fastest first; None when none
    does. before: flags that `work` has already.

    Which is fastest is by formulas, and so is what is worth compiling; what fits is what was compiled.
    """
    began = time.perf_counter()
    for changes in candidates(work, wanted):
        changes = [Change(_merged(before, change.flags), change.work) for change in changes]
        for change, plan in _promising(changes, wanted, say):
            found = _try(change, wanted, say) if wanted.compiles else plan
            if found is not None and found.fits:
                return dataclasses.replace(found, took_s=time.perf_counter() - began), change.flags
    return None


def _promising(changes: Iterable[Change], wanted: Slice, say: Say) -> list[tuple[Change, Plan]]:
    """Those that may fit, by formulas: first those that do, from the fastest on, then those that lack the least."""
    found, refused = [], {}
    for change in changes:
        try:
            plan = make_plan(change.work, wanted, patient=False, by_formula=True)
        except UserError as error:
            refused.setdefault(str(error), change)
            continue
        if plan.tightest.bytes_per_chip <= UNSURE * plan.tightest.limit_bytes and plan.whole:
            found.append((change, plan))
    for error, change in refused.items():
        say(f"{' '.join(change.flags)}: {error}")

    def order(pair: tuple[Change, Plan]) -> tuple[bool, float]:
        plan = pair[1]
        return (False, plan.hours) if plan.fits else (True, plan.tightest.bytes_per_chip)

    return sorted(found, key=order)


def find(work: Work, wanted: Slice, say: Say, by_search: bool) -> tuple[Plan, tuple[str, ...]]:
    """A plan, and the flags with which it was made or, where it doesn't fit, with which it would; none where nothing
    does. Its time is that of all that was tried. Raises UserError."""
    began = time.perf_counter()
    found = search(work, wanted, say) if by_search else None
    if found is not None:
        return found
    asked = _after_search(work, wanted) if by_search else Change((), work)
    plan = make_plan(asked.work, wanted)
    if plan.fits:
        return plan, asked.flags
    remedy = nearest(asked.work, wanted, plan, say, asked.flags) or _with_adapters(asked, wanted, say)
    plan = dataclasses.replace(plan, took_s=time.perf_counter() - began)
    return plan, () if remedy is None else remedy[1]


def _with_adapters(asked: Change, wanted: Slice, say: Say) -> tuple[Plan, tuple[str, ...]] | None:
    """The last remedy of a full fine-tuning, which trains something else: LoRA, and what that needs to fit."""
    config = asked.work.config
    if config.model.lora.rank:
        return None
    lora = dataclasses.replace(config.model.lora, rank=ADAPTER_RANK)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))
    flags = (*asked.flags, f"{ADAPTERS} {ADAPTER_RANK}")
    if config.optimizer.name == "muon":  # which LoRA is refused with
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="adamw"))
        flags = (*flags, "--optimizer.name adamw")
    work = dataclasses.replace(asked.work, config=config)
    plan = _try(Change(flags, work), wanted, say)
    if plan is None:
        return None
    return (plan, flags) if plan.fits else nearest(work, wanted, plan, say, flags)


def _after_search(work: Work, wanted: Slice) -> Change:
    """What is gone on from when a search has found nothing: the config's own mesh or, where the slice has no such mesh,
    the one that by formulas lacks the least."""
    try:
        described_mesh(work.config, wanted)
    except UserError:
        found: list[tuple[float, Change]] = []
        for change in itertools.chain.from_iterable(candidates(work, wanted)):
            with contextlib.suppress(UserError):  # said by the search
                found.append((make_plan(change.work, wanted, patient=False, by_formula=True).tightest.lacks, change))
        if not found:
            raise
        return min(found, key=lambda pair: pair[0])[1]
    return Change((), work)


def nearest(
    work: Work, wanted: Slice, failed: Plan, say: Say, before: tuple[str, ...] = ()
) -> tuple[Plan, tuple[str, ...]] | None:
    """What to change so that it fits, found by trying: one setting more at a time, those that cost least first, then
    other meshes with all of them; where nothing is compiled, which takes minutes, without them first. before: flags
    that `work` has already."""
    asked, flags, tried = work, before, [work.config]
    for _ in range(MOST_CHANGES):
        change = _relief(work, failed, tried, wanted)
        if change is None:
            break
        tried.append(change.work.config)
        flags, work = _merged(flags, change.flags), change.work
        plan = _try(Change(flags, work), wanted, say)
        if plan is None:
            break
        if plan.fits:
            return plan, flags
        failed = plan
    found = None if wanted.compiles and flags else search(asked, wanted, say, before)
    return found or (search(work, wanted, say, flags) if flags else None)


def candidates(work: Work, wanted: Slice) -> Iterator[list[Change]]:
    """All meshes of the whole slice, with the rows of a micro-batch as the config has them, then as few as may be.

    Tensor and fsdp hold the state; data, over slices at least, takes the rest. Rows are spread further by position when
    nothing else is left.
    """
    spread = max(1, work.config.mesh.sequence)  # -1: the rest
    for sequence, rows in itertools.product(
        (spread, 2 * spread, 4 * spread), dict.fromkeys((work.config.grpo.micro_rows, 1))
    ):
        found = []
        for mesh in _meshes(work.arch, wanted, sequence):
            flags = [f"--mesh.{name} {size}" for name, size in dataclasses.asdict(mesh).items()]
            grpo = dataclasses.replace(work.config.grpo, micro_rows=rows)
            config = dataclasses.replace(work.config, mesh=mesh, grpo=grpo)
            found.append(Change((*flags, f"--grpo.micro_rows {rows}"), dataclasses.replace(work, config=config)))
        yield found


def _meshes(arch: Arch, wanted: Slice, sequence: int) -> Iterator[MeshConfig]:
    chips = wanted.chips // wanted.slices
    for tensor in TRIED_TENSOR:
        ways = tensor * sequence
        if chips % ways or wanted.host_chips % ways or arch.heads % ways:
            continue
        if arch.ffn % tensor or arch.vocab_size % tensor:
            continue
        for fsdp in range(1, chips // ways + 1):
            if chips // ways % fsdp == 0 and arch.hidden % (fsdp * sequence) == 0:
                yield MeshConfig(wanted.slices * (chips // ways // fsdp), fsdp, sequence, tensor)


def _try(change: Change, wanted: Slice, say: Say) -> Plan | None:
    """A plan that stops at the first program that doesn't fit; None where the mesh can't be."""
    try:
        plan = make_plan(change.work, wanted, patient=False)
    except UserError as error:
        say(f"{' '.join(change.flags)}: {error}")
        return None
    tight = plan.tightest
    verdict = "fits" if plan.fits else f"{tight.name} needs {tight.lacks / 2**30:.2f} GiB more"
    say(f"{' '.join(change.flags)}: {verdict}")
    return plan


def _relief(work: Work, failed: Plan, tried: Sequence[Config], wanted: Slice) -> Change | None:
    """One change that takes memory off the program that lacks the most, and makes no config that was tried; None when
    nothing is left to change."""
    config, worst = work.config, failed.tightest
    first = next((relief for relief in _reliefs(config, worst, wanted) if relief[1] not in tried), None)
    return None if first is None else Change(tuple(first[0].splitlines()), dataclasses.replace(work, config=first[1]))


def _reliefs(config: Config, worst: Program, wanted: Slice) -> Iterator[tuple[str, Config]]:
    """Flags that take memory off a program, a line each where one needs another, those that cost the least first."""
    model, grpo = config.model, config.grpo
    at_rest = worst.name == AT_REST
    pages = worst.kinds.get("keys and values", 0.0) + worst.kinds.get("keys and values, others", 0.0)
    eight_bit = dataclasses.replace(config.sampling, kv_cache="int8")
    # Of a row's bytes they take a little more than half, for their scales.
    if at_rest and config.sampling != eight_bit and worst.bytes_per_chip - 0.45 * pages <= worst.limit_bytes:
        yield "--sampling.kv_cache int8", dataclasses.replace(config, sampling=eight_bit)
    if at_rest and config.sampling.kv_memory_gb:  # less than a row takes: whatever else were freed wouldn't be for it
        yield (
            "--sampling.kv_memory_gb 0",
            dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, kv_memory_gb=0.0)),
        )
    if worst.phase == "sample" and wanted.compiles and 0 < config.sampling.page_tokens < LANES:
        # A TPU's memory is in rows of LANES: of small heads smaller pages take twice their size, and are copied.
        whole = dataclasses.replace(config.sampling, page_tokens=LANES)
        yield f"--sampling.page_tokens {LANES}", dataclasses.replace(config, sampling=whole)
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
    lighter = dataclasses.replace(config.sampling, weights="int8")
    copied = _copied(config, worst)  # nearly all of it the layers'
    enough = copied and worst.bytes_per_chip - 0.45 * copied <= worst.limit_bytes
    if enough and config.sampling != lighter and model.lora.base == "plain":
        yield "--sampling.weights int8", dataclasses.replace(config, sampling=lighter)
    first = not model.lora.rank or worst.lacks <= worst.kinds.get("optimizer", 0.0) / 2  # adapters have few
    if first:
        yield from _lighter_moments(config)
    if worst.name == "gradient" and model.remat == "all":
        offload = dataclasses.replace(model, remat="offload")
        yield "--model.remat offload", dataclasses.replace(config, model=offload)
    if model.lora.rank and model.lora.base == "plain":
        lora = dataclasses.replace(model.lora, base="int8")
        sampling = dataclasses.replace(config.sampling, weights="plain")  # it is sampled from as it lies
        needs = "\n--sampling.weights plain" * (config.sampling.weights != "plain")
        changed = dataclasses.replace(config, model=dataclasses.replace(model, lora=lora), sampling=sampling)
        yield f"--model.lora.base int8{needs}", changed
    if not first:
        yield from _lighter_moments(config)


def _lighter_moments(config: Config) -> Iterator[tuple[str, Config]]:
    if config.optimizer.name == "adamw" and config.optimizer.moments in LIGHTER:
        changed = dataclasses.replace(config.optimizer, moments=LIGHTER[config.optimizer.moments])
        yield f"--optimizer.moments {changed.moments}", dataclasses.replace(config, optimizer=changed)


def _copied(config: Config, program: Program) -> float:
    """Bytes of a chip that sampling has to itself while a program runs: of LoRA perhaps none."""
    return program.kinds.get("sampled base" if config.model.lora.rank else "sampled weights", 0.0)


def quicker(plan: Plan) -> tuple[str, float] | None:
    """A flag by which a plan that fits would take clearly less time, and the hours then, by formulas; None without one.

    Where decoding takes most of the time its weights may lie in 8 bits, if the chip is known to gain by it.
    """
    config, chip = plan.work.config, plan.wanted.chip
    decoding = sum(round_.steps * round_.seconds.decode for round_ in plan.rounds) / 3600
    may = chip.int8_weights < 1 and config.sampling.weights == "plain" and config.model.lora.base == "plain"
    if not (may and plan.fits and decoding > plan.hours / 2 and any(_copied(config, p) for p in plan.programs)):
        return None
    sampling = dataclasses.replace(config.sampling, weights="int8")
    lighter = dataclasses.replace(plan.work, config=dataclasses.replace(config, sampling=sampling))
    before, after = (
        make_plan(work, plan.wanted, patient=False, by_formula=True).hours for work in (plan.work, lighter)
    )
    hours = plan.hours * after / before
    return ("--sampling.weights int8", hours) if hours <= CLEARLY * plan.hours else None


def _merged(before: tuple[str, ...], after: tuple[str, ...]) -> tuple[str, ...]:
    """Later flags in the place of earlier ones of the same name."""
    found = {flag.split()[0]: flag for flag in (*before, *after)}
    return tuple(found.values())
