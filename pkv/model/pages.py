"""Keys and values in pages: memory follows the sum of the lengths, and every page is read where it lies.

A page holds the same few positions of every layer, for one row, or for several rows that share what it says (a prompt's
samples, a common prefix). A token's attention is a flash-decoding merge (arXiv 2205.14135, section 3.1) of the pages
that its row reads: nothing is gathered, and a page that many rows read is read once for all of them. Everything here
sees one device's pages and rows; over the mesh axis "sequence" the pages of a row lie on several devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pkv.mesh import merging_axis
from pkv.model.arch import Arch
from pkv.model.cache import LEAST, Heads, Met
from pkv.model.kernels import PageKernel

# {"k": [L, P, K, H, S], "v": [L, P, K, S, H]}, in 8 bits with "k_scale" and "v_scale", where H is 1; or L times a tuple
# of banks, such dicts without the axis L that share the heads K. S: positions a page. In these orders neither product
# of attention sums over the last axis; else XLA's compiler for TPU copies a layer's pages out of the stack before it
# reads them. On a CPU one thread computes a product of many small ones: two banks are read by two.
Stock = Any
ORDERS = {"k": "KHS", "v": "KSH"}  # of the last three axes
FEW_QUERIES = 16  # so many queries a page at most meet it on a CPU as broadcast products (see `attention`)


class Level(NamedTuple):
    """Pages and who reads them. A reader that is no row (B or above) reads nothing.

    Of the stock that is written, the last level's, that level has the first P pages; a level whose stock is None has
    the last P of it.
    """

    stock: Stock | None
    readers: jax.Array  # int32 [P, R], rows
    first: jax.Array  # int32 [P], the position in a page's first slot
    stop: jax.Array  # int32 [P], slots that stand for positions from here on hold nothing
    order: jax.Array | None = None  # int32 [P · R], the places in `readers` by the row that stands there,
    starts: jax.Array | None = None  # int32 [B + 1], and where each row's begin: for a kernel, from `in_order`

    def in_order(self, rows: int) -> Level:
        """The same, with its order for `rows` rows."""
        flat = self.readers.reshape(-1)
        starts = (flat < jnp.arange(rows + 1)[:, None]).sum(axis=1, dtype=jnp.int32)
        return self._replace(order=jnp.argsort(flat).astype(jnp.int32), starts=starts)


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
    banks: int = 1,
    eight_bit: bool = False,
) -> Stock:
    """Empty pages of `size` positions; `stacked` must match the layers of the weights, and `banks` divide the heads."""
    sizes = {"S": size, "K": arch.kv_heads // (1 if stacked else banks), "H": arch.head_size}
    kinds = dict.fromkeys(ORDERS, (sizes, jnp.int8 if eight_bit else dtype))
    if eight_bit:
        kinds |= {f"{name}_scale": (sizes | {"H": 1}, jnp.float32) for name in kinds}
    lead = (arch.layers, pages) if stacked else (pages,)

    def empty() -> dict[str, jax.Array]:
        return {n: jnp.zeros((*lead, *(each[axis] for axis in _order(n))), kind) for n, (each, kind) in kinds.items()}

    return empty() if stacked else tuple(tuple(empty() for _ in range(banks)) for _ in range(arch.layers))


def _order(name: str) -> str:
    return ORDERS[name.removesuffix("_scale")]


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


def resize_pages(stock: Stock, pages: int) -> Stock:
    """The first `pages` pages of the stock, empty ones behind them where it has fewer."""

    def resize(array: jax.Array) -> jax.Array:
        axis = array.ndim - 4
        kept = jax.lax.slice_in_dim(array, 0, min(pages, array.shape[axis]), axis=axis)
        return jnp.pad(kept, [(0, pages - kept.shape[axis] if at == axis else 0) for at in range(array.ndim)])

    return jax.tree.map(resize, stock)


def cut_into_pages(cache: Any, size: int, *, banks: int = 1, eight_bit: bool = False) -> Stock:
    """The rows of a cache (see `cache`), whose length `size` divides, as pages: row after row, [..., B·S/size, ...].

    banks: in which each layer's heads lie, where layers are not stacked.
    """

    def cut(name: str, array: jax.Array) -> jax.Array:  # [..., B, K, H, S] or [..., B, K, S, H]
        axis = array.ndim - 3 + ORDERS[name].index("S")
        before, length, after = array.shape[:axis], array.shape[axis], array.shape[axis + 1 :]
        pages = jnp.moveaxis(array.reshape(*before, length // size, size, *after), axis, -4)  # behind the rows
        return pages.reshape(*pages.shape[:-5], -1, *pages.shape[-3:])

    def pages(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found = {name: cut(name, array) for name, array in arrays.items()}
        return quantised(found) if eight_bit else found

    return pages(cache) if isinstance(cache, dict) else tuple(_in_banks(pages(layer), banks) for layer in cache)


def _in_banks(pages: dict[str, jax.Array], banks: int) -> tuple[dict[str, jax.Array], ...]:
    """A layer's pages with each bank's heads by themselves."""
    parts = {name: jnp.split(array, banks, axis=1) for name, array in pages.items()}
    return tuple({name: part[number] for name, part in parts.items()} for number in range(banks))


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
    heads: Sequence[Heads],
    *,
    positions_BT: jax.Array,
    scale: float,
    window: int | None = None,
    local: bool | jax.Array = True,
    cap: float | None = None,
    kernel: PageKernel = "xla",
) -> tuple[jax.Array, Stock]:
    """Write one new token a row into a layer of `own`, the last level's stock, and attend: [B, 1, N, H] and the stock.

    A query at position p sees what its row reads at positions up to p, within the window in a local layer. heads: in as
    many banks as the stocks have. kernel: of attention; triton for levels in order, see `page_kernel`.
    """
    own = _write(own, layer, paged.page, paged.slot, heads)
    B, H = len(positions_BT), heads[0].q.shape[-1]
    asked_BKGH = [(q[:, 0] * scale).reshape(B, k.shape[2], -1, H) for q, k, _ in heads]
    window = None if local is False else window
    met = []  # by level: what each of its banks is to the readers
    for number, level in enumerate(paged.levels, 1):
        stock = own if level.stock is None or number == len(paged.levels) else level.stock
        P = len(level.readers)
        banks = _of_layer(stock, layer, stock_pages(stock) - P if level.stock is None else 0, P)
        seen_PRS = _seen(level, banks[0], positions_BT[:, 0], B, window, local)
        met.append([Met(pages, level.readers, seen_PRS, level.order, level.starts) for pages in banks])
    by_bank = zip(asked_BKGH, zip(*met, strict=True), strict=True)
    attend = _attend
    if kernel == "triton":
        from pkv.model.page_kernel import attend_pages as attend  # where JAX still has it
    mixed = jnp.concatenate([attend(q, levels, cap) for q, levels in by_bank], axis=1)
    return mixed.reshape(B, 1, -1, H).astype(heads[0].q.dtype), own


def _of_layer(stock: Stock, layer: Any, first: int, pages: int) -> tuple[dict[str, jax.Array], ...]:
    """The banks of a layer's pages from `first` on, so many; one slice, which XLA fuses with what reads them."""
    if isinstance(stock, dict):
        place = lambda a: ((layer, first, 0, 0, 0), (1, pages, *a.shape[2:]))  # noqa: E731
        return ({name: jax.lax.dynamic_slice(array, *place(array))[0] for name, array in stock.items()},)
    return jax.tree.map(lambda array: jax.lax.slice_in_dim(array, first, first + pages), stock[layer])


