"""Looking for what is wrong in a pool, without changing anything: every kind of finding that format 1 knows.

docs/format.md explains each kind. An error is damage: something that a record promises is not there or not right. A
warning is something left over or unfinished: the collector, or a retry of the operation, deals with it.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from csi_quobyte.engine import index as index_module
from csi_quobyte.engine.index import Index, Stray
from csi_quobyte.errors import Corrupt, DriverError, Refused
from csi_quobyte.pool import images
from csi_quobyte.pool.chain import chain_of
from csi_quobyte.pool.naming import is_claim
from csi_quobyte.pool.records import (
    ImageState,
    LayerRecord,
    LayerState,
    SnapshotState,
    TrashState,
    VolumeRecord,
    VolumeState,
    child_marker,
    image_marker,
    is_layer_id,
    layer_of,
    marker_of,
    note_uid,
    parse_marker,
    snapshot_marker,
    volume_marker,
)
from csi_quobyte.pool.store import Store

Kind = Literal[
    "unreadable-record",
    "missing-layer",
    "missing-image",
    "missing-marker",
    "broken-chain",
    "wrong-size",
    "wrong-backing-name",
    "damaged-image",
    "leaked-clusters",
    "unfinished",
    "stale-marker",
    "orphan-layer",
    "orphan-file",
    "stale-claim",
    "stale-temporary",
    "foreign-file",
]
_WARNINGS: frozenset[Kind] = frozenset(
    {
        "leaked-clusters",
        "unfinished",
        "stale-marker",
        "orphan-layer",
        "orphan-file",
        "stale-claim",
        "stale-temporary",
        "foreign-file",
    }
)
# what the collector, a retry or engine/repair puts right without a decision of anybody's; an unreadable or missing
# record only sometimes is
_REPAIRABLE: frozenset[Kind] = (_WARNINGS - {"foreign-file"}) | {"missing-marker", "wrong-backing-name"}

# Gives (errors, leaked clusters) of one image on its own, as `qemu-img check` counts them.
CheckImage = Callable[[str, str], tuple[int, int]]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; `id` is the record concerned, `path` the file or the marker, either may be empty."""

    kind: Kind
    id: str
    path: str
    detail: str

    @property
    def severity(self) -> Literal["error", "warning"]:
        """error: damage; warning: something left over or unfinished."""
        return "warning" if self.kind in _WARNINGS else "error"

    @property
    def repairable(self) -> bool:
        """Whether it goes away without a decision of anybody's."""
        return self.kind in _REPAIRABLE


@dataclass
class Result:
    """What was looked at, and what is wrong."""

    volumes: int = 0
    snapshots: int = 0
    layers: int = 0
    trash: int = 0
    skipped_live: int = 0
    findings: list[Finding] = field(default_factory=list)


def check(store: Store, check_image: CheckImage) -> Result:
    """Look at everything in a pool. Images that a daemon writes are not opened and counted as `skipped_live`."""
    found = index_module.read(store)
    result = Result(len(found.volumes), len(found.snapshots), len(found.layers), len(found.trash))
    for part in (_records, _references, _markers, _leftovers):
        result.findings += part(store, found)
    live = {
        layer_id
        for volume in found.volumes.values()
        for attachment in volume.attachments
        for layer_id in (volume.head, *attachment.opened[:1])
    }
    for layer in found.layers.values():
        if layer.state is LayerState.RETIRED:
            continue
        if layer.id in live or _is_written(store, layer):
            result.skipped_live += 1
            result.findings += _missing_image(store, layer)
        else:
            result.findings += _image(store, found, layer, check_image)
    result.findings.sort(key=lambda finding: (finding.severity, finding.kind, finding.id, finding.path))
    return result


def _unreadable(store: Store, record_id: str, message: str) -> Finding:
    """Make the finding of what the store says of a damaged file: its path, a space, and what is wrong with it."""
    name, _, detail = message.removeprefix(store.root).partition(" ")  # no name below the root has a space
    return Finding("unreadable-record", record_id, f"{store.root}{name}", detail)


