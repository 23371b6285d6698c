"""A power cut at every point of every operation: what was written and not synced is lost, torn or there.

Axes: operation (or a row of operations) × each write, fsync, link, rename, unlink, mkdir, rmdir of it × what is left of
the unsynced rest (tests/integration/power_cut.py). After each: a new controller opens the pool; everything that had
been acknowledged is there with its contents; `check` finds nothing once the collector is quiet; a retry completes the
operation; and when everything is deleted the pool is as new.

By default a sample by a seed; `make power-loss` does all cuts (CSI_QUOBYTE_POWER_CUTS=0).
"""

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import crash_runner
import pytest
import test_crash_merges
import test_crash_states
import test_crash_steps
from controller_kit import OWNER, SIZE_BYTES, Kit, tree
from crash_runner import IMAGES, OPERATIONS, TRASH, entries_of, import_new
from power_cut import (
    ALL_LOST,
    ALL_THERE,
    EXTREMES,
    NAMES_ONLY,
    ZEROS,
    Event,
    Luck,
    Names,
    Recorder,
    Synced,
    Tree,
    after_cut,
    all_but,
    chance,
)
from test_crash_steps import UNTOUCHED, is_noticed, retry

from csi_quobyte.engine import collector
from csi_quobyte.errors import NotFound
from csi_quobyte.operations import volumes
from csi_quobyte.pool import layout, records
from csi_quobyte.pool.records import Modes
from csi_quobyte.pool.sizes import SizeRange
from csi_quobyte.pool.steps import Steps
from csi_quobyte.pool.store import Store

pytestmark = pytest.mark.usefixtures("started_anew")
SEED = int(os.environ.get("CSI_QUOBYTE_SEED", "0")) or random.SystemRandom().randrange(1 << 31)
CUTS = int(os.environ.get("CSI_QUOBYTE_POWER_CUTS", "2"))
"""How many cuts are tried for each operation; 0: each, with every extreme and three times by dice."""

template = test_crash_steps.template
merge_template = test_crash_merges.template
Blocks = tuple[int, ...]
Files = dict[str, str]
Model = dict[str, Blocks | None]
"""What volumes ("v"), snapshots ("snapshot s"), images ("image i") and what is in the trash ("trash v") hold in their
first blocks; None: there is none."""
BEFORE: Model = {**UNTOUCHED, "snapshot s": (1, 0, 0)}


@dataclass(frozen=True)
class Step:
    """One call, and what is different in the model once it was answered."""

    work: Callable[[Kit], object]
    changes: Model = field(default_factory=dict)
    check: Callable[[Kit], None] = lambda _: None
    is_daemons: bool = False
    """Whether it stands for a daemon's writes and flush."""


def size_is_doubled(kit: Kit) -> None:
    assert kit.store.volume(kit.volume_id("v")).size_bytes == 2 * SIZE_BYTES


def is_attached(kit: Kit) -> None:
    assert [present.generation for present in kit.store.volume(kit.volume_id("v")).attachments] == [1]


def is_detached(kit: Kit) -> None:
    assert kit.store.volume(kit.volume_id("a")).attachments == ()


def image_is_gone(kit: Kit) -> None:
    assert kit.store.find_image(kit.image_id("golden")) is None


def remove_new(kit: Kit) -> None:
    """Remove the image "new"; done before is success."""
    with suppress(NotFound):
        kit.remove_image("new")


def content_is_noted(kit: Kit) -> None:
    content = kit.store.content(kit.store.volume(kit.volume_id("a")))
    assert content
    assert content.state == "formatted"


def note_content(kit: Kit) -> None:
    """What the node does after mkfs."""
    volume = kit.store.volume(kit.volume_id("a"))
    for state in ("formatting", "formatted"):
        kit.store.put_content(volume, records.Content(state=state, filesystem="ext4", generation=1))  # type: ignore[arg-type]


