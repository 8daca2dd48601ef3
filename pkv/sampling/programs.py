"""What runs on the devices: prefill, decode, and moving pages. Each program sees one shard's rows and pages.

Compiled anew for each shape of its arrays, and for nothing else; the shapes come from `pool.round_up`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pkv.config import SamplingConfig
from pkv.mesh import BATCH_AXES, PAGE_AXES, SAMPLING_RULES, shardings
from pkv.model import (
    Arch,
    Cache,
    Level,
    Paged,
    Params,
    Stock,
    choose_page_kernel,
    cut_into_pages,
    forward,
    init_cache,
    init_stock,
    logits,
    put_pages,
    resize_pages,
    stock_axes,
    take_pages,
)
from pkv.sampling import laying
from pkv.sampling.drawing import Drawing, Greedy, Nucleus, draw
from pkv.sampling.laying import Lay, form_of

# Stands where nothing ends a response: an array of nothing made jaxlib 0.11.2's CPU compiler crash on a mesh.
NO_TOKEN = -1
STEPS_BETWEEN = 8  # two looks at whether any shard has a row left
PREFILL_CHUNK = 512  # prompt tokens of a row that meet their keys at the same time, at most

ROWS, PAGES, WHOLE = PartitionSpec(BATCH_AXES), PartitionSpec(PAGE_AXES), PartitionSpec()


class Table(NamedTuple):
    """Who reads the pages of one level: see `model.pages.Level`, of which it is all but the stock."""

    readers: Any
    first: Any
    stop: Any


class Rows(NamedTuple):
    """All slots at the start of a segment. `position` is that of `token`, whose key and value are not written yet.

    int32 [B]: token, position, last (the last position that may be generated), origin (the first position of
    `ahead`'s first page). active: bool [B]. keys: uint32 [B, 2]. forced: int32 [B, steps], tokens that come whatever is
    drawn, -1 where none. ahead: int32 [B, sequence, W], the pages that the segment is written into, on each of the
    row's devices.
    """

    token: Any
    position: Any
    last: Any
    origin: Any
    active: Any
    keys: Any
    forced: Any
    ahead: Any


class Segment(NamedTuple):
    """What a segment brought: [steps, B] tokens, both log-probabilities, and which of them count; active: bool [B]."""

    tokens: Any
    logprobs: Any
    policy_logprobs: Any
    counted: Any
    active: Any


def page_tokens(config: SamplingConfig, platform: str) -> int:
    """Positions of a page of keys and values."""
    return config.page_tokens or (64 if platform == "cpu" else 128)


class Programs:
    """The compiled programs of one architecture on one mesh; `whole` is that of all hosts, where weights come from."""

    def __init__(
        self, arch: Arch, config: SamplingConfig, stop_ids: Sequence[int], mesh: Mesh, dtype: Any, whole: Mesh
    ) -> None:
        self.arch, self.repeats = _spread_kv_heads(arch, mesh.shape["tensor"])
        self._mesh, self._dtype, platform = mesh, jnp.dtype(dtype), mesh.devices.flat[0].platform
        eight_bit = config.weights == "int8"
        self.form = form_of(self.arch, mesh, self._dtype, eight_bit=eight_bit)
        self.fixed = platform == "tpu"  # a stock keeps its size; elsewhere XLA copies what is read of a larger one
        self.page = page_tokens(config, platform)
        self._eight_bit = config.kv_cache == "int8"
        self._kernel = choose_page_kernel(config.attention, mesh, self.arch, self.page, self._dtype, self._eight_bit)
        self._banks = _banks(self.arch.kv_heads, mesh) if self.form == "by output" else 1
        self._steps = config.segment
        self._stops = jnp.asarray(list(stop_ids) or [NO_TOKEN], jnp.int32)
        self._drawing: Drawing = Greedy()
        if config.temperature > 0:
            self._drawing = Nucleus(config.top_p < 1 or config.top_k > 0 or config.min_p > 0, config.top_k)
        self._scalars = (jnp.float32(config.temperature or 1.0), jnp.float32(config.top_p), jnp.float32(config.min_p))
        # Partials, as jit counts the programs of a function together, whoever compiled them.
        how = {"flat": platform in laying.FLAT_ON, "eight_bit": eight_bit}
        self.lay = Lay(self.arch, self.repeats, self._dtype, whole, self.form, self._banks, **how)
        self.prefix = jax.jit(self._prefix)
        self.prefill = jax.jit(self._prefill, donate_argnames="stock")
        self.decode = jax.jit(self._decode, donate_argnames="own")
        self.empty = jax.jit(self._empty, static_argnames="pages")
        self.resize = jax.jit(self._resize, static_argnames="pages")
        self.relocate = jax.jit(self._relocate, donate_argnames="stock")
        self.fetch = jax.jit(partial(take_pages))
        self.restore = jax.jit(self._restore, donate_argnames="stock")

    @property
    def stacked(self) -> bool:
        """Whether weights and pages hold all layers in one array."""
        return self.form == "stacked"

    @property
    def compilations(self) -> int:
        """How many programs have been compiled."""
        return sum(program._cache_size() for program in vars(self).values() if hasattr(program, "_cache_size"))

    def page_bytes(self) -> int:
        """Bytes of one page on a device that holds it."""
        return sum(device_bytes(self.stock_shapes(1)))

    def prefix_bytes(self, length: int) -> int:
        """Bytes on a device of what `prefix` gives for so many tokens: their cache is whole on each."""
        return sum(device_bytes(self.prefix_shapes(length)))

    def largest_share(self) -> float:
        """Which share of a stock exists twice while its size changes, if it does: a layer, or a stacked array."""
        if self.fixed:
            return 0.0
        sizes = device_bytes(self.stock_shapes(1))
        return max(sizes) / sum(sizes) if self.stacked else 1 / self.arch.layers

    def _prefix(self, weights: Params, tokens_C: jax.Array) -> tuple[Cache, Stock]:
        """The keys and values of what all prompts begin with: as a cache of one row, and as a level's stock."""

        def own(weights: Params, tokens_C: jax.Array) -> tuple[Cache, Stock]:
            cache = self._fill(weights, self._cache(1, len(tokens_C)), tokens_C[None], 0)
            ways = self._mesh.shape["sequence"]
            mine = jax.lax.axis_index("sequence") + ways * jnp.arange(-(-len(tokens_C) // (self.page * ways)))
            return cache, take_pages(self._cut(cache), mine)

        specs = WHOLE, self._specs(jax.eval_shape(partial(self._stock, 1)))
        cache, stock = self._by_shard(own, (WHOLE, WHOLE), specs)(weights, tokens_C)
        return jax.lax.with_sharding_constraint(cache, self._cache_placing(cache)), self._spread(stock)

    def _prefill(self, weights: Params, prefix: Cache | None, stock: Stock, tokens_PT: Any, places: Any) -> Stock:
        """The keys and values of whole prompts, each shard its own, written into the pages `places` of `stock`.

        Not spread over the axis "sequence": each of its devices computes all of a prompt, and keeps its own pages.
        prefix: what comes before tokens_PT in every row. places: int32 [shards, P · T/page]; beyond the stock's end:
        nowhere. Padding on the right is written too, where nothing looks at it.
        """

        def own(weights: Params, prefix: Any, stock: Stock, tokens_PT: Any, places: Any) -> Stock:
            P, T = tokens_PT.shape
            C = 0 if prefix is None else (prefix if self.stacked else prefix[0])["k"].shape[-1]
            cache = self._cache(P, C + T)
            if prefix is not None:
                cache = jax.tree.map(_put_first, cache, prefix)
            cache = jax.tree_util.tree_map_with_path(partial(_after, C), self._fill(weights, cache, tokens_PT, C))
            return put_pages(stock, places[0], self._cut(cache))

        mapped = self._by_shard(own, (WHOLE, WHOLE, self._specs(stock), ROWS, PAGES), self._specs(stock))
        return self._spread(mapped(weights, prefix, stock, tokens_PT, places))

    def _fill(self, weights: Params, cache: Cache, tokens_PT: jax.Array, before: int) -> Cache:
        """The cache with tokens_PT in it, from position `before` on, chunk by chunk."""
        P, T = tokens_PT.shape

        def chunk(size: int, cache: Cache, at: Any) -> tuple[Cache, None]:
            tokens = jax.lax.dynamic_slice_in_dim(tokens_PT, at, size, axis=1)
            positions = jnp.broadcast_to(before + at + jnp.arange(size), (P, size))
            return forward(weights, self.arch, tokens, positions, cache=cache, dtype=self._dtype)[1], None

        whole = T - T % PREFILL_CHUNK
        if whole:
            cache, _ = jax.lax.scan(partial(chunk, PREFILL_CHUNK), cache, jnp.arange(0, whole, PREFILL_CHUNK))
        return chunk(T - whole, cache, whole)[0] if whole < T else cache

    def _decode(
        self, weights: Params, shared: tuple[Level, ...], own: Stock, table: Table, rows: Rows
    ) -> tuple[Stock, Segment]:
        """Up to `steps` tokens for every active row; ends early when none is left."""
        level = Table(PAGES, PAGES, PAGES)
        specs = (
            WHOLE,
            tuple(Level(self._specs(one.stock), *level) for one in shared),
            self._specs(own),
            level,
            Rows(ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, PartitionSpec(BATCH_AXES, "sequence")),
        )
        columns = PartitionSpec(None, BATCH_AXES)
        out_specs = (self._specs(own), Segment(columns, columns, columns, columns, ROWS))
        own, segment = self._by_shard(self._decode_own, specs, out_specs)(weights, shared, own, table, rows)
        return self._spread(own), segment

    def _decode_own(
        self, weights: Params, shared: tuple[Level, ...], own: Stock, table: Table, rows: Rows
    ) -> tuple[Stock, Segment]:
        B, steps = rows.forced.shape
        outputs = (
            jnp.zeros((steps, B), jnp.int32),
            *(jnp.zeros((steps, B)) for _ in range(2)),
            jnp.zeros((steps, B), bool),
        )
        keys = rows.keys
        levels = [*shared, Level(None, *table)]
        if self._kernel != "xla":
            levels = [level.in_order(B) for level in levels]

        def more(loop: Any) -> jax.Array:
            step, going, *_ = loop
            return (step < steps) & going

        def advance(loop: Any) -> Any:
            step, _, own, token, position, active, outputs = loop
            page, slot = jnp.divmod(position - rows.origin, self.page)
            page = jnp.take_along_axis(rows.ahead[:, 0], page[:, None], axis=1, mode="clip")[:, 0]
            page = jnp.where(active, page, jnp.iinfo(jnp.int32).max)
            cache = Paged((*levels[:-1], levels[-1]._replace(stock=own)), page, slot)
            kind = {"cache": cache, "dtype": self._dtype, "page_kernel": self._kernel}
            hidden_B1D, own = forward(weights, self.arch, token[:, None], position[:, None], **kind)
            logits_BV = logits(weights, self.arch, hidden_B1D[:, 0])
            forced = jax.lax.dynamic_index_in_dim(rows.forced, step, axis=1, keepdims=False)
            drawn = draw(self._drawing, logits_BV, keys, position + 1, *self._scalars, forced_B=forced)
            outputs = tuple(out.at[step].set(new) for out, new in zip(outputs, (*drawn, active), strict=True))
            position = jnp.where(active, position + 1, position)
            token = jnp.where(active, drawn.tokens, token)
            ended = (jnp.isin(token, self._stops) & (forced < 0)) | (position >= rows.last)
            active &= ~ended
            return step + 1, self._any_left(step + 1, active), own, token, position, active, outputs

        start = (jnp.int32(0), jnp.bool_(True), own, rows.token, rows.position, rows.active, outputs)
        _, _, own, _, _, active, outputs = jax.lax.while_loop(more, advance, start)
        return own, Segment(outputs[0], outputs[1], outputs[2], outputs[3], active)

    def _any_left(self, step: jax.Array, active: jax.Array) -> jax.Array:
        """Whether a segment goes on. Shards whose steps hold collectives agree on it, every few steps."""
        shape = self._mesh.shape
        if self._ways(BATCH_AXES) == 1 or shape["sequence"] * shape["tensor"] == 1:
            return active.any()
        agree = lambda active: jax.lax.pmax(active.any().astype(jnp.int32), BATCH_AXES) > 0  # noqa: E731
        return jax.lax.cond(step % STEPS_BETWEEN == 0, agree, lambda active: jnp.bool_(True), active)

    def _empty(self, *, pages: int) -> Stock:
        """So many empty pages on each shelf."""
        return self._spread(self._stock(pages * self._ways(PAGE_AXES)))

    def _resize(self, stock: Stock, *, pages: int) -> Stock:
        specs = self._specs(stock)
        return self._spread(self._by_shard(partial(resize_pages, pages=pages), (specs,), specs)(stock))

    def _relocate(self, stock: Stock, old: Any, new: Any) -> Stock:
        """Pages of every shard, int32 [shards, P], copied to where they are to lie; beyond the stock's end: nowhere."""

        def own(stock: Stock, old: Any, new: Any) -> Stock:
            return put_pages(stock, new[0], take_pages(stock, old[0]))

        specs = self._specs(stock)
        return self._spread(self._by_shard(own, (specs, PAGES, PAGES), specs)(stock, old, new))

    def _restore(self, stock: Stock, pages: Any, fresh: Stock) -> Stock:
        return self._spread(put_pages(stock, pages, fresh))

    def _by_shard(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """A function that every shard calls on its own rows and pages; over tensor the compiler spreads it."""
        kind = {"mesh": self._mesh, "axis_names": set(PAGE_AXES), "check_vma": False}
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, **kind)

    def _specs(self, stock: Stock) -> Any:
        return jax.tree.map(lambda a: PartitionSpec(*(None,) * (len(a.shape) - 4), PAGE_AXES), stock)

    def _ways(self, axes: tuple[str, ...]) -> int:
        return math.prod(self._mesh.shape[name] for name in axes)

    def _stock(self, pages: int) -> Stock:
        kind = {"stacked": self.stacked, "banks": self._banks, "eight_bit": self._eight_bit}
        return init_stock(self.arch, pages, self.page, self._dtype, **kind)

    def _cache(self, rows: int, length: int) -> Cache:
        return init_cache(self.arch, rows, length, self._dtype, stacked=self.stacked)

    def _cache_placing(self, cache: Cache) -> Any:
        """Where the common prefix's cache lies: whole on every row shard, its heads over tensor as far as they go."""
        heads = "tensor" if self.arch.kv_heads % self._mesh.shape["tensor"] == 0 else None
        return jax.tree.map(lambda a: NamedSharding(self._mesh, PartitionSpec(*(None,) * (a.ndim - 3), heads)), cache)

    def _cut(self, cache: Cache) -> Stock:
        return cut_into_pages(cache, self.page, banks=self._banks, eight_bit=self._eight_bit)

    def _placing(self, stock: Stock) -> Any:
        return shardings(stock_axes(stock), stock, self._mesh, SAMPLING_RULES)

    def _spread(self, stock: Stock) -> Stock:
        """Every device holds its own pages and heads, whatever made them: one layout, one program for each shape."""
        return jax.lax.with_sharding_constraint(stock, self._placing(stock))

    @property
    def shelves(self) -> int:
        """How many devices hold pages of their own."""
        return self._ways(PAGE_AXES)

    def stock_shapes(self, pages: int) -> Stock:
        """Shapes, dtypes and places of so many pages on each shelf."""
        return _described(jax.eval_shape(partial(self._stock, pages * self.shelves)), self._placing)

    def prefix_shapes(self, length: int) -> tuple[Cache, Stock]:
        """Shapes, dtypes and places of what `prefix` gives for so many tokens."""
        cache = jax.eval_shape(partial(self._cache, 1, length))
        ways = self._mesh.shape["sequence"]
        return _described(cache, self._cache_placing), self.stock_shapes(-(-length // (self.page * ways)))


def _described(tree: Any, placing: Callable[[Any], Any]) -> Any:
    """Shapes with their places, as a program's results have them: without None at the end of a PartitionSpec."""

    def one(array: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
        parts = list(place.spec)
        while parts and parts[-1] is None:
            parts.pop()
        sharding = NamedSharding(place.mesh, PartitionSpec(*parts))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(one, tree, placing(tree))


def device_bytes(tree: Any) -> list[int]:
    """What each array takes of a device."""
    return [math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)]


def _spread_kv_heads(arch: Arch, tensor: int) -> tuple[Arch, int]:
    """The architecture with its key-value heads repeated so often that `tensor` devices divide them, and how often."""
    repeats = tensor // math.gcd(arch.kv_heads, tensor)
    if repeats == 1 or arch.heads % (arch.kv_heads * repeats):
        return arch, 1
    return dataclasses.replace(arch, kv_heads=arch.kv_heads * repeats), repeats


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _banks(kv_heads: int, mesh: Mesh) -> int:
    """Parts of a device's key-value heads that a CPU's cores read beside each other: see `model.pages.Stock`."""
    heads, rest = divmod(kv_heads, mesh.shape["tensor"])
    return 1 if rest else math.gcd(heads, max(1, cores() // mesh.size))


def _put_first(array: jax.Array, row: jax.Array) -> jax.Array:
    """One row's cache, in front of every row of a longer cache."""
    first = jnp.broadcast_to(row, (*row.shape[:-4], array.shape[-4], *row.shape[-3:]))
    return array.at[..., : row.shape[-2], : row.shape[-1]].set(first)


def _after(length: int, path: tuple[Any, ...], array: jax.Array) -> jax.Array:
    """A cache without its first positions."""
    return array[..., length:] if path[-1].key == "k" else array[..., length:, :]
