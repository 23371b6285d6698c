"""Where tests put pools that need not outlive the machine: in memory, if that is as good as a disk there.

What is left after a SIGKILL is the same, while an fsync, and a new pool's 768 directories, cost next to nothing.

PYTEST_DONT_REWRITE: it is imported by test modules and not loaded as a plugin.
"""

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

_MEMORY = Path("/dev/shm")
_DISK = Path("/tmp")  # and not TMPDIR: a socket's path has at most 107 bytes
_NEEDED_BYTES = 4 << 30


@cache
def directory() -> Path:
    """Give /dev/shm if it has room and takes O_DIRECT (from Linux 6.6 on), which the data path opens images with."""
    try:
        with tempfile.NamedTemporaryFile(dir=_MEMORY) as probe:
            os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
        return _MEMORY if shutil.disk_usage(_MEMORY).free > _NEEDED_BYTES else _DISK
    except OSError:
        return _DISK
