"""What the controller does with volumes: create, delete, attach, detach, expand, list.

A volume's life:   (nothing) -> creating -> ready <-> ready with attachments -> deleting -> (nothing)

`creating` is written before anything else exists and names it all, so that a retry goes on where a crash ended and a
delete knows what to undo. An error that is final for the CSI sidecars leaves nothing behind; a transient one leaves
the intent for the retry.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace

from csi_quobyte.engine import layers, removal
from csi_quobyte.engine.copying import Copies, cache_of
from csi_quobyte.engine.layers import ready_volume
from csi_quobyte.engine.removal import Release
from csi_quobyte.errors import (
    FINAL,
    AlreadyExists,
    Busy,
    Corrupt,
    DriverError,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Refused,
    Unavailable,
)
from csi_quobyte.operations.capacity import Provisioned, check_fits
from csi_quobyte.pool import records
from csi_quobyte.pool.chain import chain_of
from csi_quobyte.pool.records import (
    DEFAULT_TRASH_RETENTION_S,
    AccessType,
    Attachment,
    CloneMode,
    Content,
    DataPath,
    ImageFormat,
    ImageState,
    LayerRecord,
    LayerState,
    OnDelete,
    Preallocation,
    SnapshotRecord,
    SnapshotState,
    Source,
    VolumeRecord,
    VolumeState,
    child_marker,
    volume_marker,
)
from csi_quobyte.pool.sizes import GRANULARITY_BYTES, SizeRange, round_up
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

DEFAULT_FILESYSTEM = "ext4"


@dataclass(frozen=True, kw_only=True)
class CreateRequest:
    """A checked CreateVolume request.

    `source_image` names the golden image that a volume without a source is made from. `filesystem` is empty for a block
    volume, and for a mount volume when the request does not say: then it is the source's, or ext4. `minimum_bytes` is
    what the file system needs at least.
    """

    name: str
    size: SizeRange
    image_format: ImageFormat
    preallocation: Preallocation
    data_path: DataPath
    access_type: AccessType
    filesystem: str
    mkfs_options: tuple[str, ...]
    source: Source | None
    clone_mode: CloneMode = "overlay"
    source_image: str = ""
    minimum_bytes: int = GRANULARITY_BYTES
    on_delete: OnDelete = "delete"
    trash_retention_s: int = DEFAULT_TRASH_RETENTION_S
    kubernetes: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class AttachRequest:
    """A checked ControllerPublishVolume request; `access_mode` is the CSI name such as SINGLE_NODE_WRITER."""

    volume_id: str
    node: str
    readonly: bool
    access_mode: str
    access_type: AccessType
    filesystem: str


@dataclass(frozen=True)
class _Base:
    """What a new volume lies on: nothing (parent None), or a layer; `source_next` when that still is a volume's head.

    `uncached`: it is to lie on the cache of its snapshot, which is not made yet.
    """

    parent: str | None
    source_next: str | None
    size_bytes: int
    content: Content | None
    uncached: bool = False


_NOTHING = _Base(None, None, 0, None)

# --- create ----------------------------------------------------------------------------------------------------


def create(
    store: Store, request: CreateRequest, provisioned: Provisioned, release: Release, copies: Copies
) -> VolumeRecord:
    """Make the volume of a CSI name, or give the one that is there; durable and ready on return.

    What is to be a copy of its source is made by `copies` meanwhile: until it is whole, the answer is Busy.

    Raises:
        AlreadyExists: the name is taken by a volume made with other parameters.
        NotFound, Refused, OutOfRange: the source is missing, in the wrong state, attached, or larger than asked.
        InvalidArgument: the source holds another file system.
        Exhausted: no space; nothing is left behind.
        Busy: another operation on this name or on the source is running, or the copy is.
    """
    volume_id = records.volume_id(store.prefix, request.name)
    if request.source is None and request.source_image:
        image = Source(kind="image", id=records.image_id(store.prefix, request.source_image))
        request = replace(request, source=image)
    with _locked(store, volume_id, request.source):
        volume = store.find_volume(volume_id)
        if volume is None:
            _tell_failure(store, copies.failure(volume_id), request, provisioned)
        if volume and volume.state is not VolumeState.DELETING:
            check_same_request(volume, request)
        if volume and (volume.state is VolumeState.DELETING or _is_outdated(store, volume)):
            with _also_locked(store, volume, request.source):
                release(removal.remove_volume(store, volume))
            volume = None
        if volume and volume.state is VolumeState.READY:
            store.settle(volume)
            return volume
        if request.source is None:
            made = _create_blank(store, _plan(store, volume_id, request, _NOTHING, provisioned))
        else:
            made = _create_from(store, volume, volume_id, request, provisioned, release, copies)
        if not (volume and volume.pinned):
            provisioned.add(store, made.id, made.size_bytes)
    # a copy takes its time, and holds none of these locks meanwhile
    return copies.volume(store, made, release) if made.pinned else made


def _tell_failure(
    store: Store, failed: tuple[VolumeRecord, DriverError] | None, request: CreateRequest, provisioned: Provisioned
) -> None:
    """Raise what an earlier copy for the same request has failed with; nothing of it is left."""
    if failed is None:
        return
    volume, error = failed
    provisioned.add(store, volume.id, -volume.size_bytes)
    try:
        check_same_request(volume, request)
    except AlreadyExists:
        return  # another volume that happens to have the name
    raise error


def _create_from(
    store: Store,
    volume: VolumeRecord | None,
    volume_id: str,
    request: CreateRequest,
    provisioned: Provisioned,
    release: Release,
    copies: Copies,
) -> VolumeRecord:
    """Make a volume that lies on another object's layer: an intent first, or the one that an earlier call has left."""
    if volume is None:
        base = _find_base(store, request)
        planned = _plan(store, volume_id, request, base, provisioned)
        if base.uncached and request.source:
            copies.cache(store, request.source.id)
            base = _find_base(store, request)
            if base.uncached:
                raise Busy(f"the cache of snapshot {request.source.id} was given up by another operation")
            planned = _plan(store, volume_id, request, base, provisioned)
        # An intent has to be seen before what it names, not to outlive a power cut: what is found without one then
        # is removed by the collector. (A freeze makes it durable first.)
        volume = store.create(planned, sync=False)
    try:
        return _finish(store, volume)
    except FINAL:
        # final for the sidecars: they forget the volume, so nothing of it may stay
        # It is the record of this call that is undone: if another one has finished or changed it, that one is right.
        with removal.undoing():
            release(removal.remove_volume(store, volume))
        raise


