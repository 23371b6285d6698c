"""Merging layers: what is folded into what, that every disk shows the same before and after, and who comes first.

Axes: the kind of merge (up, down, flatten), the format of the base, growth along the chain, who else refers to what.
"""

import json
import subprocess
import sys

import pytest
from controller_kit import BLOCK_BYTES, QEMU_DIR, SIZE_BYTES, Kit, tools, tree
from gates import DiedError, dies_before
from merging_kit import begin, is_clean, two_layers

from csi_quobyte.engine import collector, merging
from csi_quobyte.engine.lease import LEASE_S, Lease
from csi_quobyte.engine.merging import SOFT_DEPTH
from csi_quobyte.errors import Busy
from csi_quobyte.host import qemu_img
from csi_quobyte.host.jobs import Stopped
from csi_quobyte.pool.records import LayerState
from csi_quobyte.pool.store import Store


def layers_of(kit: Kit, name: str) -> list[str]:
    return [layer.id for layer in kit.chain(name)]


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_layer_of_a_deleted_snapshot_goes_up_into_the_head(kit: Kit, image_format: str) -> None:
    kit.create("v", image_format=image_format)
    kit.write("v", 1)
    kit.write("v", 9, block=1)
    kit.snapshot("s", of="v")
    kit.write("v", 2, block=1)
    kit.delete_snapshot("s")
    assert kit.merge_all() == ["up"]
    assert len(kit.chain("v")) == 1
    assert kit.holds("v", 1, 2, 0)
    assert is_clean(kit)


def test_middle_layer_goes_down_into_a_base_that_nothing_else_refers_to(kit: Kit) -> None:
    kit.create("v", image_format="raw")
    kit.write("v", 1)
    kit.snapshot("first", of="v")
    kit.write("v", 2, block=1)
    kit.snapshot("second", of="v")
    kit.write("v", 3, block=2)
    base = layers_of(kit, "v")[2]
    kit.delete_snapshot("first")
    kit.delete_snapshot("second")
    plan = merging.plan_for(kit.store, layers_of(kit, "v")[1])
    assert plan is not None
    assert plan.kind == "down"
    assert kit.merge(plan)
    assert layers_of(kit, "v")[1] == base
    assert kit.holds("v", 1, 2, 3)
    assert is_clean(kit)
    kit.merge_all()
    assert len(kit.chain("v")) == 1
    assert kit.holds("v", 1, 2, 3)


def test_layer_between_two_snapshots_goes_up_and_both_show_what_they_did(kit: Kit) -> None:
    kit.create("v")
    for number, name in enumerate(("first", "second", "third"), start=1):
        kit.write("v", number, block=number - 1)
        kit.snapshot(name, of="v")
    kit.write("v", 7)
    kit.create("child", source=kit.from_snapshot("third"))
    kit.delete_snapshot("second")
    assert kit.merge_all() == ["up"]
    assert kit.snapshot_holds("first", 1, 0, 0)
    assert kit.snapshot_holds("third", 1, 2, 3)
    assert kit.holds("child", 1, 2, 3)
    assert kit.holds("v", 7, 2, 3)
    assert is_clean(kit)


def test_growing_sizes_stay_right(kit: Kit) -> None:
    kit.create("v", image_format="raw")
    kit.write("v", 1)
    for number, name in enumerate(("first", "second"), start=2):
        kit.snapshot(name, of="v")
        kit.expand("v", number * SIZE_BYTES)
        kit.grow_image("v")
        last = number * SIZE_BYTES // BLOCK_BYTES - 1
        kit.write("v", number, block=last)
    kit.delete_snapshot("first")
    kit.delete_snapshot("second")
    assert kit.merge_all()
    assert len(kit.chain("v")) == 1
    per_size = SIZE_BYTES // BLOCK_BYTES
    assert kit.holds("v", 1, *[0] * (2 * per_size - 2), 2, *[0] * (per_size - 1), 3)
    assert is_clean(kit)


