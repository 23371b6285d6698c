"""A call dies inside a step: a name is changed and not yet synced. Another process goes on from there. The power goes.

What the second one saw was in memory only; it must not have built on it, or answered, before that was durable.

Axes: operation × each fsync of directories at which it dies × who goes on (the retry, the collector, both, another
call) × what is left of the unsynced names. By default a sample by a seed; `make power-loss` does all of it.
"""

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import crash_runner
import pytest
import test_crash_merges
import test_power_loss
from controller_kit import Kit, tools, tree
from gates import DiedError, dies_before
from power_cut import ALL_LOST, Recorder, after_cut, all_but
from test_crash_steps import retry
from test_power_loss import (
    BEFORE,
    CUTS,
    SEED,
    SINGLE,
    TRASH_BEFORE,
    TRASH_ROWS,
    Files,
    Model,
    Step,
    check_model,
    copied,
)

from csi_quobyte.engine import collector, copying, hold, layers
from csi_quobyte.engine.merging import Plan
from csi_quobyte.errors import Busy, DriverError, Exhausted, NotFound, Unavailable
from csi_quobyte.operations import snapshots
from csi_quobyte.operations.snapshots import SnapshotRequest
from csi_quobyte.pool.records import LayerState, VolumeState
from csi_quobyte.pool.store import Store

pytestmark = pytest.mark.usefixtures("started_anew")
LUCKS = (ALL_LOST, all_but(1), all_but(2), all_but(3))
SAMPLES = 2
template = test_power_loss.template
trash_template = test_power_loss.trash_template
merge_template = test_power_loss.merge_template


class Dying:
    """A process that dies at its fsync of directories number `at`; from then on it does nothing any more."""

    def __init__(self, root: Path, at: int) -> None:
        self.is_dead = False
        self._left = at
        self.last = ("", "")
        store = Store(str(root), observer=self._observe)
        steps = store._steps
        self._sync, self._sync_all = steps._sync, steps.sync_all
        steps._sync = self._one  # type: ignore[method-assign]
        steps.sync_all = self._all  # type: ignore[method-assign]
        self.kit = Kit(store)

    def _observe(self, step: str, path: str) -> None:
        if self.is_dead:
            raise DiedError
        self.last = (step, path)

    def _die_if_it_is_time(self) -> None:
        self._left -= 1
        if self.is_dead or self._left == 0:
            self.is_dead = True
            raise DiedError

    def _one(self, directory: str) -> None:
        self._die_if_it_is_time()
        self._sync(directory)

    def _all(self, paths: Sequence[str]) -> None:
        if paths:
            self._die_if_it_is_time()
        self._sync_all(paths)

    def does(self, work: Callable[[Kit], object]) -> bool:
        """Do something; says whether it died of it."""
        try:
            work(self.kit)
        except DiedError:
            pass
        finally:
            self.kit.store.close()
        return self.is_dead


def dies_inside(root: Path, step: str, part: str) -> Kit:
    """A process that dies in the first such step, after its name was changed and before that is durable."""
    is_near = is_dead = False

    def observe(at: str, path: str) -> None:
        nonlocal is_near
        if is_dead:
            raise DiedError
        is_near = is_near or (at == step and part in path)

    store = Store(str(root), observer=observe)
    right = store._steps._sync

    def sync(directory: str) -> None:
        nonlocal is_dead
        if is_near or is_dead:
            is_dead = True
            raise DiedError
        right(directory)

    store._steps._sync = sync  # type: ignore[method-assign]
    return Kit(store)


def fails_once(store: Store, step: str, part: str) -> None:
    """Let the first fsync after such a step fail, as by a lost connection; all else works."""
    is_near = has_failed = False

    def observe(at: str, path: str) -> None:
        nonlocal is_near
        is_near = is_near or (at == step and part in path)

    right = store._steps._sync

    def sync(directory: str) -> None:
        nonlocal has_failed
        if is_near and not has_failed:
            has_failed = True
            raise Unavailable("lost for a moment")
        right(directory)

    store._steps._observer = observe
    store._steps._sync = sync  # type: ignore[method-assign]


# --- every operation, every such moment ------------------------------------------------------------------------


def goes_on(kit: Kit, step: Step, who: str, model: Model, recorder: Recorder) -> None:
    """Let others go on, and note in the model what they were told."""
    if "collector" in who:
        kit.sweep_until_quiet()
    if "other" in who:
        kit.write("v", 5)
        recorder.flushed_outside()
        kit.snapshot("other", of="v")
        model.update({"v": (5, 2, 3), "snapshot other": (5, 2, 3)})
    if "retry" in who:
        retry(lambda: step.work(kit))
        model.update(step.changes)


