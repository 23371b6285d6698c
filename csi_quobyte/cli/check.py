"""csi-quobyte check: is everything in the pools as the records say?"""

import json
import sys
from collections.abc import Callable, Iterable

import click

from csi_quobyte.cli import options
from csi_quobyte.cli.opening import open_pools
from csi_quobyte.engine import repair as repairing
from csi_quobyte.engine.check import CheckImage, Finding, Result
from csi_quobyte.engine.check import check as check_store
from csi_quobyte.engine.repair import Outcome
from csi_quobyte.errors import InvalidArgument
from csi_quobyte.host import qemu_img
from csi_quobyte.host.qemu import QemuTools, find_tools
from csi_quobyte.pool.mount import RequireMount
from csi_quobyte.pool.records import FORMAT
from csi_quobyte.pool.store import Store


@click.command()
@options.pools(required=True)
@options.require_mount
@options.qemu_dir
@click.option(
    "--repair", is_flag=True, help="Say what could be put right; do it with --yes, or when a terminal says so."
)
@click.option("--yes", is_flag=True, help="With --repair: do it without asking.")
@options.as_json
def check(
    pool: tuple[str, ...],
    require_mount: RequireMount,
    qemu_dir: str | None,
    repair: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Look for orphans, dangling references, wrong sizes, damaged images and unreadable records; changes nothing.

    With --repair it also says what could be done about each finding, and with --yes it does that: what is certain is
    put right, what would be a guess is left as it is. Images that are in use are not touched.

    Exit status 1 when something was found, with --repair --yes when something is left.
    """
    if yes and not repair:
        raise InvalidArgument("--yes is for --repair")
    tools = find_tools(qemu_dir)
    check_image = _image_checker(tools)
    is_clean = True
    with open_pools(pool, require_mount) as opened:
        for one, store in opened:
            if repair:
                is_clean &= _repair(one.name, store, tools, check_image, yes=yes, as_json=as_json)
            else:
                result = check_store(store, check_image)
                _print(one.name, result, as_json)
                is_clean &= not result.findings
    sys.exit(0 if is_clean else 1)


def _repair(name: str, store: Store, tools: QemuTools, check_image: CheckImage, *, yes: bool, as_json: bool) -> bool:
    """Say what can be done in one pool, and do it if that is wanted; gives whether nothing is left."""
    is_wanted = yes
    if not yes:
        planned = repairing.plan(store, tools, check_image)
        _print_outcome(name, planned, dry_run=True, as_json=as_json)
        possible = sum(action.action != "none" for action in planned.actions)
        is_wanted = bool(possible) and not as_json and sys.stdin.isatty() and sys.stdout.isatty()
        if not is_wanted:
            if possible and not as_json:
                click.echo("nothing was changed; csi-quobyte check --repair --yes does what it would do")
            return not planned.before.findings
        if not click.confirm(f"Do these {possible} things in pool {name}?"):
            return False
    done = repairing.repair(store, tools, check_image)
    _print_outcome(name, done, dry_run=False, as_json=as_json)
    return not done.after.findings


def _image_checker(tools: QemuTools) -> Callable[[str, str], tuple[int, int]]:
    def check_image(path: str, image_format: str) -> tuple[int, int]:
        if image_format != "qcow2":
            return 0, 0  # every content of a raw file is right
        found = qemu_img.check(tools, path, "qcow2")
        return found.errors + found.corruptions, found.leaks

    return check_image


def _print_outcome(name: str, outcome: Outcome, *, dry_run: bool, as_json: bool) -> None:
    """Print what was or would be done about the findings of a pool, and what is left."""
    if as_json:
        actions = [vars(action) for action in outcome.actions]
        done = {"dry_run": dry_run, "skipped_live": outcome.skipped_live, "actions": actions}
        click.echo(json.dumps({**_as_json(name, outcome.after), "repair": done}))
        return
    for action in outcome.actions:
        where = " ".join(part for part in (action.id, action.path) if part)
        if action.action == "none":
            words = "left as it is"
        elif dry_run:
            words = f"would {action.action}"
        else:
            words = f"{action.action}: {'done' if action.done else 'NOT DONE'}"
        click.echo(f"{action.kind}: {where}: {words}: {action.reason}")
    told = {(action.kind, action.id, action.path) for action in outcome.actions if dry_run or not action.done}
    _print_findings(one for one in outcome.after.findings if (one.kind, one.id, one.path) not in told)
    _print_sum(name, outcome.after)


def _as_json(name: str, result: Result) -> dict[str, object]:
    return {
        "format": FORMAT,
        "pool": name,
        "checked": {"volumes": result.volumes, "snapshots": result.snapshots, "layers": result.layers},
        "skipped_live": result.skipped_live,
        "findings": [_as_object(finding) for finding in result.findings],
    }


def _print(name: str, result: Result, as_json: bool) -> None:
    """Print one pool's result: one JSON object, or a line for each finding and a sum."""
    if as_json:
        click.echo(json.dumps(_as_json(name, result)))
        return
    _print_findings(result.findings)
    _print_sum(name, result)


def _print_findings(findings: Iterable[Finding]) -> None:
    for finding in findings:
        where = " ".join(part for part in (finding.id, finding.path) if part)
        click.echo(f"{finding.severity}: {finding.kind}: {where}: {finding.detail}")


def _print_sum(name: str, result: Result) -> None:
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
