#!/usr/bin/env python3
"""Runs one part of the tests so that nothing of it stays behind, however it ends.

Owns a run directory, given to the part as TMPDIR and, as the mark of everything it starts, as CSI_QUOBYTE_RUN in its
environment. Both are inherited, by daemons in sessions of their own too. So at the end, what belongs to the run can be
told from everything else on the machine: the processes with the mark, the mounts below the directory, the loop devices
on files in it, and the driver's new loop devices whose storage daemon is gone.

Always holds: what belongs to another run is not touched. A run whose keeper was itself killed (its lock on the owner
file is free) is cleared by the next one. A part that succeeds but leaves something behind has failed.

Needs only the standard library, so that it works whatever state the driver's own code is in.
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

MARK = "CSI_QUOBYTE_RUN"
LOOP_TAG = int.from_bytes(b"cq")  # the top two bytes of `sizelimit`, by which the driver finds its loop devices
OWNER = ".csi-quobyte-run"
PREFIX = "cqt-"  # short: sockets live below, and a socket's path has at most 107 bytes

LOOP_GET_STATUS64 = 0x4C05
LOOP_INFO64_BYTES = 232
MNT_DETACH = 2

SETTLE_S = 5  # daemons that were told to stop may still be writing their last bytes
TERM_S = 10  # as long as a storage daemon may take to flush
KILL_S = 5
SERVER_S = 2  # longer than the kernel keeps what a FUSE server said of a file
INTERRUPT_S = 20  # time for a test runner to undo what it did, after Ctrl-C
UMOUNT_S = 10


class Interrupted(Exception):
    """A signal asked this run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True)
class Mount:
    """One line of the mount table."""

    target: str
    source: str
    fstype: str


@dataclass(frozen=True)
class Loop:
    """A bound loop device; the kernel shortens `backing` when the mount that it was below is gone."""

    device: str
    backing: str
    has_tag: bool


def is_of(run: Path, pid: int) -> bool:
    """Say whether a process runs and carries the mark of `run`."""
    try:
        environment = (Path("/proc") / str(pid) / "environ").read_bytes()
    except OSError:  # ended while we looked
        return False
    return f"{MARK}={run}".encode() in environment.split(b"\0")


