"""Protobuf to domain and back, and every check of an argument. Nothing behind it checks a request again."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from csi_quobyte.errors import InvalidArgument, OutOfRange
from csi_quobyte.host.filesystem import MINIMUM_SIZE_BYTES
from csi_quobyte.host.filesystem_options import SUPPORTED, check_mount_options
from csi_quobyte.operations.snapshots import SnapshotRequest
from csi_quobyte.operations.volumes import DEFAULT_FILESYSTEM, AttachRequest, CreateRequest
from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pool.records import AccessType, SnapshotRecord, Source, VolumeRecord, job_of_snapshot
from csi_quobyte.pool.sizes import GRANULARITY_BYTES, SizeRange
from csi_quobyte.rpc import parameters

NAME_BYTES = 128
ID_BYTES = 192

_MODES = {
    csi.VolumeCapability.AccessMode.SINGLE_NODE_WRITER: "SINGLE_NODE_WRITER",
    csi.VolumeCapability.AccessMode.SINGLE_NODE_READER_ONLY: "SINGLE_NODE_READER_ONLY",
    csi.VolumeCapability.AccessMode.SINGLE_NODE_SINGLE_WRITER: "SINGLE_NODE_SINGLE_WRITER",
    csi.VolumeCapability.AccessMode.SINGLE_NODE_MULTI_WRITER: "SINGLE_NODE_MULTI_WRITER",
}
READER_ONLY = "SINGLE_NODE_READER_ONLY"
SINGLE_WRITER = "SINGLE_NODE_SINGLE_WRITER"


@dataclass(frozen=True)
class Capability:
    """A checked VolumeCapability; `filesystem` is empty for block, and for mount when the request does not say."""

    access_type: AccessType
    access_mode: str
    filesystem: str
    mount_options: tuple[str, ...]

    @property
    def readonly(self) -> bool:
        """True when the mode itself lets nobody write."""
        return self.access_mode == READER_ONLY


# --- parts -----------------------------------------------------------------------------------------------------


def required(value: str, what: str) -> str:
    """Give a string field that must not be empty nor longer than an id can be.

    Raises:
        InvalidArgument: it is.
    """
    if not value:
        raise InvalidArgument(f"{what} is missing")
    if len(value.encode()) > ID_BYTES:
        raise InvalidArgument(f"{what} has more than {ID_BYTES} bytes")
    return value


def name(value: str, what: str) -> str:
    """Give a CSI name: any text of 1 to 128 bytes without control characters.

    Raises:
        InvalidArgument: it is something else.
    """
    if not value:
        raise InvalidArgument(f"the name of the {what} is missing")
    if len(value.encode()) > NAME_BYTES:
        raise InvalidArgument(
            f"the name of the {what} has {len(value.encode())} bytes, at most {NAME_BYTES} are allowed"
        )
    if any(unicodedata.category(character) == "Cc" for character in value):
        raise InvalidArgument(f"the name of the {what} contains control characters")
    return value


def path(value: str, what: str) -> str:
    """Give a path of a node request: absolute, without `.` and `..`.

    Raises:
        InvalidArgument: it is not.
    """
    if not value:
        raise InvalidArgument(f"{what} is missing")
    if not value.startswith("/") or {".", ".."} & set(value.split("/")) or "\0" in value:
        raise InvalidArgument(f"{what} {value!r} is not an absolute path")
    return value.rstrip("/") or "/"


def size_range(given: csi.CapacityRange | None) -> SizeRange:
    """Give a capacity range; an absent one allows every size.

    Raises:
        OutOfRange: negative, above 64 TiB, or a limit below the required size.
    """
    if given is None:
        return SizeRange()
    return SizeRange(given.required_bytes, given.limit_bytes)


def capability(given: csi.VolumeCapability) -> Capability:
    """Check one capability.

    Raises:
        InvalidArgument: no access type or mode, a mode, file system or mount option that is not supported.
    """
    mode = _MODES.get(given.access_mode.mode)
    if mode is None:
        asked = csi.VolumeCapability.AccessMode.Mode.Name(given.access_mode.mode)
        raise InvalidArgument(f"access mode {asked} is not supported; supported: {', '.join(_MODES.values())}")
    match given.WhichOneof("access_type"):
        case "block":
            return Capability("block", mode, "", ())
        case "mount":
            filesystem = given.mount.fs_type
            if filesystem and filesystem not in SUPPORTED:
                raise InvalidArgument(f"file system {filesystem!r} is not supported; supported: {', '.join(SUPPORTED)}")
            options = check_mount_options(filesystem or DEFAULT_FILESYSTEM, list(given.mount.mount_flags))
            return Capability("mount", mode, filesystem, options)
        case _:
            raise InvalidArgument("the capability says neither mount nor block")


def capabilities(given: Sequence[csi.VolumeCapability]) -> list[Capability]:
    """Check the capabilities that a volume must have at the same time.

    Raises:
        InvalidArgument: there are none, or they contradict each other.
    """
    if not given:
        raise InvalidArgument("volume capabilities are missing")
    checked = [capability(one) for one in given]
    if len({one.access_type for one in checked}) > 1:
        raise InvalidArgument("a volume is either mounted or used as a block device, not both")
    if len({one.filesystem for one in checked if one.filesystem}) > 1:
        raise InvalidArgument("the capabilities name different file systems")
    return checked


# --- controller requests ---------------------------------------------------------------------------------------


def create_request(
    request: csi.CreateVolumeRequest, given: parameters.VolumeParameters, source: Source | None
) -> CreateRequest:
    """Check a CreateVolume request whose parameters and source have been read.

    Raises:
        InvalidArgument, OutOfRange: something is wrong with it.
    """
    checked = capabilities(request.volume_capabilities)
    access_type = checked[0].access_type
    filesystem = _filesystem(checked, given) if access_type == "mount" else ""
    to_make = filesystem or (DEFAULT_FILESYSTEM if access_type == "mount" else "")
    if (source or given.source_image) and given.preallocation != "off" and given.clone_mode != "copy":
        raise InvalidArgument(
            f"preallocation {given.preallocation} is not possible with a source, whose space is shared; cloneMode copy "
            "shares none"
        )
    size = size_range(request.capacity_range if request.HasField("capacity_range") else None)
    minimum_bytes = MINIMUM_SIZE_BYTES.get(to_make, GRANULARITY_BYTES)
    return CreateRequest(
        name=name(request.name, "volume"),
        size=size,
        image_format=given.image_format,
        preallocation=given.preallocation,
        data_path=given.data_path,
        access_type=access_type,
        filesystem=filesystem,
        mkfs_options=parameters.mkfs_options(to_make, given.mkfs_options),
        source=source,
        clone_mode=given.clone_mode,
        source_image=given.source_image,
        minimum_bytes=minimum_bytes,
        on_delete=given.on_delete,
        trash_retention_s=given.trash_retention_s,
        kubernetes=given.kubernetes,
    )


def _filesystem(checked: Iterable[Capability], given: parameters.VolumeParameters) -> str:
    """Give the file system that a request names, in a capability or as a parameter; empty when it names none."""
    asked = next((one.filesystem for one in checked if one.filesystem), "")
    if asked and given.filesystem and asked != given.filesystem:
        raise InvalidArgument(f"the capability names file system {asked}, the parameter {given.filesystem}")
    named = asked or given.filesystem
    if named and named not in SUPPORTED:
        raise InvalidArgument(f"file system {named!r} is not supported; supported: {', '.join(SUPPORTED)}")
    return named


def source(request: csi.CreateVolumeRequest) -> Source | None:
    """Give the content source of a CreateVolume request, None for a blank volume.

    Raises:
        InvalidArgument: it is there and says nothing.
    """
    if not request.HasField("volume_content_source"):
        return None
    content = request.volume_content_source
    match content.WhichOneof("type"):
        case "snapshot":
            return Source(kind="snapshot", id=required(content.snapshot.snapshot_id, "the id of the source snapshot"))
        case "volume":
            return Source(kind="volume", id=required(content.volume.volume_id, "the id of the source volume"))
        case _:
            raise InvalidArgument("the volume content source names neither a snapshot nor a volume")


def attach_request(request: csi.ControllerPublishVolumeRequest) -> AttachRequest:
    """Check a ControllerPublishVolume request.

    Raises:
        InvalidArgument: something is wrong with it.
    """
    volume_id = required(request.volume_id, "the volume id")
    node = required(request.node_id, "the node id")
    if not request.HasField("volume_capability"):
        raise InvalidArgument("the volume capability is missing")
    checked = capability(request.volume_capability)
    return AttachRequest(
        volume_id=volume_id,
        node=node,
        readonly=request.readonly or checked.readonly,
        access_mode=checked.access_mode,
        access_type=checked.access_type,
        filesystem=checked.filesystem,
    )


def snapshot_request(request: csi.CreateSnapshotRequest) -> SnapshotRequest:
    """Check a CreateSnapshot request.

    Raises:
        InvalidArgument: something is wrong with it.
    """
    given = parameters.snapshot_parameters(request.parameters)
    wanted = name(request.name, "snapshot")
    if job_of_snapshot(wanted):
        raise InvalidArgument(f"the name {wanted!r} has the form of those that exports take for themselves")
    return SnapshotRequest(
        name=wanted,
        source_volume=required(request.source_volume_id, "the id of the source volume"),
        on_delete=given.on_delete,
        trash_retention_s=given.trash_retention_s,
        kubernetes=given.kubernetes,
    )


def expand_range(request: csi.ControllerExpandVolumeRequest) -> SizeRange:
    """Check the range of a ControllerExpandVolume request, which must be there.

    Raises:
        InvalidArgument: it is missing.
        OutOfRange: see `size_range`.
    """
    if not request.HasField("capacity_range"):
        raise InvalidArgument("the capacity range is missing")
    found = size_range(request.capacity_range)
    if found.required_bytes == 0 and found.limit_bytes == 0:
        raise OutOfRange("the capacity range says nothing")
    return found


# --- pages -----------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"([0-9]{1,4}):([0-9a-f]{8}-(?:vol|snap)-[0-9a-f]{32})?")


def page_token(text: str) -> tuple[int, str]:
    """Read a starting token: the number of the pool and the last id of the page before.

    Raises:
        ValueError: it is none of ours; the specification wants ABORTED then, which the caller sees to.
    """
    if not text:
        return 0, ""
    found = _TOKEN.fullmatch(text)
    if not found:
        raise ValueError(f"the starting token {text!r} is not one of this driver's")
    return int(found[1]), found[2] or ""


def next_token(pool_number: int, last_id: str) -> str:
    """Give the token of the page that begins after `last_id`."""
    return f"{pool_number}:{last_id}"


# --- responses -------------------------------------------------------------------------------------------------


def volume(record: VolumeRecord, pool: str) -> csi.Volume:
    """Give the CSI form of a volume; `pool` is the configured name."""
    made = csi.Volume(volume_id=record.id, capacity_bytes=record.size_bytes, volume_context={"pool": pool})
    if record.source and record.source.kind == "snapshot":
        made.content_source.snapshot.snapshot_id = record.source.id
    elif record.source and record.source.kind == "volume":
        made.content_source.volume.volume_id = record.source.id
    return made


def snapshot(record: SnapshotRecord) -> csi.Snapshot:
    """Give the CSI form of a snapshot."""
    moment = Timestamp()
    moment.FromDatetime(record.created_at)
    return csi.Snapshot(
        snapshot_id=record.id,
        source_volume_id=record.source_volume,
        size_bytes=record.size_bytes,
        creation_time=moment,
        ready_to_use=not record.unfinished,
    )
