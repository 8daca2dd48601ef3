"""Llama 2 and 3: no biases, no windows; 3.1 and later scale positions in their own way."""

from __future__ import annotations

from typing import Any

from pkv.model.arch import Arch
from pkv.model.families.family import Family
from pkv.model.families.llama_like import make_arch, places, read_sizes, redundant, write_sizes
from pkv.model.families.reading import ConfigReader, read_rope, write_rope


def read(config: dict[str, Any]) -> Arch:
    """An Arch from a Llama config. Raises UserError for a feature that is not supported."""
    fields = ConfigReader(config)
    fields.only("hidden_act", "silu")
    fields.only("rope_interleaved", False)  # pairs of neighbours, which weights of this format never have
    fields.skip("is_llama_config")  # SmolLM2's; nothing reads it
    sizes = read_sizes(fields, max_positions=2048)
    return make_arch(fields, sizes | read_rope(fields, sizes["max_positions"]))


def words(arch: Arch) -> dict[str, Any]:
    """The Llama config that `read` reads back."""
    return {
        "architectures": ["LlamaForCausalLM"],
        **write_sizes(arch),
        **write_rope(arch),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


FAMILY = Family("llama", read, words, places, redundant)
