"""`check --repair`: each kind of damage made for real in a real pool, what is done about it, and what is left alone.

Axes: the kind of damage; how much of a torn record is left; who uses the image; a kill before each step.
"""

import hashlib
import json
import os
import pty
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from controller_kit import QEMU_DIR, SIZE_BYTES, Kit, tools, tree
from crash_runner import REPAIR
from merging_kit import begin, two_layers
from test_check import MADE, image, leak, put_other_backing_name
from test_collector import add_garbage, record_of, tear
from test_crash_merges import EVERY, SEED
from test_crash_steps import Runner

from csi_quobyte.engine import index, layers, merging
from csi_quobyte.engine import repair as repairing
from csi_quobyte.engine.lease import _RENEW_S, LEASE_S, Lease
from csi_quobyte.engine.repair import Outcome
from csi_quobyte.errors import Busy, Corrupt, Unavailable
from csi_quobyte.host import qemu_img
from csi_quobyte.pool import records
from csi_quobyte.pool import store as store_module
from csi_quobyte.pool.records import LayerRecord, LayerState
from csi_quobyte.pool.salvage import salvage
from csi_quobyte.pool.store import Store
from lab.machine import wait_for

REPAIRED = {
    "missing-layer": "rebuild-record",
    "missing-marker": "make-marker",
    "wrong-backing-name": "set-backing-name",
    "leaked-clusters": "free-clusters",
    "unfinished": "collect",
    "stale-marker": "collect",
    "orphan-layer": "collect",
    "orphan-file": "collect",
    "stale-claim": "collect",
    "stale-temporary": "collect",
}
LEFT = {
    "unreadable-record",  # of a snapshot, torn in the middle
    "missing-image",
    "broken-chain",
    "wrong-size",
    "damaged-image",
    "foreign-file",
}


