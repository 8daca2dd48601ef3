"""Launching on machines elsewhere: which commands are given, and that the commit arrives."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import launching
import pytest
from launching import ANOTHER, BABYSIT, FAKES, GCE, HERE, ROOT, TRAIN, VM, git, wait_for, write_program

launch, repository = launching.launch, launching.repository  # fixtures


def test_a_slice_is_asked_for_by_queued_resources(launch):
    launch(*VM, "--spot", "--project=my-project")
    launch("tpu_vm.sh", "create", "a2", *HERE, "--type", "v5e-32", "--slices", 2)
    launch("tpu_vm.sh", "delete", "a1", *HERE)
    first, second, third = (call[4:] for call in launch.calls())
    words = ["create", "a1", "--node-id=a1", "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e", "--spot"]
    assert first == [*words, "--zone=us-east5-b", "--project=my-project", "--quiet"]
    assert {"--node-count=2", "--node-prefix=a2", "--accelerator-type=v5litepod-32"} <= set(second)
    assert "--runtime-version=v2-alpha-tpuv5-lite" in second and "--spot" not in second
    assert third == ["delete", "a1", "--force", "--zone=us-east5-b", "--quiet"]


def test_the_same_commit_and_lock_come_to_every_worker(launch):
    (launch.repository / "build").mkdir(exist_ok=True)
    done = launch("tpu_vm.sh", "setup", "a1", *HERE, "--prepare", "echo 'it is' mounted >>~/prepared")
    assert done.stdout.count("no requirements.lock in this commit") == 2
    scp, ssh = launch.calls()
    assert {"--node=all", "--worker=all"} <= set(scp) & set(ssh)
    for home in (launch.folder / "homes").iterdir():
        assert git(home / "pkv", "rev-parse", "HEAD") == launch.commit
        assert (home / "prepared").read_text() == "it is mounted\n"
        assert "--editable .[report,tpu]" in (home / "pip").read_text()


def test_a_machine_that_replaces_a_lost_one_gets_the_pinned_commit_wherever_head_is_by_then(launch):
    script = """
        source launch/shipping.sh
        allow_dirty=true
        pin_commit && pack
        git -c user.name=a -c user.email=a@b commit --quiet --allow-empty -m later
        pack && git bundle list-heads "$bundle" && echo "$commit" && git rev-parse HEAD
    """
    done = subprocess.run(["bash", "-euc", script], cwd=launch.repository, capture_output=True, text=True, check=True)
    shipped, _, pinned, later = done.stdout.split()
    assert shipped == pinned != later


def test_a_shallow_clone_is_refused_before_anything_is_rented(launch, tmp_path):
    git(launch.repository, *ANOTHER)  # or the one commit is whole
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "--quiet", "--depth=1", launch.repository.as_uri(), str(shallow))
    launch.repository = shallow
    for words in (("tpu_vm.sh", "setup", "a1", *HERE), (*BABYSIT, *TRAIN), ("submit.sh", "slurm", "a1", *TRAIN)):
        said = launch(*words, code=2).stderr
        assert "git fetch --unshallow" in said and said.count("\n") == 1 and launch.calls() == []


def test_a_lock_constrains_what_is_installed(launch, tmp_path):
    home = launch.folder / "homes/w0"
    shutil.copytree(launch.repository / "launch", home / "pkv/launch")
    shutil.copy(launch.repository / "pyproject.toml", home / "pkv")
    (home / "pkv/requirements.lock").write_text("jax==0.10.2\n")
    command = ["bash", str(home / "pkv/launch/worker.sh"), "setup", "cpu"]
    environment = {**os.environ, "HOME": str(home), "PYTHON": sys.executable}
    for lock in ("jax==0.10.2\n", "jax==0.10.2\n", "jax==0.10.3\n"):
        (home / "pkv/requirements.lock").write_text(lock)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert "NOTICE" not in done.stdout
    installed = (home / "pip").read_text().splitlines()
    assert len(installed) == 2, "once, and again when the lock has changed"
    assert all(line.startswith(str(home / "pkv/requirements.lock")) for line in installed)


def test_a_run_starts_in_the_background_says_how_it_is_and_stops(launch):
    launch("tpu_vm.sh", "setup", "a1", *HERE)
    odd = ["train", "tiny", "--run", "/mnt/pkv/a b", "--data.train", """it's "$HOME" \\ `x`; 1""", "--empty", ""]
    launch("tpu_vm.sh", "run", "a1", *HERE, "--env", "EXTRA=1 2", "--", *odd)
    launch.answers(states=["ACTIVE"])
    assert launch("tpu_vm.sh", "status", "a1", *HERE).stdout.count("job: running") == 2
    assert "already runs" in launch("tpu_vm.sh", "run", "a1", *HERE, *TRAIN, code=2).stderr
    worker = launch.folder / "homes/w0/pkv/launch/worker.sh"
    again = launch(worker, "resume", launch.commit, "-", "tpu", "train", HOME=str(launch.folder / "homes/w0"))
    assert again.stdout.startswith("runs already: ")
    said = launch("tpu_vm.sh", "logs", "a1", *HERE, "--worker", 1).stdout
    assert shlex.split(said) == [*odd, "tpu,cpu", "1", "2"]
    assert "the machines stay" in launch("tpu_vm.sh", "stop", "a1", *HERE).stderr
    wait_for(lambda: launch("tpu_vm.sh", "status", "a1", *HERE).stdout.count("job: stopped") == 2)
    assert launch("tpu_vm.sh", "logs", "a1", *HERE, "--lines=1").stdout == "saved\n"
    for code in (0, 3):
        launch("tpu_vm.sh", "run", "a1", *HERE, "--", f"exit-{code}")
        wait_for(lambda code=code: f"job: exited {code}," in launch("tpu_vm.sh", "status", "a1", *HERE).stdout)
    assert launch("tpu_vm.sh", "stop", "a1", *HERE).stdout.count("job: stopped") == 2  # babysit leaves it alone


