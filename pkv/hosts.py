"""Several hosts as one run: they find each other, agree before they compute, and hear when one of them is gone.

Each host samples and scores its own share of the problems on its own devices; the update is one program on the devices
of all. What goes between hosts beside it is numbers about rollouts, never what they say. A host is a process of JAX,
usually a machine. With one host everything here is immediate.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np

from pkv.config import UnavailableError, UserError

Item = TypeVar("Item")

BEAT_S = 2.0
SILENT_S = 30.0  # a host that says nothing for so long is taken for dead
HEARTBEAT_S = 60  # JAX's own, which ends a process that hears nothing of the first host
JOIN_S = 300
_RUNS: list[int] = []  # that this process has watched over
# For machines that JAX doesn't recognise by itself; of the names, JAX reads the first.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_ALL = ", ".join(VARIABLES)
_AGAIN = "start the same command on all at the same time, or set JAX_NUM_PROCESSES=1 to train on this one alone"


class StoppedTogetherError(KeyboardInterrupt):
    """All hosts leave at the same place, as one of them was asked to."""


def join() -> None:
    """Join the other hosts of the run, where there are some; before any computation.

    They are found by JAX on Cloud TPU, GKE, Slurm and Open MPI, elsewhere by VARIABLES; with JAX_NUM_PROCESSES=1 none
    are looked for. Raises UserError; ends the process where they are not found within JOIN_S.
    """
    count = os.environ.get("JAX_NUM_PROCESSES")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS"))  # of srun; of the whole allocation
    if "1" not in (count, tasks, os.environ.get("OMPI_COMM_WORLD_SIZE")) and not jax.distributed.is_initialized():
        late = threading.Timer(JOIN_S, _give_up)
        late.daemon = True
        late.start()
        try:
            _find_others()
        finally:
            late.cancel()
    if (count := jax.process_count()) > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"JAX counts {count} processes, which nothing has joined; give each {_ALL} with their true number"
        )


def _find_others() -> None:
    address, count, number = map(os.environ.get, VARIABLES)
    named = " ".join(name for name in VARIABLES if name in os.environ)
    if address and ":" not in address:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS: got {address!r}, expected a host and a free port, as in 10.0.0.1:1234"
        )
    # Its handler takes SIGTERM for a word to a service that pkv has no use for: a run that loads would not end.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            int(count) if count else None,
            int(number) if number else None,
            initialization_timeout=2 * JOIN_S,  # it ends by an abort in C++, so it never gets there
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except ValueError as error:
        nobody_else = "coordinator_address should be defined" in str(error)
        if named or not nobody_else:
            told = named or "the variables of the launcher"
            raise UserError(f"{told}: {_first_line(error)}; give all of {_ALL}") from error
    except OSError as error:  # a TPU without the service that tells machines of each other
        if named:
            raise UnavailableError(f"{named}: {_first_line(error)}") from error
    except Exception as error:
        if "before any JAX calls" not in str(error):
            raise UnavailableError(f"the hosts did not find each other: {_first_line(error)}; {_AGAIN}") from error
        if named or jax.process_count() > 1:  # in a notebook that has computed already it is alone
            raise UserError(f"the hosts cannot find each other: {_first_line(error)}") from error


def _give_up() -> None:
    """Say that others are missing, before JAX does so by an abort."""
    address = _state().coordinator_address
    _end(f"the hosts did not find each other{f' at {address}' if address else ''} within {JOIN_S} s; {_AGAIN}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def leads() -> bool:
    """Whether this host writes what there is once."""
    return jax.process_index() == 0


def share(items: Sequence[Item]) -> list[Item]:
    """This host's part of what all hosts do together, in turn."""
    return list(items[jax.process_index() :: jax.process_count()])


