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
