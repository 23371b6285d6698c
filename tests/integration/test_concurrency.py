"""Eight callers with random calls on five volume names at once, over gRPC, with one controller process and with two.

The recorded history of each name must be linearizable (tests/integration/linearizability.py); every call returns within
its deadline; afterwards each name can be worked on, and nothing is left. The checker is tested first.

`make soak` runs a minute of each (CSI_QUOBYTE_CONCURRENCY_S), `make test` some seconds.
"""

import os
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from linearizability import NOTHING, Call, family, first_impossible, without_early_looks
from running import GIB, Code, eventually, findings_left, listing, machine_of

from csi_quobyte import __version__
from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pb import csi_pb2_grpc
from csi_quobyte.pool import records
from csi_quobyte.pool.records import NodeRecord
from csi_quobyte.pool.store import Store
from lab.client import Client, block_capability
from lab.machine import NODE_ID, Machine, wait_for

SEED = int(os.environ.get("CSI_QUOBYTE_SEED", "0")) or random.SystemRandom().randrange(1 << 31)
DURATION_S = float(os.environ.get("CSI_QUOBYTE_CONCURRENCY_S", "5"))
CALLERS = 8
NAMES = tuple(f"name-{number}" for number in range(5))
DEADLINE_S = 30.0
_SIZES = (GIB, 2 * GIB, 3 * GIB)
_BLOCK = block_capability()

# --- the checker -----------------------------------------------------------------------------------------------


def call(method: str, began: float, ended: float, *argument: Any, code: str = "OK", answer: Any = None) -> Call:
    return Call(method, began, ended, code, argument, answer)


CREATED = call("create", 0, 1, GIB, answer=GIB)
LINEARIZABLE: dict[str, list[Call]] = {
    "nothing": [],
    "one after the other": [
        CREATED,
        call("attach", 2, 3, answer=1),
        call("delete", 4, 5, "volume", code="FAILED_PRECONDITION"),
        call("detach", 6, 7),
        call("attach", 8, 9, answer=2),
        call("detach", 10, 11),
        call("delete", 12, 13, "volume"),
        call("look", 14, 15, "volume", code="NOT_FOUND"),
    ],
    "a look beside a create sees either": [
        call("create", 0, 10, GIB, answer=GIB),
        call("look", 1, 2, "volume", code="NOT_FOUND"),
        call("look", 3, 4, "volume", answer=(GIB, False)),
    ],
    "aborted and it happened": [
        call("create", 0, 5, GIB, code="ABORTED"),
        call("look", 6, 7, "volume", answer=(GIB, False)),
    ],
    "aborted and nothing happened": [
        call("create", 0, 5, GIB, code="ABORTED"),
        call("look", 6, 7, "volume"),
    ],
    "unavailable and it happens later": [
        call("create", 0, 1, GIB, code="UNAVAILABLE"),
        call("look", 2, 3, "volume"),
        call("look", 4, 5, "volume", answer=(GIB, False)),
    ],
    "the snapshot of a name that was used again": [
        CREATED,
        call("snapshot", 2, 3, "first", answer=GIB),
        call("delete", 4, 5, "volume"),
        call("expand", 6, 7, 2 * GIB, code="NOT_FOUND"),
        call("snapshot", 8, 9, "first", answer=GIB),
        call("snapshot", 10, 11, "second", code="NOT_FOUND"),
        call("clone", 12, 13, "first", answer=GIB),
        call("clone", 14, 15, "second", code="ALREADY_EXISTS"),
    ],
    "a detach beside an attach comes after it": [
        CREATED,
        call("attach", 2, 4, answer=1),
        call("detach", 3, 5),
        call("delete", 6, 7, "volume"),
    ],
    "a snapshot is deleted while a clone of it is made, which is seen when it is there": [
        CREATED,
        call("snapshot", 2, 3, "first", answer=GIB),
        call("clone", 4, 20, "first", answer=GIB),
        call("delete", 5, 6, "first"),
        call("look", 7, 8, "clone"),
        call("look", 21, 22, "clone", answer=(GIB, False)),
    ],
    "two callers expand": [
        CREATED,
        call("expand", 2, 9, 3 * GIB, answer=3 * GIB),
        call("expand", 3, 8, 2 * GIB, answer=2 * GIB),
        call("look", 10, 11, "volume", answer=(3 * GIB, False)),
    ],
}
IMPOSSIBLE: dict[str, list[Call]] = {
    "an acknowledged volume is gone": [CREATED, call("look", 2, 3, "volume", code="NOT_FOUND")],
    "a deleted volume comes back": [
        CREATED,
        call("delete", 2, 3, "volume"),
        call("look", 4, 5, "volume"),
        call("look", 6, 7, "volume", answer=(GIB, False)),
    ],
    "a lost expansion": [
        CREATED,
        call("expand", 2, 3, 2 * GIB, answer=2 * GIB),
        call("look", 4, 5, "volume", answer=(GIB, False)),
    ],
    "two attachments with one number": [
        CREATED,
        call("attach", 2, 3, answer=1),
        call("detach", 4, 5),
        call("attach", 6, 7, answer=1),
    ],
    "an aborted call happens after its end": [
        call("create", 0, 1, GIB, code="ABORTED"),
        call("look", 2, 3, "volume"),
        call("look", 4, 5, "volume", answer=(GIB, False)),
    ],
    "a snapshot of an attached volume": [
        CREATED,
        call("attach", 2, 3, answer=1),
        call("snapshot", 4, 5, "first", answer=GIB),
    ],
    "a snapshot that is smaller than the volume was": [
        CREATED,
        call("expand", 2, 3, 2 * GIB, answer=2 * GIB),
        call("snapshot", 4, 5, "first", answer=GIB),
    ],
    "looks that go back in time": [
        call("create", 0, 10, GIB, answer=GIB),
        call("look", 1, 2, "volume", answer=(GIB, False)),
        call("look", 3, 4, "volume"),
    ],
    "a clone that was made is missing, though its snapshot was deleted meanwhile": [
        CREATED,
        call("snapshot", 2, 3, "first", answer=GIB),
        call("clone", 4, 7, "first", answer=GIB),
        call("delete", 5, 6, "first"),
        call("look", 8, 9, "clone"),
    ],
    "a clone of a snapshot that was deleted before": [
        CREATED,
        call("snapshot", 2, 3, "first", answer=GIB),
        call("delete", 4, 5, "first"),
        call("clone", 6, 9, "first", answer=GIB),
    ],
    "a clone goes and comes while it is made": [
        CREATED,
        call("clone", 2, 9, "volume", answer=GIB),
        call("look", 3, 4, "clone", answer=(GIB, False)),
        call("look", 5, 6, "clone"),
    ],
    "a clone of what is not there": [CREATED, call("clone", 2, 3, "first", answer=GIB)],
    "a code that the model does not know": [call("create", 0, 1, GIB, code="INTERNAL")],
}