def gather(value: Any) -> list[Any]:
    """What every host says, in their order; plain JSON. All hosts must call this at the same place."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    said = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = process_allgather(np.array([len(said)], np.int32)).reshape(-1)
    room = 1 << int(max(sizes) - 1).bit_length()  # few sizes, so that few programs are compiled
    padded = np.zeros(room, np.uint8)
    padded[: len(said)] = said
    heard = np.asarray(process_allgather(padded)).reshape(len(sizes), room)
    return [json.loads(bytes(row[:size])) for row, size in zip(heard, sizes, strict=True)]


def together(items: Sequence[Item]) -> list[Item]:
    """The items of all hosts, one host's after the other's."""
    return [item for items in gather(list(items)) for item in items]


def compare(facts: Mapping[str, Any]) -> None:
    """Raise UserError where a host's facts differ from the first one's: before the first computation of all.

    Computations that differ do not fail, they wait for each other; so this goes by the service that JAX keeps for its
    processes.
    """
    if jax.process_count() == 1:
        return
    client = _client()
    _say(client, "facts", json.dumps(facts, sort_keys=True))
    first: dict[str, Any] = {}
    for number in range(jax.process_count()):
        try:
            theirs = json.loads(client.blocking_key_value_get(f"{_place()}facts/{number}", JOIN_S * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise UnavailableError(
                f"host {number} did not say what it runs within {JOIN_S} s: look at its output"
            ) from error
        first = first or theirs
        for name in [*first, *theirs]:
            if first.get(name) != theirs.get(name):
                raise UserError(
                    f"hosts differ in {name}: {first.get(name)} on host 0, {theirs.get(name)} on host {number}; ship "
                    "the same commit, lock file and config to all (launch/ does)"
                )


@contextmanager
def watched() -> Iterator[None]:
    """While the block runs, the end of another host ends this one within SILENT_S, saying which one and why.

    A host whose block fails tells the others. One that leaves without a word is known by its silence. The first host
    keeps the service that all go by: when its process dies while its machine lives, JAX ends the others at once by an
    abort, in words of its own, before anything here could speak.
    """
    if jax.process_count() == 1:
        yield
        return
    _RUNS.append(len(_RUNS))
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(_client(), done), daemon=True)
    watch.start()
    try:
        yield
    except StoppedTogetherError:
        gather("stopped")
        raise
    except BaseException as error:
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if isinstance(error, jax.errors.JaxRuntimeError):  # perhaps because another host is gone: wait for the verdict
            time.sleep(SILENT_S + 2 * BEAT_S)
        done.set()  # what the others say by now, they say of the same
        _say(_client(), "end", what.splitlines()[0][:500])
        time.sleep(2 * BEAT_S)  # the others have heard before the service may go
        raise
    else:
        gather("done")  # nobody leaves before all are through
    finally:
        done.set()


def _watch(client: Any, done: threading.Event) -> None:
    """Say that this host lives, and end it when another one doesn't. Runs beside the block, in a thread."""
    me, count, beats = jax.process_index(), jax.process_count(), 0
    heard = dict.fromkeys(range(count), ("", time.monotonic()))
    while not done.wait(BEAT_S):
        try:
            if beats:  # of these questions the only one with a limit; its answer is known
                client.blocking_key_value_get(f"{_place()}beat/{me}", round(1000 * SILENT_S))
            _say(client, "beat", str(beats + 1))
            beats += 1
            said = {key.removeprefix(_place()): text for key, text in client.key_value_dir_get(_place())}
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error) and not done.is_set():
                _leave(_silent(0))
            continue  # the first host's process is gone, of which JAX tells
        now = time.monotonic()
        for number in range(count):
            if number == me:
                continue
            if (reason := said.get(f"end/{number}")) is not None and not done.is_set():
                _leave(f"host {number} ended: {reason}")
            if heard[number][0] != (beat := said.get(f"beat/{number}", "")):
                heard[number] = beat, now
            elif now - heard[number][1] > SILENT_S and not done.is_set():
                _leave(_silent(number))


def _silent(number: int) -> str:
    return f"nothing was heard of host {number} for {SILENT_S:.0f} s: it is gone, or its network is"


def _say(client: Any, what: str, text: str) -> None:
    client.key_value_set(f"{_place()}{what}/{jax.process_index()}", text, allow_overwrite=True)


def _place() -> str:
    """Where the hosts of this run leave word: another run of the same processes has another place."""
    return f"pkv/{len(_RUNS)}/"


def _leave(why: str) -> None:
    hint = "the same command on all hosts resumes at the last checkpoint"
    _end(f"{why}; host {jax.process_index()} ({socket.gethostname()}) stops; {hint}")


def _end(why: str) -> None:
    """End the process from a thread, whatever its other threads wait for."""
    print(f"pkv: {why}", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():  # or what scores would live on, and hold the terminal
        child.kill()
    os._exit(1)


def _client() -> Any:
    return _state().client


def _state() -> Any:
    """What JAX's processes know each other by. It has no public name; Orbax uses it as well."""
    from jax._src import distributed

    return distributed.global_state
