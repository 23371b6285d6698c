"""Merging: a frozen layer that nothing but one child refers to is folded into that child or into its parent.

    up     P <- F <- C       P <- C'          C' has what F had and C had not; F is dropped
    down   P <- F <- C       P' <- C          P' has what F had; only if nothing but F refers to P; F is dropped
    flatten  P <- F <- C     P <- C'          C is a head; F stays as long as something refers to it

Only where nobody has the chain open: no attachment of any volume above, and the work is done by a private storage
daemon that dies with this process. The order of the steps is that of docs/format.md, "Merges". What holds after a
crash between any two of them:

- Until the child's record names its new parent, the chain by records is the old one and shows the same: what has
  changed below it is hidden, what has changed in it is what it showed anyway. Then the merge is undone (`resume`).
- From then on the new chain shows the same, and the merge is finished.
- Whoever wants to use a layer makes a marker or an attachment first and reads the layer's state then; the merge writes
  the state first and looks for markers and attachments then. So one of the two sees the other.

One process of a pool merges: who holds its lease (engine/lease). One that has lost it without noticing can do no harm:
its daemon is dead by then, and its commit reads the child before the layer, while who undoes it writes the layer before
the child, so that one of its two comparisons fails. What no comparison guards, a name in an image and the removal of a
marker, is done right after the lease was looked at, and a marker is looked at once more.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from csi_quobyte.engine import layers
from csi_quobyte.engine.index import find_owner
from csi_quobyte.errors import Busy, Refused
from csi_quobyte.host import jobs, qemu_img
from csi_quobyte.host.qemu import ImageLayer, QemuTools
from csi_quobyte.pool import images
from csi_quobyte.pool.chain import chain_of
from csi_quobyte.pool.records import (
    LayerRecord,
    LayerState,
    Merge,
    VolumeRecord,
    VolumeState,
    child_marker,
    now,
    parse_marker,
    same_version,
)
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

SOFT_DEPTH = 8
"""The collector flattens the head of a chain that is longer."""
_FLAT_DEPTH = SOFT_DEPTH // 2  # so that not every further snapshot makes the next flattening
_CHEAP_BYTES = 256 << 20  # moved without asking what it frees: a second of work, and mkfs.xfs alone writes 64 MiB
_SPARE_BYTES = 64 << 20  # left to those who write, besides what a merge may take before it frees anything
_LOOK_EVERY_S = 0.25  # how long somebody who wants the volume may wait for a job's end
SETTLE_S = 2.0
"""So long after a note the data is left where it is: a client may show records and names as they were a second ago, so
that who wants the chain and the merge could miss each other."""
GRACE_S = 60.0
"""So long after a detachment a volume is left alone: a node from which it was taken by force may write until it is
fenced (20 s), and the clocks of two hosts differ."""

Ask = Callable[[], bool]


@dataclass(frozen=True)
class Plan:
    """A merge that could be done. `layer` is the one that goes (for flatten: the head), `bytes` what may be moved."""

    kind: Literal["up", "down", "flatten"]
    layer: str
    child: str
    parent: str | None
    bytes: int


# --- what could be done ----------------------------------------------------------------------------------------


def plan_for(store: Store, layer_id: str, *, keep: Callable[[str], bool] = lambda _: False) -> Plan | None:
    """Give the merge by which a layer that lost a reference could go, None if there is none or it does not pay.

    Layers that are to be kept, because they are needed without a marker of that, neither go nor change.
    """
    layer = store.find_layer(layer_id)
    if layer is None or layer.state is not LayerState.FROZEN or keep(layer.id):
        return None
    child_id = _only_child(store, layer.id)
    child = store.find_layer(child_id) if child_id else None
    if child is None or child.parent != layer.id or child.merge:
        return None
    if child.state not in {LayerState.HEAD, LayerState.FROZEN}:
        return None
    parent = store.find_layer(layer.parent) if layer.parent else None
    if layer.parent and (parent is None or parent.state is not LayerState.FROZEN or parent.merge):
        return None
    target, kind = child, "up"
    if parent and _only_child(store, parent.id) == layer.id and not keep(parent.id):
        target, kind = parent, "down"  # the child, which may be shared, is not touched
    moved = allocated_bytes(store, layer)
    if not _pays(store, child.id, moved=moved, into=allocated_bytes(store, target)):
        return None
    return Plan(kind, layer.id, child.id, layer.parent, moved)  # type: ignore[arg-type]


def _pays(store: Store, head: str, *, moved: int, into: int) -> bool:
    """Say whether a merge is worth what it moves: it frees at most what both layers have.

    A large base under a small overlay would be moved each time a snapshot is taken and deleted. A chain that is
    too long is merged all the same.
    """
    return moved <= max(_CHEAP_BYTES, 2 * into) or len(chain_of(head, store.find_layer)) > SOFT_DEPTH


def plan_flattening(store: Store, volume: VolumeRecord) -> Plan | None:
    """Give the flattening of a detached volume's head, None if its chain is short enough."""
    if volume.state is not VolumeState.READY or volume.attachments:
        return None
    chain = chain_of(volume.head, store.find_layer)
    if len(chain) <= SOFT_DEPTH or chain[0].merge or not _is_settled(chain[1:]):
        return None
    keep = len(chain) - _FLAT_DEPTH + 1
    moved = sum(allocated_bytes(store, layer) for layer in chain[1:keep])
    return Plan("flatten", chain[0].id, chain[0].id, chain[keep].id, moved)


