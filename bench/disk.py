"""What a benchmark lies on: a file system of its own, or one that has recovered from what was done to it before.

An ext4 on which many files were removed makes new ones up to fifty times as slowly for some minutes (measured after a
run of the tests: 850 instead of 15 microseconds each, processor time all of it), and every ratio would tell of that.
"""

import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.machine import run

RECOVERED_US = 40.0
PATIENCE_S = 400.0
_PAUSE_S = 20.0
_FILES = 20


def wait_until_recovered(directory: Path, progress: Callable[[str], None]) -> float:
    """Wait until a new file costs what it should, or for 400 s; gives what it costs, in microseconds."""
    deadline = time.monotonic() + PATIENCE_S
    while (cost_us := new_file_us(directory)) > RECOVERED_US and time.monotonic() < deadline:
        progress(f"nothing yet: a new file takes {cost_us:.0f} µs here, as after many were removed; waiting")
        time.sleep(_PAUSE_S)
    return cost_us


def new_file_us(directory: Path) -> float:
    """Give the median time of making an empty file, in microseconds."""
    samples, paths = [], [directory / secrets.token_hex(8) for _ in range(_FILES)]
    for path in paths:
        begun = time.perf_counter()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        samples.append(time.perf_counter() - begun)
        os.close(fd)
    for path in paths:
        path.unlink()
    return statistics.median(samples) * 1e6


@contextmanager
def own_disk(base: Path, *, size_bytes: int, files: int) -> Iterator[Path]:
    """Give the mount point of a new ext4 on a sparse file below `base`; both are removed afterwards."""
    image, mounted = base / "disk", base / "m"
    with image.open("wb") as file:
        file.truncate(size_bytes)
    mounted.mkdir()
    run("mkfs.ext4", "-q", "-m", "0", "-N", str(files), "-E", "lazy_itable_init=1,nodiscard", image)
    run("mount", "-o", "loop", image, mounted)
    try:
        yield mounted
    finally:
        run("umount", mounted)
        mounted.rmdir()
        image.unlink()
