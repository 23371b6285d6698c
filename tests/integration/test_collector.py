"""The collector: what it removes, what it must keep, and what a damaged record may and may not stop."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from controller_kit import Kit, tree

from csi_quobyte.engine import collector, index
from csi_quobyte.errors import Busy, Corrupt
from csi_quobyte.pool import records
from csi_quobyte.pool.records import VolumeState
from csi_quobyte.pool.store import Store


def record_of(kit: Kit, folder: str, record_id: str) -> Path:
    return Path(kit.store.root, folder, record_id.rpartition("-")[2][:2], f"{record_id}.json")


def tear(kit: Kit, folder: str, record_id: str) -> None:
    path = record_of(kit, folder, record_id)
    path.write_bytes(path.read_bytes()[:50])


def add_garbage(kit: Kit) -> str:
    """A layer that nothing refers to; gives its id."""
    layer_id = kit.create("garbage").head
    kit.delete("garbage")
    return layer_id


def test_quiet_pool_is_left_as_it_is(kit: Kit) -> None:
    kit.create("v")
    kit.snapshot("s", of="v")
    kit.sweep_until_quiet()
    before = tree(kit.store.root)
    assert not collector.sweep(kit.store)
    assert tree(kit.store.root) == before


def test_S22_everything_deleted_leaves_a_new_pool(kit: Kit) -> None:
    new = tree(kit.store.root)
    kit.create("v")
    for number in range(4):
        kit.write("v", number + 1)
        kit.snapshot(f"s{number}", of="v")
        kit.create(f"r{number}", source=kit.from_snapshot(f"s{number}"))
        kit.create(f"c{number}", source=kit.from_volume(f"r{number}"))
    deletes = [f"v:{name}" for name in ("v", *(f"{kind}{n}" for kind in "rc" for n in range(4)))]
    deletes += [f"s:s{number}" for number in range(4)]
    random.Random(5).shuffle(deletes)
    for name in deletes:
        (kit.delete if name.startswith("v:") else kit.delete_snapshot)(name[2:])
    kit.sweep_until_quiet()
    assert tree(kit.store.root) == new


def test_reserve_is_filled_up(kit: Kit) -> None:
    collector.sweep(kit.store)
    assert [path.stat().st_size for path in Path(kit.store.root, "reserve").iterdir()] == [64 * 1024] * 8


def test_leftovers_of_every_kind_are_removed(kit: Kit) -> None:
    new = tree(kit.store.root)
    root, layer_id = Path(kit.store.root), "ab" + records.new_layer_id()[2:]
    (root / "layers" / "ab" / f"{layer_id}.qcow2").touch()
    (root / "layers" / "ab" / f"{layer_id}.refs").mkdir()
    (root / "layers" / "ab" / f"{layer_id}.refs" / f"c-{records.new_layer_id()}").touch()
    (root / "volumes" / "00" / f"{kit.store.prefix}-vol-{'0' * 32}.content-01234567").touch()
    left = Store(kit.store.root)
    (root / "tmp" / f"{left.token}.0123456789ab").touch()
    left.close()
    assert kit.findings() == {"orphan-file", "stale-marker", "stale-temporary"}
    kit.sweep_until_quiet()
    assert tree(kit.store.root) == new


def test_foreign_files_are_left_alone(kit: Kit) -> None:
    root = Path(kit.store.root)
    foreign = [root / "layers" / "00" / "notes.txt", root / "volumes" / "ff" / "x.bak", root / "snapshots" / "11" / "y"]
    for path in foreign:
        path.write_text("mine")
    kit.sweep_until_quiet()
    assert [path.read_text() for path in foreign] == ["mine"] * 3
    assert kit.findings() == {"foreign-file"}


def test_layer_whose_marker_was_lost_is_kept(kit: Kit) -> None:
    volume = kit.create("v")
    kit.store.unmark(volume.head, records.volume_marker(volume))
    collector.sweep(kit.store)
    assert kit.holds("v", 0)
    assert kit.findings() == {"missing-marker"}


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_layer_whose_record_was_lost_keeps_what_it_lies_on(kit: Kit, position: int) -> None:
    """Also one in the middle, which only its child names: its parent's marker of it is not left over."""
    kit.create("v")
    for number in (1, 2, 3):
        kit.write("v", number, block=number - 1)
        kit.snapshot(f"s{number}", of="v")
    kit.write("v", 4, block=3)
    for number in (1, 2, 3):
        kit.delete_snapshot(f"s{number}")
    chain = kit.chain("v")
    path = record_of(kit, "layers", chain[position].id)
    text = path.read_bytes()
    path.unlink()
    for _ in range(3):
        collector.sweep(kit.store)
    assert "missing-layer" in kit.findings()
    path.write_bytes(text)
    assert kit.chain("v") == chain
    assert kit.holds("v", 1, 2, 3, 4)
    assert kit.findings() == set()


# --- damaged records -------------------------------------------------------------------------------------------


