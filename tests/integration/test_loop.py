"""Loop devices on real files: idempotence, races, and backing files that die or hang under a device.

Axes: backing file (ordinary, unlinked, on a FUSE mount that is killed, on one that is stopped) × call (find, ensure,
release). Every tag is random, so that the tests see only their own devices.
"""

import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi_quobyte.errors import Busy, InvalidArgument, NotFound, Refused, Unavailable
from csi_quobyte.host import loop

SIZE_BYTES = 16 << 20
NewTag = Callable[[], str]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


def make_file(path: Path, size_bytes: int = SIZE_BYTES) -> str:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return str(path)


@pytest.fixture
def new_tag() -> Iterator[NewTag]:
    tags: list[str] = []

    def make() -> str:
        tags.append(f"zt:{secrets.token_hex(6)}")
        return tags[-1]

    yield make
    # Also a second device of a tag, which is what some tests look for.
    for device in loop.scan("zt:"):
        if device.tag in tags:
            subprocess.run(["losetup", "-d", device.path], check=False, timeout=10)
    wait_until(lambda: not any(device.tag in tags for device in loop.scan("zt:")), "the devices are free")


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """A FUSE mount that stands for a pool, and its server to kill or stop."""
    source, target = tmp_path / "source", tmp_path / "pool"
    source.mkdir()
    target.mkdir()
    argv = ["bindfs", "-f", "--multithreaded", "--forward-odirect=512", str(source), str(target)]
    server = subprocess.Popen(argv)
    try:
        wait_until(lambda: f" {target} " in Path("/proc/self/mountinfo").read_text(), "bindfs has mounted")
        yield server, target
    finally:
        server.send_signal(signal.SIGCONT)
        server.kill()
        server.wait(10)
        subprocess.run(["umount", "-n", "-c", "-l", str(target)], check=False, stderr=subprocess.DEVNULL)


def test_tag_of_is_stable_and_well_formed() -> None:
    assert loop.tag_of("cq", "vol-1") == loop.tag_of("cq", "vol-1")
    assert loop.tag_of("cq", "vol-1") != loop.tag_of("cq", "vol-2")
    assert loop.find(loop.tag_of("cq", "a key that nobody uses")) is None


@pytest.mark.parametrize("tag", ["", "cq", "cq:", "cq:12345", "CQ:0123456789ab", "cq:0123456789abc", "c1:0123456789ab"])
def test_malformed_tag_is_invalid(tag: str, tmp_path: Path) -> None:
    backing = make_file(tmp_path / "f")
    with pytest.raises(InvalidArgument):
        loop.find(tag)
    with pytest.raises(InvalidArgument):
        loop.ensure(tag, backing, read_only=False)
    with pytest.raises(InvalidArgument):
        loop.release(tag, timeout_s=1)


@pytest.mark.root
def test_ensure_binds_with_direct_io_and_data_reaches_the_file(tmp_path: Path, new_tag: NewTag) -> None:
    tag, backing = new_tag(), make_file(tmp_path / "f")
    device = loop.ensure(tag, backing, read_only=False)
    assert (device.tag, device.size_bytes, device.read_only, device.direct_io) == (tag, SIZE_BYTES, False, True)
    assert loop.find(tag) == device
    assert device in loop.scan("zt:")
    assert device not in loop.scan("cq:")
    Path(device.path).write_bytes(b"x" * 4096)
    assert loop.release(tag, timeout_s=5) == loop.Released(was_bound=True, flush_error=None)
    assert loop.find(tag) is None
    assert Path(backing).read_bytes()[:4097] == b"x" * 4096 + b"\0"


@pytest.mark.root
def test_logical_block_size_is_taken(tmp_path: Path, new_tag: NewTag) -> None:
    device = loop.ensure(new_tag(), make_file(tmp_path / "f"), read_only=False, logical_block_size=4096)
    assert Path(f"/sys/block/{device.name}/queue/logical_block_size").read_text() == "4096\n"


@pytest.mark.root
def test_direct_io_that_the_filesystem_cannot_do_is_reported(tmp_path: Path, new_tag: NewTag) -> None:
    no_direct_io = tmp_path / "no_direct_io"
    no_direct_io.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", str(no_direct_io)], check=True)
    try:
        tag = new_tag()
        assert not loop.ensure(tag, make_file(no_direct_io / "f"), read_only=False).direct_io
        loop.release(tag, timeout_s=5)
    finally:
        subprocess.run(["umount", "-l", str(no_direct_io)], check=True)


