"""Steps on disk: what is saved comes back bit for bit, and what is broken is never used."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pkv import checkpoint
from pkv.checkpoint import CheckpointError

Moments = namedtuple("Moments", "mu nu count")


def make_state(seed: int = 0):
    """A training state in small: sharded bf16 and float32, awkward bit patterns, scalars, raw keys, containers."""
    rng = np.random.default_rng(seed)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = NamedSharding(mesh, PartitionSpec("fsdp", None))
    special = np.array([np.nan, -0.0, np.inf, 1e-42, 3.0, 4.0, 5.0, 6.0], np.float32)
    return {
        "params": {
            "embed": jax.device_put(jnp.asarray(rng.normal(size=(8, 6)), jnp.bfloat16), spread),
            "layers": {"wq": jax.device_put(rng.normal(size=(4, 6)).astype(np.float32), spread)},
        },
        "opt": (
            Moments(jnp.asarray(special), jnp.asarray(special).astype(jnp.bfloat16), jnp.int32(7)),
            (),
            [np.int32(3)],
        ),
        "key": jnp.array([1, 2**32 - 1], jnp.uint32),
        "counts": np.arange(5, dtype=np.int64),
        "step": 12,
    }


def bits(tree):
    """Every leaf as (kind, dtype, shape, bytes), so that NaN and -0.0 compare too."""
    return [
        (isinstance(x, jax.Array), str(np.asarray(x).dtype), np.shape(x), np.asarray(x).tobytes())
        for x in jax.tree.leaves(tree)
    ]


def flip_bit(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def weight_files(step_folder: Path) -> list[Path]:
    return sorted((f for f in step_folder.rglob("*") if f.is_file()), key=lambda f: -f.stat().st_size)


def test_restore_after_save_is_the_identity_with_shardings_dtypes_and_structure(tmp_path):
    state = make_state()
    meta = {"round": "format", "sampler": {"cursor": 5}}
    checkpoint.save(tmp_path, 12, state, meta, keep=2)
    template = jax.tree.map(lambda x: x * 0 if isinstance(x, (jax.Array, np.ndarray)) else type(x)(0), state)
    template["params"] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state["params"]
    )
    restored, restored_meta = checkpoint.restore(tmp_path, checkpoint.latest(tmp_path), template)
    assert restored_meta == meta
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert type(restored["step"]) is int and type(restored["opt"][2][0]) is np.int32
    for got, put in zip(jax.tree.leaves(restored["params"]), jax.tree.leaves(state["params"]), strict=True):
        assert got.sharding == put.sharding and len(got.sharding.device_set) == 8


def test_a_state_goes_back_on_another_mesh_unchanged(tmp_path):
    state = {"w": make_state()["params"]["embed"]}
    checkpoint.save(tmp_path, 0, state, {}, keep=1)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    template = {"w": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=sharding)}
    restored, _ = checkpoint.restore(tmp_path, 0, template)
    assert restored["w"].sharding == sharding
    assert bits(restored) == bits(state)


def test_parameters_load_without_the_rest(tmp_path):
    state = make_state()
    checkpoint.save(tmp_path, 3, state, {"a": 1}, keep=1)
    restored, meta = checkpoint.restore(tmp_path, 3, state["params"], under="params")
    assert meta == {"a": 1}
    assert bits(restored) == bits(state["params"])


def test_a_flipped_bit_in_any_file_is_noticed_and_the_older_step_used(tmp_path, capsys):
    state = make_state()
    checkpoint.save(tmp_path, 1, state, {"mark": "older"}, keep=2)
    checkpoint.save(tmp_path, 2, state, {"mark": "newer"}, keep=2)
    files = weight_files(tmp_path / "2")
    assert len(files) > 3 and any(f.name == checkpoint.MANIFEST for f in files)
    for file in files:
        if file.stat().st_size == 0:
            continue
        flip_bit(file, at=file.stat().st_size // 2)
        assert checkpoint.latest(tmp_path) == 1
        assert str(file) in capsys.readouterr().err
        with pytest.raises(CheckpointError, match=file.name):
            checkpoint.restore(tmp_path, 2, state)
        flip_bit(file, at=file.stat().st_size // 2)
    assert checkpoint.latest(tmp_path) == 2 and capsys.readouterr().err == ""


def test_meta_cannot_be_changed_unnoticed(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": jnp.zeros(3)}, {"cursor": 41}, keep=1)
    file = tmp_path / "1" / checkpoint.MANIFEST
    file.write_text(file.read_text().replace('"cursor": 41', '"cursor": 42'))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.restore(tmp_path, 1, {"a": jnp.zeros(3)})


@pytest.mark.parametrize("harm", ["truncate", "delete"])
def test_truncated_and_deleted_files_are_noticed(tmp_path, harm):
    checkpoint.save(tmp_path, 1, make_state(), {}, keep=1)
    file = weight_files(tmp_path / "1")[1]
    file.unlink() if harm == "delete" else file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=file.name):
        checkpoint.verify(tmp_path, 1)


def test_empty_and_foreign_folders_are_no_steps(tmp_path, capsys):
    assert checkpoint.latest(tmp_path / "none") is None
    (tmp_path / "99").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "007").mkdir()
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 5, {"a": jnp.ones(2)}, {}, keep=1)
    capsys.readouterr()
    assert checkpoint.latest(tmp_path) == 5
    assert "99" in capsys.readouterr().err


def test_keep_counts_whole_steps_up_to_the_saved_one(tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, step, {"a": jnp.full(2, step)}, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]
    flip_bit(weight_files(tmp_path / "4")[0])  # broken: the run goes on from 3
    (tmp_path / "2").mkdir()  # no step, and must not push one out
    checkpoint.save(tmp_path, 3, {"a": jnp.full(2, 30)}, {}, keep=2)
    assert checkpoint.latest(tmp_path) == 3
    restored, _ = checkpoint.restore(tmp_path, 3, {"a": jnp.zeros(2, jnp.int32)})
    assert restored["a"].tolist() == [30, 30]
    assert not list(tmp_path.glob(".*"))


def test_a_broken_older_step_does_not_push_out_a_whole_one(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": jnp.ones(2)}, {}, keep=2)
    (tmp_path / "2").mkdir()
    checkpoint.save(tmp_path, 3, {"a": jnp.ones(2)}, {}, keep=2)
    assert (tmp_path / "1" / checkpoint.MANIFEST).is_file()
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"a": jnp.zeros(4)}, r"a is float32\[3\], expected float32\[4\]"),
        ({"a": jnp.zeros(3, jnp.bfloat16)}, "expected bfloat16"),
        ({"a": jnp.zeros(3), "b": jnp.zeros(1)}, "has no array 'b'"),
        ({}, "holds 'a'"),
    ],
)
def test_another_models_state_is_refused_in_one_line(tmp_path, template, words):
    checkpoint.save(tmp_path, 1, {"a": jnp.zeros(3)}, {}, keep=1)
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.restore(tmp_path, 1, template)
    assert "\n" not in str(caught.value)


def test_the_manifest_names_versions_arrays_and_every_file(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": {"b": jnp.zeros((2, 3), jnp.bfloat16)}}, {}, keep=1)
    manifest = json.loads((tmp_path / "1" / checkpoint.MANIFEST).read_text())
    assert manifest["versions"]["jax"] == jax.__version__ and manifest["versions"]["numpy"] == np.__version__
    assert manifest["arrays"] == {"a.b": {"shape": [2, 3], "dtype": "bfloat16"}}
    on_disk = {f.relative_to(tmp_path / "1").as_posix() for f in (tmp_path / "1").rglob("*") if f.is_file()}
    assert manifest["files"].keys() == on_disk - {checkpoint.MANIFEST}


def test_dotted_keys_that_collide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dotted path"):
        checkpoint.save(tmp_path, 1, {"a.b": jnp.zeros(1), "a": {"b": jnp.ones(1)}}, {}, keep=1)


@pytest.mark.parametrize("moment", ["before the manifest", "before the rename", "between the renames"])
def test_a_save_that_dies_leaves_only_whole_steps(tmp_path, monkeypatch, moment):
    state = {"a": jnp.ones(3)}
    checkpoint.save(tmp_path, 1, state, {}, keep=3)
    checkpoint.save(tmp_path, 2, state, {}, keep=3)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "before the manifest":
            patch.setattr(checkpoint, "_write_manifest", die)
        elif moment == "before the rename":
            patch.setattr(checkpoint, "_rename_over", die)
        else:
            real = Path.rename
            patch.setattr(Path, "rename", lambda s, t: die() if "tmp" in s.name else real(s, t))
        checkpoint.save(tmp_path, 2, state, {}, keep=3)
    assert checkpoint.latest(tmp_path) == (1 if moment == "between the renames" else 2)
    checkpoint.save(tmp_path, 2, state, {}, keep=3)
    assert checkpoint.latest(tmp_path) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


SAVE_FOREVER = """
import itertools, sys, jax.numpy as jnp
from pathlib import Path
from pkv import checkpoint
for step in itertools.count():
    state = {str(i): jnp.full((64, 64), step) for i in range(8)}
    checkpoint.save(Path(sys.argv[1]), step, state, {"step": step}, keep=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.013, 0.05, 0.09])
def test_sigkill_at_any_moment_leaves_only_whole_steps(tmp_path, delay_s):
    folder = tmp_path / "steps"
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(folder)], cwd=Path(__file__).parent.parent)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "2").is_dir():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(delay_s)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    whole = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()]
    assert whole
    for step in whole:
        template = {str(i): jnp.zeros((64, 64), jnp.int32) for i in range(8)}
        restored, meta = checkpoint.restore(folder, step, template)
        assert meta == {"step": step} and all((np.asarray(a) == step).all() for a in restored.values())
    assert checkpoint.latest(folder) == max(whole)
