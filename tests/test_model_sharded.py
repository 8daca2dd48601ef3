"""One device and eight give the same weights, loss, gradient and decoding, under every mesh and both rule tables."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkv.config import MeshConfig
from pkv.mesh import SAMPLING_RULES, TRAINING_RULES, batch_sharding, make_mesh, shardings
from pkv.model import Arch, forward, init_cache, init_params, logits, param_axes, param_shapes

SMALL = {"vocab_size": 64, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "ffn": 48}
ARCHES = {
    "plain": Arch(**SMALL, qkv_bias=True, init_std=0.2),
    "local and global": Arch(
        **SMALL,
        window=3,
        local_layers=(True, False),
        local_rope_theta=100.0,
        rotary_share=0.5,
        attention_cap=3.0,
        post_norms=True,
        qk_norm=True,
        init_std=0.2,
    ),
}
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=4, tensor=2),
    "more than key-value heads": MeshConfig(data=2, tensor=4),
    "sequence": MeshConfig(data=2, sequence=2, tensor=2),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}
TOKENS = jax.random.randint(jax.random.key(5), (8, 10), 0, 64)
POSITIONS = jnp.broadcast_to(jnp.arange(10), (8, 10))


# "all" has every axis in it; the others, one axis at a time, tell where a failure comes from.
@pytest.fixture(params=[name if name == "all" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES])
def mesh(request):
    assert len(jax.devices()) == 8
    return make_mesh(MESHES[request.param])


@pytest.fixture(scope="module", params=ARCHES)
def arch(request):
    return ARCHES[request.param]


def loss(params, arch, tokens, positions):
    scores = logits(params, arch, forward(params, arch, tokens, positions, remat="all")[0])
    chances = jax.nn.log_softmax(scores[:, :-1])
    return -jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1).mean()


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def params(arch):
    return init_params(arch, jax.random.key(0))


@pytest.fixture(scope="module")
def alone(arch, params):
    """Loss and gradient on one device."""
    return jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, arch, TOKENS, POSITIONS)


def test_weights_are_the_same_on_every_mesh(mesh, arch, params):
    spread = init_params(arch, jax.random.key(0), mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, spread, params)
    expected = shardings(param_axes(arch), param_shapes(arch), mesh, TRAINING_RULES)
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), spread, expected))


@pytest.mark.parametrize("ambient", [True, False])
def test_loss_and_gradient_are_equal_for_one_and_eight_devices(mesh, ambient, arch, params, alone):
    spread = jax.device_put(params, shardings(param_axes(arch), params, mesh, TRAINING_RULES))
    rows = jax.device_put((TOKENS, POSITIONS), batch_sharding(mesh))
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(spread, arch, *rows)
    assert alone[0] > 1
    close(value, alone[0])
    jax.tree.map(close, gradient, alone[1])


def test_decoding_is_equal_for_one_and_eight_devices(mesh, arch, params):
    def step(params, cache, tokens, positions):
        hidden, cache = forward(params, arch, tokens, positions, cache=cache)
        return logits(params, arch, hidden), cache

    def run(params, cache):
        _, cache = jax.jit(step)(params, cache, TOKENS[:, :6], POSITIONS[:, :6])
        return jax.jit(step, donate_argnums=1)(params, cache, TOKENS[:, 6:7], POSITIONS[:, 6:7])[0]

    cache = init_cache(arch, 8, 10)
    expected = run(params, cache)
    params = jax.device_put(params, shardings(param_axes(arch), params, mesh, SAMPLING_RULES))
    axes = {"k": ("layers", "rows", "kv_heads", "head", "time"), "v": ("layers", "rows", "kv_heads", "time", "head")}
    cache = jax.device_put(init_cache(arch, 8, 10), shardings(axes, cache, mesh, SAMPLING_RULES))
    close(run(params, cache), expected)
