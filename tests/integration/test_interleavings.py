"""Operations that overtake each other, on two hosts without common locks; nodes that come back after a forced detach.

Two hosts are two mounts of one directory: each has its own locks and its own cache of names and lengths, as between
real hosts. The axes: who is stopped (create, delete, collector, stage), at which durable step, and what happens then.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from controller_kit import Kit
from gates import DiedError, Gate, background, dies_before
from node_kit import Host, host_on
from running import MIB, Code, eventually, fails, machine_of, running

from csi_quobyte.config import PoolSpec
from csi_quobyte.engine import collector, layers
from csi_quobyte.errors import Busy, Exhausted, Refused, Unavailable
from csi_quobyte.host import filesystem
from csi_quobyte.operations.targets import PublishRequest
from csi_quobyte.pool import files, images
from csi_quobyte.pool.pools import Pools
from csi_quobyte.pool.records import Content, LayerState, SnapshotState, VolumeState
from csi_quobyte.pool.sizes import SizeRange
from csi_quobyte.pool.store import Store
from csi_quobyte.rpc.node import Attachments, Fence
from lab.client import Client
from lab.machine import Machine, StandIn, wait_for

pytestmark = pytest.mark.root

T = TypeVar("T")
DEADLINE_S = 20.0
SIZE = SizeRange(64 * MIB)
BLOCK: dict[str, Any] = {"size": SIZE, "access_type": "block", "filesystem": ""}


# --- two hosts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hosts:
    """Two hosts, a and b, and the machine below them."""

    machine: Machine
    a: Host
    b: Host

    def agree(self) -> None:
        """Wait until both mounts show every record as it is: names and lengths are cached for about a second."""
        directory = self.machine.directories["main"]
        for path in directory.glob("*/*/*.json"):
            for host in (self.a, self.b):
                seen = Path(host.kit.store.root, path.relative_to(directory))
                wait_for(f"{seen} to be shown as it is", lambda seen=seen, path=path: _same(seen, path))  # type: ignore[misc]


def _same(seen: Path, path: Path) -> bool:
    return seen.exists() and seen.read_bytes() == path.read_bytes()


def known_host(machine: Machine, name: str, root: Path) -> Host:
    """Give a host whose node the controllers know."""
    host = host_on(machine.base, name, root)
    host.kit.add_node(name)
    return host


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with machine_of() as machine:
        machine.standins["b"] = StandIn(machine.directories["main"], machine.base / "b")
        made = Hosts(
            machine,
            known_host(machine, "a", machine.pools["main"]),
            known_host(machine, "b", machine.standins["b"].path),
        )
        yield made
        for host in (made.a, made.b):
            host.kit.store.close()


# --- the collector ---------------------------------------------------------------------------------------------


def test_a_head_survives_a_sweep_that_reads_on_both_sides_of_its_freeze(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = kit.create("v")
    kit.write("v", 7)
    with pytest.raises(DiedError):
        Kit(Store(kit.store.root, observer=dies_before("link", f"{volume.id}.json.g"))).snapshot("s", of="v")
    other = Kit(Store(kit.store.root))
    plain = Store.snapshot_ids
    done: list[SnapshotState] = []

    def between(store: Store, **named: Any) -> Iterator[str]:
        # the sweep has read the volume, with its old head, and now reads the snapshots
        if store is kit.store and not done:
            done.append(other.snapshot("s", of="v").state)
        return plain(store, **named)

    monkeypatch.setattr(Store, "snapshot_ids", between)
    collector.sweep(kit.store)
    assert done == [SnapshotState.READY]
    kit.sweep_until_quiet()
    assert kit.holds("v", 7)
    assert kit.snapshot_holds("s", 7)
    assert kit.errors() == []


# --- overtaken calls -------------------------------------------------------------------------------------------


def test_an_overtaken_create_leaves_the_finished_clone_alone(hosts: Hosts) -> None:
    a, b = hosts.a.kit, hosts.b.kit
    a.create("v")
    a.write("v", 5)
    a.snapshot("s", of="v")
    hosts.agree()
    gate = Gate("touch", "/c-")
    late_kit = hosts.a.observed(gate)
    late = background(lambda: late_kit.create("clone", source=late_kit.from_snapshot("s")))
    gate.wait(late)
    clone = b.create("clone", source=b.from_snapshot("s"))
    assert clone.state is VolumeState.READY
    b.attach("clone", node="b")
    b.delete_snapshot("s")
    attached = b.store.volume(clone.id)
    hosts.agree()
    gate.open()
    with pytest.raises(Busy):
        late.result(DEADLINE_S)
    hosts.agree()
    assert b.store.volume(clone.id) == attached
    b.sweep_until_quiet()
    assert b.holds("clone", 5)
    assert b.errors() == []


def test_an_overtaken_snapshot_leaves_the_finished_one_alone(hosts: Hosts) -> None:
    a, b = hosts.a.kit, hosts.b.kit
    a.create("v")
    a.write("v", 5)
    hosts.agree()
    gate = Gate("touch", "/s-")
    late_kit = hosts.a.observed(gate)
    late = background(lambda: late_kit.snapshot("s", of="v"))
    gate.wait(late)
    made = b.snapshot("s", of="v")
    b.delete("v")
    hosts.agree()
    gate.open()
    with pytest.raises(Busy):
        late.result(DEADLINE_S)
    hosts.agree()
    assert b.store.snapshot(made.id) == made
    b.sweep_until_quiet()
    assert b.snapshot_holds("s", 5)
    assert b.errors() == []


def test_a_snapshot_deleted_while_its_retry_runs_costs_the_volume_nothing(hosts: Hosts) -> None:
    a, b = hosts.a.kit, hosts.b.kit
    volume = a.create("v")
    a.write("v", 9)
    claim = f"{volume.id}.json.g"
    with pytest.raises(DiedError):
        hosts.a.observed(dies_before("link", claim)).snapshot("s", of="v")
    overlay = a.store.snapshot(a.snapshot_id("s")).next
    hosts.agree()
    marking, swapping = Gate("touch", "/s-"), Gate("link", claim)
    undoing = Gate("unlink", f"{overlay}.refs/v-")

    def both(step: str, path: str) -> None:
        marking(step, path)
        swapping(step, path)

    retry_kit, delete_kit = hosts.b.observed(both), hosts.a.observed(undoing)
    retry = background(lambda: retry_kit.snapshot("s", of="v"))
    marking.wait(retry)
    delete = background(lambda: delete_kit.delete_snapshot("s"))
    undoing.wait(delete)
    hosts.agree()
    marking.open()
    swapping.wait(retry, or_end=True)
    undoing.open()
    delete.result(DEADLINE_S)
    swapping.open()
    with pytest.raises(Busy):
        retry.result(DEADLINE_S)
    hosts.agree()
    assert b.store.find_snapshot(a.snapshot_id("s")) is None
    a.sweep_until_quiet()
    assert a.store.volume(volume.id).head == volume.head
    assert a.holds("v", 9)
    assert a.errors() == []


# --- a torn read -----------------------------------------------------------------------------------------------


def cut_once(record_id: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the next reader of a record see it cut off; gives what was seen so."""
    plain = files.read
    cut: list[str] = []

    def torn(path: str) -> bytes | None:
        data = plain(path)
        if data and path.endswith(f"{record_id}.json") and not cut:
            cut.append(path)
            return data[:-20]
        return data

    monkeypatch.setattr(files, "read", torn)
    return cut


