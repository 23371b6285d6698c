"""One look that is wrong, or a death at the worst moment of an undo: nothing is lost, and nothing stays for ever.

Axes: what was shown wrong (a directory as it was a second ago, a record beside a rename, a clock, an entry that is
another's) or where a process died × what another host does next.
"""

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from controller_kit import CopiesNever, Elsewhere, Kit, tools
from gates import DiedError, Gate, background, dies_before
from test_lost_markers import controller_of, do_released

from csi_quobyte.engine import collector
from csi_quobyte.engine import index as index_module
from csi_quobyte.errors import Busy, Corrupt, DriverError, Unavailable
from csi_quobyte.pool import files, records
from csi_quobyte.pool.steps import Observer
from csi_quobyte.pool.store import Store


@pytest.fixture
def other(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kit]:
    """A controller on another host, which no lock reaches, and whose sweeps wait as they should."""
    monkeypatch.setattr(collector, "SETTLE_S", 0.3)
    store = Elsewhere(kit.store.root)
    store.lock = lambda _: nullcontext()  # type: ignore[method-assign]
    yield Kit(store)
    store.close()


def hide(kit: Kit, monkeypatch: pytest.MonkeyPatch, listing: str, hidden: str) -> None:
    """Let a client show a directory, for 200 ms from its first look on, without a name that has just come."""
    plain: Callable[..., Iterator[str]] = getattr(kit.store, listing)
    first: list[float] = []

    def ids(**options: Any) -> Iterator[str]:
        first.append(collector.time.monotonic())
        is_stale = first[-1] - first[0] < 0.2
        return (one for one in plain(**options) if one != hidden or not is_stale)

    monkeypatch.setattr(kit.store, listing, ids)


def test_settling_is_longer_than_a_client_caches() -> None:
    assert collector.SETTLE_S == 0.0, "of these tests, whose stores cache nothing"
    text = Path(collector.__file__).read_text()
    assert "\nSETTLE_S = 2.2\n" in text


