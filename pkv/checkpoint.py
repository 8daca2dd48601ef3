"""State on disk, and the only door to Orbax: whole steps, verified by sha256 before they are used.

    FOLDER/STEP/state/         the arrays, in Orbax's format, under flat names such as "params.layers.wq"
    FOLDER/STEP/beside-0.npz   arrays of host 0 that go with the state, of any size; not there when there are none
    FOLDER/STEP/manifest.json  size and sha256 of every file, shape and dtype of every array, versions, the `meta`

Orbax alone restores flipped bits silently and takes an empty step folder for a checkpoint. So a step counts only when
its manifest is there and agrees with every file. Several hosts write into one directory, which all must see: each its
own part of the arrays, the first one the manifest when all are through.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pkv.config import UserError
from pkv.hosts import gather, leads

MANIFEST = "manifest.json"
_STATE = "state"
_FORMAT = 1
_PACKAGES = ("pkv", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")


class CheckpointError(UserError):
    """A checkpoint that cannot be used."""


def save(
    folder: Path,
    step: int,
    state: Any,
    meta: Mapping[str, Any],
    keep: int,
    beside: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write FOLDER/STEP in one piece, then remove all but the newest `keep` steps up to it.

    state: a pytree of arrays; scalars are stored as arrays of shape []. meta: small and JSON-able. beside: numbers
    that no template says the size of when they are read, this host's own. All hosts call this together.
    A process that is killed here leaves the older steps whole and no half of this one.
    """
    import orbax.checkpoint as ocp

    if step < 0 or keep < 1:
        raise ValueError(f"expected step >= 0 and keep >= 1, got step {step} and keep {keep}")
    folder = Path(folder).absolute()
    partial = folder / f".{step}.tmp"
    if leads():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*.tmp"):  # what a killed save left
            shutil.rmtree(stale)
        partial.mkdir()
    gather("ready")
    arrays = {name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for name, leaf in _flatten(state).items()}
    ocp.PyTreeCheckpointer().save(partial / _STATE, arrays)
    if beside:
        np.savez(partial / _beside(jax.process_index()), allow_pickle=False, **beside)
    gather("written")
    if leads():
        _write_manifest(partial, step, arrays, meta)
        _rename_over(partial, folder / str(step))
        _remove_old(folder, step, keep)
    gather("named")


def latest(folder: Path) -> int | None:
    """The newest step that is whole, or None; a broken newer one is passed over with a line on stderr."""
    for step in _steps(Path(folder)):
        try:
            verify(folder, step)
        except CheckpointError as error:
            print(f"warning: {error}; looking for an older checkpoint", file=sys.stderr)
        else:
            return step
    return None


def verify(folder: Path, step: int) -> dict[str, Any]:
    """The step's manifest, once every file was found to agree with it. Raises CheckpointError naming a file."""
    path = Path(folder) / str(step)
    manifest = _read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing from checkpoint {step}")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{file}: expected {entry['bytes']} bytes, got {file.stat().st_size}")
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: content differs from what was saved (sha256)")
    return manifest


def restore(folder: Path, step: int, template: Any, under: str = "") -> tuple[Any, dict[str, Any]]:
    """The state of a step and its meta, bit for bit, in the template's structure, on the template's shardings.

    template: a pytree of arrays or `jax.ShapeDtypeStruct`; jax leaves come back as jax arrays on the leaf's sharding,
    numpy leaves as numpy, Python numbers as numbers. under: the sub-tree of the saved state to read, such as "params".
    Raises CheckpointError when the step is broken, or an array is missing, left over, or of another shape or dtype.
    """
    manifest = verify(folder, step)
    names = [f"{under}.{name}".rstrip(".") if under else name for name in _flatten(template)]
    leaves, structure = jax.tree.flatten(template)
    wanted = dict(zip(names, leaves, strict=True))
    _check_template(Path(folder) / str(step), manifest["arrays"], wanted, under)
    arrays = _read_arrays(Path(folder) / str(step), wanted)
    return jax.tree.unflatten(structure, [_like(arrays[name], leaf) for name, leaf in wanted.items()]), manifest["meta"]


