"""Splash attention says what XLA's attention says, interpreted; and it compiles for a TPU that isn't there."""

import dataclasses
import functools
import importlib.util
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_cudnn import cudnn_in_words
from remat import compile_gradient

from pkv.config import MeshConfig, UserError
from pkv.mesh import make_mesh
from pkv.model import Arch, choose_kernel, forward, init_params, logits
from pkv.model.attention import attend
from pkv.model.kernels import cudnn, places_of, splash

B, T, N, K, H = 2, 200, 4, 2, 16
SEGMENTS = jnp.asarray(np.tile(np.repeat([1, 2, 0], [80, 100, 20]), (B, 1)))
KINDS = {
    "whole rows": {},
    "packed": {"segments_BT": SEGMENTS},
    "packed, window and cap": {"segments_BT": SEGMENTS, "window": 30, "cap": 2.0},
    "told at run time to be local": {"window": 30, "local": jnp.array(True)},
    "told at run time to be global": {"window": 30, "local": jnp.array(False)},
}
ARCH = Arch(vocab_size=64, hidden=32, layers=4, heads=4, kv_heads=2, head_size=8, ffn=48, init_std=0.3)


@pytest.fixture
def interpreted(monkeypatch):
    """Splash's kernels run by Pallas's interpreter, on any device."""
    monkeypatch.setattr(splash, "make_splash_mha", partial(splash.make_splash_mha, interpret=True))


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(key, s) for key, s in zip(keys, [(B, T, N, H), (B, K, H, T), (B, K, T, H)], strict=True)
    )


def value_and_gradient(arrays, kernel, **kind):
    def total(*arrays):
        out = attend(*arrays, scale=0.25, kernel=kernel, **kind)
        return jnp.sum(out[:, :180] ** 2), out  # what padding says is nobody's business

    (_, out), gradient = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return out[:, :180], *gradient


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_splash_says_what_xla_says_with_its_gradient(interpreted, arrays, kind):
    got, expected = (value_and_gradient(arrays, kernel, **KINDS[kind]) for kernel in ("splash", "xla"))
    for one, other in zip(got, expected, strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["cudnn", "cudnn_masked"])
@pytest.mark.parametrize("kind", [{}, {"segments_BT": SEGMENTS}, {"segments_BT": SEGMENTS, "window": 30}])
def test_cudnn_is_asked_for_what_xla_says(monkeypatch, arrays, kernel, kind):
    """No GPU here: the same calls, answered by XLA."""
    asked = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **kw: asked(*a, **kw | {"implementation": "xla"}))
    monkeypatch.setattr(cudnn, "dot_product_attention", cudnn_in_words)
    got, expected = (value_and_gradient(arrays, one, **kind) for one in (kernel, "xla"))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [125, 126])
def test_cudnn_with_a_mask_gets_rows_of_even_lengths(monkeypatch, arrays, length):
    """It refuses others in training; what is there is met all the same."""
    asked, lengths = jax.nn.dot_product_attention, []

    def play(*given, **kind):
        lengths.append(given[0].shape[1])
        return asked(*given, **kind | {"implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", play)
    q, keys, values = arrays
    arrays = q[:, :length], keys[..., :length], values[:, :, :length]
    segments = SEGMENTS[:, :length]
    got, expected = (value_and_gradient(arrays, one, segments_BT=segments) for one in ("cudnn_masked", "xla"))
    assert set(lengths) == {126}
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5, rtol=1e-4)