@contextmanager
def _locked(store: Store, volume_id: str, source: Source | None) -> Iterator[None]:
    """Hold the volume's lock, and the source volume's: a clone freezes it."""
    with ExitStack() as stack:
        stack.enter_context(store.lock(volume_id))
        if source and source.kind == "volume" and source.id != volume_id:
            stack.enter_context(store.lock(source.id))
        yield


def _also_locked(store: Store, volume: VolumeRecord, held: Source | None) -> AbstractContextManager[object]:
    """Hold the lock of an unfinished clone's source, unless the caller holds it for the request already."""
    stack = ExitStack()
    if volume.source and volume.source.kind == "volume" and volume.unfinished and volume.source != held:
        stack.enter_context(store.lock(volume.source.id))
    return stack


def _plan(store: Store, volume_id: str, request: CreateRequest, base: _Base, provisioned: Provisioned) -> VolumeRecord:
    """Give the record of a volume to be made, as an intent.

    Raises:
        InvalidArgument, OutOfRange, Exhausted: it cannot be made so.
    """
    filesystem = _choose_filesystem(request, base.content)
    size_bytes = request.size.choose(source_bytes=base.size_bytes, minimum_bytes=request.minimum_bytes)
    check_fits(store, provisioned, size_bytes, request.preallocation)
    return VolumeRecord(
        id=volume_id,
        uid=records.new_uid(),
        name=request.name,
        state=VolumeState.CREATING,
        size_bytes=size_bytes,
        head=records.new_layer_id(),
        image_format=request.image_format,
        preallocation=request.preallocation,
        data_path=request.data_path,
        access_type=request.access_type,
        filesystem=filesystem,
        mkfs_options=request.mkfs_options,
        created_at=records.now(),
        source=request.source,
        clone_mode=request.clone_mode,
        parent=base.parent,
        source_next=base.source_next,
        inherited_content=base.content,
        on_delete=request.on_delete,
        trash_retention_s=request.trash_retention_s,
        kubernetes=request.kubernetes,
    )


