"""Scale on paper: a step of 14B and of 72B on 8 to 4,096 chips, by the roofline of `pkv plan`, nothing compiled.

    python benchmarks/scale.py            # Markdown tables

What chips send each other is counted by the formulas here, and held against compiled programs in BENCHMARKS.md. A step
has 512 rollouts, whatever the chips, or sixteen for every group of chips that shares a row. A machine samples prompts
of its own, so that there are as many prompts as machines at least: on many machines 512 rollouts make small groups.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from pkv.config import find_config, load_config
from pkv.model import param_shapes
from pkv.plan import model_shape, work_of
from pkv.plan.chips import Chip, Slice, read_slice
from pkv.plan.collectives import NETWORK
from pkv.plan.programs import Work
from pkv.plan.roofline import Spread, micro_batches, sent_seconds, step_seconds
from pkv.sampling.engine import SHARE_OF_FREE

CHIPS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST_SLICE = {"v5e": 256, "v6e": 256, "v5p": 4096}
ROLLOUTS = 512
A_SHARD = 16
LEAST_GROUP = 2  # rollouts of a prompt; one alone has nothing to be compared with
MOMENTS = {"float32": 8.0, "bfloat16": 4.0, "float8": 2.0}  # bytes of a weight's two moments
PASSES = 3  # a layer's weights and positions are gathered forward, again for rematerialisation, and backward


@dataclass(frozen=True)
class Case:
    """A model on a kind of chip; tensor: chips that share a row's layers."""

    config: str
    kind: str
    tensor: int


CASES = (Case("qwen2.5-14b", "v6e", 4), Case("qwen2.5-14b", "v5p", 4), Case("qwen2.5-72b", "v5p", 4))


def gradient_sent(work: Work, weights: float, data: int, fsdp: int, tensor: int, tokens: int) -> float:
    """Bytes that a chip sends for a micro-batch of so many tokens a shard.

    Weights gathered in 16 bits and their gradient scattered in 32 over fsdp, and summed over a slice's data; in every
    layer two gathers and two scatters of what stands between layers over tensor, in 16 bits.
    """
    over_data = 2 * weights * 4 / fsdp / tensor * (data - 1) / data
    over_fsdp = weights / tensor * (2 * PASSES + 4) * (fsdp - 1) / fsdp
    over_tensor = work.arch.layers * tokens * work.arch.hidden * 2 * 4 * PASSES * (tensor - 1) / tensor
    return over_data + over_fsdp + over_tensor


def placed(
    work: Work, wanted: Slice, weights: float, tensor: int, rollouts: int
) -> tuple[Work, Spread, dict[str, float]] | str:
    """The step's work, how it is spread and what a micro-batch sends; or why it can't be.

    fsdp is as small as the state allows with half of the memory left, and data takes the rest.
    """
    arch, limit = work.arch, wanted.chip.hbm_gib * 2**30
    state = weights * (8 + MOMENTS[work.config.optimizer.moments])  # weights, gradient and moments
    shards = wanted.chips // tensor
    fits = [f for f in divisors(shards // wanted.slices) if state / f / tensor < limit / 2 and shards % f == 0]
    if not fits:
        return "does not fit"
    fsdp = fits[0]
    sampled, held = weights * 2 / tensor, weights * (4 + MOMENTS[work.config.optimizer.moments]) / fsdp / tensor
    prompts = max(rollouts // work.samples, wanted.chips // wanted.host_chips)
    samples = rollouts // prompts
    if samples < LEAST_GROUP:
        return "more machines than groups"
    rounds = tuple(dataclasses.replace(round_, samples=samples) for round_ in work.config.rounds)
    grpo = dataclasses.replace(work.config.grpo, prompts=prompts, samples=samples)
    sampling = dataclasses.replace(work.config.sampling, slots=rollouts)
    work = dataclasses.replace(
        work, config=dataclasses.replace(work.config, grpo=grpo, sampling=sampling, rounds=rounds)
    )
    kv_token = 2 * arch.layers * arch.kv_heads * arch.head_size * 2 / tensor
    kv = SHARE_OF_FREE * (limit - sampled - held)
    if kv < kv_token * work.longest:
        return "does not fit"
    row = work.config.grpo.row_tokens
    spread = Spread(wanted.chips, shards, tensor, 1, sampled, weights * 4 / fsdp / tensor, kv_token, kv, (shards, row))
    data = shards // fsdp // wanted.slices
    over_slices = 2 * weights * 2 / fsdp / tensor * (wanted.slices - 1) / wanted.slices  # in 16 bits, as compiled
    sent = {NETWORK: over_slices, "links": gradient_sent(work, weights, data, fsdp, tensor, row)}
    return work, spread, sent


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
    weights = float(sum(math.prod(leaf.shape) for leaf in leaves(param_shapes(work.arch))))
    wanted = slice_of(case.kind, chips)
    rollouts = chips // case.tensor * A_SHARD if weak else ROLLOUTS
    found = placed(work, wanted, weights, case.tensor, rollouts)
    if isinstance(found, str):
        return f"| {chips} | | {found} | | | | | | |"
    work, spread, sent = found
    # A micro-batch has a row for each shard: one whose shards have no row to train on are idle in it.
    seconds = step_seconds(work, spread, wanted, {"gradient": sent})
    micros = micro_batches(work, spread, work.longest)
    sending = micros * sent_seconds(sent, wanted)
    idle = max(1.0, spread.shards / rollouts)
    update = (seconds.update - sending) * idle + sending
    step = seconds.total - seconds.update + update
    dollars = step / 3600 * chips * wanted.chip.dollars
    tokens = rollouts * work.longest / 2
    fsdp = round(weights * 4 / spread.trained / case.tensor)
    mesh, grpo = f"{spread.shards // fsdp} × {fsdp} × {case.tensor}", work.config.grpo
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
