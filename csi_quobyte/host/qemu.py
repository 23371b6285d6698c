"""Which QEMU this machine has, which of its uses were measured to be right, and what one layer is to it.

Owns: finding the two programs, reading their version, the version gate, and `ImageLayer`.
Hides: how distributions write versions.

What always holds: a branch of QEMU that nobody measured is refused, not assumed to be good. QEMU 7.2 and 10.0.2 wrote
wrong data through a FUSE export with more than one request in flight, and nothing but reading it back showed it.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from csi_quobyte.errors import Unavailable
from csi_quobyte.host import command

DataPath = Literal["nbd", "fuse", "loop"]
ImageFormat = Literal["qcow2", "raw"]
Version = tuple[int, int, int]

_VERSION_TIMEOUT_S = 10.0
# "qemu-img version 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)": the first three numbers are QEMU's own; what a
# distribution adds comes after them, in parentheses or after a hyphen.
_VERSION_LINE = re.compile(r"^\S+ version (\d+)\.(\d+)\.(\d+)(?![\d.])", re.MULTILINE)


@dataclass(frozen=True)
class QemuTools:
    """The two programs of one QEMU."""

    qemu_img: str
    """Absolute path."""
    storage_daemon: str
    """Absolute path."""
    version: Version


@dataclass(frozen=True)
class ImageLayer:
    """One image file of a chain, as a record describes it; never what the file says about itself."""

    id: str
    """24 hex digits; with its two-letter prefix it is the name of a QEMU node, which has 31 bytes at most."""
    path: str
    """Absolute path."""
    format: ImageFormat


def find_tools(qemu_dir: str | None) -> QemuTools:
    """Find qemu-img and qemu-storage-daemon of one and the same version in `qemu_dir`, or on PATH if that is None.

    Raises:
        Unavailable: a program is missing, does not run, tells no version, or the two have different versions.
    """
    qemu_img, image_version = _find("qemu-img", qemu_dir)
    storage_daemon, daemon_version = _find("qemu-storage-daemon", qemu_dir)
    if image_version != daemon_version:
        raise Unavailable(
            f"{qemu_img} is version {format_version(image_version)}, but {storage_daemon} is version "
            f"{format_version(daemon_version)}: both must come from one QEMU"
        )
    return QemuTools(qemu_img, storage_daemon, daemon_version)


def gate(version: Version, data_path: DataPath) -> str | None:
    """Return None if this version was measured to be right for a data path, else why it is refused and what to do."""
    if data_path == "loop" or _is_measured(version, data_path):
        return None
    wanted = "10.0.13 or a later 10.0.x, or 11.1 or later" if data_path == "fuse" else "10.0.x, or 11.1 or later"
    if data_path == "fuse" and version < (10, 0, 13):
        why = "can write wrong data through a FUSE export"
    elif data_path == "nbd" and version < (10, 0, 0):
        why = "can abort when an NBD client leaves"
    else:
        why = "is of a branch that was not measured"
    return f"QEMU {format_version(version)} {why}; install {wanted}, or give --allow-untested-qemu for tests"


def parse_version(text: str) -> Version | None:
    """Return the version in what `--version` printed, None if there is none."""
    found = _VERSION_LINE.search(text)
    if found is None:
        return None
    major, minor, micro = (int(group) for group in found.groups())
    return major, minor, micro


def format_version(version: Version) -> str:
    """Write a version as users know it: 10.0.13."""
    return ".".join(str(number) for number in version)


def _is_measured(version: Version, data_path: DataPath) -> bool:
    # A release candidate counts its micro from 90 (11.0.90 is 11.1's first), so it sorts before the release.
    if version >= (11, 1, 0):
        return True
    first_good = (10, 0, 13) if data_path == "fuse" else (10, 0, 0)
    return first_good <= version < (10, 0, 50)


def _find(name: str, qemu_dir: str | None) -> tuple[str, Version]:
    path = shutil.which(name) if qemu_dir is None else str(Path(qemu_dir) / name)
    where = "on PATH" if qemu_dir is None else f"in {qemu_dir}"
    if path is None or not os.access(path, os.X_OK):
        raise Unavailable(
            f"no {name} {where}: QEMU 10.0.13 or a later 10.0, or 11.1 and later, is needed (older ones, as "
            f"in Debian 12, are refused); --qemu-dir names its directory"
        )
    path = str(Path(path).absolute())  # commands run with another working directory
    printed = command.run([path, "--version"], timeout_s=_VERSION_TIMEOUT_S).stdout
    version = parse_version(printed)
    if version is None:
        raise Unavailable(f"{path} --version tells no version: {printed.splitlines()[:1]}")
    return path, version
