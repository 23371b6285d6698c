"""Snapshots: create, restore, delete; and intents that an interrupted create has left, met by a changed source."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from controller_kit import SIZE_BYTES, Kit, tree
from test_volumes import FORMATTED, at_once

from csi_quobyte.errors import AlreadyExists, Busy, NotFound, Refused, Unavailable
from csi_quobyte.operations import snapshots
from csi_quobyte.pool.records import LayerState, SnapshotRecord, SnapshotState
from csi_quobyte.pool.sizes import SizeRange
from csi_quobyte.pool.steps import Observer
from csi_quobyte.pool.store import Store


def test_snapshot_keeps_what_the_volume_held(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    snapshot = kit.snapshot("s", of="v")
    kit.write("v", 2)
    assert (snapshot.state, snapshot.size_bytes, snapshot.unfinished) == (SnapshotState.READY, SIZE_BYTES, False)
    assert kit.store.layer(snapshot.layer).state is LayerState.FROZEN
    assert kit.snapshot_holds("s", 1)
    assert kit.holds("v", 2)
    assert kit.check() == []


def test_snapshot_again_gives_the_same_also_when_the_volume_is_attached_or_gone(kit: Kit) -> None:
    kit.create("v")
    first = kit.snapshot("s", of="v")
    kit.attach("v")
    assert kit.snapshot("s", of="v") == first
    kit.detach("v")
    kit.delete("v")
    assert kit.snapshot("s", of="v") == first


def test_snapshot_of_the_same_name_of_another_volume_already_exists(kit: Kit) -> None:
    kit.create("v")
    kit.create("w")
    kit.snapshot("s", of="v")
    before = tree(kit.store.root)
    with pytest.raises(AlreadyExists, match=kit.volume_id("v")):
        kit.snapshot("s", of="w")
    assert tree(kit.store.root) == before


def test_snapshot_of_an_attached_volume_is_refused_and_leaves_nothing(kit: Kit) -> None:
    kit.create("v")
    kit.attach("v")
    before = tree(kit.store.root)
    with pytest.raises(Refused, match="node-1"):
        kit.snapshot("s", of="v")
    assert tree(kit.store.root) == before


def test_snapshot_of_what_does_not_exist_is_not_found(kit: Kit) -> None:
    before = tree(kit.store.root)
    with pytest.raises(NotFound):
        kit.snapshot("s", of="v")
    assert tree(kit.store.root) == before


def test_sixteen_snapshots_of_one_name_make_one(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    results = at_once(16, lambda: kit.snapshot("s", of="v"))
    assert {type(result) for result in results} <= {SnapshotRecord, Busy}
    assert {result.uid for result in results if isinstance(result, SnapshotRecord)} == {
        kit.store.snapshot(kit.snapshot_id("s")).uid
    }
    assert len(list(kit.store.layer_ids())) == 2
    assert kit.check() == []


def test_snapshots_without_a_write_between_share_a_layer(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    layers = {kit.snapshot(f"s{number}", of="v").layer for number in range(4)}
    assert len(layers) == 1
    assert len(kit.chain("v")) == 2
    kit.write("v", 2)
    assert kit.snapshot("s4", of="v").layer not in layers
    assert len(kit.chain("v")) == 3


def test_restore_of_a_clone_of_a_restore_holds_what_each_wrote(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1, block=0)
    kit.snapshot("s1", of="v")
    kit.create("r1", source=kit.from_snapshot("s1"))
    kit.write("r1", 2, block=1)
    kit.create("c", source=kit.from_volume("r1"))
    kit.write("c", 3, block=2)
    kit.snapshot("s2", of="c")
    kit.write("c", 9, block=0)
    kit.create("r2", source=kit.from_snapshot("s2"), size=SizeRange(2 * SIZE_BYTES))
    assert kit.holds("r2", 1, 2, 3, 0)
    assert kit.holds("v", 1, 0, 0)
    assert kit.check() == []
    kit.consistency()


def test_snapshot_name_used_again_shows_the_new_moment_and_the_restore_keeps_the_old(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.create("r", source=kit.from_snapshot("s"))
    kit.delete_snapshot("s")
    kit.write("v", 2)
    kit.snapshot("s", of="v")
    kit.write("v", 3)
    kit.sweep_until_quiet()
    assert kit.holds("r", 1)
    assert kit.snapshot_holds("s", 2)
    assert kit.holds("v", 3)
    assert kit.check() == []


def test_delete_again_and_of_what_never_was_succeeds(kit: Kit) -> None:
    new = tree(kit.store.root)
    kit.create("v")
    kit.snapshot("s", of="v")
    kit.delete_snapshot("s")
    kit.delete_snapshot("s")
    kit.delete_snapshot("never")
    kit.delete("v")
    kit.sweep_until_quiet()
    assert tree(kit.store.root) == new


@pytest.mark.parametrize(("state", "kind"), [(SnapshotState.CREATING, Unavailable), (SnapshotState.DELETING, NotFound)])
def test_restore_of_an_unfinished_snapshot_is_not_made(kit: Kit, state: SnapshotState, kind: type[Exception]) -> None:
    kit.create("v")
    snapshot = kit.snapshot("s", of="v")
    kit.store.swap(snapshot, replace(snapshot, state=state))
    before = tree(kit.store.root)
    with pytest.raises(kind):
        kit.create("r", source=kit.from_snapshot("s"))
    assert tree(kit.store.root) == before


def test_find_ready_gives_no_snapshot_that_is_being_deleted(kit: Kit) -> None:
    kit.create("v")
    snapshot = kit.snapshot("s", of="v")
    assert snapshots.find_ready(kit.store, snapshot.id) == snapshot
    kit.store.swap(snapshot, replace(snapshot, state=SnapshotState.DELETING))
    with pytest.raises(NotFound):
        snapshots.find_ready(kit.store, snapshot.id)


def test_list_filters_by_volume_and_pages(kit: Kit) -> None:
    for name in ("v", "w"):
        kit.create(name)
        kit.write(name, 1)
    made = sorted(kit.snapshot(f"s{number}", of="vw"[number % 2]).id for number in range(6))
    everything = snapshots.list_page(kit.store, after="", at_most=100)
    assert [snapshot.id for snapshot in everything] == made
    of_v = snapshots.list_page(kit.store, after="", at_most=100, source_volume=kit.volume_id("v"))
    assert [snapshot.id for snapshot in of_v] == sorted(kit.snapshot_id(f"s{number}") for number in (0, 2, 4))
    page = snapshots.list_page(kit.store, after=made[1], at_most=2)
    assert [snapshot.id for snapshot in page] == made[2:4]


# --- an intent that was interrupted, and a source that changed meanwhile -----------------------------------------


class Interrupted(BaseException):
    """Stands for the death of the process: nothing in the product catches it."""


def interrupted(kit: Kit, work: Callable[[Kit], object], *, before: Callable[[str, str], bool]) -> None:
    """Run `work` on the kit's pool and let it die before the first step for which `before` holds."""

    def observe(step: str, path: str) -> None:
        if before(step, path):
            raise Interrupted

    observer: Observer = observe
    doomed = Kit(Store(kit.store.root, observer=observer))
    with pytest.raises(Interrupted):
        work(doomed)
    doomed.store.close()