def test_cudnn_is_told_where_segments_begin():
    """In no more places than asked, which is one more than there are trees where a row has padding."""
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3]])
    np.testing.assert_array_equal(places_of(segments, 3)[0], [[0, 2, 5], [0, -1, -1]])
    starts, lengths = places_of(segments, 6)
    np.testing.assert_array_equal(starts, [[0, 2, 5, -1, -1, -1], [0, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[2, 3, 1, -1, -1, -1], [6, -1, -1, -1, -1, -1]])


@pytest.mark.slow
def test_splash_on_eight_devices_says_what_one_device_says(interpreted):
    params = init_params(ARCH, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 128), 0, 64)
    positions = jnp.broadcast_to(jnp.arange(128), tokens.shape)

    def loss(params, kernel):
        hidden, _ = forward(params, ARCH, tokens, positions, segments_BT=1 + positions // 64, kernel=kernel)
        return jnp.mean(logits(params, ARCH, hidden) ** 2)

    expected = jax.grad(partial(loss, kernel="xla"))(params)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        got = jax.jit(jax.grad(partial(loss, kernel="splash")))(params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-3), got, expected)


def test_a_kernel_that_cannot_run_here_is_one_line():
    mesh = make_mesh(MeshConfig())
    assert choose_kernel("auto", mesh, ARCH, "float32") == choose_kernel("xla", mesh, ARCH, "float32") == "xla"
    with pytest.raises(UserError, match=r"model.attention: splash runs on tpu only, and this is cpu; use auto"):
        choose_kernel("splash", mesh, ARCH, "float32")
    with pytest.raises(UserError, match=r"model.attention: cudnn runs on gpu only"):
        choose_kernel("cudnn", mesh, ARCH, "bfloat16")


@pytest.mark.parametrize(
    "capability, dtype, arch, kernel",
    [
        ("9.0", "bfloat16", {}, "cudnn"),
        ("8.0", "bfloat16", {}, "cudnn_masked"),
        ("7.5", "bfloat16", {}, "a GPU of compute capability 8 or more"),
        ("9.0", "float32", {}, "dtype bfloat16"),
        ("9.0", "bfloat16", {"head_size": 256}, "heads of at most 128"),
        ("9.0", "bfloat16", {"attention_cap": 50.0}, "scores without a cap"),
        ("9.0", "bfloat16", {"window": 9, "local_layers": (True, False) * 2}, "layers of one kind"),
        ("gfx942", "bfloat16", {}, "a GPU of compute capability 8 or more"),
    ],
)
def test_a_gpu_has_cudnn_for_what_it_knows(capability, dtype, arch, kernel):
    device = SimpleNamespace(platform="gpu", compute_capability=capability)
    mesh = SimpleNamespace(devices=np.array([device]))
    arch = dataclasses.replace(ARCH, **arch)
    if kernel.startswith("cudnn"):
        assert choose_kernel("auto", mesh, arch, dtype) == choose_kernel("cudnn", mesh, arch, dtype) == kernel
        return
    assert choose_kernel("auto", mesh, arch, dtype) == "xla"
    with pytest.raises(UserError, match=f"model.attention: cudnn needs {kernel}"):
        choose_kernel("cudnn", mesh, arch, dtype)


@functools.cache
def compiled_gradient(remat):
    arch = dataclasses.replace(ARCH, layers=8, hidden=512, head_size=64, ffn=1024)
    arch = dataclasses.replace(arch, window=300, local_layers=(True, False) * 4, attention_cap=50.0)
    return compile_gradient(arch, "v5e:2x2", MeshConfig(data=1, fsdp=2, tensor=2), 1024, remat)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize(("remat", "kernels"), [("none", 3), ("cheap", 3), ("all", 4)])
def test_the_gradient_compiles_for_tpu_and_runs_again_what_its_policy_says(remat, kernels):
    """Splash has a forward and two backward kernels; all but cheap's rematerialisation runs the forward one again."""
    text = compiled_gradient(remat).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * kernels  # of local layers and of global ones


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_rematerialisation_frees_memory_on_tpu_and_offloading_uses_the_hosts():
    memory = {remat: compiled_gradient(remat).memory_analysis() for remat in ("none", "cheap", "all", "offload")}
    for remat in ("cheap", "all", "offload"):
        assert memory[remat].temp_size_in_bytes < memory["none"].temp_size_in_bytes / 3
        assert (memory[remat].host_temp_size_in_bytes > 0) == (remat == "offload")
