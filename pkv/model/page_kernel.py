"""Attention over pages by a kernel of our own, for NVIDIA's GPUs from Ampere on.

What XLA makes of `pages.meet_pages` is some twenty small kernels a layer, which take longer than reading the pages
where the model is small. Here every page meets its readers in one program, with all of its numbers in registers, and
leaves a part for each of them; then every row puts its parts together (arXiv 2205.14135, section 3.1). Written in
Pallas for Triton, which JAX means to drop: where it is gone, `kernels.choose_page_kernel` says XLA.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pkv.mesh import merging_axis
from pkv.model.cache import LEAST, Met

QUERIES = 16, 64  # that meet a page in one program: a product needs the first at least, registers hold the second
AT_ONCE = 8  # parts of a row that are put together at once
TINY = jnp.finfo(jnp.float32).tiny


class Part(NamedTuple):
    """What readers have of pages, float32: the greatest score, and sums of the shares and of what they mix."""

    most: Any
    whole: Any
    mixed: Any  # with one more axis, H


def attend_pages(q_BKGH: jax.Array, levels: Sequence[Met], cap: float | None, *, interpret: bool = False) -> jax.Array:
    """The softmax over all that a row reads, [B, K, G, H]; of levels with their `order`. See `kernels` for its limits.

    interpret: on any device, without compiling, for tests.
    """
    axis = merging_axis()
    found = _attend(q_BKGH, tuple(levels), cap, axis is None, interpret)
    if axis is None:
        return found.mixed
    most_BKG = jax.lax.pmax(found.most, axis)
    weights_BKG = jnp.exp(found.most - most_BKG)
    sums = jax.lax.psum((found.whole * weights_BKG, found.mixed * weights_BKG[..., None]), axis)
    return sums[1] / jnp.maximum(sums[0], TINY)[..., None]


# Jitted, so that it is traced once for all layers.
@partial(jax.jit, static_argnums=(2, 3, 4))
def _attend(q_BKGH: jax.Array, levels: tuple[Met, ...], cap: float | None, alone: bool, interpret: bool) -> Part:
    parts = [_parts(q_BKGH, met, cap, interpret) for met in levels]
    return _by_row(q_BKGH, parts, levels, alone, interpret)


def _parts(q_BKGH: jax.Array, met: Met, cap: float | None, interpret: bool) -> Part:
    """Of each page and its readers' queries, [P, K, M] for M = R·G."""
    B, K, G, H = q_BKGH.shape
    P, R = met.readers.shape
    M, S = R * G, met.seen.shape[-1]
    block = min(max(QUERIES[0], pl.next_power_of_2(M)), QUERIES[1])

    def meet(q: Any, readers: Any, seen: Any, k: Any, v: Any, part: Part) -> None:
        p, head = pl.program_id(0), pl.program_id(1)
        number = pl.program_id(2) * block + jnp.arange(block)
        there = number < M
        reader, g = jnp.minimum(number, M - 1) // G, number % G
        row = triton.load(readers.at[p, reader])
        reads = (there & (row < B))[:, None]

        @pl.when(jnp.max(reads.astype(jnp.int32)) > 0)  # a page without a reader is not read
        def _() -> None:
            across = jnp.arange(H)[None]
            queries = triton.load(
                q.at[jnp.minimum(row, B - 1)[:, None], head, g[:, None], across], mask=reads, other=0.0
            )
            scores = triton.dot(queries, k[0, 0])
            if cap is not None:
                scores = cap * _tanh(scores / cap)
            sees = triton.load(seen.at[p, reader[:, None], jnp.arange(S)[None]], mask=reads, other=False)
            scores = jnp.where(sees, scores, LEAST)
            most = scores.max(axis=1)
            shares = jnp.exp(scores - most[:, None])
            triton.store(part.most.at[p, head, number], most, mask=there)
            triton.store(part.whole.at[p, head, number], shares.sum(axis=1), mask=there)
            mixed = triton.dot(shares.astype(v.dtype), v[0, 0])
            triton.store(part.mixed.at[p, head, number[:, None], across], mixed, mask=there[:, None])

    def page(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *array.shape[2:]), lambda p, head, _: (p, head, 0, 0))

    arrays = q_BKGH, met.readers, met.seen, met.pages["k"], met.pages["v"]
    return pl.pallas_call(
        lambda q, readers, seen, k, v, *out: meet(q, readers, seen, k, v, Part(*out)),
        grid=(P, K, pl.cdiv(M, block)),
        in_specs=[*map(_everything, arrays[:3]), *map(page, arrays[3:])],
        out_shape=(shapes := _shapes((P, K, M), H)),
        out_specs=Part(*map(_everything, shapes)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="meet_pages",
    )(*arrays)


def _by_row(q_BKGH: jax.Array, parts: Sequence[Part], levels: Sequence[Met], alone: bool, interpret: bool) -> Part:
    """The parts of each row as one, [B, K, G]; alone: what is mixed already divided, in the queries' dtype."""
    B, K, G, H = q_BKGH.shape
    width = pl.next_power_of_2(G)
    readers = [met.readers.shape[1] for met in levels]

    def gather(*refs: Any) -> None:
        given, out = refs[: -len(Part._fields)], Part(*refs[-len(Part._fields) :])
        b, head = pl.program_id(0), pl.program_id(1)
        g, across = jnp.arange(width), jnp.arange(H)
        there = g < G
        found = Part(jnp.full(width, LEAST), jnp.zeros(width), jnp.zeros((width, H)))
        for level, R in enumerate(readers):
            *arrays, order, starts = given[level * 5 : level * 5 + 5]
            part, first, stop = Part(*arrays), triton.load(starts.at[b]), triton.load(starts.at[b + 1])

            def add(
                turn: Any, found: Part, part: Part = part, order: Any = order, R: int = R, span: Any = (first, stop)
            ):
                at = span[0] + turn * AT_ONCE + jnp.arange(AT_ONCE)
                place = triton.load(order.at[at], mask=at < span[1], other=0)[:, None]
                p, number, mine = place // R, place % R * G + g, (at < span[1])[:, None] & there
                most = triton.load(part.most.at[p, head, number], mask=mine, other=LEAST)
                whole = triton.load(part.whole.at[p, head, number], mask=mine, other=0.0)
                here = part.mixed.at[p[..., None], head, number[..., None], across[None, None]]
                mixed = triton.load(here, mask=mine[..., None], other=0.0)
                now = jnp.maximum(found.most, most.max(axis=0))
                kept, weights = jnp.exp(found.most - now), jnp.exp(most - now)
                whole = found.whole * kept + (whole * weights).sum(axis=0)
                return Part(now, whole, found.mixed * kept[:, None] + (mixed * weights[..., None]).sum(axis=0))

            found = jax.lax.fori_loop(0, pl.cdiv(stop - first, AT_ONCE), add, found)
        mixed = found.mixed / jnp.maximum(found.whole, TINY)[:, None] if alone else found.mixed
        triton.store(out.most.at[b, head, g], found.most, mask=there)
        triton.store(out.whole.at[b, head, g], found.whole, mask=there)
        here = out.mixed.at[b, head, g[:, None], across[None]]
        triton.store(here, mixed.astype(out.mixed.dtype), mask=there[:, None])

    arrays = [array for part, met in zip(parts, levels, strict=True) for array in (*part, met.order, met.starts)]
    return pl.pallas_call(
        gather,
        grid=(B, K),
        in_specs=list(map(_everything, arrays)),
        out_shape=(shapes := _shapes((B, K, G), H, q_BKGH.dtype if alone else jnp.float32)),
        out_specs=Part(*map(_everything, shapes)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="parts_by_row",
    )(*arrays)


def _tanh(x: jax.Array) -> jax.Array:
    return 2 / (1 + jnp.exp(-2 * x)) - 1  # Triton has none of its own


def _shapes(sizes: tuple[int, ...], head: int, dtype: Any = jnp.float32) -> Part:
    number = jax.ShapeDtypeStruct(sizes, jnp.float32)
    return Part(number, number, jax.ShapeDtypeStruct((*sizes, head), dtype))


def _everything(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))
