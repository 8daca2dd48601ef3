"""cuDNN's packed attention as JAX documents it, in XLA's terms: no GPU here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pkv.model.kernels import cudnn


def cudnn_in_words(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, sliding_window_length, mask_type):
    """By row the first token and the length of each segment, -1 where there is none."""
    assert mask_type == cudnn.MaskType.PADDING_CAUSAL and kv_seqlen is q_seqlen and kv_offsets is q_offsets
    at, (B, M) = np.arange(q.shape[1]), q_seqlen.shape
    assert q_offsets.shape == (B, M + 1)
    first, length = q_offsets[:, :M, None], q_seqlen[..., None]
    inside = ((first >= 0) & (at >= first) & (at < first + length)).astype(jnp.float32)  # [B, M, T]
    covered = (inside.sum(axis=1) == 1)[..., None, None]  # what is in no segment stays as it was in memory
    window = None if sliding_window_length is None else (sliding_window_length - 1, 0)
    mask = jnp.einsum("bmt,bms->bts", inside, inside)[:, None] > 0
    kind = {"mask": mask, "is_causal": True, "scale": scale, "local_window_size": window, "implementation": "xla"}
    return jnp.where(covered, jax.nn.dot_product_attention(q, k, v, **kind), jnp.nan)
