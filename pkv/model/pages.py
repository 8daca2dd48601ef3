"""Keys and values in pages: memory follows the sum of the lengths, and every page is read where it lies.

A page holds the same few positions of every layer, for one row, or for several rows that share what it says (a prompt's
samples, a common prefix). A token's attention is a flash-decoding merge (arXiv 2205.14135, section 3.1) of the pages
that its row reads: nothing is gathered, and a page that many rows read is read once for all of them. Everything here
sees one device's pages and rows; over the mesh axis "sequence" the pages of a row lie on several devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pkv.mesh import merging_axis
from pkv.model.arch import Arch

# {"k": [L, P, S, K, H], "v": [L, P, S, K, H]} or by heads {"k_heads": [L, P, K, H, S], "v_heads": [L, P, K, S, H]}, in
# 8 bits with "k_scale" and so on, where H is 1; or a tuple of L such dicts without the axis L. S: positions a page.
# A CPU takes them by heads, for its loops run along S; accelerators write a position in one piece, and would copy all
# pages at each segment's start and end if these stood in another order.
Stock = Any
LEAST = jnp.finfo(jnp.float32).min
WANTED = {"k": "KHS", "v": "KSH"}  # by attention
ORDERS = {"k": "SKH", "v": "SKH", "k_heads": "KHS", "v_heads": "KSH"}  # of the last three axes
FEW_QUERIES = 16  # so many queries a page at most meet it on a CPU as broadcast products (see `attention`)


class Level(NamedTuple):
    """Pages and who reads them. A reader that is no row (B or above) reads nothing."""

    stock: Stock
    readers: jax.Array  # int32 [P, R], rows
    first: jax.Array  # int32 [P], the position in a page's first slot
    stop: jax.Array  # int32 [P], slots that stand for positions from here on hold nothing


class Paged(NamedTuple):
    """What `forward` takes as a cache of pages: the new token of each row is written into the last level."""

    levels: tuple[Level, ...]
    page: jax.Array  # int32 [B], where the new token goes; beyond the last page: nowhere
    slot: jax.Array  # int32 [B]


def init_stock(
    arch: Arch,
    pages: int,
    size: int,
    dtype: Any = jnp.float32,
    *,
    stacked: bool = True,
    eight_bit: bool = False,
    by_heads: bool = False,
) -> Stock:
    """Empty pages of `size` positions; `stacked` must match the layers of the weights."""
    sizes = {"S": size, "K": arch.kv_heads, "H": arch.head_size}
    kinds = dict.fromkeys(_names(by_heads), (sizes, jnp.int8 if eight_bit else dtype))
    if eight_bit:
        kinds |= {f"{name}_scale": (sizes | {"H": 1}, jnp.float32) for name in kinds}
    lead = (arch.layers, pages) if stacked else (pages,)

    def empty() -> dict[str, jax.Array]:
        return {n: jnp.zeros((*lead, *(each[axis] for axis in _order(n))), kind) for n, (each, kind) in kinds.items()}

    return empty() if stacked else tuple(empty() for _ in range(arch.layers))


def _names(by_heads: bool) -> tuple[str, str]:
    return ("k_heads", "v_heads") if by_heads else ("k", "v")


def _order(name: str) -> str:
    return ORDERS[name.removesuffix("_scale")]


def _turned(array: jax.Array, order: str, wanted: str) -> jax.Array:
    """An array whose last three axes stand in `order`, in the order `wanted`."""
    lead = array.ndim - 3
    return array.transpose(*range(lead), *(lead + order.index(axis) for axis in wanted))


def stock_axes(stock: Stock) -> Any:
    """The logical axes of every array of a stock."""

    def axes(path: tuple[Any, ...], array: Any) -> tuple[str, ...]:
        names = {"S": "time", "K": "kv_heads", "H": "head"}
        found = ("pages", *(names[axis] for axis in _order(path[-1].key)))
        return found if len(array.shape) == len(found) else ("layers", *found)

    return jax.tree_util.tree_map_with_path(axes, stock)


def stock_pages(stock: Stock) -> int:
    """P, the pages of a stock on all devices."""
    return jax.tree.leaves(stock)[0].shape[-4]


def take_pages(stock: Stock, pages: jax.Array) -> Stock:
    """The chosen pages, in the order of `pages`; repeats are allowed."""
    return jax.tree.map(lambda array: jnp.take(array, pages, axis=array.ndim - 4, mode="clip"), stock)


def put_pages(stock: Stock, pages: jax.Array, fresh: Stock) -> Stock:
    """The stock with the pages `fresh` written over its pages `pages`; those beyond its end are dropped."""

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        layers = (slice(None),) * (array.ndim - 4)
        return array.at[(*layers, pages)].set(new, mode="drop")

    return jax.tree.map(put, stock, fresh)


def add_pages(stock: Stock, more: int) -> Stock:
    """The stock with so many empty pages behind it."""
    return jax.tree.map(lambda a: jnp.pad(a, [(0, more if axis == a.ndim - 4 else 0) for axis in range(a.ndim)]), stock)


def cut_into_pages(cache: Any, size: int, *, eight_bit: bool = False, by_heads: bool = False) -> Stock:
    """The rows of a cache (see `cache`), whose length `size` divides, as pages: row after row, [..., B·S/size, ...]."""

    def rows(array: jax.Array) -> jax.Array:  # [..., B, K, S, H]
        *lead, K, S, H = array.shape
        pages = jnp.moveaxis(array.reshape(*lead, K, S // size, size, H), -3, -4)
        return pages.reshape(*lead[:-1], -1, *pages.shape[-3:])

    def cut(layers: dict[str, jax.Array]) -> dict[str, jax.Array]:
        both = rows(layers["k"].swapaxes(-1, -2)), rows(layers["v"])
        stock = {name: _turned(x, "KSH", ORDERS[name]) for name, x in zip(_names(by_heads), both, strict=True)}
        return quantised(stock) if eight_bit else stock

    return jax.tree.map(cut, cache, is_leaf=lambda node: isinstance(node, dict))


def quantised(pages: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """One layer's keys and values in 8 bits: whole numbers from -127 to 127 and a scale for each position and head."""
    found = {}
    for name, array in pages.items():
        array = array.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(array).max(axis=ORDERS[name].index("H") - 3, keepdims=True), 1e-20) / 127
        found |= {name: jnp.round(array / scale).astype(jnp.int8), f"{name}_scale": scale}
    return found


