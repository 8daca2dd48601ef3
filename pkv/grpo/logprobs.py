"""Log-probabilities and entropy from hidden states, in parts: the logits of a whole batch never exist at once.

11,000 positions times a vocabulary of 152,000 in 32 bits would be 6.7 GB for each sequence and copy. A loop over parts
of the vocabulary, each for all positions, reads the table once and writes its gradient once; a loop over positions
would add up the gradient of the whole table at every turn.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from pkv.mesh import over_tokens, vocabulary_axis
from pkv.model import Arch, Params, head, logits, param_axes

MOST_LOGITS, MOST_LOGITS_ON_GPU = 2**24, 2**26  # that exist at the same time on a device
LANES = 128  # so many columns of the table are the least part, and each part is a multiple of them

Pair = tuple[jax.Array, jax.Array]


def token_logprobs(params: Params, arch: Arch, hidden_BTD: jax.Array, targets_BT: jax.Array) -> Pair:
    """Log-probability of each target and entropy of each prediction, nats, float32 [B, T] both, with their gradients.

    Every device goes through its own tokens and, over tensor, through its own columns of the table. The backward pass
    computes the logits again: kept is a number a token, the logarithm of its normaliser.
    """
    return over_tokens(partial(_own, arch=arch), head(param_axes(arch), arch))(
        head(params, arch), hidden_BTD, targets_BT
    )


def _own(params: Params, hidden_BTD: jax.Array, targets_BT: jax.Array, *, arch: Arch) -> Pair:
    B, T, D = hidden_BTD.shape
    targets_S = targets_BT.reshape(B * T)
    if (axis := vocabulary_axis()) is not None:  # columns are numbered from this device's first one on
        targets_S -= jax.lax.axis_index(axis) * _columns(arch, params)
    logprobs_S, entropy_S = cast(Pair, _by_parts(arch, axis, params, hidden_BTD.reshape(B * T, D), targets_S))
    return logprobs_S.reshape(B, T), entropy_S.reshape(B, T)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_parts(arch: Arch, axis: str | None, params: Params, hidden_SD: jax.Array, targets_S: jax.Array) -> Pair:
    return _forward(arch, axis, params, hidden_SD, targets_S)[0]


def _forward(
    arch: Arch, axis: str | None, params: Params, hidden_SD: jax.Array, targets_S: jax.Array
) -> tuple[Pair, tuple[Any, ...]]:
    """The softmax's sums as they are after each part (arXiv 1805.02867), and with them that of p · z."""

    def part(carry: tuple[jax.Array, ...], number: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        before_S, whole_S, mixed_S, chosen_S = carry
        taken, ids_V, fresh_V = _taken(arch, params, number, len(hidden_SD))
        scores_SV = logits(taken, arch, hidden_SD)
        most_S = jnp.maximum(before_S, scores_SV.max(axis=-1))
        shares_SV = jnp.where(fresh_V, jnp.exp(scores_SV - most_S[:, None]), 0)
        kept_S = jnp.exp(before_S - most_S)
        whole_S = whole_S * kept_S + shares_SV.sum(axis=-1)
        mixed_S = mixed_S * kept_S + (shares_SV * scores_SV).sum(axis=-1)
        chosen_S += jnp.where(fresh_V & (ids_V == targets_S[:, None]), scores_SV, 0).sum(axis=-1)
        return (most_S, whole_S, mixed_S, chosen_S), None

    zeros_S = jnp.zeros_like(hidden_SD[:, 0], jnp.float32)
    parts = jnp.arange(_count(arch, params, len(hidden_SD)))
    (most_S, *sums), _ = jax.lax.scan(part, (zeros_S - jnp.inf, zeros_S, zeros_S, zeros_S), parts)
    if axis is not None:
        own_S, most_S = most_S, jax.lax.pmax(most_S, axis)
        kept_S = jnp.exp(own_S - most_S)
        sums = jax.lax.psum([sums[0] * kept_S, sums[1] * kept_S, sums[2]], axis)
    whole_S, mixed_S, chosen_S = sums
    normaliser_S = most_S + jnp.log(whole_S)
    entropy_S = normaliser_S - mixed_S / whole_S
    return (chosen_S - normaliser_S, entropy_S), (params, hidden_SD, targets_S, normaliser_S, entropy_S)


def _backward(arch: Arch, axis: str | None, kept: tuple[Any, ...], gradients: Pair) -> tuple[Params, jax.Array, None]:
    """With p = softmax(z): d log p[y] / dz = onehot(y) − p, and dH / dz = −p · (log p + H); of own columns."""
    params, hidden_SD, targets_S, normaliser_S, entropy_S = kept
    of_logprob_S1, of_entropy_S1 = (gradient[:, None] for gradient in gradients)

    def part(sums: tuple[jax.Array, Params], number: jax.Array) -> tuple[tuple[jax.Array, Params], None]:
        of_hidden_SD, of_params = sums
        taken, ids_V, fresh_V = _taken(arch, params, number, len(hidden_SD))
        scores_SV = logits(taken, arch, hidden_SD)
        logs_SV = scores_SV - normaliser_S[:, None]
        shares_SV = jnp.exp(logs_SV)
        through_SV = of_logprob_S1 * ((ids_V == targets_S[:, None]) - shares_SV)
        through_SV -= of_entropy_S1 * shares_SV * (logs_SV + entropy_S[:, None])
        if arch.logit_cap is not None:
            through_SV *= 1 - (scores_SV / arch.logit_cap) ** 2
        # In the dtype of compute, as all products are: of 32-bit numbers GPUs make slow ones.
        through_SV = jnp.where(fresh_V, through_SV, 0).astype(hidden_SD.dtype)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        table = "VD" if arch.tied_embeddings else "DV"
        more_SD = product(f"SV,{table}->SD", through_SV, jax.tree.leaves(taken)[0].astype(hidden_SD.dtype))
        of_taken = product(f"SV,SD->{table}", through_SV, hidden_SD)
        add = partial(_added, arch, ids_V[0])
        return (of_hidden_SD + more_SD, jax.tree.map(lambda whole: add(whole, of_taken), of_params)), None

    zeros = jnp.zeros_like(hidden_SD, jnp.float32), jax.tree.map(jnp.zeros_like, params)
    parts = jnp.arange(_count(arch, params, len(hidden_SD)))
    (of_hidden_SD, of_params), _ = jax.lax.scan(part, zeros, parts)
    return of_params, of_hidden_SD.astype(hidden_SD.dtype), None


_by_parts.defvjp(_forward, _backward)


def _axis(arch: Arch) -> int:
    """Which axis of the table is the vocabulary's."""
    return 0 if arch.tied_embeddings else 1


def _columns(arch: Arch, params: Params) -> int:
    (table,) = jax.tree.leaves(params)
    return table.shape[_axis(arch)]


def _size(arch: Arch, params: Params, tokens: int) -> int:
    most = MOST_LOGITS_ON_GPU if jax.default_backend() == "gpu" else MOST_LOGITS
    return min(_columns(arch, params), max(LANES, most // tokens // LANES * LANES))


def _count(arch: Arch, params: Params, tokens: int) -> int:
    return -(-_columns(arch, params) // _size(arch, params, tokens))


def _taken(arch: Arch, params: Params, number: jax.Array, tokens: int) -> tuple[Params, jax.Array, jax.Array]:
    """A part of the table; int32 [V], its columns' numbers; bool [V], which of them were in no earlier part.

    The last part begins earlier where it would go beyond the end.
    """
    size = _size(arch, params, tokens)
    first = jnp.minimum(number * size, _columns(arch, params) - size)
    ids_V = first + jnp.arange(size)
    take = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=_axis(arch))
    return jax.tree.map(take, params), ids_V, ids_V >= number * size


def _added(arch: Arch, first: jax.Array, table: jax.Array, part: jax.Array) -> jax.Array:
    """The table's gradient with that of a part in it."""
    axis = _axis(arch)
    part = part + jax.lax.dynamic_slice_in_dim(table, first, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(table, part.astype(table.dtype), first, axis)