def read_beside(folder: Path, step: int) -> list[dict[str, np.ndarray]]:
    """What each host saved beside a step's state, by name; none where nothing was. Raises CheckpointError."""
    there, found = verify(folder, step)["files"], []
    while (name := _beside(len(found))) in there:
        with np.load(Path(folder) / str(step) / name, allow_pickle=False) as arrays:
            found.append(dict(arrays))
    return found


def _beside(host: int) -> str:
    return f"beside-{host}.npz"


def _flatten(tree: Any) -> dict[str, Any]:
    """The leaves by dotted path, in the tree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the state have the same dotted path; keys must not contain dots")
    return flat


def _steps(folder: Path) -> list[int]:
    """The step numbers for which a folder exists, newest first; nothing is said about their content."""
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted((int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True)


def _check_template(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], under: str) -> None:
    inside = {n for n in saved if not under or n == under or n.startswith(f"{under}.")}
    for name in wanted:
        if name not in inside:
            raise CheckpointError(f"{path}: has no array {name!r}; it was saved by another model or configuration")
    if left := sorted(inside - wanted.keys()):
        raise CheckpointError(f"{path}: holds {left[0]!r}, which this model or configuration has no place for")
    for name, leaf in wanted.items():
        shape, dtype = list(np.shape(leaf)), str(_dtype(leaf))
        if [shape, dtype] != [saved[name]["shape"], saved[name]["dtype"]]:
            got = f"{saved[name]['dtype']}{saved[name]['shape']}"
            raise CheckpointError(
                f"{path}: {name} is {got}, expected {dtype}{shape}; use the configuration it was saved with"
            )


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _read_arrays(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The named arrays as stored: on a jax leaf's sharding, as numpy for every other leaf."""
    import orbax.checkpoint as ocp

    def how(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True)

    arguments = ocp.args.PyTreeRestore(
        item=dict.fromkeys(wanted, 0),
        restore_args={name: how(leaf) for name, leaf in wanted.items()},
        partial_restore=True,
    )
    return ocp.PyTreeCheckpointer().restore((path / _STATE).absolute(), args=arguments)


def _like(array: Any, leaf: Any) -> Any:
    """A restored array as the kind of thing the template's leaf is."""
    if isinstance(leaf, (bool, int, float)):
        return type(leaf)(array.item())
    if isinstance(leaf, np.generic):
        return array[()]
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
        return jax.numpy.asarray(array)
    return array


def _write_manifest(path: Path, step: int, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "step": step,
        "versions": {package: _version(package) for package in _PACKAGES},
        "meta": dict(meta),
        "arrays": {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in arrays.items()},
        "files": {f.relative_to(path).as_posix(): {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in files},
    }
    manifest["sha256"] = _own_sha256(manifest)
    with (path / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; {path.name} is not a whole checkpoint")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        claimed = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{file}: not readable as a manifest ({error})") from error
    if claimed != _own_sha256(manifest):
        raise CheckpointError(f"{file}: content differs from what was saved (sha256)")
    if manifest["format"] != _FORMAT:
        raise CheckpointError(
            f"{file}: format {manifest['format']}, expected {_FORMAT}; use the pkv version that wrote it"
        )
    return manifest


def _own_sha256(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # pkv run from a checkout


def _remove_old(folder: Path, step: int, keep: int) -> None:
    """Remove every step up to `step` but the newest `keep` whole ones; out of sight first, so that no half is seen."""
    upto = [old for old in _steps(folder) if old <= step]
    kept = [old for old in upto if (folder / str(old) / MANIFEST).is_file()][:keep]
    for old in set(upto) - set(kept):
        hidden = folder / f".{old}.old.tmp"
        (folder / str(old)).rename(hidden)
        shutil.rmtree(hidden)


def _rename_over(partial: Path, final: Path) -> None:
    """Move a complete folder to its name; one that stands there goes aside first, as folders cannot be swapped."""
    aside = final.with_name(f".{final.name}.old.tmp")
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    handle = os.open(final.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    if aside.exists():
        shutil.rmtree(aside)
