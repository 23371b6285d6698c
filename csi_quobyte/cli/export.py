"""csi-quobyte export: a volume or snapshot as an image file outside of the pools."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from csi_quobyte.cli import options, progress
from csi_quobyte.cli.opening import open_pools
from csi_quobyte.errors import InvalidArgument, NotFound
from csi_quobyte.host.qemu import ImageFormat, find_tools
from csi_quobyte.operations import exporting
from csi_quobyte.operations.exporting import ExportRequest
from csi_quobyte.pool import records
from csi_quobyte.pool.mount import RequireMount
from csi_quobyte.pool.pools import Pool
from csi_quobyte.pool.sizes import human
from csi_quobyte.pool.store import Store

_ENDINGS: dict[str, ImageFormat] = {".qcow2": "qcow2", ".raw": "raw"}


@click.command()
@click.argument("volume")
@click.argument("file")
@click.option(
    "--snapshot", default="", help="Export this snapshot of VOLUME (its id or CSI name), not what it holds now."
)
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["raw", "qcow2"]),
    help="Format of FILE; needed unless its name ends with .raw or .qcow2.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@options.pools(required=True)
@options.require_mount
@options.qemu_dir
def export(
    volume: str,
    file: str,
    snapshot: str,
    image_format: ImageFormat | None,
    force: bool,
    pool: tuple[str, ...],
    require_mount: RequireMount,
    qemu_dir: str | None,
) -> None:
    """Write what VOLUME (its id, or its CSI name such as pvc-…) holds into FILE, an image that needs no other file.

    FILE gets its name when it is whole; what is interrupted leaves nothing. Without --snapshot VOLUME must not be
    attached. VOLUME and the snapshot can be deleted meanwhile.
    """
    if file == "-":
        raise InvalidArgument("an image cannot be written to standard output: give the name of a file")
    chosen = image_format or _ENDINGS.get(Path(file).suffix.lower())
    if chosen is None:
        raise InvalidArgument(f"say with --format what {file} is to be: its name ends neither with .raw nor .qcow2")
    tools = find_tools(qemu_dir)
    with open_pools(pool, require_mount) as opened:
        store, volume_id, snapshot_id = _found(opened, volume, snapshot)
        request = ExportRequest(volume_id, file, chosen, snapshot=snapshot_id, replace=force)
        with progress.shown(f"export of {snapshot or volume}") as watch:
            size_bytes = exporting.export(store, tools, request, watch)
        if sys.stdout.isatty():
            click.echo(f"{file}: {chosen}, {human(size_bytes)}")
        else:
            found = {"volume": volume_id, "snapshot": snapshot_id or None}
            progress.print_event("done", **found, file=file, image_format=chosen, size_bytes=size_bytes)
        sys.exit(0)  # another pool that could not be opened has nothing to do with it


def _found(opened: Sequence[tuple[Pool, Store]], volume: str, snapshot: str) -> tuple[Store, str, str]:
    """Find what is meant: the pool, the id of the volume and, if one is given, that of the snapshot.

    A snapshot is looked for by itself: its volume may have been deleted.

    Raises:
        NotFound: there is none.
        InvalidArgument: several pools have one of this name.
    """
    found = []
    for _, store in opened:
        volume_id = volume if records.parse_id(volume) else records.volume_id(store.prefix, volume)
        snapshot_id = snapshot if records.parse_id(snapshot) else records.snapshot_id(store.prefix, snapshot)
        if store.find_snapshot(snapshot_id) if snapshot else store.find_volume(volume_id):
            found.append((store, volume_id, snapshot_id if snapshot else ""))
    what = f"snapshot {snapshot!r}" if snapshot else f"volume {volume!r}"
    if not found:
        raise NotFound(f"these pools have no {what}; csi-quobyte ls prints ids and names")
    if len(found) > 1:
        raise InvalidArgument(f"several pools have a {what}: give its id")
    return found[0]
