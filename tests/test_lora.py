"""Adapters beside frozen weights: nothing but the adapter is trained or kept for it, and the base is only rounded."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkv.config import LoraConfig, MeshConfig, ModelConfig, OptimizerConfig, PolicyLoss, SamplingConfig, UserError
from pkv.grpo import Layout, Learner, Sequence, pack, reference_weights
from pkv.grpo.logprobs import token_logprobs
from pkv.grpo.losses import Supervised
from pkv.mesh import TRAINING_RULES, make_mesh, shardings
from pkv.model import (
    Arch,
    forward,
    freezer,
    init_adapters,
    init_params,
    join,
    load_params,
    logits,
    param_axes,
    param_shapes,
    save_params,
    split,
    weight_axes,
)
from pkv.model.layout import by_path
from pkv.model.linear import NF4, Adapted, Quantised, dense, quantise
from pkv.sampling import Engine, Request, row_keys

ARCH = Arch(
    vocab_size=48, hidden=128, layers=2, heads=4, kv_heads=2, head_size=8, ffn=128, qkv_bias=True, tied_embeddings=True,
    init_std=0.05,
)  # fmt: skip
LORA = LoraConfig(rank=4, alpha=8.0)
BASES = ("float32", "bfloat16", "int8", "nf4")
SOME_SLOW = [base if base == "nf4" else pytest.param(base, marks=pytest.mark.slow) for base in BASES]
KEY = jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(1), (3, 12), 0, 48)
POSITIONS = jnp.broadcast_to(jnp.arange(12), (3, 12))


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@cache
def frozen(base: str, arch: Arch = ARCH, mesh=None):
    """A base of LoRA: a dtype, or a way to quantise what is in float32 otherwise."""
    dtype, kind = (base, "plain") if "float" in base else ("float32", base)
    keep, whole = freezer(arch, kind, mesh), init_params(arch, KEY, dtype, mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, weight: keep(jax.tree_util.keystr(path, simple=True, separator="."), weight), whole
    )


def adapters(arch: Arch = ARCH):
    """Adapters that change something: B drawn too."""

    def drawn(node):
        return dataclasses.replace(node, b=0.05 * jax.random.normal(jax.random.key(7), node.b.shape))

    return jax.tree.map(drawn, init_adapters(arch, LORA, KEY), is_leaf=lambda node: isinstance(node, Adapted))


@jax.jit
def scores(params):
    return logits(params, ARCH, forward(params, ARCH, TOKENS, POSITIONS)[0])


def equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def sequences(count: int = 6) -> list[Sequence]:
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        prompt, response = (draw.integers(0, 48, size).astype(np.int32) for size in draw.integers(3, 12, 2))
        advantages, logprobs = draw.normal(size=len(response)), -draw.random(len(response)) - 3
        found.append(Sequence(prompt, response, advantages.astype(np.float32), logprobs.astype(np.float32)))
    return found


def learner(base, mesh=None, **model) -> Learner:
    return Learner(ARCH, ModelConfig(**model), OptimizerConfig(), mesh or one_device(), base)


# Few bits.


@pytest.mark.parametrize("axis", [-3, -2, -1])
@pytest.mark.parametrize(("kind", "bound", "bits"), [("int8", 1 / 254, 8.5), ("nf4", 0.152, 4.5)])
def test_quantised_numbers_are_off_by_no_more_than_is_said_and_take_the_bits_that_they_should(axis, kind, bound, bits):
    weight = jax.random.normal(KEY, (128, 192, 64)) * jax.random.normal(jax.random.key(1), (128, 1, 64))
    found = quantise(weight, axis, kind)
    at = weight.ndim + axis
    blocks = (*weight.shape[:at], weight.shape[at] // 64, 64, *weight.shape[at + 1 :])
    error = jnp.abs(found.astype(jnp.float32) - weight).reshape(blocks).max(axis=at + 1)
    assert jnp.all(error <= bound * found.scales * 1.001)
    assert error.max() > 0.5 * bound * found.scales.max(), "the bound says something"
    assert sum(array.nbytes for array in jax.tree.leaves(found)) * 8 == bits * weight.size


def test_the_sixteen_values_and_zero_come_back_exactly():
    values = jnp.tile(jnp.array(NF4), 4).reshape(1, 64) * jnp.array([[0.5], [3.0], [0.0]])
    equal(quantise(values, -1, "nf4").astype(jnp.float32), values)
    equal(quantise(jnp.zeros((2, 64)), -1, "int8").astype(jnp.float32), jnp.zeros((2, 64)))


def test_a_layer_of_a_quantised_stack_is_the_layer_quantised():
    stack = jax.random.normal(KEY, (3, 128, 4, 8))
    for kind in ("int8", "nf4"):
        equal(quantise(stack, -3, kind)[1], quantise(stack[1], -3, kind))
        assert quantise(stack, -3, kind).ndim == stack.ndim


def test_an_axis_that_64_does_not_divide_has_smaller_blocks():
    found = quantise(jax.random.normal(KEY, (48, 5)), -2, "nf4")
    assert found.scales.shape == (3, 5) and found.astype(jnp.float32).shape == (48, 5)


@pytest.mark.parametrize(("base", "most"), [("bfloat16", 0.01), ("int8", 0.02), ("nf4", 0.2)])
def test_a_model_in_few_bits_says_nearly_the_same(base, most):
    exact, found = scores(init_params(ARCH, KEY)), scores(frozen(base))
    error = jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)
    assert 0 < error < most


def test_only_the_layers_matrices_are_quantised():
    kinds = {path: type(w).__name__ for path, w in flat(frozen("nf4")).items()}
    matrices = {f"attention.{n}" for n in "qkvo"} | {f"ffn.{n}" for n in ("gate", "up", "down")}
    assert {path for path, kind in kinds.items() if kind == "Quantised"} == {f"layers.{name}" for name in matrices}


def flat(params):
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda n: isinstance(n, Quantised | Adapted))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def test_loading_quantises_layer_by_layer_and_lets_each_go(tmp_path):
    arch = dataclasses.replace(ARCH, layers=4, ffn=1024, vocab_size=48)
    save_params(init_params(arch, KEY), arch, tmp_path)
    before = sum(array.nbytes for array in jax.live_arrays())
    keep = freezer(arch, "nf4")
    seen, peaks = [], []

    def watched(path, weight):
        seen.append(path)
        peaks.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        return keep(path, weight)

    loaded = load_params(tmp_path, arch, "bfloat16", keep=watched)
    assert set(seen) == set(by_path(param_shapes(arch)))
    assert seen.count("layers.ffn.up") == arch.layers and seen.count("embedding") == 1
    biggest, whole = (2 * f([s.size for s in jax.tree.leaves(param_shapes(arch))]) for f in (max, sum))
    left = sum(array.nbytes for array in jax.tree.leaves(loaded))
    assert left < 0.4 * whole
    assert max(peaks) < left + 1.3 * biggest / arch.layers, "beside what is kept, one layer of one weight"
    whole = init_params(arch, KEY, "bfloat16")
    equal(loaded["layers"]["ffn"]["up"], keep("layers.ffn.up", whole["layers"]["ffn"]["up"]))
    equal(loaded["embedding"], whole["embedding"])


# Adapters.


@pytest.mark.parametrize("base", BASES)
def test_a_fresh_adapter_changes_nothing_at_all(base):
    weights = frozen(base)
    equal(scores(join(init_adapters(ARCH, LORA, KEY), weights)), scores(weights))


def test_an_adapter_adds_what_its_matrices_multiply_to():
    whole = join(adapters(), frozen("float32"))
    merged = jax.tree.map(lambda node: node.astype(jnp.float32), whole, is_leaf=lambda node: isinstance(node, Adapted))
    o = whole["layers"]["attention"]["o"]
    by_hand = np.einsum("lnhr,lrd->lnhd", o.a, o.b) * 2.0 + np.asarray(o.base)  # alpha 8 over rank 4
    np.testing.assert_allclose(merged["layers"]["attention"]["o"], by_hand, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores(whole), scores(merged), rtol=1e-4, atol=1e-4)
    assert np.abs(scores(merged) - scores(split(whole)[1])).max() > 0.1


def test_the_gradient_of_an_adapter_is_the_merged_weights_projected():
    base = jax.random.normal(KEY, (4, 3, 10))
    a, b = jax.random.normal(jax.random.key(1), (4, 3, 2)), jax.random.normal(jax.random.key(2), (2, 10))
    x, wanted = jax.random.normal(jax.random.key(3), (2, 5, 4, 3)), jax.random.normal(jax.random.key(4), (2, 5, 10))

    def loss(weight):
        return jnp.mean((dense(x, weight, inputs=2) - wanted) ** 2)

    found = jax.grad(lambda a, b: loss(Adapted(base, a, b, 0.5)), argnums=(0, 1))(a, b)
    full = jax.grad(loss)(base + 0.5 * jnp.tensordot(a, b, axes=1))
    np.testing.assert_allclose(found[0], 0.5 * jnp.einsum("nhd,rd->nhr", full, b), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[1], 0.5 * jnp.einsum("nhr,nhd->rd", a, full), rtol=1e-4, atol=1e-6)


def test_split_and_join_are_inverse_and_the_base_is_the_reference_model():
    weights, trained = frozen("nf4"), adapters()
    whole = join(trained, weights)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, (trained, weights), split(whole)))
    plain = init_params(ARCH, KEY)
    assert split(plain) == (plain, None) and join(plain, None) is plain


def test_a_matrix_in_few_bits_without_an_adapter_is_frozen_whole():
    few = init_adapters(ARCH, dataclasses.replace(LORA, targets=("q",)), KEY)
    trained, base = split(join(few, frozen("nf4")))
    assert jax.tree.structure(trained) == jax.tree.structure(few)
    equal(base, frozen("nf4"))
    state = learner("nf4").init(join(few, frozen("nf4")))
    assert {name.rpartition(".")[2] for name in flat(state.params)} == {"q"}


def test_an_adapters_draw_depends_on_the_key_and_its_weights_name_only():
    found, few = (flat(init_adapters(ARCH, dataclasses.replace(LORA, targets=t), KEY)) for t in (LORA.targets, ("up",)))
    assert set(few) == {"layers.ffn.up"} and len(found) == 7
    equal(few["layers.ffn.up"], found["layers.ffn.up"])
    assert not np.array_equal(found["layers.ffn.up"].a, found["layers.ffn.gate"].a)
    for node in found.values():
        inputs = np.prod(node.a.shape[1:-1])
        assert not node.b.any() and 0.9 < np.abs(node.a).max() * inputs**0.5 <= 1
        assert node.a.dtype == node.b.dtype == jnp.float32


def test_adapters_lie_where_their_weights_do():
    axes = weight_axes(join(adapters(), frozen("nf4")), ARCH)
    o, gate = axes["layers"]["attention"]["o"], axes["layers"]["ffn"]["gate"]
    assert o.a == ("layers", "heads", "head", "rank") and o.b == ("layers", "rank", "embed")
    assert o.base.codes == ("layers", "heads", "head", "block", "embed")
    assert o.base.scales == ("layers", "heads", "head", "embed")
    assert gate.a == ("layers", "embed", "rank") and gate.b == ("layers", "rank", "ffn")
    assert gate.base.codes == ("layers", "embed", "block", "ffn")
    assert weight_axes(init_params(ARCH, KEY), ARCH) == param_axes(ARCH)


def test_blocks_that_the_mesh_does_not_divide_are_an_error_with_the_weights_name():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with pytest.raises(UserError, match=r"layers\.attention\.\w\.codes: embed=2 .* not divisible by 8 \(fsdp=8\)"):
        frozen("nf4", mesh=mesh)


# Training.


@cache
def train(base: str, mesh=None, steps: int = 1, loss=None, **model):
    """The adapters after some steps from fresh ones, the statistics of each step, and the base before and after."""
    mesh = mesh or one_device()
    weights = frozen(base, mesh=mesh)
    trainer, before = learner(weights, mesh, **model), jax.device_get(weights)
    state = trainer.init(join(init_adapters(ARCH, LORA, KEY, mesh), weights))
    batches = pack(sequences(), Layout(64, 4, rows_multiple=mesh.shape["data"] * mesh.shape["fsdp"]))
    seen = []
    for _ in range(steps):
        state, statistics = trainer.update(state, [batches], loss or CLIPPED, 1e-2)
        seen.append(statistics)
    return state, seen, before, weights


CLIPPED = PolicyLoss()


@pytest.mark.parametrize("base", SOME_SLOW)
def test_an_adapter_learns_by_heart_and_its_base_stays_as_it_is(base):
    state, seen, before, after = train(base, steps=60, loss=Supervised())
    assert seen[-1]["loss"] < 0.5 * seen[0]["loss"]
    equal(before, jax.device_get(after))
    assert set(flat(state.params)) == {name for name in flat(before) if name.rpartition(".")[2] in LORA.targets}


@pytest.mark.parametrize("base", [pytest.param("float32", marks=pytest.mark.slow), "nf4"])
def test_the_reference_is_the_model_without_its_adapters(base):
    weights = frozen(base)
    whole = join(init_adapters(ARCH, LORA, KEY), weights)
    reference = reference_weights(whole, "float32")
    assert reference is not whole and jax.tree.leaves(reference)[0] is jax.tree.leaves(weights)[0], "not copied"
    trainer = Learner(ARCH, ModelConfig(), OptimizerConfig(), one_device(), weights, reference)
    state, batches, seen = trainer.init(whole), pack(sequences(), Layout(64, 4)), []
    for _ in range(3):
        state, statistics = trainer.update(state, [batches], PolicyLoss(kl_weight=0.01), 1e-2)
        seen.append(statistics["kl_reference"])
    assert seen[0] == pytest.approx(0, abs=1e-6) and seen[2] > 1e-4, "fresh adapters change nothing, trained ones do"


@pytest.mark.parametrize("base", [pytest.param("float32", marks=pytest.mark.slow), "nf4"])
def test_one_and_eight_devices_are_equal(base):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    (alone, seen, *_), (spread, seen8, _, base8) = train(base), train(base, mesh)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5), alone.params, spread.params)
    assert seen[0] == pytest.approx(seen8[0], rel=1e-3, abs=1e-5)
    up = spread.params["layers"]["ffn"]["up"]
    assert {shard.data.shape for shard in up.a.addressable_shards} == {(2, 64, 4)}
    assert {shard.data.shape for shard in up.b.addressable_shards} == {(2, 4, 64)}
    if base == "nf4":
        codes = base8["layers"]["ffn"]["up"].codes
        assert {shard.data.shape for shard in codes.addressable_shards} == {(2, 1, 32, 64)}


@pytest.mark.slow
def test_remat_changes_nothing():
    (plain, _, *_), (again, _, *_) = train("nf4"), train("nf4", remat="all")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5), plain.params, again.params)


def test_the_optimizer_keeps_two_numbers_for_each_of_the_adapters_and_none_for_the_base():
    base = frozen("int8")
    state = learner(base).init(join(init_adapters(ARCH, LORA, KEY), base))
    size = sum(array.size for array in jax.tree.leaves(init_adapters(ARCH, LORA, KEY)))
    moments = sum(array.nbytes for array in jax.tree.leaves(state.optimizer) if array.ndim)
    assert moments == 2 * 4 * size
    assert sum(array.nbytes for array in jax.tree.leaves(state.params)) == 4 * size


@pytest.mark.parametrize("remat", ["none", "cheap", "all"])
def test_the_backward_pass_keeps_neither_the_decoded_base_nor_a_copy_of_its_codes(remat):
    arch = dataclasses.replace(ARCH, hidden=256, ffn=1024)
    weights, trained = frozen("nf4", arch), adapters(arch)

    def loss(trained, weights):
        one = TOKENS[:1, :1], POSITIONS[:1, :1]  # so that activations are small beside the weights
        return forward(join(trained, weights), arch, *one, remat=remat)[0].sum()

    program = jax.make_jaxpr(jax.grad(loss))(trained, weights)
    first = next(step for step in program.eqns if step.primitive.name == "scan")
    kept = sum(out.aval.size * out.aval.dtype.itemsize for out in first.outvars)
    codes = [w.codes for w in flat(weights).values() if isinstance(w, Quantised)]
    assert kept < 0.3 * sum(array.nbytes for array in codes)


# Sampling.


@pytest.mark.parametrize("base", SOME_SLOW)
@pytest.mark.parametrize("layers", [pytest.param(2, marks=pytest.mark.slow), 10])  # unrolled, and scanned
def test_the_sampler_says_what_the_trainer_computes(base, layers):
    arch = dataclasses.replace(ARCH, layers=layers, init_std=0.1)
    engine = Engine(arch, SamplingConfig(slots=8, segment=4, page_tokens=16), (3,), one_device())
    weights, trained = frozen(base, arch), adapters(arch)
    prompt = np.array([5, 9, 11], np.int32)
    asked = [Request(prompt, row_keys(0, "test", 0, ["p"], 2)[0], 6)]
    for done in engine.sample(join(engine.load(trained), engine.load(weights)), asked):
        whole = jnp.asarray(np.concatenate([prompt, done.tokens]))[None]
        params = join(trained, weights)
        expected = computed(params, arch, whole)[len(prompt) - 1 :]
        np.testing.assert_allclose(done.logprobs, expected, atol=2e-5)


@partial(jax.jit, static_argnums=1)
def computed(params, arch, tokens):
    hidden, _ = forward(params, arch, tokens[:, :-1], jnp.arange(tokens.shape[1] - 1)[None])
    return token_logprobs(params, arch, hidden, tokens[:, 1:])[0][0]


def test_sampling_copies_no_base_that_lies_right_and_decodes_none_in_few_bits():
    arch = dataclasses.replace(ARCH, layers=10)
    weights = frozen("int8", arch)
    loaded = Engine(arch, SamplingConfig(), (3,), one_device()).load(weights)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, loaded, weights))
    small = Engine(ARCH, SamplingConfig(), (3,), one_device(), "bfloat16").load(join(adapters(), frozen("int8")))
    for layer in small["layers"]:
        up = layer["ffn"]["up"]
        assert (up.base.codes.dtype, up.base.scales.dtype, up.a.dtype) == ("int8", "float32", "bfloat16")


def test_weights_on_a_mesh_are_those_on_one_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    fresh = init_adapters(ARCH, LORA, KEY, mesh)
    equal(jax.device_get(fresh), jax.device_get(init_adapters(ARCH, LORA, KEY)))
    equal(jax.device_get(frozen("nf4", mesh=mesh)), jax.device_get(frozen("nf4")))
    whole = join(fresh, frozen("nf4", mesh=mesh))
    placed = shardings(weight_axes(whole, ARCH), whole, mesh, TRAINING_RULES)
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), whole, placed))