def _write(stock: Stock, layer: Any, page_B: jax.Array, slot_B: jax.Array, heads: Sequence[Heads]) -> Stock:
    """In place when donated; no two rows write into the same page."""
    stacked = isinstance(stock, dict)
    banks = (stock,) if stacked else stock[layer]
    fresh = [{"k": k[:, 0, :, :, None], "v": v[:, 0, :, None]} for _, k, v in heads]  # as pages of one position
    fresh = list(map(quantised, fresh)) if len(banks[0]) > len(fresh[0]) else fresh
    put = partial(_put, lead=(layer,) if stacked else (), page_B=page_B, slot_B=slot_B)
    written = tuple(put(bank, new) for bank, new in zip(banks, fresh, strict=True))
    return written[0] if stacked else tuple(written if number == layer else one for number, one in enumerate(stock))


def _put(
    bank: dict[str, jax.Array], fresh: dict[str, jax.Array], *, lead: tuple[Any, ...], page_B: Any, slot_B: Any
) -> dict[str, jax.Array]:
    written = {}
    for name, array in bank.items():
        ways = {way: partial(how, lead=lead, axis=_order(name).index("S")) for way, how in WRITING.items()}
        written[name] = jax.lax.platform_dependent(array, fresh[name].astype(array.dtype), page_B, slot_B, **ways)
    return written


