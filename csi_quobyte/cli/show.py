"""csi-quobyte ls, show and tree: what is in the pools and who refers to what."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from csi_quobyte.cli import options
from csi_quobyte.cli.opening import open_pools
from csi_quobyte.engine import index as index_module
from csi_quobyte.engine.index import Index
from csi_quobyte.engine.space import LayerSpace, Space, space_of
from csi_quobyte.errors import InvalidArgument, NotFound
from csi_quobyte.pool.mount import RequireMount
from csi_quobyte.pool.records import (
    ImageRecord,
    LayerRecord,
    Marker,
    Owning,
    SnapshotRecord,
    VolumeRecord,
    image_id,
    is_layer_id,
    layer_of,
    marker_of,
    parse_id,
    parse_marker,
    snapshot_id,
    volume_id,
)
from csi_quobyte.pool.sizes import human
from csi_quobyte.pool.store import Store

_WIDEST = 1000

_looking = options.combined(options.pools(required=True), options.require_mount, options.as_json)


@click.command()
@_looking
def ls(pool: tuple[str, ...], require_mount: RequireMount, as_json: bool) -> None:
    """List volumes, snapshots and golden images."""
    with open_pools(pool, require_mount) as opened:
        rows = [row for one, store in opened for row in _rows(one.name, store, index_module.read(store))]
        if as_json:
            click.echo(json.dumps({"objects": rows}))
        else:
            _print_objects(rows)


def _print_objects(rows: list[dict[str, Any]]) -> None:
    print_columns(
        ("ID", "NAME", "SIZE", "ALLOCATED", "EXCLUSIVE", "STATE", "NODE", "SOURCE"),
        [
            (
                r["id"],
                r["name"],
                human(r["size_bytes"]),
                human(r["allocated_bytes"]),
                human(r["exclusive_bytes"]),
                r["state"],
                r["node"],
                r["source"],
            )
            for r in rows
        ],
    )


@click.command()
@click.argument("wanted", metavar="ID|NAME")
@_looking
def show(wanted: str, pool: tuple[str, ...], require_mount: RequireMount, as_json: bool) -> None:
    """Show one volume, snapshot, golden image or layer whole: its record, its chain, its files and who refers to it.

    It is given by its id, or by its CSI name such as pvc-…; what is in the trash is shown by csi-quobyte trash ls.
    """
    with open_pools(pool, require_mount) as opened:
        found = [
            {**details, "pool": one.name}
            for one, store in opened
            for record_id in _ids(store, wanted)
            if (details := _details(store, record_id))
        ]
        if not found:
            raise NotFound(f"nothing in these pools has the id or name {wanted}; csi-quobyte ls prints both")
        if len(found) > 1:
            meant = ", ".join(f"{details['id']} in pool {details['pool']}" for details in found)
            raise InvalidArgument(f"{wanted!r} is the name of {meant}: give the id")
        click.echo(json.dumps(found[0], default=_plain) if as_json else _as_text(found[0]))


def _ids(store: Store, wanted: str) -> Sequence[str]:
    """Give the ids that an id or a CSI name may stand for in a pool."""
    if parse_id(wanted) or is_layer_id(wanted):
        return [wanted]
    return [id_of(store.prefix, wanted) for id_of in (volume_id, snapshot_id, image_id)]


@click.command()
@click.argument("volume", required=False)
@_looking
def tree(volume: str | None, pool: tuple[str, ...], require_mount: RequireMount, as_json: bool) -> None:
    """Draw the layers, base first, with what refers to each; those of VOLUME (its id or CSI name) if it is given."""
    with open_pools(pool, require_mount) as opened:
        drawn = 0
        for one, store in opened:
            found = index_module.read(store)
            chosen = _volume_of(found, store.prefix, volume) if volume else None
            if volume and chosen is None:
                continue
            _print_tree(one.name, store, found, _roots(found, chosen), as_json)
            drawn += 1
        if volume and not drawn:
            raise NotFound(f"no volume has the id or name {volume}; csi-quobyte ls prints both")


def _volume_of(found: Index, prefix: str, wanted: str) -> VolumeRecord | None:
    return found.volumes.get(wanted) or found.volumes.get(volume_id(prefix, wanted))


def _print_tree(pool: str, store: Store, found: Index, roots: list[LayerRecord], as_json: bool) -> None:
    children = _children_of(found)
    if as_json:
        nodes = [_as_nodes(store, children, layer, 0) for layer in roots]
        click.echo(json.dumps({"pool": pool, "layers": nodes}, default=_plain))
        return
    drawing = Tree(Text(f"pool {pool}"))
    for layer in roots:
        _draw(store, found, children, layer, drawing, 0)
    _console().print(drawing)


def print_columns(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with columns as wide as they need: ids must stay whole, for copying and for other programs."""
    widths = [max(len(row[at]) for row in (headings, *rows)) for at in range(len(headings))]
    for row in (headings, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _console() -> Console:
    """A console as wide as its terminal; in a pipe so wide that no line is ever cut."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDEST)


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _sizes(space: Space) -> dict[str, int]:
    return {
        "allocated_bytes": space.allocated_bytes,
        "exclusive_bytes": space.exclusive_bytes,
        "shared_bytes": space.shared_bytes,
    }


def _space_in(found: Index, allocated: dict[str, int | None], record: Owning) -> dict[str, int]:
    """Give the space of an object from one reading of the pool."""

    def layer(layer_id: str) -> LayerSpace:
        return LayerSpace(layer_id, allocated.get(layer_id), frozenset(found.refs.get(layer_id, ())))

    chain: list[LayerSpace] = []
    seen: set[str] = set()
    current = found.layers.get(layer_of(record))
    while current and current.id not in seen:
        seen.add(current.id)
        chain.append(layer(current.id))
        current = found.layers.get(current.parent) if current.parent else None
    cache = record.cache if isinstance(record, SnapshotRecord) else None
    return _sizes(space_of(marker_of(record), chain, layer(cache) if cache else None))


def space_now(store: Store, record: Owning) -> dict[str, int]:
    """Give the space of one object, also one in the trash, from its chain alone."""
    chain = _chain(store, layer_of(record))
    layers = [
        LayerSpace(one["layer"], one.get("allocated_bytes"), frozenset(one.get("references") or ())) for one in chain
    ]
    cache_id = record.cache if isinstance(record, SnapshotRecord) and record.trash is None else None
    cache = store.find_layer(cache_id) if cache_id else None
    length = store.image_bytes(cache) if cache else None
    own = LayerSpace(cache.id, length and length[1], frozenset(store.markers(cache.id) or ())) if cache else None
    return _sizes(space_of(marker_of(record), layers, own))


def _rows(pool: str, store: Store, found: Index) -> Iterator[dict[str, Any]]:
    lengths = {layer.id: store.image_bytes(layer) for layer in found.layers.values()}
    allocated = {layer_id: length[1] if length else None for layer_id, length in lengths.items()}
    for volume in found.volumes.values():
        yield {
            "pool": pool,
            "kind": "volume",
            "id": volume.id,
            "name": volume.name,
            "size_bytes": volume.size_bytes,
            **_space_in(found, allocated, volume),
            "state": str(volume.state),
            "node": ", ".join(attachment.node for attachment in volume.attachments),
            "source": volume.source.id if volume.source else "",
        }
    for snapshot in found.snapshots.values():
        yield {
            "pool": pool,
            "kind": "snapshot",
            "id": snapshot.id,
            "name": snapshot.name,
            "size_bytes": snapshot.size_bytes,
            **_space_in(found, allocated, snapshot),
            "state": str(snapshot.state),
            "node": "",
            "source": snapshot.source_volume,
        }
    for image in found.images.values():
        yield {
            "pool": pool,
            "kind": "image",
            "id": image.id,
            "name": image.name,
            "size_bytes": image.size_bytes,
            **_space_in(found, allocated, image),
            "state": str(image.state),
            "node": "",
            "source": "",
        }
    for record_id, detail in found.unreadable.items():
        yield {"pool": pool, "kind": "damaged", "id": record_id, "name": "", "size_bytes": 0, **_sizes(Space(0, 0))} | {
            "state": "unreadable",
            "node": "",
            "source": detail,
        }


def _details(store: Store, record_id: str) -> dict[str, Any] | None:
    """Give everything about one object, None when there is none of this id."""
    record: VolumeRecord | SnapshotRecord | ImageRecord | LayerRecord | None
    record = store.find_volume(record_id) or store.find_snapshot(record_id) or store.find_image(record_id)
    record = record or store.find_layer(record_id)
    if record is None:
        return None
    details = asdict(record)
    match record:
        case VolumeRecord():
            details["content"] = store.content(record)
            details["chain"] = list(_chain(store, record.head))
            details |= space_now(store, record)
            if record.pinned:
                details["copy"] = store.progress(record.head) or "waits for its turn, or the next look of the collector"
        case SnapshotRecord() | ImageRecord():
            details["chain"] = list(_chain(store, record.layer))
            details |= space_now(store, record)
        case LayerRecord():
            details["references"] = store.markers(record.id)
            details["chain"] = list(_chain(store, record.id))
    return details


def _chain(store: Store, layer_id: str | None) -> Iterator[dict[str, Any]]:
    """Give the layers from a head down, as far as their records can be found."""
    seen: set[str] = set()
    while layer_id and layer_id not in seen:
        seen.add(layer_id)
        layer = store.find_layer(layer_id)
        if layer is None:
            yield {"layer": layer_id, "missing": True}
            return
        yield _layer_details(store, layer)
        layer_id = layer.parent


def _layer_details(store: Store, layer: LayerRecord) -> dict[str, Any]:
    length = store.image_bytes(layer)
    return {
        "layer": layer.id,
        "state": str(layer.state),
        "format": layer.format,
        "size_bytes": layer.size_bytes,
        "allocated_bytes": length[1] if length else None,
        "path": store.image_path(layer),
        "references": store.markers(layer.id),
    }


def _as_text(details: dict[str, Any]) -> str:
    lines = [
        f"{key}: {_plain(value)}" for key, value in details.items() if key != "chain" and value not in (None, "", {})
    ]
    lines.append("chain, head first:")
    for layer in details["chain"]:
        lines.append("  " + ", ".join(f"{key} {value}" for key, value in layer.items()))
    return "\n".join(lines)


def _roots(found: Index, volume: VolumeRecord | None) -> list[LayerRecord]:
    """Give the layers to begin drawing with: all bases, or the base of one volume."""
    if volume is None:
        return [layer for layer in found.layers.values() if layer.parent not in found.layers]
    layer = found.layers.get(volume.head)
    seen: set[str] = set()
    while layer and layer.parent in found.layers and layer.id not in seen:
        seen.add(layer.id)
        layer = found.layers[layer.parent] if layer.parent else None
    return [layer] if layer else []


_Children = Mapping[str, Sequence[LayerRecord]]


def _children_of(found: Index) -> _Children:
    children = defaultdict[str, list[LayerRecord]](list)
    for layer in found.layers.values():
        if layer.parent:
            children[layer.parent].append(layer)
    return children


def _who(found: Index, layer: LayerRecord) -> list[str]:
    """Name what refers to a layer, other than its children: "volume pvc-1", "snapshot snap-1"."""
    names = []
    for text in found.refs.get(layer.id, []):
        marker = parse_marker(text)
        if marker and marker.kind == "v":
            volume = found.volumes.get(marker.id)
            if volume and volume.uid == marker.uid:
                names.append(f"volume {volume.name} ({human(volume.size_bytes)})")
            else:
                names.append(_gone(found, "volume", marker))
        elif marker and marker.kind == "s":
            snapshot = found.snapshots.get(marker.id)
            is_it = snapshot and snapshot.uid == marker.uid
            names.append(f"snapshot {snapshot.name}" if snapshot and is_it else _gone(found, "snapshot", marker))
        elif marker and marker.kind == "i":
            image = found.images.get(marker.id)
            names.append(f"image {image.name if image else marker.id}")
        elif marker and (job := found.jobs.get(marker.id)):
            names.append(job.what)
    return names


def _gone(found: Index, kind: str, marker: Marker) -> str:
    """Name what has a marker and no record: it is in the trash, or a marker was left behind."""
    entry = found.trash.get(marker.owners[-1])
    return f"{kind} {entry.name} (in the trash)" if entry else f"{kind} {marker.id} (no such record)"


_DEEPEST = 200


def _draw(store: Store, found: Index, children: _Children, layer: LayerRecord, branch: Tree, depth: int) -> None:
    length = store.image_bytes(layer)
    used = human(length[1]) if length else "file missing"
    who = ", ".join(_who(found, layer))
    label = f"{layer.id} {layer.state} {layer.format} {human(layer.size_bytes)} ({used} used)"
    below = branch.add(Text(f"{label}{'  <- ' + who if who else ''}"))
    if depth < _DEEPEST:
        for child in children.get(layer.id, ()):
            _draw(store, found, children, child, below, depth + 1)


def _as_nodes(store: Store, children: _Children, layer: LayerRecord, depth: int) -> dict[str, Any]:
    below = children.get(layer.id, ()) if depth < _DEEPEST else ()
    return _layer_details(store, layer) | {
        "children": [_as_nodes(store, children, child, depth + 1) for child in below]
    }
