"""Threads that may be abandoned: the one way to touch what can hang.

A thread inside a hung mount cannot be stopped. So the work runs on a bounded executor of its own, the caller waits for
a limited time, and work that is not done by then goes on alone and keeps its locks until it really ends.
"""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

from csi_quobyte.errors import Busy, Unavailable

T = TypeVar("T")


class Reservations:
    """Names that a call has to itself from the moment it arrives until its work has really ended.

    Work that waits in a queue, or hangs before it reaches a lock of its own, is under way all the same: a later call
    that undoes what it does must not be answered before it.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken: set[str] = set()

    def take(self, *names: str) -> Callable[[], None]:
        """Take all names, and give what lets them go again (from any thread, once).

        Raises:
            Busy: one of them is taken; none was taken now.
        """
        with self._guard:
            for name in names:
                if name in self._taken:
                    raise Busy(f"another call on {name} is still under way")
            self._taken.update(names)

        def let_go() -> None:
            with self._guard:
                self._taken.difference_update(names)

        return let_go


class Executor:
    """A bounded number of threads for one thing that may hang; `name` is shown in the error.

    `callers` bounds how many calls may wait for it at once: those of a hung thing must not take up the places of all
    others.
    """

    def __init__(self, name: str, *, workers: int, callers: int, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._callers = threading.BoundedSemaphore(callers)
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix=name)
        self._waiting = 0
        self._guard = threading.Lock()

    @property
    def waiting(self) -> int:
        """How many calls wait for work of this executor now."""
        return self._waiting

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Start `work` with the caller's log context, and do not wait."""
        return self._workers.submit(contextvars.copy_context().run, work)

    def run(self, work: Callable[[], T], *, finished: Callable[[], None] = lambda: None) -> T:
        """Do `work` and give its result. `finished` is called once it has really ended, or will never begin.

        Raises:
            Unavailable: it was not done within the time limit (if it had begun, it goes on), or too many wait already.
        """
        if not self._callers.acquire(blocking=False):
            finished()
            raise Unavailable(f"too many calls wait for {self._name} already; try again")
        try:
            self._count(1)
            return self._wait(work, finished)
        finally:
            self._count(-1)
            self._callers.release()

    def _count(self, more: int) -> None:
        with self._guard:
            self._waiting += more

    def _wait(self, work: Callable[[], T], finished: Callable[[], None]) -> T:
        future = self.submit(work)
        future.add_done_callback(lambda _: finished())
        try:
            return future.result(self._timeout_s)
        except FutureTimeoutError:
            if future.done():  # the work ended in the last moment, or with a time-out of its own
                return future.result()
            future.cancel()
            raise Unavailable(
                f"{self._name} did not finish within {self._timeout_s:g} s; the operation may go on"
            ) from None
