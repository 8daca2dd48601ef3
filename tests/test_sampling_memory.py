"""Keys and values stay within their memory, which follows the lengths, and few programs are compiled."""

from __future__ import annotations

import dataclasses
import re
import time

import jax
import numpy as np
import pytest
from tiny_sampling import ARCH, CONFIG, MESHES, PARAMS, STOPS, assert_same, one_device, requests, run

from pkv.config import UserError
from pkv.mesh import make_mesh
from pkv.sampling import Engine, Request, WarmUp, compile_ahead, rehearse, row_keys
from pkv.sampling.rehearsal import Call, Rehearsal
from pkv.sampling.schedule import Schedule


@pytest.fixture(scope="module")
def plain():
    return run()


@pytest.mark.parametrize("stacked", [False, True])
def test_a_segment_never_copies_the_pages(monkeypatch, stacked):
    """The compiled loop writes the donated pages in place."""
    if stacked:
        monkeypatch.setattr("pkv.sampling.laying.UNROLL", 0)
    engine = Engine(ARCH, CONFIG, STOPS, one_device())
    decode, texts = engine.programs.decode, []

    def seen_decode(*args):
        shapes = {",".join(map(str, array.shape)) for array in jax.tree.leaves(args[2])}
        texts.append((shapes, decode.lower(*args).compile().as_text()))
        return decode(*args)

    monkeypatch.setattr(engine.programs, "decode", seen_decode)
    list(engine.sample(engine.load(PARAMS), requests()))
    shapes, text = texts[0]
    body = text[: text.index("ENTRY")]
    copies = [line for line in body.splitlines() if re.search(r"= f32\[(\S+?)\]\S* (copy|transpose)\(", line)]
    assert not [line for line in copies if re.search(r"f32\[(\S+?)\]", line)[1] in shapes]


def memory_of(pages: int, page: int = 8, *, fixed: bool = False) -> dict[str, float]:
    """A limit that so many pages of ARCH fit into, and one of its two layers twice where a stock changes its size."""
    times = 1 if fixed else 1.5
    return {"page_tokens": page, "kv_memory_gb": times * (pages + 0.5) * 2 * ARCH.layers * 2 * 8 * page * 4 / 1e9}


# fixed: a stock keeps its size from the beginning, as on an accelerator.
@pytest.mark.slow
@pytest.mark.parametrize("mesh, fixed", [(None, False), (None, True), (MESHES["all"], False)])
def test_when_the_memory_ends_rows_wait_and_say_the_same(plain, mesh, fixed):
    limit = memory_of(9, fixed=fixed) if mesh is None else memory_of(4, fixed=fixed)
    engine = Engine(
        ARCH, dataclasses.replace(CONFIG, **limit), STOPS, one_device() if mesh is None else make_mesh(mesh)
    )
    engine.programs.fixed = fixed
    found = {(c.request, c.sample): c for c in engine.sample(engine.load(PARAMS), requests())}
    assert_same(plain, found)
    assert engine.usage.peak_bytes <= limit["kv_memory_gb"] * 1e9
    if mesh is None:
        assert engine.usage.evicted, "the case must show it"


@pytest.mark.slow
def test_the_memory_suffices_while_pages_are_added_too(monkeypatch):
    monkeypatch.setattr("pkv.sampling.arena.GROWING", (8, 0))
    limit = memory_of(60)
    engine = Engine(ARCH, dataclasses.replace(CONFIG, slots=16, **limit), (), one_device())
    resize, seen = engine.programs.resize, []

    def seen_resize(stock, *, pages):
        fresh = resize(stock, pages=pages)
        seen.append(sum(array.nbytes for array in jax.live_arrays() if array.shape[1:] == (2, 8, 8)))
        return fresh

    monkeypatch.setattr(engine.programs, "resize", seen_resize)
    list(engine.sample(engine.load(PARAMS), requests((70, 70, 70), samples=8)))
    assert len(seen) > 4 and engine.usage.evicted and max(seen) <= limit["kv_memory_gb"] * 1e9


@pytest.mark.slow
@pytest.mark.parametrize("mesh, stacked", [(None, True), (MESHES["all"], False)], ids=["one device", "all"])
def test_a_stock_of_one_size_says_the_same_and_is_made_once(monkeypatch, plain, mesh, stacked):
    """Its parts grow, shrink and are moved together, and nothing else is made or copied."""
    if stacked:
        monkeypatch.setattr("pkv.sampling.laying.UNROLL", 0)
    monkeypatch.setattr("pkv.sampling.arena.LEAST_PAGES", 1)
    monkeypatch.setattr("pkv.sampling.arena.AT_ONCE", 2)
    config = dataclasses.replace(CONFIG, page_tokens=4, kv_memory_gb=1e-3)
    engine = Engine(ARCH, config, STOPS, make_mesh(mesh) if mesh else one_device())
    programs = engine.programs
    programs.fixed = True
    assert_same(plain, {(c.request, c.sample): c for c in engine.sample(engine.load(PARAMS), requests())})
    assert programs.empty._cache_size() == 1 and programs.resize._cache_size() == 0
    moving = programs.relocate._cache_size()
    assert moving <= 1
    assert moving or mesh, "the case must show it"


