"""Log-probabilities and entropy from hidden states, in chunks: the logits of a whole batch never exist at once.

11,000 positions times a vocabulary of 152,000 in 32 bits would be 6.7 GB for each sequence and copy.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from pkv.mesh import over_tokens
from pkv.model import Arch, Params, head, logits

CHUNK = 512  # positions whose logits exist at the same time on a device

Pair = tuple[jax.Array, jax.Array]


def token_logprobs(params: Params, arch: Arch, hidden_BTD: jax.Array, targets_BT: jax.Array) -> Pair:
    """Log-probability of each target and entropy of each prediction, nats, float32 [B, T] both, with their gradients.

    Every device goes through its own tokens, and over tensor through its own part of the vocabulary. The backward pass
    computes each chunk's logits again: of a chunk a number a token is kept, the logarithm of its normaliser.
    """
    return over_tokens(partial(_in_chunks, arch=arch))(head(params, arch), hidden_BTD, targets_BT)


def _in_chunks(params: Params, hidden_BTD: jax.Array, targets_BT: jax.Array, *, arch: Arch) -> Pair:
    B, T, D = hidden_BTD.shape
    size = min(CHUNK, B * T)
    pad = -(B * T) % size
    hidden_CSD = jnp.pad(hidden_BTD.reshape(B * T, D), ((0, pad), (0, 0))).reshape(-1, size, D)
    targets_CS = jnp.pad(targets_BT.reshape(B * T), (0, pad)).reshape(-1, size)
    logprobs_CS, entropy_CS = cast(Pair, _chunked(arch, params, hidden_CSD, targets_CS))
    return logprobs_CS.reshape(-1)[: B * T].reshape(B, T), entropy_CS.reshape(-1)[: B * T].reshape(B, T)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(arch: Arch, params: Params, hidden_CSD: jax.Array, targets_CS: jax.Array) -> Pair:
    return _forward(arch, params, hidden_CSD, targets_CS)[0]


def _forward(arch: Arch, params: Params, hidden_CSD: jax.Array, targets_CS: jax.Array) -> tuple[Pair, tuple[Any, ...]]:
    def chunk(carry: None, xs: Pair) -> tuple[None, tuple[jax.Array, ...]]:
        hidden_SD, targets_S = xs
        scores_SV = logits(params, arch, hidden_SD)
        whole_S = jax.nn.logsumexp(scores_SV, axis=-1)
        mean_S = jnp.sum(jnp.exp(scores_SV - whole_S[:, None]) * scores_SV, axis=-1)
        chosen_S = jnp.take_along_axis(scores_SV, targets_S[:, None], axis=-1)[:, 0]
        return carry, (chosen_S - whole_S, whole_S - mean_S, whole_S)

    _, (logprobs_CS, entropy_CS, whole_CS) = jax.lax.scan(chunk, None, (hidden_CSD, targets_CS))
    return (logprobs_CS, entropy_CS), (params, hidden_CSD, targets_CS, whole_CS, entropy_CS)


def _backward(arch: Arch, kept: tuple[Any, ...], gradients: Pair) -> tuple[Params, jax.Array, None]:
    """With p = softmax(z): d log p[y] / dz = onehot(y) − p, and dH / dz = −p · (log p + H)."""
    params, hidden_CSD, targets_CS, whole_CS, entropy_CS = kept

    def chunk(sums: Params, xs: tuple[jax.Array, ...]) -> tuple[Params, jax.Array]:
        hidden_SD, targets_S, whole_S, entropy_S, of_logprob_S, of_entropy_S = xs
        scores_SV, pull = jax.vjp(lambda params, hidden: logits(params, arch, hidden), params, hidden_SD)
        logs_SV = scores_SV - whole_S[:, None]
        shares_SV = jnp.exp(logs_SV)
        chosen_SV = jnp.arange(scores_SV.shape[-1]) == targets_S[:, None]
        through_SV = of_logprob_S[:, None] * (chosen_SV - shares_SV)
        through_SV -= of_entropy_S[:, None] * shares_SV * (logs_SV + entropy_S[:, None])
        of_params, of_hidden_SD = pull(through_SV)
        return jax.tree.map(jnp.add, sums, of_params), of_hidden_SD

    zeros = jax.tree.map(jnp.zeros_like, params)
    xs = (hidden_CSD, targets_CS, whole_CS, entropy_CS, *gradients)
    of_params, of_hidden_CSD = jax.lax.scan(chunk, zeros, xs)
    return of_params, of_hidden_CSD, None


_chunked.defvjp(_forward, _backward)
