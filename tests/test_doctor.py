"""What doctor says of machines that are broken in one way each, and of those that are fine."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from http.client import BadStatusLine
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from pkv import cli, compiling
from pkv.doctor import Finding, diagnosis, in_words
from pkv.doctor.checks import (
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
)
from pkv.doctor.devices import Device, Devices, ask_devices
from pkv.doctor.diagnosis import free_bytes, installed, list_checks, process_name, settle
from pkv.doctor.findings import Outcome

ROOT = Path(__file__).parent.parent
CPU, TPU = Device("cpu", "cpu"), Device("tpu", "TPU v5 lite", 16_000_000_000, 0)
ONE = Devices((CPU,), 1)
STUCK, BROKEN = Devices(trouble="no answer within 60 s"), Devices(trouble="RuntimeError: no TPU")
JAX_NEEDS = [
    "jaxlib<=0.10.2,>=0.10.1",
    'libtpu==0.0.42.*; extra == "tpu"',
    'jaxlib>=0.10.2; extra == "tpu"',
    'jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda12"',
]
GOOD = {"jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6", "flax": "0.12.8"}
PROXY = {"https_proxy": "http://me:secret@proxy:3128"}


def said(outcome: Outcome, state: str, *words: str) -> None:
    """The state, and words of what was found and of the remedy, which only what is well has not."""
    assert outcome.state == state, outcome
    assert all(word in f"{outcome.found} -> {outcome.remedy}" for word in words), outcome
    assert "\n" not in outcome.found + outcome.remedy and bool(outcome.remedy) == (state in ("warn", "fail"))


def test_python():
    said(check_python("3.11.0rc1", ">=3.11"), "ok", "3.11.0rc1")
    said(check_python("3.11.9+", ">=3.11"), "ok")  # built from a checkout
    said(check_python("3.10.12", ">=3.11"), "fail", "3.10.12", ">=3.11", "newer Python")


def test_packages_missing_too_old_and_for_others():
    required = ["jax>=0.10.2", "numpy>=2.0", 'torch>=2; extra == "live"', 'win>=1; sys_platform == "win32"']
    said(check_packages(required, GOOD.get), "ok", "jax 0.10.2")
    said(check_packages(required, {"jax": "0.9.1"}.get), "fail", "jax 0.9.1, expected >=0.10.2; numpy is missing")


def test_the_parts_of_jax_belong_together():
    said(check_jax_family(JAX_NEEDS, GOOD.get), "ok")
    said(check_jax_family(JAX_NEEDS, {**GOOD, "jaxlib": "0.10.1"}.get), "ok")  # enough where there is no accelerator
    said(check_jax_family(JAX_NEEDS, {**GOOD, "libtpu": "0.0.42.1"}.get), "ok", "libtpu 0.0.42.1")
    for part, version in {"jaxlib": "0.9.0", "libtpu": "0.0.30", "jax-cuda12-plugin": "0.10.1"}.items():
        said(check_jax_family(JAX_NEEDS, {**GOOD, part: version}.get), "fail", f"{part} {version}, expected")
    said(check_jax_family(JAX_NEEDS, {"jax": "0.10.2"}.get), "fail", "jaxlib is missing")
    said(check_jax_family([], {}.get), "fail", "jax is not installed")


def test_devices_that_do_not_start_do_not_answer_or_are_not_used():
    said(check_devices(ONE, "", []), "ok", "1 x cpu")
    said(check_devices(Devices((TPU, TPU), 1), "", ["/dev/accel0"]), "ok", "2 x tpu (TPU v5 lite)")
    said(check_devices(ONE, "cpu", ["/dev/accel0"]), "ok")
    said(check_devices(ONE, "", ["/dev/accel0"]), "fail", "though there is /dev/accel0", "JAX_PLATFORMS=cpu")
    said(check_devices(BROKEN, "tpu", []), "fail", "RuntimeError: no TPU", "JAX_PLATFORMS is 'tpu'")
    alone = Devices(trouble="ValueError: coordinator_address should be defined.")
    said(check_devices(alone, "cpu", []), "fail", "JAX does not start", "JAX_NUM_PROCESSES=1")
    said(check_devices(STUCK, "", []), "fail", "no answer within 60 s", "on all at the same time")


def test_what_is_passed_through_is_a_tpu_only_where_google_made_it(tmp_path):
    def plug(place: str, vendor: str, kind: str) -> None:
        device = tmp_path / "sys/bus/pci/devices" / place
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")

    root, files = f"{tmp_path}/", tmp_path / "dev"
    (files / "vfio").mkdir(parents=True)
    for name in ("vfio/vfio", "vfio/12", "nvidia0"):
        (files / name).touch()
    plug("0000:00:01.0", "0x8086", "0x020000")
    plug("0000:00:02.0", "0x1ae0", "0x020000")  # Google's network card
    assert diagnosis.tpu_files(root) == []
    plug("0000:00:03.0", "0x1ae0", "0x088000")
    assert diagnosis.tpu_files(root) == [f"{files}/vfio/12"]
    (files / "accel0").touch()
    (files / "vfio/12").unlink()
    assert diagnosis.tpu_files(root) == [f"{files}/accel0"]


@pytest.mark.parametrize(
    ("environment", "processes", "state", "words"),
    [
        ({}, 1, "ok", "no variable says how many"),
        ({}, 4, "ok", "JAX counts 4"),  # a slice of Cloud TPU VMs
        ({"JAX_NUM_PROCESSES": "2"}, 2, "ok", "JAX_NUM_PROCESSES says 2"),
        ({"JAX_NUM_PROCESSES": "2"}, 1, "fail", "JAX counts 1, JAX_NUM_PROCESSES says 2"),
        ({"JAX_NUM_PROCESSES": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, "ok", "says 1"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1, "ok", "says 1"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2"}, 4, "ok", "says 4"),
        ({"SLURM_NTASKS": "8"}, 1, "ok", "no variable says"),  # a shell within an allocation
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, "fail", "JAX counts 1, SLURM_NTASKS says 8"),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 1, "fail", "says 4"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, 4, "fail", "JAX counts 4"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "2"}, 2, "fail", "from 0 to 1"),
        (
            {"TPU_WORKER_HOSTNAMES": "a,b", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
            2,
            "fail",
            "disagree",
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None, "skipped", "PKV-D04"),
    ],
)
def test_hosts(environment, processes, state, words):
    said(check_hosts(environment, processes), state, words)


def test_a_lock_is_told_by_who_holds_it(tmp_path):
    lock = tmp_path / "lock"
    said(check_lock(lock, "", process_name, blocked=True), "ok", "no ")
    lock.touch()
    said(check_lock(lock, "", process_name, blocked=False), "ok", "left by you")
    said(check_lock(lock, "", process_name, blocked=True), "fail", "held by nobody", f"rm {lock}")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = check_lock(lock, Path("/proc/locks").read_text(), process_name, blocked=False)
        said(found, "fail", f"held by process {os.getpid()} (", "only one process")
        elsewhere = check_lock(lock, Path("/proc/locks").read_text(), lambda pid: None, blocked=False)
        said(elsewhere, "fail", "not to be seen from here")
    said(check_lock(lock, Path("/proc/locks").read_text(), process_name, blocked=False), "ok")
    if os.getuid() == 0:
        os.chown(lock, 4242, 4242)
        said(check_lock(lock, "", process_name, blocked=False), "fail", "user 4242", "sudo rm")


def test_proxies_leave_the_metadata_server_out():
    said(check_proxies({"http_proxy": ""}, tpu=True), "ok", "no proxy")
    for tpu, state in ((True, "fail"), (False, "warn")):
        found = check_proxies(PROXY, tpu=tpu)
        said(found, state, "https_proxy set", "metadata.google.internal", "no_proxy=")
        assert "secret" not in found.found + found.remedy
    for exempt in ("metadata.google.internal", "a, .google.internal", "*"):
        said(check_proxies({**PROXY, "NO_PROXY": exempt}, tpu=True), "ok")
    said(check_proxies({"HTTP_PROXY": "a", "no_proxy": "google.com"}, tpu=True), "fail", "HTTP_PROXY")
    upper = {**PROXY, "NO_PROXY": "google.com"}
    said(check_proxies(upper, tpu=True), "fail", "export no_proxy=$NO_PROXY,metadata.google.internal")
    # Whoever did that has both.
    cured = {"no_proxy": "google.com,metadata.google.internal"}
    said(check_proxies(cured | upper, tpu=True), "ok")
    said(check_proxies(upper | cured, tpu=True), "ok")


@pytest.mark.parametrize(
    ("several", "first"),
    [
        ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "10.0.0.7:1234"}, "10.0.0.7"),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "gpu[007-014],big3"}, "gpu007"),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "big3,gpu[007-014]"}, "big3"),
        ({"TPU_WORKER_HOSTNAMES": "t-0.pods,t-1.pods"}, "t-0.pods"),
    ],
)
def test_proxies_leave_the_first_of_several_hosts_out(several, first):
    environment = {**PROXY, **several, "no_proxy": "metadata.google.internal"}
    said(check_proxies(environment, tpu=False), "warn", f"no_proxy leaves out {first}", f"no_proxy=$no_proxy,{first}")
    exempt = f"metadata.google.internal,{'10.0.0.0/8' if first[0] == '1' else first}"
    said(check_proxies({**environment, "no_proxy": exempt}, tpu=False), "ok", first)
    said(check_proxies({**environment, "no_proxy": "*"}, tpu=False), "ok")
    said(check_proxies({**several, **PROXY}, tpu=True), "fail", "metadata.google.internal", first)


def test_caches_are_private_and_can_be_written(tmp_path):
    me, folder = os.getuid(), tmp_path / "cache"
    said(check_folder(folder, "set X", me, None), "ok", "made when it is needed")
    folder.mkdir(mode=0o700)
    said(check_folder(folder, "set X", me, None), "ok", "yours alone")
    said(check_folder(folder, "set X", me + 1, None), "fail", f"belongs to user {me}", "set X")
    said(check_folder(folder, "set X", me + 1, None, "warn"), "warn", f"belongs to user {me}", "set X")
    folder.chmod(0o775)
    mine = folder.stat().st_gid
    said(check_folder(folder, "set X", me, mine), "ok")  # under umask 0002
    for group, others in ((None, "fail"), (mine + 1, "fail"), (None, "warn")):
        said(check_folder(folder, "set X", me, group, others), others, "mode 775", f"chmod go-w {folder}")
    folder.chmod(0o777)
    said(check_folder(folder, "set X", me, mine), "fail", "mode 777")
    (tmp_path / "file").touch()
    said(check_folder(tmp_path / "file" / "cache", "set X", me, None, "warn"), "fail", "no directory", "set X")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("pkv.doctor.checks.os.access", lambda *_: False)  # root may write everywhere
    said(check_folder(tmp_path / "cache", "set X", 0, None, "warn"), "fail", f"{tmp_path} cannot be written", "set X")
    said(check_folder(tmp_path, "set X", 0, None), "fail", f"{tmp_path} cannot be written")
    said(
        check_folder(tmp_path, "set X", 0, None, "warn"), "warn", f"{tmp_path} cannot be written"
    )  # read what is there


@pytest.mark.parametrize(("members", "private"), [([], 7), (["ann"], 7), (["ann", "bob"], None)])
def test_a_group_is_private_that_bears_the_users_name_and_holds_nobody_else(members, private, monkeypatch):
    monkeypatch.setattr(diagnosis.pwd, "getpwuid", lambda user: SimpleNamespace(pw_name="ann"))
    groups = {"ann": SimpleNamespace(gr_gid=7, gr_mem=members), "users": SimpleNamespace(gr_gid=8, gr_mem=[])}
    monkeypatch.setattr(diagnosis.grp, "getgrnam", groups.__getitem__)
    assert diagnosis.private_group(1000) == private
    monkeypatch.setattr(diagnosis.grp, "getgrnam", {}.__getitem__)
    assert diagnosis.private_group(1000) is None


def test_compiled_programs_are_looked_for_where_they_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    values = {"jax_compilation_cache_dir": None, "jax_enable_compilation_cache": True}
    config = SimpleNamespace(values=values, update=lambda name, value: None)
    monkeypatch.setattr(compiling, "jax", SimpleNamespace(config=config))
    compiling.keep_compiled()
    environment = {"XDG_CACHE_HOME": str(tmp_path), "HOME": "/nowhere"}
    said(check_compiled(environment, os.getuid(), None), "ok", f"{tmp_path}/pkv/compiled is yours alone")
    (tmp_path / "pkv/compiled").chmod(0o777)
    said(check_compiled(environment, os.getuid(), None), "fail", "mode 777")
    said(check_compiled({"HOME": str(tmp_path)}, os.getuid(), None), "ok", f"{tmp_path}/.cache/pkv/compiled")
    named = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "pkv")}
    with monkeypatch.context() as nobody:
        nobody.delenv("HOME", raising=False)
        nobody.setattr("os.getuid", lambda: 4_242_424)  # of whom no account says where the home is
        said(check_compiled({}, os.getuid(), None), "fail", "HOME is not set", "JAX_COMPILATION_CACHE_DIR")
    said(check_compiled(named, os.getuid(), None), "ok", f"{tmp_path}/pkv is yours")
    (tmp_path / "pkv").chmod(0o775)  # under umask 0002
    mine = (tmp_path / "pkv").stat().st_gid
    said(check_compiled(named, os.getuid(), mine), "ok")
    (tmp_path / "pkv/compiled").chmod(0o775)
    said(check_compiled(environment, os.getuid(), mine), "fail", "mode 775")  # as pkv.compiling does
    said(check_compiled({"JAX_COMPILATION_CACHE_DIR": "gs://a/b"}, os.getuid(), None), "skipped")
    said(check_compiled({"JAX_ENABLE_COMPILATION_CACHE": "false"}, os.getuid(), None), "skipped")


def test_disks_are_as_good_as_the_fullest(tmp_path):
    free = {Path("a"): 30e9, Path("b"): 5e9, Path("c"): 0.1e9}.__getitem__
    places = {"runs": (Path("a"), 20, 1), "cache": (Path("b"), 10, 1), "tmp": (Path("c"), 2, 0.2)}
    said(check_disk({"runs": places["runs"]}, free), "ok", "runs 30.0 GB")
    said(
        check_disk({name: places[name] for name in ("cache", "runs")}, free), "warn", "cache 5.0 GB (expected 10) at b"
    )
    said(check_disk(places, free), "fail", "tmp 0.1 GB (expected 2)")
    assert free_bytes(tmp_path / "not" / "yet") > 0


def test_a_disk_without_room_for_a_temporary_file_is_a_full_disk(tmp_path, monkeypatch):
    def refuse() -> str:
        raise FileNotFoundError("No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(diagnosis.tempfile, "gettempdir", refuse)
    monkeypatch.setattr(diagnosis, "free_bytes", lambda _: 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (found,) = settle([each for each in list_checks(tmp_path, False, 1) if each[0] == "PKV-D10"])
    assert found.state == "fail" and f"temporary files 0.0 GB (expected 2) at {tmp_path}" in found.found
    assert found.remedy.startswith("free some")


def test_memory_of_devices_and_of_the_host():
    said(check_memory(Devices((TPU, TPU), 1), None), "ok", "2 x 16.0 GB, 0% in use")
    said(
        check_memory(Devices((TPU, Device("gpu", "H100", 16_000_000_000, 4_000_000_000)), 1), None),
        "fail",
        "25% in use",
    )
    said(check_memory(Devices((TPU, Device("gpu", "A", 8_000_000_000)), 1), None), "warn", "8.0 to 16.0 GB")
    said(check_memory(ONE, 10_000_000_000), "ok", "10.0 GB free")
    said(check_memory(ONE, 1_000_000_000), "fail", "1.0 GB free")
    said(check_memory(ONE, None), "skipped")
    said(check_memory(BROKEN, None), "skipped", "PKV-D04")


def test_the_hub_is_asked_only_on_demand():
    def ask() -> int:
        raise AssertionError

    said(check_hub(False, False, ask), "skipped", "--online")
    said(check_hub(True, True, ask), "skipped", "HF_HUB_OFFLINE")
    said(check_hub(True, False, lambda: 200), "ok", "answers")
    said(check_hub(True, False, lambda: 401), "fail", "401", "hf auth login")
    for error in (TimeoutError("timed out"), ConnectionResetError("reset"), BadStatusLine("x")):
        said(
            check_hub(True, False, lambda error=error: (_ for _ in ()).throw(error)),
            "fail",
            "does not answer",
            "PKV-D07",
        )


def test_a_hub_that_is_named_wrongly_is_not_our_mistake(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "hf.example.org")
    said(check_hub(True, False, diagnosis._ask_hub), "fail", "unknown url type", "HF_ENDPOINT as https://")


def test_what_proc_refuses_to_show_is_not_there(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert process_name(1) is None


def test_jax_is_asked_in_a_process_that_may_fail_or_hang():
    answer = 'print(\'noise\'); print(\'{"processes": 2, "devices": [{"platform": "tpu", "kind": "v5"}]}\')'
    assert ask_devices(False, 20, answer) == Devices((Device("tpu", "v5"),), 2)
    assert ask_devices(False, 20, "raise RuntimeError('no TPU')").trouble == "RuntimeError: no TPU"
    assert ask_devices(False, 20, "import os; os.abort()").trouble == "exit code -6"
    assert ask_devices(
        True, 1, "import sys, time; time.sleep(60 * (sys.argv[1] == 'several'))"
    ).trouble == STUCK.trouble.replace("60", "1")
    assert "says nothing that can be read" in ask_devices(False, 20, "pass").trouble


def test_hosts_find_each_other_by_the_variables_of_jax():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    code = "from pkv.doctor.devices import ask_devices; print(ask_devices(True, 60).processes)"
    told = os.environ | {"JAX_COORDINATOR_ADDRESS": place, "JAX_NUM_PROCESSES": "2"}
    asked = [
        subprocess.Popen([sys.executable, "-c", code], env=told | {"JAX_PROCESS_ID": number}, cwd=ROOT, stdout=-1)
        for number in "01"
    ]
    assert [process.communicate(timeout=120)[0] for process in asked] == [b"2\n", b"2\n"]


def test_a_check_that_crashes_is_a_finding_and_the_others_go_on():
    def crash() -> Outcome:
        raise ZeroDivisionError("ours\nalone")

    first, second = settle([("PKV-D98", "a", crash), ("PKV-D99", "b", lambda: Outcome("ok", "well"))])
    assert first.state == "fail" and first.found == "the check itself failed: ZeroDivisionError: ours alone"
    assert second == Finding("PKV-D99", "b", "ok", "well", "")


def test_every_check_has_a_code_of_its_own():
    codes = [code for code, _, _ in list_checks(Path("runs"), False, 1)]
    assert codes == [f"PKV-D{number:02}" for number in range(1, 13)]
    assert installed("jax") == jax.__version__ and installed("no-such-package") is None


def call(capsys, monkeypatch, devices: Devices, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(diagnosis, "ask_devices", lambda several, timeout_s: devices)
    code = cli.main(["doctor", *words])
    return code, capsys.readouterr().out


def test_the_command_tells_by_its_exit_code_whether_something_failed(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out = call(capsys, monkeypatch, BROKEN, "--json", "--run", str(tmp_path))
    findings = {each["code"]: each for each in json.loads(out)}
    assert code == 1 and findings["PKV-D04"]["state"] == "fail" and findings["PKV-D12"]["state"] == "skipped"
    assert set(findings["PKV-D01"]) == {"code", "check", "state", "found", "remedy"}
    code, out = call(capsys, monkeypatch, BROKEN)
    assert code == 1 and "PKV-D04 fail    devices: JAX does not start: RuntimeError: no TPU\n" in out
    assert "-> JAX_PLATFORMS is 'cpu'" in out and "hf_secret" not in out
    fine = [("PKV-D01", "python", lambda: Outcome("warn", "old", "renew it"))]
    monkeypatch.setattr(diagnosis, "list_checks", lambda *_: fine)
    code, out = call(capsys, monkeypatch, ONE)
    assert (
        code == 0
        and out == "PKV-D01 warn    python: old\n                -> renew it\n1 checks: 0 failed, 1 to look at\n"
    )


def test_words_count_what_matters():
    findings = [Finding("A", "a", "fail", "x", "y"), Finding("B", "b", "skipped", "x", "")]
    assert in_words(findings).endswith("2 checks: 1 failed, 0 to look at")


def test_doctor_starts_without_jax():
    code = "import sys; sys.modules['jax'] = None; from pkv.doctor.diagnosis import *; from pathlib import Path\n"
    code += "print([(f.code, f.state) for f in settle(list_checks(Path('runs'), False, 1)[:3])])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and "('PKV-D03', 'ok')" in done.stdout, done.stderr
