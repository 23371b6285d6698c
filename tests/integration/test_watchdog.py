"""The watchdog of a child: who is not fed is killed, also when this process is stopped as a whole."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from csi_quobyte.errors import Unavailable
from csi_quobyte.host import command, watchdog

SLEEP = ["sleep", "60"]
LIMIT_S = 1.0


def test_child_that_is_not_fed_is_killed() -> None:
    with command.tied(SLEEP) as child, watchdog.watching(child.pid, LIMIT_S):
        assert child.wait(LIMIT_S / 2) is None
        assert child.wait(10) == 137


def test_child_that_is_fed_lives() -> None:
    with command.tied(SLEEP) as child, watchdog.watching(child.pid, LIMIT_S) as watched:
        until = time.monotonic() + 3 * LIMIT_S
        while time.monotonic() < until:
            watched.feed()
            assert child.wait(LIMIT_S / 10) is None
        assert child.wait(10) == 137


def test_end_of_the_child_is_the_end_of_its_watcher() -> None:
    with command.tied(SLEEP) as child, watchdog.watching(child.pid, 60) as watched:
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        until = time.monotonic() + 10
        with pytest.raises(Unavailable, match="watchdog"):
            while time.monotonic() < until:
                watched.feed()
                time.sleep(0.01)


_FEEDING = """
import time
from csi_quobyte.host import command, watchdog
with command.tied(["sleep", "60"]) as child, watchdog.watching(child.pid, 1.0) as watched:
    print(child.pid, flush=True)
    while True:
        watched.feed()
        time.sleep(0.05)
"""


def test_child_dies_while_its_parent_is_stopped() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _FEEDING],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    try:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(2)
        assert child.status() != psutil.STATUS_ZOMBIE
        parent.send_signal(signal.SIGSTOP)
        until = time.monotonic() + 10
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:  # the stopped parent does not reap it
            assert time.monotonic() < until, "the child outlives its stopped parent's word"
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait(10)
        if parent.stdout:
            parent.stdout.close()
