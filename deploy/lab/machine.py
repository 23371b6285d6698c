"""One machine with a stand-in for a mounted Quobyte volume, and the driver's processes on it.

Used by the demo, the tests and the benchmarks. Everything that is started here is ended by `close`, by its pid, also
when a test fails in the middle; nothing else on the machine is touched.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc

from csi_quobyte.host import loop
from csi_quobyte.operations.staging import TAG_PREFIX
from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pb import csi_pb2_grpc

T = TypeVar("T")

CACHE = Path(os.environ.get("CSI_QUOBYTE_CACHE", "/var/cache/csi-quobyte"))
QEMU_DIR = Path(os.environ.get("CSI_QUOBYTE_QEMU_DIR", CACHE / "qemu/bin"))
NODE_ID = "node-1"

GIB = 1 << 30


def wait_for(what: str, attempt: Callable[[], T | None], *, timeout_s: float = 15.0) -> T:
    """Call `attempt` until it gives something true, and give that.

    Raises:
        TimeoutError: it did not within the time limit; `what` is named.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found = attempt()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.02)


def mounted_at(path: Path | str) -> bool:
    """Say whether something is mounted at exactly this path, without touching it."""
    table = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    return any(line.split(" ")[4] == str(path) for line in table.splitlines())


def run(*argv: str | Path, timeout_s: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command with a time limit and give its text output; a failure shows what it said.

    Raises:
        RuntimeError: it failed (unless `check` is false).
    """
    done = subprocess.run([str(part) for part in argv], capture_output=True, text=True, timeout=timeout_s, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))} ended with {done.returncode}: {done.stderr}{done.stdout}")
    return done


class StandIn:
    """A directory mounted with bindfs as type fuse.quobyte: what a mounted Quobyte volume looks like to the driver.

    It differs from a real one: one host, no replication, no quotas, slower, and its root has a size of 4096.
    """

    def __init__(self, directory: Path, mountpoint: Path) -> None:
        self.directory = directory
        self.path = mountpoint
        self._process: subprocess.Popen[bytes] | None = None
        self.mount()

    def mount(self) -> None:
        """Mount it, and wait until it is."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        options = "subtype=quobyte,allow_other"
        argv = ["bindfs", "-f", "-o", options, "--multithreaded", "--forward-odirect=512", self.directory, self.path]
        self._process = subprocess.Popen([str(part) for part in argv], start_new_session=True)
        try:
            wait_for(f"bindfs at {self.path}", lambda: mounted_at(self.path))
        except BaseException:  # also Ctrl-C: nobody else knows of the process yet
            self.unmount()
            raise

    @property
    def pid(self) -> int:
        """The pid of the FUSE server."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill the FUSE server: every touch of the mount gives ENOTCONN from now on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def hang(self) -> None:
        """Stop the FUSE server: every touch of the mount hangs from now on."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_for(f"bindfs at {self.path} to stop", lambda: _is_stopped(self.pid))

    def resume(self) -> None:
        """Let a hung FUSE server go on."""
        os.kill(self.pid, signal.SIGCONT)

    def unmount(self) -> None:
        """Unmount, lazily if something still uses it, and end the FUSE server."""
        if self._process and self._process.poll() is None:
            self.resume()
        if mounted_at(self.path):
            run("umount", self.path, check=False)
        while mounted_at(self.path):
            run("umount", "-l", self.path)
        if self._process:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
            if self._process.poll() is None:
                self.kill()
            self._process = None


class Process:
    """One `csi-quobyte` server process."""

    def __init__(self, arguments: Sequence[str | Path], log: Path) -> None:
        self._argv = [sys.executable, "-m", "csi_quobyte", *(str(part) for part in arguments)]
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it (again)."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._argv, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, and give the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout_s)

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Machine:
    """A stand-in, a pool on it, a controller, a node, and clients of both. Use it in a with block."""

    def __init__(
        self, base: Path, *, pools: Sequence[str] = ("main",), backing: Path | None = None, standin: bool = True
    ) -> None:
        """`base` is an empty directory with a short path; `backing` is where the first pool's files shall really lie.

        Without `standin` the pools are plain directories, for measurements in which no FUSE shall be counted.
        """
        self.base = base
        self.pools: dict[str, Path] = {}
        """Where the driver sees each pool."""
        self.directories: dict[str, Path] = {}
        """Where the files of each pool really lie: can be read while a stand-in hangs."""
        self.standins: dict[str, StandIn] = {}
        """The mounts of the pools; empty when they are plain directories."""
        self._require_mount = "quobyte-nosize" if standin else "any"
        self._exit = ExitStack()
        self._extra: list[str] = []
        self.controller_process: Process | None = None
        self._more_controllers: list[Process] = []
        self.node_process: Process | None = None
        try:
            for name in pools:
                directory = backing if backing and name == pools[0] else base / f"{name}.dir"
                self.directories[name] = directory
                self.pools[name] = self._make_pool_directory(name, directory, standin)
                self.cli("pool", "init", self.pools[name], "--require-mount", self._require_mount)
        except BaseException:
            self.close()
            raise

    def _make_pool_directory(self, name: str, directory: Path, standin: bool) -> Path:
        if standin:
            self.standins[name] = StandIn(directory, self.base / name)
            return self.standins[name].path
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    # --- the command line --------------------------------------------------------------------------------------

    @property
    def pool_path(self) -> Path:
        """Where the driver sees the first pool."""
        return next(iter(self.pools.values()))

    @property
    def pool_arguments(self) -> list[str]:
        """The --pool and --require-mount options."""
        given = [part for name, path in self.pools.items() for part in ("--pool", f"{name}={path}")]
        return [*given, "--require-mount", self._require_mount]

    def cli(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `csi-quobyte` with arguments."""
        return run(sys.executable, "-m", "csi_quobyte", *arguments, check=check)

    def check(self) -> list[dict[str, Any]]:
        """Give all findings of `csi-quobyte check` over all pools."""
        done = self.cli("check", *self.pool_arguments, "--qemu-dir", QEMU_DIR, "--json", check=False)
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stderr)
        return [finding for line in done.stdout.splitlines() for finding in json.loads(line)["findings"]]

    # --- processes ---------------------------------------------------------------------------------------------

    def start(self, *extra: str) -> None:
        """Start controller and node, and wait until both are ready. `extra` are further options for both."""
        self._extra = list(extra)
        self.start_controller()
        self.start_node()

    def _common(self, socket: Path) -> list[str | Path]:
        return ["--endpoint", f"unix://{socket}", *self.pool_arguments, "--qemu-dir", QEMU_DIR, *self._extra]

    def start_controller(self, *extra: str | Path) -> None:
        """Start the controller and wait until it is ready."""
        arguments = ["controller", *self._common(self.base / "c.sock"), *extra]
        self.controller_process = Process(arguments, self.base / "controller.log")
        self._wait_ready(self.controller_process, self.base / "c.sock")

    def start_another_controller(self, socket: str) -> None:
        """Start one more controller on the same pools, with a socket of its own, and wait until it is ready."""
        arguments = ["controller", *self._common(self.base / socket)]
        self._more_controllers.append(Process(arguments, self.base / f"{socket}.log"))
        self._wait_ready(self._more_controllers[-1], self.base / socket)

    def start_node(self, *extra: str | Path, ready: bool = True) -> None:
        """Start the node and wait until it is known in every pool and, unless `ready` is false, is ready."""
        state = self.base / "state"
        arguments = ["node", *self._common(self.base / "n.sock"), "--node-id", NODE_ID, "--state-dir", state, *extra]
        self.node_process = Process(arguments, self.base / "node.log")
        self._wait_ready(self.node_process, self.base / "n.sock", ready=ready)
        for directory in self.directories.values():
            wait_for("the node's record", partial(_holds_json, directory / "nodes"))

    def _wait_ready(self, process: Process, socket: Path, *, ready: bool = True) -> None:
        def probe() -> bool:
            if process.process is not None and process.process.poll() is not None:
                raise RuntimeError(f"the process has ended:\n{process.tail()}")
            with suppress(grpc.RpcError), grpc.insecure_channel(f"unix://{socket}") as channel:
                answer = csi_pb2_grpc.IdentityStub(channel).Probe(csi.ProbeRequest(), timeout=5)
                return bool(answer.ready.value) or not ready
            return False

        try:
            wait_for(f"{socket} to be ready", probe, timeout_s=30)
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{process.tail()}") from error

    def channel(self, socket: str) -> grpc.Channel:
        """A channel to `c.sock`, `n.sock` or another socket that lives as long as this machine."""
        return self._exit.enter_context(grpc.insecure_channel(f"unix://{self.base / socket}"))

    def close(self) -> None:
        """Unstage what is staged, end everything that was started, unmount everything below the base directory."""
        self._exit.close()
        for standin in self.standins.values():
            with suppress(ProcessLookupError):
                standin.resume()
        for process in (self.node_process, *self._more_controllers, self.controller_process):
            if process and process.process and process.process.poll() is None:
                process.process.terminate()
                try:
                    process.process.wait(40)
                except subprocess.TimeoutExpired:
                    process.kill()
        self._clear_devices()
        for standin in self.standins.values():
            standin.unmount()
        shutil.rmtree(self.base, ignore_errors=True)

    def _clear_devices(self) -> None:
        """Unmount what is below the base directory, free our loop devices, end our daemons."""
        for target in sorted(_mounts_below(self.base, but=[s.path for s in self.standins.values()]), reverse=True):
            run("umount", "-l", target, check=False)
        for device in _loops_below(self.base):
            run("losetup", "-d", device, check=False)
        for pid in _daemons_below(self.base):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for target in _mounts_below(self.base, but=[s.path for s in self.standins.values()]):
            run("umount", "-l", target, check=False)

    def leftovers(self) -> list[str]:
        """Name every mount, loop device and daemon of this machine's that is still there."""
        mounts = list(_mounts_below(self.base, but=[s.path for s in self.standins.values()]))
        return mounts + _loops_below(self.base) + [f"daemon {pid}" for pid in self.daemons()]

    def daemons(self) -> list[int]:
        """Give the pids of the storage daemons that serve volumes of this machine."""
        return _daemons_below(self.base)

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_stopped(pid: int) -> bool:
    """Say whether every thread of a process has stopped: a signal reaches one, which then stops the others."""
    with suppress(OSError):  # a thread has just ended
        states = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        return all(state.rpartition(")")[2].split()[0] in "tT" for state in states)
    return False


def _holds_json(directory: Path) -> bool:
    return any(directory.glob("*.json"))


def _mounts_below(base: Path, *, but: Sequence[Path]) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        target = line.split(" ")[4]
        if target.startswith(f"{base}/") and Path(target) not in but:
            yield target


def _loops_below(base: Path) -> list[str]:
    """Give the loop devices whose file lies below a directory, and those that a node noted there as staged.

    A device whose daemon was killed is found by the note alone: its file has no path any more.
    """
    # only the state directories of the nodes are looked into: a pool beside them may hang or be dead
    noted = {loop.tag_of(TAG_PREFIX, path.stem) for path in base.glob("state*/staged/*.json")}
    found = {device.path for device in loop.scan(f"{TAG_PREFIX}:") if device.tag in noted}
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            if entry.read_text().startswith(f"{base}/"):
                found.add(f"/dev/{entry.parts[3]}")
    return sorted(found)


def _daemons_below(base: Path) -> list[int]:
    """Give the storage daemons that were started with a directory below `base`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if any(b"qemu-storage-daemon" in word for word in words[:6]) and f"{base}/".encode() in b" ".join(words):
                found.append(int(entry.parts[2]))
    return found
