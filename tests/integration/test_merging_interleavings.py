"""Merges that meet somebody else: an intent that was never finished, another holder of the lease, a lost node.

Two processes without common locks are two stores of one directory here; each has read what it has read. Whoever is
stopped is stopped before a durable step, and the other one does all that it may do meanwhile.
"""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import pytest
from controller_kit import BLOCK_BYTES, QEMU_DIR, Kit, tools
from gates import DEADLINE_S, DiedError, Gate, background, dies_before
from merging_kit import begin, is_clean, no_lock, other, three_layers, two_layers

from csi_quobyte.engine import merger, merging
from csi_quobyte.engine.lease import LEASE_S, SAFE_S, Lease
from csi_quobyte.engine.merging import Plan
from csi_quobyte.errors import Busy, Unavailable
from csi_quobyte.host.jobs import Stopped
from csi_quobyte.pool import records
from csi_quobyte.pool.records import LayerState, SnapshotState
from csi_quobyte.pool.store import Store

# --- an intent for the layer below an untouched head, which was never finished ----------------------------------


@pytest.mark.parametrize("wanted", ["snapshot", "clone"])
@pytest.mark.parametrize("ends", ["stopped", "done"])
def test_layer_below_an_untouched_head_that_an_old_intent_names(kit: Kit, wanted: str, ends: str) -> None:
    def ask(of: Kit) -> None:
        if wanted == "snapshot":
            of.snapshot("late", of="v")
        else:
            of.create("late", source=of.from_volume("v"))

    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("first", of="v")
    base = kit.chain("v")[1].id
    with pytest.raises(DiedError):
        ask(other(kit, dies_before("touch", f"{base}.refs")))
    kit.write("v", 2)
    kit.write("v", 2, block=1)
    kit.snapshot("second", of="v")
    kit.write("v", 3, block=2)
    kit.delete_snapshot("second")
    kit.delete_snapshot("first")
    plan = merging.plan_for(kit.store, kit.chain("v")[1].id)
    assert plan
    assert (plan.kind, plan.parent) == ("down", base)
    if ends == "stopped":
        with pytest.raises(Busy):
            kit.merge(plan, is_held=stops_before_the_commit())
        kit.sweep_until_quiet()
        assert kit.chain("v")[1].id == plan.layer, "the merge was not to be committed"
    else:
        assert kit.merge(plan)
    ask(kit)
    assert kit.holds("v", 2, 2, 3)
    shows = kit.snapshot_holds if wanted == "snapshot" else kit.holds
    assert shows("late", 2, 2, 3)
    assert is_clean(kit)


def stops_before_the_commit() -> merging.Ask:
    """The lease is lost when the data has been moved: the first question after the last one of the job."""
    plain = merging._commit
    lost = False

    def commit(*arguments: object) -> None:
        nonlocal lost
        lost = True
        merging._commit = plain
        plain(*arguments)  # type: ignore[arg-type]

    merging._commit = commit
    return lambda: not lost


def test_merge_into_a_layer_that_is_just_being_marked_by_an_old_intent(kit: Kit) -> None:
    """The intent is retried while the merge is under way: one of the two sees the other."""
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("first", of="v")
    base = kit.chain("v")[1].id
    gate = Gate("touch", f"{base}.refs/s-")
    late = other(kit, gate)
    marking = background(lambda: late.snapshot("late", of="v"))
    gate.wait(marking)
    lock, Store.lock = Store.lock, no_lock  # type: ignore[method-assign,assignment]
    try:
        kit.write("v", 2, block=1)
        kit.snapshot("second", of="v")
        kit.write("v", 3, block=2)
        kit.delete_snapshot("second")
        kit.delete_snapshot("first")
        plan = merging.plan_for(kit.store, kit.chain("v")[1].id)
        assert plan
        assert plan.kind == "down"
        noted = begin(kit, plan)
        gate.open()
        with pytest.raises(Busy):
            marking.result(DEADLINE_S)
        assert not merging._is_free(kit.store, kit.store.layer(plan.layer), noted)
    finally:
        Store.lock = lock  # type: ignore[method-assign]
    kit.sweep_until_quiet()
    assert kit.snapshot("late", of="v").state is SnapshotState.READY
    assert kit.snapshot_holds("late", 1, 2, 3)
    assert is_clean(kit)