@pytest.mark.slow
@pytest.mark.parametrize("slots, fixed", [(1, True), (3, False), (3, True)])
def test_a_long_wait_for_memory_loses_no_page(monkeypatch, slots, fixed):
    """Many prompts come, go out and come back: at every visit each page is free or has its holder."""
    extend = Schedule.extend

    def checked(schedule, fresh):
        extend(schedule, fresh)
        for pool, holders in zip((schedule.own, schedule.prompts), schedule.holders(), strict=True):
            held = sum(len(one.pages) for one in holders)
            assert held + sum(map(len, pool._free)) == pool.size * len(pool._free)

    monkeypatch.setattr(Schedule, "extend", checked)
    draw, limit = np.random.default_rng(3), memory_of(9, fixed=fixed)
    keys = row_keys(0, "pressure", 0, [str(n) for n in range(12)], 3)
    prompts = [draw.integers(10, 200, draw.integers(2, 33)).astype(np.int32) for _ in range(12)]
    asked = [Request(prompt, key, 30) for prompt, key in zip(prompts, keys, strict=True)]
    roomy = run(dataclasses.replace(CONFIG, page_tokens=8), asked)
    engine = Engine(ARCH, dataclasses.replace(CONFIG, slots=slots * 2, **limit), STOPS, one_device())
    engine.programs.fixed = fixed
    assert_same(roomy, {(c.request, c.sample): c for c in engine.sample(engine.load(PARAMS), asked)})
    assert engine.usage.peak_bytes <= limit["kv_memory_gb"] * 1e9


@pytest.mark.parametrize("empty", [{"prompt": np.zeros(0, np.int32)}, {"max_new_tokens": 0}], ids=["prompt", "budget"])
def test_an_empty_request_is_refused(empty):
    first, *rest = requests()
    for asked in ([dataclasses.replace(first, **empty)], [*rest, dataclasses.replace(first, **empty)]):
        with pytest.raises(UserError, match=f"request {len(asked) - 1}: expected a prompt of at least one token"):
            run(asked=asked)


def test_a_request_that_the_memory_cannot_hold_is_refused_before_anything_is_sampled():
    with pytest.raises(UserError, match="holds 3"):
        run(dataclasses.replace(CONFIG, **memory_of(3)))


def beginning_alike(common: int) -> list[Request]:
    head = np.random.default_rng(1).integers(10, 200, common).astype(np.int32)
    return [dataclasses.replace(one, prompt=np.concatenate([head, one.prompt])) for one in requests()]


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", ["plain", "int8"])
@pytest.mark.parametrize("mesh", [None, MESHES["all"]], ids=["one device", "all"])
def test_what_all_prompts_begin_with_counts_as_memory(monkeypatch, mesh, kv_cache):
    """Its cache, which lives as long as prompts may come, and its pages."""
    limit, kept = memory_of(40) if kv_cache == "plain" else memory_of(24), []
    config = dataclasses.replace(CONFIG, kv_cache=kv_cache, **limit)
    engine = Engine(ARCH, config, STOPS, make_mesh(mesh) if mesh else one_device())
    programs, seen, held_of = engine.programs, [], lambda tree: sum(a.addressable_shards[0].data.nbytes for a in tree)
    prefix, decode = programs.prefix, programs.decode

    def seen_prefix(weights, tokens):
        made = prefix(weights, tokens)
        kept.extend(jax.tree.leaves(made[0]))
        return made

    def seen_decode(weights, shared, own, table, rows):
        seen.append(held_of(kept + jax.tree.leaves((own, [level.stock for level in shared]))))
        return decode(weights, shared, own, table, rows)

    monkeypatch.setattr(programs, "prefix", seen_prefix)
    monkeypatch.setattr(programs, "decode", seen_decode)
    list(engine.sample(engine.load(PARAMS), beginning_alike(80)))
    assert kept and engine.usage.peak_bytes == max(seen) <= limit["kv_memory_gb"] * 1e9


def test_a_refusal_says_what_the_beginning_of_all_prompts_takes():
    with pytest.raises(UserError, match="its memory holds 0 beside what all prompts begin with, which takes 20"):
        run(dataclasses.replace(CONFIG, **memory_of(6)), beginning_alike(80))


