"""csi-quobyte gc: what the collector of the controller does, by hand."""

import json
from collections.abc import Iterator

import click

from csi_quobyte.cli import options
from csi_quobyte.cli.opening import open_pools
from csi_quobyte.engine import collector
from csi_quobyte.engine.collector import Collected
from csi_quobyte.engine.merging import Plan
from csi_quobyte.host.qemu import find_tools
from csi_quobyte.pool.mount import RequireMount
from csi_quobyte.pool.records import FORMAT
from csi_quobyte.pool.sizes import human


@click.command()
@options.pools(required=True)
@options.require_mount
@options.qemu_dir
@click.option("--merge/--no-merge", default=True, help="Merge layers of deleted snapshots, flatten long chains. [yes]")
@click.option("--dry-run", is_flag=True, help="Only say what could be merged.")
@options.as_json
def gc(
    pool: tuple[str, ...],
    require_mount: RequireMount,
    qemu_dir: str | None,
    merge: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Finish what crashes have left and drop layers that nothing needs, as the controller's collector does by itself.

    Also fold the layers of deleted snapshots into others where that pays. Volumes that are attached, or were a minute
    ago, are left alone.
    """
    tools = find_tools(qemu_dir)
    with open_pools(pool, require_mount) as opened:
        for one, store in opened:
            done: Iterator[Collected | Plan] = (
                iter(collector.plans(store)) if dry_run else collector.collect(store, tools, merges=merge)
            )
            for step in done:
                _print(one.name, step, dry_run, as_json)


def _print(pool: str, step: Collected | Plan, dry_run: bool, as_json: bool) -> None:
    """Print one thing that was or would be done, as a line."""
    if as_json:
        found = vars(step if isinstance(step, Plan) else step.report)
        click.echo(json.dumps({"format": FORMAT, "pool": pool, "dry_run": dry_run, **found}))
    elif isinstance(step, Plan):
        words = "would go" if dry_run else "went"
        what = "head" if step.kind == "flatten" else "layer"
        click.echo(f"pool {pool}: {what} {step.layer} {words} {step.kind} ({human(step.bytes)}), child {step.child}")
    else:
        done = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in vars(step.report).items() if count)
        click.echo(f"pool {pool}: {done}")
