"""Rebuilding a record that cannot be read, only as far as what is left in the pool says all of it. Changes nothing.

A record that was cut off is taken as it stands when no field of it is lost (pool/salvage). Of a layer's record
everything is written a second time in the pool, and is taken when the witnesses agree (docs/decisions/0025):

    format, file     the one image file that has the layer's id
    size             the image's header or length; not below the parent's, not above the children's
    state            head: a volume that can be read says so; frozen: a snapshot, image or child needs it and no volume
    parent           the backing name in the image, *and* the child marker, which must be in that layer's refs and in
                     no other's. A merge writes the name early, and has both markers while it changes the parent: so
                     as long as a merge is on its way, or was left half done, the two do not agree.

Nothing is guessed: `Uncertain` says what is missing or contradicts.
"""

from csi_quobyte.engine.index import Index
from csi_quobyte.errors import Corrupt
from csi_quobyte.pool import images, layout
from csi_quobyte.pool.records import (
    ImageFormat,
    ImageRecord,
    LayerRecord,
    LayerState,
    Owning,
    SnapshotRecord,
    VolumeRecord,
    child_marker,
    layer_of,
    marker_of,
    parse_id,
    parse_marker,
)
from csi_quobyte.pool.salvage import salvage
from csi_quobyte.pool.store import Store

_FORMATS: tuple[ImageFormat, ...] = ("qcow2", "raw")
# for each kind of object: its record, what to say when a part of that is lost, and when it never was ready
_OBJECTS: dict[str, tuple[type[Owning], str, str]] = {
    "vol": (VolumeRecord, ", and its attachments are written nowhere else", "repeat the call, or delete it"),
    "snap": (SnapshotRecord, "", "repeat the call, or delete it"),
    "img": (ImageRecord, "; csi-quobyte image rm removes it", "csi-quobyte image rm removes it"),
}


class Uncertain(Exception):
    """A record cannot be rebuilt without guessing; the message says why."""


def rebuild_object(store: Store, found: Index, record_id: str) -> Owning:
    """Give the record of a volume, snapshot or golden image from what is left of its text.

    Raises:
        Uncertain: part of it is lost, or the pool contradicts it.
    """
    parsed = parse_id(record_id)
    if parsed is None:
        raise Uncertain(f"{record_id} is no id of this format")
    kind, if_lost, if_unfinished = _OBJECTS[parsed.kind]
    data = store.damaged_bytes(layout.FOLDERS[parsed.kind], record_id)
    record = salvage(kind, data) if data else None
    _check_no_change_under_way(found, record_id)
    if record is None or record.id != record_id:
        raise Uncertain(f"what its file still says is not all of it{if_lost}")
    if record.state.value != "ready" or record.unfinished:
        raise Uncertain(f"its state was {record.state}: {if_unfinished}")
    if marker_of(record) not in found.refs.get(layer_of(record), []):
        raise Uncertain(f"layer {layer_of(record)}, to which its file refers, has no marker of it")
    return record


def rebuild_layer(store: Store, found: Index, layer_id: str) -> LayerRecord:
    """Give the record of a layer whose own is torn or lost.

    Raises:
        Uncertain: the witnesses are incomplete, or do not agree.
    """
    _check_no_change_under_way(found, layer_id)
    _check_no_merge_near(found, layer_id)
    data = store.damaged_bytes("layers", layer_id)
    record = salvage(LayerRecord, data) if data else None
    if record is None:
        record = _from_witnesses(store, found, layer_id)
    elif record.id != layer_id or record.merge or record.state not in {LayerState.HEAD, LayerState.FROZEN}:
        raise Uncertain(f"its file says state {record.state}: a merge or its removal was under way")
    if (record.parent, []) != (None, parents_by_marker(found, layer_id)) and parents_by_marker(found, layer_id) != [
        record.parent
    ]:
        raise Uncertain(
            f"its parent is {record.parent or 'none'} by its file, and by the markers "
            f"{', '.join(parents_by_marker(found, layer_id)) or 'none'}"
        )
    _check_sizes(found, record)
    return record


def _from_witnesses(store: Store, found: Index, layer_id: str) -> LayerRecord:
    """Put a layer's record together from its image, its markers and who refers to it."""
    state = _state(found, layer_id)
    candidates = [
        LayerRecord(id=layer_id, file=f"{layer_id}.{one}", format=one, size_bytes=0, parent=None, state=state)
        for one in _FORMATS
    ]
    present = [candidate for candidate in candidates if store.image_bytes(candidate) is not None]
    if len(present) != 1:
        raise Uncertain("it has no image file" if not present else "it has two image files")
    (layer,) = present
    try:
        size_bytes = images.virtual_size_bytes(store, layer)
        parent = _parent_by_name(store, layer)
    except Corrupt as error:
        raise Uncertain(f"its image is damaged, too: {error}") from error
    return LayerRecord(
        id=layer_id, file=layer.file, format=layer.format, size_bytes=size_bytes, parent=parent, state=state
    )


