"""One token from its logits: by its distribution, never what has no probability, and of what the filters keep."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkv.sampling import row_keys
from pkv.sampling.drawing import Nucleus, _search, _truncate, draw, invert


def test_draws_follow_the_distribution():
    weights = np.random.default_rng(0).random(300) ** 4
    weights[::3] = 0
    probabilities = weights / weights.sum()
    N = 40_000
    drawn = np.asarray(
        invert(jnp.broadcast_to(jnp.asarray(probabilities, jnp.float32), (N, 300)), (jnp.arange(N) + 0.5) / N)[0]
    )
    counts = np.bincount(drawn, minlength=300)
    assert not counts[probabilities == 0].any()
    np.testing.assert_allclose(counts / N, probabilities, atol=3 / N)


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(np.float32(1), np.float32(0))])
def test_the_ends_of_the_unit_interval_never_draw_what_has_no_probability(uniform):
    probabilities = jnp.zeros((1, 300)).at[0, jnp.array([7, 250])].set(0.5)
    assert int(invert(probabilities, jnp.full(1, uniform))[0][0]) in (7, 250)


def test_a_long_vocabulary_never_draws_what_has_no_probability():
    """The running sum over 1,187 blocks is added in a tree, and rises by a rounding where a block's weight is 0."""
    random, V = np.random.default_rng(0), 151_936
    for uniforms in ([], [0.6928966], [0.63166094], [0.6846694, 0.8361306]):
        kept, shares = random.choice(V, 50, replace=False), random.random(50) ** 3
        weights = jnp.zeros(V).at[kept].set(jnp.asarray(shares / shares.sum(), jnp.float32))
        probabilities = jax.nn.softmax(jnp.log(weights))
        for uniform in (*uniforms, np.nextafter(np.float32(1), np.float32(0))):
            token = int(jax.jit(invert)(probabilities[None], jnp.full(1, uniform, jnp.float32))[0][0])
            assert token in kept and probabilities[token] > 0


@pytest.mark.parametrize("weights, drawn", [([0, 2, 0, 3, 0], 3), ([5, 1, 0, 0, 0], 1), ([0, 0, 4, 0, 0], 2)])
def test_a_target_that_no_running_sum_exceeds_draws_the_last_with_weight(weights, drawn):
    weights = jnp.asarray([weights], jnp.float32)
    index, rest = _search(weights, weights.sum(axis=-1))
    assert int(index[0]) == drawn and float(rest[0]) == float(weights[0, drawn])


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-50])
@pytest.mark.parametrize("drawing", [Nucleus(False), Nucleus(True, 3)])
def test_however_small_a_temperature_is_the_likeliest_token_is_drawn(drawing, temperature):
    logits = jax.random.normal(jax.random.key(0), (4, 200))
    keys = jnp.asarray(row_keys(0, "draw", 0, ["a"], 4)[0])
    args = logits, keys, jnp.arange(4), jnp.float32(temperature), jnp.float32(1), jnp.float32(0)
    drawn = jax.jit(draw, static_argnums=0)(drawing, *args)
    np.testing.assert_array_equal(drawn.tokens, logits.argmax(axis=-1))
    np.testing.assert_array_equal(drawn.logprobs, np.zeros(4))


def test_top_k_top_p_and_min_p_keep_what_they_say():
    off = jnp.float32(0)
    table = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]])).repeat(4000, 0)
    keys = jnp.asarray(row_keys(0, "draw", 0, [f"{i}" for i in range(40)], 100).reshape(-1, 2))
    args = (table, keys, jnp.zeros(4000, jnp.int32), jnp.float32(1))
    by_k = draw(Nucleus(True, 3), *args, jnp.float32(1), off)
    assert set(np.unique(by_k.tokens)) == {0, 1, 2}
    by_p = draw(Nucleus(True, 0), *args, jnp.float32(0.7), off)
    assert set(np.unique(by_p.tokens)) == {0, 1}, "the token that crosses 0.7 is kept"
    np.testing.assert_allclose(by_p.logprobs, np.log(np.array([2 / 3, 1 / 3]))[np.asarray(by_p.tokens)], rtol=1e-5)
    np.testing.assert_allclose(by_p.policy_logprobs, np.log(np.array([0.5, 0.25]))[np.asarray(by_p.tokens)], rtol=1e-5)
    by_m = draw(Nucleus(True, 0), *args, jnp.float32(1), jnp.float32(0.25))
    assert set(np.unique(by_m.tokens)) == {0, 1, 2}, "0.15 is more than a quarter of 0.5, 0.1 is less"
    np.testing.assert_allclose(by_m.logprobs, np.log(np.array([50, 25, 15]) / 90)[np.asarray(by_m.tokens)], rtol=1e-5)


@pytest.mark.parametrize("steps", [0, 4])  # 4: scores are quarters, so that many are equal
@pytest.mark.parametrize("top_k, top_p, min_p", [(0, 0.95, 0), (20, 0.9, 0), (20, 1, 0), (0, 1, 0.1), (9, 0.5, 0.02)])
def test_what_is_kept_is_what_sorting_would_keep(steps, top_k, top_p, min_p):
    scores = np.random.default_rng(0).normal(size=(8, 3000)).astype(np.float32)
    scores = np.round(steps * scores) / steps if steps else scores
    scores -= scores.max(axis=1, keepdims=True)
    kept = np.isfinite(_truncate(jnp.asarray(scores), top_k, jnp.float32(top_p), jnp.float32(min_p)))
    for row, of_row in zip(scores.astype(float), kept, strict=True):
        ordered = np.sort(row)[::-1]
        ordered = ordered[ordered >= ordered[top_k - 1]] if top_k else ordered
        shares = np.exp(ordered) / np.exp(ordered).sum()
        least = ordered[(np.cumsum(shares) - shares < top_p) | (top_p == 1)].min()
        np.testing.assert_array_equal(of_row, (row >= least) & (np.exp(row) >= min_p))
