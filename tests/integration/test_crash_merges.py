"""Every kind of merge, killed with SIGKILL before each of its durable steps and at random moments inside its job.

After each: every disk shows what it did, by the records; the merge is done again or undone; nothing is left once all
is deleted. The storage daemon that moves the data dies with the process (tests/integration/test_jobs.py shows that).
"""

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from controller_kit import OWNER, Kit, Tree, tree
from crash_runner import MERGES, merge
from test_crash_steps import Runner, is_noticed

from csi_quobyte.engine.merging import SOFT_DEPTH
from csi_quobyte.errors import Busy, Corrupt, Refused
from csi_quobyte.pool import layout
from csi_quobyte.pool.records import LayerRecord, Modes
from csi_quobyte.pool.store import Store

# `make crash` sets these: every step, and 30 kills in each kind of job; otherwise a sample, by the seed
EVERY = int(os.environ.get("CSI_QUOBYTE_CRASH_EVERY", "5"))
KILLS_IN_A_JOB = int(os.environ.get("CSI_QUOBYTE_CRASH_IN_JOB", "6"))
RETRY_S = 10.0
BLOCKS = SOFT_DEPTH + 1

SEED = int(os.environ.get("CSI_QUOBYTE_SEED", "0")) or random.SystemRandom().randrange(1 << 31)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


@pytest.fixture(scope="module")
def template() -> Iterator[tuple[Path, Tree]]:
    """A pool that calls for one merge of each kind.

    up: one base under a head, over it a clone's snapshot. down: a raw base, a layer, a head. flatten: a long chain of
    snapshots that are all alive.
    """
    memory = Path("/dev/shm")
    parent = Path(tempfile.mkdtemp(prefix="csi-quobyte-test-", dir=memory if memory.is_dir() else None))
    root = parent / "pool"
    root.mkdir()
    layout.initialise(str(root), owner=OWNER, modes=Modes())
    as_new = tree(root)
    kit = Kit(Store(str(root)))
    kit.create("up")
    kit.write("up", 1)
    kit.snapshot("gone", of="up")
    kit.write("up", 2, block=1)
    kit.delete_snapshot("gone")
    kit.create("down", image_format="raw")
    for number in (1, 2):
        kit.write("down", number, block=number - 1)
        kit.snapshot(f"gone-{number}", of="down")
    kit.write("down", 3, block=2)
    for number in (1, 2):
        kit.delete_snapshot(f"gone-{number}")
    kit.create("flatten")
    for number in range(BLOCKS):
        kit.write("flatten", number + 1, block=number)
        kit.snapshot(f"kept-{number}", of="flatten")
    kit.store.replenish_reserve()
    kit.store.close()
    yield root, as_new
    shutil.rmtree(parent)


@pytest.fixture
def fresh(template: tuple[Path, Tree], tmp_path: Path) -> Iterator[Callable[[], Kit]]:
    """Give a copy of the template pool, each time anew."""
    opened: list[Store] = []
    source, _ = template
    target = source.with_name("fresh")

    def make() -> Kit:
        while opened:
            opened.pop().close()
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True, timeout=20)
        opened.append(Store(str(target)))
        return Kit(opened[0])

    yield make
    while opened:
        opened.pop().close()
    shutil.rmtree(target, ignore_errors=True)


