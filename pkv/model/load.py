"""A Hugging Face checkpoint as an Arch and weights: safetensors only; never torch, never pickle.

Every process reads the parts that its own devices hold and no others, each once: a part is a slice of a view of a
mapped tensor. What the host holds is one part of one tensor at a time, and the mapped pages of that tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from pkv.config import UserError
from pkv.hub import fetch, find_checkpoint
from pkv.model.arch import Arch
from pkv.model.families import family_of, gemma3
from pkv.model.layout import DiskTensor, WholeTensor, by_path, disk_tensors, whole_tensors
from pkv.model.rope import Yarn
from pkv.model.tensorfiles import DTYPES, TensorFiles, read_json, weight_files
from pkv.model.weights import Params
from pkv.tracking import Progress


def read_config(source: str | Path, context: int = 0) -> dict[str, Any]:
    """A checkpoint's config.json as it stands, or `stretched`; of a Gemma 3 with vision, its text model's.

    Raises UserError.
    """
    config = read_json(find_checkpoint(source) / "config.json")
    return stretched(gemma3.text_config(config) if config.get("model_type") == "gemma3" else config, context)


def stretched(config: dict[str, Any], context: int) -> dict[str, Any]:
    """A config.json for so many positions, where they are more than its own: by YaRN (arXiv 2309.00071), in the words
    of Qwen's model cards. Raises UserError for a model that is scaled already, or that isn't by YaRN."""
    if not context or (arch := family_of(config).read(config)).max_positions >= context:
        return config
    if arch.rope_scaling is not None:
        raise UserError(
            f"model.context: {context}, and config.json has a rope_scaling already, for {arch.max_positions} positions"
        )
    block = {"rope_type": "yarn", "factor": context / arch.max_positions}
    block["original_max_position_embeddings"] = arch.max_positions
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    longer = {**config, name: {**(config.get(name) or {}), **block}}
    longer.pop("rope_parameters" if name == "rope_scaling" else "rope_scaling", None)
    try:
        known = isinstance(family_of(longer).read(longer).rope_scaling, Yarn)
    except UserError:
        known = False
    if not known:
        raise UserError(
            f"model.context: {context}, and the model holds {arch.max_positions} positions: {config['model_type']} "
            "isn't stretched by YaRN"
        )
    return longer


def read_arch(source: str | Path, context: int = 0) -> Arch:
    """What a checkpoint is made of, from its config.json, for `context` positions where it holds fewer.

    Raises UserError for a family or feature that pkv doesn't know.
    """
    config = read_config(source)
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"config.json: quantization_config: quantised weights ({method}) are not supported; "
            "take the checkpoint in bf16, f16 or f32"
        )
    longer = stretched(config, context)
    return family_of(longer).read(longer)


def load_params(
    source: str | Path,
    arch: Arch,
    dtype: Any = jnp.float32,
    shardings: Any = None,
    keep: Callable[[str, jax.Array], Any] = lambda path, weight: weight,
) -> Params:
    """The weights of a checkpoint, layers stacked, in `dtype`.

    shardings: a tree like `param_axes`, from `pkv.mesh.shardings`; None puts all on the default device. Names, shapes
    and dtypes are checked before the first number is read; then it is tensor by tensor, with progress on stderr.
    keep: what becomes of each weight as soon as it is loaded, such as `freezer` says, given its path and array; of a
    stacked one each layer by itself, as a stack of one, so that a stack is never there before it is kept.
    Raises UserError naming a tensor that is missing, has no place in the model, or another shape or dtype.
    """
    family = family_of(read_config(source))
    weights = disk_tensors(arch, family)
    placed = dict.fromkeys(weights) if shardings is None else by_path(shardings)
    directory = find_checkpoint(source)
    fetch(source, weight_files(directory))
    files = TensorFiles(directory, family.rename)
    _check(files, whole_tensors(weights), family.redundant(arch))
    params: Params = {}
    with Progress(sum(map(len, weights.values())), f"loading {source}", delay_s=2.0) as progress:
        for path, tensors in weights.items():
            *parents, name = path.split(".")
            node = functools.reduce(lambda inner, parent: inner.setdefault(parent, {}), parents, params)
            node[name] = _load_weight(files, tensors, jnp.dtype(dtype), placed[path], partial(keep, path), progress)
    return params


def _check(files: TensorFiles, tensors: list[WholeTensor], redundant: frozenset[str]) -> None:
    there, expected = files.entries.keys() - redundant, {tensor.name for tensor in tensors}
    for name in sorted(there):
        if (entry := files.entries[name]).dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(
                f"{files.directory}: {name} is stored as {entry.dtype}; pkv reads {known}, nothing quantised"
            )
    for words, names in (
        ("the checkpoint lacks", expected - there),
        ("the model has no place for", there - expected),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{files.directory}: {words} the tensor {min(names)}{more}")
    for tensor in tensors:
        if (shape := files.entries[tensor.name].shape) != tensor.shape:
            raise UserError(f"{files.directory}: {tensor.name} has shape {shape}; its config.json means {tensor.shape}")


def _load_weight(
    files: TensorFiles,
    tensors: list[DiskTensor],
    dtype: jnp.dtype,
    sharding: NamedSharding | None,
    keep: Callable[[jax.Array], Any],
    progress: Progress,
) -> Any:
    """One weight on its devices. Numbers travel as they stand on disk; the device converts them."""
    if tensors[0].layer is None:
        whole = _put(tensors[0].view(files.view(tensors[0].name)), sharding)
        progress.advance()
        return keep(jax.device_put(whole.astype(dtype), sharding))
    # Layer after layer into the stacked arrays, in place: a stack is never there twice, nor in another dtype.
    inner = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = None
    for tensor in tensors:
        layer = keep(_stacking(sharding).lift(_put(tensor.view(files.view(tensor.name)), inner), dtype))
        if stack is None:
            stack = jax.tree.map(lambda part: _stacking(part.sharding).empty(len(tensors), part), layer)
        stack = jax.tree.map(
            lambda whole, part, at=tensor.layer: _stacking(whole.sharding).fill(whole, part, at), stack, layer
        )
        progress.advance()
    return stack


class Stacking(NamedTuple):
    """Jitted functions: a layer as a stack of one, an empty stack of such layers, and a stack with one put in."""

    lift: Callable[[jax.Array, jnp.dtype], jax.Array]
    empty: Callable[[int, jax.Array], jax.Array]
    fill: Callable[[jax.Array, jax.Array, Any], jax.Array]


@functools.lru_cache(maxsize=32)
def _stacking(sharding: Sharding | None) -> Stacking:
    def lift(layer: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return layer.astype(dtype)[None]

    def empty(layers: int, one: jax.Array) -> jax.Array:
        return jnp.zeros((layers, *one.shape[1:]), one.dtype)

    def fill(stack: jax.Array, one: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(stack, one, at, axis=0)

    jit = partial(jax.jit, out_shardings=sharding)
    return Stacking(jit(lift, static_argnums=1), jit(empty, static_argnums=0), jit(fill, donate_argnums=0))


def _put(view: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """A mapped tensor on its devices, part by part; the host has let go of all of them when this returns."""
    if sharding is None:
        return jnp.asarray(_read(view, ...)).block_until_ready()
    arrays: list[jax.Array] = []
    for index, devices in own_parts(view.shape, sharding):
        part = _read(view, index)
        arrays += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(view.shape, sharding, arrays).block_until_ready()


def _read(view: np.ndarray, index: Any) -> np.ndarray:
    """A part of a mapped tensor in memory, in the order it has on disk: reading it is sequential."""
    return view[index].copy(order="K")


def own_parts(shape: tuple[int, ...], sharding: Sharding) -> list[tuple[Any, list[Any]]]:
    """The slices of an array that this process holds, each once, with all of its devices that hold it."""
    owners: dict[str, tuple[Any, list[Any]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        owners.setdefault(str(index), (index, []))[1].append(device)
    return list(owners.values())
