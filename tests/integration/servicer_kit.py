"""The controller's servicer on one pool, called without gRPC: what a sidecar's request does, in this process.

Owns: making and remaking a servicer (a controller that was restarted), and calls as lines of text, so that another
process can do one and be killed in it.
"""

import base64
import json
import time
from collections.abc import Callable
from typing import Any

from controller_kit import Kit, tools

from csi_quobyte.config import PoolSpec
from csi_quobyte.engine import collector
from csi_quobyte.engine.collector import Collector
from csi_quobyte.errors import Busy, DriverError, Unavailable
from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pool import pools as pools_module
from csi_quobyte.pool.pools import Pools
from csi_quobyte.pool.steps import Observer
from csi_quobyte.pool.store import Store
from csi_quobyte.rpc.controller import ControllerService

POOL = "main"
COLLECT = "collect"
_RETRY_S = 20.0
_CALL_S = 60.0


class Servicer:
    """One controller on one pool at one path. Errors are those of csi_quobyte.errors, as its gRPC server sees them."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._pools = Pools([PoolSpec(POOL, root)], require_mount="any", timeout_s=_CALL_S)
        pool = self._pools.named(POOL)
        self.store = pool.open()
        self.kit = Kit(self.store)
        # never started: what it is told stays in its queue, and the tests collect when they want
        self._service = ControllerService(self._pools, {POOL: Collector(pool, tools())}, {POOL: self.kit.copies})

    def call(self, method: str, request: Any) -> Any:
        """Make one call."""
        return getattr(self._service, method)(request, None)

    def eventually(self, method: str, request: Any, *, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """Make a call as a sidecar does: again while a retry may help. `meanwhile` is what others do between two."""
        deadline = time.monotonic() + _RETRY_S
        while True:
            try:
                return self.call(method, request)
            except (Busy, Unavailable) as error:
                assert time.monotonic() < deadline, f"{method} does not complete: {error}"
                meanwhile()
                time.sleep(0.005)

    def collect(self, *, merges: bool = True) -> None:
        """Do all that the collector would do."""
        for _ in collector.collect(self.store, tools(), merges=merges):
            pass

    def close(self) -> None:
        self.store.close()


def as_line(method: str, request: Any = None) -> str:
    """Give a call as text, for `make_call`."""
    data = base64.b64encode(request.SerializeToString()).decode() if request is not None else ""
    return json.dumps({"method": method, "request": data})


def make_call(root: str, line: str, observer: Observer, began: Callable[[], None]) -> None:
    """Make the call of a line, by a controller that is started for it. How it is answered is not told."""
    asked = json.loads(line)

    def opened(path: str) -> Store:
        return Store(path, observer=observer)

    pools_module.Store = opened  # type: ignore[assignment,misc,attr-defined]
    servicer = Servicer(root)
    began()
    try:
        if asked["method"] == COLLECT:
            servicer.collect()
        else:
            request = getattr(csi, f"{asked['method']}Request").FromString(base64.b64decode(asked["request"]))
            servicer.call(asked["method"], request)
    except DriverError:
        pass  # who asked makes the call again and sees that itself
