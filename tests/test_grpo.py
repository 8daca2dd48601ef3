"""Advantages by hand, packing that loses nothing, and an update that neither rows, micro-batches nor devices change."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkv.config import MeshConfig, ModelConfig, OptimizerConfig, UserError
from pkv.grpo import Learner, Sequence, advantages_by_reward, pack, token_advantages
from pkv.grpo.advantages import groups_with_signal
from pkv.grpo.logprobs import CHUNK, token_logprobs
from pkv.grpo.losses import ClippedSurrogate, Supervised, token_losses
from pkv.mesh import TRAINING_RULES, batch_sharding, make_mesh, shardings
from pkv.model import Arch, forward, init_params, logits, param_axes

ARCH = Arch(
    vocab_size=48, hidden=16, layers=2, heads=4, kv_heads=2, head_size=8, ffn=32, qkv_bias=True, tied_embeddings=True
)
NAN = float("nan")
CLIPPED = ClippedSurrogate(0.2, 0.28, 2.0)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def learner(mesh=None, optimizer="adamw", **model) -> Learner:
    return Learner(ARCH, ModelConfig(**model), OptimizerConfig(optimizer), mesh or one_device())


def sequences(count: int = 6, seed: int = 0) -> list[Sequence]:
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt, response = (draw.integers(0, 48, size).astype(np.int32) for size in draw.integers(3, 12, 2))
        advantages, logprobs = draw.normal(size=len(response)), -draw.random(len(response)) - 3
        found.append(Sequence(prompt, response, advantages.astype(np.float32), logprobs.astype(np.float32)))
    return found


# Advantages.


def test_std_advantages_by_hand():
    # rewards 1, 0, 0, 1: mean 0.5, std 0.5
    found = advantages_by_reward(np.array([[[1.0, 0.0, 0.0, 1.0]]]), "std")
    np.testing.assert_allclose(found[0, 0], [1, -1, -1, 1], rtol=1e-3)


def test_floored_std_divides_by_the_floor_where_a_reward_hardly_varies():
    values = np.array([[[0.500, 0.501, 0.500, 0.501]]])
    np.testing.assert_allclose(
        advantages_by_reward(values, "floored_std", 0.25)[0, 0], np.array([-1, 1, -1, 1]) * 0.002, rtol=1e-3
    )
    assert np.abs(advantages_by_reward(values, "std")).max() > 0.8, "what the floor protects from"


def test_floored_std_is_std_above_the_floor():
    values = np.array([[[1.0, 0.0, 0.0, 1.0]]])
    np.testing.assert_allclose(advantages_by_reward(values, "floored_std", 0.25)[0, 0], [1, -1, -1, 1])


def test_unscored_rollouts_stay_out_of_the_baseline():
    found = advantages_by_reward(np.array([[[1.0, 0.0, NAN, NAN]]]), "none")
    np.testing.assert_allclose(found[0, 0], [0.5, -0.5, 0, 0])


def test_a_group_without_any_value_has_no_advantage():
    assert not advantages_by_reward(np.full((1, 1, 4), NAN), "floored_std").any()


def test_block_credit_by_hand():
    # Two rewards: the pirate's length (tokens 0, 1) and correctness (token 3), which half of pays the whole trace.
    owners = np.array([[1, 1, 0, 0], [0, 0, 0, 1]], bool)
    found = token_advantages(np.array([2.0, -1.0]), np.array([0.5, 4.0]), owners, np.array([0.0, 0.5]))
    np.testing.assert_allclose(found, [1 - 2, 1 - 2, -2, -4])


def test_sequence_credit_is_the_classic_scalar():
    owners = np.array([[1, 0, 0], [0, 0, 1]], bool)
    found = token_advantages(np.array([2.0, -1.0]), np.array([0.5, 4.0]), owners, np.ones(2))
    np.testing.assert_allclose(found, [-3, -3, -3])


def test_groups_without_signal_on_a_weighted_reward_are_found():
    advantages = np.array([[[0.0, 0.0], [1.0, -1.0]], [[1.0, -1.0], [1.0, -1.0]]])
    assert groups_with_signal(advantages, np.array([1.0, 0.0])).tolist() == [False, True]


# Packing.


def test_packing_places_every_response_token_once_and_in_order():
    given = sequences(9)
    batch = pack(given, 32)
    found = []
    for row in range(len(batch.tokens)):
        for number in range(1, batch.segments[row].max() + 1):
            here = batch.segments[row] == number
            counted = here & (batch.mask[row] > 0)
            np.testing.assert_array_equal(batch.positions[row][here], np.arange(here.sum()))
            found.append((batch.targets[row][counted].tolist(), batch.advantages[row][counted].tolist()))
    wanted = [(s.response.tolist(), s.advantages.tolist()) for s in given]
    assert sorted(found) == sorted(wanted)
    assert batch.mask.sum() == sum(len(s.response) for s in given)


def test_a_sequence_longer_than_a_row_is_an_error_with_both_numbers():
    with pytest.raises(UserError, match=r"row_tokens: 8 .* 2\d|row_tokens: 8 .* 1\d"):
        pack(sequences(9), 8)


# Log-probabilities and losses.


def test_chunked_logprobs_are_the_whole_ones_with_their_gradient():
    params = init_params(ARCH, jax.random.key(0))
    T = CHUNK // 2 + 3
    tokens = jax.random.randint(jax.random.key(1), (3, T), 0, 48)
    hidden = jax.random.normal(jax.random.key(2), (3, T, ARCH.hidden))

    def whole(hidden):
        table = jax.nn.log_softmax(logits(params, ARCH, hidden))
        return jnp.take_along_axis(table, tokens[..., None], -1)[..., 0], -(jnp.exp(table) * table).sum(-1)

    chunked = jax.jit(lambda hidden: token_logprobs(params, ARCH, hidden, tokens))
    for a, b in zip(chunked(hidden), whole(hidden), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    gradients = [jax.grad(lambda h, f=f: (f(h)[0] * jnp.arange(T)).sum())(hidden) for f in (chunked, whole)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("tied", [True, False])
def test_every_device_projects_its_own_rows_only_and_the_values_and_gradients_stay(monkeypatch, sizes, tied):
    monkeypatch.setattr("pkv.grpo.logprobs.CHUNK", 32)
    arch = dataclasses.replace(ARCH, vocab_size=1024, tied_embeddings=tied)
    params = init_params(arch, jax.random.key(0))
    hidden_BTD = jax.random.normal(jax.random.key(2), (16, 32, 16))
    targets_BT = jax.random.randint(jax.random.key(1), (16, 32), 0, 1024)

    def total(params, hidden_BTD, targets_BT):
        logprobs_BT, entropy_BT = token_logprobs(params, arch, hidden_BTD, targets_BT)
        return (logprobs_BT * jnp.arange(32)).sum(), (logprobs_BT, entropy_BT)

    def results(mesh):
        weights = jax.device_put(params, shardings(param_axes(arch), params, mesh, TRAINING_RULES))
        arguments = weights, *jax.device_put((hidden_BTD, targets_BT), batch_sharding(mesh))
        with jax.set_mesh(mesh):
            program = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True)).lower(*arguments).compile()
            return program(*arguments), program

    (alone, one), (spread, eight) = results(one_device()), results(make_mesh(sizes))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), spread, alone)
    assert flops(eight) < 1.1 / 8 * flops(one)
    in_loops = eight.as_text().split("ENTRY")[0]
    assert not re.search(r"f32\[((1024|512),16|16,(1024|512))\]\S* all-reduce", in_loops), (
        "the table's gradient, at each chunk"
    )


def flops(program) -> float:
    """Of one device; the cost analysis counts a single turn of each loop, and here all loops turn as often."""
    (turns,) = set(re.findall(r'"known_trip_count":\{"n":"(\d+)"', program.as_text()))
    return int(turns) * program.cost_analysis()["flops"]


def test_clipped_surrogate_by_hand():
    ratio = jnp.array([1.0, 1.5, 1.5, 0.5, 0.5])
    advantage = jnp.array([2.0, 1.0, -1.0, 1.0, -1.0])
    old = jnp.full(5, -1.0)
    losses, clipped = token_losses(CLIPPED, old + jnp.log(ratio), old, old, advantage)
    np.testing.assert_allclose(losses, [-2.0, -1.28, 1.5, -0.5, 0.8], rtol=1e-6)
    assert clipped.tolist() == [0, 1, 0, 0, 1]


def test_importance_weights_are_truncated_and_carry_no_gradient():
    old, sampler = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.1, 0.4]))

    def loss(logprobs):
        return token_losses(CLIPPED, logprobs, jax.lax.stop_gradient(old), sampler, jnp.ones(2))[0].sum()

    np.testing.assert_allclose(loss(old), -(2.0 + 1.25), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(old), [-2.0, -1.25], rtol=1e-6)


# The update.


def change(learner: Learner, batch, loss=CLIPPED, micro_rows: int = 8, epochs: int = 1):
    state = learner.init(init_params(ARCH, jax.random.key(0)))
    state, statistics = learner.update(state, batch, loss, 1e-2, micro_rows, epochs)
    return jax.device_get(state.params), statistics


def assert_same(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), a[0], b[0])
    assert a[1] == pytest.approx(b[1], rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def plain():
    return change(learner(), pack(sequences(), 64))


def test_packed_and_unpacked_updates_are_equal(plain):
    alone = [pack([sequence], 64) for sequence in sequences()]
    fields = {name: np.concatenate([getattr(b, name) for b in alone]) for name in vars(alone[0])}
    assert_same(plain, change(learner(), type(alone[0])(**fields)))


def test_one_and_four_micro_batches_are_equal(plain):
    batch = pack(sequences(), 24)
    assert len(batch.tokens) >= 4
    assert_same(plain, change(learner(), batch, micro_rows=1))


def test_remat_changes_nothing(plain):
    assert_same(plain, change(learner(remat="all"), pack(sequences(), 64)))


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_one_and_eight_devices_are_equal(plain, mesh):
    assert len(jax.devices()) == 8
    assert_same(plain, change(learner(make_mesh(mesh)), pack(sequences(), 64)))


def test_muon_is_equal_on_one_and_eight_devices():
    batch = pack(sequences(), 64)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert_same(change(learner(optimizer="muon"), batch), change(learner(mesh, optimizer="muon"), batch))


def test_muon_steps_orthogonally_in_every_matrix_of_a_layer_and_like_adam_elsewhere(plain):
    before = jax.device_get(init_params(ARCH, jax.random.key(0)))
    after, _ = change(learner(optimizer="muon"), pack(sequences(), 64))
    step = jax.tree.map(np.subtract, after, before)
    for matrix in step["layers"]["ffn"]["gate"]:  # [D, F] of each layer
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.min() > 0.4 * values.max(), "Newton-Schulz brings the singular values close to each other"
    adam = np.subtract(plain[0]["embedding"], before["embedding"])
    assert np.all(step["embedding"] * adam >= 0), "the same direction; optax's Muon adds Nesterov's momentum to Adam's"


def test_several_epochs_hold_on_to_the_first_ones_policy():
    far = [Sequence(s.prompt, s.response, np.ones_like(s.advantages), s.logprobs) for s in sequences()]
    _, first = change(learner(), pack(far, 64), epochs=1)
    _, third = change(learner(), pack(far, 64), epochs=3)
    assert first["clipped"] == 0.0, "exactly on-policy: every ratio is 1"
    assert third["clipped"] > 0.05, "after two updates ratios have left the clip range"


def test_supervised_updates_learn_a_sequence_by_heart():
    trainer, batch = learner(), pack(sequences(2), 64)
    state = trainer.init(init_params(ARCH, jax.random.key(0)))
    losses = []
    for _ in range(40):
        state, statistics = trainer.update(state, batch, Supervised(), 1e-2, 8)
        losses.append(statistics["loss"])
    assert losses[0] == pytest.approx(np.log(48), rel=0.05)
    assert losses[-1] < 0.3


def test_positive_advantages_make_their_tokens_likelier():
    given = sequences(4)
    given = [
        Sequence(s.prompt, s.response, np.full(len(s.response), 1.0 if i < 2 else -1.0, np.float32), s.logprobs)
        for i, s in enumerate(given)
    ]
    params, _ = change(learner(), pack(given, 64))
    before = init_params(ARCH, jax.random.key(0))

    def total(params, s):
        tokens = jnp.asarray(np.concatenate([s.prompt, s.response]))[None]
        hidden, _ = forward(params, ARCH, tokens[:, :-1], jnp.arange(tokens.shape[1] - 1)[None])
        return float(token_logprobs(params, ARCH, hidden, tokens[:, 1:])[0][0, len(s.prompt) - 1 :].sum())

    params = jax.tree.map(jnp.asarray, params)
    rises = [total(params, s) - total(before, s) for s in given]
    assert min(rises[:2]) > 0 > max(rises[2:])


def test_weight_decay_leaves_norms_and_biases_alone():
    trainer = Learner(ARCH, ModelConfig(), OptimizerConfig(weight_decay=0.5), one_device())
    params = init_params(ARCH, jax.random.key(0))
    state = trainer.init(jax.tree.map(jnp.ones_like, params))
    batch = pack([Sequence(s.prompt, s.response, np.zeros_like(s.advantages), s.logprobs) for s in sequences()], 64)
    state, _ = trainer.update(state, batch, CLIPPED, 0.1, 8)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="."): float(jnp.abs(x - 1).max())
        for path, x in jax.tree_util.tree_leaves_with_path(state.params)
    }
    assert {name for name, size in moved.items() if size == 0} == {n for n in moved if n.endswith(("norm", "bias"))}
    assert moved["layers.ffn.up"] == pytest.approx(0.05, rel=1e-4)


def test_forced_tokens_are_not_trained_on():
    free = sequences(2)
    forced = [dataclasses.replace(one, forced=np.arange(len(one.response)) == 1) for one in free]
    whole, without = pack(free, 64), pack(forced, 64)
    np.testing.assert_array_equal(whole.tokens, without.tokens)
    assert whole.mask.sum() - without.mask.sum() == 2
    left_out = (whole.mask == 1) & (without.mask == 0)
    assert not without.advantages[left_out].any() and not without.sampler_logprobs[left_out].any()
    np.testing.assert_array_equal(whole.advantages[~left_out], without.advantages[~left_out])
