"""Threads that may be abandoned: the one way to touch what can hang.

A thread inside a hung mount cannot be stopped. So the work runs on a bounded executor of its own, the caller waits for
a limited time, and work that is not done by then goes on alone and keeps its locks until it really ends.
"""

import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

from csi_quobyte.errors import Unavailable

T = TypeVar("T")


class Executor:
    """A bounded number of threads for one thing that may hang; `name` is shown in the error."""

    def __init__(self, name: str, *, workers: int, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix=name)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Start `work` with the caller's log context, and do not wait."""
        return self._workers.submit(contextvars.copy_context().run, work)

    def run(self, work: Callable[[], T]) -> T:
        """Do `work` and give its result.

        Raises:
            Unavailable: it was not done within the time limit; if it had begun, it goes on.
        """
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
