"""The collector: removes what nothing refers to, and finishes what a crash has left half done.

One thread per pool in the controller. A delete tells it which layer has lost a reference, and it drops that and what
becomes unreferenced below it, or lets the merger (engine/merger) have a look; now and then, and at the start, it looks
at everything. It never delays a call, takes each object's lock before it touches it (Busy: next time), and every step
of it can be repeated after a crash.

While any record of the pool cannot be read, nothing whose owner is unknown is removed: the unreadable record may be
the owner.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial

from csi_quobyte import telemetry
from csi_quobyte.engine import copying, hold, layers, merging, removal, trash
from csi_quobyte.engine import index as index_module
from csi_quobyte.engine.check import is_needed_unmarked
from csi_quobyte.engine.index import Index, Stray
from csi_quobyte.engine.lease import Lease
from csi_quobyte.engine.merger import Merger, Work, end_begun, plan_near, work_in
from csi_quobyte.engine.merging import Plan
from csi_quobyte.engine.removal import Release
from csi_quobyte.errors import Busy, Corrupt, DriverError, Exhausted
from csi_quobyte.host.qemu import QemuTools
from csi_quobyte.pool import images, records
from csi_quobyte.pool.naming import is_claim
from csi_quobyte.pool.pace import Pace, no_pace
from csi_quobyte.pool.pools import Pool
from csi_quobyte.pool.records import (
    ImageFormat,
    ImageState,
    LayerRecord,
    LayerState,
    Marker,
    SnapshotState,
    TrashState,
    VolumeState,
    is_layer_id,
    layer_of,
    note_uid,
    parse_marker,
)
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

PASS_EVERY_S = 300.0
# of the time that a pass took: of a slow or large pool it has one tenth of all time at most, while something is in its
# way one quarter
_REST_AFTER_PASS = 9.0
_REST_BEFORE_RETRY = 3.0
RESUME_EVERY_S = 60.0
AGAIN_AFTER_S = 15.0  # after a piece of work that failed or was in somebody's way
_PASSES_AT_MOST = 5
# between passes when a claim is in the way: some passes later it counts as a dead process's
_CLAIM_PAUSE_S = 1.0
_LOCK = "collector"
SETTLE_S = 2.2
"""So long after its first look a pass waits before it looks again for who may need what it is about to remove: a client
may show a directory as it was a second ago."""
_SETTLE_STEP_S = 0.1


@dataclass
class Report:
    """What one pass did; `left` counts what it could not do for a moment: a dead process's claim was in the way."""

    finished_deletes: int = 0
    finished_freezes: int = 0
    purged: int = 0
    restored: int = 0
    markers: int = 0
    layers: int = 0
    files: int = 0
    left: int = 0

    def __bool__(self) -> bool:
        return any(vars(self).values())

    @property
    def is_stuck(self) -> bool:
        """Whether nothing was done, and something is left."""
        return bool(self.left) and sum(vars(self).values()) == self.left


