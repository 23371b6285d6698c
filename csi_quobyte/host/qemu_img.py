"""Call qemu-img: explicit formats and backing files, limited memory and time, JSON out.

Owns: every call of qemu-img, and the check that an image uses no feature that we do not know.
Hides: its options, its exit statuses, its JSON.

What always holds:
- No format is probed, and no backing file or data file is opened because an image names it: a guest can write bytes
  that look like a header, and the string in an image may be wrong at any time; the records are right.
- An image with an external data file or an unknown incompatible feature is refused before QEMU sees it.
- `commit` and `rebase` are never called: both follow the strings, and killed in the middle they lost data.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from csi_quobyte.errors import Corrupt, Refused, Unavailable
from csi_quobyte.host import command
from csi_quobyte.host.qemu import ImageFormat, ImageLayer, QemuTools

INFO_TIMEOUT_S = 30.0
CHECK_TIMEOUT_S = 600.0
COPY_TIMEOUT_S = 6 * 3600.0

# What reads a whole image may need any amount of CPU time; its wall clock limit is the guard.
_WHOLE_IMAGE_LIMITS = command.Limits(address_space_bytes=command.QEMU_IMG_LIMITS.address_space_bytes, cpu_s=None)

# qemu-img(1), "check": 0 good, 2 corrupted, 3 leaked clusters; 1 and 63 mean that there was no check.
_CHECK_STATUSES = (0, 2, 3)
# qemu-img(1), "compare": 0 equal, 1 different, more than 1 an error.
_EQUAL, _DIFFERENT = 0, 1

# QEMU, docs/interop/qcow2.rst, "Header". Bits: 0 dirty, 1 corrupt, 2 external data file, 3 compression type,
# 4 extended L2 entries. Bit 2 is missing here on purpose.
_QCOW2_MAGIC = b"QFI\xfb"
_QCOW2_KNOWN_FEATURES = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4
_QCOW2_EXTERNAL_DATA_FILE = 1 << 2
_QCOW2_HEADER_BYTES = 80
_QCOW2_FEATURES_OFFSET_BYTES = 72


@dataclass(frozen=True)
class ImageInfo:
    """What one image says about itself; for operators and checks, never for deciding what to open."""

    format: ImageFormat
    virtual_size_bytes: int
    actual_size_bytes: int
    """Space taken in the filesystem."""
    backing_file: str | None
    """The string in the image, as it stands there."""
    backing_format: str | None
    cluster_size_bytes: int | None
    """None for raw, as the next three."""
    compat: str | None
    """"0.10" or "1.1"."""
    is_dirty: bool | None
    is_marked_corrupt: bool | None


@dataclass(frozen=True)
class CheckResult:
    """The outcome of `qemu-img check`; all zero means sound."""

    errors: int
    """Errors that kept the check from looking at something."""
    leaks: int
    """Clusters that are taken but not used: lost space, nothing else."""
    corruptions: int
    """Damaged metadata: contents may be lost."""


def check_features(path: str, format: ImageFormat) -> None:  # noqa: A002 - the word of QEMU's own options
    """Check that an image can be opened without opening a file that only the image names; raw always can.

    Raises:
        Corrupt: the file is missing, is no qcow2 image of version 2 or 3, or has an external data file or an
            incompatible feature that this driver does not know.
        Unavailable: the file cannot be read now.
    """
    if format == "raw":
        return
    header = _read_header(path)
    version = struct.unpack_from(">I", header, 4)[0] if len(header) >= _QCOW2_HEADER_BYTES else 0
    if header[:4] != _QCOW2_MAGIC or version not in (2, 3):
        raise Corrupt(f"{path}: the record says qcow2, but the file has no qcow2 header of version 2 or 3")
    # Version 2 ends at byte 72: there are no feature bits.
    features = struct.unpack_from(">Q", header, _QCOW2_FEATURES_OFFSET_BYTES)[0] if version == 3 else 0
    if features & _QCOW2_EXTERNAL_DATA_FILE:
        raise Corrupt(f"{path}: the image keeps its data in an external file, which is refused")
    if features & ~_QCOW2_KNOWN_FEATURES:
        raise Corrupt(f"{path}: the image has unknown incompatible features (bits {features:#x})")


def info(
    tools: QemuTools,
    path: str,
    format: ImageFormat,  # noqa: A002
    *,
    timeout_s: float = INFO_TIMEOUT_S,
) -> ImageInfo:
    """Read the metadata of one image, also of one that a daemon has open (which may make it slightly old).

    Raises:
        Corrupt: as `check_features`.
        Unavailable: qemu-img failed or did not end in time.
    """
    check_features(path, format)
    argv = [tools.qemu_img, "info", "--output=json", "--force-share", _alone_json(path, format, direct=False)]
    found = _as_json(command.run(argv, timeout_s=timeout_s, limits=command.QEMU_IMG_LIMITS), argv)
    specific = found.get("format-specific", {}).get("data", {}) if format == "qcow2" else {}
    return ImageInfo(
        format=format,
        virtual_size_bytes=found["virtual-size"],
        actual_size_bytes=found["actual-size"],
        backing_file=found.get("backing-filename"),
        backing_format=found.get("backing-filename-format"),
        cluster_size_bytes=found.get("cluster-size"),
        compat=specific.get("compat"),
        is_dirty=found.get("dirty-flag") if format == "qcow2" else None,
        is_marked_corrupt=specific.get("corrupt"),
    )


def check(
    tools: QemuTools,
    path: str,
    format: ImageFormat,  # noqa: A002
    *,
    timeout_s: float = CHECK_TIMEOUT_S,
) -> CheckResult:
    """Check the metadata of one image alone, without its backing file; repairs nothing. Raw has none: all zero.

    Raises:
        Corrupt: as `check_features`.
        Unavailable: it could not be checked: a daemon has it open for writing, or its header is too damaged.
    """
    if format == "raw":
        return CheckResult(0, 0, 0)
    check_features(path, format)
    argv = [tools.qemu_img, "check", "--output=json", _alone_json(path, format, direct=True)]
    return _checked(argv, timeout_s)


def free_leaks(tools: QemuTools, path: str, *, timeout_s: float = CHECK_TIMEOUT_S) -> CheckResult:
    """Give the leaked clusters of a qcow2 image that nobody has open back; changes refcounts only, durably.

    The result is what the check found after that.

    Raises:
        Corrupt: as `check_features`.
        Unavailable: it could not be done: somebody has it open, or its metadata is damaged.
    """
    check_features(path, "qcow2")
    node = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": path, "locking": "on"}}
    argv = [tools.qemu_img, "check", "-r", "leaks", "--output=json", "json:" + json.dumps(node)]
    found = _checked(argv, timeout_s)
    sync(path)
    return found


def _checked(argv: Sequence[str], timeout_s: float) -> CheckResult:
    completed = command.run(argv, timeout_s=timeout_s, limits=_WHOLE_IMAGE_LIMITS, ok_statuses=_CHECK_STATUSES)
    found = _as_json(completed, argv)
    return CheckResult(found.get("check-errors", 0), found.get("leaks", 0), found.get("corruptions", 0))


def convert(
    tools: QemuTools,
    source: Sequence[ImageLayer],
    target_path: str,
    target_format: ImageFormat,
    *,
    timeout_s: float = COPY_TIMEOUT_S,
) -> None:
    """Copy what a chain (base first) shows into a new image without backing file, with the virtual size of its head.

    On return the file is durable, its directory entry is not. A crash in between leaves a file that passes `check` and
    is still incomplete: only the record that names it says that it is whole.

    Raises:
        Refused: `target_path` exists; it was not touched.
        Corrupt: as `check_features`, for a layer of the source.
        Unavailable: qemu-img failed (also: no space) or did not end in time; the target was removed.
    """
    options = ["-o", "compat=1.1,lazy_refcounts=off"] if target_format == "qcow2" else []
    argv = [tools.qemu_img, "convert", "-q", "-t", "none", "-O", target_format, *options, chain_json(source)]
    try:
        os.close(os.open(target_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError as error:
        raise Refused(f"{target_path} exists already: a copy never replaces a file") from error
    except OSError as error:
        raise Unavailable(f"{target_path} cannot be made: {error}") from error
    try:
        command.run([*argv, target_path], timeout_s=timeout_s, limits=_WHOLE_IMAGE_LIMITS)
        sync(target_path)
    except BaseException:
        Path(target_path).unlink(missing_ok=True)
        raise


def compare(
    tools: QemuTools,
    chain_a: Sequence[ImageLayer],
    chain_b: Sequence[ImageLayer],
    *,
    timeout_s: float = COPY_TIMEOUT_S,
) -> bool:
    """Tell whether two chains (base first) show the same contents; a longer one may go on with zeros.

    Raises:
        Corrupt: as `check_features`, for any layer.
        Unavailable: qemu-img failed or did not end in time; a layer may be open for writing.
    """
    argv = [tools.qemu_img, "compare", "-q", chain_json(chain_a), chain_json(chain_b)]
    statuses = (_EQUAL, _DIFFERENT)
    return command.run(argv, timeout_s=timeout_s, limits=_WHOLE_IMAGE_LIMITS, ok_statuses=statuses).status == _EQUAL


def set_backing_name(tools: QemuTools, path: str, name: str | None, backing_format: ImageFormat | None) -> None:
    """Write the backing string of a qcow2 image that nobody has open; no byte of the disk in it changes, durably.

    Nothing of ours follows the string. `rebase -u` opens no backing file.

    Raises:
        Corrupt: as `check_features`.
        Unavailable: it could not be written; a daemon may have the image open.
    """
    check_features(path, "qcow2")
    backing = ["-b", name or ""] + (["-F", backing_format] if name and backing_format else [])
    command.run(
        [tools.qemu_img, "rebase", "-u", "-f", "qcow2", *backing, path],
        timeout_s=INFO_TIMEOUT_S,
        limits=command.QEMU_IMG_LIMITS,
    )
    sync(path)


def chain_json(layers: Sequence[ImageLayer]) -> str:
    """Return a chain (base first) as a "json:" file name for reading: driver, file and parent of each layer explicit.

    Raises:
        Corrupt: as `check_features`, for any layer.
    """
    node: Mapping[str, Any] | None = None
    for layer in layers:
        check_features(layer.path, layer.format)
        node = _node(layer.path, layer.format, direct=True, backing=node)
    return "json:" + json.dumps(node)


ForeignFormat = Literal["qcow2", "raw", "vdi", "vhdx", "vpc"]
"""What an image from outside may be. None of QEMU's drivers for these opens another file for one without a parent."""


