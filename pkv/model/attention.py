"""Attention behind one function. Plain XLA here; whole rows may go to one platform's own kernel (kernels.py)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pkv.model.kernels import SEGMENTS, Kernel, attend_cudnn, attend_splash

CHUNK = 128  # queries that meet their keys at the same time, at least
MOST_CHUNKS = 16  # unrolled copies of the attention of a row, at most


def attend(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    *,
    scale: float,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    tree: tuple[jax.Array, jax.Array] | None = None,
    window: int | None = None,
    local: bool | jax.Array = True,
    cap: float | None = None,
    kernel: Kernel = "xla",
    most_segments: int = SEGMENTS[-1],
) -> jax.Array:
    """Grouped-query attention with a 32-bit softmax: [B, T, N, H] in the queries' dtype.

    Query head n reads key-value head n // (N // K); keys and values are never repeated in memory. Keys lie with S last
    and values with H last, so that both products run along memory, and no layout makes XLA transpose the whole cache.

    Without positions_BT, key t belongs to query t, and a query sees the keys up to its own, with segments_BT those of
    its own segment; of these, with tree = (branches_BT, positions_BT), those of its own branch and of branch 0, and
    positions count, not places in the row. With positions_BT the keys are slots, and a query at position p sees those
    up to p.
    window: a query sees this many keys at most, its own and those before it; what lies outside of a row's windows is
    not computed. local: False switches the window off; a traced bool (of one layer in a scan) does so in the mask only.
    scale: what scores are multiplied by. cap: a score s then becomes cap · tanh(s / cap).
    kernel: what computes whole rows; cached keys are always met by XLA. most_segments: of a row, see `attend_cudnn`.
    """
    B, T, N, H = q_BTNH.shape
    K, S = v_BKSH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    if local is False or (window is not None and window >= S):
        window = None
    sees = partial(_mask, window=window, local=local)
    mix = partial(_mix, scale=scale, cap=cap)
    if positions_BT is not None:
        if T == 1:
            on_cpu = partial(_decode_on_cpu, scale=scale, cap=cap)
            mix = partial(jax.lax.platform_dependent, cpu=on_cpu, default=mix)
        return mix(q_BTKGH, k_BKHS, v_BKSH, sees(positions_BT, jnp.arange(S)[None])).reshape(B, T, N, H)

    if kernel != "xla":
        k_BTKH, v_BTKH = jnp.moveaxis(k_BKHS, 3, 1), v_BKSH.swapaxes(1, 2)
        if kernel == "splash":
            kind = {"window": window, "local": local, "cap": cap}
            return attend_splash(q_BTNH, k_BTKH, v_BTKH, segments_BT, scale=scale, **kind)
        masked = kernel == "cudnn_masked"
        kind = {"scale": scale, "window": window, "most_segments": most_segments, "masked": masked}
        return attend_cudnn(q_BTNH, k_BTKH, v_BTKH, segments_BT, **kind)

    branches_BT, places_BT = (None, jnp.arange(T)[None]) if tree is None else tree
    size = max(CHUNK, -(-T // MOST_CHUNKS))
    parts = []
    for a in range(0, T, size):
        b = min(a + size, T)
        first = 0 if window is None or local is not True or tree is not None else max(0, a - window + 1)
        mask_BTS = sees(places_BT[:, a:b], places_BT[:, first:b])
        if segments_BT is not None:
            mask_BTS &= segments_BT[:, a:b, None] == segments_BT[:, None, first:b]
        if branches_BT is not None:
            trunk_BTS = branches_BT[:, None, first:b] == 0
            mask_BTS &= (branches_BT[:, a:b, None] == branches_BT[:, None, first:b]) | trunk_BTS
        parts.append(mix(q_BTKGH[:, a:b], k_BKHS[..., first:b], v_BKSH[:, :, first:b], mask_BTS))
    return jnp.concatenate(parts, axis=1).reshape(B, T, N, H)


def _mask(queries_BT: jax.Array, keys_BS: jax.Array, *, window: int | None, local: bool | jax.Array) -> jax.Array:
    """bool [B, T, S]: which keys a query sees, from where both stand."""
    back_BTS = queries_BT[:, :, None] - keys_BS[:, None, :]
    if window is None:
        return back_BTS >= 0
    return (back_BTS >= 0) & ((back_BTS < window) | jnp.logical_not(local))


def _mix(
    q_BTKGH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array, *, scale: float, cap: float | None
) -> jax.Array:
    """Each key-value head meets all queries of its group in one matrix product; the softmax divides at the end."""
    B, T, K, G, H = q_BTKGH.shape
    S = k_BKHS.shape[-1]
    q_BKQH = (q_BTKGH * scale).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores_BKQS = _capped(jnp.matmul(q_BKQH, k_BKHS, preferred_element_type=jnp.float32), cap)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKQS.reshape(B, K, G, T, S), jnp.finfo(jnp.float32).min)
    most = jax.lax.stop_gradient(scores_BKGTS.max(axis=-1, keepdims=True))
    shares_BKGTS = jnp.exp(scores_BKGTS - most)
    whole_BKGT1 = shares_BKGTS.sum(axis=-1, keepdims=True)
    shares_BKQS = shares_BKGTS.astype(v_BKSH.dtype).reshape(B, K, G * T, S)
    mixed_BKQH = jnp.matmul(shares_BKQS, v_BKSH, preferred_element_type=jnp.float32)
    mixed_BKGTH = mixed_BKQH.reshape(B, K, G, T, H) / whole_BKGT1  # in 32 bits, after the smaller of the two products
    return mixed_BKGTH.transpose(0, 3, 1, 2, 4).astype(v_BKSH.dtype)


def _decode_on_cpu(
    q_BTKGH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array, *, scale: float, cap: float | None
) -> jax.Array:
    """The same for T = 1 as broadcast products and sums, which XLA's CPU compiler turns into loops along memory.

    Its batched matrix product calls a general routine for each of the B·K tiny matrices: 10 times slower here.
    """
    q_BKGH = q_BTKGH[:, 0].astype(jnp.float32)
    scores_BKGS = jnp.sum(q_BKGH[..., None] * k_BKHS[:, :, None].astype(jnp.float32), axis=-2)
    scores_BKGS = jnp.where(mask_BTS[:, :, None], _capped(scores_BKGS * scale, cap), jnp.finfo(jnp.float32).min)
    shares_BKGS = jax.nn.softmax(scores_BKGS, axis=-1)
    mixed_BKGH = jnp.sum(shares_BKGS[..., None] * v_BKSH[:, :, None].astype(jnp.float32), axis=-2)
    return mixed_BKGH[:, None].astype(v_BKSH.dtype)


def _capped(scores: jax.Array, cap: float | None) -> jax.Array:
    return scores if cap is None else cap * jnp.tanh(scores / cap)