def _is_settled(layers_below: Sequence[LayerRecord]) -> bool:
    """Say whether no layer is being merged or waits for the end of a freeze, which looks for it below the head."""
    return all(one.state is LayerState.FROZEN and one.merge is None for one in layers_below)


def has_space(store: Store, plan: Plan) -> bool:
    """Say whether a merge leaves space to those who write: it takes up to what it moves, and frees it at the end."""
    _, available_bytes = store.space()
    return available_bytes >= plan.bytes + _SPARE_BYTES


def _only_child(store: Store, layer_id: str) -> str | None:
    """Give the layer that alone refers to this one, None if something else does too or nothing does."""
    markers = [parse_marker(name) for name in store.markers(layer_id) or []]
    return markers[0].id if len(markers) == 1 and markers[0] and markers[0].kind == "c" else None


def allocated_bytes(store: Store, layer: LayerRecord) -> int:
    """Give what a layer's image takes in the pool; 0 when it is missing."""
    found = store.image_bytes(layer)
    return found[1] if found else 0


# --- doing one -------------------------------------------------------------------------------------------------


def merge(
    store: Store,
    tools: QemuTools,
    plan: Plan,
    *,
    is_held: Ask,
    may_go_on: Ask = lambda: True,
    speed_bytes_per_s: int | None = None,
) -> bool:
    """Do a merge; False if it is not possible now. What was begun is finished or undone, also after an error.

    `is_held` says whether the caller still holds the lease: without it nothing is written any more, and whoever holds
    it ends what was begun. `may_go_on` is asked while data is moved.

    Raises:
        Stopped: `is_held` or `may_go_on` said no, or somebody wants to use the chain.
        Exhausted, Unavailable, Busy, Corrupt: see host/jobs; it was undone.
    """
    layer = store.find_layer(plan.layer)
    wanted = LayerState.HEAD if plan.kind == "flatten" else LayerState.FROZEN
    if layer is None or layer.state is not wanted or layer.merge or not _still_fits(store, layer, plan):
        return False
    if _is_in_use(store, plan.child):  # what counts is the look after the note; this one saves writing it
        return False
    _check_held(is_held)
    noted = Merge(kind=plan.kind, child=plan.child, parent=plan.parent)
    state = LayerState.HEAD if plan.kind == "flatten" else LayerState.MERGING
    # die here, before or after: nothing has happened
    layer = store.swap(layer, replace(layer, state=state, merge=noted))
    try:
        if not _is_free(store, layer, noted):
            return False
        _settle(store, layer, noted, lambda: is_held() and may_go_on())
        _move(store, tools, layer, noted, lambda: is_held() and may_go_on(), speed_bytes_per_s)
        _commit(store, layer, noted, is_held)
        return True
    finally:
        current = store.find_layer(layer.id)
        if is_held() and current and same_version(current, layer):
            resume(store, tools, layer.id, is_held=is_held)


