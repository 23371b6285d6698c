"""The lease of a pool: one process merges layers in a pool, wherever its host is.

Locks may not reach between hosts, and two jobs that write one image destroy it. So the right to run them is a record
that changes by compare-and-set, and its holder renews it. What it runs it runs only while it is sure of it:

    0 s       the last renewal that the pool has taken
    30 s      `is_safe` says no: the job is ended, and nothing is committed any more
    45 s      a job whose process cannot ask, because it is stopped or hangs, has been killed (host/watchdog)
    120 s     another process, which has seen no renewal since, may take the lease

The rest of the time is for what the kernels still have under way. All clocks go on while a machine is suspended.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from csi_quobyte.errors import Busy, Corrupt, DriverError
from csi_quobyte.pool import records
from csi_quobyte.pool.records import LeaseRecord
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

LEASE_S = 120.0
"""A lease that is not renewed for so long, by the clock of who wants it, is another's to take."""
SAFE_S = 30.0
"""For so long after its last renewal the holder relies on it."""
_RENEW_S = 10.0


def _boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """One process's view of a pool's lease. The methods may be called from several threads."""

    def __init__(self, clock: Callable[[], float] = _boot_time) -> None:
        self._clock = clock
        self._guard = threading.Lock()
        self._record: LeaseRecord | None = None  # as this process has written it
        self._renewed_at = 0.0
        self._seen: tuple[int, str, float] | None = None  # another's version, and since when it is the same

    def hold(self, store: Store) -> bool:
        """Take or renew the lease if that can be done now; says whether this process has it."""
        with self._guard:
            if self._record and 0 <= self._clock() - self._renewed_at < _RENEW_S:
                return True
            began = self._clock()
            try:
                self._record = self._take(store)
            except (Busy, Corrupt) as error:
                if isinstance(error, Corrupt):
                    log.error("nothing is merged, and no merge is ended, while the lease cannot be read: %s", error)
                self._record = None
            if self._record:
                self._renewed_at = began  # what is written later counts from before
            return self._record is not None and self._clock() - began < SAFE_S

    def is_safe(self, store: Store) -> bool:
        """Say whether what needs the lease may go on: it is held, and was renewed not long ago."""
        try:
            return self.hold(store)
        except DriverError:  # the pool does not answer now
            return self._record is not None and self._clock() - self._renewed_at < SAFE_S

    @property
    def is_taken(self) -> bool:
        """Whether this process has taken it and not given it back; it may have run out since."""
        return self._record is not None

    def release(self, store: Store) -> None:
        """Let the next process have it at once. Only when nothing runs any more that needs it."""
        with self._guard:
            if self._record:
                try:
                    store.swap(self._record, replace(self._record, holder=""))
                except DriverError:
                    pass  # it runs out by itself
                self._record = None

    def _take(self, store: Store) -> LeaseRecord | None:
        mine = LeaseRecord(id=records.LEASE_ID, holder=store.token, place=store.place, renewed_at=records.now())
        current = store.find_lease()
        if current is None:
            return store.create(mine)
        if current.holder not in {"", store.token} and not self._is_over(store, current):
            return None
        return store.swap(current, replace(mine, generation=current.generation, nonce=current.nonce))

    def _is_over(self, store: Store, current: LeaseRecord) -> bool:
        """Say whether another's lease is one of a dead process, or was not renewed for long enough."""
        if current.place == store.place and not store.is_alive(current.holder):
            return True  # what it ran has died with it
        version = (current.generation, current.nonce)
        if self._seen is None or self._seen[:2] != version:
            self._seen = (*version, self._clock())
        return self._clock() - self._seen[2] > LEASE_S
