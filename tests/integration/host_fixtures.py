"""Fixtures for what runs on a host: a measured QEMU, a directory on a stand-in pool, storage daemons.

What a fixture starts or mounts it also ends, when the test has failed too.

Use in a test module: `pytest_plugins = ["host_fixtures"]`. QEMU is taken from $CSI_QUOBYTE_QEMU_DIR, else from the
cache that tests/tools/setup.sh fills, else from PATH.

PYTEST_DONT_REWRITE: test modules import helpers from here before pytest loads it as a plugin.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_quobyte.host import mounts
from csi_quobyte.host.qemu import ImageLayer, QemuTools, find_tools
from csi_quobyte.host.qsd import Daemons

MIB = 1 << 20
SIZE_BYTES = 64 * MIB


@dataclass(frozen=True)
class Standin:
    """A bindfs mount that stands for a mounted Quobyte volume."""

    directory: Path
    """What is below the mount."""
    mountpoint: Path
    pid: int


@dataclass(frozen=True)
class DaemonSet:
    """Storage daemons of one state directory."""

    daemons: Daemons
    state_dir: str
    key: str
    """A key that no other test uses."""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.005)


def make_chain(tools: QemuTools, directory: Path, length: int = 3, size_bytes: int = SIZE_BYTES) -> list[ImageLayer]:
    """Make a chain of empty qcow2 overlays, base first; backing strings are right and relative."""
    layers: list[ImageLayer] = []
    for _ in range(length):
        layer_id = secrets.token_hex(12)
        backing = ["-b", layers[-1].id, "-F", "qcow2"] if layers else []
        path = directory / layer_id
        argv = [tools.qemu_img, "create", "-q", "-u", "-f", "qcow2", *backing, str(path), str(size_bytes)]
        subprocess.run(argv, check=True, timeout=30)
        layers.append(ImageLayer(layer_id, str(path), "qcow2"))
    return layers


def write_image(tools: QemuTools, layer: ImageLayer, pattern: int, offset_bytes: int, length_bytes: int) -> None:
    """Write a pattern into one layer alone (its backing file is not opened)."""
    options = f"driver={layer.format},file.driver=file,file.filename={layer.path}"
    backing = ",backing=" if layer.format == "qcow2" else ""
    qemu_io = str(Path(tools.qemu_img).with_name("qemu-io"))
    script = f"write -q -P {pattern} {offset_bytes} {length_bytes}"
    subprocess.run([qemu_io, "--image-opts", options + backing, "-c", script], check=True, timeout=30)


@contextmanager
def standin_mount(directory: Path, mountpoint: Path) -> Iterator[Standin]:
    directory.mkdir(exist_ok=True)
    mountpoint.mkdir()
    options = ["-o", "subtype=quobyte,allow_other", "--multithreaded", "--forward-odirect=512"]
    server = subprocess.Popen(["bindfs", "-f", *options, str(directory), str(mountpoint)])
    try:
        wait_until(lambda: mounts.at(str(mountpoint)) is not None, "bindfs has mounted")
        yield Standin(directory, mountpoint, server.pid)
    finally:
        # Killed and not asked: a test may have stopped it, or left files open.
        server.kill()
        server.wait(10)
        while mounts.at(str(mountpoint)) is not None:
            subprocess.run(["umount", "-n", "-c", "-l", str(mountpoint)], check=True, timeout=10)


@pytest.fixture(scope="session")
def tools() -> QemuTools:
    cache = os.environ.get("CSI_QUOBYTE_CACHE", "/var/cache/csi-quobyte")
    qemu_dir = os.environ.get("CSI_QUOBYTE_QEMU_DIR", f"{cache}/qemu/bin")
    return find_tools(qemu_dir if Path(qemu_dir).is_dir() else None)


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[Standin]:
    with standin_mount(tmp_path / "bricks", tmp_path / "pool") as mounted:
        yield mounted


@pytest.fixture(params=["plain", "standin"])
def image_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory for images: an ordinary one, and one on a stand-in pool."""
    if request.param == "standin":
        mounted: Standin = request.getfixturevalue("standin")
        return mounted.mountpoint
    plain = tmp_path / "plain"
    plain.mkdir()
    return plain


@pytest.fixture
def daemon_set(tools: QemuTools) -> Iterator[DaemonSet]:
    # Not tmp_path, which can be too long for a socket.
    state_dir = tempfile.mkdtemp(prefix="csiq-")
    daemons = Daemons(tools, state_dir)
    yield DaemonSet(daemons, state_dir, secrets.token_hex(12))
    left = daemons.keys()
    for key in left:
        kill_daemon(daemons, key)
        daemons.forget(key)
    shutil.rmtree(state_dir)


def kill_daemon(daemons: Daemons, key: str) -> None:
    """End a daemon with SIGKILL, whatever it does, and wait until it has ended."""
    daemon = daemons.find(key)
    if daemon is not None:
        with suppress(ProcessLookupError):
            os.kill(daemon.pid, signal.SIGKILL)
        wait_until(lambda: daemons.find(key) is None, "the daemon has ended")
