"""Many rows decode at once; a finished row is handed out at once and its place goes to the next one waiting.

Each prompt is prefilled once for all of its samples, and what all prompts begin with once for all. Decoding runs for
many steps on the device between two visits of the host. Keys and values lie in pages, so that memory and attention
follow what has been said. What a row says depends on its own key and the weights only.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pkv.config import SamplingConfig
from pkv.mesh import on_own_part, own_part
from pkv.model import Arch, Cache, Level, Params, Stock
from pkv.sampling.arena import Arena
from pkv.sampling.pool import NOWHERE, Held, Pool, round_up
from pkv.sampling.programs import PAGES, PREFILL_CHUNK, ROWS, WHOLE, Programs, Table
from pkv.sampling.schedule import Completion, Fresh, Request, Rows, Schedule, Segment, check, pages_alone

LEAST_ROWS = 4  # the batch does not shrink below this
PROMPT_MULTIPLE = 64  # prompts are padded to a multiple of this, so that few shapes are compiled
PREFILL_TOKENS = 16_384  # of a shard in one program, what all prompts begin with in every row, at most
PREFILL_SHARE = 1 / 8  # of the pages' memory: no more tokens than fit into that, for its own cache stands beside it
MEMINFO = Path("/proc/meminfo")
SHARE_OF_FREE = 0.8  # of a device's free memory for keys and values, when no limit is set


@dataclass
class Usage:
    """Keys and values over the visits of one `sample`: positions that there was memory for, and live ones.

    steps: that decoded. read_bytes: what these must read of a device's keys and values, each prompt once for all that
    share it.
    """

    allocated: int = 0
    live: int = 0
    steps: int = 0
    read_bytes: float = 0.0
    peak_bytes: int = 0  # of a device
    evicted: int = 0

    @property
    def ratio(self) -> float:
        """Memory held over the sum of the live rows' lengths, prompts counted for every row."""
        return self.allocated / max(self.live, 1)


class Prefix(NamedTuple):
    """What all prompts begin with: how many positions, what they take of a device, their cache of one row, and the same
    as a level's stock."""

    length: int
    bytes: int
    cache: Cache
    stock: Stock


