"""Kill a child of this process when this process stops doing its part: also when it hangs, or is stopped.

A child that is tied to us (`command.tied`) dies with us. It does not die when we live and do nothing: stopped by a
signal, frozen with our cgroup, waiting for a hung file system in a call that holds the interpreter's lock. Then it
would go on writing while we cannot say any more that it may. So a second child, which needs nothing of us, kills it
when we have not fed it for a while.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from csi_quobyte.errors import Unavailable
from csi_quobyte.host import command

LIMIT_S: Final = 15.0
"""A child that was not fed for so long is killed."""

_PROGRAM = str(Path(__file__).with_name("_watcher.py"))


class Watchdog:
    """Feeds the watcher of one child; get it from `watching`."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def feed(self) -> None:
        """Say that the child may go on for another `limit_s`. Never waits.

        Raises:
            Unavailable: nobody watches any more: the child has to be ended.
        """
        try:
            self._channel.send(b".")
        except BlockingIOError:
            pass  # the watcher has enough to read
        except OSError as error:
            raise Unavailable(f"the watchdog of a storage daemon has ended: {error}") from error


@contextmanager
def watching(pid: int, limit_s: float = LIMIT_S) -> Iterator[Watchdog]:
    """Have the child `pid` of this process killed (SIGKILL) when it is not fed for `limit_s`, inside the block.

    The thread that enters the block has to stay in it, as for `command.tied`.

    Raises:
        Unavailable: the watcher cannot be started.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with command.tied([sys.executable, "-I", "-S", _PROGRAM, str(limit_s)], stdin=theirs.fileno()):
            theirs.close()
            pidfd = os.pidfd_open(pid)
            try:
                socket.send_fds(ours, [b"."], [pidfd])
            except OSError as error:
                raise Unavailable(f"the watchdog of a storage daemon cannot be started: {error}") from error
            finally:
                os.close(pidfd)
            yield Watchdog(ours)