def _choose_filesystem(request: CreateRequest, content: Content | None) -> str:
    """Give the file system of a new volume.

    Raises:
        InvalidArgument: the source holds another one than is asked for: it is never formatted over.
    """
    if request.access_type == "block":
        return ""
    holds = content.filesystem if content and content.state == "formatted" else ""
    if request.filesystem and holds and request.filesystem != holds:
        raise InvalidArgument(f"the source holds {holds}, the volume is asked for with {request.filesystem}")
    return request.filesystem or holds or DEFAULT_FILESYSTEM


def _is_outdated(store: Store, volume: VolumeRecord) -> bool:
    """Say whether the source of an unfinished clone has changed too much since its intent was written."""
    if volume.state is not VolumeState.CREATING or not (volume.source and volume.parent):
        return False
    if volume.pinned:
        return False
    if volume.source.kind == "snapshot":
        snapshot = store.find_snapshot(volume.source.id)
        return snapshot is not None and (
            _is_another(snapshot, volume) or volume.parent not in {snapshot.layer, snapshot.cache}
        )
    if volume.source.kind == "image":
        image = store.find_image(volume.source.id)
        return image is not None and image.layer != volume.parent  # one of the same name, imported since
    return layers.intent_is_outdated(
        store,
        volume.source.id,
        layer_id=volume.parent,
        next_id=volume.source_next,
        size_bytes=volume.size_bytes,
        content=volume.inherited_content,
    )


def _is_another(snapshot: SnapshotRecord, intent: VolumeRecord) -> bool:
    """Say whether a snapshot is not the one that an intent saw: one of the same name that shows something else."""
    return snapshot.size_bytes > intent.size_bytes or snapshot.content != intent.inherited_content


def _find_base(store: Store, request: CreateRequest) -> _Base:
    """Judge the source and say what the new volume lies on.

    Raises:
        NotFound: the source does not exist, or is not ready.
        Refused: the source volume is attached.
    """
    source, clone_mode = request.source, request.clone_mode
    if source is None:
        return _Base(None, None, 0, None)
    if source.kind == "snapshot":
        snapshot = store.snapshot(source.id)
        if snapshot.state is SnapshotState.CREATING:
            raise Unavailable(f"snapshot {source.id} is not ready yet")
        if snapshot.state is SnapshotState.DELETING:
            raise NotFound(f"snapshot {source.id} is being deleted")
        if clone_mode == "cache":
            cache = cache_of(store, snapshot)
            if cache:
                store.settle(cache)  # its record is the commit: whoever wrote it may have died before that was durable
            layer_id = cache.id if cache else snapshot.layer
            return _Base(layer_id, None, snapshot.size_bytes, snapshot.content, uncached=cache is None)
        if clone_mode == "overlay":  # a copy puts nothing on that chain
            layers.check_depth(store, snapshot.layer)
        return _Base(snapshot.layer, None, snapshot.size_bytes, snapshot.content)
    if source.kind == "image":
        image = store.find_image(source.id)
        if image is None or image.state is not ImageState.READY:
            raise NotFound(f"pool {store.root} has no golden image {request.source_image!r} (sourceImage)")
        return _Base(image.layer, None, image.size_bytes, image.content)
    volume = layers.detached_volume(store, source.id, to_be="cloned")
    content = store.content(volume)
    if parent := layers.untouched_parent(store, volume):
        return _Base(parent.id, None, volume.size_bytes, content)
    layers.check_depth(store, volume.head)
    return _Base(volume.head, records.new_layer_id(), volume.size_bytes, content)


