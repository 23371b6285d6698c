"""Every operation, killed with SIGKILL before each of its durable steps; then retried, or its object deleted.

Axes: operation × step × what comes after. For each of them: the retry completes, every disk holds what it must, no
error is found by `check`, nothing at all after the collector, and when everything is deleted the pool is as new.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from controller_kit import BLOCK_BYTES, OWNER, SIZE_BYTES, Kit, Tree, tree
from crash_runner import DELETES, IMAGES, OPERATIONS, retry

from csi_quobyte.engine import collector
from csi_quobyte.errors import Busy
from csi_quobyte.pool import layout
from csi_quobyte.pool import store as store_module
from csi_quobyte.pool.records import Modes, SnapshotState, VolumeState
from csi_quobyte.pool.store import Store

# `make crash` sets this to 1: every step is killed; otherwise a sample, by the seed. A copy starts several processes
# each time, so fewer of its steps are.
EVERY = int(os.environ.get("CSI_QUOBYTE_CRASH_EVERY", "3"))
COPY_EVERY = EVERY if EVERY == 1 else 6
SEED = int(os.environ.get("CSI_QUOBYTE_SEED", "0")) or random.SystemRandom().randrange(1 << 31)
MINIMUM_KILLS = 300 if EVERY == 1 else 100


class Runner:
    """The process that has its children killed."""

    total = 0  # of all runners, for the closing line of `make crash`

    def __init__(self) -> None:
        package = Path(store_module.__file__).parents[2]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_runner.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(package)},
        )
        self.kills = 0

    def run(
        self, root: Path, operation: str, kill_at: int, *, in_job_s: float | None = None, wrong: str | None = None
    ) -> bool:
        """Run an operation and kill it before a step, or in a merge's job; False when it ended before that.

        `wrong` names an order of steps that is wrong on purpose.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"root": str(root), "operation": operation, "kill_at": kill_at, "in_job_s": in_job_s, "wrong": wrong}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        self.kills += answer["killed"]
        Runner.total += answer["killed"]
        return bool(answer["killed"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=10)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


@pytest.fixture(scope="module")
def template() -> Iterator[tuple[Path, Tree]]:
    """A pool in which every operation has something to work on, and how it looked when it was new.

    v (1, 2) written, with snapshot s (1); c an untouched clone of v's state (1, 2); a attached to a node; golden an
    image (7, 8); deleting: half-done deletes and layers without references for the collector.
    """
    yield from made_by(fill)


def made_by(*fillers: Callable[[Kit], object]) -> Iterator[tuple[Path, Tree]]:
    """Give a pool that these have filled, and how it looked when it was new; removed afterwards."""
    # in memory where there is such a place: what survives a SIGKILL is the same, and an fsync costs nothing
    memory = Path("/dev/shm")
    parent = Path(tempfile.mkdtemp(prefix="csi-quobyte-test-", dir=memory if memory.is_dir() else None))
    root = parent / "pool"
    root.mkdir()
    layout.initialise(str(root), owner=OWNER, modes=Modes())
    as_new = tree(root)
    kit = Kit(Store(str(root)))
    for fill_with in fillers:
        fill_with(kit)
    kit.store.close()
    yield root, as_new
    shutil.rmtree(parent)


def fill(kit: Kit) -> None:
    """Make the objects of the template."""
    kit.add_node()
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.write("v", 2, block=1)
    kit.create("c", source=kit.from_volume("v"))
    kit.write("v", 3, block=2)
    kit.create("a", image_format="raw")
    kit.attach("a")
    for name in ("gone", "half-gone"):
        kit.create(name)
        kit.write(name, 1)
        kit.snapshot(f"{name}-s", of=name)
    kit.delete("gone")
    kit.delete_snapshot("gone-s")
    import_golden(kit)
    half = kit.store.volume(kit.volume_id("half-gone"))
    kit.store.swap(half, replace(half, state=VolumeState.DELETING))
    half_snapshot = kit.store.snapshot(kit.snapshot_id("half-gone-s"))
    kit.store.swap(half_snapshot, replace(half_snapshot, state=SnapshotState.DELETING))
    kit.store.replenish_reserve()


def import_golden(kit: Kit) -> None:
    """Make the image golden (7, 8), of a raw file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "golden.raw")
        path.write_bytes(b"".join(bytes([byte]) * BLOCK_BYTES for byte in (7, 8)) + bytes(SIZE_BYTES - 2 * BLOCK_BYTES))
        kit.import_image("golden", path, "raw")


@pytest.fixture
def fresh(template: tuple[Path, Tree]) -> Iterator[Callable[[], Kit]]:
    """Give a copy of the template pool, each time anew."""
    opened: list[Store] = []
    source, as_new = template
    target = source.with_name("fresh")
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True, timeout=20)
    contents = [Path(name) for name in tree(source) if name not in as_new]

    def make() -> Kit:
        if opened:
            # the run before has just been shown to have left a pool as new: only what was in it is put back
            opened.pop().close()
            for name in contents:
                _copy(source / name, target / name)
        opened.append(Store(str(target)))
        return Kit(opened[0])

    yield make
    while opened:
        opened.pop().close()
    shutil.rmtree(target)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir(mode=0o700)
    else:
        shutil.copy2(source, target)


# What each disk holds after the operation: (volume, its blocks).
UNTOUCHED: dict[str, tuple[int, ...]] = {"v": (1, 2, 3), "c": (1, 2, 0), "a": (0, 0, 0)}
AFTER: dict[str, dict[str, tuple[int, ...]]] = {
    "create blank": {"new": (0, 0, 0)},
    "create raw": {"new": (0, 0, 0)},
    "create from snapshot": {"new": (1, 0, 0)},
    "create from volume": {"new": (1, 2, 3)},
    "create from untouched volume": {"new": (1, 2, 0)},
    "copy of snapshot": {"new": (1, 0, 0)},
    "copy of volume": {"new": (1, 2, 3)},
    "create from image": {"new": (7, 8, 0)},
    "copy of image": {"new": (7, 8, 0)},
    "cache copy of snapshot": {"new": (1, 0, 0)},
}
SNAPSHOT_AFTER = {"snapshot": (1, 2, 3), "snapshot of untouched volume": (1, 2, 0)}


def steps_of(operation: str) -> range:
    """The steps before which an operation is killed, as far as it has them."""
    every = COPY_EVERY if "copy" in operation or operation == "import image" else EVERY
    return range(1 + SEED % every, 1000, every)


def check_contents(kit: Kit, expected: dict[str, tuple[int, ...]]) -> None:
    for name, blocks in expected.items():
        assert kit.holds(name, *blocks), f"volume {name} does not hold {blocks}"


def check_pool(kit: Kit, *, inside: bool) -> None:
    """No damage before the collector, nothing at all after it. `inside`: let qemu-img look into the images, too."""
    assert kit.errors() == []
    kit.sweep_until_quiet()
    assert (kit.check() if inside else sorted(kit.findings())) == []
    kit.consistency()


def check_all_deleted(kit: Kit, as_new: Tree) -> None:
    kit.delete_everything()
    assert tree(kit.store.root) == as_new


def check_effect(kit: Kit, operation: str) -> None:
    """What the operation has promised, once it has returned."""
    expected = {**UNTOUCHED, **AFTER.get(operation, {})}
    if operation == "delete volume":
        del expected["v"]
        assert kit.store.find_volume(kit.volume_id("v")) is None
    if operation == "expand":
        assert kit.store.volume(kit.volume_id("v")).size_bytes == 2 * SIZE_BYTES
    if operation == "attach":
        assert kit.store.volume(kit.volume_id("v")).attachments[0].generation == 1
    if operation == "detach":
        assert kit.store.volume(kit.volume_id("a")).attachments == ()
    if blocks := SNAPSHOT_AFTER.get(operation):
        assert kit.snapshot_holds("new", *blocks)
    if operation == "delete snapshot":
        assert kit.store.find_snapshot(kit.snapshot_id("s")) is None
    else:
        assert kit.snapshot_holds("s", 1, 0, 0)
    if operation == "import image":
        assert kit.layer_holds(kit.image("new").layer, 7, 8, 0)
    if operation == "remove image":
        assert kit.store.find_image(kit.image_id("golden")) is None
    elif operation in IMAGES:
        assert kit.layer_holds(kit.image("golden").layer, 7, 8, 0)
    check_contents(kit, expected)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("operation", OPERATIONS | IMAGES)
def test_operation_killed_before_any_step_is_completed_by_a_retry(
    operation: str, runner: Runner, template: tuple[Path, Tree], fresh: Callable[[], Kit], impatient: None
) -> None:
    before = runner.kills
    for step in steps_of(operation):
        kit = fresh()
        if not runner.run(Path(kit.store.root), operation, step):
            break
        with _named(operation, step):
            retry(lambda kit=kit: (OPERATIONS | IMAGES)[operation](kit))  # type: ignore[misc]
            check_pool(kit, inside=step % 6 == 1)
            check_effect(kit, operation)
            check_all_deleted(kit, template[1])
    assert runner.kills - before == len(range(steps_of(operation).start, step, steps_of(operation).step)) > 0
    print(f"{operation}: killed before each of {step - 1} steps, retried")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("operation", DELETES)
def test_object_of_an_operation_killed_before_any_step_can_be_deleted(
    operation: str, runner: Runner, template: tuple[Path, Tree], fresh: Callable[[], Kit], impatient: None
) -> None:
    for step in steps_of(operation):
        kit = fresh()
        if not runner.run(Path(kit.store.root), operation, step):
            break
        with _named(operation, step):
            retry(lambda kit=kit: DELETES[operation](kit))  # type: ignore[misc]
            check_pool(kit, inside=False)
            left = dict(UNTOUCHED)
            if operation == "expand":
                del left["v"]
            check_contents(kit, left)
            check_all_deleted(kit, template[1])
    assert step > 3
    print(f"{operation}: killed before each of {step - 1} steps, deleted")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("operation", ["create from volume", "copy of volume", "snapshot"])
def test_sources_of_a_killed_operation_can_be_deleted_first(
    operation: str, runner: Runner, template: tuple[Path, Tree], fresh: Callable[[], Kit], impatient: None
) -> None:
    for step in steps_of(operation):
        kit = fresh()
        if not runner.run(Path(kit.store.root), operation, step):
            break
        with _named(operation, step):
            retry(lambda kit=kit: kit.delete("v"))  # type: ignore[misc]
            with suppress(Busy):
                collector.sweep(kit.store)
            assert kit.errors() == []
            retry(lambda kit=kit: DELETES[operation](kit))  # type: ignore[misc]
            check_pool(kit, inside=False)
            check_contents(kit, {"c": (1, 2, 0)})
            check_all_deleted(kit, template[1])


def is_noticed(look: Callable[[], None]) -> bool:
    """Say whether what the crash tests look at shows that something is wrong."""
    try:
        look()
    except Exception:  # noqa: BLE001 - an assertion, or an operation that finds damage
        return True
    return False


@pytest.mark.parametrize(
    ("operation", "wrong"), [("create blank", "publish before data"), ("drop", "remove before condemning")]
)
def test_wrong_order_would_be_noticed(
    operation: str, wrong: str, runner: Runner, fresh: Callable[[], Kit], impatient: None
) -> None:
    for step in range(1, 1000):
        kit = fresh()
        killed = runner.run(Path(kit.store.root), operation, step, wrong=wrong)

        def look(kit: Kit = kit) -> None:
            assert kit.errors() == []
            check_contents(kit, UNTOUCHED)

        if is_noticed(look):
            return
        assert killed, f"{wrong} was not noticed in {step} kills"
        kit.delete_everything()


def test_enough_was_killed(runner: Runner) -> None:
    """Comes last: the numbers of the tests above, and a floor under them."""
    print(f"{runner.kills} processes were killed, seed {SEED}")
    assert runner.kills >= MINIMUM_KILLS


class _named:  # noqa: N801 - reads as a word
    """Adds the operation and the step to a failed assertion."""

    def __init__(self, operation: str, step: int) -> None:
        self._note = f"{operation}, killed before step {step}, seed {SEED}"

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(self._note)
