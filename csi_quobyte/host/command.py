"""Run the machine's commands: the only module of the driver that starts a process.

Owns: the environment of every child, its time and resource limits, the kill of its process group, the supervision
of daemons that outlive us, the end of children that must not, and the guard against pids that were used again.
Hides: pipes, pidfds, sessions, `prlimit`, /proc.

What always holds:
- A command is a list of arguments, never text for a shell, and nothing secret is ever an argument or an environment
  variable: both are readable by every process of the machine, and both may appear in an error message.
- A call returns within its time limit plus about a second, also when the child hangs in the kernel (state D).
- Children run in their own session, with cwd "/", LC_ALL=C and PATH (and what limits need) as their whole
  environment; paths in an argument list must therefore be absolute.
- No zombie is left while this process lives.
- A child of `run` may go on when this process is killed; one of `spawn_detached` does, one of `tied` cannot.
- After `isolate`, starting a command never touches a file that other threads have open. Without it, a child closes its
  copies of all of them before it executes anything, and closing a file of a hung FUSE mount waits for that mount: one
  hung pool would keep every command from starting (measured; the parent waits in vfork, beyond any time limit).

A detached process and its supervisor:

    this process ── sh (supervisor) ── daemon          the supervisor waits for the daemon and then writes
         ╎             │                   │           "pid start exit-status" to the status file
         ╎ may die     │ ignores TERM,     │
         ╎             │ INT and HUP       └─ pid file: "pid start supervisor-pid supervisor-start"
"""

import contextlib
import contextvars
import ctypes
import errno
import logging
import os
import select
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from csi_quobyte.errors import Unavailable

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

MAX_OUTPUT_BYTES = 8 * 1024 * 1024
_READ_BYTES = 64 * 1024
_STDERR_TAIL_CHARS = 2000
_SHOWN_ARGV_CHARS = 300
_KILLED_STATUS = 128 + signal.SIGKILL
_NOT_STARTED_STATUS = 125  # as the supervisor's script says it
_NOT_FOUND_STATUS = 127  # as shells say it
_AFTER_KILL_S = 1.0  # a killed child that needs longer is stuck in the kernel; waiting on gains nothing
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The text is constant: everything that varies arrives as a positional parameter and is only ever used as "$…", so
# nothing is interpolated. It is a shell because a shell is the smallest supervisor there is (dash: about 1 MiB), and
# an interpreter of our own would cost ten times as much for each volume.
# `trap :` and not `trap ''`: an ignored signal would stay ignored in the daemon after exec, a caught one does not.
# The daemon runs in the foreground of the supervisor, because a shell sets SIGINT to "ignore" for background jobs.
# A pid file that is there is never replaced: a process that was killed in the middle of a start has left a supervisor
# that goes on, and of its daemon and that of the next start only one may live, the one that the file names.
# The inner shell becomes the daemon by exec, so its own pid is the daemon's, known before the daemon runs.
_SUPERVISOR = r"""
trap : TERM INT HUP
start_time() { read -r line < "/proc/$1/stat" && set -- ${line##*) } && shift 19 && printf %s "$1"; }
pid_path=$1 status_path=$2 inner=$3
shift 3
start=$(start_time $$) || exit 125
sh -c "$inner" sh "$pid_path" $$ "$start" "$@"
status=$?
printf '%s %s %s\n' $$ "$start" $status > "$status_path.tmp" && mv -f -- "$status_path.tmp" "$status_path"
exit $status
"""
_BECOME_DAEMON = r"""
start_time() { read -r line < "/proc/$1/stat" && set -- ${line##*) } && shift 19 && printf %s "$1"; }
start=$(start_time $$) || exit 125
identity="$$ $start $2 $3"
printf '%s\n' "$identity" > "$1.$$" && ln -- "$1.$$" "$1"
linked=$?
rm -f -- "$1.$$"
[ $linked = 0 ] || exit 125
printf '%s\n' "$identity"
shift 3
exec "$@" >&2
"""

# PR_SET_PDEATHSIG, which setpriv(1) has set before this runs, says nothing about a parent that died before that.
_TIED = '[ "$PPID" = "$1" ] || exit 125; shift; exec "$@"'

