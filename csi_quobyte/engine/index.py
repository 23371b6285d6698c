"""Everything that is in a pool, read once: what the collector and check judge by.

The order of reading matters: markers and stray files first, records after. An intent is written before anything that
it names, so whatever was seen in the first part and belongs to somebody has its record seen in the second.

A pool may have 100 000 volumes: `brief` keeps of each record what the collector judges by, and `read_names` only which
layers are named.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TypeVar

from csi_quobyte.errors import Corrupt
from csi_quobyte.pool.pace import no_pace
from csi_quobyte.pool.records import LayerRecord, Marker, SnapshotRecord, VolumeRecord, VolumeState
from csi_quobyte.pool.store import Store, is_record

T = TypeVar("T")

_NO_TIME = datetime.fromtimestamp(0, UTC)
_NOTHING: dict[str, str] = {}
_PART = 1000  # records at a time
_LAYER_FILES = frozenset({"qcow2", "raw", "refs"})


@dataclass(frozen=True, slots=True)
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


@dataclass
class Names:
    """Which layers the records of a pool name, and which of them volumes and snapshots hold; see `Index`."""

    named: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, part: Index) -> None:
        """Add what a part of the pool names; what a record names does not depend on the other ones."""
        self.named.update(part.named_layers)
        self.held |= part.held_layers


def read(store: Store, *, brief: bool = False, pace: Callable[[], None] = no_pace) -> Index:
    """Read all of a pool; `pace` is called between small steps. Damaged records are listed, not raised.

    A layer's files beside its record, in one look at their directory, are no strays: they belong to it.

    With `brief` the records lack what nobody needs to judge a pool by, and that is most of their bytes. They have no
    nonce: one that is written back by mistake loses every compare-and-set.
    """
    index = Index()
    for shard, names in store.listings("layers"):
        _read_layer_files(store, index, shard, names, pace)
    # announcements, too, are made before what they name: looked for after the markers and before the records that
    # they become
    for folder in ("volumes", "snapshots"):
        for shard, names in store.listings(folder):
            index.strays += [Stray(folder, shard, name) for name in names if not is_record(name)]
            pace()
    for volume_id, volume in _records(store.volume_ids(), store.find_volume, index.unreadable, pace):
        index.volumes[volume_id] = _brief_volume(volume) if brief else volume
    for snapshot_id, snapshot in _records(store.snapshot_ids(), store.find_snapshot, index.unreadable, pace):
        index.snapshots[snapshot_id] = _brief_snapshot(snapshot) if brief else snapshot
    for layer_id, layer in _records(store.layer_ids(), store.find_layer, index.unreadable, pace):
        index.layers[layer_id] = _brief_layer(layer) if brief else layer
    return index


def read_names(store: Store, *, pace: Callable[[], None] = no_pace) -> Names:
    """Read which layers are named now: announcements first, the records that they become after."""
    found = Names()
    announced = Index()
    for shard, names in store.listings("volumes"):
        announced.strays += [Stray("volumes", shard, name) for name in names if ".new-" in name]
        pace()
    found.add(announced)
    for volumes in _parts(_records(store.volume_ids(), store.find_volume, found.unreadable, pace)):
        found.add(Index(volumes=volumes))
    for snapshots in _parts(_records(store.snapshot_ids(), store.find_snapshot, found.unreadable, pace)):
        found.add(Index(snapshots=snapshots))
    for layers in _parts(_records(store.layer_ids(), store.find_layer, found.unreadable, pace)):
        found.add(Index(layers=layers))
    return found


def _parts(records: Iterator[tuple[str, T]]) -> Iterator[dict[str, T]]:
    while part := dict(itertools.islice(records, _PART)):
        yield part


def _read_layer_files(store: Store, index: Index, shard: str, names: Sequence[str], pace: Callable[[], None]) -> None:
    """Read the markers of a shard's layers, and keep what else is there and is not beside its record."""
    recorded = {name.removesuffix(".json") for name in names if is_record(name)}
    for name in names:
        owner, _, ending = name.partition(".")
        if ending == "refs" and (markers := store.markers(owner)) is not None:
            index.refs[sys.intern(owner)] = markers
        if not is_record(name) and not (owner in recorded and ending in _LAYER_FILES):
            index.strays.append(Stray("layers", shard, name))
        pace()


def _records(
    ids: Iterable[str], find: Callable[[str], T | None], unreadable: dict[str, str], pace: Callable[[], None]
) -> Iterator[tuple[str, T]]:
    """Give the records of some ids; those that cannot be read go into `unreadable`, with what is wrong."""
    for record_id in ids:
        try:
            record = find(record_id)
        except Corrupt as error:
            unreadable[record_id] = str(error)
        else:
            if record is not None:
                yield sys.intern(record_id), record
        pace()


def _shared(text: str | None) -> str | None:
    """Give the one copy of an id in memory: several records name the same layer."""
    return sys.intern(text) if text else None


def _brief_volume(volume: VolumeRecord) -> VolumeRecord:
    return replace(
        volume,
        id=sys.intern(volume.id),
        name="",
        head=sys.intern(volume.head),
        filesystem="",
        mkfs_options=(),
        created_at=_NO_TIME,
        parent=_shared(volume.parent),
        source_next=_shared(volume.source_next),
        inherited_content=None,
        kubernetes=_NOTHING,
        nonce="",
    )


def _brief_snapshot(snapshot: SnapshotRecord) -> SnapshotRecord:
    return replace(
        snapshot,
        id=sys.intern(snapshot.id),
        name="",
        source_volume=sys.intern(snapshot.source_volume),
        layer=sys.intern(snapshot.layer),
        next=_shared(snapshot.next),
        content=None,
        created_at=_NO_TIME,
        kubernetes=_NOTHING,
        nonce="",
    )


def _brief_layer(layer: LayerRecord) -> LayerRecord:
    return replace(layer, id=sys.intern(layer.id), parent=_shared(layer.parent), nonce="")
