"""Processes that compare answers and are killed at their limit. Not a general pool: one question, one yes or no.

`ProcessPoolExecutor.result(timeout)` leaves the hung worker in place: after four hung items none of five good ones was
scored. Here the worker that holds a late item is killed and another one started. Plain subprocesses that speak JSON
rather than multiprocessing: nothing is pickled, the caller's main module is not imported again, and it works from
threads, from notebooks and from daemonic processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

TASK = "pkv.mathcheck.symbolic:same"
PATIENCE = 5  # times its limit an item may wait for a processor that others hold
_RECYCLE_AFTER = 1000  # items; sympy's caches grow
_MAX_REPLY = 4096  # bytes


class VerifyError(Exception):
    """The comparison came to no result: the answer is neither right nor wrong, its reward is unscored.

    code: "timeout", "failed" (the comparison raised, ran out of memory or died) or "no_pool".
    """

    def __init__(self, code: Literal["timeout", "failed", "no_pool"], message: str) -> None:
        super().__init__(message)
        self.code = code


class VerifyPool:
    """A context manager over `workers` processes, started when first needed. Safe to share between threads.

    timeout_s: of processor time that an item may take, its process's start not counted, so that a busy machine leaves
    no answer unscored; PATIENCE times as long by the clock, and not longer than timeout_s where the system has no
    /proc to tell a process's time. memory_mb: address space of a process.
    task: "module:function" that a process runs as function(gold, answer) -> bool.
    """

    def __init__(
        self,
        workers: int = 1,
        timeout_s: float = 2.0,
        memory_mb: int = 1024,
        task: str = TASK,
        start_timeout_s: float = 60.0,
    ) -> None:
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        limits = map(str, (timeout_s, PATIENCE * timeout_s, memory_mb << 20))
        self._command = [sys.executable, "-P", "-m", "pkv.mathcheck.worker", task, *limits]
        self._closed = False
        self._size = workers
        # Last in, first out: a running worker is taken before an empty place makes another one start.
        self._places: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._places.put(None)

    def check(self, gold: str, answer: str) -> bool:
        """Whether `answer` equals `gold`. Raises VerifyError when that cannot be said within the limits."""
        worker, kept = self._places.get(), None
        try:
            if self._closed:
                raise VerifyError("failed", "the verify pool is closed")
            worker = worker or _Worker(self._command)
            worker.wait_ready(self._start_timeout_s)
            reply = worker.ask([gold, answer], self._timeout_s)
            if worker.asked < _RECYCLE_AFTER and not reply.get("retire"):
                kept = worker
            if "error" in reply:
                raise VerifyError("failed", f"the comparison failed: {reply['error']}")
            return reply["right"]
        finally:
            # Whatever went wrong, a late reply must never be read as the next item's: that worker has to go.
            if worker is not None and kept is None:
                worker.kill()
                kept = None if self._closed else _Worker(self._command)  # gets ready while others are scored
            self._places.put(kept)

    def close(self) -> None:
        """End the processes; items under way finish first."""
        self._closed = True
        places = [self._places.get() for _ in range(self._size)]
        for worker in places:
            if worker is not None:
                worker.kill()
            self._places.put(None)

    def __enter__(self) -> VerifyPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    """One process and the two pipes to it."""

    def __init__(self, command: list[str]) -> None:
        # Nothing of the caller's environment but what Python needs: the child reads text that a model wrote.
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT") if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # its own process group: killed with whatever it started
        )
        self._buffer = b""
        self._ready = False
        self.asked = 0

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the task is imported. Raises VerifyError."""
        if not self._ready:
            reply = self._read(timeout_s, "start", patience=1)
            if "error" in reply:
                raise VerifyError("failed", f"the comparing process did not start: {reply['error']}")
            self._ready = True

    def ask(self, item: list[str], timeout_s: float) -> dict[str, Any]:
        """Send one item and wait for its reply, {"right": bool} or {"error": str}. Raises VerifyError."""
        assert self._process.stdin is not None
        self.asked += 1
        try:
            self._process.stdin.write(json.dumps(item).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise VerifyError("failed", f"the comparing process is gone: {error}") from error
        return self._read(timeout_s, "comparison", PATIENCE)

    def _read(self, timeout_s: float, what: str, patience: int) -> dict[str, Any]:
        assert self._process.stdout is not None
        worked_out, waited_out = self._worked_s() + timeout_s, time.monotonic() + patience * timeout_s
        left_s = timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(left_s):
                    left_s = min(worked_out - self._worked_s(), waited_out - time.monotonic())
                    if left_s <= 0:
                        raise VerifyError("timeout", f"the {what} took longer than {timeout_s:g} s")
                    continue
                chunk = os.read(self._process.stdout.fileno(), _MAX_REPLY)
                if not chunk or len(self._buffer) > _MAX_REPLY:
                    raise VerifyError("failed", f"the comparing process ended during the {what}")
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _worked_s(self) -> float:
        """Processor time of the process so far, or where that is not told the time of the clock."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return time.monotonic()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime: proc(5)

    def kill(self) -> None:
        """End the process and everything that it started, now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
