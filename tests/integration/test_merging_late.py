"""Merges and steps that come late: of a process that was stopped for longer than its lease, or of an old intent.

As in test_merging_interleavings, two processes without common locks are two stores of one directory.
"""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from controller_kit import BLOCK_BYTES, SIZE_BYTES, Kit, qemu_io, tools
from gates import DEADLINE_S, DiedError, Gate, background, dies_before
from merging_kit import begin, is_clean, no_lock, other, three_layers

from csi_quobyte.engine import collector, index, layers, merger, merging
from csi_quobyte.engine.merging import Plan
from csi_quobyte.errors import Busy
from csi_quobyte.host import jobs
from csi_quobyte.pool.records import LayerState, Merge, SnapshotState, VolumeRecord, child_marker
from csi_quobyte.pool.store import Store


def delete_and_collect(kit: Kit, snapshot: str) -> None:
    """Delete a snapshot, and do what the collector does as soon as it is told."""
    kit.delete_snapshot(snapshot)
    layers.drop_upwards(kit.store, kit.released[-1])


def above_a_snapshot(kit: Kit) -> Plan:
    """A volume whose middle layer calls for a merge up, over a base that a snapshot keeps."""
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("keep", of="v")
    kit.write("v", 2, block=1)
    kit.snapshot("middle", of="v")
    kit.write("v", 3, block=2)
    kit.delete_snapshot("middle")
    (plan,) = kit.plans()
    assert plan.kind == "up"
    assert plan.parent
    return plan


def half_merged_down(kit: Kit, plan: Plan) -> None:
    """Leave a merge down as a process does that is killed when one block of two was moved."""
    noted = begin(kit, plan)
    assert noted.kind == "down"
    assert noted.parent
    path = kit.store.image_path(kit.store.layer(noted.parent))
    qemu_io(path, f"write -P 2 0 {BLOCK_BYTES}", read_only=False)
    kit.sweep_until_quiet()
    assert kit.store.layer(plan.layer).merge is None


