"""A marker that was lost to damage before the collector's last look at everything: nobody may go by its absence.

Axes: what the marker was of (a snapshot, an image, a child, a copy under way) × who could take the layer for free (a
merge down or up, a delete, an export, `image rm`, `trash purge`, a controller whose first look has failed).
"""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from controller_kit import SIZE_BYTES, CopiesNever, Kit, tools
from gates import DiedError, dies_before
from test_repair import quick, repair, two_disks  # noqa: F401 - a fixture

from csi_quobyte.config import PoolSpec
from csi_quobyte.engine import collector
from csi_quobyte.engine.collector import Collector
from csi_quobyte.errors import Busy, Corrupt
from csi_quobyte.operations import exporting
from csi_quobyte.operations.exporting import ExportRequest
from csi_quobyte.pool.pools import Pools
from csi_quobyte.pool.records import ImageRecord, child_marker, image_marker, snapshot_marker
from csi_quobyte.pool.store import Store

BLOCK_BYTES = 64 * 1024


def controller_of(kit: Kit) -> Collector:
    """A collector whose threads are not started: the test does what they would."""
    pools = Pools([PoolSpec("main", kit.store.root)], require_mount="any", timeout_s=20.0)
    return Collector(pools.all[0], tools())


def do_released(kit: Kit, controller: Collector) -> None:
    """What the controller's threads do at once, and seconds later, about layers that have lost a reference."""
    for layer_id in kit.released:
        controller._work(layer_id)
    for layer_id in list(controller._merger._queued):
        controller._merger._do(kit.store, layer_id)
    controller._merger._lease.release(kit.store)


def golden_image(kit: Kit, tmp_path: Path) -> ImageRecord:
    path = tmp_path / "image.raw"
    path.write_bytes(bytes([9]) * BLOCK_BYTES + bytes(SIZE_BYTES - BLOCK_BYTES))
    return kit.import_image("gold", path, "raw")


# --- merges ----------------------------------------------------------------------------------------------------


