"""Sequences of node calls that are late, wrong, or overtaken: what they must never do to data that is another's by now.

The axes: what went before (a forced detach, a stage that did not end, a process that died), the call, the data path.
"""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gates import background
from running import MIB, read_tree, write_tree
from test_interleavings import BLOCK, SIZE, Hosts, hosts
from test_node_faults import LOOP, QUIET, STALE, attach, attachments_of, create, image_of, overtake, sum_of

from csi_quobyte import telemetry
from csi_quobyte.errors import AlreadyExists, Busy, Corrupt, DriverError, Refused, Unavailable
from csi_quobyte.host import command, filesystem, mounts, qsd
from csi_quobyte.rpc.node import Fence
from lab.machine import run, wait_for

__all__ = ["hosts"]  # a fixture
pytestmark = pytest.mark.root

both_paths = pytest.mark.parametrize("path", ["qcow2", "loop"])


class KilledError(BaseException):
    """The process dies here."""


def on(path: str) -> dict[str, Any]:
    return LOOP if path == "loop" else {}


# --- a volume that was taken away ------------------------------------------------------------------------------


@both_paths
def test_a_check_that_runs_for_long_does_not_keep_the_fence_away(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """e2fsck, mkfs and resize2fs may take an hour; by then another node has the volume."""
    a, b = hosts.a, hosts.b
    volume = a.kit.create("v", size=SIZE, **on(path))
    generation = a.attach(volume)
    a.stage(volume, generation)
    a.close(volume)
    go_on, began = threading.Event(), threading.Event()

    def check(device: str, *_: object, **__: object) -> None:
        began.set()
        assert go_on.wait(60)
        write = ["dd", "if=/dev/urandom", f"of={device}", "bs=4096", "seek=8000", "count=16", "oflag=direct"]
        command.run([*write, "conv=notrunc", "status=none"], timeout_s=30)

    fence = Fence(a.node, attachments_of(a))
    with monkeypatch.context() as patched:
        patched.setattr(filesystem, "repair", check)
        stage = background(lambda: a.stage(volume, generation))
        assert began.wait(20)
    a.detach(volume)  # forced
    hosts.agree()
    fence.look()
    fence.look()
    b.stage(volume, attach(b, volume))
    sums = write_tree(b.staging_path, files=2, size_bytes=MIB)
    run("sync", "-f", b.staging_path)
    before = sum_of(image_of(hosts, volume))
    go_on.set()
    with pytest.raises(DriverError):
        stage.result(60)
    assert sum_of(image_of(hosts, volume)) == before
    assert read_tree(b.staging_path) == sums
    b.unstage(volume)
    assert a.daemon_pid(volume) is None
    with suppress(DriverError):
        a.unstage(volume, stale=True)
    assert hosts.machine.leftovers() == []


@both_paths
@pytest.mark.parametrize("wrong", ["access type", "file system", "staging path", "deleted"])
def test_a_stage_that_fails_never_flushes_what_was_taken_away(hosts: Hosts, path: str, wrong: str) -> None:
    a, b = hosts.a, hosts.b
    volume = create(a, "ext4", **on(path), **QUIET)
    first, sums, before = overtake(hosts, volume, b.close)
    image = image_of(hosts, volume)
    a_file = a.base / "file"
    a_file.touch()
    changes: dict[str, dict[str, Any]] = {
        "access type": {"access_type": "block", "filesystem": ""},
        "file system": {"filesystem": "xfs"},
        "staging path": {"staging_path": str(a_file / "globalmount")},
        "deleted": {},
    }
    if wrong == "deleted":
        b.kit.snapshot("s", of="v")
        b.kit.delete("v")
        third = first
    else:
        third = attach(a, volume)
    hosts.agree()
    with pytest.raises(DriverError):
        a.stage(volume, third, **changes[wrong])
    assert sum_of(image) == before
    if wrong == "staging path":
        a.unstage(volume, stale=True)
    if wrong == "deleted":
        hosts.agree()
        volume = b.kit.create("again", source=b.kit.from_snapshot("s"), filesystem="ext4")
    else:
        a.detach(volume)
        hosts.agree()
    b.stage(volume, attach(b, volume))
    assert read_tree(b.staging_path) == sums
    b.unstage(volume)
    assert hosts.machine.leftovers() == []


def test_another_volume_of_the_same_name_is_another_one(hosts: Hosts) -> None:
    """Its id is the same and its generations begin anew: what was staged of the first, in the trash now, is not its."""
    a = hosts.a
    volume = a.kit.create("v", **BLOCK, on_delete="trash")
    a.stage(volume, a.attach(volume))
    image = image_of(hosts, volume)
    a.detach(volume)  # forced
    a.kit.delete("v")
    again = a.kit.create("v", **BLOCK)
    generation = a.attach(again)
    assert again.id == volume.id
    with pytest.raises(Refused, match="another attachment"):
        a.publish(again, generation)
    fence = Fence(a.node, attachments_of(a))
    fence.look()
    fence.look()
    assert a.daemon_pid(volume) is None
    before = sum_of(image)
    with suppress(OSError), Path(a.device(volume)).open("r+b", buffering=0) as device:
        device.write(STALE * 4096)
    a.stage(again, generation)
    target = a.publish(again, generation)
    assert target.read_bytes()[:4096] == bytes(4096), "the new one's"
    a.unpublish(again)
    a.unstage(again)
    assert sum_of(image) == before
    assert hosts.machine.leftovers() == []


def test_a_record_that_was_changed_a_moment_ago_is_not_damaged(hosts: Hosts) -> None:
    """A client that has the old length cached shows a new record cut off, for about a second."""
    a, b = hosts.a, hosts.b
    volume = a.kit.create("v", size=SIZE)
    hosts.agree()
    a.kit.store.find_volume(volume.id)
    generation = b.kit.attach("v", node=a.name, filesystem="ext4").generation

    def stage() -> bool:
        try:
            a.stage(volume, generation)
        except Corrupt:
            raise
        except (Busy, Refused, Unavailable):  # not seen yet
            return False
        return True

    wait_for("the stage", stage)
    a.unstage(volume)


# --- stages and starts that did not end ------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["another staging path", "unreadable record"])
def test_a_final_error_leaves_nothing_of_an_unfinished_stage(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """The kubelet never unstages what it was told for good was not staged."""
    a = hosts.a
    volume = a.kit.create("v", size=SIZE)
    generation = a.attach(volume)

    def make(*_: object, **__: object) -> None:
        raise Unavailable("mkfs did not end in time")

    with monkeypatch.context() as patched:
        patched.setattr(filesystem, "make", make)
        with pytest.raises(Unavailable):
            a.stage(volume, generation)
    assert a.daemon_pid(volume)
    if ending == "another staging path":
        a_file = a.base / "file"
        a_file.touch()
        with pytest.raises(Refused):
            a.stage(volume, generation, staging_path=str(a_file / "globalmount"))
        assert a.daemon_pid(volume) is None
    else:
        record = next((hosts.machine.directories["main"] / "volumes").glob(f"*/{volume.id}.json"))
        whole = record.read_bytes()
        record.write_bytes(whole[:20])
        with pytest.raises(Unavailable):
            a.stage(volume, generation)
        record.write_bytes(whole)
        hosts.agree()
        wait_for("the record", lambda: a.kit.store.find_volume(volume.id))
        a.stage(volume, generation)
        a.unstage(volume)
    assert hosts.machine.leftovers() == []


@pytest.mark.parametrize("is_late", [False, True], ids=["ends first", "binds last"])
def test_a_daemon_whose_start_was_overtaken_is_ended(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """The supervisor of a node that was killed goes on between the next start's look for a pid file and its own."""
    a = hosts.a
    volume = a.kit.create("v", **BLOCK)
    generation = a.attach(volume)
    first: list[command.Detached] = []
    plain, plain_ensure = command.spawn_detached, qsd.Daemons.ensure

    def overtaken(argv: Any, **named: Any) -> Any:
        first.append(plain(argv, **named))
        if is_late:  # it gets no processor for a moment
            os.kill(first[0].process.pid, signal.SIGSTOP)
        return plain(argv, **named)

    def ensure(daemons: qsd.Daemons, key: str, **named: Any) -> Any:
        found = plain_ensure(daemons, key, **named)
        with suppress(ProcessLookupError):
            os.kill(first[0].process.pid, signal.SIGCONT)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(command, "spawn_detached", overtaken)
        patched.setattr(qsd.Daemons, "ensure", ensure)
        a.stage(volume, generation)
    wait_for("the first to end", lambda: not Path(f"/proc/{first[0].process.pid}").exists())
    with Path(a.device(volume)).open("r+b", buffering=0) as device:
        device.write(STALE * 4096)
    a.unstage(volume)
    assert STALE in image_of(hosts, volume).read_bytes()
    assert hosts.machine.leftovers() == []


def test_a_directory_of_a_daemon_does_not_make_a_plain_loop_volume_look_dead(hosts: Hosts) -> None:
    a = hosts.a
    volume = a.kit.create("v", **BLOCK, **LOOP)
    generation = a.attach(volume)
    Path(a.daemons.directory(a.node._key(volume.id))).mkdir(parents=True)  # of an attempt whose start failed
    a.stage(volume, generation)
    a.publish(volume, generation)
    a.unpublish(volume)
    a.unstage(volume)
    assert hosts.machine.leftovers() == []


# --- publish and unpublish -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies", ["between the two steps", "after both"])
def test_a_read_only_publish_that_was_killed_is_done_again(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    a = hosts.a
    volume = a.kit.create("v", size=SIZE)
    generation = a.attach(volume)
    a.stage(volume, generation)
    target = a.base / "target"
    plain = mounts._mount

    def mount(argv: Any, timeout_s: float) -> None:
        is_second = "remount,bind,ro" in argv
        if not is_second or dies == "after both":
            plain(argv, timeout_s)
        if is_second:
            raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(mounts, "_mount", mount)
        with pytest.raises(KilledError):
            a.publish(volume, generation, read_only=True)
    for _ in range(2):
        a.publish(volume, generation, read_only=True)
        found = mounts.at(str(target))
        assert found is not None
        assert "ro" in found.options
    with pytest.raises(AlreadyExists):
        a.publish(volume, generation)
    a.node.unpublish(volume.id, str(target))
    a.publish(volume, generation)
    with pytest.raises(AlreadyExists):
        a.publish(volume, generation, read_only=True)
    a.node.unpublish(volume.id, str(target))
    a.unstage(volume)
    assert hosts.machine.leftovers() == []


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_a_class_that_mounts_read_only(hosts: Hosts, fstype: str) -> None:
    """mountOptions: [ro]: every call twice, an expansion, and the growth once it is mounted writable."""
    a = hosts.a
    volume = create(a, fstype)
    generation = attach(a, volume)

    def stage() -> None:
        a.stage(volume, generation, mount_options=("ro",))

    stage()
    stage()
    a.publish(volume, generation)
    a.publish(volume, generation)
    a.kit.expand("v", 700 * MIB)
    hosts.agree()
    assert a.expand(volume) == 700 * MIB
    a.unpublish(volume)
    a.unstage(volume)
    stage()
    stage()
    a.unstage(volume)
    a.stage(volume, generation)
    assert os.statvfs(a.staging_path).f_blocks * os.statvfs(a.staging_path).f_frsize > 500 * MIB
    a.unstage(volume)
    assert hosts.machine.leftovers() == []


def test_unpublish_takes_away_what_is_this_volume_s_only(hosts: Hosts) -> None:
    a = hosts.a
    none, mounted, block = a.kit.create("none", **BLOCK), a.kit.create("mounted", size=SIZE), a.kit.create("b", **BLOCK)
    generation = a.attach(mounted)
    a.stage(mounted, generation)
    of_block = a.attach(block)
    a.stage(block, of_block, staging_path=str(a.base / "another"))
    target = a.publish(block, of_block)
    precious = a.base / "precious"
    precious.write_text("somebody's")
    for path in (precious, a.staging_path, target):
        with pytest.raises(Refused):
            a.node.unpublish(none.id, str(path))
    assert precious.read_text() == "somebody's"
    assert mounts.at(str(a.staging_path)) is not None
    assert target.is_block_device()
    a.unpublish(block)
    a.node.unstage(block.id, str(a.base / "another"))
    a.unstage(mounted)
    assert hosts.machine.leftovers() == []


@both_paths
def test_staged_volumes_are_counted_by_their_data_path(hosts: Hosts, path: str) -> None:
    a = hosts.a
    volume = create(a, "ext4", **on(path), **QUIET)

    def counted() -> dict[str, float]:
        return {one: telemetry.STAGED_VOLUMES.labels(one)._value.get() for one in ("fuse", "loop")}

    a.stage(volume, attach(a, volume))
    assert counted() == ({"fuse": 0, "loop": 1} if path == "loop" else {"fuse": 1, "loop": 0})
    a.unstage(volume)
    assert counted() == {"fuse": 0, "loop": 0}
