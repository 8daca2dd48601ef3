"""Adapters as a PEFT directory, which `peft` and vLLM put beside the base model: names and shapes are theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from pkv.config import LoraConfig, UserError
from pkv.hub import name_and_revision
from pkv.model.arch import Arch
from pkv.model.families import family_of
from pkv.model.layout import disk_tensors
from pkv.model.linear import Adapted
from pkv.model.weights import Params


def save_adapter(
    adapters: Params,
    arch: Arch,
    directory: str | Path,
    source_config: dict[str, Any],
    lora: LoraConfig,
    base_model: str,
    dtype: Any = jnp.float32,
) -> None:
    """Write adapter_model.safetensors and adapter_config.json of the adapters from `split`.

    source_config: the base model's config. base_model: where others find it, a directory or a hub id.
    Raises UserError for a target that the family keeps in one tensor with other weights.
    """
    arrays: dict[str, np.ndarray] = {}
    for path, tensors in disk_tensors(arch, family_of(source_config)).items():
        adapter = adapters
        for part in path.split("."):
            adapter = adapter[part]
        if not isinstance(adapter, Adapted):
            continue
        for tensor in tensors:
            a, b = (_matrix(array[tensor.layer], axis, dtype) for array, axis in ((adapter.a, -1), (adapter.b, 0)))
            if (b.shape[0], a.shape[1]) != tensor.shape:
                raise UserError(f"{tensor.name}: holds more than {path}, so PEFT has no place for it; use --merge-lora")
            module = f"base_model.model.{tensor.name.removesuffix('.weight')}"
            arrays |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(arrays, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    name, revision = name_and_revision(base_model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.split(".")[-3] for name in arrays}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _matrix(array: jax.Array, rank_axis: int, dtype: Any) -> np.ndarray:
    """A [*in, R] as [R, in], or B [R, *out] as [out, R], contiguous."""
    array = jnp.moveaxis(array.astype(dtype), rank_axis, 0)
    flat = np.asarray(jax.device_get(array)).reshape(array.shape[0], -1)
    return np.ascontiguousarray(flat if rank_axis else flat.T)
