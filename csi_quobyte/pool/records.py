"""The records of format 1 and their JSON form. Pure: knows no path and does no I/O.

A record is one JSON object in one file. Every write of it raises `generation` by one and draws a new `nonce`;
the pair is the record's version and what compare-and-set compares. docs/format.md is the exact page.

    volume --head--> layer --parent--> layer --parent--> layer (base)
    snapshot --layer------------------^

Always true: an object's `uid` is new each time a name is used, so that nothing made for a deleted object of the
same name (a marker, a half-done write) can be taken for the new one's.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Literal, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from csi_quobyte.errors import Corrupt

FORMAT = 1
LEASE_ID = "collector"
KNOWN_REQUIRED_FEATURES: frozenset[str] = frozenset()

ImageFormat = Literal["qcow2", "raw"]
Preallocation = Literal["off", "metadata", "falloc"]
DataPath = Literal["auto", "nbd", "fuse", "loop"]
AccessType = Literal["mount", "block"]
CloneMode = Literal["overlay", "cache", "copy"]
OnDelete = Literal["delete", "retain", "trash"]

DEFAULT_TRASH_RETENTION_S = 24 * 3600

_RECORD_ID = re.compile(r"([0-9a-f]{8})-(vol|snap|img)-([0-9a-f]{32})")
_UID = re.compile(r"[0-9a-f]{8}")
_LAYER_ID = re.compile(r"[0-9a-f]{24}")
_JOBS_SNAPSHOT = re.compile(r"export-([0-9a-f]{24})")


class VolumeState(StrEnum):
    """`creating` is an intent: it names what is being made, before anything of it exists."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"


class SnapshotState(StrEnum):
    """Only a `ready` snapshot may be a source."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"


class ImageState(StrEnum):
    """Only a `ready` image may be a source."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"


class TrashState(StrEnum):
    """kept: until it is restored or purged; restoring: `target` of its Trash says as what; purging: not to be had any
    more.
    """

    KEPT = "kept"
    RESTORING = "restoring"
    PURGING = "purging"


class LayerState(StrEnum):
    """head: may be written by its volume's daemon; frozen: what it shows never changes; merging: frozen, and about to
    be folded into the layer above or below it; retired: condemned, its file may be gone.
    """

    HEAD = "head"
    FROZEN = "frozen"
    MERGING = "merging"
    RETIRED = "retired"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a volume was made from."""

    kind: Literal["snapshot", "volume", "image"]
    id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What is known to have been written to a volume's device.

    formatting: our mkfs was started and nothing else ever wrote; formatted: holds `filesystem`;
    raw: given to a pod as a block device, so anything may be there. `generation` is the attachment's that wrote it.
    `growing`: our resize2fs was started on the unmounted ext4, which was whole, and nothing else wrote since.
    """

    state: Literal["formatting", "formatted", "raw"]
    filesystem: str = ""
    generation: int = 0
    growing: bool = False


