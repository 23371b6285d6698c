"""How much can still be provisioned in a pool (row S25), and the one rule by which CreateVolume accepts a size.

    reserved  = total * reservedPercentage / 100
    physical  = available - reserved                                  what may still be written
    virtual   = (total - reserved) * maxOverSubscription - provisioned   what may still be promised
    thin  = min(virtual, physical * maxOverSubscription)     thick (preallocation falloc) = min(virtual, physical)

`provisioned` is the sum of all volumes' sizes. It is kept in memory per pool, counted anew every minute and
corrected at once by what this process itself makes, grows and deletes.
"""

import threading
import time
from collections.abc import Callable

from csi_quobyte.errors import Corrupt, Exhausted
from csi_quobyte.pool.records import Preallocation
from csi_quobyte.pool.sizes import GRANULARITY_BYTES, human
from csi_quobyte.pool.store import Store

_RECOUNT_AFTER_S = 60.0


class Provisioned:
    """The sum of the sizes of all volumes of each pool, by pool prefix; thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._guard = threading.Lock()
        self._sums: dict[str, tuple[int, float]] = {}

    def total_bytes(self, store: Store) -> int:
        """Give the sum for a pool, counting it when it is unknown or too old."""
        with self._guard:
            known = self._sums.get(store.prefix)
        if known and self._clock() - known[1] < _RECOUNT_AFTER_S:
            return known[0]
        counted = _count(store)
        with self._guard:
            self._sums[store.prefix] = (counted, self._clock())
        return counted

    def add(self, store: Store, size_bytes: int) -> None:
        """Correct the sum of a pool by what this process has just made (or, negative, deleted)."""
        with self._guard:
            if known := self._sums.get(store.prefix):
                self._sums[store.prefix] = (max(0, known[0] + size_bytes), known[1])


def _count(store: Store) -> int:
    total = 0
    for volume_id in store.volume_ids():
        try:
            volume = store.find_volume(volume_id)
        except Corrupt:
            continue  # reported by check and by every call that names it
        total += volume.size_bytes if volume else 0
    return total


def available_bytes(store: Store, provisioned: Provisioned, preallocation: Preallocation) -> int:
    """Give the size of the largest volume that CreateVolume would accept now, in whole MiB, never below zero."""
    settings = store.format.settings
    total, available = store.space()
    reserved = total * settings.reservedPercentage // 100
    physical = available - reserved
    virtual = int((total - reserved) * settings.maxOverSubscription) - provisioned.total_bytes(store)
    promised = physical if preallocation == "falloc" else int(physical * settings.maxOverSubscription)
    return max(0, min(virtual, promised)) // GRANULARITY_BYTES * GRANULARITY_BYTES


def check_fits(store: Store, provisioned: Provisioned, more_bytes: int, preallocation: Preallocation) -> None:
    """Check that `more_bytes` can still be provisioned.

    Raises:
        Exhausted: they cannot; the message says how much can.
    """
    left = available_bytes(store, provisioned, preallocation)
    if more_bytes > left:
        raise Exhausted(
            f"{human(more_bytes)} are asked for and {human(left)} are left; delete volumes or snapshots, enlarge the "
            f"Quobyte volume, or change reservedPercentage or maxOverSubscription in the pool's format.json"
        )
