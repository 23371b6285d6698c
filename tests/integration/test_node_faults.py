"""A node that stops, that has lost a volume, or that cannot look whether it has: no write is lost, none comes late.

The axes: what the node does (SIGTERM, fence, unstage, publish, start), the data path, the access type, and what it can
learn of the attachment: ours, taken away, or nothing because the pool hangs or is gone.
"""

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from node_kit import Host
from running import MIB, discard, eventually, machine_of, read_tree, write_tree
from test_interleavings import BLOCK, SIZE, Hosts, hosts, known_host

from csi_quobyte.config import PoolSpec
from csi_quobyte.errors import Busy, Refused, Unavailable
from csi_quobyte.host import filesystem, loop
from csi_quobyte.host.qsd import Daemon, StopResult
from csi_quobyte.host.staged import StagedNote, StagedNotes
from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pool.pools import Pools
from csi_quobyte.pool.records import VolumeRecord
from csi_quobyte.rpc import node as node_module
from csi_quobyte.rpc.node import Attachments, Fence, NodeService, Standing
from lab.client import Client
from lab.machine import run, wait_for

__all__ = ["hosts"]  # a fixture
pytestmark = pytest.mark.root

DEADLINE_S = 20.0
LOOP: dict[str, Any] = {"image_format": "raw", "data_path": "loop"}
QUIET: dict[str, Any] = {"mkfs_options": ("-E", "lazy_itable_init=0,lazy_journal_init=0")}
"""ext4 would otherwise go on with its tables in the background: a node that lost its volume is to be quiet."""
STALE = b"of the node that lost the volume"


def never(volume_id: str) -> bool:
    """No volume was taken away."""
    return False


def pools_of(host: Host, timeout_s: float = DEADLINE_S) -> Pools:
    return Pools([PoolSpec("main", host.kit.store.root)], require_mount="quobyte-nosize", timeout_s=timeout_s)


def attachments_of(host: Host, timeout_s: float = DEADLINE_S) -> Attachments:
    return Attachments(host.node, pools_of(host, timeout_s), timeout_s=timeout_s)


def image_of(hosts: Hosts, volume: VolumeRecord) -> Path:
    return next(
        path
        for path in (hosts.machine.directories["main"] / "layers").glob(f"*/{volume.head}.*")
        if path.suffix in (".raw", ".qcow2")
    )


def sum_of(image: Path) -> str:
    return hashlib.sha256(image.read_bytes()).hexdigest()


# --- SIGTERM ---------------------------------------------------------------------------------------------------


