"""One device and eight give the same weights, loss, gradient and decoding, under every mesh and both rule tables."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkv.config import MeshConfig
from pkv.mesh import SAMPLING_RULES, TRAINING_RULES, batch_sharding, make_mesh, shardings
from pkv.model import Arch, cache_axes, forward, init_cache, init_params, logits, param_axes, param_shapes

ARCH = Arch(vocab_size=64, hidden=32, layers=2, heads=4, kv_heads=2, head_size=8, ffn=48, qkv_bias=True, init_std=0.2)
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=4, tensor=2),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}
TOKENS = jax.random.randint(jax.random.key(5), (8, 10), 0, 64)
POSITIONS = jnp.broadcast_to(jnp.arange(10), (8, 10))


# "all" has every axis in it; the others, one axis at a time, tell where a failure comes from.
@pytest.fixture(params=[name if name == "all" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES])
def mesh(request):
    assert len(jax.devices()) == 8
    return make_mesh(MESHES[request.param])


def loss(params, tokens, positions):
    scores = logits(params, ARCH, forward(params, ARCH, tokens, positions, remat="layer")[0])
    chances = jax.nn.log_softmax(scores[:, :-1])
    return -jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1).mean()


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def params():
    return init_params(ARCH, jax.random.key(0))


@pytest.fixture(scope="module")
def alone(params):
    """Loss and gradient on one device."""
    return jax.jit(jax.value_and_grad(loss))(params, TOKENS, POSITIONS)


def test_weights_are_the_same_on_every_mesh(mesh, params):
    spread = init_params(ARCH, jax.random.key(0), mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, spread, params)
    expected = shardings(param_axes(ARCH), param_shapes(ARCH), mesh, TRAINING_RULES)
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), spread, expected))


@pytest.mark.parametrize("ambient", [True, False])
def test_loss_and_gradient_are_equal_for_one_and_eight_devices(mesh, ambient, params, alone):
    spread = jax.device_put(params, shardings(param_axes(ARCH), params, mesh, TRAINING_RULES))
    rows = jax.device_put((TOKENS, POSITIONS), batch_sharding(mesh))
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        value, gradient = jax.jit(jax.value_and_grad(loss))(spread, *rows)
    assert alone[0] > 1
    close(value, alone[0])
    jax.tree.map(close, gradient, alone[1])


def test_decoding_is_equal_for_one_and_eight_devices(mesh, params):
    def step(params, cache, tokens, positions):
        hidden, cache = forward(params, ARCH, tokens, positions, cache=cache)
        return logits(params, ARCH, hidden), cache

    def run(params, cache):
        _, cache = jax.jit(step)(params, cache, TOKENS[:, :6], POSITIONS[:, :6])
        return jax.jit(step, donate_argnums=1)(params, cache, TOKENS[:, 6:7], POSITIONS[:, 6:7])[0]

    cache = init_cache(ARCH, 8, 10)
    expected = run(params, cache)
    params = jax.device_put(params, shardings(param_axes(ARCH), params, mesh, SAMPLING_RULES))
    cache = jax.device_put(init_cache(ARCH, 8, 10), shardings(cache_axes(ARCH), cache, mesh, SAMPLING_RULES))
    close(run(params, cache), expected)