def restore(kit: Kit, name: str) -> None:
    """Restore what is in the trash under a name; done before is success."""
    for entry_id in entries_of(kit, name):
        kit.restore(entry_id)


def as_before(kit: Kit) -> None:
    """There is nothing to see of it."""


SINGLE: dict[str, Step] = {
    name: Step((OPERATIONS | IMAGES).get(name, note_content), changes, check)
    for name, changes, check in (
        ("create blank", {"new": (0, 0, 0)}, as_before),
        ("create raw", {"new": (0, 0, 0)}, as_before),
        ("create from snapshot", {"new": (1, 0, 0)}, as_before),
        ("create from volume", {"new": (1, 2, 3)}, as_before),
        ("create from untouched volume", {"new": (1, 2, 0)}, as_before),
        ("snapshot", {"snapshot new": (1, 2, 3)}, as_before),
        ("snapshot of untouched volume", {"snapshot new": (1, 2, 0)}, as_before),
        ("delete volume", {"v": None}, as_before),
        ("delete snapshot", {"snapshot s": None}, as_before),
        ("create from image", {"new": (7, 8, 0)}, as_before),
        ("copy of snapshot", {"new": (1, 0, 0)}, as_before),
        ("copy of volume", {"new": (1, 2, 3)}, as_before),
        ("cache copy of snapshot", {"new": (1, 0, 0)}, as_before),
        ("copy of image", {"new": (7, 8, 0)}, as_before),
        ("import image", {"image new": (7, 8, 0)}, as_before),
        ("remove image", {}, image_is_gone),
        ("attach", {}, is_attached),
        ("detach", {}, is_detached),
        ("expand", {}, size_is_doubled),
        ("drop", {}, as_before),
        ("sweep", {}, as_before),
        ("note of contents", {}, content_is_noted),
    )
}
# What one call has left unsynced is still so while the next ones run.
ROWS: dict[str, tuple[Step, ...]] = {
    **{name: (step,) for name, step in SINGLE.items()},
    "a name used twice": (
        Step(lambda kit: kit.create("new"), {"new": (0, 0, 0)}),
        Step(lambda kit: kit.write("new", 7), {"new": (7, 0, 0)}, is_daemons=True),
        Step(lambda kit: kit.snapshot("t", of="new"), {"snapshot t": (7, 0, 0)}),
        Step(lambda kit: kit.delete("new"), {"new": None}),
        Step(lambda kit: kit.create("new", source=kit.from_snapshot("s")), {"new": (1, 0, 0)}),
        Step(lambda kit: kit.delete_snapshot("t"), {"snapshot t": None}),
        Step(lambda kit: kit.snapshot("t", of="new"), {"snapshot t": (1, 0, 0)}),
    ),
    "generations": (
        Step(lambda kit: kit.write("v", 8, block=1), {"v": (1, 8, 3)}, is_daemons=True),
        Step(lambda kit: kit.snapshot("t", of="v"), {"snapshot t": (1, 8, 3)}),
        Step(lambda kit: kit.write("v", 9), {"v": (9, 8, 3)}, is_daemons=True),
        Step(lambda kit: kit.create("new", source=kit.from_volume("v")), {"new": (9, 8, 3)}),
        Step(lambda kit: kit.delete_snapshot("s"), {"snapshot s": None}),
        Step(lambda kit: collector.sweep(kit.store)),
        Step(lambda kit: kit.delete("v"), {"v": None}),
    ),
    "copies that outlive their source": (
        Step(OPERATIONS["cache copy of snapshot"], {"new": (1, 0, 0)}),
        Step(
            lambda kit: kit.create("copy", source=kit.from_snapshot("s"), clone_mode="copy", image_format="raw"),
            {"copy": (1, 0, 0)},
        ),
        Step(lambda kit: kit.delete_snapshot("s"), {"snapshot s": None}),
        Step(lambda kit: collector.sweep(kit.store)),
        Step(lambda kit: kit.delete("new"), {"new": None}),
        Step(lambda kit: kit.snapshot("t", of="copy"), {"snapshot t": (1, 0, 0)}),
    ),
    "an image and what is made from it": (
        Step(import_new, {"image new": (7, 8, 0)}),
        Step(lambda kit: kit.create("new", source_image="new", size=SizeRange()), {"new": (7, 8, 0)}),
        Step(remove_new, {"image new": None}),
        Step(lambda kit: kit.delete("new"), {"new": None}),
        Step(import_new, {"image new": (7, 8, 0)}),
    ),
}
TRASH_ROWS: dict[str, tuple[Step, ...]] = {
    "trash volume": (Step(TRASH["trash volume"], {"k": None, "trash k": (1, 7, 7)}),),
    "trash snapshot": (Step(TRASH["trash snapshot"], {"snapshot ks": None, "trash ks": (1, 7, 0)}),),
    "restore volume": (Step(TRASH["restore volume"], {"tv": (1, 8, 8), "trash tv": None}),),
    "restore snapshot": (Step(TRASH["restore snapshot"], {"snapshot ts": (1, 8, 0), "trash ts": None}),),
    "purge volume": (Step(TRASH["purge volume"], {"trash tv": None}),),
    "purge snapshot": (Step(TRASH["purge snapshot"], {"trash ts": None}),),
    "to the trash and back": (
        Step(TRASH["trash volume"], {"k": None, "trash k": (1, 7, 7)}),
        Step(lambda kit: kit.create("k"), {"k": (0, 0, 0)}),
        Step(lambda kit: kit.delete("k"), {"k": None}),
        Step(lambda kit: restore(kit, "k"), {"k": (1, 7, 7), "trash k": None}),
        Step(lambda kit: kit.write("k", 9), {"k": (9, 7, 7)}, is_daemons=True),
        Step(lambda kit: kit.snapshot("t", of="k"), {"snapshot t": (9, 7, 7)}),
        Step(TRASH["trash volume"], {"k": None, "trash k": (9, 7, 7)}),
        Step(lambda kit: [kit.purge(entry_id) for entry_id in entries_of(kit, "k")], {"trash k": None}),
    ),
}
TRASH_BEFORE: Model = {
    **BEFORE,
    "k": (1, 7, 7),
    "snapshot ks": (1, 7, 0),
    "trash tv": (1, 8, 8),
    "trash ts": (1, 8, 0),
}
assert set(OPERATIONS | IMAGES | TRASH) <= set(ROWS | TRASH_ROWS), "an operation of the crash tests is not here"


