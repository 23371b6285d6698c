"""Every operation, with every call that it makes on the pool's files failing: ENOSPC, EDQUOT, EIO, ENOTCONN.

Axes: operation × way to fail × call × what comes after. Wanted of each: the right class of error (final only when
nothing is left of the attempt), and after the fault a retry, or going on without one, leaves what it must: contents,
no error for `check`, a pool as new once all is deleted.
"""

import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from controller_kit import Kit, Tree, tree
from crash_runner import DELETES, IMAGES, OPERATIONS
from faulty_os import MODES, FaultyOs, Mode
from test_crash_steps import (  # the same pool, operations and questions as after a crash
    UNTOUCHED,
    check_all_deleted,
    check_contents,
    check_effect,
    check_pool,
    fresh,  # noqa: F401 - a fixture
    retry,
    template,  # noqa: F401 - a fixture
)

from csi_quobyte.errors import Busy, DriverError, Exhausted, Unavailable
from csi_quobyte.pool.store import Store

# How many calls of each operation fail in each way: `make faults` sets 0, all of them; otherwise some, by the seed.
CALLS = int(os.environ.get("CSI_QUOBYTE_FAULTS_CALLS", "1"))
SEED = int(os.environ.get("CSI_QUOBYTE_SEED", "0")) or random.SystemRandom().randrange(1 << 31)

# An operation reads a little more or less from run to run: its ids are random, and with them the shards it looks at.
SPREAD = 3

ALL = OPERATIONS | IMAGES
# What moves data writes down each second how far it is.
TIMED = {name for name in ALL if "copy" in name or "import" in name}

# The sidecars forget the new object after a final error, so nothing of it may be left. Those that freeze a volume's
# head may have done that: the volume has one layer more, and an empty head on top.
FREEZES = {"create from volume", "snapshot"}
MAKES = FREEZES | {"snapshot of untouched volume"} | {name for name in ALL if name.startswith("create")}


@dataclass
class Tally:
    """How the calls of one test ended, by class of error."""

    ended: dict[str, int] = field(default_factory=dict)

    def add(self, error: DriverError | None) -> None:
        name = type(error).__name__ if error else "done"
        self.ended[name] = self.ended.get(name, 0) + 1

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(self.ended.items()))


def attempt(work: Callable[[], object], faults: FaultyOs) -> DriverError | None:
    """Do an operation while the pool fails; gives its error. One that is no DriverError is a bug, and passes."""
    try:
        with faults.installed():
            work()
    except DriverError as error:
        return error
    return None


def check_class(error: DriverError | None, mode: Mode) -> None:
    """Full is RESOURCE_EXHAUSTED, or transient where the attempt could not be undone; all else is transient."""
    allowed = (Exhausted, Unavailable, Busy) if mode.number in (errno.ENOSPC, errno.EDQUOT) else (Unavailable, Busy)
    assert error is None or isinstance(error, allowed), f"{type(error).__name__}: {error}"


def restarted(kit: Kit) -> Kit:
    """A new process on the same pool."""
    kit.store.close()
    kit.store.close = lambda: None  # type: ignore[method-assign]  # the fixture that opened it closes it, too
    return Kit(Store(kit.store.root))


def after_retry(kit: Kit, operation: str, as_new: Tree, *, inside: bool) -> None:
    retry(lambda: ALL[operation](kit))
    check_pool(kit, inside=inside)
    check_effect(kit, operation)
    check_all_deleted(kit, as_new)


def after_giving_up(kit: Kit, operation: str, as_new: Tree) -> None:
    """The object is deleted, as the sidecars do when a claim goes away before its call came through."""
    retry(lambda: DELETES[operation](kit))
    check_pool(kit, inside=False)
    check_contents(kit, {name: blocks for name, blocks in UNTOUCHED.items() if (name, operation) != ("v", "expand")})
    check_all_deleted(kit, as_new)


def swept(kit: Kit) -> Tree:
    """What a copy of the pool is when the collector has been there and nobody else."""
    kit.sweep_until_quiet()
    found = tree(kit.store.root)
    kit.delete_everything()
    return found


def after_a_final_error(kit: Kit, operation: str, before: Tree) -> None:
    """Nobody comes back: the pool is as it was."""
    assert kit.store.find_volume(kit.volume_id("new")) is None
    assert kit.store.find_snapshot(kit.snapshot_id("new")) is None
    kit.sweep_until_quiet()
    assert sorted(kit.findings()) == []
    if operation not in FREEZES:
        assert tree(kit.store.root) == before


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("operation", ALL)
def test_operation_on_a_pool_that_fails_at_any_call(
    operation: str,
    template: tuple[Path, Tree],  # noqa: F811
    fresh: Callable[[], Kit],  # noqa: F811
    impatient: None,
    closing: Callable[[Kit], Kit],
) -> None:
    before = swept(fresh())
    kit = fresh()
    whole = FaultyOs(kit.store.root, MODES["ENOTCONN"], at=0)
    assert attempt(lambda: ALL[operation](kit), whole) is None
    kit.delete_everything()
    for name, mode in MODES.items():
        tally = Tally()
        kinds = [kind for kind, spare in whole.seen if mode.counts(kind, spare=spare)]
        calls = len(kinds)
        for number, at in enumerate(chosen(name, kinds)):
            kit = fresh()
            faults = FaultyOs(kit.store.root, mode, at)
            error = attempt(lambda kit=kit: ALL[operation](kit), faults)  # type: ignore[misc]
            tally.add(error)
            try:
                assert faults.failed or calls - at < SPREAD or operation in TIMED, "nothing failed"
                check_class(error, mode)
                # a pool whose server has died is mounted anew, and the store opened anew with it
                if number % 3 != 1 or mode.number == errno.ENOTCONN:
                    kit = closing(restarted(kit))
                if isinstance(error, Exhausted) and operation in MAKES:
                    after_a_final_error(kit, operation, before)
                if error and (number + SEED) % 3 == 2 and operation in DELETES:
                    after_giving_up(kit, operation, template[1])
                else:
                    after_retry(kit, operation, template[1], inside=number % 6 == 3)
            except BaseException as problem:
                problem.add_note(f"{operation}, {name} at call {at} ({faults.failed}) gave {error!r}, seed {SEED}")
                raise
        print(f"{operation}, {name}: {tally}; of {calls} calls, seed {SEED}")


def chosen(name: str, kinds: Sequence[str]) -> list[int]:
    """Which of the calls of an operation fail: all for `make faults`, else some, in any order, by the seed.

    A look at a whole pool lists 256 directories of each kind: of calls that list directories one after the other, the
    first and each sixty-fourth stand for all.
    """
    in_a_row = [kind == before == "listdir" for before, kind in pairwise(["", *kinds])]
    numbers = [at for at, is_next in enumerate(in_a_row, 1) if not is_next or at % 64 == 0]
    random.Random(f"{name} {SEED}").shuffle(numbers)
    return numbers[: CALLS or None]


@pytest.fixture
def closing() -> Iterator[Callable[[Kit], Kit]]:
    """Close the pools that a test opens."""
    opened: list[Kit] = []

    def close_later(kit: Kit) -> Kit:
        opened.append(kit)
        return kit

    yield close_later
    for kit in opened:
        kit.store.close()
