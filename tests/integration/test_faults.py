"""The faults of the field: a pool that is dead, hangs, is full or is not mounted, and a daemon that was killed.

The axes: what fails, and which call meets it. Wanted of every call: an answer within its time limit, a code that makes
the caller retry, and that all goes on with the same ids once the fault is over, without a restart of anything.
"""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from running import GIB, MIB, Code, discard, eventually, fails, findings_left, listing, read_tree, running, write_tree

from csi_quobyte.pb import csi_pb2 as csi
from lab.client import Client, block_capability, code_of, mount_capability
from lab.machine import Machine, run, wait_for

pytestmark = pytest.mark.root

VOLUME_BYTES = 64 * MIB
POOL_TIMEOUT_S = 3.0
SLACK_S = 5.0
"""What the issue allows above the pool's time limit."""
PROBE_S = 5.0
HANG_S = 15.0


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with running("--pool-timeout", f"{POOL_TIMEOUT_S:g}s", pools=("main", "second")) as machine:
        yield machine


@pytest.fixture
def calls(machine: Machine) -> Iterator[Client]:
    client = Client(machine)
    yield client
    for standin in machine.standins.values():
        standin.resume()
    for snapshot in eventually(client.controller.ListSnapshots, csi.ListSnapshotsRequest()).entries:
        client.delete_snapshot(snapshot.snapshot.snapshot_id)
    for volume in eventually(client.controller.ListVolumes, csi.ListVolumesRequest()).entries:
        discard(client, volume.volume.volume_id)
    assert machine.leftovers() == []


@contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def unavailable(call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    with within(POOL_TIMEOUT_S + SLACK_S):
        fails(Code.UNAVAILABLE, call, *arguments, **named)


def unavailable_again(call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """A repeated call on an object whose first call hangs: that one still has it."""
    with within(POOL_TIMEOUT_S + SLACK_S):
        assert code_of(call, *arguments, **named) in (Code.UNAVAILABLE, Code.ABORTED)


def release_slowly(calls: Client, volume: str) -> None:
    """Unpublish and unstage within the deadline of one call each: done, or UNAVAILABLE and done by a retry."""
    for call in (calls.unpublish, calls.unstage):
        eventually(call, volume, timeout_s=60)


# --- a dead pool -----------------------------------------------------------------------------------------------


def test_a_pool_whose_client_died_comes_back(machine: Machine, calls: Client) -> None:
    volume = calls.create("before", VOLUME_BYTES, pool="main").volume_id
    spare = calls.create("spare", VOLUME_BYTES, pool="main").volume_id
    target = calls.use(volume)
    sums = write_tree(target, files=2)
    standin = machine.standins["main"]
    standin.kill()
    try:
        stub = calls.controller
        unavailable(calls.create, "during", VOLUME_BYTES, pool="main")
        unavailable(calls.delete, spare)
        unavailable(calls.attach, spare)
        unavailable(calls.detach, volume)
        unavailable(calls.expand, spare, GIB)
        unavailable(calls.snapshot, "moment", spare)
        unavailable(stub.ControllerGetVolume, csi.ControllerGetVolumeRequest(volume_id=spare))
        unavailable(stub.ListVolumes, csi.ListVolumesRequest())
        unavailable(stub.GetCapacity, csi.GetCapacityRequest(parameters={"pool": "main"}))
        unavailable(calls.stage, spare, {"generation": "1"})
        release_slowly(calls, volume)
        assert machine.leftovers() == []
    finally:
        standin.unmount()
        standin.mount()
    eventually(calls.detach, volume)
    assert read_tree(calls.use(volume)) == sums
    calls.release(volume)
    assert calls.create("spare", VOLUME_BYTES, pool="main").volume_id == spare
    calls.delete(calls.create("during", VOLUME_BYTES, pool="main").volume_id)


# --- a pool that hangs -----------------------------------------------------------------------------------------


class Writer:
    """Writes and syncs for ever; a hang of its pool makes it wait and nothing else."""

    def __init__(self, path: Path) -> None:
        self.written = 0
        self.error: OSError | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write, args=(path,))
        self._thread.start()

    def _write(self, path: Path) -> None:
        try:
            with path.open("wb", buffering=0) as file:
                while not self._stopping.is_set():
                    os.pwrite(file.fileno(), b"%020d" % self.written, 0)
                    os.fsync(file.fileno())
                    self.written += 1
        except OSError as error:
            self.error = error

    def await_progress(self) -> None:
        target = self.written + 5
        wait_for("the writer to go on", lambda: self.written >= target or self.error, timeout_s=40)
        assert self.error is None

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(40)
        assert not self._thread.is_alive()


def story_in(calls: Client, pool: str, name: str, filesystem: str) -> None:
    """Create, write, release and delete a volume, each call well within the limit of a pool."""
    capability = mount_capability(filesystem)
    size_bytes = 300 * MIB if filesystem == "xfs" else VOLUME_BYTES
    volume = calls.create(name, size_bytes, capability=capability, pool=pool).volume_id
    write_tree(calls.use(volume, capability=capability), files=1)
    calls.release(volume)
    calls.delete(volume)


@pytest.mark.timeout(180)
def test_a_pool_that_hangs_holds_up_nothing_else(machine: Machine, calls: Client) -> None:
    volume = calls.create("hangs", VOLUME_BYTES, pool="main").volume_id
    spare = calls.create("spare", VOLUME_BYTES, pool="main").volume_id
    writer = Writer(calls.use(volume) / "counter")
    standin = machine.standins["main"]
    try:
        writer.await_progress()
        standin.hang()
        since = time.monotonic()
        number = 0
        while time.monotonic() - since < HANG_S:
            refused = unavailable_again if number else unavailable
            refused(calls.create, "during", VOLUME_BYTES, pool="main")
            refused(calls.attach, spare)
            refused(calls.stage, spare, {"generation": "1"})
            for identity in (calls.identity, calls.node_identity):
                with within(PROBE_S):
                    assert identity.Probe(csi.ProbeRequest(), timeout=PROBE_S).ready.value, "one of two pools is well"
            story_in(calls, "second", f"meanwhile{number}", "ext4")
            number += 1
        standin.resume()
        writer.await_progress()
    finally:
        standin.resume()
        writer.stop()
    assert writer.error is None
    eventually(calls.attach, spare)
    eventually(calls.detach, spare)
    eventually(calls.delete, eventually(calls.create, "during", VOLUME_BYTES, pool="main").volume_id)
    calls.release(volume)
    assert (calls.use(volume) / "counter").read_bytes() == b"%020d" % (writer.written - 1)
    calls.release(volume)


def test_mkfs_of_xfs_does_not_hang_with_another_pool(machine: Machine, calls: Client) -> None:
    """mkfs.xfs looks at every mount point of the machine unless it is kept from doing so."""
    standin = machine.standins["main"]
    standin.hang()
    try:
        story_in(calls, "second", "xfs", "xfs")
    finally:
        standin.resume()


def test_unstage_from_a_pool_that_hangs_ends_in_time_and_a_retry_completes(machine: Machine, calls: Client) -> None:
    volume = calls.create("stuck", VOLUME_BYTES, pool="main").volume_id
    sums = write_tree(calls.use(volume), files=1)
    standin = machine.standins["main"]
    standin.hang()
    try:
        with within(POOL_TIMEOUT_S + SLACK_S):
            try:
                calls.unpublish(volume)
                calls.unstage(volume)
            except grpc.RpcError as error:
                assert error.code() in (Code.UNAVAILABLE, Code.ABORTED), error.details()
    finally:
        standin.resume()
    release_slowly(calls, volume)
    assert machine.leftovers() == []
    calls.detach(volume)
    assert read_tree(calls.use(volume)) == sums
    calls.release(volume)


# --- a daemon that was killed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("access_type", ["mount", "block"])
def test_a_killed_daemon_under_a_staged_volume(machine: Machine, calls: Client, access_type: str) -> None:
    capability = mount_capability() if access_type == "mount" else block_capability()
    volume = calls.create("killed", VOLUME_BYTES, capability=capability, pool="main").volume_id
    context = calls.attach(volume, capability=capability)

    def use() -> Path:
        calls.stage(volume, context, capability=capability)
        return calls.publish(volume, context, capability=capability)

    def flushed(target: Path) -> object:
        return read_tree(target) if access_type == "mount" else target.open("rb").read(4096)

    target = use()
    if access_type == "mount":
        write_tree(target, files=2)
    else:
        with target.open("r+b", buffering=0) as device:
            device.write(os.urandom(4096))
            os.fsync(device.fileno())
    before = flushed(target)
    for pid in machine.daemons():
        os.kill(pid, signal.SIGKILL)
    wait_for("the daemon to end", lambda: not machine.daemons())
    fails(Code.FAILED_PRECONDITION, calls.stage, volume, context, capability=capability, saying=str(target))
    eventually(calls.unpublish, volume)
    assert flushed(use()) == before, "staged again without an unstage between"
    eventually(calls.unpublish, volume)
    for pid in machine.daemons():
        os.kill(pid, signal.SIGKILL)
    eventually(calls.unstage, volume)
    assert machine.leftovers() == []
    assert flushed(use()) == before
    calls.release(volume)


# --- a pool that is not mounted --------------------------------------------------------------------------------


def test_nothing_is_written_below_a_pool_that_is_not_mounted(machine: Machine, calls: Client) -> None:
    volume = calls.create("safe", VOLUME_BYTES, pool="second").volume_id
    context = calls.attach(volume)
    calls.detach(volume)
    standin = machine.standins["second"]
    standin.unmount()
    try:
        assert list(standin.path.iterdir()) == []
        for call, arguments in (
            (calls.create, ("new", VOLUME_BYTES)),
            (calls.create, ("safe", VOLUME_BYTES)),
        ):
            unavailable(call, *arguments, pool="second")
        unavailable(calls.delete, volume)
        unavailable(calls.attach, volume)
        unavailable(calls.snapshot, "moment", volume)
        unavailable(calls.stage, volume, context)
        unavailable(calls.create, "copy", 0, pool="second", volume=volume)
        story_in(calls, "main", "elsewhere", "ext4")
        assert list(standin.path.iterdir()) == []
        assert calls.identity.Probe(csi.ProbeRequest()).ready.value
    finally:
        standin.mount()
    assert eventually(calls.create, "safe", VOLUME_BYTES, pool="second").volume_id == volume
    calls.use(volume)
    calls.release(volume)


def test_processes_started_without_their_pool_serve_it_once_it_is_there(machine: Machine, calls: Client) -> None:
    volume = calls.create("late", VOLUME_BYTES, pool="second").volume_id
    assert machine.controller_process is not None
    machine.controller_process.stop()
    standin = machine.standins["second"]
    standin.unmount()
    try:
        machine.start_controller()
        unavailable(calls.create, "new", VOLUME_BYTES, pool="second")
        unavailable(calls.delete, volume)
    finally:
        standin.mount()
    eventually(calls.delete, volume)


# --- a full pool -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[Machine, Path]]:
    """A pool on an ext4 of 64 MiB, and a directory of the same file system to fill it from outside."""
    with tempfile.TemporaryDirectory(prefix="cqf-", dir="/tmp") as name:
        image, mountpoint = Path(name) / "image", Path(name) / "small"
        mountpoint.mkdir()
        image.touch()
        os.truncate(image, 64 * MIB)
        run("mkfs.ext4", "-q", "-m", "0", "-b", "4096", "-N", "4096", image)
        run("mount", "-o", "loop", image, mountpoint)
        try:
            with running(backing=mountpoint / "pool") as machine:
                yield machine, mountpoint
        finally:
            run("umount", mountpoint)


@pytest.fixture
def small_calls(small: tuple[Machine, Path]) -> Iterator[Client]:
    """A client for the small pool, which is emptied after each test."""
    machine, mountpoint = small
    client = Client(machine)
    yield client
    (mountpoint / "filler").unlink(missing_ok=True)
    for snapshot in client.controller.ListSnapshots(csi.ListSnapshotsRequest()).entries:
        client.delete_snapshot(snapshot.snapshot.snapshot_id)
    for volume in client.controller.ListVolumes(csi.ListVolumesRequest()).entries:
        discard(client, volume.volume.volume_id)


def free_bytes(mountpoint: Path) -> int:
    found = os.statvfs(mountpoint)
    return found.f_bavail * found.f_frsize


def fill(mountpoint: Path, *, leave_bytes: int) -> None:
    """Make a file so large, or larger, that at most so much space is left."""
    run("sync", "-f", mountpoint)
    with (mountpoint / "filler").open("ab") as file:
        offset_bytes = os.fstat(file.fileno()).st_size
        while (more_bytes := min(free_bytes(mountpoint) - leave_bytes, MIB)) > 0:
            with suppress(OSError):  # the file's own map takes a block now and then
                os.posix_fallocate(file.fileno(), offset_bytes, more_bytes)
            offset_bytes += more_bytes
    assert free_bytes(mountpoint) <= leave_bytes


@pytest.mark.parametrize("leave_kib", [0, 8, 16])
def test_a_full_pool_is_resource_exhausted_and_nothing_is_left(small: tuple[Machine, Path], leave_kib: int) -> None:
    machine, mountpoint = small
    calls = Client(machine)
    volume = calls.create("before", VOLUME_BYTES).volume_id
    sums = write_tree(calls.use(volume), files=2)
    calls.release(volume)
    doomed = calls.create("doomed", VOLUME_BYTES).volume_id
    try:
        for call, arguments in (
            (calls.create, {"name": "no room", "size_bytes": MIB, "capability": block_capability()}),
            (calls.snapshot, {"name": "no room", "volume_id": volume}),
            (calls.create, {"name": "no clone", "size_bytes": 0, "volume": volume}),
        ) * 2:
            # each time, because undoing an attempt may use up a file of the pool's reserve, whose space is free then
            fill(mountpoint, leave_bytes=leave_kib * 1024)
            before = listing(machine.directories["main"])
            fails(Code.RESOURCE_EXHAUSTED, call, **arguments)
            assert listing(machine.directories["main"]) == before
        calls.delete(doomed)
    finally:
        (mountpoint / "filler").unlink()
    snapshot = calls.snapshot("no room", volume).snapshot_id
    restored = calls.create("restored", 0, snapshot=snapshot).volume_id
    assert read_tree(calls.use(restored)) == sums
    calls.release(restored)
    calls.delete_snapshot(snapshot)
    for one in (volume, restored):
        calls.delete(one)
    assert findings_left(machine) == []


def test_create_accepts_exactly_what_get_capacity_says(small_calls: Client) -> None:
    """Nobody else writes here, and after the first volume it is the promised sum that decides, not the free space."""
    calls = small_calls
    first = calls.create("first", 600 * MIB).volume_id
    answer = calls.controller.GetCapacity(csi.GetCapacityRequest())
    fits = answer.available_capacity // MIB * MIB
    assert fits > 0
    assert answer.maximum_volume_size.value == answer.available_capacity
    fails(Code.RESOURCE_EXHAUSTED, calls.create, "second", fits + MIB, saying="are left; delete volumes")
    second = calls.create("second", fits).volume_id
    fails(Code.RESOURCE_EXHAUSTED, calls.create, "third", MIB, capability=block_capability())
    fails(Code.RESOURCE_EXHAUSTED, calls.expand, first, 600 * MIB + fits)
    calls.delete(first)
    calls.delete(second)
    assert calls.controller.GetCapacity(csi.GetCapacityRequest()).available_capacity > 600 * MIB