class Collector:
    """The collector thread of one pool, and its merger; started once, stopped with `stop`."""

    def __init__(
        self,
        pool: Pool,
        tools: QemuTools,
        *,
        merges: bool = True,
        speed_bytes_per_s: int | None = None,
        resume: Callable[[Store, str, Release], bool] | None = None,
    ) -> None:
        """See `Merger` for `merges` and `speed_bytes_per_s`; `resume` begins a broken off copy of a volume again, and
        says whether it is to be asked again.
        """
        self._pool = pool
        self._resume = resume
        self._others_copies: set[str] = set()
        self._resume_at = 0.0
        self._merger = Merger(pool, tools, self.release, begins=merges, speed_bytes_per_s=speed_bytes_per_s)
        self._unmarked: Mapping[str, Sequence[str]] | None = None  # not known before the first look at everything
        self._released: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._said = ""
        self._thread = threading.Thread(target=self._run, name=f"collector-{pool.name}", daemon=True)

    def start(self) -> None:
        """Begin with a look at everything."""
        self._released.put(None)
        self._thread.start()
        self._merger.start()

    def release(self, layer_id: str | None) -> None:
        """Tell that a layer has lost a reference (None: look at everything). Returns at once."""
        self._released.put(layer_id)

    def closed(self, layer_ids: Sequence[str]) -> None:
        """Tell that a node has closed these layers: merges that waited for that can be done. Returns at once."""
        for layer_id in layer_ids:
            self._merger.look_at(layer_id, closed=True)

    def stop(self, timeout_s: float) -> bool:
        """End after the step at hand; False if that takes longer than the time limit."""
        until = time.monotonic() + timeout_s
        self._stopping.set()
        self._released.put(None)
        merger_ended = self._merger.stop(timeout_s)
        self._thread.join(max(0.0, until - time.monotonic()))
        return merger_ended and not self._thread.is_alive()

    def _run(self) -> None:
        due = time.monotonic() + PASS_EVERY_S  # the next look at everything, also when there is always something to do
        took_s = 0.0  # by the last one
        while not self._stopping.is_set():
            layer_id = self._next(due)
            if self._stopping.is_set():
                return
            begun = time.monotonic()
            done = self._work(layer_id)
            now = time.monotonic()
            if layer_id is None:
                took_s = now - begun
                telemetry.COLLECTOR_PASS_SECONDS.labels(self._pool.name).set(took_s)
                due = now + max(PASS_EVERY_S, took_s * _REST_AFTER_PASS)
            if not done:
                due = min(due, now + max(AGAIN_AFTER_S, took_s * _REST_BEFORE_RETRY))

    def _next(self, due: float) -> str | None:
        """Wait for a layer that has lost a reference; None: everything is to be looked at, at `due` at the latest."""
        while not self._stopping.is_set():
            now = time.monotonic()
            if self._others_copies and now >= self._resume_at:
                self._resume_copies()
            if now >= due:
                return None
            until = min(due, self._resume_at) if self._others_copies else due
            with suppress(queue.Empty):
                return self._released.get(timeout=max(0.0, until - now))
        return None

    def _resume_copies(self) -> None:
        """Ask again for the copies that somebody else may have been at: his host may have died."""
        self._resume_at = time.monotonic() + RESUME_EVERY_S
        try:
            store = self._pool.open()
            self._others_copies = {one for one in self._others_copies if self._is_resumed_later(store, one)}
        except DriverError as error:
            log.info("collector of pool %s: %s", self._pool.name, error)

    def _is_resumed_later(self, store: Store, volume_id: str) -> bool:
        return bool(self._resume and not self._stopping.is_set() and self._resume(store, volume_id, self.release))

    def _work(self, layer_id: str | None) -> bool:
        """Do one piece of work; an error never ends the thread. False: something is to be done again soon."""
        try:
            store = self._pool.open()
            if layer_id is None:
                self._merger.take(self._sweep_until_quiet(store))
                return True
            dropped = self._drop_upwards(store, layer_id)
            telemetry.LAYERS_DROPPED.labels(self._pool.name).inc(dropped)
            if dropped or store.find_layer(layer_id) is None:
                return True
            # it is referred to, or something was in the way of dropping it
            self._merger.look_at(layer_id)
            return self._unmarked is None or bool(store.markers(layer_id))
        except Busy as error:
            log.info("collector of pool %s: %s", self._pool.name, error)
        except DriverError as error:
            telemetry.COLLECTOR_FAILURES.labels(self._pool.name).inc()
            # a pool that is not mounted is said once, not every quarter of a minute
            log.log(
                logging.DEBUG if str(error) == self._said else logging.WARNING,
                "collector of pool %s: %s",
                self._pool.name,
                error,
            )
            self._said = str(error)
        except Exception:  # the thread must live on; the counter and the traceback tell of the bug
            telemetry.COLLECTOR_FAILURES.labels(self._pool.name).inc()
            log.exception("collector of pool %s", self._pool.name)
        return False

    def _drop_upwards(self, store: Store, layer_id: str) -> int:
        """Drop a layer and then each parent that nothing refers to any more, as far as markers can be believed."""
        keep = partial(self._is_needed_unmarked, store)
        return 0 if keep(layer_id) else layers.drop_upwards(store, layer_id, keep=keep)

    def _is_needed_unmarked(self, store: Store, layer_id: str) -> bool:
        """Say whether a record needs a layer whose marker of that was missing at the last look at everything.

        Then only the next such look may say that nothing needs the layer, as before the first one.
        """
        return self._unmarked is None or is_needed_unmarked(store, layer_id, self._unmarked)

    def _sweep_until_quiet(self, store: Store) -> Work:
        """Look again after a pass that did something: what it removed may have been the last owner of more.

        Gives what the last look has found for the merger.
        """
        pace = Pace(lambda: self._pool.is_serving, sleep=self._stopping.wait)
        found: Index | None = None
        for _ in range(_PASSES_AT_MOST):
            found = None  # no two in memory at a time
            report, found = _sweep(store, pace)
            if not report or self._stopping.is_set():
                break
            telemetry.LAYERS_DROPPED.labels(self._pool.name).inc(report.layers)
            log.info("collector of pool %s: %s", self._pool.name, report)
            if report.left:
                self._stopping.wait(_CLAIM_PAUSE_S)
        if found is None:
            return Work()
        pinned = [volume.id for volume in found.volumes.values() if volume.pinned]
        self._others_copies = {volume_id for volume_id in pinned if self._is_resumed_later(store, volume_id)}
        self._resume_at = time.monotonic() + RESUME_EVERY_S
        work = work_in(found, store, pace=pace)
        self._unmarked = work.unmarked
        return work


