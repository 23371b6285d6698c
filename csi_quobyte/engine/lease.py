"""The lease of a pool's collector: one process merges layers in a pool, wherever its host is.

Locks may not reach between hosts, and two jobs that write one image destroy it. So the right to run them is a record
that changes by compare-and-set: its holder renews it, and stops what it runs when it could not renew for half of the
time after which others may take it.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from csi_quobyte.errors import Busy, Corrupt, DriverError
from csi_quobyte.pool import records
from csi_quobyte.pool.records import LeaseRecord
from csi_quobyte.pool.store import Store

LEASE_S = 60.0
"""A lease that is not renewed for so long, by the clock of who wants it, is another's to take."""
_RENEW_S = 10.0


class Lease:
    """One process's view of a pool's lease."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._record: LeaseRecord | None = None  # as this process has written it
        self._renewed_at = 0.0
        self._seen: tuple[int, str, float] | None = None  # another's version, and since when it is the same

    def hold(self, store: Store) -> bool:
        """Take or renew the lease if that can be done now; says whether this process has it."""
        if self._record and self._clock() - self._renewed_at < _RENEW_S:
            return True
        began = self._clock()
        try:
            self._record = self._take(store)
        except (Busy, Corrupt):
            self._record = None
        if self._record:
            self._renewed_at = began  # what is written later counts from before
        return self._record is not None

    def is_safe(self, store: Store) -> bool:
        """Say whether a job may go on: the lease is held, and was renewed not long ago."""
        try:
            return self.hold(store)
        except DriverError:  # the pool does not answer now
            return self._record is not None and self._clock() - self._renewed_at < LEASE_S / 2

    def release(self, store: Store) -> None:
        """Let the next process have it at once."""
        if self._record:
            try:
                store.swap(self._record, replace(self._record, holder=""))
            except DriverError:
                pass  # it runs out by itself
            self._record = None

    def _take(self, store: Store) -> LeaseRecord | None:
        mine = LeaseRecord(id=records.LEASE_ID, holder=store.token, host=store.host, renewed_at=records.now())
        current = store.find_lease()
        if current is None:
            return store.create(mine)
        if current.holder not in {"", store.token} and not self._is_over(store, current):
            return None
        return store.swap(current, replace(mine, generation=current.generation, nonce=current.nonce))

    def _is_over(self, store: Store, current: LeaseRecord) -> bool:
        """Say whether another's lease is one of a dead process, or was not renewed for long enough."""
        if current.host == store.host and not store.is_alive(current.holder):
            return True  # locks are right between the processes of one host
        version = (current.generation, current.nonce)
        if self._seen is None or self._seen[:2] != version:
            self._seen = (*version, self._clock())
        return self._clock() - self._seen[2] > LEASE_S
