"""The walls between pools: a hung one, one that was remounted, one that is not there, ids of unknown pools."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from controller_kit import OWNER

from csi_quobyte.config import PoolSpec
from csi_quobyte.errors import Busy, Corrupt, InvalidArgument, NotFound, Unavailable
from csi_quobyte.pool import layout, records
from csi_quobyte.pool.pools import WORKERS, Pool, Pools
from csi_quobyte.pool.store import Store

TIMEOUT_S = 0.3
DEADLINE_S = 10.0


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set at the end of the test, so that no thread stays hung."""
    event = threading.Event()
    yield event
    event.set()


def make_pool(root: Path) -> str:
    root.mkdir(exist_ok=True)
    return layout.initialise(str(root), owner=OWNER, modes=records.Modes()).prefix


def open_pools(*roots: Path) -> Pools:
    specs = [PoolSpec(root.name, str(root)) for root in roots]
    return Pools(specs, require_mount="any", timeout_s=TIMEOUT_S)


def test_work_that_hangs_is_abandoned_in_time_and_keeps_its_lock(tmp_path: Path, released: threading.Event) -> None:
    make_pool(tmp_path / "a")
    pool = open_pools(tmp_path / "a").all[0]
    ended = threading.Event()

    def hang(store: Store) -> None:
        with store.lock("x"):
            released.wait(DEADLINE_S)
        ended.set()

    started = time.monotonic()
    with pytest.raises(Unavailable, match="pool a"):
        pool.run(hang)
    assert time.monotonic() - started < TIMEOUT_S + 2

    def take(store: Store) -> None:
        with store.lock("x"):
            pass

    with pytest.raises(Busy):
        pool.run(take)
    released.set()
    assert ended.wait(DEADLINE_S), "the abandoned work did not go on to its end"
    pool.run(take)


def test_hung_pool_does_not_stop_another(tmp_path: Path, released: threading.Event) -> None:
    for name in ("a", "b"):
        make_pool(tmp_path / name)
    hung, well = open_pools(tmp_path / "a", tmp_path / "b").all
    begun = threading.Semaphore(0)

    def hang(store: Store) -> None:
        begun.release()
        released.wait(DEADLINE_S)

    def call() -> None:
        with pytest.raises(Unavailable):
            hung.run(hang)

    callers = [threading.Thread(target=call) for _ in range(WORKERS)]
    for caller in callers:
        caller.start()
    for _ in callers:
        assert begun.acquire(timeout=DEADLINE_S)
    assert well.run(lambda store: store.prefix) == well.prefix
    with pytest.raises(Unavailable):
        hung.run(lambda store: store.prefix)
    for caller in callers:
        caller.join(DEADLINE_S)
    released.set()
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            assert hung.run(lambda store: store.prefix) == hung.prefix
            break
        except Unavailable:
            assert time.monotonic() < deadline, "the pool does not recover"


def test_error_of_the_work_is_the_callers(tmp_path: Path) -> None:
    make_pool(tmp_path / "a")
    pool = open_pools(tmp_path / "a").all[0]
    with pytest.raises(NotFound):
        pool.run(lambda store: store.volume("00000000-vol-" + "0" * 32))


def test_health_tells_why_and_recovers(tmp_path: Path) -> None:
    pool = open_pools(tmp_path / "a").all[0]
    assert not pool.health().ok
    assert "pool init" in pool.health().reason
    with pytest.raises(Unavailable):
        pool.run(lambda _: None)
    make_pool(tmp_path / "a")
    assert pool.health().ok


