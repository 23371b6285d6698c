"""A pool's file system that fails on demand: what stands for the module `os` inside csi_quobyte.pool.

Owns the numbering of the calls that reach files of one pool, and which of them fail how. Everything else is passed on
to the real module, also every call on files outside of that pool.

PYTEST_DONT_REWRITE: it is imported by test modules and not loaded as a plugin.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import pytest

from csi_quobyte.pool import files, images, layout, locks, steps, store, versions

# calls that may find no room, by what they need it for
_DATA = {"create", "pwrite", "mkdir", "posix_fallocate"}
_NAMES = {"link", "rename", "fsync", "ftruncate"}
# calls that change something, so that they may be done and reported as failed
_CHANGES = _DATA | _NAMES | {"unlink", "rmdir"}
_READS = {"open", "stat", "read", "pread", "listdir", "fstat", "statvfs"}


@dataclass(frozen=True)
class Mode:
    """One way to fail: which calls count, whether all after the first fail too, and whether it is done all the same."""

    number: int
    calls: frozenset[str]
    lasts: bool = False
    is_done: bool = False
    spares_the_reserve: bool = False

    def counts(self, kind: str, *, spare: bool) -> bool:
        """Say whether a call can fail in this way."""
        return kind in self.calls and not (spare and self.spares_the_reserve)


MODES: dict[str, Mode] = {
    # the pool is full for a moment: somebody else's file was in the way
    "ENOSPC once": Mode(errno.ENOSPC, frozenset(_DATA | _NAMES)),
    # it is full and stays so; what the pool has in reserve can be used, and names find room in their directories
    "ENOSPC": Mode(errno.ENOSPC, frozenset(_DATA), lasts=True, spares_the_reserve=True),
    # nothing is left at all, the reserve has been used up
    "ENOSPC without reserve": Mode(errno.ENOSPC, frozenset(_DATA | _NAMES), lasts=True),
    "EDQUOT": Mode(errno.EDQUOT, frozenset(_DATA), lasts=True, spares_the_reserve=True),
    "EIO once": Mode(errno.EIO, frozenset(_CHANGES | _READS)),
    # the server did it, and the answer was lost
    "EIO after it was done": Mode(errno.EIO, frozenset(_CHANGES), is_done=True),
    "ENOTCONN": Mode(errno.ENOTCONN, frozenset(_CHANGES | _READS), lasts=True),
}


def is_on_spare(kind: str, argument: object) -> bool:
    """Say whether a call overwrites a reserve file, whose blocks are there: nothing else here is so large."""
    return kind == "pwrite" and isinstance(argument, int) and os.fstat(argument).st_size == store._RESERVE_BYTES


@dataclass
class FaultyOs:
    """Stands for `os`. Fails from the call number `at` on, counted among the calls of `mode`; 0: never."""

    root: str
    mode: Mode
    at: int
    calls: int = 0
    failed: str = ""
    """The first call that failed, for a message."""
    seen: list[tuple[str, bool]] = field(default_factory=list)
    """Every call that some mode would count: its kind, and whether it overwrites a reserve file."""
    _guard: Any = field(default_factory=Lock)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "open":
            return self._open
        if name not in _CHANGES | _READS:
            return real
        return lambda *arguments, **named: self._call(name, real, arguments, named)

    def _open(self, path: str, flags: int, *rest: int) -> int:
        kind = "create" if flags & os.O_CREAT else "open"
        fd: int = self._call(kind, os.open, (path, flags, *rest), {})
        return fd

    def _is_of_pool(self, argument: object) -> bool:
        """Say whether a path, or what a descriptor is open on, lies in the pool."""
        if isinstance(argument, int):
            argument = os.readlink(f"/proc/self/fd/{argument}")
        return str(argument).startswith(f"{self.root}/") or argument == self.root

    def _call(self, kind: str, real: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not self._is_of_pool(arguments[0]):
            return real(*arguments, **named)
        spare = is_on_spare(kind, arguments[0])
        self.seen.append((kind, spare))
        if not self.mode.counts(kind, spare=spare):
            return real(*arguments, **named)
        with self._guard:
            self.calls += 1
            number = self.calls
        if self.at and (number == self.at or (self.mode.lasts and number > self.at)):
            self.failed = self.failed or f"{kind} {arguments[0]}"
            if self.mode.is_done:
                real(*arguments, **named)
            raise OSError(self.mode.number, os.strerror(self.mode.number), str(arguments[0]))
        return real(*arguments, **named)

    @contextmanager
    def installed(self) -> Iterator["FaultyOs"]:
        """Let the modules of the pool use it inside the block."""
        with pytest.MonkeyPatch.context() as patch:
            for module in (steps, store, versions, files, layout, images, locks):
                patch.setattr(module, "os", self)
            yield self