_SYS_CLOSE_RANGE = 436  # the same on every architecture
_CLOSE_RANGE_UNSHARE = 2  # linux/close_range.h
_ISOLATED_THREADS = 64  # four times what one pool can keep busy
_TURN_S = 30.0  # so long a command waits for one of them


@dataclass(frozen=True)
class _Isolation:
    """Threads with file descriptor tables of their own, and a way to give them descriptors of ours."""

    executor: ThreadPoolExecutor
    here: socket.socket
    there: socket.socket
    """The two ends of one connection; open in all tables, because they are older than these."""
    sending: threading.Lock
    """Held from sending descriptors until they are received, so that nobody receives another's."""


# The one mutable thing here: a property of the whole process, set once at its start.
_isolated: _Isolation | None = None


@dataclass(frozen=True)
class Limits:
    """Resource limits of a child; None leaves a limit as this process has it."""

    address_space_bytes: int | None
    """RLIMIT_AS: an allocation beyond it fails."""
    cpu_s: int | None
    """RLIMIT_CPU: SIGXCPU (status 152) at the limit, SIGKILL a second later."""


QEMU_IMG_LIMITS = Limits(address_space_bytes=1 << 30, cpu_s=60)


@dataclass(frozen=True)
class Completed:
    """The outcome of a command whose status was one that the caller accepts."""

    status: int
    """Exit status; 128 + n if signal n ended it, as shells count."""
    stdout: str
    stderr: str


@dataclass(frozen=True)
class ProcessIdentity:
    """One process for as long as the machine runs: a pid alone may have been used again."""

    pid: int
    start_time_ticks: int
    """Clock ticks between boot and the start of the process (proc(5), field 22 of /proc/PID/stat)."""


@dataclass(frozen=True)
class Detached:
    """A process started by `spawn_detached`, and the supervisor that records its exit status."""

    process: ProcessIdentity
    supervisor: ProcessIdentity


class CommandFailed(Unavailable):
    """A command could not be started, or ended with a status that its caller did not expect."""

    def __init__(self, argv: Sequence[str], status: int, stderr: str, reason: str | None = None) -> None:
        """Build the message from the command and `reason`, or its status and the last line of its stderr."""
        self.argv = tuple(argv)
        self.status = status
        self.stderr = stderr[-_STDERR_TAIL_CHARS:]
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        said = f": {lines[-1].strip()}" if lines else ""
        shown = shlex.join(self.argv)
        if len(shown) > _SHOWN_ARGV_CHARS:
            shown = shown[:_SHOWN_ARGV_CHARS] + "…"
        super().__init__(f"{shown}: {reason or f'failed with status {status}'}{said}")


class CommandTimedOut(CommandFailed):
    """A command was killed at its time limit; what it did until then is unknown."""


def isolate() -> None:
    """Run all commands from now on from threads that have file descriptor tables of their own.

    Call it once, first thing in a process that serves: what is open at this moment is in those tables for ever, what is
    opened later never. Descriptors of a command are made and closed on one such thread.

    Raises:
        OSError: the kernel is older than 5.9.
    """
    global _isolated
    if _isolated is not None:
        return
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # All threads now: one that is started later would copy the table as it is then.
    started = threading.Barrier(_ISOLATED_THREADS + 1)
    executor = ThreadPoolExecutor(_ISOLATED_THREADS, thread_name_prefix="command")
    futures = [executor.submit(_own_file_table, started) for _ in range(_ISOLATED_THREADS)]
    started.wait()
    for future in futures:
        future.result()
    _isolated = _Isolation(executor, here, there, threading.Lock())


def _own_file_table(started: threading.Barrier) -> None:
    started.wait()  # no thread ends, and so none does this twice, before all have begun
    # close_range(2) of no descriptor at all, for its flag. Not unshare(2): containers' default seccomp profiles allow
    # that to privileged processes only.
    libc = ctypes.CDLL(None, use_errno=True)
    none = ctypes.c_uint(0xFFFFFFFF)
    if libc.syscall(_SYS_CLOSE_RANGE, none, none, ctypes.c_uint(_CLOSE_RANGE_UNSHARE)):
        error = ctypes.get_errno()
        raise OSError(error, f"close_range: {os.strerror(error)}")