def _check_held(is_held: Ask) -> None:
    """Check that the lease is held at this moment.

    Raises:
        Busy: it is another's; who holds it ends what was begun.
    """
    if not is_held():
        raise Busy("the right to merge layers in this pool was lost")


def _still_fits(store: Store, layer: LayerRecord, plan: Plan) -> bool:
    """Say whether a plan is one for the chain as it is now: merges before it may have changed that."""
    if plan.kind != "flatten":
        return layer.parent == plan.parent
    return plan.parent in [one.id for one in chain_of(layer.id, store.find_layer)[2:]]


def _is_free(store: Store, layer: LayerRecord, noted: Merge) -> bool:
    """Say, after the note was written, whether nobody but the child refers to the layer and nobody has it open."""
    current, child = store.find_layer(layer.id), store.find_layer(noted.child)
    if current is None or not same_version(current, layer):
        return False  # another process has ended it
    if child is None or (noted.kind != "flatten" and child.parent != layer.id):
        return False
    if noted.kind != "flatten" and store.markers(layer.id) != [child_marker(child.id)]:
        return False
    if noted.kind == "down" and (noted.parent is None or store.markers(noted.parent) != [child_marker(layer.id)]):
        return False
    if child.state is LayerState.HEAD and not _has_quiet_owner(store, child):
        return False
    return not _is_in_use(store, child.id)


def _settle(store: Store, layer: LayerRecord, noted: Merge, may_go_on: Ask) -> None:
    """Wait until every client shows the note, and who came before it is shown here.

    Raises:
        Stopped: somebody wants the layer, or `may_go_on` said no.
    """
    until = time.monotonic() + SETTLE_S
    while (left_s := until - time.monotonic()) > 0:
        time.sleep(min(left_s, _LOOK_EVERY_S))
        if not may_go_on() or not _is_free(store, layer, noted):
            raise jobs.Stopped(f"the {noted.kind} merge of layer {layer.id} steps back before it has begun")


def _has_quiet_owner(store: Store, head: LayerRecord) -> bool:
    """Say whether a head is referred to by its volume alone: no freeze of it is under way."""
    markers = [parse_marker(name) for name in store.markers(head.id) or []]
    if len(markers) != 1 or markers[0] is None or markers[0].kind != "v":
        return False
    volume = store.find_volume(markers[0].id)
    return volume is not None and volume.head == head.id and volume.state is VolumeState.READY


def _is_in_use(store: Store, layer_id: str) -> bool:
    """Say whether somebody may have a layer open: a node, or something that is being made from it or reads it.

    Every ready volume has its marker in its head. A child marker without a layer is one of a reader or of a layer that
    is being made.
    """
    seen: set[str] = set()
    todo = [layer_id]
    while todo:
        current = todo.pop()
        seen.add(current)
        for marker in map(parse_marker, store.markers(current) or []):
            if marker and marker.kind == "c" and marker.id not in seen:
                if store.find_layer(marker.id) is None:
                    return True
                todo.append(marker.id)
            elif marker and marker.kind == "v":
                volume = find_owner(store, marker)
                if isinstance(volume, VolumeRecord) and (volume.attachments or is_in_grace(volume)):
                    return True
    return False


def is_in_grace(volume: VolumeRecord) -> bool:
    """Say whether a volume was detached so lately that a lost node may still write to it."""
    return volume.detached_at is not None and (now() - volume.detached_at).total_seconds() < GRACE_S


