"""Advantages by hand, packing that loses nothing, and an update that neither rows, micro-batches nor devices change."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_cudnn import cudnn_in_words

from pkv.config import GrpoConfig, MeshConfig, ModelConfig, OptimizerConfig, PolicyLoss, RoundConfig, UserError
from pkv.grpo import (
    Layout,
    Learner,
    Sequence,
    advantages_by_reward,
    learning_rate,
    pack,
    reference_weights,
    token_advantages,
)
from pkv.grpo.advantages import groups_with_signal, soft_overlong, total_advantages, whiten
from pkv.grpo.logprobs import token_logprobs
from pkv.grpo.losses import Logprobs, Supervised, token_losses
from pkv.grpo.moments import round_at_random
from pkv.mesh import AXES, TRAINING_RULES, batch_sharding, make_mesh, shardings
from pkv.model import SEGMENTS, Arch, forward, head, init_params, logits, param_axes
from pkv.model.kernels import cudnn

ARCH = Arch(
    vocab_size=48, hidden=16, layers=2, heads=4, kv_heads=2, head_size=8, ffn=32, qkv_bias=True, tied_embeddings=True
)
NAN = float("nan")
CLIPPED = PolicyLoss()


@cache
def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@cache
def learner(mesh=None, optimizer="adamw", **model) -> Learner:
    return Learner(ARCH, ModelConfig(**model), OptimizerConfig(optimizer), mesh or one_device())


def layout(row_tokens: int = 64, micro_rows: int = 8, **kind) -> Layout:
    return Layout(row_tokens, micro_rows, **kind)


def whole_batch(batches):
    """Micro-batches of one length as one."""
    return type(batches[0])(**{name: np.concatenate([getattr(b, name) for b in batches]) for name in vars(batches[0])})


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


def test_groups_without_signal_are_found():
    values = np.array([[[1.0, 1.0, NAN], [1.0, 0.0, 1.0], [NAN, NAN, 1.0]], [[0.5, 0.5, 0.5]] * 3])
    assert groups_with_signal(values).tolist() == [False, True, False]


def test_leave_one_out_compares_with_the_others_only():
    found = advantages_by_reward(np.array([[[1.0, 0.0, 0.0, NAN]]]), "none", baseline="leave_one_out")
    np.testing.assert_allclose(found[0, 0], [1.0, -0.5, -0.5, 0.0], rtol=1e-6)


def test_a_rollout_is_compared_with_those_that_fared_alike():
    # Two with one right fighter, two with two of them, and one alone.
    alike = np.array([[[1, 1, 2, 2, 3]]])
    found = advantages_by_reward(np.array([[[1.0, 0.0, 1.0, 1.0, 0.0]]]), "none", alike_KPG=alike)
    np.testing.assert_allclose(found[0, 0], [0.5, -0.5, 0, 0, 0])


def test_rewards_scaled_by_themselves_do_not_drown_in_the_sum():
    values = np.array([[[0.0, 1.0, 1.0]], [[0.0, 0.0, 10.0]]])
    apart = advantages_by_reward(values, "std").sum(axis=0)[0]
    together = total_advantages(values, np.ones(2), "std", 0.25, "mean")[0]
    np.testing.assert_allclose(apart, [-1.5 * 2**0.5, 0, 1.5 * 2**0.5], atol=1e-3)
    np.testing.assert_allclose(together, (np.array([0, 1, 11]) - 4) / np.std([0, 1, 11]), rtol=1e-3)
    assert together[1] < -0.5, "right in the first reward, and punished for it"


def test_a_total_is_over_the_rewards_that_there_are():
    values = np.array([[[1.0, NAN, NAN]], [[1.0, 4.0, NAN]]])
    found = total_advantages(values, np.array([2.0, 1.0]), "none", 0.25, "mean")
    np.testing.assert_allclose(found[0], [-0.5, 0.5, 0.0])


def test_whitened_tokens_have_unit_deviation_and_owners_without_advantage_keep_none():
    given = [np.array([2.0, 0.0], np.float32), np.array([-1.0, 0.0, 0.0], np.float32)]
    chosen = [np.ones(2), np.ones(3)]
    tokens = np.concatenate(whiten(given, chosen, centre=False))
    np.testing.assert_allclose(tokens, np.array([2, 0, -1, 0, 0]), rtol=1e-5)  # its mean square is 1 already
    centred = np.concatenate(whiten(given, chosen, centre=True))
    assert centred.mean() == pytest.approx(0, abs=1e-6) and centred.std() == pytest.approx(1, abs=1e-5)
    assert whiten([], [], centre=True) == []


def test_of_responses_that_count_the_same_a_long_one_is_not_the_batch():
    short, long = np.array([1.0], np.float32), np.full(3, -1.0, np.float32)
    chosen = [np.ones(1), np.ones(3)]
    by_response = whiten([short, long], chosen, centre=True, by_response=True)  # as GDPO: mean 0, deviation 1
    np.testing.assert_allclose([one[0] for one in by_response], [1, -1], rtol=1e-5)
    by_token = whiten([short, long], chosen, centre=True)
    np.testing.assert_allclose([one[0] for one in by_token], [3**0.5, -(3**-0.5)], rtol=1e-5)


def test_soft_overlong_by_hand():
    # DAPO's numbers: 20,480 tokens, of which the last 4,096 are punished.
    found = soft_overlong(np.array([100, 16_384, 18_432, 20_480, 30_000]), 20_480, 4096)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1, -1])


# Packing.


def test_packing_places_every_response_token_once_and_in_order():
    given = sequences(9)
    batches = pack(given, layout(32, 2))
    found = []
    for batch, row in ((one, row) for one in batches for row in range(len(one.tokens))):
        for number in range(1, batch.segments[row].max() + 1):
            here = batch.segments[row] == number
            counted = here & (batch.mask[row] > 0)
            np.testing.assert_array_equal(batch.positions[row][here], np.arange(here.sum()))
            found.append((batch.targets[row][counted].tolist(), batch.advantages[row][counted].tolist()))
    wanted = [(s.response.tolist(), s.advantages.tolist()) for s in given]
    assert sorted(found) == sorted(wanted)
    assert sum(batch.mask.sum() for batch in batches) == sum(len(s.response) for s in given)
    assert sum(batch.weights.sum() for batch in batches) == pytest.approx(1, abs=1e-6)


def test_a_shared_prompt_stands_once_before_its_responses():
    prompt = np.arange(5, dtype=np.int32)
    given = [dataclasses.replace(s, prompt=prompt) for s in sequences(4)]
    given.append(dataclasses.replace(sequences(1)[0], prompt=np.zeros(40, np.int32)))  # it makes rows long
    (batch,) = (one for one in pack(given, layout(64, 1, share_prompts=True)) if one.branches.max() == 4)
    assert (batch.segments > 0).sum() == 4 + sum(len(s.response) for s in given[:4])
    assert (batch.segments[0].max(), batch.branches[0].max()) == (1, 4)
    for branch in range(1, 5):
        here = batch.branches[0] == branch
        assert batch.tokens[0][here][0] == 4, "each branch begins with the prompt's last token"
        np.testing.assert_array_equal(batch.positions[0][here], 4 + np.arange(here.sum()))


def test_short_responses_go_into_short_rows_and_micro_batches_hold_as_many_tokens():
    def of(size):
        some = np.ones(size, np.float32)
        return Sequence(np.zeros(2, np.int32), np.zeros(size, np.int32), some, some)

    batches = pack([of(15) for _ in range(16)] + [of(60)], layout(64, 2))
    shapes = [batch.tokens.shape for batch in batches]
    assert all(rows * length <= 128 for rows, length in shapes)
    assert (8, 16) in shapes and any(length == 64 for _, length in shapes)
    assert sum(rows * length for rows, length in shapes) <= 16 * 16 + 64


def test_of_the_ways_to_pack_the_one_with_the_least_work_is_taken():
    prompt = np.arange(20, dtype=np.int32)
    given = [dataclasses.replace(s, prompt=prompt) for s in sequences(8)]

    def work(batches, crossover):
        return sum(b.tokens.size * (1 + b.tokens.shape[1] / crossover) for b in batches)

    for crossover in (10.0, 1000.0):  # attention weighs much, or hardly anything
        apart = pack(given, layout(128, 1, crossover=crossover))
        best = pack(given, layout(128, 1, crossover=crossover, share_prompts=True))
        assert work(best, crossover) < work(apart, crossover)
    assert max(b.tokens.shape[1] for b in best) > max(b.tokens.shape[1] for b in apart), "all behind one prompt"


def test_a_row_holds_no_more_trees_than_it_may():
    def most(batches):
        assert sum(batch.mask.sum() for batch in batches) == sum(len(s.response) for s in sequences(30))
        return max(batch.segments.max() for batch in batches)

    assert most(pack(sequences(30), layout(128, 4))) > 3
    assert most(pack(sequences(30), layout(128, 4, most_trees=3))) == 3


@pytest.mark.parametrize("micro_rows", [1, 2, 3, 5, 7])
def test_no_micro_batch_has_more_tokens_than_asked(micro_rows):
    for batch in pack(sequences(40), layout(24, micro_rows)):
        assert batch.tokens.size <= 24 * micro_rows


def test_rows_and_lengths_are_what_devices_divide():
    for batch in pack(sequences(9), layout(60, 3, rows_multiple=4, time_multiple=8)):
        assert len(batch.tokens) % 4 == 0 and batch.tokens.shape[1] % 8 == 0


def test_token_weights_by_hand():
    def of(size):
        some = np.ones(size, np.float32)
        return Sequence(np.zeros(2, np.int32), np.zeros(size, np.int32), some, some)

    def weights(normalise):
        batches = pack([of(1), of(3)], layout(8, 1, normalise=normalise, budget=10))
        return sorted(float(weight) for batch in batches for weight in batch.weights[batch.mask > 0])

    assert weights("tokens") == pytest.approx([1 / 4] * 4)
    assert weights("sequences") == pytest.approx([1 / 6] * 3 + [1 / 2])
    assert weights("constant") == pytest.approx([1 / 20] * 4)


def test_a_sequence_longer_than_a_row_is_an_error_with_both_numbers():
    with pytest.raises(UserError, match=r"row_tokens: 8 .* 2\d|row_tokens: 8 .* 1\d"):
        pack(sequences(9), layout(8))


# Log-probabilities and losses.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [1024, 1000])  # in parts of 256, the last of which begins earlier in one case
def test_logprobs_in_parts_are_the_whole_ones_with_their_gradients(monkeypatch, tied, vocab):
    monkeypatch.setattr("pkv.grpo.logprobs.MOST_LOGITS", 99 * 300)
    arch = dataclasses.replace(ARCH, vocab_size=vocab, tied_embeddings=tied, logit_cap=2.0)
    params = head(init_params(arch, jax.random.key(0)), arch)
    tokens = jax.random.randint(jax.random.key(1), (3, 33), 0, vocab)
    hidden = 9 * jax.random.normal(jax.random.key(2), (3, 33, arch.hidden))

    def whole(params, hidden):
        table = jax.nn.log_softmax(logits(params, arch, hidden))
        return jnp.take_along_axis(table, tokens[..., None], -1)[..., 0], -(jnp.exp(table) * table).sum(-1)

    def parts(params, hidden):
        return token_logprobs(params, arch, hidden, tokens)

    def gradients(function):
        total = lambda *given: sum((each * jnp.arange(33)).sum() for each in function(*given))  # noqa: E731
        return jax.grad(total, argnums=(0, 1))(params, hidden)

    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, parts(params, hidden), whole(params, hidden))
    jax.tree.map(close, gradients(parts), gradients(whole))


def test_memory_for_logits_grows_neither_with_the_length_nor_with_the_vocabulary(monkeypatch):
    monkeypatch.setattr("pkv.grpo.logprobs.MOST_LOGITS", 2**18)

    def temporary(vocab: int, length: int) -> int:
        arch = dataclasses.replace(ARCH, vocab_size=vocab, tied_embeddings=False)
        params = jax.eval_shape(lambda: head(init_params(arch, jax.random.key(0)), arch))
        hidden = jax.ShapeDtypeStruct((1, length, arch.hidden), jnp.float32)
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        total = lambda params, hidden, tokens: sum(x.sum() for x in token_logprobs(params, arch, hidden, tokens))  # noqa: E731
        gradient = jax.jit(jax.grad(total, argnums=(0, 1))).lower(params, hidden, tokens).compile()
        return gradient.memory_analysis().temp_size_in_bytes

    tables = 3 * 4 * ARCH.hidden * 4096  # what may be kept of a table and its gradient
    for vocab, length in ((4096, 512), (4096, 2048), (8192, 2048)):
        activations = 8 * 4 * ARCH.hidden * length
        assert temporary(vocab, length) < 4 * 4 * 2**18 + tables * vocab / 4096 + activations, (vocab, length)


@pytest.mark.parametrize("sizes", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("tied", [True, False])
def test_every_device_projects_its_own_rows_only_and_the_values_and_gradients_stay(monkeypatch, sizes, tied):
    monkeypatch.setattr("pkv.grpo.logprobs.LANES", 8)  # so that one device has as many turns as each of eight
    arch = dataclasses.replace(ARCH, vocab_size=1024, tied_embeddings=tied)
    params = init_params(arch, jax.random.key(0))
    hidden_BTD = jax.random.normal(jax.random.key(2), (16, 32, 16))
    targets_BT = jax.random.randint(jax.random.key(1), (16, 32), 0, 1024)

    def total(params, hidden_BTD, targets_BT):
        logprobs_BT, entropy_BT = token_logprobs(params, arch, hidden_BTD, targets_BT)
        return (logprobs_BT * jnp.arange(32)).sum(), (logprobs_BT, entropy_BT)

    def results(mesh, most):
        monkeypatch.setattr("pkv.grpo.logprobs.MOST_LOGITS", most)
        weights = jax.device_put(params, shardings(param_axes(arch), params, mesh, TRAINING_RULES))
        arguments = weights, *jax.device_put((hidden_BTD, targets_BT), batch_sharding(mesh))
        with jax.set_mesh(mesh):
            program = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True)).lower(*arguments).compile()
            return program(*arguments), program

    (alone, one), (spread, eight) = results(one_device(), 512 * 256), results(make_mesh(sizes), 512 * 256 // 8)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), spread, alone)
    assert flops(eight) < 1.1 / 8 * flops(one)
    in_loops = eight.as_text().split("ENTRY")[0]
    assert "all-reduce" not in in_loops and "all-gather" not in in_loops, "sums over devices, at each turn"


def flops(program) -> float:
    """Of one device; the cost analysis counts a single turn of each loop, and here all loops turn as often."""
    (turns,) = set(re.findall(r'"known_trip_count":\{"n":"(\d+)"', program.as_text()))
    return int(turns) * program.cost_analysis()["flops"]


def losses_of(loss, now, old, sampler, advantages, reference=None, average=lambda x: x.mean() + 0 * x, entropy=0.0):
    """Of one sequence."""
    return token_losses(loss, Logprobs(now, old, sampler, reference), entropy + 0 * now, advantages, average)


RATIO = jnp.array([1.0, 1.5, 1.5, 0.5, 0.5])
ADVANTAGE = jnp.array([2.0, 1.0, -1.0, 1.0, -1.0])
OLD = jnp.full(5, -1.0)


def test_clipped_surrogate_by_hand():
    found = losses_of(CLIPPED, OLD + jnp.log(RATIO), OLD, OLD, ADVANTAGE)
    np.testing.assert_allclose(found.loss, [-2.0, -1.28, 1.5, -0.5, 0.8], rtol=1e-6)
    assert found.clipped_low.tolist() == [0, 0, 0, 0, 1] and found.clipped_high.tolist() == [0, 1, 0, 0, 0]


def test_dual_clip_bounds_what_a_negative_advantage_can_cost():
    loss = PolicyLoss(dual_clip=3.0)
    found = losses_of(loss, OLD + jnp.log(jnp.array([2.0, 5.0, 5.0, 1.0, 1.0])), OLD, OLD, -ADVANTAGE)
    np.testing.assert_allclose(found.loss, [4.0, 3.0, -1.28, 1.0, -1.0], rtol=1e-6)
    assert found.clipped_high.tolist() == [0, 1, 1, 0, 0]


def test_cispo_holds_weights_and_gives_every_token_its_gradient():
    loss = PolicyLoss("cispo", cap=1.2)

    def total(now):
        return losses_of(loss, now, OLD, OLD, ADVANTAGE).loss.sum()

    now = OLD + jnp.log(RATIO)
    np.testing.assert_allclose(jax.grad(total)(now), -jnp.minimum(RATIO, 1.2) * ADVANTAGE, rtol=1e-6)
    assert losses_of(loss, now, OLD, OLD, ADVANTAGE).clipped_high.tolist() == [0, 1, 1, 0, 0]


def test_gspo_gives_a_sequence_one_ratio():
    loss, advantages = PolicyLoss("gspo", clip_low=0.2, clip_high=0.28), jnp.ones(5)
    ratio = float(np.exp(np.mean(np.log(RATIO))))

    def total(now):
        return losses_of(loss, now, OLD, OLD, advantages).loss.sum()

    now = OLD + jnp.log(RATIO)
    np.testing.assert_allclose(losses_of(loss, now, OLD, OLD, advantages).loss, [-ratio] * 5, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(total)(now), [-ratio] * 5, rtol=1e-6)
    far = now + 1.0
    assert not jax.grad(total)(far).any() and losses_of(loss, far, OLD, OLD, advantages).clipped_high.all()
    usual = [losses_of(PolicyLoss("gspo"), OLD + off, OLD, OLD, advantages) for off in (3e-4, 5e-4)]
    assert not usual[0].clipped_high.any() and usual[1].clipped_high.all(), "4e-4, unless it is given"


def test_divergences_by_hand():
    now, reference = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.4]))
    log2 = np.log(2)
    for kl, wanted in (("k2", [log2**2 / 2] * 2), ("k3", [0.5 - 1 + log2, 2 - 1 - log2])):
        found = losses_of(PolicyLoss(kl=kl, kl_weight=0.1), now, now, now, jnp.zeros(2), reference)
        np.testing.assert_allclose(found.loss, 0.1 * np.array(wanted), rtol=1e-5)
    # k1 in the reward: what is likelier than under the reference pays for it.
    found = losses_of(PolicyLoss(kl="k1", kl_weight=0.1), now, now, now, jnp.zeros(2), reference)
    np.testing.assert_allclose(found.loss, [0.1 * log2, -0.1 * log2], rtol=1e-5)
    np.testing.assert_allclose(found.kl_reference, [0.5 - 1 + log2, 2 - 1 - log2], rtol=1e-5)


def test_a_sequence_far_from_its_sampler_is_rejected_by_its_geometric_mean():
    near, far = OLD + 0.01, OLD.at[0].add(1.0)  # geometric means of the ratios: exp(-0.01) and exp(-0.2)
    for sampler, rejected in ((near, 0.0), (far, 1.0)):
        found = losses_of(PolicyLoss(reject=1.05), OLD, OLD, sampler, ADVANTAGE, entropy=1.0)
        assert found.rejected.tolist() == [rejected] * 5
        assert bool(found.loss.any()) == (not rejected)


def test_entropy_is_paid_for():
    np.testing.assert_allclose(
        losses_of(PolicyLoss(entropy=0.5), OLD, OLD, OLD, jnp.zeros(5), entropy=2.0).loss, [-1.0] * 5
    )


def test_importance_weights_are_truncated_and_carry_no_gradient():
    old, sampler = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.1, 0.4]))

    def loss(logprobs):
        return losses_of(CLIPPED, logprobs, jax.lax.stop_gradient(old), sampler, jnp.ones(2)).loss.sum()

    np.testing.assert_allclose(loss(old), -(2.0 + 1.25), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(old), [-2.0, -1.25], rtol=1e-6)


# The update.


def change(learner: Learner, *minibatches, loss=CLIPPED, epochs: int = 1, arch: Arch = ARCH):
    """What an update makes of the weights, its statistics, and the gradient of its first step."""
    state = learner.init(init_params(arch, jax.random.key(0)))
    gradient = jax.device_get(learner.gradient(state.params, minibatches[0], loss)[0])
    state, statistics = learner.update(state, minibatches, loss, 1e-2, epochs)
    return jax.device_get(state.params), statistics, gradient


def assert_same(a, b) -> None:
    """Leaf by leaf the gradient, which a step of Adam would make signs of, and what the update came to."""

    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max())

    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(a[2])) > 1e-3
    jax.tree.map(close, a[2], b[2])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), a[0], b[0])
    assert a[1] == pytest.approx(b[1], rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def plain():
    return change(learner(), pack(sequences(), layout()))


def test_packed_and_unpacked_updates_are_equal(plain):
    tokens = sum(len(sequence.response) for sequence in sequences())
    alone = []
    for sequence in sequences():
        (batch,) = pack([sequence], layout())
        alone.append(dataclasses.replace(batch, weights=batch.mask / tokens))
    assert_same(plain, change(learner(), alone))


@pytest.mark.parametrize(
    "loss", [CLIPPED, PolicyLoss("gspo", clip_low=0.2, clip_high=0.28, reject=1.5), PolicyLoss(normalise="sequences")]
)
@pytest.mark.parametrize("window", [None, 5])
def test_responses_behind_one_prompt_are_as_good_as_apart(loss, window):
    arch = dataclasses.replace(ARCH, window=window, local_layers=(True, False) if window else ())
    prompts = [s.prompt for s in sequences(2)]
    given = [dataclasses.replace(s, prompt=prompts[i % 2]) for i, s in enumerate(sequences(8))]

    def changed(shared):
        trainer = Learner(arch, ModelConfig(), OptimizerConfig(), one_device())
        micros = pack(given, layout(share_prompts=shared, normalise=loss.normalise))
        return change(trainer, micros, loss=loss, epochs=2, arch=arch), sum(int((m.segments > 0).sum()) for m in micros)

    (apart, computed_apart), (together, computed_together) = changed(False), changed(True)
    assert_same(apart, together)
    assert computed_together < computed_apart, "tokens"


def test_an_update_by_cudnn_is_the_same(monkeypatch, plain):
    """XLA plays cuDNN, which is told of as many segments as the fullest row has, in few sizes."""
    monkeypatch.setattr("pkv.grpo.update.choose_kernel", lambda *_: "cudnn")
    told = []

    def play(q, k, v, **kind):
        told.append(kind["q_seqlen"].shape[1])
        return cudnn_in_words(q, k, v, **kind)

    monkeypatch.setattr(cudnn, "dot_product_attention", play)
    trainer = Learner(ARCH, ModelConfig(), OptimizerConfig(), one_device())
    made = trainer.layout(GrpoConfig(row_tokens=64, micro_rows=8))
    assert (made.share_prompts, made.most_trees) == (False, SEGMENTS[-1] - 1)
    batches = pack(sequences(), made)
    needed = 1 + max(batch.segments.max() for batch in batches)
    assert_same(plain, change(trainer, batches))
    assert set(told) == {min(size for size in SEGMENTS if size >= needed)}


@pytest.mark.parametrize(
    "platform, sizes, layers, remat, unrolled",
    [
        ("cpu", {}, 8, "all", True),
        ("cpu", {}, 9, "none", False),
        ("gpu", {}, 48, "none", True),
        ("gpu", {}, 48, "cheap", False),
        ("gpu", {"data": 8}, 48, "none", True),
        ("gpu", {"fsdp": 8}, 48, "none", False),
        ("tpu", {}, 4, "none", False),
    ],
)
def test_layers_of_an_update_are_unrolled_where_a_scan_costs_more(
    monkeypatch, platform, sizes, layers, remat, unrolled
):
    monkeypatch.setattr("pkv.grpo.update.choose_kernel", lambda *_: "xla")
    shape = dict.fromkeys(AXES, 1) | sizes
    mesh = SimpleNamespace(
        devices=np.array([SimpleNamespace(platform=platform)]), shape=shape, size=math.prod(shape.values())
    )
    arch = dataclasses.replace(ARCH, layers=layers)
    assert Learner(arch, ModelConfig(remat=remat), OptimizerConfig(), mesh)._unrolled == unrolled


@pytest.mark.parametrize(
    "sizes, remat",
    [
        ({}, "none"),
        ({}, "cheap"),
        ({}, "all"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "all"),
        ({"data": 2, "fsdp": 2, "sequence": 2}, "cheap"),
    ],
)
def test_scanned_layers_whose_gradient_is_added_up_in_place_change_nothing(monkeypatch, plain, sizes, remat):
    monkeypatch.setattr("pkv.grpo.update.FEW_LAYERS", 0)
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    trainer = Learner(ARCH, ModelConfig(remat=remat), OptimizerConfig(), mesh)
    batches = pack(sequences(), layout(24, 4, rows_multiple=4, time_multiple=2))
    assert len(batches) > 1 and not trainer._unrolled
    assert_same(plain, change(trainer, batches))
    weights = trainer.init(init_params(ARCH, jax.random.key(0))).params
    gradient, _ = trainer.gradient(weights, batches, CLIPPED)
    alike = jax.tree.map(lambda g, w: g.sharding.is_equivalent_to(w.sharding, w.ndim), gradient, weights)
    assert jax.tree.all(alike), "where its weight lies, or the next micro-batch is another program"


def test_a_micro_batchs_own_gradient_is_never_whole_where_layers_are_scanned(monkeypatch):
    """Beside weights and sums there is room for some layers only; a whole second gradient would be 12 of them."""
    monkeypatch.setattr("pkv.grpo.update.FEW_LAYERS", 0)
    arch = dataclasses.replace(ARCH, layers=12, hidden=128, ffn=512)
    trainer = Learner(arch, ModelConfig(remat="all"), OptimizerConfig(), one_device())
    shapes = jax.eval_shape(lambda: init_params(arch, jax.random.key(0)))
    memory = trainer.lower(trainer.template(shapes), 1, 16, CLIPPED)["gradient"].compile().memory_analysis()
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes["layers"]))
    assert memory.temp_size_in_bytes < weights / 2
    assert memory.alias_size_in_bytes >= weights


def test_one_and_four_micro_batches_are_equal(plain):
    batches = pack(sequences(), layout(24, 1))
    assert len(batches) >= 4
    assert_same(plain, change(learner(), batches))


def test_what_is_not_trained_on_may_be_any_distance_apart(plain):
    (batch,) = pack(sequences(), layout())
    far = np.where(batch.mask > 0, batch.sampler_logprobs, -200.0).astype(np.float32)
    assert_same(plain, change(learner(), [dataclasses.replace(batch, sampler_logprobs=far)]))


def test_the_gradient_is_what_an_update_applies(plain):
    trainer, weights = learner(), init_params(ARCH, jax.random.key(0))
    gradient, statistics = trainer.gradient(weights, pack(sequences(), layout(24, 1)), CLIPPED)
    norm = np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(gradient)))
    said = {**statistics, "gradient_norm": norm}
    assert norm > 1e-3 and said == pytest.approx({name: plain[1][name] for name in said}, rel=1e-3, abs=1e-5)


def test_remat_changes_nothing(plain):
    assert_same(plain, change(learner(remat="all"), pack(sequences(), layout())))


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_one_and_eight_devices_are_equal(plain, mesh):
    assert len(jax.devices()) == 8
    assert_same(plain, change(learner(make_mesh(mesh)), pack(sequences(), layout(rows_multiple=8))))


@pytest.mark.parametrize(
    ("mesh", "kv_heads"),
    [
        (MeshConfig(data=2, sequence=4), 1),
        (MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), 2),
        (MeshConfig(data=4, tensor=2), 1),  # heads that tensor doesn't divide are repeated
    ],
)
def test_rows_spread_over_devices_by_position_give_the_same_gradient(mesh, kv_heads):
    arch = dataclasses.replace(ARCH, kv_heads=kv_heads, layers=1)
    loss = PolicyLoss(entropy=0.01, reject=3.0)

    def changed(mesh):
        trainer = Learner(arch, ModelConfig(), OptimizerConfig(), mesh)
        micros = pack(sequences(12), layout(rows_multiple=4, time_multiple=4, share_prompts=True))
        return change(trainer, micros, loss=loss, arch=arch)

    assert_same(changed(one_device()), changed(make_mesh(mesh)))


def test_heads_that_a_sequence_axis_does_not_divide_are_an_error_with_both_numbers():
    with pytest.raises(UserError, match=r"mesh\.sequence: 4 heads .* 8"):
        learner(make_mesh(MeshConfig(data=1, sequence=8)))


def test_muon_is_equal_on_one_and_eight_devices():
    batches = pack(sequences(), layout(rows_multiple=4))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert_same(change(learner(optimizer="muon"), batches), change(learner(mesh, optimizer="muon"), batches))


def test_muon_steps_orthogonally_in_every_matrix_of_a_layer_and_like_adam_elsewhere(plain):
    before = jax.device_get(init_params(ARCH, jax.random.key(0)))
    after, *_ = change(learner(optimizer="muon"), pack(sequences(), layout()))
    step = jax.tree.map(np.subtract, after, before)
    for matrix in step["layers"]["ffn"]["gate"]:  # [D, F] of each layer
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.min() > 0.4 * values.max(), "Newton-Schulz brings the singular values close to each other"
    adam = np.subtract(plain[0]["embedding"], before["embedding"])
    assert np.all(step["embedding"] * adam >= 0), "the same direction; optax's Muon adds Nesterov's momentum to Adam's"


def test_several_epochs_hold_on_to_the_first_ones_policy():
    far = [Sequence(s.prompt, s.response, np.ones_like(s.advantages), s.logprobs) for s in sequences()]
    _, first, _ = change(learner(), pack(far, layout()), epochs=1)
    _, third, _ = change(learner(), pack(far, layout()), epochs=3)
    assert first["clipped_low"] == first["clipped_high"] == 0.0, "exactly on-policy: every ratio is 1"
    assert third["clipped_high"] > 0.05, "after two updates ratios have left the clip range"


def test_later_minibatches_are_held_against_the_first_policy_too():
    far = [Sequence(s.prompt, s.response, np.ones_like(s.advantages), s.logprobs) for s in sequences()]
    one = pack(far, layout())
    _, twice, _ = change(learner(), one, one)
    _, epochs, _ = change(learner(), one, epochs=2)
    assert twice == pytest.approx(epochs, rel=1e-5)
    assert twice["clipped_high"] > 0


def test_the_divergence_from_a_reference_holds_the_policy_back():
    start = init_params(ARCH, jax.random.key(0))
    trainer = Learner(
        ARCH, ModelConfig(), OptimizerConfig(), one_device(), reference=reference_weights(start, jnp.float32)
    )
    batches = pack(sequences(), layout())

    def divergence(weight):
        state = trainer.init(jax.tree.map(jnp.copy, start))
        for _ in range(8):
            state, statistics = trainer.update(state, [batches], PolicyLoss(kl_weight=weight or 1e-9), 1e-2)
        return statistics["kl_reference"]

    free, held = divergence(0.0), divergence(3.0)
    assert free > 0.01 and held < free / 2
    with pytest.raises(ValueError, match="reference"):
        change(learner(), batches, loss=PolicyLoss(kl_weight=0.1))


def test_a_step_whose_gradient_is_not_finite_changes_nothing():
    broken = [dataclasses.replace(s, advantages=s.advantages * np.inf) for s in sequences()]
    trainer = learner()
    state = trainer.init(init_params(ARCH, jax.random.key(0)))
    before = jax.device_get(state)
    state, statistics = trainer.update(state, [pack(broken, layout())], CLIPPED, 1e-2)
    assert statistics["skipped"] == 1.0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
    state, statistics = trainer.update(state, [pack([], layout())], CLIPPED, 1e-2)
    assert statistics["skipped"] == 0.0, "nothing to train on is no failure"
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
    _, statistics = trainer.update(state, [pack(broken, layout()), pack(sequences(), layout())], CLIPPED, 1e-2)
    assert statistics["skipped"] == 0.5 and all(map(np.isfinite, statistics.values()))


def test_minibatches_without_a_token_to_train_on_are_not_computed_and_change_no_other(monkeypatch):
    """A group without signal leaves them empty; how many programs then waited at once made fake devices stand still."""
    one, none = pack(sequences(), layout()), pack([], layout())
    trainer = learner()
    calls, place = [], trainer._place
    monkeypatch.setattr(trainer, "_place", lambda micro: calls.append(micro) or place(micro))

    def updated(*minibatches):
        state = trainer.init(init_params(ARCH, jax.random.key(0)))
        state, statistics = trainer.update(state, minibatches, CLIPPED, 1e-2)
        return jax.device_get(state), statistics

    plain, padded = updated(one), updated(none, one, none)
    jax.tree.map(np.testing.assert_array_equal, plain, padded)
    assert updated(none, none)[1] == {"skipped": 0.0}, "no token has no loss and no entropy, not ones of 0"
    assert len(calls) == 2 * len(one)


@pytest.mark.parametrize("moments", ["bfloat16", "float8"])
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)])
def test_small_moments_learn_as_the_large_ones_do(moments, mesh):
    trainer = Learner(ARCH, ModelConfig(), OptimizerConfig(moments=moments), make_mesh(mesh) if mesh else one_device())
    batches = pack(sequences(2), layout(rows_multiple=4))
    state = trainer.init(init_params(ARCH, jax.random.key(0)))
    held = sum(array.nbytes for array in jax.tree.leaves(state.optimizer)) / sum(
        array.nbytes for array in jax.tree.leaves(state.params)
    )
    assert held < {"bfloat16": 1.01, "float8": 0.7}[moments], "of this narrow model a scale for every row is much"
    losses = []
    for _ in range(40):
        state, statistics = trainer.update(state, [batches], Supervised(), 1e-2)
        losses.append(statistics["loss"])
    assert losses[-1] < 0.3


def test_rounding_at_random_is_right_on_average_and_a_matter_of_place_and_step():
    x = jnp.full((256, 256), 1.3)
    rounded = round_at_random(x, 3, jnp.uint32(7))
    assert set(np.unique(rounded)) == {1.25, 1.375}
    assert float(rounded.mean()) == pytest.approx(1.3, abs=1e-3)
    np.testing.assert_array_equal(rounded, round_at_random(x, 3, jnp.uint32(7)))
    assert (rounded != round_at_random(x, 3, jnp.uint32(8))).mean() > 0.3


@pytest.mark.parametrize("scaled", [1.3, 2**-6 * 0.9, 2**-9 * 1.4, 2**-9 * 0.3])
def test_rounding_at_random_is_right_on_average_where_8_bits_have_no_mantissa_left(scaled):
    x = jnp.full((256, 256), -scaled)
    kept = round_at_random(x, 3, jnp.uint32(7), 2.0**-6).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    assert float(kept.mean()) == pytest.approx(-scaled, rel=0.02)
    assert len(np.unique(kept)) == 2


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [("constant", [1, 2, 2, 2, 2, 2]), ("linear", [1, 2, 2, 1.5, 1, 0.5]), ("cosine", [1, 2, 2, 1.625, 0.875, 0.5])],
)
def test_learning_rates_by_hand(schedule, wanted):
    round_ = RoundConfig(steps=6, learning_rate=2.0, ramp_steps=2, schedule=schedule, final_learning_rate=0.5)
    found = [learning_rate(round_, step) for step in range(6)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_supervised_updates_learn_a_sequence_by_heart():
    trainer, batches = learner(), pack(sequences(2), layout())
    state = trainer.init(init_params(ARCH, jax.random.key(0)))
    losses = []
    for _ in range(40):
        state, statistics = trainer.update(state, [batches], Supervised(), 1e-2)
        losses.append(statistics["loss"])
    assert losses[0] == pytest.approx(np.log(48), rel=0.05)
    assert losses[-1] < 0.3


def test_positive_advantages_make_their_tokens_likelier():
    given = sequences(4)
    given = [
        Sequence(s.prompt, s.response, np.full(len(s.response), 1.0 if i < 2 else -1.0, np.float32), s.logprobs)
        for i, s in enumerate(given)
    ]
    params, *_ = change(learner(), pack(given, layout()))
    before = init_params(ARCH, jax.random.key(0))

    def total(params, s):
        tokens = jnp.asarray(np.concatenate([s.prompt, s.response]))[None]
        hidden, _ = forward(params, ARCH, tokens[:, :-1], jnp.arange(tokens.shape[1] - 1)[None])
        return float(token_logprobs(params, ARCH, hidden, tokens[:, 1:])[0][0, len(s.prompt) - 1 :].sum())

    params = jax.tree.map(jnp.asarray, params)
    rises = [total(params, s) - total(before, s) for s in given]
    assert min(rises[:2]) > 0 > max(rises[2:])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_leaves_norms_and_biases_alone_and_nothing_else(name):
    trainer = Learner(ARCH, ModelConfig(), OptimizerConfig(name=name, weight_decay=0.5), one_device())
    params = init_params(ARCH, jax.random.key(0))
    state = trainer.init(jax.tree.map(jnp.ones_like, params))
    still = [Sequence(s.prompt, s.response, np.zeros_like(s.advantages), s.logprobs) for s in sequences()]
    state, _ = trainer.update(state, [pack(still, layout())], CLIPPED, 0.1)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="."): float(jnp.abs(x - 1).max())
        for path, x in jax.tree_util.tree_leaves_with_path(state.params)
    }
    assert {name for name, size in moved.items() if size == 0} == {n for n in moved if n.endswith(("norm", "bias"))}
    assert moved["layers.ffn.up"] == pytest.approx(0.05, rel=1e-4)


def test_forced_tokens_are_not_trained_on():
    free = sequences(2)
    forced = [dataclasses.replace(one, forced=np.arange(len(one.response)) == 1) for one in free]
    (whole,), (without,) = pack(free, layout()), pack(forced, layout())
    np.testing.assert_array_equal(whole.tokens, without.tokens)
    assert whole.mask.sum() - without.mask.sum() == 2
    left_out = (whole.mask == 1) & (without.mask == 0)
    assert not without.advantages[left_out].any() and not without.sampler_logprobs[left_out].any()
    np.testing.assert_array_equal(whole.advantages[~left_out], without.advantages[~left_out])