def _isolated_call(work: Callable[[], _T]) -> _T:
    """Do `work` on a thread with its own file table, if there are such; a command's time limit bounds it.

    Raises:
        Unavailable: all these threads have had other commands for too long.
    """
    if _isolated is None:
        return work()
    return _in_turn(_isolated.executor, work)


def _in_turn(executor: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
    """Do `work` on a thread of these, or give it up when none has begun with it in time: each may be busy for hours."""
    future = executor.submit(contextvars.copy_context().run, work)
    wait_for_futures([future], timeout=_TURN_S)
    if future.cancel():
        raise _no_turn()
    return future.result()


def _no_turn() -> Unavailable:
    return Unavailable(f"{_ISOLATED_THREADS} commands are running already, for more than {_TURN_S:g} s")


def _isolated_start(fds: Sequence[int], start: Callable[[Sequence[int]], _T]) -> _T:
    """Start a process on a thread with its own file table, if there are such, where `fds` may have other numbers."""
    if _isolated is None:
        return start(fds)
    isolation = _isolated

    def receive_and_start() -> _T:
        _, received, _, _ = socket.recv_fds(isolation.there, 1, len(fds))
        try:
            return start(received)
        finally:
            for fd in received:
                os.close(fd)

    if not isolation.sending.acquire(timeout=_TURN_S):
        raise _no_turn()
    try:
        socket.send_fds(isolation.here, [b"\0"], fds)
        try:
            return _in_turn(isolation.executor, receive_and_start)
        except Unavailable:
            _forget_sent(isolation.there, len(fds))
            raise
    finally:
        isolation.sending.release()


def _forget_sent(there: socket.socket, count: int) -> None:
    """Take out what was sent to a thread that has not received it; nothing when it has."""
    with contextlib.suppress(BlockingIOError):
        _, received, _, _ = socket.recv_fds(there, 1, count, socket.MSG_DONTWAIT)
        for fd in received:
            os.close(fd)


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    input: bytes | None = None,  # noqa: A002 - the name that subprocess.run uses for it
    limits: Limits | None = None,
    ok_statuses: Collection[int] = (0,),
    env_extra: Mapping[str, str] | None = None,
) -> Completed:
    """Run a command to its end and return what it printed, decoded as UTF-8 with replacement characters.

    stdin is `input`, or empty. Processes that the command leaves behind (a FUSE helper, say) are not waited for and
    may keep its stdout and stderr open. At the time limit the whole process group is killed.

    Raises:
        CommandTimedOut: it did not end within `timeout_s`.
        CommandFailed: its status is not in `ok_statuses`, it could not be started (status 127), or it printed more
            than MAX_OUTPUT_BYTES (it is killed then).
    """
    completed = _isolated_call(lambda: _run(argv, timeout_s, input, limits, env_extra))
    if completed.status not in ok_statuses:
        raise CommandFailed(argv, completed.status, completed.stderr)
    return completed


def _run(
    argv: Sequence[str],
    timeout_s: float,
    input: bytes | None,  # noqa: A002
    limits: Limits | None,
    env_extra: Mapping[str, str] | None,
) -> Completed:
    full_argv = [*_limit_prefix(limits), *argv]
    with _input_file(input) as stdin:
        extra = {**_limit_environment(limits), **(env_extra or {})}
        process = _start(argv, full_argv, stdin, subprocess.PIPE, subprocess.PIPE, extra)
    try:
        stdout, stderr = _collect(process, argv, timeout_s)
    except BaseException:
        _kill_group(process)
        raise
    finally:
        _close_pipes(process)
    return Completed(_shell_status(process.wait()), stdout, stderr)  # it has exited: this only reaps it


def run_answering(
    argv: Sequence[str],
    answer: Callable[[str], str],
    *,
    timeout_s: float,
    ok_statuses: Collection[int] = (0,),
) -> Completed:
    """Run a command on a terminal of its own, and answer its questions; its stdout is all that it said there.

    `answer` is given what was said since its last answer, each time there is more, and gives what to type; nothing as
    long as that is no question. An error that it raises kills the command, which never gets the answer then.

    Raises:
        CommandTimedOut, CommandFailed: as `run`. What `answer` raises.
    """
    completed = _isolated_call(lambda: _run_answering(argv, answer, timeout_s))
    if completed.status not in ok_statuses:
        raise CommandFailed(argv, completed.status, completed.stdout)
    return completed