@dataclass(frozen=True)
class Collected:
    """What one pass of `collect` has dropped or finished."""

    report: Report


def collect(store: Store, tools: QemuTools, *, merges: bool, purges: bool = True) -> Iterator["Collected | Plan"]:
    """Do at once all that the collector would do, with or without `merges`, and give each thing when it is done.

    Raises:
        Busy: another process does this now.
    """
    lease = Lease()
    stuck = 0
    try:
        while True:
            report, found = _sweep(store, no_pace, purges=purges)
            stuck = stuck + 1 if report.is_stuck else 0
            if report and stuck < _PASSES_AT_MOST:
                yield Collected(report)
                if stuck:
                    time.sleep(_CLAIM_PAUSE_S)
                continue
            work = work_in(found, store)
            if not work.begun and not work.left and not (merges and work.free):
                return
            if not lease.hold(store):
                raise Busy("another process merges layers in this pool at this moment")
            rest = end_begun(store, tools, work, is_held=lambda: lease.is_safe(store))
            busy = (rest.begun, rest.left) != (work.begun, work.left)
            for layer_id in work.free if merges else ():
                plan = plan_near(store, layer_id, unmarked=work.unmarked)
                if plan is None or not merging.has_space(store, plan):
                    continue
                if merging.merge(store, tools, plan, is_held=lambda: lease.is_safe(store)):
                    busy = True
                    yield plan
            if not busy:
                return
    finally:
        lease.release(store)


def plans(store: Store) -> list[Plan]:
    """Give the merges that a pool's contents call for, those that move the least first."""
    work = work_in(index_module.read(store), store)
    return [plan for layer_id in work.free if (plan := plan_near(store, layer_id, unmarked=work.unmarked))]


def sweep(store: Store, *, pace: Callable[[], None] = no_pace) -> Report:
    """Look at everything once and do what can be done; a second pass over a quiet pool does nothing.

    `pace` is called between small steps of reading. No two indexes are in memory at a time.

    Raises:
        Busy: another collector is at work on this pool.
    """
    return _sweep(store, pace)[0]


