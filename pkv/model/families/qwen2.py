"""Qwen2 and Qwen2.5: biases on queries, keys and values; small sizes tie the output projection to the embedding."""

from __future__ import annotations

from typing import Any

from pkv.model.arch import Arch
from pkv.model.families.family import Family
from pkv.model.families.llama_like import make_arch, places, read_sizes, redundant, write_sizes
from pkv.model.families.reading import ConfigReader, read_local_layers, read_rope, write_layer_types, write_rope


def read_qwen(config: dict[str, Any], **features: bool) -> Arch:
    """An Arch from a Qwen2 or Qwen3 config. Raises UserError for a feature that is not supported."""
    fields = ConfigReader(config)
    fields.only("hidden_act", "silu")
    sizes = read_sizes(fields, max_positions=32_768)
    window = fields.take_or_none("sliding_window", int, 4096)
    first = fields.take("max_window_layers", int, 28)  # layers from this one on are local
    if not fields.take("use_sliding_window", bool, False):
        window, first = None, sizes["layers"]
    local = range(first, sizes["layers"]) if window is not None else ()
    sizes |= read_local_layers(fields, window, local, sizes["layers"])
    return make_arch(fields, sizes | read_rope(fields, sizes["max_positions"]) | features)


def write_qwen(arch: Arch) -> dict[str, Any]:
    """The keys that `read_qwen` reads back."""
    return {
        **write_sizes(arch),
        **write_rope(arch),
        "hidden_act": "silu",
        "use_sliding_window": arch.window is not None,
        "sliding_window": arch.window,
        "layer_types": write_layer_types(arch),
    }


def read(config: dict[str, Any]) -> Arch:
    """An Arch from a Qwen2 config. Raises UserError for a feature that is not supported."""
    return read_qwen(config, qkv_bias=True)


def words(arch: Arch) -> dict[str, Any]:
    """The Qwen2 config that `read` reads back."""
    return {"architectures": ["Qwen2ForCausalLM"], **write_qwen(arch)}


FAMILY = Family("qwen2", read, words, places, redundant)
