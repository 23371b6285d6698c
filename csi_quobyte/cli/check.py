"""csi-quobyte check: is everything in the pools as the records say?"""

import json
import sys
from collections.abc import Callable

import click

from csi_quobyte.cli import options
from csi_quobyte.cli.opening import open_pools
from csi_quobyte.engine.check import Finding, Result
from csi_quobyte.engine.check import check as check_store
from csi_quobyte.host import qemu_img
from csi_quobyte.host.qemu import QemuTools, find_tools
from csi_quobyte.pool.mount import RequireMount
from csi_quobyte.pool.records import FORMAT


@click.command()
@options.pools(required=True)
@options.require_mount
@options.qemu_dir
@options.as_json
def check(pool: tuple[str, ...], require_mount: RequireMount, qemu_dir: str | None, as_json: bool) -> None:
    """Look for orphans, dangling references, wrong sizes, damaged images and unreadable records; changes nothing.

    Exit status 1 when something was found.
    """
    check_image = _image_checker(find_tools(qemu_dir))
    with open_pools(pool, require_mount) as opened:
        results = [(one.name, check_store(store, check_image)) for one, store in opened]
        for name, result in results:
            _print(name, result, as_json)
    sys.exit(1 if any(result.findings for _, result in results) else 0)


def _image_checker(tools: QemuTools) -> Callable[[str, str], tuple[int, int]]:
    def check_image(path: str, image_format: str) -> tuple[int, int]:
        if image_format != "qcow2":
            return 0, 0  # every content of a raw file is right
        found = qemu_img.check(tools, path, "qcow2")
        return found.errors + found.corruptions, found.leaks

    return check_image


def _print(name: str, result: Result, as_json: bool) -> None:
    """Print one pool's result: one JSON object, or a line for each finding and a sum."""
    if as_json:
        click.echo(
            json.dumps(
                {
                    "format": FORMAT,
                    "pool": name,
                    "checked": {"volumes": result.volumes, "snapshots": result.snapshots, "layers": result.layers},
                    "skipped_live": result.skipped_live,
                    "findings": [_as_object(finding) for finding in result.findings],
                }
            )
        )
        return
    for finding in result.findings:
        where = " ".join(part for part in (finding.id, finding.path) if part)
        click.echo(f"{finding.severity}: {finding.kind}: {where}: {finding.detail}")
    click.echo(
        f"pool {name}: {result.volumes} volumes, {result.snapshots} snapshots, {result.layers} layers checked "
        f"({result.skipped_live} in use, not opened): {len(result.findings) or 'no'} findings"
    )


def _as_object(finding: Finding) -> dict[str, object]:
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "id": finding.id,
        "path": finding.path,
        "detail": finding.detail,
        "repairable": finding.repairable,
    }
