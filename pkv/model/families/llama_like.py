"""What all families say in the same words: the sizes in config.json, and the names of tensors, by features."""

from __future__ import annotations

from typing import Any

from pkv.config import UserError
from pkv.model.arch import Arch
from pkv.model.families.family import Place
from pkv.model.families.reading import METADATA, ConfigReader
from pkv.model.rope import LongRope


def read_sizes(
    fields: ConfigReader, *, norm_eps: float = 1e-6, max_positions: int, tied: bool = False
) -> dict[str, Any]:
    """The features of an Arch that every family has; what differs is the value of a key that is left out."""
    fields.skip(*METADATA)
    fields.only("attention_dropout", 0, 0.0)
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    return {
        "vocab_size": fields.size("vocab_size"),
        "hidden": hidden,
        "layers": fields.size("num_hidden_layers"),
        "heads": heads,
        "kv_heads": fields.size("num_key_value_heads", heads),
        "head_size": fields.size("head_dim", hidden // heads),
        "ffn": fields.size("intermediate_size"),
        "norm_eps": fields.take("rms_norm_eps", float, norm_eps),
        "tied_embeddings": fields.take("tie_word_embeddings", bool, tied),
        "max_positions": fields.size("max_position_embeddings", max_positions),
        "init_std": fields.take("initializer_range", float, 0.02),
    }


def make_arch(fields: ConfigReader, features: dict[str, Any]) -> Arch:
    """The Arch, once every key of the config has been read and the numbers fit together. Raises UserError."""
    fields.finish()
    arch = Arch(**features)
    if arch.heads % arch.kv_heads or arch.rotary_size % 2 or not 0 < arch.rotary_share <= 1:
        raise UserError(
            f"config.json: {arch.heads} query heads of size {arch.head_size} on {arch.kv_heads} key-value heads, "
            f"{arch.rotary_size} dimensions turning; expected a multiple of num_key_value_heads, and an even number"
        )
    if arch.window is not None and arch.window < 1:
        raise UserError(f"config.json: sliding_window: got {arch.window}; expected at least 1, or null for none")
    if isinstance(scaling := arch.rope_scaling, LongRope):
        counts = len(scaling.short_factors), len(scaling.long_factors)
        if set(counts) != {arch.rotary_size // 2}:
            raise UserError(
                f"config.json: short_factor and long_factor have {counts[0]} and {counts[1]} numbers; expected "
                f"{arch.rotary_size // 2}, one for each pair of dimensions that turn"
            )
    return arch


def write_sizes(arch: Arch) -> dict[str, Any]:
    """The keys that `read_sizes` reads back."""
    return {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_size,
        "intermediate_size": arch.ffn,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tied_embeddings,
        "max_position_embeddings": arch.max_positions,
        "initializer_range": arch.init_std,
        "attention_dropout": 0.0,
    }


def places(arch: Arch) -> dict[str, Place]:
    """Our weights by path, and where they lie in a checkpoint."""
    layer, attention = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
    found = {
        "embedding": Place("model.embed_tokens.weight", "vocab embed"),
        "final_norm": Place("model.norm.weight", "embed"),
        "layers.attention_norm": Place(layer + "input_layernorm.weight", "embed"),
        "layers.attention.q": Place(attention + "q_proj.weight", "(heads head) embed"),
        "layers.attention.k": Place(attention + "k_proj.weight", "(kv_heads head) embed"),
        "layers.attention.v": Place(attention + "v_proj.weight", "(kv_heads head) embed"),
        "layers.attention.o": Place(attention + "o_proj.weight", "embed (heads head)"),
        "layers.ffn_norm": Place(layer + "post_attention_layernorm.weight", "embed"),
        "layers.ffn.gate": Place(layer + "mlp.gate_proj.weight", "ffn embed"),
        "layers.ffn.up": Place(layer + "mlp.up_proj.weight", "ffn embed"),
        "layers.ffn.down": Place(layer + "mlp.down_proj.weight", "embed ffn"),
    }
    if arch.qkv_bias:
        for name, axis in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
            found[f"layers.attention.{name}_bias"] = Place(f"{attention}{name}_proj.bias", f"({axis} head)")
    if arch.qk_norm:
        for name in ("q_norm", "k_norm"):
            found[f"layers.attention.{name}"] = Place(f"{attention}{name}.weight", "head")
    if arch.post_norms:
        found["layers.attention_post_norm"] = Place(layer + "post_attention_layernorm.weight", "embed")
        found["layers.ffn_norm"] = Place(layer + "pre_feedforward_layernorm.weight", "embed")
        found["layers.ffn_post_norm"] = Place(layer + "post_feedforward_layernorm.weight", "embed")
    if not arch.tied_embeddings:
        found["unembedding"] = Place("lm_head.weight", "vocab embed")
    return found


def redundant(arch: Arch) -> frozenset[str]:
    """What transformers ignores, and so do we: an output projection that the config ties to the embedding, and the
    turns of positions, which older versions saved in every layer."""
    turns = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(arch.layers)}
    return frozenset(turns | ({"lm_head.weight"} if arch.tied_embeddings else set()))