# --- two who hold the lease, as the first believes ---------------------------------------------------------------


@pytest.mark.parametrize("make", [two_layers, three_layers], ids=["up", "down"])
@pytest.mark.parametrize("step", ["mark", "claim", "rename"])
def test_commit_of_who_has_lost_the_lease_comes_late(kit: Kit, make: Callable[[Kit], Plan], step: str) -> None:
    """It is stopped inside its commit, another one ends its merge, and then it goes on."""
    plan = make(kit)
    places = {
        "mark": ("touch", f"c-{plan.child}"),
        "claim": ("link", f"{plan.child}.json.g"),
        "rename": ("rename", f"{plan.child}.json"),
    }
    if step == "mark" and plan.parent is None:
        pytest.skip("a child without parent marks nothing")
    gate = Gate(*places[step])
    slow = other(kit, gate)
    merged = background(lambda: slow.merge(plan))
    gate.wait(merged)
    kit.sweep_until_quiet()
    ended = kit.store.find_layer(plan.layer)
    gate.open()
    if step == "rename":  # its claim is complete: the other one took it for a dead one's and has made it true
        assert ended is None
        merged.exception(DEADLINE_S)
    else:
        assert ended
        assert ended.merge is None
        with pytest.raises(Busy):
            merged.result(DEADLINE_S)
    kit.sweep_until_quiet()
    assert is_clean(kit)
    assert kit.holds("v", 1, 2, *([3] if plan.parent else []))
    kit.merge_all()
    assert len(kit.chain("v")) == 1
    assert kit.holds("v", 1, 2, *([3] if plan.parent else []))
    assert is_clean(kit)


def test_who_has_lost_the_lease_leaves_the_merge_of_the_next_holder_alone(kit: Kit) -> None:
    plan = two_layers(kit)
    next_holder = other(kit)
    done = False

    def taken_over() -> bool:
        nonlocal done
        if not done:
            done = True
            next_holder.end_merges()
            begin(next_holder, plan)
        return False

    with pytest.raises(Stopped):
        kit.merge(plan, taken_over, is_held=lambda: True)
    assert kit.store.layer(plan.layer).merge is not None
    kit.sweep_until_quiet()
    assert kit.holds("v", 1, 2)


def test_nothing_is_written_any_more_without_the_lease(kit: Kit) -> None:
    plan = two_layers(kit)
    with pytest.raises(Busy):
        kit.merge(plan, is_held=stops_before_the_commit())
    assert kit.store.layer(plan.layer).merge is not None
    assert kit.store.layer(plan.child).parent == plan.layer
    kit.sweep_until_quiet()
    assert kit.holds("v", 1, 2)
    assert is_clean(kit)


