"""The key-value cache: an ordinary pytree that `forward` takes and returns. Slot p of a row holds its position p.

And what comes to it, a layer's queries and its new keys and values; and where it lies in pages, these as they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pkv.model.arch import Arch

Cache = Any  # {"k": [L, B, K, H, S], "v": [L, B, K, S, H]}, or a tuple of L such dicts without the axis L
LEAST = jnp.finfo(jnp.float32).min  # the score of what isn't seen


class Heads(NamedTuple):
    """What a layer's heads ask, [B, T, N, H], and what they write, [B, T, K, H] each; or a bank of them."""

    q: jax.Array
    k: jax.Array
    v: jax.Array

    @classmethod
    def joined(cls, banks: Sequence[Heads]) -> Heads:
        """All banks as one."""
        if len(banks) == 1:
            return banks[0]
        return cls(*(jnp.concatenate(parts, axis=2) for parts in zip(*banks, strict=True)))


class Met(NamedTuple):
    """A level's pages, or a bank of them, as its readers meet them."""

    pages: dict[str, jax.Array]
    readers: jax.Array  # int32 [P, R]
    seen: jax.Array  # bool [P, R, S], which slots of a page a reader sees
    order: jax.Array | None = None  # as in `pages.Level`
    starts: jax.Array | None = None


def init_cache(arch: Arch, rows: int, length: int, dtype: Any = jnp.float32, *, stacked: bool = True) -> Cache:
    """An empty cache for `rows` rows of `length` positions; `stacked` must match the layers of the weights."""
    K, H = arch.kv_heads, arch.head_size
    shapes = {"k": (rows, K, H, length), "v": (rows, K, length, H)}
    if stacked:
        return {name: jnp.zeros((arch.layers, *shape), dtype) for name, shape in shapes.items()}
    return tuple({name: jnp.zeros(shape, dtype) for name, shape in shapes.items()} for _ in range(arch.layers))
