"""Reading of small files, records and directories through a FUSE client that caches names."""

import os
import uuid
from contextlib import suppress
from typing import TypeVar

from csi_quobyte.errors import Corrupt, Unavailable
from csi_quobyte.pool import records
from csi_quobyte.pool.steps import translated

D = TypeVar("D")

_RECORD_BYTES = 1 << 20
_READ_BYTES = 1 << 16  # at a time: a buffer of a MiB for each small record costs more than the reading


def _open_surely(path: str) -> int | None:
    """Open a file for reading; None when it does not exist, and not when it is just being replaced.

    A FUSE client opens by an inode that it has looked up before; if the name was given to another file in between, the
    answer can be ENOENT. Looking up a name that nobody has used waits in the kernel for a rename in that directory
    that is under way; the second attempt then finds the new file.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        with suppress(FileNotFoundError):
            os.stat(f"{os.path.dirname(path)}/{uuid.uuid4().hex}")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def read(path: str) -> bytes | None:
    """Give the contents of a small file, None when it does not exist.

    Raises:
        Corrupt: it is larger than any record.
    """
    with translated(path):
        fd = _open_surely(path)
        if fd is None:
            return None
        try:
            data = part = os.read(fd, _READ_BYTES)
            while len(part) == _READ_BYTES and len(data) < _RECORD_BYTES:
                part = os.read(fd, _READ_BYTES)
                data += part
            if len(data) >= _RECORD_BYTES:
                raise Corrupt(f"{path} is larger than any record")
            return data
        finally:
            os.close(fd)


def find(kind: type[D], path: str) -> D | None:
    """Give the record in a file, None when it does not exist.

    Raises:
        Corrupt: it cannot be read.
    """
    data = read(path)
    return None if data is None else records.decode(kind, data, where=path)


def names(directory: str) -> list[str]:
    """Give the names in a directory, sorted; none when it does not exist."""
    with translated(directory):
        try:
            return sorted(os.listdir(directory))
        except FileNotFoundError:
            return []


def names_in(directory: str) -> list[str]:
    """Give the names in a directory that every pool has, sorted.

    Raises:
        Unavailable: it does not exist: what was in it must not be taken for gone.
    """
    with translated(directory):
        try:
            return sorted(os.listdir(directory))
        except FileNotFoundError as error:
            raise Unavailable(f"{directory} is gone: is the pool still mounted?") from error
