"""What is on the device of a staged volume: a file system that only our own mkfs has made, whole, mounted and grown.

The note of what is on a device (docs/format.md, "Content") is written before the device is, by the node that has it.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from csi_quobyte.errors import Exhausted, Refused
from csi_quobyte.host import filesystem, filesystem_options, loop, mounts
from csi_quobyte.host.loop import LoopDevice
from csi_quobyte.pool.records import Attachment, Content, VolumeRecord
from csi_quobyte.pool.store import Store

MKFS_TIMEOUT_S = 600.0
FSCK_TIMEOUT_S = 3600.0


def note_raw_use(store: Store, volume: VolumeRecord, attachment: Attachment) -> None:
    """Write down, before a pod can write, that anything may be on the device from now on."""
    content = store.content(volume)
    if not attachment.readonly and (content is None or content.state != "raw"):
        store.put_content(volume, Content(state="raw", generation=attachment.generation))


def ensure_mounted(
    store: Store,
    volume: VolumeRecord,
    attachment: Attachment,
    device: LoopDevice,
    staging_path: str,
    *,
    mount_options: Sequence[str],
    check_attached: Callable[[], None],
) -> None:
    """Mount a device at the staging path, after its file system was made or checked, repaired and grown.

    `check_attached` is called before each change: a stage that hung must not go on for an attachment of before.

    Raises:
        Refused: something else is mounted there, or the device does not hold what the records say.
    """
    mounted = mounts.at(staging_path)
    if mounted:
        if mounted.major_minor != device.major_minor:
            raise Refused(f"{mounted.source} is mounted at the staging path {staging_path}")
        return
    filesystem.check_unused(device.path)
    _ensure_filesystem(store, volume, attachment, device, check_attached)
    check_attached()
    _repair_and_grow(store, volume, attachment, device, check_attached)
    options = [*mount_options, *filesystem_options.default_mount_options(volume.filesystem)]
    if attachment.readonly:
        # the journal of a snapshot may be dirty: replayed first, because a read-only device cannot be
        filesystem.replay_journal(device.path, volume.filesystem, staging_path, timeout_s=FSCK_TIMEOUT_S)
        device = loop.set_read_only(device)
        options.append("ro")
    check_attached()
    mounts.mount(device.path, staging_path, fstype=volume.filesystem, options=options)
    if "ro" not in options and filesystem.needs_growth(device.path, volume.filesystem, staging_path):
        filesystem.grow(device.path, volume.filesystem, staging_path)


def _ensure_filesystem(
    store: Store,
    volume: VolumeRecord,
    attachment: Attachment,
    device: LoopDevice,
    check_attached: Callable[[], None],
) -> None:
    """Make the file system if nothing was ever written but by our own mkfs, else check that it is there.

    The note `formatting` comes before the first byte of mkfs and `formatted` before the first mount: a volume found
    `formatting` holds nothing of anybody's. Only a note of an earlier attachment may have come late, from a node that
    hung: then a file system that is there is believed before the note is.

    Raises:
        Refused: the device holds something else than the records say; it is never formatted then.
    """
    content = store.content(volume)
    formatted = Content(state="formatted", filesystem=volume.filesystem, generation=attachment.generation)
    if _may_format(volume, attachment, device, content):
        check_attached()
        store.put_content(volume, replace(formatted, state="formatting"))
        check_attached()
        filesystem.make(device.path, volume.filesystem, options=volume.mkfs_options, timeout_s=MKFS_TIMEOUT_S)
        store.put_content(volume, formatted)
        return
    if content and content.growing:
        return  # it may not even be recognised before it is repaired
    found = filesystem.probe(device.path)
    if found != volume.filesystem:
        raise Refused(
            f"volume {volume.id} should hold {volume.filesystem}, its device holds {found or 'nothing known'}"
        )
    if content is None or content.state != "formatted":
        store.put_content(volume, formatted)


def _repair_and_grow(
    store: Store,
    volume: VolumeRecord,
    attachment: Attachment,
    device: LoopDevice,
    check_attached: Callable[[], None],
) -> None:
    """Make a file system whole, and as large as its device if it cannot grow mounted.

    resize2fs that is interrupted leaves an ext4 that e2fsck repairs only if it may decide all by itself, as it may not
    otherwise: the note `growing`, which a snapshot inherits, says that it may, from before resize2fs until after it.
    """
    content = store.content(volume)
    was_growing = content is not None and content.growing
    formatted = Content(state="formatted", filesystem=volume.filesystem, generation=attachment.generation)

    def begin_growth() -> None:
        check_attached()
        store.put_content(volume, replace(formatted, growing=True))
        check_attached()

    filesystem.repair(device.path, volume.filesystem, timeout_s=FSCK_TIMEOUT_S, after_growth=was_growing)
    has_to_grow = filesystem.has_to_grow_unmounted(device.path, volume.filesystem)
    if has_to_grow:
        filesystem.grow_unmounted(device.path, volume.filesystem, begin=begin_growth)
    if has_to_grow or was_growing:
        check_attached()
        store.put_content(volume, formatted)
    elif not attachment.readonly and content and content.generation < attachment.generation:
        # so that what a node that lost the volume writes down late is refused; on a full pool without that
        with suppress(Exhausted):
            store.put_content(volume, formatted)


def _may_format(volume: VolumeRecord, attachment: Attachment, device: LoopDevice, content: Content | None) -> bool:
    """Say whether nothing of anybody's can be on a device.

    Raises:
        Refused: the volume was never formatted, and yet something is there.
    """
    if content is None:
        if not filesystem.is_blank(device.path):
            raise Refused(f"volume {volume.id} was never formatted and its device is not blank: not touching it")
        return True
    if content.state != "formatting":
        return False
    return content.generation == attachment.generation or filesystem.probe(device.path) != volume.filesystem


def grow_mounted(volume: VolumeRecord, device: LoopDevice, volume_path: str) -> None:
    """Let the file system that is mounted at a path fill its device; one that is mounted read-only is left alone."""
    mounted = mounts.at(volume_path)
    if mounted is None or "ro" in mounted.options:
        return  # read-only by its class: it grows when it is mounted writable
    if filesystem.needs_growth(device.path, volume.filesystem, volume_path):
        filesystem.grow(device.path, volume.filesystem, volume_path)
