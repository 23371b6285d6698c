"""Capacity: the formula, GetCapacity against what create accepts, and a pool that really is full: an ext4 of 24 MiB."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from controller_kit import Kit, tree

from csi_quobyte.errors import Exhausted, Unavailable
from csi_quobyte.operations.capacity import Provisioned, available_bytes
from csi_quobyte.pool import records
from csi_quobyte.pool.layout import SHARDS
from csi_quobyte.pool.records import PoolSettings
from csi_quobyte.pool.sizes import GIB, MIB, SizeRange, human
from csi_quobyte.pool.store import Store

Spaced = Callable[..., Kit]


@pytest.fixture
def spaced(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Spaced:
    """Let the pool say that it has a certain space, and give it settings."""

    def make(total: int, available: int, *, reserved: int = 0, over: float = 20.0) -> Kit:
        settings = PoolSettings(reservedPercentage=reserved, maxOverSubscription=over)
        kit.store.format = replace(kit.store.format, settings=settings)
        monkeypatch.setattr(kit.store, "space", lambda: (total, available))
        return kit

    return make


@pytest.mark.parametrize(
    ("total", "available", "reserved", "over", "provisioned", "thin", "thick"),
    [
        (100, 100, 0, 20.0, 0, 2000, 100),
        (100, 60, 0, 20.0, 0, 1200, 60),
        (100, 60, 0, 20.0, 1900, 100, 60),
        (100, 60, 0, 20.0, 1960, 40, 40),
        (100, 60, 0, 20.0, 2500, 0, 0),
        (100, 60, 10, 20.0, 0, 1000, 50),
        (100, 60, 10, 2.0, 100, 80, 50),
        (100, 5, 10, 20.0, 0, 0, 0),
        (100, 60, 0, 1.0, 0, 60, 60),
    ],
)
def test_formula(
    spaced: Spaced, total: int, available: int, reserved: int, over: float, provisioned: int, thin: int, thick: int
) -> None:
    kit = spaced(total * GIB, available * GIB, reserved=reserved, over=over)
    known = Provisioned()
    known.total_bytes(kit.store)
    known.add(kit.store, records.volume_id(kit.store.prefix, "v"), provisioned * GIB)
    assert available_bytes(kit.store, known, "off") == thin * GIB
    assert available_bytes(kit.store, known, "metadata") == thin * GIB
    assert available_bytes(kit.store, known, "falloc") == thick * GIB


@pytest.mark.parametrize("available", [64 * MIB, 64 * MIB + 1, 65 * MIB - 1])
def test_S25_create_accepts_exactly_what_capacity_says(spaced: Spaced, available: int) -> None:
    kit = spaced(GIB, available, over=3.0)
    left = available_bytes(kit.store, kit.provisioned, "off")
    before = tree(kit.store.root)
    with pytest.raises(Exhausted, match=f"{human(left)} are left"):
        kit.create("v", size=SizeRange(left + MIB))
    assert tree(kit.store.root) == before
    assert kit.create("v", size=SizeRange(left)).size_bytes == left


def test_provisioned_follows_what_is_made_grown_and_deleted(spaced: Spaced) -> None:
    kit = spaced(GIB, GIB, over=1.0)
    steps: list[tuple[Callable[[], object], int]] = [
        (lambda: kit.create("v", size=SizeRange(100 * MIB)), 924),
        (lambda: kit.create("v", size=SizeRange(100 * MIB)), 924),
        (lambda: kit.expand("v", 200 * MIB), 824),
        (lambda: kit.create("c", source=kit.from_volume("v")), 624),
        (lambda: kit.snapshot("s", of="v"), 624),
        (lambda: kit.delete("v"), 824),
        (lambda: kit.delete("v"), 824),
        (lambda: kit.delete("c"), 1024),
    ]
    for step, left in steps:
        step()
        assert available_bytes(kit.store, kit.provisioned, "off") == left * MIB
        assert available_bytes(kit.store, Provisioned(), "off") == left * MIB


def test_expand_beyond_what_is_left_is_exhausted(spaced: Spaced) -> None:
    kit = spaced(GIB, GIB, over=1.0)
    volume = kit.create("v", size=SizeRange(100 * MIB))
    with pytest.raises(Exhausted):
        kit.expand("v", 1025 * MIB)
    assert kit.store.volume(volume.id) == volume
    assert kit.expand("v", 1024 * MIB).size_bytes == GIB


def eventually(known: Provisioned, kit: Kit) -> int:
    """Give the sum after the count that is due now: on a busy machine no call may have waited for it."""
    known.total_bytes(kit.store)
    deadline = time.monotonic() + 10
    while any(thread.name == "count" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return known.total_bytes(kit.store)


def test_other_processes_volumes_are_counted_after_a_minute(kit: Kit) -> None:
    now = 0.0
    known = Provisioned(clock=lambda: now)
    assert known.total_bytes(kit.store) == 0
    kit.create("v", size=SizeRange(GIB))
    now = 59.0
    assert known.total_bytes(kit.store) == 0
    now = 61.0
    assert eventually(known, kit) == GIB


def test_a_long_count_is_waited_for_by_no_call(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    known = Provisioned(clock=lambda: now)
    volume = kit.create("v", size=SizeRange(GIB))
    assert known.total_bytes(kit.store) == GIB
    read, go_on, ended = Store.volume_sizes, threading.Event(), threading.Event()

    def slow(store: Store, shard: str) -> Iterator[int]:
        if shard == SHARDS[-1]:
            go_on.wait(30)
            ended.set()
        return read(store, shard)

    monkeypatch.setattr(Store, "volume_sizes", slow)
    kit.expand("v", 2 * GIB)  # not through `known`: as another process does it
    now = 61.0
    begun = time.monotonic()
    sums = {known.total_bytes(kit.store) for _ in range(3)}
    assert time.monotonic() - begun < 10
    assert not ended.is_set()
    assert sums <= {GIB, 2 * GIB}
    known.add(kit.store, volume.id, GIB)  # while the count runs
    go_on.set()
    assert ended.wait(10)
    assert eventually(known, kit) in {2 * GIB, 3 * GIB}  # by whether it had been counted when it was added
    now = 122.0
    assert eventually(known, kit) == 2 * GIB


def test_only_directories_that_changed_are_counted_again(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    known = Provisioned(clock=lambda: now)
    kit.create("v", size=SizeRange(GIB))
    assert eventually(known, kit) == GIB
    now = 61.0
    assert eventually(known, kit) == GIB
    read, shards = Store.volume_sizes, []

    def noted(store: Store, shard: str) -> Iterator[int]:
        shards.append(shard)
        return read(store, shard)

    monkeypatch.setattr(Store, "volume_sizes", noted)
    now = 122.0
    assert eventually(known, kit) == GIB
    assert shards == []
    other = kit.create("w", size=SizeRange(GIB))
    now = 183.0
    assert eventually(known, kit) == 2 * GIB
    assert shards == [records.shard_of(other.id)]
    now = 3700.0
    assert eventually(known, kit) == 2 * GIB
    assert len(shards) == 1 + len(SHARDS)


def test_a_pool_that_cannot_be_counted_is_unavailable(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(store: Store, folder: str, shard: str) -> int:
        raise Unavailable("gone")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "changed_ns", gone)
        known = Provisioned()
        with pytest.raises(Unavailable, match="gone"):
            known.total_bytes(kit.store)
    assert known.total_bytes(kit.store) == 0


# --- a full pool -----------------------------------------------------------------------------------------------


def fill(root: str) -> Path:
    """Take all the space that is left, to the last block."""
    path = Path(root, "lost+found", "filler")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    for size in (MIB, 4096, 512):
        try:
            while True:
                os.write(fd, bytes(size))
                os.fsync(fd)
        except OSError:
            continue
    os.close(fd)
    return path


@pytest.mark.root
def test_full_pool_refuses_what_needs_space_leaves_nothing_and_lets_go(
    small: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tree(small.store.root)
    for name in ("v", "w", "attached"):
        small.create(name)
    small.write("v", 1)
    small.snapshot("s", of="v")
    small.write("v", 2)
    small.attach("attached")
    small.sweep_until_quiet()
    total = small.store.space()[0]
    monkeypatch.setattr(small.store, "space", lambda: (total, total))
    filler = fill(small.store.root)
    before = tree(small.store.root)
    for work in (
        lambda: small.create("n"),
        lambda: small.create("n", image_format="raw", preallocation="falloc"),
        lambda: small.create("n", source=small.from_snapshot("s")),
        lambda: small.create("n", source=small.from_volume("v")),
        lambda: small.snapshot("n", of="v"),
    ):
        with pytest.raises(Exhausted):
            work()
        assert tree(small.store.root) == before
    small.detach("attached")
    small.delete("attached")
    small.delete("w")
    small.delete_snapshot("s")
    filler.unlink()
    small.sweep_until_quiet()
    assert small.holds("v", 2)
    small.create("n", source=small.from_volume("v"))
    assert small.check() == []
    small.delete_everything()
    assert tree(small.store.root) == new


@pytest.mark.root
@pytest.mark.parametrize(
    ("image_format", "preallocation", "size"),
    [("raw", "falloc", 64 * MIB), ("qcow2", "falloc", 64 * MIB), ("qcow2", "metadata", 512 * GIB)],
)
def test_preallocation_that_does_not_fit_is_exhausted_and_leaves_nothing(
    small: Kit, monkeypatch: pytest.MonkeyPatch, image_format: str, preallocation: str, size: int
) -> None:
    monkeypatch.setattr(small.store, "space", lambda: (1 << 50, 1 << 50))
    small.sweep_until_quiet()
    before = tree(small.store.root)
    with pytest.raises(Exhausted):
        small.create("v", image_format=image_format, preallocation=preallocation, size=SizeRange(size))
    small.sweep_until_quiet()
    assert tree(small.store.root) == before
    small.create("v", image_format=image_format, preallocation=preallocation, size=SizeRange(MIB))
