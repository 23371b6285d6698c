"""Ways to stop a host at a durable step: for a while, or for good; and to run its call beside the test."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from csi_quobyte.pool.steps import Observer
from lab.machine import wait_for

T = TypeVar("T")
DEADLINE_S = 20.0


class DiedError(Exception):
    """The process of a call ends here."""


class Gate:
    """A durable step before which a host stops, once, until the test lets it go on."""

    def __init__(self, step: str, part: str) -> None:
        self._step = step
        self._part = part
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, step: str, path: str) -> None:
        if step == self._step and self._part in path and not self.reached.is_set():
            self.reached.set()
            if not self._open.wait(DEADLINE_S):
                raise TimeoutError(f"nobody has opened the gate before {step} {path}")

    def open(self) -> None:
        """Let the host go on, and do not stop it any more."""
        self._open.set()

    def wait(self, future: "Future[Any]", *, or_end: bool = False) -> None:
        """Wait until the host of this call has come here; with `or_end` it may have ended before."""

        def arrived() -> bool:
            if future.done() and not or_end:
                raise AssertionError(f"the call did not come to {self._step} {self._part}: {future!r}")
            return self.reached.is_set() or future.done()

        wait_for(f"{self._step} {self._part}", arrived, timeout_s=DEADLINE_S)


def dies_before(step: str, part: str) -> Observer:
    """A process that ends before this step: of what comes after it nothing is done."""
    is_dead = False

    def observe(at: str, path: str) -> None:
        nonlocal is_dead
        is_dead = is_dead or (at == step and part in path)
        if is_dead:
            raise DiedError

    return observe


def background(work: Callable[[], T]) -> "Future[T]":
    """Run a call of one host while the test goes on; gates have a deadline, so it ends."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(work)
    executor.shutdown(wait=False)
    return future