def test_a_read_that_was_cut_once_does_not_end_the_undo_of_a_freeze(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = kit.create("v")
    kit.write("v", 1)
    with pytest.raises(DiedError):
        Kit(Store(kit.store.root, observer=dies_before("link", f"{volume.head}.json.g"))).snapshot("s", of="v")
    cut = cut_once(volume.id, monkeypatch)
    with pytest.raises(Busy):
        kit.delete_snapshot("s")
    assert cut
    kit.delete_snapshot("s")
    assert kit.store.layer(volume.head).state is LayerState.FROZEN
    kit.sweep_until_quiet()
    kit.consistency()
    assert kit.holds("v", 1)


def test_a_read_that_was_cut_once_does_not_delete_an_attached_volume(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = kit.create("v")
    kit.attach("v")
    attached = kit.store.volume(volume.id)
    cut = cut_once(volume.id, monkeypatch)
    with pytest.raises(Busy):
        kit.delete("v")
    assert cut
    assert kit.store.volume(volume.id) == attached
    with pytest.raises(Refused):
        kit.delete("v")


# --- nodes and attachments -------------------------------------------------------------------------------------


def write_device(path: str, data: bytes, offset_bytes: int) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset_bytes)
        os.fsync(fd)
    finally:
        os.close(fd)


def read_device(path: str, length_bytes: int, offset_bytes: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length_bytes, offset_bytes)
    finally:
        os.close(fd)


def test_a_volume_that_was_taken_from_a_node_is_frozen_only_when_that_has_ended(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lock of node a reaches host b, where the snapshot is taken: what it shows would still change."""
    monkeypatch.setattr(layers, "FENCE_S", 3.0)
    a, b = hosts.a, hosts.b
    volume = a.kit.create("v", **BLOCK)
    a.stage(volume, a.attach(volume))
    write_device(a.device(volume), b"A" * MIB, 0)
    hosts.agree()
    b.kit.detach("v", node=a.name)  # forced: node a is not asked
    with pytest.raises(Unavailable, match="a moment ago"):
        b.kit.snapshot("s", of="v")
    with pytest.raises(Unavailable, match="a moment ago"):
        b.kit.create("clone", source=b.kit.from_volume("v"))
    assert list(b.kit.store.snapshot_ids()) == []
    a.node.fence(volume.id)
    wait_for("the time of grace", lambda: fails_not(lambda: b.kit.snapshot("s", of="v")), timeout_s=DEADLINE_S)
    assert b.kit.check() == []
    a.unstage(volume, stale=True)
    assert hosts.machine.leftovers() == []


def fails_not(work: Callable[[], object]) -> bool:
    try:
        work()
    except Unavailable:
        return False
    return True


def test_a_volume_that_its_node_has_closed_is_frozen_at_once(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "FENCE_S", 600.0)
    a, b = hosts.a, hosts.b
    volume = a.kit.create("v", **BLOCK)
    generation = a.attach(volume)
    a.stage(volume, generation)
    a.node.note_closed(a.kit.store, volume.id)
    assert a.kit.store.closed_generation(volume) == 0, "it is staged, whoever says something else"
    a.unstage(volume)
    a.node.note_closed(a.kit.store, volume.id)
    assert a.kit.store.closed_generation(volume) == generation
    a.stage(volume, generation)
    assert a.kit.store.closed_generation(volume) == 0, "staged again for the same attachment"
    a.unstage(volume)
    a.node.note_closed(a.kit.store, volume.id)
    a.detach(volume)
    hosts.agree()
    b.kit.snapshot("s", of="v")
    hosts.agree()
    a.attach(volume)
    a.detach(volume)
    with pytest.raises(Unavailable, match="a moment ago"):
        a.kit.snapshot("later", of="v")  # the word is about an earlier attachment
    assert a.kit.findings() == set()
    a.kit.delete_snapshot("s")
    a.kit.delete("v")
    a.kit.sweep_until_quiet()
    assert not list(hosts.machine.directories["main"].glob("volumes/*/*"))


def test_a_daemon_of_an_earlier_attachment_is_not_used_again(hosts: Hosts) -> None:
    a, b = hosts.a, hosts.b
    volume = a.kit.create("v", **BLOCK)
    first = a.attach(volume)
    a.stage(volume, first)
    write_device(a.device(volume), b"A" * MIB, 0)
    old_pid = a.daemon_pid(volume)
    a.detach(volume)  # forced: the node is not asked, its daemon lives on
    hosts.agree()
    b.stage(volume, b.attach(volume))
    write_device(b.device(volume), b"B" * MIB, 4 * MIB)
    b.unstage(volume)
    b.detach(volume)
    hosts.agree()
    assert a.daemon_pid(volume) == old_pid
    a.stage(volume, a.attach(volume))
    assert a.daemon_pid(volume) != old_pid
    assert read_device(a.device(volume), MIB, 4 * MIB) == b"B" * MIB
    assert read_device(a.device(volume), MIB, 0) == b"A" * MIB
    a.unstage(volume)
    a.detach(volume)
    assert hosts.machine.leftovers() == []
    hosts.agree()
    assert [finding for finding in a.kit.check() if finding.severity == "error"] == []


def test_expand_under_a_gone_attachment_is_refused(hosts: Hosts) -> None:
    a, b = hosts.a, hosts.b
    volume = a.kit.create("v", **BLOCK)
    generation = a.attach(volume)
    a.stage(volume, generation)
    target = str(hosts.machine.base / "target")
    a.node.publish(
        a.kit.store,
        PublishRequest(
            volume_id=volume.id,
            generation=generation,
            staging_path=str(a.staging_path),
            target_path=target,
            access_type="block",
            readonly=False,
            single_writer=False,
        ),
    )
    a.detach(volume)
    hosts.agree()
    snapshot = b.kit.snapshot("s", of="v")
    b.kit.expand("v", 128 * MIB)
    hosts.agree()
    with pytest.raises(Refused):
        a.node.expand(a.kit.store, volume.id, target, 0)
    assert images.virtual_size_bytes(b.kit.store, b.kit.store.layer(snapshot.layer)) == 64 * MIB
    a.node.unpublish(volume.id, target)
    a.unstage(volume, stale=True)
    assert hosts.machine.leftovers() == []


def test_S52_a_forced_detach_ends_the_daemon_after_two_looks(hosts: Hosts) -> None:
    a = hosts.a
    volume = a.kit.create("v", **BLOCK)
    a.stage(volume, a.attach(volume))
    pools = Pools([PoolSpec("main", a.kit.store.root)], require_mount="quobyte-nosize", timeout_s=DEADLINE_S)
    fence = Fence(a.node, Attachments(a.node, pools, timeout_s=DEADLINE_S))
    fence.look()
    fence.look()
    assert a.daemon_pid(volume) is not None, "an attached volume is left alone"
    a.detach(volume)
    fence.look()
    assert a.daemon_pid(volume) is not None, "one look may have seen an old record"
    fence.look()
    assert a.daemon_pid(volume) is None
    a.unstage(volume, stale=True)
    assert hosts.machine.leftovers() == []
    assert a.node.staged_volumes() == []


# --- content notes ---------------------------------------------------------------------------------------------


def test_a_late_note_of_an_older_attachment_does_not_replace_a_newer_one(kit: Kit) -> None:
    volume = kit.create("v")
    newer = Content(state="formatted", filesystem="ext4", generation=2)
    kit.store.put_content(volume, newer)
    with pytest.raises(Refused):
        kit.store.put_content(volume, Content(state="formatting", filesystem="ext4", generation=1))
    assert kit.store.content(volume) == newer


def test_a_formatting_note_of_another_attachment_does_not_license_mkfs(hosts: Hosts) -> None:
    a = hosts.a
    volume = a.kit.create("v", size=SIZE)
    first = a.attach(volume)
    precious = a.stage(volume, first) / "precious"
    precious.write_text("kept")
    a.unstage(volume)
    a.detach(volume)
    # what a node that hung wrote when it went on, after it had lost the race for the attachment
    a.kit.store.put_content(volume, Content(state="formatting", filesystem="ext4", generation=first))
    second = a.attach(volume)
    assert second != first
    a.stage(volume, second)
    assert precious.read_text() == "kept"
    assert a.kit.store.content(volume) == Content(state="formatted", filesystem="ext4", generation=second)
    a.unstage(volume)
    assert hosts.machine.leftovers() == []


@pytest.mark.parametrize("how", ["clone", "snapshot", "copy"])
def test_a_late_formatting_note_does_not_license_mkfs_in_a_clone_either(hosts: Hosts, how: str) -> None:
    """The note is inherited, and the clone's first attachment has the number of the source's."""
    a, b = hosts.a, hosts.b
    volume = a.kit.create("v", size=SIZE)
    first = a.attach(volume)

    def taken_over(step: str, path: str) -> None:
        if step == "rename" and ".content-" in path:
            a.kit.detach("v", node="a")
            hosts.agree()
            second = b.attach(volume)
            (b.stage(volume, second) / "precious").write_text("kept")
            b.close(volume)
            b.detach(volume)

    slow = Store(a.kit.store.root, observer=taken_over)
    slow.put_content(volume, Content(state="formatting", filesystem="ext4", generation=first))
    slow.close()
    hosts.agree()
    content = b.kit.store.content(volume)
    assert content
    assert content.state == "formatting"
    source = b.kit.from_volume("v")
    if how != "clone":
        b.kit.snapshot("s", of="v")
        source = b.kit.from_snapshot("s")
    clone = b.kit.create("w", source=source, **({"clone_mode": "copy"} if how == "copy" else {}))
    generation = b.attach(clone)
    assert generation == first
    assert (b.stage(clone, generation) / "precious").read_text() == "kept"
    b.unstage(clone)
    assert hosts.machine.leftovers() == []


def test_a_note_that_comes_after_another_attachment_is_refused(hosts: Hosts) -> None:
    """Of a node that lost the volume; the next one had nothing to write down but that it has it."""
    a, b = hosts.a, hosts.b
    volume = a.kit.create("v", size=SIZE)
    first = a.attach(volume)
    a.stage(volume, first)
    a.close(volume)
    a.detach(volume)
    second = a.attach(volume)
    a.detach(volume)
    hosts.agree()
    third = b.attach(volume)
    b.stage(volume, third)
    hosts.agree()
    with pytest.raises(Refused):
        a.kit.store.put_content(volume, Content(state="formatted", filesystem="ext4", generation=second, growing=True))
    b.unstage(volume)
    assert hosts.machine.leftovers() == []


def test_a_full_pool_does_not_keep_a_volume_from_its_next_node(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the node has to write down is that it has the volume; who is to make space may need it."""
    a, b = hosts.a, hosts.b
    volume = a.kit.create("v", size=SIZE)
    (a.stage(volume, a.attach(volume)) / "precious").write_text("kept")
    a.close(volume)
    a.detach(volume)
    hosts.agree()
    asked: list[Content] = []

    def no_space(_: object, content: Content) -> None:
        asked.append(content)
        raise Exhausted("full")

    monkeypatch.setattr(b.kit.store, "put_content", no_space)
    generation = b.attach(volume)
    assert (b.stage(volume, generation) / "precious").read_text() == "kept"
    assert [content.generation for content in asked] == [generation]
    b.unstage(volume)
    assert hosts.machine.leftovers() == []


@pytest.mark.parametrize("data_path", ["fuse", "loop"])
def test_a_stage_that_hung_does_not_grow_what_is_not_its_node_s_any_more(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, data_path: str
) -> None:
    """A chain that was read before the volume was taken away may be merged since, and its head written elsewhere."""
    a = hosts.a
    volume = a.kit.create("v", **BLOCK, image_format="raw", data_path=data_path)
    head = a.kit.store.layer(volume.head)
    generation = a.attach(volume)
    a.kit.expand("v", 2 * 64 * MIB)
    plain = images.check_chain

    def hang(store: Store, chain: Any) -> None:
        plain(store, chain)
        hosts.b.kit.detach("v", node="a")
        hosts.agree()

    monkeypatch.setattr(images, "check_chain", hang)
    with pytest.raises(Refused, match="not attached"):
        a.stage(volume, generation)
    assert images.virtual_size_bytes(a.kit.store, head) == 64 * MIB
    assert hosts.machine.leftovers() == []


# --- failed stages ---------------------------------------------------------------------------------------------


def test_a_final_error_takes_down_what_an_uncertain_attempt_has_left(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = hosts.a
    volume = a.kit.create("v", size=SIZE)
    generation = a.attach(volume)

    def fail_with(error: Exception) -> None:
        def make(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(filesystem, "make", make)

    fail_with(Unavailable("mkfs did not end in time"))
    with pytest.raises(Unavailable):
        a.stage(volume, generation)
    assert a.daemon_pid(volume) is not None, "an uncertain attempt leaves what the next one goes on with"
    fail_with(Refused("mkfs refuses"))
    with pytest.raises(Refused):
        a.stage(volume, generation)
    assert a.daemon_pid(volume) is None
    assert hosts.machine.leftovers() == []
    assert a.node.staged_volumes() == []


def test_a_device_that_an_orphaned_tool_holds_is_busy(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    a = hosts.a
    volume = a.kit.create("v", size=SIZE)
    generation = a.attach(volume)

    def killed(*_: object, **__: object) -> None:
        raise Unavailable("the node is killed here, mkfs goes on")

    with monkeypatch.context() as patched:
        patched.setattr(filesystem, "make", killed)
        with pytest.raises(Unavailable):
            a.stage(volume, generation)
    held = os.open(a.device(volume), os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(Busy):
            a.stage(volume, generation)
    finally:
        os.close(held)
    assert (a.stage(volume, generation) / "lost+found").is_dir()
    a.unstage(volume)
    assert hosts.machine.leftovers() == []


# --- calls that were abandoned in a hung pool ------------------------------------------------------------------


def hang_whole(standin: StandIn) -> None:
    """Hang a pool, and wait until the kernel answers nothing from its cache any more: a call hangs at its first touch.

    It hangs before it has any lock of its own then, which is what the reservations are for.
    """
    standin.hang()

    def hangs() -> bool:
        looking = background(lambda: os.stat(standin.path / "format.json"))
        try:
            looking.result(0.2)
        except TimeoutError:
            return True  # the thread ends with the hang
        return False

    wait_for(f"{standin.path} to hang", hangs)


def test_what_undoes_a_call_waits_for_the_end_of_an_abandoned_one() -> None:
    with running("--pool-timeout", "2s") as machine:
        calls, standin = Client(machine), machine.standins["main"]
        volume = calls.create("v", 64 * MIB).volume_id
        context = calls.attach(volume)
        hang_whole(standin)
        fails(Code.UNAVAILABLE, calls.stage, volume, context)
        fails(Code.ABORTED, calls.unstage, volume)
        standin.resume()
        eventually(calls.unstage, volume)
        assert machine.leftovers() == []
        eventually(calls.stage, volume, context)
        hang_whole(standin)
        fails(Code.UNAVAILABLE, calls.publish, volume, context)
        fails(Code.ABORTED, calls.unpublish, volume)
        standin.resume()
        eventually(calls.unpublish, volume)
        assert not calls.target_path(volume).exists()
        eventually(calls.unstage, volume)
        assert machine.leftovers() == []
        calls.detach(volume)
        calls.delete(volume)
