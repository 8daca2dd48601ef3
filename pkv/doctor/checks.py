"""The checks: each looks at what it is given and says what it found; what is given comes from `diagnosis`."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from ipaddress import ip_address, ip_network
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pkv.doctor.devices import Devices
from pkv.doctor.findings import Outcome, State

GB = 1e9
METADATA = "metadata.google.internal"  # JAX and libtpu ask it how the slice is built
Versions = Callable[[str], str | None]  # of an installed distribution; None: not installed


def check_python(version: str, wanted: str) -> Outcome:
    """`wanted` as pyproject.toml's requires-python; 3.11.0rc1, which Ubuntu 22.04 has, counts as 3.11.0."""
    if SpecifierSet(wanted).contains(Version(version.rstrip("+")).base_version):
        return Outcome("ok", f"{version}, pkv needs {wanted}")
    return Outcome("fail", f"{version}, pkv needs {wanted}", "make the environment anew with a newer Python")


def check_packages(required: Sequence[str], installed: Versions) -> Outcome:
    """Every requirement of pkv itself; those of its extras only where the package is there."""
    wrong = _unmet(required, installed)
    if wrong:
        return Outcome("fail", "; ".join(wrong), "install pkv again in its environment: pip install -e .")
    main = ", ".join(f"{name} {installed(name)}" for name in ("jax", "jaxlib", "flax", "numpy"))
    return Outcome("ok", f"all {len(required)} requirements are met: {main}")


def check_jax_family(required: Sequence[str], installed: Versions) -> Outcome:
    """jaxlib, libtpu and the CUDA plugins, where they are there, against what the installed jax requires."""
    if installed("jax") is None:
        return Outcome("fail", "jax is not installed", "pip install -e . in pkv's folder")
    accelerators = [text for text in required if Requirement(text).name.startswith(("libtpu", "jax-cuda"))]
    wrong = _unmet([text for text in required if Requirement(text).name == "jaxlib"], installed)
    for extra in ("tpu", "cuda12", "cuda13"):
        wrong += _unmet(accelerators, installed, extra)
    parts = [f"{name} {version}" for name in ("jax", "jaxlib", "libtpu") if (version := installed(name))]
    if wrong:
        remedy = 'install them together: pip install -U "jax[tpu]", "jax[cuda12]", or jax alone for a CPU'
        return Outcome("fail", f"{', '.join(parts)}: {'; '.join(wrong)}", remedy)
    return Outcome("ok", f"{', '.join(parts)} belong together")


def _unmet(required: Sequence[str], installed: Versions, extra: str = "") -> list[str]:
    wrong = []
    for requirement in map(Requirement, required):
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        version = installed(requirement.name)
        if version is None and not extra:
            wrong.append(f"{requirement.name} is missing, expected {requirement.specifier or 'any version'}")
        elif version is not None and not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, expected {requirement.specifier}")
    return wrong


def check_devices(devices: Devices, platforms: str, present: Sequence[str]) -> Outcome:
    """Whether JAX starts, with the accelerator that is there; `platforms`: JAX_PLATFORMS, `present`: device files."""
    if devices.trouble.startswith("no answer"):
        remedy = (
            "on a slice of several hosts, run doctor on all at the same time; else end what holds the device (PKV-D06)"
        )
        return Outcome("fail", f"JAX does not start: {devices.trouble}", remedy)
    if "coordinator_address" in devices.trouble:
        remedy = (
            "give JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID on each host, or JAX_NUM_PROCESSES=1 "
            "on one that is to be alone; see PKV-D05"
        )
        return Outcome("fail", f"JAX does not start: {devices.trouble}", remedy)
    if devices.trouble:
        part = f'JAX_PLATFORMS is {platforms!r}: install its part as in pip install "jax[cuda12]", or unset it; '
        remedy = f"{part if platforms else ''}see PKV-D03 and PKV-D06"
        return Outcome("fail", f"JAX does not start: {devices.trouble}", remedy)
    kinds = sorted({f"{each.platform} ({each.kind})" for each in devices.devices})
    found = f"{len(devices.devices)} x {', '.join(kinds)}"
    if present and not platforms and all(each.platform == "cpu" for each in devices.devices):
        remedy = 'pip install "jax[tpu]" or "jax[cuda12]"; or JAX_PLATFORMS=cpu, if the CPU is meant'
        return Outcome("fail", f"{found}, though there is {present[0]}", remedy)
    return Outcome("ok", found)


