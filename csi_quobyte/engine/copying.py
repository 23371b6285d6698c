"""Copies of a chain into one new image, in the background: a volume of the clone mode copy, the cache of a snapshot.

    L (frozen) <-- c-N            before and while it is copied: no record N, so that nothing below L may change
    N (no parent) <-- v-V or s-S  once it is published; c-N goes after the volume is ready, or the cache is

A copy may take hours, so no call waits for it: `Copier` starts it on one of a few threads of the pool and raises
Busy with how far it is; the retry finds it, or what it has made. It ends with this process; the next retry, or the
first pass of the next controller's collector, begins it again from nothing.

Always true: of all processes one copies a volume (a lock, and where that does not reach, the first to publish); what is
being copied is a temporary file, and becomes the image only when it is whole; the lock of the volume or snapshot is
held for a moment at the end and not while data moves, so that it can be deleted at any time.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from csi_quobyte.engine import layers, removal
from csi_quobyte.engine.removal import Release
from csi_quobyte.errors import FINAL, Busy, Corrupt, DriverError, NotFound, Unavailable
from csi_quobyte.host import jobs
from csi_quobyte.host.jobs import Progress
from csi_quobyte.host.qemu import ImageLayer, QemuTools
from csi_quobyte.pool import images, records
from csi_quobyte.pool.chain import chain_of
from csi_quobyte.pool.records import (
    LayerRecord,
    LayerState,
    Preallocation,
    SnapshotRecord,
    SnapshotState,
    VolumeRecord,
    VolumeState,
    child_marker,
    same_version,
    snapshot_marker,
    volume_marker,
)
from csi_quobyte.pool.sizes import human
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

COPIES_AT_ONCE: Final = 2
"""For each pool; further ones wait for their turn."""
FIRST_WAIT_S: Final = 0.5
"""A call waits so long for its copy: what is small is answered at once."""

_NOTE_EVERY_S = 1.0  # how often the progress is written down, and the volume's record is looked at
_LOCK_PATIENCE_S = 30.0
_LOCK_PAUSE_S = 0.05
_CANCEL_WAIT_S = 5.0
_STALE_S = 2.2  # a client shows what was there a second ago
_FAILURES_KEPT = 1000

Watch = jobs.Watch


class Copies(Protocol):
    """What makes the copies that volumes ask for."""

    def volume(self, store: Store, volume: VolumeRecord, release: Release) -> VolumeRecord:
        """Give the volume once what its pinned intent says has been copied.

        Raises:
            Busy: it is under way, or waits for its turn; the message says how far it is.
            Unavailable: it was broken off, and begins again with the next call.
            Exhausted, Corrupt, OutOfRange: it cannot be made; nothing of the volume is left.
        """

    def cache(self, store: Store, snapshot_id: str) -> None:
        """Make the cache of a snapshot, if it is not there: the same errors as `volume`, and NotFound.

        All who want it at once share one copy.
        """

    def failure(self, volume_id: str) -> tuple[VolumeRecord, DriverError] | None:
        """Give, once, why the last copy of a volume failed for good, and what the volume was to be."""

    def cancel(self, volume_id: str) -> None:
        """Stop the copying of a volume that is being deleted, and forget a failure of it."""


# --- one copy --------------------------------------------------------------------------------------------------


def copy_volume(
    store: Store, tools: QemuTools, volume: VolumeRecord, watch: Watch, *, speed_bytes_per_s: int | None = None
) -> VolumeRecord:
    """Do what the pinned intent of a volume says: copy what `parent` shows into its head, and make the volume ready.

    Raises:
        Stopped: the watch said so, or the volume is not what it was any more.
        Busy: another process copies it, or a merge is under way below its source.
        Exhausted, Corrupt, OutOfRange: it cannot be done; the intent is as it was.
        Unavailable: the pool or the copying process failed; try again.
    """
    if volume.parent is None or not volume.pinned:
        raise Corrupt(f"volume {volume.id} is not one that can be copied: its source is not held")
    with store.lock(f"copy of {volume.head}"):
        _check_unchanged(store, volume)
        copied = None
        record = _base_record(volume.head, volume)
        if store.image_bytes(record) is None:  # an image that has its name is whole
            attentive = _attentive(store, record.id, lambda: _check_unchanged(store, volume), watch)
            copied = _copy_chain(
                store,
                tools,
                volume.parent,
                record,
                attentive,
                preallocation=volume.preallocation,
                speed_bytes_per_s=speed_bytes_per_s,
            )
        try:
            with _lock_patiently(store, volume.id):
                _check_unchanged(store, volume)
                made = _publish(store, volume, record, copied)
        finally:
            if copied:
                store.discard_temporary(copied)
        # die here: a marker that nothing needs, which the collector removes
        store.unmark(volume.parent, child_marker(volume.head))
        return made


def _base_record(layer_id: str, volume: VolumeRecord) -> LayerRecord:
    return LayerRecord(
        id=layer_id,
        file=f"{layer_id}.{volume.image_format}",
        format=volume.image_format,
        size_bytes=volume.size_bytes,
        parent=None,
        state=LayerState.HEAD,
        depth=1,
    )


def _copy_chain(
    store: Store,
    tools: QemuTools,
    source: str,
    target: LayerRecord,
    watch: Watch,
    *,
    preallocation: Preallocation,
    speed_bytes_per_s: int | None,
) -> str:
    """Copy what layer `source` shows into a temporary file, and give its path; whole and durable on return.

    The file is made as that of a blank volume is, with its preallocation, and then filled.
    """
    chain = _sound_chain(store, source)
    # what an upper layer hides of a lower one counts twice
    needed_bytes = sum(found[1] for layer in chain if (found := store.image_bytes(layer)))
    store.check_room(min(needed_bytes, target.size_bytes), f"the copy of layer {source}")
    opened = [ImageLayer(one.id, store.image_path(one), one.format) for one in chain]
    writer = images.blank(target.format, size_bytes=target.size_bytes, preallocation=preallocation)
    path = store.write_image(writer)
    try:
        jobs.copy_chain(
            tools,
            opened,
            path,
            target.format,
            size_bytes=target.size_bytes,
            watch=watch,
            target_is_made=True,
            speed_bytes_per_s=speed_bytes_per_s,
        )
    except BaseException:
        store.discard_temporary(path)
        raise
    finally:
        store.drop_progress(target.id)
    return path


def _sound_chain(store: Store, source: str) -> tuple[LayerRecord, ...]:
    """Give the chain of a layer that is held, base first.

    What looks damaged is looked at again later: a client may show a record, just after a merge elsewhere, as it was a
    second ago, and the source of a copy that is given up as damaged may have been deleted since.

    Raises:
        Busy: a merge is under way in it.
        Corrupt: it is damaged.
    """
    try:
        return _chain_now(store, source)
    except Corrupt:
        time.sleep(_STALE_S)
    return _chain_now(store, source)


def _chain_now(store: Store, source: str) -> tuple[LayerRecord, ...]:
    chain = tuple(reversed(chain_of(source, store.find_layer)))
    layers.check_quiet(store, chain)
    images.check_chain(store, chain)
    return chain


def _publish(store: Store, volume: VolumeRecord, record: LayerRecord, copied: str | None) -> VolumeRecord:
    """Make the copied file the head of its volume, and the volume ready, which is the commit. The volume is locked."""
    done = replace(volume, state=VolumeState.READY, unfinished=False, pinned=False, parent=None)
    with store.prepared(volume, done) as ready:
        # without a file of ours the image is there already, and is not made
        store.make_layer(record, volume_marker(volume), copied or _never, also=[ready.temporary])
        return store.commit(ready)


def _never(_: int) -> None:
    raise Busy("an image that was there is gone: another operation has given it up")


def _check_unchanged(store: Store, volume: VolumeRecord) -> None:
    current = store.find_volume(volume.id)
    if current is None or not same_version(current, volume):
        raise jobs.Stopped(f"volume {volume.id} is not what it was when its copy began")


def _attentive(store: Store, layer_id: str, check: Callable[[], None], watch: Watch) -> Watch:
    """Give a watch that now and then notes how far the copy is, and calls `check`, which stops it by an error."""
    noted_at = 0.0

    def attentive(progress: Progress) -> jobs.Answer:
        nonlocal noted_at
        if time.monotonic() - noted_at >= _NOTE_EVERY_S:
            noted_at = time.monotonic()
            store.put_progress(layer_id, progress.current_bytes, progress.total_bytes)
            check()
        return watch(progress)

    return attentive


@contextmanager
def _lock_patiently(store: Store, name: str) -> Iterator[None]:
    """Hold a lock that calls take for a moment, too.

    Raises:
        Busy: it was taken all the time.
    """
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            lock = store.lock(name)
            lock.__enter__()
        except Busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOCK_PAUSE_S)
        else:
            break
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


# --- the cache of a snapshot -----------------------------------------------------------------------------------


def cache_of(store: Store, snapshot: SnapshotRecord) -> LayerRecord | None:
    """Give the layer that is a copy of all that a snapshot shows, None if it is not made yet."""
    return store.find_layer(snapshot.cache) if snapshot.cache else None


def fill_cache(
    store: Store, tools: QemuTools, snapshot_id: str, watch: Watch, *, speed_bytes_per_s: int | None = None
) -> None:
    """Make the cache E of a snapshot S on layer L; made before is success.

    1 swap S: `cache: E`. 2 c-E in L; S is looked at again. 3 the copy. 4 E's refs with s-S, image, record (commit).
    5 c-E out of L. A crash before 4 leaves what the next who wants the cache goes on with, or `end_dead_cache` undoes.

    Raises:
        NotFound: there is no such snapshot (any more).
        Stopped, Busy, Exhausted, Corrupt, Unavailable: as `copy_volume`.
    """
    with store.lock(copy_lock(snapshot_id)):
        with _lock_patiently(store, snapshot_id):
            snapshot = store.snapshot(snapshot_id)
            if snapshot.state is not SnapshotState.READY:
                raise NotFound(f"snapshot {snapshot_id} is not there to be copied")
            if snapshot.cache is None:
                snapshot = store.swap(snapshot, replace(snapshot, cache=records.new_layer_id()))
        entry = str(snapshot.cache)
        if cache_of(store, snapshot) is None:
            try:
                _fill_cache(store, tools, snapshot, entry, watch, speed_bytes_per_s)
            except (*FINAL, jobs.Stopped) as error:
                if not isinstance(error, jobs.Stopped) or not _is_wanted(store, snapshot):
                    _give_up_cache(store, snapshot, entry)
                raise
        # die here: a marker that nothing needs, which the collector removes
        store.unmark(snapshot.layer, child_marker(entry))


def _fill_cache(
    store: Store,
    tools: QemuTools,
    snapshot: SnapshotRecord,
    entry: str,
    watch: Watch,
    speed_bytes_per_s: int | None,
) -> None:
    store.mark(snapshot.layer, child_marker(entry))
    _check_wanted(store, snapshot)
    record = LayerRecord(
        id=entry,
        file=f"{entry}.qcow2",
        format="qcow2",
        size_bytes=max(snapshot.size_bytes, store.layer(snapshot.layer).size_bytes),
        parent=None,
        state=LayerState.FROZEN,
        depth=1,
    )
    copied = None
    if store.image_bytes(record) is None:  # an image that has its name is whole
        attentive = _attentive(store, entry, lambda: _check_wanted(store, snapshot), watch)
        copied = _copy_chain(
            store,
            tools,
            snapshot.layer,
            record,
            attentive,
            preallocation="off",
            speed_bytes_per_s=speed_bytes_per_s,
        )
    try:
        with _lock_patiently(store, snapshot.id):
            _check_wanted(store, snapshot)
            store.make_layer(record, snapshot_marker(snapshot), copied or _never, is_commit=True)
    finally:
        if copied:
            store.discard_temporary(copied)
    _check_wanted(store, snapshot)  # where locks do not reach, it may have been deleted in that moment


def copy_lock(snapshot_id: str) -> str:
    """The name of the lock of who makes the cache of a snapshot."""
    return f"copy of {snapshot_id}"


def end_dead_cache(store: Store, snapshot_id: str) -> bool:
    """Give up a cache that was begun and that nobody makes any more, so that merges are not kept from its source.

    The caller holds `copy_lock`. One that is being made where locks do not reach says how far it is; in the moment
    before it first does, it is stopped by this and begun again by who wants it.
    """
    snapshot = store.find_snapshot(snapshot_id)
    if snapshot is None or snapshot.state is not SnapshotState.READY or snapshot.cache is None:
        return False
    if cache_of(store, snapshot) or store.may_be_filled(snapshot.cache):
        return False
    if set(store.markers(snapshot.cache) or []) - {snapshot_marker(snapshot)}:
        return False  # something lies on it: its record was lost, and that is for `check`
    _give_up_cache(store, snapshot, snapshot.cache)
    return True


def _give_up_cache(store: Store, snapshot: SnapshotRecord, entry: str) -> None:
    """Undo a cache that cannot be made, or whose snapshot is gone: first the name of it, then what there is."""
    with _lock_patiently(store, snapshot.id):
        current = store.find_snapshot(snapshot.id)
        if current and current.cache == entry:
            store.swap(current, replace(current, cache=None))
    layers.abandon(store, entry, snapshot_marker(snapshot), parent=snapshot.layer, intent=snapshot.id)


def _is_wanted(store: Store, snapshot: SnapshotRecord) -> bool:
    current = store.find_snapshot(snapshot.id)
    return current is not None and current.state is SnapshotState.READY and current.cache == snapshot.cache


def _check_wanted(store: Store, snapshot: SnapshotRecord) -> None:
    if not _is_wanted(store, snapshot):
        raise jobs.Stopped(f"snapshot {snapshot.id} was deleted while it was copied")


# --- in the background -----------------------------------------------------------------------------------------


@dataclass
class _Job:
    """One copy: waiting, running or ended."""

    uid: str = ""
    progress: Progress | None = None
    error: DriverError | None = None
    made: VolumeRecord | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def watch(self, progress: Progress) -> jobs.Answer:
        """What the copying process is asked with."""
        self.progress = progress
        return "stop" if self.stop.is_set() else "go on"

    def __str__(self) -> str:
        if self.progress is None:
            return "waits for its turn"
        if not self.progress.total_bytes:
            return "has begun"
        share = 100 * self.progress.current_bytes // self.progress.total_bytes
        return f"is at {share} % of {human(self.progress.total_bytes)}"


class Copier:
    """The copies of one pool; `stop` ends what is under way."""

    def __init__(
        self,
        tools: QemuTools,
        name: str,
        *,
        first_wait_s: float = FIRST_WAIT_S,
        speed_bytes_per_s: int | None = None,
    ) -> None:
        """`name` is the pool's; `speed_bytes_per_s` limits each copy."""
        self._tools = tools
        self._speed_bytes_per_s = speed_bytes_per_s
        self._first_wait_s = first_wait_s
        self._guard = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        self._failures: dict[str, tuple[VolumeRecord, DriverError]] = {}
        self._cache_failures: dict[str, DriverError] = {}
        self._stopping = False
        self._threads = ThreadPoolExecutor(COPIES_AT_ONCE, thread_name_prefix=f"copier-{name}")

    def volume(self, store: Store, volume: VolumeRecord, release: Release) -> VolumeRecord:
        """See `Copies`."""
        job = self._job(volume.id, lambda job: self._copy(store, volume, job, release), uid=volume.uid)
        job.ended.wait(self._first_wait_s)
        if job.made:
            return job.made
        if job.error:
            self.failure(volume.id)  # it is told now
            raise job.error
        raise Busy(f"the copy for volume {volume.id} {job}; it goes on, try again")

    def resume(self, store: Store, volume_id: str, release: Release) -> bool:
        """Begin a copy again that nobody makes. Returns at once; True: somebody may be at it, so ask again later."""
        volume = store.find_volume(volume_id)
        if volume is None or volume.state is not VolumeState.CREATING or not volume.pinned:
            return False
        if store.may_be_filled(volume.head):
            return True
        with suppress(Unavailable, Busy):  # this process ends, or the volume is being deleted
            self._job(volume.id, lambda job: self._copy(store, volume, job, release), uid=volume.uid)
        return True

    def cache(self, store: Store, snapshot_id: str) -> None:
        """See `Copies`."""
        with self._guard:
            failed = self._cache_failures.pop(snapshot_id, None)
        if failed:
            raise failed
        job = self._job(snapshot_id, lambda job: self._fill(store, snapshot_id, job))
        if not job.ended.wait(self._first_wait_s):
            raise Busy(f"the copy of snapshot {snapshot_id} {job}; it goes on, try again")
        if job.error:
            with self._guard:
                self._cache_failures.pop(snapshot_id, None)  # it is told now
            raise job.error

    def failure(self, volume_id: str) -> tuple[VolumeRecord, DriverError] | None:
        """See `Copies`."""
        with self._guard:
            return self._failures.pop(volume_id, None)

    def cancel(self, volume_id: str) -> None:
        """See `Copies`."""
        self.failure(volume_id)
        with self._guard:
            job = self._jobs.get(volume_id)
            if job and job.progress is None:
                del self._jobs[volume_id]  # it has not begun, and will not
        if job:
            job.stop.set()
            if job.progress:
                # where that is not enough, it ends by itself once it looks at the volume's record
                job.ended.wait(_CANCEL_WAIT_S)

    def stop(self, timeout_s: float) -> bool:
        """End what is under way and begin nothing more; False if that takes longer than the time limit."""
        deadline = time.monotonic() + timeout_s
        with self._guard:
            self._stopping = True
            running = list(self._jobs.values())
        for job in running:
            job.stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        return all(job.progress is None or job.ended.wait(deadline - time.monotonic()) for job in running)

    def _job(self, key: str, work: Callable[[_Job], None], uid: str = "") -> _Job:
        """Give the job of a volume or snapshot, begun now or by an earlier call; `uid`: of which volume of that id.

        Raises:
            Busy: one for an earlier volume of the id has not ended yet.
            Unavailable: this process ends.
        """
        with self._guard:
            if self._stopping:
                raise Unavailable("this controller ends")
            present = self._jobs.get(key)
            if present and not present.stop.is_set() and present.uid == uid:
                return present
            if present and not present.ended.is_set():
                raise Busy(f"an earlier copy for {key} is being stopped")
            job = self._jobs[key] = _Job(uid)
            self._threads.submit(self._run, key, job, work)
            return job

    def _run(self, key: str, job: _Job, work: Callable[[_Job], None]) -> None:
        started = time.monotonic()
        try:
            if job.stop.is_set():
                raise jobs.Stopped("stopped before it began")
            job.progress = Progress(0, 0)
            work(job)
            log.info("the copy for %s took %.1f s", key, time.monotonic() - started)
        except DriverError as error:
            log.log(logging.INFO if isinstance(error, Busy) else logging.WARNING, "the copy for %s: %s", key, error)
            job.error = error
        except Exception as error:  # the traceback tells of the bug
            log.exception("the copy for %s", key)
            job.error = Unavailable(f"the copy for {key} ended with an unexpected error: {error!r}")
        finally:
            with self._guard:
                if self._jobs.get(key) is job:
                    del self._jobs[key]
            job.ended.set()

    def _copy(self, store: Store, volume: VolumeRecord, job: _Job, release: Release) -> None:
        try:
            job.made = copy_volume(store, self._tools, volume, job.watch, speed_bytes_per_s=self._speed_bytes_per_s)
        except FINAL as error:
            # final for the sidecars: they forget the volume, so nothing of it may stay
            with removal.undoing(), _lock_patiently(store, volume.id):
                released = removal.remove_volume(store, volume)
            release(released)
            self._remember(volume, error)
            raise
        release(volume.parent)

    def _fill(self, store: Store, snapshot_id: str, job: _Job) -> None:
        try:
            fill_cache(store, self._tools, snapshot_id, job.watch, speed_bytes_per_s=self._speed_bytes_per_s)
        except NotFound:
            raise  # who asks next sees for himself whether the snapshot is there
        except FINAL as error:
            with self._guard:
                while len(self._cache_failures) >= _FAILURES_KEPT:
                    del self._cache_failures[next(iter(self._cache_failures))]
                self._cache_failures[snapshot_id] = error
            raise

    def _remember(self, volume: VolumeRecord, error: DriverError) -> None:
        """Keep an error for the call that asks for this volume next."""
        with self._guard:
            while len(self._failures) >= _FAILURES_KEPT:
                del self._failures[next(iter(self._failures))]
            self._failures[volume.id] = (volume, error)
