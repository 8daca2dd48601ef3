"""Launching by a scheduler: what Slurm, GKE and SkyPilot are given, and that the commit is in it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import launching
import pytest
import yaml
from launching import PKV, PYTHON, TRAIN, git, write_program

launch, repository = launching.launch, launching.repository  # fixtures


def test_slurm_gets_a_task_a_node_and_the_commit(launch):
    run = ["train", "my config", "--run", "/scratch/a"]
    launch("submit.sh", "slurm", "a1", "--nodes", 2, "--gpus", 4, "--time", "1-00:00:00", "--", *run)
    (call,) = launch.calls()
    wanted = {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=16", "--time=1-00:00:00"}
    assert wanted | {"--signal=INT@600"} <= set(call)
    script = call.index("launch/slurm.sbatch")
    assert call[script + 1 :] == [launch.commit, *run]
    # Slurm runs a copy of the script, in the directory where it was submitted.
    tree = launch.repository / f"build/slurm-{launch.commit}"
    write_program(tree / ".venv/bin/python", PYTHON)
    write_program(tree / ".venv/bin/pkv", PKV)
    copy = shutil.copy(launch.repository / "launch/slurm.sbatch", launch.folder / "script")
    done = launch(
        copy, launch.commit, "exit-0", "my config", SLURM_SUBMIT_DIR=str(launch.repository), SLURM_CPUS_PER_TASK="16"
    )
    assert launch.calls()[-1][1:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=16"]
    assert r"exit-0 my\ config cuda,cpu" in done.stdout and git(tree, "rev-parse", "HEAD") == launch.commit
    assert "jax[cuda12]" in (launch.folder / "pip").read_text()
    dry = launch(copy, "--dry-run", launch.commit, "train", SLURM_SUBMIT_DIR=str(launch.repository))
    assert dry.stdout.count("\n") == 5 and "srun --kill-on-bad-exit=1" in dry.stdout


def test_jobs_of_one_commit_that_start_at_once_share_its_copy(launch):
    launch("submit.sh", "slurm", "a1", *TRAIN)
    tree = launch.repository / f"build/slurm-{launch.commit}"
    write_program(tree / ".venv/bin/python", PYTHON)
    write_program(tree / ".venv/bin/pkv", PKV)
    git(tree, "init", "--quiet")
    busy = tree / ".git/index.lock"
    busy.touch()  # as of another job's git, which has the lock
    other = ["flock", f"{tree}.lock", "bash", "-c", 'echo taken && /bin/sleep 1 && rm "$0"', str(busy)]
    with subprocess.Popen(other, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "taken\n"
        launch("slurm.sbatch", launch.commit, "exit-0", SLURM_SUBMIT_DIR=str(launch.repository))
    assert git(tree, "rev-parse", "HEAD") == launch.commit


def test_what_a_slurm_job_says_is_no_change_of_the_commit(launch):
    """A log beside the code would keep the next job from being submitted."""
    launch("submit.sh", "slurm", "a1", *TRAIN)
    (output,) = re.findall(r"^#SBATCH --output=(.*)", (launch.repository / "launch/slurm.sbatch").read_text(), re.M)
    (launch.repository / output.replace("%x", "a1").replace("%j", "7")).write_text("step 1")
    launch("submit.sh", "slurm", "a1", *TRAIN)


def expanded(word: str) -> str:
    """What a container gets of an argument: kubelet makes `$` of `$$`, and a variable's value of `$(NAME)`."""
    values = {"$$": "$", "$(PKV_COMMIT)": "a variable"}
    return re.sub(r"\$\$|\$\(\w+\)", lambda found: values.get(found[0], found[0]), word)