def test_logs_are_those_of_the_slice_and_worker_that_are_named(launch):
    launch("tpu_vm.sh", "setup", "a1", *HERE)
    launch("tpu_vm.sh", "run", "a1", *HERE, "--", "exit-0")
    for given, node, worker in (("1", 0, "1"), ("2/1", 2, "1"), ("2/all", 2, "all"), ("all", "all", "all")):
        launch("tpu_vm.sh", "logs", "a1", *HERE, "--worker", given)
        assert {f"--node={node}", f"--worker={worker}"} <= set(launch.calls()[-1])
    launch.answers(machines=["a1-x:RUNNING a1-y:RUNNING"])
    assert "--worker 2: a1 has not so many" in launch("tpu_gce.sh", "logs", "a1", *GCE, "--worker", 2, code=2).stderr


def test_a_run_needs_its_commit_and_a_mount(launch):
    launch("tpu_vm.sh", "setup", "a1", *HERE)
    (launch.folder / "no_mounts").touch()
    assert "/mnt/pkv is not a mount" in launch("tpu_vm.sh", "run", "a1", *HERE, *TRAIN, code=2).stderr
    git(launch.folder / "homes/w0/pkv", *ANOTHER)
    assert f"expected {launch.commit}: run setup" in launch("tpu_vm.sh", "run", "a1", *HERE, "--", "x", code=2).stderr
    assert "no log yet" in launch("tpu_vm.sh", "logs", "a1", *HERE, code=2).stderr


def test_a_start_on_a_full_disk_ends_with_one_line(launch):
    launch("tpu_vm.sh", "setup", "a1", *HERE)
    full = '#!/bin/bash\nln -s /dev/full "$HOME/pkv-job/pid" && exec "$@"\n'
    write_program(launch.folder / "bin/setsid", full)
    said = launch("tpu_vm.sh", "run", "a1", *HERE, *TRAIN, code=2).stderr
    assert "pkv-job/pid could not be written; is the disk full?" in said and said.count("\n") == 1
    here = str(launch.folder / "homes/w0/pkv")
    wait_for(
        lambda: here not in map(os.path.realpath, Path("/proc").glob("[0-9]*/cwd"))
    )  # pkv isn't left without a pid


def test_what_is_not_committed_is_not_shipped_in_silence(launch):
    stray = launch.repository / "configs/mine.yaml"
    stray.write_text("seed: 1")
    try:
        for words in (("tpu_vm.sh", "setup", "a1", *HERE), ("submit.sh", "slurm", "a1", "--", "x")):
            done = launch(*words, code=2)
            assert "not committed" in done.stderr and done.stderr.count("\n") == 1 and launch.calls() == []
        assert launch.commit in launch("tpu_vm.sh", "setup", "a1", *HERE, "--allow-dirty").stderr
        assert not (launch.folder / "homes/w0/pkv/configs/mine.yaml").exists()
    finally:
        stray.unlink()


