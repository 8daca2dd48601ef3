"""The decoder's weights as Flax NNX modules: shape, logical axes and initialiser, one line each.

Outside this file nobody sees NNX: `init_params`, `param_axes` and `param_shapes` give plain nested dicts. The
computation is in `decoder.py` and works on those dicts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, normal, ones, zeros
from jax.sharding import Mesh

from pkv.mesh import TRAINING_RULES, fold, shardings
from pkv.model.arch import Arch

Params = dict[str, Any]  # nested dicts of arrays; "layers" is stacked on a leading axis L, or a tuple of L dicts


def param(key: jax.Array, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer) -> nnx.Param:
    """One weight: drawn in 32 bits from a key folded with its name, carrying its logical axes.

    The axes are metadata of our own. Flax's names for sharding metadata change between versions, and it may act on
    them by itself; neither can reach us here.
    """
    if len(shape) != len(axes):
        raise ValueError(f"{name}: shape {shape} has {len(shape)} dimensions, axes {axes} name {len(axes)}")
    return nnx.Param(init(fold(key, name), shape, jnp.float32), axes=axes)


class Attention(nnx.Module):
    """Projections of all layers' attention."""

    def __init__(self, arch: Arch, key: jax.Array) -> None:
        L, D, N, K, H = arch.layers, arch.hidden, arch.heads, arch.kv_heads, arch.head_size
        new, std = partial(param, key), arch.init_std
        self.q = new("q", (L, D, N, H), ("layers", "embed", "heads", "head"), normal(std))
        self.k = new("k", (L, D, K, H), ("layers", "embed", "kv_heads", "head"), normal(std))
        self.v = new("v", (L, D, K, H), ("layers", "embed", "kv_heads", "head"), normal(std))
        self.o = new("o", (L, N, H, D), ("layers", "heads", "head", "embed"), normal(residual_std(arch)))
        if arch.qkv_bias:
            self.q_bias = new("q_bias", (L, N, H), ("layers", "heads", "head"), zeros)
            self.k_bias = new("k_bias", (L, K, H), ("layers", "kv_heads", "head"), zeros)
            self.v_bias = new("v_bias", (L, K, H), ("layers", "kv_heads", "head"), zeros)
        if arch.qk_norm:
            self.q_norm = new("q_norm", (L, H), ("layers", "head"), unit(arch))
            self.k_norm = new("k_norm", (L, H), ("layers", "head"), unit(arch))


class FeedForward(nnx.Module):
    """The gated feed-forward of all layers."""

    def __init__(self, arch: Arch, key: jax.Array) -> None:
        L, D, F = arch.layers, arch.hidden, arch.ffn
        new, std = partial(param, key), arch.init_std
        self.gate = new("gate", (L, D, F), ("layers", "embed", "ffn"), normal(std))
        self.up = new("up", (L, D, F), ("layers", "embed", "ffn"), normal(std))
        self.down = new("down", (L, F, D), ("layers", "ffn", "embed"), normal(residual_std(arch)))


class Layers(nnx.Module):
    """All decoder layers, stacked on a leading axis."""

    def __init__(self, arch: Arch, key: jax.Array) -> None:
        L, D = arch.layers, arch.hidden
        new = partial(param, key)
        self.attention_norm = new("attention_norm", (L, D), ("layers", "embed"), unit(arch))
        self.attention = Attention(arch, fold(key, "attention"))
        self.ffn_norm = new("ffn_norm", (L, D), ("layers", "embed"), unit(arch))
        self.ffn = FeedForward(arch, fold(key, "ffn"))
        if arch.post_norms:
            self.attention_post_norm = new("attention_post_norm", (L, D), ("layers", "embed"), unit(arch))
            self.ffn_post_norm = new("ffn_post_norm", (L, D), ("layers", "embed"), unit(arch))


class Decoder(nnx.Module):
    """Every weight of the model."""

    def __init__(self, arch: Arch, key: jax.Array) -> None:
        V, D = arch.vocab_size, arch.hidden
        new, std = partial(param, key), arch.init_std
        self.embedding = new("embedding", (V, D), ("vocab", "embed"), normal(std))
        self.layers = Layers(arch, fold(key, "layers"))
        self.final_norm = new("final_norm", (D,), ("embed",), unit(arch))
        if not arch.tied_embeddings:
            self.unembedding = new("unembedding", (D, V), ("embed", "vocab"), normal(std))


def unit(arch: Arch) -> Initializer:
    """Of a norm's weight that changes nothing."""
    return zeros if arch.norm_offset else ones


def residual_std(arch: Arch) -> float:
    """The spread of projections that write into the residual stream, which 2L of them add to (GPT-2, section 2.3)."""
    return arch.init_std / (2 * arch.layers) ** 0.5


def init_params(arch: Arch, key: jax.Array, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Params:
    """Random weights as nested dicts, layers stacked; with a mesh, made in place under TRAINING_RULES.

    The draw depends on the key and the weight's name only: neither the mesh nor another weight changes it.
    """
    return _maker(arch, jnp.dtype(dtype), mesh)(key)


@lru_cache(maxsize=16)  # so that a second draw compiles nothing
def _maker(arch: Arch, dtype: Any, mesh: Mesh | None) -> Callable[[jax.Array], Params]:
    placed = None if mesh is None else shardings(param_axes(arch), param_shapes(arch), mesh, TRAINING_RULES)

    def make(key: jax.Array) -> Params:
        weights = nnx.to_pure_dict(nnx.state(Decoder(arch, key)))
        return jax.tree.map(lambda weight: weight.astype(dtype), weights)

    return jax.jit(make, out_shardings=placed)


def param_axes(arch: Arch) -> dict[str, Any]:
    """The logical axes of every weight: the structure of `init_params` with tuples of names as leaves."""
    return _describe(arch)[0]


def param_shapes(arch: Arch, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Every weight as a `jax.ShapeDtypeStruct`: the structure of `init_params` without the numbers."""
    return jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.shape, dtype), _describe(arch)[1])


@lru_cache(maxsize=16)
def _describe(arch: Arch) -> tuple[dict[str, Any], dict[str, Any]]:
    state = nnx.state(nnx.eval_shape(lambda: Decoder(arch, jax.random.key(0))))
    axes = nnx.to_pure_dict(state, extract_fn=lambda weight: weight.get_metadata()["axes"])
    return axes, nnx.to_pure_dict(state)
