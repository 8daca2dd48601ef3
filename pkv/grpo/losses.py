"""Losses as small pure functions on token arrays, one number for each token.

The update sums them and divides by the batch's token count, so that micro-batches, devices and packing cannot change a
gradient (DAPO, arXiv 2503.14476, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy on the response tokens."""


@dataclass(frozen=True)
class ClippedSurrogate:
    """PPO's clipped surrogate with DAPO's higher upper clip, and truncated importance sampling against the sampler."""

    clip_low: float
    clip_high: float
    importance_cap: float


Loss = Supervised | ClippedSurrogate


def token_losses(
    loss: Loss, logprobs: jax.Array, old_logprobs: jax.Array, sampler_logprobs: jax.Array, advantages: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss of each token and whether its ratio was clipped; all arrays float32 of one shape.

    logprobs: under the weights being trained. old_logprobs: the trainer's, before this batch's first update.
    sampler_logprobs: what the sampler drew from; their mismatch with old_logprobs is corrected by a weight of at most
    `importance_cap` that carries no gradient.
    """
    if isinstance(loss, Supervised):
        return -logprobs, jnp.zeros_like(logprobs)
    ratio = jnp.exp(logprobs - old_logprobs)
    clipped = jnp.clip(ratio, 1 - loss.clip_low, 1 + loss.clip_high)
    correction = jax.lax.stop_gradient(jnp.minimum(jnp.exp(old_logprobs - sampler_logprobs), loss.importance_cap))
    surrogate = jnp.minimum(ratio * advantages, clipped * advantages)
    binding = (ratio * advantages > clipped * advantages).astype(jnp.float32)
    return -surrogate * correction, binding
