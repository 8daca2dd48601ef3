"""The model's own arithmetic: floating-point operations by its shapes, whatever a compiler makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax

from pkv.model.arch import Arch
from pkv.model.weights import param_shapes

# Dense 16-bit products a second of a device at most, by the beginning of JAX's device_kind; makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # of a device: two are a chip
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 8.1e12,  # of 32 bits: it has no bfloat16
}


def peak_flops(device_kind: str) -> float | None:
    """Of one chip, in 16 bits; None for one that isn't known, a CPU above all."""
    return next((rate for kind, rate in PEAK_FLOPS.items() if device_kind.startswith(kind)), None)


def forward_flops(arch: Arch, sizes: Iterable[tuple[float, float]]) -> float:
    """Of one forward pass over sequences of (tokens, tokens whose next one is predicted).

    Two operations a weight of a matrix and token; attention's two products for every key that a query sees; logits
    only where they are asked for. Norms, softmax and rotary tables are left out.
    """
    shapes = param_shapes(arch)
    matrices = sum(math.prod(w.shape) for w in _matrices(shapes["layers"]))
    local = sum(arch.local_layers) if arch.local_layers else 0
    total = 0.0
    for tokens, predicted in sizes:
        total += 2.0 * matrices * tokens + 2.0 * arch.hidden * arch.vocab_size * predicted
        for layers, window in ((arch.layers - local, None), (local, arch.window)):
            total += layers * 4.0 * arch.heads * arch.head_size * _pairs(tokens, window)
    return total


def crossover(arch: Arch) -> float:
    """The length of a causal row at which its attention is as much work as its matrices, tokens."""
    matrices = sum(math.prod(w.shape) for w in _matrices(param_shapes(arch)["layers"]))
    return matrices / (arch.layers * arch.heads * arch.head_size)


def update_flops(arch: Arch, sizes: Iterable[tuple[float, float]], frozen: bool) -> float:
    """Of a forward and backward pass; where the matrices are frozen, no gradient of them is computed."""
    return (2.0 if frozen else 3.0) * forward_flops(arch, sizes)


def _pairs(tokens: float, window: int | None) -> float:
    if window is None or window >= tokens:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window


def _matrices(layers: Any) -> list[Any]:
    found = jax.tree.leaves_with_path(layers)
    return [w for path, w in found if not jax.tree_util.keystr(path[-1:], simple=True).endswith(("norm", "bias"))]
