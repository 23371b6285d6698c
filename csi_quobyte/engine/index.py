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
from csi_quobyte.pool.naming import is_record
from csi_quobyte.pool.pace import no_pace
from csi_quobyte.pool.records import (
    Deletable,
    ImageRecord,
    JobRecord,
    LayerRecord,
    LayerState,
    Marker,
    Owning,
    SnapshotRecord,
    VolumeRecord,
    VolumeState,
    job_of_snapshot,
    layer_of,
    marker_of,
)
from csi_quobyte.pool.store import Store

T = TypeVar("T")

_NO_TIME = datetime.fromtimestamp(0, UTC)
_NOTHING: dict[str, str] = {}
_PART = 1000  # records at a time
_LAYER_FILES = frozenset({"qcow2", "raw", "refs"})


@dataclass(frozen=True, slots=True)
class Stray:
    """A file in a shard that is not a record: an image, a refs directory, a content note, a claim, or foreign.

    The trash has no shards; there it is a claim, or a record that is to be published by a restore. A claim on the lease
    is in no folder.
    """

    folder: str
    shard: str
    name: str

    @property
    def path(self) -> str:
        """The file, relative to the pool."""
        return "/".join(part for part in (self.folder, self.shard, self.name) if part)


@dataclass
class Index:
    """A pool's contents, complete once `read` has given it; `unreadable` says of a record what is wrong.

    `trash` is by the ids of its entries; what is in it needs its layers as before.
    """

    volumes: dict[str, VolumeRecord] = field(default_factory=dict)
    snapshots: dict[str, SnapshotRecord] = field(default_factory=dict)
    images: dict[str, ImageRecord] = field(default_factory=dict)
    jobs: dict[str, JobRecord] = field(default_factory=dict)
    layers: dict[str, LayerRecord] = field(default_factory=dict)
    trash: dict[str, Deletable] = field(default_factory=dict)
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

    def orphaned_snapshots(self) -> Iterator[tuple[str, str]]:
        """Give (snapshot id, job id) of what jobs have taken for themselves that are there no more.

        A job's record is made before its snapshot and removed after it, unless it was ended meanwhile by somebody who
        took its process for dead.
        """
        for snapshot in self.snapshots.values():
            job_id = job_of_snapshot(snapshot.name)
            if job_id and job_id not in self.jobs:
                yield snapshot.id, job_id

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
        intended |= {image.layer for image in self.images.values() if image.unfinished}
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
        """Each layer id that a record names as head, snapshot, image, parent or read, with the id of what names it."""
        named = {snapshot.layer: snapshot.id for snapshot in self.snapshots.values()}
        named |= {snapshot.cache: snapshot.id for snapshot in self.snapshots.values() if snapshot.cache}
        named |= {image.layer: image.id for image in self.images.values()}
        named |= {job.layer: job.id for job in self.jobs.values() if job.layer}
        named |= {layer_of(entry): entry_id for entry_id, entry in self.trash.items()}
        named |= {layer.parent: layer.id for layer in self.layers.values() if layer.parent}
        named |= {volume.head: volume.id for volume in self.volumes.values()}
        named |= {volume.parent: volume.id for volume in self.volumes.values() if volume.parent}
        return named

    @cached_property
    def held_layers(self) -> frozenset[str]:
        """The layer ids that volumes, snapshots, images and jobs name themselves, or that may be under way."""
        held = {volume.head for volume in self.volumes.values()}
        held |= {volume.parent for volume in self.volumes.values() if volume.parent}
        held |= {snapshot.layer for snapshot in self.snapshots.values()}
        held |= {snapshot.cache for snapshot in self.snapshots.values() if snapshot.cache}
        held |= {image.layer for image in self.images.values()}
        held |= {job.layer for job in self.jobs.values() if job.layer}
        held |= {layer_of(entry) for entry in self.trash.values()}
        return frozenset(held) | self.intended_layers

    @cached_property
    def lost_layers(self) -> frozenset[str]:
        """The layer ids that another layer names as its parent and that have no record (or just lose it in a merge):
        what they lie on is kept, and so is what they are.
        """
        alive = (layer for layer in self.layers.values() if layer.state is not LayerState.RETIRED)
        return frozenset(layer.parent for layer in alive if layer.parent and layer.parent not in self.layers)

    @cached_property
    def merge_markers(self) -> frozenset[tuple[str, str]]:
        """The pairs (layer id, child id) of parents that merges under way are about to give to a child."""
        noted = [layer.merge for layer in self.layers.values() if layer.merge]
        return frozenset((merge.parent, merge.child) for merge in noted if merge.parent)

    @cached_property
    def trash_markers(self) -> frozenset[tuple[str, str]]:
        """The pairs (layer id, marker) that the trash needs; see `markers_of_trashed`."""
        return frozenset(
            (layer_of(entry), marker) for entry in self.trash.values() for marker in markers_of_trashed(entry)
        )

    @cached_property
    def broken_volumes(self) -> frozenset[str]:
        """The ids of volumes whose head has no readable record: nothing that may belong to them is removed."""
        return frozenset(
            volume.id
            for volume in self.volumes.values()
            if not volume.unfinished and volume.state is VolumeState.READY and volume.head not in self.layers
        ) | frozenset(entry.id for entry in self.trash.values() if layer_of(entry) not in self.layers)

    def needs(self, layer_id: str, marker: Marker) -> bool:
        """Say whether a record justifies a marker on a layer."""
        if marker.kind != "c" and (layer_id, f"{marker.kind}-{marker.id}-{marker.uid}") in self.trash_markers:
            return True
        match marker.kind:
            case "c":
                if (job := self.jobs.get(marker.id)) and job.layer == layer_id:
                    return True
                child = self.layers.get(marker.id)
                # a child that a volume or snapshot names and that has no record is damage, not garbage; one without
                # a parent is a copy: once that is finished, its marker in what it was made from is left over
                is_whole = child is not None and child.parent is None
                is_held = marker.id in (self.intended_layers if is_whole else self.held_layers)
                is_parent = child is not None and child.parent == layer_id
                is_lost = marker.id in self.lost_layers
                return is_parent or is_held or is_lost or (layer_id, marker.id) in self.merge_markers
            case "s":
                snapshot = self.snapshots.get(marker.id)
                if snapshot is None or snapshot.uid != marker.uid:
                    return False
                return layer_id in {snapshot.layer, snapshot.cache}
            case "i":
                image = self.images.get(marker.id)
                return image is not None and image.uid == marker.uid and image.layer == layer_id
            case "v":
                if self.announced.get(layer_id) == marker.id or marker.id in self.broken_volumes:
                    return True
                volume = self.volumes.get(marker.id)
                if volume is None or volume.uid != marker.uid:
                    return False
                return volume.head == layer_id or (volume.id, layer_id) in self.intended_heads


