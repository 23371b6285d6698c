"""Locks on names: between threads, between open files, between processes, and after a process was killed."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from csi_quobyte.errors import Busy
from csi_quobyte.pool import locks as locks_module
from csi_quobyte.pool.locks import Locks

HOLD = """
import sys
from csi_quobyte.pool.locks import Locks
with Locks(sys.argv[1]).hold(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "lock").touch()
    return str(tmp_path / "lock")


def test_name_is_held_once_and_free_after_the_block(path: str) -> None:
    locks = Locks(path)
    with locks.hold("a"):
        with pytest.raises(Busy), locks.hold("a"):
            pass
        with locks.hold("b"):
            pass
    with locks.hold("a"):
        pass


def test_name_is_free_after_an_exception_in_the_block(path: str) -> None:
    locks = Locks(path)
    with pytest.raises(ValueError, match="inside"), locks.hold("a"):
        raise ValueError("inside")
    with locks.hold("a"):
        pass


def test_refused_attempt_does_not_free_the_holder(path: str) -> None:
    holder, other = Locks(path), Locks(path)
    with holder.hold("a"):
        for locks in (other, holder, other):
            with pytest.raises(Busy), locks.hold("a"):
                pass
    with other.hold("a"):
        pass


def test_name_is_free_after_the_block_though_a_child_that_is_being_started_has_the_file_open(path: str) -> None:
    locks = Locks(path)
    with locks.hold("a"):
        child = os.fork()
        if child == 0:  # as a command between fork and exec, which other threads start at any moment
            signal.pause()
    try:
        with Locks(path).hold("a"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_one_of_many_threads_holds_a_name(path: str) -> None:
    locks, start, end = Locks(path), threading.Barrier(16), threading.Barrier(16)
    held: list[bool] = []

    def attempt() -> None:
        start.wait(10)
        try:
            with locks.hold("a"):
                held.append(True)
                end.wait(10)
        except Busy:
            held.append(False)
            end.wait(10)

    threads = [threading.Thread(target=attempt) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(held) == [False] * 15 + [True]


def test_other_process_holds_a_name_until_it_is_killed(path: str) -> None:
    package = str(Path(locks_module.__file__).parents[2])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path, "a"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": package},
    )
    locks = Locks(path)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Busy, match="another process"), locks.hold("a"):
            pass
        with locks.hold("b"):
            pass
    finally:
        holder.kill()
        holder.communicate(timeout=10)
    with locks.hold("a"):
        pass