@pytest.mark.parametrize("wanted", ["snapshot", "clone"])
@pytest.mark.parametrize("asks", ["anew", "late"])
def test_head_that_an_old_intent_names_and_a_merge_has_changed_since(
    kit: Kit, wanted: str, asks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The intent was written when the layer was a head. Frozen by somebody else, it took half of the next layer."""

    def ask(of: Kit) -> None:
        if wanted == "snapshot":
            of.snapshot("late", of="v")
        else:
            of.create("late", source=of.from_volume("v"))

    kit.create("v")
    kit.write("v", 1)
    kit.write("v", 1, block=1)
    base = kit.chain("v")[0].id
    gate = Gate("touch", f"{base}.refs/")
    if asks == "anew":
        with pytest.raises(DiedError):
            ask(other(kit, dies_before("touch", f"{base}.refs/")))
    else:
        monkeypatch.setattr(Store, "lock", no_lock)
        late = background(lambda: ask(other(kit, gate)))
        gate.wait(late)
    kit.snapshot("second", of="v")
    kit.write("v", 2)
    kit.write("v", 2, block=1)
    kit.snapshot("third", of="v")
    kit.write("v", 3, block=2)
    kit.delete_snapshot("second")
    kit.delete_snapshot("third")
    plan = merging.plan_for(kit.store, kit.chain("v")[1].id)
    assert plan
    assert (plan.kind, plan.parent) == ("down", base)
    half_merged_down(kit, plan)
    if asks == "anew":
        ask(kit)
    else:
        gate.open()
        with pytest.raises(Busy, match="has changed"):
            late.result(DEADLINE_S)
        ask(kit)
    shows = kit.snapshot_holds if wanted == "snapshot" else kit.holds
    assert shows("late", 2, 2, 3)
    assert kit.holds("v", 2, 2, 3)
    assert is_clean(kit)


@pytest.mark.parametrize("what", ["undo", "tidy"])
def test_marker_is_removed_by_who_has_lost_the_lease_when_it_is_needed_again(kit: Kit, what: str) -> None:
    plan = above_a_snapshot(kit)
    assert plan.parent
    marker = child_marker(plan.child)
    gate = Gate("unlink", f"{plan.parent}.refs/{marker}")
    slow = other(kit, gate)
    if what == "undo":
        begin(kit, plan)
    kit.store.mark(plan.parent, marker)
    ending = background(slow.end_merges)
    gate.wait(ending)
    kit.sweep_until_quiet()
    assert kit.merge(plan)
    assert marker in (kit.store.markers(plan.parent) or [])
    gate.open()
    ending.result(DEADLINE_S)
    assert marker in (kit.store.markers(plan.parent) or [])
    delete_and_collect(kit, "keep")
    assert kit.holds("v", 1, 2, 3)
    assert is_clean(kit)


def test_note_that_comes_late_on_the_child_of_a_merge(kit: Kit) -> None:
    down = three_layers(kit)
    up = merging.plan_for(kit.store, down.parent or "")
    assert up
    assert (up.kind, up.child) == ("up", down.layer)
    noted = False

    def late_note() -> bool:
        nonlocal noted
        if not noted:
            noted = True
            begin(other(kit), down)
        return True

    with pytest.raises(Busy, match="being merged itself"):
        kit.merge(up, may_go_on=late_note)
    kit.sweep_until_quiet()
    assert [layer.state for layer in kit.chain("v")[1:]] == [LayerState.FROZEN] * 2
    kit.merge_all()
    assert len(kit.chain("v")) == 1
    assert kit.holds("v", 1, 2, 3)


def test_note_that_another_process_has_taken_away_stops_the_merge(kit: Kit) -> None:
    """It may have taken the lease early: where locks were lost with the session of a mount, say."""
    plan = above_a_snapshot(kit)
    noted = begin(kit, plan)
    layer = kit.store.layer(plan.layer)
    assert merging._is_free(kit.store, layer, noted)
    assert other(kit).end_merges()
    assert not merging._is_free(kit.store, layer, noted)


def test_nothing_is_ended_without_the_lease(kit: Kit) -> None:
    plan = above_a_snapshot(kit)
    begin(kit, plan)
    work = merger.work_in(index.read(kit.store), kit.store)
    for asked in range(2):  # lost before the first thing, and in the middle of it
        answers = iter([True] * asked)
        rest = merger.end_begun(kit.store, tools(), work, is_held=lambda answers=answers: next(answers, False))
        assert rest.begun == work.begun
        assert kit.store.layer(plan.layer).merge is not None
    assert merger.end_begun(kit.store, tools(), work, is_held=lambda: True) == merger.Work()


def test_pool_without_space_is_not_filled_by_merging(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = above_a_snapshot(kit)
    assert merging.has_space(kit.store, plan)
    monkeypatch.setattr(Store, "space", lambda _: (1 << 40, plan.bytes + (32 << 20)))
    assert not merging.has_space(kit.store, plan)
    assert list(collector.collect(kit.store, tools(), merges=True)) == []
    assert len(kit.chain("v")) == 3


def test_merge_is_ended_while_a_record_of_something_else_cannot_be_read(kit: Kit) -> None:
    plan = above_a_snapshot(kit)
    begin(kit, plan)
    kit.create("other")
    kit.snapshot("damaged", of="other")
    path = Path(kit.store._paths.record("snapshots", kit.snapshot_id("damaged")))
    path.write_bytes(path.read_bytes()[:20])
    assert kit.end_merges()
    assert kit.store.layer(plan.layer).merge is None


def test_flattening_over_a_freeze_that_a_crash_has_left_waits_for_its_end(kit: Kit) -> None:
    """The freeze is finished by what lies below the volume's head, which a flattening changes."""
    kit.create("v")
    for number in range(merging.SOFT_DEPTH):
        kit.write("v", number + 1, block=number)
        kit.snapshot(f"s{number}", of="v")
    kit.write("v", 99)
    head = kit.chain("v")[0].id
    with pytest.raises(DiedError):
        other(kit, dies_before("link", f"{head}.json.g")).snapshot("late", of="v")
    chain = kit.chain("v")
    assert chain[1].state is LayerState.HEAD
    assert merging.plan_flattening(kit.store, kit.store.volume(kit.volume_id("v"))) is None
    with pytest.raises(Busy, match="freeze"):
        kit.merge(Plan("flatten", chain[0].id, chain[0].id, chain[5].id, 0))
    kit.sweep_until_quiet()
    assert kit.snapshot("late", of="v").state is SnapshotState.READY
    assert kit.merge_all() == ["flatten"]
    assert kit.snapshot_holds("late", 99, 2, 3)
    assert kit.holds("v", 99, 2, 3)
    assert is_clean(kit)


def test_flattening_that_is_given_up_leaves_a_frozen_layer_frozen(kit: Kit) -> None:
    """A freeze was finished beside the note of a flattening that came late; then both processes died."""
    kit.create("v")
    kit.write("v", 1)
    head = kit.chain("v")[0]
    with pytest.raises(DiedError):
        other(kit, dies_before("link", f"{head.id}.json.g")).snapshot("s", of="v")
    noted = Merge(kind="flatten", child=head.id, parent=None)
    kit.store.swap(kit.store.layer(head.id), replace(kit.store.layer(head.id), merge=noted))
    layers.finish_freeze(kit.store, kit.store.volume(kit.volume_id("v")))
    assert kit.end_merges()
    layer = kit.store.layer(head.id)
    assert (layer.state, layer.merge) == (LayerState.FROZEN, None)
    kit.snapshot("s", of="v")
    assert kit.holds("v", 1)
    assert kit.snapshot_holds("s", 1)
    assert is_clean(kit)


def test_attachment_that_a_cache_hides_for_a_second_is_seen_before_data_is_moved(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node stages by records that do not show the note yet, and the merger looks at one without the attachment."""
    plan = above_a_snapshot(kit)
    moved = []
    monkeypatch.setattr(merging, "SETTLE_S", 0.6)
    monkeypatch.setattr(merging.jobs, "stream_up", lambda *_, **__: moved.append(1))
    plain, volume_id, since = Store.find_volume, kit.volume_id("v"), time.monotonic()
    old = kit.store.volume(volume_id)
    kit.attach("v")

    def cached(store: Store, record_id: str) -> VolumeRecord | None:
        is_old = record_id == volume_id and time.monotonic() - since < 0.3
        return old if is_old else plain(store, record_id)

    monkeypatch.setattr(Store, "find_volume", cached)
    since = time.monotonic()
    with pytest.raises(jobs.Stopped):
        kit.merge(plan)
    assert not moved
    assert kit.store.layer(plan.layer).merge is None


def test_old_intent_for_a_snapshot_of_a_name_that_is_another_one_s_now(kit: Kit) -> None:
    """Merges may have put the new one on the same layer: it is as large, and holds what the new one says."""
    kit.create("v")
    kit.write("v", 1)
    base = kit.snapshot("s", of="v").layer
    with pytest.raises(DiedError):
        other(kit, dies_before("touch", f"{base}.refs/c-")).create("late", source=kit.from_snapshot("s"))
    kit.delete_snapshot("s")
    kit.expand("v", 2 * SIZE_BYTES)
    kit.grow_image("v")
    assert kit.snapshot("s", of="v").layer == base
    assert kit.create("late", source=kit.from_snapshot("s")).size_bytes == 2 * SIZE_BYTES
    kit.sweep_until_quiet()
    assert kit.holds("late", 1)
    assert is_clean(kit)
