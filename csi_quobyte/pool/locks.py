"""Locks on names of a pool, held across threads and processes.

One file, `lock`, carries all of them: the lock of a name is an open-file-description lock on the byte whose offset is
a hash of the name. There is nothing to create or to clean up, and the kernel frees a dead process's locks.

These locks keep processes *of one mount* apart (between hosts only where the client forwards them). They make
conflicts rare and retries cheap; what keeps data right without them is compare-and-set and the markers.
"""

import fcntl
import hashlib
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from csi_quobyte.errors import Busy, Unavailable
from csi_quobyte.pool.steps import translated

# Linux's <fcntl.h>; Python names F_OFD_SETLK from 3.9 on, but not on every libc.
_F_OFD_GETLK = getattr(fcntl, "F_OFD_GETLK", 36)
_F_OFD_SETLK = getattr(fcntl, "F_OFD_SETLK", 37)
_OFFSETS = 1 << 62


_FLOCK = struct.Struct("hhqqi4x")  # struct flock of fcntl(2): l_type, l_whence, l_start, l_len, l_pid

# QEMU's block/file-posix.c: whoever uses permission i of an image holds a lock on byte 100 + i; i = 1 is writing.
_QEMU_WRITE_BYTE = 101


def _flock(kind: int, offset: int) -> bytes:
    """Give a struct flock for one byte."""
    return _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0)


def _offset_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % _OFFSETS


def try_lock(fd: int, name: str) -> bool:
    """Lock the byte of `name` on an open lock file; False when another open file holds it. Closing `fd` unlocks."""
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, _flock(fcntl.F_WRLCK, _offset_of(name)))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _unlock(fd: int, name: str) -> None:
    """Unlock at once: closing alone does not while a process that another thread starts still has a copy of `fd`."""
    with suppress(OSError):  # the mount is gone, and its locks with it
        fcntl.fcntl(fd, _F_OFD_SETLK, _flock(fcntl.F_UNLCK, _offset_of(name)))


def is_written_by_qemu(fd: int) -> bool:
    """Say whether some QEMU process has an image open for writing, as far as this mount's locks tell."""
    found = fcntl.fcntl(fd, _F_OFD_GETLK, _flock(fcntl.F_WRLCK, _QEMU_WRITE_BYTE))
    return int(_FLOCK.unpack(found)[0]) != fcntl.F_UNLCK


class Locks:
    """The named locks of one pool, as one process takes them."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._held: set[str] = set()
        self._guard = threading.Lock()

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold the lock of `name` inside the block; never waits.

        Raises:
            Busy: another thread or process has it.
            Unavailable: the lock file is gone: the pool is not mounted any more.
        """
        with self._guard:
            if name in self._held:
                raise Busy(f"another operation on {name} is running")
            self._held.add(name)
        try:
            try:
                with translated(self._path):
                    fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise Unavailable(f"{self._path} is gone: is the pool still mounted?") from error
            try:
                with translated(self._path):
                    if not try_lock(fd, name):
                        raise Busy(f"another process is working on {name}")
                try:
                    yield
                finally:
                    _unlock(fd, name)
            finally:
                os.close(fd)
        finally:
            with self._guard:
                self._held.discard(name)