# --- recording and cutting -------------------------------------------------------------------------------------


@dataclass
class Row:
    """A row of calls as it was recorded; `ends` says how many events there were when each was answered."""

    steps: Sequence[Step]
    start: Tree
    events: list[Event]
    ends: list[int]
    before: Model

    def answered(self, cut: int) -> int:
        """Give how many calls had been answered at a cut."""
        return sum(end <= cut for end in self.ends)

    def model(self, answered: int) -> Model:
        """Give what is there once so many calls were answered."""
        model = dict(self.before)
        for step in self.steps[:answered]:
            model.update(step.changes)
        return model


def record(root: Path, steps: Sequence[Step], before: Model) -> Row:
    """Do a row of calls and write down what they do to the files."""
    recorder = Recorder(root)
    ends = []
    with recorder.recording():
        kit = Kit(Store(str(root)))
        for step in steps:
            step.work(kit)
            if step.is_daemons:
                recorder.flushed_outside()
            ends.append(len(recorder.events))
        kit.store.close()
    recorder.check_complete()
    return Row(steps, recorder.start, recorder.events, ends, before)


def copied(source: Path) -> Path:
    """Give a copy of a pool, beside it."""
    target = source.with_name("recorded")
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True, timeout=20)
    return target


@dataclass(frozen=True)
class Case:
    """One cut of a row: after so many events, with this luck."""

    cut: int
    luck: Luck


