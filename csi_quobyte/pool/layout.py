"""What every pool consists of: its directories, and format.json; making one, and judging one that is there."""

import os
import uuid
from contextlib import suppress

from csi_quobyte.errors import Busy, NotFound, Refused
from csi_quobyte.pool import files, naming, records
from csi_quobyte.pool.records import Modes, Owner, PoolFormat, PoolSettings
from csi_quobyte.pool.steps import Ownership, Steps, translated, write_whole

SHARDS = tuple(f"{number:02x}" for number in range(256))
"""The directories in each of `SHARDED`; `records.shard_of` says which one an id has."""
SHARDED = ("volumes", "snapshots", "images", "layers")
FOLDERS = {"vol": "volumes", "snap": "snapshots", "img": "images"}
PLAIN = ("tmp", "reserve", "nodes", "jobs", "trash")
INIT = "init"


def identity_of(root: str) -> tuple[int, int, int] | None:
    """Give what tells one mounted pool from another: device, inode and time of format.json; None without one.

    The device number alone would not do: the kernel gives it to the next mount. An edited format.json counts as
    another pool, so that its settings are read.
    """
    path = f"{root}/format.json"
    with translated(path):
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def read_format(root: str) -> PoolFormat:
    """Read and judge a pool's format.json.

    Raises:
        NotFound: there is none.
        Corrupt: it is damaged.
        Refused: another format, or a required feature that this version does not know.
    """
    path = f"{root}/format.json"
    data = files.read(path)
    if data is None:
        raise NotFound(f"{root} is not a pool: it has no format.json (csi-quobyte pool init makes one)")
    found = records.decode(PoolFormat, data, where=path)
    if found.format != records.FORMAT:
        raise Refused(f"{path} has format {found.format}, this version knows {records.FORMAT}")
    if unknown := sorted(set(found.required_features) - records.KNOWN_REQUIRED_FEATURES):
        raise Refused(f"{path} requires features that this version does not know: {', '.join(unknown)}")
    return found


def initialise(root: str, *, owner: Owner, modes: Modes) -> PoolFormat:
    """Make the directory `root` a pool; give the format of the one that is there when it is one already.

    format.json is published last: a run that dies earlier leaves only empty directories, and a second run goes on.

    Raises:
        Refused: the directory holds something else, or is a pool of another owner or other modes.
    """
    with suppress(NotFound):
        found = read_format(root)
        if (found.owner, found.modes) != (owner, modes):
            raise Refused(
                f"{root} is a pool already, with owner {found.owner.uid}:{found.owner.gid}, file mode "
                f"{found.modes.file} and directory mode {found.modes.directory}, which pool init does not change"
            )
        return found
    if foreign := _foreign_before_init(root):
        raise Refused(f"{root} is not empty and not a pool: it holds {', '.join(foreign[:5])}")
    made = PoolFormat(
        format=records.FORMAT,
        uuid=str(uuid.uuid4()),
        required_features=(),
        optional_features=(),
        owner=owner,
        modes=modes,
        settings=PoolSettings(),
    )
    steps = Steps(f"{root}/tmp", INIT, ownership_of(made))
    for name in (*PLAIN, *SHARDED):
        steps.make_directory(f"{root}/{name}")
    for name in SHARDED:
        for shard in SHARDS:
            steps.make_directory(f"{root}/{name}/{shard}", sync=False)
        steps.sync(f"{root}/{name}")
    _own_root(root, made)
    steps.touch(f"{root}/lock")
    temporary = steps.write_temporary(lambda fd: write_whole(fd, records.encode(made)))
    try:
        steps.link(temporary, f"{root}/format.json")
    except FileExistsError as error:
        raise Busy(f"{root} is being made a pool by somebody else") from error
    finally:
        steps.discard(temporary)
    return made


def _foreign_before_init(root: str) -> list[str]:
    """Name what is in a directory without format.json that an interrupted `initialise` has not made."""
    foreign = [name for name in files.names(root) if name not in {*SHARDED, *PLAIN, "lock", "lost+found"}]
    for folder in (*SHARDED, *PLAIN):
        for name in _names_if_directory(f"{root}/{folder}", foreign, folder):
            path = f"{folder}/{name}"
            made = (
                naming.SHARD.fullmatch(name)
                if folder in SHARDED
                else folder == "tmp" and naming.TEMPORARY.fullmatch(name)
            )
            if not made:
                foreign.append(path)
            elif folder in SHARDED:
                foreign += [f"{path}/{below}" for below in _names_if_directory(f"{root}/{path}", foreign, path)]
    with translated(f"{root}/lock"), suppress(FileNotFoundError):
        if os.stat(f"{root}/lock").st_size:
            foreign.append("lock")
    return sorted(foreign)


def _names_if_directory(path: str, foreign: list[str], name: str) -> list[str]:
    """Give the names in a directory; a file in its place is added to `foreign`."""
    if os.path.lexists(path) and not os.path.isdir(path):
        foreign.append(name)
        return []
    return files.names(path)


def _own_root(root: str, made: PoolFormat) -> None:
    """Give the pool's top directory its owner: the unprivileged controller must be able to enter it."""
    with translated(root):
        status = os.stat(root)
        if (status.st_uid, status.st_gid) != (made.owner.uid, made.owner.gid):
            os.chown(root, made.owner.uid, made.owner.gid)


def ownership_of(pool: PoolFormat) -> Ownership:
    return Ownership(pool.owner.uid, pool.owner.gid, int(pool.modes.file, 8), int(pool.modes.directory, 8))
