"""The operations of test_crash_steps, killed before each durable step, in pools that have more in them.

Axes: start state (a deep tree of snapshots and clones that are alive, a merge that was killed halfway, things in the
trash) × operation × step. Wanted as there, and that what the state is made of holds what it held.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scratch
from controller_kit import OWNER, Kit, Tree, tree
from crash_runner import OPERATIONS, TRASH, entries_of
from test_crash_steps import (
    EVERY,
    SEED,
    Runner,
    check_all_deleted,
    check_effect,
    check_pool,
    fill,
    fresh,  # noqa: F401 - a fixture
    retry,
    runner,  # noqa: F401 - a fixture
)
from test_faults_full_pool import SIZE_BYTES as FULL_BYTES
from test_faults_full_pool import Small, command

from csi_quobyte.pool import layout
from csi_quobyte.pool.records import Modes
from csi_quobyte.pool.store import Store

KEPT = {"on_delete": "trash"}
# every step for `make crash`; otherwise one of the first four of each operation, and some of the later ones
STEPS = range(1, 1000) if EVERY == 1 else range(1 + SEED % 4, 1000, 13)
# pages that are left in a nearly full pool
AMOUNTS = [1, 2, 4]
MERGE_STEP = 6
"""Before this step a merge up is killed: noted, and the data not moved, or not yet taken over."""


def grow(kit: Kit) -> None:
    """Snapshots and clones of the clone, all alive."""
    kit.snapshot("s2", of="v")
    kit.snapshot("cs", of="c")
    kit.create("cc", source=kit.from_snapshot("cs"))
    kit.write("cc", 9)
    kit.snapshot("ccs", of="cc")
    kit.create("ccc", source=kit.from_snapshot("ccs"))
    kit.write("v", 3, block=2)  # what it holds already; its head is not an empty one any more


def check_grown(kit: Kit) -> None:
    assert kit.holds("cc", 9, 2, 0)
    assert kit.holds("ccc", 9, 2, 0)
    assert kit.snapshot_holds("s2", 1, 2, 3)


def begin_merge(kit: Kit) -> None:
    """A chain that calls for a merge, which is killed in the middle once the pool is whole: see `template`."""
    kit.create("m")
    kit.write("m", 1)
    kit.snapshot("m-gone", of="m")
    kit.write("m", 2, block=1)
    kit.delete_snapshot("m-gone")


def check_merged(kit: Kit) -> None:
    assert kit.holds("m", 1, 2, 0)


def fill_trash(kit: Kit) -> None:
    """A volume and a snapshot that will go to the trash, and two that are in it."""
    for volume, snapshot, byte in (("k", "ks", 7), ("tv", "ts", 8)):
        kit.create(volume, source=kit.from_snapshot("s"), **KEPT)
        kit.write(volume, byte, block=1)
        kit.snapshot(snapshot, of=volume, **KEPT)
        kit.write(volume, byte, block=2)
    kit.delete("tv")
    kit.delete_snapshot("ts")


def check_trash(kit: Kit) -> None:
    """Whatever is in the trash can be had back, with what it held."""
    for name in ("k", "ks", "tv", "ts"):
        for entry_id in entries_of(kit, name):
            kit.restore(entry_id)
    for volume, snapshot, byte in (("k", "ks", 7), ("tv", "ts", 8)):
        if kit.store.find_volume(kit.volume_id(volume)):
            assert kit.holds(volume, 1, byte, byte)
        if kit.store.find_snapshot(kit.snapshot_id(snapshot)):
            assert kit.snapshot_holds(snapshot, 1, byte, 0)


STATES: dict[str, tuple[Callable[[Kit], None], Callable[[Kit], None]]] = {
    "grown": (grow, check_grown),
    "mid-merge": (begin_merge, check_merged),
    "trash": (fill_trash, check_trash),
}
CASES = [
    *((state, operation) for state in ("grown", "mid-merge", "trash") for operation in OPERATIONS),
    *(("trash", operation) for operation in TRASH),
]


@pytest.fixture(scope="module")
def templates(runner: Runner) -> Iterator[dict[str, tuple[Path, Tree]]]:  # noqa: F811
    """A pool in each state, and how it looked when it was new."""
    parent = Path(tempfile.mkdtemp(prefix="csi-quobyte-test-", dir=scratch.directory()))
    made = {}
    for state, (build, _) in STATES.items():
        root = parent / state / "pool"
        root.mkdir(parents=True)
        layout.initialise(str(root), owner=OWNER, modes=Modes())
        as_new = tree(root)
        kit = Kit(Store(str(root)))
        fill(kit)
        build(kit)
        kit.store.close()
        if state == "mid-merge":
            assert runner.run(root, "up", MERGE_STEP)
        made[state] = root, as_new
    yield made
    shutil.rmtree(parent)


@pytest.fixture
def state(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def template(templates: dict[str, tuple[Path, Tree]], state: str) -> tuple[Path, Tree]:
    """What `fresh` copies."""
    return templates[state]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("state", "operation"), CASES, indirect=["state"])
def test_operation_killed_before_any_step_in_a_state(
    state: str,
    operation: str,
    runner: Runner,  # noqa: F811
    template: tuple[Path, Tree],
    fresh: Callable[[], Kit],  # noqa: F811
    impatient: None,
) -> None:
    kills = 0
    for step in STEPS:
        kit = fresh()
        if not runner.run(Path(kit.store.root), operation, step):
            break
        kills += 1
        try:
            retry(lambda kit=kit: (OPERATIONS | TRASH)[operation](kit))  # type: ignore[misc]
            check_pool(kit, inside=step % 6 == 1)
            check_effect(kit, operation)
            check_trash_effect(kit, operation)
            STATES[state][1](kit)
            check_pool(kit, inside=False)
            check_all_deleted(kit, template[1])
        except BaseException as error:
            error.add_note(f"{operation} in state {state}, killed before step {step}, seed {SEED}")
            raise
    assert kills
    print(f"{operation} in state {state}: {kills} kills before steps up to {step - 1}, seed {SEED}")


def check_trash_effect(kit: Kit, operation: str) -> None:
    """What an operation with the trash has promised, once it has returned."""
    live = {
        "k": kit.store.find_volume(kit.volume_id("k")),
        "ks": kit.store.find_snapshot(kit.snapshot_id("ks")),
        "tv": kit.store.find_volume(kit.volume_id("tv")),
        "ts": kit.store.find_snapshot(kit.snapshot_id("ts")),
    }
    objects = {"trash volume": "k", "trash snapshot": "ks", "restore volume": "tv", "restore snapshot": "ts"}
    objects |= {"purge volume": "tv", "purge snapshot": "ts"}
    if name := objects.get(operation):
        assert (live[name] is not None) == operation.startswith("restore")
        assert len(entries_of(kit, name)) == operation.startswith("trash")


# --- nearly full -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nearly_full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Small, Path, Tree]]:
    """A small file system, the template pool on it, promising as much as is wanted, and how it looked when new."""
    mountpoint = tmp_path_factory.mktemp("small")
    command("mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES},nr_inodes=100000", "small", mountpoint)
    try:
        root = mountpoint / "template"
        root.mkdir()
        layout.initialise(str(root), owner=OWNER, modes=Modes())
        described = json.loads((root / "format.json").read_text())
        described["settings"]["maxOverSubscription"] = 1e9
        (root / "format.json").write_text(json.dumps(described))
        as_new = tree(root)
        kit = Kit(Store(str(root)))
        fill(kit)
        kit.store.close()
        yield Small(mountpoint), root, as_new
    finally:
        command("umount", mountpoint)


@pytest.mark.root
@pytest.mark.timeout(600)
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if "copy" not in name])
def test_operation_killed_before_any_step_in_a_pool_that_is_nearly_full(
    operation: str,
    runner: Runner,  # noqa: F811
    nearly_full: tuple[Small, Path, Tree],
    impatient: None,
) -> None:
    small, source, as_new = nearly_full
    amounts = AMOUNTS if EVERY == 1 else [AMOUNTS[SEED % len(AMOUNTS)]]
    kills = 0
    ended: set[int] = set()
    for pages, step in [(pages, step) for pages in amounts for step in STEPS[:60]]:
        if pages in ended:
            continue
        shutil.rmtree(small.root, ignore_errors=True)
        command("cp", "-a", "--sparse=always", source, small.root)
        command("cp", "-a", "--sparse=never", "--reflink=never", "-T", source / "reserve", small.root / "reserve")
        small.leave("pages of tmpfs", pages)
        try:
            killed = runner.run(small.root, operation, step)
        finally:
            small.give_back("pages of tmpfs")
        if not killed:
            ended.add(pages)
            continue
        kills += 1
        kit = Kit(Store(str(small.root)))
        try:
            retry(lambda kit=kit: OPERATIONS[operation](kit))  # type: ignore[misc]
            check_pool(kit, inside=False)
            check_effect(kit, operation)
            check_all_deleted(kit, as_new)
        except BaseException as error:
            error.add_note(f"{operation} with {pages} pages left, killed before step {step}, seed {SEED}")
            raise
        finally:
            kit.store.close()
    assert kills
    print(f"{operation} in a nearly full pool: {kills} kills, seed {SEED}")
