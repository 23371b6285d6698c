"""csi-quobyte trash: what was deleted and is kept, and what becomes of it."""

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import click

from csi_quobyte.cli import options
from csi_quobyte.cli.opening import open_pools
from csi_quobyte.cli.show import print_columns, space_now
from csi_quobyte.engine import trash as engine
from csi_quobyte.errors import Busy, Corrupt, NotFound
from csi_quobyte.pool import records
from csi_quobyte.pool.mount import RequireMount
from csi_quobyte.pool.pools import Pool
from csi_quobyte.pool.records import FORMAT, Deletable, VolumeRecord
from csi_quobyte.pool.sizes import human
from csi_quobyte.pool.store import Store
from csi_quobyte.rpc import convert

_pools = options.combined(options.pools(required=True), options.require_mount)


@click.group()
def trash() -> None:
    """What was deleted under onDelete trash or retain: list it, bring it back, or give it up for good."""


@trash.command()
@_pools
@options.as_json
def ls(pool: tuple[str, ...], require_mount: RequireMount, as_json: bool) -> None:
    """List what is in the trash, with the ids that restore and purge take."""
    with open_pools(pool, require_mount) as opened:
        rows = [row for one, _ in opened for row in one.run(partial(_rows, one.name))]
        if as_json:
            click.echo(json.dumps({"format": FORMAT, "entries": rows}))
            return
        print_columns(
            ("ID", "NAME", "CLAIM", "SIZE", "EXCLUSIVE", "STATE", "DELETED", "EXPIRES"),
            [
                (
                    r["id"],
                    r["name"],
                    r["claim"],
                    human(r["size_bytes"]),
                    human(r["exclusive_bytes"]),
                    r["state"],
                    r["deleted_at"],
                    r["expires_at"],
                )
                for r in rows
            ],
        )


def _rows(pool: str, store: Store) -> list[dict[str, Any]]:
    return [_row(pool, entry_id, store) for entry_id in store.trash_ids()]


def _row(pool: str, entry_id: str, store: Store) -> dict[str, Any]:
    row = {"pool": pool, "id": entry_id, "kind": "damaged", "name": "", "claim": "", "size_bytes": 0}
    row |= {
        "allocated_bytes": 0,
        "exclusive_bytes": 0,
        "shared_bytes": 0,
        "state": "unreadable",
        "deleted_at": "",
        "expires_at": "",
    }
    try:
        entry = store.find_trashed(entry_id)
    except Corrupt:
        return row
    if entry is None or entry.trash is None:
        return row
    expires_at = entry.trash.expires_at
    return row | {
        "kind": entry.kind,
        "name": entry.name,
        "claim": _claim(entry),
        "size_bytes": entry.size_bytes,
        **space_now(store, entry),
        "state": str(entry.trash.state),
        "deleted_at": entry.trash.deleted_at.isoformat(timespec="seconds"),
        "expires_at": expires_at.isoformat(timespec="seconds") if expires_at else "never",
    }


def _claim(entry: Deletable) -> str:
    """Name what it was in Kubernetes: namespace/name of the claim or of the VolumeSnapshot, if the sidecars said."""
    kind = "pvc" if isinstance(entry, VolumeRecord) else "volumesnapshot"
    names = [entry.kubernetes.get(f"{kind}/{part}", "") for part in ("namespace", "name")]
    return "/".join(name for name in names if name)


@trash.command()
@click.argument("entry_id", metavar="ID")
@click.option("--name", default="", help="CSI name to restore it under, if its own is taken.")
@_pools
@options.as_json
def restore(entry_id: str, name: str, pool: tuple[str, ...], require_mount: RequireMount, as_json: bool) -> None:
    """Bring a volume or snapshot back, with all that it held. The handle that it prints is for a static
    PersistentVolume or VolumeSnapshotContent (docs/kubernetes.md, "Deleted by mistake").
    """
    checked = convert.name(name, "restored object") if name else ""
    with open_pools(pool, require_mount) as opened:
        one = _owner(opened, entry_id)
        made = one.run(lambda store: engine.restore(store, entry_id, checked))
        if as_json:
            found = {"kind": made.kind, "id": made.id, "name": made.name, "size_bytes": made.size_bytes}
            click.echo(json.dumps({"format": FORMAT, "pool": one.name, "entry": entry_id, **found}))
            return
        handle = "volumeHandle" if isinstance(made, VolumeRecord) else "snapshotHandle"
        click.echo(f"{made.kind} {made.name} is back, {human(made.size_bytes)}\n{handle}: {made.id}")


@trash.command()
@click.argument("entry_ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that is in the trash.")
@click.option("--expired", is_flag=True, help="Only what has been kept for long enough.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_pools
@options.as_json
def purge(
    entry_ids: tuple[str, ...],
    everything: bool,
    expired: bool,
    yes: bool,
    pool: tuple[str, ...],
    require_mount: RequireMount,
    as_json: bool,
) -> None:
    """Give up for good what is in the trash. On a terminal it asks first. The controller frees the space at its next
    look, about every five minutes; csi-quobyte gc does it at once.
    """
    if sum((bool(entry_ids), everything, expired)) != 1:
        raise click.UsageError("give either ids, or --all, or --expired")
    with open_pools(pool, require_mount) as opened:
        chosen = [(_owner(opened, entry_id), entry_id) for entry_id in entry_ids] or [
            (one, entry_id) for one, _ in opened for entry_id in one.run(partial(_ids, expired=expired))
        ]
        if chosen and sys.stdin.isatty() and not yes:
            click.confirm(f"Purge {len(chosen)} of what was deleted, for good?", abort=True, err=True)
        if _purge_each(chosen, as_json):
            sys.exit(1)


def _ids(store: Store, *, expired: bool) -> list[str]:
    if not expired:
        return list(store.trash_ids())
    return [entry_id for entry_id, entry in _readable(store) if engine.is_expired(entry, records.now())]


def _readable(store: Store) -> Iterator[tuple[str, Deletable]]:
    for entry_id in store.trash_ids():
        try:
            entry = store.find_trashed(entry_id)
        except Corrupt:
            continue
        if entry:
            yield entry_id, entry


def _purge_each(chosen: Sequence[tuple[Pool, str]], as_json: bool) -> int:
    """Purge one after the other; gives how many could not be."""
    failed = 0
    for one, entry_id in chosen:
        try:
            one.run(partial(engine.purge, entry_id=entry_id))
        except (NotFound, Busy, Corrupt) as error:
            failed += 1
            click.echo(f"csi-quobyte: {error}", err=True)
            continue
        if as_json:
            click.echo(json.dumps({"format": FORMAT, "pool": one.name, "purged": entry_id}))
        else:
            click.echo(f"purged {entry_id}")
    return failed


def _owner(opened: Sequence[tuple[Pool, Store]], entry_id: str) -> Pool:
    """Give the pool that an id names.

    Raises:
        NotFound: it is none of these.
    """
    for one, store in opened:
        if entry_id.startswith(f"{store.prefix}-"):
            return one
    raise NotFound(f"nothing in the trash of these pools has the id {entry_id}; csi-quobyte trash ls prints the ids")
