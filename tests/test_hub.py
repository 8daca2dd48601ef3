"""The hub: one commit a process for weights and tokenizer, only the files that are needed, one line for what is not."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from pkv import hub
from pkv.competition import Tokenizer, train_tokenizer
from pkv.config import MeshConfig, UserError, parse_config
from pkv.evaluate import load_policy
from pkv.export import export
from pkv.hub import fetch, find_checkpoint, pinned
from pkv.mesh import make_mesh
from pkv.model import Arch, load_params, param_shapes, read_arch, read_config, save_params, split
from pkv.train.run import open_run

ARCH = Arch(vocab_size=320, hidden=8, layers=2, heads=2, kv_heads=2, head_size=4, ffn=8, qkv_bias=True)
FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def new_process():
    hub._snapshot.cache_clear()
    yield
    hub._snapshot.cache_clear()


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """What a repository holds at a commit: a model in shards and what other programs leave beside it."""
    folder = tmp_path_factory.mktemp("repository")
    train_tokenizer(["How many hives?"], 300, folder)
    save_params(jax.tree.map(lambda x: jnp.ones(x.shape), param_shapes(ARCH)), ARCH, folder, max_file_bytes=4000)
    (folder / "README.md").write_text("A model.")
    (folder / "original").mkdir()
    for unwanted in (
        "pytorch_model.bin",
        "modeling_small.py",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "original/model.safetensors",
        "original/params.json",
        "training.pt",
    ):
        (folder / unwanted).write_text("not to be fetched")
    return folder


@pytest.fixture
def remote(repository, tmp_path, monkeypatch):
    """A hub with one repository and two commits of it; `main` can be moved, and what is fetched is written down."""

    class Remote:
        main = FIRST
        calls = 0
        files = tuple(file.relative_to(repository).as_posix() for file in repository.rglob("*") if file.is_file())

        def download(self, name, *, revision=None, allow_patterns, ignore_patterns):
            self.calls += 1
            assert name == "owner/small"
            commit = self.main if revision in (None, "main") else {"v1": FIRST, "v2": SECOND}.get(revision, revision)
            folder = tmp_path / "snapshots" / commit
            wanted = filter_repo_objects(self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
            for file in wanted:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes((repository / file).read_bytes())
            return str(folder)

    remote = Remote()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", remote.download)
    return remote


def test_only_what_is_needed_is_fetched_and_weights_only_when_they_are(remote, repository):
    directory = find_checkpoint("owner/small")
    small = {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in directory.rglob("*")} == small
    arch = read_arch("owner/small")
    assert arch == read_arch(repository)
    loaded = load_params("owner/small", arch)
    shards = {file.name for file in repository.glob("model-*.safetensors")}
    assert len(shards) > 2 and {file.name for file in directory.rglob("*")} == small | shards
    jax.tree.map(np.testing.assert_array_equal, loaded, load_params(repository, arch))


def test_weights_and_tokenizer_are_of_one_commit_whatever_is_pushed_meanwhile(remote):
    assert find_checkpoint("owner/small").name == FIRST
    remote.main = SECOND
    policy = load_policy("owner/small", make_mesh(MeshConfig()))
    assert policy.tokenizer.vocab_size == Tokenizer.load("owner/small").vocab_size
    assert find_checkpoint("owner/small").name == FIRST
    assert not (find_checkpoint("owner/small").parent / SECOND).exists()
    assert pinned("owner/small") == f"owner/small@{FIRST}"
    assert remote.calls == 2  # configs and tokenizer once, weights once


def test_a_revision_pins_what_is_fetched(remote):
    remote.main = SECOND
    assert find_checkpoint("owner/small@v1").name == FIRST
    assert pinned("owner/small@v1") == pinned(f"owner/small@{FIRST}") == f"owner/small@{FIRST}"
    assert find_checkpoint("owner/small").name == SECOND
    assert load_params("owner/small@v1", ARCH)["embedding"].shape == (320, 8)
    assert not list((find_checkpoint("owner/small")).glob("*.safetensors"))


def test_a_run_says_the_commit_and_goes_on_with_that_commit_only(remote, tmp_path):
    def start(model: str) -> dict:
        config = parse_config({"model": {"path": model}, "rounds": [{"name": "format", "steps": 1}]})
        policy = SimpleNamespace(system="Compete.", tokenizer=SimpleNamespace(save=lambda _: None))
        open_run(config, tmp_path / "run", policy, {}, fresh=False).close()
        return yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())

    assert start("owner/small")["made_with"]["model"] == f"owner/small@{FIRST}"
    assert start("owner/small")["model"]["path"] == "owner/small"
    remote.main = SECOND
    hub._snapshot.cache_clear()
    with pytest.raises(UserError, match=f"model.path is 'owner/small@{FIRST}' there and 'owner/small@{SECOND}' here"):
        start("owner/small")
    assert start("owner/small@v1")["model"]["path"] == "owner/small"


def test_a_lora_run_stands_on_the_commit_that_it_was_trained_on(remote, tmp_path):
    config = parse_config({"model": {"path": "owner/small", "lora": {"rank": 2}}})
    mesh, run = make_mesh(MeshConfig()), tmp_path / "run"
    policy = load_policy("owner/small", mesh, model=config.model)
    with open_run(config, run, policy, read_config("owner/small"), fresh=False) as opened:
        opened.save(1, {"params": split(policy.params)[0]}, keep=1)
    remote.main = SECOND
    hub._snapshot.cache_clear()
    jax.tree.map(np.testing.assert_array_equal, load_policy(str(run), mesh).params, policy.params)
    out = export(str(run), tmp_path / "out")
    assert not (tmp_path / "snapshots" / SECOND).exists()
    said = json.loads((out / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == ("owner/small", FIRST)
    assert "base_model: owner/small\n" in (out / "README.md").read_text()


def test_a_directory_is_its_own_name(repository, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert find_checkpoint(repository) == repository and pinned(repository) == str(repository)
    monkeypatch.chdir(repository.parent)
    assert pinned(repository.name) == str(repository)
    fetch(repository, ["nothing.safetensors"])  # what it lacks is for its reader to say


def test_a_repository_without_safetensors_is_one_line(remote):
    remote.files = ("config.json", "pytorch_model.bin")
    with pytest.raises(UserError, match=r"owner/small: the hub gave no model\.safetensors; pkv reads safetensors only"):
        load_params("owner/small", ARCH)
    assert {file.name for file in find_checkpoint("owner/small").iterdir()} == {"config.json"}


def cached(cache: Path, files: dict[str, bytes]) -> None:
    """A cache as the hub's own library lays it out, with `main` at FIRST."""
    folder = cache / "models--owner--small"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(FIRST)
    for name, content in files.items():
        file = folder / "snapshots" / FIRST / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_offline_the_cache_is_enough(offline, repository):
    cached(offline, {file.name: file.read_bytes() for file in repository.iterdir() if file.is_file()})
    for source in ("owner/small", "owner/small@main", f"owner/small@{FIRST}"):
        assert pinned(source) == f"owner/small@{FIRST}"
        assert load_params(source, read_arch(source))["final_norm"].shape == (8,)
    assert Tokenizer.load("owner/small", light=True).stop_ids == Tokenizer.load(repository, light=True).stop_ids