@pytest.mark.parametrize("name", LINEARIZABLE)
def test_checker_accepts(name: str) -> None:
    assert first_impossible(without_early_looks(LINEARIZABLE[name]), NOTHING, family) is None


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_checker_refuses(name: str) -> None:
    calls = IMPOSSIBLE[name]
    assert first_impossible(without_early_looks(calls), NOTHING, family) == calls[-1]


def test_checker_is_quick_with_eight_callers() -> None:
    """The most that can be open at once: half of it aborted."""
    dice = random.Random(1)
    calls = []
    for began in range(0, 400, 8):
        for caller in range(CALLERS):
            code = "ABORTED" if caller % 2 else "OK"
            size = dice.choice(_SIZES)
            made = call("expand", began + caller * 0.1, began + 7, size, code="NOT_FOUND")
            calls.append(made if code == "OK" else replace(made, code=code))
    started = time.monotonic()
    assert first_impossible(calls, NOTHING, family) is None
    assert time.monotonic() - started < 10


# --- callers ---------------------------------------------------------------------------------------------------


class Caller:
    """One caller: makes random calls on one controller until the time is over, and writes down what it sees."""

    def __init__(self, client: Client, prefix: str, number: int) -> None:
        self._client = client
        self._prefix = prefix
        self._dice = random.Random(f"{SEED} {number}")
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self.codes: Counter[str] = Counter()

    def id_of(self, name: str, what: str) -> str:
        return id_of(self._prefix, name, what)

    def run(self, until: float) -> None:
        """Make calls until this moment."""
        while time.monotonic() < until:
            name = self._dice.choice(NAMES)
            self._dice.choices(
                (self._create, self._delete, self._snapshot, self._clone, self._expand, self._attach, self._detach),
                (4, 4, 3, 3, 2, 3, 4),
            )[0](name)
            if self._dice.random() < 0.3:
                self._dice.choice((self._look, self._list_volumes, self._list_snapshots))(name)

    def _record(
        self, name: str, method: str, argument: tuple[Any, ...], make: Callable[[], Any], see: Callable[[Any], Any]
    ) -> None:
        began = time.monotonic()
        code, answer = "OK", None
        try:
            answer = see(make())
        except grpc.RpcError as error:
            code = error.code().name
            if "was detached a moment ago" in (error.details() or ""):
                self.codes[f"{method} {code}, too early"] += 1
                return  # refused before anything was done, for half a minute: the model knows no clock
        self.codes[f"{method} {code}"] += 1
        self.calls[name].append(Call(method, began, time.monotonic(), code, argument, answer))

    def _create(self, name: str) -> None:
        def make() -> Any:
            return self._client.create(name, GIB, capability=_BLOCK)

        self._record(name, "create", (GIB,), make, lambda made: made.capacity_bytes)

    def _delete(self, name: str) -> None:
        what = self._dice.choice(("volume", "clone", "first", "second"))
        is_volume = what in {"volume", "clone"}
        delete = self._client.delete if is_volume else self._client.delete_snapshot
        self._record(name, "delete", (what,), lambda: delete(self.id_of(name, what)), lambda _: None)

    def _snapshot(self, name: str) -> None:
        what = self._dice.choice(("first", "second"))

        def make() -> Any:
            return self._client.snapshot(f"{name}-{what}", self.id_of(name, "volume"))

        self._record(name, "snapshot", (what,), make, lambda made: made.size_bytes)

    def _clone(self, name: str) -> None:
        what = self._dice.choice(("volume", "first", "second"))
        source = {"volume" if what == "volume" else "snapshot": self.id_of(name, what)}

        def make() -> Any:
            return self._client.create(f"{name}-clone", 0, capability=_BLOCK, **source)  # type: ignore[arg-type]

        self._record(name, "clone", (what,), make, lambda made: made.capacity_bytes)

    def _expand(self, name: str) -> None:
        size = self._dice.choice(_SIZES)
        self._record(name, "expand", (size,), lambda: self._client.expand(self.id_of(name, "volume"), size), int)

    def _attach(self, name: str) -> None:
        def make() -> Any:
            return self._client.attach(self.id_of(name, "volume"), capability=_BLOCK)

        self._record(name, "attach", (), make, lambda context: int(context["generation"]))

    def _detach(self, name: str) -> None:
        self._record(name, "detach", (), lambda: self._client.detach(self.id_of(name, "volume")), lambda _: None)

    def _look(self, name: str) -> None:
        what = self._dice.choice(("volume", "clone"))
        request = csi.ControllerGetVolumeRequest(volume_id=self.id_of(name, what))

        def make() -> Any:
            return self._client.controller.ControllerGetVolume(request, timeout=DEADLINE_S)

        self._record(
            name, "look", (what,), make,
            lambda seen: (seen.volume.capacity_bytes, bool(seen.status.published_node_ids)),
        )  # fmt: skip

    def _list_volumes(self, _: str) -> None:
        began = time.monotonic()
        entries = self._client.controller.ListVolumes(csi.ListVolumesRequest(), timeout=DEADLINE_S).entries
        found = {
            entry.volume.volume_id: (entry.volume.capacity_bytes, bool(entry.status.published_node_ids))
            for entry in entries
        }
        self._listed(began, found, ("volume", "clone"))

    def _list_snapshots(self, _: str) -> None:
        began = time.monotonic()
        entries = self._client.controller.ListSnapshots(csi.ListSnapshotsRequest(), timeout=DEADLINE_S).entries
        found = {entry.snapshot.snapshot_id: (entry.snapshot.size_bytes, False) for entry in entries}
        self._listed(began, found, ("first", "second"))

    def _listed(self, began: float, found: dict[str, tuple[int, bool]], kinds: tuple[str, ...]) -> None:
        """A list is no snapshot of the pool: it is one look at each object."""
        ended = time.monotonic()
        self.codes["list OK"] += 1
        for name in NAMES:
            for what in kinds:
                seen = found.get(self.id_of(name, what))
                self.calls[name].append(Call("look", began, ended, "OK", (what,), seen))


