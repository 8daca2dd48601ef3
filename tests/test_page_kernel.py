"""The kernel for pages on GPUs, interpreted here: it says what XLA's way says, and reads no page that nobody reads."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_sampling import ARCH, CONFIG, MESHES, assert_same, one_device, run

from pkv.config import MeshConfig, UserError
from pkv.mesh import AXES, make_mesh
from pkv.model import page_kernel, pages
from pkv.model.cache import Met
from pkv.model.kernels import choose_page_kernel, cuda_capability
from pkv.model.pages import Level
from pkv.sampling.pool import NOWHERE

B, K, G, H, S = 6, 2, 3, 16, 32
NOBODY = NOWHERE


def met(readers) -> Met:
    """Pages with such readers, who see some of the slots; where nobody reads, there is what no number is."""
    readers = np.asarray(readers, np.int64)
    draw, (P, R) = np.random.default_rng(1), readers.shape
    read = (readers < B).any(axis=1)[:, None, None, None]
    k, v = (draw.normal(size=shape) for shape in ((P, K, H, S), (P, K, S, H)))
    held = {name: jnp.asarray(np.where(read, array, np.nan), jnp.float32) for name, array in (("k", k), ("v", v))}
    seen = (draw.random((P, R, S)) < 0.7) & (readers < B)[..., None]
    level = Level(None, jnp.asarray(readers, jnp.int32), jnp.zeros(P), jnp.zeros(P)).in_order(B)
    return Met(held, level.readers, jnp.asarray(seen), level.order, level.starts)


LEVELS = {
    "of one row each": [met([*np.arange(B).repeat(3)[:, None], [NOBODY], [NOBODY]])],
    "in any order": [met(np.random.default_rng(5).permutation(np.arange(B).repeat(3))[:, None])],
    "of a prefix, of prompts and of rows": [
        met([[*range(B), NOBODY, NOBODY]] * 2),
        met([[0, 1, 2, NOBODY], [3, 4, 5, NOBODY], [0, 1, 2, NOBODY], [NOBODY] * 4]),
        met([*np.arange(B).repeat(12)[:, None]]),
    ],
    "of more readers than meet a page at once": [met([[*range(B), *[NOBODY] * 26]] * 3), met(np.arange(B)[:, None])],
}


def queries() -> jax.Array:
    return jnp.asarray(np.random.default_rng(9).normal(size=(B, K, G, H)), jnp.float32)


def without_gaps(levels: list[Met]) -> list[Met]:
    """XLA's way multiplies by 0 what nobody reads, which must be a number."""
    return [one._replace(pages=jax.tree.map(jnp.nan_to_num, one.pages)) for one in levels]


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_the_kernel_says_what_xla_says(levels, cap):
    expected = pages._attend(queries(), without_gaps(levels), cap)
    got = page_kernel.attend_pages(queries(), levels, cap, interpret=True)
    assert np.isfinite(got).all() and np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_what_a_row_reads_does_not_hang_on_where_it_stands():
    levels = LEVELS["of a prefix, of prompts and of rows"]
    turned = np.roll(np.arange(B), 1)  # row b is row turned[b] of the other batch
    there = lambda readers: jnp.where(readers < B, jnp.roll(jnp.arange(B), -1)[readers % B], readers)  # noqa: E731
    moved = []
    for one in levels:
        level = Level(None, there(one.readers), None, None).in_order(B)
        moved.append(one._replace(readers=level.readers, order=level.order, starts=level.starts))
    attend = partial(page_kernel.attend_pages, cap=None, interpret=True)
    np.testing.assert_allclose(attend(queries()[turned], moved), attend(queries(), levels)[turned], atol=1e-6)


@pytest.mark.parametrize("kind, more", [("max", ()), ("sum", ()), ("sum", (H,))])
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_rows_are_compared_as_they_are_scattered(monkeypatch, levels, kind, more):
    for one in levels:
        P, R = one.readers.shape
        parts = jnp.asarray(np.random.default_rng(0).normal(size=(P, K, R, G, *more)), jnp.float32)
        expected = pages._by_row(kind, parts, one.readers, B)
        with monkeypatch.context() as patch:
            patch.setattr(jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays))
            got = pages._by_row(kind, parts, one.readers, B)
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.fixture
def by_kernel(monkeypatch):
    monkeypatch.setattr("pkv.sampling.programs.choose_page_kernel", lambda *_: "triton")
    interpreted = partial(page_kernel.attend_pages, interpret=True)
    monkeypatch.setattr(page_kernel, "attend_pages", interpreted)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, MESHES["sequence"]])
def test_the_engine_says_the_same_by_kernel(request, mesh):
    config = dataclasses.replace(CONFIG, segment=8)
    expected = run(config)
    request.getfixturevalue("by_kernel")
    assert_same(expected, run(config, mesh=one_device() if mesh is None else make_mesh(mesh)))


def gpu(capability: str) -> SimpleNamespace:
    return SimpleNamespace(platform="gpu", compute_capability=capability)


def mesh_of(device, **sizes) -> SimpleNamespace:
    return SimpleNamespace(devices=np.array([[device]]), shape=dict.fromkeys(AXES, 1) | sizes)


def test_the_kernel_is_taken_where_it_can_be_and_refused_in_one_line():
    arch = dataclasses.replace(ARCH, head_size=128)
    choose = partial(choose_page_kernel, arch=arch, page=128, dtype="bfloat16", eight_bit=False)
    assert choose("auto", mesh_of(gpu("9.0"))) == choose("triton", mesh_of(gpu("8.0"))) == "triton"
    assert choose("xla", mesh_of(gpu("9.0"))) == "xla"
    wrong = {
        "a GPU of compute capability 8": {"mesh": mesh_of(gpu("7.5"))},
        "mesh.tensor 1": {"mesh": mesh_of(gpu("9.0"), tensor=2)},
        "heads and pages of 16": {"mesh": mesh_of(gpu("9.0")), "page": 96},
        "pages of at most 32 KiB": {"mesh": mesh_of(gpu("9.0")), "dtype": "float32"},
        "sampling.kv_cache plain": {"mesh": mesh_of(gpu("9.0")), "eight_bit": True},
    }
    for said, kind in wrong.items():
        assert choose("auto", **kind) == "xla"
        with pytest.raises(UserError, match=f"sampling.attention: triton needs {said}"):
            choose("triton", **kind)
    assert choose("auto", make_mesh(MeshConfig())) == "xla"
    assert [cuda_capability(gpu(said)) for said in ("9.0", "12.1", "gfx942")] == [9.0, 12.1, 0.0]