class Engine:
    """Sampling for one architecture on one mesh; of several hosts each samples its own requests on its part of it.

    beginning: token ids with which the prompts of all calls begin, if that is known: calls of few prompts, or of one,
    then read the same pages as large ones and need no programs of their own.
    """

    def __init__(
        self,
        arch: Arch,
        config: SamplingConfig,
        stop_ids: Sequence[int],
        mesh: Mesh,
        dtype: str = "float32",
        beginning: np.ndarray | None = None,
    ) -> None:
        whole, mesh = mesh, own_part(mesh)
        config = dataclasses.replace(config, slots=max(1, config.slots * mesh.size // whole.size))
        self._config, self._mesh, self._dtype = config, mesh, jnp.dtype(dtype)
        self.programs = Programs(arch, config, stop_ids, mesh, dtype, whole)
        self._stops = np.asarray(list(stop_ids), np.int32)
        self._beginning = [] if beginning is None else [beginning]
        self._shards, self._places = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["sequence"]
        self._least, self._page_bytes = min(LEAST_ROWS, config.slots), self.programs.page_bytes()
        self._found: list[float] = []  # shares of the free memory, also by rehearsals
        self.usage = Usage()  # of the `sample` that began last

    @property
    def compilations(self) -> int:
        """How many programs have been compiled."""
        return self.programs.compilations

    def load(self, params: Params) -> Params:
        """Weights, or a part of them from `split`, in the layout and dtype of sampling; what `sample` takes.

        Adapters are not merged and quantised weights stay so: merged in 16 bits, an adapter's small changes would be
        rounded away, and sampler and trainer would differ. What lies right already is not copied.
        """
        placed = params if self.lies_right(params) else self.programs.lay.place(params)
        if jax.process_count() == 1:
            return placed
        return jax.tree.map(partial(on_own_part, own=self._mesh), placed)

    def lies_right(self, params: Params) -> bool:
        """Whether weights, of which shapes, dtypes and places suffice, have the layout and dtype of sampling."""
        return self.programs.lay.lies_right(params)

    def sample(
        self,
        weights: Params,
        requests: Sequence[Request],
        on_tokens: Callable[[int, int, np.ndarray], None] | None = None,
    ) -> Iterator[Completion]:
        """All samples of all requests, each handed out when it ends. weights: from `load`.

        on_tokens(request, sample, tokens) is called with the new tokens of every row at each visit of the host.
        Each open call has keys and values of its own, and `usage` is the last one's. Raises UserError for an empty
        request, and for one that the memory can't hold.
        """
        check(requests)
        usage = self.usage = Usage()
        page, most = self.programs.page, self._most_pages()
        prefix, prefix_bytes = self._shared(requests, most)
        own, prompts = (
            Pool(self._shards, self._places, page, from_end=at_end and self.programs.fixed) for at_end in (False, True)
        )
        slots, segment, taken = self._config.slots, self._config.segment, self._in_pages(prefix_bytes)
        schedule = Schedule(requests, slots, segment, len(prefix), own, prompts, most, taken)
        arena = Arena(self.programs, schedule, self._put)
        start = None
        if len(prefix):
            start = Prefix(len(prefix), prefix_bytes, *self.programs.prefix(weights, self._put(prefix, WHOLE)))
        while schedule.unfinished:
            for row in schedule.evict():
                arena.put_aside(row)
                usage.evicted += 1
            fresh = schedule.admit()
            schedule.drop_prompts()
            arena.fit()
            schedule.extend(fresh)
            self._prefill(weights, start, arena, requests, fresh, schedule.most)
            for row in fresh.returned:
                arena.bring_back(row)
            rows, segment = self._visit(weights, schedule, start, arena, usage)
            yield from schedule.harvest(rows, segment, self._stops, on_tokens)

    def _shared(self, requests: Sequence[Request], most: int) -> tuple[np.ndarray, int]:
        """What all prompts begin with, in whole pages, and its bytes on a device. most: pages that fit.

        None of one prompt by itself, whose rows share its pages anyway; and none where a sample would fit without it
        only: it takes more than such pages, since its cache stands beside it.
        """
        page = self.programs.page
        found = common_beginning([*(request.prompt[:-1] for request in requests), *self._beginning])
        prefix = found[: len(found) // page * page]
        if not len(prefix):
            return prefix, 0
        taken = self.programs.prefix_bytes(len(prefix))
        with_it, without = (
            max(pages_alone(request, before, page, self._places) for request in requests) for before in (len(prefix), 0)
        )
        return (prefix[:0], 0) if with_it + self._in_pages(taken) > most >= without else (prefix, taken)

    def _in_pages(self, taken: int) -> int:
        """How many more pages would fit without so many bytes."""
        return -(-taken // self._page_bytes)

    def _visit(
        self, weights: Params, schedule: Schedule, start: Prefix | None, arena: Arena, usage: Usage
    ) -> tuple[Rows, Segment]:
        rows = schedule.arrays(self._least)
        of_prompts, of_rows = schedule.tables()
        shared = [Level(arena.prompt_stock, *self._by_shelf(of_prompts))] if schedule.prompts.size else []
        if start is not None:
            shared.insert(0, self._prefix_level(start, len(rows.token) // self._shards))
        table = Table(*self._by_shelf(of_rows))
        arena.own.stock, segment = self._segment(weights, tuple(shared), arena.own.stock, table, rows)
        held = arena.size * self._page_bytes + (0 if start is None else start.bytes)
        usage.allocated += held * self._shards * self._places * self.programs.page // self._page_bytes
        usage.live += sum(row.position + 1 for row in schedule.rows())
        usage.peak_bytes = max(usage.peak_bytes, held)
        own, prompts, steps = schedule.read_in(segment.counted)
        usage.steps += steps
        shelves = self._shards * self._places
        usage.read_bytes += (own + steps * prompts) * self._page_bytes / (self.programs.page * shelves)
        return rows, segment

    def _segment(
        self, weights: Params, shared: tuple[Level, ...], own: Stock | None, table: Table, rows: Rows
    ) -> tuple[Stock, Segment]:
        stock, segment = self.programs.decode(weights, shared, own, table, self._placed(rows))
        return stock, Segment(*(np.asarray(array) for array in jax.device_get(segment)))

    def _placed(self, rows: Rows) -> Rows:
        return Rows(*(self._put(array, ROWS) for array in rows))

    def _put(self, array: np.ndarray, spec: PartitionSpec) -> Any:
        return jax.device_put(array, NamedSharding(self._mesh, spec))

    def _prefill(
        self, weights: Params, start: Prefix | None, arena: Arena, requests: Sequence[Request], fresh: Fresh, most: int
    ) -> None:
        """The keys and values of prompts that come for the first time, or again, into their pages; most: that fit."""
        before = 0 if start is None else start.length
        by_shard: list[list[tuple[int, Held]]] = [[] for _ in range(self._shards)]
        for request, held in fresh.prompts:
            if held.pages:
                by_shard[held.shard].append((request, held))
        lengths = [len(requests[request].prompt) - 1 - before for request, held in fresh.prompts if held.pages]
        if not lengths:
            return
        multiple = -(-PROMPT_MULTIPLE // self.programs.page) * self.programs.page
        width = round_up(max(lengths), multiple)
        width = width if width <= PREFILL_CHUNK else -(-width // PREFILL_CHUNK) * PREFILL_CHUNK
        width = -(-width // self.programs.page) * self.programs.page
        tokens = min(PREFILL_TOKENS, int(PREFILL_SHARE * most * self.programs.page))
        at_once = 1 << (max(1, tokens // (before + width)).bit_length() - 1)  # as `count`, a power of two
        for first in range(0, max(map(len, by_shard)), at_once):
            parts = [part[first : first + at_once] for part in by_shard]
            count = 1 << (max(map(len, parts)) - 1).bit_length()
            tokens = np.zeros((self._shards * count, width), np.int32)
            places = np.full((self._shards * self._places, count, width // self.programs.page), NOWHERE, np.int32)
            for shard, part in enumerate(parts):
                for number, (request, held) in enumerate(part):
                    prompt = requests[request].prompt[before:-1]
                    tokens[shard * count + number, : len(prompt)] = prompt
                    for at, place in enumerate(arena.prompt_places(held)):
                        places[shard * self._places + at % self._places, number, at] = place
            arena.prompts.stock = self.programs.prefill(
                weights,
                None if start is None else start.cache,
                arena.prompts.stock,
                self._put(tokens, ROWS),
                self._put(places.reshape(len(places), -1), PAGES),
            )

    def _prefix_level(self, start: Prefix, rows: int) -> Level:
        """What all prompts begin with, read by all rows of a shard."""
        shelves, page = self._shards * self._places, self.programs.page
        mine = -(-start.length // (page * self._places))  # pages of a shelf
        numbers = np.tile(np.arange(mine), shelves) * self._places + np.repeat(np.arange(shelves) % self._places, mine)
        readers = np.broadcast_to(np.arange(rows, dtype=np.int32), (len(numbers), rows))
        stop = np.full(len(numbers), start.length, np.int32)
        return Level(start.stock, *self._by_shelf((readers, (numbers * page).astype(np.int32), stop)))

    def _by_shelf(self, arrays: Sequence[np.ndarray]) -> list[jax.Array]:
        return [self._put(array, PAGES) for array in arrays]

    def _most_pages(self) -> int:
        """Pages that fit into the memory of each device."""
        limit = self._config.kv_memory_gb * 1e9 or self._share_of_free()
        return int(limit // (self._page_bytes * (1 + self.programs.largest_share())))

    def _share_of_free(self) -> float:
        """The most that was found before and is there now: of few sizes of stock few shapes are compiled."""
        share = SHARE_OF_FREE * _free_bytes(self._mesh)
        if not self.programs.fixed:
            return share
        found = next((found for found in sorted(self._found, reverse=True) if found <= 1.1 * share), None)
        if found is None:
            self._found.append(found := share)
        return found


def common_beginning(texts: Sequence[np.ndarray]) -> np.ndarray:
    """What all token ids begin with, int32 [T]; nothing when there is but one."""
    shortest = min(map(len, texts), default=0) if len(texts) > 1 else 0
    heads = np.stack([text[:shortest] for text in texts]) if shortest else np.zeros((1, 0), np.int32)
    differs = (heads != heads[0]).any(axis=0)
    return heads[0][: int(differs.argmax()) if differs.any() else shortest].astype(np.int32)


def _free_bytes(mesh: Mesh) -> float:
    """Memory that is free on the fullest device; without such a figure, the host's, shared by its devices."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    if all(one and "bytes_limit" in one for one in stats):
        return min(one["bytes_limit"] - one["bytes_in_use"] for one in stats if one)
    return _host_bytes() / len(mesh.local_devices)


def _host_bytes() -> float:
    """The host's memory that is there for the asking: what Linux calls available, elsewhere half of all."""
    if MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
