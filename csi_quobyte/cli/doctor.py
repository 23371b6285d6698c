"""csi-quobyte doctor: what this host can do for the driver, and what is in the way."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from csi_quobyte.cli import options
from csi_quobyte.config import PoolSpec, check_pools
from csi_quobyte.errors import DriverError
from csi_quobyte.host.qemu import find_tools, gate
from csi_quobyte.pool.mount import RequireMount, check_mount
from csi_quobyte.pool.pools import Pool
from csi_quobyte.pool.store import Store

TIMEOUT_S = 10.0
_COMMANDS = ("mkfs.ext4", "e2fsck", "resize2fs", "mkfs.xfs", "xfs_growfs", "blkid", "mount", "umount", "prlimit")

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of the result."""

    name: str
    status: Status
    detail: str


@click.command()
@options.pools(required=False)
@options.require_mount
@options.qemu_dir
@options.allow_untested_qemu
@options.as_json
def doctor(
    pool: tuple[str, ...], require_mount: RequireMount, qemu_dir: str | None, allow_untested_qemu: bool, as_json: bool
) -> None:
    """Say what this host can do: QEMU and its version gate, loop, FUSE and nbd, privileges, pools and their locks.

    Exit status 1 when a check fails.
    """
    checks = [*_qemu(qemu_dir, allow_untested_qemu), *_kernel(), *_commands(), *_privileges()]
    specs = options.parse_pools(pool)
    if specs:
        check_pools(specs)
    for spec in specs:
        checks += _pool(spec, require_mount)
    if as_json:
        click.echo(json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            click.echo(f"{check.status:<4}  {check.name:<{width}}  {check.detail}")
    sys.exit(1 if any(check.status == "fail" for check in checks) else 0)


def _qemu(qemu_dir: str | None, allow_untested: bool) -> Iterator[Check]:
    try:
        tools = find_tools(qemu_dir)
    except DriverError as error:
        yield Check("qemu", "fail", str(error))
        return
    yield Check("qemu", "ok", f"{'.'.join(map(str, tools.version))} ({tools.storage_daemon})")
    for data_path in ("fuse", "nbd"):
        reason = gate(tools.version, data_path)
        refused: Status = "warn" if allow_untested or data_path == "nbd" else "fail"
        yield Check(
            f"qemu for {data_path}", refused if reason else "ok", reason or "this version was measured to be right"
        )


def _kernel() -> Iterator[Check]:
    for name, path, needed_for in (("fuse", "/dev/fuse", "qcow2"), ("loop", "/dev/loop-control", "every volume")):
        found = os.path.exists(path)
        yield Check(name, "ok" if found else "fail", path if found else f"{path} is missing: needed for {needed_for}")
    nbd = os.path.isdir("/sys/module/nbd") or os.path.exists("/dev/nbd0")
    yield Check("nbd", "ok" if nbd else "warn", "the kernel has nbd" if nbd else "no nbd; this version does not use it")
    filesystems = Path("/proc/filesystems").read_text(encoding="ascii").split()
    for name in ("ext4", "xfs"):
        found = name in filesystems or os.path.isdir(f"/sys/module/{name}")
        yield Check(
            f"{name} in the kernel", "ok" if found else "warn", "" if found else "not loaded (it may be a module)"
        )


def _commands() -> Iterator[Check]:
    missing = [command for command in _COMMANDS if shutil.which(command) is None]
    yield Check("commands", "fail" if missing else "ok", f"missing: {', '.join(missing)}" if missing else "all there")


def _privileges() -> Iterator[Check]:
    if os.geteuid() != 0:
        yield Check("root", "warn", "not root: enough for the controller, not for the node")
        return
    yield Check("root", "ok", "")
    text = Path("/proc/self/status").read_text(encoding="ascii")
    effective = int(next(line for line in text.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    # capability numbers of linux/capability.h
    for name, number, meaning in (
        ("CAP_SYS_ADMIN", 21, "mounting and loop devices need it"),
        ("CAP_SYS_RESOURCE", 24, "without it ext4 cannot grow while mounted (xfs can)"),
    ):
        has = bool(effective >> number & 1)
        status: Status = "ok" if has else ("fail" if name == "CAP_SYS_ADMIN" else "warn")
        yield Check(name, status, "" if has else meaning)


def _pool(spec: PoolSpec, require_mount: RequireMount) -> Iterator[Check]:
    """Look at one pool: its mount, its format, and what its file system promises."""
    pool = Pool(spec, require_mount=require_mount, timeout_s=TIMEOUT_S)
    name = f"pool {spec.name}"
    health = pool.health(wait_s=TIMEOUT_S)
    if not health.ok:
        yield Check(name, "fail", health.reason)
        return
    yield from _attempt(f"{name} mount", lambda: check_mount(spec.path, "quobyte"), failed="warn", fine=spec.path)
    yield from _attempt(
        f"{name} primitives",
        lambda: pool.run(_try_primitives),
        failed="fail",
        fine="link, rmdir and locks behave; that they hold between hosts too is not tested here",
    )
    total, available = pool.run(lambda store: store.space())
    yield Check(f"{name} space", "ok" if available else "warn", f"{available} of {total} bytes free")


def _try_primitives(store: Store) -> None:
    store.prove_primitives()


def _attempt(name: str, attempt: Callable[[], object], *, failed: Status, fine: str) -> Iterator[Check]:
    try:
        attempt()
    except DriverError as error:
        yield Check(name, failed, str(error))
    else:
        yield Check(name, "ok", fine)