@dataclass
class Names:
    """Which layers the records of a pool name, which of them are held by more than other layers, and which ones
    somebody may be making; see `Index`.
    """

    named: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    intended: set[str] = field(default_factory=set)
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, part: Index) -> None:
        """Add what a part of the pool names; what a record names does not depend on the other ones."""
        self.named.update(part.named_layers)
        self.held |= part.held_layers
        self.intended |= part.intended_layers


def markers_of_trashed(entry: Deletable) -> list[str]:
    """Give the markers that an entry of the trash needs in its layer: its own, and that of what it is restored as."""
    markers = [marker_of(entry)]
    if entry.trash and (target := entry.trash.target):
        markers.append(marker_of(replace(entry, id=target.id, uid=target.uid)))
    return markers


def is_needed_now(store: Store, layer_id: str, marker: Marker) -> bool:
    """Say whether the record that a marker names justifies it at this moment; what an intent needs is not seen.

    An object is looked for in the order in which it moves: what a restore is about to publish, record, trash. It is at
    the next place before it leaves the one before.
    """
    if marker.kind == "c":
        # One of a child with another parent is left by a merge, or a merge is about to need it: see merger. One of a
        # child without a parent, which never gets one, is left by a copy.
        child = store.find_layer(marker.id)
        if child is None:
            job = store.find_job(marker.id)
            return job is not None and job.layer == layer_id
        return child.parent is not None
    if any(name.endswith(f".restore-{marker.uid}") for name in store.trash_strays()):
        return True
    owner = find_owner(store, marker)
    if isinstance(owner, SnapshotRecord) and owner.trash is None and owner.cache == layer_id:
        return True
    return owner is not None and layer_of(owner) == layer_id


