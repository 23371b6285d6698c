"""The pace of work in the background: it rests so often that calls find the process and the pool free.

Looking at everything in a pool of 100 000 volumes is half a minute of work. Done at one go it would keep the
interpreter, and a metadata server, from the calls that come meanwhile.
"""

import time
from collections.abc import Callable

_SLICE_S = 0.002  # what a call may have to wait for at most, beside what the system does
_IDLE_SHARE = 0.8
_SERVING_SHARE = 0.15
_REST_AT_MOST_S = 1.0  # one step that took long: the pool did not answer, and that costs no call anything


class Pace:
    """Made for one piece of work and called between its small steps: now and then it sleeps, for longer while calls
    are being served.
    """

    def __init__(
        self, is_serving: Callable[[], bool] = lambda: False, *, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        """`sleep` may return early, when the process is to end."""
        self._is_serving = is_serving
        self._sleep = sleep
        self._since = time.monotonic()

    def __call__(self) -> None:
        """Say that a piece of work is done; returns when the next one may be begun."""
        worked_s = time.monotonic() - self._since
        if worked_s < _SLICE_S:
            return
        share = _SERVING_SHARE if self._is_serving() else _IDLE_SHARE
        self._sleep(min(_REST_AT_MOST_S, worked_s * (1 - share) / share))
        self._since = time.monotonic()


def no_pace() -> None:
    """What is called instead of a `Pace` where nobody else is to be spared: go on at once."""