def _run_answering(argv: Sequence[str], answer: Callable[[str], str], timeout_s: float) -> Completed:
    ours, terminal = os.openpty()
    with _opened(ours):
        with _opened(terminal):
            process = _start(argv, argv, terminal, terminal, terminal, None)
        try:
            said = _converse(process, ours, argv, answer, timeout_s)
        except BaseException:
            _kill_group(process)
            raise
    return Completed(_shell_status(process.wait()), said, "")  # it has exited: this only reaps it


def _converse(
    process: subprocess.Popen[bytes], ours: int, argv: Sequence[str], answer: Callable[[str], str], timeout_s: float
) -> str:
    said, answered = bytearray(), 0

    def reply() -> None:
        nonlocal answered
        if typed := answer(_text(said[answered:])):
            answered = len(said)
            with contextlib.suppress(OSError):  # it has ended meanwhile
                os.write(ours, typed.encode())

    _read_until_exit(process, {ours: said}, argv, timeout_s, heard=reply)
    return _text(said)


def spawn_detached(
    argv: Sequence[str],
    *,
    log_path: str,
    status_path: str,
    pid_path: str,
    env_extra: Mapping[str, str] | None = None,
    timeout_s: float = 10.0,
) -> Detached:
    """Start a daemon that outlives this process and whose exit status is recorded whoever is alive then.

    stdout and stderr are appended to `log_path`. On return `pid_path` names the process, which may not yet have
    executed `argv[0]`; if that fails, the recorded status is 126 or 127 and the log says why. To end the daemon,
    signal the process and not its supervisor, which catches SIGTERM, SIGINT and SIGHUP so that a signal to a
    whole group does not lose the status. None of the files is synced: they mean nothing after a reboot.

    Raises:
        CommandFailed: the supervisor could not be started, could not write `pid_path`, or did not get the daemon under
            way within `timeout_s`; everything started was killed.
    """
    return _isolated_call(lambda: _spawn_detached(argv, log_path, status_path, pid_path, env_extra, timeout_s))


def _spawn_detached(
    argv: Sequence[str],
    log_path: str,
    status_path: str,
    pid_path: str,
    env_extra: Mapping[str, str] | None,
    timeout_s: float,
) -> Detached:
    _end_overtaken(pid_path)
    Path(status_path).unlink(missing_ok=True)
    supervisor_argv = ["sh", "-c", _SUPERVISOR, "sh", pid_path, status_path, _BECOME_DAEMON, *argv]
    log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        process = _start(argv, supervisor_argv, subprocess.DEVNULL, subprocess.PIPE, log_fd, env_extra)
    finally:
        os.close(log_fd)
    try:
        detached = _parse_identities(_first_line(process, timeout_s))
        if detached is None:
            raise CommandFailed(argv, _NOT_STARTED_STATUS, log_tail(log_path), "could not be started as a daemon")
    except BaseException:
        _kill_group(process)
        raise
    finally:
        _close_pipes(process)
    _reap_in_background(process)
    return detached


def _end_overtaken(pid_path: str) -> None:
    """Take an old pid file away, and end what it names.

    The caller has found nothing running; a start that was under way when its process died may have made the file since.
    Nobody knows of that daemon yet, and it must not get the socket of the next one.
    """
    taken = f"{pid_path}.old"
    try:
        os.replace(pid_path, taken)
    except FileNotFoundError:
        return
    found = find_detached(taken)
    if found and send_signal(found.process, os.path.dirname(pid_path), signal.SIGKILL):
        wait_exit(found.process, _AFTER_KILL_S)
    Path(taken).unlink(missing_ok=True)