@dataclass(frozen=True, kw_only=True)
class Closed:
    """A node's word that it has closed a volume: nothing is written any more for the attachment of `generation`."""

    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Attachment:
    """One node's right to open a volume. A stage that does not bring this `generation` is refused."""

    node: str
    generation: int
    readonly: bool
    access_mode: str
    opened: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Incarnation:
    """One use of an id."""

    id: str
    uid: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Trash:
    """What becomes of a deleted object that is kept: written together with the decision to delete it.

    `expires_at` None: it is kept until somebody decides. `target` is set while it is being restored.
    """

    deleted_at: datetime
    expires_at: datetime | None
    state: TrashState = TrashState.KEPT
    target: Incarnation | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VolumeRecord:
    """A volume.

    `unfinished` is true until it was ready once, also while it is being deleted: then `parent` and `source_next` say
    what its head was to lie on (or, with the clone mode copy, what is copied into it) and what the source volume's new
    head was to be. `pinned` is true while a copy is made: its marker is in `parent`, and was there in time.
    `detached_at`: when an attachment was last taken away.

    `on_delete` and `trash_retention_s` are its class's choice; `trash` is set in state `deleting` when it is kept, and
    the record then moves to trash/ as it is. `restored_from` names the trash entry that it was restored from, which
    may still be there as long as this record is.
    """

    id: str
    uid: str
    name: str
    state: VolumeState
    size_bytes: int
    head: str
    image_format: ImageFormat
    preallocation: Preallocation
    data_path: DataPath
    access_type: AccessType
    filesystem: str
    mkfs_options: tuple[str, ...]
    created_at: datetime
    unfinished: bool = True
    source: Source | None = None
    parent: str | None = None
    source_next: str | None = None
    clone_mode: CloneMode = "overlay"
    pinned: bool = False
    inherited_content: Content | None = None
    attach_generation: int = 0
    attachments: tuple[Attachment, ...] = ()
    detached_at: datetime | None = None
    on_delete: OnDelete = "delete"
    trash_retention_s: int = DEFAULT_TRASH_RETENTION_S
    trash: Trash | None = None
    restored_from: str | None = None
    kubernetes: dict[str, str] = field(default_factory=dict)
    kind: Literal["volume"] = "volume"
    generation: int = 0
    nonce: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotRecord:
    """A snapshot: a reference to a frozen layer. `next` is the head that the source volume gets by the freeze.

    `next` is None when the source's head was an overlay that nothing was ever written to: then `layer` is the
    frozen layer below it and nothing has to be frozen. `unfinished` is true until it was ready once. `cache`: a layer
    that is made, or may be under way, as a copy of all that the snapshot shows, for the volumes that lie on it.
    `on_delete`, `trash_retention_s`, `trash` and `restored_from`: as of a volume.
    """

    id: str
    uid: str
    name: str
    state: SnapshotState
    source_volume: str
    layer: str
    next: str | None
    size_bytes: int
    content: Content | None
    created_at: datetime
    unfinished: bool = True
    cache: str | None = None
    on_delete: OnDelete = "delete"
    trash_retention_s: int = DEFAULT_TRASH_RETENTION_S
    trash: Trash | None = None
    restored_from: str | None = None
    kubernetes: dict[str, str] = field(default_factory=dict)
    kind: Literal["snapshot"] = "snapshot"
    generation: int = 0
    nonce: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """A golden image, which volumes are made from by its name: a reference to a frozen layer of its own.

    `unfinished` is true until it was ready once.
    """

    id: str
    uid: str
    name: str
    state: ImageState
    layer: str
    size_bytes: int
    content: Content | None
    created_at: datetime
    unfinished: bool = True
    kind: Literal["image"] = "image"
    generation: int = 0
    nonce: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """A process that is no controller and works in a pool for long, such as an import.

    While this is there, the marker `c-<id>` in `layer` holds that layer and all below it, and the temporary files of
    `token` are in use. `place`: the mount that it sees the pool by.
    """

    id: str
    token: str
    place: str
    what: str
    layer: str | None
    started_at: datetime
    renewed_at: datetime
    kind: Literal["job"] = "job"
    generation: int = 0
    nonce: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """A change of a chain that is under way; `child` is the layer whose parent becomes `parent` (None: it has none).

    up: the layer that has this, in state `merging`, is folded into its child, so that the child gets the parent.
    down: it is folded into its parent. flatten: the head that has this (it is its own `child`) takes over what the
    layers above `parent` have; they stay as they are.
    """

    kind: Literal["up", "down", "flatten"]
    child: str
    parent: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecord:
    """One image file. `size_bytes` is its virtual size when it was made (a head may have grown since).

    While `merge` is set, nobody may open a chain with this layer in it, but who does the merge. Its chain has at most
    `depth` layers, itself included (0: not known): so many when it was made, and merges only shorten chains.
    """

    id: str
    file: str
    format: ImageFormat
    size_bytes: int
    parent: str | None
    state: LayerState
    merge: Merge | None = None
    depth: int = 0
    kind: Literal["layer"] = "layer"
    generation: int = 0
    nonce: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeRecord:
    """A node plugin that has this pool mounted; written by that node alone."""

    id: str
    driver_version: str
    started_at: datetime
    kind: Literal["node"] = "node"
    generation: int = 0
    nonce: str = ""