def id_of(prefix: str, name: str, what: str) -> str:
    if what in {"first", "second"}:
        return records.snapshot_id(prefix, f"{name}-{what}")
    return records.volume_id(prefix, name if what == "volume" else f"{name}-clone")


def run_callers(clients: list[Client], prefix: str, duration_s: float) -> list[Caller]:
    """Let the callers run, each on one of the controllers."""
    callers = [Caller(clients[number % len(clients)], prefix, number) for number in range(CALLERS)]
    failed: list[BaseException] = []

    def run(caller: Caller) -> None:
        try:
            caller.run(time.monotonic() + duration_s)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=run, args=(caller,), daemon=True) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(duration_s + 3 * DEADLINE_S)
        assert not thread.is_alive(), "a call does not return"
    assert not failed, failed
    return callers


def check_histories(callers: list[Caller]) -> int:
    """Check the history of each name; gives how many calls and looks there were."""
    total = 0
    for name in NAMES:
        recorded = sorted((each for caller in callers for each in caller.calls[name]), key=lambda each: each.began)
        calls = without_early_looks(recorded)
        total += len(calls)
        wrong = first_impossible(calls, NOTHING, family)
        if wrong:
            before = [each for each in calls if each.began < wrong.ended][-40:]
            said = "\n".join(map(str, before))
            raise AssertionError(f"{name}: no order explains {wrong}, seed {SEED}; the calls before its end:\n{said}")
    return total