class Tied:
    """A child that ends with the block that started it, and with this process; see `tied`."""

    def __init__(self, process: subprocess.Popen[bytes], pidfd: int, stdout: int, stderr: int) -> None:
        self._process = process
        self._pidfd = pidfd
        self._stdout = stdout
        self._stderr = stderr
        self._stderr_text = ""

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end and return its status (128 + n for signal n); None if it still runs after `timeout_s`."""
        if self._process.returncode is None and not _readable_within(self._pidfd, timeout_s):
            return None
        return _shell_status(self._process.wait())

    def send_signal(self, signal_number: signal.Signals) -> None:
        """Signal the child; one that has ended gets nothing."""
        self._process.send_signal(signal_number)

    def read_stdout(self) -> str:
        """Return what there is on its stdout since the last call, at most 64 KiB; nothing is waited for."""
        return _text(_read_now(self._stdout))

    def stderr_tail(self) -> str:
        """Return the last 2000 characters that it has written to stderr."""
        self._stderr_text = (self._stderr_text + _text(_read_now(self._stderr)))[-_STDERR_TAIL_CHARS:]
        return self._stderr_text

    def activity(self) -> str:
        """Return something that is another whenever the child has read, written or computed since; empty at its end."""
        # proc(5): utime and stime are fields 14 and 15 of stat.
        fields = _read_or_empty(f"/proc/{self.pid}/stat").rpartition(") ")[2].split()
        return f"{' '.join(fields[11:13])} {_read_or_empty(f'/proc/{self.pid}/io')}"


@contextlib.contextmanager
def tied(argv: Sequence[str], *, stdin: int | None = None, limits: Limits | None = None) -> Iterator[Tied]:
    """Start a child that is killed when the block is left, with its process group, or when this process dies, however.

    The thread that enters the block has to stay in it: the kernel ties a child to the thread that started it. It does
    not tie the child's own children, nor a program that gives itself other credentials (prctl(2), PR_SET_PDEATHSIG).
    stdin is a copy of that descriptor, or empty. The child never waits for somebody to read its stdout or stderr: what
    does not fit into a pipe is lost.

    Raises:
        CommandFailed: it could not be started (status 127).
    """
    full_argv = ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", _TIED, "sh", str(os.getpid())]
    full_argv += [*_limit_prefix(limits), *argv]

    def start(fds: Sequence[int]) -> subprocess.Popen[bytes]:
        child_stdin = fds[2] if len(fds) > 2 else subprocess.DEVNULL
        return _start(argv, full_argv, child_stdin, fds[0], fds[1], _limit_environment(limits))

    with _nonblocking_pipe() as (stdout, stdout_end), _nonblocking_pipe() as (stderr, stderr_end):
        ends = [stdout_end.fileno(), stderr_end.fileno()]
        process = _isolated_start(ends if stdin is None else [*ends, stdin], start)
        try:
            stdout_end.close()
            stderr_end.close()
            with _opened(os.pidfd_open(process.pid)) as pidfd:
                yield Tied(process, pidfd, stdout, stderr)
        finally:
            _kill_group(process)


def find_detached(pid_path: str) -> Detached | None:
    """Read which process `spawn_detached` started; None if there is no complete pid file."""
    return _parse_identities(_read_or_empty(pid_path))


def find_exit_status(detached: Detached, status_path: str) -> int | None:
    """Return the recorded exit status of this very process (128 + n for signal n), None if none was recorded."""
    fields = _read_or_empty(status_path).split()
    if len(fields) != 3 or not all(field.isdecimal() for field in fields):
        return None
    # A status that an earlier daemon's supervisor wrote late must not be taken for this one's.
    if ProcessIdentity(int(fields[0]), int(fields[1])) != detached.supervisor:
        return None
    return int(fields[2])


def log_tail(log_path: str) -> str:
    """Return the last 2000 characters of a daemon's log, empty if there is none."""
    return _read_or_empty(log_path)[-_STDERR_TAIL_CHARS:]


def is_running(identity: ProcessIdentity, cmdline_contains: str) -> bool:
    """Tell whether that process lives; a process that merely got its pid does not count.

    One whose first thread has ended still lives while another thread is stuck in the kernel: it may yet write.
    `cmdline_contains` must occur in its command line: it guards against a pid file from before a reboot.
    """
    try:
        with _opened(os.pidfd_open(identity.pid)) as pidfd:
            if not _has_start_time(identity) or _readable_within(pidfd, 0):
                return False
            cmdline = _read_or_empty(f"/proc/{identity.pid}/cmdline").replace("\0", " ")
    except ProcessLookupError:
        return False
    # It is empty for a moment within execve(2), and once the first thread has ended.
    return not cmdline or cmdline_contains in cmdline


