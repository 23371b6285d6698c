"""One qemu-storage-daemon for each staged volume, and private ones, behind calls that block and have time limits.

Owns: starting, finding and ending daemons; their state directories; the nodes and the export inside them.
Hides: QMP and asyncio, node names, the order in which nodes are added, exit statuses.

What always holds:
- A daemon outlives the process that started it, and any later process finds it again. The state directory is a hint;
  what counts is the process and what it answers over QMP. Only a private one (`private_daemon`) is the contrary: no
  state directory, no export, and it ends with the process that started it.
- Every node is named and given its driver, its file and its parent by us; strings in images are never followed.
- A monitor serves one client at a time. So a session lasts one operation: nothing has to be restored after a restart
  of either side, and a process that hangs keeps nobody out for ever. An operation waits for the one before it.
- Nothing is decided by the text of an error: after a failure the daemon or the kernel is asked for its state.

What a daemon holds for a chain base ← middle ← head (node names; the id of a layer has 24 hex digits):

    export "export" ── l-<head>  ──backing──▶  l-<middle>  ──backing──▶  l-<base>        format nodes: qcow2 or raw
                          │ file                  │ file                    │ file
                       f-<head>                f-<middle>                f-<base>        file nodes: O_DIRECT, locked

When all is flushed: exit status 0 alone does not prove it. Measured with QEMU 10.0.13: when the mount below a daemon
has died, SIGTERM makes it print "Failed to flush the L2 table cache" and exit with status 0. So `stop` first takes the
export away (no more writes), then flushes with an error check, and only this together with exit status 0 is CLEAN.
"""

import asyncio
import contextlib
import enum
import fcntl
import logging
import os
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from csi_quobyte.errors import Busy, Corrupt, InvalidArgument, Refused, Unavailable
from csi_quobyte.host import command, mounts, qemu_img, watchdog
from csi_quobyte.host.qemu import ImageLayer, QemuTools

_log = logging.getLogger(__name__)
# The library logs each failed attempt to connect as an error of its own; here it becomes an exception or a retry.
_library_log = logging.getLogger(f"{__name__}.qmp")
_library_log.setLevel(logging.CRITICAL)

QMP_TIMEOUT_S = 10.0
"""For one QMP command: each takes milliseconds, unless the mount below hangs."""
_LOCK_TIMEOUT_S = 60.0  # an operation of another thread: a few commands at their time limit
_HEALTH_TIMEOUT_S = 2.0
_KILL_TIMEOUT_S = 5.0
_CLOSE_SHARE = 2 / 3  # of the time for stopping: what is left is for SIGTERM, which may still flush
_RECORD_TIMEOUT_S = 5.0  # between the end of a daemon and its recorded status: two commands of a shell
_UNMOUNT_TIMEOUT_S = 5.0
_STAT_TIMEOUT_S = 5.0
_READY_POLL_S = 0.005

_TICK_S = 0.1

_KEY_LENGTH = 24
_SOCKET_PATH_MAX_BYTES = 107  # sun_path has 108 with the final zero byte (unix(7))
_PRIVATE = "(private)"
_FORMAT_PREFIX = "l-"
_IOTHREAD = "io0"
# Whether an export is writable cannot be asked over QMP, so its id tells.
_EXPORT_IDS = {True: "export", False: "export-ro"}

# A job walks through the chain once: 1 MiB are the mapping tables of 8 GiB. QEMU's default is up to 32 MiB for each
# layer, which is more memory than a controller has when 64 large ones are open.
_JOB_L2_CACHE_BYTES = 1 << 20

# QEMU's image locks are OFD locks on these bytes of the file (block/file-posix.c, RAW_LOCK_PERM_BASE and
# RAW_LOCK_SHARED_BASE): one byte for each permission taken, one for each not shared.
_LOCK_BYTES_START = 100
_LOCK_BYTES_LENGTH = 200
# Those that keep an image from being read: write and resize (bits 1 and 3, include/block/block-common.h) taken, or
# consistent read (bit 0) not shared.
_LOCKS_AGAINST_READING = (101, 103, 200)
_FLOCK = "hhqqi4x"  # struct flock of fcntl(2) on 64-bit Linux

_T = TypeVar("_T")


class StopResult(enum.Enum):
    """How a daemon ended."""

    CLEAN = "clean"
    """It flushed everything and ended with status 0: the image holds every acknowledged write."""
    UNCLEAN = "unclean"
    """It does not run any more, but acknowledged writes may be lost, as in a power cut."""
    STILL_RUNNING = "still running"
    """It was killed and does not end: it is stuck in the kernel, and may still write."""


@dataclass(frozen=True)
class _Node:
    """One node of the block graph, as far as it decides what is read and written."""

    name: str
    driver: str
    path: str | None
    """Of a file node; None for a format node."""
    read_only: bool | None
    """Of a format node. None for a file node, which QEMU reopens as it needs (auto-read-only)."""
    file: str | None = None
    backing: str | None = None