@dataclass(frozen=True, kw_only=True)
class LeaseRecord:
    """Who may merge layers in the pool: the token of a process (empty: nobody), and the mount that it sees it by."""

    id: str
    holder: str
    place: str
    renewed_at: datetime
    kind: Literal["lease"] = "lease"
    generation: int = 0
    nonce: str = ""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who owns every file of a pool."""

    uid: int
    gid: int


@dataclass(frozen=True, kw_only=True)
class Modes:
    """Permission bits of every file and directory of a pool, as octal text such as "0600"."""

    file: str = "0600"
    directory: str = "0700"


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """What an administrator may change in format.json; names as in the file (row S25)."""

    reservedPercentage: int = 0  # noqa: N815 - the name in the file
    maxOverSubscription: float = 20.0  # noqa: N815


@dataclass(frozen=True, kw_only=True)
class PoolFormat:
    """format.json: what a reader must understand before it touches anything else."""

    format: int
    uuid: str
    required_features: tuple[str, ...]
    optional_features: tuple[str, ...]
    owner: Owner
    modes: Modes
    settings: PoolSettings

    @property
    def prefix(self) -> str:
        """The first eight hex digits of the uuid: the part of every record id that names the pool."""
        return self.uuid[:8]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the filling of a layer is; the unit is the job's own."""

    current_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Versioned:
    """The part that all records share: their version, and whose it is (`uid` is empty where ids are never reused)."""

    generation: int
    nonce: str
    uid: str = ""


@dataclass(frozen=True, kw_only=True)
class Sized:
    """The part of a volume's record that is counted."""

    size_bytes: int


Record = VolumeRecord | SnapshotRecord | ImageRecord | LayerRecord | NodeRecord | LeaseRecord | JobRecord
R = TypeVar("R", bound=Record)
# What users name and delete; an entry of the trash is such a record, as it was when it was deleted.
Deletable = VolumeRecord | SnapshotRecord
# What refers to a layer by a marker with its own id and uid.
Owning = VolumeRecord | SnapshotRecord | ImageRecord
D = TypeVar("D")

_ADAPTERS: dict[type, TypeAdapter[object]] = {
    kind: TypeAdapter(kind)
    for kind in (
        VolumeRecord,
        SnapshotRecord,
        LayerRecord,
        NodeRecord,
        LeaseRecord,
        ImageRecord,
        JobRecord,
        PoolFormat,
        Content,
        Progress,
        Versioned,
        Sized,
        Closed,
    )
}


def encode(value: object) -> bytes:
    """Give the JSON form of a record or of one of the other kinds: one indented object and a final newline."""
    return _ADAPTERS[type(value)].dump_json(value, indent=1) + b"\n"


def decode(kind: type[D], data: bytes, *, where: str) -> D:
    """Read the JSON form of a `kind`. Unknown fields are ignored; a missing or mistyped one is an error.

    Raises:
        Corrupt: `data` is not a complete record of this kind; `where` (a path) is named in the message.
    """
    try:
        value = _ADAPTERS[kind].validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the object"
        raise Corrupt(f"{where} is not a {kind.__name__}: {place}: {first['msg']}") from error
    return value  # type: ignore[return-value]


def next_version(record: R, *, of: R | None = None) -> R:
    """Give `record` the version that follows `of` (or the first one)."""
    generation = of.generation + 1 if of else 1
    return replace(record, generation=generation, nonce=secrets.token_hex(4))


def same_version(one: Record, other: Record) -> bool:
    """Say whether two readings of a file are the same write of it."""
    return (one.generation, one.nonce) == (other.generation, other.nonce)


def now() -> datetime:
    """The time for records: UTC, whole microseconds."""
    return datetime.now(UTC)


# --- ids -------------------------------------------------------------------------------------------------------


class RecordId(NamedTuple):
    """The parts of the id of a volume, snapshot or image."""

    pool: str
    kind: Literal["vol", "snap", "img"]
    digest: str


def parse_id(text: str) -> RecordId | None:
    """Take the id of a volume, snapshot or image apart; None when it cannot be one of ours: nothing of it exists."""
    found = _RECORD_ID.fullmatch(text)
    return RecordId(found[1], found[2], found[3]) if found else None  # type: ignore[arg-type]


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def volume_id(pool_prefix: str, name: str) -> str:
    """The id of the volume that a CSI name stands for in a pool."""
    return f"{pool_prefix}-vol-{_digest(name)}"


def snapshot_id(pool_prefix: str, name: str) -> str:
    """The id of the snapshot that a CSI name stands for in a pool."""
    return f"{pool_prefix}-snap-{_digest(name)}"


def image_id(pool_prefix: str, name: str) -> str:
    """The id of the golden image that a name stands for in a pool."""
    return f"{pool_prefix}-img-{_digest(name)}"