def meet_pages(
    paged: Paged,
    own: Stock,
    layer: Any,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    positions_BT: jax.Array,
    scale: float,
    window: int | None = None,
    local: bool | jax.Array = True,
    cap: float | None = None,
) -> tuple[jax.Array, Stock]:
    """Write one new token a row into a layer of `own`, the last level's stock, and attend: [B, 1, N, H] and the stock.

    A query at position p sees what its row reads at positions up to p, within the window in a local layer.
    """
    own = _write(own, layer, paged.page, paged.slot, k_BTKH[:, 0], v_BTKH[:, 0])
    B, _, N, H = q_BTNH.shape
    q_BKGH = q_BTNH[:, 0].reshape(B, k_BTKH.shape[2], -1, H)
    stocks = [*(level.stock for level in paged.levels[:-1]), own]
    window = None if local is False else window
    parts = []
    for level, stock in zip(paged.levels, stocks, strict=True):
        seen_PRS = _seen(level, stock, positions_BT[:, 0], window, local)
        parts.append(_partial(q_BKGH, _of_layer(stock, layer), level.readers, seen_PRS, scale=scale, cap=cap))
    mixed_BKGH = _merge(parts, [level.readers for level in paged.levels], B)
    return mixed_BKGH.reshape(B, 1, N, H).astype(q_BTNH.dtype), own


def _of_layer(stock: Stock, layer: Any) -> dict[str, jax.Array]:
    if isinstance(stock, dict):
        return {name: array[layer] for name, array in stock.items()}
    return stock[layer]


def _write(stock: Stock, layer: Any, page_B: jax.Array, slot_B: jax.Array, k_BKH: jax.Array, v_BKH: jax.Array) -> Stock:
    """In place when donated. Slices between the index arrays: the shape of the updates is [B, ...]."""
    kinds = stock if isinstance(stock, dict) else stock[layer]
    fresh = dict(zip(_names("v_heads" in kinds), (k_BKH, v_BKH), strict=True))
    if len(kinds) > len(fresh):  # in 8 bits, as pages of one position
        fresh = quantised({name: jnp.expand_dims(new, 1 + ORDERS[name].index("S")) for name, new in fresh.items()})
        fresh = {name: jnp.squeeze(new, 1 + _order(name).index("S")) for name, new in fresh.items()}

    def place(name: str) -> tuple[Any, ...]:
        found = (page_B, *(slice(None),) * _order(name).index("S"), slot_B)
        return (layer, *found) if isinstance(stock, dict) else found

    written = {
        name: array.at[place(name)].set(fresh[name].astype(array.dtype), mode="drop") for name, array in kinds.items()
    }
    if isinstance(stock, dict):
        return written
    return tuple(written if number == layer else one for number, one in enumerate(stock))


def _seen(level: Level, stock: Stock, positions_B: jax.Array, window: int | None, local: bool | jax.Array) -> jax.Array:
    """bool [P, R, S]: which slots of a page its readers see."""
    name, array = next(iter((stock if isinstance(stock, dict) else stock[0]).items()))
    size = array.shape[_order(name).index("S") - 3]
    at_PS = level.first[:, None] + jnp.arange(size)
    back_PRS = positions_B.at[level.readers].get(mode="clip")[:, :, None] - at_PS[:, None]
    seen_PRS = (back_PRS >= 0) & (at_PS < level.stop[:, None])[:, None]
    if window is not None:
        seen_PRS &= (back_PRS < window) | jnp.logical_not(local)
    return seen_PRS


