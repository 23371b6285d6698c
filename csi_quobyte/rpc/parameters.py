"""The parameters of a StorageClass and of a VolumeSnapshotClass: one table, from which checks and docs are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from csi_quobyte.errors import InvalidArgument
from csi_quobyte.host.filesystem import check_mkfs_options
from csi_quobyte.pool.records import CloneMode, DataPath, ImageFormat, Preallocation

KUBERNETES_PREFIX = "csi.storage.k8s.io/"
FSTYPE = f"{KUBERNETES_PREFIX}fstype"


@dataclass(frozen=True)
class Parameter:
    """One parameter: its values as users write them (empty: free text), its default, and what it means."""

    name: str
    values: tuple[str, ...]
    default: str
    meaning: str


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
    Parameter("mkfsOptions", (), "", "Further options for mkfs, from the allow-list of the file system."),
    Parameter(FSTYPE, ("ext4", "xfs"), "ext4", "File system of the volume. One with a source has the source's."),
)
RESERVED_VOLUME_PARAMETERS = ("sourceImage", "crashPolicy", "onDelete", "evictOnFailure")
SNAPSHOT_PARAMETERS: tuple[Parameter, ...] = ()
RESERVED_SNAPSHOT_PARAMETERS = ("fsfreeze",)


@dataclass(frozen=True)
class VolumeParameters:
    """The checked parameters of a StorageClass; `filesystem` is empty when the class does not say."""

    pool: str
    image_format: ImageFormat
    preallocation: Preallocation
    data_path: DataPath
    clone_mode: CloneMode
    mkfs_options: str
    filesystem: str
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
        mkfs_options=given.get("mkfsOptions", ""),
        filesystem=given.get(FSTYPE, ""),
        kubernetes=_kubernetes(given),
    )


def snapshot_parameters(given: Mapping[str, str]) -> dict[str, str]:
    """Read the parameters of a VolumeSnapshotClass and give what Kubernetes added to them.

    Raises:
        InvalidArgument: an unknown or reserved key.
    """
    _check_keys(given, SNAPSHOT_PARAMETERS, RESERVED_SNAPSHOT_PARAMETERS)
    return _kubernetes(given)


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
