"""Which pages are free and who holds the others: the host's side of the KV memory. Numbers only, no device.

Pages are counted on shelves, one for each device that holds pages of its own: shelf d · S + s has the pages of row
shard d at place s of the sequence axis. A row's j-th page lies at place j mod S.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NOWHERE = np.iinfo(np.int32).max  # a page or row beyond every end: what is written there is dropped


def round_up(count: int, least: int = 1, steps: int = 2) -> int:
    """The least size that holds `count`, of `steps` sizes an octave, in multiples of `least`: with two 1, 2, 3, 4, 6,
    8, 12, ... times `least`. So few shapes are compiled, and little lies idle."""
    units = -(-max(count, 1) // least)
    step = max(1, (1 << max(0, (units - 1).bit_length() - 1)) // steps)
    return -(-units // step) * step * least


@dataclass
class Held:
    """Pages of one row, or of one prompt on one row shard: the first position, and the pages in their order."""

    shard: int
    first: int
    pages: list[int] = field(default_factory=list)


class Pool:
    """The free pages of one level. `size`: pages a shelf. from_end: they are counted from the end of where they lie."""

    def __init__(self, shards: int, places: int, page: int, *, from_end: bool = False) -> None:
        self.shards, self.places, self.page, self.from_end, self.size = shards, places, page, from_end, 0
        self._free: list[list[int]] = [[] for _ in range(shards * places)]

    def needed(self, demands: Iterable[tuple[int, int]]) -> int:
        """Pages that the fullest shelf must have for (shard, pages) pairs."""
        counts = np.zeros((self.shards, self.places), np.int64)
        for shard, pages in demands:
            counts[shard] += [-(-(pages - place) // self.places) for place in range(self.places)]
        return int(counts.max(initial=0))

    def resize(self, size: int) -> None:
        """More pages on each shelf."""
        for free in self._free:
            free[:0] = range(size - 1, self.size - 1, -1)  # taken from the end: low numbers first
        self.size = size

    def extend(self, held: Held, pages: int) -> None:
        """Give `held` what it lacks of `pages` pages."""
        for number in range(len(held.pages), pages):
            held.pages.append(self._free[held.shard * self.places + number % self.places].pop())

    def release(self, held: Held) -> None:
        """Take all pages back."""
        for number, page in enumerate(held.pages):
            self._free[held.shard * self.places + number % self.places].append(page)
        held.pages = []

    def shrink(self, holders: Sequence[Held], size: int) -> list[tuple[int, int, int]]:
        """Shrink every shelf to `size` pages: holders' pages beyond it get numbers below it. (shelf, old, new) each."""
        moved = []
        for free in self._free:
            free[:] = [page for page in free if page < size]
        for held in holders:
            for number, page in enumerate(held.pages):
                if page >= size:
                    shelf = held.shard * self.places + number % self.places
                    held.pages[number] = self._free[shelf].pop()
                    moved.append((shelf, page, held.pages[number]))
        self.size = size
        return moved

    def table(
        self, readers: Sequence[tuple[Held, Sequence[int]]], width: int, stop: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Who reads which page: readers int32 [shelves · size, width], first and stop int32 [shelves · size].

        readers: holders, and the rows of their shard that read them. stop: of each, the position that ends it.
        """
        total = self.shards * self.places * self.size
        rows = np.full((total, width), NOWHERE, np.int32)
        first, stops = np.zeros(total, np.int32), np.full(total, NOWHERE, np.int32)
        for number, (held, slots) in enumerate(readers):
            at = self.flat(held)
            rows[at, : len(slots)] = slots
            first[at] = held.first + self.page * np.arange(len(at))
            if stop is not None:
                stops[at] = stop[number]
        return rows, first, stops

    def flat(self, held: Held, size: int | None = None) -> np.ndarray:
        """Where the pages stand in the table of all shelves, or in a stock of `size` pages a shelf."""
        size, numbers = self.size if size is None else size, np.arange(len(held.pages))
        shelves = held.shard * self.places + numbers % self.places
        return shelves * size + self.at(np.asarray(held.pages, np.int64), size)

    def at(self, pages: Any, size: int) -> Any:
        """Where pages stand among the `size` pages of their shelf."""
        return size - 1 - pages if self.from_end else pages
