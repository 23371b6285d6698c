"""csi-quobyte pool: making pools."""

import os

import click

from csi_quobyte.cli import options
from csi_quobyte.errors import InvalidArgument
from csi_quobyte.pool.layout import initialise
from csi_quobyte.pool.mount import RequireMount, check_mount
from csi_quobyte.pool.records import Modes, Owner


@click.group()
def pool() -> None:
    """Make pools."""


@pool.command()
@click.argument("path")
@options.option("--owner", default=None, metavar="UID:GID", help="Owner of all files.  [default: this process's]")
@options.option("--file-mode", default="0600", metavar="OCTAL", help="Mode of all files.")
@options.option("--dir-mode", default="0700", metavar="OCTAL", help="Mode of all directories.")
@options.require_mount
def init(path: str, owner: str | None, file_mode: str, dir_mode: str, require_mount: RequireMount) -> None:
    """Make the Quobyte volume mounted at PATH a pool. Does nothing when it is one already."""
    path = os.path.abspath(path)
    check_mount(path, require_mount)
    modes = Modes(file=_mode("--file-mode", file_mode), directory=_mode("--dir-mode", dir_mode))
    made = initialise(path, owner=_owner(owner), modes=modes)
    click.echo(f"{path} is a pool of format {made.format} with uuid {made.uuid}")


def _owner(text: str | None) -> Owner:
    if text is None:
        return Owner(uid=os.geteuid(), gid=os.getegid())
    uid, separator, gid = text.partition(":")
    if not (separator and uid.isdecimal() and gid.isdecimal()):
        raise InvalidArgument(f"--owner {text!r} is not UID:GID in numbers")
    return Owner(uid=int(uid), gid=int(gid))


def _mode(flag: str, text: str) -> str:
    """Check an octal mode: the owner must be able to read and write, others get no more than read or search."""
    try:
        mode = int(text, 8)
    except ValueError as error:
        raise InvalidArgument(f"{flag} {text!r} is not an octal mode") from error
    if mode & ~0o777 or mode & 0o600 != 0o600 or mode & 0o002:
        raise InvalidArgument(f"{flag} {text!r} must let the owner read and write and must not let everybody write")
    return f"{mode:04o}"