def _put_positions(
    array: jax.Array, new: jax.Array, page_B: jax.Array, slot_B: jax.Array, *, lead: tuple[Any, ...], axis: int
) -> jax.Array:
    # Slices between the index arrays: the shape of the updates is [B, ...].
    place = (*lead, page_B, *(slice(None),) * axis, slot_B)
    return array.at[place].set(jnp.squeeze(new, 1 + axis), mode="drop")


def _put_whole_pages(
    array: jax.Array, new: jax.Array, page_B: jax.Array, slot_B: jax.Array, *, lead: tuple[Any, ...], axis: int
) -> jax.Array:
    place = (*lead, page_B)
    old = array.at[place].get(mode="clip")
    here = slot_B[:, None, None, None] == jax.lax.broadcasted_iota(slot_B.dtype, old.shape, 1 + axis)
    return array.at[place].set(jnp.where(here, new, old), mode="drop")


# TPU writes what lies in one piece: for single positions XLA would turn all pages round, and back again.
WRITING = {"tpu": _put_whole_pages, "default": _put_positions}


def _seen(
    level: Level,
    pages: dict[str, jax.Array],
    positions_B: jax.Array,
    rows: int,
    window: int | None,
    local: bool | jax.Array,
) -> jax.Array:
    """bool [P, R, S]: which slots of a page its readers see."""
    size = pages["k"].shape[_order("k").index("S") - 3]
    at_PS = level.first[:, None] + jnp.arange(size)
    back_PRS = positions_B.at[level.readers].get(mode="clip")[:, :, None] - at_PS[:, None]
    seen_PRS = (back_PRS >= 0) & (at_PS < level.stop[:, None])[:, None] & (level.readers < rows)[:, :, None]
    if window is not None:
        seen_PRS &= (back_PRS < window) | jnp.logical_not(local)
    return seen_PRS


def _attend(q_BKGH: jax.Array, levels: Sequence[Met], cap: float | None) -> jax.Array:
    """The softmax over all that a row reads, float32 [B, K, G, H].

    Scores are held against the greatest of their row, whichever page has it: what pages mix then only adds up.
    """
    B, axis, dtype = len(q_BKGH), merging_axis(), q_BKGH.dtype
    scores = [_scores(q_BKGH, met, cap) for met in levels]
    most = [_by_row("max", one.max(axis=-1), met.readers, B) for one, met in zip(scores, levels, strict=True)]
    most_BKG = jax.tree.reduce(jnp.maximum, most)
    if axis is not None:
        most_BKG = jax.lax.pmax(most_BKG, axis)
    whole, mixed = [], []
    for scores_PKRGS, met in zip(scores, levels, strict=True):
        most_PKRG = most_BKG.at[met.readers].get(mode="clip").swapaxes(1, 2)
        shares_PKRGS = jnp.exp(scores_PKRGS - most_PKRG[..., None])
        whole.append(_by_row("sum", shares_PKRGS.sum(axis=-1), met.readers, B))
        mixed.append(_by_row("sum", _mix(shares_PKRGS, met.pages, dtype), met.readers, B))
    whole_BKG, mixed_BKGH = jax.tree.reduce(jnp.add, whole), jax.tree.reduce(jnp.add, mixed)
    if axis is not None:
        whole_BKG, mixed_BKGH = jax.lax.psum((whole_BKG, mixed_BKGH), axis)
    return mixed_BKGH / jnp.maximum(whole_BKG, jnp.finfo(jnp.float32).tiny)[..., None]