def announced_processes(environment: Mapping[str, str]) -> dict[str, int]:
    """How many processes the surroundings announce, by the variable that says so, as JAX's own detection reads them."""
    own = environment.get("JAX_NUM_PROCESSES", "")
    found = {"JAX_NUM_PROCESSES": int(own)} if own.isdigit() else {}
    if own == "1":  # whoever else is there, this one is to be alone
        return found
    slices = environment.get("MEGASCALE_NUM_SLICES", "")
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if hosts := [host for host in environment.get(name, "").split(",") if host.strip()]:
            found[name] = len(hosts) * (int(slices) if slices.isdigit() else 1)
    # A shell within an allocation has the count, but is not one of its tasks.
    for name, task in (("SLURM_NTASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")):
        if environment.get(name, "").isdigit() and task in environment:
            found[name] = int(environment[name])
    return found


def check_hosts(environment: Mapping[str, str], processes: int | None) -> Outcome:
    """jax.process_count(), None where JAX did not start, against what the surroundings announce.

    On a Cloud TPU VM no variable does: libtpu and JAX ask the metadata server.
    """
    announced = announced_processes(environment)
    said = ", ".join(f"{name} says {count}" for name, count in announced.items()) or "no variable says how many"
    if len(set(announced.values())) > 1:
        return Outcome("fail", f"{said}: they disagree", "unset the ones that are left from another launcher")
    worker, hosts = environment.get("TPU_WORKER_ID", ""), environment.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
    if "TPU_WORKER_HOSTNAMES" in announced and worker and not (worker.isdigit() and int(worker) < hosts):
        return Outcome("fail", f"TPU_WORKER_ID is {worker!r}, {said}", f"give each host its own, from 0 to {hosts - 1}")
    if processes is None:
        return Outcome("skipped", f"{said}; JAX did not start, see PKV-D04")
    if processes != next(iter(announced.values()), processes):
        remedy = "start one process on every host at the same time, by launch/tpu_vm.sh, srun or a JobSet"
        return Outcome("fail", f"JAX counts {processes}, {said}", remedy)
    return Outcome("ok", f"JAX counts {processes}, {said}")


def check_lock(lock: Path, locks: str, command: Callable[[int], str | None], *, blocked: bool) -> Outcome:
    """The file by which libtpu keeps a TPU for one process; `locks` is /proc/locks, `command` a live process's name.

    A file that nobody holds is what every run leaves: it matters where the TPU that is there is `blocked`.
    """
    if not lock.exists():
        return Outcome("ok", f"no {lock}")
    holders = _holders(lock.stat(), locks)
    live = [f"{pid} ({name})" for pid in holders if (name := command(pid))]
    if live:
        remedy = "wait for it, or end it: only one process at a time can use this machine's TPU"
        return Outcome("fail", f"{lock} is held by process {', '.join(live)}", remedy)
    if holders:
        remedy = "look for it outside: a container on the same machine has the TPU"
        return Outcome("fail", f"{lock} is held by a process that is not to be seen from here", remedy)
    owner = lock.stat().st_uid
    if blocked or owner != os.getuid():
        return Outcome("fail", f"{lock} is a leftover of user {owner}, held by nobody", f"remove it: sudo rm {lock}")
    return Outcome("ok", f"{lock} is left by you, held by nobody")


def _holders(file: os.stat_result, locks: str) -> list[int]:
    """Processes in lines such as `1: FLOCK ADVISORY WRITE 4242 08:01:131 0 EOF`; 0 or less: of another namespace."""
    place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    words = (line.split() for line in locks.splitlines())
    return [int(line[-4]) for line in words if len(line) >= 8 and line[-3] == place]


