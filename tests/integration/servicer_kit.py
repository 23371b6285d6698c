"""The controller's servicer on one pool, called without gRPC: what a sidecar's request does, in this process.

Owns: making and remaking a servicer (a controller that was restarted), what is done beside the RPCs (the collector,
and the commands of an administrator), and calls as lines of text, so that another process can do one and be killed in
it.
"""

import base64
import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from controller_kit import CopiesAtOnce, Kit, tools

from csi_quobyte.config import PoolSpec
from csi_quobyte.engine import collector, trash
from csi_quobyte.engine.collector import Collector
from csi_quobyte.engine.copying import Copier
from csi_quobyte.errors import Busy, DriverError, Unavailable
from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pool import pools as pools_module
from csi_quobyte.pool.pools import Pools
from csi_quobyte.pool.steps import Observer
from csi_quobyte.pool.store import Store
from csi_quobyte.rpc.controller import ControllerService

POOL = "main"
COLLECT = "collect"
COLLECT_LATER = "collect later"
RESTORE = "restore"
PURGE = "purge"
IMPORT = "import"
REMOVE_IMAGE = "remove image"
LATER = timedelta(days=2)
"""So much later all that was deleted under `onDelete: trash` is over, if the class does not say how long it is kept."""
_RETRY_S = 20.0
_CALL_S = 60.0


class Servicer:
    """One controller on one pool at one path. Errors are those of csi_quobyte.errors, as its gRPC server sees them.

    Copies are made inside the calls, or with `in_background_s` by threads, as a controller does: a call then waits for
    its copy for so many seconds.
    """

    def __init__(self, root: str, *, in_background_s: float | None = None) -> None:
        self.root = root
        self.was_repeated = False
        """Whether the last `eventually` has made its call more than once."""
        self._pools = Pools([PoolSpec(POOL, root)], require_mount="any", timeout_s=_CALL_S)
        pool = self._pools.named(POOL)
        self.store = pool.open()
        self._copier = None if in_background_s is None else Copier(tools(), POOL, first_wait_s=in_background_s)
        self.kit = Kit(self.store, copies=self._copier or CopiesAtOnce())
        # never started: what it is told stays in its queue, and the tests collect when they want
        self._service = ControllerService(self._pools, {POOL: Collector(pool, tools())}, {POOL: self.kit.copies})

    def call(self, method: str, request: Any) -> Any:
        """Make one call, or give one command with the words of `request`."""
        if method in COMMANDS:
            return COMMANDS[method](self, *request)
        return getattr(self._service, method)(request, None)

    def eventually(self, method: str, request: Any, *, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """Make a call as a sidecar does: again while a retry may help. `meanwhile` is what others do between two."""
        deadline = time.monotonic() + _RETRY_S
        self.was_repeated = False
        while True:
            try:
                return self.call(method, request)
            except (Busy, Unavailable) as error:
                self.was_repeated = True
                assert time.monotonic() < deadline, f"{method} does not complete: {error}"
                meanwhile()
                time.sleep(0.005)

    def collect(self, *, merges: bool = True) -> None:
        """Do all that the collector would do."""
        for _ in collector.collect(self.store, tools(), merges=merges):
            pass

    def collect_later(self) -> None:
        """Do what the collector does when all that is kept for a time has been kept for longer."""
        right = trash.is_expired
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trash, "is_expired", lambda entry, at: right(entry, at + LATER))
            self.collect(merges=False)

    def resume_copies(self) -> None:
        """Begin the copies again that a controller has broken off, as the first look of the next one's collector."""
        for volume_id in list(self.store.volume_ids()):
            if self._copier:
                self._copier.resume(self.store, volume_id, self.kit.released.append)

    def stop_copies(self) -> None:
        """Break off what is being copied; nothing more is copied by this controller."""
        if self._copier:
            assert self._copier.stop(_CALL_S), "a copy does not stop"

    def close(self) -> None:
        self.stop_copies()
        self.store.close()


COMMANDS: dict[str, Callable[..., Any]] = {
    COLLECT: Servicer.collect,
    COLLECT_LATER: Servicer.collect_later,
    RESTORE: lambda servicer, entry_id, name: servicer.kit.restore(entry_id, name),
    PURGE: lambda servicer, entry_id: servicer.kit.purge(entry_id),
    IMPORT: lambda servicer, name, path: servicer.kit.import_image(name, path, "raw"),
    REMOVE_IMAGE: lambda servicer, name: servicer.kit.remove_image(name),
}
"""What is no RPC: the collector's work, and commands of csi-quobyte."""


def as_line(method: str, request: Any = ()) -> str:
    """Give a call or command as text, for `make_call`."""
    given = list(request) if method in COMMANDS else base64.b64encode(request.SerializeToString()).decode()
    return json.dumps({"method": method, "request": given})


def make_call(root: str, line: str, observer: Observer, began: Callable[[], None]) -> None:
    """Make the call of a line, by a controller that is started for it. How it is answered is not told."""
    asked = json.loads(line)

    def opened(path: str) -> Store:
        return Store(path, observer=observer)

    pools_module.Store = opened  # type: ignore[assignment,misc,attr-defined]
    servicer = Servicer(root)
    began()
    method, given = asked["method"], asked["request"]
    if method not in COMMANDS:
        given = getattr(csi, f"{method}Request").FromString(base64.b64decode(given))
    with suppress(DriverError):  # who asked makes the call again and sees that itself
        servicer.call(method, given)