def processes_of(run: Path) -> Iterator[int]:
    """Yield the pids of the running processes that carry the mark of `run`."""
    pids = (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
    return (pid for pid in pids if is_of(run, pid))


def describe(pid: int) -> str:
    """Say which process this is, for a message."""
    try:
        command = (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return f"process {pid}"
    return f"process {pid}: {command.strip()[:160]}"


def send(run: Path, pid: int, number: int) -> None:
    """Send a signal to a process of `run`, and to none that got its number after it ended."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if is_of(run, pid):
            signal.pidfd_send_signal(handle, number)
            signal.pidfd_send_signal(handle, signal.SIGCONT)  # a stopped one does not end before it goes on
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


def decode_mount_path(text: str) -> str:
    """Undo the octal escapes of /proc/self/mountinfo (proc(5))."""
    octal = text.encode(errors="surrogateescape").decode("unicode_escape")
    return octal.encode("latin-1").decode(errors="surrogateescape")


def mount_table() -> list[Mount]:
    """Return the mounts of this namespace, those below others after them."""
    table = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        fstype, source = fields[fields.index("-") + 1 :][:2]
        table.append(Mount(decode_mount_path(fields[4]), decode_mount_path(source), fstype))
    return table


def mounts_of(run: Path, devices: frozenset[str]) -> list[Mount]:
    """Return the mounts below `run` and those of the given devices."""
    return [mount for mount in mount_table() if Path(mount.target).is_relative_to(run) or mount.source in devices]


def has_no_server(device: str) -> bool:
    """Say whether the file of a loop device lies on a FUSE file system whose server is gone.

    Asking for the device's status makes the kernel ask the server for the file's attributes: ENOTCONN is the sign, but
    only once the kernel forgot what it knew (after a second). A server that hangs hangs the call: no answer means no.
    """
    answer: list[bool] = []

    def ask() -> bool:
        try:
            handle = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(handle, LOOP_GET_STATUS64, bytes(LOOP_INFO64_BYTES))
            finally:
                os.close(handle)
        except OSError as error:
            return error.errno == errno.ENOTCONN
        return False

    asking = threading.Thread(target=lambda: answer.append(wait_until(ask, SERVER_S)), daemon=True)
    asking.start()
    asking.join(SERVER_S + 1)
    return any(answer)


def loops() -> list[Loop]:
    """Return every bound loop device of the machine, by what sysfs says: that never waits for a backing file."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop"):
        with contextlib.suppress(OSError):  # not bound
            backing = (entry / "backing_file").read_text().rstrip("\n")
            has_tag = int((entry / "sizelimit").read_text()) >> 48 == LOOP_TAG
            found.append(Loop(f"/dev/{entry.parent.name}", backing, has_tag))
    return found


def loops_of(run: Path, before: frozenset[str] | None) -> list[Loop]:
    """Return the loop devices of `run`: on its files, or lost by it and not in `before` (None: not known).

    A lost one is the driver's, and its file was served by a daemon that is gone, with its mount: for such a file the
    kernel has no path but what was below the mount. One whose daemon lives belongs to somebody, if only in another
    mount namespace. Those of two runs at once cannot be told apart, but a lost device serves nobody any more.
    """

    def is_lost(loop: Loop) -> bool:
        if before is None or loop.device in before or not loop.has_tag:
            return False
        is_served = any(Path(loop.backing).is_relative_to(target) for target in served)
        return not is_served and has_no_server(loop.device)

    served = [mount.target for mount in mount_table() if mount.fstype.startswith("fuse")]
    return [loop for loop in loops() if Path(loop.backing).is_relative_to(run) or is_lost(loop)]


def left_behind(run: Path, before: frozenset[str] | None) -> list[str]:
    """Name everything of `run` that still is on the machine."""
    bound = loops_of(run, before)
    return [
        *(describe(pid) for pid in processes_of(run)),
        *(f"mount {mount.target}" for mount in mounts_of(run, frozenset(loop.device for loop in bound))),
        *(f"loop device {loop.device} on {loop.backing}" for loop in bound),
    ]


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for `condition`; say whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def end_processes(run: Path) -> None:
    """End every process of `run`: asked first, so that storage daemons flush, then killed."""
    for number, timeout_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, KILL_S)):
        for pid in list(processes_of(run)):
            send(run, pid, number)
        if wait_until(lambda: not any(processes_of(run)), timeout_s):
            return


def command(*argv: str) -> bool:
    """Run a clearing command, at most UMOUNT_S; say whether it succeeded. What it could not do is reported later."""
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=UMOUNT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def unmount(targets: list[str]) -> None:
    """Unmount, the last made first; what stays is detached, the first made first, with all below it."""
    for target in reversed(targets):
        command("umount", "--", target)
    libc = ctypes.CDLL(None, use_errno=True)
    for target in targets:
        # The result is not asked: the mount table is, at the end.
        libc.umount2(os.fsencode(target), MNT_DETACH)


def clear(run: Path, before: frozenset[str] | None) -> list[str]:
    """Remove everything of `run` from the machine, and name what could not be removed.

    Processes go first: then no mount has a server that may hang, and what is mounted is idle or dead. Loop devices are
    looked for before their mounts go, while the paths of their files still tell whose they are.
    """
    end_processes(run)
    bound = loops_of(run, before)
    unmount([mount.target for mount in mounts_of(run, frozenset(loop.device for loop in bound))])
    for loop in bound:
        command("losetup", "--detach", loop.device)
    wait_until(lambda: not loops_of(run, before), KILL_S)
    rest = left_behind(run, before)
    if not rest:
        try:
            shutil.rmtree(run)
        except OSError as error:
            rest.append(str(error))
    return rest


def claim(run: Path) -> TextIO:
    """Mark `run` as owned by this process for as long as the returned file is open.

    The lock is taken before the file gets its name: nobody ever finds an owner file of a live run unlocked.
    """
    draft = run / f"{OWNER}.new"
    owner = draft.open("w")
    fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    draft.rename(run / OWNER)
    return owner