def test_gke_gets_a_pod_a_machine_and_the_code_of_the_commit(launch):
    odd = ["train", "tiny", "--run=/mnt/pkv/a b", 'say "x" \\ y', "two\nlines", "@NAME@", "a & b"]
    odd += ["$HOME 5$ a$$b $(PKV_COMMIT) $$(x)", "tab\t, return\r\n, escape\x1b", "é"]
    shape = ("--accelerator", "tpu-v5-lite-podslice", "--topology", "4x8", "--claim", "runs", "--slices", 2)
    launch("submit.sh", "gke", "a1", *shape, "--spot", "--", *odd)
    _, configmap, apply = launch.calls()
    assert configmap[1:4] == ["create", "configmap", f"pkv-{launch.commit[:12]}"] and apply == [
        "kubectl",
        "apply",
        "--filename=build/a1.yaml",
    ]
    archive = launch.repository / configmap[4].removeprefix("--from-file=pkv.tar.gz=")
    assert archive.stat().st_size < 1_000_000
    found = yaml.safe_load((launch.repository / "build/a1.yaml").read_text())
    (job,) = found["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    assert (job["replicas"], pods["parallelism"], pods["completions"]) == (2, 8, 8)
    pod = pods["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "hostNetwork" not in pod  # Autopilot and gcsfuse refuse it
    (container,) = pod["containers"]
    assert [expanded(word) for word in container["args"]] == odd
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"] == [{"name": "PKV_COMMIT", "value": launch.commit}] and container["envFrom"] == []


GKE = ("gke", "a1", "--accelerator", "tpu7x", "--topology", "2x2x1", "--claim", "c")


def jobset(launch) -> dict:
    return yaml.safe_load((launch.repository / "build/a1.yaml").read_text())


def pod_of(found: dict) -> dict:
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_a_step_has_the_time_to_end_that_a_person_gives_it(launch):
    launch("submit.sh", "slurm", "a1", "--grace", 900, "--time", "20", *TRAIN)
    assert "--signal=INT@900" in launch.calls()[0]
    launch("submit.sh", *GKE, "--grace=900", *TRAIN)
    assert pod_of(jobset(launch))["terminationGracePeriodSeconds"] == 900
    launch("submit.sh", *GKE, *TRAIN)
    assert pod_of(jobset(launch))["terminationGracePeriodSeconds"] == 600
    for short in ("10", "00:10:00", "0-00:09:08"):
        said = launch("submit.sh", "slurm", "a1", "--time", short, *TRAIN, code=2).stderr
        assert f"--time {short}: expected more than --grace, 600 s" in said and said.count("\n") == 1
    launch("submit.sh", "slurm", "a1", "--time", "1-00:00:00", *TRAIN)
    # What stands in the file would be lost to the command line, and mislead.
    assert "#SBATCH --signal" not in (launch.repository / "launch/slurm.sbatch").read_text()


def test_a_mistake_ends_a_jobset_and_a_preemption_is_not_counted(launch):
    launch("submit.sh", *GKE, *TRAIN)
    found = jobset(launch)
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # or Kubernetes refuses the policy
    (name,) = (container["name"] for container in job["template"]["spec"]["containers"])
    code = {"containerName": name, "operator": "In"}
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {**code, "values": [2]}},
        # JobSet's schema wants the status, which Job's own has a default for.
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {**code, "values": [130]}},
    ]
    messages = {  # Kubernetes' own, of a job that fails by its policy
        "Container pkv for pod a/b-2 failed with exit code 2 matching FailJob rule at index 0": "FailJobSet",
        "Container pkv for pod a/b-2 failed with exit code 130 matching FailJob rule at index 2": "Restart",
        "Pod a/b-2 has condition DisruptionTarget matching FailJob rule at index 1": "Restart",
    }
    rules = found["spec"]["failurePolicy"]["rules"]
    assert all(rule["onJobFailureReasons"] == ["PodFailurePolicy"] for rule in rules)
    for message, wanted in messages.items():
        patterns = [(rule["action"], rule.get("onJobFailureMessagePatterns", [""])) for rule in rules]
        first = next(action for action, each in patterns if any(re.search(one, message) for one in each))
        assert first == (wanted if wanted == "FailJobSet" else "RestartJobSetAndIgnoreMaxRestarts")