def empty(client: Client, prefix: str) -> None:
    """Show that each name can be worked on, and take everything away."""
    for name in NAMES:
        volume, clone = (id_of(prefix, name, what) for what in ("volume", "clone"))
        eventually(client.detach, volume, timeout_s=DEADLINE_S)
        for what in ("first", "second"):
            eventually(client.delete_snapshot, id_of(prefix, name, what), timeout_s=DEADLINE_S)
        for each in (clone, volume):
            eventually(client.delete, each, timeout_s=DEADLINE_S)
        eventually(client.create, name, GIB, capability=_BLOCK, timeout_s=DEADLINE_S)
        snapshot = eventually(client.snapshot, f"{name}-first", volume, timeout_s=DEADLINE_S)
        eventually(client.delete_snapshot, snapshot.snapshot_id, timeout_s=DEADLINE_S)
        eventually(client.attach, volume, capability=_BLOCK, timeout_s=DEADLINE_S)
        eventually(client.detach, volume, timeout_s=DEADLINE_S)
        eventually(client.delete, volume, timeout_s=DEADLINE_S)


@pytest.fixture
def machine() -> Iterator[Machine]:
    with machine_of() as made:
        made.start_controller()
        yield made


def prepare(machine: Machine) -> str:
    """Make the node known, without a node process; gives the pool's prefix."""
    store = Store(str(machine.pool_path))
    store.put_node(NodeRecord(id=NODE_ID, driver_version=__version__, started_at=records.now()))
    store.close()
    return store.prefix


@pytest.mark.root
@pytest.mark.timeout(600)
@pytest.mark.parametrize("controllers", [1, 2])
def test_history_of_concurrent_calls_is_linearizable(machine: Machine, controllers: int) -> None:
    prefix = prepare(machine)
    clients = [Client(machine)]
    if controllers == 2:
        machine.start_another_controller("c2.sock")
        clients.append(Client(machine))
        clients[1].controller = csi_pb2_grpc.ControllerStub(machine.channel("c2.sock"))
    directory = next(iter(machine.directories.values()))
    as_new = listing(directory)
    callers = run_callers(clients, prefix, DURATION_S)
    codes = sum((caller.codes for caller in callers), Counter[str]())
    print(f"{controllers} controllers, seed {SEED}: {dict(sorted(codes.items()))}")
    late = [name for name in codes if name.endswith(Code.DEADLINE_EXCEEDED.name)]
    assert not late, f"calls did not return within {DEADLINE_S:g} s: {late}"
    started = time.monotonic()
    total = check_histories(callers)
    print(f"{total} calls and looks checked in {time.monotonic() - started:.1f} s")
    assert sum(count for name, count in codes.items() if name.endswith(" OK")) > 10 * CALLERS
    empty(clients[-1], prefix)
    assert findings_left(machine, timeout_s=60) == []

    def is_as_new() -> bool:
        return [path for path in listing(directory) if not path.startswith("collector.json")] == as_new

    wait_for("the pool to be as new", is_as_new, timeout_s=60)
