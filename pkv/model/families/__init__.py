"""The families of checkpoints that pkv reads and writes, by the `model_type` of their config.json."""

from __future__ import annotations

from typing import Any

from pkv.config import UserError
from pkv.model.families import gemma2, gemma3, llama, mistral, phi3, qwen2, qwen3
from pkv.model.families.family import Family, Place

FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in (qwen2, qwen3, llama, mistral, gemma2, gemma3, phi3)}

__all__ = ["FAMILIES", "Family", "Place", "family_of"]


def family_of(config: dict[str, Any]) -> Family:
    """The family of a Hugging Face config. Raises UserError for one that pkv doesn't know."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type {model_type!r} is not a family that pkv knows; known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
