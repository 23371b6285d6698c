"""Every kind of merge, with calls on the pool's files failing, or with a few pages left in the pool's file system.

What moves the data is a storage daemon, whose own calls are not made to fail here: it meets the full file system, and
tests/integration/test_jobs.py has the rest. Wanted: an error that says try again, every disk shows what it did, and
the merge is done again or undone once the fault is over.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from controller_kit import Kit, Tree
from crash_runner import MERGES, merge
from faulty_os import MODES, FaultyOs
from test_crash_merges import after_a_kill, fresh, template  # noqa: F401 - the last two are fixtures
from test_faults_each_step import attempt, check_class, chosen
from test_faults_full_pool import PAGE_BYTES, SIZE_BYTES, Small, command

from csi_quobyte.errors import Busy, Exhausted, Unavailable
from csi_quobyte.pool.store import Store

SEED = int(os.environ.get("CSI_QUOBYTE_SEED", "0")) or random.SystemRandom().randrange(1 << 31)
CALLS = int(os.environ.get("CSI_QUOBYTE_FAULTS_CALLS", "1"))
LEFT = range(0, 80, 2)
"""Pages; a block that a merge moves has 16, its image some more for the tables."""


def some(of: list[str]) -> list[str]:
    """All for `make faults`, else two, by the seed."""
    return random.Random(SEED).sample(of, 2) if CALLS else of


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", MERGES)
def test_merge_on_a_pool_that_fails_at_any_call(
    kind: str,
    template: tuple[Path, Tree],  # noqa: F811
    fresh: Callable[[], Kit],  # noqa: F811
    impatient: None,
) -> None:
    kit = fresh()
    whole = FaultyOs(kit.store.root, MODES["ENOTCONN"], at=0)
    assert attempt(lambda: merge(kit, kind, lambda: None), whole) is None
    for name in some(list(MODES)):
        mode = MODES[name]
        kinds = [call for call, spare in whole.seen if mode.counts(call, spare=spare)]
        for number, at in enumerate(chosen(f"{kind} {name}", kinds)):
            kit = fresh()
            faults = FaultyOs(kit.store.root, mode, at)
            error = attempt(lambda kit=kit: merge(kit, kind, lambda: None), faults)  # type: ignore[misc]
            try:
                check_class(error, mode)
                after_a_kill(kit, kind, template[1], redo=(number + SEED) % 3 != 0)
            except BaseException as problem:
                problem.add_note(f"{kind}, {name} at call {at} ({faults.failed}) gave {error!r}, seed {SEED}")
                raise
        print(f"{kind}, {name}: of {len(kinds)} calls, seed {SEED}")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    mountpoint = tmp_path_factory.mktemp("small")
    command("mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES},nr_inodes=100000", "small", mountpoint)
    yield Small(mountpoint)
    command("umount", mountpoint)


@pytest.mark.root
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", MERGES)
def test_merge_in_a_pool_with_little_space_left(
    kind: str,
    small: Small,
    template: tuple[Path, Tree],  # noqa: F811
    impatient: None,
) -> None:
    ended = []
    for pages in random.Random(f"{kind} {SEED}").sample(LEFT, CALLS * 2 or len(LEFT)):
        shutil.rmtree(small.root, ignore_errors=True)
        command("cp", "-a", "--sparse=always", template[0], small.root)
        store = Store(str(small.root))
        kit = Kit(store)
        small.leave("pages of tmpfs", pages)
        try:
            merge(kit, kind, lambda: None)
            ended.append(f"{pages} pages: done")
        except (Exhausted, Unavailable, Busy) as error:
            ended.append(f"{pages} pages: {type(error).__name__}")
        finally:
            small.give_back("pages of tmpfs")
        try:
            after_a_kill(kit, kind, template[1], redo=pages % 3 != 0)
        except BaseException as problem:
            problem.add_note(f"{ended[-1]} of {PAGE_BYTES} bytes, {kind}, seed {SEED}")
            raise
        finally:
            store.close()
    print(f"{kind}: {', '.join(ended)}, seed {SEED}")
