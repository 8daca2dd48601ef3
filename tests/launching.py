"""A script of launch/ as a user calls it, between fakes of what it calls.

`gcloud`, `kubectl`, `sbatch`, `sky` and `srun` are one fake, which writes its arguments down as a JSON line, answers
with states that a test gives, and does what is sent to a worker in a folder that stands for that worker's home.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = ("launch", "pyproject.toml", "README.md", "LICENSE", ".gitignore")
FAKES = ("gcloud", "kubectl", "sbatch", "sky", "srun")
SMALL = {
    "sleep": """#!/bin/bash\nprintf '["sleep", "%s"]\\n' "$1" >>"$FAKE/calls.jsonl"\n""",
    "sudo": '#!/bin/bash\necho \'["sudo"]\' >>"$FAKE/calls.jsonl"\n',
    "timeout": '#!/bin/bash\nshift 2\n[[ ! -e "$FAKE/hangs" ]] || exit 124\nexec "$@"\n',
    "mountpoint": '#!/bin/bash\n[[ ! -e "$FAKE/no_mounts" ]]\n',
}
FAKE = f"""#!{sys.executable} -SE
import json, os, sys

folder, name, words = os.environ["FAKE"], os.path.basename(sys.argv[0]), sys.argv[1:]
with open(f"{{folder}}/calls.jsonl", "a") as file:
    file.write(json.dumps([name, *words]) + "\\n")
if "--filename=-" in words or "TOKEN" in os.environ:
    with open(f"{{folder}}/given", "a") as file:
        file.write(sys.stdin.read() if "--filename=-" in words else os.environ["TOKEN"])

def answer(what):
    with open(f"{{folder}}/{{what}}") as file:
        now, *later = file.read().splitlines()
    if later:
        with open(f"{{folder}}/{{what}}", "w") as file:
            file.write("\\n".join(later))
    return now

given = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
if words[:1] == ["get"]:
    sys.exit("no such configmap")
if name == "srun":
    at = words.index("bash")
    os.execvp("bash", words[at:])
if "describe" in words and (state := answer("states")) in ("NONE", "OFFLINE"):
    sys.exit("ERROR: NOT_FOUND: no such resource" if state == "NONE" else "ERROR: there was a problem with the network")
elif "describe" in words:
    print(state)
elif os.path.exists(f"{{folder}}/broken") and answer("broken") in " ".join(words):
    sys.exit("ERROR: 503")
elif (one := given.get("--filter", "")).startswith("name="):  # parts of a group are empty folders
    print(*(part for part in [words[1]] if os.path.exists(f"{{folder}}/{{one[5:].split()[0]}}/{{part}}")))
elif words[:1] == ["compute"] and words[1] != "tpus" and {{"create", "delete"}} & set(words):
    at = [word for word in words[:5] if not word.startswith("-")][-1]
    (os.makedirs if "create" in words else os.rmdir)(f"{{folder}}/{{at}}/{{words[1]}}")
elif words[1:3] == ["instances", "list"]:
    machines = [line.split(":") for line in answer("machines").split()]
    print(*[each[given["--format"] == "value(status)"] for each in machines], sep="\\n")
elif "ssh" in words and os.path.exists(f"{{folder}}/jobs") and "worker.sh status" in given["--command"]:
    print(answer("jobs"))
elif "ssh" in words or "scp" in words:
    import shutil, subprocess

    homes = sorted(os.listdir(f"{{folder}}/homes"))
    if (one := given.get("--worker", "all")) != "all":
        homes = homes[int(one) : int(one) + 1]
    elif words[1] in ("ssh", "scp"):  # of one machine of a group, at the same time as of the others
        homes = homes["a1-y" in "".join(words[2:4]) :][:1]
    for home in homes:
        if "scp" in words:
            at = words.index("scp")
            shutil.copyfile(words[at + 1], f"{{folder}}/homes/{{home}}/" + words[at + 2].split(":")[1])
            continue
        environment = {{**os.environ, "HOME": f"{{folder}}/homes/{{home}}"}}
        if code := subprocess.call(["bash", "-c", given["--command"]], cwd=environment["HOME"], env=environment):
            sys.exit(code)
"""
# On a worker pip is only written down, and pkv says what it was given and ends as its first word says.
PYTHON = '#!/bin/bash\n[[ $1 == -c ]] || echo "$PIP_CONSTRAINT $*" >>"$HOME/pip"\n'
PKV = """#!/bin/bash
trap 'echo saved; exit 130' TERM
printf '%q ' "$@"; echo "$JAX_PLATFORMS $EXTRA"
while [[ $1 == train && ! -e $HOME/over ]]; do /bin/sleep 0.05; done
exit "${1#exit-}"
"""


def write_program(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A commit with the scripts in it."""
    folder = tmp_path_factory.mktemp("repository")
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for name in ("pkv", "configs"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, *ANOTHER)
    return folder


ANOTHER = ("-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--quiet", "--allow-empty", "--message=a")


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout.strip()


class Launch:
    """A script called as a user calls it, and what the fakes wrote down."""

    def __init__(self, repository: Path, folder: Path):
        self.repository, self.folder = repository, folder
        self.commit = git(repository, "rev-parse", "HEAD")
        for name, text in {**dict.fromkeys(FAKES, FAKE), **SMALL}.items():
            write_program(folder / "bin" / name, text)
        for home in ("w0", "w1"):
            write_program(folder / "homes" / home / "pkv/.venv/bin/python", PYTHON)
            write_program(folder / "homes" / home / "pkv/.venv/bin/pkv", PKV)

    def answers(self, **lines: list[str]) -> None:
        for name, each in lines.items():
            (self.folder / name).write_text("\n".join(each))

    def __call__(self, script: str, *words: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        given = {"PATH": path, "FAKE": str(self.folder), "HOME": str(self.folder), "PYTHON": sys.executable}
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "SLURM_", "PIP_"))}
        command = ["bash", str(self.repository / "launch" / script), *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=keep | given | environment, timeout=60, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def calls(self, but: tuple[str, ...] = ("sleep", "sudo")) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        lines = map(json.loads, file.read_text().splitlines()) if file.exists() else []
        return [call for call in lines if call[0] not in but]

    def verbs(self) -> list[str]:
        """What was asked of gcloud, a word each; what was sent to a worker by the verb of worker.sh."""
        found = []
        for call in self.calls():
            sent = next((word for word in call if word.startswith("--command=")), "")
            verb = re.search(r"worker\.sh (\w+)", sent)
            found.append(verb[1] if verb else call[4])
        return found


@pytest.fixture
def launch(repository, tmp_path) -> Iterator[Launch]:
    yield Launch(repository, tmp_path)
    for home in (tmp_path / "homes").iterdir():
        (home / "over").touch()  # what still trains there ends


HERE = ("--zone", "us-east5-b")
VM = ("tpu_vm.sh", "create", "a1", *HERE, "--type", "v6e-8")
BABYSIT = ("tpu_vm.sh", "babysit", "a1", *HERE, "--type", "v6e-8", "--spot", "--every", 1, "--prepare", "true")
TRAIN = ("--", "train", "tiny", "--run", "/mnt/pkv/a")
GCE = ("--zone", "us-central1-c", "--project", "project-1")


def wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
