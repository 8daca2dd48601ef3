"""Compiled programs are kept where only their owner can write."""

from __future__ import annotations

import subprocess
import sys

import jax
import pytest

from pkv.compiling import keep_compiled

PROGRAM = """
import jax, jax.numpy as jnp
from pathlib import Path
import pkv.compiling as compiling
compiling.LEAST_S = 0.0
compiling.keep_compiled(Path({folder!r}))
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(len(hits))
"""


@pytest.fixture
def nothing_kept(monkeypatch):
    """As in a process of a user's own: the tests themselves keep what they compile."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_a_user_without_a_home_is_warned(nothing_kept, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_242_424)  # as in a container, of whom there is no account
    with pytest.warns(UserWarning, match="no home; compiled programs are not kept"):
        keep_compiled()


def test_the_next_process_finds_what_one_compiled(tmp_path, nothing_kept):
    folder = tmp_path / "cache" / "compiled"
    program = [sys.executable, "-c", PROGRAM.format(folder=str(folder))]
    first, second = (int(subprocess.run(program, check=True, capture_output=True, text=True).stdout) for _ in range(2))
    assert (first, second > 0) == (0, True)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_is_not_used(tmp_path, nothing_kept):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="others can write"):
        keep_compiled(folder)
    assert not jax.config.jax_compilation_cache_dir


def test_it_can_be_switched_off(tmp_path, nothing_kept):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        keep_compiled(tmp_path / "none")
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not (tmp_path / "none").exists()
