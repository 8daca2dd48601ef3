"""Which sample decodes where, and on which pages: the host's side of the engine. Numbers only, no device.

Waiting samples come in while there are slots and pages for them; when the pages run out, the youngest rows go out and
wait for their turn with what they have said. Rows have no place of their own on the device: every segment is told anew
which pages each row reads and writes, so that the batch may have any size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pkv.config import UserError
from pkv.records import Finish, Watch
from pkv.sampling.pool import NOWHERE, Held, Pool, round_up
from pkv.sampling.programs import Rows, Segment, Table

NO_TOKENS = np.zeros(0, np.int32)
READERS = 2  # places for the readers of a prompt: so many, or twice as many, and so on


@dataclass(frozen=True)
class Request:
    """One prompt, int32 [T], and the keys of its samples, uint32 [G, 2].

    watch: makes what watches one sample's tokens and may end it or force tokens on it; None: nothing does.
    """

    prompt: np.ndarray
    keys: np.ndarray
    max_new_tokens: int
    watch: Callable[[], Watch] | None = None


class Completion(NamedTuple):
    """One finished sample: which request and sample, generated tokens int32 [T], log-probabilities float32 [T], and
    bool [T] which tokens were forced on the policy."""

    request: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    policy_logprobs: np.ndarray
    finish: Finish
    forced: np.ndarray


class Piece(NamedTuple):
    """What a row said in a segment."""

    tokens: np.ndarray
    logprobs: np.ndarray
    policy_logprobs: np.ndarray
    forced: np.ndarray


@dataclass
class Row:
    """One sample. `position` is that of `token`, whose key and value are not written yet; `last` may be generated."""

    request: int
    sample: int
    key: np.ndarray
    position: int
    token: int
    last: int
    own: Held
    watch: Watch | None
    pieces: list[Piece] = field(default_factory=list)
    to_force: np.ndarray = field(default_factory=lambda: NO_TOKENS)
    kept: list[Any] | None = None  # its pages, while it waits after it has begun


class Fresh(NamedTuple):
    """What a segment needs first: prompts to prefill, by request, and rows that come back with their pages."""

    prompts: list[tuple[int, Held]]
    returned: list[Row]


def check(requests: Sequence[Request]) -> None:
    """Raises UserError for a request that no memory would help."""
    for number, request in enumerate(requests):
        if len(request.prompt) < 1 or request.max_new_tokens < 1:
            raise UserError(f"request {number}: expected a prompt of at least one token, and room for one more")


def pages_alone(request: Request, prefix: int, page: int, places: int) -> int:
    """Pages of a device that a sample has at the end of its budget, beside `prefix` positions that all prompts share;
    places: devices that its pages lie on."""
    return sum(-(-tokens // (page * places)) for tokens in (request.max_new_tokens, len(request.prompt) - 1 - prefix))


class Schedule:
    """All samples of one call: waiting, live, or handed out.

    prefix: positions that all prompts share. memory: pages that a device may hold, taken: so many of them by these
    positions; `most` are left for prompts and rows.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        slots: int,
        segment: int,
        prefix: int,
        own: Pool,
        prompts: Pool,
        memory: int,
        taken: int,
    ) -> None:
        self.own, self.prompts, self.most = own, prompts, max(0, memory - taken)
        self.live: list[list[Row]] = [[] for _ in range(own.shards)]
        self.waiting = deque(self._row(requests, r, s) for r, one in enumerate(requests) for s in range(len(one.keys)))
        self._requests, self._segment, self._prefix, self._page = requests, segment, prefix, own.page
        self._slots = -(-slots // own.shards)  # of a shard
        self._held: dict[tuple[int, int], Held] = {}  # the prompts that are there, by request and shard
        for number, request in enumerate(requests):
            self._check(number, request, taken)

    @property
    def unfinished(self) -> bool:
        """Whether samples wait or decode."""
        return bool(self.waiting) or any(self.live)

    def rows(self) -> Iterator[Row]:
        """All live rows, shard by shard."""
        return (row for rows in self.live for row in rows)

    def demands(self) -> tuple[int, int]:
        """Pages that the fullest device needs for the next segment: of rows, and of prompts."""
        own = self.own.needed((row.own.shard, self._pages(row)) for row in self.rows())
        prompts = self.prompts.needed((held.shard, self._prompt_pages(r)) for (r, _), held in self._held.items())
        return own, prompts

    def evict(self) -> list[Row]:
        """Take live rows out, the youngest first, until the pages suffice for all others; the caller keeps theirs."""
        gone: list[Row] = []
        while sum(self.demands()) > self.most:
            shard = max(range(len(self.live)), key=lambda d: sum(self._pages(row) for row in self.live[d]))
            row = min(self.live[shard], key=lambda row: row.position - row.own.first)
            self.live[shard].remove(row)
            self.waiting.appendleft(row)
            self.drop_prompts()
            gone.append(row)
        return gone

    def admit(self) -> Fresh:
        """Give free slots to waiting samples, as far as the pages suffice."""
        fresh = Fresh([], [])
        while self.waiting:
            row = self.waiting[0]
            shard = self._best_shard(row.request)
            if shard is None:
                break
            here = row.request, shard
            known = here in self._held
            row.own.shard = shard
            self.live[shard].append(row)
            self._held.setdefault(here, Held(shard, self._prefix))
            alone = sum(map(len, self.live)) == 1
            spare = 0 if alone else max(map(len, self.live))  # a page a row, lest the newest go out again at once
            if sum(self.demands()) + spare > self.most:
                self.live[shard].pop()
                if not known:
                    del self._held[here]
                if self.drop_prompts():
                    continue
                break
            self.waiting.popleft()
            if not known:
                fresh.prompts.append((row.request, self._held[here]))
            if row.kept is not None:
                fresh.returned.append(row)
        return fresh

    def drop_prompts(self) -> bool:
        """Free the pages of prompts that no row reads; returns whether there were any."""
        read = {(row.request, row.own.shard) for row in self.rows()}
        unread = [self._held.pop(here) for here in list(self._held) if here not in read]
        for held in unread:
            self.prompts.release(held)
        return bool(unread)

    def extend(self, fresh: Fresh) -> None:
        """Give every row the pages of the next segment, and new prompts theirs."""
        for request, held in fresh.prompts:
            self.prompts.extend(held, self._prompt_pages(request))
        for row in self.rows():
            self.own.extend(row.own, self._pages(row))

    def holders(self) -> tuple[list[Held], list[Held]]:
        """Who holds pages: rows, and prompts."""
        return [row.own for row in self.rows()], list(self._held.values())

    def read_in(self, counted: np.ndarray) -> tuple[int, int, int]:
        """Positions that a segment's steps read of rows' own, in all; of prompts, in each; and how many steps it had.

        counted: bool [steps, B], before `harvest`.
        """
        steps_B = counted.sum(axis=0)
        own, B = 0, counted.shape[1] // self.own.shards
        for shard, rows in enumerate(self.live):
            for row, steps in zip(rows, steps_B[shard * B :], strict=False):
                own += int(steps) * (row.position - row.own.first) + int(steps) * (int(steps) + 1) // 2
        prompts = sum(len(self._requests[request].prompt) - 1 - self._prefix for request, _ in self._held)
        return own, prompts + self._prefix * self.own.shards, int(counted.any(axis=1).sum())

    def tables(self) -> tuple[Table, Table]:
        """Who reads what: of prompts, and of rows."""
        readers: dict[tuple[int, int], list[int]] = {here: [] for here in self._held}
        own = []
        for shard, rows in enumerate(self.live):
            for slot, row in enumerate(rows):
                readers[row.request, shard].append(slot)
                own.append((row.own, (slot,)))
        width = READERS
        while width < max(map(len, readers.values()), default=1):
            width *= 2
        prompts = [(held, readers[here]) for here, held in self._held.items()]
        stops = [len(self._requests[request].prompt) - 1 for request, _ in self._held]
        return Table(*self.prompts.table(prompts, width, stops)), Table(*self.own.table(own, 1))

    def arrays(self, least: int) -> Rows:
        """The rows as a segment takes them: so many a shard as `round_up` says, `least` in all at least."""
        D, S, steps = self.own.shards, self.own.places, self._segment
        count = self._batch_rows(least)
        B = D * count
        token, position, last, origin = (np.zeros(B, np.int32) for _ in range(4))
        active, keys = np.zeros(B, bool), np.zeros((B, 2), np.uint32)
        forced, ahead = np.full((B, steps), -1, np.int32), np.full((B, S, (steps - 1) // self._page + 2), NOWHERE)
        for shard, rows in enumerate(self.live):
            for b, row in enumerate(rows, shard * count):
                token[b], position[b], last[b], active[b], keys[b] = row.token, row.position, row.last, True, row.key
                number = (row.position - row.own.first) // self._page
                origin[b] = row.own.first + number * self._page
                for at, page in enumerate(row.own.pages[number:]):
                    ahead[b, (number + at) % S, at] = page
                coming = row.to_force[:steps]
                forced[b, : len(coming)] = coming
        return Rows(token, position, last, origin, active, keys, forced, ahead.astype(np.int32))

    def harvest(
        self,
        rows: Rows,
        segment: Segment,
        stops: np.ndarray,
        on_tokens: Callable[[int, int, np.ndarray], None] | None,
    ) -> Iterator[Completion]:
        """Take what a segment brought; finished samples are handed out and their pages freed."""
        count = len(rows.token) // self.own.shards
        for shard in range(self.own.shards):
            places = list(enumerate(self.live[shard], shard * count))
            for b, row in places:
                counted = segment.counted[:, b]
                forced = rows.forced[b][: len(counted)][counted] >= 0
                said, logprobs, policy = (
                    array[counted, b] for array in (segment.tokens, segment.logprobs, segment.policy_logprobs)
                )
                piece = Piece(said, logprobs, policy, forced)
                row.to_force = row.to_force[int(forced.sum()) :]
                finish = self._take(row, piece, bool(segment.active[b]), stops)
                said = row.pieces[-1].tokens
                if on_tokens is not None and len(said):
                    on_tokens(row.request, row.sample, said)
                if finish is not None:
                    self.live[shard].remove(row)
                    self.own.release(row.own)
                    whole = (np.concatenate(parts) for parts in zip(*row.pieces, strict=True))
                    tokens, logprobs, policy, forced = whole
                    yield Completion(row.request, row.sample, tokens.astype(np.int32), logprobs, policy, finish, forced)

    def _take(self, row: Row, piece: Piece, active: bool, stops: np.ndarray) -> Finish | None:
        """Add a piece to its row, or what its watch lets stand of it; says why the row ended, None when it goes on."""
        whole = len(piece.tokens)
        keep, forced, done = (whole, NO_TOKENS, False) if row.watch is None else row.watch(piece.tokens)
        row.pieces.append(Piece(*(array[:keep] for array in piece)))
        if keep < whole:
            row.to_force, active = NO_TOKENS, row.position + keep < row.last
        row.position += keep
        row.token = int(piece.tokens[keep - 1]) if keep else row.token
        row.to_force = np.concatenate([row.to_force, forced]).astype(np.int32)
        if done:
            return "stop"
        if active:
            return None
        return "stop" if keep == whole and not piece.forced[-1] and np.isin(row.token, stops) else "length"

    def _row(self, requests: Sequence[Request], r: int, s: int) -> Row:
        request = requests[r]
        start = len(request.prompt) - 1  # the last prompt token is a row's first step, which draws the first new token
        watch = None if request.watch is None else request.watch()
        last = start + request.max_new_tokens
        return Row(r, s, request.keys[s], start, int(request.prompt[-1]), last, Held(0, start), watch)

    def _pages(self, row: Row) -> int:
        """Pages of its own that a row needs for the next segment."""
        end = min(row.position + self._segment, row.last)
        return -(-(end - row.own.first) // self._page)

    def _prompt_pages(self, request: int) -> int:
        return -(-(len(self._requests[request].prompt) - 1 - self._prefix) // self._page)

    def _best_shard(self, request: int) -> int | None:
        """Where a sample goes: where its prompt is, else where there is most room; None when all slots are taken.

        No shard takes more than its share of all samples, so that a single prompt's samples use every device.
        """
        share = -(-(sum(map(len, self.live)) + len(self.waiting)) // len(self.live))
        free = [shard for shard, rows in enumerate(self.live) if len(rows) < min(self._slots, share)]
        return min(free, key=lambda d: ((request, d) not in self._held, len(self.live[d])), default=None)

    def _batch_rows(self, least: int) -> int:
        """Rows of a shard's batch."""
        return max(round_up(max(map(len, self.live))), -(-least // self.own.shards))

    def _check(self, number: int, request: Request, taken: int) -> None:
        pages = pages_alone(request, self._prefix, self._page, self.own.places)
        if pages > self.most:
            beside = f" beside what all prompts begin with, which takes {taken}" if taken else ""
            raise UserError(
                f"a prompt of {len(request.prompt)} tokens with {request.max_new_tokens} to come takes {pages} pages "
                f"of {self._page} tokens on a device, and its memory holds {self.most}{beside}: shorten it, raise "
                "sampling.kv_memory_gb, use sampling.kv_cache int8, or spread it with mesh.tensor or mesh.sequence"
            )
