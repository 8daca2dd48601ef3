"""The first host keeps the service by which all hosts know each other; its end too is known in bounded time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_hosts import announce

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
    hosts = [
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
        assert all(host.stdout is not None and host.stdout.readline() == "watched\n" for host in hosts)
        time.sleep(5)  # so that both have heard of each other
        hosts[0].send_signal(end)
        began = time.monotonic()
        _, stderr = hosts[1].communicate(timeout=60)
        assert hosts[1].returncode == code and said in stderr, stderr[-3000:]
        assert time.monotonic() - began < 30  # JAX's own limit is 60
    finally:
        for host in hosts:
            host.kill()
            host.communicate()
