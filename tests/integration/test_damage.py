"""Damage from outside in a pool, and the collector and repair beside it: nothing that is left is lost by them.

Axes: what is damaged (a record torn, gone, unreadable for a moment, another's; a marker or refs directory lost; a
directory missing; files of others) × who comes by (a sweep, a delete, `check --repair`) × what must be there after.
"""

import shutil
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from controller_kit import QEMU_DIR, SIZE_BYTES, Kit, tools, tree
from test_check import leak, put_other_backing_name
from test_collector import record_of, tear
from test_repair import cut_behind, plan, quick, repair, two_disks  # noqa: F401 - a fixture

from csi_quobyte.config import PoolSpec
from csi_quobyte.engine import check as check_module
from csi_quobyte.engine import collector, layers, trash
from csi_quobyte.engine import index as index_module
from csi_quobyte.engine import repair as repairing
from csi_quobyte.errors import Corrupt, DriverError
from csi_quobyte.pool import records
from csi_quobyte.pool.pools import Pools
from csi_quobyte.pool.records import SnapshotState, VolumeState
from csi_quobyte.pool.store import Store


def note(kit: Kit, name: str) -> Path:
    volume = kit.store.volume(kit.volume_id(name))
    kit.store.put_content(volume, records.Content(state="formatted", filesystem="ext4", generation=1))
    return record_of(kit, "volumes", volume.id).with_name(f"{volume.id}.content-{volume.uid}")


