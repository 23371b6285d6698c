"""What format 1 needs of a mount, tried out: nothing else tells whether a client really does it."""

import uuid

from csi_quobyte.errors import Busy, Refused
from csi_quobyte.pool import files
from csi_quobyte.pool.presence import Presence
from csi_quobyte.pool.steps import Steps, write_whole


def prove(steps: Steps, presence: Presence, temporary: str) -> None:
    """Try the file operations that everything rests on, in the directory for temporaries; leaves nothing.

    Raises:
        Refused: the mount does not do what format 1 needs; the message says which operation.
    """
    directory = f"{temporary}/{presence.token}.{uuid.uuid4().hex[:12]}"
    first = steps.write_temporary(lambda fd: write_whole(fd, b"1"))
    second = steps.write_temporary(lambda fd: write_whole(fd, b"2"))
    try:
        steps.make_directory(directory)
        steps.link(first, f"{directory}/name")
        try:
            steps.link(second, f"{directory}/name")
        except FileExistsError:
            pass
        else:
            raise Refused("link(2) replaced a file: changes of records would get lost")
        try:
            steps.remove_directory(directory)
        except Busy:
            pass
        else:
            raise Refused("rmdir(2) removed a directory that was not empty: layers in use would be removed")
        steps.rename(second, f"{directory}/name")
        if files.read(f"{directory}/name") != b"2":
            raise Refused("rename(2) did not replace a file")
        if not presence.is_held(presence.token):
            raise Refused("locks on open files do not exclude each other on this mount")
    finally:
        for path in (first, second, f"{directory}/name"):
            steps.discard(path)
        steps.remove_directory(directory)