def check_contents(kit: Kit) -> None:
    assert kit.holds("up", 1, 2, 0), "the volume that goes up shows something else"
    assert kit.holds("down", 1, 2, 3, 0), "the volume that goes down shows something else"
    blocks = tuple(range(1, BLOCKS + 1))
    assert kit.holds("flatten", *blocks, 0), "the volume that is flattened shows something else"
    for number in (0, BLOCKS // 2, BLOCKS - 1):
        assert kit.snapshot_holds(f"kept-{number}", *blocks[: number + 1], 0), f"snapshot {number} shows something else"


def again(kit: Kit, kind: str) -> None:
    """Do the merge of a process that was killed: its locks are gone a moment after it."""
    deadline = time.monotonic() + RETRY_S
    while True:
        try:
            merge(kit, kind, lambda: None)
        except Busy:
            assert time.monotonic() < deadline, f"{kind} does not complete"
            time.sleep(0.02)
        else:
            return


def wait_for_the_daemons_end(kit: Kit) -> None:
    """Wait until the storage daemon of a killed process has gone too: its locks go with its last thread."""
    deadline = time.monotonic() + RETRY_S
    while any(is_locked(kit, layer_id) for layer_id in kit.store.layer_ids()):
        assert time.monotonic() < deadline, "a storage daemon lives on"
        time.sleep(0.02)


def is_locked(kit: Kit, layer_id: str) -> bool:
    layer = kit.store.find_layer(layer_id)
    try:
        if layer:
            kit.store.check_not_written(layer)
    except Refused:
        return True
    except Corrupt:  # no file any more
        return False
    return False


def after_a_kill(kit: Kit, kind: str, as_new: Tree, *, redo: bool) -> None:
    """Check everything that a kill may have spoilt; then do the merge again, or only clear up."""
    wait_for_the_daemons_end(kit)
    assert kit.errors() == []
    check_contents(kit)
    if redo:
        again(kit, kind)
        assert not [plan for plan in kit.plans() if plan.kind == kind], f"{kind} was not done"
        check_contents(kit)
    kit.sweep_until_quiet()
    check_contents(kit)
    assert [finding for finding in kit.check() if finding.kind != "leaked-clusters"] == []
    kit.consistency()
    kit.delete_everything()
    assert tree(kit.store.root) == as_new


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", MERGES)
def test_merge_killed_before_any_step(
    kind: str, runner: Runner, template: tuple[Path, Tree], fresh: Callable[[], Kit], impatient: None
) -> None:
    for step in range(1 + SEED % EVERY, 1000, EVERY):
        kit = fresh()
        if not runner.run(Path(kit.store.root), kind, step):
            break
        try:
            after_a_kill(kit, kind, template[1], redo=step % 3 != 0)
        except BaseException as error:
            error.add_note(f"{kind}, killed before step {step}, seed {SEED}")
            raise
    assert step > 8
    print(f"{kind}: killed before steps up to {step - 1}, every {EVERY}., seed {SEED}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", MERGES)
def test_merge_killed_inside_its_job(
    kind: str, runner: Runner, template: tuple[Path, Tree], fresh: Callable[[], Kit], impatient: None
) -> None:
    moments = random.Random(SEED)
    killed = 0
    for number in range(KILLS_IN_A_JOB):
        kit = fresh()
        in_job_s = moments.uniform(0.0, 0.12)
        killed += runner.run(Path(kit.store.root), kind, 0, in_job_s=in_job_s)
        try:
            after_a_kill(kit, kind, template[1], redo=number % 3 != 0)
        except BaseException as error:
            error.add_note(f"{kind}, killed {in_job_s:.4f} s after its job began, seed {SEED}")
            raise
    print(f"{kind}: {killed} kills in {KILLS_IN_A_JOB} jobs, seed {SEED}")
    assert killed


def test_marker_after_the_record_would_be_noticed(runner: Runner, fresh: Callable[[], Kit], impatient: None) -> None:
    for step in range(1, 1000):
        kit = fresh()
        killed = runner.run(Path(kit.store.root), "flatten", step, wrong="mark after the record")

        def look(kit: Kit = kit) -> None:
            assert kit.errors() == []

        if is_noticed(look):
            return
        assert killed, f"not noticed in {step} kills"


def test_undo_that_does_not_write_the_childs_record_again_would_be_noticed(
    runner: Runner,
    template: tuple[Path, Tree],
    fresh: Callable[[], Kit],
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = Store.swap

    def swap(store: Store, old: LayerRecord, new: LayerRecord) -> LayerRecord:
        return old if isinstance(old, LayerRecord) and old is new else right(store, old, new)

    monkeypatch.setattr(Store, "swap", swap)
    for step in range(1, 1000):
        kit = fresh()
        killed = runner.run(Path(kit.store.root), "down", step)

        def look(kit: Kit = kit) -> None:
            after_a_kill(kit, "down", template[1], redo=False)

        if is_noticed(look):
            return
        assert killed, f"not noticed in {step} kills"