def _records(store: Store, found: Index) -> Iterator[Finding]:
    """Records that cannot be read, operations that did not end, and what `_volumes` looks for."""
    for record_id, detail in found.unreadable.items():
        yield _unreadable(store, record_id, detail)
    for detail in store.unreadable_aside():
        yield _unreadable(store, "", detail)
    unfinished = [(v.id, str(v.state)) for v in found.volumes.values() if v.state is not VolumeState.READY]
    unfinished += [(i.id, str(i.state)) for i in found.images.values() if i.state is not ImageState.READY]
    unfinished += [(s.id, str(s.state)) for s in found.snapshots.values() if s.state is not SnapshotState.READY]
    for record_id, state in unfinished:
        yield Finding("unfinished", record_id, "", f"state {state}: retry the call, or delete the object")
    for job in found.jobs.values():
        if store.is_over(job):
            yield Finding("unfinished", job.id, store.job_record_path(job.id), f"the process has ended: {job.what}")
    for snapshot_id, job_id in found.orphaned_snapshots():
        if store.find_job(job_id) is None:
            yield Finding("unfinished", snapshot_id, "", f"export {job_id}, which took this snapshot, has ended")
    for entry_id, entry in found.trash.items():
        if entry.trash and entry.trash.state is not TrashState.KEPT:
            yield Finding("unfinished", entry_id, "", f"{entry.trash.state}: retry that, or leave it to the collector")
    yield from _merges(found)
    yield from _volumes(store, found)
    yield from _other_chains(found)


def _volumes(store: Store, found: Index) -> Iterator[Finding]:
    """Notes that cannot be read and chains that do not hold together, of live volumes and of those in the trash."""
    whole = [(v.id, v, v.state is VolumeState.READY) for v in found.volumes.values()]
    whole += [(entry_id, v, True) for entry_id, v in found.trash.items() if isinstance(v, VolumeRecord)]
    for record_id, volume, has_chain in whole:
        for look in (store.content, store.closed_generation):
            try:
                look(volume)
            except Corrupt as error:
                yield _unreadable(store, record_id, str(error))
        if has_chain:
            yield from _chain(found, record_id, volume.head)


def _other_chains(found: Index) -> Iterator[Finding]:
    """Chains below snapshots, their caches and golden images that do not hold together."""
    for snapshot in found.snapshots.values():
        if snapshot.state is SnapshotState.READY:
            yield from _chain(found, snapshot.id, snapshot.layer)
        if snapshot.cache:
            yield from _chain(found, snapshot.id, snapshot.cache)
    for image in found.images.values():
        if image.state is ImageState.READY:
            yield from _chain(found, image.id, image.layer)
    for entry_id, entry in found.trash.items():
        if not isinstance(entry, VolumeRecord):
            yield from _chain(found, entry_id, entry.layer)


def _chain(found: Index, record_id: str, layer_id: str) -> Iterator[Finding]:
    if layer_id in found.layers:
        try:
            chain_of(layer_id, found.layers.get)
        except Corrupt as error:
            yield Finding("broken-chain", record_id, "", str(error))


def _merges(found: Index) -> Iterator[Finding]:
    for layer in found.layers.values():
        if layer.merge and layer.state is not LayerState.RETIRED:
            yield Finding("unfinished", layer.id, "", f"being merged ({layer.merge.kind}), or the process died")


def _is_written(store: Store, layer: LayerRecord) -> bool:
    """Say whether a daemon writes an image that no volume is attached for: a forced detach, or a merge."""
    try:
        store.check_not_written(layer)
    except Refused:
        return True
    except Corrupt:  # there is no file: reported as that
        pass
    return False


