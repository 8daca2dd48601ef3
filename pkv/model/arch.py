"""What a decoder is made of, as features; never which family it came from. No weights here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from pkv.model.rope import LongRope, Scaling


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
    rope_scaling: Scaling | None = None
    rotary_share: float = 1.0  # of a head's dimensions turn, the first ones; the others say the same everywhere
    norm_eps: float = 1e-6
    norm_offset: bool = False  # norms multiply by 1 + weight
    post_norms: bool = False  # attention and feed-forward are normed once more before they are added to the stream
    qkv_bias: bool = False
    qk_norm: bool = False  # an RMS norm over H on queries and keys, before the rotation
    query_pre_attn_scalar: int | None = None  # scores are divided by its square root; None: by that of H
    attention_cap: float | None = None  # a score s becomes cap · tanh(s / cap)
    logit_cap: float | None = None  # the same for the scores of the next token
    window: int | None = None  # how many keys a query of a local layer sees, its own among them
    local_layers: tuple[bool, ...] = ()  # for each layer whether it is local; () if none is
    local_rope_theta: float | None = None  # local layers turn by this base, unscaled; None: like the others
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the feed-forward's gate
    scaled_embedding: bool = False  # the stream begins with the embedding times the square root of D
    tied_embeddings: bool = False  # the output projection is the embedding table, transposed
    max_positions: int = 32_768  # the context that the checkpoint was made for; nothing here is sized by it
    init_std: float = 0.02  # of random weights

    def __post_init__(self) -> None:
        if self.local_layers and (len(self.local_layers) != self.layers or self.window is None):
            raise ValueError(f"Arch: local_layers needs a window and one bool for each of the {self.layers} layers")

    @property
    def rotary_size(self) -> int:
        """How many of a head's H dimensions turn."""
        return int(self.head_size * self.rotary_share)

    @property
    def query_scale(self) -> float:
        """What scores are multiplied by."""
        return (self.query_pre_attn_scalar or self.head_size) ** -0.5

    def for_context(self, length: int) -> Arch:
        """The same model for rows of up to `length` positions: another one under longrope only, whose factors depend
        on it. As read, an Arch is for its `max_positions`."""
        if not isinstance(self.rope_scaling, LongRope):
            return self
        longer = length > self.rope_scaling.original_positions
        return dataclasses.replace(self, rope_scaling=dataclasses.replace(self.rope_scaling, long_context=longer))
