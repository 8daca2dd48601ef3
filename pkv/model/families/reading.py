"""Reading config.json so that nothing in it goes by unseen, and the words for positions of both generations."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from pkv.config import UserError, describe
from pkv.model.arch import Arch
from pkv.model.rope import Linear, Llama3, LongRope, Scaling, Yarn

# Facts about files, tokens, generation and training: nothing of the decoder's computation.
METADATA = (
    "_attn_implementation",  # whose kernels another program takes
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",  # code in the repository, which is never run
    "bos_token_id",
    "cache_implementation",
    "do_sample",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "length_penalty",
    "max_length",
    "model_type",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "pad_token_id",
    "pretraining_tp",  # how products were split up; transformers does not read it any more
    "repetition_penalty",
    "return_dict",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
)


class ConfigReader:
    """Reads a Hugging Face config so that no key goes by unread: `finish` raises UserError for what nobody took."""

    def __init__(self, config: dict[str, Any], where: str = "config.json") -> None:
        self._config, self._where = config, where
        self._taken: set[str] = set()

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """The value of a key; without a default it must be there. Whole numbers pass as float. Raises UserError."""
        value = self.take_or_none(name, kind)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self._where}: {name} is missing; the checkpoint is not complete")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1, as `take` gives it. Raises UserError."""
        size = self.take(name, int, default)
        if size < 1:
            raise UserError(f"{self._where}: {name}: got {size}; expected at least 1")
        return size

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0, as `take` gives it. Raises UserError."""
        value = self.take(name, float, default)
        if not 0 < value < math.inf:
            raise UserError(f"{self._where}: {name}: got {value:g}; expected a number above 0")
        return value

    def take_or_none(self, name: str, kind: type, absent: Any = None) -> Any:
        """The value of a key, which may be null; `absent` if the key is not there at all. Raises UserError."""
        self._taken.add(name)
        value = self._config.get(name, absent)
        if kind is float and type(value) is int:
            return float(value)
        if value is not None and type(value) is not kind:
            raise UserError(f"{self._where}: {name}: expected {kind.__name__}, got {describe(value)}")
        return value

    def only(self, name: str, *known: Any) -> None:
        """A feature of which only these values are supported (or none given). Raises UserError for another."""
        self._taken.add(name)
        value = self._config.get(name)
        if value is not None and value not in known:
            words = " or ".join(repr(one) for one in known)
            raise UserError(f"{self._where}: {name}: {describe(value)} is not supported; known: {words}")

    def skip(self, *names: str) -> None:
        """Keys that say nothing about the computation."""
        self._taken.update(names)

    def block(self, name: str) -> ConfigReader:
        """The reader of an object inside this one; of an empty one if it is not there."""
        return ConfigReader(self.take_or_none(name, dict) or {}, f"{self._where}: {name}")

    def finish(self) -> None:
        """Raises UserError naming a key that nobody took; null, false, 0 and what is empty switch nothing on."""
        nothing = (None, False, [], {})
        left = [name for name, value in self._config.items() if name not in self._taken and value not in nothing]
        if left:
            raise UserError(
                f"{self._where}: unknown feature {left[0]} = {describe(self._config[left[0]])}; "
                "pkv would compute something else than the checkpoint was trained for"
            )


def read_rope(
    fields: ConfigReader, max_positions: int, *, partial: bool = False, longrope: int | None = None
) -> dict[str, Any]:
    """rope_theta, rope_scaling, rotary_share of an Arch, from either generation of configs; under YaRN max_positions.

    Older ones say rope_theta and rope_scaling, transformers 5 rope_parameters. partial: whether the family knows
    partial_rotary_factor. longrope: the original window, for a family (Phi) that says it outside of the block and has
    no other scaling. Raises UserError.
    """
    old, new = (fields.take_or_none(name, dict) or {} for name in ("rope_scaling", "rope_parameters"))
    if old and new and old != new:
        raise UserError("config.json: both rope_scaling and rope_parameters; keep the one that is meant")
    return read_rope_block(ConfigReader(old or new, "config.json: rope"), fields, max_positions, partial, longrope)


def read_rope_block(
    block: ConfigReader,
    fields: ConfigReader,
    max_positions: int,
    partial: bool = False,
    longrope: int | None = None,
) -> dict[str, Any]:
    """The same from one block; what it leaves out may stand outside, in `fields`."""
    outside = fields.take_or_none("rope_theta", float)
    theta = block.positive("rope_theta", 10_000.0 if outside is None else outside)
    share = 1.0
    if partial:
        outside = fields.take_or_none("partial_rotary_factor", float)
        share = block.positive("partial_rotary_factor", 1.0 if outside is None else outside)
    else:
        block.only("partial_rotary_factor", 1, 1.0)
    old_kind = block.take_or_none("type", str)
    kind = block.take("rope_type", str, old_kind or "default")
    if longrope and kind in ("su", "yarn"):  # what early Phi-3 called it
        kind = "longrope"
    if kind not in (("default", "longrope") if longrope else ("default", "linear", "llama3", "yarn")):
        known = "'default' or 'longrope'" if longrope else "'default', 'linear', 'llama3' or 'yarn'"
        raise UserError(f"config.json: rope_type {kind!r} is not supported; known: {known}")
    scaling = None if kind == "default" else _read_scaling(block, kind, max_positions, longrope)
    block.finish()
    found = {"rope_theta": theta, "rope_scaling": scaling, "rotary_share": share}
    if isinstance(scaling, Yarn):  # Qwen's cards add the block and leave max_position_embeddings as it was
        found["max_positions"] = max(max_positions, round(scaling.original_positions * scaling.factor))
    return found


def _read_scaling(block: ConfigReader, kind: str, max_positions: int, longrope: int | None) -> Scaling:
    if kind == "linear":
        return Linear(block.positive("factor"))
    said = block.take("original_max_position_embeddings", int, max_positions)
    original = longrope or said
    if original < 2:
        raise UserError(f"config.json: original_max_position_embeddings: got {original}; expected at least 2")
    if kind == "llama3":
        low, high = (block.take(name, float) for name in ("low_freq_factor", "high_freq_factor"))
        return Llama3(block.positive("factor"), low, high, original)
    given = block.take_or_none("attention_factor", float)
    if kind == "longrope":
        ratio = block.take("factor", float, max_positions / original)
        usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        short, long = (_numbers(block, name) for name in ("short_factor", "long_factor"))
        return LongRope(short, long, original, usual if given is None else given, max_positions > original)
    factor = block.positive("factor", max_positions / original if max_positions > original else None)
    top, bottom = block.take_or_none("mscale", float), block.take_or_none("mscale_all_dim", float)
    usual = _mscale(factor, top) / _mscale(factor, bottom) if top and bottom else _mscale(factor, 1.0)
    fast, slow = block.take("beta_fast", float, 32.0), block.take("beta_slow", float, 1.0)
    truncate = block.take("truncate", bool, True)
    block.skip("finetuned")
    return Yarn(factor, original, usual if given is None else given, fast, slow, truncate)


def _numbers(block: ConfigReader, name: str) -> tuple[float, ...]:
    numbers = block.take(name, list)
    if not all(type(number) in (int, float) and number > 0 for number in numbers):
        raise UserError(f"config.json: {name}: got {describe(numbers)}; expected numbers above 0")
    return tuple(map(float, numbers))


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(arch: Arch) -> dict[str, Any]:
    """The keys that `read_rope` reads back, in the words that every version of transformers knows."""
    partial = {} if arch.rotary_share == 1 else {"partial_rotary_factor": arch.rotary_share}
    return {"rope_theta": arch.rope_theta, "rope_scaling": _write_scaling(arch.rope_scaling), **partial}


def _write_scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    match scaling:
        case None:
            return None
        case Linear(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3(factor, low, high, original):
            frequencies = {"low_freq_factor": low, "high_freq_factor": high}
            return {
                "rope_type": "llama3",
                "factor": factor,
                **frequencies,
                "original_max_position_embeddings": original,
            }
        case Yarn():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_positions,
                "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
        case LongRope():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                "original_max_position_embeddings": scaling.original_positions,
                "attention_factor": scaling.attention_factor,
            }


def read_local_layers(fields: ConfigReader, window: int | None, usual: Collection[int], layers: int) -> dict[str, Any]:
    """window and local_layers of an Arch: from layer_types, or from the layers that are local where it is not said."""
    said = fields.take_or_none("layer_types", list)
    types = said or [SLIDING if index in usual else FULL for index in range(layers)]
    if odd := sorted(set(types) - {SLIDING, FULL}):
        raise UserError(f"config.json: layer_types: {odd[0]!r} is not supported; known: {SLIDING!r} or {FULL!r}")
    if len(types) != layers:
        raise UserError(f"config.json: layer_types: got {len(types)} of them; expected one for each of {layers} layers")
    local = tuple(kind == SLIDING for kind in types)
    if not any(local):
        return {}
    if window is None:
        raise UserError(f"config.json: layer_types: {SLIDING!r} without a sliding_window; say how many tokens it holds")
    return {"window": window, "local_layers": local}


def write_layer_types(arch: Arch) -> list[str]:
    """What `read_local_layers` reads back."""
    return [SLIDING if local else FULL for local in arch.local_layers or (False,) * arch.layers]


SLIDING, FULL = "sliding_attention", "full_attention"
