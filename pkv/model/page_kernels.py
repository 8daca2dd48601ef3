"""Attention over pages by a kernel for GPUs (Ampere and later), in Pallas: a page is read once, and nothing is written but its parts.

What XLA makes of `pages._attend` is some twenty small kernels a layer, which cost more than reading the pages where a
model is small. Here it is one for each level and one that puts the parts together (arXiv 2205.14135, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LEAST = jnp.finfo(jnp.float32).min
BLOCK = 64  # queries that meet a page at the same time, at most


def attend_pages(q_BKGH: jax.Array, levels: Sequence[Any], *, interpret: bool = False):
    """most, whole [B, K, G] and mixed [B, K, G, H], float32: see `pages._attend`."""
    B, K, G, H = q_BKGH.shape
    parts, orders = [], []
    for met in levels:
        P, R = met.readers.shape
        parts.append(_parts(q_BKGH, met, interpret))
        flat = met.readers.reshape(-1)
        orders.append((jnp.argsort(flat).astype(jnp.int32), jnp.searchsorted(jnp.sort(flat), jnp.arange(B + 1)).astype(jnp.int32), R))
    return _merged(q_BKGH, parts, orders, interpret)


def _pow2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _parts(q_BKGH, met, interpret):
    B, K, G, H = q_BKGH.shape
    P, R = met.readers.shape
    S = met.pages["v"].shape[2]
    M = R * G
    block = min(BLOCK, max(16, _pow2(M)))
    cap = met.cap if hasattr(met, "cap") else None

    def kernel(readers, seen, q, k, v, most, whole, mixed):
        p, head, at = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        m = at * block + jnp.arange(block)
        there = m < M
        r = jnp.minimum(m, M - 1) // G
        row = triton.load(readers.at[p, r])
        reads = there & (row < B)
        row = jnp.where(reads, row, 0)
        hs = jnp.arange(H)
        queries = triton.load(q.at[row[:, None], head, (m % G)[:, None], hs[None, :]], mask=reads[:, None], other=0.0)
        keys = k[0, 0]
        scores = triton.dot(queries, keys)
        sees = triton.load(seen.at[p, r[:, None], jnp.arange(S)[None, :]], mask=reads[:, None], other=False)
        scores = jnp.where(sees, scores, LEAST)
        top = scores.max(axis=1)
        shares = jnp.exp(scores - top[:, None])
        triton.store(most.at[p, head, m], top, mask=there)
        triton.store(whole.at[p, head, m], shares.sum(axis=1), mask=there)
        got = triton.dot(shares.astype(v.dtype), v[0, 0])
        triton.store(mixed.at[p, head, m[:, None], hs[None, :]], got, mask=there[:, None])

    whole_of = lambda a: pl.BlockSpec(a.shape, lambda p, h, i: (0,) * a.ndim)
    page = lambda a: pl.BlockSpec((1, 1, *a.shape[2:]), lambda p, h, i: (p, h, 0, 0))
    ins = (met.readers, met.seen, q_BKGH, met.pages["k"], met.pages["v"])
    shapes = [jax.ShapeDtypeStruct((P, K, M), jnp.float32)] * 2 + [jax.ShapeDtypeStruct((P, K, M, H), jnp.float32)]
    return pl.pallas_call(
        kernel,
        grid=(P, K, pl.cdiv(M, block)),
        in_specs=[whole_of(ins[0]), whole_of(ins[1]), whole_of(ins[2]), page(ins[3]), page(ins[4])],
        out_specs=[whole_of(s) for s in map(lambda s: jnp.empty(s.shape, s.dtype) if False else s, map(_Shape, shapes))],
        out_shape=shapes,
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        name="page_parts",
    )(*ins)


class _Shape:
    def __init__(self, s):
        self.shape, self.ndim = s.shape, len(s.shape)


def _merged(q_BKGH, parts, orders, interpret):
    B, K, G, H = q_BKGH.shape
    Gp = _pow2(G)
    Rs = [one[2] for one in orders]

    def kernel(*refs):
        ins, (out_most, out_whole, out_mixed) = refs[:-3], refs[-3:]
        b, head = pl.program_id(0), pl.program_id(1)
        g, hs = jnp.arange(Gp), jnp.arange(H)
        there = g < G
        carry = jnp.full((Gp,), LEAST, jnp.float32), jnp.zeros((Gp,), jnp.float32), jnp.zeros((Gp, H), jnp.float32)
        for level, R in enumerate(Rs):
            most, whole, mixed, order, starts = ins[5 * level : 5 * level + 5]
            first, last = triton.load(starts.at[b]), triton.load(starts.at[b + 1])

            def add(i, carry, most=most, whole=whole, mixed=mixed, order=order, R=R):
                top, sums, sum_h = carry
                j = triton.load(order.at[i])
                p, m = j // R, (j % R) * G + g
                new = triton.load(most.at[p, head, m], mask=there, other=LEAST)
                part = triton.load(whole.at[p, head, m], mask=there, other=0.0)
                mix = triton.load(mixed.at[p, head, m[:, None], hs[None, :]], mask=there[:, None], other=0.0)
                now = jnp.maximum(top, new)
                a, c = jnp.exp(top - now), jnp.exp(new - now)
                return now, sums * a + part * c, sum_h * a[:, None] + mix * c[:, None]

            carry = jax.lax.fori_loop(first, last, add, carry)
        top, sums, sum_h = carry
        triton.store(out_most.at[b, head, g], top, mask=there)
        triton.store(out_whole.at[b, head, g], sums, mask=there)
        triton.store(out_mixed.at[b, head, g[:, None], hs[None, :]], sum_h, mask=there[:, None])

    whole_of = lambda a: pl.BlockSpec(a.shape, lambda b, h: (0,) * len(a.shape))
    ins = [array for part, (order, starts, _) in zip(parts, orders, strict=True) for array in (*part, order, starts)]
    shapes = [jax.ShapeDtypeStruct((B, K, G), jnp.float32)] * 2 + [jax.ShapeDtypeStruct((B, K, G, H), jnp.float32)]
    return pl.pallas_call(
        kernel,
        grid=(B, K),
        in_specs=[whole_of(a) for a in ins],
        out_specs=[whole_of(s) for s in shapes],
        out_shape=shapes,
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=2, num_stages=2),
        name="page_merge",
    )(*ins)