def needed(found: Index) -> Iterator[tuple[str, str, str]]:
    """Give (layer id, marker, who needs it) for every reference that finished records make, and pinned copies."""
    yield from _copied(found)
    for volume in found.volumes.values():
        if not volume.unfinished and volume.state is VolumeState.READY:
            yield volume.head, volume_marker(volume), volume.id
    for snapshot in found.snapshots.values():
        if snapshot.state is SnapshotState.READY:
            yield snapshot.layer, snapshot_marker(snapshot), snapshot.id
            if snapshot.cache in found.layers:  # without a record it is being made, or will be by the next who wants it
                yield snapshot.cache, snapshot_marker(snapshot), snapshot.id
    for entry_id, entry in found.trash.items():
        if entry.trash and entry.trash.state is TrashState.KEPT:
            yield layer_of(entry), marker_of(entry), entry_id
    for image in found.images.values():
        if image.state is ImageState.READY:
            yield image.layer, image_marker(image), image.id
    for layer in found.layers.values():
        if layer.parent and layer.state is not LayerState.RETIRED:
            yield layer.parent, child_marker(layer.id), layer.id


def _copied(found: Index) -> Iterator[tuple[str, str, str]]:
    """What is still to be copied must stay, also when the source is deleted. A copy whose layer is there is whole."""
    for volume in found.volumes.values():
        is_to_be_copied = volume.pinned and volume.state is VolumeState.CREATING and volume.head not in found.layers
        if is_to_be_copied and volume.parent:
            yield volume.parent, child_marker(volume.head), volume.id


def _held_for_a_while(found: Index) -> Iterator[tuple[str, str, str]]:
    """Give the same for jobs and for what is on the way into or out of the trash: its marker may not be there yet, or
    not any more.
    """
    for job in found.jobs.values():
        if job.layer:
            yield job.layer, child_marker(job.id), job.id
    for entry_id, entry in found.trash.items():
        if not entry.trash or entry.trash.state is not TrashState.KEPT:
            yield layer_of(entry), marker_of(entry), entry_id


def unmarked_layers(found: Index) -> dict[str, list[str]]:
    """Give the layers that records need, with the markers of that which are not there: of finished ones, damage."""
    unmarked: dict[str, list[str]] = {}
    for layer_id, marker, _ in itertools.chain(needed(found), _held_for_a_while(found)):
        if marker not in found.refs.get(layer_id, ()):
            unmarked.setdefault(layer_id, []).append(marker)
    return unmarked


def is_needed_unmarked(store: Store, layer_id: str, unmarked: Mapping[str, Sequence[str]]) -> bool:
    """Say whether a record still needs a layer without a marker of that; `unmarked` is of a look at everything, whose
    markers were read before the records, so that of those that seemed to be missing some have come since.
    """
    missing = set(unmarked.get(layer_id, ()))
    if not missing:
        return False
    missing -= set(store.markers(layer_id) or ())
    markers = [marker for marker in map(parse_marker, missing) if marker]
    # a child without a record may be the head of a volume that is being copied
    is_copied = any(marker.kind == "c" and store.find_layer(marker.id) is None for marker in markers)
    return is_copied or any(index_module.is_needed_now(store, layer_id, marker) for marker in markers)


def _references(store: Store, found: Index) -> Iterator[Finding]:
    """References without the layer or without the marker that keeps it."""
    for layer_id, marker, owner in needed(found):
        if layer_id in found.unreadable:
            continue
        if layer_id not in found.layers:
            path = store.layer_record_path(layer_id)
            yield Finding("missing-layer", owner, path, f"{owner} needs layer {layer_id}, which has no record")
        elif marker not in (store.markers(layer_id) or []):
            yield Finding("missing-marker", layer_id, marker, f"{owner} needs this layer, its marker is missing")


def _markers(store: Store, found: Index) -> Iterator[Finding]:
    """Markers and layers that nothing needs."""
    if found.unreadable:
        return  # an unreadable record may be what needs them
    for layer_id, names in found.refs.items():
        for name in names:
            marker = parse_marker(name)
            if marker is None:
                yield Finding("foreign-file", layer_id, name, "a marker of no known form keeps this layer for ever")
            elif not found.needs(layer_id, marker):
                yield Finding("stale-marker", layer_id, name, "no record justifies this marker")
    for layer in found.layers.values():
        if not found.refs.get(layer.id) and layer.id not in found.named_layers:
            yield Finding("orphan-layer", layer.id, store.image_path(layer), "nothing refers to this layer")