class Daemons:
    """All storage daemons of this node; one process at a time uses a state directory."""

    def __init__(self, tools: QemuTools, state_dir: str, *, qmp_timeout_s: float = QMP_TIMEOUT_S) -> None:
        """Take `state_dir` (absolute; need not exist yet) as the place for one directory for each daemon.

        Raises:
            InvalidArgument: the path is relative, or too long for a socket's path below it.
        """
        # As the kernel prints it in its mount table: without symbolic links.
        real_dir = os.path.realpath(state_dir)
        most = _SOCKET_PATH_MAX_BYTES - _KEY_LENGTH - len("//qmp")
        if not state_dir.startswith("/") or len(os.fsencode(real_dir)) > most:
            raise InvalidArgument(f"state directory {state_dir!r}: expected an absolute path of at most {most} bytes")
        self._tools = tools
        self._state_dir = real_dir
        self._qmp_timeout_s = qmp_timeout_s
        self._guard = threading.Lock()
        self._locks: dict[str, threading.RLock] = {}

    def directory(self, key: str) -> str:
        """Return the path of a daemon's state directory.

        Raises:
            InvalidArgument: the key is not 24 hex digits.
        """
        if not _is_key(key):
            raise InvalidArgument(f"daemon key {key!r}: expected {_KEY_LENGTH} lower-case hex digits")
        return f"{self._state_dir}/{key}"

    def keys(self) -> list[str]:
        """Return the keys that have a state directory, sorted; their daemons need not run."""
        try:
            return sorted(name for name in os.listdir(self._state_dir) if _is_key(name))
        except FileNotFoundError:
            return []

    def find(self, key: str) -> "Daemon | None":
        """Return the running daemon with this key, whoever started it, else None; it is not asked anything."""
        directory = self.directory(key)
        detached = command.find_detached(f"{directory}/pid")
        if detached is None:
            return None
        daemon = Daemon(key, directory, detached, self._lock_of(key), self._qmp_timeout_s)
        return daemon if daemon.is_running() else None

    def ended(self, key: str) -> StopResult | None:
        """Tell how the daemon with this key ended; None if it runs, or if none was started since `forget`."""
        directory = self.directory(key)
        detached = command.find_detached(f"{directory}/pid")
        if detached is None or command.is_running(detached.process, _marker(key)):
            return None
        return _ended_result(directory, detached)

    def ensure(self, key: str, *, timeout_s: float = 10.0) -> "Daemon":
        """Return the daemon with this key, ready for commands; start one if none runs.

        A new one has nothing open. How an earlier one ended (`ended`) is no longer known after that, and the dead mount
        that a killed one left is taken away.

        Raises:
            Unavailable: not ready within `timeout_s`. One that was started here is gone again; one that ran before
                is left alone.
            Busy: another thread works with this daemon and does not end.
        """
        with _exclusive(self._lock_of(key), key):
            deadline = time.monotonic() + timeout_s
            running = self.find(key)
            if running is not None:
                running._await_ready(deadline)
                return running
            return self._start(key, deadline)

    def forget(self, key: str) -> None:
        """Remove the state directory of a daemon that does not run, and a dead mount in it; none there is success.

        Raises:
            Refused: the daemon runs.
            Unavailable: the dead mount or the directory cannot be taken away.
            Busy: another thread works with this daemon and does not end.
        """
        with _exclusive(self._lock_of(key), key):
            if self.find(key) is not None:
                raise Refused(f"the storage daemon {key} runs: stop it first")
            directory = self.directory(key)
            _unmount_dead(f"{directory}/export")
            _await_record(command.find_detached(f"{directory}/pid"))
            try:
                shutil.rmtree(directory)
            except FileNotFoundError:
                return
            except OSError as error:
                raise Unavailable(f"{directory} cannot be removed: {error}") from error

    def _start(self, key: str, deadline: float) -> "Daemon":
        directory = self.directory(key)
        _unmount_dead(f"{directory}/export")
        try:
            Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
            # not the socket: it may be the one of a start that was under way when its process died; QEMU replaces it
            Path(f"{directory}/flushed").unlink(missing_ok=True)
            Path(f"{directory}/export").touch(mode=0o600)
            detached = command.spawn_detached(
                _daemon_argv(self._tools, f"{directory}/qmp"),
                log_path=f"{directory}/log",
                status_path=f"{directory}/status",
                pid_path=f"{directory}/pid",
                timeout_s=max(0.1, deadline - time.monotonic()),
            )
        except OSError as error:
            raise Unavailable(f"{directory} cannot be prepared: {error}") from error
        daemon = Daemon(key, directory, detached, self._lock_of(key), self._qmp_timeout_s)
        try:
            daemon._await_ready(deadline)
        except BaseException:
            # It has nothing open yet, so killing it loses nothing.
            command.send_signal(detached.process, _marker(key), signal.SIGKILL)
            command.wait_exit(detached.process, _KILL_TIMEOUT_S)
            raise
        return daemon

    def _lock_of(self, key: str) -> threading.RLock:
        with self._guard:
            return self._locks.setdefault(key, threading.RLock())