def _sweep(store: Store, pace: Callable[[], None], *, purges: bool = True) -> tuple[Report, Index]:
    """Do what `sweep` does, and give what was found last, too."""
    with store.lock(_LOCK):
        report = Report()
        found = index_module.read(store, brief=True, pace=pace)
        second = _SecondLook(store, pace)
        _end_dead_jobs(store, found, report)
        _finish_deletes(store, found, report)
        _empty_trash(store, found, report, purges=purges)
        _finish_freezes(store, found, report)
        _revoke_announced(store, found, report)
        if found.unreadable:
            log.error(
                "nothing without a known owner is removed while these records cannot be read: %s",
                "; ".join(found.unreadable.values()),
            )
            if all(is_layer_id(record_id) for record_id in found.unreadable):
                _drop_unreferenced(store, found, report, second)
                _remove_markers_of_nothing(store, found, report, second)
                _remove_damaged_layers(store, found, report)
        else:
            _end_dead_caches(store, found, report)
            if report:
                del found
                found = index_module.read(store, brief=True, pace=pace)
                second = _SecondLook(store, pace)
            if not found.unreadable:  # what could be read at first may be unreadable at the second look
                _remove_stale_markers(store, found, report, second)
                _drop_unreferenced(store, found, report, second)
                _remove_orphan_files(store, found, report)
        _clean_temporaries(store, report)
        return report, found


class _SecondLook:
    """Which layers records name, read once more in a pass that is about to remove something.

    What an intent needs only a look at all intents can tell. A client may show a directory as it was a second ago, so
    that the first look has missed one; whoever was about to write it then has written it now.
    """

    def __init__(self, store: Store, pace: Callable[[], None]) -> None:
        self._store = store
        self.pace = pace
        self._first_ended = time.monotonic()

    @cached_property
    def names(self) -> index_module.Names:
        """What is named now; the first call waits."""
        until = self._first_ended + SETTLE_S
        while time.monotonic() < until:
            time.sleep(_SETTLE_STEP_S)
            self.pace()
        return index_module.read_names(self._store, pace=self.pace)

    def needs(self, layer_id: str, marker: Marker) -> bool:
        """Say whether something that is being made may need a marker: of a child, or on a layer, that is intended."""
        if self.names.unreadable:
            return True
        return (marker.id if marker.kind == "c" else layer_id) in self.names.intended


@contextmanager
def _if_free(store: Store, report: Report, *names: str) -> Iterator[bool]:
    """Hold some locks, or give False when one of them is taken. What fails for one object must not stop the work on the
    rest: it is looked at again in the next pass.
    """
    with ExitStack() as stack:
        try:
            for name in names:
                stack.enter_context(store.lock(name))
        except Busy:
            yield False
            return
        try:
            yield True
        except DriverError as error:
            report.left += isinstance(error, Busy)  # the others are for a human, another pass would not help
            log.warning("left for the next pass: %s", error)


def _finish_deletes(store: Store, found: Index, report: Report) -> None:
    """Take away what a delete has decided on and a crash has left."""
    for volume in found.volumes.values():
        if volume.state is VolumeState.DELETING:
            names = [volume.id]
            if volume.source and volume.source.kind == "volume" and volume.unfinished:
                names.append(volume.source.id)
            with _if_free(store, report, *names) as free:
                current = store.find_volume(volume.id) if free else None
                if current and current.state is VolumeState.DELETING:
                    removal.remove_volume(store, current)
                    report.finished_deletes += 1
    for snapshot in found.snapshots.values():
        if snapshot.state is SnapshotState.DELETING:
            with _if_free(store, report, snapshot.source_volume, snapshot.id) as free:
                current_snapshot = store.find_snapshot(snapshot.id) if free else None
                if current_snapshot and current_snapshot.state is SnapshotState.DELETING:
                    removal.remove_snapshot(store, current_snapshot)
                    report.finished_deletes += 1
    # One that is being made now has its lock held; where locks do not reach, its job's record says so.
    is_importing = any(not store.is_over(job) for job in found.jobs.values())
    for image in found.images.values():
        if image.state is ImageState.DELETING or (image.state is ImageState.CREATING and not is_importing):
            with _if_free(store, report, image.id) as free:
                current_image = store.find_image(image.id) if free else None
                if current_image and current_image.state is not ImageState.READY:
                    removal.remove_image(store, current_image)
                    report.finished_deletes += 1


