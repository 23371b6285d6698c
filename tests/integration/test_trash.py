"""The trash: what is kept, for how long, and that restore and purge leave nothing behind.

The last part lets operations overtake each other at every durable step, without the locks that would keep the two
processes of one mount apart, as on two hosts.
"""

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from controller_kit import OWNER, SIZE_BYTES, Kit, tree
from gates import DiedError, Gate, background, dies_before
from test_crash_merges import EVERY, SEED

from csi_quobyte.engine import collector
from csi_quobyte.errors import AlreadyExists, Busy, Corrupt, DriverError, NotFound, Refused
from csi_quobyte.operations.capacity import Provisioned, available_bytes
from csi_quobyte.pool import layout, records
from csi_quobyte.pool.chain import chain_of
from csi_quobyte.pool.records import (
    Content,
    LayerState,
    Modes,
    SnapshotRecord,
    VolumeRecord,
    VolumeState,
    marker_of,
)
from csi_quobyte.pool.sizes import GIB, SizeRange
from csi_quobyte.pool.store import Store

FORMATTED = Content(state="formatted", filesystem="ext4", generation=1)
KEPT: dict[str, Any] = {"on_delete": "trash"}


def pass_time(monkeypatch: pytest.MonkeyPatch, passed: timedelta) -> None:
    """Let the clocks of this host and of the pool's file system be that much later than they are."""
    right = records.now
    monkeypatch.setattr(records, "now", lambda: right() + passed)
    monkeypatch.setattr(Store, "time", lambda _: right() + passed)


def deleted(kit: Kit, name: str = "v", **changes: Any) -> str:
    """A written and formatted volume that was deleted; gives the id of its entry."""
    volume = kit.create(name, **{**KEPT, **changes})
    kit.store.put_content(volume, FORMATTED)
    kit.write(name, 1)
    kit.delete(name)
    return records.trash_id(volume)


# --- keeping ---------------------------------------------------------------------------------------------------


def test_deleted_volume_is_gone_for_users_and_comes_back_with_what_it_held(kit: Kit) -> None:
    new = tree(kit.store.root)
    entry_id = deleted(kit)
    assert kit.store.find_volume(kit.volume_id("v")) is None
    assert kit.findings() == set()
    kit.sweep_until_quiet()
    restored = kit.restore(entry_id)
    assert (restored.id, restored.name, restored.restored_from) == (kit.volume_id("v"), "v", entry_id)
    assert isinstance(restored, VolumeRecord)
    assert restored.state is VolumeState.READY
    assert records.trash_id(restored) != entry_id, "markers and notes of the deleted one are not the restored one's"
    assert kit.holds("v", 1)
    assert list(kit.store.trash_ids()) == []
    assert kit.check() == []
    kit.sweep_until_quiet()
    assert kit.holds("v", 1)
    kit.delete("v")  # and into the trash again
    kit.restore(kit.trashed("v"))
    assert kit.holds("v", 1)
    kit.delete_everything()
    assert tree(kit.store.root) == new


def is_formatted(kit: Kit, volume: VolumeRecord) -> bool:
    """Say whether a volume is known to hold what was written; the number of the attachment is not inherited."""
    content = kit.store.content(volume)
    return content is not None and replace(content, generation=FORMATTED.generation) == FORMATTED


def test_restored_volume_knows_its_content_so_that_nothing_is_formatted_over_it(kit: Kit) -> None:
    entry_id = deleted(kit)
    kit.sweep_until_quiet()
    restored = kit.restore(entry_id, "w")
    assert isinstance(restored, VolumeRecord)
    assert is_formatted(kit, restored)
    kit.sweep_until_quiet()
    assert is_formatted(kit, restored)
    # the clone and the snapshot of it know, too
    clone = kit.create("c", source=kit.from_volume("w"))
    assert is_formatted(kit, clone)
    kit.delete("w")
    again = kit.restore(kit.trashed("w"))
    assert isinstance(again, VolumeRecord)
    assert is_formatted(kit, again)
    assert again.attach_generation == restored.attach_generation


def test_later_attachments_of_a_restored_volume_have_later_generations(kit: Kit) -> None:
    kit.create("v", **KEPT)
    assert kit.attach("v").generation == 1
    kit.detach("v")
    kit.delete("v")
    kit.restore(kit.trashed("v"))
    assert kit.attach("v").generation == 2


