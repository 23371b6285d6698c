"""The program that kills one process unless it is fed; `host/watchdog` starts it. Standard library only.

    _watcher.py LIMIT_S        stdin: a socket. First a pidfd comes over it, then any bytes: each feeds the process.

It kills when nothing came for LIMIT_S, counted with the time in which the machine was suspended, and when the other end
of the socket is closed. It ends when the process has.
"""

import select
import signal
import socket
import sys
import time
from contextlib import suppress

_LOOK_EVERY_S = 1.0  # a poll(2) does not count suspended time


def main() -> None:
    """Watch until the process has ended."""
    limit_s = float(sys.argv[1])
    channel = socket.socket(fileno=0)
    channel.settimeout(limit_s)
    _, received, _, _ = socket.recv_fds(channel, 1, 1)
    if not received:
        return  # the other end has ended before there was anything to watch
    (pidfd,) = received
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    poller.register(pidfd, select.POLLIN)
    fed_at = time.clock_gettime(time.CLOCK_BOOTTIME)
    while (left_s := fed_at + limit_s - time.clock_gettime(time.CLOCK_BOOTTIME)) > 0:
        ready = dict(poller.poll(min(left_s, _LOOK_EVERY_S) * 1000))
        if pidfd in ready:
            return
        if channel.fileno() in ready:
            if not channel.recv(4096):
                break
            fed_at = time.clock_gettime(time.CLOCK_BOOTTIME)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


main()