def send_signal(identity: ProcessIdentity, cmdline_contains: str, signal_number: signal.Signals) -> bool:
    """Signal that process and no other; False if it does not run any more."""
    try:
        with _opened(os.pidfd_open(identity.pid)) as pidfd:
            # Checked after pidfd_open: from here on the descriptor cannot come to mean another process.
            if not is_running(identity, cmdline_contains):
                return False
            signal.pidfd_send_signal(pidfd, signal_number)
    except ProcessLookupError:
        return False
    return True


def wait_exit(identity: ProcessIdentity, timeout_s: float) -> bool:
    """Wait until that process has ended; False if it still runs after `timeout_s`. It need not be our child."""
    try:
        with _opened(os.pidfd_open(identity.pid)) as pidfd:
            return not _has_start_time(identity) or _readable_within(pidfd, timeout_s)
    except ProcessLookupError:
        return True


def _limit_prefix(limits: Limits | None) -> list[str]:
    # prlimit(1) instead of preexec_fn, which may deadlock in a process with threads.
    if limits is None:
        return []
    prefix = ["prlimit"]
    if limits.address_space_bytes is not None:
        prefix.append(f"--as={limits.address_space_bytes}")
    if limits.cpu_s is not None:
        # At a hard limit the kernel sends SIGKILL, which would look like the work of the OOM killer.
        prefix.append(f"--cpu={limits.cpu_s}:{limits.cpu_s + 1}")
    return [*prefix, "--"]


def _limit_environment(limits: Limits | None) -> dict[str, str]:
    # glibc reserves 64 MiB of address space for each thread that allocates. With a limit of 1 GiB, 2 of 60 copies by
    # qemu-img, which has up to 64 threads, ended with "qemu_thread_create: Resource temporarily unavailable".
    return {} if limits is None or limits.address_space_bytes is None else {"MALLOC_ARENA_MAX": "1"}


def _environment(env_extra: Mapping[str, str] | None) -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", _DEFAULT_PATH), "LC_ALL": "C", **(env_extra or {})}


@contextlib.contextmanager
def _input_file(content: bytes | None) -> Iterator[IO[bytes] | int]:
    # Memory and not a pipe, so that a child that does not read its input cannot block us; and not a file, for the
    # root file system may be read-only.
    if content is None:
        yield subprocess.DEVNULL
        return
    with os.fdopen(os.memfd_create("stdin"), "w+b") as file:
        file.write(content)
        file.seek(0)
        yield file