# --- a directory as it was a second ago ------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["its overlay has its name", "its commit"])
def test_freeze_of_a_snapshot_that_is_not_listed_yet(
    kit: Kit, other: Kit, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    volume = kit.create("v")
    kit.write("v", 1)
    gate = Gate("link", ".qcow2" if before == "its overlay has its name" else f"{volume.id}.json.g")
    late = Kit(Store(kit.store.root, observer=gate))
    call = background(lambda: late.snapshot("s", of="v"))
    gate.wait(call)
    hide(other, monkeypatch, "snapshot_ids", other.snapshot_id("s"))
    collector.sweep(other.store)
    gate.open()
    call.result(20)
    assert kit.findings() == set()
    kit.write("v", 2, block=1)
    controller = controller_of(kit)
    controller._sweep_until_quiet(kit.store)
    late.delete_snapshot("s")
    do_released(late, controller)
    assert kit.holds("v", 1, 2)


@pytest.mark.parametrize("mode", ["overlay", "copy"])
def test_clone_that_is_not_listed_yet(kit: Kit, other: Kit, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    kit.create("v")
    kit.write("v", 1)
    snapshot = kit.snapshot("s", of="v")
    kit.delete("v")
    kit.sweep_until_quiet()
    hide(other, monkeypatch, "volume_ids", other.volume_id("clone"))
    if mode == "copy":
        pinned = Kit(kit.store, copies=CopiesNever()).create("clone", source=kit.from_snapshot("s"), clone_mode=mode)
        collector.sweep(other.store)
        assert records.child_marker(pinned.head) in (kit.store.markers(snapshot.layer) or [])
        return
    gate = Gate("link", ".qcow2")
    late = Kit(Store(kit.store.root, observer=gate))
    call = background(lambda: late.create("clone", source=kit.from_snapshot("s")))
    gate.wait(call)
    collector.sweep(other.store)
    gate.open()
    call.result(20)
    assert kit.findings() == set()
    assert kit.holds("clone", 1)


def test_blank_volume_that_is_not_listed_yet(kit: Kit, other: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its announcement is still there, and its record not shown."""
    gate = Gate("unlink", ".new-")
    late = Kit(Store(kit.store.root, observer=gate))
    call = background(lambda: late.create("v"))
    gate.wait(call)
    hide(other, monkeypatch, "volume_ids", other.volume_id("v"))
    plain, started = other.store.find_volume, collector.time.monotonic()
    monkeypatch.setattr(
        other.store, "find_volume", lambda one: None if collector.time.monotonic() - started < 0.2 else plain(one)
    )
    collector.sweep(other.store)
    gate.open()
    call.result(20)
    assert kit.findings() == set()


def test_markers_of_what_died_go_all_the_same(kit: Kit, other: Kit) -> None:
    """After the second look, which finds no intent."""
    kit.create("v")
    kit.snapshot("s", of="v")
    layer_id = kit.chain("v")[1].id
    kit.store.mark(layer_id, records.child_marker(records.new_layer_id()))
    assert collector.sweep(other.store).markers == 1


# --- a record beside a rename ----------------------------------------------------------------------------------


def test_delete_that_finds_nothing_beside_a_change_is_not_answered(
    kit: Kit, other: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = kit.create("v")
    kit.write("v", 1)
    gate = Gate("rename", f"{volume.id}.json")
    late = Kit(Store(kit.store.root, observer=gate))
    call = background(lambda: late.attach("v"))
    gate.wait(call)
    read, asked = files.read, []

    def second_finds_nothing(path: str) -> bytes | None:
        if path.endswith(f"{volume.id}.json"):
            asked.append(path)
        return None if len(asked) == 2 else read(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "read", second_finds_nothing)
        with pytest.raises(Busy):
            other.delete("v")
    gate.open()
    call.result(20)
    assert kit.holds("v", 1)


# --- clocks, entries of others, notes --------------------------------------------------------------------------


def test_clock_that_is_wrong_purges_nothing(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.create("v", on_delete="trash", trash_retention_s=30 * 86400)
    kit.write("v", 1)
    kit.delete("v")
    right = records.now
    with monkeypatch.context() as patch:
        patch.setattr(records, "now", lambda: right() + timedelta(days=4000))
        collector.sweep(kit.store)
    kit.restore(kit.trashed("v"))
    assert kit.holds("v", 1)


def test_entry_of_the_trash_that_is_anothers_is_damage(kit: Kit) -> None:
    for number, name in enumerate(("a", "b"), start=1):
        kit.create(name, on_delete="retain")
        kit.write(name, number)
        kit.delete(name)
    first, second = kit.trashed("a"), kit.trashed("b")
    root = Path(kit.store.root, "trash")
    (root / f"{second}.json").write_bytes((root / f"{first}.json").read_bytes())
    with pytest.raises(Corrupt):
        kit.store.find_trashed(second)
    assert "unreadable-record" in kit.findings()
    kit.purge(second)
    kit.restore(first)
    assert kit.holds("a", 1)


def test_closed_note_that_cannot_be_removed_is_said(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a snapshot would believe, after the next loss of the node, that it had closed the volume."""
    kit.create("v")
    kit.attach("v")
    volume = kit.store.volume(kit.volume_id("v"))
    kit.store.note_closed(volume, volume.attach_generation)

    def fails(path: str, *_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", fails)
        patch.setattr(os, "unlink", fails)
        with pytest.raises(Unavailable):
            kit.store.forget_closed(volume)
    kit.store.forget_closed(volume)
    assert kit.store.closed_generation(volume) == 0
    kit.store.forget_closed(volume)


# --- an undo that died after it had condemned a layer ----------------------------------------------------------


def dies_after(step: str, part: str) -> Observer:
    """A process that ends after this step, before the next one."""
    seen = False

    def observe(at: str, path: str) -> None:
        nonlocal seen
        if seen:
            raise DiedError
        seen = at == step and part in path

    return observe


def on(kit: Kit, observer: Observer, **options: Any) -> Kit:
    return Kit(Store(kit.store.root, observer=observer), **options)


def half_made(kit: Kit, what: str) -> tuple[str, Callable[[Kit], object]]:
    """Leave an intent whose layer is whole; gives that layer, and what undoes it."""
    volume = kit.create("v")
    kit.write("v", 1)
    if what == "snapshot":
        with pytest.raises(DiedError):
            on(kit, dies_before("link", f"{volume.id}.json.g")).snapshot("s", of="v")
        return str(kit.store.snapshot(kit.snapshot_id("s")).next), lambda by: by.delete_snapshot("s")
    clone_id = kit.volume_id("c")
    if what == "clone of a volume":
        with pytest.raises(DiedError):
            on(kit, dies_before("link", f"{volume.id}.json.g")).create("c", source=kit.from_volume("v"))
        return str(kit.store.volume(clone_id).source_next), lambda by: by.delete("c")
    kit.snapshot("s", of="v")
    mode = "copy" if what == "copy" else "overlay"
    if mode == "copy":
        Kit(kit.store, copies=CopiesNever()).create("c", source=kit.from_snapshot("s"), clone_mode=mode)
    with pytest.raises(DiedError):
        on(kit, dies_before("link", f"{clone_id}.json.g")).create("c", source=kit.from_snapshot("s"), clone_mode=mode)
    return kit.store.volume(clone_id).head, lambda by: by.delete("c")


WHAT = ["clone of a snapshot", "clone of a volume", "copy", "snapshot"]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("who", ["call", "collector"])
@pytest.mark.parametrize("what", WHAT)
def test_undo_that_died_when_the_layer_was_condemned_is_ended(kit: Kit, what: str, who: str) -> None:
    layer_id, undo = half_made(kit, what)
    with pytest.raises(DiedError):
        undo(on(kit, dies_after("rmdir", layer_id)))
    assert kit.store.find_layer(layer_id)
    assert kit.store.markers(layer_id) is None
    if who == "call":
        undo(kit)
    kit.sweep_until_quiet()
    assert kit.store.find_layer(layer_id) is None
    assert kit.findings() == set()
    assert kit.holds("v", 1)
    kit.snapshot("s2", of="v")


@pytest.mark.usefixtures("impatient")
def test_undo_whose_write_failed_once_is_ended(kit: Kit) -> None:
    layer_id, undo = half_made(kit, "clone of a snapshot")
    failed: list[str] = []

    def observe(step: str, path: str) -> None:
        if failed == ["rmdir"] and step == "write":
            failed.append("write")
            raise Unavailable("EIO")
        if step == "rmdir" and layer_id in path:
            failed.append("rmdir")

    with pytest.raises(Unavailable):
        undo(on(kit, observe))
    undo(kit)
    kit.sweep_until_quiet()
    assert kit.findings() == set()


@pytest.mark.usefixtures("impatient")
def test_layer_of_a_chain_that_has_moved_on_and_lost_its_refs_is_not_undone(kit: Kit) -> None:
    """A snapshot's intent is found again by a power cut, when its overlay has become a layer of the chain since."""
    kit.create("v")
    kit.write("v", 1)
    with pytest.raises(DiedError):
        on(kit, dies_before("link", f"{kit.snapshot_id('s')}.json.g")).snapshot("s", of="v")
    layer_id = kit.store.snapshot(kit.snapshot_id("s")).next
    assert kit.store.volume(kit.volume_id("v")).head == layer_id
    kit.write("v", 2, block=1)
    kit.snapshot("later", of="v")
    kit.write("v", 3, block=2)
    assert kit.chain("v")[1].id == layer_id
    refs = Path(kit.store.root, "layers", str(layer_id)[:2], f"{layer_id}.refs")
    for marker in refs.iterdir():
        marker.unlink()
    refs.rmdir()
    for _ in range(2):
        with pytest.raises(DriverError):
            kit.delete_snapshot("s")
        collector.sweep(kit.store)
    assert kit.holds("v", 1, 2, 3)


@pytest.mark.usefixtures("impatient")
def test_collecting_by_hand_ends_although_something_is_left(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "_CLAIM_PAUSE_S", 0.0)
    layer_id, undo = half_made(kit, "clone of a snapshot")
    with pytest.raises(DiedError):
        undo(on(kit, dies_after("rmdir", layer_id)))
    read_names = index_module.read_names

    def unreadable(*arguments: Any, **options: Any) -> index_module.Names:
        found = read_names(*arguments, **options)
        found.unreadable["some"] = "cannot be read"
        return found

    monkeypatch.setattr(index_module, "read_names", unreadable)
    rounds = list(itertools.islice(collector.collect(kit.store, tools(), merges=True), 100))
    assert 0 < len(rounds) < 20
