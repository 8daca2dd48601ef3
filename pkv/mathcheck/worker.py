"""The child process of VerifyPool: a JSON line in for every item, a JSON line out. Run as `python -m`; see pool.py.

It limits itself: memory, files, processor time and wall time per item, so that it ends even when its parent is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable


def main(arguments: list[str]) -> int:
    """Serve `module:function` until standard input ends. arguments: task, an item's seconds of
    processor time and by the clock, bytes of memory."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler's, meant for the run: it still needs what is checked
        signal.signal(number, signal.SIG_IGN)
    task_name, seconds, wall_seconds, memory_bytes = arguments[0], *map(float, arguments[1:3]), int(arguments[3])
    # The task gets neither end of the protocol: what it prints must not look like an answer.
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    module, _, name = task_name.partition(":")
    try:
        task = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        _reply(replies, {"error": f"cannot load {task_name}: {error}"})
        return 1
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _reply(replies, {"ready": True})
    for line in requests:
        gold, answer = json.loads(line)
        # One item's own budget; the parent kills earlier, this is for a worker that outlives its parent.
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds) + 1)
        signal.setitimer(signal.ITIMER_REAL, 2 * wall_seconds + 1)
        reply = _run(task, gold, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, reply)
    return 0


def _run(task: Callable[[str, str], bool], gold: str, answer: str) -> dict[str, object]:
    try:
        return {"right": bool(task(gold, answer))}
    except (MemoryError, RecursionError) as error:
        return {"error": type(error).__name__, "retire": True}
    except Exception as error:  # noqa: BLE001 - the border: whatever the task raises becomes a coded failure in the parent
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _limit(kind: int, value: int) -> None:
    """Set a soft limit; a system that does not know or allow it goes without."""
    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _reply(replies: object, message: dict[str, object]) -> None:
    print(json.dumps(message), file=replies, flush=True)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