def node_digest(node_id: str) -> str:
    """The file-name part of a node's record: node ids may hold characters that file names may not."""
    return _digest(node_id)


def shard_of(record_id: str) -> str:
    """The two hex digits that name the directory of a volume, snapshot or layer."""
    return record_id.rpartition("-")[2][:2]


def new_uid() -> str:
    """A fresh uid of a volume or snapshot: eight hex digits."""
    return secrets.token_hex(4)


def new_layer_id() -> str:
    """A fresh layer id: 24 random hex digits, short enough for a QMP node name of 31 bytes with a prefix."""
    return secrets.token_hex(12)


def is_layer_id(text: str) -> bool:
    """Say whether `text` has the form of a layer id."""
    return _LAYER_ID.fullmatch(text) is not None


def name_of_jobs_snapshot(job_id: str) -> str:
    """The CSI name of the snapshot that a job may take for itself; no call may ask for a name of this form."""
    return f"export-{job_id}"


def job_of_snapshot(name: str) -> str | None:
    """Give the id of the job that has taken a snapshot of this CSI name for itself; None: it is none of those."""
    found = _JOBS_SNAPSHOT.fullmatch(name)
    return found[1] if found else None


def trash_id(record: Deletable) -> str:
    """The id that a deleted object has in the trash: its name may be in use again, so its uid belongs to it."""
    return f"{record.id}-{record.uid}"


def parse_trash_id(text: str) -> tuple[RecordId, Incarnation] | None:
    """Take the id of a trash entry apart; None when it cannot be one."""
    record_id, _, uid = text.rpartition("-")
    parsed = parse_id(record_id)
    if parsed is None or parsed.kind == "img" or not _UID.fullmatch(uid):
        return None
    return parsed, Incarnation(id=record_id, uid=uid)


def note_uid(ending: str) -> str | None:
    """Give the uid of the volume that a note beside its record is about, by the end of its name; None: it is none."""
    kind, _, uid = ending.partition("-")
    return uid if kind in {"content", "closed"} else None


# --- markers ---------------------------------------------------------------------------------------------------


class Marker(NamedTuple):
    """The parts of a marker: `id` is the id of a layer or job (c), or that of a volume (v), snapshot (s) or image (i)
    whose incarnation is `uid`.
    """

    kind: Literal["c", "v", "s", "i"]
    id: str
    uid: str

    @property
    def owners(self) -> tuple[str, ...]:
        """The ids that the record may have that has made it: a layer's, or an object's and its entry's in the trash.

        A job's, too, has the form of a layer's.
        """
        return (self.id,) if self.kind == "c" else (self.id, f"{self.id}-{self.uid}")


def child_marker(layer_id: str) -> str:
    """The marker that a child layer puts into its parent's refs, and a job into those of the layer that it reads."""
    return f"c-{layer_id}"


def volume_marker(volume: VolumeRecord) -> str:
    """The marker that a volume puts into its head's refs."""
    return f"v-{volume.id}-{volume.uid}"


def snapshot_marker(snapshot: SnapshotRecord) -> str:
    """The marker that a snapshot puts into its layer's refs."""
    return f"s-{snapshot.id}-{snapshot.uid}"


def image_marker(image: ImageRecord) -> str:
    """The marker that a golden image puts into its layer's refs."""
    return f"i-{image.id}-{image.uid}"


def layer_of(record: Owning) -> str:
    """The layer that a volume, snapshot or image refers to itself: the head, or what the snapshot or image shows."""
    return record.head if isinstance(record, VolumeRecord) else record.layer


def marker_of(record: Owning) -> str:
    """The marker that a volume, snapshot or image has in the layer that it refers to."""
    match record:
        case VolumeRecord():
            return volume_marker(record)
        case SnapshotRecord():
            return snapshot_marker(record)
        case ImageRecord():
            return image_marker(record)


def parse_marker(text: str) -> Marker | None:
    """Take a marker apart; None when it is none of format 1 (such a marker keeps its layer for ever)."""
    kind, _, rest = text.partition("-")
    if kind == "c" and is_layer_id(rest):
        return Marker("c", rest, "")
    owner, _, uid = rest.rpartition("-")
    parsed = parse_id(owner)
    if parsed and len(uid) == 8 and {"v": "vol", "s": "snap", "i": "img"}.get(kind) == parsed.kind:
        return Marker(kind, owner, uid)  # type: ignore[arg-type]
    return None