V6E = ("--accelerator", "tpu-v6e-slice", "--topology", "4x4", "--claim", "runs")
EVERY = [
    *[("tpu_vm.sh", verb, "a1", *HERE) for verb in ("setup", "logs", "status", "stop", "delete")],
    VM,
    ("tpu_vm.sh", "run", "a1", *HERE, *TRAIN),
    (*BABYSIT, *TRAIN),
    *[("tpu_gce.sh", verb, "a1", *GCE) for verb in ("setup", "logs", "status", "stop", "delete")],
    *[("tpu_gce.sh", "create", "a1", *GCE, "--topology", shape) for shape in ("2x2x1", "2x2x2")],
    ("tpu_gce.sh", "run", "a1", *GCE, *TRAIN),
    ("tpu_gce.sh", "babysit", "a1", *GCE, "--topology", "2x2x2", "--prepare", "true", *TRAIN),
    ("submit.sh", "slurm", "a1", *TRAIN),
    ("submit.sh", "gke", "a1", *V6E, *TRAIN),
    ("submit.sh", "sky", "a1", "--accelerator", "tpu-v6e-8", "--bucket", "runs", *TRAIN),
]


@pytest.mark.parametrize("words", EVERY, ids=lambda words: "-".join(map(str, words[:2])))
def test_a_dry_run_prints_the_commands_and_runs_nothing(launch, words):
    shutil.rmtree(launch.repository / "build", ignore_errors=True)
    at = words.index("--") if "--" in words else len(words)
    done = launch(*words[:at], "--dry-run", *words[at:])
    assert launch.calls(but=()) == [] and not (launch.repository / "build").exists()
    printed = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    assert printed and all(shutil.which(line[0]) or line[0] in FAKES for line in printed), done.stdout


@pytest.mark.parametrize("words", [each for each in EVERY if each[1] in ("run", "babysit", "slurm", "gke", "sky")])
def test_a_dry_run_says_no_secret(launch, words):
    done = launch(*words[: -len(TRAIN)], "--env", "TOKEN=hf_1 2", "--dry-run", *TRAIN)
    assert "hf_1" not in done.stdout + done.stderr and ("TOKEN=HIDDEN" in done.stdout or words[1] == "gke")


def test_scripts_find_their_folder_whatever_cd_looks_through(launch, tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    monkeypatch.chdir(launch.repository)
    for script, *words in (VM, ("tpu_gce.sh", "delete", "a1", *GCE), ("submit.sh", "slurm", "a1", *TRAIN)):
        at = words.index("--") if "--" in words else len(words)
        command = ["bash", f"launch/{script}", *words[:at], "--dry-run", *words[at:]]
        said = [
            subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=True).stdout
            for more in ({}, {"CDPATH": f".:{tmp_path}"}, {"CDPATH": str(tmp_path)})
        ]
        assert said[0] == said[1] == said[2] != ""