def _scores(q_BKGH: jax.Array, met: Met, cap: float | None) -> jax.Array:
    """float32 [P, K, R, G, S], LEAST where a reader sees nothing."""
    P, R = met.readers.shape
    _, K, G, H = q_BKGH.shape
    q_PRKGH = q_BKGH.at[met.readers].get(mode="clip")
    q_PKQH = q_PRKGH.swapaxes(1, 2).reshape(P, K, R * G, H)
    scores_PKQS = _score_product(q_PKQH, met.pages["k"], few=R * G <= FEW_QUERIES)
    if "k_scale" in met.pages:
        scores_PKQS = scores_PKQS * met.pages["k_scale"]
    if cap is not None:
        scores_PKQS = cap * jnp.tanh(scores_PKQS / cap)
    return jnp.where(met.seen[:, None, :, None], scores_PKQS.reshape(P, K, R, G, -1), LEAST)


def _mix(shares_PKRGS: jax.Array, pages: dict[str, jax.Array], dtype: Any) -> jax.Array:
    """float32 [P, K, R, G, H]."""
    P, K, R, G, S = shares_PKRGS.shape
    shares_PKQS = shares_PKRGS.reshape(P, K, R * G, S)
    if "v_scale" in pages:
        shares_PKQS = shares_PKQS * pages["v_scale"].swapaxes(-1, -2)
    return _mix_product(shares_PKQS, pages["v"], dtype, few=R * G <= FEW_QUERIES).reshape(P, K, R, G, -1)


def _score_product(q_PKQH: jax.Array, k_PKHS: jax.Array, *, few: bool) -> jax.Array:
    def product(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.matmul(q, k.astype(q.dtype), preferred_element_type=jnp.float32)

    def loops(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.sum(q.astype(jnp.float32)[..., None] * k[:, :, None].astype(jnp.float32), axis=-2)

    return jax.lax.platform_dependent(q_PKQH, k_PKHS, cpu=loops if few else product, default=product)


def _mix_product(shares_PKQS: jax.Array, v_PKSH: jax.Array, dtype: Any, *, few: bool) -> jax.Array:
    def product(shares: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.matmul(shares.astype(dtype), v.astype(dtype), preferred_element_type=jnp.float32)

    def loops(shares: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(shares[..., None] * v[:, :, None].astype(jnp.float32), axis=-2)

    return jax.lax.platform_dependent(shares_PKQS, v_PKSH, cpu=loops if few else product, default=product)


def _by_row(kind: Literal["max", "sum"], parts: jax.Array, readers_PR: jax.Array, rows: int) -> jax.Array:
    """Each row's greatest part, LEAST where it has none, or the sum of its parts. parts: float32 [P, K, R, G, ...].

    On a CPU one part after the other goes where it belongs. Accelerators do that badly, and compare every part's reader
    with every row instead: as a mask, or as a product with ones and zeros.
    """

    def scattered(parts: jax.Array, readers_PR: jax.Array) -> jax.Array:
        flat = parts.swapaxes(1, 2).reshape(-1, parts.shape[1], *parts.shape[3:])
        if kind == "max":
            return jnp.maximum(jax.ops.segment_max(flat, readers_PR.reshape(-1), rows), LEAST)
        return jax.ops.segment_sum(flat, readers_PR.reshape(-1), rows)

    def compared(parts: jax.Array, readers_PR: jax.Array) -> jax.Array:
        reads_BPR = jnp.arange(rows)[:, None, None] == readers_PR
        if parts.ndim > 4:
            return jnp.einsum("bpr,pkrgh->bkgh", reads_BPR.astype(parts.dtype), parts)
        reads_BP1R1 = reads_BPR[:, :, None, :, None]
        if kind == "max":
            return jnp.where(reads_BP1R1, parts, LEAST).max(axis=(1, 3))
        return jnp.where(reads_BP1R1, parts, 0).sum(axis=(1, 3))

    return jax.lax.platform_dependent(parts, readers_PR, cpu=scattered, default=compared)
