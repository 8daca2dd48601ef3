"""Programs by arithmetic alone, for chips that nothing can be compiled for here.

Weights, moments, gradients, keys and values are a run's own arrays, and exact. Activations are counted as the formulas
here say, to which a compiler adds and from which it takes: `SLACK` is what is left free for that.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax.sharding import Mesh

from pkv.grpo.logprobs import CHUNK
from pkv.mesh import BATCH_AXES
from pkv.model.arithmetic import forward_flops, update_flops
from pkv.plan.chips import Slice
from pkv.plan.compiled import Program
from pkv.plan.programs import Programs, Work
from pkv.plan.roofline import compute_seconds, memory_rate

SLACK = 0.08  # of a chip's memory: what the driver takes, and what a compiler adds
STREAMS = {"none": 10.0, "cheap": 4.0, "all": 1.0, "offload": 1.0}  # of D numbers a token and layer that are kept
WIDE = {"none": 3.0, "cheap": 0.0, "all": 0.0, "offload": 0.0}  # of F numbers


def by_arithmetic(programs: Programs, work: Work, wanted: Slice, mesh: Mesh, kv: float) -> list[Program]:
    """What a run holds on each chip in the parts of a step. kv: bytes of a chip for keys and values."""
    limit = wanted.chip.hbm_gib * 2**30
    state = programs.state_bytes | {"slack": SLACK * limit}
    gradient = {"gradient": state["weights"]}
    sampled = {"sampled weights": programs.sampled_bytes, "keys and values": kv}
    frozen = work.config.model.lora.rank > 0
    rows = [(programs.micro[1], programs.micro[1])] * programs.micro[0]
    prompts = [(work.prompt_tokens, 0)] * work.config.grpo.prompts
    parts: dict[str, tuple[str, Mapping[str, float], float]] = {
        "gradient": (
            "update",
            state | gradient | {"activations": activations(programs, work, mesh)},
            update_flops(work.arch, rows, frozen),
        ),
        "apply": ("update", state | gradient, 0.0),
        "reshard": ("reshard", state | {"sampled weights": programs.sampled_bytes}, 0.0),
        "prefill": ("sample", state | sampled, forward_flops(work.arch, prompts)),
        "decode": ("sample", state | sampled | {"activations": decode_logits(work, mesh)}, 0.0),
    }
    return [
        Program(
            name,
            phase,
            {kind: size for kind, size in kinds.items() if size},
            limit,
            flops,
            {},
            _seconds(wanted, kinds, flops),
        )
        for name, (phase, kinds, flops) in parts.items()
    ]


def activations(programs: Programs, work: Work, mesh: Mesh) -> float:
    """Bytes of a chip for a micro-batch's forward and backward pass.

    What is kept of every layer; one layer's own work, twice for its gradient; a layer's weights, gathered over fsdp,
    and their gradient in 32 bits; XLA's scores of one layer, which cuDNN doesn't keep; a chunk of logits three times.
    """
    arch, model = work.arch, work.config.model
    tensor, sequence, two = mesh.shape["tensor"], mesh.shape["sequence"], jnp.dtype(model.dtype).itemsize
    shards = 1
    for axis in BATCH_AXES:
        shards *= mesh.shape[axis]
    rows, length = programs.micro[0] // shards, programs.micro[1]
    tokens = rows * length / sequence
    kept = arch.layers * tokens * (STREAMS[model.remat] * arch.hidden + WIDE[model.remat] * arch.ffn / tensor) * two
    heads = arch.heads * arch.head_size / tensor
    one = 2 * tokens * (4 * arch.hidden + 4 * heads + 3 * arch.ffn / tensor) * two
    matrices = (2 * arch.hidden * heads * (1 + arch.kv_heads / arch.heads)) + 3 * arch.hidden * arch.ffn / tensor
    gathered = matrices * (two + 4)
    scores = 0.0 if model.attention == "cudnn" else rows * arch.heads / tensor / sequence * length**2 / 2 * (4 + two)
    logits = 3 * rows * min(CHUNK, length) * arch.vocab_size / tensor * 4
    return kept + one + gathered + scores + logits


def decode_logits(work: Work, mesh: Mesh) -> float:
    """Bytes of a chip for a decode step's logits and what is drawn from them, in 32 bits."""
    config = work.config
    rows = min(config.sampling.slots, config.grpo.prompts * work.samples)
    for axis in BATCH_AXES:
        rows /= mesh.shape[axis]
    return 3 * rows * work.arch.vocab_size / mesh.shape["tensor"] * 4


def _seconds(wanted: Slice, kinds: Mapping[str, float], flops: float) -> float:
    read = sum(size for kind, size in kinds.items() if kind not in ("slack", "keys and values", "activations"))
    return max(compute_seconds(flops, wanted.chips, wanted.chip), read / memory_rate(wanted.chip))
