"""A Hugging Face checkpoint as an Arch and weights: safetensors only, tensor by tensor; never torch, never pickle."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from pkv.config import UserError
from pkv.model.arch import Arch
from pkv.model.families import family_of
from pkv.model.layout import INDEX_FILE, DiskTensor, by_path, disk_tensors
from pkv.model.weights import Params

# What is fetched of a hub repository: weights, configs and tokenizers; no code and no pickles.
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


def find_checkpoint(source: str | Path) -> Path:
    """The directory of a checkpoint; what is no directory but looks like `owner/name` is fetched from the hub."""
    directory, text = Path(source), str(source)
    if directory.is_dir():
        return directory
    if directory.is_absolute() or text.count("/") != 1 or text.startswith((".", "~")):
        raise UserError(f"{text}: no such directory; expected a Hugging Face directory or a hub id such as owner/name")
    from huggingface_hub import snapshot_download  # here, because only hub ids need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(text, allow_patterns=list(WANTED)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # OSError: no network, and not in the hub's cache
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{text}: no such directory, and the hub did not give it: {reason}") from error


def read_config(source: str | Path) -> dict[str, Any]:
    """A checkpoint's config.json as it stands. Raises UserError."""
    return _read_json(find_checkpoint(source) / "config.json")


def read_arch(source: str | Path) -> Arch:
    """What a checkpoint is made of, from its config.json. Raises UserError for a family or feature pkv doesn't know."""
    config = read_config(source)
    return family_of(config).read(config)


def load_params(
    source: str | Path,
    arch: Arch,
    dtype: Any = jnp.float32,
    shardings: Any = None,
    keep: Callable[[str, jax.Array], Any] = lambda path, weight: weight,
) -> Params:
    """The weights of a checkpoint, layers stacked, in `dtype`.

    shardings: a tree like `param_axes`, from `pkv.mesh.shardings`; None puts all on the default device. Names and
    shapes are checked before the first number is read; then one tensor at a time is in host memory.
    keep: what becomes of each weight as soon as it is loaded, such as `freezer` says, given its path and array.
    Raises UserError naming a tensor that is missing, has no place in the model, or has another shape.
    """
    directory = find_checkpoint(source)
    family = family_of(read_config(directory))
    expected = disk_tensors(arch, family)
    placed = dict.fromkeys(expected) if shardings is None else by_path(shardings)
    files = TensorFiles(directory)
    _check(files, expected, family.redundant(arch))
    params: Params = {}
    for path, tensors in expected.items():
        *parents, name = path.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = keep(path, _load_weight(files, tensors, dtype, placed[path]))
    return params


class TensorFiles:
    """All tensors of a directory by name, in one safetensors file or in shards with an index; mapped, not read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, Any] = {}
        index = directory / INDEX_FILE
        if index.is_file():
            where = _read_json(index).get("weight_map")
            if not isinstance(where, dict) or any(Path(str(file)).name != file for file in where.values()):
                raise UserError(f"{index}: expected a weight_map from tensor names to files of this directory")
            self._where: dict[str, str] = where
        else:
            self._where = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from its file's header."""
        try:
            return tuple(self._file(self._where[name]).get_slice(name).get_shape())
        except SafetensorError as error:
            raise UserError(
                f"{self.directory / self._where[name]}: no {name} in it, though the index says so"
            ) from error

    def read(self, name: str) -> np.ndarray:
        """A tensor's numbers."""
        return self._file(self._where[name]).get_tensor(name)

    def _file(self, name: str) -> Any:
        path = self.directory / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; pkv reads model.safetensors, or shards with {INDEX_FILE}")
        if name not in self._open:
            try:
                self._open[name] = safe_open(path, framework="numpy")
            except SafetensorError as error:
                raise UserError(f"{path}: not a whole safetensors file: {error}") from error
        return self._open[name]


def _check(files: TensorFiles, expected: dict[str, list[DiskTensor]], redundant: frozenset[str]) -> None:
    tensors = {tensor.name: tensor for group in expected.values() for tensor in group}
    missing, homeless = set(tensors) - files.names, files.names - set(tensors) - redundant
    for words, names in (("the checkpoint lacks", missing), ("the model has no place for", homeless)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{files.directory}: {words} the tensor {min(names)}{more}")
    for name, tensor in tensors.items():
        if (shape := files.shape(name)) != tensor.shape:
            raise UserError(f"{files.directory}: {name} has shape {shape}; its config.json means {tensor.shape}")


def _load_weight(
    files: TensorFiles, tensors: list[DiskTensor], dtype: Any, sharding: NamedSharding | None
) -> jax.Array:
    first = tensors[0]
    shape = tuple(first.sizes[axis] for axis in first.axes)
    if first.layer is None:
        return _put(_read(files, first), dtype, sharding)
    # One layer after the other into the stacked array, in place: the host holds one layer's tensor at a time.
    inner = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    empty, fill = _stackers(sharding)
    stack = empty((len(tensors), *shape), jnp.dtype(dtype))
    for tensor in tensors:
        stack = fill(stack, _put(_read(files, tensor), dtype, inner), tensor.layer)
    return stack


def _read(files: TensorFiles, tensor: DiskTensor) -> np.ndarray:
    return tensor.place.from_disk(files.read(tensor.name), tensor.axes, tensor.sizes)


@functools.lru_cache(maxsize=32)
def _stackers(sharding: NamedSharding | None) -> tuple[Any, Any]:
    """Two jitted functions: an empty stack of a shape and dtype, and a stack with one layer put in."""
    empty = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)
    fill = jax.jit(lambda stack, one, at: stack.at[at].set(one), donate_argnums=0, out_shardings=sharding)
    return empty, fill


def _put(host: np.ndarray, dtype: Any, sharding: NamedSharding | None) -> jax.Array:
    """The array on its devices; each gets its own part only, converted on the way."""
    if sharding is None:
        return jnp.asarray(host.astype(dtype))
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part].astype(dtype))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected a Hugging Face directory with config.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