@pytest.mark.slow
@pytest.mark.parametrize("mesh, pages", [(None, 17), (MESHES["all"], 6)], ids=["one device", "all"])
def test_what_all_prompts_begin_with_gives_way_to_a_row_that_fits_without_it_only(mesh, pages):
    """Then rows wait for each other, and nothing is refused."""
    asked, mesh = beginning_alike(80), make_mesh(mesh) if mesh else None
    tight = dataclasses.replace(CONFIG, **memory_of(pages))
    assert_same(run(asked=asked), run(tight, asked, mesh))


def test_without_a_limit_the_memory_that_is_available_counts(monkeypatch, tmp_path):
    told = tmp_path / "meminfo"
    # A page of CONFIG takes 4 KiB, and half of it twice while a stock changes its size.
    told.write_text("MemTotal:  100 kB\nMemFree:  1 kB\nMemAvailable:  8 kB\n")
    monkeypatch.setattr("pkv.sampling.engine.MEMINFO", told)
    with pytest.raises(UserError, match="holds 1"):
        run()
    told.unlink()
    run()


@pytest.mark.parametrize("limit", ["tokens", "memory"])
@pytest.mark.parametrize("common, rows", [(0, 4), (80, 2)])
def test_prompts_that_are_prefilled_at_once_stay_within_their_tokens(monkeypatch, common, rows, limit):
    """Of 64 tokens and what comes before them; seven prompts are no power of two, but the rows of a program are."""
    if limit == "tokens":
        monkeypatch.setattr("pkv.sampling.engine.PREFILL_TOKENS", 400)
    else:  # of all that there is memory for an eighth
        monkeypatch.setattr(Engine, "_most_pages", lambda engine: 8 * 400 // engine.programs.page)
    draw, keys = np.random.default_rng(0), row_keys(0, "at once", 0, [str(n) for n in range(7)], 1)
    head = draw.integers(10, 200, common)
    prompts = [np.concatenate([head, draw.integers(10, 200, 40)]).astype(np.int32) for _ in keys]
    engine = Engine(ARCH, dataclasses.replace(CONFIG, slots=16), (), one_device())
    calls = rehearse(engine, [Request(prompt, key, 8) for prompt, key in zip(prompts, keys, strict=True)])
    shapes = [call.arguments[2].shape for call in calls if call.name == "prefill"]
    assert max(B for B, _ in shapes) == rows and all(B * (common + T) <= 400 for B, T in shapes)


def test_the_memory_that_is_free_is_the_most_that_was_found_and_is_still_there(monkeypatch):
    engine = Engine(ARCH, CONFIG, STOPS, one_device())
    engine.programs.fixed = True
    found = []
    for free in (1e6, 1e5, 0.95e6, 0.95e5, 1e6, 5e5):  # bytes; for a moment there is little
        monkeypatch.setattr("pkv.sampling.engine._free_bytes", lambda mesh, free=free: free)
        found.append(engine._share_of_free())
    assert found == [0.8e6, 0.8e5, 0.8e6, 0.8e5, 0.8e6, 0.8e5]


@pytest.mark.slow
def test_memory_follows_the_lengths():
    engine = Engine(ARCH, dataclasses.replace(CONFIG, page_tokens=4, segment=4, slots=32), (), one_device())
    draw, lengths = np.random.default_rng(0), (200, 20, 30, 40, 25, 100)
    keys = row_keys(0, "long", 0, [str(n) for n in lengths], 8)
    asked = [Request(draw.integers(10, 200, 30).astype(np.int32), k, n) for k, n in zip(keys, lengths, strict=True)]
    list(engine.sample(engine.load(PARAMS), asked))
    assert engine.usage.ratio < 1.3


@pytest.mark.parametrize(
    "prompts, samples, new_tokens, most",
    [
        (8, 8, 1024, 1.3),
        (32, 8, 1024, 1.3),
        (4, 16, 4096, 1.3),
        (2, 4, 11264, 1.3),
        (64, 1, 1024, 1.7),
        (8, 1, 1024, 2.3),
    ],
)
def test_memory_follows_the_lengths_of_long_tailed_rollouts(prompts, samples, new_tokens, most):
    """By a rehearsal of whole rollouts in the pages that a CPU has: nothing is computed. Few rows take more."""
    engine = Engine(ARCH, dataclasses.replace(CONFIG, slots=64, segment=32, page_tokens=64), (), one_device())
    draw, keys = np.random.default_rng(0), np.zeros((samples, 2), np.uint32)
    asked = [Request(draw.integers(10, 200, 140).astype(np.int32), keys, new_tokens) for _ in range(prompts)]
    rehearsal = Rehearsal(engine, new_tokens / 4)
    list(rehearsal.sample({}, asked))
    assert rehearsal.usage.ratio < most


@pytest.mark.slow
def test_a_long_run_compiles_few_programs():
    """Rows end where their budgets do, long-tailed: so what is compiled is the same on every machine."""
    engine = Engine(ARCH, dataclasses.replace(CONFIG, slots=32, page_tokens=16), (), one_device())
    draw, weights = np.random.default_rng(0), engine.load(PARAMS)
    for step in range(12):
        budgets = np.minimum(draw.geometric(1 / 60, 24), 300)
        keys = row_keys(0, "long", step, [str(n) for n in range(24)], 2)
        asked = [
            Request(draw.integers(10, 200, draw.integers(1, 200)).astype(np.int32), k, int(n))
            for k, n in zip(keys, budgets, strict=True)
        ]
        list(engine.sample(weights, asked))
        if step == 7:
            before = engine.compilations
    assert engine.compilations - before <= 2, "what a run needs is compiled in its first steps"
    assert engine.compilations <= 72


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, memory", [(None, {}), (MESHES["all"], {}), (None, {"kv_memory_gb": 1.5 * 40 * 16 * 256 / 1e9})]
)
def test_after_a_warm_up_rollouts_to_the_end_of_their_budget_compile_nothing(mesh, memory):
    config = dataclasses.replace(CONFIG, slots=16, page_tokens=16, **memory)
    engine = Engine(ARCH, config, (), make_mesh(mesh) if mesh else one_device())
    weights, asked = engine.load(PARAMS), requests((70, 70, 70), samples=8)
    warm_up = WarmUp(engine)
    assert warm_up(weights, asked) > 0
    before = engine.compilations
    list(engine.sample(weights, asked))
    assert bool(engine.usage.evicted) == bool(memory), "the case must show it"
    from_the_host = engine.programs.restore._cache_size()  # of rows that come back: what is left to compile then
    assert engine.compilations - before == from_the_host
    assert warm_up(weights, asked) == 0