@pytest.mark.parametrize(
    ("setup", "code", "started"),
    [("exit 0", 2, True), ("exit 2", 1, False), ("kill -TERM $PPID", 130, False)],
    ids=("a mistake of pkv's user", "an installation that failed", "asked to leave meanwhile"),
)
def test_a_pod_ends_with_2_only_where_pkv_does(launch, setup, code, started):
    launch("submit.sh", *GKE, *TRAIN)
    (container,) = pod_of(jobset(launch))["containers"]
    script = re.sub(r"(?<=\s)/(pkv|code)\b", rf"{launch.folder}/\1", container["command"][2])
    worker = f"[[ $1 == exec ]] || {{ {setup}; exit; }}\necho started\nexit 2\n"
    write_program(launch.folder / "code/launch/worker.sh", worker)
    archive = ["tar", "-czf", "pkv.tar.gz", "launch"]
    subprocess.run(archive, cwd=launch.folder / "code", check=True)
    done = subprocess.run(["bash", "-c", script, "pkv"], capture_output=True, text=True, check=False)
    assert (done.returncode, "started" in done.stdout) == (code, started), done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("slurm", "a1"),
        GKE,
        ("sky", "a1", "--accelerator", "H100:8", "--bucket", "runs", "--spot"),
    ],
    ids=lambda words: words[0],
)
def test_a_secret_comes_to_pkv_and_to_no_command_line_or_file(launch, words):
    token = 'hf_1 "2" \\ $HOME'
    done = launch("submit.sh", *words, "--env", f"TOKEN={token}", *TRAIN)
    given = (launch.folder / "given").read_text()
    if words[0] == "gke":
        secret = yaml.safe_load(given)
        assert secret["kind"] == "Secret" and secret["stringData"] == {"TOKEN": token}
        (container,) = pod_of(jobset(launch))["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
    else:
        assert given == token
    written = [file.read_text() for file in (launch.repository / "build").glob("*.yaml")]
    assert not any("hf_1" in text for text in (str(launch.calls()), done.stdout, done.stderr, *written))
    assert words[0] != "sky" or launch.calls()[0][-3:-1] == ["--secret", "TOKEN"]


@pytest.mark.parametrize("word", ["no", "null", "on", "true"])
def test_names_stay_names_in_yaml(launch, word):
    gke = ("--accelerator", "tpu7x", "--topology", "2x2x1", "--claim", word, "--image", "20241231")
    launch("submit.sh", "gke", word, *gke, *TRAIN)
    found = yaml.safe_load((launch.repository / f"build/{word}.yaml").read_text())
    assert found["metadata"]["name"] == word
    pod = pod_of(found)
    assert pod["containers"][0]["image"] == "20241231"
    assert pod["volumes"][1]["persistentVolumeClaim"] == {"claimName": word}
    launch("submit.sh", "sky", word, "--accelerator", "H100", "--bucket", "2024-12-31", *TRAIN)
    found = yaml.safe_load((launch.repository / f"build/{word}.yaml").read_text())
    assert found["name"] == word and found["file_mounts"]["/mnt/pkv"]["name"] == "2024-12-31"


SKY = [("tpu-v6e-16", "v2-alpha-tpuv6e"), ("tpu-v4-8", "tpu-ubuntu2204-base"), ("H100:8", None)]


@pytest.mark.parametrize(("accelerator", "version"), SKY)
def test_skypilot_gets_the_bundle_and_a_bucket(launch, accelerator, version):
    words = ("sky", "a1", "--accelerator", accelerator, "--bucket", "my-runs")
    launch("submit.sh", *words, *TRAIN, "--name", "it's")
    launch("submit.sh", *words, "--spot", *TRAIN)
    first, second = launch.calls()
    assert first[1] == "launch" and second[1:3] == ["jobs", "launch"]
    launch("submit.sh", *words, *TRAIN, "--name", "it's")
    found = yaml.safe_load((launch.repository / "build/a1.yaml").read_text())
    runtime, kind = ({"runtime_version": version}, "tpu") if version else (None, "gpu")
    assert found["resources"].get("accelerator_args") == runtime and found["resources"]["use_spot"] is False
    assert Path(found["file_mounts"]["~/pkv.bundle"]).is_file()
    assert found["file_mounts"]["/mnt/pkv"]["name"] == "my-runs" and launch.commit in found["setup"]
    assert shlex.split(found["run"])[2:] == ["exec", kind, *TRAIN[1:], "--name", "it's"]