class Daemon:
    """One storage daemon that ran when this object was made; get it from `Daemons`, which knows whether it runs.

    Any method may raise Unavailable (the daemon has ended, does not answer in time, or refuses a command) or Busy
    (another thread works with it and does not end).
    """

    def __init__(
        self, key: str, directory: str, detached: command.Detached, lock: threading.RLock, qmp_timeout_s: float
    ) -> None:
        self.key = key
        self._directory = directory
        self._detached = detached
        self._lock = lock
        self._qmp_timeout_s = qmp_timeout_s

    @property
    def pid(self) -> int:
        """The process id."""
        return self._detached.process.pid

    @property
    def export_path(self) -> str:
        """Path of the regular file over which the FUSE export is mounted."""
        return f"{self._directory}/export"

    def is_running(self) -> bool:
        """Tell whether the process lives; it may still be starting, or hang."""
        return command.is_running(self._detached.process, _marker(self.key))

    def is_healthy(self) -> bool:
        """Tell whether the daemon answers within two seconds after the operation of another thread, if there is one."""
        try:
            self._converse(_query_nodes, timeout_s=_HEALTH_TIMEOUT_S)
        except (Unavailable, Busy):
            return False
        return True

    def ensure_open(self, layers: Sequence[ImageLayer], *, read_only: bool) -> None:
        """Open exactly this chain, base first; nothing is done if it is open already.

        A failure takes away what this call has added. What a process that died in this call had added is completed.

        Raises:
            Corrupt: something else is open, or a layer's image must not be opened (`qemu_img.check_features`).
            Unavailable: also when another process has an image open; the message says so.
        """
        _check_chain(layers)
        for layer in layers:
            qemu_img.check_features(layer.path, layer.format)
        self._converse(lambda monitor: _open(monitor, self.key, layers, read_only))

    def virtual_size_bytes(self) -> int:
        """Return the size of the head as the daemon has it open.

        Raises:
            Refused: nothing is open.
        """
        return self._converse(lambda monitor: _head_size_bytes(monitor, self.key))

    def resize(self, size_bytes: int) -> None:
        """Make the head at least this large; it never shrinks. An exported file shows its new size on return.

        A device on top of the export has to be told separately.

        Raises:
            Refused: nothing is open.
            Unavailable: also when the daemon refuses to, for example for lack of space.
        """
        exported = self._converse(lambda monitor: _grow(monitor, self.key, size_bytes))
        if exported:
            # The kernel caches attributes of a FUSE file for a second; "never" makes it ask the daemon now. Without
            # it, a loop device that takes over the size would take the old one.
            argv = ["stat", "--cached=never", "--format=%s", "--", self.export_path]
            command.run(argv, timeout_s=_STAT_TIMEOUT_S)

    def ensure_fuse_export(self, *, writable: bool) -> str:
        """Export the head as a file with a fixed size and return its path; nothing is done if that is so already.

        Raises:
            Refused: nothing is open, or it is exported with the other `writable`.
            Unavailable: also when the daemon's mount is not visible here, because it lives in another mount namespace.
        """
        self._converse(lambda monitor: _export(monitor, self.key, self.export_path, writable))
        mounted = mounts.at(self.export_path)
        if mounted is None or not mounted.fstype.startswith("fuse"):
            raise Unavailable(f"storage daemon {self.key} has an export, but {self.export_path} is not mounted here")
        return self.export_path

    def flush(self) -> None:
        """Bring every write that was acknowledged so far to the image file, durably.

        Raises:
            Unavailable: the flush failed: what was not durable before may be lost.
        """
        self._converse(_flush)

    def stop(self, *, timeout_s: float) -> StopResult:
        """Take the export away, flush, end the process and tell how it went. For one that has ended: how it ended.

        Takes `timeout_s` in all, and a few seconds more where the process has to be killed.

        Raises:
            Busy: another thread works with this daemon and does not end; nothing was done.
        """
        with _exclusive(self._lock, self.key):
            deadline = time.monotonic() + timeout_s
            if self.is_running():
                self._close(time.monotonic() + timeout_s * _CLOSE_SHARE)
                self._terminate(deadline)
            if self.is_running():
                return StopResult.STILL_RUNNING
            return _ended_result(self._directory, self._detached)

    def kill(self) -> bool:
        """End the process without a flush, and say whether it has ended: for one that must not write any more."""
        process, marker = self._detached.process, _marker(self.key)
        command.send_signal(process, marker, signal.SIGKILL)
        return command.wait_exit(process, _KILL_TIMEOUT_S)

    def _close(self, deadline: float) -> None:
        """Take the export away, flush, and note that for the process that may have to go on from here."""
        try:
            self._converse(
                lambda monitor: _unexport(monitor, deadline), timeout_s=max(0.1, deadline - time.monotonic())
            )
            self._converse(_flush, timeout_s=max(0.1, deadline - time.monotonic()))
            # If we die here: the daemon runs with no export and nothing unflushed, and is stopped again.
            Path(f"{self._directory}/flushed").write_text(_flushed_mark(self._detached), encoding="ascii")
        except (Unavailable, OSError) as error:
            # Not the end of it: the process has to go all the same, and the result says that it was not clean.
            _log.warning("storage daemon %s is stopped without a confirmed flush: %s", self.key, error)

    def _terminate(self, deadline: float) -> None:
        process, marker = self._detached.process, _marker(self.key)
        # SIGCONT, because a stopped process ends by SIGKILL only, and that loses what is not flushed.
        command.send_signal(process, marker, signal.SIGTERM)
        command.send_signal(process, marker, signal.SIGCONT)
        if not command.wait_exit(process, max(0.1, deadline - time.monotonic())):
            _log.error("storage daemon %s did not end in time and is killed", self.key)
            command.send_signal(process, marker, signal.SIGKILL)
            command.wait_exit(process, _KILL_TIMEOUT_S)

    def _await_ready(self, deadline: float) -> None:
        """Wait for the first answer; attempts are repeated because the socket appears some time after the start."""
        while True:
            try:
                self._converse(_query_nodes, timeout_s=max(0.1, deadline - time.monotonic()))
                return
            except Unavailable as error:
                if time.monotonic() > deadline or not self.is_running():
                    raise Unavailable(f"{error}; its log ends with: {self._log_end()}") from error
            time.sleep(_READY_POLL_S)

    def _log_end(self) -> str:
        return command.log_tail(f"{self._directory}/log").strip() or "(nothing)"

    def _converse(self, conversation: "Callable[[_Monitor], Awaitable[_T]]", *, timeout_s: float | None = None) -> _T:
        """Hold one session with the monitor; each command in it may take `timeout_s`."""
        limit_s = self._qmp_timeout_s if timeout_s is None else timeout_s
        with _exclusive(self._lock, self.key):
            if not self.is_running():
                raise Unavailable(f"storage daemon {self.key} has ended")
            # A loop for each session and no thread of its own: an operation is a few commands in a row, and nothing
            # is left running that would have to be stopped.
            return asyncio.run(_session(self.key, f"{self._directory}/qmp", limit_s, conversation))