def _empty_trash(store: Store, found: Index, report: Report, *, purges: bool) -> None:
    """Purge what was kept for long enough, and finish the purges and restores that a crash has left."""
    now: datetime | None = None
    for entry_id, entry in found.trash.items():
        state = entry.trash.state if entry.trash else TrashState.KEPT
        if state is TrashState.KEPT:
            if not purges or not trash.is_expired(entry, records.now()):
                continue
            now = now or store.time()  # this host's clock may be wrong
            if not trash.is_expired(entry, now):
                continue
        with _if_free(store, report):
            if state is TrashState.RESTORING:
                trash.go_on_restoring(store, entry_id)
                report.restored += 1
                continue
            trash.purge(store, entry_id)
            report.purged += 1
            log.info("%s is purged from the trash", entry_id)


def _finish_freezes(store: Store, found: Index, report: Report) -> None:
    """Freeze what a crash left unfrozen below a head, or a power cut below a layer that was a head then."""
    for volume in found.volumes.values():
        head = found.layers.get(volume.head)
        below = found.layers.get(head.parent) if head and head.parent else None
        if below and below.state is LayerState.HEAD and volume.state is VolumeState.READY:
            with _if_free(store, report, volume.id) as free:
                current = store.find_volume(volume.id) if free else None
                if current and current.head == volume.head:
                    layers.finish_freeze(store, current)
                    report.finished_freezes += 1
    if found.unreadable:
        return
    heads = {volume.head for volume in found.volumes.values()} | {layer_of(entry) for entry in found.trash.values()}
    lain_on = {layer.parent for layer in found.layers.values()}
    lain_on |= {snapshot.layer for snapshot in found.snapshots.values() if snapshot.state is SnapshotState.READY}
    for layer in found.layers.values():
        if layer.state is LayerState.HEAD and layer.id in lain_on and layer.id not in heads:
            with _if_free(store, report):
                report.finished_freezes += layers.freeze_passed(store, layer.id)


def _end_dead_jobs(store: Store, found: Index, report: Report) -> None:
    """Take away what jobs hold whose processes have died: their snapshot, their marker, then their record."""
    for job in found.jobs.values():
        if not store.is_over(job):
            continue
        with _if_free(store, report):
            # One that has renewed it at this moment after all is left alone; from here on it cannot renew it any more.
            hold.end(store, store.swap(job, job))
            report.files += 1
            log.info("the process has ended that made this: %s", job.what)
    for snapshot_id, job_id in found.orphaned_snapshots():
        with _if_free(store, report):
            if store.find_job(job_id) is None:
                hold.drop_snapshot(store, job_id)
                report.files += 1
                log.info("the export has ended that took snapshot %s", snapshot_id)


def _end_dead_caches(store: Store, found: Index, report: Report) -> None:
    """Give up the caches of snapshots that a crash has left half made; see `copying.end_dead_cache`."""
    for snapshot in found.snapshots.values():
        if snapshot.cache and snapshot.cache not in found.layers:
            with _if_free(store, report, copying.copy_lock(snapshot.id)) as free:
                report.files += free and copying.end_dead_cache(store, snapshot.id)


def _revoke_announced(store: Store, found: Index, report: Report) -> None:
    """Take away the announcements of blank volumes whose making a crash has ended; one that is being made now has its
    lock held. From then on nobody can publish it; if somebody had, its record is seen by the further looks of this pass
    and the next, which take away what is left of one that nobody has.
    """
    for layer_id, volume_id in found.announced.items():
        with _if_free(store, report, volume_id) as free:
            if free:
                store.revoke(volume_id, layer_id)
                report.files += 1