def cases(row: Row, *, number: int = CUTS) -> Iterator[Case]:
    """Give so many cuts by dice, of which one loses all that is unsynced after the last answer; 0: every cut."""
    dice = random.Random(SEED)
    last = len(row.events)
    if number:
        yield Case(last, ALL_LOST)
        for _ in range(number - 1):
            by_dice = chance(dice.randrange(1 << 31))
            yield Case(dice.randrange(last + 1), dice.choice([*EXTREMES, by_dice, by_dice, by_dice]))
        return
    for cut in range(last + 1):
        for luck in (*EXTREMES, chance(dice.randrange(1 << 31)), chance(dice.randrange(1 << 31))):
            yield Case(cut, luck)


def holds(kit: Kit, name: str, blocks: Blocks | None) -> bool:
    kind, _, rest = name.rpartition(" ")
    if kind == "snapshot":
        if blocks is None:
            return kit.store.find_snapshot(kit.snapshot_id(rest)) is None
        return kit.snapshot_holds(rest, *blocks)
    if kind == "image":
        found = kit.store.find_image(kit.image_id(rest))
        return found is None if blocks is None else found is not None and kit.layer_holds(found.layer, *blocks)
    if kind == "trash":
        layers = [records.layer_of(entry) for entry in trashed(kit, rest)]
        return layers == [] if blocks is None else len(layers) == 1 and kit.layer_holds(layers[0], *blocks)
    if blocks is None:
        return kit.store.find_volume(kit.volume_id(rest)) is None
    return kit.holds(rest, *blocks)


def trashed(kit: Kit, name: str) -> list[records.Deletable]:
    return [entry for entry in map(kit.store.find_trashed, entries_of(kit, name)) if entry]


def check_model(kit: Kit, model: Model) -> None:
    for name, blocks in model.items():
        assert holds(kit, name, blocks), f"{name} is not {blocks}"


def check_case(as_new: Files, kit: Kit, row: Row, case: Case, dice: random.Random) -> None:
    """Be the controller that comes after the cut, and look at everything."""
    answered = row.answered(case.cut)
    is_idle = case.cut in {0, *row.ends}
    model = row.model(answered)
    pending = [] if is_idle or answered == len(row.steps) else [row.steps[answered]]
    free = {name for step in pending for name in step.changes}
    if is_idle or dice.random() < 0.7:  # else the retry comes before the collector
        kit.sweep_until_quiet()
        assert kit.errors() == []
        check_model(kit, {name: blocks for name, blocks in model.items() if name not in free})
        if answered:
            row.steps[answered - 1].check(kit)
    for step in pending:
        retry(lambda: step.work(kit))  # noqa: B023 - called at once
        answered += 1
        row.steps[answered - 1].check(kit)
    kit.sweep_until_quiet()
    left = kit.check() if dice.random() < 0.2 else kit.findings()
    assert not left, left
    kit.consistency()
    check_model(kit, row.model(answered))
    kit.delete_everything()
    assert tree(kit.store.root) == as_new


Look = Callable[[Kit, Row, Case, random.Random], None]


def try_cuts(row: Row, target: Path, chosen: Iterable[Case], look: Look) -> int:
    """Replay a row up to each of these cuts and look at what is left; gives how many different states there were."""
    seen: set[object] = set()
    for number, case in enumerate(chosen):
        left = after_cut(row.start, row.events[: case.cut], case.luck)
        key = (left.key(), row.answered(case.cut))
        if key in seen:
            continue
        seen.add(key)
        left.put(target)
        store = Store(str(target))
        try:
            look(Kit(store), row, case, random.Random(SEED + number))
        except BaseException as error:
            before = row.events[case.cut - 1] if case.cut else "nothing"
            error.add_note(f"cut after event {case.cut} ({before}), {case.luck.name}, seed {SEED}")
            raise
        finally:
            store.close()
    return len(seen)