def clear_abandoned(parent: Path) -> None:
    """Clear the runs below `parent` whose keeper is gone (killed, or the machine was restarted)."""
    for path in parent.glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError), path.open() as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its keeper lives
            print(f"clearing an abandoned run: {path.parent}", flush=True)
            for name in clear(path.parent, before=None):
                print(f"  cannot be removed: {name}", flush=True)


def on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Set what the signals do that ask for an end; one that was ignored from the start (nohup) stays so."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def interrupt(number: int, _frame: FrameType | None) -> None:
    """Signal handler: leave the wait for the part."""
    raise Interrupted(number)


def end_part(part: subprocess.Popen[bytes], number: int) -> None:
    """End an interrupted part, giving it time to undo what it did."""
    if number == signal.SIGINT:  # a terminal has sent it to the part too
        with contextlib.suppress(subprocess.TimeoutExpired):
            part.wait(INTERRUPT_S)
    for last in (signal.SIGTERM, signal.SIGKILL):
        if part.poll() is None:
            part.send_signal(last)
            with contextlib.suppress(subprocess.TimeoutExpired):
                part.wait(TERM_S)


def run_part(argv: list[str], run: Path, timeout_s: float) -> tuple[int, str]:
    """Run the part to its end; return its exit status (as a shell has it) and, if it did not end itself, why not."""
    environment = {**os.environ, MARK: str(run), "TMPDIR": str(run)}
    part = None
    try:
        on_signals(interrupt)
        part = subprocess.Popen(argv, env=environment)
        status = part.wait(timeout_s)
    except subprocess.TimeoutExpired:
        number, status, reason = int(signal.SIGTERM), 124, f"not ended after {timeout_s:.0f} s"
    except OSError as error:
        return 127, str(error)
    except Interrupted as error:
        number, status, reason = error.number, 128 + error.number, f"interrupted by {error}"
    else:
        return (status if status >= 0 else 128 - status), ""
    finally:
        on_signals(signal.SIG_IGN)  # from here on nothing may interrupt the clearing
    if part is not None:
        end_part(part, number)
    return status, reason


def report(name: str, status: int, reason: str, seconds: float) -> None:
    """Print the closing line of the part."""
    verdict = "passed" if status == 0 else f"FAILED, {reason or f'exit status {status}'}"
    print(f"== {name}: {verdict} ({seconds:.1f} s)", flush=True)


def contained(name: str, argv: list[str], timeout_s: float) -> int:
    """Run the part in a run directory of its own, clear up after it and return its exit status.

    A part that succeeded but left a process, mount or loop device behind gets status 1.
    """
    parent = Path(tempfile.gettempdir()).resolve()
    clear_abandoned(parent)
    start = time.monotonic()
    print(f"== {name}", flush=True)
    before = frozenset(loop.device for loop in loops())
    run = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    run.chmod(0o711)  # tests that give up being root must be able to pass through
    with claim(run):
        status, reason = run_part(argv, run, timeout_s)
        if status == 0 and not wait_until(lambda: not left_behind(run, before), SETTLE_S):
            status, reason = 1, "it left something behind"
            for thing in left_behind(run, before):
                print(f"left behind: {thing}", flush=True)
        for thing in clear(run, before):
            status, reason = status or 1, reason or "it could not be cleared"
            print(f"cannot be removed: {thing}", flush=True)
    report(name, status, reason, time.monotonic() - start)
    return status


def main() -> int:
    """Read the arguments and run the part."""
    parser = argparse.ArgumentParser(description="Run one part of the tests and leave nothing of it behind.")
    parser.add_argument("--timeout-s", type=float, default=900, help="end the part after so many seconds (%(default)s)")
    parser.add_argument("name", help="shown with the result")
    parser.add_argument("command", nargs="+", help="after --, the command and its arguments")
    arguments = parser.parse_args()
    return contained(arguments.name, arguments.command, arguments.timeout_s)


if __name__ == "__main__":
    sys.exit(main())