def test_merge_does_not_write_into_the_layer_of_a_snapshot(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    first = kit.snapshot("a", of="v")
    kit.write("v", 2)
    kit.snapshot("b", of="v")
    kit.write("v", 3, block=1)
    kit.store.unmark(first.layer, snapshot_marker(first))
    kit.delete_snapshot("b")
    list(collector.collect(kit.store, tools(), merges=True))
    assert kit.snapshot_holds("a", 1)
    assert kit.holds("v", 2, 3)


def test_merge_does_not_write_into_the_layer_of_a_golden_image(kit: Kit, tmp_path: Path) -> None:
    """Each later volume made from it would have one tenant's data."""
    image = golden_image(kit, tmp_path)
    kit.create("v", source_image="gold", filesystem="", access_type="block")
    kit.write("v", 7)
    kit.snapshot("s", of="v")
    kit.write("v", 8, block=1)
    kit.store.unmark(image.layer, image_marker(image))
    kit.delete_snapshot("s")
    list(collector.collect(kit.store, tools(), merges=True))
    assert kit.layer_holds(image.layer, 9)
    assert kit.holds("v", 7, 8)


@pytest.mark.parametrize("has_looked", [True, False])
def test_controller_neither_drops_nor_merges_a_layer_that_a_snapshot_needs(kit: Kit, has_looked: bool) -> None:
    """Of two snapshots on one layer the one is deleted whose marker is there."""
    kit.create("v")
    kit.write("v", 1)
    first, second = kit.snapshot("a", of="v"), kit.snapshot("b", of="v")
    assert first.layer == second.layer
    kit.write("v", 2)
    kit.store.unmark(first.layer, snapshot_marker(first))
    controller = controller_of(kit)
    if has_looked:
        controller._merger._do(kit.store, controller._sweep_until_quiet(kit.store))
    kit.delete_snapshot("b")
    do_released(kit, controller)
    assert kit.snapshot_holds("a", 1)


def test_controller_whose_first_look_has_failed_drops_nothing(kit: Kit) -> None:
    """Another process was collecting in this pool at that moment."""
    two_disks(kit)
    head, base = kit.chain("v")
    kit.store.unmark(base.id, child_marker(head.id))
    controller, other = controller_of(kit), Store(kit.store.root)
    with other.lock("collector"):
        assert controller._work(None) is False
    kit.delete_snapshot("s")
    do_released(kit, controller)
    assert kit.holds("v", 1, 2)
    other.close()


def test_source_of_a_copy_under_way_stays(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    snapshot = kit.snapshot("s", of="v")
    kit.delete("v")
    kit.sweep_until_quiet()
    waiting = Kit(kit.store, copies=CopiesNever())
    pinned = waiting.create("copy", source=kit.from_snapshot("s"), clone_mode="copy")
    kit.store.unmark(snapshot.layer, child_marker(pinned.head))
    assert kit.findings() == {"unfinished", "missing-marker"}
    controller = controller_of(kit)
    controller._sweep_until_quiet(kit.store)
    waiting.delete_snapshot("s")
    do_released(waiting, controller)
    kit.create("copy", source=kit.from_snapshot("s"), clone_mode="copy")
    assert kit.holds("copy", 1)


@pytest.mark.usefixtures("quick")
def test_marker_of_a_copy_under_way_is_made_again(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    snapshot = kit.snapshot("s", of="v")
    pinned = Kit(kit.store, copies=CopiesNever()).create("copy", source=kit.from_snapshot("s"), clone_mode="copy")
    kit.store.unmark(snapshot.layer, child_marker(pinned.head))
    done = {action.action for action in repair(kit).actions if action.done}
    assert done == {"make-marker"}
    assert child_marker(pinned.head) in (kit.store.markers(snapshot.layer) or [])


# --- commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["snapshot", "volume"])
def test_export_does_not_drop_what_it_reads(kit: Kit, tmp_path: Path, what: str) -> None:
    kit.create("v")
    kit.write("v", 1)
    snapshot = kit.snapshot("s", of="v")
    if what == "snapshot":
        kit.delete("v")
        kit.sweep_until_quiet()
        kit.store.unmark(snapshot.layer, snapshot_marker(snapshot))
    else:
        head, base = kit.chain("v")
        kit.delete_snapshot("s")
        kit.store.unmark(base.id, child_marker(head.id))
    wanted = kit.snapshot_id("s") if what == "snapshot" else ""
    request = ExportRequest(kit.volume_id("v"), str(tmp_path / "file"), "qcow2", snapshot=wanted)
    exporting.export(kit.store, tools(), request, lambda _: "go on")
    assert kit.snapshot_holds("s", 1) if what == "snapshot" else kit.holds("v", 1)


def test_removal_of_an_image_does_not_drop_what_volumes_lie_on(kit: Kit, tmp_path: Path) -> None:
    golden_image(kit, tmp_path)
    kit.create("v", source_image="gold", filesystem="", access_type="block")
    head, base = kit.chain("v")
    kit.store.unmark(base.id, child_marker(head.id))
    kit.remove_image("gold")
    kit.sweep_until_quiet()
    assert kit.holds("v", 9)


def test_purge_does_not_drop_what_volumes_lie_on(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v", on_delete="retain")
    head, base = kit.chain("v")
    kit.delete_snapshot("s")
    kit.store.unmark(base.id, child_marker(head.id))
    kit.purge(kit.trashed("s"))
    kit.sweep_until_quiet()
    assert kit.holds("v", 1)


def test_entry_of_the_trash_whose_refs_were_lost_in_a_restore_can_be_purged(kit: Kit) -> None:
    kit.create("v", on_delete="retain")
    kit.write("v", 1)
    kit.delete("v")
    entry = kit.trashed("v")
    with pytest.raises(DiedError):
        Kit(Store(kit.store.root, observer=dies_before("touch", "/v-"))).restore(entry)
    found = kit.store.find_trashed(entry)
    assert found
    assert found.kind == "volume"
    shutil.rmtree(Path(kit.store.image_path(kit.store.layer(found.head))).with_suffix(".refs"))
    with pytest.raises(Corrupt):
        kit.restore(entry)
    with suppress(Busy):
        kit.purge(entry)
    assert kit.store.find_trashed(entry) is None
    kit.sweep_until_quiet()
    assert kit.findings() == set()