def test_commands_compile_ahead_where_compiling_takes_long(monkeypatch):
    engine = Engine(ARCH, CONFIG, (), one_device())
    weights, asked = engine.load(PARAMS), requests()
    before = engine.compilations
    compile_ahead(engine, weights, asked)
    assert engine.compilations == before, "a CPU has each program when it comes"
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    compile_ahead(engine, weights, asked)
    ahead = engine.compilations
    assert ahead > before
    list(engine.sample(weights, asked))
    assert engine.compilations == ahead


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_warm_up_that_fails_or_is_interrupted_does_not_compile_what_is_left(monkeypatch, error):
    tried = []

    def fails(call, programs, weights):
        tried.append(call)
        time.sleep(0.05)
        raise error

    monkeypatch.setattr(Call, "compile", fails)
    monkeypatch.setattr("pkv.sampling.rehearsal.cores", lambda: 2)
    engine = Engine(ARCH, CONFIG, (), one_device())
    weights, asked = engine.load(PARAMS), requests()
    with pytest.raises(error):
        WarmUp(engine)(weights, asked)
    assert len(tried) < len(rehearse(engine, asked)) / 2


@pytest.mark.slow
def test_a_warm_up_leaves_little_to_compile_for_long_tailed_lengths():
    engine = Engine(ARCH, dataclasses.replace(CONFIG, slots=32), STOPS, one_device())
    weights, asked = engine.load(PARAMS), requests((100, 100, 100), samples=16)
    warmed = WarmUp(engine)(weights, asked)
    before = engine.compilations
    list(engine.sample(weights, asked))
    assert engine.compilations - before <= warmed // 3


def test_the_longest_shapes_are_compiled_first_and_are_the_longest_there_will_be():
    engine = Engine(ARCH, dataclasses.replace(CONFIG, slots=16), (), one_device())
    asked = requests((70, 70, 70), samples=8)
    calls = rehearse(engine, asked)
    assert [call.bytes for call in calls] == sorted((call.bytes for call in calls), reverse=True)
    list(engine.sample(engine.load(PARAMS), asked))
    decode = next(call for call in calls if call.name == "decode")
    pages = sum(
        array.size * array.dtype.itemsize
        for array in jax.tree.leaves((decode.arguments[0][0].stock, decode.arguments[1]))
    )
    assert pages == engine.usage.peak_bytes


def test_a_rehearsal_refuses_what_sampling_would_refuse():
    engine = Engine(ARCH, dataclasses.replace(CONFIG, kv_memory_gb=1e-6), (), one_device())
    with pytest.raises(UserError, match="its memory holds"):
        rehearse(engine, requests((70, 70, 70)))
