"""What was compiled once is kept on disk for the next process, where nobody else can write."""

from __future__ import annotations

import math
import os
import stat
import threading
import warnings
from pathlib import Path

import jax

LEAST_S = 0.5  # what compiles faster is not kept


def keep_compiled(folder: Path | None = None) -> None:
    """Keep compiled programs in `folder`, ~/.cache/pkv/compiled unless given, and take them from there.

    A program from that folder is run as it is: so it must be the user's own and writable by nobody else, or nothing is
    kept and a warning says so. JAX_COMPILATION_CACHE_DIR names another one, JAX_ENABLE_COMPILATION_CACHE=false none.
    """
    if jax.config.values["jax_compilation_cache_dir"] or not jax.config.values["jax_enable_compilation_cache"]:
        return
    try:
        folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pkv" / "compiled"
    except RuntimeError:  # a container's user often has no account, and may have no HOME
        warnings.warn("this user has no home; compiled programs are not kept: set XDG_CACHE_HOME", stacklevel=2)
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        warnings.warn(f"{folder}: {error.strerror}; compiled programs are not kept", stacklevel=2)
        return
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        warnings.warn(f"{folder}: others can write there; compiled programs are not kept: chmod 700 it", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_S)


class Compilations:
    """What JAX compiles between enter and exit: how many programs, and the seconds of tracing, lowering and compiling.

    Times that overlap, as one function is traced inside another, count once. A program that comes out of JAX's cache on
    disk counts like any other, with the time that this takes.
    """

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()  # programs may be compiled beside each other
        self._spans: list[tuple[float, float]] = []

    @property
    def seconds(self) -> float:
        """Seconds in which anything was traced, lowered or compiled."""
        total, reached = 0.0, -math.inf
        for start, stop in sorted(self._spans):
            total += max(0.0, stop - max(start, reached))
            reached = max(reached, stop)
        return total

    def __enter__(self) -> Compilations:
        jax.monitoring.register_event_time_span_listener(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._hear)

    def _hear(self, event: str, start_time: float, end_time: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            with self._lock:
                self._spans.append((start_time, end_time))
                self.count += event.endswith("/backend_compile_duration")