def _check_not_written(store: Store, *ids: str | None) -> None:
    """Check that no storage daemon has one of these layers open for writing, as far as the mount's locks tell.

    Raises:
        Busy: one has.
    """
    for layer_id in ids:
        layer = store.find_layer(layer_id) if layer_id else None
        if layer and layer.state is not LayerState.RETIRED:
            try:
                store.check_not_written(layer)
            except Refused as error:
                raise Busy(str(error)) from error


def _move(
    store: Store,
    tools: QemuTools,
    layer: LayerRecord,
    noted: Merge,
    may_go_on: Ask,
    speed_bytes_per_s: int | None,
) -> None:
    """Move the data; durable on return, and the records are as they were."""
    child = store.layer(noted.child)
    _check_not_written(store, child.id, layer.id, noted.parent)
    chain = tuple(reversed(chain_of(child.id, store.find_layer)))
    if not _is_settled([one for one in chain if one.id not in {child.id, layer.id}]):
        raise Busy(f"another merge or a freeze below layer {child.id} is not ended yet")
    images.check_chain(store, chain)
    opened = [ImageLayer(one.id, store.image_path(one), one.format) for one in chain]
    parent = store.layer(noted.parent) if noted.parent else None
    name = store.backing_name(child.id, parent) if parent else None
    looked_at = time.monotonic()

    def watch(_: jobs.Progress) -> jobs.Answer:
        nonlocal looked_at
        if not may_go_on():
            return "stop"
        if time.monotonic() - looked_at >= _LOOK_EVERY_S:
            looked_at = time.monotonic()
            if not _is_free(store, layer, noted):
                return "stop"
        return "go on"

    if noted.kind == "down" and parent and name:
        jobs.commit_down(
            tools, opened, top=layer.id, base=parent.id, backing_name=name, watch=watch,
            speed_bytes_per_s=speed_bytes_per_s,
        )  # fmt: skip
        # the parent has grown: its record says so before anything can lie on it without the layer between
        if layer.size_bytes > parent.size_bytes:
            store.swap(parent, replace(parent, size_bytes=images.virtual_size_bytes(store, parent)))
    else:
        jobs.stream_up(
            tools, opened, into=child.id, base=noted.parent, backing_name=name, watch=watch,
            speed_bytes_per_s=speed_bytes_per_s,
        )  # fmt: skip


def _commit(store: Store, layer: LayerRecord, noted: Merge, is_held: Ask) -> None:
    """Give the child its new parent: the one step that makes the merge true.

    The child is read before the layer is compared: `_undo` writes them in the other order.
    """
    child = store.layer(noted.child)
    current = store.layer(layer.id)
    if not same_version(current, layer):
        raise Busy(f"the merge of layer {layer.id} was given up by another process")
    if child.merge and child.id != layer.id:
        # a note that came late, of a process without the lease
        raise Busy(f"layer {child.id} is being merged itself")
    _check_held(is_held)
    before = child.parent
    if noted.parent:
        store.mark(noted.parent, child_marker(child.id))
    # for a flattening the child is the layer with the note, which goes in the same step
    child = store.swap(child, replace(child, parent=noted.parent, merge=None))
    log.info("layer %s has the parent %s now (%s of %s)", child.id, noted.parent, noted.kind, layer.id)
    if noted.kind == "flatten" and before:
        # die here: a marker without a need, which `tidy` removes
        _leave(store, before, child)


def _leave(store: Store, parent_id: str, child: LayerRecord) -> None:
    """Take the marker of a child out of its old parent.

    The new parent's is made once more before: somebody may have looked before the child's record named that parent, and
    have removed it as stale since.
    """
    if child.parent:
        store.mark(child.parent, child_marker(child.id))
    store.unmark(parent_id, child_marker(child.id))


def tidy(store: Store, layer_id: str, child_id: str, *, is_held: Ask) -> bool:
    """Remove the marker of a child that has another parent; says whether it did. Only for who holds the lease.

    Raises:
        Busy: the child's record changes at this moment, or the lease is lost.
    """
    child, layer = store.find_layer(child_id), store.find_layer(layer_id)
    if child is None or layer is None or child.parent == layer_id or child.merge:
        return False
    above = store.find_layer(child.parent) if child.parent else None
    if above and above.merge and (above.merge.child, above.merge.parent) == (child_id, layer_id):
        return False
    # A commit that another process is in the middle of loses its compare-and-set.
    store.swap(child, child)
    _remove_left(store, layer_id, child_id, is_held)
    return True


