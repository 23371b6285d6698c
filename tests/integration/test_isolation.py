"""Commands start although another thread of the process has a file open on a FUSE mount that hangs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.machine import StandIn

_PROGRAM = """
import os, sys, threading, time
from csi_quobyte.host import command
if sys.argv[2] == "isolated":
    command.isolate()
fd = os.open(sys.argv[1], os.O_RDWR)
print("open", flush=True)
sys.stdin.readline()
started = time.monotonic()
done = command.run(["echo", "said"], timeout_s=5)
print(done.stdout.strip(), time.monotonic() - started < 2, flush=True)
os._exit(0)
"""


@pytest.mark.root
@pytest.mark.parametrize("how", ["isolated", "plain"])
def test_a_command_starts_while_an_open_file_hangs(tmp_path: Path, how: str) -> None:
    standin = StandIn(tmp_path / "dir", tmp_path / "mnt")
    try:
        (tmp_path / "dir/file").write_text("x")
        program = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(tmp_path / "mnt/file"), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        assert program.stdin and program.stdout
        try:
            assert program.stdout.readline() == "open\n"
            standin.hang()
            program.stdin.write("go\n")
            program.stdin.flush()
            if how == "isolated":
                assert program.stdout.readline() == "said True\n"
            else:
                # what isolate() is for: if this passes one day, the kernel has changed and it can go
                with pytest.raises(subprocess.TimeoutExpired):
                    program.wait(3)
        finally:
            standin.resume()
            program.kill()
            program.wait(10)
            program.stdin.close()
            program.stdout.close()
    finally:
        standin.unmount()


_CROWD = """
import sys, threading, time
from csi_quobyte.errors import Unavailable
from csi_quobyte.host import command
command.isolate()
command._TURN_S = 0.5
sleepers = [
    threading.Thread(target=command.run, args=(["sleep", "4"],), kwargs={"timeout_s": 20})
    for _ in range(command._ISOLATED_THREADS)
]
for sleeper in sleepers:
    sleeper.start()
time.sleep(1)
started = time.monotonic()
for _ in range(2):
    for begin in (lambda: command.run(["echo", "early"], timeout_s=5), lambda: command._isolated_start([1], print)):
        try:
            begin()
        except Unavailable as error:
            print("commands are running already" in str(error), flush=True)
print(time.monotonic() - started < 2.9, flush=True)
for sleeper in sleepers:
    sleeper.join()
print(command._isolated_start([1], lambda fds: len(fds)), command.run(["echo", "late"], timeout_s=5).stdout.strip())
"""


def test_a_command_that_gets_no_thread_is_given_up_and_leaves_nothing() -> None:
    said = subprocess.run(
        [sys.executable, "-c", _CROWD],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert said.stdout.split() == ["True"] * 5 + ["1", "late"], said.stderr