def _state(found: Index, layer_id: str) -> LayerState:
    """Judge by who refers to a layer whether it is a head or frozen."""
    names = found.refs.get(layer_id)
    if names is None:
        raise Uncertain("its refs directory is gone, as of a layer that is being removed")
    markers = [parse_marker(name) for name in names]
    is_cache = any(snapshot.cache == layer_id for snapshot in found.snapshots.values())
    # a cache entry without a record counts as one that is being made, unless it had one or has children
    was_made = layer_id in found.unreadable or any(marker.kind == "c" for marker in markers if marker)
    if layer_id in found.intended_layers and not (is_cache and was_made):
        raise Uncertain("it belongs to an operation that did not end: repeat the call, or delete the object")
    unknown = [name for name, marker in zip(names, markers, strict=True) if marker is None]
    unknown += [
        marker.id
        for marker in markers
        if marker and marker.kind != "c" and not found.unreadable.keys().isdisjoint(marker.owners)
    ]
    if unknown:
        raise Uncertain(f"{unknown[0]} refers to it, and cannot be read")
    if any(volume.head == layer_id for volume in found.volumes.values() if not volume.unfinished):
        return LayerState.HEAD
    if any(isinstance(entry, VolumeRecord) and entry.head == layer_id for entry in found.trash.values()):
        return LayerState.HEAD
    if any(marker.kind in {"c", "s", "i"} and found.needs(layer_id, marker) for marker in markers if marker):
        return LayerState.FROZEN
    raise Uncertain("nothing that can be read needs it")


def _parent_by_name(store: Store, layer: LayerRecord) -> str | None:
    """Give the layer whose file an image names exactly as the store would, None when it names none."""
    if layer.format == "raw":
        return None
    header = images.read_header(store, layer)
    if header.backing_name is None:
        return None
    parent_id, _, ending = header.backing_name.rpartition("/")[2].partition(".")
    for one in _FORMATS:
        parent = LayerRecord(
            id=parent_id, file=f"{parent_id}.{one}", format=one, size_bytes=0, parent=None, state=LayerState.FROZEN
        )
        if (header.backing_name, header.backing_format) == (store.backing_name(layer.id, parent), one) and ending:
            return parent_id
    raise Uncertain(f"its image names {header.backing_name!r} ({header.backing_format}), which is no layer's file")


def parents_by_marker(found: Index, layer_id: str) -> list[str]:
    """Name the layers that have a child marker of this one."""
    return [parent for parent, names in found.refs.items() if child_marker(layer_id) in names]


def _check_no_change_under_way(found: Index, record_id: str) -> None:
    if any(stray.name.startswith(f"{record_id}.json.g") for stray in found.strays):
        raise Uncertain("a change of it was under way when it was damaged, and may have come true or not")


def _check_no_merge_near(found: Index, layer_id: str) -> None:
    """Check that no record notes a merge that touches a layer; a merge that was ended leaves no note and no harm."""
    near = {layer_id, *parents_by_marker(found, layer_id)}
    for layer in found.layers.values():
        if layer.merge and near & {layer.id, layer.parent, layer.merge.child, layer.merge.parent}:
            raise Uncertain(f"layer {layer.id} notes a merge ({layer.merge.kind}) that touches it")


def _check_sizes(found: Index, record: LayerRecord) -> None:
    """Check that with a rebuilt record sizes do not fall from base to head, and that there is no circle."""
    parent = found.layers.get(record.parent) if record.parent else None
    sizes = [layer.size_bytes for layer in found.layers.values() if layer.parent == record.id]
    sizes += [volume.size_bytes for volume in found.volumes.values() if volume.head == record.id]
    below = parent.size_bytes if parent else 0
    above = min(sizes, default=record.size_bytes)
    if not below <= record.size_bytes <= above:
        raise Uncertain(f"its size {record.size_bytes} does not fit between {below} below it and {above} above it")
    seen = {record.id}
    while parent:
        if parent.id in seen:
            raise Uncertain("with it, the parents form a circle")
        seen.add(parent.id)
        parent = found.layers.get(parent.parent) if parent.parent else None
