"""What a rollout asks of the devices, found by going through it without them.

The engine's own loop runs here with programs that compute nothing and only note the shapes that they were given: to be
compiled before the first rollout, the longest ones first, or for devices that aren't there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from pkv.model import Cache, Params, Stock
from pkv.sampling.engine import Engine
from pkv.sampling.programs import Programs, Rows, Segment, Table, cores, device_bytes
from pkv.sampling.schedule import Request
from pkv.tracking import Progress

MOST_THREADS = 8
MEAN_SHARE = 4  # of the lengths that a rehearsal expects: the budget over this is their mean


@dataclass(frozen=True)
class Call:
    """One program and the shapes, dtypes and places of what it is given; of_weights: the weights come before that."""

    name: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, int]
    of_weights: bool

    @property
    def key(self) -> Any:
        """Equal for two calls that are one compiled program."""
        leaves, form = jax.tree.flatten(self.arguments)
        kinds = tuple((leaf.shape, str(leaf.dtype), leaf.sharding) for leaf in leaves)
        return self.name, form, kinds, tuple(self.keywords.items())

    @property
    def bytes(self) -> int:
        """What its arguments take of a device, without the weights."""
        return sum(device_bytes(self.arguments))

    def run(self, programs: Programs, weights: Params) -> None:
        """Compile the program, and run it on rows that are all over: so its memory is had once, too."""
        given = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), self.arguments)
        before = (weights,) if self.of_weights else ()
        jax.block_until_ready(getattr(programs, self.name)(*before, *given, **self.keywords))

    def compile(self, programs: Programs, weights: Params) -> None:
        """What `run` finds compiled then, if weights and arguments lie on a mesh: JAX keeps it in memory."""
        self.lower(programs, weights).compile()

    def lower(self, programs: Programs, weights: Params) -> jax.stages.Lowered:
        """The program before it is compiled. weights: shapes and places suffice."""
        before = (weights,) if self.of_weights else ()
        return getattr(programs, self.name).lower(*before, *self.arguments, **self.keywords)


class Rehearsal(Engine):
    """An engine that computes nothing. mean_tokens: of a sample, at random; None: all run to their budget's end."""

    def __init__(self, engine: Engine, mean_tokens: float | None = None) -> None:
        self.__dict__.update(engine.__dict__)
        self.programs = _Recorder(engine.programs)
        self._mean_tokens, self._draw = mean_tokens, np.random.default_rng(0)

    @property
    def calls(self) -> list[Call]:
        """What has been asked so far, each once, in the order of its first need."""
        return list(self.programs.calls.values())

    def _put(self, array: np.ndarray, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(self._mesh, spec))

    def _segment(self, weights: Params, shared: Any, own: Stock, table: Table, rows: Rows) -> tuple[Stock, Segment]:
        placed = self._placed(rows)
        self.programs.note("decode", shared, own, table, placed)
        steps = rows.forced.shape[1]
        left = rows.last - rows.position
        if self._mean_tokens is not None:
            left = np.minimum(left, self._draw.geometric(min(1.0, 1 / self._mean_tokens), len(left)))
        said = np.where(rows.active, np.minimum(left, steps), 0)
        counted = np.arange(steps)[:, None] < said
        nothing = np.zeros(counted.shape)
        return own, Segment(nothing.astype(np.int32), nothing, nothing, counted, rows.active & (left > steps))


class _Recorder:
    """`Programs` by their shapes alone."""

    def __init__(self, programs: Programs) -> None:
        self._real, self.page, self.fixed = programs, programs.page, programs.fixed
        self.largest_share, self.prefix_bytes = programs.largest_share, programs.prefix_bytes
        self.calls: dict[Any, Call] = {}

    def note(self, name: str, *arguments: Any, of_weights: bool = True, **keywords: int) -> None:
        arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arguments)
        call = Call(name, arguments, keywords, of_weights)
        self.calls.setdefault(call.key, call)

    def prefix(self, weights: Params, tokens: Any) -> tuple[Cache, Stock]:
        self.note("prefix", tokens)
        return self._real.prefix_shapes(tokens.shape[0])

    def prefill(self, weights: Params, prefix: Cache | None, stock: Stock, tokens: Any, places: Any) -> Stock:
        self.note("prefill", prefix, stock, tokens, places)
        return stock

    def empty(self, *, pages: int) -> Stock:
        self.note("empty", of_weights=False, pages=pages)
        return self._real.stock_shapes(pages)

    def resize(self, stock: Stock, *, pages: int) -> Stock:
        self.note("resize", stock, of_weights=False, pages=pages)

        def one(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (*a.shape[:-4], pages * self._real.shelves, *a.shape[-3:])
            return jax.ShapeDtypeStruct(shape, a.dtype, sharding=a.sharding)

        return jax.tree.map(one, stock)

    def relocate(self, stock: Stock, old: Any, new: Any) -> Stock:
        self.note("relocate", stock, old, new, of_weights=False)
        return stock

    def fetch(self, stock: Stock, pages: Any) -> Stock:
        self.note("fetch", stock, pages, of_weights=False)
        return jax.eval_shape(self._real.fetch, stock, pages)

    def restore(self, stock: Stock, pages: Any, fresh: Stock) -> Stock:
        return stock  # what comes back lies in the host's memory: its program is compiled when that happens


def rehearse(engine: Engine, requests: Sequence[Request]) -> list[Call]:
    """What a rollout of `requests` will ask, as far as it can be known before: if all run to the end of their budget,
    and if their lengths are long-tailed. The largest call comes first. Raises UserError as `Engine.sample` does."""
    calls: dict[Any, Call] = {}
    unwatched = [replace(request, watch=None) for request in requests]
    mean = max((request.max_new_tokens for request in requests), default=1) / MEAN_SHARE
    for mean_tokens in (None, mean):
        rehearsal = Rehearsal(engine, mean_tokens)
        for _ in rehearsal.sample({}, unwatched):
            pass
        calls |= {call.key: call for call in rehearsal.calls}
    return sorted(calls.values(), key=lambda call: -call.bytes)


class WarmUp:
    """Compiles what rollouts will need before the first of them, with a bar. Keeps in mind what has been compiled."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._done = engine, set()

    def __call__(self, weights: Params, requests: Sequence[Request]) -> int:
        """How many programs it ran that it had not run before. weights: from `Engine.load`.

        Raises UserError as `Engine.sample` does.
        """
        programs = self._engine.programs
        calls = [call for call in rehearse(self._engine, requests) if call.key not in self._done]
        threads = _threads()
        compiled = [threads.submit(call.compile, programs, weights) for call in calls]
        try:
            with Progress(len(calls), "compiling the sampler", delay_s=1.0) as progress:
                for call, done in zip(calls, compiled, strict=True):
                    done.result()
                    call.run(programs, weights)
                    self._done.add(call.key)
                    progress.advance(1, pages_gb=call.bytes / 1e9)
        finally:  # of a program that doesn't fit, or an interrupt: the others are not waited for
            threads.shutdown(cancel_futures=True)
        return len(calls)


def compile_ahead(engine: Engine, weights: Params, requests: Sequence[Request]) -> None:
    """Compile what one call will need, the largest first, where that takes long: beside each other, and what doesn't
    fit fails before anything was said. On a CPU each program is compiled when it comes."""
    if jax.default_backend() != "cpu":
        WarmUp(engine)(weights, requests)


def _threads() -> ThreadPoolExecutor:
    """As many programs are compiled beside each other; each takes two cores or so, and some memory."""
    return ThreadPoolExecutor(max(1, min(cores() // 2, MOST_THREADS)), "compiling")
