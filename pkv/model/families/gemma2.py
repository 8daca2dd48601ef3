"""Gemma 2: every other layer is local, scores are capped, four norms a layer multiply by 1 + weight."""

from __future__ import annotations

from typing import Any

from pkv.model.arch import Arch
from pkv.model.families.family import Family
from pkv.model.families.llama_like import make_arch, places, read_sizes, redundant, write_sizes
from pkv.model.families.reading import ConfigReader, read_local_layers, read_rope, write_layer_types, write_rope


def read_gemma(fields: ConfigReader, max_positions: int, every: int) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common; layer number `every`, and every so many after it, sees everything."""
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.only("use_bidirectional_attention", False)
    fields.skip("hidden_act", "sliding_window_size")  # said a second time in some; transformers does not read them
    sizes = read_sizes(fields, max_positions=max_positions, tied=True)
    window = fields.take("sliding_window", int, 4096)
    local = [index for index in range(sizes["layers"]) if (index + 1) % every]
    return {
        **sizes,
        **read_local_layers(fields, window, local, sizes["layers"]),
        "norm_offset": True,
        "post_norms": True,
        "query_pre_attn_scalar": fields.size("query_pre_attn_scalar", 256),
        "activation": "gelu_tanh",
        "scaled_embedding": True,
    }


def write_gemma(arch: Arch) -> dict[str, Any]:
    """The keys that `read_gemma` reads back."""
    return {
        **write_sizes(arch),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": arch.query_pre_attn_scalar or arch.head_size,
        "attn_logit_softcapping": arch.attention_cap,
        "final_logit_softcapping": arch.logit_cap,
        "sliding_window": arch.window,
        "layer_types": write_layer_types(arch),
    }


def read(config: dict[str, Any]) -> Arch:
    """An Arch from a Gemma 2 config. Raises UserError for a feature that is not supported."""
    fields = ConfigReader(config)
    features = read_gemma(fields, 8192, every=2)
    features["attention_cap"] = fields.take_or_none("attn_logit_softcapping", float, 50.0)
    features["logit_cap"] = fields.take_or_none("final_logit_softcapping", float, 30.0)
    return make_arch(fields, features | read_rope(fields, features["max_positions"]))


def words(arch: Arch) -> dict[str, Any]:
    """The Gemma 2 config that `read` reads back."""
    return {"architectures": ["Gemma2ForCausalLM"], **write_gemma(arch), **write_rope(arch)}


FAMILY = Family("gemma2", read, words, places, redundant)
