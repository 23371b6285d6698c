"""Which processes work on a pool, as far as one of them can see: tokens, and the places where locks are right.

A process has a random token, by which its temporary files, its jobs and its lease are known, and holds the lock of
that name as long as it lives. Another process at the same place (one mount on one running host) sees by the lock at
once that it has died. The locks of another place say nothing; what a process there uses shows by its changes.
"""

import hashlib
import os
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from csi_quobyte.errors import Unavailable
from csi_quobyte.pool.locks import try_lock
from csi_quobyte.pool.steps import translated

UNTOUCHED_S = 600.0
"""When a process of another place has changed none of its temporary files for so long, it has died."""
_WATCHED_S = 60.0
"""Clocks of hosts may differ: nothing is old before it was seen not to change for so long by one's own clock."""
_LONG_AGO_S = 86400.0  # no clock is believed to be wrong by so much; a command that only looks once sees it at once
_TOKEN_DIGITS = 16
_PLACE_DIGITS = 6


class Presence:
    """This process's own presence, and what it sees of others."""

    def __init__(self, root: str) -> None:
        """Appear in the pool at `root`.

        Raises:
            Unavailable: the mount gives no locks.
        """
        self._path = f"{root}/lock"
        with translated(self._path):
            self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._watched: dict[str, tuple[tuple[int, int], float]] = {}
        try:
            with translated(self._path):
                self.place: Final = _place_of(self._fd)
                """Tells this mount on this running host from all others: inside one place, locks are right."""
                self._of_place = hashlib.sha256(self.place.encode()).hexdigest()[:_PLACE_DIGITS]
                self.token: Final = self._of_place + uuid.uuid4().hex[: _TOKEN_DIGITS - _PLACE_DIGITS]
                """Tells this process from all others; its first digits are the same for all of one place."""
                if not try_lock(self._fd, self.token):
                    raise Unavailable(f"{self._path} gives no locks")
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Disappear: for others at this place, this process is dead from now on."""
        os.close(self._fd)

    def is_held(self, token: str) -> bool:
        """Say whether a process at this place, this one too, holds the lock of a token."""
        with translated(self._path):
            # by the file that is open: at the path there may be another mount by now, whose locks say nothing of ours
            fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            return not try_lock(fd, token)
        finally:
            os.close(fd)

    def is_alive(self, token: str) -> bool:
        """Say whether the process of a token lives, as far as the locks of this place tell."""
        return token == self.token or self.is_held(token)

    def is_using(self, token: str, paths: Iterable[str], *, untouched_s: float | None = None) -> bool:
        """Say whether the process of a token may live, at any place: one elsewhere may while one of `paths`, the files
        that it is at work on, changes at least every `untouched_s` (else UNTOUCHED_S).

        How old a file is shows by its time, if it is a day, or was also seen not to change for a minute: a clock may be
        wrong. Else only by this process's own clock, from when it first saw the file as it is.
        """
        if self.is_alive(token):
            return True
        if token.startswith(self._of_place):
            return False
        limit_s = UNTOUCHED_S if untouched_s is None else untouched_s
        changing = [self._may_change(path, limit_s) for path in paths]  # all of them are watched from now on
        return any(changing)

    def _may_change(self, path: str, limit_s: float) -> bool:
        found = _stat(path)
        if found is None:
            self._watched.pop(path, None)
            return False
        age_s = time.time() - found.st_mtime
        if age_s >= max(limit_s, _LONG_AGO_S):
            return False
        version, now = (found.st_mtime_ns, found.st_size), time.monotonic()
        since = self._watched.get(path, (None, 0.0))
        if since[0] != version:
            since = self._watched[path] = (version, now)
        return now - since[1] < (min(limit_s, _WATCHED_S) if age_s >= limit_s else limit_s)

    def is_fresh(self, token: str, path: str, *, within_s: float) -> bool:
        """Say whether a file tells of something that goes on: its process lives, or at another place, by the clocks of
        both, has changed it a moment ago.
        """
        if self.is_alive(token):
            return True
        if token.startswith(self._of_place):
            return False
        found = _stat(path)
        return found is not None and abs(time.time() - found.st_mtime) < within_s


def _place_of(lock_fd: int) -> str:
    """Give the kernel's boot id, and device and inode number of the lock file, which is what the kernel locks by.

    Both numbers stay as they are, and are nobody else's, as long as a process has the file open.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    found = os.fstat(lock_fd)
    return f"{boot_id}/{found.st_dev:x}/{found.st_ino:x}"


def _stat(path: str) -> os.stat_result | None:
    with translated(path), suppress(FileNotFoundError):
        return os.stat(path)
    return None