def _leftovers(store: Store, found: Index) -> Iterator[Finding]:
    for stray in found.strays:
        if finding := _stray(found, stray):
            yield finding
    for name in store.foreign_files():
        yield Finding("foreign-file", "", name, "not a file of this format")
    for path in store.stale_temporaries():
        yield Finding("stale-temporary", "", path, "left by a process that has ended")


def _stray(found: Index, stray: Stray) -> Finding | None:
    """Judge a file in a shard that is no record."""
    path = stray.path
    owner, _, ending = stray.name.partition(".")
    if is_claim(stray.name):
        return Finding("stale-claim", owner, path, "a change of this record was interrupted")
    if stray.folder == "layers" and is_layer_id(owner) and ending in {"qcow2", "raw", "refs"}:
        if owner in found.layers or owner in found.intended_layers or owner in found.unreadable:
            return None
        if owner in found.named_layers:
            return None  # its record is what is missing
        return Finding("orphan-file", owner, path, "no layer record names this file")
    if stray.folder == "volumes" and ending.startswith("new-"):
        return Finding("unfinished", owner, path, "the making of this volume was interrupted")
    if stray.folder == "volumes" and (uid := note_uid(ending)):
        volume = found.volumes.get(owner)
        if owner in found.unreadable or (volume and uid == volume.uid):
            return None
        entry_id = f"{owner}-{uid}"
        if entry_id in found.trash or entry_id in found.unreadable:
            return None
        return Finding("orphan-file", owner, path, "the volume of this note does not exist")
    if stray.folder == "trash" and ending.startswith("restore-"):
        return Finding("unfinished", owner, path, "a restore from the trash was interrupted")
    return Finding("foreign-file", "", path, "not a file of this format")


def _missing_image(store: Store, layer: LayerRecord) -> Iterator[Finding]:
    if store.image_bytes(layer) is None:
        yield Finding("missing-image", layer.id, store.image_path(layer), "the layer's file does not exist")


def _is_unfinished(found: Index, layer: LayerRecord) -> bool:
    """Say whether only an unfinished operation names a layer: its files come one by one, and a retry makes them all.

    After a power cut the record may be there without the image, though it was made after it.
    """
    heads = {volume.head for volume in found.volumes.values() if not volume.unfinished}
    return layer.id in found.intended_layers and layer.id not in heads


def _image(store: Store, found: Index, layer: LayerRecord, check_image: CheckImage) -> Iterator[Finding]:
    """Compare one image that no daemon writes with its record, and check its inside."""
    path = store.image_path(layer)
    missing = list(_missing_image(store, layer))
    if missing:
        if not _is_unfinished(found, layer):
            yield from missing
        return
    try:
        size_bytes = images.virtual_size_bytes(store, layer)
        backing_name = images.backing_name(store, layer)
    except Corrupt as error:
        yield Finding("damaged-image", layer.id, path, str(error))
        return
    if size_bytes < layer.size_bytes or (layer.state is LayerState.FROZEN and size_bytes != layer.size_bytes):
        yield Finding("wrong-size", layer.id, path, f"virtual size {size_bytes}, the record says {layer.size_bytes}")
    parent = found.layers.get(layer.parent) if layer.parent else None
    wanted = store.backing_name(layer.id, parent) if parent else None
    is_merging = bool(layer.merge or (parent and parent.merge))  # the new name is written first
    if backing_name != wanted and (parent or layer.parent is None) and not is_merging:
        yield Finding("wrong-backing-name", layer.id, path, f"backing name {backing_name!r}, by the records {wanted!r}")
    yield from _inside(layer, path, check_image)


def _inside(layer: LayerRecord, path: str, check_image: CheckImage) -> Iterator[Finding]:
    try:
        errors, leaks = check_image(path, layer.format)
    except DriverError as error:
        yield Finding("damaged-image", layer.id, path, str(error))
        return
    if errors:
        yield Finding("damaged-image", layer.id, path, f"qemu-img check counts {errors} errors")
    elif leaks:
        yield Finding(
            "leaked-clusters", layer.id, path, f"{leaks} clusters are allocated and unused (a daemon was killed)"
        )
