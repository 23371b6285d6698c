"""Is a path a live mount of a Quobyte volume? The checks of the predecessor (rows S03, S04), without touching more."""

import os
from typing import Literal

import psutil

from csi_quobyte.errors import Unavailable
from csi_quobyte.pool.steps import translated

RequireMount = Literal["quobyte", "quobyte-nosize", "any"]
REQUIRE_MOUNT_CHOICES: tuple[RequireMount, ...] = ("quobyte", "quobyte-nosize", "any")


def check_mount(path: str, require: RequireMount) -> None:
    """Check that `path` is mounted as `require` demands.

    quobyte: the mount table has it with device `quobyte@...` or type `fuse.quobyte`, and its root says size 0;
    quobyte-nosize: the same without the rule on the size (a stand-in made with bindfs says 4096); any: no check.

    Raises:
        Unavailable: it is not, or the mount does not answer; the message says what was found.
    """
    if require == "any":
        return
    # a later line of the mount table covers an earlier one of the same place
    here = [mount for mount in psutil.disk_partitions(all=True) if mount.mountpoint == os.path.normpath(path)]
    if not here:
        raise Unavailable(f"{path} is not a mount point; mount the Quobyte volume there on every host of the cluster")
    mount = here[-1]
    if not (mount.device.startswith("quobyte@") or mount.fstype == "fuse.quobyte"):
        raise Unavailable(f"{path} is mounted from {mount.device} with type {mount.fstype}, which is not Quobyte")
    with translated(path):
        size = os.stat(path).st_size
    if require == "quobyte" and size != 0:
        raise Unavailable(f"the root of {path} has size {size}, a Quobyte volume's has 0 (see --require-mount)")
