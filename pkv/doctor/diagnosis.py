"""Every check by its code, given what this machine is; one that crashes is a finding, and the others go on."""

from __future__ import annotations

import grp
import os
import platform
import pwd
import shutil
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from glob import glob
from importlib import metadata
from pathlib import Path

from pkv.doctor.checks import (
    announced_processes,
    check_compiled,
    check_devices,
    check_disk,
    check_folder,
    check_hosts,
    check_hub,
    check_jax_family,
    check_lock,
    check_memory,
    check_packages,
    check_proxies,
    check_python,
    nearest_existing,
)
from pkv.doctor.devices import ask_devices
from pkv.doctor.findings import Finding, Outcome

LOCK = Path("/tmp/libtpu_lockfile")  # libtpu's own name for it
HUB_TIMEOUT_S = 5
_HUB_REMEDY = "set HF_HOME to a directory of yours, unless it is meant so: what lies there is read, never run"
Check = tuple[str, str, Callable[[], Outcome]]  # code, name, what is called


def diagnose(run: Path, *, online: bool = False, timeout_s: int = 60) -> list[Finding]:
    """Look at this machine: versions, devices, hosts, caches, disk, memory; `run`: where runs are to lie.

    JAX gets `timeout_s` seconds to start. With `online` the hub is asked, which takes 5 s at most.
    """
    return settle(list_checks(run, online, timeout_s))


def settle(listed: Sequence[Check]) -> list[Finding]:
    """Call the checks one after another. What a check raises stays in its future, where it is found, not caught."""
    findings = []
    with ThreadPoolExecutor(max_workers=1) as worker:
        for code, name, check in listed:
            outcome = _outcome(worker.submit(check))
            findings.append(Finding(code, name, outcome.state, outcome.found, outcome.remedy))
    return findings


def _outcome(future: Future[Outcome]) -> Outcome:
    error = future.exception()
    if error is None:
        return future.result()
    found = " ".join(f"the check itself failed: {type(error).__name__}: {error}".split())
    return Outcome("fail", found, "this is a mistake of pkv or of its installation; see PKV-D02, and report it")


def list_checks(run: Path, online: bool, timeout_s: int) -> list[Check]:
    """The checks with what they look at; what is slow or may fail is looked up when the check is called."""
    environment = dict(os.environ)
    tpus, gpus = tpu_files(), sorted(glob("/dev/nvidia[0-9]*"))
    tpu, user = bool(tpus), os.getuid()
    several = max(announced_processes(environment).values(), default=1) > 1
    devices = cache(lambda: ask_devices(several, timeout_s))
    wanted = environment.get("JAX_PLATFORMS", "")

    def blocked() -> bool:
        return tpu and bool(devices().trouble)

    return [
        ("PKV-D01", "python", lambda: check_python(platform.python_version(), _requirements()[0])),
        ("PKV-D02", "packages", lambda: check_packages(_requirements()[1], installed)),
        ("PKV-D03", "jax's parts", lambda: check_jax_family(_required_by_jax(), installed)),
        ("PKV-D04", "devices", lambda: check_devices(devices(), wanted, [*tpus, *gpus])),
        ("PKV-D05", "hosts", lambda: check_hosts(environment, devices().processes)),
        ("PKV-D06", "TPU lock", lambda: check_lock(LOCK, _text("/proc/locks"), process_name, blocked=blocked())),
        ("PKV-D07", "proxies", lambda: check_proxies(environment, tpu=tpu)),
        ("PKV-D08", "compiled programs", lambda: check_compiled(environment, user, private_group(user))),
        ("PKV-D09", "hub cache", lambda: check_folder(_hub_cache(), _HUB_REMEDY, user, private_group(user), "warn")),
        ("PKV-D10", "disk", lambda: check_disk(_places(run), free_bytes)),
        ("PKV-D11", "memory a device", lambda: check_memory(devices(), _host_free())),
        ("PKV-D12", "hub", lambda: check_hub(online, _hub_is_off(), _ask_hub)),
    ]


def installed(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def process_name(pid: int) -> str | None:
    """Of a live process that can be seen from here."""
    return _text(f"/proc/{pid}/comm").strip() or None if pid > 0 else None


def tpu_files(root: str = "/") -> list[str]:
    """Device files of TPUs; newer ones have VFIO's, as has whatever is passed through to a virtual machine."""
    google = [Path(file).parent for file in glob(f"{root}sys/bus/pci/devices/*/vendor") if _text(file) == "0x1ae0\n"]
    # Google's too are the disks and network cards of its virtual machines, PCI classes 1 and 2.
    chips = [device for device in google if not _text(f"{device}/class").startswith(("0x01", "0x02"))]
    return sorted(glob(f"{root}dev/accel[0-9]*") + (glob(f"{root}dev/vfio/[0-9]*") if chips else []))


def private_group(user: int) -> int | None:
    """The group that bears the user's name and holds nobody else, as most Linux systems make it."""
    try:
        name = pwd.getpwuid(user).pw_name
        group = grp.getgrnam(name)
    except KeyError:  # a container's user often has no name
        return None
    return group.gr_gid if set(group.gr_mem) <= {name} else None


def free_bytes(path: Path) -> int:
    """Free where `path` lies, or is to lie."""
    return shutil.disk_usage(nearest_existing(path)).free


def _requirements() -> tuple[str, list[str]]:
    """What pkv requires: of Python, and of packages. A checkout's pyproject.toml is newer than what was installed."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    if file.is_file() and (project := tomllib.loads(file.read_text("utf-8"))["project"])["name"] == "pkv":
        return project["requires-python"], project["dependencies"]
    about = metadata.metadata("pkv")
    return about["Requires-Python"], about.get_all("Requires-Dist") or []


def _required_by_jax() -> list[str]:
    return (metadata.requires("jax") or []) if installed("jax") else []


def _places(run: Path) -> dict[str, tuple[Path, float, float]]:
    """Where, the GB that a 1B model's run needs, and the GB below which nothing works."""
    return {
        "runs": (run, 20, 1),
        "the hub's cache": (_hub_cache(), 10, 1),
        "temporary files": (_temporary(), 2, 0.2),
    }


def _temporary() -> Path:
    """Where temporary files lie, or should: Python takes no directory that has no room for even one."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return Path(os.environ.get("TMPDIR") or "/tmp")


def _text(path: str) -> str:
    """A file of /proc; empty where there is none, or none for us."""
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def _host_free() -> int | None:
    lines = (line.split() for line in _text("/proc/meminfo").splitlines())
    return next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), None)


def _hub_cache() -> Path:
    from huggingface_hub import constants  # here: it may be missing

    return Path(constants.HF_HUB_CACHE)


def _hub_is_off() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _ask_hub() -> int:
    """The status with which the hub answers a question that anybody may ask."""
    from huggingface_hub import constants, get_token

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    question = urllib.request.Request(f"{constants.ENDPOINT}/api/models?limit=1", headers=headers)
    try:
        with urllib.request.urlopen(question, timeout=HUB_TIMEOUT_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