def _create_blank(store: Store, planned: VolumeRecord) -> VolumeRecord:
    """Make a volume that lies on nothing: announcement, layer, record. It touches nothing of others', so that what a
    crash leaves of it needs no intent to be undone.
    """
    volume = replace(planned, state=VolumeState.READY, unfinished=False)
    begun = store.begin_volume(volume)
    try:
        layers.make_base(
            store,
            volume.head,
            volume_marker(volume),
            image_format=volume.image_format,
            size_bytes=volume.size_bytes,
            preallocation=volume.preallocation,
            also=[begun.path],
        )
        return store.publish_begun(begun)
    except (*FINAL, Busy):
        with removal.undoing():
            layers.undo_announced(store, volume.id, volume.head)
        raise


def _finish(store: Store, volume: VolumeRecord) -> VolumeRecord:
    """Do what the intent of a volume with a source says, as far as it is not done, and make the volume ready.

    One that is to be a copy is pinned instead: its marker holds what it is copied from, whatever becomes of the source.
    """
    if volume.pinned:
        return volume
    if volume.parent is None:
        raise Corrupt(f"volume {volume.id} is unfinished and its record does not say what it lies on")
    store.mark(volume.parent, child_marker(volume.head), sync=False)
    parent, also = _frozen_parent(store, volume, volume.parent)
    if volume.clone_mode == "copy":
        store.make_durable(also)
        return store.swap(volume, replace(volume, pinned=True, source_next=None))
    done = replace(volume, state=VolumeState.READY, unfinished=False, parent=None, source_next=None)
    with store.prepared(volume, done) as ready:
        layers.make_overlay(
            store,
            volume.head,
            volume_marker(volume),
            parent=parent,
            size_bytes=volume.size_bytes,
            also=[ready.temporary, *also],
        )
        return store.commit(ready)


def _frozen_parent(store: Store, volume: VolumeRecord, parent_id: str) -> tuple[LayerRecord, list[str]]:
    """Check, after the marker was made, that the source still is what the intent saw; freeze it if it is a head.

    The marker comes first: either it was made while the source's own reference was there, and the layer stays, or
    the source is seen to be gone here. Gives the layer, and the directories to be made durable before the volume says
    that it lies on it.
    """
    source = volume.source
    later: list[str] = []
    if source and source.kind == "image":
        image = store.find_image(source.id)
        if image is None or image.state is not ImageState.READY or image.layer != parent_id:
            raise NotFound(f"image {source.id} was removed meanwhile")
    elif source and source.kind == "snapshot":
        snapshot = store.find_snapshot(source.id)
        if snapshot is None or snapshot.state is not SnapshotState.READY:
            raise NotFound(f"snapshot {source.id} was deleted meanwhile")
        if parent_id not in {snapshot.layer, snapshot.cache} or _is_another(snapshot, volume):
            raise NotFound(f"snapshot {source.id} was deleted meanwhile")
    elif source and volume.source_next and store.layer(parent_id).state is LayerState.HEAD:
        cloned = ready_volume(store, source.id)
        if cloned.head not in {parent_id, volume.source_next}:
            raise NotFound(f"volume {source.id} was made anew meanwhile")
        later = layers.freeze(
            store,
            cloned,
            volume.source_next,
            check_intent=lambda: _check_unchanged(store, volume),
            # The source's claim names an overlay that only this intent explains: it must outlive a power cut, too.
            also=[store.refs_path(parent_id), store.directory_of(volume)],
        )
    if source and source.kind == "volume":
        layers.check_intent(
            store,
            source.id,
            layer_id=parent_id,
            next_id=volume.source_next,
            size_bytes=volume.size_bytes,
            content=volume.inherited_content,
        )
    parent = store.layer(parent_id)
    if parent.state is not LayerState.FROZEN:
        raise Busy(f"the source of volume {volume.id} is being changed")
    # the frozen layer's name, too: whoever froze it may have died before he made that durable
    return parent, later or [store.refs_path(parent_id), store.directory_of(parent)]