def before_new_head(step: str, path: str) -> bool:
    """The step that makes the new overlay the head: everything of the freeze but its commit is there."""
    return step == "link" and "/volumes/" in path and path.endswith(".g2")


def before_frozen(step: str, path: str) -> bool:
    """The step after the volume's record got its new head: the layer below is not yet called frozen."""
    return step == "link" and "/layers/" in path and path.endswith(".json.g2")


def before_layer_record(step: str, path: str) -> bool:
    """The overlay's image is there, its record is not."""
    return step == "link" and "/layers/" in path and path.endswith(".json")


STALE_POINTS = pytest.mark.parametrize("before", [before_new_head, before_layer_record])


@STALE_POINTS
def test_snapshot_goes_on_after_the_volume_was_grown(
    kit: Kit, impatient: None, before: Callable[[str, str], bool]
) -> None:
    kit.create("v")
    kit.write("v", 1)
    interrupted(kit, lambda doomed: doomed.snapshot("s", of="v"), before=before)
    kit.expand("v", 2 * SIZE_BYTES)
    kit.grow_image("v")
    kit.store.put_content(kit.store.volume(kit.volume_id("v")), FORMATTED)
    kit.write("v", 2, block=SIZE_BYTES // (64 * 1024))
    snapshot = kit.snapshot("s", of="v")
    assert (snapshot.size_bytes, snapshot.content) == (2 * SIZE_BYTES, FORMATTED)
    kit.create("r", source=kit.from_snapshot("s"))
    for name in ("v", "r"):
        assert kit.holds(name, 1, *[0] * 63, 2)
    kit.consistency()
    kit.sweep_until_quiet()
    assert kit.check() == []


@STALE_POINTS
@pytest.mark.parametrize("clone_bytes", [0, 3 * SIZE_BYTES])
def test_clone_goes_on_after_its_source_was_grown(
    kit: Kit, impatient: None, before: Callable[[str, str], bool], clone_bytes: int
) -> None:
    kit.create("v")
    kit.write("v", 1)
    source = kit.from_volume("v")

    def clone(by: Kit) -> object:
        return by.create("c", source=source, size=SizeRange(clone_bytes))

    interrupted(kit, clone, before=before)
    kit.expand("v", 2 * SIZE_BYTES)
    kit.grow_image("v")
    kit.store.put_content(kit.store.volume(kit.volume_id("v")), FORMATTED)
    kit.write("v", 2, block=SIZE_BYTES // (64 * 1024))
    clone(kit)
    made = kit.store.volume(kit.volume_id("c"))
    assert (made.size_bytes, kit.store.content(made)) == (max(clone_bytes, 2 * SIZE_BYTES), FORMATTED)
    for name in ("v", "c"):
        assert kit.holds(name, 1, *[0] * 63, 2)
    kit.consistency()
    kit.sweep_until_quiet()
    assert kit.check() == []


def test_snapshot_goes_on_after_another_one_was_taken(kit: Kit, impatient: None) -> None:
    kit.create("v")
    kit.write("v", 1)
    interrupted(kit, lambda doomed: doomed.snapshot("s", of="v"), before=before_frozen)
    kit.write("v", 2)
    kit.snapshot("other", of="v")
    kit.write("v", 3)
    kit.snapshot("s", of="v")
    assert kit.snapshot_holds("s", 1)
    assert kit.snapshot_holds("other", 2)
    assert kit.holds("v", 3)
    kit.consistency()
    assert kit.check() == []


def test_interrupted_snapshot_of_a_volume_that_was_then_attached_is_refused_and_undone(
    kit: Kit, impatient: None
) -> None:
    kit.create("v")
    kit.write("v", 1)
    interrupted(kit, lambda doomed: doomed.snapshot("s", of="v"), before=before_new_head)
    kit.attach("v")
    with pytest.raises(Refused):
        kit.snapshot("s", of="v")
    kit.sweep_until_quiet()
    assert kit.store.find_snapshot(kit.snapshot_id("s")) is None
    assert len(list(kit.store.layer_ids())) == 1
    kit.detach("v")
    assert kit.holds("v", 1)
    assert kit.check() == []
