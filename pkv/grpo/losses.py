"""Losses as small pure functions on token arrays, one number for each token.

The update sums them times the weights that packing gave the tokens, so that micro-batches, devices and packing cannot
change a gradient (DAPO, arXiv 2503.14476, section 3.3). All arrays are float32 of one shape, natural logarithms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pkv.config import PolicyLoss

Average = Callable[[jax.Array], jax.Array]  # of a quantity over each sequence's trained tokens, at each of its tokens


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy on the response tokens."""


Loss = Supervised | PolicyLoss


class Logprobs(NamedTuple):
    """Of the response tokens: under the weights being trained; under the trainer's before this batch's first update;
    under what the sampler drew from; under the reference, or None where no divergence is asked for."""

    now: jax.Array
    old: jax.Array
    sampler: jax.Array
    reference: jax.Array | None = None


class TokenLosses(NamedTuple):
    """The loss of each token and what is worth watching, each of the tokens' shape.

    clipped_low, clipped_high: 1 where the clip took the gradient away (cispo: held the weight), with the ratio below or
    above. rejected: 1 in a rejected sequence. kl_reference: the k3 estimate, where there is a reference.
    """

    loss: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array
    rejected: jax.Array
    kl_reference: jax.Array


def token_losses(
    loss: Loss, logprobs: Logprobs, entropy: jax.Array, advantages: jax.Array, average: Average
) -> TokenLosses:
    """The loss of each token. entropy: of each prediction, nats, with its gradient; its bonus is A3C's (1602.01783, 4).

    The divergence from the reference is a loss (GRPO, 2402.03300, equation 3), or taken off the reward, as k1 is.
    """
    none = jnp.zeros_like(logprobs.now)
    if isinstance(loss, Supervised):
        return TokenLosses(-logprobs.now, none, none, none, none)
    penalty = divergence = none
    if logprobs.reference is not None:
        divergence = k3(logprobs.now, logprobs.reference)
        if loss.kl == "k1":
            advantages = advantages - loss.kl_weight * jax.lax.stop_gradient(k1(logprobs.old, logprobs.reference))
        else:
            penalty = loss.kl_weight * {"k2": k2, "k3": k3}[loss.kl](logprobs.now, logprobs.reference)
    correction, rejected = importance_weights(logprobs, loss.importance_cap, loss.reject, average)
    surrogate, low, high = SURROGATES[loss.surrogate](loss, logprobs, advantages, average)
    total = -surrogate * correction + penalty - loss.entropy * entropy
    kept = 1.0 - rejected
    return TokenLosses(total * kept, low * kept, high * kept, rejected, divergence)


def importance_weights(logprobs: Logprobs, cap: float, reject: float, average: Average) -> tuple[jax.Array, jax.Array]:
    """Truncated importance weights of the tokens against the sampler (IMPALA, arXiv 1802.01561, section 4.1), and 1
    where their sequence is rejected.

    The weights carry no gradient. At 11,000 tokens a product of ratios explodes: weights are per token, and sequences
    are judged by the geometric mean of theirs (GSPO's ratio, 2507.18071, equation 7).
    """
    difference = logprobs.old - logprobs.sampler
    weights = jax.lax.stop_gradient(jnp.minimum(jnp.exp(difference), cap))
    if not reject:
        return weights, jnp.zeros_like(weights)
    return weights, jax.lax.stop_gradient((jnp.abs(average(difference)) > jnp.log(reject)).astype(jnp.float32))


# Surrogates, to be made large: each gives its value, and where the clip binds below and above.


def clipped(
    loss: PolicyLoss, logprobs: Logprobs, advantages: jax.Array, average: Average
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """min(r·A, clip(r)·A) with r the ratio of the token's probabilities (PPO, arXiv 1707.06347, equation 7)."""
    return _clip(loss, jnp.exp(logprobs.now - logprobs.old), advantages)


def gspo(
    loss: PolicyLoss, logprobs: Logprobs, advantages: jax.Array, average: Average
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same with one ratio for all tokens of a sequence, the geometric mean of theirs (arXiv 2507.18071, 7 and 13).

    A token carries the gradient of its own log-probability, times the sequence's ratio.
    """
    whole = jax.lax.stop_gradient(average(logprobs.now - logprobs.old))
    return _clip(loss, jnp.exp(whole + logprobs.now - jax.lax.stop_gradient(logprobs.now)), advantages)


def cispo(
    loss: PolicyLoss, logprobs: Logprobs, advantages: jax.Array, average: Average
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """sg(min(r, cap))·A·log p (arXiv 2506.13585, equations 4 and 5, without their lower clip)."""
    ratio = jax.lax.stop_gradient(jnp.exp(logprobs.now - logprobs.old))
    held = (ratio > loss.cap).astype(jnp.float32)
    return jnp.minimum(ratio, loss.cap) * advantages * logprobs.now, jnp.zeros_like(held), held


def _clip(loss: PolicyLoss, ratio: jax.Array, advantages: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    free = ratio * advantages
    usual_low, usual_high = USUAL_CLIPS[loss.surrogate]
    held = jnp.clip(ratio, 1 - (loss.clip_low or usual_low), 1 + (loss.clip_high or usual_high)) * advantages
    surrogate, binding = jnp.minimum(free, held), free > held
    if loss.dual_clip:
        worst = loss.dual_clip * advantages
        binding |= (advantages < 0) & (worst > surrogate)
        surrogate = jnp.where(advantages < 0, jnp.maximum(surrogate, worst), surrogate)
    low, high = binding & (ratio < 1), binding & (ratio > 1)
    return surrogate, low.astype(jnp.float32), high.astype(jnp.float32)


USUAL_CLIPS = {"clipped": (0.2, 0.28), "gspo": (3e-4, 4e-4)}  # DAPO, arXiv 2503.14476, 4.1; GSPO, 2507.18071, 5.1
SURROGATES = {"clipped": clipped, "gspo": gspo, "cispo": cispo}


def k1(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """log p − log q: unbiased (Schulman, Approximating KL Divergence, 2020, as are k2 and k3).

    In the reward it is each token's own, without what follows from it: its gradient is k2's, on average.
    """
    return logprobs - reference


def k2(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """(log p − log q)²/2: its gradient is that of the divergence."""
    return 0.5 * (logprobs - reference) ** 2


def k3(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """q/p − 1 − log q/p: unbiased, never below 0 (GRPO, arXiv 2402.03300, equation 4)."""
    difference = reference - logprobs
    return jnp.exp(difference) - 1 - difference
