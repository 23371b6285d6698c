"""The floor: the bare durable file operations that a step cannot do without.

Owns what they are for each operation. Imports nothing of the driver: what is measured here is the file system's.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FLOOR_BYTES = 1024
# How many small files the step cannot do without: images made, records made or replaced.
FLOOR_FILES = {"create": 2, "snapshot": 3, "restore": 2, "clone": 4, "expand": 1, "delete": 1}


def floor(directory: Path, name: str, files: int) -> None:
    """Make small files durable, one after the other: each written, fsynced, renamed, and the directory fsynced."""
    for number in range(files):
        temporary = directory / f"{name}.{number}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"x" * FLOOR_BYTES)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(directory / f"{name}.{number}")
        sync_directory(directory)


def floor_of(operation: str, directory: Path, name: str) -> None:
    """Do what an operation cannot do without."""
    floor(directory, name, FLOOR_FILES[operation])
    if operation == "delete":
        (directory / f"{name}.0").unlink()
        sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def floor_directory(pool: Path) -> Iterator[Path]:
    """A directory in the pool, so on the same file system and mount, for the floor's files; removed afterwards."""
    directory = pool / "bench-floor"
    directory.mkdir()
    try:
        yield directory
    finally:
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
