"""Log-probabilities and entropy from hidden states, in chunks: the logits of a whole batch never exist at once.

11,000 positions times a vocabulary of 152,000 in 32 bits would be 6.7 GB for each sequence and copy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pkv.model import Arch, Params, logits

CHUNK = 512  # positions whose logits exist at the same time


def token_logprobs(
    params: Params, arch: Arch, hidden_BTD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of each prediction, nats, float32 [B, T] both.

    The backward pass computes each chunk's logits again. Entropy carries no gradient.
    """
    B, T, D = hidden_BTD.shape
    pad = -(B * T) % CHUNK
    hidden_CSD = jnp.pad(hidden_BTD.reshape(B * T, D), ((0, pad), (0, 0))).reshape(-1, CHUNK, D)
    targets_CS = jnp.pad(targets_BT.reshape(B * T), (0, pad)).reshape(-1, CHUNK)

    @jax.checkpoint
    def chunk(carry: None, xs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden_SD, targets_S = xs
        logprobs_SV = jax.nn.log_softmax(logits(params, arch, hidden_SD))
        frozen_SV = jax.lax.stop_gradient(logprobs_SV)
        entropy_S = -jnp.sum(jnp.exp(frozen_SV) * frozen_SV, axis=-1)
        return carry, (jnp.take_along_axis(logprobs_SV, targets_S[:, None], axis=-1)[:, 0], entropy_S)

    _, (logprobs_CS, entropy_CS) = jax.lax.scan(chunk, None, (hidden_CSD, targets_CS))
    return logprobs_CS.reshape(-1)[: B * T].reshape(B, T), entropy_CS.reshape(-1)[: B * T].reshape(B, T)
