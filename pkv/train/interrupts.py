"""Ctrl-C that cannot get lost: where the exception is swallowed, the next step raises it again.

Python raises it in whatever runs at that moment; in a callback of the garbage collector, of which jax has one, it is
printed and forgotten.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """A check that raises KeyboardInterrupt if there was one since the block began. Off the main thread it never is."""
    seen = False

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        raise KeyboardInterrupt

    def check() -> None:
        if seen:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGINT, ring)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