@pytest.fixture(autouse=True)
def quick(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is torn is torn, without two seconds of looking again."""
    monkeypatch.setattr(store_module, "_REREAD_PAUSE_S", 0.0)
    monkeypatch.setattr(repairing, "_PATIENCE_S", 1.0)
    monkeypatch.setattr(repairing, "_PAUSE_S", 0.02)


def every_byte(root: str | Path) -> dict[str, str]:
    """What is in a pool, with a checksum of each file; without the reserve and who may merge."""
    found: dict[str, str] = {}
    for path in sorted(Path(root).rglob("*")):
        name = str(path.relative_to(root))
        if not name.startswith(("reserve", "collector.json")):
            found[name] = "directory" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def plan(kit: Kit) -> Outcome:
    """What would be done; nothing may change by asking."""
    before = every_byte(kit.store.root)
    planned = repairing.plan(kit.store, tools(), kit.check_image)
    assert every_byte(kit.store.root) == before
    return planned


def repair(kit: Kit) -> Outcome:
    return repairing.repair(kit.store, tools(), kit.check_image)


def two_disks(kit: Kit) -> None:
    """v holds 1, 2; its snapshot s holds 1."""
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.write("v", 2, block=1)


def test_every_kind_is_repaired_or_left() -> None:
    assert REPAIRED.keys() | LEFT == set(MADE)
    assert not REPAIRED.keys() & LEFT


@pytest.mark.parametrize("kind", REPAIRED)
def test_damage_is_repaired_and_the_second_look_finds_nothing(kit: Kit, kind: str) -> None:
    two_disks(kit)
    MADE[kind](kit)
    planned = [action for action in plan(kit).actions if action.kind == kind]
    assert {(action.action, action.done) for action in planned} == {(REPAIRED[kind], False)}
    done = [action for action in repair(kit).actions if action.kind == kind]
    assert {(action.action, action.done) for action in done} == {(REPAIRED[kind], True)}
    assert kit.check() == []
    assert kit.holds("v", 1, 2)
    assert kit.snapshot_holds("s", 1, 0)
    settled = every_byte(kit.store.root)
    assert repair(kit).actions == []
    assert every_byte(kit.store.root) == settled


@pytest.mark.parametrize("kind", sorted(LEFT))
def test_what_would_be_a_guess_is_reported_and_left(kit: Kit, kind: str) -> None:
    two_disks(kit)
    MADE[kind](kit)
    before = every_byte(kit.store.root)
    done = repair(kit)
    found = [action for action in done.actions if action.kind == kind]
    assert found
    assert {(action.action, action.done) for action in found} == {("none", False)}
    assert all(action.reason for action in found)
    assert every_byte(kit.store.root) == before
    assert [finding.kind for finding in done.after.findings] == [finding.kind for finding in done.before.findings]


def test_deleting_what_could_not_be_repaired_leaves_a_new_pool(kit: Kit) -> None:
    as_new = tree(kit.store.root)
    two_disks(kit)
    image(kit, "v", 1).unlink()
    repair(kit)
    kit.delete("v")
    kit.delete_snapshot("s")
    repair(kit)
    Path(kit.store.root, "collector.json").unlink()
    assert tree(kit.store.root) == as_new


# --- torn records ----------------------------------------------------------------------------------------------


def cut_behind(kit: Kit, folder: str, record_id: str, field: str) -> None:
    """Cut a record off in the middle of a field, everything before it is left."""
    path = record_of(kit, folder, record_id)
    text = path.read_bytes()
    path.write_bytes(text[: text.index(f'"{field}"'.encode()) + 5])


def same(one: LayerRecord, other: LayerRecord) -> bool:
    """Say whether a record says what another one did; how deep it lies is not rebuilt, but counted when it matters."""
    return replace(one, generation=0, nonce="", depth=0) == replace(other, generation=0, nonce="", depth=0)


@pytest.mark.parametrize(
    ("image_format", "position", "left"),
    [
        ("qcow2", 0, "nothing"),
        ("qcow2", 1, "half"),
        ("qcow2", 2, "all but the version"),
        ("raw", 0, "all but the version"),
        ("raw", 1, "nothing"),
        ("raw", 2, "half"),
    ],
)
def test_torn_layer_is_rebuilt_as_it_was(kit: Kit, image_format: str, position: int, left: str) -> None:
    kit.create("v", image_format=image_format)
    for number in (1, 2):
        kit.write("v", number, block=number - 1)
        kit.snapshot(f"s{number}", of="v")
    kit.write("v", 3, block=2)
    torn = kit.chain("v")[position]
    match left:
        case "nothing":
            record_of(kit, "layers", torn.id).write_bytes(b"")
        case "half":
            tear(kit, "layers", torn.id)
        case _:
            cut_behind(kit, "layers", torn.id, "kind")
    with pytest.raises(Corrupt):
        kit.chain("v")
    planned = {action.kind: action.action for action in plan(kit).actions}
    assert planned["unreadable-record"] == "rebuild-record"
    assert {one.done for one in repair(kit).actions} == {True}
    assert same(kit.store.layer(torn.id), torn)
    assert kit.check() == []
    assert kit.holds("v", 1, 2, 3)
    assert kit.snapshot_holds("s2", 1, 2, 0)


def test_whole_chain_of_torn_and_lost_layer_records_is_rebuilt(kit: Kit) -> None:
    two_disks(kit)
    kit.create("clone", source=kit.from_snapshot("s"))
    kit.write("clone", 5, block=2)
    chain = {layer.id: layer for name in ("v", "clone") for layer in kit.chain(name)}
    for number, layer_id in enumerate(chain):
        tear(kit, "layers", layer_id) if number % 2 else record_of(kit, "layers", layer_id).unlink()
    assert repair(kit).after.findings == []
    assert all(same(kit.store.layer(layer_id), layer) for layer_id, layer in chain.items())
    assert kit.holds("v", 1, 2)
    assert kit.holds("clone", 1, 0, 5)


def test_frozen_layer_below_an_attached_volume_is_rebuilt_and_its_head_is_not(kit: Kit) -> None:
    two_disks(kit)
    head, base = kit.chain("v")
    kit.attach("v")
    for layer in (head, base):
        tear(kit, "layers", layer.id)
    done = repair(kit)
    assert {action.id: action.done for action in done.actions} == {head.id: False, base.id: True}
    assert done.skipped_live == 1
    kit.detach("v")
    assert repair(kit).after.findings == []
    assert kit.holds("v", 1, 2)


@pytest.mark.parametrize("lost", ["torn", "gone"])
def test_cache_entry_with_children_is_rebuilt(kit: Kit, lost: str) -> None:
    two_disks(kit)
    kit.create("cached", source=kit.from_snapshot("s"), clone_mode="cache")
    kit.write("cached", 6, block=1)
    entry = kit.chain("cached")[-1]
    assert entry.id == kit.store.snapshot(kit.snapshot_id("s")).cache
    tear(kit, "layers", entry.id) if lost == "torn" else record_of(kit, "layers", entry.id).unlink()
    assert repair(kit).after.findings == []
    assert same(kit.store.layer(entry.id), entry)
    assert kit.holds("cached", 1, 6)


def test_record_of_a_grown_head_says_the_size_of_its_image(kit: Kit) -> None:
    two_disks(kit)
    kit.expand("v", 2 * SIZE_BYTES)
    kit.grow_image("v")
    tear(kit, "layers", kit.chain("v")[0].id)
    assert repair(kit).after.findings == []
    assert kit.chain("v")[0].size_bytes == 2 * SIZE_BYTES


@pytest.mark.parametrize("position", [0, 1])
def test_layer_is_rebuilt_after_a_merge_that_has_ended(kit: Kit, position: int) -> None:
    kit.create("v")
    for number, name in enumerate(("first", "second", "third"), start=1):
        kit.write("v", number, block=number - 1)
        kit.snapshot(name, of="v")
    kit.delete_snapshot("second")
    assert kit.merge_all() == ["up"]
    torn = kit.chain("v")[position]
    tear(kit, "layers", torn.id)
    assert repair(kit).after.findings == []
    assert same(kit.store.layer(torn.id), torn)
    assert kit.holds("v", 1, 2, 3)


@pytest.mark.parametrize("which", ["child", "parent", "name only", "marker only"])
def test_layer_that_a_merge_touches_is_not_rebuilt(kit: Kit, which: str) -> None:
    """The name in the image is ahead of the data while a merge runs, and nothing here may believe it."""
    kit.create("v")
    for number, name in enumerate(("first", "second"), start=1):
        kit.write("v", number, block=number - 1)
        kit.snapshot(name, of="v")
    kit.delete_snapshot("second")
    head, middle, base = kit.chain("v")
    name = kit.store.backing_name(head.id, base)
    merged = replace(middle, state=LayerState.MERGING, merge=records.Merge(kind="up", child=head.id, parent=base.id))
    if which in {"child", "parent"}:
        kit.store.swap(middle, merged)
        qemu_img.set_backing_name(tools(), kit.store.image_path(head), name, base.format)
        tear(kit, "layers", head.id if which == "child" else base.id)
    elif which == "name only":  # as if the record with the note were the one that is torn
        qemu_img.set_backing_name(tools(), kit.store.image_path(head), name, base.format)
        tear(kit, "layers", head.id)
        tear(kit, "layers", middle.id)
    else:  # killed between the new marker and the commit
        qemu_img.set_backing_name(tools(), kit.store.image_path(head), name, base.format)
        kit.store.mark(base.id, records.child_marker(head.id))
        tear(kit, "layers", head.id)
    torn = head.id if which != "parent" else base.id
    before = record_of(kit, "layers", torn).read_bytes(), Path(kit.store.image_path(head)).read_bytes()
    done = repair(kit)
    assert [(one.action, one.done) for one in done.actions if one.id == torn] == [("none", False)]
    assert (record_of(kit, "layers", torn).read_bytes(), Path(kit.store.image_path(head)).read_bytes()) == before


def test_layer_is_not_rebuilt_over_a_foreign_name_or_a_second_image(kit: Kit) -> None:
    two_disks(kit)
    head, base = kit.chain("v")
    put_other_backing_name(kit)
    tear(kit, "layers", head.id)
    (action,) = repair(kit).actions
    assert "no layer's file" in action.reason
    Path(kit.store.image_path(base)).with_suffix(".raw").touch()
    tear(kit, "layers", base.id)
    assert {one.done for one in repair(kit).actions} == {False}


@pytest.mark.parametrize("folder", ["volumes", "snapshots"])
def test_record_cut_off_behind_all_that_matters_is_rebuilt(kit: Kit, folder: str) -> None:
    two_disks(kit)
    kit.attach("v")
    volume, snapshot = kit.store.volume(kit.volume_id("v")), kit.store.snapshot(kit.snapshot_id("s"))
    record = volume if folder == "volumes" else snapshot
    cut_behind(kit, folder, record.id, "kubernetes")
    (action,) = plan(kit).actions
    assert action.action == "rebuild-record"
    assert repair(kit).after.findings == []
    assert replace(kit.store.volume(volume.id), generation=0, nonce="") == replace(volume, generation=0, nonce="")
    assert replace(kit.store.snapshot(snapshot.id), generation=0, nonce="") == replace(snapshot, generation=0, nonce="")
    kit.detach("v")
    assert kit.holds("v", 1, 2)
    kit.delete_everything()


@pytest.mark.parametrize(
    ("folder", "field"),
    [("volumes", "unfinished"), ("volumes", "attachments"), ("volumes", "detached_at"), ("snapshots", "unfinished")],
)
def test_record_that_lost_a_field_is_left_and_can_be_deleted(kit: Kit, folder: str, field: str) -> None:
    as_new = tree(kit.store.root)
    two_disks(kit)
    torn = kit.volume_id("v") if folder == "volumes" else kit.snapshot_id("s")
    cut_behind(kit, folder, torn, field)
    before = every_byte(kit.store.root)
    (action,) = repair(kit).actions
    assert (action.id, action.action, action.done) == (torn, "none", False)
    assert every_byte(kit.store.root) == before
    kit.delete("v")
    kit.delete_snapshot("s")
    kit.sweep_until_quiet()
    Path(kit.store.root, "collector.json").unlink(missing_ok=True)
    assert tree(kit.store.root) == as_new


def test_cut_off_record_whose_marker_is_gone_is_left(kit: Kit) -> None:
    two_disks(kit)
    volume = kit.store.volume(kit.volume_id("v"))
    kit.store.unmark(volume.head, records.volume_marker(volume))
    cut_behind(kit, "volumes", volume.id, "kubernetes")
    assert {action.done for action in repair(kit).actions} == {False}


def test_late_change_of_the_torn_record_does_not_come_true(kit: Kit) -> None:
    """A claim that a dead process has left for the old record must not become a change of the rebuilt one."""
    two_disks(kit)
    base = kit.chain("v")[1]
    path = record_of(kit, "layers", base.id)
    claim = Path(f"{path}.g{base.generation + 1}")
    claim.write_bytes(records.encode(records.next_version(replace(base, parent="0" * 24), of=base)))
    tear(kit, "layers", base.id)
    (reason,) = (action.reason for action in repair(kit).actions if action.kind == "unreadable-record")
    assert "under way" in reason
    kit.store.replace_damaged(base, path.read_bytes())
    assert not claim.exists()
    assert kit.store.layer(base.id).parent is None


def test_nothing_of_a_text_that_is_damaged_in_the_middle_is_believed(kit: Kit) -> None:
    volume = kit.create("v")
    text = records.encode(volume)
    whole = salvage(records.VolumeRecord, text[: text.index(b'"kind"')] + bytes(40))
    assert whole is not None
    assert (whole.head, whole.size_bytes, whole.attachments) == (volume.head, volume.size_bytes, ())
    for broken in (bytes(len(text)), b"\0" * 20 + text[20:], text[:80] + b"\xff\0" + text[82:], text[:300], b"[]", b""):
        assert salvage(records.VolumeRecord, broken) is None


def test_torn_content_note_is_never_removed(kit: Kit) -> None:
    volume = kit.create("v")
    kit.store.put_content(volume, records.Content(state="formatted", filesystem="ext4"))
    (note,) = Path(kit.store.root).glob("volumes/*/*.content-*")
    note.write_bytes(b"{")
    (action,) = repair(kit).actions
    assert (action.kind, action.id, action.action) == ("unreadable-record", volume.id, "none")
    assert note.read_bytes() == b"{"


def test_torn_closed_note_is_found_blocks_nothing_and_is_removed(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.create("v")
    kit.attach("v")
    kit.detach("v")
    volume = kit.store.volume(kit.volume_id("v"))
    kit.store.note_closed(volume, volume.attach_generation)
    monkeypatch.setattr(layers, "FENCE_S", 30.0)
    monkeypatch.setattr(merging, "GRACE_S", 60.0)
    (note,) = Path(kit.store.root).glob("volumes/*/*.closed-*")
    note.write_bytes(b"{")
    kit.write("v", 1)
    with pytest.raises(Unavailable, match="a moment ago"):
        kit.snapshot("early", of="v")
    (finding,) = kit.check()
    assert (finding.kind, finding.id, finding.path) == ("unreadable-record", volume.id, str(note))
    (action,) = repair(kit).actions
    assert (action.action, action.done) == ("none", False), "a node that was lost may still write"
    assert note.exists()
    later = records.now() + timedelta(minutes=2)
    for module in (layers, merging):
        monkeypatch.setattr(module, "now", lambda: later)
    kit.snapshot("s", of="v")
    (action,) = repair(kit).actions
    assert (action.action, action.done) == ("remove-note", True)
    assert kit.check() == []


def test_what_is_in_the_trash_is_repaired_and_can_be_restored(kit: Kit) -> None:
    kit.create("v", on_delete="trash")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.write("v", 2, block=1)
    head, base = kit.chain("v")
    put_other_backing_name(kit)
    kit.delete("v")
    entry = kit.store.find_trashed(kit.trashed("v"))
    assert entry
    kit.store.unmark(head.id, records.marker_of(entry))
    tear(kit, "layers", base.id)
    assert repair(kit).after.findings == []
    tear(kit, "layers", head.id)
    assert repair(kit).after.findings == []
    assert same(kit.store.layer(head.id), head)
    kit.restore(kit.trashed("v"), "again")
    assert kit.holds("again", 1, 2)


def test_torn_entry_of_the_trash_is_left_for_a_purge(kit: Kit) -> None:
    kit.create("v", on_delete="trash")
    kit.write("v", 1)
    kit.delete("v")
    (entry,) = Path(kit.store.root, "trash").glob("*.json")
    entry.write_bytes(entry.read_bytes()[:50])
    before = every_byte(kit.store.root)
    (action,) = repair(kit).actions
    assert (action.kind, action.action, "purge" in action.reason) == ("unreadable-record", "none", True)
    assert every_byte(kit.store.root) == before


def test_torn_record_of_the_lease_is_reported(kit: Kit) -> None:
    kit.create("v")
    lease = Path(kit.store.root, "collector.json")
    lease.write_bytes(b"{")
    (action,) = repair(kit).actions
    assert (Path(action.path), action.action, action.done) == (lease, "none", False)
    assert "stop all controllers" in action.reason
    kit.store.unmark(*lost_marker(kit))
    with pytest.raises(Busy, match="collector"):
        repair(kit)
    lease.unlink()
    assert repair(kit).after.findings == []


def test_torn_record_of_a_node_is_removed(kit: Kit) -> None:
    (node,) = Path(kit.store.root, "nodes").glob("*.json")
    node.write_bytes(b"{")
    outcome = repair(kit)
    assert [(Path(action.path), action.action, action.done) for action in outcome.actions] == [
        (node, "remove-note", True)
    ]
    assert outcome.after.findings == []
    assert not node.exists()


def test_record_of_a_node_that_is_written_at_that_moment_stays(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    (node,) = Path(kit.store.root, "nodes").glob("*.json")
    whole = node.read_bytes()
    node.write_bytes(b"{")
    unlink = kit.store._steps.unlink

    def late(path: str, **options: Any) -> bool:
        node.write_bytes(whole)
        return unlink(path, **options)

    monkeypatch.setattr(kit.store._steps, "unlink", late)
    with pytest.raises(Busy):
        kit.store.remove_damaged_node(node.name)
    assert node.read_bytes() == whole


def lost_marker(kit: Kit) -> tuple[str, str]:
    """The head of v, and v's marker in it."""
    volume = kit.store.volume(kit.volume_id("v"))
    return volume.head, records.volume_marker(volume)


# --- who is in the way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [put_other_backing_name, leak])
def test_image_of_an_attached_volume_is_left_until_it_is_detached(kit: Kit, damage: Callable[[Kit], None]) -> None:
    two_disks(kit)
    kit.create("clone", source=kit.from_snapshot("s"))
    damage(kit)
    for name in ("v", "clone"):
        kit.attach(name)
    before = every_byte(kit.store.root)
    done = repair(kit)
    assert not any(action.done for action in done.actions)
    assert done.skipped_live + done.after.skipped_live >= 1
    assert every_byte(kit.store.root) == before
    kit.detach("v")
    kit.detach("clone")
    assert repair(kit).after.findings == []


def test_image_that_a_daemon_writes_without_an_attachment_is_skipped(kit: Kit) -> None:
    """As after a detach by force: the lost node's daemon goes on."""
    two_disks(kit)
    put_other_backing_name(kit)
    path = image(kit, "v")
    before = path.read_bytes()
    node = {"driver": "qcow2", "node-name": "n", "backing": None, "file": {"driver": "file", "filename": str(path)}}
    with tempfile.TemporaryDirectory(prefix="cq-", dir="/tmp") as short:
        daemon = subprocess.Popen(
            [tools().storage_daemon, "--blockdev", json.dumps(node), "--pidfile", f"{short}/pid"]  # noqa: RUF005
            + ["--nbd-server", f"addr.type=unix,addr.path={short}/nbd"]
            + ["--export", "type=nbd,id=e,node-name=n,writable=on"]
        )
        try:
            wait_for("the daemon", Path(short, "pid").exists, timeout_s=20)
            done = repair(kit)
            assert done.after.skipped_live == 1
            assert not any(action.kind == "wrong-backing-name" for action in done.actions)
            assert path.read_bytes() == before
        finally:
            daemon.kill()
            daemon.wait()


def test_object_that_an_operation_works_on_is_left_for_later(kit: Kit) -> None:
    two_disks(kit)
    put_other_backing_name(kit)
    other = Store(kit.store.root)
    with other.lock(kit.volume_id("v")):
        (action,) = repair(kit).actions
        assert (action.done, kit.volume_id("v") in action.reason) == (False, True)
    assert repair(kit).actions[0].done
    other.close()


def test_volume_that_is_attached_after_the_decision_is_left(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    two_disks(kit)
    put_other_backing_name(kit)
    before = image(kit, "v").read_bytes()
    decide = repairing._task
    asked: list[None] = []

    def late(*arguments: Any) -> Any:
        task = decide(*arguments)
        asked.append(None)
        if len(asked) == 2:  # the first decision only says whether there is anything to do
            kit.attach("v")
        return task

    with monkeypatch.context() as patched:
        patched.setattr(repairing, "_task", late)
        (action,) = repair(kit).actions
    assert (action.done, "changed by another operation" in action.reason) == (False, True)
    assert image(kit, "v").read_bytes() == before


def test_nothing_more_is_repaired_once_another_process_merges(kit: Kit) -> None:
    """An image may have taken longer than the lease; the next one is left alone then."""
    elsewhere, mine, others = Store(kit.store.root), Lease(), Lease()
    found, done = index.read(kit.store), []
    task = repairing._Task("free-clusters", "", work=lambda: done.append(1))
    assert mine.hold(kit.store)
    assert repairing._attempt(kit.store, found, task, mine) is None
    mine.release(kit.store)
    assert others.hold(elsewhere)
    assert isinstance(repairing._attempt(kit.store, found, task, mine), Busy)
    assert done == [1]
    assert repairing._IMAGE_TIMEOUT_S + _RENEW_S < LEASE_S


def test_half_done_merge_is_ended(kit: Kit) -> None:
    merging = two_layers(kit)
    begin(kit, merging)
    (action,) = plan(kit).actions
    assert (action.kind, action.action) == ("unfinished", "collect")
    assert repair(kit).after.findings == []
    assert kit.store.layer(merging.layer).merge is None
    assert kit.holds("v", 1, 2)


def test_nothing_without_an_owner_is_removed_while_a_record_cannot_be_read(kit: Kit) -> None:
    torn = kit.create("torn")
    add_garbage(kit)
    orphan = Path(kit.store.root, "layers", "ab", "ab" + records.new_layer_id()[2:] + ".qcow2")
    orphan.touch()
    tear(kit, "volumes", torn.id)
    before = every_byte(kit.store.root)
    done = repair(kit)
    assert not any(action.done for action in done.actions)
    assert every_byte(kit.store.root) == before
    kit.delete("torn")
    assert repair(kit).after.findings == []
    assert not orphan.exists()


def test_lost_refs_directory_of_a_needed_layer_is_made_again(kit: Kit) -> None:
    two_disks(kit)
    head, base = kit.chain("v")
    for layer in (head, base):
        shutil.rmtree(Path(kit.store.image_path(layer)).with_suffix(".refs"))
    assert repair(kit).after.findings == []
    assert len(kit.store.markers(base.id) or []) == 2
    kit.delete("v")
    kit.delete_snapshot("s")
    kit.sweep_until_quiet()
    assert list(kit.store.layer_ids()) == []


# --- killed ----------------------------------------------------------------------------------------------------


def all_damage(kit: Kit) -> None:
    """Much of what can be repaired, at once."""
    two_disks(kit)
    leak(kit)
    kit.create("other")
    kit.write("other", 3)
    kit.snapshot("t", of="other")
    kit.create("w")
    put_other_backing_name(kit)
    tear(kit, "layers", kit.chain("other")[1].id)
    record_of(kit, "layers", kit.store.volume(kit.volume_id("w")).head).unlink()
    cut_behind(kit, "snapshots", kit.snapshot_id("t"), "kubernetes")
    volume = kit.store.volume(kit.volume_id("v"))
    kit.store.unmark(volume.head, records.volume_marker(volume))
    kit.store.mark(volume.head, records.child_marker(records.new_layer_id()))
    Path(kit.store.root, "layers", "ab", "ab" + "0" * 22 + ".raw").touch()
    os.link(record_of(kit, "volumes", volume.id), f"{record_of(kit, 'volumes', volume.id)}.g9")


def test_repair_that_is_killed_before_a_step_is_ended_by_the_next_one(kit: Kit, tmp_path: Path) -> None:
    """A sample of the steps by the seed; all of them with `make crash`."""
    all_damage(kit)
    damaged, root = tmp_path / "damaged", tmp_path / "killed"
    subprocess.run(["cp", "-a", "--sparse=always", kit.store.root, str(damaged)], check=True, timeout=20)
    runner = Runner()
    steps = range(1, 200) if EVERY == 1 else sorted(random.Random(SEED).sample(range(1, 60), 4))
    try:
        for step in steps:
            shutil.rmtree(root, ignore_errors=True)
            subprocess.run(["cp", "-a", "--sparse=always", str(damaged), str(root)], check=True, timeout=20)
            if not runner.run(root, REPAIR, step):
                break
            again = Kit(Store(str(root)))
            assert repair(again).after.findings == [], f"killed before step {step}, seed {SEED}"
            assert again.holds("v", 1, 2)
            assert again.holds("other", 3)
            assert again.snapshot_holds("t", 3)
            again.store.close()
        assert runner.kills >= (60 if EVERY == 1 else len(steps))
    finally:
        runner.close()


# --- the command -----------------------------------------------------------------------------------------------


def command(kit: Kit, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "csi_quobyte", "check", "--pool", f"main={kit.store.root}", "--require-mount", "any"]
    return subprocess.run(
        [*argv, "--qemu-dir", QEMU_DIR, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_command_says_what_it_would_do_and_does_it_when_told(kit: Kit) -> None:
    two_disks(kit)
    put_other_backing_name(kit)
    before = every_byte(kit.store.root)
    would = command(kit, "--repair")
    assert (would.returncode, "would set-backing-name" in would.stdout) == (1, True), would
    machine = json.loads(command(kit, "--repair", "--json").stdout)
    (action,) = machine["repair"]["actions"]
    assert (machine["repair"]["dry_run"], action["action"], action["done"]) == (True, "set-backing-name", False)
    assert set(action) == {"kind", "id", "path", "action", "done", "reason"}
    assert len(machine["findings"]) == 1
    assert every_byte(kit.store.root) == before
    assert command(kit, "--yes").returncode == 2
    did = json.loads(command(kit, "--repair", "--yes", "--json").stdout)
    assert (did["repair"]["dry_run"], did["repair"]["actions"][0]["done"], did["findings"]) == (False, True, [])
    again = command(kit, "--repair", "--yes")
    assert (again.returncode, "no findings" in again.stdout) == (0, True), again


@pytest.mark.parametrize("answer", ["y", "n"])
def test_command_asks_a_terminal(kit: Kit, answer: str) -> None:
    two_disks(kit)
    put_other_backing_name(kit)
    before = image(kit, "v").read_bytes()
    ours, terminal = pty.openpty()
    argv = [sys.executable, "-m", "csi_quobyte", "check", "--pool", f"main={kit.store.root}", "--require-mount", "any"]
    with subprocess.Popen(
        [*argv, "--qemu-dir", QEMU_DIR, "--repair"], stdin=terminal, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        said = b""
        while b"[y/N]" not in said:
            said += os.read(ours, 4096)
        assert image(kit, "v").read_bytes() == before
        os.write(ours, answer.encode() + b"\n")
        with suppress(OSError):  # how a terminal ends whose last process has ended
            while os.read(ours, 4096):
                pass
        assert process.wait(60) == (0 if answer == "y" else 1)
    os.close(ours)
    assert (image(kit, "v").read_bytes() == before) == (answer == "n")
    assert bool(kit.check()) == (answer == "n")