def test_offline_what_is_not_in_the_cache_is_one_line(offline, repository):
    for source in ("owner/other", "owner/small@v7"):
        with pytest.raises(UserError, match=r"not in this machine's hub cache, and HF_HUB_OFFLINE forbids") as error:
            find_checkpoint(source)
        assert str(error.value).startswith(f"{source}: ") and "\n" not in str(error.value)
    small = {file.name: file.read_bytes() for file in repository.glob("*.json")}
    cached(offline, small)
    assert read_arch("owner/small") == ARCH
    with pytest.raises(UserError, match=r"model-00001-of-\d+\.safetensors.* HF_HUB_OFFLINE") as error:
        load_params("owner/small", ARCH)
    assert "\n" not in str(error.value)


def answered(kind: type[errors.HfHubHTTPError], status: int, words: str) -> errors.HfHubHTTPError:
    """What the hub's library raises for an answer of the hub."""
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(f"{status} Client Error. (Request ID: x)\n\n{words}\nand more", response=response)  # type: ignore[arg-type]


FAILURES = {
    "gated": (
        answered(errors.GatedRepoError, 403, "Cannot access"),
        r"restricted; ask for it at https://huggingface.co/owner/small and log in by `hf auth login`",
    ),
    "unknown": (
        answered(errors.RepositoryNotFoundError, 401, "Not Found"),
        "no such directory, .* no such repository, or a private one; correct the name, or log in",
    ),
    "revision": (
        answered(errors.RevisionNotFoundError, 404, "Not Found"),
        "no such revision of it; correct what stands behind @",
    ),
    "token": (answered(errors.HfHubHTTPError, 401, "Invalid token"), "refuses access: 401 Client Error.*; log in"),
    "busy": (answered(errors.HfHubHTTPError, 503, "Unavailable"), "503 Client Error.*give the command again"),
    "away": (
        errors.LocalEntryNotFoundError("Got: ConnectError: Name unknown\nAn error happened"),
        "ConnectError: Name unknown; check the connection",
    ),
    "cut off": (
        errors.HfHubHTTPError.__bases__[0]("peer closed connection"),
        "peer closed connection; check the connection",
    ),
    "xet": (
        RuntimeError("Data processing error: IO Error: No space left on device (os error 28)"),
        "no room .*set HF_HOME",
    ),
    "full": (
        OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
        "no room for it on the disk: .*free some",
    ),
    "cache": (PermissionError(errno.EACCES, "Permission denied", "/hub"), "cache cannot be written: .*set HF_HOME"),
    "silent": (TimeoutError(), "did not give it: TimeoutError; check the connection"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_goes_wrong_at_the_hub_is_one_line_that_says_what_to_do(remote, monkeypatch, failure):
    """Before anything is there, and in the middle of the weights."""
    error, words = FAILURES[failure]

    def fail(*_, **__):
        raise error

    arch = read_arch("owner/small")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for source, ask in (("owner/small@v2", find_checkpoint), ("owner/small", lambda source: load_params(source, arch))):
        with pytest.raises(UserError, match=words) as said:
            ask(source)
        assert str(said.value).startswith("owner/small@") and "\n" not in str(said.value)
        assert said.value.code == (1 if failure in ("busy", "away", "cut off", "silent") else 2)  # as the command exits


@pytest.mark.parametrize(
    "name", ["nowhere", "/nowhere/at/all", "./owner/name", "~/model", "a/b/c", "owner/", "o/n@", "o/n@ 1"]
)
def test_what_is_neither_a_directory_nor_a_hub_id_never_asks_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match="no such directory; expected"):
        find_checkpoint(name)


def test_a_broken_index_is_not_asked_for(remote, repository, tmp_path):
    directory = find_checkpoint("owner/small")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="files of this directory"):
        load_params("owner/small", ARCH)
    assert remote.calls == 1
