"""The copy-on-write engine: new layers, freeze, drop. Each function is a fixed order of durable steps.

    before freeze     V --head--> F (head) --> P (frozen)
    after freeze      V --head--> N (head) --> F (frozen) --> P        N is an empty overlay

The callers hold the lock of the volume concerned; that makes conflicts rare. What must hold without it, and after a
crash between any two steps, is kept by compare-and-set and the markers (docs/format.md): a marker is made before the
record that needs it, and taken away after that record is gone or no longer needs it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from csi_quobyte.engine import index
from csi_quobyte.errors import Busy, Corrupt, Exhausted, NotFound, Refused, Unavailable
from csi_quobyte.pool import images
from csi_quobyte.pool.chain import HARD_DEPTH, chain_of
from csi_quobyte.pool.records import (
    Content,
    ImageFormat,
    LayerRecord,
    LayerState,
    Preallocation,
    VolumeRecord,
    VolumeState,
    child_marker,
    now,
    parse_marker,
    volume_marker,
)
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

FENCE_S = 30.0
"""So long after a forced detachment a node may still write: it fences itself within 20 s, the rest is for clocks."""


def make_base(
    store: Store,
    layer_id: str,
    marker: str,
    *,
    image_format: ImageFormat,
    size_bytes: int,
    preallocation: Preallocation,
    also: Sequence[str] = (),
) -> LayerRecord:
    """Make the blank base of a new volume, referred to by `marker`; made before is success.

    An announcement or intent names `layer_id` already, so that a crash in here leaves nothing without an owner. The
    files `also` are made durable together with the layer.

    Raises:
        Exhausted: no space; what was made so far is undone with the intent.
    """
    writer = images.blank(image_format, size_bytes=size_bytes, preallocation=preallocation)
    record = LayerRecord(
        id=layer_id,
        file=f"{layer_id}.{image_format}",
        format=image_format,
        size_bytes=size_bytes,
        parent=None,
        state=LayerState.HEAD,
        depth=1,
    )
    return store.make_layer(record, marker, writer, also=also)


def make_overlay(
    store: Store,
    layer_id: str,
    marker: str,
    *,
    parent: LayerRecord,
    size_bytes: int,
    also: Sequence[str] = (),
) -> LayerRecord:
    """Make an empty overlay over `parent`, referred to by `marker`; made before is success.

    The overlay is at least as large as its parent: with a smaller one, data beyond its end would show again later.
    The caller has put this layer's child marker into the parent.
    """
    size_bytes = max(size_bytes, parent.size_bytes)
    writer = images.overlay(
        size_bytes=size_bytes, backing_name=store.backing_name(layer_id, parent), backing_format=parent.format
    )
    depth = _depth(store, parent) + 1
    record = _overlay_record(layer_id, parent_id=parent.id, size_bytes=size_bytes, depth=depth)
    return store.make_layer(record, marker, writer, also=also)


def _overlay_record(layer_id: str, *, parent_id: str, size_bytes: int, depth: int = 0) -> LayerRecord:
    return LayerRecord(
        id=layer_id,
        file=f"{layer_id}.qcow2",
        format="qcow2",
        size_bytes=size_bytes,
        parent=parent_id,
        state=LayerState.HEAD,
        depth=depth,
    )


def detached_volume(store: Store, volume_id: str, *, to_be: str) -> VolumeRecord:
    """Give a ready volume that no daemon can have open, so that its head may be frozen.

    Raises:
        NotFound: there is none, or it is being deleted.
        Unavailable: it is still being made, or see `_check_closed`.
        Refused: it is attached; this version cannot freeze what a daemon writes. `to_be` says what was wanted.
    """
    volume = ready_volume(store, volume_id)
    if volume.attachments:
        raise Refused(
            f"the volume is attached to node {volume.attachments[0].node} and can be {to_be} only while it is "
            f"detached; delete the pods that use it, then Kubernetes' next try does it ({volume_id})"
        )
    _check_closed(store, volume)
    return volume


def _check_closed(store: Store, volume: VolumeRecord) -> None:
    """Check that no node that was thought lost writes to a volume still.

    Raises:
        Unavailable: it was detached a moment ago, and not by a node that had closed it.
    """
    if volume.detached_at is None or (now() - volume.detached_at).total_seconds() >= FENCE_S:
        return
    try:
        is_closed = store.closed_generation(volume) == volume.attach_generation
    except Corrupt as error:
        log.error("the word that a volume was closed cannot be read and counts as none: %s", error)
        is_closed = False
    if not is_closed:
        raise Unavailable(
            f"volume {volume.id} was detached a moment ago from a node that has not said that it has closed it, and "
            f"may write to it for some seconds; try again"
        )


def ready_volume(store: Store, volume_id: str) -> VolumeRecord:
    """Give a volume that may be used.

    Raises:
        NotFound: there is none, or it is being deleted.
        Unavailable: it is still being made.
    """
    volume = store.volume(volume_id)
    if volume.state is VolumeState.DELETING:
        raise NotFound(f"volume {volume_id} is being deleted")
    if volume.state is VolumeState.CREATING:
        raise Unavailable(f"volume {volume_id} is not ready yet")
    return volume


def check_depth(store: Store, head: str) -> None:
    """Check that one more layer may be put on `head`.

    Raises:
        Exhausted: the chain has reached the hard depth.
    """
    depth = _depth(store, store.layer(head))
    if depth >= HARD_DEPTH:
        raise Exhausted(
            f"the volume already lies on {depth} layers, the most that is supported; while it is detached its chain is "
            f"shortened, so detach it and try again in a few minutes, or copy its data into a new volume"
        )


def _depth(store: Store, layer: LayerRecord) -> int:
    """Give how many layers a chain has at most; exactly, by reading all of it, only where that may be too many."""
    if 0 < layer.depth < HARD_DEPTH:
        return layer.depth
    return len(chain_of(layer.id, store.find_layer))


def untouched_parent(store: Store, volume: VolumeRecord) -> LayerRecord | None:
    """Give the frozen layer below a detached volume's head if nothing was ever written to that head, else None.

    Then a snapshot or clone can refer to that layer, and the chain does not grow. A detached volume's daemon has
    exited, so no newer mapping is in anybody's memory. A freeze that was interrupted below the head is finished
    first: once the volume moves on, nobody would find it any more.
    """
    head = store.layer(volume.head)
    if head.parent is None:
        return None
    if store.layer(head.parent).state is LayerState.HEAD:
        finish_freeze(store, volume)
    return store.layer(head.parent) if images.is_untouched(store, head) else None


def intent_is_outdated(
    store: Store, volume_id: str, *, layer_id: str, next_id: str | None, size_bytes: int, content: Content | None
) -> bool:
    """Say whether an intent to refer to a volume's contents describes something that it would not give any more.

    `next_id`: the overlay by which the volume's head `layer_id` is to be frozen; None: that head was untouched, and
    `layer_id` is the layer below it. An intent is outdated when the volume was grown or formatted since, its overlay
    may then be smaller than the layer it is to lie on; and when the volume has moved on before the layer was marked for
    the intent: until it is, merges may change the layer. An outdated intent is undone and written anew.
    """
    volume = store.find_volume(volume_id)
    if next_id is None:
        return volume is None or not _is_untouched_over(store, volume, layer_id, size_bytes, content)
    if volume and volume.head == next_id:
        return False
    if volume is None or volume.head != layer_id:
        # The overlay's marker comes after the intent's own, and both while the layer is the volume's head.
        if child_marker(next_id) not in (store.markers(layer_id) or []):
            return True
        # Somebody else may have frozen it, when it was larger or held something else.
        holds_other = volume is not None and store.content(volume) != content
        return holds_other or store.layer(layer_id).size_bytes > size_bytes
    overlay = _overlay_record(next_id, parent_id=layer_id, size_bytes=size_bytes)
    is_made = store.image_bytes(overlay) is not None
    return (
        volume.size_bytes > size_bytes
        or (is_made and images.virtual_size_bytes(store, overlay) < volume.size_bytes)
        or store.content(volume) != content
    )


def _is_untouched_over(
    store: Store, volume: VolumeRecord, layer_id: str, size_bytes: int, content: Content | None
) -> bool:
    """Say whether a volume is a detached one whose untouched head lies on a layer, not grown and with this content."""
    if volume.state is not VolumeState.READY or volume.attachments:
        return False
    if volume.size_bytes > size_bytes or store.content(volume) != content:
        return False
    head = store.layer(volume.head)
    return head.parent == layer_id and images.is_untouched(store, head)


def check_intent(
    store: Store, volume_id: str, *, layer_id: str, next_id: str | None, size_bytes: int, content: Content | None
) -> None:
    """Check, after a frozen layer was marked for an intent, that it holds what the intent saw, now and for good.

    The arguments are those of `intent_is_outdated`.

    Raises:
        Busy: the volume has moved on, or a merge into the layer may be under way.
    """
    if intent_is_outdated(store, volume_id, layer_id=layer_id, next_id=next_id, size_bytes=size_bytes, content=content):
        raise Busy(f"volume {volume_id} has changed since this was begun; try again")
    if next_id:
        return  # it was marked while it was a head: nothing was merged into it since
    for marker in map(parse_marker, store.markers(layer_id) or []):
        child = store.find_layer(marker.id) if marker and marker.kind == "c" else None
        if child and child.merge and child.merge.kind == "down" and child.merge.parent == layer_id:
            raise Busy(f"layer {child.id} is being merged into {layer_id}; it stops for this call, try again")


def check_quiet(store: Store, chain: Sequence[LayerRecord]) -> None:
    """Check that no merge changes a layer of a chain that is to be read whole, or is about to give one another parent.

    The caller has made its marker in the chain's head before, so that a merge sees it and stops.

    Raises:
        Busy: one does.
    """
    for layer in chain:
        check_not_merging(store, layer)


def check_not_merging(store: Store, layer: LayerRecord) -> None:
    """Check that no merge changes a layer or is about to give it another parent.

    The caller has made its marker before, so that the merge sees it and stops.

    Raises:
        Busy: one does.
    """
    if layer.merge:
        raise Busy(f"layer {layer.id} is being merged; it stops for this call, try again")
    parent = store.find_layer(layer.parent) if layer.parent else None
    if parent and parent.merge and parent.merge.child == layer.id:
        raise Busy(f"layer {parent.id} is being merged; it stops for this call, try again")


def freeze(
    store: Store,
    volume: VolumeRecord,
    next_id: str,
    *,
    check_intent: Callable[[], None] = lambda: None,
    also: Sequence[str] = (),
) -> list[str]:
    """Put the new overlay `next_id` on a detached volume's head, which is frozen by that; done before is success.

    The caller's intent record names `next_id`, and its own marker is in the old head. On return the old head is
    frozen; a crash in between is finished by calling again or by `finish_freeze`. `check_intent` raises Busy when the
    intent record is no longer what the caller read. The files and directories `also` are made durable with the overlay.

    Gives the directories that the caller makes durable before anything says that what the freeze is for is there: until
    then a power cut may show the old head as one, which is finished like a crash.

    Raises:
        Refused: the volume is attached, or a storage daemon has its head open all the same.
        Unavailable: see `_check_closed`.
        Corrupt: its head is damaged; nothing was changed.
    """
    if volume.head == next_id:
        if also:
            store.make_durable(also)
        finish_freeze(store, volume)
        return []
    if volume.attachments:
        raise Refused(f"volume {volume.id} is attached to node {volume.attachments[0].node}")
    _check_closed(store, volume)
    store.mark(volume.head, child_marker(next_id), sync=False)
    old = store.layer(volume.head)
    check_not_merging(store, old)
    images.check_chain(store, (old,))
    store.check_not_written(old)
    marker = volume_marker(volume)
    # An earlier freeze may have died before that below was durable; nobody looks there once this is no head any more.
    below = [store.directory_of(store.layer(old.parent))] if old.parent else []
    # Written down now, so that all of it becomes durable at once; each comes true, by compare-and-set, in its turn.
    with (
        store.prepared(volume, replace(volume, head=next_id)) as moved,
        store.prepared(old, _frozen(store, old)) as frozen,
    ):
        make_overlay(
            store,
            next_id,
            marker,
            parent=old,
            size_bytes=volume.size_bytes,
            also=[store.refs_path(old.id), moved.temporary, frozen.temporary, *below, *also],
        )
        # Whoever undoes the intent writes that down first, then writes the volume's record again, then removes the
        # overlay: with the intent read after the volume was, either it is seen here or the swap fails.
        check_intent()
        # die here: the new overlay is nobody's head yet; the intent's owner goes on or undoes it
        volume = store.commit(moved)
        # die here, or between the next: `finish_freeze` goes on
        store.commit(frozen, sync=False)
    store.unmark(old.id, marker, sync=False)
    return [store.directory_of(old), store.refs_path(old.id)]


def _frozen(store: Store, head: LayerRecord) -> LayerRecord:
    """Give the record of a head that nobody writes any more."""
    return replace(head, state=LayerState.FROZEN, size_bytes=images.virtual_size_bytes(store, head))


def finish_freeze(store: Store, volume: VolumeRecord) -> None:
    """Make the layer below a volume's head frozen, durably, if a freeze was interrupted after the record named the new
    head.
    """
    head = store.layer(volume.head)
    if head.parent is None:
        return
    old = store.layer(head.parent)
    store.settle(volume)  # a power cut must not make it the head again once it is frozen
    if old.state is LayerState.HEAD:
        store.swap(old, _frozen(store, old))
    else:
        store.settle(old)  # whoever froze it may have died before that was durable
    store.unmark(old.id, volume_marker(volume))


def freeze_passed(store: Store, layer_id: str) -> bool:
    """Freeze a layer that others lie on and that is nobody's head, if that is so; says whether it was.

    A freeze whose end a power cut took back leaves one when its volume has moved on since.
    """
    layer = store.find_layer(layer_id)
    if layer is None or layer.state is not LayerState.HEAD or layer.merge:
        return False
    markers = [marker for marker in map(parse_marker, store.markers(layer_id) or []) if marker and marker.kind == "v"]
    if any(index.is_needed_now(store, layer_id, marker) for marker in markers):
        return False
    store.swap(layer, _frozen(store, layer))
    return True


def abandon(store: Store, layer_id: str, marker: str | None, *, parent: str | None, intent: str) -> None:
    """Undo a layer that was made for an intent, of that record's id, and never became anything, whatever of it exists.

    The parent's child marker goes last: until then the parent cannot be dropped under a half-made child.

    Raises:
        Busy: something else refers to the layer.
    """
    if marker:
        store.unmark(layer_id, marker)
    try:
        is_whole = store.find_layer(layer_id) is not None
    except Corrupt as error:
        log.error("removing a layer whose record cannot be read: %s", error)
        is_whole = False
    if is_whole:
        # an earlier undo may have died right after it had removed the refs; or they are lost, and the layer is needed
        is_refless = store.markers(layer_id) is None
        drop(store, layer_id, is_unnamed=is_refless and not _is_named(store, layer_id, besides=intent))
    else:
        remove_damaged(store, layer_id)
    if parent:  # a whole copy has no parent in its record, and its marker is there all the same
        store.unmark(parent, child_marker(layer_id))


def _is_named(store: Store, layer_id: str, *, besides: str) -> bool:
    """Say whether a record names a layer, or may: reads all of them."""
    names = index.read_names(store, besides=besides)
    return bool(names.unreadable) or layer_id in names.named or layer_id in names.held


def undo_announced(store: Store, volume_id: str, layer_id: str) -> None:
    """Undo a blank volume that was announced, unless it was published.

    The announcement goes first: from then on nobody can publish it, and whether somebody had can be seen: by the
    volume's record, or, when the volume has moved on or was deleted since, by what else refers to the layer: that may
    be what the volume has become in the trash, or was restored as.
    """
    store.revoke(volume_id, layer_id)
    volume = store.find_volume(volume_id)
    markers = store.markers(layer_id) or []
    if (volume and volume.head == layer_id) or any(not marker.startswith("v-") for marker in markers):
        return
    if any(index.is_needed_now(store, layer_id, marker) for marker in map(parse_marker, markers) if marker):
        return
    for marker in markers:
        store.unmark(layer_id, marker)
    abandon(store, layer_id, None, parent=None, intent=volume_id)


def remove_damaged(store: Store, layer_id: str) -> None:
    """Remove what there is of a layer that has no readable record and that nothing refers to. Can be repeated.

    Its record goes last. It would have named the parent, whose child marker is stale from then on.

    Raises:
        Busy: something refers to the layer; nothing changed.
    """
    store.condemn(layer_id)
    for image_format in ("qcow2", "raw"):
        store.remove_image(layer_id, f"{layer_id}.{image_format}")
    store.remove_damaged("layers", layer_id)


def drop(store: Store, layer_id: str, *, is_unnamed: bool = False) -> str | None:
    """Remove a layer that nothing refers to, and give its parent, which has lost a child by that.

    None when there is no such layer or it had no parent. Restartable at every step: the record goes last and names
    the parent until the child marker there is gone.

    Raises:
        Busy: something refers to the layer; nothing changed.
    """
    layer = store.find_layer(layer_id)
    if layer is None:
        return None
    if layer.state is not LayerState.RETIRED:
        if not store.condemn(layer_id) and not is_unnamed:
            # condemned by a process that died, or its refs are lost: the collector looks whether a record names it
            raise Busy(f"layer {layer_id} has lost its refs directory")
        # die here: the record without refs tells the collector to go on
        layer = store.swap(layer, replace(layer, state=LayerState.RETIRED))
    store.remove_image(layer_id, layer.file)
    if layer.parent:
        store.unmark(layer.parent, child_marker(layer_id))
    store.remove(layer)
    log.info("layer %s removed", layer_id)
    return layer.parent


def drop_upwards(
    store: Store, layer_id: str | None, *, keep: Callable[[str], bool] = lambda _: False, is_unnamed: bool = False
) -> int:
    """Drop a layer and then each parent that nothing refers to any more, up to one to `keep`; gives how many.

    `is_unnamed`: the layer itself is named by no record, so that it may be dropped though it has lost its refs.
    """
    dropped = 0
    while layer_id and (dropped == 0 or not keep(layer_id)):
        try:
            layer_id = drop(store, layer_id, is_unnamed=is_unnamed and dropped == 0)
        except (Busy, NotFound):
            break
        dropped += 1
    return dropped
