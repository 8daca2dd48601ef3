"""Scale on paper: a step of 14B and of 72B on 8 to 4,096 chips, by the roofline of `pkv plan`, nothing compiled.

    python benchmarks/scale.py            # Markdown tables

What fits and what chips send each other is by the formulas of pkv/plan/arithmetic.py. A step has 512 rollouts, whatever
the chips, or sixteen for every group of chips that shares a row. A machine samples prompts of its own,
so there are as many prompts as machines at least: on many machines 512 rollouts make small groups, and at last none.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from pkv.config import find_config, load_config
from pkv.model import param_shapes
from pkv.plan import model_shape, work_of
from pkv.plan.arithmetic import activations, sent_by_formula
from pkv.plan.chips import Chip, Slice, read_slice
from pkv.plan.programs import Work
from pkv.plan.roofline import Seconds, Spread, micro_batches, sent_seconds, step_seconds
from pkv.sampling.engine import SHARE_OF_FREE

CHIPS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST_SLICE = {"v5e": 256, "v6e": 256, "v5p": 4096}
ROLLOUTS = 512
A_SHARD = 16
LEAST_GROUP = 2  # rollouts of a prompt; one alone has nothing to be compared with
MOMENTS = {"float32": 8.0, "bfloat16": 4.0, "float8": 2.0}  # bytes of a weight's two moments


@dataclass(frozen=True)
class Case:
    """A model on a kind of chip; tensor: chips that share a row's layers."""

    config: str
    kind: str
    tensor: int


CASES = (Case("qwen2.5-14b", "v6e", 4), Case("qwen2.5-14b", "v5p", 4), Case("qwen2.5-72b", "v5p", 4))


def placed(work: Work, wanted: Slice, tensor: int, rollouts: int) -> tuple[Work, Spread] | str:
    """The step's work, and how it is spread; or why it can't be.

    Of all ways to share chips between fsdp and data that fit, the one with the shortest step; with moments in 8 bits
    where none fits otherwise.
    """
    prompts = max(rollouts // work.samples, wanted.machines)
    if rollouts < LEAST_GROUP * prompts:
        return f"fewer than {LEAST_GROUP} rollouts for each of {wanted.machines} machines"
    config, samples = work.config, rollouts // prompts
    rounds = tuple(dataclasses.replace(round_, samples=samples) for round_ in config.rounds)
    grpo = dataclasses.replace(config.grpo, prompts=prompts, samples=samples)
    sampling = dataclasses.replace(config.sampling, slots=rollouts)
    for moments in dict.fromkeys((config.optimizer.moments, "float8")):
        optimizer = dataclasses.replace(config.optimizer, moments=moments)
        config = dataclasses.replace(config, grpo=grpo, sampling=sampling, rounds=rounds, optimizer=optimizer)
        work = dataclasses.replace(work, config=config)
        ways = (spread_over(work, wanted, fsdp, tensor) for fsdp in divisors(wanted.chips // wanted.slices // tensor))
        if found := [spread for spread in ways if spread is not None]:
            return work, min(found, key=lambda spread: seconds_of(work, spread, wanted).total)
    return "does not fit"


def spread_over(work: Work, wanted: Slice, fsdp: int, tensor: int) -> Spread | None:
    """None where a chip lacks the memory for a micro-batch's gradient, or for one row's keys and values."""
    arch, limit, shards = work.arch, wanted.chip.hbm_gib * 2**30, wanted.chips // tensor
    weights, row = weights_of(work), work.config.grpo.row_tokens
    sampled, trained = weights * 2 / tensor, weights * 4 / fsdp / tensor
    held = trained * (1 + MOMENTS[work.config.optimizer.moments] / 4)
    kv_token = 2 * arch.layers * arch.kv_heads * arch.head_size * 2 / tensor
    kv = SHARE_OF_FREE * (limit - sampled - held)
    spread = Spread(wanted.chips, shards, fsdp, tensor, 1, *[sampled] * 3, trained, kv_token, kv, (shards, row))
    of_gradient = held + trained + activations(work, spread, "splash")
    return spread if of_gradient <= limit and kv >= kv_token * row else None


def seconds_of(work: Work, spread: Spread, wanted: Slice) -> Seconds:
    """A step's."""
    return step_seconds(work, spread, wanted, sent_by_formula(work, spread, wanted))


def weights_of(work: Work) -> float:
    """How many the model has."""
    return float(sum(math.prod(leaf.shape) for leaf in leaves(param_shapes(work.arch))))


def divisors(number: int) -> list[int]:
    """In order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def slice_of(kind: str, chips: int) -> Slice:
    """Slices of a kind that have so many chips in all."""
    chip: Chip = read_slice(f"{kind}:1x1x1" if kind == "v5p" else f"{kind}:1x1").chip
    slices = -(-chips // LARGEST_SLICE[kind])
    return Slice(f"{slices}x{kind}-{chips}", chip, (chips // slices,), slices)


def row(case: Case, chips: int, weak: bool) -> str:
    """A line of a table."""
    config = load_config(str(find_config(case.config)), [])
    work = work_of(config, model_shape(config.model.path))
    wanted = slice_of(case.kind, chips)
    rollouts = chips // case.tensor * A_SHARD if weak else ROLLOUTS
    found = placed(work, wanted, case.tensor, rollouts)
    if isinstance(found, str):
        return f"| {chips} | | {found} | | | | | | |"
    work, spread = found
    # A micro-batch has a row for each shard: one whose shards have no row to train on are idle in it.
    seconds, sent = seconds_of(work, spread, wanted), sent_by_formula(work, spread, wanted)["gradient"]
    sending = micro_batches(work, spread, work.longest) * sent_seconds(sent, wanted)
    idle = max(1.0, spread.shards / rollouts)
    update = (seconds.update - sending) * idle + sending
    step = seconds.total - seconds.update + update
    dollars = step / 3600 * chips * wanted.chip.dollars
    tokens = rollouts * work.longest / 2
    mesh, grpo = f"{spread.shards // spread.fsdp} × {spread.fsdp} × {case.tensor}", work.config.grpo
    if work.config.optimizer.moments != config.optimizer.moments:
        mesh += f", moments {work.config.optimizer.moments}"
    return (
        f"| {chips} | {mesh} | {grpo.prompts} × {grpo.samples} | {seconds.decode:.0f} | {update - sending:.0f} "
        f"| {sending:.1f} | {step:.0f} | {sending / step:.0%} | {dollars / tokens * 1e6:.2f} |"
    )


def leaves(tree: object) -> list:
    """Of nested dicts."""
    return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [tree]


def main() -> None:
    for case in CASES:
        for weak in (True, False):
            asked = "sixteen rollouts a row of chips" if weak else f"{ROLLOUTS} rollouts a step"
            print(f"\n{case.config} on {case.kind}, {asked}\n")
            print(
                "| chips | data × fsdp × tensor | prompts × samples | decode, s | update, s | sending, s | step, s ",
                end="",
            )
            print("| sending | dollars a million tokens |")
            print("|---|---|---|---|---|---|---|---|---|")
            for chips in CHIPS:
                print(row(case, chips, weak))


if __name__ == "__main__":
    main()
