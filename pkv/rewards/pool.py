"""Scoring in worker processes, so that each rollout is scored when it ends, while others are still being written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from functools import partial
from multiprocessing.context import SpawnContext, SpawnProcess
from types import TracebackType

import numpy as np

from pkv.competition.parser import parse
from pkv.config import RewardConfig, UserError
from pkv.records import Problem, Scorecard, Trace
from pkv.rewards.scoring import Scorer

_DIED = (
    "a scoring process died: the machine ran out of memory, or a reward of rewards.user_files ended it; "
    "lower rewards.workers or mend the reward, and run the same command again"
)
_scorer: Scorer | None = None  # of this worker process; set once, when it starts


class _Worker(SpawnProcess):
    """A process that passes over SIGTERM (see `_start_worker`), also where the executor ends a broken pool by it."""

    def terminate(self) -> None:
        self.kill()


class _Workers(SpawnContext):
    Process = _Worker


class ScoringPool:
    """`config.workers` processes that parse and score; 0 scores where it is called. A context manager.

    The processes are spawned, so that they hold neither the parent's device nor its memory.
    """

    def __init__(self, weights: Mapping[str, float], length_optimum: int, config: RewardConfig) -> None:
        self._own: Scorer | None = None
        self._processes: ProcessPoolExecutor | None = None
        if config.workers == 0:
            self._own = Scorer(weights, length_optimum, config)
        else:
            Scorer(weights, length_optimum, config).close()  # the user's mistakes are found here, not in a worker
            self._processes = ProcessPoolExecutor(
                config.workers,
                mp_context=_Workers(),
                initializer=_start_worker,
                initargs=(dict(weights), length_optimum, config),
            )

    def submit(
        self,
        problem: Problem,
        text: str,
        offsets: np.ndarray | None = None,
        truncated: bool = False,
        forced: np.ndarray | None = None,
    ) -> Future[tuple[Trace, Scorecard]]:
        """Parse and score one response (see `competition.parse` for the arguments), as soon as a process is free.

        The result raises UserError when a process died.
        """
        future: Future[tuple[Trace, Scorecard]] = Future()
        if self._processes is not None:
            try:
                work = self._processes.submit(_work, problem, text, offsets, truncated, forced)
            except BrokenExecutor:
                raise UserError(_DIED) from None
            work.add_done_callback(partial(_pass_on, future))
            return future
        assert self._own is not None
        future.set_result(_score(self._own, problem, text, offsets, truncated, forced))
        return future

    def close(self) -> None:
        """Wait for what was submitted and end the processes."""
        if self._own is not None:
            self._own.close()
        if self._processes is not None:
            self._processes.shutdown()

    def __enter__(self) -> ScoringPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _pass_on(future: Future[tuple[Trace, Scorecard]], done: Future[tuple[Trace, Scorecard]]) -> None:
    error = done.exception()
    if isinstance(error, BrokenExecutor):
        future.set_exception(UserError(_DIED))
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())


def _score(
    scorer: Scorer,
    problem: Problem,
    text: str,
    offsets: np.ndarray | None,
    truncated: bool,
    forced: np.ndarray | None,
) -> tuple[Trace, Scorecard]:
    trace = parse(text, offsets, truncated, forced)
    return trace, scorer.score(problem, trace)


def _start_worker(weights: Mapping[str, float], length_optimum: int, config: RewardConfig) -> None:
    global _scorer
    # Ctrl-C, `timeout` and schedulers tell all processes of a run to stop. That is the parent's to handle: it ends its
    # step, whose responses are still to be scored, and then its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _scorer = Scorer(weights, length_optimum, config)


def _leave_with_parent() -> None:
    """End where the parent was killed: it didn't say so, and who waits for work would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(
    problem: Problem, text: str, offsets: np.ndarray | None, truncated: bool, forced: np.ndarray | None
) -> tuple[Trace, Scorecard]:
    assert _scorer is not None
    return _score(_scorer, problem, text, offsets, truncated, forced)