@pytest.fixture
def target(template: tuple[Path, Files]) -> Iterator[Path]:
    """The directory in which what a cut leaves is put."""
    made = template[0].with_name("cut")
    made.mkdir()
    yield made
    shutil.rmtree(made)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ROWS)
def test_nothing_acknowledged_is_lost_in_a_power_cut(
    name: str, template: tuple[Path, Files], target: Path, impatient: None
) -> None:
    source, as_new = template
    row = record(copied(source), ROWS[name], BEFORE)
    states = try_cuts(row, target, cases(row), partial(check_case, as_new))
    print(f"{name}: {len(row.events)} events, {states} states after a cut, seed {SEED}")
    assert states


@pytest.fixture(scope="module")
def trash_template() -> Iterator[tuple[Path, Files]]:
    """A pool with something in the trash and something to be put there, and how it looked when it was new."""
    yield from test_crash_steps.made_by(test_crash_steps.fill, test_crash_states.fill_trash)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TRASH_ROWS)
def test_trash_loses_nothing_in_a_power_cut(
    name: str, trash_template: tuple[Path, Files], target: Path, impatient: None
) -> None:
    source, as_new = trash_template
    row = record(copied(source), TRASH_ROWS[name], TRASH_BEFORE)
    states = try_cuts(row, target, cases(row), partial(check_case, as_new))
    print(f"{name}: {len(row.events)} events, {states} states after a cut, seed {SEED}")
    assert states


NAMES_UNSYNCED = 20


@pytest.mark.parametrize("name", ["create from volume", "snapshot", "copy of volume", "cache copy of snapshot"])
def test_one_name_that_is_lost_takes_nothing_with_it(
    name: str, template: tuple[Path, Files], target: Path, impatient: None
) -> None:
    """At the moments at which what is written down elsewhere rests on a name: claims of records, and new layers."""
    source, as_new = template
    row = record(copied(source), ROWS[name], BEFORE)
    cuts = [at for at, event in enumerate(row.events, 1) if isinstance(event, Names) and rests_on_others(event)]
    chosen = [Case(cut, all_but(number)) for cut in cuts for number in range(1, NAMES_UNSYNCED)]
    random.Random(SEED).shuffle(chosen)
    states = try_cuts(row, target, chosen[: CUTS * 4 or None], partial(check_case, as_new))
    print(f"{name}: {len(cuts)} moments, {states} states after a cut")
    assert states


def rests_on_others(event: Names) -> bool:
    """Say whether a record or its claim gets its name."""
    return any(".json" in name and number is not None for _, name, number in event.changes)


def named(row: Row, ending: str) -> tuple[int, int]:
    """Give when the first file with this ending got its name, and the directory of that."""
    return next(
        (at, directory)
        for at, event in enumerate(row.events)
        if isinstance(event, Names)
        for directory, name, number in event.changes
        if number is not None and name.endswith(ending)
    )


def is_synced(row: Row, directory: int, after: int, before: int) -> bool:
    return any(isinstance(event, Synced) and event.number == directory for event in row.events[after:before])


@pytest.mark.parametrize(("name", "intent"), [("create from volume", "volume_id"), ("snapshot", "snapshot_id")])
def test_intent_of_a_freeze_is_durable_before_the_volumes_claim(
    name: str, intent: str, template: tuple[Path, Files], impatient: None
) -> None:
    root = copied(template[0])
    kit = Kit(Store(str(root)))
    volume = kit.store.volume(kit.volume_id("v"))
    kit.store.close()
    row = record(root, ROWS[name], BEFORE)
    made, directory = named(row, f"{getattr(kit, intent)('new')}.json")
    claimed, _ = named(row, f"{volume.id}.json.g{volume.generation + 1}")
    assert is_synced(row, directory, made, claimed)


def test_image_of_a_cache_is_durable_before_its_record(template: tuple[Path, Files], impatient: None) -> None:
    row = record(copied(template[0]), ROWS["cache copy of snapshot"], BEFORE)
    made, directory = named(row, ".qcow2")
    at = next(
        at
        for at, event in enumerate(row.events)
        if isinstance(event, Names) and at > made and event.changes[0][:1] == (directory,)
    )
    assert is_synced(row, directory, made, at)


