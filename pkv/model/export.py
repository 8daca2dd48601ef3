"""Weights back into a Hugging Face directory: config.json and safetensors under the family's own names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pkv.config import UserError
from pkv.model.arch import Arch
from pkv.model.families import FAMILIES, family_of
from pkv.model.layout import DiskTensor, WholeTensor, disk_tensors, whole_tensors
from pkv.model.tensorfiles import INDEX_FILE, SINGLE_FILE, write_tensors
from pkv.model.weights import Params

MAX_FILE_BYTES = 5 * 10**9


def save_params(
    params: Params,
    arch: Arch,
    directory: str | Path,
    source_config: dict[str, Any] | None = None,
    dtype: Any = jnp.float32,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write config.json and model.safetensors, or shards with an index above `max_file_bytes`.

    source_config: the config that the model came with, kept as it is but for the dtype; without one it is made from
    the Arch. Sharded weights are gathered and written one tensor at a time, and one tensor is what the host holds. A
    file gets its name when it is whole, and config.json comes last: a directory that was left half-written doesn't pass
    for a model.
    Raises UserError when the directory holds weights already, or when the config describes another model.
    """
    family = FAMILIES["qwen2"] if source_config is None else family_of(source_config)
    config = family.write(arch) if source_config is None else dict(source_config)
    if family.read(config) != arch:
        raise UserError("export: the config describes another model than the weights; give the one they came with")
    directory = Path(directory)
    if directory.is_dir() and any(directory.glob("*.safetensors")):
        raise UserError(f"{directory}: there is a model here already; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)

    dtype = jnp.dtype(dtype)
    files = _split(whole_tensors(disk_tensors(arch, family)), dtype.itemsize, max_file_bytes)
    where: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        file = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        parts = (_to_disk(params, part, dtype) for tensor in tensors for part in tensor.parts)
        write_tensors(directory / file, {tensor.name: tensor.shape for tensor in tensors}, dtype, parts)
        where.update((tensor.name, file) for tensor in tensors)
    if len(files) > 1:
        total = sum(_bytes(tensor, dtype.itemsize) for tensors in files for tensor in tensors)
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})
    config.pop("dtype", None)  # transformers 5 reads both names, older versions and other programs only this one
    _write_json(directory / "config.json", {**config, "torch_dtype": dtype.name})


def _split(tensors: list[WholeTensor], itemsize: int, limit: int) -> list[list[WholeTensor]]:
    """The tensors in order, cut before a file would grow beyond the limit; a tensor is never cut."""
    files: list[list[WholeTensor]] = [[]]
    size = 0
    for tensor in tensors:
        more = _bytes(tensor, itemsize)
        if files[-1] and size + more > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += more
    return files


def _bytes(tensor: WholeTensor, itemsize: int) -> int:
    return math.prod(tensor.shape) * itemsize


def _to_disk(params: Params, part: DiskTensor, dtype: Any) -> np.ndarray:
    """A weight, or one layer of it, as the file has it: sliced, converted and turned on its devices, then gathered."""
    node: Any = params
    layer = part.layer
    for name in part.path.split("."):
        node = node[name]
        if layer is not None and isinstance(node, (tuple, list)):
            node, layer = node[layer], None
    weight = node if layer is None else node[layer]
    return np.asarray(part.place.to_disk(weight.astype(dtype), part.axes, part.sizes))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