def test_a_dry_run_prints_what_would_be_run(launch):
    printed = launch(*VM, "--dry-run").stdout
    launch(*VM)
    assert shlex.split(printed) == launch.calls()[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tpu_vm.sh", "creat", "a1"), "creat: no such verb; expected create,"),
        (("tpu_vm.sh", "create"), "create NAME: got ''"),
        (("tpu_vm.sh", "create", "A1", *HERE), "create NAME: got A1"),
        (("tpu_vm.sh", "create", "a1;ls", *HERE), "create NAME: got 'a1;ls'"),
        (("tpu_vm.sh", "delete", "a" * 41, *HERE), "lower case, up to 40"),
        (("tpu_vm.sh", "create", "a1", "--type", "v6e-8"), "--zone: got ''"),
        (("tpu_vm.sh", "create", "a1", "--zone", "us-east5"), "--zone: got us-east5, expected a zone"),
        (("tpu_vm.sh", "create", "a1", "--zone", "us-east5-b\nx"), "--zone: got $'us-east5-b\\nx'"),
        (("tpu_vm.sh", "create", "a1", *HERE), "--type: got ''"),
        (("tpu_vm.sh", "create", "a1", *HERE, "--type", "v9-8"), "--type: got v9-8"),
        (("tpu_vm.sh", "create", "a1", *HERE, "--type", "tpu7x-8"), "use launch/tpu_gce.sh"),
        ((*VM, "--slices", "0"), "--slices: got 0"),
        ((*VM, "--project", "A"), "--project: got A"),
        ((*VM, "--zonne", "b"), "--zonne: unknown option"),
        ((*VM, ""), "unknown option"),
        ((*VM, "--runtime"), "--runtime: expected a value"),
        (("tpu_vm.sh", "run", "a1", *HERE), "run: expected a pkv command behind --"),
        (("tpu_vm.sh", "run", "a1", *HERE, "--env", "A-B=1", *TRAIN), "--env: got A-B="),
        (("tpu_vm.sh", "run", "a1", *HERE, "--env", "A", *TRAIN), "--env: got no =, expected NAME=VALUE"),
        (("submit.sh", "sky", "a1", "--env", "1=A", *TRAIN), "--env: got 1=, expected NAME=VALUE"),
        (("tpu_vm.sh", "logs", "a1", *HERE, "--worker", "x"), "--worker: got x"),
        (("tpu_vm.sh", "logs", "a1", *HERE, "--worker", "all/1"), "--worker: got all/1, expected a number or all"),
        (("tpu_gce.sh", "logs", "a1", *GCE, "--worker", "1/0"), "--worker: got 1/0, expected a number"),
        ((*BABYSIT, "--", "train", "tiny"), "--run: got '', expected a directory below /mnt/pkv"),
        ((*BABYSIT, "--", "train", "tiny", "--run", "runs/a"), "on a bucket or a persistent disk"),
        ((*BABYSIT, "--", "train", "tiny", "--run", "/mnt/pkv/../tmp/a"), "on a bucket or a persistent disk"),
        ((*BABYSIT, "--", "train", "tiny", "--run=/mnt/pkv/a/.."), "on a bucket or a persistent disk"),
        ((*BABYSIT, *TRAIN, "--dry-run"), "--dry-run: expected before --"),
        (("submit.sh", "slurm", "a1", *TRAIN, "--dry-run"), "--dry-run: expected before --"),
        ((*BABYSIT, "--", "eval", "m"), "expected a command that resumes"),
        ((*BABYSIT, *TRAIN, "--fresh"), "--fresh: a restart would begin anew"),
        (("submit.sh", "slurm", "a1", *TRAIN, "--fresh"), "--fresh: a restart would begin anew"),
        ((*BABYSIT, "--prepare", "", *TRAIN), "--prepare: expected a command that mounts a bucket"),
        (("tpu_gce.sh", "babysit", "a1", *GCE, "--topology", "2x2x2", *TRAIN), "--prepare: expected a command"),
        ((*BABYSIT, "--every", "0", *TRAIN), "--every: got 0"),
        ((*BABYSIT, "--max-restarts", "x", *TRAIN), "--max-restarts: got x"),
        ((*BABYSIT, "--max-restarts", "08", *TRAIN), "--max-restarts: got 08"),
        (("tpu_gce.sh", "logs", "a1", *GCE, "--worker", "08"), "--worker: got 08"),
        (("tpu_gce.sh", "create", "a1", *HERE, "--topology", "2x2x1"), "--project: expected"),
        (("tpu_gce.sh", "create", "a1", *GCE, "--topology", "4x4"), "--topology: got 4x4"),
        (("tpu_gce.sh", "create", "a1", *GCE, "--topology", "1x1x1"), "1 chips; expected a multiple of the 4"),
        (("tpu_gce.sh", "create", "a1", *GCE, "--type", "v6e-8"), "--type: unknown option"),
        (("submit.sh", "lsf", "a1"), "lsf: no such scheduler"),
        (("submit.sh", "slurm", "a1"), "expected a pkv command behind --"),
        (("submit.sh", "slurm", "a1", "--", "train", "tiny", "--run", "runs/a"), "--run: expected a whole path"),
        (("submit.sh", "slurm", "a1", "--gpus", "many", *TRAIN), "--gpus: got many"),
        (("submit.sh", "slurm", "a1", "--time", "soon", *TRAIN), "--time: got soon"),
        (("submit.sh", "slurm", "a1", "--grace", "0", *TRAIN), "--grace: got 0, expected seconds"),
        (("submit.sh", "gke", "a1", *V6E, "--grace", "2m", *TRAIN), "--grace: got 2m, expected seconds"),
        (("submit.sh", "slurm", "a1", "--topology", "4x4", *TRAIN), "--topology: unknown option of slurm"),
        (("submit.sh", "gke", "a1", "--accelerator", "v6e", *TRAIN), "--accelerator: got v6e"),
        (("submit.sh", "gke", "a1", *V6E, "--max-restarts", "010", *TRAIN), "--max-restarts: got 010"),
        (("submit.sh", "sky", "a1", "--accelerator", "tpu-v6e-8", *TRAIN), "--bucket: got ''"),
        (("slurm.sbatch", "main"), "COMMIT: got main"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(launch, words, said):
    done = launch(*words, code=2)
    assert said in done.stderr and done.stderr.count("\n") == 1 and done.stdout == "" and launch.calls() == []


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (VM, "gcloud"),
        ((*BABYSIT, *TRAIN), "gcloud"),
        (("tpu_gce.sh", "status", "a1", *GCE), "gcloud"),
        (("submit.sh", "slurm", "a1", "--", "train", "tiny", "--run", "/x"), "sbatch"),
        (
            ("submit.sh", "gke", "a1", "--accelerator", "tpu7x", "--topology", "2x2x1", "--claim", "c", *TRAIN),
            "kubectl",
        ),
        (("submit.sh", "sky", "a1", "--accelerator", "H100:8", "--bucket", "bucket", *TRAIN), "sky"),
    ],
)
def test_a_tool_that_is_missing_is_said_at_once_but_no_dry_run_needs_it(launch, words, missing):
    tools = launch.folder / "tools"
    tools.mkdir()
    for name in (
        "bash",
        "git",
        "dirname",
        "basename",
        "sed",
        "grep",
        "env",
        "mkdir",
        "cat",
        "sort",
        "tail",
        "cut",
        "tr",
    ):
        (tools / name).symlink_to(shutil.which(name) or name)
    done = launch(*words, code=2, PATH=str(tools))
    assert done.stderr.startswith(f"{missing}: no such command here; install ") and done.stderr.count("\n") == 1
    assert missing in launch(*words[:3], "--dry-run", *words[3:], PATH=str(tools)).stdout


