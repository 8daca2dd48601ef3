"""One token for every row from its logits: greedy, or from the tempered and truncated distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # vocabulary entries that are summed before one is searched for inside them


@dataclass(frozen=True)
class Greedy:
    """The likeliest token."""


@dataclass(frozen=True)
class Nucleus:
    """A draw at some temperature. filtered: keep top_k tokens (0: all), of these the smallest set holding top_p, and of
    these the ones that have at least min_p of the likeliest one's probability; what is as likely as the last one kept
    is kept too.
    """

    filtered: bool
    top_k: int = 0


Drawing = Greedy | Nucleus


class Drawn(NamedTuple):
    """tokens int32 [B]; logprobs of what was drawn from, policy_logprobs of the untempered policy, float32 [B]."""

    tokens: jax.Array
    logprobs: jax.Array
    policy_logprobs: jax.Array


def draw(
    drawing: Drawing,
    logits_BV: jax.Array,
    keys_B2: jax.Array,
    positions_B: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    forced_B: jax.Array | None = None,
) -> Drawn:
    """Draw the token that will stand at `positions_B` in each row; the row's key is folded with that position.

    forced_B: tokens that stand there whatever is drawn, with the log-probabilities of such a draw, -inf where it could
    not be; -1 where none.

    A draw needs one uniform number a row (inverse of the distribution function), not one for each vocabulary entry.
    """
    scores_BV = logits_BV.astype(jnp.float32)
    scores_BV -= scores_BV.max(axis=-1, keepdims=True)
    whole_B = jnp.exp(scores_BV).sum(axis=-1)
    if isinstance(drawing, Greedy):
        tokens = _unless_forced(jnp.argmax(scores_BV, axis=-1).astype(jnp.int32), forced_B)
        return Drawn(tokens, jnp.zeros(tokens.shape, jnp.float32), _pick(scores_BV, tokens) - jnp.log(whole_B))
    # What is smaller than this is 0 to most devices, and 0 / 0 no number.
    tempered_BV = scores_BV / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    if drawing.filtered:
        tempered_BV = _truncate(tempered_BV, drawing.top_k, top_p, min_p)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys_B2), positions_B)
    uniform_B = jax.vmap(jax.random.uniform)(keys)
    tokens, sampled_B = invert(jnp.exp(tempered_BV), uniform_B)
    tokens = _unless_forced(tokens, forced_B)
    logprobs_B = _pick(tempered_BV, tokens) - jnp.log(sampled_B)
    return Drawn(tokens, logprobs_B, _pick(scores_BV, tokens) - jnp.log(whole_B))


def _unless_forced(tokens_B: jax.Array, forced_B: jax.Array | None) -> jax.Array:
    return tokens_B if forced_B is None else jnp.where(forced_B < 0, tokens_B, forced_B)


def invert(weights_BV: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the running sum of the weights passes the share `uniform_B` (in [0, 1)) of their whole, int32 [B], never at
    an index that weighs nothing; and that whole, float32 [B].

    Two levels, so that the running sums are short: first over blocks of the vocabulary, then inside one block.
    """
    B, V = weights_BV.shape
    padded = jnp.pad(weights_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    block_sums = padded.sum(axis=-1)
    whole_B = block_sums.sum(axis=-1)
    block, rest = _search(block_sums, uniform_B * whole_B)
    # A sum of one block and zeros: to take the block from a vocabulary that is spread, jax 0.12's compiler aborts.
    chosen = jnp.arange(padded.shape[1]) == block[:, None]
    inside = jnp.where(chosen[:, :, None], padded, 0.0).sum(axis=1)
    index, _ = _search(inside, jnp.minimum(rest, inside.sum(axis=-1)))
    return (block * BLOCK + index).astype(jnp.int32), whole_B


def _search(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the running sum of each row first exceeds its target, and how much of the target is left there."""
    running = jnp.cumsum(weights, axis=-1)
    # Long sums are added in a tree, whose roundings may rise where a weight is 0: such an entry is passed over. If they
    # leave a target that nothing exceeds, the last entry with a weight stands in.
    weighs = weights > 0
    exceeds = weighs & (running > target[:, None])
    last = weights.shape[-1] - 1 - jnp.argmax(weighs[:, ::-1], axis=-1)
    index = jnp.where(exceeds.any(axis=-1), jnp.argmax(exceeds, axis=-1), last)
    before = jnp.take_along_axis(running - weights, index[:, None], axis=-1)[:, 0]
    return index, jnp.maximum(target - before, 0.0)


def _truncate(scores_BV: jax.Array, top_k: int, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """-inf for what isn't kept of scores whose largest is 0."""
    below_BV = -scores_BV
    kept_BV = below_BV <= -jnp.log(min_p)
    if top_k:
        within_BV = below_BV <= _reach(below_BV, jnp.ones_like(scores_BV), jnp.float32(top_k))
        scores_BV, kept_BV = jnp.where(within_BV, scores_BV, -jnp.inf), kept_BV & within_BV
    weights_BV = jnp.exp(scores_BV)
    enough_B1 = jnp.where(top_p < 1, top_p * weights_BV.sum(axis=-1, keepdims=True), jnp.inf)
    return jnp.where(kept_BV & (below_BV <= _reach(below_BV, weights_BV, enough_B1)), scores_BV, -jnp.inf)


def _reach(below_BV: jax.Array, weights_BV: jax.Array, enough: jax.Array) -> jax.Array:
    """The farthest below the best, float32 [B, 1], above which weights sum to less than `enough`: where it is reached.

    Bisected over bit patterns, which order as numbers of 0 and more do: 31 sums, exact, where sorting a vocabulary on a
    TPU takes a hundred and more exchanges of all of it.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        least, most = bounds
        middle = least + (most - least + 1) // 2
        above_BV = below_BV < jax.lax.bitcast_convert_type(middle, jnp.float32)
        short = jnp.where(above_BV, weights_BV, 0.0).sum(axis=-1, keepdims=True) < enough
        return jnp.where(short, middle, least), jnp.where(short, most, middle - 1)

    first = jnp.zeros_like(below_BV[:, :1], jnp.int32)
    infinite = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, (first, first + infinite))[0], jnp.float32)


def _pick(table_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table_BV, tokens_B[:, None], axis=-1)[:, 0]
