"""How far a run is: a bar on a terminal, a plain line now and then elsewhere (a log file, CI)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

# How some values read best; all others are `name value` with three significant digits.
_FORMS = {"accuracy": "accuracy {:.0%}", "format": "format {:.0%}", "tokens_per_s": "{:,.0f} tokens/s"}
_BAR = "{desc} |{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"


class Progress:
    """Progress through `total` steps, shown on `stream` (stderr unless told otherwise).

    On a terminal a tqdm bar; elsewhere at most one line every `every_s` seconds, the last step always. What is over
    before `delay_s` seconds shows nothing, nor does a quiet one.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        initial: int = 0,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        delay_s: float = 0.0,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total, self._description, self._initial, self._done = total, description, initial, initial
        self._every_s, self._delay_s, self._clock = every_s, delay_s, clock
        self._start, self._printed_at = clock(), -float("inf")
        self._bar, self._quiet = None, quiet
        if self._stream.isatty() and not quiet:
            self._bar = tqdm(
                total=total,
                desc=description,
                initial=initial,
                file=self._stream,
                dynamic_ncols=True,
                bar_format=_BAR,
                delay=delay_s,
            )

    def advance(self, steps: int = 1, **shown: float | str | None) -> None:
        """Count `steps` more as done and show values (round, reward, accuracy, tokens_per_s); None is left out."""
        self._done += steps
        values = ", ".join(_show(name, value) for name, value in shown.items() if value is not None)
        if self._bar is not None:
            self._bar.set_postfix_str(values, refresh=False)
            self._bar.update(steps)
            return
        now = self._clock()
        due = self._done >= self._total or now - self._printed_at >= self._every_s
        if due and now - self._start >= self._delay_s and not self._quiet:
            self._printed_at = now
            left = "" if self._done >= self._total else f", {self._left(now)} left"
            line = f"{self._description} {self._done}/{self._total}{left}{', ' if values else ''}{values}"
            print(line, file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Print a line without tearing the bar."""
        tqdm.write(text, file=self._stream)
        self._stream.flush()

    def close(self) -> None:
        """Leave the last state standing."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _left(self, now: float) -> str:
        per_step = (now - self._start) / max(1, self._done - self._initial)
        return tqdm.format_interval(per_step * (self._total - self._done))


def _show(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return f"{name} {value}"
    if name in _FORMS:
        return _FORMS[name].format(value)
    return f"{name} {value}" if isinstance(value, int) else f"{name} {value:.3g}"
