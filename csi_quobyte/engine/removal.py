"""Finishing what a delete has decided: takes a volume or snapshot in state `deleting` away, or undoes an intent.

The decision is one step. Of an object that is ready and not kept in the trash it is the removal of its record: its
markers mean nothing from then on. Of others it is a swap of the record to `deleting`, which also says whether the
object goes to the trash; everything here comes after that and can be repeated. It is used by the delete calls
themselves, by a create that fails or finds an old object of its name, and by the collector.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from csi_quobyte.engine import index, layers, trash
from csi_quobyte.errors import Busy, Corrupt, Exhausted, NotFound, OutOfRange, Refused, Unavailable
from csi_quobyte.pool.records import (
    ImageRecord,
    ImageState,
    SnapshotRecord,
    SnapshotState,
    VolumeRecord,
    VolumeState,
    child_marker,
    image_marker,
    parse_marker,
    snapshot_marker,
    volume_marker,
)
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

# Told which layer has lost a reference (None: look at everything), so that the collector can drop it.
Release = Callable[[str | None], None]


@contextmanager
def undoing() -> Iterator[None]:
    """Around the undo of an attempt that has failed for good: if it cannot be undone now, it has not failed for good.

    A final code makes the sidecars forget the object, and with it what is left of the attempt (a full pool whose
    reserve is used up takes no change of a record). On a transient one they call again.

    Raises:
        Unavailable: something final kept the undo from its end.
    """
    try:
        yield
    except (Exhausted, NotFound, OutOfRange, Refused) as error:
        raise Unavailable(f"what was made so far cannot be undone now; try again ({error})") from error


def remove_volume(store: Store, volume: VolumeRecord) -> str | None:
    """Take a volume away, or move it to the trash; gives the layer it leaves, or would leave.

    Its record is swapped to `deleting` first if it is not yet.

    The caller holds the lock of the volume, and of the source while `source_next` is set.

    Raises:
        Refused: it is attached.
        Busy: the record is no longer what the caller read; nothing was changed.
    """
    if volume.attachments:
        raise Refused(f"volume {volume.id} is published to node {volume.attachments[0].node}")
    if _is_plain(volume):
        # The decision is the removal itself. What is left of it means nothing to anybody: the collector takes it.
        store.remove(volume)
        # die here, or after the next
        store.unmark(volume.head, volume_marker(volume), sync=False)
        store.remove_content(volume, sync=False)
        return volume.head
    if volume.state is not VolumeState.DELETING:
        volume = store.swap(volume, replace(volume, state=VolumeState.DELETING, trash=trash.decide(volume)))
    else:
        store.settle(volume)  # whoever decided it may have died before that was durable; its markers go now
    trash.finish_restored(store, volume)
    if volume.trash:
        _end_freeze(store, volume)
        store.move_to_trash(volume)
        return volume.head
    if volume.unfinished:
        if volume.source_next and volume.source and volume.parent:
            _undo_freeze(store, volume.source.id, volume.source_next, parent=volume.parent, intent=volume.id)
        layers.abandon(store, volume.head, volume_marker(volume), parent=volume.parent, intent=volume.id)
        released = volume.parent
    else:
        store.unmark(volume.head, volume_marker(volume))
        released = volume.head
    store.remove_content(volume)
    store.remove(volume)
    return released


def _is_plain(record: VolumeRecord | SnapshotRecord) -> bool:
    """Say whether nothing but markers and notes is to be taken back of what is deleted now: one step does it."""
    is_ready = record.state in {VolumeState.READY, SnapshotState.READY} and not record.unfinished
    return is_ready and record.restored_from is None and trash.decide(record) is None


def _end_freeze(store: Store, volume: VolumeRecord) -> None:
    """Finish a freeze below the head of a volume that goes to the trash: what it was for is there to be finished, and
    must not be undone by taking that head away.
    """
    try:
        layers.finish_freeze(store, volume)
    except Corrupt as error:  # a damaged volume can always be deleted
        log.error("volume %s goes to the trash with damage: %s", volume.id, error)


def remove_snapshot(store: Store, snapshot: SnapshotRecord) -> str:
    """Take a snapshot away, or move it to the trash, or undo one that never became ready; gives the layer it leaves.

    It also leaves its cache, which is made anew for a restored one.

    The caller holds the lock of the snapshot, and of the source volume if the snapshot never became ready.
    """
    if _is_plain(snapshot):
        store.remove(snapshot)
        # die here, or between the next ones
        if snapshot.cache:
            store.unmark(snapshot.cache, snapshot_marker(snapshot), sync=False)
            store.unmark(snapshot.layer, child_marker(snapshot.cache), sync=False)
        store.unmark(snapshot.layer, snapshot_marker(snapshot), sync=False)
        return snapshot.layer
    if snapshot.state is not SnapshotState.DELETING:
        snapshot = store.swap(snapshot, replace(snapshot, state=SnapshotState.DELETING, trash=trash.decide(snapshot)))
    else:
        store.settle(snapshot)
    trash.finish_restored(store, snapshot)
    if snapshot.unfinished and snapshot.next:
        _undo_freeze(store, snapshot.source_volume, snapshot.next, parent=snapshot.layer, intent=snapshot.id)
    if snapshot.cache:
        # one that is being filled is given up by whoever fills it; what a crash has left of it belongs to nothing now
        store.unmark(snapshot.cache, snapshot_marker(snapshot))
        store.unmark(snapshot.layer, child_marker(snapshot.cache))
    if snapshot.trash:
        store.move_to_trash(snapshot)
        return snapshot.layer
    store.unmark(snapshot.layer, snapshot_marker(snapshot))
    store.remove(snapshot)
    return snapshot.layer


def remove_image(store: Store, image: ImageRecord) -> str | None:
    """Take a golden image away, or undo one that never became ready; gives the layer it leaves.

    The caller holds the lock of the image. Volumes that lie on it are not concerned.
    """
    if image.state is not ImageState.DELETING:
        image = store.swap(image, replace(image, state=ImageState.DELETING))
    else:
        store.settle(image)
    if image.unfinished:
        # Whoever has seen it ready has made a volume of it; a power cut may have taken that word back since. What else
        # refers to the layer then lives on, as after any removal.
        with suppress(Busy):
            layers.abandon(store, image.layer, image_marker(image), parent=None, intent=image.id)
    else:
        store.unmark(image.layer, image_marker(image))
    store.remove(image)
    return None if image.unfinished else image.layer


def _undo_freeze(store: Store, source_id: str, next_id: str, *, parent: str, intent: str) -> None:
    """Finish a freeze that the source volume's record has already taken over, else remove its unused overlay.

    The source's record is written again first, unchanged: a freeze that another process is in the middle of (where
    locks do not reach) then loses its compare-and-set and cannot make a head of what is removed here.

    Raises:
        Busy: the source's record cannot be read at this moment, or changes.
    """
    try:
        source = store.find_volume(source_id)
    except Corrupt as error:
        if not store.is_damaged("volumes", source_id):
            raise Busy(f"volume {source_id} was being changed") from error
        _leave_freeze(error)
        return
    if source and source.head == next_id:
        try:
            layers.finish_freeze(store, source)
        except Corrupt as error:
            _leave_freeze(error)
        return
    if source is None:
        store.settle_name(source_id)
    markers = store.markers(next_id) or []
    if any(not marker.startswith("v-") for marker in markers):
        return  # the freeze was finished and the volume has moved on since: this layer is part of its chain
    if any(index.is_needed_now(store, next_id, marker) for marker in map(parse_marker, markers) if marker):
        return  # it is the head of what the volume has become: in the trash, or restored from there
    if source and source.state is VolumeState.READY:
        store.swap(source, source)
    for marker in markers:
        store.unmark(next_id, marker)
    layers.abandon(store, next_id, None, parent=parent, intent=intent)


def _leave_freeze(error: Corrupt) -> None:
    """What is damaged is another object's: once that is repaired or deleted, the collector does the rest."""
    log.error("a freeze is left as it is: %s", error)
