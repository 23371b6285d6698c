"""cloneMode copy and cache: what it makes, in the background, and what is left when anything happens meanwhile.

A copy is made slow by a limit of 1 MiB/s where something has to happen while it runs.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import controller_kit
import pytest
from controller_kit import QEMU_DIR, SIZE_BYTES, Elsewhere, Kit, qemu_io, read_disk, tools, tree, write_disk
from gates import DiedError, Gate, dies_before

from csi_quobyte.config import PoolSpec
from csi_quobyte.engine import collector, copying
from csi_quobyte.engine import collector as collector_module
from csi_quobyte.engine.collector import Collector
from csi_quobyte.engine.copying import Copier
from csi_quobyte.errors import AlreadyExists, Busy, Exhausted, Refused, Unavailable
from csi_quobyte.host.qemu import QemuTools
from csi_quobyte.pool.pools import Pools
from csi_quobyte.pool.records import LayerState, VolumeState
from csi_quobyte.pool.sizes import MIB, SizeRange
from csi_quobyte.pool.store import Store

DATA_BYTES = 24 * MIB
SLOW_BYTES_PER_S = 1 << 20
PATIENCE_S = 30.0


def fill(kit: Kit, name: str, pattern: int, offset_bytes: int = 0, length_bytes: int = DATA_BYTES) -> None:
    disk = write_disk(kit.store, kit.store.volume(kit.volume_id(name)).head)
    qemu_io(disk, f"write -P {pattern} {offset_bytes} {length_bytes}", read_only=False)


def holds(kit: Kit, name: str, pattern: int, offset_bytes: int = 0, length_bytes: int = DATA_BYTES) -> bool:
    disk = read_disk(kit.store, kit.store.volume(kit.volume_id(name)).head)
    return qemu_io(disk, f"read -P {pattern} {offset_bytes} {length_bytes}", read_only=True) == 0


def allocated_bytes(kit: Kit, name: str) -> int:
    (head,) = kit.chain(name)
    found = kit.store.image_bytes(head)
    assert found
    return found[1]


def eventually(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def until_ready(kit: Kit, work: Callable[[], object]) -> int:
    """Repeat a call until it is not Busy, and give how often it was."""
    deadline = time.monotonic() + PATIENCE_S
    for times in range(100000):
        try:
            work()
        except Busy:
            assert time.monotonic() < deadline, "the copy does not end"
            time.sleep(0.05)
        else:
            return times
    return 0


@pytest.fixture
def slow(kit: Kit) -> Iterator[Kit]:
    """A controller whose copies take 24 s for the data of volume v (24 MiB), and that has its snapshot s."""
    kit.create("v", size=SizeRange(64 * MIB))
    fill(kit, "v", 7)
    kit.snapshot("s", of="v")
    copier = Copier(tools(), "main", first_wait_s=0.01, speed_bytes_per_s=SLOW_BYTES_PER_S)
    kit.copies = copier
    yield kit
    copier.stop(PATIENCE_S)


def quick(kit: Kit) -> None:
    """Let the copies that begin from now on be quick."""
    kit.copies = Copier(tools(), "main", first_wait_s=0.01)


def temporaries(kit: Kit) -> list[str]:
    return os.listdir(f"{kit.store.root}/tmp")


def copy_of_s(kit: Kit, name: str = "n", **changes: object) -> Callable[[], object]:
    return lambda: kit.create(name, source=kit.from_snapshot("s"), clone_mode="copy", **changes)


def begin(kit: Kit, work: Callable[[], object]) -> None:
    """Have a copy under way."""
    with pytest.raises(Busy):
        work()
    eventually(lambda: kit.store.progress(kit.store.volume(kit.volume_id("n")).head) is not None)


# --- what it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_format", "preallocation"),
    [("qcow2", "off"), ("qcow2", "metadata"), ("qcow2", "falloc"), ("raw", "off"), ("raw", "falloc")],
)
def test_copy_is_one_image_of_the_class_with_the_same_contents(kit: Kit, image_format: str, preallocation: str) -> None:
    kit.create("v", size=SizeRange(64 * MIB))
    kit.write("v", 1)
    kit.snapshot("older", of="v")
    kit.write("v", 2, block=1)
    kit.snapshot("s", of="v")
    kit.write("v", 3)
    made = copy_of_s(kit, image_format=image_format, preallocation=preallocation, size=SizeRange(96 * MIB))()
    assert made == kit.store.volume(kit.volume_id("n"))
    (head,) = kit.chain("n")
    assert (head.format, head.parent, head.state, head.size_bytes) == (image_format, None, LayerState.HEAD, 96 * MIB)
    assert kit.holds("n", 1, 2, 0)
    assert holds(kit, "n", 0, 64 * MIB, 32 * MIB)
    assert allocated_bytes(kit, "n") >= 96 * MIB if preallocation == "falloc" else allocated_bytes(kit, "n") < 2 * MIB
    kit.write("n", 9)
    assert kit.snapshot_holds("s", 1, 2, 0)
    assert kit.check() == []
    assert copy_of_s(kit, image_format=image_format, preallocation=preallocation, size=SizeRange(96 * MIB))() == made


def test_copy_does_not_hold_its_source(kit: Kit) -> None:
    new = tree(kit.store.root)
    kit.create("v")
    kit.write("v", 1)
    kit.create("n", source=kit.from_volume("v"), clone_mode="copy")
    kit.delete("v")
    kit.sweep_until_quiet()
    assert [layer.id for layer in kit.chain("n")] == list(kit.store.layer_ids())
    assert kit.holds("n", 1, 0)
    kit.delete_everything()
    assert tree(kit.store.root) == new


def test_copy_of_a_volume_takes_what_it_holds_now_and_refuses_an_attached_one(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.attach("v")
    with pytest.raises(Refused, match="attached"):
        kit.create("n", source=kit.from_volume("v"), clone_mode="copy")
    assert kit.store.find_volume(kit.volume_id("n")) is None
    kit.detach("v")
    kit.create("n", source=kit.from_volume("v"), clone_mode="copy")
    kit.write("v", 2)
    assert kit.holds("n", 1, 0)
    assert kit.holds("v", 2, 0)


def test_copy_and_overlay_are_different_requests(kit: Kit) -> None:
    kit.create("v")
    kit.snapshot("s", of="v")
    copy_of_s(kit)()
    with pytest.raises(AlreadyExists, match="cloneMode is copy, asked for overlay"):
        kit.create("n", source=kit.from_snapshot("s"))


# --- in the background -----------------------------------------------------------------------------------------


def test_call_answers_at_once_with_how_far_it_is_and_the_retry_gets_the_volume(kit: Kit) -> None:
    kit.create("v", size=SizeRange(64 * MIB))
    fill(kit, "v", 7, length_bytes=6 * MIB)
    kit.snapshot("s", of="v")
    kit.copies = Copier(tools(), "main", first_wait_s=0.01, speed_bytes_per_s=SLOW_BYTES_PER_S)
    began = time.monotonic()
    with pytest.raises(Busy):
        copy_of_s(kit)()
    assert time.monotonic() - began < 1.0
    volume = kit.store.volume(kit.volume_id("n"))
    assert (volume.state, volume.pinned) == (VolumeState.CREATING, True)
    with pytest.raises(Unavailable, match="not ready"):
        kit.attach("n")
    other = Store(kit.store.root)
    eventually(lambda: (other.progress(volume.head) or _NOTHING).current_bytes > 0)
    with pytest.raises(Busy, match=r"is at [0-9]+ % of 64 MiB"):
        copy_of_s(kit)()
    assert until_ready(kit, copy_of_s(kit)) > 0
    assert other.progress(volume.head) is None
    other.close()
    assert holds(kit, "n", 7, length_bytes=6 * MIB)
    assert temporaries(kit) == []
    assert kit.check() == []


class _NOTHING:
    current_bytes = 0


def test_small_copy_is_there_with_the_first_call(kit: Kit) -> None:
    kit.create("v")
    kit.snapshot("s", of="v")
    kit.copies = Copier(tools(), "main", first_wait_s=PATIENCE_S)
    copy_of_s(kit)()
    assert kit.store.volume(kit.volume_id("n")).state is VolumeState.READY


def test_deleting_a_volume_that_is_being_copied_stops_the_copy_and_undoes_it(slow: Kit) -> None:
    before = tree(slow.store.root)
    begin(slow, copy_of_s(slow))
    began = time.monotonic()
    slow.delete("n")
    assert time.monotonic() - began < 5.0
    slow.sweep_until_quiet()
    assert tree(slow.store.root) == before
    assert slow.check() == []


def test_deleting_from_another_controller_stops_the_copy_too(slow: Kit) -> None:
    before = tree(slow.store.root)
    begin(slow, copy_of_s(slow))
    other = Kit(Store(slow.store.root))
    other.delete("n")
    eventually(lambda: temporaries(slow) == [], 10.0)  # long before it would have ended
    slow.sweep_until_quiet()
    assert tree(slow.store.root) == before
    other.store.close()


def test_source_deleted_while_it_is_copied(slow: Kit) -> None:
    begin(slow, copy_of_s(slow))
    slow.delete_snapshot("s")
    slow.delete("v")
    slow.sweep_until_quiet()
    assert len(list(slow.store.layer_ids())) == 1
    slow.copies.stop(PATIENCE_S)
    quick(slow)
    until_ready(slow, copy_of_s(slow))
    assert holds(slow, "n", 7)
    slow.sweep_until_quiet()
    assert list(slow.store.layer_ids()) == [slow.chain("n")[0].id]
    assert slow.check() == []


def test_two_controllers_make_one_copy(slow: Kit) -> None:
    begin(slow, copy_of_s(slow))
    other = Kit(Store(slow.store.root))
    other.copies = Copier(tools(), "main", first_wait_s=5.0)
    with pytest.raises(Busy, match="another process"):
        copy_of_s(other)()
    assert (
        len([name for name in temporaries(slow) if Path(slow.store.root, "tmp", name).stat().st_size > MIB // 8]) == 1
    )
    slow.copies.stop(PATIENCE_S)
    until_ready(other, copy_of_s(other))
    assert holds(slow, "n", 7)
    other.store.close()


def test_collector_of_another_host_lets_a_copy_be(slow: Kit) -> None:
    begin(slow, copy_of_s(slow))
    far = Elsewhere(slow.store.root)
    before = sorted(temporaries(slow))
    collector.sweep(far)
    assert sorted(temporaries(slow)) == before
    assert far.progress(slow.store.volume(slow.volume_id("n")).head)
    far.close()


def without_locks(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The pool as another host sees it: neither tokens nor the locks of records reach there."""
    far = Elsewhere(kit.store.root)
    monkeypatch.setattr(far, "lock", lambda *_: _no_lock())
    return far


