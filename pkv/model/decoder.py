"""The decoder's computation: one pure forward for every family, over plain dicts of weights.

It tests features of `Arch` only. Norms, softmax, rotary tables and logits are 32-bit whatever the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pkv.mesh import constrain_rows
from pkv.model.arch import Arch
from pkv.model.attention import attend
from pkv.model.cache import Cache, cache_length
from pkv.model.linear import cast, dense
from pkv.model.weights import Params

Rotation = tuple[jax.Array, jax.Array]  # cos and sin, float32 [B, T, 1, H/2]
# Takes a layer's new keys and values [B, T, K, H]; gives those to look at, and the cache that holds them.
Remember = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, Cache]]


def forward(
    params: Params,
    arch: Arch,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    cache: Cache | None = None,
    dtype: Any = jnp.float32,
    remat: Literal["none", "layer"] = "none",
) -> tuple[jax.Array, Cache | None]:
    """Hidden states after the final norm, [B, T, D] in `dtype`, and the cache with these tokens written into it.

    Without a cache a token sees the earlier tokens of its row, and with `segments_BT` (0 is padding) only those of its
    own segment. With a cache, keys and values at position p are written into slot p of their row, and a query at p
    sees the slots up to p: a prefill that is padded on the right needs no mask, because decoding overwrites the
    padding's slots before it reaches them. What would be written beyond the cache's end is dropped.

    `params["layers"]` is stacked (scanned: compiles once for all layers) or a tuple (unrolled); the cache alike.
    remat "layer" keeps each layer's input for the backward pass and computes the rest again.
    Raises ValueError for a cache together with segments, or in another form than the weights.
    """
    layers = params["layers"]
    stacked = not isinstance(layers, (tuple, list))
    if cache is not None and segments_BT is not None:
        raise ValueError("forward: segments are for packed rows without a cache")
    if cache is not None and stacked == isinstance(cache, (tuple, list)):
        raise ValueError("forward: weights and cache differ in form; pass both stacked or both as a tuple of layers")
    rotation = rotary_table(positions_BT, arch)
    mask_BTS = _row_mask(tokens_BT, segments_BT) if cache is None else _slot_mask(positions_BT, cache)

    def layer(x_BTD: jax.Array, weights: Params, cache: Cache, index: Any) -> tuple[jax.Array, Cache]:
        remember = _recall_row if cache is None else partial(_write, cache, index, positions_BT)
        return decoder_layer(x_BTD, weights, arch, rotation, mask_BTS, remember)

    if remat == "layer":
        layer = jax.checkpoint(layer)
    x_BTD = constrain_rows(params["embedding"].at[tokens_BT].get(mode="clip").astype(dtype))
    if stacked:
        # The stacked cache is carried and written in place; as scanned inputs and outputs it would be copied whole.
        def scanned(carry: tuple[jax.Array, Cache], step: tuple[Params, jax.Array]) -> tuple[Any, None]:
            return layer(carry[0], step[0], carry[1], step[1]), None

        (x_BTD, cache), _ = jax.lax.scan(scanned, (x_BTD, cache), (layers, jnp.arange(arch.layers)))
    else:
        caches = []
        for weights, layer_cache in zip(layers, cache or [None] * len(layers), strict=True):
            x_BTD, layer_cache = layer(x_BTD, weights, layer_cache, None)
            caches.append(layer_cache)
        cache = tuple(caches) if cache is not None else None
    return rms_norm(x_BTD, params["final_norm"], arch.norm_eps), cache


def logits(params: Params, arch: Arch, hidden: jax.Array) -> jax.Array:
    """The scores of the next token, float32 [..., V], from hidden states [..., D] after the final norm."""
    if arch.tied_embeddings:
        table_VD = params["embedding"].astype(hidden.dtype)
        return jnp.einsum("...D,VD->...V", hidden, table_VD, preferred_element_type=jnp.float32)
    table_DV = params["unembedding"].astype(hidden.dtype)
    return jnp.einsum("...D,DV->...V", hidden, table_DV, preferred_element_type=jnp.float32)


def decoder_layer(
    x_BTD: jax.Array, weights: Params, arch: Arch, rotation: Rotation, mask_BTS: jax.Array, remember: Remember
) -> tuple[jax.Array, Cache]:
    """One layer: attention and the gated feed-forward, each on a normed copy, each added to the stream."""
    w, eps = cast(weights, x_BTD.dtype), arch.norm_eps
    q_BTNH, k_BTKH, v_BTKH = _project(rms_norm(x_BTD, w["attention_norm"], eps), w["attention"], arch)
    keys_BKHS, values_BKSH, cache = remember(rotate(k_BTKH, rotation), v_BTKH)
    mixed_BTNH = attend(rotate(q_BTNH, rotation), keys_BKHS, values_BKSH, mask_BTS, causal=cache is None)
    x_BTD = x_BTD + dense(mixed_BTNH, w["attention"]["o"], inputs=2)

    normed_BTD = rms_norm(x_BTD, w["ffn_norm"], eps)
    gate_BTF = dense(normed_BTD, w["ffn"]["gate"])
    up_BTF = dense(normed_BTD, w["ffn"]["up"])
    x_BTD = x_BTD + dense(jax.nn.silu(gate_BTF) * up_BTF, w["ffn"]["down"])
    return constrain_rows(x_BTD), cache


def _project(x_BTD: jax.Array, w: Params, arch: Arch) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BTNH = dense(x_BTD, w["q"])
    k_BTKH = dense(x_BTD, w["k"])
    v_BTKH = dense(x_BTD, w["v"])
    if arch.qkv_bias:
        q_BTNH, k_BTKH, v_BTKH = q_BTNH + w["q_bias"], k_BTKH + w["k_bias"], v_BTKH + w["v_bias"]
    if arch.qk_norm:
        q_BTNH = rms_norm(q_BTNH, w["q_norm"], arch.norm_eps)
        k_BTKH = rms_norm(k_BTKH, w["k_norm"], arch.norm_eps)
    return q_BTNH, k_BTKH, v_BTKH


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in 32 bits, returned in x's dtype (arXiv 1910.07467, equation 4)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def rotary_table(positions_BT: jax.Array, arch: Arch) -> Rotation:
    """cos and sin of every position's angles, float32 [B, T, 1, H/2] (arXiv 2104.09864, equation 15)."""
    exponents = jnp.arange(0, arch.head_size, 2, dtype=jnp.float32) / arch.head_size
    angles = positions_BT[..., None, None].astype(jnp.float32) * arch.rope_theta**-exponents
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn each head by its position's angles; the pairs are (i, i + H/2), as Hugging Face checkpoints have them."""
    cos, sin = rotation
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def _row_mask(tokens_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """bool [B or 1, T, T]: earlier tokens of the same row and segment."""
    T = tokens_BT.shape[1]
    causal = jnp.tril(jnp.ones((1, T, T), bool))
    return causal if segments_BT is None else causal & (segments_BT[:, :, None] == segments_BT[:, None, :])


def _slot_mask(positions_BT: jax.Array, cache: Cache) -> jax.Array:
    """bool [B, T, S]: slots up to the query's position."""
    return jnp.arange(cache_length(cache)) <= positions_BT[:, :, None]


def _recall_row(k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    return jnp.moveaxis(k_BTKH, 1, 3), jnp.moveaxis(v_BTKH, 1, 2), None


def _write(
    cache: Cache, layer: jax.Array | None, positions_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> tuple[jax.Array, jax.Array, Cache]:
    """Write into slots `positions_BT` of every row (of one layer, if the cache is stacked); in place when donated."""
    rows, every = jnp.arange(positions_BT.shape[0])[:, None], slice(None)
    # Slices between the index arrays: the shape of both updates is [B, T, ...].
    places = {"k": (rows, every, every, positions_BT), "v": (rows, every, positions_BT)}
    fresh = {"k": k_BTKH, "v": v_BTKH}
    if layer is not None:
        places = {name: (layer, *place) for name, place in places.items()}
    cache = {n: cache[n].at[places[n]].set(fresh[n].astype(cache[n].dtype), mode="drop") for n in ("k", "v")}
    seen = cache if layer is None else {name: array[layer] for name, array in cache.items()}
    return seen["k"].astype(k_BTKH.dtype), seen["v"].astype(v_BTKH.dtype), cache