def foreign_json(path: str, format: ForeignFormat) -> str:  # noqa: A002
    """Return an image from outside of a pool as a "json:" file name for reading, without anything below it."""
    node: dict[str, Any] = {
        "driver": format,
        "file": {"driver": "file", "filename": path, "read-only": True, "locking": "on"},
        "read-only": True,
    }
    if format == "qcow2":
        node["backing"] = None
    return "json:" + json.dumps(node)


def foreign_size_bytes(tools: QemuTools, path: str, format: ForeignFormat) -> int:  # noqa: A002
    """Give the virtual size of an image from outside of a pool, whose header the caller has judged if it is qcow2.

    Raises:
        Refused: QEMU cannot open it as that format, or it needs another file, is encrypted or has internal snapshots.
    """
    argv = [tools.qemu_img, "info", "--output=json", foreign_json(path, format)]
    try:
        found = _as_json(command.run(argv, timeout_s=INFO_TIMEOUT_S, limits=command.QEMU_IMG_LIMITS), argv)
    except Unavailable as error:
        raise Refused(f"{path} cannot be read as {format}: {error}") from error
    for key, words in (
        ("backing-filename", "lies on another image"),
        ("encrypted", "is encrypted"),
        ("snapshots", "has internal snapshots"),
    ):
        if found.get(key):
            raise Refused(f"{path} {words}: convert it into a plain image first (qemu-img convert)")
    size_bytes: int = found["virtual-size"]
    return size_bytes