def test_deleted_snapshot_comes_back_and_can_be_a_source(kit: Kit) -> None:
    new = tree(kit.store.root)
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v", **KEPT)
    kit.write("v", 2)
    kit.delete_snapshot("s")
    assert kit.store.find_snapshot(kit.snapshot_id("s")) is None
    kit.delete("v")
    kit.sweep_until_quiet()
    restored = kit.restore(kit.trashed("s"), "t")
    assert isinstance(restored, SnapshotRecord)
    assert kit.snapshot_holds("t", 1)
    kit.create("c", source=kit.from_snapshot("t"))
    assert kit.holds("c", 1)
    assert kit.check() == []
    kit.delete_everything()
    assert tree(kit.store.root) == new


def test_name_is_free_at_once_and_the_new_volume_is_empty(kit: Kit) -> None:
    entry_id = deleted(kit)
    made = kit.create("v")
    assert kit.holds("v", 0)
    assert kit.store.content(made) is None
    kit.write("v", 2)
    before = tree(kit.store.root)
    with pytest.raises(AlreadyExists, match="--name"):
        kit.restore(entry_id)
    assert tree(kit.store.root) == before
    kit.restore(entry_id, "old")
    assert kit.holds("old", 1)
    assert kit.holds("v", 2)
    assert kit.check() == []


def test_same_name_can_be_in_the_trash_several_times(kit: Kit) -> None:
    entries = []
    for pattern in (1, 2, 3):
        volume = kit.create("v", **KEPT)
        kit.write("v", pattern)
        kit.delete("v")
        entries.append(records.trash_id(volume))
    for pattern, entry_id in enumerate(entries, 1):
        kit.restore(entry_id, f"v{pattern}")
    assert all(kit.holds(f"v{pattern}", pattern) for pattern in (1, 2, 3))
    assert kit.check() == []


def test_children_of_what_is_in_the_trash_live_on_and_outlive_it(kit: Kit) -> None:
    kit.create("v", **KEPT)
    kit.write("v", 1)
    kit.create("c", source=kit.from_volume("v"), **KEPT)
    kit.snapshot("s", of="v", **KEPT)
    kit.write("v", 2)
    kit.delete("v")
    kit.delete_snapshot("s")
    kit.sweep_until_quiet()
    assert kit.holds("c", 1)
    kit.purge(kit.trashed("v"))
    kit.purge(kit.trashed("s"))
    kit.sweep_until_quiet()
    assert kit.holds("c", 1)
    kit.delete("c")
    kit.restore(kit.trashed("c"))
    assert kit.holds("c", 1)
    assert kit.check() == []


def test_what_never_was_ready_is_undone_and_not_kept(kit: Kit) -> None:
    new = tree(kit.store.root)
    kit.create("v")
    kit.write("v", 1)
    died = Kit(Store(kit.store.root, observer=dies_before("touch", "/layers/")))
    with pytest.raises(DiedError):
        died.create("c", source=kit.from_volume("v"), **KEPT)
    assert kit.store.volume(kit.volume_id("c")).unfinished
    kit.delete("c")
    assert list(kit.store.trash_ids()) == []
    kit.delete_everything()
    assert tree(kit.store.root) == new


@pytest.mark.parametrize("name", ["", "w"])
def test_announcement_that_a_crash_has_left_does_not_take_a_kept_volumes_layer_away(kit: Kit, name: str) -> None:
    """A blank volume whose process died right after it was published: the announcement is there when it is deleted."""
    died = Kit(Store(kit.store.root, observer=dies_before("unlink", ".new-")))
    with pytest.raises(DiedError):
        died.create("v", **KEPT)
    assert kit.create("v", **KEPT).state is VolumeState.READY
    kit.write("v", 1)
    kit.delete("v")
    if name:
        kit.restore(kit.trashed("v"), name)
    kit.sweep_until_quiet()
    if not name:
        kit.restore(kit.trashed("v"))
    assert kit.holds(name or "v", 1)
    assert kit.check() == []


def test_other_way_of_deleting_is_another_request(kit: Kit) -> None:
    kit.create("v")
    with pytest.raises(AlreadyExists, match="onDelete is delete, asked for trash"):
        kit.create("v", **KEPT)
    kit.snapshot("s", of="v")
    with pytest.raises(AlreadyExists, match="onDelete is delete"):
        kit.snapshot("s", of="v", **KEPT)


