"""The first host keeps the service by which all hosts know each other; its end too is known in bounded time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from test_hosts import announce

from pkv import hosts

WATCHING = """
import time
from pkv import hosts
hosts.SILENT_S = 5
hosts.join()
with hosts.watched():
    print("watched", flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        # Its machine takes part in nothing any more: nobody answers, and no connection ends.
        (signal.SIGSTOP, 1, "pkv: nothing was heard of host 0 for 5 s: it is gone, or its network is; host 1 ("),
        # Its process is gone, and its machine says so: JAX aborts in that moment, before pkv could say anything.
        (signal.SIGKILL, -signal.SIGABRT, "Either the leader task was preempted/died"),
    ],
    ids=("the machine", "the process"),
)
def test_the_first_hosts_end_ends_the_others_and_they_say_why(end, code, said):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WATCHING],
            env=os.environ | told,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for told in announce(2)
    ]
    try:
        assert all(host.stdout is not None and host.stdout.readline() == "watched\n" for host in running)
        time.sleep(5)  # so that both have heard of each other
        running[0].send_signal(end)
        began = time.monotonic()
        _, stderr = running[1].communicate(timeout=60)
        assert running[1].returncode == code and said in stderr, stderr[-3000:]
        assert time.monotonic() - began < 30  # JAX's own limit is 60
    finally:
        for host in running:
            host.kill()
            host.communicate()


def test_a_first_beat_that_fails_is_said_again(monkeypatch):
    """Its missing key would look like a first host that answers nothing."""
    said, trouble, done, ends = {}, [jax.errors.JaxRuntimeError("UNAVAILABLE: for a moment")], threading.Event(), []

    def set_value(key, text, allow_overwrite):
        if trouble:
            raise trouble.pop()
        said[key] = text
        if text == "3":
            done.set()

    def get_value(key, milliseconds):
        if key not in said:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")

    client = SimpleNamespace(
        key_value_set=set_value, blocking_key_value_get=get_value, key_value_dir_get=lambda _: list(said.items())
    )
    monkeypatch.setattr(hosts, "BEAT_S", 0.01)
    monkeypatch.setattr(hosts, "_leave", lambda why: (ends.append(why), done.set()))
    hosts._watch(client, done)
    assert list(said.values()) == ["3"] and not ends
