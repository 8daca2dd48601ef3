"""The decoder's computation: one pure forward for every family, over plain dicts of weights.

It tests features of `Arch` only. Norms, softmax, rotary tables and logits are 32-bit whatever the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pkv.mesh import by_heads, gathered, scattered, summed_apart
from pkv.model.arch import Arch
from pkv.model.attention import attend
from pkv.model.cache import Cache, Heads
from pkv.model.kernels import MIXED, SEGMENTS, Kernel, PageKernel
from pkv.model.linear import ByOutput, cast, dense, gated
from pkv.model.pages import Paged, Stock, meet_pages
from pkv.model.rope import Scaling, turns
from pkv.model.weights import Params

Remat = Literal["none", "cheap", "all", "offload"]
STREAM = "stream"  # a layer's input, by the name under which it may be offloaded
Rotation = tuple[jax.Array, jax.Array]  # cos and sin, float32 [B, T, 1, R/2] for the R dimensions that turn
Rotations = tuple[Rotation, Rotation | None]  # of all layers; of local ones, where they turn by a base of their own
# Takes a layer's heads, in one bank or several; gives what its queries see, [B, T, N, H], and the cache.
Meet = Callable[[Sequence[Heads]], tuple[jax.Array, Cache]]


def forward(
    params: Params,
    arch: Arch,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    branches_BT: jax.Array | None = None,
    cache: Cache | Paged | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    kernel: Kernel = "xla",
    most_segments: int = SEGMENTS[-1],
    page_kernel: PageKernel = "xla",
) -> tuple[jax.Array, Cache | Stock | None]:
    """Hidden states after the final norm, [B, T, D] in `dtype`, and the cache with these tokens written into it.

    Without a cache a token sees the earlier tokens of its row, and with `segments_BT` (0 is padding) only those of its
    own segment; with `branches_BT` of these those of its own branch and of branch 0, a trunk that all of them share,
    where each goes on at the position after the trunk's last. With a cache, keys and values at position p are written
    into slot p of their row, and a query at p sees the slots up to p: a prefill that is padded on the right needs no
    mask, because decoding overwrites the padding's slots before it reaches them. What would be written beyond the
    cache's end is dropped. With a cache of pages T is 1, and the stock of its last level comes back. In a local layer a
    query sees no further back than the window.

    `params["layers"]` is stacked (scanned: compiles once for all layers) or a tuple (unrolled); the cache alike.
    remat: what the backward pass finds kept (see `rematerialised`). kernel: of attention over whole rows, of at most
    `most_segments` a row with cuDNN; page_kernel: over a cache of pages.
    Raises ValueError for a cache together with segments, or in another form than the weights, and for branches that
    the kernel doesn't know.
    """
    layers = params["layers"]
    stacked = not isinstance(layers, (tuple, list))
    if cache is not None and segments_BT is not None:
        raise ValueError("forward: segments are for packed rows without a cache")
    if branches_BT is not None and (segments_BT is None or kernel != "xla"):
        raise ValueError("forward: branches need segments, and XLA's attention")
    if cache is not None and stacked != isinstance(cache.levels[-1].stock if isinstance(cache, Paged) else cache, dict):
        raise ValueError("forward: weights and cache differ in form; pass both stacked or both as a tuple of layers")
    local_layers = arch.local_layers or (False,) * arch.layers
    told = stacked and len(set(local_layers)) > 1  # layers of both kinds in one scan hear at run time what they are
    rotations = rotary_tables(positions_BT, arch)
    sight = {"window": arch.window, "scale": arch.query_scale, "cap": arch.attention_cap}
    memory = cache.levels[-1].stock if isinstance(cache, Paged) else cache

    def meet(memory: Cache, index: Any, local: Any, banks: Sequence[Heads]) -> tuple[Any, Cache]:
        if isinstance(cache, Paged):
            kind = {"positions_BT": positions_BT, "local": local, "kernel": page_kernel, **sight}
            return meet_pages(cache, memory, index, banks, **kind)
        q, k, v = Heads.joined(banks)
        if memory is None:
            q, k, v = by_heads(q, k, v)
            keys, values = jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2)
            tree = None if branches_BT is None else (branches_BT, positions_BT)
            packed = {"segments_BT": segments_BT, "tree": tree, "most_segments": most_segments}
            return attend(q, keys, values, local=local, kernel=kernel, **packed, **sight), None
        keys, values, memory = _write(memory, index, positions_BT, k, v)
        return attend(q, keys, values, positions_BT=positions_BT, local=local, **sight), memory

    def layer(x_BTD: jax.Array, weights: Params, memory: Cache, index: Any, local: Any) -> tuple[jax.Array, Cache]:
        if remat != "none":  # where it isn't computed again, a frozen weight that went through this would be kept
            weights = jax.tree.map(summed_apart, weights)
        x_BTD = checkpoint_name(x_BTD, STREAM)
        meeting = partial(meet, memory, index, local)
        return decoder_layer(x_BTD, weights, arch, _of_layer(rotations, local), meeting)

    # Where the layers are not scanned, a layer's number is known when compiling, as `local` then is.
    layer = rematerialised(layer, remat, static_argnums=() if told else (4,) if stacked else (3, 4))
    x_BTD = scattered(embed(params, arch, tokens_BT, dtype))
    if stacked:
        # The stacked cache is carried and written in place; as scanned inputs and outputs it would be copied whole.
        def scanned(carry: tuple[jax.Array, Cache], step: tuple[Params, jax.Array, jax.Array]) -> tuple[Any, None]:
            (x_BTD, memory), (weights, index, local) = carry, step
            return layer(x_BTD, weights, memory, index, local if told else local_layers[0]), None

        steps = (layers, jnp.arange(arch.layers), jnp.array(local_layers))
        (x_BTD, memory), _ = jax.lax.scan(scanned, (x_BTD, memory), steps)
    else:
        for number, (weights, local) in enumerate(zip(layers, local_layers, strict=True)):
            x_BTD, memory = layer(x_BTD, weights, memory, number, local)
    return gathered(_norm(x_BTD, params["final_norm"], arch)), memory


def rematerialised(layer: Callable[..., Any], remat: Remat, static_argnums: tuple[int, ...]) -> Callable[..., Any]:
    """A layer whose backward pass finds less kept than all that its forward pass made, and computes the rest again.

    "none" keeps everything. "cheap" keeps each layer's input and what attention mixed: little memory, and attention,
    whose work grows with T², is not computed twice. "all" computes everything again from the layer's input. "offload"
    does so too, but the inputs wait in the host's memory (on TPU and GPU). Source: arXiv 1604.06174.
    """
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = {
        "cheap": policies.save_only_these_names(MIXED),
        "all": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[STREAM],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(layer, policy=policy, static_argnums=static_argnums)


def embed(params: Params, arch: Arch, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """The stream before the first layer, [B, T, D] in `dtype`; a scale is rounded to `dtype` as transformers does."""
    x_BTD = params["embedding"].at[tokens_BT].get(mode="clip").astype(dtype)
    return x_BTD * jnp.asarray(arch.hidden**0.5, dtype) if arch.scaled_embedding else x_BTD


def head(params: Params, arch: Arch) -> Params:
    """The weights that `logits` reads, and no others."""
    name = "embedding" if arch.tied_embeddings else "unembedding"
    return {name: params[name]}


def logits(params: Params, arch: Arch, hidden: jax.Array) -> jax.Array:
    """The scores of the next token, float32 [..., V], from hidden states [..., D] after the final norm."""
    if isinstance(params.get("unembedding"), ByOutput):  # of tied embeddings too
        scores = params["unembedding"].times(hidden, jnp.float32)
    elif arch.tied_embeddings:
        table_VD = params["embedding"].astype(hidden.dtype)
        scores = jnp.einsum("...D,VD->...V", hidden, table_VD, preferred_element_type=jnp.float32)
    else:
        table_DV = params["unembedding"].astype(hidden.dtype)
        scores = jnp.einsum("...D,DV->...V", hidden, table_DV, preferred_element_type=jnp.float32)
    return scores if arch.logit_cap is None else arch.logit_cap * jnp.tanh(scores / arch.logit_cap)


def decoder_layer(
    x_BTD: jax.Array, weights: Params, arch: Arch, rotation: Rotation, meet: Meet
) -> tuple[jax.Array, Cache]:
    """One layer: attention and the gated feed-forward, each on a normed copy, each added to the stream."""
    w = cast(weights, x_BTD.dtype)
    normed_BTD = gathered(_norm(x_BTD, w["attention_norm"], arch))
    banks = [_project(normed_BTD, bank, arch) for bank in w["attention"].get("banks", (w["attention"],))]
    mixed_BTNH, cache = meet([Heads(rotate(q, rotation), rotate(k, rotation), v) for q, k, v in banks])
    mixed_BTD = scattered(dense(checkpoint_name(mixed_BTNH, MIXED), w["attention"]["o"], inputs=2))
    x_BTD = x_BTD + (_norm(mixed_BTD, w["attention_post_norm"], arch) if arch.post_norms else mixed_BTD)

    normed_BTD = gathered(_norm(x_BTD, w["ffn_norm"], arch))
    down_BTD = scattered(gated(normed_BTD, **w["ffn"], activation=ACTIVATIONS[arch.activation]))
    x_BTD = x_BTD + (_norm(down_BTD, w["ffn_post_norm"], arch) if arch.post_norms else down_BTD)
    return x_BTD, cache


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


def _project(x_BTD: jax.Array, w: Params, arch: Arch) -> Heads:
    q_BTNH = dense(x_BTD, w["q"])
    k_BTKH = dense(x_BTD, w["k"])
    v_BTKH = dense(x_BTD, w["v"])
    if arch.qkv_bias:
        q_BTNH, k_BTKH, v_BTKH = q_BTNH + w["q_bias"], k_BTKH + w["k_bias"], v_BTKH + w["v_bias"]
    if arch.qk_norm:
        q_BTNH, k_BTKH = _norm(q_BTNH, w["q_norm"], arch), _norm(k_BTKH, w["k_norm"], arch)
    return Heads(q_BTNH, k_BTKH, v_BTKH)


def _norm(x: jax.Array, weight: jax.Array, arch: Arch) -> jax.Array:
    """Root-mean-square norm over the last axis, in 32 bits, returned in x's dtype (arXiv 1910.07467, equation 4)."""
    x32, scale = x.astype(jnp.float32), weight.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + arch.norm_eps)
    return (normed * (1 + scale if arch.norm_offset else scale)).astype(x.dtype)