def test_health_of_a_hung_pool_is_told_in_time_and_asked_once(
    tmp_path: Path, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pool(tmp_path / "a")
    pool = open_pools(tmp_path / "a").all[0]
    looks = []

    def hang(self: Pool) -> Store:
        looks.append(1)
        released.wait(DEADLINE_S)
        raise Unavailable("hung")

    monkeypatch.setattr(Pool, "open", hang)
    for _ in range(3):
        found = pool.health(wait_s=0.1)
        assert not found.ok
        assert "has not answered" in found.reason
    assert len(looks) == 1


def test_pool_is_opened_again_after_a_remount(tmp_path: Path) -> None:
    root = tmp_path / "a"
    make_pool(root)
    pool = open_pools(root).all[0]
    first = pool.run(lambda store: store)
    assert pool.run(lambda store: store) is first
    # what a remount changes is the identity of the file that was looked at; the pool is the same
    data = (root / "format.json").read_bytes()
    (root / "format.json.new").write_bytes(data)
    (root / "format.json.new").rename(root / "format.json")
    second = pool.run(lambda store: store)
    assert second is not first
    assert second.prefix == first.prefix


def test_other_pool_under_the_path_is_refused_and_costs_no_descriptor(tmp_path: Path) -> None:
    root = tmp_path / "a"
    make_pool(root)
    pool = open_pools(root).all[0]
    pool.run(lambda _: None)
    root.rename(tmp_path / "away")
    make_pool(root)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(Corrupt, match="another pool"):
            pool.run(lambda _: None)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_vanished_pool_is_unavailable_and_served_again_when_it_is_back(tmp_path: Path) -> None:
    root = tmp_path / "a"
    make_pool(root)
    pool = open_pools(root).all[0]
    pool.run(lambda _: None)
    root.rename(tmp_path / "away")
    root.mkdir()
    with pytest.raises(Unavailable):
        pool.run(lambda _: None)
    assert not pool.health().ok
    root.rmdir()
    (tmp_path / "away").rename(root)
    pool.run(lambda _: None)
    assert pool.health().ok


def test_path_that_is_no_quobyte_mount_is_unavailable(tmp_path: Path) -> None:
    make_pool(tmp_path / "a")
    pool = Pools([PoolSpec("a", str(tmp_path / "a"))], require_mount="quobyte", timeout_s=TIMEOUT_S).all[0]
    with pytest.raises(Unavailable, match="not a mount point"):
        pool.run(lambda _: None)


# --- whose is an id --------------------------------------------------------------------------------------------


def test_id_is_found_in_its_pool_also_before_any_other_call(tmp_path: Path) -> None:
    prefixes = [make_pool(tmp_path / name) for name in ("a", "b")]
    pools = open_pools(tmp_path / "a", tmp_path / "b")
    for pool, prefix in zip(pools.all, prefixes, strict=True):
        assert pools.find_owner(records.volume_id(prefix, "x")) is pool


def test_id_of_an_unknown_pool_is_unavailable_and_never_missing(tmp_path: Path) -> None:
    make_pool(tmp_path / "a")
    pools = open_pools(tmp_path / "a", tmp_path / "not-mounted")
    for find in (pools.find_owner, lambda record_id: pools.owner(record_id, "volume")):
        with pytest.raises(Unavailable, match="not configured here or not mounted"):
            find(records.volume_id("00000000", "x"))


@pytest.mark.parametrize("record_id", ["", "x", "../../etc/passwd", "00000000-vol-xyz"])
def test_id_that_cannot_be_ours_has_no_owner(tmp_path: Path, record_id: str) -> None:
    make_pool(tmp_path / "a")
    pools = open_pools(tmp_path / "a")
    assert pools.find_owner(record_id) is None
    with pytest.raises(NotFound):
        pools.owner(record_id, "volume")


def test_copy_of_a_pool_is_corrupt(tmp_path: Path) -> None:
    prefix = make_pool(tmp_path / "a")
    make_pool(tmp_path / "b")
    (tmp_path / "b" / "format.json").write_bytes((tmp_path / "a" / "format.json").read_bytes())
    pools = open_pools(tmp_path / "a", tmp_path / "b")
    for pool in pools.all:
        pool.health()
    with pytest.raises(Corrupt, match="copy"):
        pools.find_owner(records.volume_id(prefix, "x"))


def test_pool_parameter_is_needed_with_several_pools_only(tmp_path: Path) -> None:
    one, two = open_pools(tmp_path / "a"), open_pools(tmp_path / "a", tmp_path / "b")
    assert one.named("").name == "a"
    assert two.named("b").name == "b"
    for pools, name in ((two, ""), (one, "c")):
        with pytest.raises(InvalidArgument, match="a"):
            pools.named(name)
