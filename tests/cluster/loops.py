#!/usr/bin/env python3
"""Releases the loop devices that a cluster has left: containers end, and the kernel keeps their devices.

    loops.py remember RUN             writes down which loop devices are bound now
    loops.py release RUN POOL...      releases those that were bound since and are the cluster's

The cluster's are: the driver's (by their tag) whose storage daemon is gone; those on a file in a POOL's mount; those
that the kubelet puts on a block volume's device; and those on a file below RUN. Others are left alone.
"""

import fcntl
import json
import os
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from contained import LOOP_GET_STATUS64, LOOP_INFO64_BYTES, Loop, command, has_no_server, loops

PASSES = 5  # a device below another one is free only after that


def remember(run: Path) -> None:
    """Write down the devices that are none of the cluster's."""
    (run / "loops.json").write_text(json.dumps([loop.device for loop in loops()]), encoding="utf-8")


def device_of_file(loop: Loop) -> int:
    """Give the device number of the file system that a loop device's file lies on (struct loop_info64: lo_device)."""
    handle = os.open(loop.device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        answer = fcntl.ioctl(handle, LOOP_GET_STATUS64, bytes(LOOP_INFO64_BYTES))
    except OSError:
        return 0  # its server is gone
    finally:
        os.close(handle)
    found: int = struct.unpack_from("<Q", answer)[0]
    return found


def is_the_clusters(loop: Loop, run: Path, pools: list[int], before: set[str]) -> bool:
    """Say whether a loop device is one that the cluster has left."""
    if loop.device in before or loop.backing == f"{run}/small.img":  # that one goes with its mount
        return False
    if loop.backing.startswith(("/dev/loop", f"{run}/")):
        return True
    if loop.has_tag and has_no_server(loop.device):
        return True
    return device_of_file(loop) in pools


def release(run: Path, pools: list[Path]) -> int:
    """Release the cluster's devices, those on others first; name what could not be released."""
    try:
        before = set(json.loads((run / "loops.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return 0
    numbers = [os.stat(pool).st_dev for pool in pools if os.path.ismount(pool)]
    left: list[Loop] = []
    for _ in range(PASSES):
        left = [loop for loop in loops() if is_the_clusters(loop, run, numbers, before)]
        if not left:
            return 0
        for loop in sorted(left, key=lambda one: not one.backing.startswith("/dev/loop")):
            command("losetup", "--detach", loop.device)
    for loop in left:
        print(f"loops: {loop.device} on {loop.backing} cannot be released", file=sys.stderr)
    return 1


def main() -> int:
    """Read the arguments and do it."""
    match sys.argv[1:]:
        case ["remember", run]:
            remember(Path(run))
            return 0
        case ["release", run, *pools]:
            return release(Path(run), [Path(pool) for pool in pools])
        case _:
            print(__doc__, file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