def _check_unchanged(store: Store, intent: VolumeRecord) -> None:
    """Check that an intent still is what this call read.

    Raises:
        Busy: it was finished, undone or deleted by another operation.
    """
    current = store.find_volume(intent.id)
    if current is None or not records.same_version(current, intent):
        raise Busy(f"volume {intent.id} is being worked on by another operation")


def check_same_request(volume: VolumeRecord, request: CreateRequest) -> None:
    """Check that a volume is what a request of its name asks for.

    Raises:
        AlreadyExists: something differs; the message names all of it.
    """
    pairs = {
        "volumeFormat": (volume.image_format, request.image_format),
        "preallocation": (volume.preallocation, request.preallocation),
        "dataPath": (volume.data_path, request.data_path),
        "access type": (volume.access_type, request.access_type),
        "file system": (volume.filesystem, request.filesystem or volume.filesystem),
        "mkfsOptions": (" ".join(volume.mkfs_options), " ".join(request.mkfs_options)),
        "source": (volume.source, request.source),
        "cloneMode": (volume.clone_mode, request.clone_mode),
        # a class that promises a way back must not be answered with a volume that has none
        "onDelete": (volume.on_delete, request.on_delete),
        "seconds of trashRetention": (volume.trash_retention_s, request.trash_retention_s),
    }
    differing = [f"{what} is {has}, asked for {wants}" for what, (has, wants) in pairs.items() if has != wants]
    if not request.size.accepts(volume.size_bytes):
        differing.append(f"size is {volume.size_bytes} bytes, which is outside the range asked for")
    if differing:
        raise AlreadyExists(f"volume {volume.name!r} exists: {'; '.join(differing)}")


# --- delete ----------------------------------------------------------------------------------------------------


def delete(store: Store, volume_id: str, provisioned: Provisioned, release: Release, copies: Copies) -> None:
    """Delete a volume, or move it to the trash; gone already is success. Its layers are left to the collector through
    `release`.

    Snapshots and clones made from it stay whole: their own markers keep the layers that they need.

    Raises:
        Refused: it is attached.
    """
    copies.cancel(volume_id)
    with store.lock(volume_id):
        try:
            volume = store.find_volume(volume_id)
        except Corrupt as error:
            # a damaged object can always be deleted; what it referred to is found by the collector
            # but not on one look: a read that another host's change has cut short looks the same
            if not store.is_damaged("volumes", volume_id):
                raise Busy(f"the record of volume {volume_id} was being changed") from error
            log.error("deleting a volume whose record cannot be read: %s", error)
            store.remove_damaged("volumes", volume_id)
            release(None)
            return
        if volume is None:
            store.settle_name(volume_id)
            return
        with _also_locked(store, volume, None):
            release(removal.remove_volume(store, volume))
        provisioned.add(store, volume_id, -volume.size_bytes)


# --- attach ----------------------------------------------------------------------------------------------------