def _remove_stale_markers(store: Store, found: Index, report: Report, second: _SecondLook) -> None:
    """Take away markers that no record justifies.

    The records were read after the markers, so none is about to come for the first time. But they were not all read at
    one moment: what had still been an intent when the volume was read may have become its head since. So all intents
    are read once more, and then the owner, under its lock, before anything is removed.
    """
    for layer_id, names in list(found.refs.items()):
        second.pace()
        for name in names:
            marker = parse_marker(name)
            if marker is None or found.needs(layer_id, marker) or second.needs(layer_id, marker):
                continue
            locks = [marker.id] if marker.kind in {"v", "s", "i"} else []
            with _if_free(store, report, *locks) as free:
                if free and not index_module.is_needed_now(store, layer_id, marker):
                    store.settle_name(marker.id)
                    log.warning("marker %s on layer %s belongs to nothing and is removed", name, layer_id)
                    store.unmark(layer_id, name)
                    found.refs[layer_id] = [other for other in found.refs[layer_id] if other != name]
                    report.markers += 1


def _drop_unreferenced(store: Store, found: Index, report: Report, second: _SecondLook) -> None:
    """Drop the layers without markers, and go on with a drop that a crash has interrupted.

    Besides the markers, no record may name them; for that all records are read anew, after those were that the first
    look has seen without a need. A marker that was lost is damage, which check reports.
    """
    candidates = [
        layer for layer in found.layers.values() if not found.refs.get(layer.id) and not store.markers(layer.id)
    ]
    if not candidates:
        return
    now = second.names
    below = _below_damaged(store, found)
    # what is damaged may lie on a layer that has lost its marker; what was decided before goes on
    candidates = [
        layer
        for layer in candidates
        if layer.state is LayerState.RETIRED or (below is not None and layer.id not in below)
    ]
    if now.unreadable.keys() - found.unreadable.keys():
        report.left += 1  # what cannot be read at this moment may name them
        return
    going = {layer.id for layer in candidates}
    keep = now.held | {layer.parent for layer in found.layers.values() if layer.parent and layer.id not in going}
    for layer in candidates:
        if layer.state is not LayerState.RETIRED and (layer.id in now.named or layer.id in now.held):
            continue
        with _if_free(store, report):
            dropped = layers.drop_upwards(store, layer.id, keep=keep.__contains__, is_unnamed=True)
            report.layers += dropped
            report.left += not dropped and store.find_layer(layer.id) is not None


def _below_damaged(store: Store, found: Index) -> set[str] | None:
    """Give the layers that those whose records are lost or cannot be read lie on, by the names in their images.

    None: it is not known, because an image cannot be read, either.
    """
    named = {layer_of(one) for one in (*found.volumes.values(), *found.trash.values(), *found.snapshots.values())}
    damaged = (found.unreadable.keys() | found.lost_layers | named) - found.layers.keys()
    below = set()
    for layer_id in filter(is_layer_id, damaged):
        layer = _as_it_may_be(layer_id, "qcow2")  # a raw one lies on nothing
        if store.image_bytes(layer) is None:
            continue
        try:
            name = images.read_header(store, layer).backing_name
        except Corrupt:
            return None
        if name:
            below.add(name.rpartition("/")[2].partition(".")[0])
    return below


def _as_it_may_be(layer_id: str, image_format: ImageFormat) -> LayerRecord:
    """Give a record for finding the file of a layer whose own is lost."""
    file = f"{layer_id}.{image_format}"
    return LayerRecord(id=layer_id, file=file, format=image_format, size_bytes=0, parent=None, state=LayerState.FROZEN)


