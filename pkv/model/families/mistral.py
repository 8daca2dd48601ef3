"""Mistral: a Llama, of which early ones see through a sliding window in every layer."""

from __future__ import annotations

from typing import Any

from pkv.model.arch import Arch
from pkv.model.families.family import Family
from pkv.model.families.llama_like import make_arch, places, read_sizes, redundant, write_sizes
from pkv.model.families.reading import ConfigReader, read_rope, write_rope


def read(config: dict[str, Any]) -> Arch:
    """An Arch from a Mistral config. Raises UserError for a feature that is not supported."""
    fields = ConfigReader(config)
    fields.only("hidden_act", "silu")
    sizes = read_sizes(fields, max_positions=131_072)
    if (window := fields.take_or_none("sliding_window", int, 4096)) is not None:
        sizes |= {"window": window, "local_layers": (True,) * sizes["layers"]}
    return make_arch(fields, sizes | read_rope(fields, sizes["max_positions"]))


def words(arch: Arch) -> dict[str, Any]:
    """The Mistral config that `read` reads back."""
    return {
        "architectures": ["MistralForCausalLM"],
        **write_sizes(arch),
        **write_rope(arch),
        "hidden_act": "silu",
        "sliding_window": arch.window,
    }


FAMILY = Family("mistral", read, words, places, redundant)
