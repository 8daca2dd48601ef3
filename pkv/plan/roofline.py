"""How long a step takes at best and what share of that is usual: operations over rate, bytes over bandwidth.

Nothing here was measured on the chips it speaks of. `ASSUMED` holds every share that is taken for granted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pkv.model.arithmetic import forward_flops, update_flops
from pkv.plan.chips import Chip, Slice
from pkv.plan.collectives import NETWORK
from pkv.plan.programs import Work

ASSUMED: Mapping[str, float] = {
    "mean_response": 0.5,  # of max_new_tokens; lengths are drawn by the policy, and nobody knows them before
    "matrix_share": 0.5,  # of a chip's peak that long products reach
    "memory_share": 0.7,  # of its memory bandwidth that decoding reaches
    "link_share": 0.7,  # of its links' bandwidth; what is sent is added to the time, as if nothing overlapped
    "collective_s": 5e-6,  # a collective's latency, beside its bytes
    "packed": 0.9,  # of a packed row that holds tokens
}


@dataclass(frozen=True)
class Spread:
    """How work and weights are spread. shards: rows go to so many groups of chips. chips: all of them.

    fsdp: of the groups, so many have the weights between them. tensor, sequence: chips of a group that share a row.
    sampled, trained, kv_token: bytes on a chip, of all weights in the dtype of compute as they are spread for sampling,
    of those that are trained, and of a position's keys and values. read: bytes that take as long as a decode step's
    weights, which may be in 8 bits. laid: bytes of what each step lays anew to be sampled from, as it lies then; LoRA's
    base isn't. kv: bytes for keys and values a chip. micro: rows and tokens of a micro-batch.
    """

    chips: int
    shards: int
    fsdp: int
    tensor: int
    sequence: int
    sampled: float
    read: float
    laid: float
    trained: float
    kv_token: float
    kv: float
    micro: tuple[int, int]


@dataclass(frozen=True)
class Seconds:
    """A step's, by phase."""

    prefill: float
    decode: float
    reshard: float
    update: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode + self.reshard + self.update


def rows_at_once(work: Work, spread: Spread, budget: int) -> float:
    """Rows that a shard decodes at the same time: slots, rows there are, and rows whose keys and values fit."""
    config = work.config
    length = work.prompt_tokens + ASSUMED["mean_response"] * budget
    wanted = min(config.sampling.slots, config.grpo.prompts * work.samples) / spread.shards
    return max(1.0, min(wanted, spread.kv / (spread.kv_token * length)))


def decode_step_seconds(work: Work, spread: Spread, chip: Chip, rows: float, length: float, sending: float) -> float:
    """One token of each of a shard's rows, whose responses are on average at `length`. sending: its bytes' seconds."""
    one = forward_flops(work.arch, [(length, 1)]) - forward_flops(work.arch, [(length - 1, 0)])
    compute = compute_seconds(rows * one, spread.tensor * spread.sequence, chip, work.config.model.dtype)
    read = (spread.read + rows * length * spread.kv_token) / memory_rate(chip)
    return max(compute, read) + sending + _decode_collectives(work, spread) * ASSUMED["collective_s"]


def _decode_collectives(work: Work, spread: Spread) -> int:
    """Two sums over tensor and one merge over sequence in every layer."""
    return work.arch.layers * (2 * (spread.tensor > 1) + (spread.sequence > 1))


def sent_seconds(sent: Mapping[str, float], wanted: Slice) -> float:
    """What a chip sends by kind: over its links and, of several slices, by the network that its machine's chips share.

    Each by itself, as if nothing overlapped.
    """
    over_slices = sent.get(NETWORK, 0.0)
    links = (sum(sent.values()) - over_slices) / wanted.chip.link_gbs
    return (links + over_slices * wanted.host_chips / wanted.chip.dcn_gbs) / (1e9 * ASSUMED["link_share"])


def compute_seconds(flops: float, chips: int, chip: Chip, dtype: str) -> float:
    """Long products of numbers in `dtype`, spread over all chips."""
    return flops / chips / (chip.products(dtype) * ASSUMED["matrix_share"])


def step_flops(work: Work, budget: int) -> float:
    """Of a step's update, by the model's own arithmetic: what rematerialisation computes again isn't counted."""
    grpo, mean = work.config.grpo, ASSUMED["mean_response"] * budget
    sizes = [(work.prompt_tokens + mean, mean)] * (grpo.prompts * work.samples)
    frozen = work.config.model.lora.rank > 0
    passes = update_flops(work.arch, sizes, frozen) * grpo.epochs
    return passes + forward_flops(work.arch, sizes) * ((grpo.loss.kl_weight > 0) + (grpo.epochs * grpo.minibatches > 1))


def again(work: Work) -> float:
    """What rematerialisation makes of an update's time: the forward pass is done once more, or its cheap half."""
    once = 2.0 if work.config.model.lora.rank else 3.0
    return 1 + {"none": 0.0, "cheap": 0.3, "all": 1.0, "offload": 0.3}[work.config.model.remat] / once


def micro_batches(work: Work, spread: Spread, budget: int) -> float:
    """How many a step has."""
    tokens = work.config.grpo.prompts * work.samples * (work.prompt_tokens + ASSUMED["mean_response"] * budget)
    return max(1.0, tokens / (math.prod(spread.micro) * ASSUMED["packed"]))


def step_seconds(work: Work, spread: Spread, wanted: Slice, sent: Mapping[str, Mapping[str, float]]) -> Seconds:
    """A step of the one round of `work`. sent: bytes from a chip in one call of each program, by kind."""
    config, chip, budget = work.config, wanted.chip, work.longest
    rows, mean = rows_at_once(work, spread, budget), ASSUMED["mean_response"] * budget
    # As many tokens of each place as the queue has, and at least those of the longest response.
    steps = max(float(budget), config.grpo.prompts * work.samples / spread.shards * mean / rows)
    sending = sent_seconds(sent.get("decode", {}), wanted) / config.sampling.segment  # a call of it is a segment
    decode = steps * decode_step_seconds(work, spread, chip, rows, work.prompt_tokens + mean / 2, sending)
    prompts = forward_flops(work.arch, [(work.prompt_tokens, 0)] * config.grpo.prompts)
    dtype = config.model.dtype
    update = compute_seconds(step_flops(work, budget) * again(work), wanted.chips, chip, dtype)
    update += micro_batches(work, spread, budget) * config.grpo.epochs * sent_seconds(sent.get("gradient", {}), wanted)
    reshard = sent_seconds(sent.get("reshard", {}), wanted) + spread.laid / memory_rate(chip)
    return Seconds(
        compute_seconds(prompts, wanted.chips, chip, dtype),
        decode,
        reshard,
        update + work.steps * apply_seconds(spread, chip),
    )


def apply_seconds(spread: Spread, chip: Chip) -> float:
    """The optimizer's step: weights, moments and gradient read, the first two written."""
    return 5 * spread.trained / memory_rate(chip)


def memory_rate(chip: Chip) -> float:
    """Bytes a second that memory gives."""
    return chip.hbm_gbs * 1e9 * ASSUMED["memory_share"]
