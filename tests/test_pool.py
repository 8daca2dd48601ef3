"""Pages are held by one holder each, lie where their number says, and survive that their part shrinks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pkv.sampling.pool import NOWHERE, Held, Pool, round_up

SHARDS, PLACES, PAGE = 2, 3, 4


def stamp(pool: Pool, stock: np.ndarray, holders: list[Held]) -> None:
    """Write into every held page whose it is."""
    for number, held in enumerate(holders):
        stock[pool.flat(held)] = [number * 1000 + at for at in range(len(held.pages))]


def assert_whole(pool: Pool, stock: np.ndarray, holders: list[Held]) -> None:
    for number, held in enumerate(holders):
        assert stock[pool.flat(held)].tolist() == [number * 1000 + at for at in range(len(held.pages))]


@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, SHARDS - 1), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
)
def test_every_page_has_one_holder_and_keeps_what_it_holds(from_end, asked):
    pool = Pool(SHARDS, PLACES, PAGE, from_end=from_end)
    holders = [Held(shard, 0) for shard, _, _ in asked]
    for round_ in (1, 2):  # pages before and pages later
        wanted = [sum(one[1 : 1 + round_]) for one in asked]
        need = pool.needed((held.shard, pages) for held, pages in zip(holders, wanted, strict=True))
        if need > pool.size:
            pool.resize(need)
        for held, pages in zip(holders, wanted, strict=True):
            pool.extend(held, pages)
        taken = np.concatenate([pool.flat(held) for held in holders])
        assert len(set(taken.tolist())) == len(taken)
        for held in holders:
            places = pool.flat(held) // max(pool.size, 1)
            assert places.tolist() == [held.shard * PLACES + at % PLACES for at in range(len(held.pages))]
    stock = np.full(SHARDS * PLACES * pool.size, -1)
    stamp(pool, stock, holders)
    for held in holders[1::2]:
        pool.release(held)
    left = holders[::2]
    before = [stock[pool.flat(held)].tolist() for held in left]
    size = pool.needed((held.shard, len(held.pages)) for held in left)
    shelves, old = stock.reshape(SHARDS * PLACES, -1), pool.size
    for shelf, page, place in pool.shrink(left, size):
        assert place < size <= page, "what lies right stays"
        shelves[shelf, pool.at(place, old)] = shelves[shelf, pool.at(page, old)]
    stock = shelves[:, pool.at(np.arange(size), old)][:, pool.at(np.arange(size), size)].reshape(-1)
    assert [stock[pool.flat(held)].tolist() for held in left] == before
    pool.resize(size + len(left))  # at most one more each
    for held in left:
        pool.extend(held, len(held.pages) + 1)
    taken = np.concatenate([pool.flat(held) for held in left])
    assert len(set(taken.tolist())) == len(taken)


def test_the_table_says_who_reads_what_and_from_where():
    pool = Pool(1, 1, PAGE)
    pool.resize(4)
    prompt, row = Held(0, 0), Held(0, 7)
    pool.extend(prompt, 2)
    pool.extend(row, 1)
    readers, first, stop = pool.table([(prompt, (3, 5)), (row, (3,))], 2, [6, NOWHERE])
    assert readers[pool.flat(prompt)].tolist() == [[3, 5], [3, 5]]
    assert readers[pool.flat(row)].tolist() == [[3, NOWHERE]]
    assert first[pool.flat(prompt)].tolist() == [0, 4] and first[pool.flat(row)].tolist() == [7]
    assert stop[pool.flat(prompt)].tolist() == [6, 6]
    free = set(range(4)) - {*pool.flat(prompt).tolist(), *pool.flat(row).tolist()}
    assert all(readers[at].tolist() == [NOWHERE, NOWHERE] for at in free)


@given(st.integers(1, 10_000), st.integers(1, 64), st.sampled_from([1, 2, 4]))
def test_sizes_are_few_and_hold_what_they_must(count, least, steps):
    size = round_up(count, least, steps)
    assert count <= size and size % least == 0
    assert size <= max(least, (1 + 1 / steps) * (count + least))
    assert round_up(size, least, steps) == size
