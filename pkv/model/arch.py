"""What a decoder is made of, as features; never which family it came from. No weights here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """A decoder-only transformer. Frozen and hashable, so that it can be a static argument of `jax.jit`.

    A new family that needs something new gets a new field here, with the default that switches it off.
    """

    vocab_size: int  # V
    hidden: int  # D
    layers: int  # L
    heads: int  # N, query heads
    kv_heads: int  # K, key-value heads; N is a multiple of K
    head_size: int  # H
    ffn: int  # F
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False  # an RMS norm over H on queries and keys, before the rotation
    tied_embeddings: bool = False  # the output projection is the embedding table, transposed
    max_positions: int = 32_768  # the context that the checkpoint was made for; nothing here is sized by it
    init_std: float = 0.02  # of random weights
