"""The mount table of this machine, and mounting.

Owns: every mount and unmount that the driver makes (through mount(8) and umount(8)), and reading
/proc/self/mountinfo.
Hides: octal escapes, stacked mounts, the search for what keeps a mount busy, the decision when to unmount lazily.

What always holds:
- A question about the mount table never touches a mounted filesystem: it is answered from /proc, so it cannot hang
  with a server that does not answer. For the same reason the commands get --no-canonicalize.
- Targets are absolute and normalised, and a mount that a symbolic link would have led elsewhere is undone.
- Nothing is mounted over a mount point, so a retry cannot stack a second mount on the first.
"""

import enum
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from csi_quobyte.errors import InvalidArgument, Refused, Unavailable
from csi_quobyte.host import command

MOUNT_TIMEOUT_S = 60.0
"""A first mount replays the journal, which on a slow pool reads and writes up to a few hundred MiB."""
_BIND_TIMEOUT_S = 10.0
"""A bind mount does no I/O on a device, only a path lookup."""
_LAZY_TIMEOUT_S = 5.0
"""Lazy unmounting only detaches: it does not ask the filesystem."""
_LIVENESS_TIMEOUT_S = 2.0
"""statfs and one block: a server that needs longer than this is treated as dead."""
_MAX_STACKED = 32
"""More mounts on one target than anybody stacks; a bound for the loop that removes them."""
_LOOP_MAJOR = "7:"  # Documentation/admin-guide/devices.txt
_OF_THE_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/usr", "/etc")
"""Where programs come from: what is mounted there stays in sight of them."""

_OCTAL_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5))."""

    target: str
    source: str
    fstype: str
    root: str
    """Which part of the filesystem is mounted: "/" unless it is a bind mount of something in it."""
    options: frozenset[str]
    """Options of this mount point; of two bind mounts of one filesystem only one may be "ro"."""
    super_options: frozenset[str]
    """Options of the filesystem, the same for all its mount points."""
    major_minor: str
    mount_id: int
    parent_id: int


class Unmounted(enum.Enum):
    """How a target became free."""

    NOT_MOUNTED = "not mounted"
    CLEAN = "clean"
    LAZY = "lazy"
    """Gone from the mount table, but the filesystem lives on until its last user ends: its device is not free yet."""


def table() -> list[Mount]:
    """Return all mounts of this process's mount namespace."""
    # Paths are bytes to the kernel; surrogateescape brings every one of them through unchanged.
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    return [_parse_line(line) for line in text.splitlines()]


def at(path: str) -> Mount | None:
    """Return the mount that is visible at exactly this path (of stacked ones the top), None if it is no mount point.

    The path itself is not touched. It must be absolute and without symbolic links, as the kernel prints it.
    """
    return _top([mount for mount in table() if mount.target == path])


def of_device(major_minor: str) -> list[Mount]:
    """Return the mounts of the filesystem on this block device ("7:0"), bind mounts included."""
    return [mount for mount in table() if mount.major_minor == major_minor]


def mount(source: str, target: str, *, fstype: str, options: Sequence[str], timeout_s: float = MOUNT_TIMEOUT_S) -> None:
    """Mount a filesystem on an existing directory.

    Unless the options say "ro", a device that turns out to be write-protected is an error and not a quiet
    read-only mount, as it would be by default.

    Raises:
        InvalidArgument: `target` is not absolute and normalised.
        Refused: something is mounted there already, or a symbolic link leads elsewhere (nothing is left mounted).
        Unavailable: mount(8) failed, nothing is mounted; CommandTimedOut: it may yet become mounted.
    """
    _check_free(target)
    mode = "--read-only" if "ro" in options else "--read-write"
    argv = ["mount", "-n", "--no-canonicalize", "--internal-only", mode, "-t", fstype]
    if options:
        argv += ["-o", ",".join(options)]
    _mount([*argv, "--", source, target], timeout_s)
    _check_landed(target)