def test_help_is_the_header_of_the_script(launch):
    for script in ("tpu_vm.sh", "tpu_gce.sh", "submit.sh"):
        said = launch(script, "help").stdout
        assert f"bash launch/{script}" in said and "set -euo" not in said


def test_tpu7x_is_one_machine_or_a_group_with_a_topology(launch):
    launch("tpu_gce.sh", "create", "a1", *GCE, "--topology", "2x2x1", "--spot")
    launch("tpu_gce.sh", "create", "a2", *GCE, "--topology", "2x2x4")
    one, policy, template, group = (call for call in launch.calls() if "create" in call)
    assert one[2:5] == ["instances", "create", "a1"] and "--provisioning-model=SPOT" in one
    assert (
        policy[2:5] == ["resource-policies", "create", "workload-policy"] and "--accelerator-topology=2x2x4" in policy
    )
    assert template[2:4] == ["instance-templates", "create"] and "--provisioning-model=STANDARD" in template
    assert {"--machine-type=tpu7x-standard-4t", "--maintenance-policy=TERMINATE"} <= set(one) & set(template)
    assert {"--size=4", "--target-size-policy-mode=bulk"} <= set(group)
    assert "--workload-policy=projects/project-1/regions/us-central1/resourcePolicies/a2" in group


def test_tpu7x_commands_go_to_every_machine_of_the_group(launch):
    launch.answers(machines=["a1-x:RUNNING a1-y:RUNNING"], jobs=["job: running, a"])
    launch("tpu_gce.sh", "setup", "a1", *GCE)
    assert all(git(home / "pkv", "rev-parse", "HEAD") == launch.commit for home in (launch.folder / "homes").iterdir())
    sent = [call[3] for call in launch.calls() if call[2] == "ssh"]
    assert sorted(sent) == ["a1-x", "a1-y"]
    copied = sorted(call[4] for call in launch.calls() if call[2] == "scp")
    assert copied == ["a1-x:pkv.bundle", "a1-y:pkv.bundle"]


PARTS = ["resource-policies", "instance-templates", "instance-groups"]
GROUP = ("a1", *GCE, "--topology", "2x2x2")
BABYSIT_GROUP = ("tpu_gce.sh", "babysit", *GROUP, "--every", 1, "--prepare", "true", *TRAIN)


