"""The devices as JAX sees them, asked in a process of its own: what cannot start, or never answers, ends there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A GPU's memory is not taken for the question. On several hosts the count is known once they have found each other.
_QUESTION = """
import json, os, sys
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
import jax
if sys.argv[1] == "several":
    address, *own = (os.environ.get(f"JAX_{name}") for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"))
    own = [int(number) if number else None for number in own]
    jax.distributed.initialize(address, *own, initialization_timeout=2 * int(sys.argv[2]))  # no end by its own abort
devices = [{"kind": d.device_kind, "platform": d.platform, **(d.memory_stats() or {})} for d in jax.local_devices()]
print(json.dumps({"processes": jax.process_count(), "devices": devices}))
"""


@dataclass(frozen=True)
class Device:
    """One of this process's devices; memory in bytes, None where the device does not say."""

    platform: str
    kind: str
    limit: int | None = None
    in_use: int | None = None


@dataclass(frozen=True)
class Devices:
    """What JAX answered, or why it didn't."""

    devices: tuple[Device, ...] = ()
    processes: int | None = None
    trouble: str = ""


def ask_devices(several: bool, timeout_s: int, question: str = _QUESTION) -> Devices:
    """Start JAX in another process and wait `timeout_s` seconds at most; `several`: let the hosts find each other."""
    command = [sys.executable, "-c", question, "several" if several else "one", str(timeout_s)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    ) as asked:
        try:
            out, err = asked.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            asked.kill()
            return Devices(trouble=f"no answer within {timeout_s} s")
    if asked.returncode:
        return Devices(trouble=_reason(err, asked.returncode))
    answer = next((line for line in reversed(out.splitlines()) if line.startswith('{"processes"')), None)
    return Devices(trouble="it says nothing that can be read") if answer is None else _read(json.loads(answer))


def _environment() -> Mapping[str, str]:
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2")}


def _reason(err: str, code: int) -> str:
    """The last line that Python printed, without what JAX adds for its developers."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("RuntimeError", "jax", "ImportError", "ModuleNotFoundError"))]
    return (told or lines or [f"exit code {code}"])[-1]


def _read(answer: Mapping[str, Any]) -> Devices:
    devices: Sequence[Mapping[str, Any]] = answer["devices"]
    return Devices(
        tuple(Device(d["platform"], d["kind"], d.get("bytes_limit"), d.get("bytes_in_use")) for d in devices),
        answer["processes"],
    )
