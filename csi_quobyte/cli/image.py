"""csi-quobyte image: golden images, which volumes are made from (`sourceImage`)."""

import json
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import click

from csi_quobyte.cli import options, progress
from csi_quobyte.cli.opening import open_pools
from csi_quobyte.cli.show import print_columns
from csi_quobyte.errors import InvalidArgument, NotFound
from csi_quobyte.host.qemu import find_tools
from csi_quobyte.host.qemu_img import ForeignFormat
from csi_quobyte.operations import golden
from csi_quobyte.operations.golden import ImportRequest
from csi_quobyte.pool.mount import RequireMount
from csi_quobyte.pool.records import FORMAT
from csi_quobyte.pool.sizes import human
from csi_quobyte.pool.store import Store

_NAME_BYTES = 128
_PAUSE_S = 0.1
_ENDINGS: dict[str, ForeignFormat] = {".qcow2": "qcow2", ".raw": "raw"}


@contextmanager
def opened(name: str, texts: tuple[str, ...], require_mount: RequireMount) -> Iterator[Store]:
    """Open the pool of a name.

    Raises:
        NotFound: there is no such pool among those of --pool.
    """
    wanted = [text for text in texts if text.partition("=")[0] == name]
    if not wanted:
        known = ", ".join(text.partition("=")[0] for text in texts)
        raise NotFound(f"there is no pool {name!r}; known by --pool: {known}")
    with open_pools(wanted, require_mount) as found:
        for _, store in found:
            yield store
            store.close()


@click.group()
def image() -> None:
    """Golden images, from which volumes are made by the parameter sourceImage."""


@image.command(name="import")
@click.argument("pool_name", metavar="POOL")
@click.argument("name")
@click.argument("file")
@click.option(
    "--source-format",
    type=click.Choice(get_args(ForeignFormat)),
    help="What FILE is; needed unless its name ends with .qcow2 or .raw. It is never guessed from the contents.",
)
@options.pools(required=True)
@options.require_mount
@options.qemu_dir
def import_(
    pool_name: str,
    name: str,
    file: str,
    source_format: ForeignFormat | None,
    pool: tuple[str, ...],
    require_mount: RequireMount,
    qemu_dir: str | None,
) -> None:
    """Make FILE (- is standard input) the golden image NAME of POOL.

    It is rewritten into a plain qcow2 image. A file that needs another one (a backing or data file), is encrypted or
    has internal snapshots is refused. What is interrupted leaves nothing.
    """
    if not 0 < len(name.encode()) <= _NAME_BYTES:
        raise InvalidArgument(f"the name of an image has 1 to {_NAME_BYTES} bytes")
    chosen = source_format or _ENDINGS.get(Path(file).suffix.lower())
    if chosen is None:
        raise InvalidArgument(f"say with --source-format what {file} is: its name ends neither with .qcow2 nor .raw")
    request = ImportRequest(
        name=name,
        format=chosen,
        path=file,
        read=_read_stdin if file == "-" else None,
    )
    tools = find_tools(qemu_dir)
    with opened(pool_name, pool, require_mount) as store, progress.shown(f"import of {name}") as watch:
        made = golden.import_image(store, tools, request, watch)
    if sys.stdout.isatty():
        click.echo(f"image {name} of pool {pool_name}: {human(made.size_bytes)}")
    else:
        progress.print_event("done", id=made.id, name=name, size_bytes=made.size_bytes, layer=made.layer)


def _read_stdin(length: int) -> bytes | None:
    """Read what has come; None if nothing does for a moment, so that a stream that has stopped can be given up."""
    ready, _, _ = select.select([sys.stdin], [], [], _PAUSE_S)
    return os.read(sys.stdin.fileno(), length) if ready else None


@image.command()
@options.pools(required=True)
@options.require_mount
@options.as_json
def ls(pool: tuple[str, ...], require_mount: RequireMount, as_json: bool) -> None:
    """List the golden images of all pools."""
    with open_pools(pool, require_mount) as found:
        rows: list[dict[str, Any]] = [
            {
                "pool": one.name,
                "name": made.name,
                "id": made.id,
                "size_bytes": made.size_bytes,
                "created_at": made.created_at.isoformat(timespec="seconds"),
            }
            for one, store in found
            for made in golden.list_images(store)
        ]
        if as_json:
            click.echo(json.dumps({"format": FORMAT, "images": rows}))
            return
        print_columns(
            ("POOL", "NAME", "SIZE", "CREATED", "ID"),
            [(r["pool"], r["name"], human(r["size_bytes"]), r["created_at"], r["id"]) for r in rows],
        )


@image.command()
@click.argument("pool_name", metavar="POOL")
@click.argument("name")
@options.pools(required=True)
@options.require_mount
def rm(pool_name: str, name: str, pool: tuple[str, ...], require_mount: RequireMount) -> None:
    """Remove the golden image NAME of POOL. Volumes that were made from it stay whole."""
    with opened(pool_name, pool, require_mount) as store:
        golden.remove_image(store, name)