def parts(launch, verb: str) -> list[str]:
    """Of what a group is made, as far as the verb was tried on it."""
    return [call[2] for call in launch.calls() if verb in call]


def test_a_group_that_was_made_halfway_is_made_whole_and_deleted(launch):
    for made, broken in enumerate(PARTS):
        launch.answers(broken=[f"{broken} create" if made < 2 else "managed create"])
        launch("tpu_gce.sh", "create", *GROUP, code=1)
    assert parts(launch, "create") == [PARTS[0], *PARTS[:2], *PARTS[1:]]  # none a second time
    launch("tpu_gce.sh", "delete", "a1", *GCE)
    assert parts(launch, "delete") == ["instance-templates", "resource-policies"]
    (launch.folder / "broken").unlink()
    assert launch("tpu_gce.sh", "create", *GROUP).stderr == ""
    launch("tpu_gce.sh", "delete", "a1", *GCE)
    assert parts(launch, "delete")[2:] == PARTS[::-1]
    assert "nothing named a1" in launch("tpu_gce.sh", "delete", "a1", *GCE).stderr


def test_what_hangs_is_ended_and_machines_that_vanish_are_seen(launch):
    launch("tpu_vm.sh", "setup", "a1", *HERE)
    launch.answers(machines=["a1-x:RUNNING a1-y:RUNNING"], states=["ACTIVE"], jobs=["job: running, a"])
    launch("tpu_gce.sh", "setup", "a1", *GCE)
    launch("tpu_vm.sh", "status", "a1", *HERE)
    for call in launch.calls():
        flag = "--scp-flag" if "scp" in call else "--ssh-flag"
        alive = {f"{flag}=-oConnectTimeout=30", f"{flag}=-oServerAliveInterval=15"}
        assert alive <= set(call) or not {"ssh", "scp"} & set(call)
    (launch.folder / "hangs").touch()
    launch("tpu_vm.sh", "status", "a1", *HERE, code=124)
    assert "asking failed 10 times" in launch(*BABYSIT, *TRAIN, code=1).stderr


def test_a_question_that_fails_is_not_taken_for_absence(launch):
    launch("tpu_gce.sh", "create", *GROUP)
    launch.answers(broken=["instance-groups managed list"], machines=[""])
    launch("tpu_gce.sh", "delete", "a1", *GCE, code=1)
    done = launch(*BABYSIT_GROUP, code=1)
    assert "asking failed 10 times" in done.stderr
    assert parts(launch, "create") == PARTS and parts(launch, "delete") == []


def test_tpu7x_is_babysat_too(launch):
    up, one = "a1-x:RUNNING a1-y:RUNNING", "a1-x:RUNNING"
    launch.answers(machines=["", one, up, up, "a1-x:RUNNING a1-y:TERMINATED", *[one] * 10, up])
    launch.answers(jobs=["job: running, a", "job: running, b", "job: exited 0, a"])
    done = launch(*BABYSIT_GROUP)
    assert parts(launch, "create") == PARTS * 3 and parts(launch, "delete") == PARTS[::-1] * 2
    assert "machines PREEMPTED; restart 1" in done.stdout and "machines missing; restart 2" in done.stdout


def test_variables_of_jax_are_set_in_one_place_and_never_over_the_users():
    for file in sorted((ROOT / "launch").iterdir()):
        set_here = re.findall(
            r"\b(?:usual )?((?:JAX|XLA|LIBTPU|TPU|NCCL)_\w+)[= ]", re.sub(r"#.*", "", file.read_text())
        )
        assert not set_here or file.name == "env.sh", f"{file.name} sets {set_here}"
    script = "source launch/env.sh; environment_of gpu; echo $JAX_PLATFORMS/$XLA_PYTHON_CLIENT_MEM_FRACTION"
    script += "/$JAX_LOCAL_DEVICE_IDS"
    alone = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    for given, found in (
        ({}, "cuda,cpu/0.92/"),
        ({"JAX_PLATFORMS": "", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, "/0.5/"),
        (alone, "cuda,cpu/0.92/0,1,2,3"),
        ({**alone, "SLURM_STEP_NUM_TASKS": "8"}, "cuda,cpu/0.92/"),
        ({**alone, "JAX_LOCAL_DEVICE_IDS": "2"}, "cuda,cpu/0.92/2"),
    ):
        keep = {"PATH": os.environ["PATH"], **given}
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=keep, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == found
