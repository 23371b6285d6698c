"""The mount table, and mounts of every state: free, stacked, busy, dead (server killed) and hung (server stopped)."""

import contextlib
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from csi_quobyte.errors import InvalidArgument, Refused, Unavailable
from csi_quobyte.host import command, loop, mounts
from csi_quobyte.host.mounts import Unmounted

pytestmark = pytest.mark.root

Server = tuple["subprocess.Popen[bytes]", str]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


def shell(*argv: str) -> None:
    subprocess.run(argv, check=True, timeout=20)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory below which everything is unmounted at the end."""
    yield tmp_path
    while below := [mount.target for mount in mounts.table() if mount.target.startswith(f"{tmp_path}/")]:
        subprocess.run(["umount", "-n", "-c", "-l", "--", below[-1]], check=True, timeout=20)


@pytest.fixture
def target(directory: Path) -> str:
    path = directory / "target"
    path.mkdir()
    return str(path)


@pytest.fixture
def fuse(directory: Path) -> Iterator[Server]:
    """A FUSE mount and its server to kill or stop."""
    source, mountpoint = directory / "source", directory / "fuse"
    source.mkdir()
    mountpoint.mkdir()
    argv = ["bindfs", "-f", "--multithreaded", "--forward-odirect=512", "-o", "subtype=quobyte"]
    server = subprocess.Popen([*argv, str(source), str(mountpoint)])
    try:
        wait_until(lambda: mounts.at(str(mountpoint)) is not None, "bindfs has mounted")
        yield server, str(mountpoint)
    finally:
        server.send_signal(signal.SIGCONT)
        server.kill()
        server.wait(10)


@pytest.fixture
def ext4(directory: Path) -> Iterator[loop.LoopDevice]:
    image, tag = directory / "image", f"zt:{secrets.token_hex(6)}"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    shell("mkfs.ext4", "-q", "-F", str(image))
    yield loop.ensure(tag, str(image), read_only=True)
    for mount in mounts.table():
        if mount.target.startswith(f"{directory}/"):
            subprocess.run(["umount", "-n", "-c", "-l", "--", mount.target], check=False, timeout=20)
    loop.release(tag, timeout_s=10)


@contextlib.contextmanager
def held_open(path: str) -> Iterator[int]:
    """Keep a new file open in a process of its own; yields its pid.

    Not in ours: every child that we start closes its copy of the descriptor, which asks the server (FUSE_FLUSH), and
    with a stopped one neither the child nor we would come back.
    """
    script = "import sys; file = open(sys.argv[1], 'w'); print('open', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", script, path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"open\n"
            yield holder.pid
        finally:
            holder.kill()


def mount_tmpfs(target: str, *options: str) -> None:
    mounts.mount("none", target, fstype="tmpfs", options=["size=1m", *options])


def test_mount_is_in_the_table_with_its_options(target: str) -> None:
    mount_tmpfs(target, "nosuid", "noexec")
    found = mounts.at(target)
    assert found is not None
    assert (found.target, found.source, found.fstype, found.root) == (target, "none", "tmpfs", "/")
    assert found.options >= {"rw", "nosuid", "noexec"}
    assert "size=1024k" in found.super_options
    assert mounts.of_device(found.major_minor) == [found]
    assert mounts.unmount(target, timeout_s=5, lazy_after=False) is Unmounted.CLEAN
    assert mounts.at(target) is None


def test_paths_with_escaped_characters_are_read_back(directory: Path) -> None:
    odd = directory / "a b\tc\nd\\e#f-é"
    odd.mkdir()
    mount_tmpfs(str(odd))
    assert mounts.at(str(odd)) is not None
    assert mounts.unmount(str(odd), timeout_s=5, lazy_after=False) is Unmounted.CLEAN


def test_mount_over_a_mount_is_refused(target: str) -> None:
    mount_tmpfs(target)
    before = mounts.at(target)
    with pytest.raises(Refused, match="already"):
        mount_tmpfs(target)
    with pytest.raises(Refused, match="already"):
        mounts.bind("/etc", target, read_only=False)
    assert mounts.at(target) == before


def test_mount_through_a_symbolic_link_is_undone(directory: Path, target: str) -> None:
    link = directory / "link"
    link.symlink_to(target)
    # mount(8) follows the link up to util-linux 2.38, and refuses it itself from 2.41 on
    with pytest.raises((Refused, Unavailable)):
        mount_tmpfs(str(link))
    with pytest.raises((Refused, Unavailable)):
        mounts.bind("/etc", str(link), read_only=True)
    assert mounts.at(target) is None


@pytest.mark.parametrize("path", ["", "relative", "/", "//x", "/a/../b", "/a/./b", "/a//b", "/a/", "-o"])
def test_path_that_is_not_normalised_is_invalid(path: str) -> None:
    before = mounts.table()
    for call in (
        lambda: mount_tmpfs(path),
        lambda: mounts.bind("/etc", path, read_only=False),
        lambda: mounts.bind(path, "/nonexistent", read_only=False),
        lambda: mounts.unmount(path, timeout_s=1, lazy_after=True),
    ):
        with pytest.raises(InvalidArgument):
            call()
    assert mounts.table() == before


def test_failed_mount_is_unavailable_and_leaves_nothing(target: str) -> None:
    with pytest.raises(Unavailable):
        mounts.mount("/dev/null", target, fstype="ext4", options=[])
    assert mounts.at(target) is None


def test_write_protected_device_mounts_only_when_asked_read_only(target: str, ext4: loop.LoopDevice) -> None:
    with pytest.raises(Unavailable):
        mounts.mount(ext4.path, target, fstype="ext4", options=["noatime"])
    assert mounts.at(target) is None
    mounts.mount(ext4.path, target, fstype="ext4", options=["noatime", "ro"])
    found = mounts.at(target)
    assert found is not None
    assert found.options >= {"ro", "noatime"}
    assert mounts.of_device(ext4.major_minor) == [found]


def test_bind_shows_the_source_and_keeps_its_flags(directory: Path, target: str) -> None:
    source = directory / "tmpfs"
    source.mkdir()
    mount_tmpfs(str(source), "nosuid", "nodev")
    (source / "sub").mkdir()
    mounts.bind(str(source / "sub"), target, read_only=False)
    Path(target, "file").write_text("x")
    assert (source / "sub" / "file").read_text() == "x"
    found = mounts.at(target)
    assert found is not None
    assert found.root == "/sub"
    assert found.options >= {"rw", "nosuid", "nodev"}
    assert len(mounts.of_device(found.major_minor)) == 2


def test_read_only_bind_is_read_only_there_alone(directory: Path, target: str) -> None:
    source = directory / "tmpfs"
    source.mkdir()
    mount_tmpfs(str(source), "nosuid")
    mounts.bind(str(source), target, read_only=True)
    with pytest.raises(OSError, match="Read-only"):
        Path(target, "file").write_text("x")
    (source / "file").write_text("x")
    found = mounts.at(target)
    assert found is not None
    assert found.options >= {"ro", "nosuid"}


def test_bind_of_a_device_node_on_a_file(directory: Path) -> None:
    target = directory / "device"
    target.touch()
    mounts.bind("/dev/null", str(target), read_only=False)
    assert target.is_char_device()
    assert mounts.unmount(str(target), timeout_s=5, lazy_after=False) is Unmounted.CLEAN
    assert target.is_file()


def test_read_only_bind_that_cannot_become_read_only_is_undone(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = command.run

    def run(argv: Sequence[str], *, timeout_s: float) -> command.Completed:
        broken = ["-o", "remount,bind,ro", "/nonexistent/mountpoint"]
        return real([*argv[:-3], *broken] if "remount,bind,ro" in argv else argv, timeout_s=timeout_s)

    monkeypatch.setattr(command, "run", run)
    with pytest.raises(Unavailable):
        mounts.bind("/etc", target, read_only=True)
    assert mounts.at(target) is None


def test_unmount_of_nothing_is_not_mounted(target: str) -> None:
    assert mounts.unmount(target, timeout_s=5, lazy_after=False) is Unmounted.NOT_MOUNTED
    assert mounts.unmount("/nonexistent/x", timeout_s=5, lazy_after=False) is Unmounted.NOT_MOUNTED


def test_unmount_removes_all_stacked_mounts(target: str) -> None:
    for size in ("1m", "2m", "3m"):
        shell("mount", "-t", "tmpfs", "-o", f"size={size}", "none", target)
    top = mounts.at(target)
    assert top is not None
    assert "size=3072k" in top.super_options
    assert mounts.unmount(target, timeout_s=5, lazy_after=False) is Unmounted.CLEAN
    assert not [mount for mount in mounts.table() if mount.target == target]


def test_unmount_of_a_busy_working_mount_is_refused_with_the_users_names(target: str) -> None:
    mount_tmpfs(target)
    with held_open(f"{target}/file") as pid, pytest.raises(Refused, match=f"pid {pid} "):
        mounts.unmount(target, timeout_s=5, lazy_after=True)
    Path(target, "sub").mkdir()
    mount_tmpfs(f"{target}/sub")
    with pytest.raises(Refused, match=f"the mount {target}/sub"):
        mounts.unmount(target, timeout_s=5, lazy_after=True)
    assert mounts.at(target) is not None


def test_hung_busy_mount_is_unmounted_lazily_within_the_limit(fuse: Server) -> None:
    server, mountpoint = fuse
    with held_open(f"{mountpoint}/file"):
        server.send_signal(signal.SIGSTOP)
        try:
            started = time.monotonic()
            assert mounts.at(mountpoint) is not None
            with pytest.raises(Unavailable):
                mounts.unmount(mountpoint, timeout_s=1, lazy_after=False)
            assert mounts.at(mountpoint) is not None
            assert mounts.unmount(mountpoint, timeout_s=1, lazy_after=True) is Unmounted.LAZY
            assert time.monotonic() - started < 10
            assert mounts.at(mountpoint) is None
        finally:
            server.send_signal(signal.SIGCONT)  # the holder cannot end before


def test_unmount_that_hangs_is_done_lazily_within_the_limit(fuse: Server, directory: Path) -> None:
    # ext4 on a device on a hung file: the plain umount has to write and cannot.
    server, mountpoint = fuse
    image, target, tag = Path(mountpoint, "image"), directory / "target", f"zt:{secrets.token_hex(6)}"
    target.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    device = loop.ensure(tag, str(image), read_only=False)
    try:
        shell("mkfs.ext4", "-q", device.path)
        mounts.mount(device.path, str(target), fstype="ext4", options=[])
        Path(target, "file").write_bytes(b"x" * 65536)
        server.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        assert mounts.unmount(str(target), timeout_s=1, lazy_after=True) is Unmounted.LAZY
        assert time.monotonic() - started < 10
        assert mounts.at(str(target)) is None
    finally:
        server.send_signal(signal.SIGCONT)
        wait_until(lambda: _released(tag), "the filesystem has let its device go")


def _released(tag: str) -> bool:
    try:
        loop.release(tag, timeout_s=1)
    except Unavailable:
        return False
    return True


def test_dead_busy_mount_is_unmounted_lazily(fuse: Server) -> None:
    server, mountpoint = fuse
    with held_open(f"{mountpoint}/file"):
        server.kill()
        server.wait(10)
        assert mounts.unmount(mountpoint, timeout_s=5, lazy_after=True) is Unmounted.LAZY
    assert mounts.at(mountpoint) is None


def test_dead_idle_mount_is_unmounted(fuse: Server) -> None:
    server, mountpoint = fuse
    server.kill()
    server.wait(10)
    assert mounts.unmount(mountpoint, timeout_s=5, lazy_after=False) is Unmounted.CLEAN


def test_busy_filesystem_on_a_dead_device_is_unmounted_lazily(fuse: Server, directory: Path) -> None:
    server, mountpoint = fuse
    image, target, tag = Path(mountpoint, "image"), directory / "target", f"zt:{secrets.token_hex(6)}"
    target.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    device = loop.ensure(tag, str(image), read_only=False)
    try:
        shell("mkfs.ext4", "-q", device.path)
        mounts.mount(device.path, str(target), fstype="ext4", options=[])
        with held_open(f"{target}/file"):
            with pytest.raises(Refused):
                mounts.unmount(str(target), timeout_s=5, lazy_after=True)
            server.kill()
            server.wait(10)
            with pytest.raises(Unavailable):
                mounts.unmount(str(target), timeout_s=5, lazy_after=False)
            assert mounts.unmount(str(target), timeout_s=5, lazy_after=True) is Unmounted.LAZY
            with pytest.raises(Unavailable):  # the open file holds the filesystem, and that the device
                loop.release(tag, timeout_s=0.2)
        wait_until(lambda: loop.find(tag) is None, "the filesystem has let its device go")
    finally:
        subprocess.run(["umount", "-n", "-c", "-l", "-q", str(target)], check=False, timeout=20)
        wait_until(lambda: _released(tag), "the device is free")
