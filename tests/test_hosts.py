"""Several hosts make the run that one makes; they say what differs before they start, and who is gone when one is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as parquet
import pytest
from tiny_run import make_config

from pkv import checkpoint
from pkv.config import MeshConfig, UserError, load_config
from pkv.grpo.packing import Layout, pack
from pkv.grpo.packing import Sequence as TrainingSequence
from pkv.hosts import VARIABLES, join
from pkv.mesh import make_mesh, own_part
from pkv.records import Batch
from pkv.train.loop import train
from pkv.train.run import made_with
from pkv.train.setup import build

DEVICES = 8
FLAGS = ("--grpo.prompts=4", "--evaluate.problems=3")  # which don't go round four hosts


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    return make_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(load_config(config_file, FLAGS), folder)
    return folder


def announce(count: int, first: str = "127.0.0.1") -> list[dict[str, str]]:
    """What each of so many processes is told of the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"{first}:{probe.getsockname()[1]}"
    told = {"JAX_COORDINATOR_ADDRESS": place, "JAX_NUM_PROCESSES": str(count)}
    return [{**told, "JAX_PROCESS_ID": str(number)} for number in range(count)]


def run_python(code: str, environments: Sequence[dict[str, str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of processes that run the same at the same time, each with variables of its own."""

    def one(own: dict[str, str]) -> tuple[int, str, str]:
        command, folder = [sys.executable, "-c", code], Path(__file__).parent.parent
        done = subprocess.run(
            command, env=os.environ | own, cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        return done.returncode, done.stdout, done.stderr

    with ThreadPoolExecutor(len(environments)) as threads:
        return list(threads.map(one, environments))


class Hosts:
    """Processes that train together, each with its share of the devices.

    of: flags of one of them. networks: names of network namespaces, one for each; the first has the address `first`.
    """

    def __init__(
        self,
        count: int,
        config: Path,
        run: Path,
        *flags: str,
        of: dict[int, Sequence[str]] | None = None,
        networks: Sequence[str] = (),
        first: str = "127.0.0.1",
    ):
        self.processes = []
        for number, announced in enumerate(announce(count, first)):
            environment = os.environ | announced
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES // count}"
            inside = ["ip", "netns", "exec", networks[number]] if networks else []
            command = [*inside, sys.executable, "-m", "pkv", "train", str(config), "--run", str(run), *flags]
            self.processes.append(
                subprocess.Popen(
                    [*command, *(of or {}).get(number, ())],
                    env=environment,
                    cwd=Path(__file__).parent.parent,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def ended(self, timeout: float = 300) -> list[tuple[int, str, str]]:
        """Of each host its exit code, and what it said on stdout and stderr."""
        end = time.monotonic() + timeout
        said = [process.communicate(timeout=max(1.0, end - time.monotonic())) for process in self.processes]
        return [(process.returncode, *texts) for process, texts in zip(self.processes, said, strict=True)]

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()


def lines(folder: Path, name: str) -> Iterator[dict]:
    for line in (folder / name).read_text().splitlines():
        yield json.loads(line)


def rollouts(folder: Path) -> dict[tuple[int, str, int], list[int]]:
    rows = [row for file in folder.glob("rollouts/*.parquet") for row in parquet.read_table(file).to_pylist()]
    return {(row["step"], row["problem_id"], row["sample"]): row["tokens"] for row in rows}


def assert_alike(folder: Path, alone: Path, config_file: Path) -> None:
    assert rollouts(folder) == rollouts(alone)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        for got, want in zip(lines(folder, name), lines(alone, name), strict=True):
            got, want = (line | line.pop("metrics", {}) for line in (got, want))
            numbers = {key for key, value in want.items() if isinstance(value, float) and not key.startswith("perf/")}
            assert got.keys() - {"samples"} == want.keys() - {"samples"}
            for key in numbers:
                assert got[key] == pytest.approx(want[key], rel=2e-3, abs=1e-4), (name, want["step"], key)
    setup = build(load_config(config_file, FLAGS))
    template = setup.learner.template(setup.policy.params)
    got, want = (checkpoint.restore(run / "checkpoints", 5, template)[0] for run in (folder, alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got.params, want.params)


@pytest.mark.slow
def test_four_hosts_make_the_rollouts_and_updates_that_one_makes(config_file, alone, tmp_path):
    with Hosts(4, config_file, tmp_path / "run", *FLAGS) as hosts:
        for code, _, stderr in hosts.ended():
            assert code == 0, stderr[-3000:]
    written = sorted(file.name for file in (tmp_path / "run" / "rollouts").glob("step-000002*"))
    assert written == [*(f"step-000002-host-{n}.parquet" for n in range(1, 4)), "step-000002.parquet"]
    assert_alike(tmp_path / "run", alone, config_file)


@pytest.fixture
def two_networks() -> Iterator[list[str]]:
    """Two network namespaces, joined by one cable; in each the machine's name means its own address."""
    ip = shutil.which("ip")
    names = [f"pkv-{os.getpid()}-{number}" for number in range(2)]

    def run(*arguments: str) -> bool:
        return subprocess.run([ip, *arguments], capture_output=True, check=False).returncode == 0

    if ip is None or not all(run("netns", "add", name) for name in names):
        pytest.skip("needs the right to make network namespaces")
    try:
        ends = (f"name pkv-{end} netns {name}" for end, name in zip("ab", names, strict=True))
        cable = "link add {} type veth peer {}".format(*ends).split()
        assert run(*cable)
        for number, (name, end) in enumerate(zip(names, ("pkv-a", "pkv-b"), strict=True)):
            run("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", end)
            run("-n", name, "link", "set", "lo", "up")
            assert run("-n", name, "link", "set", end, "up")
            hosts = Path("/etc/netns", name, "hosts")  # what `ip netns exec` shows as /etc/hosts
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n10.77.0.{number + 1} {socket.gethostname()}\n")
        yield names
    finally:
        for name in names:
            run("netns", "del", name)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


@pytest.mark.slow
def test_hosts_on_networks_of_their_own_make_the_same_run(two_networks, config_file, alone, tmp_path):
    with Hosts(2, config_file, tmp_path / "run", *FLAGS, networks=two_networks, first="10.77.0.1") as hosts:
        for code, _, stderr in hosts.ended():
            assert code == 0, stderr[-3000:]
    assert_alike(tmp_path / "run", alone, config_file)


@pytest.mark.slow
def test_hosts_that_were_stopped_go_on_together(config_file, alone, tmp_path):
    run = tmp_path / "run"
    with Hosts(2, config_file, run, *FLAGS) as hosts:
        wait_for(run / "checkpoints" / "2", hosts)
        hosts.processes[1].send_signal(signal.SIGTERM)  # one is told to go: all save the same step
        ended = hosts.ended()
        assert [code for code, *_ in ended] == [130, 130], ended
    assert checkpoint.latest(run / "checkpoints") in (2, 3, 4)
    with Hosts(2, config_file, run, *FLAGS) as hosts:
        assert [code for code, *_ in hosts.ended()] == [0, 0]
    assert_alike(run, alone, config_file)


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_a_host_that_dies_ends_the_others_with_a_named_error(gone, config_file, tmp_path):
    run = tmp_path / "run"
    with Hosts(2, config_file, run, *FLAGS, "--rounds.first.steps=1000") as hosts:
        wait_for(run / "checkpoints" / "3", hosts)
        hosts.processes[gone].kill()
        began = time.monotonic()
        code, _, stderr = hosts.ended()[1 - gone]
    assert code != 0 and time.monotonic() - began < 100
    # The service by which processes know each other ends with the first one; then JAX itself speaks.
    assert ("pkv: nothing was heard of host 1" if gone else "leader task was preempted/died") in stderr, stderr[-3000:]
    assert checkpoint.latest(run / "checkpoints") >= 3


HASTY = "from pkv import cli, hosts; hosts.JOIN_S = 2; exit(cli.main(['train', 'tiny', '--run', '/dev/null/run']))"
TASK = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}


def test_a_host_that_is_alone_says_so_before_jax_aborts():
    for code, _, stderr in run_python(HASTY, [announce(2)[0], announce(2)[1]]):  # neither waits where the other is
        assert code == 1 and "pkv: the hosts did not find each other at 127.0.0.1:" in stderr, stderr
        assert "Check failure" not in stderr and stderr.count("pkv:") == 1


def test_a_launcher_that_says_nonsense_lets_nobody_train_alone():
    told = [{**TASK, "SLURM_PROCID": "x"}, {**TASK, "SLURM_PROCID": "7"}, {"JAX_COORDINATOR_ADDRESS": "localhost"}]
    words = ["invalid literal for int() with base 10: 'x'", "Got process_id=7, num_processes=2", "and a free port"]
    for (code, _, stderr), said in zip(run_python(HASTY, told), words, strict=True):
        assert code == 2 and said in stderr and stderr.count("\n") == 1, stderr


@pytest.mark.parametrize("count", ["1", None])
def test_processes_that_nothing_has_joined_do_not_train(count, monkeypatch):
    def nobody(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if count:
        monkeypatch.setenv("JAX_NUM_PROCESSES", count)
    join()  # alone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="JAX counts 2 processes"):
        join()


@pytest.mark.slow
def test_hosts_that_would_not_compute_the_same_say_so(config_file, tmp_path):
    with Hosts(2, config_file, tmp_path / "run", *FLAGS, of={1: ["--seed=5"]}) as hosts:
        ended = hosts.ended(120)
    for code, _, stderr in ended:
        assert code == 2 and "pkv: hosts differ in config: " in stderr, stderr
    assert not (tmp_path / "run").exists()


COMPARING = """
from pkv import hosts
from pkv.config import UserError
from pkv.train.run import made_with
hosts.join()
try:
    hosts.compare(made_with())
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("of", ["revision", "libtpu", "jax-cuda12-plugin", "jax"])
def test_hosts_of_another_revision_or_other_versions_are_refused_by_name(of, tmp_path):
    told = [{**each, "GIT_DIR": "/nowhere", "PKV_COMMIT": "a" * 40} for each in announce(2)]  # an unpacked archive
    if of == "revision":
        told[1]["PKV_COMMIT"] = "b" * 40
        want = f"hosts differ in git: {'a' * 12} on host 0, {'b' * 12} on host 1; ship the same commit"
    else:
        metadata = tmp_path / f"{of.replace('-', '_')}-9.9.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {of}\nVersion: 9.9\n")
        told[1]["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        want = f"hosts differ in {of}: {made_with().get(of)} on host 0, 9.9 on host 1; ship the same commit"
    for code, stdout, stderr in run_python(COMPARING, told):
        assert code == 0 and stdout.startswith(want), (stdout, stderr[-2000:])


def test_the_revision_of_an_unpacked_archive_is_the_launchers(monkeypatch):
    monkeypatch.setenv("PKV_COMMIT", "0123456789abcdef")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert made_with()["git"] == "0123456789ab"
    monkeypatch.delenv("PKV_COMMIT")
    assert "git" not in made_with()


@pytest.mark.slow
def test_a_directory_that_not_all_see_is_named_by_all(config_file, tmp_path):
    with Hosts(2, config_file, tmp_path / "a", *FLAGS, of={1: ["--run", str(tmp_path / "b")]}) as hosts:
        ended = hosts.ended(120)
    for code, _, stderr in ended:
        assert code == 2 and "host 1 does not see what host 0 wrote there" in stderr, stderr


def wait_for(path: Path, hosts: Hosts) -> None:
    end = time.monotonic() + 300
    while not path.exists():
        assert all(process.poll() is None for process in hosts.processes) and time.monotonic() < end
        time.sleep(0.05)


def packed_by(shares: list[list[TrainingSequence]], layout: Layout) -> list[list[Batch]]:
    """What every host packs; here hosts are threads."""
    said, barrier = [None] * len(shares), threading.Barrier(len(shares), timeout=60)

    def host(number: int) -> list[Batch]:
        def gather(value):
            said[number] = json.loads(json.dumps(value))
            barrier.wait()
            heard = list(said)
            barrier.wait()
            return heard

        return pack(shares[number], layout, gather)

    with ThreadPoolExecutor(len(shares)) as threads:
        return list(threads.map(host, range(len(shares))))


@pytest.mark.parametrize("normalise", ["tokens", "sequences", "constant"])
def test_hosts_pack_the_same_tokens_with_the_same_weights_into_as_many_rows_of_the_same_shape(normalise):
    draw = np.random.default_rng(0)

    def sequence() -> TrainingSequence:
        size = int(min(draw.geometric(1 / 20), 90))
        numbers = draw.normal(size=(2, size)).astype(np.float32)
        return TrainingSequence(draw.integers(0, 9, 10), draw.integers(0, 9, size), *numbers)

    for shares in (
        [[sequence() for _ in range(9)], [sequence() for _ in range(12)]],
        [[sequence() for _ in range(30)], []],
        [[], []],
    ):
        layout = Layout(128, 4, rows_multiple=4, normalise=normalise, budget=90)
        whole = pack([one for share in shares for one in share], layout)
        parts = packed_by(shares, Layout(**{**vars(layout), "hosts": 2}))
        shapes = [[batch.tokens.shape for batch in part] for part in parts]
        assert shapes[0] == shapes[1] and all(
            rows % 2 == 0 and 2 * rows * length <= 4 * 128 for rows, length in shapes[0]
        )

        def trained(batches):
            there = [np.stack([b.targets, b.advantages, b.weights])[:, b.mask > 0] for b in batches]
            return np.array(sorted(np.concatenate(there, axis=1).T.tolist()))

        got = trained([batch for part in parts for batch in part])
        np.testing.assert_allclose(got, trained(whole), rtol=1e-6)


class Chip:
    platform = device_kind = "cpu"

    def __init__(self, number: int, process_index: int, slice_index: int = 0) -> None:
        self.id, self.process_index, self.slice_index = number, process_index, slice_index


@pytest.mark.parametrize(
    ("sizes", "hosts"),
    [
        ({"data": 1, "fsdp": 4, "tensor": 4}, 4),
        ({"data": 4, "fsdp": 2, "tensor": 2}, 4),
        ({"data": 2, "fsdp": 4, "sequence": 2}, 8),
        ({"data": 1, "fsdp": 8, "tensor": 2}, 2),
    ],
)
def test_a_hosts_devices_are_a_block_of_the_mesh(sizes, hosts, monkeypatch):
    chips = [Chip(number, number * hosts // 16) for number in range(16)]
    mesh = make_mesh(MeshConfig(**sizes), chips)
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    found = []
    for number in range(hosts):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        part = own_part(mesh)
        assert {chip.process_index for chip in part.devices.flat} == {number}
        assert (part.shape["sequence"], part.shape["tensor"]) == (mesh.shape["sequence"], mesh.shape["tensor"])
        found += list(part.devices.flat)
    assert {chip.id for chip in found} == set(range(16))


def test_a_row_that_needs_several_hosts_is_refused(monkeypatch):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=8), [Chip(number, number // 4) for number in range(16)])
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match=r"sequence × tensor = 8 need devices of several hosts"):
        own_part(mesh)