def test_a_flush_that_fails_does_not_keep_the_daemon_from_its_own(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = hosts.a
    volume = a.kit.create("v", size=SIZE)
    generation = a.attach(volume)
    a.stage(volume, generation)
    target = a.publish(volume, generation, "target")
    stopped: list[StopResult] = []
    plain = Daemon.stop

    def stop(daemon: Daemon, *, timeout_s: float) -> StopResult:
        stopped.append(plain(daemon, timeout_s=timeout_s))
        return stopped[-1]

    def refuse(*_: object, **__: object) -> None:
        raise Unavailable("the device refuses")

    monkeypatch.setattr(Daemon, "stop", stop)
    with monkeypatch.context() as patched:
        patched.setattr(filesystem, "sync", refuse)
        assert not a.node.stop_all(timeout_s=DEADLINE_S, is_taken=never), "what was not flushed is not said to be"
    assert stopped == [StopResult.CLEAN]
    assert a.daemon_pid(volume) is None
    a.node.unpublish(volume.id, str(target))
    a.unstage(volume)
    assert hosts.machine.leftovers() == []


def test_one_that_hangs_does_not_keep_the_others_from_being_flushed(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = hosts.a
    volumes = [a.kit.create(name, **BLOCK) for name in ("hangs", "flushed")]
    for volume in volumes:
        a.stage(volume, a.attach(volume))
    # the first in order is the one that hangs
    hung, other = sorted(volumes, key=lambda one: a.node._key(one.id))
    hung_tag, go_on = a.node._key(hung.id), threading.Event()
    plain = type(a.node)._quiesce

    def quiesce(node: Any, key: str, deadline: float) -> None:
        if key == hung_tag:
            go_on.wait(DEADLINE_S)
        plain(node, key, deadline)

    monkeypatch.setattr(type(a.node), "_quiesce", quiesce)
    started = time.monotonic()
    try:
        assert not a.node.stop_all(timeout_s=4.0, is_taken=never)
        assert time.monotonic() - started < 6.0
        assert a.daemon_pid(other) is None
        assert a.daemon_pid(hung) is not None
    finally:
        go_on.set()
    wait_for("the late one to end", lambda: a.daemon_pid(hung) is None)
    monkeypatch.undo()
    for volume in volumes:
        a.node.unstage(volume.id, str(a.staging_path))
    assert hosts.machine.leftovers() == []


def test_what_was_taken_away_is_not_flushed_at_the_end(hosts: Hosts) -> None:
    a = hosts.a
    taken, ours = a.kit.create("taken", **BLOCK), a.kit.create("ours", **BLOCK)
    for volume in (taken, ours):
        a.stage(volume, a.attach(volume))
    opened = {volume.id: os.open(a.device(volume), os.O_RDWR) for volume in (taken, ours)}
    for fd in opened.values():
        os.pwrite(fd, STALE * 4096, 0)  # cached in the kernel
    a.detach(taken)
    before = sum_of(image_of(hosts, taken))
    a.node.stop_all(timeout_s=DEADLINE_S, is_taken=attachments_of(a).is_surely_taken)
    assert a.daemon_pid(taken) is None
    assert a.daemon_pid(ours) is None
    for fd in opened.values():
        os.close(fd)
    assert sum_of(image_of(hosts, taken)) == before
    assert STALE in image_of(hosts, ours).read_bytes()
    for volume in (taken, ours):
        a.node.unstage(volume.id, str(a.staging_path), stale=volume is taken)
    assert hosts.machine.leftovers() == []


@pytest.mark.timeout(180)
def test_the_time_to_stop_holds_while_a_pool_hangs() -> None:
    with machine_of(pools=("main", "second")) as machine:
        machine.start("--pool-timeout", "3s")
        assert machine.node_process is not None
        machine.node_process.stop()
        machine.start_node("--stop-daemons-on-exit", "--stop-timeout", "12s")
        calls, data = Client(machine), os.urandom(4 * MIB)
        stuck = calls.create("stuck", 64 * MIB, pool="main").volume_id
        well = calls.create("well", 64 * MIB, pool="second").volume_id
        for volume in (stuck, well):
            (calls.use(volume) / "cached").write_bytes(data)
        machine.standins["main"].hang()
        started = time.monotonic()
        assert machine.node_process.stop() == 0
        assert time.monotonic() - started < 16
        machine.standins["main"].resume()
        machine.start_node()
        for call in (calls.unpublish, calls.unstage, calls.detach):
            eventually(call, well)
        assert (calls.use(well) / "cached").read_bytes() == data
        for volume in (stuck, well):
            with suppress(grpc.RpcError):
                calls.release(volume)
            discard(calls, volume)
        assert machine.leftovers() == []


# --- a volume on a plain loop device that was taken away -------------------------------------------------------


def create(host: Host, filesystem_name: str, **changes: Any) -> VolumeRecord:
    size = {"size": type(SIZE)(320 * MIB)} if filesystem_name == "xfs" else {"size": SIZE}
    return host.kit.create("v", **size, filesystem=filesystem_name, **changes)


def attach(host: Host, volume: VolumeRecord) -> int:
    return host.kit.attach(volume.name, node=host.name, filesystem=volume.filesystem).generation


def overtake(
    hosts: Hosts, volume: VolumeRecord, close: Callable[[VolumeRecord], None]
) -> tuple[int, dict[str, str], str]:
    """Take a volume that a has staged away by force, let b write to it and `close` it, while a's pod goes on.

    Gives a's generation, what b wrote, and the image's sum, which has to stay. No fence runs.
    """
    a, b = hosts.a, hosts.b
    generation = attach(a, volume)
    a.stage(volume, generation)
    write_tree(a.staging_path, files=2)
    run("sync", "-f", a.staging_path)
    a.detach(volume)  # forced
    hosts.agree()
    b.stage(volume, attach(b, volume))
    sums = write_tree(b.staging_path, files=6, size_bytes=MIB)
    close(volume)
    b.detach(volume)
    hosts.agree()
    before = sum_of(image_of(hosts, volume))
    for number in range(50):  # the pod goes on, from what its kernel knew before
        (a.staging_path / f"stale-{number}").write_bytes(STALE * 4096)
    return generation, sums, before


@pytest.mark.parametrize("path", ["loop", "qcow2"])
@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_a_stale_unstage_does_not_write_over_newer_data(hosts: Hosts, path: str, fstype: str) -> None:
    a, b = hosts.a, hosts.b
    volume = create(a, fstype, **(QUIET if fstype == "ext4" else {}), **(LOOP if path == "loop" else {}))
    _, sums, before = overtake(hosts, volume, b.unstage)
    image = image_of(hosts, volume)
    a.unstage(volume, stale=True)
    assert hosts.machine.leftovers() == []
    assert sum_of(image) == before
    hosts.agree()
    b.stage(volume, attach(b, volume))
    assert read_tree(b.staging_path) == sums
    b.unstage(volume)
    b.detach(volume)
    if path == "loop":
        check = ("e2fsck", "-fn") if fstype == "ext4" else ("xfs_repair", "-n")
        assert run(*check, image, check=False).returncode == 0


@pytest.mark.parametrize("access_type", ["mount", "block"])
def test_a_fenced_volume_on_a_loop_device_is_not_written_any_more(
    hosts: Hosts, access_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    a = hosts.a
    volume = a.kit.create("v", **(BLOCK if access_type == "block" else {"size": SIZE}), **LOOP)
    generation = a.attach(volume)
    a.stage(volume, generation)
    target = a.publish(volume, generation, "target")
    run("sync", "-f", a.staging_path)
    a.detach(volume)
    fence = Fence(a.node, attachments_of(a))
    image = image_of(hosts, volume)
    file = (target if access_type == "block" else target / "file").open("wb" if access_type == "mount" else "r+b")
    with suppress(OSError), file:
        fence.look()
        fence.look()
        before = sum_of(image)
        with pytest.raises(OSError, match=r"Input/output|not permitted|No space"):  # size 0: the end of the device
            os.pwrite(file.fileno(), STALE * 4096, 0)
            os.fsync(file.fileno())
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert any("taken away" in one for one in errors)
    assert any("raw block" in one for one in errors) == (access_type == "block")
    fence.look()
    assert errors == [one.getMessage() for one in caplog.records if one.levelname == "ERROR"], "said once"
    with pytest.raises(Refused, match="not attached"):
        a.publish(volume, generation, "another")
    a.node.unpublish(volume.id, str(target))
    a.unstage(volume, stale=True)
    assert sum_of(image) == before
    assert hosts.machine.leftovers() == []
    # the number is the next one's
    a.stage(volume, a.attach(volume))
    assert loop.find(loop.tag_of("cq", a.node._key(volume.id))).size_bytes == volume.size_bytes  # type: ignore[union-attr]
    a.unstage(volume)
    assert hosts.machine.leftovers() == []


# --- what cannot be looked at ----------------------------------------------------------------------------------


def await_hang(attachments: Attachments, volume: VolumeRecord) -> None:
    """Wait until the kernel answers nothing of a hung pool from its cache any more."""
    wait_for("the record to be out of reach", lambda: attachments.standing(volume.id) is Standing.UNKNOWN)


def test_a_look_has_four_answers(hosts: Hosts) -> None:
    a, standin = hosts.a, hosts.machine.standins["main"]
    volume = a.kit.create("v", **BLOCK)
    attachments = attachments_of(a, timeout_s=1.0)
    assert attachments.standing(volume.id) is Standing.OURS, "not staged: nothing to flush"
    a.stage(volume, a.attach(volume))
    assert attachments.standing(volume.id) is Standing.OURS
    fresh = attachments_of(a, timeout_s=1.0)
    standin.hang()
    try:
        await_hang(attachments, volume)
        assert fresh.standing(volume.id) is Standing.UNKNOWN, "also in a process that has never seen the pool"
        assert not attachments.is_surely_taken(volume.id)
    finally:
        standin.resume()
    a.detach(volume)
    wait_for("the pool to answer", lambda: attachments.standing(volume.id) is Standing.TAKEN)
    # asked of the pool's health too, which may still wait for a look of before
    wait_for("the pool to be healthy", lambda: attachments.is_surely_taken(volume.id))
    standin.kill()
    wait_for("the pool to be dead", lambda: attachments.standing(volume.id) is Standing.UNREACHABLE)
    assert attachments_of(a, timeout_s=1.0).standing(volume.id) is Standing.UNREACHABLE
    standin.unmount()
    assert attachments.standing(volume.id) is Standing.UNREACHABLE
    standin.mount()
    a.unstage(volume, stale=True)
    assert hosts.machine.leftovers() == []


def test_an_unstage_waits_for_a_pool_that_hangs_and_flushes_nothing(hosts: Hosts) -> None:
    """The volume is taken away while its pool hangs here: what is cached here must not come when the pool does."""
    a, b, standin = hosts.a, hosts.b, hosts.machine.standins["main"]
    volume = a.kit.create("v", **BLOCK)
    a.stage(volume, a.attach(volume))
    hosts.agree()
    pools, attachments = pools_of(a, timeout_s=2.0), attachments_of(a, timeout_s=2.0)
    service = NodeService(a.node, pools, attachments, node_id="a", max_volumes=1, timeout_s=2.0)
    request = csi.NodeUnstageVolumeRequest(volume_id=volume.id, staging_target_path=str(a.staging_path))

    def unstage() -> bool:
        with suppress(Busy, Unavailable):
            service.NodeUnstageVolume(request, None)  # type: ignore[arg-type]
            return True
        return False

    fd = os.open(a.device(volume), os.O_RDWR)
    try:
        before = sum_of(image_of(hosts, volume))
        os.pwrite(fd, STALE * 4096, 0)  # cached in the kernel
        standin.hang()
        try:
            await_hang(attachments, volume)
            b.kit.detach(volume.name, node="a")
            assert not unstage()
            assert attachments.standing(volume.id) is Standing.UNKNOWN
        finally:
            standin.resume()
        wait_for("the daemon to be ended", lambda: unstage() or a.daemon_pid(volume) is None)
    finally:
        os.close(fd)
    wait_for("the unstage to end", unstage, timeout_s=30)
    assert sum_of(image_of(hosts, volume)) == before
    assert hosts.machine.leftovers() == []


# --- the looking itself ----------------------------------------------------------------------------------------


def test_a_look_that_fails_is_not_the_last_one(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    fence = Fence(hosts.a.node, attachments_of(hosts.a))
    looks: list[int] = []

    def look() -> None:
        looks.append(len(looks))
        raise ZeroDivisionError

    monkeypatch.setattr(fence, "look", look)
    threading.Thread(target=fence.run_forever, args=(0.01,), daemon=True).start()
    wait_for("looks after the first that failed", lambda: len(looks) > 3)
    assert fence.overdue() == ""
    monkeypatch.setattr(node_module, "FENCE_OVERDUE_S", 0.0)
    assert "not been looked at" in fence.overdue()


def test_a_look_is_in_the_metrics(hosts: Hosts) -> None:
    before = time.time()
    Fence(hosts.a.node, attachments_of(hosts.a)).look()
    assert node_module.telemetry.FENCE_LAST_LOOK._value.get() >= before


@pytest.mark.parametrize("path", ["qcow2", "loop"])
def test_an_unstage_that_loses_writes_is_counted_and_names_the_volume(
    hosts: Hosts, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As umount(8) does on a disk that fails: it ends, and what was not flushed is gone."""
    a, counter = hosts.a, node_module.telemetry.UNFLUSHED_CLOSES
    volume = a.kit.create("v", **BLOCK, **(LOOP if path == "loop" else {}))
    a.stage(volume, a.attach(volume))
    a.unstage(volume)
    before = counter._value.get()
    a.stage(volume, a.kit.store.volume(volume.id).attachments[0].generation)
    with open(a.device(volume), "r+b", buffering=0) as device:  # noqa: PTH123 - a device node
        device.write(STALE * 4096)  # cached in the kernel
    hosts.machine.standins["main"].kill()
    a.unstage(volume)
    assert counter._value.get() == before + 1
    lost = [one.getMessage() for one in caplog.records if one.levelname == "ERROR"]
    assert any(volume.id in one and "lost" in one for one in lost), lost
    assert hosts.machine.leftovers() == []


# --- publishing what is dead, and forgetting what is lost ------------------------------------------------------


@pytest.mark.parametrize("path", ["qcow2", "loop"])
def test_a_dead_volume_is_not_given_to_a_new_pod(hosts: Hosts, path: str) -> None:
    a = hosts.a
    volume = a.kit.create("v", size=SIZE, **(LOOP if path == "loop" else {}))
    generation = a.attach(volume)
    a.stage(volume, generation)
    first = a.publish(volume, generation, "first")
    if path == "qcow2":
        pid = a.daemon_pid(volume)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for("the daemon to end", lambda: a.daemon_pid(volume) is None)
    else:
        device = a.find_device(volume)
        assert device is not None
        loop.cut_off(device)
    for _ in range(2):
        with pytest.raises(Refused, match="delete all pods of the volume on this node"):
            a.publish(volume, generation, "second")
    assert not (a.base / "second").exists()
    a.node.unpublish(volume.id, str(first))
    a.stage(volume, generation)
    a.publish(volume, generation, "second")
    a.node.unpublish(volume.id, str(a.base / "second"))
    a.unstage(volume)
    assert hosts.machine.leftovers() == []


def test_notes_of_lost_volumes_are_forgotten_at_the_start(hosts: Hosts) -> None:
    a = hosts.a
    kept = a.kit.create("kept", **BLOCK, **LOOP)
    a.stage(kept, a.attach(kept))
    notes = StagedNotes(str(hosts.machine.base / "state-a"))
    notes.put("0" * 24, StagedNote("lost", 1))
    assert "lost" in a.node.staged_volumes()
    again = known_host(hosts.machine, "a", hosts.machine.pools["main"])
    again.node.recover()
    assert again.node.staged_volumes() == [kept.id]
    again.kit.store.close()
    a.unstage(kept)
    assert hosts.machine.leftovers() == []
