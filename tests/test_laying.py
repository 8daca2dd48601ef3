"""Weights as they are laid for sampling: matrices of two axes, and 8 bits, say what the weights themselves say."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_sampling import ARCH, CONFIG, MESHES, PARAMS, STOPS, assert_same, one_device, requests, run

from pkv.config import ConfigError, LoraConfig, parse_config
from pkv.grpo.logprobs import token_logprobs
from pkv.mesh import make_mesh
from pkv.model import forward, freezer, init_adapters, init_params, join
from pkv.model.linear import Flat, dense
from pkv.model.lora import INPUTS
from pkv.sampling import Engine

EIGHT_BIT = dataclasses.replace(CONFIG, weights="int8")
TWO = [("all", True), ("more devices than key-value heads", False)]
FEW_HEADS = dataclasses.replace(ARCH, heads=6, kv_heads=3)  # which two devices don't divide: left whole on each


def decoded(path, w: jax.Array) -> jax.Array:
    """By hand: a matrix of [layers, *in, *out] rounded to 255 steps an output, the largest number at the last."""
    inputs = INPUTS.get(path[-1].key)
    if inputs is None:
        return w
    array = np.asarray(w, np.float64)
    steps = np.abs(array).max(axis=tuple(range(1, 1 + inputs)), keepdims=True) / 127
    return jnp.asarray(np.round(array / steps) * steps, jnp.float32)


@partial(jax.jit, static_argnums=1)
def computed(params, arch, tokens):
    hidden, _ = forward(params, arch, tokens[:, :-1], jnp.arange(tokens.shape[1] - 1)[None])
    return token_logprobs(params, arch, hidden, tokens[:, 1:])[0][0]


def said_of(params, arch, asked, done) -> np.ndarray:
    """The trainer's log-probabilities of a completion's tokens; padded on the right to one shape."""
    prompt = asked[done.request].prompt
    whole = np.zeros((1, 64), np.int32)
    whole[0, : len(prompt) + len(done.tokens)] = np.concatenate([prompt, done.tokens])
    return np.asarray(computed(params, arch, whole))[len(prompt) - 1 :][: len(done.tokens)]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "stacked"), [(None, False), (None, True), *TWO])
def test_flat_matrices_say_the_same(monkeypatch, mesh, stacked):
    monkeypatch.setattr("pkv.sampling.laying.UNROLL", 0 if stacked else 8)
    where = make_mesh(MESHES[mesh]) if mesh else one_device()
    plain = run(mesh=where)
    monkeypatch.setattr("pkv.sampling.laying.FLAT_ON", ("cpu",))
    monkeypatch.setattr("pkv.sampling.laying.Lay.lies_right", lambda *_: False)  # as in 32 bits on one device they do
    layers = Engine(ARCH, CONFIG, STOPS, where).load(PARAMS)["layers"]
    assert isinstance(layers["ffn"]["up"] if stacked else layers[0]["ffn"]["up"], Flat)
    assert_same(plain, run(mesh=where))


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, EIGHT_BIT], ids=["plain", "int8"])
def test_layers_apart_are_flat_too(monkeypatch, config):
    """As a small model lies on a TPU; with adapters, over a mesh, each layer's parts go apart together."""
    base = init_params(ARCH, jax.random.key(0))
    adapters = jax.tree.map(lambda a: a + 0.05, init_adapters(ARCH, LoraConfig(rank=2), jax.random.key(3)))
    for mesh in (one_device(), make_mesh(MESHES["all"])):
        rounded = jax.tree_util.tree_map_with_path(decoded, base) if config is EIGHT_BIT else base
        expected = run(params=join(adapters, rounded), mesh=mesh)
        with monkeypatch.context() as patch:
            patch.setattr("pkv.sampling.programs.form_of", lambda *_, **__: "apart")
            patch.setattr("pkv.sampling.laying.FLAT_ON", ("cpu",))
            engine = Engine(ARCH, config, STOPS, mesh)
            weights = join(engine.load(adapters), engine.load(base))
            assert isinstance(weights["layers"][0]["attention"]["q"].base, Flat)
            assert_same(expected, {(c.request, c.sample): c for c in engine.sample(weights, requests())})


@pytest.mark.slow
def test_heads_that_the_mesh_does_not_divide_are_flat_and_whole(monkeypatch):
    params = init_params(FEW_HEADS, jax.random.key(1))
    plain = run(arch=FEW_HEADS, params=params)
    monkeypatch.setattr("pkv.sampling.laying.FLAT_ON", ("cpu",))
    monkeypatch.setattr("pkv.sampling.laying.UNROLL", 0)
    assert_same(plain, run(arch=FEW_HEADS, params=params, mesh=make_mesh(MESHES["all"])))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "stacked"), [(None, False), (None, True), ("all but sequence", True), *TWO])
