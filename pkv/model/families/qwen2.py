"""Qwen2 and Qwen2.5: biases on queries, keys and values; small sizes tie the output projection to the embedding."""

from __future__ import annotations

from typing import Any

from pkv.config import UserError
from pkv.model.arch import Arch
from pkv.model.families.family import METADATA, ConfigReader, Family, Place


def read(config: dict[str, Any]) -> Arch:
    """An Arch from a Qwen2 config. Raises UserError for a feature that is not supported."""
    fields = ConfigReader(config)
    fields.only("hidden_act", "silu")
    fields.only("use_sliding_window", False)
    fields.only("attention_dropout", 0, 0.0)
    layers, heads = fields.take("num_hidden_layers", int), fields.take("num_attention_heads", int)
    fields.only("layer_types", ["full_attention"] * layers)
    fields.skip("sliding_window", "max_window_layers", *METADATA)  # the window is off: use_sliding_window
    hidden = fields.take("hidden_size", int)
    kv_heads = fields.take("num_key_value_heads", int, heads)
    head_size = fields.take("head_dim", int, hidden // heads)
    if heads % kv_heads or head_size % 2:
        raise UserError(
            f"config.json: {heads} query heads of size {head_size} on {kv_heads} key-value heads; expected a multiple "
            "of num_key_value_heads, and an even size"
        )
    arch = Arch(
        vocab_size=fields.take("vocab_size", int),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        ffn=fields.take("intermediate_size", int),
        rope_theta=fields.rope_theta(10_000.0),
        norm_eps=fields.take("rms_norm_eps", float, 1e-6),
        qkv_bias=True,
        tied_embeddings=fields.take("tie_word_embeddings", bool, False),
        max_positions=fields.take("max_position_embeddings", int, 32_768),
        init_std=fields.take("initializer_range", float, 0.02),
    )
    fields.finish()
    return arch


def write(arch: Arch) -> dict[str, Any]:
    """The Qwen2 config of an Arch. Raises UserError for one that Qwen2 has no words for."""
    if not arch.qkv_bias or arch.qk_norm:
        raise UserError("a Qwen2 checkpoint needs qkv_bias and no qk_norm; this model has other features")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_size,
        "intermediate_size": arch.ffn,
        "hidden_act": "silu",
        "rope_theta": arch.rope_theta,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tied_embeddings,
        "max_position_embeddings": arch.max_positions,
        "initializer_range": arch.init_std,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
    }


def places(arch: Arch) -> dict[str, Place]:
    """Our weights by path, and where they lie in a Qwen2 checkpoint."""
    layer = "model.layers.{layer}."
    found = {
        "embedding": Place("model.embed_tokens.weight", "vocab embed"),
        "final_norm": Place("model.norm.weight", "embed"),
        "layers.attention_norm": Place(layer + "input_layernorm.weight", "embed"),
        "layers.attention.q": Place(layer + "self_attn.q_proj.weight", "(heads head) embed"),
        "layers.attention.k": Place(layer + "self_attn.k_proj.weight", "(kv_heads head) embed"),
        "layers.attention.v": Place(layer + "self_attn.v_proj.weight", "(kv_heads head) embed"),
        "layers.attention.q_bias": Place(layer + "self_attn.q_proj.bias", "(heads head)"),
        "layers.attention.k_bias": Place(layer + "self_attn.k_proj.bias", "(kv_heads head)"),
        "layers.attention.v_bias": Place(layer + "self_attn.v_proj.bias", "(kv_heads head)"),
        "layers.attention.o": Place(layer + "self_attn.o_proj.weight", "embed (heads head)"),
        "layers.ffn_norm": Place(layer + "post_attention_layernorm.weight", "embed"),
        "layers.ffn.gate": Place(layer + "mlp.gate_proj.weight", "ffn embed"),
        "layers.ffn.up": Place(layer + "mlp.up_proj.weight", "ffn embed"),
        "layers.ffn.down": Place(layer + "mlp.down_proj.weight", "embed ffn"),
    }
    if not arch.tied_embeddings:
        found["unembedding"] = Place("lm_head.weight", "vocab embed")
    return found


def redundant(arch: Arch) -> frozenset[str]:
    """transformers ignores an output projection that the config ties to the embedding, and so do we."""
    return frozenset({"lm_head.weight"} if arch.tied_embeddings else ())


FAMILY = Family("qwen2", read, write, places, redundant)