def test_kept_volumes_are_not_counted_as_provisioned(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """GetCapacity and CreateVolume agree (S25): what is in the trash cannot grow, and what it has is not available."""
    monkeypatch.setattr(kit.store, "space", lambda: (GIB, GIB))
    free = available_bytes(kit.store, kit.provisioned, "off")
    entry_id = deleted(kit)
    for known in (kit.provisioned, Provisioned()):
        assert available_bytes(kit.store, known, "off") == free
    assert kit.create("all", size=SizeRange(free)).size_bytes == free
    kit.restore(entry_id)  # not refused: it was promised before
    assert available_bytes(kit.store, Provisioned(), "off") == 0
    kit.delete("all")
    assert available_bytes(kit.store, Provisioned(), "off") == free - SIZE_BYTES


# --- the end ---------------------------------------------------------------------------------------------------


def test_collector_purges_what_is_over_and_nothing_else(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    new = tree(kit.store.root)
    deleted(kit, "day")
    deleted(kit, "week", trash_retention_s=7 * 86400)
    deleted(kit, "ever", on_delete="retain")
    pass_time(monkeypatch, timedelta(hours=23, minutes=59))
    kit.sweep_until_quiet()
    assert len(list(kit.store.trash_ids())) == 3
    pass_time(monkeypatch, timedelta(minutes=2))
    report = collector.sweep(kit.store)
    assert (report.purged, report.layers) == (1, 1)
    kit.restore(kit.trashed("week"))
    pass_time(monkeypatch, timedelta(days=3600))
    kit.sweep_until_quiet()
    assert kit.holds("week", 1), "a restored volume does not run out"
    kit.restore(kit.trashed("ever"))
    assert kit.holds("ever", 1)
    for name in ("week", "ever"):
        kit.delete(name)
        kit.purge(kit.trashed(name))
    kit.sweep_until_quiet()
    assert tree(kit.store.root) == new


def test_purged_entry_cannot_be_restored_nor_a_restored_one_purged(kit: Kit) -> None:
    entry_id = deleted(kit)
    restored = kit.restore(entry_id)
    with pytest.raises(NotFound, match="trash ls"):
        kit.purge(entry_id)
    assert kit.restore(entry_id) == restored, "the same call again"
    with pytest.raises(NotFound, match="trash ls"):
        kit.restore(entry_id, "w")
    assert kit.holds("v", 1)
    kit.delete("v")
    entry_id = kit.trashed("v")
    kit.purge(entry_id)
    for work in (kit.purge, kit.restore):
        with pytest.raises(NotFound):
            work(entry_id)


@pytest.mark.parametrize("entry_id", ["", "x", "../../format", "0123abcd-vol-" + "0" * 32, "-" * 50])
def test_ids_that_are_none(kit: Kit, entry_id: str) -> None:
    with pytest.raises(NotFound):
        kit.restore(entry_id)
    with pytest.raises(NotFound):
        kit.purge(entry_id)


def test_entry_that_cannot_be_read_is_reported_and_can_be_purged(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    new = tree(kit.store.root)
    entry_id = deleted(kit)
    Path(kit.store.root, "trash", f"{entry_id}.json").write_bytes(b'{"id": ')
    assert [finding.id for finding in kit.errors()] == [entry_id]
    collector.sweep(kit.store)
    with pytest.raises(Corrupt):
        kit.restore(entry_id)
    monkeypatch.setattr("csi_quobyte.pool.store._REREAD_PAUSE_S", 0.0)
    kit.purge(entry_id)
    kit.delete_everything()
    assert tree(kit.store.root) == new


def test_entry_without_its_marker_is_damage_and_not_restored(kit: Kit) -> None:
    entry_id = deleted(kit)
    entry = kit.store.find_trashed(entry_id)
    assert isinstance(entry, VolumeRecord)
    kit.store.unmark(entry.head, marker_of(entry))
    assert kit.findings() == {"missing-marker"}
    collector.sweep(kit.store)
    assert kit.store.find_layer(entry.head), "named by a record, so it is not dropped"
    with pytest.raises(Corrupt, match="marker"):
        kit.restore(entry_id)
    kit.store.mark(entry.head, marker_of(entry))
    kit.restore(entry_id)
    assert kit.holds("v", 1)


def test_attached_volume_is_not_deleted(kit: Kit) -> None:
    kit.create("v", **KEPT)
    kit.attach("v")
    with pytest.raises(Refused):
        kit.delete("v")
    assert list(kit.store.trash_ids()) == []


@pytest.mark.parametrize("undo", ["retry", "delete"])
def test_unfinished_snapshot_of_a_volume_in_the_trash_does_not_take_its_head_away(kit: Kit, undo: str) -> None:
    """A snapshot whose freeze was done and that never became ready: the volume goes on in the overlay made for it."""
    kit.create("v", **KEPT)
    kit.write("v", 1)
    head = kit.chain("v")[0].id
    died = Kit(Store(kit.store.root, observer=dies_before("link", f"{head}.json.g")))
    with pytest.raises(DiedError):
        died.snapshot("s", of="v")
    assert kit.chain("v")[1].state is LayerState.HEAD, "the freeze was done, and what is below not frozen"
    kit.write("v", 2, block=1)
    kit.delete("v")
    if undo == "retry":
        kit.snapshot("s", of="v")
        assert kit.snapshot_holds("s", 1, 0)
    else:
        kit.delete_snapshot("s")
    kit.sweep_until_quiet()
    kit.restore(kit.trashed("v"))
    assert kit.holds("v", 1, 2)
    assert kit.check() == []


# --- overtaking ------------------------------------------------------------------------------------------------


class Pause:
    """Stops a process before its durable step number `at`, once, until it is let go on."""

    def __init__(self, at: int) -> None:
        self._at = at
        self._steps = 0
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, *_: str) -> None:
        self._steps += 1
        if self._steps == self._at:
            self.reached.set()
            assert self.go_on.wait(20)


@dataclass(frozen=True)
class Pair:
    """Two operations of which the second runs while the first stops; before, v is in the trash or about to be.

    `purges`: they may end with v gone for good.
    """

    first: Callable[[Kit, str], object]
    second: Callable[[Kit, str], object]
    in_trash: bool = True
    purges: bool = False
    on_delete: str = "trash"


def delete_restored(kit: Kit, entry_id: str) -> None:
    """What a user does: restore it, and delete that for good."""
    restored = kit.restore(entry_id, "w")
    assert isinstance(restored, VolumeRecord)
    kit.delete("w")
    for left in list(kit.store.trash_ids()):
        kit.purge(left)


def delete_and_purge(kit: Kit, entry_id: str) -> None:
    kit.delete("v")
    for left in list(kit.store.trash_ids()):
        kit.purge(left)


PAIRS = {
    "restore, purge": Pair(lambda kit, it: kit.restore(it), lambda kit, it: kit.purge(it), purges=True),
    "purge, restore": Pair(lambda kit, it: kit.purge(it), lambda kit, it: kit.restore(it), purges=True),
    "restore, restore": Pair(lambda kit, it: kit.restore(it), lambda kit, it: kit.restore(it)),
    "restore, restore as w": Pair(lambda kit, it: kit.restore(it), lambda kit, it: kit.restore(it, "w")),
    "restore, create": Pair(lambda kit, it: kit.restore(it), lambda kit, _: kit.create("v")),
    "create, restore": Pair(lambda kit, _: kit.create("v"), lambda kit, it: kit.restore(it)),
    "restore as w, restore and delete w": Pair(lambda kit, it: kit.restore(it, "w"), delete_restored, purges=True),
    "restore, collector": Pair(lambda kit, it: kit.restore(it), lambda kit, _: kit.sweep_until_quiet()),
    "purge, collector": Pair(lambda kit, it: kit.purge(it), lambda kit, _: kit.sweep_until_quiet(), purges=True),
    "delete, restore": Pair(lambda kit, _: kit.delete("v"), lambda kit, it: kit.restore(it), in_trash=False),
    "delete, restore as w": Pair(lambda kit, _: kit.delete("v"), lambda kit, it: kit.restore(it, "w"), in_trash=False),
    "delete, delete and purge": Pair(lambda kit, _: kit.delete("v"), delete_and_purge, in_trash=False, purges=True),
    "delete, create": Pair(lambda kit, _: kit.delete("v"), lambda kit, _: kit.create("v", **KEPT), in_trash=False),
    "delete for good, create": Pair(
        lambda kit, _: kit.delete("v"), lambda kit, _: kit.create("v"), in_trash=False, purges=True, on_delete="delete"
    ),
    "delete, collector": Pair(lambda kit, _: kit.delete("v"), lambda kit, _: kit.sweep_until_quiet(), in_trash=False),
    "delete, snapshot": Pair(lambda kit, _: kit.delete("v"), lambda kit, _: kit.snapshot("s", of="v"), in_trash=False),
    "snapshot, delete": Pair(lambda kit, _: kit.snapshot("s", of="v"), lambda kit, _: kit.delete("v"), in_trash=False),
}


def outcome(work: Callable[[], object], attempts: int = 40) -> str:
    """Repeat a call as a client does while it is Busy, for a while; gives how it ended."""
    for _ in range(attempts):
        try:
            work()
        except Busy:
            threading.Event().wait(0.005)
        except DriverError as error:
            return type(error).__name__
        else:
            return "done"
    return "Busy"


@pytest.fixture
def hosts() -> Iterator[Callable[..., Kit]]:
    """Give processes on a pool in memory whose locks do not reach each other."""
    opened: list[Store] = []
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="csi-quobyte-test-", dir=memory if memory.is_dir() else None))
    layout.initialise(str(root), owner=OWNER, modes=Modes())

    def make(observer: Pause | None = None) -> Kit:
        store = Store(str(root), observer=observer)
        store.lock = lambda _: nullcontext()  # type: ignore[method-assign]
        opened.append(store)
        return Kit(store)

    yield make
    for store in opened:
        store.close()
    shutil.rmtree(root)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", PAIRS)