def find_owner(store: Store, marker: Marker) -> Owning | None:
    """Give the volume, snapshot or image that a marker names, or its entry in the trash; None for another use of its
    id, and for a layer's or job's marker.
    """
    owner: Owning | None = None
    match marker.kind:
        case "v":
            owner = store.find_volume(marker.id)
        case "s":
            owner = store.find_snapshot(marker.id)
        case "i":
            owner = store.find_image(marker.id)
        case "c":
            return None
    if owner and owner.uid == marker.uid:
        return owner
    return store.find_trashed(marker.owners[-1])


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
    for folder in ("volumes", "snapshots", "images"):
        for shard, names in store.listings(folder):
            index.strays += [Stray(folder, shard, name) for name in names if not is_record(name)]
            pace()
    index.strays += [Stray("trash", "", name) for name in store.trash_strays()]
    index.strays += [Stray("jobs", "", name) for name in store.job_claims()]
    index.strays += [Stray("", "", name) for name in store.lease_claims()]
    # A volume is made from an image while that is there: images are read before volumes. An image is made while its
    # job is there: jobs are read after images.
    for image_id, image in _records(store.image_ids(), store.find_image, index.unreadable, pace):
        index.images[image_id] = _brief_image(image) if brief else image
    # What is deleted moves from its record to the trash, what is restored the other way, and each is at the new place
    # before it leaves the old one: so the trash is read before the records and once more after them.
    for entry_id, entry in _entries(store, store.trash_ids(), index.unreadable, pace):
        index.trash[entry_id] = _brief_entry(entry) if brief else entry
    for volume_id, volume in _records(store.volume_ids(), store.find_volume, index.unreadable, pace):
        index.volumes[volume_id] = _brief_volume(volume) if brief else volume
    for snapshot_id, snapshot in _records(store.snapshot_ids(), store.find_snapshot, index.unreadable, pace):
        index.snapshots[snapshot_id] = _brief_snapshot(snapshot) if brief else snapshot
    later = (entry_id for entry_id in store.trash_ids() if entry_id not in index.trash)
    for entry_id, entry in _entries(store, later, index.unreadable, pace):
        index.trash[entry_id] = _brief_entry(entry) if brief else entry
    index.jobs.update(_jobs(store, index.unreadable, pace))
    for layer_id, layer in _records(store.layer_ids(), store.find_layer, index.unreadable, pace):
        index.layers[layer_id] = _brief_layer(layer) if brief else layer
    return index


def read_names(store: Store, *, besides: str = "", pace: Callable[[], None] = no_pace) -> Names:
    """Read which layers are named now: announcements first, the records that they become after; images before volumes,
    the trash before and after the records, jobs after what they read; see `read`. What `besides` names is left out.
    """
    found = Names()
    announced = Index()
    for shard, names in store.listings("volumes"):
        announced.strays += [Stray("volumes", shard, name) for name in names if ".new-" in name]
        pace()
    found.add(announced)

    def parts(ids: Iterable[str], find: Callable[[str], T | None]) -> Iterator[dict[str, T]]:
        others = (record_id for record_id in ids if record_id != besides)
        return _parts(_records(others, find, found.unreadable, pace))

    def entries_of_trash() -> Iterator[dict[str, Deletable]]:
        return _parts(_entries(store, store.trash_ids(), found.unreadable, pace))

    for images in parts(store.image_ids(), store.find_image):
        found.add(Index(images=images))
    for entries in entries_of_trash():
        found.add(Index(trash=entries))
    for volumes in parts(store.volume_ids(), store.find_volume):
        found.add(Index(volumes=volumes))
    for snapshots in parts(store.snapshot_ids(), store.find_snapshot):
        found.add(Index(snapshots=snapshots))
    for entries in entries_of_trash():
        found.add(Index(trash=entries))
    found.add(Index(jobs=dict(_jobs(store, found.unreadable, pace))))
    for layers in parts(store.layer_ids(), store.find_layer):
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


def _entries(
    store: Store, ids: Iterable[str], unreadable: dict[str, str], pace: Callable[[], None]
) -> Iterator[tuple[str, Deletable]]:
    return _records(ids, store.find_trashed, unreadable, pace)


def _jobs(store: Store, unreadable: dict[str, str], pace: Callable[[], None]) -> Iterator[tuple[str, JobRecord]]:
    """Give the records of all jobs. One that cannot be read is put down as `job-<id>`: its id has the form of a layer's
    id, and what a damaged layer record allows must not be done for a damaged job.
    """
    damaged: dict[str, str] = {}
    yield from _records(store.job_ids(), store.find_job, damaged, pace)
    unreadable.update({f"job-{job_id}": detail for job_id, detail in damaged.items()})


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
        name=snapshot.name if job_of_snapshot(snapshot.name) else "",
        source_volume=sys.intern(snapshot.source_volume),
        layer=sys.intern(snapshot.layer),
        next=_shared(snapshot.next),
        content=None,
        created_at=_NO_TIME,
        kubernetes=_NOTHING,
        nonce="",
    )


def _brief_image(image: ImageRecord) -> ImageRecord:
    return replace(
        image,
        id=sys.intern(image.id),
        name="",
        layer=sys.intern(image.layer),
        content=None,
        created_at=_NO_TIME,
        nonce="",
    )


def _brief_entry(entry: Deletable) -> Deletable:
    return _brief_volume(entry) if isinstance(entry, VolumeRecord) else _brief_snapshot(entry)


def _brief_layer(layer: LayerRecord) -> LayerRecord:
    return replace(layer, id=sys.intern(layer.id), parent=_shared(layer.parent), nonce="")