def test_long_chain_of_snapshots_is_flattened_below_the_head_only(kit: Kit) -> None:
    kit.create("v")
    for number in range(SOFT_DEPTH + 2):
        kit.write("v", number + 1, block=number)
        kit.snapshot(f"s{number}", of="v")
    blocks = tuple(range(1, SOFT_DEPTH + 3))
    assert len(kit.chain("v")) > SOFT_DEPTH
    assert kit.merge_all() == ["flatten"]
    assert len(kit.chain("v")) <= SOFT_DEPTH // 2
    assert kit.holds("v", *blocks)
    for number in range(SOFT_DEPTH + 2):
        assert kit.snapshot_holds(f"s{number}", *blocks[: number + 1], 0)
    assert is_clean(kit)


def test_attached_volume_is_left_alone(kit: Kit) -> None:
    plan = two_layers(kit)
    kit.attach("v")
    before = tree(kit.store.root)
    assert not kit.merge(plan)
    assert tree(kit.store.root).keys() == before.keys()
    assert kit.store.layer(plan.layer).state is LayerState.FROZEN
    kit.detach("v")
    assert kit.merge(plan)
    assert kit.holds("v", 1, 2)


def test_volume_above_that_is_attached_keeps_the_layers_below(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("first", of="v")
    kit.write("v", 2, block=1)
    kit.snapshot("second", of="v")
    kit.create("child", source=kit.from_snapshot("second"))
    kit.delete_snapshot("first")
    kit.attach("child")
    (plan,) = kit.plans()
    assert not kit.merge(plan)
    kit.detach("child")
    assert kit.merge(plan)
    assert kit.holds("child", 1, 2)


def test_stopped_merge_leaves_what_was_there(kit: Kit) -> None:
    plan = two_layers(kit)
    with pytest.raises(Stopped):
        kit.merge(plan, may_go_on=lambda: False)
    assert kit.store.layer(plan.layer).state is LayerState.FROZEN
    assert kit.store.layer(plan.layer).merge is None
    assert kit.holds("v", 1, 2)
    assert is_clean(kit)
    assert kit.merge(plan)


def test_snapshot_and_clone_during_a_merge_are_busy_and_stop_it(kit: Kit) -> None:
    plan = two_layers(kit)
    begin(kit, plan)
    with pytest.raises(Busy, match="being merged"):
        kit.snapshot("new", of="v")
    with pytest.raises(Busy, match="being merged"):
        kit.create("clone", source=kit.from_volume("v"))
    assert not merging._is_free(kit.store, kit.store.layer(plan.layer), kit.store.layer(plan.layer).merge)  # type: ignore[arg-type]
    kit.sweep_until_quiet()
    kit.snapshot("new", of="v")
    kit.create("clone", source=kit.from_volume("v"))
    assert kit.snapshot_holds("new", 1, 2)
    assert kit.holds("clone", 1, 2)


def test_attachment_during_a_merge_stops_it(kit: Kit) -> None:
    plan = two_layers(kit)
    asked = []

    def may_go_on() -> bool:
        asked.append(1)
        kit.attach("v")
        return True

    original, merging._LOOK_EVERY_S = merging._LOOK_EVERY_S, 0.0
    try:
        with pytest.raises(Stopped):
            kit.merge(plan, may_go_on=may_go_on)
    finally:
        merging._LOOK_EVERY_S = original
    assert asked
    assert kit.store.layer(plan.layer).state is LayerState.FROZEN
    kit.detach("v")
    assert kit.holds("v", 1, 2)


def test_deleting_everything_during_a_merge(kit: Kit) -> None:
    as_new = tree(kit.store.root)
    plan = two_layers(kit)
    begin(kit, plan)
    kit.delete_everything()
    assert tree(kit.store.root) == as_new


def test_large_base_is_not_moved_for_a_small_overlay(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_CHEAP_BYTES", 0)
    kit.create("v")
    for block in range(40):
        kit.write("v", 1, block=block)
    kit.snapshot("s", of="v")
    kit.write("v", 2)
    kit.delete_snapshot("s")
    assert kit.plans() == []


def test_wrong_name_that_a_killed_job_has_left_is_repaired(kit: Kit) -> None:
    plan = two_layers(kit)
    begin(kit, plan)
    child = kit.store.layer(plan.child)
    qemu_img.set_backing_name(tools(), kit.store.image_path(child), None, None)
    merging.resume(kit.store, tools(), plan.layer, is_held=lambda: True)
    assert is_clean(kit)
    assert kit.holds("v", 1, 2)


def test_plan_of_before_another_merge_is_not_followed(kit: Kit) -> None:
    kit.create("v")
    for number in (1, 2, 3):
        kit.write("v", number, block=number - 1)
        kit.snapshot(f"s{number}", of="v")
    kit.write("v", 4, block=3)
    for number in (1, 2, 3):
        kit.delete_snapshot(f"s{number}")
    found = kit.plans()
    assert len(found) == 3
    for plan in (*found, *reversed(found)):
        kit.merge(plan)
        assert kit.holds("v", 1, 2, 3, 4)
    assert is_clean(kit)


def test_lease_is_one_processes_until_it_is_released_or_its_host_says_that_it_is_dead(kit: Kit) -> None:
    other = Store(kit.store.root)
    mine, others = Lease(), Lease()
    assert mine.hold(kit.store)
    assert mine.is_safe(kit.store)
    assert not others.hold(other)
    mine.release(kit.store)
    assert others.hold(other)
    assert not mine.hold(kit.store)
    other.close()  # as when its process is killed
    assert mine.hold(kit.store)


def test_lease_of_another_host_is_taken_only_after_it_was_not_renewed_for_long(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    far = Lease(lambda: now)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Store, "place", "another boot id")
        gone = Store(kit.store.root)
        assert far.hold(gone)
        gone.close()
    mine = Lease(lambda: now)
    for now in (1.0, LEASE_S / 2, LEASE_S + 1):  # noqa: B007 - read by the clock
        assert not mine.hold(kit.store)
    now = LEASE_S + 2
    assert mine.hold(kit.store)


def test_interrupted_change_of_the_lease_is_ended_by_the_collector(kit: Kit, impatient: None) -> None:
    assert Lease().hold(kit.store)
    died = Kit(Store(kit.store.root, observer=dies_before("rename", "collector.json")))
    with pytest.raises(DiedError):
        died.store.swap(died.store.find_lease(), died.store.find_lease())
    died.store.close()
    assert kit.store.lease_claims()
    assert kit.findings() == {"stale-claim"}
    kit.sweep_until_quiet()
    assert kit.store.lease_claims() == []


def test_gc_collects_and_merges_everything(kit: Kit) -> None:
    two_layers(kit)
    kit.create("deleted")
    kit.delete("deleted")
    done = list(collector.collect(kit.store, tools(), merges=True))
    assert [step.kind for step in done if isinstance(step, merging.Plan)] == ["up"]
    assert sum(step.report.layers for step in done if isinstance(step, collector.Collected)) >= 1
    assert len(kit.chain("v")) == 1
    assert kit.holds("v", 1, 2)
    assert list(collector.collect(kit.store, tools(), merges=True)) == []


def gc(kit: Kit, *arguments: str) -> str:
    command = [sys.executable, "-m", "csi_quobyte", "gc", "--pool", f"main={kit.store.root}", "--require-mount", "any"]
    done = subprocess.run(
        [*command, "--qemu-dir", QEMU_DIR, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_gc_by_hand_says_what_it_would_do_and_does_it(kit: Kit) -> None:
    plan = two_layers(kit)
    (would,) = map(json.loads, gc(kit, "--dry-run", "--json").splitlines())
    assert (would["pool"], would["dry_run"], would["kind"], would["layer"]) == ("main", True, "up", plan.layer)
    assert f"layer {plan.layer} would go up" in gc(kit, "--dry-run")
    assert len(kit.chain("v")) == 2
    assert gc(kit, "--no-merge") == ""
    assert len(kit.chain("v")) == 2
    assert f"layer {plan.layer} went up" in gc(kit)
    assert len(kit.chain("v")) == 1
    assert gc(kit) == ""
    assert kit.holds("v", 1, 2)