def test_eight_bits_are_sampled_from_as_they_decode(monkeypatch, mesh, stacked):
    monkeypatch.setattr("pkv.sampling.laying.UNROLL", 0 if stacked else 8)
    asked, rounded = requests(), jax.tree_util.tree_map_with_path(decoded, PARAMS)
    found = run(EIGHT_BIT, asked, mesh=make_mesh(MESHES[mesh]) if mesh else None)
    assert_same(run(params=rounded), found)
    for done in found.values():
        np.testing.assert_allclose(done.policy_logprobs, said_of(rounded, ARCH, asked, done), atol=1e-4)


def test_eight_bits_are_near_and_a_fourth_of_the_memory():
    asked = requests()
    off = [done.policy_logprobs - said_of(PARAMS, ARCH, asked, done) for done in run(EIGHT_BIT, asked).values()]
    off = np.abs(np.concatenate(off))  # nats, of random weights whose logits have a deviation of 3
    assert 0 < off.mean() < 0.05 and off.max() < 0.5
    for layer in Engine(ARCH, EIGHT_BIT, STOPS, one_device()).load(PARAMS)["layers"]:
        gate = layer["ffn"]["gate"]
        assert (gate.table.dtype, gate.table.shape, gate.steps.shape) == ("int8", (16, 32), (32,))


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 10])
def test_an_adapter_lies_over_a_base_in_eight_bits(layers):
    arch = dataclasses.replace(ARCH, layers=layers)
    base = init_params(arch, jax.random.key(0))
    adapters = init_adapters(arch, LoraConfig(rank=4, alpha=8.0), jax.random.key(2))
    adapters = jax.tree.map(lambda a: a + 0.05, adapters)  # B is zero at first
    engine, asked = Engine(arch, EIGHT_BIT, STOPS, one_device()), requests()
    weights = join(engine.load(adapters), engine.load(base))
    whole = join(adapters, jax.tree_util.tree_map_with_path(decoded, base))
    found = list(engine.sample(weights, asked))
    for done in found:
        np.testing.assert_allclose(done.policy_logprobs, said_of(whole, arch, asked, done), atol=1e-4)
    together = engine.load(join(adapters, base))  # as an evaluation has them
    assert_same(*({(c.request, c.sample): c for c in all_} for all_ in (found, engine.sample(together, asked))))


def test_a_base_that_lies_right_stays_where_it_is_and_as_it_is(monkeypatch):
    """It is shared with the trainer: a flat copy would cost as much again."""
    monkeypatch.setattr("pkv.sampling.laying.FLAT_ON", ("cpu",))
    arch = dataclasses.replace(ARCH, layers=10)
    base = init_params(arch, jax.random.key(0))
    loaded = Engine(arch, CONFIG, STOPS, one_device()).load(base)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, loaded, base))


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize(("shape", "inputs"), [((3, 7, 4, 5), 1), ((3, 4, 5, 7), 2), ((3, 7, 9), 1)])
def test_a_flat_matrix_by_hand(shape, inputs, eight_bit):
    draw = np.random.default_rng(0)
    w = draw.normal(size=shape).astype(np.float32) * draw.uniform(0.1, 9, (1, *shape[1:])).astype(np.float32)
    w[..., -1] = 0  # an output that sums nothing
    flat = Flat.of(jnp.asarray(w), inputs, "float32", eight_bit=eight_bit)
    x = draw.normal(size=(2, 3, *shape[1 : 1 + inputs])).astype(np.float32)
    axes = (list(range(2, 2 + inputs)), list(range(inputs)))
    for layer in range(3):
        exact = np.tensordot(x, w[layer], axes=axes)
        found = np.asarray(dense(jnp.asarray(x), flat[layer], inputs))
        step = np.abs(w[layer]).max(axis=tuple(range(inputs))) / 127 if eight_bit else np.float32(0)
        most = np.abs(x).sum(axis=tuple(range(2, 2 + inputs)))
        most = most.reshape(2, 3, *(1,) * (exact.ndim - 2)) * step / 2 + 1e-4
        assert found.shape == exact.shape and (np.abs(found - exact) <= most).all()
        assert (found[..., -1] == 0).all()


def test_a_base_in_few_bits_takes_no_weights_in_eight():
    config = {
        "model": {"path": "x", "lora": {"rank": 4, "base": "nf4"}},
        "sampling": {"weights": "int8"},
        "rounds": [{"name": "only", "steps": 1}],
    }
    with pytest.raises(ConfigError, match=r"sampling.weights: model.lora.base is nf4"):
        parse_config(config)
    frozen = jax.tree_util.tree_map_with_path(
        lambda path, w: freezer(ARCH, "int8")(jax.tree_util.keystr(path, simple=True, separator="."), w), PARAMS
    )
    flat = Engine(ARCH, EIGHT_BIT, STOPS, one_device()).load(frozen)  # by hand it can be asked, and changes nothing
    assert flat["layers"][0]["ffn"]["up"].codes.dtype == "int8"