def look(kit: Kit, step: Step, who: str, model: Model, as_new: Files) -> None:
    """Be the controller that comes after the power cut."""
    free = set() if "retry" in who else set(step.changes)
    kit.sweep_until_quiet()
    assert kit.errors() == []
    if "retry" in who:
        step.check(kit)
    check_model(kit, {name: blocks for name, blocks in model.items() if name not in free})
    try:
        retry(lambda: step.work(kit))
    except NotFound:
        assert "other" in who, "the source has moved on"
    kit.sweep_until_quiet()
    assert kit.findings() == set()
    kit.consistency()
    kit.delete_everything()
    assert tree(kit.store.root) == as_new


def put(recorder: Recorder, luck: Any, target: Path) -> Kit:
    """Give what a cut leaves, as a new pool at `target`."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    after_cut(recorder.start, recorder.events, luck).put(target)
    return Kit(Store(str(target)))


def try_all(source: Path, as_new: Files, step: Step, before: Model, whos: Sequence[str]) -> int:
    """Let a call die at each of its fsyncs, others go on and the power go; gives how many moments there were.

    Of a sample the first moment is always looked at.
    """
    dice = random.Random(SEED)
    count = looks = 0
    while True:
        for who in whos:
            root = copied(source)
            recorder, model = Recorder(root), dict(before)
            with recorder.recording():
                dying = Dying(root, count + 1)
                if not dying.does(step.work):
                    assert looks == count * len(whos) or (CUTS and looks)
                    return count
                if CUTS and looks and dice.random() > SAMPLES / 20:
                    continue
                looks += 1
                kit = Kit(Store(str(root)))
                goes_on(kit, step, who, model, recorder)
                kit.store.close()
            recorder.check_complete()
            for luck in dice.sample(LUCKS, 1) if CUTS else LUCKS:
                after = put(recorder, luck, source.with_name("cut"))
                try:
                    look(after, step, who, model, as_new)
                except BaseException as error:
                    error.add_note(f"died in {dying.last}, then {who}, {luck.name}, seed {SEED}")
                    raise
                finally:
                    after.store.close()
        count += 1


WHO = ("retry", "collector, retry", "collector")
FREEZES = {"snapshot", "create from volume", "copy of volume"}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SINGLE)
def test_nothing_is_built_on_what_was_not_durable(name: str, template: tuple[Path, Files], impatient: None) -> None:
    whos = (*WHO, "other") if name in FREEZES else WHO
    moments = try_all(*template, SINGLE[name], BEFORE, whos)
    print(f"{name}: {moments} moments, seed {SEED}")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [name for name, row in TRASH_ROWS.items() if len(row) == 1])
def test_nothing_in_the_trash_is_built_on_what_was_not_durable(
    name: str, trash_template: tuple[Path, Files], impatient: None
) -> None:
    moments = try_all(*trash_template, TRASH_ROWS[name][0], TRASH_BEFORE, WHO)
    print(f"{name}: {moments} moments, seed {SEED}")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", crash_runner.MERGES)
def test_no_merge_is_ended_on_what_was_not_durable(
    kind: str, merge_template: tuple[Path, Files], impatient: None
) -> None:
    source, as_new = merge_template
    dice = random.Random(SEED)
    count = 0
    while True:
        root = copied(source)
        recorder = Recorder(root)
        with recorder.recording():
            dying = Dying(root, count + 1)
            if not dying.does(lambda kit: crash_runner.merge(kit, kind, lambda: None)):
                break
            count += 1
            if CUTS and count > 1 and dice.random() > SAMPLES / 20:
                continue
            recorder.flushed_outside()
            kit = Kit(Store(str(root)))
            kit.sweep_until_quiet()
            kit.store.close()
        recorder.check_complete()
        for luck in dice.sample(LUCKS, 1) if CUTS else LUCKS:
            after = put(recorder, luck, source.with_name("cut"))
            try:
                test_crash_merges.after_a_kill(after, kind, as_new, redo=False)
            except BaseException as error:
                error.add_note(f"died in {dying.last}, {luck.name}, seed {SEED}")
                raise
            finally:
                after.store.close()
    print(f"{kind}: {count} moments, seed {SEED}")


# --- single stories --------------------------------------------------------------------------------------------


@pytest.fixture
def played(kit: Kit, tmp_path: Path, impatient: None) -> Iterator["Played"]:
    """A pool whose calls are recorded, until the power goes."""
    made = Played(kit, tmp_path)
    yield made
    made.close()


class Played:
    """A story with two processes, and what is left of it after a power cut."""

    def __init__(self, kit: Kit, base: Path) -> None:
        self.kit = kit
        self.root = Path(kit.store.root)
        self._base = base
        self._opened: list[Store] = []

    def close(self) -> None:
        """Close what was opened."""
        for store in self._opened:
            store.close()

    def keep(self, kit: Kit) -> Kit:
        """Note a pool that is to be closed."""
        self._opened.append(kit.store)
        return kit

    def after(self, story: Callable[[], object]) -> Kit:
        """Record a story and give what a power cut leaves, to another controller whose collector has been there."""
        recorder = Recorder(self.root)
        with recorder.recording():
            story()
            recorder.flushed_outside()
        recorder.check_complete()
        after = self.keep(put(recorder, ALL_LOST, self._base / "after"))
        after.sweep_until_quiet()
        return after

    def dies(self, work: Callable[[Kit], object], step: str, part: str) -> None:
        """Let a process die inside a step of a call."""
        died = self.keep(dies_inside(self.root, step, part))
        with pytest.raises(DiedError):
            work(died)


def test_kept_volume_whose_way_to_the_trash_failed_once(played: Played) -> None:
    kit = played.kit
    kit.create("v", on_delete="retain")

    def story() -> None:
        fails_once(kit.store, "link", "/trash/")
        with pytest.raises(Unavailable):
            kit.delete("v")
        retry(lambda: kit.delete("v"))

    after = played.after(story)
    assert list(after.store.volume_ids()) or list(after.store.trash_ids())


def test_restored_volume_is_there_when_the_retry_says_so(played: Played) -> None:
    kit = played.kit
    kit.create("v", on_delete="retain")
    kit.write("v", 1)
    kit.delete("v")
    entry_id = kit.trashed("v")

    def story() -> None:
        played.dies(lambda died: died.restore(entry_id), "link", "/volumes/")
        kit.restore(entry_id)

    assert played.after(story).holds("v", 1)


def test_purged_entry_does_not_come_back(played: Played) -> None:
    kit = played.kit
    kit.create("v", on_delete="retain")

    def story() -> None:
        played.dies(lambda died: died.delete("v"), "unlink", "/volumes/")
        kit.purge(kit.trashed("v"))
        layers.drop_upwards(kit.store, kit.released[0])

    after = played.after(story)
    assert list(after.store.trash_ids()) == list(after.store.volume_ids()) == []
    assert after.findings() == set()


def test_restored_volume_shares_its_head_with_nobody(played: Played) -> None:
    kit = played.kit
    kit.create("v", on_delete="retain")
    kit.write("v", 1)

    def story() -> None:
        played.dies(lambda died: died.delete("v"), "unlink", "/volumes/")
        kit.restore(kit.trashed("v"), "w")

    after = played.after(story)
    assert after.holds("w", 1)
    assert after.findings() == set()
    assert list(after.store.trash_ids()) == []


def test_snapshot_of_an_export_that_died_does_not_stay(played: Played) -> None:
    kit = played.kit
    kit.create("v")
    kit.write("v", 1)

    def export(died: Kit) -> None:
        with hold.holding(died.store, "export") as held:
            request = SnapshotRequest(name=held.snapshot_name, source_volume=died.volume_id("v"), kubernetes={})
            snapshots.create(died.store, request, lambda _: None)
            held.drop_snapshot()

    def story() -> None:
        played.dies(export, "unlink", "/snapshots/")
        played._opened.pop().close()  # so that its job counts as a dead one's
        kit.sweep_until_quiet()
        assert kit.store.job_ids() == []

    assert list(played.after(story).store.snapshot_ids()) == []


def test_layer_that_a_volume_has_passed_is_frozen(played: Played) -> None:
    """The freeze of s was seen and not durable; with t the volume moved on, and nobody looks so far below its head."""
    kit = played.kit
    kit.create("v")
    kit.write("v", 1)

    def story() -> None:
        def die(_: Sequence[str]) -> None:
            raise DiedError

        died = played.keep(Kit(Store(str(played.root))))
        died.store.make_durable = die  # type: ignore[method-assign]
        with pytest.raises(DiedError):
            died.snapshot("s", of="v")
        kit.write("v", 2)
        kit.snapshot("t", of="v")

    after = played.after(story)
    assert [layer.state for layer in after.chain("v")][1:] == [LayerState.FROZEN] * 2
    after.consistency()


def test_passed_layer_is_found_by_the_collector(kit: Kit) -> None:
    kit.create("v")
    for pattern in (1, 2):
        kit.write("v", pattern)
        kit.snapshot(f"s{pattern}", of="v")
    passed = kit.chain("v")[2]
    kit.store.swap(passed, replace(passed, state=LayerState.HEAD))
    kit.sweep_until_quiet()
    assert kit.store.layer(passed.id).state is LayerState.FROZEN
    assert kit.store.layer(kit.chain("v")[0].id).state is LayerState.HEAD


def test_deleted_volume_whose_layer_was_dropped_does_not_come_back(played: Played) -> None:
    kit = played.kit
    kit.create("v")

    def story() -> None:
        played.dies(lambda died: died.delete("v"), "unlink", "/volumes/")
        kit.sweep_until_quiet()
        assert list(kit.store.layer_ids()) == []

    after = played.after(story)
    assert list(after.store.volume_ids()) == []
    assert after.findings() == set()


def test_delete_that_another_host_has_done_is_durable_when_it_is_answered(played: Played) -> None:
    kit = played.kit
    kit.create("v")
    done = []

    def story() -> None:
        def observe(step: str, path: str) -> None:
            if step == "link" and "/volumes/" in path and not done:
                done.append(path)
                played.dies(lambda died: died.delete("v"), "unlink", "/volumes/")

        other = played.keep(Kit(Store(str(played.root), observer=observe)))
        other.store.lock = lambda _: nullcontext()  # type: ignore[method-assign]
        retry(lambda: other.delete("v"))

    assert list(played.after(story).store.volume_ids()) == []


def merge_of_two_layers(kit: Kit) -> Plan:
    """A quiet pool whose volume v (1, 0, 3) calls for a merge."""
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.write("v", 3, block=2)
    kit.delete_snapshot("s")
    kit.sweep_until_quiet()
    (plan,) = kit.plans()
    return plan


def test_merge_whose_commit_failed_once(played: Played) -> None:
    kit = played.kit
    plan = merge_of_two_layers(kit)

    def story() -> None:
        fails_once(kit.store, "rename", f"{plan.child}.json")
        with pytest.raises(Unavailable):
            kit.merge(plan)

    after = played.after(story)
    assert after.errors() == []
    assert after.holds("v", 1, 0, 3)


def test_base_of_a_merge_is_not_dropped_before_the_commit_is_durable(played: Played) -> None:
    kit = played.kit
    plan = merge_of_two_layers(kit)
    assert plan.parent is None

    def story() -> None:
        played.dies(lambda died: died.merge(plan), "rename", f"{plan.child}.json")
        while collector.sweep(kit.store):
            pass
        assert kit.store.find_layer(plan.layer) is None

    after = played.after(story)
    assert after.errors() == []
    assert after.holds("v", 1, 0, 3)


def test_volume_whose_announcement_another_host_has_taken_away_is_durable(played: Played) -> None:
    revoked = []

    def story() -> None:
        def observe(step: str, path: str) -> None:
            if step == "unlink" and ".new-" in path and not revoked:
                name = path.rpartition("/")[2]
                revoked.append(name)
                played.dies(lambda died: died.store.revoke(*name.split(".new-")), "unlink", ".new-")

        played.keep(Kit(Store(str(played.root), observer=observe))).create("v")
        assert revoked

    assert list(played.after(story).store.volume_ids())


def test_undo_of_a_freeze_takes_no_head_of_a_volume_that_comes_back(played: Played) -> None:
    kit = played.kit
    kit.create("v")
    kit.write("v", 1)
    head = kit.chain("v")[0]
    died = played.keep(Kit(Store(str(played.root), observer=dies_before("link", f"{head.id}.json.g"))))
    with pytest.raises(DiedError):
        died.snapshot("s", of="v")

    def story() -> None:
        played.dies(lambda died: died.delete("v"), "unlink", "/volumes/")
        kit.delete_snapshot("s")

    assert played.after(story).errors() == []


def test_copy_that_failed_for_good_and_cannot_be_undone_is_not_final(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    copier = copying.Copier(tools(), "p", first_wait_s=10)
    kit.copies = copier  # type: ignore[assignment]

    def full(*_: object, **__: object) -> None:
        raise Exhausted("the target is full")

    swap = kit.store.swap

    def swap_unless_undoing(old: Any, new: Any) -> Any:
        if getattr(new, "state", None) is VolumeState.DELETING:
            raise Exhausted("the reserve is used up")
        return swap(old, new)

    monkeypatch.setattr(copying, "_copy_chain", full)
    with monkeypatch.context() as patch:
        patch.setattr(kit.store, "swap", swap_unless_undoing)
        with pytest.raises(DriverError) as caught:
            kit.create("c", source=kit.from_snapshot("s"), clone_mode="copy")
    copier.stop(5)
    assert isinstance(caught.value, (Unavailable, Busy))
    assert kit.store.find_volume(kit.volume_id("c"))