# --- content notes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["torn for good", "torn for a moment"])
def test_note_survives_a_record_that_is_unreadable_at_the_second_look(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    two_disks(kit)
    path = note(kit, "v")
    half = kit.create("half")
    kit.store.swap(half, replace(half, state=VolumeState.DELETING))
    real, looks = index_module.read, []
    record = record_of(kit, "volumes", kit.volume_id("v"))
    whole = record.read_bytes()

    def read(store: Store, **options: Any) -> Any:
        if options.get("brief"):
            looks.append(1)
            if len(looks) == 2:
                record.write_bytes(whole[:50])
        try:
            return real(store, **options)
        finally:
            if how == "torn for a moment":
                record.write_bytes(whole)

    monkeypatch.setattr(index_module, "read", read)
    repair(kit)
    record.write_bytes(whole)
    assert path.exists()


def at_look(number: int, kit: Kit, monkeypatch: pytest.MonkeyPatch, shown: Corrupt | None) -> None:
    """Let one look at the record of v, the `number`-th from now on, end so."""
    real = Store.find_volume
    asked: list[str] = []

    def find(self: Store, volume_id: str) -> Any:
        if volume_id == kit.volume_id("v"):
            asked.append(volume_id)
            if len(asked) == number:
                if shown:
                    raise shown
                return None
        return real(self, volume_id)

    monkeypatch.setattr(Store, "find_volume", find)


def test_note_survives_one_cut_off_read_in_a_sweep(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """No repair: one sweep of a living controller that finishes anything at all and meets one cut-off read then."""
    two_disks(kit)
    path = note(kit, "v")
    half = kit.create("half")
    kit.store.swap(half, replace(half, state=VolumeState.DELETING))
    at_look(2, kit, monkeypatch, Corrupt("a client's old length of the file"))
    collector.sweep(kit.store)
    assert path.exists()


def test_note_survives_one_look_that_finds_no_record(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOENT beside a rename; docs/decisions/0028 says how often that is seen."""
    two_disks(kit)
    path = note(kit, "v")
    at_look(1, kit, monkeypatch, None)
    collector.sweep(kit.store)
    assert kit.holds("v", 1, 2)
    assert path.exists()


def test_note_survives_a_mount_that_is_away_while_the_records_are_read(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """umount and mount of the pool while a long look is at the volumes: the empty mount point has no directories."""
    two_disks(kit)
    path = note(kit, "v")
    root = Path(kit.store.root)
    real = Store.volume_ids
    state = {"looks": 0}

    def volume_ids(self: Store, **options: Any) -> Any:
        state["looks"] += 1
        if state["looks"] != 1:
            return real(self, **options)
        root.rename(root.with_name("away"))
        root.mkdir()
        try:
            return iter(list(real(self, **options)))
        finally:
            root.rmdir()
            root.with_name("away").rename(root)

    monkeypatch.setattr(Store, "volume_ids", volume_ids)
    with suppress(DriverError):
        collector.sweep(kit.store)
    assert kit.holds("v", 1, 2)
    assert path.exists()


# --- copies of records that somebody has made ------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["json.gz", "json.good", "json.g2.bak"])
def test_copy_of_a_record_by_hand_is_a_foreign_file(kit: Kit, ending: str) -> None:
    two_disks(kit)
    path = record_of(kit, "volumes", kit.volume_id("v"))
    copy = path.with_name(path.name.removesuffix("json") + ending)
    copy.write_bytes(b"mine")
    assert kit.findings() == {"foreign-file"}


@pytest.mark.parametrize("ending", ["json.gz", "json.good", "json.g2.bak"])
def test_copy_of_a_record_by_hand_does_not_stop_the_collector(kit: Kit, ending: str) -> None:
    two_disks(kit)
    path = record_of(kit, "volumes", kit.volume_id("v"))
    copy = path.with_name(path.name.removesuffix("json") + ending)
    copy.write_bytes(b"mine")
    for _ in range(4):
        collector.sweep(kit.store)
    assert copy.exists()


def test_repair_beside_a_copy_of_a_record(kit: Kit) -> None:
    two_disks(kit)
    path = record_of(kit, "volumes", kit.volume_id("v"))
    path.with_name(path.name + ".good").write_bytes(b"mine")
    put_other_backing_name(kit)
    assert {finding.kind for finding in repair(kit).after.findings} == {"foreign-file"}


# --- below damaged layers --------------------------------------------------------------------------------------------


def three_deep(kit: Kit) -> None:
    """v: head -> middle -> base, no snapshots: only records of layers name middle and base."""
    kit.create("v")
    for number in (1, 2):
        kit.write("v", number, block=number - 1)
        kit.snapshot(f"s{number}", of="v")
    kit.write("v", 3, block=2)
    for number in (1, 2):
        kit.delete_snapshot(f"s{number}")


@pytest.mark.parametrize("lost", ["marker", "refs directory"])
@pytest.mark.parametrize("child", ["torn", "gone"])
@pytest.mark.parametrize("who", ["collector", "repair"])
def test_parent_is_kept_while_its_childs_record_is_damaged(kit: Kit, child: str, lost: str, who: str) -> None:
    three_deep(kit)
    _, middle, base = kit.chain("v")
    tear(kit, "layers", middle.id) if child == "torn" else record_of(kit, "layers", middle.id).unlink()
    if lost == "marker":
        kit.store.unmark(base.id, records.child_marker(middle.id))
    else:
        shutil.rmtree(Path(kit.store.image_path(base)).with_suffix(".refs"))
    if who == "collector":
        collector.sweep(kit.store)
    else:
        half = kit.create("half")
        kit.store.swap(half, replace(half, state=VolumeState.DELETING))
        repair(kit)
    assert kit.store.find_layer(base.id) is not None
    assert Path(kit.store.image_path(base)).exists()


def test_lost_marker_and_a_record_that_is_unreadable_for_a_moment(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    three_deep(kit)
    _, middle, base = kit.chain("v")
    kit.store.unmark(base.id, records.child_marker(middle.id))
    real = Store.find_layer

    def find(self: Store, layer_id: str) -> Any:
        if layer_id == middle.id:
            raise Corrupt("a client's old length of the file")
        return real(self, layer_id)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "find_layer", find)
        collector.sweep(kit.store)
    assert Path(kit.store.image_path(base)).exists()
    assert kit.holds("v", 1, 2, 3)


def test_torn_parent_of_a_torn_child_is_kept(kit: Kit) -> None:
    three_deep(kit)
    _, middle, base = kit.chain("v")
    tear(kit, "layers", middle.id)
    tear(kit, "layers", base.id)
    kit.store.unmark(base.id, records.child_marker(middle.id))
    collector.sweep(kit.store)
    assert Path(kit.store.image_path(base)).exists()


# --- several torn layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [(0, 1), (1, 2), (0, 1, 2)])
def test_torn_layers_of_one_chain_are_collected_once_all_is_deleted(kit: Kit, which: tuple[int, ...]) -> None:
    new = tree(kit.store.root)
    three_deep(kit)
    chain = kit.chain("v")
    for position in which:
        tear(kit, "layers", chain[position].id)
    kit.delete("v")
    repair(kit)
    for _ in range(5):
        repair(kit)
        collector.sweep(kit.store)
    Path(kit.store.root, "collector.json").unlink(missing_ok=True)
    assert kit.check() == []
    assert tree(kit.store.root) == new


# --- lost markers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name_is_wrong", [False, True])
def test_repair_does_not_drop_a_layer_that_a_record_names(kit: Kit, name_is_wrong: bool) -> None:
    """v lies on base, its marker there is lost; a delete of the snapshot on base is half done."""
    two_disks(kit)
    head, base = kit.chain("v")
    if name_is_wrong:
        put_other_backing_name(kit)
    kit.store.unmark(base.id, records.child_marker(head.id))
    snapshot = kit.store.snapshot(kit.snapshot_id("s"))
    kit.store.swap(snapshot, replace(snapshot, state=SnapshotState.DELETING))
    repair(kit)
    assert Path(kit.store.image_path(base)).exists()
    assert kit.holds("v", 1, 2)


def test_delete_does_not_drop_a_layer_that_a_record_names(kit: Kit) -> None:
    """The same without repair: the layer that a delete releases is dropped by its markers alone."""
    two_disks(kit)
    head, base = kit.chain("v")
    kit.store.unmark(base.id, records.child_marker(head.id))
    assert kit.findings() == {"missing-marker"}
    pools = Pools([PoolSpec("main", kit.store.root)], require_mount="any", timeout_s=20.0)
    controller = collector.Collector(pools.all[0], tools())
    controller._sweep_until_quiet(kit.store)
    kit.delete_snapshot("s")
    for layer_id in kit.released:
        controller._work(layer_id)
    assert Path(kit.store.image_path(base)).exists()
    assert kit.holds("v", 1, 2)


def test_expired_trash_does_not_take_a_layer_that_a_record_names(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v", on_delete="trash", trash_retention_s=0)
    kit.write("v", 2, block=1)
    _, base = kit.chain("v")
    kit.delete_snapshot("s")
    shutil.rmtree(Path(kit.store.image_path(base)).with_suffix(".refs"))
    collector.sweep(kit.store)
    assert Path(kit.store.image_path(base)).exists()
    assert kit.holds("v", 1, 2)


# --- missing directories ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["volumes", "volumes/shard", "snapshots", "images", "trash", "jobs"])
@pytest.mark.parametrize("what", ["found", "kept"])
def test_missing_directory_is_no_empty_one(kit: Kit, folder: str, what: str) -> None:
    two_disks(kit)
    kit.create("old", on_delete="trash")
    kit.write("old", 4)
    kit.delete("old")
    root = Path(kit.store.root)
    away = root / folder.replace("/shard", "")
    if folder.endswith("/shard"):
        away = record_of(kit, "volumes", kit.volume_id("v")).parent
    aside = root.with_name("aside")
    before = tree(root)
    away.rename(aside)
    if what == "found":
        with suppress(DriverError):  # refused as a whole is as good as an error among the findings
            found = kit.check()
            assert [one.kind for one in found if one.severity == "error"], found
        return
    with suppress(DriverError):
        repair(kit)
    assert not away.exists()
    aside.rename(away)
    assert before.items() - tree(root).items() == set()


def test_missing_shard_is_reported(kit: Kit) -> None:
    two_disks(kit)
    empty = next(path for path in Path(kit.store.root, "volumes").iterdir() if not any(path.iterdir()))
    empty.rmdir()
    with suppress(DriverError):
        assert kit.check() != []


# --- restores --------------------------------------------------------------------------------------------------------


def test_torn_restore_file_is_not_published(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.create("v", on_delete="trash")
    kit.write("v", 1)
    kit.delete("v")
    entry_id = kit.trashed("v")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trash, "_publish", die)
        with pytest.raises(KeyboardInterrupt):
            kit.restore(entry_id, "again")
    (path,) = Path(kit.store.root, "trash").glob("*.restore-*")
    path.write_bytes(path.read_bytes()[:50])
    repair(kit)
    assert not [one for one in kit.check() if one.severity == "error"]
    entry = kit.store.find_trashed(entry_id)
    assert entry is not None
    kit.restore(entry_id, "again")
    assert kit.holds("again", 1)


# --- chains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["volume", "snapshot"])
def test_broken_chain_below_a_snapshot_is_found(kit: Kit, owner: str) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s1", of="v")
    kit.write("v", 2, block=1)
    kit.snapshot("s2", of="v")
    base = kit.store.layer(kit.store.snapshot(kit.snapshot_id("s1")).layer)
    path = kit.store.image_path(base)
    subprocess.run([f"{QEMU_DIR}/qemu-img", "resize", "-q", "-f", "qcow2", path, str(2 * SIZE_BYTES)], check=True)
    kit.store.swap(base, replace(base, size_bytes=2 * SIZE_BYTES))
    if owner == "snapshot":
        kit.delete("v")
        kit.sweep_until_quiet()
    kinds = {one.kind for one in kit.check() if one.severity == "error"}
    kit.create("r", source=kit.from_snapshot("s2"))
    with pytest.raises(Corrupt):
        kit.chain("r")
    assert "broken-chain" in kinds


# --- another object's record -----------------------------------------------------------------------------------------


def test_record_of_another_object_is_not_taken_for_ones_own(kit: Kit) -> None:
    two_disks(kit)
    kit.create("w")
    kit.write("w", 5)
    head = kit.chain("v")[0]
    mine = record_of(kit, "volumes", kit.volume_id("v"))
    text = mine.read_bytes()
    shutil.copyfile(record_of(kit, "volumes", kit.volume_id("w")), mine)
    found = kit.check()
    repair(kit)
    mine.write_bytes(text)
    assert [one for one in found if one.severity == "error"]
    assert Path(kit.store.image_path(head)).exists()


# --- what the dry run says -------------------------------------------------------------------------------------------


def test_repair_purges_nothing_that_the_dry_run_did_not_name(kit: Kit) -> None:
    two_disks(kit)
    kit.create("old", on_delete="trash", trash_retention_s=0)
    kit.write("old", 4)
    kit.delete("old")
    kit.store.mark(kit.chain("v")[0].id, records.child_marker(records.new_layer_id()))
    planned = plan(kit)
    assert [one.kind for one in planned.actions] == ["stale-marker"]
    entries = list(kit.store.trash_ids())
    done = repair(kit)
    assert [one.kind for one in done.actions] == ["stale-marker"]
    assert list(kit.store.trash_ids()) == entries


# --- what changes meanwhile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["leak", "name"])
def test_layer_that_goes_between_the_look_and_the_decision(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    two_disks(kit)
    leak(kit) if damage == "leak" else put_other_backing_name(kit)
    real = check_module.check

    def check(*arguments: Any) -> Any:
        found = real(*arguments)
        if kit.store.find_volume(kit.volume_id("v")):
            kit.delete("v")
            kit.delete_snapshot("s")
            kit.sweep_until_quiet()
        return found

    monkeypatch.setattr(check_module, "check", check)
    repair(kit)


# --- a long chain ----------------------------------------------------------------------------------------------------


def test_long_chain_of_torn_records(kit: Kit) -> None:
    kit.create("v")
    for number in range(1, 9):
        kit.write("v", number, block=number - 1)
        kit.snapshot(f"s{number}", of="v")
    for number in range(1, 9):
        kit.delete_snapshot(f"s{number}")
    chain = kit.chain("v")
    for layer in chain:
        tear(kit, "layers", layer.id)
    first = repair(kit)
    assert first.after.findings == [] or all("again" in one.reason for one in first.actions if not one.done)
    assert repair(kit).after.findings == []


# --- plan and deed ---------------------------------------------------------------------------------------------------


def test_plan_and_deed_agree_on_a_torn_orphan_beside_a_torn_snapshot(kit: Kit) -> None:
    two_disks(kit)
    garbage = kit.create("g").head
    kit.delete("g")
    tear(kit, "layers", garbage)
    for name in kit.store.markers(garbage) or []:
        kit.store.unmark(garbage, name)
    tear(kit, "snapshots", kit.snapshot_id("s"))
    would = {one.id: one.action for one in plan(kit).actions}
    did = {one.id: (one.action, one.done) for one in repair(kit).actions}
    assert {one: would[one] != "none" for one in would} == {one: did[one][1] for one in did}, (would, did)


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intent", ["snapshot", "clone"])
def test_head_of_a_volume_that_is_on_its_way_to_the_trash_is_no_frozen_layer(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, intent: str
) -> None:
    """A snapshot's intent that died early has its marker in the head; the volume's delete died after its first step."""
    kit.create("v", on_delete="trash")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.write("v", 2, block=1)
    head = kit.chain("v")[0]

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(layers, "make_overlay", die)  # after its marker, and that of the overlay, were made
        with pytest.raises(KeyboardInterrupt):
            kit.snapshot("late", of="v") if intent == "snapshot" else kit.create("late", source=kit.from_volume("v"))
    with monkeypatch.context() as patched:
        patched.setattr(Store, "move_to_trash", die)
        with pytest.raises(KeyboardInterrupt):
            kit.delete("v")
    tear(kit, "layers", head.id)
    repair(kit)
    collector.sweep(kit.store)
    kit.sweep_until_quiet()
    with suppress(DriverError):
        kit.delete_snapshot("late")
        kit.delete("late")
    for _ in range(3):
        repair(kit)
    kit.restore(kit.trashed("v"), "again")
    assert kit.holds("again", 1, 2)


# --- names that look like records ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.json", "old-{}.json", "{}.old.json"])
def test_copy_of_a_record_whose_name_ends_like_one_is_foreign(kit: Kit, name: str) -> None:
    two_disks(kit)
    path = record_of(kit, "volumes", kit.volume_id("v"))
    shutil.copyfile(path, path.with_name(name.format(kit.volume_id("v"))))
    kit.snapshot("t", of="v")
    assert kit.findings() == {"foreign-file"}


def test_copy_of_a_record_by_hand_changes_nothing(kit: Kit) -> None:
    """An old copy beside the record, of before a snapshot, counts as a volume of its own."""
    two_disks(kit)
    path = record_of(kit, "volumes", kit.volume_id("v"))
    shutil.copyfile(path, path.with_name(f"old-{kit.volume_id('v')}.json"))
    kit.snapshot("t", of="v")
    kit.write("v", 3, block=2)
    old = kit.chain("v")[1]
    before = kit.store.markers(old.id)
    repair(kit)
    assert kit.store.markers(old.id) == before


# --- the text that is replaced ---------------------------------------------------------------------------------------


def test_torn_text_that_is_decided_by_is_the_one_that_is_replaced(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the decision and the change the record was changed (an attachment) and is cut off again."""
    two_disks(kit)
    path = record_of(kit, "volumes", kit.volume_id("v"))
    kit.attach("v")
    attached = path.read_bytes()
    kit.detach("v")
    cut_behind(kit, "volumes", kit.volume_id("v"), "kubernetes")
    decide = repairing._task
    asked: list[None] = []

    def late(*arguments: Any) -> Any:
        task = decide(*arguments)
        asked.append(None)
        if len(asked) == 2:
            path.write_bytes(attached[: attached.index(b'"kubernetes"') + 5])
        return task

    with monkeypatch.context() as patched:
        patched.setattr(repairing, "_task", late)
        repair(kit)
    with suppress(Corrupt):
        assert kit.store.volume(kit.volume_id("v")).attachments
