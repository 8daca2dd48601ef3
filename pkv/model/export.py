"""Weights back into a Hugging Face directory: config.json and safetensors under the family's own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from pkv.config import UserError
from pkv.model.arch import Arch
from pkv.model.families import FAMILIES, family_of
from pkv.model.layout import INDEX_FILE, DiskTensor, disk_tensors
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
    the Arch. One file's tensors are in host memory at a time; config.json comes last, so that a directory that was left
    half-written doesn't pass for a model.
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
    tensors: dict[str, list[DiskTensor]] = {}
    for tensor in (tensor for group in disk_tensors(arch, family).values() for tensor in group):
        tensors.setdefault(tensor.name, []).append(tensor)
    files = _split(list(tensors.values()), dtype.itemsize, max_file_bytes)
    where: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        arrays = {parts[0].name: _fuse(params, parts, dtype) for parts in part}
        save_file(arrays, directory / file, metadata={"format": "pt"})  # transformers asks for this word
        where.update(dict.fromkeys(arrays, file))
    if len(files) > 1:
        total = sum(_bytes(parts, dtype.itemsize) for parts in tensors.values())
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})
    config.pop("dtype", None)  # transformers 5 reads both names, older versions and other programs only this one
    _write_json(directory / "config.json", {**config, "torch_dtype": dtype.name})


def _split(tensors: list[list[DiskTensor]], itemsize: int, limit: int) -> list[list[list[DiskTensor]]]:
    """The tensors in order, cut before a file would grow beyond the limit; a tensor is never cut."""
    files: list[list[list[DiskTensor]]] = [[]]
    size = 0
    for parts in tensors:
        more = _bytes(parts, itemsize)
        if files[-1] and size + more > limit:
            files.append([])
            size = 0
        files[-1].append(parts)
        size += more
    return files


def _bytes(parts: list[DiskTensor], itemsize: int) -> int:
    return sum(int(np.prod(tensor.shape)) for tensor in parts) * itemsize


def _fuse(params: Params, parts: list[DiskTensor], dtype: Any) -> np.ndarray:
    """A tensor of the file from the weights that share it, in the order of their rows."""
    parts = sorted(parts, key=lambda tensor: tensor.place.first_row)
    return np.concatenate([_to_disk(params, tensor, dtype) for tensor in parts])


def _to_disk(params: Params, tensor: DiskTensor, dtype: Any) -> np.ndarray:
    node: Any = params
    layer = tensor.layer
    for part in tensor.path.split("."):
        node = node[part]
        if layer is not None and isinstance(node, (tuple, list)):
            node, layer = node[layer], None
    weight = node if layer is None else node[layer]
    return tensor.place.to_disk(np.asarray(jax.device_get(weight.astype(dtype))), tensor.axes, tensor.sizes)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