def test_operations_that_overtake_each_other_at_any_step(name: str, hosts: Callable[..., Kit], impatient: None) -> None:
    pair, kit = PAIRS[name], hosts()
    new = tree(kit.store.root)
    for step in range(1 + SEED % EVERY, 1000, EVERY):
        volume = kit.create("v", on_delete=pair.on_delete)
        entry_id = records.trash_id(volume)
        kit.store.put_content(volume, FORMATTED)
        kit.write("v", 1)
        if pair.in_trash:
            kit.delete("v")
        pause = Pause(step)
        stopped, other = hosts(pause), hosts()
        # a repeated delete would be one of the new volume
        attempts = 1 if name.endswith(", create") else 40
        ends: list[str] = []
        new_ones: list[str] = []

        def second_work(other: Kit = other, entry_id: str = entry_id, new_ones: list[str] = new_ones) -> None:
            made = pair.second(other, entry_id)
            new_ones += [made.uid] if isinstance(made, VolumeRecord) and not entry_id.endswith(made.uid) else []

        first = partial(pair.first, stopped, entry_id)
        thread = threading.Thread(
            target=lambda ends=ends, first=first, attempts=attempts: ends.append(outcome(first, attempts))
        )  # type: ignore[misc]
        thread.start()
        while thread.is_alive() and not pause.reached.wait(0.002):
            pass
        was_stopped = pause.reached.is_set()
        second = outcome(second_work) if was_stopped else ""
        pause.go_on.set()
        thread.join(30)
        try:
            assert ends, "the first operation ended with an error that nobody expects"
            owners = check_owners(kit, volume.head)
            if name.endswith(", create") and new_ones:
                assert kit.store.find_volume(volume.id), "the new one is not hit by what was meant for the old one"
            assert owners == 1 or (owners == 0 and pair.purges)
            if name in {"restore, purge", "purge, restore"} and second:
                assert {*ends, second} in ({"NotFound", "done"}, {"Busy", "done"}), "one of the two wins"
                assert owners == ([second, *ends][name == "restore, purge"] == "done")
            kit.delete_everything()
            assert tree(kit.store.root) == new
        except AssertionError as error:
            error.add_note(f"{name}: stopped before step {step} (seed {SEED}): {ends}, the other: {second}")
            raise
        if not was_stopped:
            break
    print(f"{name}: stopped before steps up to {step - 1}, every {EVERY}., seed {SEED}")


