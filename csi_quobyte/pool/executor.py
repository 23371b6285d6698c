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

from csi_quobyte.errors import Unavailable

T = TypeVar("T")


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

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Start `work` with the caller's log context, and do not wait."""
        return self._workers.submit(contextvars.copy_context().run, work)

    def run(self, work: Callable[[], T]) -> T:
        """Do `work` and give its result.

        Raises:
            Unavailable: it was not done within the time limit (if it had begun, it goes on), or too many wait already.
        """
        if not self._callers.acquire(blocking=False):
            raise Unavailable(f"too many calls wait for {self._name} already; try again")
        try:
            return self._wait(work)
        finally:
            self._callers.release()

    def _wait(self, work: Callable[[], T]) -> T:
        future = self.submit(work)
        try:
            return future.result(self._timeout_s)
        except FutureTimeoutError:
            if future.done():  # the work ended in the last moment, or with a time-out of its own
                return future.result()
            future.cancel()
            raise Unavailable(
                f"{self._name} did not finish within {self._timeout_s:g} s; the operation may go on"
            ) from None
