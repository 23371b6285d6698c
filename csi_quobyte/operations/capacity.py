"""How much can still be provisioned in a pool (row S25), and the one rule by which CreateVolume accepts a size.

    reserved  = total * reservedPercentage / 100
    physical  = available - reserved                                  what may still be written
    virtual   = (total - reserved) * maxOverSubscription - provisioned   what may still be promised
    thin  = min(virtual, physical * maxOverSubscription)     thick (preallocation falloc) = min(virtual, physical)

`provisioned` is the sum of all volumes' sizes, kept in memory per pool and corrected at once by what this process
itself makes, grows and deletes. What others do is counted every minute, in the background and only in the directories
that have changed since; no call waits for that longer than a moment. So for the first seconds after a start on a large
pool only a part of the sum is known: more could be promised then, never more written than there is.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from csi_quobyte.errors import DriverError, Exhausted, Unavailable
from csi_quobyte.pool.layout import SHARDS
from csi_quobyte.pool.pace import Pace
from csi_quobyte.pool.records import Preallocation, shard_of
from csi_quobyte.pool.sizes import GRANULARITY_BYTES, human
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

_RECOUNT_AFTER_S = 60.0
_REST_AFTER_COUNT = 9.0  # of the time it took
_WHOLE_AFTER_S = 3600.0  # everything is read again, whatever the directories' times say
_WAIT_S = 1.0  # a call's, from the beginning of the first count on, or for one that took no time when it was last done
_SHORT_S = 0.5
_STUCK_S = 300.0  # without a directory read: its pool hangs, and may have been mounted anew meanwhile


@dataclass
class _Shard:
    """The sum of one directory of volume records; `settled_ns` is its time if it was read twice at that time."""

    total_bytes: int
    read_ns: int
    settled_ns: int | None


@dataclass
class _Count:
    """What is known of one pool. Times are the clock's, but for `progress_s`, which is the machine's."""

    shards: dict[str, _Shard] = field(default_factory=dict)
    total_bytes: int = 0
    due: float | None = None
    whole_due: float = 0.0
    took_s: float = 0.0
    begun_s: float = 0.0
    progress_s: float = 0.0
    ended: threading.Event | None = None
    error: str = ""


class Provisioned:
    """The sum of the sizes of all volumes of each pool, by pool prefix; thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._guard = threading.Lock()
        self._counts: dict[str, _Count] = {}

    def total_bytes(self, store: Store) -> int:
        """Give the sum for a pool, as far as it is known; have it counted when it is unknown or too old.

        Raises:
            Unavailable: the pool cannot be read and never was.
        """
        with self._guard:
            count = self._counts.setdefault(store.prefix, _Count())
            ended = self._begin(store, count)
            wait_s = _WAIT_S if count.due is None or count.took_s < _SHORT_S else 0.0
            wait_s -= time.monotonic() - count.begun_s
        if ended:
            ended.wait(max(0.0, wait_s))
        with self._guard:
            if count.due is None and count.error:
                raise Unavailable(count.error)
            return count.total_bytes

    def add(self, store: Store, volume_id: str, size_bytes: int) -> None:
        """Correct the sum of a pool by what this process has just made (or, negative, deleted) of a volume."""
        with self._guard:
            count = self._counts.get(store.prefix)
            if count and (shard := count.shards.get(shard_of(volume_id))):
                more = max(size_bytes, -shard.total_bytes)
                shard.total_bytes += more
                count.total_bytes += more

    def _begin(self, store: Store, count: _Count) -> threading.Event | None:
        """Begin a count if one is due and none runs; gives what is set at the end of the one that runs."""
        if count.ended and time.monotonic() - count.progress_s < _STUCK_S:
            return count.ended
        if count.due is not None and self._clock() < count.due:
            return None
        count.ended = threading.Event()
        count.begun_s = count.progress_s = time.monotonic()
        threading.Thread(target=self._run, args=(store, count, count.ended), name="count", daemon=True).start()
        return count.ended

    def _run(self, store: Store, count: _Count, mine: threading.Event) -> None:
        """Count, on a thread of its own: it may hang in the pool."""
        error = ""
        now = self._clock()
        is_whole = now >= count.whole_due
        try:
            self._count(store, count, mine, is_whole)
        except DriverError as failure:
            error = str(failure)
            log.warning("the volumes of %s cannot be counted: %s", store.root, failure)
        except Exception as failure:
            error = f"the volumes of {store.root} cannot be counted: {failure}"
            log.exception("counting the volumes of %s", store.root)
        with self._guard:
            if count.ended is mine:
                count.ended = None
                count.error = error
                count.took_s = time.monotonic() - count.begun_s
                if not error:
                    count.due = self._clock() + max(_RECOUNT_AFTER_S, count.took_s * _REST_AFTER_COUNT)
                    count.whole_due = now + _WHOLE_AFTER_S if is_whole else count.whole_due
        mine.set()

    def _count(self, store: Store, count: _Count, mine: threading.Event, is_whole: bool) -> None:
        pace = Pace()
        for shard in SHARDS:
            changed_ns = store.changed_ns("volumes", shard)  # before it is read: what comes meanwhile changes it again
            known = count.shards.get(shard)
            if known is None or is_whole or known.settled_ns != changed_ns:
                total = 0
                for size_bytes in store.volume_sizes(shard):
                    total += size_bytes
                    pace()
                settled = changed_ns if known and known.read_ns == changed_ns else None
                with self._guard:
                    if count.ended is not mine:
                        return
                    count.shards[shard] = _Shard(total, changed_ns, settled)
                    count.total_bytes += total - (known.total_bytes if known else 0)
            count.progress_s = time.monotonic()


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
