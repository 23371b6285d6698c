"""The configured pools, and the walls between them: a pool that hangs costs its own threads and nobody else's.

Everything that touches a pool runs on that pool's own executor (see executor). A store is opened when its mount is
there, and again after a remount.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import TypeVar

from csi_quobyte import telemetry
from csi_quobyte.config import PoolSpec
from csi_quobyte.errors import Corrupt, DriverError, Exhausted, InvalidArgument, NotFound, Unavailable
from csi_quobyte.pool.executor import Executor
from csi_quobyte.pool.mount import RequireMount, check_mount
from csi_quobyte.pool.records import parse_id
from csi_quobyte.pool.store import Store

T = TypeVar("T")
log = logging.getLogger(__name__)

WORKERS = 16
CALLERS = 48  # as many calls as the server admits at once; several pools share them


@dataclass(frozen=True)
class Health:
    """What the last look at a pool found; `reason` is empty when it is well."""

    ok: bool
    reason: str


class Pool:
    """One configured pool, mounted or not."""

    def __init__(
        self, spec: PoolSpec, *, require_mount: RequireMount, timeout_s: float, callers: int = CALLERS
    ) -> None:
        self.name = spec.name
        self.path = spec.path
        self.prefix: str | None = None
        self._require_mount = require_mount
        self._executor = Executor(
            f"pool {spec.name} ({spec.path})", workers=WORKERS, callers=callers, timeout_s=timeout_s
        )
        self._prober = Executor(f"probe of pool {spec.name}", workers=1, callers=CALLERS, timeout_s=timeout_s)
        self._probe: tuple[Future[Health], float] | None = None
        self._guard = threading.Lock()
        self._store: Store | None = None

    @property
    def is_serving(self) -> bool:
        """Whether a call is at work in this pool now: what has time should let it pass."""
        return self._executor.waiting > 0

    def run(self, work: Callable[[Store], T], *, finished: Callable[[], None] = lambda: None) -> T:
        """Do `work` on this pool and give its result; `finished` as in `Executor.run`.

        Raises:
            Unavailable: the pool is not mounted or not answering within the time limit; in the latter case the work
                may still be going on.
            Exhausted: from `work`, with the pool's name.
        """
        return self._executor.run(lambda: self._do(work), finished=finished)

    def _do(self, work: Callable[[Store], T]) -> T:
        """Do `work`; which pool is not there, or is full, is known here only."""
        try:
            store = self.open()
        except Unavailable as error:
            raise Unavailable(f"pool {self.name}: {error}") from error
        try:
            return work(store)
        except Exhausted as error:
            raise Exhausted(f"pool {self.name}: {error}") from error

    def open(self) -> Store:
        """Give the open store, opening it (again) when needed. May hang: use `run` unless on a thread of your own.

        Raises:
            Unavailable: it is not mounted.
            Corrupt, Refused: what is mounted there cannot be served.
        """
        store = self._store
        if store and store.is_same_mount():
            return store
        check_mount(self.path, self._require_mount)
        try:
            fresh = Store(self.path)
        except NotFound as error:
            raise Unavailable(str(error)) from error
        with self._guard:
            if self.prefix and fresh.prefix != self.prefix:
                fresh.close()
                raise Corrupt(
                    f"pool {self.name}: {self.path} is another pool ({fresh.prefix}) than before ({self.prefix})"
                )
            if self._store and self._store is not store:
                fresh.close()  # another thread was faster
                return self._store
            self._store, self.prefix = fresh, fresh.prefix
        # the old store is not closed: abandoned work may still use it, and its descriptors died with its mount
        log.info("pool %s (%s) opened, uuid %s", self.name, self.path, fresh.format.uuid)
        return fresh

    def health(self, wait_s: float = 3.0) -> Health:
        """Look at the pool and say how it is; a look that hangs is reported as such and not repeated until it ends."""
        with self._guard:
            if self._probe is None or self._probe[0].done():
                self._probe = (self._prober.submit(self._look), time.monotonic())
            future, since = self._probe
        try:
            # a look that began long ago is not waited for again
            found = future.result(max(0.0, wait_s - (time.monotonic() - since)))
        except FutureTimeoutError:
            found = Health(False, f"has not answered for {time.monotonic() - since:.0f} s")
        telemetry.POOL_UP.labels(self.name).set(found.ok)
        return found

    def _look(self) -> Health:
        try:
            store = self.open()
            check_mount(self.path, self._require_mount)
            total, available = store.space()
        except DriverError as error:
            return Health(False, str(error))
        telemetry.POOL_TOTAL_BYTES.labels(self.name).set(total)
        telemetry.POOL_AVAILABLE_BYTES.labels(self.name).set(available)
        return Health(True, "")


class Pools:
    """All pools of this process, by name and by the ids of what is in them."""

    def __init__(self, specs: Sequence[PoolSpec], *, require_mount: RequireMount, timeout_s: float) -> None:
        callers = max(WORKERS, CALLERS // max(1, len(specs)))
        self.all = tuple(
            Pool(spec, require_mount=require_mount, timeout_s=timeout_s, callers=callers) for spec in specs
        )

    def named(self, name: str) -> Pool:
        """Give the pool of a StorageClass parameter; an empty name means the only one.

        Raises:
            InvalidArgument: no such pool, or a name is needed.
        """
        known = ", ".join(pool.name for pool in self.all)
        if not name:
            if len(self.all) == 1:
                return self.all[0]
            raise InvalidArgument(f"the parameter pool must be given, one of: {known}")
        for pool in self.all:
            if pool.name == name:
                return pool
        raise InvalidArgument(f"there is no pool {name!r}; known: {known}")

    def find_owner(self, record_id: str) -> Pool | None:
        """Give the pool that an id names; None when the id cannot be one of ours.

        Raises:
            Unavailable: the id is well formed and its pool is unknown: it may be one that is not mounted now.
        """
        parsed = parse_id(record_id)
        if parsed is None:
            return None
        if found := self._by_prefix(parsed.pool):
            return found
        for pool in self.all:
            if pool.prefix is None and pool.health().ok and pool.prefix == parsed.pool:
                return pool
        raise Unavailable(f"{record_id} belongs to a pool that is not configured here or not mounted now")

    def owner(self, record_id: str, what: str) -> Pool:
        """Give the pool of an id that must exist.

        Raises:
            NotFound: it cannot be an id of ours.
            Unavailable: see `find_owner`.
        """
        found = self.find_owner(record_id)
        if found is None:
            raise NotFound(f"{what} {record_id!r} does not exist")
        return found

    def _by_prefix(self, prefix: str) -> Pool | None:
        found = [pool for pool in self.all if pool.prefix == prefix]
        if len(found) > 1:
            names = ", ".join(pool.name for pool in found)
            raise Corrupt(f"the pools {names} have the same uuid prefix {prefix}: one is a copy of the other")
        return found[0] if found else None