def _remove_markers_of_nothing(store: Store, found: Index, report: Report, second: _SecondLook) -> None:
    """Take the markers of children of which nothing is left, neither record nor file, out of layers with torn records:
    one that all of its children have left would stay for ever.

    As in `_remove_stale_markers`, the markers were read before the records, so that no intent is about to need one.
    """
    for layer_id in found.unreadable:
        for name in found.refs.get(layer_id, []):
            marker = parse_marker(name)
            if marker is None or marker.kind != "c" or found.needs(layer_id, marker):
                continue
            if marker.id in second.names.intended or second.names.unreadable.keys() - found.unreadable.keys():
                continue
            with _if_free(store, report):
                if not _is_anything_left(store, marker.id) and not index_module.is_needed_now(store, layer_id, marker):
                    store.settle_name(marker.id)
                    store.unmark(layer_id, name)
                    report.markers += 1


def _is_anything_left(store: Store, layer_id: str) -> bool:
    files = [_as_it_may_be(layer_id, "qcow2"), _as_it_may_be(layer_id, "raw")]
    return store.markers(layer_id) is not None or any(store.image_bytes(one) is not None for one in files)


def _remove_damaged_layers(store: Store, found: Index, report: Report) -> None:
    """Remove layers whose own record is what cannot be read, once their volumes and snapshots have been deleted.

    Nothing else could: no call names a layer. An empty refs directory says that nobody owns one; the caller has seen
    that every volume and snapshot can be read, so that a lost marker of theirs would show.
    """
    below = _below_damaged(store, found)
    if below is None:
        return
    for layer_id in found.unreadable:
        if layer_id in below or layer_id in found.named_layers or layer_id in found.intended_layers:
            continue
        if store.markers(layer_id):
            continue
        with _if_free(store, report):
            layers.remove_damaged(store, layer_id)
            report.layers += 1


def _remove_orphan_files(store: Store, found: Index, report: Report) -> None:
    """Remove images, refs and notes that have no record and that no unfinished operation names."""
    intended = found.intended_layers
    for stray in found.strays:
        if is_claim(stray.name):
            report.files += store.settle_claim(stray.folder, stray.shard, stray.name)
        elif _is_orphan(found, stray, intended):
            with _if_free(store, report):
                if stray.folder == "volumes" and _has_owner_now(store, stray):
                    continue
                if stray.name.endswith(".refs"):
                    store.condemn(stray.name.removesuffix(".refs"))
                else:
                    store.discard_stray(stray.folder, stray.shard, stray.name)
                report.files += 1


def _has_owner_now(store: Store, stray: Stray) -> bool:
    """Look once more for the volume of a note, in the order in which it moves; what is seen is durable then."""
    owner, _, ending = stray.name.partition(".")
    uid = note_uid(ending)
    volume = store.find_volume(owner)
    if (volume and volume.uid == uid) or store.find_trashed(f"{owner}-{uid}"):
        return True
    store.settle_name(owner)
    return False


def _is_orphan(found: Index, stray: Stray, intended: frozenset[str]) -> bool:
    owner, _, ending = stray.name.partition(".")
    if stray.folder == "layers" and is_layer_id(owner):
        if owner in found.layers or owner in intended or owner in found.named_layers or found.refs.get(owner):
            return False
        return ending in {"qcow2", "raw", "refs"}
    if stray.folder == "volumes" and (uid := note_uid(ending)):
        volume = found.volumes.get(owner)
        is_current = volume is not None and uid == volume.uid
        return not is_current and f"{owner}-{uid}" not in found.trash
    if stray.folder == "trash":
        entry = found.trash.get(owner)
        target = entry.trash.target if entry and entry.trash else None
        return target is None or ending != f"restore-{target.uid}"
    return False  # not ours: left alone, check reports it


def _clean_temporaries(store: Store, report: Report) -> None:
    for path in store.stale_temporaries():
        store.discard_temporary(path)
        report.files += 1
    try:
        store.replenish_reserve()
    except Exhausted as error:
        log.warning("the reserve of the pool cannot be filled up: %s", error)
