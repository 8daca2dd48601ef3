"""Safetensors files: mapped and read in parts, written as a stream. A header and numbers; nothing in it can run.

A file is the header's length (8 bytes, little-endian), the header (JSON: name to dtype, shape and place), the numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pkv.config import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"BF16": jnp.dtype(jnp.bfloat16), "F16": jnp.dtype(jnp.float16), "F32": jnp.dtype(jnp.float32)}
_LONGEST_HEADER = 100 * 10**6  # bytes, the format's own limit


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: from byte `start` of a file on. dtype: as the header spells it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class TensorFiles:
    """All tensors of a directory by name, in one file or in shards with an index. Headers are read, numbers mapped."""

    def __init__(self, directory: Path, rename: Callable[[str], str | None] = lambda name: name) -> None:
        """rename: the name that a tensor is known by here; None leaves it out."""
        self.directory = directory
        headers = {file: _read_header(directory / file) for file in weight_files(directory)}
        where = _read_index(directory)
        if where is None:
            where = dict.fromkeys(headers[SINGLE_FILE], SINGLE_FILE)
        for name, file in where.items():
            if name not in headers[file]:
                raise UserError(f"{directory / file}: no {name} in it, though the index says so")
        named = ((rename(name), headers[file][name]) for name, file in where.items())
        self.entries = {name: entry for name, entry in named if name is not None}

    def view(self, name: str) -> np.ndarray:
        """A tensor as it stands on disk, read-only: its numbers are read where and when they are touched.

        The pages that were touched are in memory until the array and all views of it are gone.
        """
        entry = self.entries[name]
        return np.asarray(np.memmap(entry.file, DTYPES[entry.dtype], "r", entry.start, entry.shape))


def weight_files(directory: Path) -> list[str]:
    """The names of a directory's safetensors files, by its index; without one there is a single file."""
    where = _read_index(directory)
    return [SINGLE_FILE] if where is None else sorted(set(where.values()))


def write_tensors(
    file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, numbers: Iterable[np.ndarray]
) -> None:
    """Write one safetensors file, its tensors in one dtype and in the order of `shapes`.

    numbers: their contents, one array after the other; a tensor may come in several arrays, rows after rows. Each is
    written before the next one is asked for. The file takes its name when it is whole.
    """
    spelled = next(word for word, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this word
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": spelled, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8 bytes
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for array in numbers:
            end -= stream.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
    if end:
        raise ValueError(f"{file}: the tensors are {end} bytes less than their shapes mean")
    partial.replace(file)


def _read_index(directory: Path) -> dict[str, str] | None:
    index = directory / INDEX_FILE
    if not index.is_file():
        return None
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or any(Path(str(file)).name != file for file in where.values()):
        raise UserError(f"{index}: expected a weight_map from tensor names to files of this directory")
    return where


def _read_header(path: Path) -> dict[str, Entry]:
    try:
        with path.open("rb") as stream:
            length, size = int.from_bytes(stream.read(8), "little"), path.stat().st_size
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError("it ends within its header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, **fields) for name, fields in header.items()}
        if (end := max(8 + length + fields["data_offsets"][1] for fields in header.values())) != size:
            raise ValueError(f"it has {size} bytes, its header says {end}")
        return entries
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; pkv reads {SINGLE_FILE}, or shards with {INDEX_FILE}") from error
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from error


def _entry(path: Path, origin: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    """One tensor of a header. Raises ValueError or TypeError for what cannot be."""
    start, end = data_offsets
    if any(type(number) is not int or number < 0 for number in (*shape, start, end - start)):
        raise ValueError(f"shape {shape} from byte {start} to {end} cannot be")
    if dtype in DTYPES and end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{dtype} of shape {shape} does not take the {end - start} bytes that are its own")
    return Entry(path, dtype, tuple(shape), origin + start)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint's directory. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected a Hugging Face directory with config.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
