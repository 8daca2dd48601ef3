"""The key-value cache: an ordinary pytree that `forward` takes and returns. Slot p of a row holds its position p."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pkv.model.arch import Arch

Cache = Any  # {"k": [L, B, K, H, S], "v": [L, B, K, S, H]}, or a tuple of L such dicts without the axis L

SLOTS = {"k": -1, "v": -2}  # where the axis S is; see `attend` for why keys and values differ


def init_cache(arch: Arch, rows: int, length: int, dtype: Any = jnp.float32, *, stacked: bool = True) -> Cache:
    """An empty cache for `rows` rows of `length` positions; `stacked` must match the layers of the weights."""
    K, H = arch.kv_heads, arch.head_size
    shapes = {"k": (rows, K, H, length), "v": (rows, K, length, H)}
    if stacked:
        return {name: jnp.zeros((arch.layers, *shape), dtype) for name, shape in shapes.items()}
    return tuple({name: jnp.zeros(shape, dtype) for name, shape in shapes.items()} for _ in range(arch.layers))


def cache_axes(arch: Arch, *, stacked: bool = True) -> Any:
    """The logical axes of every array of the cache."""
    axes = {"k": ("rows", "kv_heads", "head", "time"), "v": ("rows", "kv_heads", "time", "head")}
    if stacked:
        return {name: ("layers", *names) for name, names in axes.items()}
    return (axes,) * arch.layers


def cache_length(cache: Cache) -> int:
    """S, the positions that a row has room for."""
    layer = cache[0] if isinstance(cache, (tuple, list)) else cache
    return layer["k"].shape[SLOTS["k"]]


def grow_cache(cache: Cache, length: int) -> Cache:
    """The same cache with room for `length` positions; new slots are zero. One that has it comes back as it is."""
    more = length - cache_length(cache)
    if more <= 0:
        return cache

    def pad(path: tuple[Any, ...], array: jax.Array) -> jax.Array:
        widths = [(0, 0)] * array.ndim
        widths[SLOTS[path[-1].key]] = (0, more)
        return jnp.pad(array, widths)

    return jax.tree_util.tree_map_with_path(pad, cache)


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """The chosen rows of the cache, in the order of `rows` (whole numbers, repeats allowed)."""
    return jax.tree.map(lambda array: jnp.take(array, rows, axis=array.ndim - 4), cache)


def put_rows(cache: Cache, rows: jax.Array, fresh: Cache) -> Cache:
    """The cache with the rows of `fresh` (the same form, not longer) written over its rows `rows`, from slot 0 on.

    Slots of `cache` beyond the length of `fresh` keep what they hold; a row number beyond the cache's end is dropped.
    """

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        layers = (slice(None),) * (array.ndim - 4)
        return array.at[(*layers, rows, slice(None), slice(new.shape[-2]), slice(new.shape[-1]))].set(new, mode="drop")

    return jax.tree.map(put, cache, fresh)
