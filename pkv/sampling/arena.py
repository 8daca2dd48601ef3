"""Where keys and values lie on the devices: the pages of rows, and those of the prompts that they share.

Both parts are as large as the next segment needs, and only they are read. On a TPU they are the beginning and the end
of one stock, which takes what there is memory for once and for all: nothing is ever there twice. On a CPU, whose memory
is the host's, and on a GPU, XLA would copy what is read of a larger stock: there each part is a stock of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from pkv.model import Stock
from pkv.sampling.pool import NOWHERE, Held, round_up
from pkv.sampling.programs import PAGES, WHOLE, Programs
from pkv.sampling.schedule import Row, Schedule

LEAST_PAGES = 32  # sizes of a part are multiples of this, so that few shapes are compiled
GROWING = 36, 12  # the same where a part is as large as its stock, and a size below it for few rows
AT_ONCE = 16  # pages that one program moves


@dataclass
class Store:
    """A stock on the devices, None where it is empty, and its pages a shelf."""

    stock: Stock | None = None
    size: int = 0


class Arena:
    """The pages of one call's rows and prompts. put: places an array on the devices."""

    def __init__(self, programs: Programs, schedule: Schedule, put: Callable[[np.ndarray, PartitionSpec], Any]) -> None:
        self._programs, self._schedule, self._put = programs, schedule, put
        self.own = Store()
        self.prompts = self.own if programs.fixed else Store()

    @property
    def size(self) -> int:
        """Pages of a shelf."""
        return self.own.size if self._programs.fixed else self.own.size + self.prompts.size

    @property
    def prompt_stock(self) -> Stock | None:
        """Prompts' pages as a level's stock: None where they are the end of the rows' one (see `Level`)."""
        return None if self._programs.fixed else self.prompts.stock

    def prompt_places(self, held: Held) -> np.ndarray:
        """Where the pages of a prompt stand in the stock of their shelf."""
        return self._schedule.prompts.at(np.asarray(held.pages, np.int32), self.prompts.size)

    def fit(self) -> None:
        """Parts of the size that the next segment needs."""
        pools, most = (self._schedule.own, self._schedule.prompts), self._schedule.most
        need_own, need_prompts = self._schedule.demands()
        for_prompts = min(self._size(need_prompts, 1), most - need_own) if need_prompts else 0
        wanted = min(self._size(need_own, 2), most - for_prompts), for_prompts
        parts = list(zip((self.own, self.prompts), pools, wanted, self._schedule.holders(), strict=True))
        for store, pool, size, holders in parts:
            if size < pool.size:
                moved = pool.shrink(holders, size)
                self._move(store, [(shelf, *(pool.at(page, store.size) for page in pages)) for shelf, *pages in moved])
                self._resize(store, size)
        for store, pool, size, _ in parts:
            if size > pool.size:
                self._resize(store, size)
                pool.resize(size)

    def _size(self, need: int, steps: int) -> int:
        least, few = (LEAST_PAGES, 0) if self._programs.fixed else GROWING
        return few if need <= few else round_up(need, least, steps)

    def put_aside(self, row: Row) -> None:
        """Keep a row's pages in the host's memory, and free them."""
        row.kept = []
        for part in self._places(row):
            padded = np.zeros(AT_ONCE, np.int32)
            padded[: len(part)] = part
            row.kept.append(jax.device_get(self._programs.fetch(self.own.stock, self._put(padded, WHOLE))))
        self._schedule.own.release(row.own)

    def bring_back(self, row: Row) -> None:
        """Write what `put_aside` kept into the first pages that the row holds now."""
        for part, pages in zip(self._places(row), row.kept or (), strict=False):
            padded = np.full(AT_ONCE, NOWHERE, np.int32)
            padded[: len(part)] = part
            self.own.stock = self._programs.restore(self.own.stock, padded, pages)
        row.kept = None

    def _places(self, row: Row) -> list[np.ndarray]:
        """Where a row's pages stand in the stock of all shelves, in parts: what is copied at once is small."""
        at = self._schedule.own.flat(row.own, self.own.size)
        return [at[first : first + AT_ONCE] for first in range(0, len(at), AT_ONCE)]

    def _resize(self, store: Store, size: int) -> None:
        """A stock as large as a part is to be; if it holds both parts, as large as there is memory for."""
        size = self._schedule.most if self._programs.fixed else size
        if store.stock is None or not size:
            store.stock = self._programs.empty(pages=size) if size else None
        elif size != store.size:
            self._each(store, partial(self._programs.resize, pages=size))
        store.size = size

    def _move(self, store: Store, moves: Sequence[tuple[int, int, int]]) -> None:
        """(shelf, old, new) of every page."""
        shelves = self._schedule.own.shards * self._schedule.own.places
        by_shelf: list[list[tuple[int, int]]] = [[] for _ in range(shelves)]
        for shelf, old, new in moves:
            by_shelf[shelf].append((old, new))
        for first in range(0, max(map(len, by_shelf)), AT_ONCE):
            pages = np.full((2, shelves, AT_ONCE), NOWHERE, np.int32)
            for shelf, both in enumerate(by_shelf):
                if part := both[first : first + AT_ONCE]:
                    pages[:, shelf, : len(part)] = np.transpose(part)
            store.stock = self._programs.relocate(store.stock, *(self._put(array, PAGES) for array in pages))

    def _each(self, store: Store, change: Callable[[Stock], Stock]) -> None:
        """Change a stock layer by layer, a stacked one array by array: only one of them exists twice at a time."""
        stock: Any = store.stock
        store.stock = None
        if isinstance(stock, dict):
            for name in list(stock):
                stock.update(change({name: stock.pop(name)}))
            store.stock = stock
            return
        layers, stock = list(stock), None
        for number in range(len(layers)):
            layers[number] = change(layers[number])
        store.stock = tuple(layers)