# --- merges ----------------------------------------------------------------------------------------------------


def check_merge(as_new: Files, kind: str, kit: Kit, row: Row, case: Case, dice: random.Random) -> None:
    test_crash_merges.after_a_kill(kit, kind, as_new, redo=dice.random() < 0.7)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", crash_runner.MERGES)
def test_merge_loses_nothing_in_a_power_cut(
    kind: str, merge_template: tuple[Path, Files], target: Path, impatient: None
) -> None:
    source, as_new = merge_template
    work = Step(lambda kit: crash_runner.merge(kit, kind, lambda: None))
    row = record(copied(source), [work], {})
    states = try_cuts(row, target, cases(row), partial(check_merge, as_new, kind))
    print(f"{kind}: {len(row.events)} events, {states} states after a cut, seed {SEED}")
    assert states


# --- a new pool ------------------------------------------------------------------------------------------------


def test_pool_init_goes_on_after_a_power_cut(target: Path) -> None:
    root = target.with_name("new")
    root.mkdir()
    recorder = Recorder(root)
    with recorder.recording():
        made = layout.initialise(str(root), owner=OWNER, modes=Modes())
    recorder.check_complete()
    as_new = tree(root)
    dice = random.Random(SEED)
    last = len(recorder.events)
    for cut in (last, *(dice.randrange(last + 1) for _ in range(CUTS)), *(() if CUTS else range(last - 20, last))):
        for luck in (ALL_LOST, NAMES_ONLY, chance(dice.randrange(1 << 31))):
            after_cut(recorder.start, recorder.events[:cut], luck).put(target)
            again = layout.initialise(str(target), owner=OWNER, modes=Modes())
            assert cut < last or again.uuid == made.uuid, f"cut {cut}, {luck.name}, seed {SEED}"
            store = Store(str(target))
            collector.sweep(store)
            store.close()
            assert tree(target) == as_new, f"cut {cut}, {luck.name}, seed {SEED}"
    shutil.rmtree(root)


# --- these tests can fail --------------------------------------------------------------------------------------


def unsynced_files(patch: pytest.MonkeyPatch) -> None:
    """The files of a new layer and the record that names it are not synced before they get their names."""
    patch.setattr(Steps, "sync_all", lambda *_: None)


def unsynced_names(patch: pytest.MonkeyPatch) -> None:
    """A directory is never synced."""
    patch.setattr(Steps, "sync", lambda *_: None)


def unsynced_records(patch: pytest.MonkeyPatch) -> None:
    """What a record is replaced by is not synced before the rename."""
    right = Steps.write_temporary
    patch.setattr(Steps, "write_temporary", lambda self, write, **named: right(self, write, **{**named, "sync": False}))


def unsynced_markers(patch: pytest.MonkeyPatch) -> None:
    """A marker's name is not synced before the record that needs it."""
    right = Steps.sync_all
    patch.setattr(
        Steps, "sync_all", lambda self, paths: right(self, [path for path in paths if not path.endswith(".refs")])
    )


def unsynced_removal(patch: pytest.MonkeyPatch) -> None:
    """A delete is answered before it is durable."""
    right = Steps.rename

    def rename(steps: Steps, path: str, name: str, **_: bool) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Steps, "sync", lambda *_: None)
            right(steps, path, name)

    patch.setattr(Steps, "rename", rename)
    patch.setattr(Steps, "unlink", lambda self, path, **_: self.discard(path) or True)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("create blank", unsynced_files),
        ("create blank", unsynced_names),
        ("expand", unsynced_records),
        ("create from snapshot", unsynced_markers),
        ("delete volume", unsynced_removal),
    ],
)
def test_missing_sync_would_be_noticed(
    name: str,
    wrong: Callable[[pytest.MonkeyPatch], None],
    template: tuple[Path, Files],
    target: Path,
    impatient: None,
) -> None:
    source, as_new = template
    with pytest.MonkeyPatch.context() as patch:
        wrong(patch)
        row = record(copied(source), ROWS[name], BEFORE)
    # backwards: most is lost at the end
    chosen = sorted(cases(row, number=0), key=lambda case: -case.cut)
    assert is_noticed(lambda: try_cuts(row, target, chosen, partial(check_case, as_new)))


