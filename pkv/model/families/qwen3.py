"""Qwen3, dense: norms on queries and keys, no biases; otherwise Qwen2."""

from __future__ import annotations

from typing import Any

from pkv.model.arch import Arch
from pkv.model.families.family import Family
from pkv.model.families.llama_like import places, redundant
from pkv.model.families.qwen2 import read_qwen, write_qwen


def read(config: dict[str, Any]) -> Arch:
    """An Arch from a Qwen3 config. Raises UserError for a feature that is not supported."""
    return read_qwen(config, qk_norm=True)


def words(arch: Arch) -> dict[str, Any]:
    """The Qwen3 config that `read` reads back."""
    return {"architectures": ["Qwen3ForCausalLM"], **write_qwen(arch)}


FAMILY = Family("qwen3", read, words, places, redundant)