def check_proxies(environment: Mapping[str, str], *, tpu: bool) -> Outcome:
    """No proxy may stand before the metadata server, nor before the first of several hosts, which all others call.

    A proxy's address, which may hold a password, isn't shown.
    """
    # Of no_proxy and NO_PROXY the first counts, as for curl and Python.
    lower = {name.lower(): name for name in sorted(environment) if environment[name]}
    proxies = [lower[name] for name in ("http_proxy", "https_proxy", "all_proxy") if name in lower]
    if not proxies:
        return Outcome("ok", "no proxy is set")
    exempt = environment[lower["no_proxy"]].split(",") if "no_proxy" in lower else []
    names = [name.strip() for name in exempt if name.strip()]
    metadata = environment.get("GCE_METADATA_IP", METADATA)
    wanted = [metadata, *_first_host(environment)]
    left_out = [host for host in wanted if not any(_is_exempt(host, name) for name in names)]
    if not left_out:
        return Outcome("ok", f"{', '.join(proxies)} set, not for {', '.join(wanted)}")
    own = lower.get("no_proxy", "no_proxy")
    remedy = f"export no_proxy=${own},{','.join(left_out)}{',169.254.169.254' if metadata in left_out else ''}"
    found = f"{', '.join(proxies)} set, no_proxy leaves out {', '.join(left_out)}"
    return Outcome("fail" if tpu and metadata in left_out else "warn", found, remedy)


def _is_exempt(host: str, exempt: str) -> bool:
    """By `*`, the end of a name, or as gRPC reads it a network such as 10.0.0.0/8."""
    try:
        return (
            f".{host}".endswith(f".{exempt.lstrip('.')}")
            or exempt == "*"
            or ip_address(host) in ip_network(exempt, False)
        )
    except ValueError:  # one of them is a name
        return False


def _first_host(environment: Mapping[str, str]) -> list[str]:
    """Where the hosts find each other, if there are several and a variable says it, as JAX reads them."""
    if max(announced_processes(environment).values(), default=1) == 1:
        return []
    for name in (
        "JAX_COORDINATOR_ADDRESS",
        "MEGASCALE_COORDINATOR_ADDRESS",
        "TPU_PROCESS_ADDRESSES",
        "TPU_WORKER_HOSTNAMES",
        "SLURM_STEP_NODELIST",
    ):
        if found := re.match(r"([^,:\[]+)(?:\[(\w+))?", environment.get(name, "")):  # of node[01-08] node01
            return ["".join(part for part in found.groups() if part)]
    return []


def check_compiled(environment: Mapping[str, str], user: int, group: int | None) -> Outcome:
    """Where pkv.compiling keeps compiled programs, which jax runs as they are: said here again, as it imports jax.

    Its own folder it wants without a group that may write, a named one it takes as it is.
    """
    named = environment.get("JAX_COMPILATION_CACHE_DIR", "")
    if environment.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("false", "0", "off", "no", "n", "f"):
        return Outcome("skipped", "JAX_ENABLE_COMPILATION_CACHE forbids to keep any")
    if "://" in named:
        return Outcome("skipped", "JAX_COMPILATION_CACHE_DIR is not on this machine's disks")
    remedy = "name a directory of yours: JAX_COMPILATION_CACHE_DIR"
    home = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "~"), ".cache")
    try:
        folder = Path(named) if named else Path(home).expanduser() / "pkv" / "compiled"
    except RuntimeError:
        return Outcome("fail", "HOME is not set and this user has no account: no place to keep any", remedy)
    return check_folder(folder, remedy, user, group if named else None)


def nearest_existing(path: Path) -> Path:
    """The path, or the directory above it in which it would be made."""
    return next(each for each in (path, *path.absolute().parents) if os.path.exists(each))