def check_foreign(tools: QemuTools, path: str) -> None:
    """Check that the metadata of a qcow2 image from outside is sound, and nothing of it lies beyond the file's end.

    Raises:
        Refused: it is damaged or cut off: QEMU would read zeros there.
        Unavailable: it could not be checked.
    """
    found = _checked([tools.qemu_img, "check", "--output=json", foreign_json(path, "qcow2")], CHECK_TIMEOUT_S)
    if found.errors or found.corruptions:
        raise Refused(f"{path} is cut off or damaged: {found.errors + found.corruptions} errors were found in it")


def _alone_json(path: str, format: ImageFormat, *, direct: bool) -> str:  # noqa: A002
    return "json:" + json.dumps(_node(path, format, direct=direct, backing=None))


def _node(
    path: str,
    format: ImageFormat,  # noqa: A002
    *,
    direct: bool,
    backing: Mapping[str, Any] | None,
) -> Mapping[str, Any]:
    # `direct` because another host may have written the file through its own client: our page cache may be old.
    file = {"driver": "file", "filename": path, "read-only": True, "locking": "on", "cache": {"direct": direct}}
    node: dict[str, Any] = {"driver": format, "file": file, "read-only": True}
    if format == "qcow2":
        node["backing"] = backing  # null: none at all, whatever the image says
    return node


def _read_header(path: str) -> bytes:
    try:
        with Path(path).open("rb", buffering=0) as file:
            return file.read(_QCOW2_HEADER_BYTES)
    except FileNotFoundError as error:
        raise Corrupt(f"{path}: the record names this layer file, but it does not exist") from error
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error}") from error


def _as_json(completed: command.Completed, argv: Sequence[str]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(completed.stdout)
    except ValueError as error:
        raise command.CommandFailed(argv, completed.status, completed.stdout, "printed no JSON") from error
    return found


def sync(path: str) -> None:
    """Make what was written to a file durable.

    Raises:
        Unavailable: it could not be made so.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise Unavailable(f"{path} cannot be made durable: {error}") from error
