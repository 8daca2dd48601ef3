"""Many rows decode at once in slots; a finished row is handed out at once and its slot goes to the next one waiting.

Each prompt is prefilled once for all of its samples. Decoding runs for many steps on the device between two visits of
the host. When nothing waits any more and most rows have ended, the rest moves together and the batch shrinks. What a
row says depends on its own key and the weights only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pkv.config import SamplingConfig
from pkv.mesh import SAMPLING_RULES, batch_sharding, shardings
from pkv.model import (
    Arch,
    Cache,
    Params,
    cache_axes,
    cache_length,
    cast,
    forward,
    grow_cache,
    init_cache,
    logits,
    put_rows,
    take_rows,
    unstack_layers,
    weight_axes,
)
from pkv.records import Finish
from pkv.sampling.drawing import Drawing, Greedy, Nucleus, draw

UNROLL = (
    8  # models of at most so many layers decode with their layers unrolled: no slicing of stacked weights and caches
)
PREFILL_MULTIPLE = 32  # prompts are padded to a multiple of this, so that few shapes are compiled
LEAST_ROWS = 8  # the batch does not shrink below this


@dataclass(frozen=True)
class Request:
    """One prompt, int32 [T], and the keys of its samples, uint32 [G, 2]."""

    prompt: np.ndarray
    keys: np.ndarray
    max_new_tokens: int


class Completion(NamedTuple):
    """One finished sample: which request and sample, generated tokens int32 [T], log-probabilities float32 [T]."""

    request: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    policy_logprobs: np.ndarray
    finish: Finish


class Rows(NamedTuple):
    """The state of all slots on the device. `position` is that of `token`, whose key and value are not written yet."""

    cache: Cache
    token: jax.Array  # int32 [B]
    position: jax.Array  # int32 [B]
    last: jax.Array  # int32 [B], the last position that may be generated
    active: jax.Array  # bool [B]
    keys: jax.Array  # uint32 [B, 2]


class Visit(NamedTuple):
    """What one visit of the host finds: the tokens of a segment, [steps, B], and which of them count."""

    tokens: np.ndarray
    logprobs: np.ndarray
    policy_logprobs: np.ndarray
    counted: np.ndarray
    active: np.ndarray


@dataclass
class Slot:
    """The host's side of one slot."""

    request: int
    sample: int
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