def check_folder(folder: Path, remedy: str, user: int, group: int | None, others: State = "fail") -> Outcome:
    """Whether what is fetched or compiled can be kept in `folder`, where nobody but `user` writes.

    group: one that holds nobody else. others: how bad it is where somebody else owns it or can write there.
    """
    place = nearest_existing(folder)
    if not place.is_dir():
        return Outcome("fail", f"{place} is no directory", remedy)
    if not os.access(place, os.W_OK | os.X_OK):
        return Outcome(others if place == folder else "fail", f"{place} cannot be written", remedy)
    if place != folder:
        return Outcome("ok", f"{folder} is made when it is needed")
    found = folder.stat()
    if found.st_uid != user:
        return Outcome(others, f"{folder} belongs to user {found.st_uid}, not to you ({user})", remedy)
    if found.st_mode & (stat.S_IWOTH if found.st_gid == group else stat.S_IWOTH | stat.S_IWGRP):
        mode = stat.S_IMODE(found.st_mode)
        return Outcome(others, f"{folder} can be written by others (mode {mode:o})", f"chmod go-w {folder}")
    return Outcome("ok", f"{folder} is yours alone to write")


def check_disk(places: Mapping[str, tuple[Path, float, float]], free: Callable[[Path], int]) -> Outcome:
    """Free space by name: where, and the GB below which it is too little, and much too little."""
    states: list[State] = ["ok", "warn", "fail"]
    worst, found = 0, []
    for name, (path, enough, least) in places.items():
        gb = free(path) / GB
        state = (gb < enough) + (gb < least)
        worst = max(worst, state)
        found.append(f"{name} {gb:.1f} GB" + (f" (expected {enough:g}) at {path}" if state else ""))
    remedy = "free some, or name another disk: --run, HF_HOME, XDG_CACHE_HOME, TMPDIR" if worst else ""
    return Outcome(states[worst], f"free for {', '.join(found)}", remedy)


def check_memory(devices: Devices, host_free: int | None) -> Outcome:
    """Memory of each device, and what is taken of it before anything has begun; of a CPU the host's."""
    if devices.trouble:
        return Outcome("skipped", "JAX did not start, see PKV-D04")
    sized = [(each.limit, each.in_use or 0) for each in devices.devices if each.limit]
    if not sized:
        if host_free is None:
            return Outcome("skipped", "the devices do not say how much they have")
        little = host_free < 2 * GB
        remedy = "end other programs, or take a machine with more: even configs/tiny.yaml wants 2 GB" if little else ""
        return Outcome("fail" if little else "ok", f"{host_free / GB:.1f} GB free on the host", remedy)
    least, most = min(limit for limit, _ in sized), max(limit for limit, _ in sized)
    taken = max(used / limit for limit, used in sized)
    size = f"{least / GB:.1f}" if least == most else f"{least / GB:.1f} to {most / GB:.1f}"
    found = f"{len(sized)} x {size} GB, {taken:.0%} in use"
    if taken > 0.1:
        return Outcome("fail", found, "end what else runs on the devices (nvidia-smi; PKV-D06 for a TPU)")
    if least < 0.9 * most:
        return Outcome("warn", found, "what fits is decided by the smallest: leave it out, or end what runs there")
    return Outcome("ok", found)


def check_hub(online: bool, offline: bool, ask: Callable[[], int]) -> Outcome:
    """Whether the hub answers; `ask` gives the status of its answer. Whether there is a token is never said."""
    if not online:
        return Outcome("skipped", "the network is asked with --online only")
    if offline:
        return Outcome("skipped", "HF_HUB_OFFLINE forbids to ask")
    try:
        status = ask()
    except (OSError, HTTPException) as error:  # the network: refused, unknown, too slow, a certificate
        return Outcome("fail", f"the hub does not answer: {error}", "check the connection and the proxies (PKV-D07)")
    except ValueError as error:
        return Outcome("fail", f"the hub cannot be asked: {error}", "give HF_ENDPOINT as https://..., or unset it")
    if status == 200:
        return Outcome("ok", "the hub answers")
    return Outcome(
        "fail", f"the hub answers with status {status}", "for 401 and 403: `hf auth login`, or unset HF_TOKEN"
    )