def attach(store: Store, request: AttachRequest) -> Attachment:
    """Give a node the right to open a volume, with a new generation; the same again gives the same.

    Raises:
        NotFound: no such volume or node.
        AlreadyExists: attached to this node in another way.
        Refused: attached to another node.
        Refused: see `check_capability`.
    """
    with store.lock(request.volume_id):
        volume = ready_volume(store, request.volume_id)
        if store.find_node(request.node) is None:
            raise NotFound(f"node {request.node!r} is not known in this pool: is the node plugin running there?")
        check_capability(volume, request.access_type, request.filesystem)
        if volume.attachments:
            present = _same_attachment(volume, volume.attachments[0], request)
            store.settle(volume)
            return present
        chain = chain_of(volume.head, store.find_layer)
        generation = volume.attach_generation + 1
        made = Attachment(
            node=request.node,
            generation=generation,
            readonly=request.readonly,
            access_mode=request.access_mode,
            opened=tuple(layer.id for layer in chain),
        )
        store.swap(volume, replace(volume, attach_generation=generation, attachments=(made,)))
        return made


def _same_attachment(volume: VolumeRecord, present: Attachment, request: AttachRequest) -> Attachment:
    if present.node != request.node:
        raise Refused(f"volume {volume.id} is published to node {present.node}")
    if (present.readonly, present.access_mode) != (request.readonly, request.access_mode):
        raise AlreadyExists(
            f"volume {volume.id} is published to node {present.node} with readonly={present.readonly} and access mode "
            f"{present.access_mode}"
        )
    return present


def check_capability(volume: VolumeRecord, access_type: AccessType, filesystem: str) -> None:
    """Check that a volume can be used in the way that a capability says.

    Raises:
        Refused: it was made for another access type or file system.
    """
    if access_type != volume.access_type:
        raise Refused(f"volume {volume.id} was made for access type {volume.access_type}, not {access_type}")
    if filesystem and filesystem != volume.filesystem:
        raise Refused(f"volume {volume.id} has file system {volume.filesystem}, not {filesystem}")


def detach(store: Store, volume_id: str, node: str) -> tuple[str, ...]:
    """Take a node's right to open a volume away (every node's when `node` is empty); done before is success.

    Gives the layers that the node had open: what waited for that can be merged now.
    """
    with store.lock(volume_id):
        volume = store.find_volume(volume_id)
        if volume is None:
            return ()
        gone = [present for present in volume.attachments if not node or present.node == node]
        if gone:
            remaining = tuple(present for present in volume.attachments if present not in gone)
            store.swap(volume, replace(volume, attachments=remaining, detached_at=records.now()))
        else:
            store.settle(volume)
        return tuple(layer_id for present in gone for layer_id in present.opened)


# --- expand ----------------------------------------------------------------------------------------------------


def expand(store: Store, volume_id: str, size: SizeRange, provisioned: Provisioned) -> VolumeRecord:
    """Set a volume's size in its record: the node makes it so, now or at the next stage. Never shrinks.

    Raises:
        OutOfRange: the volume is larger than the limit.
        Exhausted: the pool cannot take that much more.
    """
    with store.lock(volume_id):
        volume = ready_volume(store, volume_id)
        wanted = max(volume.size_bytes, round_up(size.required_bytes))
        if size.limit_bytes and wanted > size.limit_bytes:
            raise OutOfRange(f"volume {volume_id} has {wanted} bytes, which is above the limit of {size.limit_bytes}")
        if wanted > volume.size_bytes:
            more = wanted - volume.size_bytes
            check_fits(store, provisioned, more, "off")
            volume = store.swap(volume, replace(volume, size_bytes=wanted))
            provisioned.add(store, volume_id, more)
        else:
            store.settle(volume)
        return volume


# --- read ------------------------------------------------------------------------------------------------------


def list_page(store: Store, *, after: str, at_most: int) -> list[VolumeRecord]:
    """Give up to `at_most` ready volumes with ids above `after`, ascending. Damaged records are logged and skipped."""
    found: list[VolumeRecord] = []
    for volume_id in store.volume_ids(after=after):
        try:
            volume = store.find_volume(volume_id)
        except DriverError as error:
            if not isinstance(error, Corrupt):
                raise
            log.error("left out of the list: %s", error)
            continue
        if volume and volume.state is VolumeState.READY:
            found.append(volume)
            if len(found) == at_most:
                break
    return found