def test_torn_volume_keeps_its_layers_until_it_is_deleted(kit: Kit) -> None:
    new = tree(kit.store.root)
    volume, other = kit.create("v"), kit.create("other")
    tear(kit, "volumes", volume.id)
    collector.sweep(kit.store)
    assert kit.store.layer(volume.head)
    for work in (lambda: kit.create("v"), lambda: kit.attach("v"), lambda: kit.snapshot("s", of="v")):
        with pytest.raises(Corrupt, match=str(record_of(kit, "volumes", volume.id))):
            work()
    assert kit.create("other") == other
    kit.snapshot("s", of="other")
    kit.delete("v")
    kit.delete_everything()
    assert tree(kit.store.root) == new


def test_torn_snapshot_keeps_its_layer_until_it_is_deleted(kit: Kit) -> None:
    new = tree(kit.store.root)
    kit.create("v")
    kit.write("v", 1)
    snapshot = kit.snapshot("s", of="v")
    kit.create("r", source=kit.from_snapshot("s"))
    tear(kit, "snapshots", snapshot.id)
    kit.delete("v")
    kit.delete("r")
    collector.sweep(kit.store)
    assert kit.store.layer(snapshot.layer)
    with pytest.raises(Corrupt, match=str(record_of(kit, "snapshots", snapshot.id))):
        kit.create("r", source=kit.from_snapshot("s"))
    kit.delete_snapshot("s")
    kit.sweep_until_quiet()
    assert tree(kit.store.root) == new


@pytest.mark.parametrize("which", ["head", "base"])
def test_torn_layer_is_collected_once_its_volume_is_deleted(kit: Kit, which: str) -> None:
    new = tree(kit.store.root)
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.create("other")
    chain = kit.chain("v")
    torn = chain[0] if which == "head" else chain[-1]
    tear(kit, "layers", torn.id)
    with pytest.raises(Corrupt, match=torn.id):
        kit.attach("v")
    collector.sweep(kit.store)
    assert kit.store.image_bytes(torn) is not None
    kit.attach("other")
    kit.delete("v")
    kit.delete_snapshot("s")
    kit.delete_everything()
    assert tree(kit.store.root) == new


def test_nothing_without_an_owner_is_removed_while_a_volume_cannot_be_read(kit: Kit) -> None:
    torn = kit.create("torn")
    garbage = add_garbage(kit)
    orphan = Path(kit.store.root, "layers", "ab", "ab" + records.new_layer_id()[2:] + ".qcow2")
    orphan.touch()
    tear(kit, "volumes", torn.id)
    before = tree(kit.store.root)
    collector.sweep(kit.store)
    assert tree(kit.store.root) == before
    kit.delete("torn")
    kit.sweep_until_quiet()
    assert kit.store.find_layer(garbage) is None
    assert not orphan.exists()


def test_half_done_delete_is_finished_although_another_record_cannot_be_read(kit: Kit) -> None:
    torn, half = kit.create("torn"), kit.create("half")
    tear(kit, "volumes", torn.id)
    kit.store.swap(half, replace(half, state=VolumeState.DELETING))
    collector.sweep(kit.store)
    assert kit.store.find_volume(half.id) is None


def test_damaged_object_does_not_stop_the_collector_from_its_other_work(kit: Kit) -> None:
    """An unfinished clone of a torn volume cannot be judged; what else there is to do is done all the same."""
    source = kit.create("source")
    clone = kit.create("clone")
    unfinished = replace(
        clone,
        state=VolumeState.DELETING,
        unfinished=True,
        source=kit.from_volume("source"),
        source_next=records.new_layer_id(),
        parent=source.head,
    )
    kit.store.swap(clone, unfinished)
    half = kit.create("half")
    kit.store.swap(half, replace(half, state=VolumeState.DELETING))
    tear(kit, "volumes", source.id)
    collector.sweep(kit.store)
    assert kit.store.find_volume(half.id) is None
    assert kit.store.find_volume(clone.id) is None


# --- what the collector keeps in memory of a large pool --------------------------------------------------------


def test_a_record_of_a_brief_index_cannot_be_written_back(kit: Kit) -> None:
    volume = kit.create("v")
    kit.snapshot("s", of="v")
    found = index.read(kit.store, brief=True)
    short = found.volumes[volume.id]
    with pytest.raises(Busy):
        kit.store.swap(short, replace(short, size_bytes=1))
    layer = found.layers[short.head]
    with pytest.raises(Busy):
        kit.store.remove(layer)
    assert kit.store.volume(volume.id).name == "v"
    assert kit.check() == []


def test_a_brief_index_and_the_names_alone_say_what_the_whole_one_says(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.create("restored", source=kit.from_snapshot("s"))
    kit.write("v", 2)
    kit.create("cloned", source=kit.from_volume("v"))
    snapshot = kit.store.snapshot(kit.snapshot_id("s"))
    kit.store.swap(snapshot, replace(snapshot, cache=records.new_layer_id()))
    whole, brief, names = index.read(kit.store), index.read(kit.store, brief=True), index.read_names(kit.store)
    assert whole.layers
    for judged in ("named_layers", "held_layers", "intended_layers", "intended_heads", "merge_markers", "announced"):
        assert getattr(brief, judged) == getattr(whole, judged), judged
    assert names.named == set(whole.named_layers)
    assert names.held == set(whole.held_layers)
    assert brief.refs == whole.refs
    assert brief.strays == whole.strays