def test_record_before_its_data_would_be_noticed(template: tuple[Path, Files], target: Path, impatient: None) -> None:
    source, as_new = template
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volumes, "_create_blank", volumes._create_blank)
        crash_runner.publish_before_data()
        row = record(copied(source), ROWS["create blank"], BEFORE)
    chosen = [Case(cut, ALL_LOST) for cut in range(len(row.events), 0, -1)]
    assert is_noticed(lambda: try_cuts(row, target, chosen, partial(check_case, as_new)))


# --- the model of a cut itself ---------------------------------------------------------------------------------


def left_by(work: Callable[[Path], None], luck: Luck, *, before: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """Do something in a directory, cut the power, and give the files that are left."""
    with tempfile.TemporaryDirectory(prefix="csi-quobyte-test-") as base:
        root, target = Path(base, "done"), Path(base, "left")
        for directory in (root, target):
            directory.mkdir()
        for name, data in (before or {}).items():
            (root / name).write_bytes(data)
        recorder = Recorder(root)
        with recorder.recording():
            work(root)
        recorder.check_complete()
        after_cut(recorder.start, recorder.events, luck).put(target)
        return {path.name: path.read_bytes() for path in target.iterdir()}


def write_file(path: Path, *, sync: bool) -> None:
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    os.pwrite(fd, b"data", 0)
    if sync:
        os.fsync(fd)
    os.close(fd)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def test_cut_after_a_synced_file_may_lose_its_name() -> None:
    def work(root: Path) -> None:
        write_file(root / "a", sync=True)

    assert left_by(work, ALL_LOST) == {}
    assert left_by(work, NAMES_ONLY) == {"a": b"data"}


def test_cut_after_a_synced_name_may_lose_the_data() -> None:
    def work(root: Path) -> None:
        write_file(root / "a", sync=False)
        sync_directory(root)

    assert left_by(work, ALL_LOST) == {"a": b""}
    assert left_by(work, ZEROS) == {"a": bytes(4)}
    assert left_by(work, replace(ALL_LOST, data=lambda: "part")) == {"a": b"da"}
    assert left_by(work, ALL_THERE) == {"a": b"data"}


def test_cut_after_an_unsynced_rename_leaves_the_old_or_the_new_file() -> None:
    def work(root: Path) -> None:
        write_file(root / "a", sync=True)
        sync_directory(root)
        write_file(root / "b", sync=True)
        os.rename(root / "b", root / "a")

    seen = {frozenset(left_by(work, chance(seed))) for seed in range(20)}
    assert seen == {frozenset({"a"}), frozenset({"a", "b"})}


def test_what_another_process_wrote_is_there_once_it_is_synced() -> None:
    def work(root: Path, *, sync: bool) -> None:
        subprocess.run(["sh", "-c", f"printf new > {root}/a.raw"], check=True, timeout=10)
        fd = os.open(root / "a.raw", os.O_RDONLY)
        if sync:
            os.fsync(fd)
        os.close(fd)

    old = {"a.raw": b"old"}
    assert left_by(partial(work, sync=False), ALL_LOST, before=old) == old
    assert left_by(partial(work, sync=True), ALL_LOST, before=old) == {"a.raw": b"new"}


def test_recorder_notices_what_goes_past_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    (tmp_path / "a").write_bytes(b"unseen")
    with pytest.raises(AssertionError, match="past the recorder"):
        recorder.check_complete()
