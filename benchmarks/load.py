"""Loads a synthetic sharded checkpoint of some GB and says what it takes: `python benchmarks/load.py [--layers N]`.

The checkpoint has Qwen2.5-1.5B's shapes in bf16, of random bytes, in files of at most 1 GB, and is deleted afterwards.
Each load is a fresh process with 1 or 8 CPU devices, with the files out of the page cache ("cold") and then in it
("warm"). Prints one JSON object. On a CPU the arrays are host memory too, so `peak_above_arrays_mb` is the process's
greatest resident memory during the load, less what it had before, less the arrays; mapped pages of the files count.
`half` is what a process reads that owns 4 of the 8 devices of a mesh: bytes it asks for, and bytes off the storage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pkv.config import MeshConfig
from pkv.mesh import TRAINING_RULES, make_mesh, shardings
from pkv.model import Arch, load_params, param_axes, param_shapes, read_arch
from pkv.model.families import FAMILIES
from pkv.model.layout import by_path, disk_tensors, whole_tensors
from pkv.model.load import own_parts
from pkv.model.tensorfiles import INDEX_FILE, TensorFiles, weight_files, write_tensors

MESHES = {1: MeshConfig(data=1), 8: MeshConfig(data=1, fsdp=4, tensor=2)}
FILE_BYTES = 10**9
MB, GB = 10**6, 10**9


def arch_of(layers: int) -> Arch:
    """Qwen2.5-1.5B, with as many layers as are asked for (28 in the original)."""
    return Arch(
        vocab_size=151_936,
        hidden=1536,
        layers=layers,
        heads=12,
        kv_heads=2,
        head_size=128,
        ffn=8960,
        rope_theta=1e6,
        qkv_bias=True,
        tied_embeddings=True,
    )


def make_checkpoint(directory: Path, arch: Arch) -> None:
    """Random bytes under the right names, tensor by tensor."""
    family = FAMILIES["qwen2"]
    dtype, draw = np.dtype(jnp.bfloat16), np.random.default_rng(0)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for tensor in whole_tensors(disk_tensors(arch, family)):
        held = sum(2 * int(np.prod(shape)) for shape in files[-1].values())
        if files[-1] and held + 2 * int(np.prod(tensor.shape)) > FILE_BYTES:
            files.append({})
        files[-1][tensor.name] = tensor.shape
    where = {}
    for number, shapes in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        numbers = (np.frombuffer(draw.bytes(2 * int(np.prod(shape))), dtype) for shape in shapes.values())
        write_tensors(directory / name, shapes, dtype, numbers)
        where |= dict.fromkeys(shapes, name)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": where}))
    (directory / "config.json").write_text(json.dumps(family.write(arch)))


def forget(directory: Path) -> None:
    """Take the files out of the page cache."""
    for name in weight_files(directory):
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(name: str) -> int:
    """Bytes of this process, now (VmRSS) or at most since `Path("/proc/self/clear_refs")` was written (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def off_storage() -> int:
    """Bytes that this process made the kernel read from storage."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def placing(arch: Arch) -> Any:
    mesh = make_mesh(MESHES[len(jax.devices())])
    return shardings(param_axes(arch), param_shapes(arch), mesh, TRAINING_RULES)


def measure_load(directory: Path) -> dict[str, Any]:
    """One load in this process."""
    arch = read_arch(directory)
    placed = placing(arch)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    before, read_before, start = memory("VmRSS"), off_storage(), time.perf_counter()
    params = jax.block_until_ready(load_params(directory, arch, jnp.bfloat16, placed))
    seconds, peak = time.perf_counter() - start, memory("VmHWM")
    arrays = sum(weight.nbytes for weight in jax.tree.leaves(params))
    return {
        "seconds": round(seconds, 2),
        "gb_per_s": round(arrays / seconds / GB, 2),
        "off_storage_mb": round((off_storage() - read_before) / MB),
        "arrays_mb": round(arrays / MB),
        "peak_above_arrays_mb": round((peak - before - arrays) / MB),
    }


def measure_half(directory: Path) -> dict[str, Any]:
    """What a process that owns the first half of the devices reads; the parts are dropped."""
    arch = read_arch(directory)
    files, placed = TensorFiles(directory), by_path(placing(arch))
    mine = set(jax.devices()[: len(jax.devices()) // 2])
    read_before, asked = off_storage(), 0
    for path, tensors in disk_tensors(arch, FAMILIES["qwen2"]).items():
        for tensor in tensors:
            view = tensor.view(files.view(tensor.name))
            sharding = placed[path]
            if tensor.layer is not None:
                sharding = jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))
            for index, devices in own_parts(view.shape, sharding):
                if mine & set(devices):
                    asked += view[index].copy(order="K").nbytes
    return {"asked_mb": round(asked / MB), "off_storage_mb": round((off_storage() - read_before) / MB)}


MEASURES = {"load": measure_load, "half": measure_half}


def in_fresh_process(what: str, directory: Path, devices: int) -> dict[str, Any]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__, "--measure", what, "--directory", str(directory)]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def measure_all(directory: Path, arch: Arch) -> Iterator[tuple[str, Any]]:
    tensors = whole_tensors(disk_tensors(arch, FAMILIES["qwen2"]))
    yield "on_disk_mb", round(sum((directory / name).stat().st_size for name in weight_files(directory)) / MB)
    yield "files", len(weight_files(directory))
    yield "largest_tensor_mb", round(max(2 * int(np.prod(tensor.shape)) for tensor in tensors) / MB)
    for devices in MESHES:
        for cache in ("cold", "warm"):
            if cache == "cold":
                forget(directory)
            yield f"devices_{devices}_{cache}", in_fresh_process("load", directory, devices)
    forget(directory)
    yield "half", in_fresh_process("half", directory, 8)


def main() -> None:
    arguments = argparse.ArgumentParser(description="Loads a synthetic checkpoint and says what it takes.")
    arguments.add_argument("--layers", type=int, default=28)
    arguments.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to make it")
    arguments.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.measure:
        print(json.dumps(MEASURES[chosen.measure](chosen.directory)))
        return
    arch = arch_of(chosen.layers)
    needed = sum(2 * int(np.prod(shape.shape)) for shape in jax.tree.leaves(param_shapes(arch)))
    if (free := shutil.disk_usage(chosen.directory).free) < 2 * needed:
        sys.exit(f"{chosen.directory}: {free / GB:.1f} GB are free, {2 * needed / GB:.1f} are wanted")
    with tempfile.TemporaryDirectory(dir=chosen.directory) as folder:
        make_checkpoint(Path(folder), arch)
        print(json.dumps(dict(measure_all(Path(folder), arch)), indent=2))


if __name__ == "__main__":
    main()
