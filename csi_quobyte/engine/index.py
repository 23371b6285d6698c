"""Everything that is in a pool, read once: what the collector and check judge by.

The order of reading matters: markers and stray files first, records after. An intent is written before anything that
it names, so whatever was seen in the first part and belongs to somebody has its record seen in the second.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from csi_quobyte.errors import Corrupt
from csi_quobyte.pool.records import LayerRecord, Marker, SnapshotRecord, VolumeRecord, VolumeState
from csi_quobyte.pool.store import Store

T = TypeVar("T")


@dataclass(frozen=True)
class Stray:
    """A file in a shard that is not a record: an image, a refs directory, a content note, a claim, or foreign."""

    folder: str
    shard: str
    name: str


@dataclass
class Index:
    """A pool's contents, complete once `read` has given it; `unreadable` says of a record what is wrong."""

    volumes: dict[str, VolumeRecord] = field(default_factory=dict)
    snapshots: dict[str, SnapshotRecord] = field(default_factory=dict)
    layers: dict[str, LayerRecord] = field(default_factory=dict)
    refs: dict[str, list[str]] = field(default_factory=dict)
    strays: list[Stray] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    @cached_property
    def announced(self) -> dict[str, str]:
        """The layer ids of blank volumes that are being made, or were left so, with the volumes' ids."""
        found = {}
        for stray in self.strays:
            volume_id, _, ending = stray.name.partition(".")
            if stray.folder == "volumes" and ending.startswith("new-"):
                found[ending.removeprefix("new-")] = volume_id
        return found

    @cached_property
    def intended_layers(self) -> frozenset[str]:
        """The layer ids that an announcement or an unfinished record names and may be making at this moment."""
        volumes = [volume for volume in self.volumes.values() if volume.unfinished]
        snapshots = [snapshot for snapshot in self.snapshots.values() if snapshot.unfinished]
        intended = {volume.head for volume in volumes}
        intended |= {volume.source_next for volume in volumes if volume.source_next}
        intended |= {snapshot.next for snapshot in snapshots if snapshot.next}
        caches = {snapshot.cache for snapshot in self.snapshots.values() if snapshot.cache}
        intended |= caches - self.layers.keys()
        return frozenset(intended | self.announced.keys())

    @cached_property
    def intended_heads(self) -> frozenset[tuple[str, str]]:
        """The pairs (volume id, layer id) of heads that an unfinished freeze may be about to give to a volume."""
        pairs = {
            (volume.source.id, volume.source_next)
            for volume in self.volumes.values()
            if volume.unfinished and volume.source and volume.source_next
        }
        pairs |= {
            (snapshot.source_volume, snapshot.next)
            for snapshot in self.snapshots.values()
            if snapshot.unfinished and snapshot.next
        }
        return frozenset(pairs)

    @cached_property
    def named_layers(self) -> dict[str, str]:
        """Each layer id that a record names as head, snapshot or parent, with the id of what names it."""
        named = {snapshot.layer: snapshot.id for snapshot in self.snapshots.values()}
        named |= {snapshot.cache: snapshot.id for snapshot in self.snapshots.values() if snapshot.cache}
        named |= {layer.parent: layer.id for layer in self.layers.values() if layer.parent}
        named |= {volume.head: volume.id for volume in self.volumes.values()}
        named |= {volume.parent: volume.id for volume in self.volumes.values() if volume.parent}
        return named

    @cached_property
    def held_layers(self) -> frozenset[str]:
        """The layer ids that volumes and snapshots name themselves, or that may be under way."""
        held = {volume.head for volume in self.volumes.values()}
        held |= {volume.parent for volume in self.volumes.values() if volume.parent}
        held |= {snapshot.layer for snapshot in self.snapshots.values()}
        held |= {snapshot.cache for snapshot in self.snapshots.values() if snapshot.cache}
        return frozenset(held) | self.intended_layers

    @cached_property
    def merge_markers(self) -> frozenset[tuple[str, str]]:
        """The pairs (layer id, child id) of parents that merges under way are about to give to a child."""
        noted = [layer.merge for layer in self.layers.values() if layer.merge]
        return frozenset((merge.parent, merge.child) for merge in noted if merge.parent)

    @cached_property
    def broken_volumes(self) -> frozenset[str]:
        """The ids of volumes whose head has no readable record: nothing that may belong to them is removed."""
        return frozenset(
            volume.id
            for volume in self.volumes.values()
            if not volume.unfinished and volume.state is VolumeState.READY and volume.head not in self.layers
        )

    def needs(self, layer_id: str, marker: Marker) -> bool:
        """Say whether a record justifies a marker on a layer."""
        match marker.kind:
            case "c":
                child = self.layers.get(marker.id)
                # a child that a volume or snapshot names and that has no record is damage, not garbage; one without
                # a parent is a copy: once that is finished, its marker in what it was made from is left over
                is_whole = child is not None and child.parent is None
                is_held = marker.id in (self.intended_layers if is_whole else self.held_layers)
                is_parent = child is not None and child.parent == layer_id
                return is_parent or is_held or (layer_id, marker.id) in self.merge_markers
            case "s":
                snapshot = self.snapshots.get(marker.id)
                if snapshot is None or snapshot.uid != marker.uid:
                    return False
                return layer_id in {snapshot.layer, snapshot.cache}
            case "v":
                if self.announced.get(layer_id) == marker.id or marker.id in self.broken_volumes:
                    return True
                volume = self.volumes.get(marker.id)
                if volume is None or volume.uid != marker.uid:
                    return False
                return volume.head == layer_id or (volume.id, layer_id) in self.intended_heads


def read(store: Store) -> Index:
    """Read all of a pool. Damaged records are listed, not raised."""
    index = Index()
    index.strays = [Stray(*entry) for entry in store.stray_files("layers")]
    for stray in index.strays:
        if stray.name.endswith(".refs"):
            layer_id = stray.name.removesuffix(".refs")
            markers = store.markers(layer_id)
            if markers is not None:
                index.refs[layer_id] = markers
    # announcements, too, are made before what they name: looked for after the markers and before the records that
    # they become
    index.strays += [Stray(*entry) for folder in ("volumes", "snapshots") for entry in store.stray_files(folder)]
    _read_into(index, index.volumes, store.volume_ids(), store.find_volume)
    _read_into(index, index.snapshots, store.snapshot_ids(), store.find_snapshot)
    _read_into(index, index.layers, store.layer_ids(), store.find_layer)
    return index


def _read_into(index: Index, into: dict[str, T], ids: Iterable[str], find: Callable[[str], T | None]) -> None:
    for record_id in ids:
        try:
            record = find(record_id)
        except Corrupt as error:
            index.unreadable[record_id] = str(error)
            continue
        if record is not None:
            into[record_id] = record
