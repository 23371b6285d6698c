"""What the controller does with snapshots of detached volumes: create, delete, list.

A snapshot's life:   (nothing) -> creating -> ready -> deleting -> (nothing)

    before    V --> F              after    V --> N --> F <-- S        N is an empty overlay, F is frozen
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from csi_quobyte.engine import layers, removal
from csi_quobyte.engine.removal import Release
from csi_quobyte.errors import FINAL, AlreadyExists, Busy, Corrupt, NotFound
from csi_quobyte.pool import records
from csi_quobyte.pool.records import (
    DEFAULT_TRASH_RETENTION_S,
    LayerState,
    OnDelete,
    SnapshotRecord,
    SnapshotState,
    snapshot_marker,
)
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SnapshotRequest:
    """A checked CreateSnapshot request."""

    name: str
    source_volume: str
    on_delete: OnDelete = "delete"
    trash_retention_s: int = DEFAULT_TRASH_RETENTION_S
    kubernetes: dict[str, str]


def create(store: Store, request: SnapshotRequest, release: Release) -> SnapshotRecord:
    """Take the snapshot of a CSI name, or give the one that is there; durable and ready on return.

    Raises:
        AlreadyExists: the name is taken by a snapshot of another volume.
        NotFound: no such volume.
        Refused: the volume is attached.
        Exhausted: no space, or the chain is too long; nothing is left behind.
        Busy: another operation on the volume is running.
    """
    snapshot_id = records.snapshot_id(store.prefix, request.name)
    with _locked(store, snapshot_id, request.source_volume):
        snapshot = store.find_snapshot(snapshot_id)
        if snapshot and snapshot.state is not SnapshotState.DELETING:
            _check_same_request(snapshot, request)
        if snapshot and (snapshot.state is SnapshotState.DELETING or _is_outdated(store, snapshot)):
            with _source_locked(store, snapshot, held=request.source_volume):
                release(removal.remove_snapshot(store, snapshot))
            snapshot = None
        if snapshot is None:
            snapshot = _write_intent(store, snapshot_id, request)
        if snapshot.state is SnapshotState.READY:
            store.settle(snapshot)
            return snapshot
        try:
            return _finish(store, snapshot)
        except FINAL:
            # the record of this call, and no other: see volumes
            with removal.undoing():
                release(removal.remove_snapshot(store, snapshot))
            raise


def _check_same_request(snapshot: SnapshotRecord, request: SnapshotRequest) -> None:
    if snapshot.source_volume != request.source_volume:
        raise AlreadyExists(f"snapshot {request.name!r} exists: it is one of volume {snapshot.source_volume}")
    has, wants = ((one.on_delete, one.trash_retention_s) for one in (snapshot, request))
    if has != wants:
        raise AlreadyExists(
            f"snapshot {request.name!r} exists: onDelete is {has[0]} ({has[1]} s), asked for {wants[0]} ({wants[1]} s)"
        )


def _is_outdated(store: Store, snapshot: SnapshotRecord) -> bool:
    """Say whether the volume of an unfinished snapshot has changed too much since the intent was written."""
    if snapshot.state is not SnapshotState.CREATING:
        return False
    return layers.intent_is_outdated(
        store,
        snapshot.source_volume,
        layer_id=snapshot.layer,
        next_id=snapshot.next,
        size_bytes=snapshot.size_bytes,
        content=snapshot.content,
    )


@contextmanager
def _locked(store: Store, snapshot_id: str, volume_id: str) -> Iterator[None]:
    with store.lock(volume_id), store.lock(snapshot_id):
        yield


@contextmanager
def _source_locked(store: Store, snapshot: SnapshotRecord, *, held: str) -> Iterator[None]:
    """Hold the lock of the volume whose freeze has to be undone, unless it is `held` or nothing has to be."""
    with ExitStack() as stack:
        if snapshot.unfinished and snapshot.next and snapshot.source_volume != held:
            stack.enter_context(store.lock(snapshot.source_volume))
        yield


def _write_intent(store: Store, snapshot_id: str, request: SnapshotRequest) -> SnapshotRecord:
    volume = layers.detached_volume(store, request.source_volume, to_be="snapshotted")
    untouched = layers.untouched_parent(store, volume)
    if untouched is None:
        layers.check_depth(store, volume.head)
    return store.create(
        SnapshotRecord(
            id=snapshot_id,
            uid=records.new_uid(),
            name=request.name,
            state=SnapshotState.CREATING,
            source_volume=volume.id,
            layer=untouched.id if untouched else volume.head,
            next=None if untouched else records.new_layer_id(),
            size_bytes=volume.size_bytes,
            content=store.content(volume),
            created_at=records.now(),
            on_delete=request.on_delete,
            trash_retention_s=request.trash_retention_s,
            kubernetes=request.kubernetes,
        ),
        sync=False,  # see volumes: until it freezes something, an intent need not outlive a power cut
    )


def _finish(store: Store, snapshot: SnapshotRecord) -> SnapshotRecord:
    """Do what the intent says, as far as it is not done, and make the snapshot ready."""
    store.mark(snapshot.layer, snapshot_marker(snapshot), sync=False)
    marked = store.refs_path(snapshot.layer)
    with store.prepared(snapshot, replace(snapshot, state=SnapshotState.READY, unfinished=False)) as ready:
        if snapshot.next and store.layer(snapshot.layer).state is LayerState.HEAD:
            volume = layers.ready_volume(store, snapshot.source_volume)
            if volume.head not in {snapshot.layer, snapshot.next}:
                raise NotFound(f"volume {volume.id} was made anew meanwhile")
            later = layers.freeze(
                store,
                volume,
                snapshot.next,
                check_intent=lambda: _check_unchanged(store, snapshot),
                # the intent, too: before the volume's claim names an overlay that only it explains
                also=[marked, store.directory_of(snapshot), ready.temporary],
            )
        else:
            # the frozen layer's name, too: whoever froze it may have died before he made that durable
            later = [marked, store.directory_of(store.layer(snapshot.layer)), ready.temporary]
        store.make_durable(later)
        layers.check_intent(
            store,
            snapshot.source_volume,
            layer_id=snapshot.layer,
            next_id=snapshot.next,
            size_bytes=snapshot.size_bytes,
            content=snapshot.content,
        )
        if store.layer(snapshot.layer).state is not LayerState.FROZEN:
            raise Busy(f"the volume of snapshot {snapshot.id} is being changed")
        return store.commit(ready)


def _check_unchanged(store: Store, intent: SnapshotRecord) -> None:
    """Check that an intent still is what this call read.

    Raises:
        Busy: it was finished, undone or deleted by another operation.
    """
    current = store.find_snapshot(intent.id)
    if current is None or not records.same_version(current, intent):
        raise Busy(f"snapshot {intent.id} is being worked on by another operation")


def delete(store: Store, snapshot_id: str, release: Release) -> None:
    """Delete a snapshot, or move it to the trash; gone already is success. Volumes restored from it are not concerned.

    Raises:
        Busy: another operation on it, or on the source of an unfinished one, is running.
    """
    with store.lock(snapshot_id):
        try:
            snapshot = store.find_snapshot(snapshot_id)
        except Corrupt as error:
            if not store.is_damaged("snapshots", snapshot_id):
                raise Busy(f"the record of snapshot {snapshot_id} was being changed") from error
            log.error("deleting a snapshot whose record cannot be read: %s", error)
            store.remove_damaged("snapshots", snapshot_id)
            release(None)
            return
        if snapshot is None:
            store.settle_name(snapshot_id)
            return
        with _source_locked(store, snapshot, held=""):
            release(removal.remove_snapshot(store, snapshot))
        if snapshot.cache:
            release(snapshot.cache)


def find_ready(store: Store, snapshot_id: str) -> SnapshotRecord:
    """Give a snapshot that exists for users.

    Raises:
        NotFound: there is none (also while it is being deleted).
    """
    snapshot = store.snapshot(snapshot_id)
    if snapshot.state is SnapshotState.DELETING:
        raise NotFound(f"snapshot {snapshot_id} is being deleted")
    return snapshot


def list_page(store: Store, *, after: str, at_most: int, source_volume: str = "") -> list[SnapshotRecord]:
    """Give up to `at_most` ready snapshots with ids above `after`, ascending, of one volume if that is given."""
    found: list[SnapshotRecord] = []
    for snapshot_id in store.snapshot_ids(after=after):
        try:
            snapshot = store.find_snapshot(snapshot_id, of=source_volume)
        except Corrupt as error:
            log.error("left out of the list: %s", error)
            continue
        if snapshot is None or snapshot.state is not SnapshotState.READY:
            continue
        if source_volume and snapshot.source_volume != source_volume:
            continue
        found.append(snapshot)
        if len(found) == at_most:
            break
    return found