def _remove_left(store: Store, layer_id: str, child_id: str, is_held: Ask) -> None:
    """Take the marker of a child out of a layer that is not its parent, and put it back if it has become that since.

    No comparison guards the removal. Who is stopped before it and goes on late may meet the marker of another merge,
    which was committed meanwhile. One that is committed later makes the marker again itself (`_leave`).

    Raises:
        Busy: the lease is lost.
    """
    _check_held(is_held)
    store.unmark(layer_id, child_marker(child_id))
    child = store.find_layer(child_id)
    if child and child.parent == layer_id and child.state is not LayerState.RETIRED:
        store.mark(layer_id, child_marker(child_id))


# --- ending one ------------------------------------------------------------------------------------------------


def resume(store: Store, tools: QemuTools, layer_id: str, *, is_held: Ask) -> None:
    """Finish a merge whose child has its new parent, or undo one whose child has not; nothing to do is success.

    Only for who holds the lease.

    Raises:
        Busy: the records change at this moment, a daemon still has an image open, or the lease is lost; call again.
    """
    layer = store.find_layer(layer_id)
    if layer is None or layer.merge is None or layer.state is LayerState.RETIRED:
        return
    _check_held(is_held)
    noted = layer.merge
    # From here on a commit of the process that wrote the note fails, unless it was made already.
    layer = store.swap(layer, layer)
    child = store.find_layer(noted.child)
    if noted.kind == "flatten":
        _undo(store, tools, layer, layer, noted, is_held)
    elif child is None or child.state is LayerState.RETIRED:
        _undo(store, tools, layer, None, noted, is_held)
    elif child.parent == layer.id:
        _undo(store, tools, layer, child, noted, is_held)
    else:
        store.settle(child)  # whoever committed it may have died before that was durable
        _leave(store, layer.id, child)
        # die here: the layer has no markers, and the collector drops it
        layers.drop(store, layer.id)


def _undo(
    store: Store, tools: QemuTools, layer: LayerRecord, child: LayerRecord | None, noted: Merge, is_held: Ask
) -> None:
    """Make the records as they were before a merge that was not committed.

    What was moved stays where it is: it is hidden, or what was shown anyway.

    The child's record is written again first, unchanged. A commit that a crash has left as a claim, or that another
    process is in the middle of, loses its compare-and-set by that; otherwise it would come true after its marker is
    gone.
    """
    if child and child.id != layer.id:
        child = store.swap(child, child)
    elif child:
        child = layer
    _check_not_written(store, noted.child, noted.parent)
    if child:
        _repair_name(store, tools, child, is_held)
    if noted.parent and not (child and child.parent == noted.parent):
        _remove_left(store, noted.parent, noted.child, is_held)
    if noted.kind == "down" and noted.parent:
        parent = store.layer(noted.parent)
        size_bytes = images.virtual_size_bytes(store, parent)
        if size_bytes > parent.size_bytes:
            store.swap(parent, replace(parent, size_bytes=size_bytes))
    # the layer of a flattening may have been frozen beside it
    state = layer.state if noted.kind == "flatten" else LayerState.FROZEN
    store.swap(layer, replace(layer, state=state, merge=None))


def _repair_name(store: Store, tools: QemuTools, child: LayerRecord, is_held: Ask) -> None:
    """Put the recorded parent's name into an image: a job writes the new one before its data is durable."""
    parent = store.layer(child.parent) if child.parent else None
    wanted = store.backing_name(child.id, parent) if parent else None
    if images.backing_name(store, child) != wanted:
        _check_held(is_held)  # the image may be open elsewhere by now
        qemu_img.set_backing_name(tools, store.image_path(child), wanted, parent.format if parent else None)
