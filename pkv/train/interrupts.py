"""A run that is asked to stop ends its step and is saved; asked a second time, it stops at once.

An exception raised by a signal handler lands anywhere: in a checkpoint being written, in a callback of jax that
swallows it, in an import. So the first signal only leaves word, and the loop looks for it where nothing is half done.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C; what a spot machine's end and a scheduler send
ONE_S = 0.5  # as long several are one: `timeout` sends its signal to the process and to its group, so it comes twice
SAID = b"\npkv: stopping after this step, which is saved; once more to stop at once\n"


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether the run was asked to stop since the block began. Off the main thread, where no signal comes: never."""
    asked: float | None = None  # when it was

    def leave_word(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked is not None:
            if time.monotonic() - asked < ONE_S:
                return
            raise KeyboardInterrupt
        asked = time.monotonic()
        os.write(2, SAID)  # not print: the signal may have come in the middle of one

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, leave_word) for number in SIGNALS}
    try:
        yield lambda: asked is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