def rotary_tables(positions_BT: jax.Array, arch: Arch) -> Rotations:
    """cos and sin of every position's angles, float32 [B, T, 1, R/2] with R dimensions of a head turning
    (arXiv 2104.09864, equation 15): for all layers, and for the local ones where they turn by a base of their own."""

    def table(theta: float, scaling: Scaling | None) -> Rotation:
        radians, factor = turns(theta, arch.rotary_size, scaling)
        angles = positions_BT[..., None, None].astype(jnp.float32) * radians
        return jnp.cos(angles) * factor, jnp.sin(angles) * factor

    nearby = None if arch.local_rope_theta is None else table(arch.local_rope_theta, None)
    return table(arch.rope_theta, arch.rope_scaling), nearby


def _of_layer(rotations: Rotations, local: bool | jax.Array) -> Rotation:
    everywhere, nearby = rotations
    if nearby is None:
        return everywhere
    return jax.tree.map(partial(jnp.where, local), nearby, everywhere)


def rotate(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn each head by its position's angles; the pairs are (i, i + R/2), as Hugging Face checkpoints have them.

    Only the first R of the H dimensions turn; the others pass.
    """
    cos, sin = rotation
    size = 2 * cos.shape[-1]
    a, b = jnp.split(x_BTNH[..., :size].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
    return jnp.concatenate([turned, x_BTNH[..., size:]], axis=-1) if size < x_BTNH.shape[-1] else turned


def _write(
    cache: Cache, layer: Any, positions_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> tuple[jax.Array, jax.Array, Cache]:
    """Write into slots `positions_BT` of every row of one layer; in place when donated."""
    rows, every = jnp.arange(positions_BT.shape[0])[:, None], slice(None)
    # Slices between the index arrays: the shape of both updates is [B, T, ...].
    places = {"k": (rows, every, every, positions_BT), "v": (rows, every, positions_BT)}
    fresh = {"k": k_BTKH, "v": v_BTKH}
    stacked = isinstance(cache, dict)
    if stacked:
        places = {name: (layer, *place) for name, place in places.items()}
    kinds = cache if stacked else cache[layer]
    written = {n: kinds[n].at[places[n]].set(fresh[n].astype(kinds[n].dtype), mode="drop") for n in ("k", "v")}
    seen = {name: array[layer] for name, array in written.items()} if stacked else written
    cache = written if stacked else tuple(written if n == layer else one for n, one in enumerate(cache))
    return seen["k"].astype(k_BTKH.dtype), seen["v"].astype(v_BTKH.dtype), cache
