"""Programs by arithmetic alone: for chips that nothing can be compiled for here, and for what is worth compiling.

Weights, moments, gradients, keys and values are a run's own arrays, and exact. Activations are counted as the formulas
here say, to which a compiler adds and from which it takes: `SLACK` is what is left free for that. BENCHMARKS.md holds
them against what an H200 took, and what is sent against compiled programs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp

from pkv.grpo.logprobs import MOST_LOGITS_ON_GPU
from pkv.model import Kernel
from pkv.model.arithmetic import forward_flops, update_flops
from pkv.plan.chips import Slice
from pkv.plan.collectives import NETWORK
from pkv.plan.compiled import Program
from pkv.plan.programs import Programs, Work
from pkv.plan.roofline import Spread, compute_seconds, memory_rate, rows_at_once, sent_seconds

SLACK = 0.08  # of a chip's memory: what the driver takes, and what a compiler adds; launch/env.sh leaves as much free


def by_arithmetic(programs: Programs, work: Work, wanted: Slice, spread: Spread) -> list[Program]:
    """What a run holds on each chip in the parts of a step."""
    limit = wanted.chip.hbm_gib * 2**30
    state = programs.state_bytes | {"slack": 0.0 if wanted.compiles else SLACK * limit}
    gradient = {"gradient": state["weights"]}
    if programs.whole and work.config.model.remat == "none":  # layers are unrolled, and XLA keeps all as it computes
        gradient |= {"computed": state["weights"] / 4 * jnp.dtype(work.config.model.dtype).itemsize}
    sampled = {"sampled weights": programs.sampled_bytes, "keys and values": spread.kv}
    frozen = work.config.model.lora.rank > 0
    rows = [(programs.micro[1], programs.micro[1])] * programs.micro[0]
    prompts = [(work.prompt_tokens, 0)] * work.config.grpo.prompts
    parts: dict[str, tuple[str, Mapping[str, float], float]] = {
        "gradient": (
            "update",
            state | gradient | {"activations": activations(work, spread, programs.kernel)},
            update_flops(work.arch, rows, frozen),
        ),
        "apply": ("update", state | {"gradient": state["weights"]}, 0.0),
        "reshard": ("reshard", state | {"sampled weights": programs.sampled_bytes}, 0.0),
        "prefill": ("sample", state | sampled, forward_flops(work.arch, prompts)),
        "decode": ("sample", state | sampled | {"activations": decode_logits(work, spread)}, 0.0),
    }
    sent, dtype = sent_by_formula(work, spread, wanted), work.config.model.dtype
    return [
        Program(
            name,
            phase,
            {kind: size for kind, size in kinds.items() if size},
            limit,
            flops,
            sent.get(name, {}),
            _seconds(wanted, kinds, flops, dtype) + sent_seconds(sent.get(name, {}), wanted),
        )
        for name, (phase, kinds, flops) in parts.items()
    ]


def sent_by_formula(work: Work, spread: Spread, wanted: Slice) -> dict[str, dict[str, float]]:
    """Bytes that a chip sends in one call of each program, by kind, all in the dtype of compute.

    For a micro-batch's gradient: the weights, gathered over fsdp and sequence forward, again for rematerialisation, and
    backward; what is trained of them, added up over the same and over data; in every layer and pass two gathers and two
    scatters over tensor of what stands between layers, and queries, keys, values and what is mixed of them, which
    change places over sequence, backward twice. For a token, two sums over tensor in every layer. For resharding, what
    is laid anew, gathered once as it lies then. Out of a machine of GPUs goes a ring of data for each chip of a copy of
    the weights that is in it and, where a copy takes several machines, one of fsdp for each chip of a row.
    """
    arch, two = work.arch, jnp.dtype(work.config.model.dtype).itemsize
    passes = 2 + (work.config.model.remat != "none")
    ways, tensor = spread.fsdp * spread.sequence, spread.tensor
    trained = spread.trained / 4 * two  # a chip's own part
    slices = wanted.slices if wanted.compiles else 1  # GPUs have machines
    data, rest, alike = spread.shards // spread.fsdp // slices, 1 - 1 / ways, 1 - 1 / tensor
    tokens = math.prod(spread.micro) / spread.shards / spread.sequence
    over_fsdp = (passes * spread.sampled + 2 * ways * trained) * rest
    over_data, over_slices = (2 * trained * (1 - 1 / count) for count in (data, slices))
    over_tensor = 4 * passes * arch.layers * tokens * arch.hidden * two * alike
    mixed = 2 * (arch.heads + arch.kv_heads) * arch.head_size / tensor
    over_sequence = (passes + 1) * arch.layers * tokens * mixed * two * (1 - 1 / spread.sequence)
    rows = rows_at_once(work, spread, work.longest) * work.config.sampling.segment
    over_machines, copy, machine = 0.0, ways * tensor, wanted.host_chips
    if not wanted.compiles and wanted.machines > 1:
        over_machines = over_data * min(copy, machine) / machine
        over_machines += over_fsdp * (copy > machine) * tensor * spread.sequence / machine
    gradient = {"fsdp": over_fsdp, "data": over_data, "tensor": over_tensor, "sequence": over_sequence}
    gradient[NETWORK] = over_slices + over_machines
    summed = 4 if work.config.sampling.weights == "int8" else two  # whose steps come after a sum in 32 bits
    decode = {"tensor": 4 * arch.layers * rows * arch.hidden * summed * alike}
    return {"gradient": gradient, "decode": decode, "reshard": {"fsdp": spread.laid * rest}}


def activations(work: Work, spread: Spread, kernel: Kernel) -> float:
    """Bytes of a chip for a micro-batch's forward and backward pass.

    What is kept of every layer; one layer's own work, twice for its gradient; a layer's weights, gathered over fsdp,
    and their gradient in 32 bits; XLA's scores of one layer, which cuDNN doesn't keep; three parts of logits; and what
    a TPU converts. Of 13 gradients that were compiled for TPUs the formula has 0.73 to 1.57.
    """
    arch, model, tensor = work.arch, work.config.model, spread.tensor
    two = jnp.dtype(model.dtype).itemsize
    rows, length = spread.micro[0] // spread.shards, spread.micro[1]
    tokens = rows * length / spread.sequence
    heads, wide = arch.heads * arch.head_size / tensor, arch.ffn / tensor
    kept = {  # numbers of a token and layer: what stands between layers is spread over tensor, what is normed isn't
        "none": 4 * arch.hidden / tensor + 2 * arch.hidden + 4 * heads + 3 * wide,
        "cheap": arch.hidden / tensor + heads,
        "all": arch.hidden / tensor,
        "offload": 0.0,
    }[model.remat]
    one = 2 * tokens * (4 * arch.hidden + 4 * heads + 3 * wide) * two
    matrices = 2 * arch.hidden * heads * (1 + arch.kv_heads / arch.heads) + 3 * arch.hidden * wide
    pairs = rows * length**2 / 2 * arch.heads / tensor / spread.sequence
    scores = pairs * (4 + two) if kernel == "xla" else 0.0
    logits = 3 * min(MOST_LOGITS_ON_GPU, tokens * arch.vocab_size / tensor) * 4
    converted = spread.trained / 4 * two if kernel == "splash" else 0.0  # on a TPU all of a chip's, before the layers
    return arch.layers * tokens * kept * two + one + matrices * (two + 4) + scores + logits + converted


def decode_logits(work: Work, spread: Spread) -> float:
    """Bytes of a chip for a decode step's logits and what is drawn from them, in 32 bits."""
    rows = rows_at_once(work, spread, work.longest)
    return 3 * rows * work.arch.vocab_size / spread.tensor * 4


def _seconds(wanted: Slice, kinds: Mapping[str, float], flops: float, dtype: str) -> float:
    read = sum(size for kind, size in kinds.items() if kind not in ("slack", "keys and values", "activations"))
    return max(compute_seconds(flops, wanted.chips, wanted.chip, dtype), read / memory_rate(wanted.chip))