class Part(NamedTuple):
    """What each reader has of each page, float32: the greatest score, and sums of the shares and of what they mix."""

    most: jax.Array  # [P, R, K, G]
    whole: jax.Array  # [P, R, K, G]
    mixed: jax.Array  # [P, R, K, G, H]


def _partial(
    q_BKGH: jax.Array,
    pages: dict[str, jax.Array],
    readers_PR: jax.Array,
    seen_PRS: jax.Array,
    *,
    scale: float,
    cap: float | None,
) -> Part:
    P, R = readers_PR.shape
    _, K, G, H = q_BKGH.shape
    S = seen_PRS.shape[-1]
    q_PRKGH = (q_BKGH * scale).at[readers_PR].get(mode="clip")
    q_PKQH = q_PRKGH.swapaxes(1, 2).reshape(P, K, R * G, H)
    score, mix = partial(_score, few=R * G <= FEW_QUERIES), partial(_mix, few=R * G <= FEW_QUERIES)
    # By kind, whatever the order: k and its scale as [P, K, H, S], v and its own as [P, K, S, H].
    kinds = {name.replace("_heads", ""): _turned(pages[name], _order(name), WANTED[name[0]]) for name in pages}
    scores_PKQS = score(q_PKQH, kinds["k"])
    if "k_scale" in kinds:
        scores_PKQS = scores_PKQS * kinds["k_scale"]
    if cap is not None:
        scores_PKQS = cap * jnp.tanh(scores_PKQS / cap)
    scores_PKRGS = jnp.where(seen_PRS[:, None, :, None], scores_PKQS.reshape(P, K, R, G, S), LEAST)
    most_PKRG = scores_PKRGS.max(axis=-1)
    shares_PKQS = jnp.exp(scores_PKRGS - most_PKRG[..., None]).reshape(P, K, R * G, S)
    whole_PKRG = shares_PKQS.sum(axis=-1).reshape(P, K, R, G)
    if "v_scale" in kinds:
        shares_PKQS = shares_PKQS * kinds["v_scale"].swapaxes(-1, -2)
    mixed_PKRGH = mix(shares_PKQS, kinds["v"], q_BKGH.dtype).reshape(P, K, R, G, H)
    return Part(*(array.swapaxes(1, 2) for array in (most_PKRG, whole_PKRG, mixed_PKRGH)))


def _score(q_PKQH: jax.Array, k_PKHS: jax.Array, *, few: bool) -> jax.Array:
    def product(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.matmul(q, k.astype(q.dtype), preferred_element_type=jnp.float32)

    def loops(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.sum(q.astype(jnp.float32)[..., None] * k[:, :, None].astype(jnp.float32), axis=-2)

    return jax.lax.platform_dependent(q_PKQH, k_PKHS, cpu=loops if few else product, default=product)


def _mix(shares_PKQS: jax.Array, v_PKSH: jax.Array, dtype: Any, *, few: bool) -> jax.Array:
    def product(shares: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.matmul(shares.astype(dtype), v.astype(dtype), preferred_element_type=jnp.float32)

    def loops(shares: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(shares[..., None] * v[:, :, None].astype(jnp.float32), axis=-2)

    return jax.lax.platform_dependent(shares_PKQS, v_PKSH, cpu=loops if few else product, default=product)


def _merge(parts: Sequence[Part], readers: Sequence[jax.Array], rows: int) -> jax.Array:
    """The pages' parts by row: the softmax over all that a row reads, float32 [B, K, G, H]."""
    flat = [jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), part) for part in parts]
    ids = [part.reshape(-1) for part in readers]

    def every(kind: Any, arrays: list[jax.Array]) -> jax.Array:
        found = [kind(array, at, rows) for array, at in zip(arrays, ids, strict=True)]
        return jax.tree.reduce(jnp.maximum if kind is jax.ops.segment_max else jnp.add, found)

    axis = merging_axis()
    most_BKG = jnp.maximum(every(jax.ops.segment_max, [part.most for part in flat]), LEAST)
    if axis is not None:
        most_BKG = jax.lax.pmax(most_BKG, axis)
    weights = [jnp.exp(part.most - most_BKG.at[at].get(mode="clip")) for part, at in zip(flat, ids, strict=True)]
    whole_BKG = every(jax.ops.segment_sum, [part.whole * w for part, w in zip(flat, weights, strict=True)])
    mixed_BKGH = every(jax.ops.segment_sum, [part.mixed * w[..., None] for part, w in zip(flat, weights, strict=True)])
    if axis is not None:
        whole_BKG, mixed_BKGH = jax.lax.psum((whole_BKG, mixed_BKGH), axis)
    return mixed_BKGH / jnp.maximum(whole_BKG, jnp.finfo(jnp.float32).tiny)[..., None]