class Engine:
    """Compiled sampling for one architecture on one mesh."""

    def __init__(
        self, arch: Arch, config: SamplingConfig, stop_ids: Sequence[int], mesh: Mesh, dtype: str = "float32"
    ) -> None:
        self._arch, self._config, self._mesh, self._dtype = arch, config, mesh, jnp.dtype(dtype)
        self._stops = jnp.asarray(list(stop_ids), jnp.int32)
        self._stacked = arch.layers > UNROLL
        self._row_multiple = mesh.shape["data"] * mesh.shape["fsdp"]
        self._drawing: Drawing = Greedy()
        if config.temperature > 0:
            self._drawing = Nucleus(config.top_p < 1 or config.top_k > 0 or config.min_p > 0, config.top_k)
        self._scalars = (jnp.float32(config.temperature or 1.0), jnp.float32(config.top_p), jnp.float32(config.min_p))
        self._place = jax.jit(self._place_weights)
        self._prefill = jax.jit(self._prefill_prompts)
        self._insert = jax.jit(self._insert_rows, donate_argnames="rows")
        self._decode = jax.jit(self._decode_segment, donate_argnames="rows", static_argnames="steps")
        self._grow = jax.jit(lambda cache, length: grow_cache(cache, length), static_argnames="length")
        self._take = jax.jit(self._take_rows)

    def load(self, params: Params) -> Params:
        """Weights, or a part of them from `split`, in the layout and dtype of sampling; what `sample` takes.

        Adapters are not merged and quantised weights stay so: merged in 16 bits, an adapter's small changes would be
        rounded away, and sampler and trainer would differ. What lies right already is not copied.
        """
        shapes = jax.eval_shape(partial(cast, dtype=self._dtype), params)
        placed = self._placing(params)

        def right(array: jax.Array, shape: Any, place: Any) -> bool:
            return array.dtype == shape.dtype and array.sharding.is_equivalent_to(place, array.ndim)

        if self._stacked and jax.tree.all(jax.tree.map(right, params, shapes, placed)):
            return params
        return self._place(params)

    def sample(
        self,
        weights: Params,
        requests: Sequence[Request],
        on_tokens: Callable[[int, int, np.ndarray], None] | None = None,
    ) -> Iterator[Completion]:
        """All samples of all requests, each handed out when it ends. weights: from `load`.

        on_tokens(request, sample, tokens) is called with the new tokens of every row at each visit of the host.
        """
        waiting = deque((r, s) for r, request in enumerate(requests) for s in range(len(request.keys)))
        count = self._round_rows(min(self._config.slots, len(waiting)))
        length = self._round_length(max((len(requests[r].prompt) for r, _ in waiting), default=1))
        rows = self._empty_rows(count, length)
        slots: list[Slot | None] = [None] * count
        ends = np.zeros(count, np.int64)  # the furthest position a slot can have reached
        while waiting or any(slots):
            if waiting and None in slots:
                rows = self._fill(weights, rows, slots, ends, waiting, requests)
            rows, slots, ends = self._shrink(rows, slots, ends, bool(waiting))
            needed = self._round_length(int(ends.max()) + self._config.segment + 1)
            rows = rows._replace(cache=self._grow(rows.cache, length=max(needed, self._length(rows))))
            rows, visit = self._visit(weights, rows)
            ends += self._config.segment * np.array([slot is not None for slot in slots])
            yield from self._harvest(visit, slots, ends, on_tokens)

    # The host's side.

    def _fill(
        self,
        weights: Params,
        rows: Rows,
        slots: list[Slot | None],
        ends: np.ndarray,
        waiting: deque[tuple[int, int]],
        requests: Sequence[Request],
    ) -> Rows:
        """Put waiting samples into free slots; every prompt among them is prefilled once."""
        free = [at for at, slot in enumerate(slots) if slot is None][: len(waiting)]
        chosen = [waiting.popleft() for _ in free]
        wanted = sorted({r for r, _ in chosen})
        prompts = [requests[r].prompt for r in wanted]
        width = -(-max(map(len, prompts)) // PREFILL_MULTIPLE) * PREFILL_MULTIPLE
        tokens = np.zeros((self._round_rows(len(prompts)), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        rows = rows._replace(cache=self._grow(rows.cache, length=max(self._round_length(width), self._length(rows))))
        prefilled = self._prefill(weights, jax.device_put(tokens, batch_sharding(self._mesh)))
        # Padded to the number of slots, so that one program serves every refill: places past the end are dropped.
        count = len(slots)
        places = np.full(count, count, np.int32)
        places[: len(free)] = free
        source, token, position, last = (np.zeros(count, np.int32) for _ in range(4))
        keys = np.zeros((count, 2), np.uint32)
        for i, (r, s) in enumerate(chosen):
            prompt = requests[r].prompt
            source[i], token[i], position[i] = wanted.index(r), prompt[-1], len(prompt) - 1
            last[i], keys[i] = len(prompt) - 1 + requests[r].max_new_tokens, requests[r].keys[s]
            slots[free[i]] = Slot(r, s, [])
            ends[free[i]] = len(prompt) - 1
        return self._insert(rows, prefilled, places, source, token, position, last, keys)

    def _shrink(
        self, rows: Rows, slots: list[Slot | None], ends: np.ndarray, more: bool
    ) -> tuple[Rows, list[Slot | None], np.ndarray]:
        """With nothing waiting and at most half of the slots in use, move the rows that are left together."""
        used = [at for at, slot in enumerate(slots) if slot is not None]
        count = self._round_rows(max(len(used), LEAST_ROWS))
        if more or count > len(slots) // 2:
            return rows, slots, ends
        free = [at for at, slot in enumerate(slots) if slot is None]
        chosen = (used + free)[:count]
        return self._take(rows, np.asarray(chosen, np.int32)), [slots[at] for at in chosen], ends[chosen]

    def _visit(self, weights: Params, rows: Rows) -> tuple[Rows, Visit]:
        rows, *outputs = self._decode(weights, rows, *self._scalars, steps=self._config.segment)
        return rows, Visit(*(np.asarray(array) for array in jax.device_get((*outputs, rows.active))))

    def _harvest(
        self,
        visit: Visit,
        slots: list[Slot | None],
        ends: np.ndarray,
        on_tokens: Callable[[int, int, np.ndarray], None] | None,
    ) -> Iterator[Completion]:
        for at, slot in enumerate(slots):
            if slot is None:
                continue
            counted = visit.counted[:, at]
            piece = (visit.tokens[counted, at], visit.logprobs[counted, at], visit.policy_logprobs[counted, at])
            slot.pieces.append(piece)
            if on_tokens is not None and len(piece[0]):
                on_tokens(slot.request, slot.sample, piece[0])
            if visit.active[at]:
                continue
            tokens, logprobs, policy = (np.concatenate(parts) for parts in zip(*slot.pieces, strict=True))
            finish: Finish = "stop" if np.isin(tokens[-1], self._stops) else "length"
            slots[at] = None
            ends[at] = 0
            yield Completion(slot.request, slot.sample, tokens.astype(np.int32), logprobs, policy, finish)

    def _round_rows(self, rows: int) -> int:
        """The next power of two, and a multiple of the mesh axes that rows are spread over."""
        power = 1 << max(0, rows - 1).bit_length()
        return -(-power // self._row_multiple) * self._row_multiple

    def _round_length(self, length: int) -> int:
        block = self._config.cache_block
        return -(-length // block) * block

    def _length(self, rows: Rows) -> int:
        return cache_length(rows.cache)

    # The device's side.

    def _placing(self, params: Params) -> Any:
        return shardings(weight_axes(params, self._arch), params, self._mesh, SAMPLING_RULES)

    def _place_weights(self, params: Params) -> Params:
        params = jax.lax.with_sharding_constraint(cast(params, self._dtype), self._placing(params))
        return params if self._stacked else unstack_layers(params, self._arch)

    def _empty_rows(self, count: int, length: int) -> Rows:
        def make() -> Rows:
            whole = jnp.zeros(count, jnp.int32)
            cache = init_cache(self._arch, count, length, self._dtype, stacked=self._stacked)
            return Rows(cache, whole, whole, whole, jnp.zeros(count, bool), jnp.zeros((count, 2), jnp.uint32))

        return jax.jit(lambda: self._spread(make()))()

    def _spread(self, rows: Rows) -> Rows:
        """Every device holds its own rows, whatever made them: one layout, and so one program for each shape."""
        vectors = jax.lax.with_sharding_constraint(rows[1:], batch_sharding(self._mesh))
        return Rows(self._spread_cache(rows.cache), *vectors)

    def _spread_cache(self, cache: Cache) -> Cache:
        axes = cache_axes(self._arch, stacked=self._stacked)
        return jax.lax.with_sharding_constraint(cache, shardings(axes, cache, self._mesh, SAMPLING_RULES))

    def _prefill_prompts(self, weights: Params, tokens_PT: jax.Array) -> Cache:
        """The keys and values of whole prompts, each device its own prompts; padding on the right is overwritten before
        anything looks at it."""
        P, T = tokens_PT.shape
        cache = self._spread_cache(init_cache(self._arch, P, T, self._dtype, stacked=self._stacked))
        positions_PT = jnp.broadcast_to(jnp.arange(T), (P, T))
        return forward(weights, self._arch, tokens_PT, positions_PT, cache=cache, dtype=self._dtype)[1]

    def _insert_rows(
        self, rows: Rows, prefilled: Cache, places: Any, source: Any, token: Any, position: Any, last: Any, keys: Any
    ) -> Rows:
        """Write prompts into the slots `places` (those past the end are dropped) and start their rows.

        The last prompt token is decoded again as a row's first step, which draws the first new token.
        """

        def put(old: jax.Array, new: Any) -> jax.Array:
            return old.at[places].set(new, mode="drop")

        cache = put_rows(rows.cache, places, take_rows(prefilled, source))
        active = put(rows.active, True)
        return self._spread(
            Rows(
                cache,
                put(rows.token, token),
                put(rows.position, position),
                put(rows.last, last),
                active,
                put(rows.keys, keys),
            )
        )

    def _take_rows(self, rows: Rows, chosen: jax.Array) -> Rows:
        return self._spread(Rows(take_rows(rows.cache, chosen), *(x[chosen] for x in rows[1:])))

    def _decode_segment(
        self, weights: Params, rows: Rows, temperature: jax.Array, top_p: jax.Array, min_p: jax.Array, *, steps: int
    ) -> tuple[Rows, jax.Array, jax.Array, jax.Array, jax.Array]:
        """Up to `steps` tokens for every active row; ends early when none is left."""
        B = rows.token.shape[0]
        outputs = (
            jnp.zeros((steps, B), jnp.int32),
            *(jnp.zeros((steps, B)) for _ in range(2)),
            jnp.zeros((steps, B), bool),
        )

        def more(loop: Any) -> jax.Array:
            step, rows, _ = loop
            return (step < steps) & rows.active.any()

        def advance(loop: Any) -> Any:
            step, rows, outputs = loop
            hidden_B1D, cache = forward(
                weights, self._arch, rows.token[:, None], rows.position[:, None], cache=rows.cache, dtype=self._dtype
            )
            logits_BV = logits(weights, self._arch, hidden_B1D[:, 0])
            drawn = draw(self._drawing, logits_BV, rows.keys, rows.position + 1, temperature, top_p, min_p)
            outputs = tuple(out.at[step].set(new) for out, new in zip(outputs, (*drawn, rows.active), strict=True))
            position = jnp.where(rows.active, rows.position + 1, rows.position)
            token = jnp.where(rows.active, drawn.tokens, rows.token)
            ended = jnp.isin(token, self._stops) | (position >= rows.last)
            return step + 1, Rows(cache, token, position, rows.last, rows.active & ~ended, rows.keys), outputs

        _, rows, outputs = jax.lax.while_loop(more, advance, (jnp.int32(0), rows, outputs))
        return self._spread(rows), *outputs