def test_restore_that_was_done_and_deleted_since_is_not_given_up(hosts: Callable[..., Kit], impatient: None) -> None:
    """Who gives it up late must leave the marker alone: it is that of the restored one's own entry now."""
    kit, gate = hosts(), Gate("unlink", ".restore-")
    entry_id = deleted(kit, on_delete="retain")
    with pytest.raises(DiedError):
        hosts(dies_before("link", "/volumes/")).restore(entry_id, "w")
    late = background(lambda: hosts(gate).restore(entry_id, "x"))
    gate.wait(late)
    kit.restore(entry_id, "w")
    kit.delete("w")
    gate.open()
    with pytest.raises((Busy, NotFound)):
        late.result(20)
    kit.restore(kit.trashed("w"), "y")
    assert kit.holds("y", 1)
    assert kit.errors() == []


def check_owners(kit: Kit, head: str) -> int:
    """Nothing is damaged, nothing is left, no layer has two owners; gives how many have what was in the volume."""
    kit.sweep_until_quiet()
    assert kit.findings() == set()
    kit.consistency()
    live = [volume for volume in map(kit.store.find_volume, kit.store.volume_ids()) if volume]
    kept = [entry for entry in map(kit.store.find_trashed, kit.store.trash_ids()) if isinstance(entry, VolumeRecord)]
    heads = [one.head for one in (*live, *kept)]
    assert len(heads) == len(set(heads)), f"two volumes write one layer: {live} {kept}"
    owners = 0
    for volume in (*live, *kept):
        written = head in [layer.id for layer in chain_of(volume.head, kit.store.find_layer)]
        assert kit.layer_holds(volume.head, 1 if written else 0)
        assert is_formatted(kit, volume) is written
        owners += written
    return owners