@dataclass(frozen=True)
class OpenLayer:
    """A layer as a private daemon has it open now."""

    size_bytes: int
    """The virtual size."""
    read_only: bool


class PrivateDaemon:
    """The storage daemon of one piece of work; get it from `private_daemon`.

    Any method may raise Unavailable (the daemon has ended, does not answer in time, or refuses a command), and what
    `tick` raises. After any of that the only thing to do with it is to end it.
    """

    def __init__(
        self, child: command.Tied, runner: asyncio.Runner, monitor: "_Monitor", tick: Callable[[], None]
    ) -> None:
        self._child = child
        self._runner = runner
        self._monitor = monitor
        self._tick = tick

    def tick(self) -> None:
        """Ask whether to go on, while nothing is asked of the daemon; without that for long it is killed."""
        self._tick()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    def open(self, layers: Sequence[ImageLayer]) -> None:
        """Open exactly this chain, base first, the last layer for writing: nobody else can open that one then.

        Raises:
            Corrupt: a layer's image must not be opened (`qemu_img.check_features`), or the layers are no chain.
            Unavailable: also when another process has an image open; the message says so.
        """
        _check_chain(layers)
        for layer in layers:
            qemu_img.check_features(layer.path, layer.format)
        self._converse(lambda monitor: _open(monitor, _PRIVATE, layers, False, l2_cache_bytes=_JOB_L2_CACHE_BYTES))

    def layers(self) -> Mapping[str, OpenLayer]:
        """Return what is open, by the id of the layer."""
        return {
            name.removeprefix(_FORMAT_PREFIX): OpenLayer(node["image"]["virtual-size"], node["ro"])
            for name, node in self._converse(_query_nodes).items()
            if name.startswith(_FORMAT_PREFIX)
        }

    def execute(self, name: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a QMP command and return its value."""
        return self._converse(lambda monitor: monitor.execute(name, arguments))

    def flush(self) -> None:
        """Flush all layers that are writable now, durably; there must be no jobs, also no ended ones.

        Raises:
            Unavailable: the flush failed: what was not durable before may be lost.
        """
        self._converse(_flush)

    def end(self, timeout_s: float, *, quietly: bool = False) -> None:
        """End the daemon in order: it cancels its jobs, writes its caches and exits. With `quietly` without `tick`.

        Raises:
            Unavailable: it did not end within `timeout_s`, or with another status than 0: something may be lost.
        """
        deadline = time.monotonic() + timeout_s
        self._child.send_signal(signal.SIGTERM)
        while (status := self._child.wait(min(_TICK_S, max(0.0, deadline - time.monotonic())))) is None:
            if time.monotonic() > deadline:
                raise Unavailable(f"storage daemon {_PRIVATE} did not end within {timeout_s:.1f} s")
            if not quietly:
                self._tick()
        if status != 0:
            raise Unavailable(f"storage daemon {_PRIVATE} ended with status {status}: {self._child.stderr_tail()}")

    def _converse(self, conversation: "Callable[[_Monitor], Awaitable[_T]]") -> _T:
        return self._runner.run(_ticking(_explaining(self._child, conversation(self._monitor)), self._tick))


@contextlib.contextmanager
def private_daemon(tools: QemuTools, *, tick: Callable[[], None], answer_timeout_s: float) -> Iterator[PrivateDaemon]:
    """Start a storage daemon for one piece of work on this thread; it is killed when the block is left.

    It dies with this process, whatever ends that, and it needs no file or directory: its monitor is an inherited
    socket. Nobody else can find it or talk to it. `tick` is called every 100 ms while the daemon is waited for; what
    it raises ends the wait. When it is not called for `watchdog.LIMIT_S`, because this process is stopped or hangs, the
    daemon is killed. Each QMP command may take `answer_timeout_s`.

    Raises:
        Unavailable: it cannot be started, or does not answer in time.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    argv = [tools.storage_daemon, "--chardev", "socket,id=qmp,fd=0", "--monitor", "chardev=qmp"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        stack.enter_context(theirs)
        child = stack.enter_context(command.tied(argv, stdin=theirs.fileno()))
        watched = stack.enter_context(watchdog.watching(child.pid))
        runner = stack.enter_context(asyncio.Runner())
        theirs.close()  # so that the end of the daemon is the end of the session

        def fed() -> None:
            tick()
            try:
                watched.feed()
            except Unavailable as error:  # a watchdog ends with its daemon, too
                raise Unavailable(f"{error}; {_fate(child)}") from error

        client = runner.run(_ticking(_explaining(child, _connect(_PRIVATE, ours, answer_timeout_s)), fed))
        try:
            yield PrivateDaemon(child, runner, _Monitor(_PRIVATE, client, answer_timeout_s), fed)
        finally:
            child.send_signal(signal.SIGKILL)  # first: a session with a dead daemon ends at once
            runner.run(_disconnect(_PRIVATE, client, _HEALTH_TIMEOUT_S))


async def _explaining(child: command.Tied, work: Awaitable[_T]) -> _T:
    """Await `work`, and add to its failure what has become of the daemon."""
    try:
        return await work
    except Unavailable as error:
        raise Unavailable(f"{error}; {_fate(child)}") from error


def _fate(child: command.Tied) -> str:
    """Say what has become of a daemon that failed."""
    status = child.wait(_TICK_S)  # the end of a session shows a moment before the end of the process
    fate = "it still runs" if status is None else f"it has ended with status {status}"
    return f"{fate}; its log ends with: {child.stderr_tail().strip() or '(nothing)'}"


async def _ticking(work: Awaitable[_T], tick: Callable[[], None]) -> _T:
    """Await `work` and call `tick` meanwhile; what that raises abandons the work."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_TICK_S))[0]:
            tick()
    finally:
        task.cancel()
    return task.result()


class _Monitor:
    """An open QMP session."""

    def __init__(self, key: str, client: QMPClient, timeout_s: float) -> None:
        self._key = key
        self._client = client
        self._timeout_s = timeout_s

    async def execute(self, name: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a command and return its value.

        Raises:
            Unavailable: the daemon refused it (then nothing was done), the session broke, or it took too long.
        """
        try:
            return await asyncio.wait_for(self._client.execute(name, arguments), self._timeout_s)
        except TimeoutError as error:
            raise Unavailable(f"storage daemon {self._key}: no answer to {name} in {self._timeout_s:.1f} s") from error
        except ExecuteError as error:
            raise Unavailable(f"storage daemon {self._key} refuses {name}: {error}") from error
        except (QMPError, OSError, EOFError) as error:
            raise Unavailable(f"storage daemon {self._key}: session lost during {name}: {error}") from error


async def _session(
    key: str, socket_path: str, timeout_s: float, conversation: Callable[[_Monitor], Awaitable[_T]]
) -> _T:
    client = await _connect(key, socket_path, timeout_s)
    try:
        return await conversation(_Monitor(key, client, timeout_s))
    finally:
        await _disconnect(key, client, timeout_s)


async def _connect(key: str, address: str | socket.socket, timeout_s: float) -> QMPClient:
    client = QMPClient(key)
    client.logger = _library_log
    try:
        await asyncio.wait_for(client.connect(address), timeout_s)
    except TimeoutError as error:
        raise Unavailable(f"storage daemon {key}: no greeting within {timeout_s:.1f} s") from error
    except (QMPError, OSError, EOFError) as error:
        raise Unavailable(f"storage daemon {key}: cannot connect to its monitor: {error}") from error
    return client


async def _disconnect(key: str, client: QMPClient, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(client.disconnect(), timeout_s)
    except (TimeoutError, QMPError, OSError, EOFError) as error:
        # What the conversation found out stands; the daemon sees the end of this connection in any case.
        _log.debug("storage daemon %s: session did not end in order: %s", key, error)


async def _query_nodes(monitor: _Monitor) -> Mapping[str, Mapping[str, Any]]:
    found = await monitor.execute("query-named-block-nodes", {"flat": True})
    return {node["node-name"]: node for node in found}


async def _query_exports(monitor: _Monitor) -> dict[str, str]:
    """Return the exports that are not about to go: id and node name."""
    found = await monitor.execute("query-block-exports")
    return {export["id"]: export["node-name"] for export in found if not export["shutting-down"]}


async def _open_nodes(monitor: _Monitor) -> dict[str, _Node]:
    """Ask what is open, and what lies on what.

    The links come from x-debug-query-block-graph, the only command of QEMU 10.0 that tells which node is whose child;
    query-named-block-nodes tells file names only, which do not say which node it is.
    """
    nodes = await _query_nodes(monitor)
    graph = await monitor.execute("x-debug-query-block-graph")
    name_of = {node["id"]: node["name"] for node in graph["nodes"]}
    children = {(name_of[edge["parent"]], edge["name"]): name_of[edge["child"]] for edge in graph["edges"]}
    return {
        name: _Node(
            name=name,
            driver=node["drv"],
            path=node["image"]["filename"] if node["drv"] == "file" else None,
            read_only=None if node["drv"] == "file" else node["ro"],
            file=children.get((name, "file")),
            backing=children.get((name, "backing")),
        )
        for name, node in nodes.items()
    }


async def _open(
    monitor: _Monitor,
    key: str,
    layers: Sequence[ImageLayer],
    read_only: bool,
    *,
    l2_cache_bytes: int | None = None,
) -> None:
    wanted = _wanted_nodes(layers, read_only)
    present = await _open_nodes(monitor)
    done = len(present)
    if present != {node.name: node for node in wanted[:done]} or (
        # A part of the chain under an export is no interrupted opening: it is in use.
        done != len(wanted) and await _query_exports(monitor)
    ):
        raise Corrupt(
            f"storage daemon {key} has {_described(list(present.values()))} open, but wanted is {_described(wanted)}"
        )
    options = _node_options(layers, read_only, l2_cache_bytes)
    added: list[str] = []
    for node in wanted[done:]:
        try:
            await monitor.execute("blockdev-add", options[node.name])
        except Unavailable as error:
            await _remove_nodes(monitor, added)
            layer = next(layer for layer in layers if node.name in _node_names(layer))
            raise Unavailable(f"cannot open layer {layer.path}{_lock_hint(layer.path)}: {error}") from error
        added.append(node.name)


async def _remove_nodes(monitor: _Monitor, names: Sequence[str]) -> None:
    for name in reversed(names):
        try:
            await monitor.execute("blockdev-del", {"node-name": name})
        except Unavailable as error:
            # What stays is what an interrupted opening leaves too: the next one goes on from it.
            _log.warning("cannot take back node %s: %s", name, error)
            return


async def _find_head(monitor: _Monitor, key: str) -> str:
    """Return the name of the node that no other node uses.

    Raises:
        Refused: nothing is open, or not just one chain.
    """
    nodes = await _open_nodes(monitor)
    used = {node.backing for node in nodes.values()} | {node.file for node in nodes.values()}
    heads = [name for name in nodes if name not in used]
    if len(heads) != 1:
        raise Refused(f"storage daemon {key} has {len(heads)} chains open, expected one")
    return heads[0]


async def _size_bytes(monitor: _Monitor, node_name: str) -> int:
    size_bytes: int = (await _query_nodes(monitor))[node_name]["image"]["virtual-size"]
    return size_bytes


async def _head_size_bytes(monitor: _Monitor, key: str) -> int:
    return await _size_bytes(monitor, await _find_head(monitor, key))


async def _grow(monitor: _Monitor, key: str, size_bytes: int) -> bool:
    """Grow the head if it is smaller; True if it is exported (also when it had the size already)."""
    head = await _find_head(monitor, key)
    if await _size_bytes(monitor, head) < size_bytes:
        await monitor.execute("block_resize", {"node-name": head, "size": size_bytes})
    return bool(await _query_exports(monitor))


async def _export(monitor: _Monitor, key: str, mount_path: str, writable: bool) -> None:
    head = await _find_head(monitor, key)
    wanted = {_EXPORT_IDS[writable]: head}
    present = await _query_exports(monitor)
    if present == wanted:
        return
    if present:
        raise Refused(f"storage daemon {key} has the exports {present}, but wanted is {wanted}")
    export = {
        "type": "fuse",
        "id": _EXPORT_IDS[writable],
        "node-name": head,
        "mountpoint": mount_path,
        "writable": writable,
        "growable": False,  # the size is the record's, not what somebody happens to write
        "allow-other": "off",  # root only, and the kernel's loop driver acts as root
        "iothread": _IOTHREAD,
    }
    await monitor.execute("block-export-add", export)


async def _unexport(monitor: _Monitor, deadline: float) -> None:
    """Take the export away, also from under its users, and wait until its requests are done.

    Raises:
        Unavailable: also when requests are still under way at the deadline, because the mount below hangs.
    """
    for export_id in await _query_exports(monitor):
        await monitor.execute("block-export-del", {"id": export_id, "mode": "hard"})
    while await monitor.execute("query-block-exports"):
        if time.monotonic() > deadline:
            raise Unavailable("requests of the export do not end")
        await asyncio.sleep(_READY_POLL_S)


async def _flush(monitor: _Monitor) -> None:
    """Flush all format nodes that can be written.

    QMP has no command to flush. Reopening a node with the options that it has flushes it first, caches of mapping
    tables included, and fails if that fails (block.c, bdrv_reopen_prepare).
    """
    for node in (await _open_nodes(monitor)).values():
        if node.read_only is False and node.file is not None:
            options = _format_options(node.name, node.driver, node.file, node.backing, read_only=False)
            await monitor.execute("blockdev-reopen", {"options": [options]})


def _daemon_argv(tools: QemuTools, socket_path: str) -> list[str]:
    # In the foreground and without a pid file: the supervisor of command.spawn_detached does both better.
    escaped = socket_path.replace(",", ",,")
    return [
        tools.storage_daemon,
        "--chardev",
        f"socket,id=qmp,path={escaped},server=on,wait=off",
        "--monitor",
        "chardev=qmp",
        "--object",
        f"iothread,id={_IOTHREAD}",
    ]


def node_name(layer: ImageLayer) -> str:
    """Return the name of the format node of a layer, in every daemon that has it open."""
    return f"{_FORMAT_PREFIX}{layer.id}"


def _node_names(layer: ImageLayer) -> tuple[str, str]:
    return f"f-{layer.id}", node_name(layer)


def _wanted_nodes(layers: Sequence[ImageLayer], read_only: bool) -> list[_Node]:
    """Return the nodes of a chain in the order in which they are added."""
    nodes: list[_Node] = []
    parent: str | None = None
    for layer in layers:
        file_name, format_name = _node_names(layer)
        lower = read_only or layer is not layers[-1]
        nodes.append(_Node(file_name, "file", layer.path, None))
        nodes.append(_Node(format_name, layer.format, None, lower, file_name, parent))
        parent = format_name
    return nodes


def _node_options(
    layers: Sequence[ImageLayer], read_only: bool, l2_cache_bytes: int | None
) -> dict[str, Mapping[str, object]]:
    """Return the arguments of blockdev-add for each node, by its name; None leaves the size of caches to QEMU."""
    options: dict[str, Mapping[str, object]] = {}
    for node in _wanted_nodes(layers, read_only):
        if node.path is not None:
            lower = read_only or node.path != layers[-1].path
            options[node.name] = _file_options(node.name, node.path, lower=lower)
        elif node.file is not None and node.read_only is not None:
            caches = {"l2-cache-size": l2_cache_bytes} if l2_cache_bytes and node.driver == "qcow2" else {}
            options[node.name] = caches | _format_options(
                node.name, node.driver, node.file, node.backing, read_only=node.read_only
            )
    return options


def _file_options(name: str, path: str, *, lower: bool) -> Mapping[str, object]:
    options: dict[str, object] = {
        "driver": "file",
        "node-name": name,
        "filename": path,
        # Opening a file with "native" costs 20 to 36 ms (QEMU tries it out), with "threads" next to nothing. Only the
        # head has writes in flight, and reading through lower layers was as fast with either.
        "aio": "threads" if lower else "native",
        "cache": {"direct": True},
        "discard": "unmap",
        # Not "auto", which quietly goes without locks where it finds none: a second writer would not be kept out.
        "locking": "on",
    }
    if lower:
        # Not "read-only": a merge has to write to a lower layer, and QEMU then reopens the file for it.
        options["auto-read-only"] = True
    return options


def _format_options(name: str, driver: str, file: str, backing: str | None, *, read_only: bool) -> dict[str, object]:
    options: dict[str, object] = {
        "driver": driver,
        "node-name": name,
        "file": file,
        "read-only": read_only,
        "cache": {"direct": True},
        "discard": "unmap",
        "detect-zeroes": "off",
    }
    if driver == "qcow2":
        options["backing"] = backing  # null: none at all, whatever the image says
        options["lazy-refcounts"] = False  # on makes every start after a crash rebuild the refcounts
    return options


def _check_chain(layers: Sequence[ImageLayer]) -> None:
    if not layers:
        raise InvalidArgument("a chain has at least one layer")
    with_parent = [layer.id for layer in layers[1:] if layer.format == "raw"]
    if with_parent or len({layer.id for layer in layers}) != len(layers):
        raise Corrupt(
            f"the chain {' <- '.join(f'{layer.id} ({layer.format})' for layer in layers)} has a layer twice, "
            "or a raw layer above another one"
        )


def _described(nodes: Sequence[_Node]) -> str:
    """Describe the format nodes for an error message: each with its file and what it lies on."""
    paths = {node.name: node.path for node in nodes}
    parts = [
        f"{node.name} ({node.driver}, {'read-only' if node.read_only else 'writable'}, {paths.get(node.file or '')}) "
        f"on {node.backing or 'nothing'}"
        for node in nodes
        if node.driver != "file"
    ]
    return "; ".join(parts) or (f"only the files {', '.join(sorted(paths))}" if paths else "nothing")


def is_locked(path: str, *, alone: bool) -> bool:
    """Tell whether QEMU's image locks keep this file from being read or, with `alone`, whether there are any at all.

    Locks of this process count as anybody's.

    Raises:
        Unavailable: the file cannot be asked.
    """
    try:
        if alone:
            return _is_range_locked(path, _LOCK_BYTES_START, _LOCK_BYTES_LENGTH)
        return any(_is_range_locked(path, byte, 1) for byte in _LOCKS_AGAINST_READING)
    except OSError as error:
        raise Unavailable(f"the locks of {path} cannot be asked for: {error}") from error


def _lock_hint(path: str) -> str:
    """Say whether an open description holds QEMU's locks on a file."""
    try:
        is_open = _is_range_locked(path, _LOCK_BYTES_START, _LOCK_BYTES_LENGTH)
    except OSError as error:
        return f" (its locks cannot be asked for: {error})"
    return ": another process has the image open" if is_open else ""


def _is_range_locked(path: str, start: int, length: int) -> bool:
    """Ask for an OFD lock without taking it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        answer = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))
    finally:
        os.close(fd)
    return bool(answer[0] != fcntl.F_UNLCK)


def _ended_result(directory: str, detached: command.Detached) -> StopResult:
    _await_record(detached)
    status = command.find_exit_status(detached, f"{directory}/status")
    if status == 0 and _is_flushed(directory, detached):
        return StopResult.CLEAN
    return StopResult.UNCLEAN


def _await_record(detached: command.Detached | None) -> None:
    """Wait until the status of an ended daemon is recorded; if the supervisor was killed itself, it never is."""
    if detached is not None:
        command.wait_exit(detached.supervisor, _RECORD_TIMEOUT_S)


def _flushed_mark(detached: command.Detached) -> str:
    return f"{detached.process.pid} {detached.process.start_time_ticks}\n"


def _is_flushed(directory: str, detached: command.Detached) -> bool:
    try:
        return Path(f"{directory}/flushed").read_text(encoding="ascii") == _flushed_mark(detached)
    except FileNotFoundError:
        return False


def _unmount_dead(export_path: str) -> None:
    """Take away the mount that a killed daemon left; lazily, because its users may still have it open."""
    mounts.unmount(export_path, timeout_s=_UNMOUNT_TIMEOUT_S, lazy_after=True)


def _marker(key: str) -> str:
    """Return what the command line of this key's daemon contains, and no other's."""
    return f"/{key}/qmp"


def _is_key(name: str) -> bool:
    return len(name) == _KEY_LENGTH and all(digit in "0123456789abcdef" for digit in name)


@contextlib.contextmanager
def _exclusive(lock: threading.RLock, key: str) -> Iterator[None]:
    if not lock.acquire(timeout=_LOCK_TIMEOUT_S):
        raise Busy(f"another operation on storage daemon {key} is running and does not end")
    try:
        yield
    finally:
        lock.release()
