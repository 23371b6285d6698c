"""The parameters of a StorageClass and of a VolumeSnapshotClass: one table, from which checks and docs are made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from csi_quobyte.errors import InvalidArgument
from csi_quobyte.host.filesystem_options import check_mkfs_options
from csi_quobyte.pool.records import (
    DEFAULT_TRASH_RETENTION_S,
    CloneMode,
    DataPath,
    ImageFormat,
    OnDelete,
    Preallocation,
)

KUBERNETES_PREFIX = "csi.storage.k8s.io/"
FSTYPE = f"{KUBERNETES_PREFIX}fstype"


@dataclass(frozen=True)
class Parameter:
    """One parameter: its values as users write them (empty: free text), its default, and what it means."""

    name: str
    values: tuple[str, ...]
    default: str
    meaning: str


ON_DELETE = Parameter(
    "onDelete",
    ("delete", "retain", "trash"),
    "delete",
    "What becomes of what is deleted. delete: it is gone; trash: `csi-quobyte trash restore` brings it back until "
    "`trashRetention` is over; retain: the same without an end, until it is restored or `csi-quobyte trash purge`d.",
)
TRASH_RETENTION = Parameter(
    "trashRetention",
    (),
    "24h",
    "How long the trash keeps it: a whole number with `s`, `m`, `h` or `d`, such as 24h or 7d, at most 3650d. Needs "
    "`onDelete: trash`.",
)
VOLUME_PARAMETERS = (
    Parameter("pool", (), "the only pool", "Name of the pool (`--pool NAME=PATH`); needed when there are several."),
    Parameter(
        "volumeFormat",
        ("qcow2", "raw"),
        "qcow2",
        "Format of the image file of a volume that is blank or a copy (cloneMode). What lies on a source or on a "
        "snapshot is always qcow2.",
    ),
    Parameter(
        "preallocation",
        ("off", "metadata", "falloc"),
        "off",
        "Space taken at once. off: none; metadata (qcow2 only): that of the mapping tables; falloc: all of it. "
        "With a source only off is possible, unless it is copied (cloneMode).",
    ),
    Parameter(
        "dataPath",
        ("auto", "fuse", "loop"),
        "auto",
        "How the image becomes a block device. auto and fuse: a storage daemon under a loop device. loop (raw only): "
        "the kernel's loop device on the file itself, while the volume is a single image: blank or a copy, and no "
        "snapshot was taken. Otherwise as fuse.",
    ),
    Parameter(
        "cloneMode",
        ("overlay", "cache", "copy"),
        "overlay",
        "How a volume with a source is made. overlay: at once, it shares its data with the source. cache: "
        "as overlay, but on a copy of all that the snapshot shows, which is made once, for the first such volume, so "
        "that none has a long chain; for a volume as source, as overlay. copy: an "
        "independent image in volumeFormat with its preallocation, copied in the background; until that is done the "
        "claim is pending.",
    ),
    Parameter(
        "sourceImage",
        (),
        "",
        "Name of a golden image of the pool (`csi-quobyte image import`): a volume without a `dataSource` is made from "
        "it, as `cloneMode` says (cache as overlay).",
    ),
    Parameter("mkfsOptions", (), "", "Further options for mkfs, from the allow-list of the file system."),
    ON_DELETE,
    TRASH_RETENTION,
    Parameter(FSTYPE, ("ext4", "xfs"), "ext4", "File system of the volume. One with a source has the source's."),
)
RESERVED_VOLUME_PARAMETERS = ("crashPolicy", "evictOnFailure")
SNAPSHOT_PARAMETERS = (ON_DELETE, TRASH_RETENTION)
RESERVED_SNAPSHOT_PARAMETERS = ("fsfreeze",)


@dataclass(frozen=True)
class VolumeParameters:
    """The checked parameters of a StorageClass; `filesystem` is empty when the class does not say."""

    pool: str
    image_format: ImageFormat
    preallocation: Preallocation
    data_path: DataPath
    clone_mode: CloneMode
    source_image: str
    mkfs_options: str
    filesystem: str
    on_delete: OnDelete
    trash_retention_s: int
    kubernetes: dict[str, str]


@dataclass(frozen=True)
class SnapshotParameters:
    """The checked parameters of a VolumeSnapshotClass."""

    on_delete: OnDelete
    trash_retention_s: int
    kubernetes: dict[str, str]


def volume_parameters(given: Mapping[str, str]) -> VolumeParameters:
    """Read the parameters of a StorageClass.

    Raises:
        InvalidArgument: an unknown or reserved key, a value that the key does not have, or keys that contradict each
            other (row S17); the message lists what is known.
    """
    _check_keys(given, VOLUME_PARAMETERS, RESERVED_VOLUME_PARAMETERS)
    if given.get("dataPath") == "nbd":
        raise InvalidArgument("dataPath nbd is not in this version yet; use auto, which serves this volume over fuse")
    image_format = cast(ImageFormat, _choice(given, "volumeFormat"))
    preallocation = cast(Preallocation, _choice(given, "preallocation"))
    data_path = cast(DataPath, _choice(given, "dataPath"))
    if image_format == "raw" and preallocation == "metadata":
        raise InvalidArgument("preallocation metadata needs volumeFormat qcow2; raw knows off and falloc")
    if image_format == "qcow2" and data_path == "loop":
        raise InvalidArgument("dataPath loop needs volumeFormat raw")
    return VolumeParameters(
        pool=given.get("pool", ""),
        image_format=image_format,
        preallocation=preallocation,
        data_path=data_path,
        clone_mode=cast(CloneMode, _choice(given, "cloneMode")),
        source_image=given.get("sourceImage", ""),
        mkfs_options=given.get("mkfsOptions", ""),
        filesystem=given.get(FSTYPE, ""),
        on_delete=cast(OnDelete, _choice(given, "onDelete")),
        trash_retention_s=_retention_s(given),
        kubernetes=_kubernetes(given),
    )


def snapshot_parameters(given: Mapping[str, str]) -> SnapshotParameters:
    """Read the parameters of a VolumeSnapshotClass.

    Raises:
        InvalidArgument: as for `volume_parameters`.
    """
    _check_keys(given, SNAPSHOT_PARAMETERS, RESERVED_SNAPSHOT_PARAMETERS)
    return SnapshotParameters(
        on_delete=cast(OnDelete, _choice(given, "onDelete")),
        trash_retention_s=_retention_s(given),
        kubernetes=_kubernetes(given),
    )


_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_RETENTION_S = 3650 * 86400


def _retention_s(given: Mapping[str, str]) -> int:
    """Read how long the trash keeps what was deleted, in seconds.

    Raises:
        InvalidArgument: it is no such time, or nothing goes to the trash.
    """
    text = given.get("trashRetention")
    if text is None:
        return DEFAULT_TRASH_RETENTION_S
    if given.get("onDelete") != "trash":
        raise InvalidArgument("trashRetention needs onDelete trash; what is retained is kept without an end")
    found = re.fullmatch(r"([0-9]{1,10})([smhd])", text)
    seconds = int(found[1]) * _UNITS_S[found[2]] if found else 0
    if not 0 < seconds <= _LONGEST_RETENTION_S:
        raise InvalidArgument(f"trashRetention {text!r} is not a time such as 24h or 7d, of at most 3650d")
    return seconds


def mkfs_options(filesystem: str, text: str) -> tuple[str, ...]:
    """Split and check `mkfsOptions` for a file system; none for a block volume.

    Raises:
        InvalidArgument: an option is not on the list, or there is no file system to make.
    """
    if not filesystem:
        if text:
            raise InvalidArgument("mkfsOptions makes no sense for a block volume")
        return ()
    return check_mkfs_options(filesystem, text)


def _check_keys(given: Mapping[str, str], known: tuple[Parameter, ...], reserved: tuple[str, ...]) -> None:
    names = [parameter.name for parameter in known if not parameter.name.startswith(KUBERNETES_PREFIX)]
    for key in given:
        if key in reserved:
            raise InvalidArgument(
                f"the parameter {key} is reserved for a later version; known: {', '.join(names) or 'none'}"
            )
        if key not in names and not key.startswith(KUBERNETES_PREFIX):
            raise InvalidArgument(f"unknown parameter {key!r}; known: {', '.join(names) or 'none'}")


def _choice(given: Mapping[str, str], name: str) -> str:
    parameter = next(parameter for parameter in VOLUME_PARAMETERS if parameter.name == name)
    value = given.get(name, parameter.default)
    if value not in parameter.values:
        raise InvalidArgument(f"{name} {value!r} is not one of {', '.join(parameter.values)}")
    return value


def _kubernetes(given: Mapping[str, str]) -> dict[str, str]:
    """Give what the sidecars add with --extra-create-metadata: the names of the PVC, PV or VolumeSnapshot."""
    return {
        key.removeprefix(KUBERNETES_PREFIX): value
        for key, value in given.items()
        if key.startswith(KUBERNETES_PREFIX) and key != FSTYPE
    }
