"""Where a volume is on this node: the mounts of its device and of the device's node, and the target paths of pods."""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from csi_quobyte.errors import AlreadyExists, NotFound, Refused
from csi_quobyte.host import mounts
from csi_quobyte.host.loop import LoopDevice
from csi_quobyte.pool.records import AccessType

UNMOUNT_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class PublishRequest:
    """A checked NodePublishVolume request."""

    volume_id: str
    generation: int
    staging_path: str
    target_path: str
    access_type: AccessType
    readonly: bool
    single_writer: bool


def device_at(device: LoopDevice | None, volume_id: str, volume_path: str) -> LoopDevice:
    """Check that a volume is staged or published at a path.

    Raises:
        NotFound: it is not.
    """
    if device is None:
        raise NotFound(f"volume {volume_id} is not staged here")
    if volume_path not in of_device(device):
        raise NotFound(f"volume {volume_id} is not at {volume_path}")
    return device


def source_of(device: LoopDevice, request: PublishRequest) -> str:
    """Give what is bound to the target: the device node, or the staging path if our file system is mounted there."""
    if request.access_type == "block":
        return device.path
    mounted = mounts.at(request.staging_path)
    if mounted is None or mounted.major_minor != device.major_minor:
        raise Refused(f"volume {request.volume_id} is not staged at {request.staging_path}")
    return request.staging_path


def of_device(device: LoopDevice) -> list[str]:
    """Give all places where a device, or the file system on it, is mounted."""
    return [mounted.target for mounted in mounts.of_device(device.major_minor)] + block_targets(device)


def block_targets(device: LoopDevice) -> list[str]:
    """Give the targets where a device node is bound: mounts of /dev's file system whose root is the node."""
    return [mounted.target for mounted in mounts.table() if _is_node_of(mounted, device)]


def _is_node_of(mounted: mounts.Mount, device: LoopDevice) -> bool:
    return mounted.fstype in {"devtmpfs", "tmpfs"} and mounted.root == f"/{device.name}"


def is_published(device: LoopDevice, target_path: str, *, readonly: bool) -> bool:
    """Say whether a target has this volume already.

    Raises:
        Refused: it has something else.
        AlreadyExists: it has it with another readonly.
    """
    mounted = mounts.at(target_path)
    if mounted is None:
        return False
    if target_path not in of_device(device):
        raise Refused(f"{mounted.source} is mounted at the target path {target_path}")
    if ("ro" in mounted.options) != readonly:
        raise AlreadyExists(f"the volume is published at {target_path} with readonly={not readonly}")
    return True


def check_single_writer(device: LoopDevice, request: PublishRequest) -> None:
    """Check that a SINGLE_NODE_SINGLE_WRITER volume has no other target.

    Raises:
        Refused: it has one.
    """
    others = set(of_device(device)) - {request.staging_path, request.target_path}
    if request.single_writer and others:
        raise Refused(f"volume {request.volume_id} has a single writer and is published at {sorted(others)[0]}")


def undo_half_bind(device: LoopDevice, target_path: str) -> None:
    """Unmount a writable bind that was to become a read-only one when its process died; no pod has it yet."""
    mounted = mounts.at(target_path)
    if mounted and "ro" not in mounted.options and target_path in of_device(device):
        mounts.unmount(target_path, timeout_s=UNMOUNT_TIMEOUT_S, lazy_after=True)


def check_not_another(
    mounted: mounts.Mount, device: LoopDevice | None, volume_id: str, *, ours: Iterable[LoopDevice]
) -> None:
    """Check that a mount is not one of another volume of this driver, whose devices are `ours`.

    Raises:
        Refused: it is.
    """
    for other in ours:
        if device and other.path == device.path:
            continue
        if mounted.major_minor == other.major_minor or _is_node_of(mounted, other):
            raise Refused(f"another volume is mounted at {mounted.target}, not {volume_id}")


def make(request: PublishRequest) -> None:
    """Make the target: a directory for a mount volume, an empty file for a block volume.

    Raises:
        Refused: something of another kind is there.
    """
    wants_file = request.access_type == "block"
    target = Path(request.target_path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if wants_file:
            target.touch(mode=0o600)
        else:
            target.mkdir(mode=0o750, exist_ok=True)
        mode = os.lstat(target).st_mode
    except OSError as error:
        raise Refused(f"the target path {target} cannot be made: {error.strerror}") from error
    if not (stat.S_ISREG(mode) if wants_file else stat.S_ISDIR(mode)):
        raise Refused(f"the target path {target} is not a {'file' if wants_file else 'directory'}")


def remove(target_path: str) -> None:
    """Remove an unmounted target.

    Raises:
        Refused: the directory or the file is not empty, so it is none of ours.
    """
    try:
        found = os.lstat(target_path)
        if stat.S_ISDIR(found.st_mode):
            os.rmdir(target_path)
        elif stat.S_ISREG(found.st_mode) and found.st_size:
            raise Refused(f"the target path {target_path} is a file with contents: none of ours")
        else:
            os.unlink(target_path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise Refused(f"the target path {target_path} cannot be removed: {error.strerror}") from error
