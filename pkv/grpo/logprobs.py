"""Log-probabilities and entropy from hidden states, in chunks: the logits of a whole batch never exist at once.

11,000 positions times a vocabulary of 152,000 in 32 bits would be 6.7 GB for each sequence and copy.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pkv.mesh import over_rows
from pkv.model import Arch, Params, head, logits

CHUNK = 512  # positions whose logits exist at the same time on a device


def token_logprobs(
    params: Params, arch: Arch, hidden_BTD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of each prediction, nats, float32 [B, T] both.

    Every device goes through its own rows. The backward pass computes each chunk's logits again. Entropy carries no
    gradient.
    """
    return over_rows(partial(_in_chunks, arch=arch))(head(params, arch), hidden_BTD, targets_BT)


def _in_chunks(
    params: Params, hidden_BTD: jax.Array, targets_BT: jax.Array, *, arch: Arch
) -> tuple[jax.Array, jax.Array]:
    B, T, D = hidden_BTD.shape
    size = min(CHUNK, B * T)
    pad = -(B * T) % size
    hidden_CSD = jnp.pad(hidden_BTD.reshape(B * T, D), ((0, pad), (0, 0))).reshape(-1, size, D)
    targets_CS = jnp.pad(targets_BT.reshape(B * T), (0, pad)).reshape(-1, size)

    @jax.checkpoint
    def chunk(carry: None, xs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden_SD, targets_S = xs
        logprobs_SV = jax.nn.log_softmax(logits(params, arch, hidden_SD))
        frozen_SV = jax.lax.stop_gradient(logprobs_SV)
        entropy_S = -jnp.sum(jnp.exp(frozen_SV) * frozen_SV, axis=-1)
        return carry, (jnp.take_along_axis(logprobs_SV, targets_S[:, None], axis=-1)[:, 0], entropy_S)

    _, (logprobs_CS, entropy_CS) = jax.lax.scan(chunk, None, (hidden_CSD, targets_CS))
    return logprobs_CS.reshape(-1)[: B * T].reshape(B, T), entropy_CS.reshape(-1)[: B * T].reshape(B, T)