def bind(source: str, target: str, *, read_only: bool) -> None:
    """Make a file or directory visible at an existing target of the same kind; mounts below `source` stay behind.

    Flags of the source's mount (nosuid, noexec …) carry over. A crash between the two steps of a read-only bind leaves
    a writable one, which `at(target).options` shows.

    Raises:
        InvalidArgument: a path is not absolute and normalised.
        Refused: something is mounted at the target already, or a symbolic link leads elsewhere.
        Unavailable: mount(8) failed; nothing is mounted at the target.
    """
    _check_path(source)
    _check_free(target)
    _mount(["mount", "-n", "--no-canonicalize", "--bind", "--", source, target], _BIND_TIMEOUT_S)
    _check_landed(target)
    if not read_only:
        return
    try:
        # Its own step, because mount(2) ignores MS_RDONLY when it makes a bind mount.
        _mount(["mount", "-n", "--no-canonicalize", "-o", "remount,bind,ro", target], _BIND_TIMEOUT_S)
    except Unavailable:
        unmount(target, timeout_s=_BIND_TIMEOUT_S, lazy_after=True)
        raise


def unmount(target: str, *, timeout_s: float, lazy_after: bool) -> Unmounted:
    """Unmount everything that is mounted at the target, top first; not being mounted is success.

    Each mount is unmounted plainly, so that its data reaches the device. With `lazy_after`, one that is not done in
    time, or is busy while its server or device is dead, is detached lazily instead; a busy one that works never is.
    Returns within `timeout_s` plus about ten seconds.

    Raises:
        InvalidArgument: `target` is not absolute and normalised.
        Refused: a working filesystem is in use; the message names by whom, as far as /proc shows it.
        Unavailable: not done in time, or dead and busy, and `lazy_after` is false; the outcome is unknown.
    """
    _check_path(target)
    deadline = time.monotonic() + timeout_s
    outcome = Unmounted.NOT_MOUNTED
    for _ in range(_MAX_STACKED):
        found = at(target)
        if found is None:
            return outcome
        clean = _unmount_plainly(found, max(0.1, deadline - time.monotonic()), lazy_after=lazy_after)
        if not clean:
            # umount(2) detaches first and writes afterwards: one that hangs may have left the table already.
            if not _is_gone(found):
                command.run(["umount", "-n", "--no-canonicalize", "--lazy", "--", target], timeout_s=_LAZY_TIMEOUT_S)
            outcome = Unmounted.LAZY
        elif outcome is Unmounted.NOT_MOUNTED:
            outcome = Unmounted.CLEAN
    raise Unavailable(f"{target}: still a mount point after {_MAX_STACKED} unmounts; something keeps mounting there")


def out_of_reach_of_servers(argv: Sequence[str]) -> list[str]:
    """Return the command line that runs `argv` where no mount of a server is: one that hangs cannot hang it then.

    It runs in a mount namespace of its own, from which FUSE and network mounts are detached first (lazily, which asks
    no server). For tools that look at every mount point, mkfs.xfs above all. Other volumes are detached there, too:
    while the tool hangs on its own device, its copies of their mounts would keep them from being freed.
    """
    servers = [mount.target for mount in table() if _is_served(mount) or _is_on_loop(mount)]
    # Constant text: the targets and the command are its arguments, never read as shell.
    script = 'while [ "$1" != -- ]; do umount -n -l --no-canonicalize -- "$1" || :; shift; done; shift; exec "$@"'
    # The deepest first; "sh" after the script is its $0.
    return [
        *("unshare", "--mount", "--propagation", "private", "--", "sh", "-c", script, "sh"),
        *sorted(servers, key=len, reverse=True),
        "--",
        *argv,
    ]


