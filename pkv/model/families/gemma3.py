"""Gemma 3, text: five local layers for each that sees everything, with a rotary base of their own; norms on queries
and keys instead of caps on scores; otherwise Gemma 2."""

from __future__ import annotations

from typing import Any

from pkv.config import UserError
from pkv.model.arch import Arch
from pkv.model.families.family import Family
from pkv.model.families.gemma2 import read_gemma, write_gemma
from pkv.model.families.llama_like import make_arch, places, redundant
from pkv.model.families.reading import FULL, METADATA, SLIDING, ConfigReader, read_rope_block, write_rope


def read(config: dict[str, Any]) -> Arch:
    """An Arch from a Gemma 3 text config. Raises UserError for a feature that is not supported."""
    fields = ConfigReader(config)
    fields.only("attn_logit_softcapping", None)  # transformers does not read it here
    fields.skip("_sliding_window_pattern")  # how transformers 5 writes the pattern a second time
    features = read_gemma(fields, 131_072, fields.size("sliding_window_pattern", 6))
    features |= {"qk_norm": True, "logit_cap": fields.take_or_none("final_logit_softcapping", float)}
    return make_arch(fields, features | _read_ropes(fields, features["max_positions"]))


def _read_ropes(fields: ConfigReader, max_positions: int) -> dict[str, Any]:
    """Older configs have rope_theta, rope_scaling and rope_local_base_freq; transformers 5, a block for each kind."""
    scaling, both = (fields.take_or_none(name, dict) or {} for name in ("rope_scaling", "rope_parameters"))
    if scaling and both:
        raise UserError("config.json: both rope_scaling and rope_parameters; keep the one that is meant")
    blocks = ConfigReader(both, "config.json: rope_parameters")
    everywhere, nearby = (blocks.take_or_none(kind, dict) or {} for kind in (FULL, SLIDING))
    blocks.finish()
    theta = fields.positive("rope_theta", 1_000_000.0)
    local_theta = fields.positive("rope_local_base_freq", 10_000.0)
    block = {"rope_theta": theta, **scaling, **everywhere}
    found = read_rope_block(ConfigReader(block, f"config.json: rope of {FULL}"), fields, max_positions)
    block = ConfigReader({"rope_theta": local_theta, **nearby}, f"config.json: rope of {SLIDING}")
    block.only("rope_type", "default")
    found["local_rope_theta"] = block.positive("rope_theta")
    block.finish()
    return found


def words(arch: Arch) -> dict[str, Any]:
    """The Gemma 3 text config that `read` reads back."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        **write_gemma(arch),
        **write_rope(arch),
        "rope_local_base_freq": arch.local_rope_theta,
    }


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's config inside that of a Gemma 3 with vision. Raises UserError for a feature beside it."""
    fields = ConfigReader(config)
    fields.skip(*METADATA, *CARRIED, *VISION)
    inner = fields.take("text_config", dict)
    fields.finish()
    carried = {name: config[name] for name in CARRIED if name in config}
    kind = {"model_type": FAMILY.model_type, "architectures": ["Gemma3ForCausalLM"]}
    return {**UNSAID, **inner, **carried, **kind}


def text_tensor(name: str) -> str | None:
    """A tensor's name without what a Gemma 3 with vision puts before it; None for those of the vision."""
    if name.removeprefix("model.").startswith(("vision_tower.", "multi_modal_projector.")):
        return None
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


# What the config of a Gemma 3 with vision says outside of its text_config: of the text too, and of the vision only.
CARRIED = (
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
)
VISION = (
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
    "initializer_range",
    "mm_tokens_per_image",
    "vision_config",
)
UNSAID = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}  # 4B leaves it out
FAMILY = Family("gemma3_text", read, words, places, redundant, text_tensor)