def _start(
    argv: Sequence[str],
    full_argv: Sequence[str],
    stdin: IO[bytes] | int,
    stdout: int,
    stderr: int,
    env_extra: Mapping[str, str] | None,
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            full_argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=_environment(env_extra),
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise CommandFailed(argv, _NOT_FOUND_STATUS, str(error), "could not be started") from error


def _collect(process: subprocess.Popen[bytes], argv: Sequence[str], timeout_s: float) -> tuple[str, str]:
    """Read stdout and stderr until the child has exited; end of file may never come (see `run`)."""
    buffers = {pipe.fileno(): bytearray() for pipe in (process.stdout, process.stderr) if pipe is not None}
    _read_until_exit(process, buffers, argv, timeout_s)
    stdout, stderr = (_text(buffer) for buffer in buffers.values())
    return stdout, stderr


def _read_until_exit(
    process: subprocess.Popen[bytes],
    buffers: Mapping[int, bytearray],
    argv: Sequence[str],
    timeout_s: float,
    *,
    heard: Callable[[], None] = lambda: None,
) -> None:
    """Move what comes on descriptors to their buffers until the child has exited; `heard` is called after each look.

    Raises:
        CommandTimedOut: it has not; it still runs.
    """
    deadline = time.monotonic() + timeout_s
    open_fds = set(buffers)
    poller = select.poll()
    for fd in buffers:
        os.set_blocking(fd, False)
        poller.register(fd, select.POLLIN)
    with _opened(os.pidfd_open(process.pid)) as pidfd:
        poller.register(pidfd, select.POLLIN)
        exited = False
        while not exited:
            left_s = deadline - time.monotonic()
            ready = {fd for fd, _ in poller.poll(max(0.0, left_s) * 1000)}
            exited = pidfd in ready
            for fd in list(open_fds if exited else open_fds & ready):
                if _read_available(fd, buffers[fd], argv):
                    open_fds.remove(fd)
                    poller.unregister(fd)
            heard()
            if not exited and left_s <= 0:
                said = _text(list(buffers.values())[-1])
                raise CommandTimedOut(argv, _KILLED_STATUS, said, f"killed after {timeout_s} s")


def _read_available(fd: int, buffer: bytearray, argv: Sequence[str]) -> bool:
    """Move what a pipe or terminal holds to the buffer; True at end of file, which a terminal says by EIO.

    Raises:
        CommandFailed: the buffer grew beyond MAX_OUTPUT_BYTES.
    """
    while len(buffer) <= MAX_OUTPUT_BYTES:
        try:
            chunk = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return True
        if not chunk:
            return True
        buffer += chunk
    raise CommandFailed(argv, _KILLED_STATUS, "", f"killed: it printed more than {MAX_OUTPUT_BYTES} bytes")


def _first_line(process: subprocess.Popen[bytes], timeout_s: float) -> str:
    """Return the first line on the child's stdout, or what there is of it at end of file or at the time limit."""
    deadline = time.monotonic() + timeout_s
    line = b""
    if process.stdout is not None:
        fd = process.stdout.fileno()
        while not line.endswith(b"\n") and _readable_within(fd, deadline - time.monotonic()):
            chunk = os.read(fd, 1)  # one line only: the rest of a pipe belongs to whoever reads next
            if not chunk:
                break
            line += chunk
    return _text(line)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the child's process group; a child stuck in the kernel is left to a thread that reaps it when it ends."""
    # Only while the leader is not reaped is its group id certain to be ours; Popen knows whether it is.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    try:
        with _opened(os.pidfd_open(process.pid)) as pidfd:
            ended = _readable_within(pidfd, _AFTER_KILL_S)
    except ProcessLookupError:
        ended = True
    if ended:
        process.wait()
        return
    _log.warning("process %d does not end although it was killed: it is stuck in the kernel", process.pid)
    _reap_in_background(process)


def _reap_in_background(process: subprocess.Popen[bytes]) -> None:
    threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


@contextlib.contextmanager
def _nonblocking_pipe() -> Iterator[tuple[int, IO[bytes]]]:
    """Give the two ends, to read and to write, of a pipe of which neither waits."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    with _opened(read_end), os.fdopen(write_end, "wb", buffering=0) as writer:
        yield read_end, writer


def _read_now(fd: int) -> bytes:
    """Read what a non-blocking pipe holds, at most _READ_BYTES."""
    try:
        return os.read(fd, _READ_BYTES)
    except BlockingIOError:
        return b""


@contextlib.contextmanager
def _opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _readable_within(fd: int, timeout_s: float) -> bool:
    """Wait until a descriptor is readable; a pidfd is readable once its process has ended (pidfd_open(2))."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(max(0.0, timeout_s) * 1000))


def _has_start_time(identity: ProcessIdentity) -> bool:
    # The command name in parentheses may itself contain ") ", hence the last one.
    fields = _read_or_empty(f"/proc/{identity.pid}/stat").rpartition(") ")[2].split()
    return len(fields) >= 20 and fields[19] == str(identity.start_time_ticks)


def _parse_identities(text: str) -> Detached | None:
    fields = text.split()
    if len(fields) != 4 or not all(field.isdecimal() for field in fields):
        return None
    pid, start, supervisor_pid, supervisor_start = (int(field) for field in fields)
    return Detached(ProcessIdentity(pid, start), ProcessIdentity(supervisor_pid, supervisor_start))


def _read_or_empty(path: str) -> str:
    try:
        return Path(path).read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # /proc answers ESRCH for a process that ends meanwhile
        return ""


def _text(raw: bytes | bytearray) -> str:
    return raw.decode(errors="replace")


def _shell_status(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode
