"""Phi-3, Phi-3.5 and Phi-4: a Llama whose projections lie together on disk; longrope, a part of each head may turn."""

from __future__ import annotations

from typing import Any

from pkv.model.arch import Arch
from pkv.model.families import llama_like
from pkv.model.families.family import Family, Place
from pkv.model.families.llama_like import make_arch, read_sizes, redundant, write_sizes
from pkv.model.families.reading import ConfigReader, read_rope, write_rope
from pkv.model.rope import LongRope


def read(config: dict[str, Any]) -> Arch:
    """An Arch from a Phi-3 config. Raises UserError for a feature that is not supported."""
    fields = ConfigReader(config)
    fields.only("hidden_act", "silu")
    for name in ("resid_pdrop", "embd_pdrop"):
        fields.only(name, 0, 0.0)
    for name in ("full_attn_mod", "interpolate_factor"):  # Phi-4-mini's, at the values that change nothing
        fields.only(name, 1)
    sizes = read_sizes(fields, norm_eps=1e-5, max_positions=4096)
    if (window := fields.take_or_none("sliding_window", int)) is not None:
        sizes |= {"window": window, "local_layers": (True,) * sizes["layers"]}
    original = fields.take("original_max_position_embeddings", int, 4096)
    return make_arch(fields, sizes | read_rope(fields, sizes["max_positions"], partial=True, longrope=original))


def words(arch: Arch) -> dict[str, Any]:
    """The Phi-3 config that `read` reads back."""
    scaling = arch.rope_scaling
    original = scaling.original_positions if isinstance(scaling, LongRope) else arch.max_positions
    return {
        "architectures": ["Phi3ForCausalLM"],
        **write_sizes(arch),
        **write_rope(arch),
        "hidden_act": "silu",
        "original_max_position_embeddings": original,
        "sliding_window": arch.window,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "pad_token_id": None,  # left out, transformers takes 32000, which a small vocabulary does not have
    }


def places(arch: Arch) -> dict[str, Place]:
    """Queries, keys and values are the rows of one tensor, one after the other; gate and up those of another."""
    queries, keys = arch.heads * arch.head_size, arch.kv_heads * arch.head_size
    qkv, gate_up = "model.layers.{layer}.self_attn.qkv_proj.weight", "model.layers.{layer}.mlp.gate_up_proj.weight"
    return llama_like.places(arch) | {
        "layers.attention.q": Place(qkv, "(heads head) embed"),
        "layers.attention.k": Place(qkv, "(kv_heads head) embed", first_row=queries),
        "layers.attention.v": Place(qkv, "(kv_heads head) embed", first_row=queries + keys),
        "layers.ffn.gate": Place(gate_up, "ffn embed"),
        "layers.ffn.up": Place(gate_up, "ffn embed", first_row=arch.ffn),
    }


FAMILY = Family("phi3", read, words, places, redundant)