@pytest.mark.root
def test_ensure_twice_is_one_device(tmp_path: Path, new_tag: NewTag) -> None:
    tag, backing = new_tag(), make_file(tmp_path / "f")
    assert loop.ensure(tag, backing, read_only=False) == loop.ensure(tag, backing, read_only=False)


@pytest.mark.root
def test_ensure_from_many_threads_with_one_tag_is_one_device(tmp_path: Path, new_tag: NewTag) -> None:
    tag, backing = new_tag(), make_file(tmp_path / "f")
    start = threading.Barrier(8, timeout=10)

    def ensure(_: int) -> loop.LoopDevice:
        start.wait()
        return loop.ensure(tag, backing, read_only=False)

    with ThreadPoolExecutor(8) as pool:
        devices = list(pool.map(ensure, range(8)))
    assert len(set(devices)) == 1
    assert [device.tag for device in loop.scan("zt:")].count(tag) == 1


@pytest.mark.root
def test_ensure_from_many_threads_with_own_tags_are_as_many_devices(tmp_path: Path, new_tag: NewTag) -> None:
    wanted = [(new_tag(), make_file(tmp_path / f"f{n}", SIZE_BYTES + (n << 20))) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        devices = list(pool.map(lambda pair: loop.ensure(*pair, read_only=False), wanted))
    assert len({device.path for device in devices}) == 8
    assert [device.tag for device in devices] == [tag for tag, _ in wanted]
    assert [device.size_bytes for device in devices] == [SIZE_BYTES + (n << 20) for n in range(8)]


@pytest.mark.root
def test_ensure_while_another_call_holds_the_tag_is_busy(tmp_path: Path, new_tag: NewTag) -> None:
    tag, backing = new_tag(), make_file(tmp_path / "f")
    with loop._tag_lock(tag, time.monotonic()), pytest.raises(Busy):
        loop.ensure(tag, backing, read_only=False, timeout_s=0.05)
    assert loop.find(tag) is None
    other = new_tag()
    with loop._tag_lock(tag, time.monotonic()):
        assert loop.ensure(other, backing, read_only=False).tag == other


@pytest.mark.root
def test_read_only_device_refuses_writes_and_the_other_mode(tmp_path: Path, new_tag: NewTag) -> None:
    tag, backing = new_tag(), make_file(tmp_path / "f")
    device = loop.ensure(tag, backing, read_only=True)
    assert device.read_only
    with pytest.raises(PermissionError), Path(device.path).open("r+b", buffering=0) as file:
        file.write(b"x" * 512)
    with pytest.raises(Refused, match="read-only"):
        loop.ensure(tag, backing, read_only=False)
    assert loop.find(tag) == device
    writable = new_tag()
    loop.ensure(writable, backing, read_only=False)
    with pytest.raises(Refused, match="writable"):
        loop.ensure(writable, backing, read_only=True)


@pytest.mark.root
def test_ensure_with_another_file_is_refused(tmp_path: Path, new_tag: NewTag) -> None:
    tag = new_tag()
    device = loop.ensure(tag, make_file(tmp_path / "f"), read_only=False)
    with pytest.raises(Refused, match="another file"):
        loop.ensure(tag, make_file(tmp_path / "g"), read_only=False)
    assert loop.find(tag) == device


@pytest.mark.root
@pytest.mark.parametrize(("kind", "expected"), [("missing", NotFound), ("directory", Refused), ("fifo", Refused)])
def test_ensure_on_something_else_fails(kind: str, expected: type[Exception], tmp_path: Path, new_tag: NewTag) -> None:
    path, tag = tmp_path / kind, new_tag()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(expected):
        loop.ensure(tag, str(path), read_only=False)
    assert loop.find(tag) is None


@pytest.mark.root
def test_scan_ignores_devices_of_others(tmp_path: Path) -> None:
    backing = make_file(tmp_path / "f")
    argv = ["losetup", "--show", "-f", "--sizelimit", "1048576", backing]
    foreign = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    try:
        assert foreign not in [device.path for device in loop.scan("")]
    finally:
        subprocess.run(["losetup", "-d", foreign], check=True)


@pytest.mark.root
def test_refresh_size_follows_the_file(tmp_path: Path, new_tag: NewTag) -> None:
    backing = make_file(tmp_path / "f")
    device = loop.ensure(new_tag(), backing, read_only=False)
    os.truncate(backing, 3 * SIZE_BYTES)
    assert loop.find(device.tag) == device
    assert loop.refresh_size(device) == dataclasses.replace(device, size_bytes=3 * SIZE_BYTES)
    with Path(device.path).open("rb") as file:
        assert file.seek(0, os.SEEK_END) == 3 * SIZE_BYTES


@pytest.mark.root
def test_set_read_only_stops_later_writes(tmp_path: Path, new_tag: NewTag) -> None:
    device = loop.ensure(new_tag(), make_file(tmp_path / "f"), read_only=False)
    assert loop.set_read_only(device).read_only
    with pytest.raises(PermissionError), Path(device.path).open("r+b", buffering=0) as file:
        file.write(b"x" * 512)


@pytest.mark.root
@pytest.mark.alone  # the number may be somebody else's by the time it is made read-only
def test_a_number_that_was_read_only_is_writable_for_its_next_user(tmp_path: Path, new_tag: NewTag) -> None:
    first = loop.ensure(new_tag(), make_file(tmp_path / "f"), read_only=False)
    loop.set_read_only(first)
    loop.release(first.tag, timeout_s=5)
    assert Path(f"/sys/block/{first.name}/ro").read_text() == "0\n"
    # Left so by somebody else who made the number read-only and released it.
    subprocess.run(["blockdev", "--setro", first.path], check=True)
    second = loop.ensure(new_tag(), make_file(tmp_path / "g"), read_only=False)
    assert not second.read_only
    Path(second.path).write_bytes(b"x" * 512)
    if second.path != first.path:
        subprocess.run(["blockdev", "--setrw", first.path], check=True)


@pytest.mark.root
def test_a_number_that_went_to_another_tag_is_never_touched(tmp_path: Path, new_tag: NewTag) -> None:
    device = loop.ensure(new_tag(), make_file(tmp_path / "f"), read_only=False)
    stale = dataclasses.replace(device, tag=new_tag())
    loop._clear(stale)
    with pytest.raises(NotFound):
        loop.set_read_only(stale)
    with pytest.raises(NotFound):
        loop.refresh_size(stale)
    assert loop.find(device.tag) == device


@pytest.mark.root
def test_release_of_nothing_and_release_twice_succeed(tmp_path: Path, new_tag: NewTag) -> None:
    tag = new_tag()
    assert not loop.release(tag, timeout_s=1).was_bound
    loop.ensure(tag, make_file(tmp_path / "f"), read_only=False)
    assert loop.release(tag, timeout_s=5).was_bound
    assert not loop.release(tag, timeout_s=1).was_bound


@pytest.mark.root
def test_release_of_an_open_device_names_the_holder_and_ends_with_it(tmp_path: Path, new_tag: NewTag) -> None:
    tag, backing = new_tag(), make_file(tmp_path / "f")
    device = loop.ensure(tag, backing, read_only=False)
    with Path(device.path).open("rb"):
        with pytest.raises(Unavailable, match=f"pid {os.getpid()} "):
            loop.release(tag, timeout_s=0.3)
        found = loop.find(tag)
        assert found is not None
        assert found.clearing
        with pytest.raises(Unavailable, match="cleared"):
            loop.ensure(tag, backing, read_only=False)
    wait_until(lambda: loop.find(tag) is None, "freed by the last close")
    assert not loop.release(tag, timeout_s=1).was_bound


@pytest.mark.root
def test_release_of_a_mounted_device_is_refused_and_changes_nothing(tmp_path: Path, new_tag: NewTag) -> None:
    tag, target = new_tag(), tmp_path / "mnt"
    target.mkdir()
    device = loop.ensure(tag, make_file(tmp_path / "f"), read_only=False)
    subprocess.run(["mkfs.ext4", "-q", device.path], check=True)
    subprocess.run(["mount", device.path, str(target)], check=True)
    try:
        with pytest.raises(Refused, match=str(target)):
            loop.release(tag, timeout_s=5)
        assert loop.find(tag) == device
    finally:
        subprocess.run(["umount", str(target)], check=True)
    assert loop.release(tag, timeout_s=5).was_bound


@pytest.mark.root
def test_device_of_an_unlinked_file_is_found_and_released(tmp_path: Path, new_tag: NewTag) -> None:
    tag, backing = new_tag(), make_file(tmp_path / "f")
    device = loop.ensure(tag, backing, read_only=False)
    Path(backing).unlink()
    assert loop.find(tag) == device
    assert loop.release(tag, timeout_s=5).flush_error is None


@pytest.mark.root
def test_device_of_a_dead_file_is_found_refused_and_released(
    fuse: tuple["subprocess.Popen[bytes]", Path], new_tag: NewTag
) -> None:
    server, pool = fuse
    tag, backing = new_tag(), make_file(pool / "f")
    device = loop.ensure(tag, backing, read_only=False)
    fd = os.open(device.path, os.O_WRONLY)
    try:
        server.kill()
        server.wait(10)
        with pytest.raises(Unavailable):
            loop.ensure(tag, backing, read_only=False)
        subprocess.run(["umount", "-l", str(pool)], check=True)
        os.write(fd, b"x" * 4096)
        assert loop.find(tag) == device
        # The same path is a live file again, the device's own file is not: as after a daemon's restart.
        make_file(pool / "f")
        with pytest.raises(Refused, match="release it first"):
            loop.ensure(tag, backing, read_only=False)
    finally:
        os.close(fd)
    assert loop.release(tag, timeout_s=5).was_bound
    assert loop.find(tag) is None


@pytest.mark.root
def test_release_reports_cached_data_that_a_dead_file_lost(
    fuse: tuple["subprocess.Popen[bytes]", Path], new_tag: NewTag
) -> None:
    server, pool = fuse
    tag = new_tag()
    device = loop.ensure(tag, make_file(pool / "f"), read_only=False)
    fd = os.open(device.path, os.O_WRONLY)
    try:
        server.kill()
        server.wait(10)
        os.write(fd, b"x" * 4096)
        with pytest.raises(Unavailable):  # open here
            loop.release(tag, timeout_s=0.3)
        os.write(fd, b"x" * 4096)
        error = loop._flush(device, 5)
        assert error is not None
        assert "Input/output error" in error
    finally:
        os.close(fd)
    wait_until(lambda: loop.find(tag) is None, "freed by the last close")


@pytest.mark.root
def test_device_of_a_hung_file_is_found_and_release_gives_up_in_time_without_clearing(
    fuse: tuple["subprocess.Popen[bytes]", Path], new_tag: NewTag
) -> None:
    server, pool = fuse
    tag = new_tag()
    device = loop.ensure(tag, make_file(pool / "f"), read_only=False)
    fd = os.open(device.path, os.O_WRONLY)
    try:
        server.send_signal(signal.SIGSTOP)
        os.write(fd, b"x" * 4096)
        started = time.monotonic()
        assert loop.find(tag) == device
        assert time.monotonic() - started < 1
        with pytest.raises(Unavailable):
            loop.release(tag, timeout_s=0.5)
        assert time.monotonic() - started < 5
        assert loop.find(tag) == device  # not even marked for clearing
        server.send_signal(signal.SIGCONT)
        os.fsync(fd)
    finally:
        server.send_signal(signal.SIGCONT)
        os.close(fd)
    assert loop.release(tag, timeout_s=10).flush_error is None
    assert (pool / "f").read_bytes()[:4096] == b"x" * 4096


@pytest.mark.root
def test_missing_device_node_is_made(tmp_path: Path, new_tag: NewTag) -> None:
    tag, backing = new_tag(), make_file(tmp_path / "f")
    # A /dev of its own, as in a container: with loop-control and nothing else.
    script = f"""
import os, stat, subprocess
subprocess.run(["mount", "-t", "tmpfs", "none", "/dev"], check=True)
os.mknod("/dev/loop-control", stat.S_IFCHR | 0o600, os.makedev(10, 237))
os.mknod("/dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
from csi_quobyte.host import loop
device = loop.ensure({tag!r}, {backing!r}, read_only=False)
assert stat.S_ISBLK(os.stat(device.path).st_mode)
assert loop.release({tag!r}, timeout_s=5).was_bound
os.unlink(device.path)
os.mkdir(device.path)
try:
    loop._device_node(device.name)
except loop.Refused:
    print("refused")
"""
    argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
    assert loop.find(tag) is None