def test_collector_of_another_host_lets_the_making_of_a_cache_be(slow: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Busy):
        on_cache_of_s(slow)()
    eventually(lambda: bool(temporaries(slow)))
    snapshot = slow.store.snapshot(slow.snapshot_id("s"))
    assert snapshot.cache
    eventually(lambda: slow.store.progress(str(snapshot.cache)) is not None)
    far = without_locks(slow, monkeypatch)
    collector.sweep(far)
    assert slow.store.snapshot(snapshot.id).cache == snapshot.cache
    assert source_markers(slow)[0] == "c"
    far.close()


@pytest.mark.parametrize("is_made", [False, True])
def test_cache_that_another_host_gives_up_meanwhile_is_made_anew(
    kit: Kit, is_made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not said yet how far it is, or is about to publish the image, when the other host's collector looks."""
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    far = without_locks(kit, monkeypatch)
    make_layer, copy_chain = Store.make_layer, copying._copy_chain

    def look() -> None:
        monkeypatch.setattr(Store, "make_layer", make_layer)
        monkeypatch.setattr(copying, "_copy_chain", copy_chain)
        assert collector.sweep(far)

    def late_layer(*arguments: object, **named: object) -> object:
        look()
        return make_layer(*arguments, **named)  # type: ignore[arg-type]

    def late_copy(*arguments: object, **named: object) -> object:
        look()
        return copy_chain(*arguments, **named)  # type: ignore[arg-type]

    if is_made:
        monkeypatch.setattr(Store, "make_layer", late_layer)
    else:
        monkeypatch.setattr(copying, "_copy_chain", late_copy)
    with pytest.raises(Busy):
        on_cache_of_s(kit)()
    until_ready(kit, on_cache_of_s(kit))
    assert kit.holds("n", 1)
    kit.sweep_until_quiet()
    assert kit.check() == []
    assert source_markers(kit) == ["c", "s"]
    far.close()


def test_what_ended_in_both_controllers_at_once_is_made_by_one(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks do not reach, both copy; the second finds the image, and the record changed."""
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    publish = copying._publish

    def late(*arguments: object) -> object:
        monkeypatch.setattr(copying, "_publish", publish)
        other = Kit(Store(kit.store.root))
        monkeypatch.setattr(type(other.store), "lock", lambda *_: _no_lock())
        copy_of_s(other)()
        other.store.close()
        return publish(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(copying, "_publish", late)
    with pytest.raises(Busy):
        copy_of_s(kit)()
    monkeypatch.undo()
    assert kit.holds("n", 1)
    kit.sweep_until_quiet()
    assert kit.check() == []


class _no_lock:  # noqa: N801 - stands for a function
    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        return


# --- cache -----------------------------------------------------------------------------------------------------


def on_cache_of_s(kit: Kit, name: str = "n", **changes: object) -> Callable[[], object]:
    return lambda: kit.create(name, source=kit.from_snapshot("s"), clone_mode="cache", **changes)


def test_volumes_lie_on_one_flat_copy_that_lives_as_long_as_any_of_them(kit: Kit) -> None:
    new = tree(kit.store.root)
    kit.create("v")
    for block in range(3):
        kit.write("v", block + 1, block=block)
        kit.snapshot("s" if block == 2 else f"older-{block}", of="v")
    on_cache_of_s(kit)()
    on_cache_of_s(kit, "m", size=SizeRange(2 * SIZE_BYTES))()
    entry = kit.store.snapshot(kit.snapshot_id("s")).cache
    assert [layer.id for layer in kit.chain("n")[1:]] == [entry] == [layer.id for layer in kit.chain("m")[1:]]
    assert kit.chain("n")[1].state is LayerState.FROZEN
    assert kit.holds("n", 1, 2, 3)
    kit.write("n", 9)
    assert kit.holds("m", 1, 2, 3)
    kit.sweep_until_quiet()
    assert kit.check() == []
    kit.delete_snapshot("s")
    assert entry in kit.released
    kit.delete("v")
    kit.sweep_until_quiet()
    assert kit.holds("m", 1, 2, 3)
    kit.delete("m")
    kit.delete("n")
    kit.sweep_until_quiet()
    assert entry not in list(kit.store.layer_ids())
    kit.delete_everything()
    assert tree(kit.store.root) == new


def test_cache_nobody_uses_goes_with_its_snapshot(kit: Kit) -> None:
    kit.create("v")
    kit.snapshot("s", of="v")
    kit.sweep_until_quiet()
    on_cache_of_s(kit)()
    kit.delete("n")
    kit.sweep_until_quiet()
    entry = kit.store.snapshot(kit.snapshot_id("s")).cache
    assert entry in kit.store.layer_ids()
    kit.delete_snapshot("s")
    kit.sweep_until_quiet()
    assert entry not in kit.store.layer_ids()
    assert kit.check() == []


def test_first_users_at_once_share_one_copy(slow: Kit) -> None:
    for name in ("n", "m"):
        with pytest.raises(Busy):
            on_cache_of_s(slow, name)()
    eventually(lambda: slow.store.snapshot(slow.snapshot_id("s")).cache is not None)
    entry = slow.store.snapshot(slow.snapshot_id("s")).cache
    assert entry
    eventually(lambda: slow.store.progress(entry) is not None)
    with pytest.raises(Busy, match=r"has begun|is at"):
        on_cache_of_s(slow, "m")()
    assert len(temporaries(slow)) == 2  # the image, and how far it is
    assert slow.copies.stop(PATIENCE_S)
    quick(slow)
    for name in ("n", "m"):
        until_ready(slow, on_cache_of_s(slow, name))
        assert slow.chain(name)[1].id == entry
        assert holds(slow, name, 7)
    slow.sweep_until_quiet()
    assert slow.check() == []


def test_snapshot_deleted_while_it_is_flattened_leaves_nothing_of_that(slow: Kit) -> None:
    before = tree(slow.store.root)
    slow.snapshot("s2", of="v")
    with pytest.raises(Busy):
        slow.create("n", source=slow.from_snapshot("s2"), clone_mode="cache")
    eventually(lambda: len(temporaries(slow)) == 2)
    slow.delete_snapshot("s2")
    eventually(lambda: temporaries(slow) == [])
    slow.sweep_until_quiet()
    assert tree(slow.store.root) == before
    assert slow.check() == []


def test_of_a_volume_the_mode_cache_is_overlay(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.create("n", source=kit.from_volume("v"), clone_mode="cache")
    assert kit.chain("n")[1].id == kit.chain("v")[1].id
    assert kit.holds("n", 1)


# --- crashes and failures --------------------------------------------------------------------------------------

_COPY = """
import sys
from controller_kit import Kit, tools
from csi_quobyte.engine.copying import Copier
from csi_quobyte.pool.store import Store
kit = Kit(Store(sys.argv[1]))
kit.copies = Copier(tools(), "main", first_wait_s=1000, speed_bytes_per_s=1 << 20)
kit.create("n", source=kit.from_snapshot("s"), clone_mode="copy")
"""


def begin_and_kill(kit: Kit) -> str:
    """Kill the process that copies s to volume n in the middle of that; gives the head that n was to get."""
    argv = [sys.executable, "-c", _COPY, kit.store.root]
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": here})
    try:
        eventually(lambda: kit.store.find_volume(kit.volume_id("n")) is not None)
        head = kit.store.volume(kit.volume_id("n")).head
        eventually(lambda: (kit.store.progress(head) or _NOTHING).current_bytes > 0)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert temporaries(kit)
    return head


def test_copy_whose_process_is_killed_begins_again_with_the_retry(slow: Kit) -> None:
    head = begin_and_kill(slow)
    assert slow.store.progress(head) is None
    slow.sweep_until_quiet()
    assert temporaries(slow) == []
    assert slow.errors() == []
    quick(slow)
    until_ready(slow, copy_of_s(slow))
    assert holds(slow, "n", 7)
    slow.sweep_until_quiet()
    assert slow.check() == []


@contextmanager
def next_controller(kit: Kit) -> Iterator[tuple[Copier, Collector]]:
    """A controller that begins the copy n again, up to where that is whole."""
    copier = Copier(tools(), "main")
    pools = Pools([PoolSpec("main", kit.store.root)], require_mount="any", timeout_s=PATIENCE_S)
    collector = Collector(pools.all[0], tools(), resume=copier.resume)
    collector.start()
    try:
        eventually(lambda: kit.store.volume(kit.volume_id("n")).state is VolumeState.READY)
        assert holds(kit, "n", 7)
        yield copier, collector
    finally:
        assert collector.stop(PATIENCE_S)
        assert copier.stop(PATIENCE_S)


def test_copy_whose_process_is_killed_is_begun_again_by_the_next_controller(slow: Kit) -> None:
    begin_and_kill(slow)
    with next_controller(slow) as (copier, _):
        pass
    slow.sweep_until_quiet()
    assert slow.check() == []
    assert not copier.resume(slow.store, slow.volume_id("n"), slow.released.append), "there is nothing to be done"


def test_copy_that_is_under_way_is_not_begun_a_second_time(slow: Kit) -> None:
    begin(slow, copy_of_s(slow))
    other = Copier(tools(), "main")
    try:
        assert other.resume(slow.store, slow.volume_id("n"), slow.released.append), "it has to be asked again"
        assert other._jobs == {}
        slow.delete("n")
        assert not other.resume(slow.store, slow.volume_id("n"), slow.released.append)
    finally:
        assert other.stop(PATIENCE_S)
    slow.sweep_until_quiet()
    assert slow.check() == []


def source_markers(kit: Kit) -> list[str]:
    """The kinds of markers on the layer of snapshot s."""
    return [name[0] for name in kit.store.markers(kit.store.snapshot(kit.snapshot_id("s")).layer) or []]


def test_copy_of_a_host_that_died_a_moment_ago_is_begun_again_later(slow: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its note it may still be at work when the next controller starts, which therefore asks again."""
    begin_and_kill(slow)
    head = slow.store.volume(slow.volume_id("n")).head
    far = Elsewhere(slow.store.root)
    far.put_progress(head, 1, 2)
    far.close()
    monkeypatch.setattr(collector_module, "RESUME_EVERY_S", 0.1)
    monkeypatch.setattr("csi_quobyte.pool.store._NOTE_FRESH_S", 1.0)
    with next_controller(slow) as (_, collector):
        eventually(lambda: not collector._others_copies)


def test_cache_whose_process_is_killed_is_given_up_and_made_by_the_next_who_wants_it(slow: Kit) -> None:
    nobody_copies = source_markers(slow)
    argv = [sys.executable, "-c", _COPY.replace('"copy"', '"cache"'), slow.store.root]
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": here})
    try:
        eventually(lambda: len(temporaries(slow)) == 2)
        slow.sweep_until_quiet()
        assert len(temporaries(slow)) == 2, "one that is being made is left alone"
        assert source_markers(slow) == ["c", *nobody_copies]
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    slow.sweep_until_quiet()
    assert temporaries(slow) == []
    assert slow.store.snapshot(slow.snapshot_id("s")).cache is None
    assert source_markers(slow) == nobody_copies
    assert slow.check() == []
    quick(slow)
    until_ready(slow, on_cache_of_s(slow))
    assert holds(slow, "n", 7)
    slow.sweep_until_quiet()
    assert slow.check() == []


def test_end_of_the_controller_breaks_a_copy_off_at_once(slow: Kit) -> None:
    begin(slow, copy_of_s(slow))
    began = time.monotonic()
    assert slow.copies.stop(PATIENCE_S)
    assert time.monotonic() - began < 3.0
    assert temporaries(slow) == []
    with pytest.raises(Unavailable):
        copy_of_s(slow)()


@pytest.mark.root
def test_copy_that_does_not_fit_leaves_nothing_and_the_next_call_is_told(
    small: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small.store, "space", lambda: (1 << 50, 1 << 50))
    small.create("v", size=SizeRange(64 * MIB))
    fill(small, "v", 7, length_bytes=14 * MIB)
    small.snapshot("s", of="v")
    small.sweep_until_quiet()
    before = tree(small.store.root)
    copier = Copier(tools(), "main", first_wait_s=0.01)
    small.copies = copier
    with pytest.raises(Busy):
        copy_of_s(small)()
    eventually(lambda: small.store.find_volume(small.volume_id("n")) is None)
    eventually(lambda: bool(copier._failures))
    with pytest.raises(Exhausted):
        copy_of_s(small)()
    small.sweep_until_quiet()
    assert tree(small.store.root) == before
    assert small.check() == []
    with pytest.raises(Busy):  # the next one tries again
        copy_of_s(small)()
    copier.stop(PATIENCE_S)


@pytest.mark.parametrize("mode", ["copy", "cache"])
def test_copy_that_cannot_fit_is_not_begun(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """It would take the last space from the pods that write, and fail all the same."""
    kit.create("v")
    fill(kit, "v", 7, length_bytes=3 * MIB)
    kit.snapshot("s", of="v")
    kit.sweep_until_quiet()
    before = tree(kit.store.root)
    copier = kit.copies = Copier(other_convert(tmp_path, "exit 1"), "main", first_wait_s=10)  # type: ignore[assignment]
    monkeypatch.setattr(kit.store, "space", lambda: (64 * MIB, MIB))
    with pytest.raises(Exhausted, match="pool has 1 MiB left"):
        kit.create("n", source=kit.from_snapshot("s"), clone_mode=mode)
    copier.stop(10)
    kit.sweep_until_quiet()
    assert tree(kit.store.root) == before


def test_request_of_the_same_name_is_not_told_of_anothers_failure(kit: Kit) -> None:
    kit.create("v")
    kit.snapshot("s", of="v")
    copier = Copier(tools(), "main", first_wait_s=PATIENCE_S)
    kit.copies = copier
    failed = kit.create("n", source=kit.from_snapshot("s"))
    kit.delete("n")
    copier._remember(failed, Exhausted("full"))
    kit.create("n", size=SizeRange(SIZE_BYTES))
    assert copier.failure(failed.id) is None


# --- what qemu-img says, and what a client still shows ---------------------------------------------------------


def other_convert(directory: Path, instead: str) -> QemuTools:
    """Tools whose `qemu-img convert` is this line of shell, in which "$@" is the right command."""
    script = directory / "qemu-img"
    script.write_text(
        f'#!/bin/sh\nright={QEMU_DIR}/qemu-img\n[ "$1" = convert ] || exec "$right" "$@"\n'
        f'set -- "$right" "$@"\n{instead}\n'
    )
    script.chmod(0o755)
    return replace(tools(), qemu_img=str(script))


@pytest.mark.parametrize("mode", ["copy", "cache"])
def test_copy_whose_last_metadata_was_lost_is_not_acknowledged(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """QEMU ends with status 0 when the L2 tables that it writes at the very end cannot be written; it only says so."""
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    words = "qemu-img: Failed to flush the L2 table cache: Input/output error"
    bad = other_convert(tmp_path, f'"$@" && echo "{words}" >&2')
    monkeypatch.setattr(controller_kit, "tools", lambda: bad)
    with pytest.raises(Unavailable, match="L2 table"):
        kit.create("n", source=kit.from_snapshot("s"), clone_mode=mode)
    warned = other_convert(tmp_path, '"$@" && echo "qemu-img: warning: of no importance" >&2')
    monkeypatch.setattr(controller_kit, "tools", lambda: warned)
    kit.create("n", source=kit.from_snapshot("s"), clone_mode=mode)
    assert kit.holds("n", 1)


@pytest.mark.parametrize("words", ["No space left on device", "Disk quota exceeded"])
def test_copy_that_meets_a_quota_is_given_up_for_good(kit: Kit, tmp_path: Path, words: str) -> None:
    """statvfs(2) shows space all the time."""
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.sweep_until_quiet()
    before = tree(kit.store.root)
    full = other_convert(tmp_path, f'echo "qemu-img: error while writing at byte 0: {words}" >&2; exit 1')
    copier = kit.copies = Copier(full, "main", first_wait_s=10)  # type: ignore[assignment]
    with pytest.raises(Exhausted):
        copy_of_s(kit)()
    copier.stop(10)
    assert tree(kit.store.root) == before


def test_copy_that_is_shown_a_record_of_a_second_ago_is_not_given_up(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge below the source was committed on another host; the source was deleted, which it may be."""
    kit.create("v")
    for number, name in enumerate(("keep", "middle", "s"), start=1):
        kit.write("v", number, block=number - 1)
        kit.snapshot(name, of="v")
    kit.delete_snapshot("middle")
    upper = kit.store.snapshot(kit.snapshot_id("s")).layer
    old = kit.store.layer(upper)
    assert Kit(Store(kit.store.root)).merge_all()
    until, right = time.monotonic() + 1.0, kit.store.find_layer
    monkeypatch.setattr(
        kit.store, "find_layer", lambda one: old if one == upper and time.monotonic() < until else right(one)
    )
    copier = kit.copies = Copier(tools(), "main", first_wait_s=0.01)  # type: ignore[assignment]
    with pytest.raises(Busy):
        copy_of_s(kit)()
    for snapshot in ("s", "keep"):
        kit.delete_snapshot(snapshot)
    kit.delete("v")
    until_ready(kit, copy_of_s(kit))
    copier.stop(10)
    assert kit.holds("n", 1, 2, 3)


def test_call_is_not_answered_with_an_earlier_volume_of_the_name(kit: Kit) -> None:
    """The job of the old one is in its last step while another controller has deleted it and begun a new one."""
    kit.create("v", size=SizeRange(64 * MIB))
    fill(kit, "v", 7)
    kit.snapshot("s", of="v")
    gate = Gate("unlink", ".refs/c-")
    one, two = Kit(Store(kit.store.root, observer=gate)), Kit(Store(kit.store.root))
    first = one.copies = Copier(tools(), "main", first_wait_s=0.01)  # type: ignore[assignment]
    second = two.copies = Copier(tools(), "main", first_wait_s=0.01, speed_bytes_per_s=SLOW_BYTES_PER_S)  # type: ignore[assignment]
    try:
        with pytest.raises(Busy):
            copy_of_s(one)()
        eventually(gate.reached.is_set)
        two.delete("n")
        with pytest.raises(Busy):
            copy_of_s(two)()
        with pytest.raises(Busy, match="earlier copy"):
            copy_of_s(one)()
    finally:
        gate.open()
        for copier in (first, second):
            copier.stop(10)


def test_failure_of_a_cache_is_not_told_of_a_snapshot_that_is_there_again(slow: Kit) -> None:
    slow.snapshot("s2", of="v", on_delete="trash", trash_retention_s=3600)
    for name in ("n", "n2"):  # both threads are busy
        with pytest.raises(Busy):
            copy_of_s(slow, name)()
    cached: dict[str, object] = {"source": slow.from_snapshot("s2"), "clone_mode": "cache"}
    with pytest.raises(Busy):
        slow.create("m", **cached)
    slow.delete_snapshot("s2")
    for name in ("n", "n2"):
        slow.delete(name)
    eventually(lambda: not slow.copies._jobs)  # type: ignore[attr-defined]
    slow.restore(slow.trashed("s2"))
    with suppress(Busy):
        slow.create("m", **cached)


def test_intent_on_a_cache_whose_snapshot_was_restored_meanwhile_is_begun_anew(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v", on_delete="trash", trash_retention_s=3600)
    on_cache_of_s(kit, "first")()
    with pytest.raises(DiedError):
        on_cache_of_s(Kit(Store(kit.store.root, observer=dies_before("touch", "/c-"))))()
    assert kit.store.volume(kit.volume_id("n")).state is VolumeState.CREATING
    kit.delete_snapshot("s")
    kit.restore(kit.trashed("s"))
    until_ready(kit, on_cache_of_s(kit))
    assert kit.holds("n", 1)