def _is_served(mount: Mount) -> bool:
    kind = mount.fstype.partition(".")[0]
    return kind in {"fuse", "fuseblk", "nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "glusterfs", "lustre", "afs"}


def _is_on_loop(mount: Mount) -> bool:
    """Say whether a mount is one of a loop device, and none that programs come from."""
    is_of_system = any(f"{mount.target}/".startswith(f"{directory}/") for directory in _OF_THE_SYSTEM)
    return mount.major_minor.startswith(_LOOP_MAJOR) and mount.target != "/" and not is_of_system


def users_of(path: str, *, limit: int = 5) -> list[str]:
    """Name up to `limit` processes that have a file at or below `path` open, or run or work there: "pid 12 (fio)".

    Only what /proc shows in this mount namespace; the path itself is not touched.
    """
    found: list[str] = []
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        if any(link == path or link.startswith(path + "/") for link in _links(pid)):
            found.append(f"pid {pid} ({_name_of(pid)})")
        if len(found) == limit:
            break
    return found


def _parse_line(line: str) -> Mount:
    fields = line.split(" ")
    # After the six fixed fields come optional ones, then "-"; an optional field always contains more than that.
    separator = fields.index("-", 6)
    fstype, source, super_options = fields[separator + 1 : separator + 4]
    return Mount(
        target=_unescape(fields[4]),
        source=_unescape(source),
        fstype=fstype,
        root=_unescape(fields[3]),
        options=frozenset(fields[5].split(",")),
        super_options=frozenset(_unescape(super_options).split(",")),
        major_minor=fields[2],
        mount_id=int(fields[0]),
        parent_id=int(fields[1]),
    )


def _unescape(text: str) -> str:
    return _OCTAL_ESCAPE.sub(lambda match: chr(int(match.group(1), 8)), text)


def _top(stacked: list[Mount]) -> Mount | None:
    # By parenthood and not by order: a mount stacked on another is its child, while ids are used again.
    covered = {mount.parent_id for mount in stacked}
    uncovered = [mount for mount in stacked if mount.mount_id not in covered]
    return uncovered[-1] if uncovered else None


def _check_path(path: str) -> None:
    if not path.startswith("/") or path.startswith("//") or path == "/" or os.path.normpath(path) != path:
        raise InvalidArgument(f"{path!r}: expected an absolute path without '.', '..', '//' or a final '/'")


def _check_free(target: str) -> None:
    _check_path(target)
    present = at(target)
    if present is not None:
        raise Refused(f"{target}: {present.source} ({present.fstype}) is mounted there already")


def _mount(argv: Sequence[str], timeout_s: float) -> None:
    try:
        command.run(argv, timeout_s=timeout_s)
    except command.CommandTimedOut:
        raise
    except command.CommandFailed as error:
        # All it said: the reason is in the first line, and the last is only advice to look into dmesg.
        raise Unavailable(f"mount ended with status {error.status}: {' '.join(error.stderr.split())}") from error


def _check_landed(target: str) -> None:
    """Undo a mount that did not come to be at the target's own path."""
    if at(target) is None:
        # umount(8) follows the same links, so it finds what mount(8) has just mounted.
        command.run(["umount", "-n", "--no-canonicalize", "--", target], timeout_s=_BIND_TIMEOUT_S)
        raise Refused(f"{target}: the path goes through a symbolic link; nothing is mounted")


def _unmount_plainly(mounted: Mount, timeout_s: float, *, lazy_after: bool) -> bool:
    """Unmount one mount; False if it is dead or stuck and may be detached lazily."""
    try:
        command.run(["umount", "-n", "--no-canonicalize", "--", mounted.target], timeout_s=timeout_s)
    except command.CommandTimedOut:
        if not lazy_after:
            raise
        return False
    except command.CommandFailed as error:
        if _is_gone(mounted):
            return True
        # Status 32 means any failure; whether it is a user's doing or a dead device decides what may follow.
        if _is_alive(mounted):
            raise Refused(f"{mounted.target}: {_said(error)}; in use by {_users_text(mounted)}") from error
        if not lazy_after:
            raise
        return False
    return True


def _is_gone(mounted: Mount) -> bool:
    present = at(mounted.target)
    return present is None or present.mount_id != mounted.mount_id


def _is_alive(mounted: Mount) -> bool:
    """Tell whether the filesystem answers: statfs, and for one on a block device also a read of the device.

    The read goes past the page cache; statfs of ext4 and xfs answers from memory on a dead device.
    """
    questions = [["stat", "--file-system", "--format=%T", "--", mounted.target]]
    if mounted.source.startswith("/dev/"):
        read_one = ["dd", f"if={mounted.source}", "of=/dev/null", "iflag=direct", "bs=4096", "count=1", "status=none"]
        questions.append(read_one)
    try:
        for argv in questions:
            command.run(argv, timeout_s=_LIVENESS_TIMEOUT_S)
    except command.CommandFailed:
        return False
    return True


def _said(error: command.CommandFailed) -> str:
    return error.stderr.strip() or f"umount ended with status {error.status}"


def _users_text(mounted: Mount) -> str:
    below = [f"the mount {mount.target}" for mount in table() if mount.target.startswith(mounted.target + "/")]
    return ", ".join(below[:5] + users_of(mounted.target)) or "something that this mount namespace does not show"


def _links(pid: int) -> Iterator[str]:
    base = f"/proc/{pid}"
    try:
        names = ["cwd", "root", "exe", *(f"fd/{name}" for name in os.listdir(f"{base}/fd"))]
    except OSError:
        return  # it has ended, which is as good as not using anything
    for name in names:
        try:
            yield os.readlink(f"{base}/{name}")
        except OSError:
            continue  # closed in between, or a kernel thread


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "ended"
