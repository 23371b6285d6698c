"""The hold of a long reader or writer that is no controller: a job record, and a marker in the top layer it reads.

    jobs/<id>.json  renewed every minute      L <-- c-<id>    no layer has that id, so nothing of L's chain may change

The record is made before the marker and removed after it. A job that reads a volume takes a snapshot of its own first,
whose name says whose it is. While the record is there the collector lets the marker, the snapshot and the temporary
files of its process be. When the process is dead (as locks tell on its mount), or has not renewed it for ten minutes,
the collector removes them.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime

from csi_quobyte.engine import removal
from csi_quobyte.errors import Busy, DriverError
from csi_quobyte.host import jobs
from csi_quobyte.pool import records
from csi_quobyte.pool.records import JobRecord, child_marker
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

RENEW_S = 60.0
GIVE_UP_S = 300.0
"""A job that could not be renewed for so long stops itself: half of the time after which it may be ended."""


class Hold:
    """One job's hold."""

    def __init__(self, store: Store, job: JobRecord, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._renewed_at = self._tried_at = clock()
        self._job = job
        self._failed: set[datetime] = set()  # the times in changes that failed, and may have been made all the same

    @property
    def job(self) -> JobRecord:
        """The job's record as this process has written it last."""
        if self._failed:
            found = self._store.find_job(self._job.id)
            # who ends a job writes it first, too, but with the time that stands there
            if found and found.generation == self._job.generation + 1 and found.renewed_at in self._failed:
                self._job = found
                self._failed.clear()
        return self._job

    def confirm(self) -> None:
        """Check, by renewing it, that the job was not ended by somebody else.

        Raises:
            Stopped: it was, or its record cannot be changed now.
        """
        try:
            self.change(self.job)
        except DriverError as error:
            raise jobs.Stopped(f"the record of this job could not be renewed: {error}") from error

    @property
    def marker(self) -> str:
        """What it puts into the refs of the layer that it reads."""
        return child_marker(self.job.id)

    @property
    def snapshot_name(self) -> str:
        """The CSI name of the snapshot that this job may take for itself; nobody else's has it."""
        return records.name_of_jobs_snapshot(self.job.id)

    def drop_snapshot(self) -> None:
        """Take away the snapshot that the job has taken for itself, once its marker holds the layer.

        Raises:
            Busy: another operation on the volume is running.
        """
        drop_snapshot(self._store, self.job.id)

    def change(self, job: JobRecord) -> None:
        """Write down what the job holds from now on, before its marker is made.

        Raises:
            Busy: the job was ended by somebody else, or an earlier change that failed is not ended yet.
        """
        present, following = self.job, replace(job, renewed_at=records.now())
        self._failed.add(following.renewed_at)
        self._job = self._store.swap(present, following)
        self._failed.clear()
        self._renewed_at = self._clock()

    def renew(self) -> None:
        """Show, when it is time, that the job lives.

        Raises:
            Stopped: it was ended by somebody else, or could not be renewed for too long.
        """
        now = self._clock()
        if now - self._tried_at < RENEW_S:
            return
        self._tried_at = now
        try:
            self.change(self.job)
        except DriverError as error:
            gone = isinstance(error, Busy) and self._store.find_job(self.job.id) is None
            if gone or now - self._renewed_at > GIVE_UP_S:
                raise jobs.Stopped(f"the record of this job could not be renewed: {error}") from error

    def watched(self, watch: jobs.Watch) -> jobs.Watch:
        """Give a watch that renews the hold meanwhile."""

        def watching(progress: jobs.Progress) -> jobs.Answer:
            self.renew()
            return watch(progress)

        return watching


@contextmanager
def holding(store: Store, what: str) -> Iterator[Hold]:
    """Have a job record inside the block; what it holds at the end is let go of."""
    now = records.now()
    job = JobRecord(
        id=records.new_layer_id(),
        token=store.token,
        place=store.place,
        what=what,
        layer=None,
        started_at=now,
        renewed_at=now,
    )
    try:
        hold = Hold(store, store.create(job))
    except DriverError:
        store.note_over(job)  # it may be there all the same
        raise
    try:
        yield hold
    finally:
        try:
            end(store, hold.job)
        except DriverError as error:
            # what the job was for is done, or has failed by itself; its record is ended as that of a dead process
            store.note_over(job)
            log.warning("left to the collector, the hold of %s: %s", what, error)


def end(store: Store, job: JobRecord) -> None:
    """Let go of all that a job holds: its snapshot, its marker, its record. What nothing needs then is the collector's.

    Raises:
        Busy: another operation on the volume is running; the record is still there.
    """
    drop_snapshot(store, job.id)
    if job.layer:
        store.unmark(job.layer, child_marker(job.id))
    store.remove(job)


def drop_snapshot(store: Store, job_id: str) -> None:
    """Take away the snapshot that a job has taken for itself, if there is one.

    Raises:
        Busy: another operation on the volume is running.
    """
    snapshot_id = records.snapshot_id(store.prefix, records.name_of_jobs_snapshot(job_id))
    snapshot = store.find_snapshot(snapshot_id)
    if snapshot is None:
        store.settle_name(snapshot_id)
        return
    with store.lock(snapshot.source_volume), store.lock(snapshot_id):
        current = store.find_snapshot(snapshot_id)
        if current:
            removal.remove_snapshot(store, current)