def test_lease_is_not_taken_from_a_process_whose_locks_another_mount_does_not_show(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Lease()
    assert holder.hold(kit.store)
    elsewhere = other(kit).store
    with monkeypatch.context() as mount:
        mount.setattr(Store, "place", f"{kit.store.place}-another-mount")
        mount.setattr(Store, "is_alive", lambda *_: False)
        assert not Lease().hold(elsewhere)


def test_holder_that_cannot_renew_stops_long_before_another_takes_over(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    holder = Lease(lambda: now)
    assert holder.hold(kit.store)

    def fail(*_: object) -> None:
        raise Unavailable("the pool does not answer")

    monkeypatch.setattr(Store, "find_lease", fail)
    now = SAFE_S - 1
    assert holder.is_safe(kit.store)
    now = SAFE_S + 1
    assert not holder.is_safe(kit.store)
    assert SAFE_S < LEASE_S / 2


# --- markers ----------------------------------------------------------------------------------------------------


def test_marker_of_a_child_with_another_parent_is_removed_and_one_that_is_needed_is_not(kit: Kit) -> None:
    plan = three_layers(kit)
    base, middle, head = plan.parent, plan.layer, plan.child
    assert base
    kit.store.mark(base, records.child_marker(head))
    kit.sweep_until_quiet()
    assert kit.store.markers(base) == [records.child_marker(middle)]
    assert not merging.tidy(kit.store, middle, head, is_held=lambda: True)
    assert kit.store.markers(middle) == [records.child_marker(head)]


def test_marker_that_somebody_has_removed_before_the_commit_is_made_again(kit: Kit) -> None:
    """A sweep of another controller saw the marker of a merge without its note, and removes it late."""
    plan = three_layers(kit)
    assert plan.parent
    marker = records.child_marker(plan.child)

    def remove(step: str, path: str) -> None:
        if step == "rename" and path.endswith(f"{plan.child}.json"):
            kit.store.unmark(plan.parent or "", marker)

    assert other(kit, remove).merge(plan)
    assert kit.store.markers(plan.parent) == [marker]
    assert is_clean(kit)


# --- nodes that may still write ---------------------------------------------------------------------------------


def test_volume_that_was_just_detached_is_left_alone(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "GRACE_S", 60.0)
    plan = two_layers(kit)
    kit.attach("v")
    kit.detach("v")
    assert not kit.merge(plan)
    assert kit.store.layer(plan.layer).state is LayerState.FROZEN
    volume = kit.store.volume(kit.volume_id("v"))
    assert volume.detached_at
    kit.store.swap(volume, replace(volume, detached_at=volume.detached_at + timedelta(seconds=600)))
    assert not kit.merge(plan), "a clock that is ahead is no reason"
    volume = kit.store.volume(kit.volume_id("v"))
    assert volume.detached_at
    kit.store.swap(volume, replace(volume, detached_at=volume.detached_at - timedelta(seconds=661)))
    assert kit.merge(plan)
    assert kit.holds("v", 1, 2)


@contextmanager
def written_by_a_lost_node(kit: Kit, layer_id: str) -> Iterator[None]:
    """A QEMU process has the image of a layer open for writing, as a node that was thought lost."""
    path = kit.store.image_path(kit.store.layer(layer_id))
    opened = subprocess.Popen(
        [f"{QEMU_DIR}/qemu-io", "-f", "qcow2", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert opened.stdin
    assert opened.stdout
    try:
        print(f"write -P 9 {8 * BLOCK_BYTES} {BLOCK_BYTES}", file=opened.stdin, flush=True)
        opened.stdout.readline()
        yield
    finally:
        opened.communicate("q\n", timeout=DEADLINE_S)


def test_layer_that_a_lost_node_has_open_is_not_touched(kit: Kit) -> None:
    plan = two_layers(kit)
    with written_by_a_lost_node(kit, plan.child), pytest.raises(Busy, match="open for writing"):
        kit.merge(plan)
    kit.sweep_until_quiet()
    assert kit.merge(plan)
    assert kit.holds("v", 1, 2)


def test_merge_of_a_dead_process_is_not_undone_while_its_daemon_may_write(kit: Kit) -> None:
    plan = two_layers(kit)
    begin(kit, plan)
    with written_by_a_lost_node(kit, plan.child):
        with pytest.raises(Busy, match="open for writing"):
            merging.resume(kit.store, tools(), plan.layer, is_held=lambda: True)
        assert kit.store.layer(plan.layer).merge is not None
    kit.sweep_until_quiet()
    assert kit.store.layer(plan.layer).merge is None
    assert kit.holds("v", 1, 2)


def test_layer_below_something_that_is_being_made_is_left_alone(kit: Kit) -> None:
    """A child marker without a layer is one of a copy, an export or a clone under way."""
    plan = two_layers(kit)
    marker = records.child_marker(records.new_layer_id())
    kit.store.mark(plan.child, marker)
    assert not kit.merge(plan)
    kit.store.unmark(plan.child, marker)
    assert kit.merge(plan)


# --- the merger's thread ----------------------------------------------------------------------------------------


def test_work_is_found_small_layers_first(kit: Kit) -> None:
    plan = two_layers(kit)
    kit.create("large")
    for block in range(20):
        kit.write("large", 1, block=block)
    kit.snapshot("large", of="large")
    kit.write("large", 2)
    kit.delete_snapshot("large")
    found = [one.layer for one in kit.plans()]
    assert found[0] == plan.layer
    assert len(found) == 2
    assert merger.plan_near(kit.store, plan.layer, unmarked={}) == plan
