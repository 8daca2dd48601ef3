"""Attention behind one function. Plain XLA; a kernel for one platform is another branch here and nowhere else."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

CHUNK = 128  # queries that meet their keys at the same time, at least
MOST_CHUNKS = 16  # unrolled copies of the attention of a row, at most


def attend(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array, *, causal: bool = False
) -> jax.Array:
    """Grouped-query attention with a 32-bit softmax: [B, T, N, H] in the queries' dtype.

    Query head n reads key-value head n // (N // K); keys and values are never repeated in memory. mask_BTS: bool, True
    where a query may look; every query must see at least one key. Keys lie with S last and values with H last, so that
    both products run along memory, and no layout makes XLA transpose the whole cache. causal: key t belongs to query t,
    and the mask shows nothing later; the work on later keys is then left out.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKHS.shape[1]
    size = max(CHUNK, -(-T // MOST_CHUNKS))
    if causal and size < T:
        ends = [(start, min(start + size, T)) for start in range(0, T, size)]
        parts = [attend(q_BTNH[:, a:b], k_BKHS[..., :b], v_BKSH[:, :, :b], mask_BTS[:, a:b, :b]) for a, b in ends]
        return jnp.concatenate(parts, axis=1)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    if T == 1:
        one = functools.partial(jax.lax.platform_dependent, cpu=_decode_on_cpu, default=_mix)
    else:
        one = _mix
    return one(q_BTKGH, k_BKHS, v_BKSH, mask_BTS).reshape(B, T, N, H)


def _mix(q_BTKGH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Each key-value head meets all queries of its group in one matrix product; the softmax divides at the end."""
    B, T, K, G, H = q_BTKGH.shape
    S = k_BKHS.shape[-1]
    q_BKQH = (q_BTKGH * H**-0.5).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores_BKQS = jnp.matmul(q_BKQH, k_BKHS, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKQS.reshape(B, K, G, T, S), jnp.finfo(jnp.float32).min)
    most = jax.lax.stop_gradient(scores_BKGTS.max(axis=-1, keepdims=True))
    shares_BKGTS = jnp.exp(scores_BKGTS - most)
    whole_BKGT1 = shares_BKGTS.sum(axis=-1, keepdims=True)
    shares_BKQS = shares_BKGTS.astype(v_BKSH.dtype).reshape(B, K, G * T, S)
    mixed_BKQH = jnp.matmul(shares_BKQS, v_BKSH, preferred_element_type=jnp.float32)
    mixed_BKGTH = mixed_BKQH.reshape(B, K, G, T, H) / whole_BKGT1  # in 32 bits, after the smaller of the two products
    return mixed_BKGTH.transpose(0, 3, 1, 2, 4).astype(v_BKSH.dtype)


def _decode_on_cpu(q_BTKGH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """The same for T = 1 as broadcast products and sums, which XLA's CPU compiler turns into loops along memory.

    Its batched matrix product calls a general routine for each of the B·K tiny matrices: 10 times slower here.
    """
    q_BKGH = q_BTKGH[:, 0].astype(jnp.float32)
    scores_BKGS = jnp.sum(q_BKGH[..., None] * k_BKHS[:, :, None].astype(jnp.float32), axis=-2)
    scores_BKGS = jnp.where(mask_BTS[:, :, None], scores_BKGS * q_BKGH.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    shares_BKGS = jax.nn.softmax(scores_BKGS, axis=-1)
    mixed_BKGH = jnp.sum(shares_BKGS[..., None] * v_BKSH[:, :, None].astype(jnp.float32), axis=-2)
    return mixed_BKGH[:, None].astype(v_BKSH.dtype)
