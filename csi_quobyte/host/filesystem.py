"""What is on a block device: probing, formatting, repairing and growing filesystems.

Owns: the list of supported filesystems, their minimum sizes, and which options a StorageClass may pass to mkfs and
mount.
Hides: blkid's exit statuses, superblock layouts, which tool grows what and when.

What always holds:
- "Nothing is there" is only said of a device that has been read: blkid ends with 2 also when it cannot read.
- `make` overwrites whatever it finds. It is the caller who proves that it may (the record says never formatted, and
  `is_blank`); no other function here destroys anything.
- Formatting keeps a thin file thin: nothing is discarded and no table is written that can be left to the kernel.
- An option that is not in a table here reaches neither mkfs nor mount.

Commands have time limits. Reads and ioctls made in this process have none: a device that hangs is caught by
the command before them (blkid, mount), and a call that hangs all the same has to be abandoned by the caller.
"""

import errno
import fcntl
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from csi_quobyte.errors import Busy, InvalidArgument, OutOfRange, Refused, Unavailable
from csi_quobyte.host import command, filesystem_options, mounts
from csi_quobyte.host.filesystem_options import check_supported

MINIMUM_SIZE_BYTES: Mapping[str, int] = {
    # mkfs.ext4 leaves the journal out, without an error, below 2 MiB (1 KiB blocks) or 8 MiB (4 KiB blocks).
    "ext4": 8 << 20,
    # mkfs.xfs refuses less since xfsprogs 5.19.
    "xfs": 300 << 20,
}
AMBIGUOUS = "ambiguous"
"""What `probe` says when blkid recognises several contradicting formats."""

_BLANK_CHECK_BYTES = 2 << 20
"""Covers every superblock and partition table that blkid knows, at either end."""
_PROBE_TIMEOUT_S = 10.0
"""blkid reads some dozen blocks."""
_GROW_TIMEOUT_S = 120.0
"""Growing online writes the new groups' descriptors: seconds for a terabyte on a slow pool."""
_CHECK_TIMEOUT_S = 600.0
"""A full e2fsck reads all metadata, a few GiB on a volume of many terabytes."""
_LABEL_BYTES: Mapping[str, int] = {"ext4": 16, "xfs": 12}
_CAP_SYS_RESOURCE = 24  # linux/capability.h
# linux/fs.h and Documentation/filesystems/ext4; xfs calls it XFS_IOC_GOINGDOWN
_FS_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = struct.pack("I", 2)

# ext4: struct ext4_super_block at byte 1024 (Documentation/filesystems/ext4/super.rst)
_EXT4_SUPERBLOCK_OFFSET = 1024
_EXT4_MAGIC = 0xEF53
# e2fsck's ask_yn() and ehandler.c; the second is checked wherever it may stand, a file's name included: that is the
# safe side
_E2FSCK_QUESTION = re.compile(r"(<[yn]>|\(y/n\))\? $")
_E2FSCK_DEVICE_ERROR = re.compile(r"Error (reading|writing) block \d+ \([^)\n]*\)?|Input/output error")
_EXT4_COMPAT_SPARSE_SUPER2 = 0x200
_EXT4_INCOMPAT_META_BG = 0x10
_EXT4_INCOMPAT_64BIT = 0x80
_EXT4_LEAST_DATA_BLOCKS = 50  # resize2fs drops a last group with fewer blocks for data than this
# xfs: struct xfs_dsb (fs/xfs/libxfs/xfs_format.h) and ioctls (xfs_fs.h)
_XFS_SUPERBLOCK = struct.Struct(">4sIQ")  # sb_magicnum, sb_blocksize, sb_dblocks
_XFS_SB_AGBLOCKS_OFFSET = 84
_XFS_IOC_FSGEOMETRY_V1 = 0x80705864
_XFS_GEOMETRY_V1 = struct.Struct("=8IQ72x")  # blocksize, rtextsize, agblocks, …, imaxpct (7), datablocks (8)
_XFS_IOC_FSGROWFSDATA = 0x4010586E
_XFS_GROWFS_DATA = struct.Struct("=QI4x")  # newblocks, imaxpct
_XFS_LEAST_AG_BLOCKS = 64  # the kernel drops a last allocation group smaller than this


@dataclass(frozen=True)
class Usage:
    """How full a mounted filesystem is."""

    total_bytes: int
    available_bytes: int
    """For unprivileged users: without what is reserved for root."""
    used_bytes: int
    total_inodes: int
    free_inodes: int
    used_inodes: int


@dataclass(frozen=True)
class _Extent:
    """How long a filesystem is, and how long it could be made on its device, in its own blocks."""

    block_bytes: int
    blocks: int
    reachable_blocks: int


@dataclass(frozen=True)
class _Ext4Superblock:
    block_bytes: int
    blocks: int
    first_data_block: int
    blocks_per_group: int
    inode_table_blocks: int
    descriptors_per_block: int
    reserved_descriptor_blocks: int
    meta_bg: bool
    sparse_super2: bool


def probe(device: str) -> str | None:
    """Return what is on a device: a filesystem type, "… partition table", AMBIGUOUS, or None for nothing known.

    RAID members, encryption headers and swap space count as content too.

    Raises:
        Unavailable: the device cannot be read, or not in time.
    """
    signature = _signature(device)
    if signature is None:
        _check_readable(device)
    return signature


def is_blank(device: str) -> bool:
    """Tell whether a device holds nothing: no known signature, and zeros in its first and last 2 MiB.

    Read past the page cache. A superblock that was torn, so that blkid does not know it any more, is not blank.

    Raises:
        Unavailable: the device cannot be read, or not in time.
    """
    # Reading the ends also proves what the absence of a signature does not: that the device can be read.
    return _signature(device) is None and all(piece == bytes(len(piece)) for piece in _end_pieces(device))


def is_readable(device: str) -> bool:
    """Tell whether a device answers reads at its ends at all; past the page cache."""
    try:
        for _ in _end_pieces(device):
            pass
    except Unavailable:
        return False
    return True


def check_unused(device: str) -> None:
    """Check that nothing has an unmounted device open for itself, as a tool that was left running would.

    Raises:
        Busy: something has.
        Unavailable: the device cannot be opened.
    """
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Busy(f"{device}: another process works on it; an earlier call may not have ended") from error
        raise Unavailable(f"{device}: cannot be opened: {error.strerror}") from error


def sync(mountpoint: str, *, timeout_s: float) -> None:
    """Bring everything cached for the filesystem at a mount point down to its device (syncfs(2)).

    Raises:
        Unavailable: the device refuses some of it; CommandTimedOut: it did not end in time.
    """
    command.run(["sync", "--file-system", "--", mountpoint], timeout_s=timeout_s)


def shut_down(mountpoint: str) -> None:
    """End all reading and writing of the file system at a mount point, without a flush; done before is success.

    Neither cached data nor the journal is written any more. But ext4 writes one block of the journal when it is shut
    down, and at the unmount such metadata as was in the journal already: who must not have that cuts the device off
    first. May hang with the device: for a thread that can be abandoned.

    Raises:
        Unavailable: it is refused.
    """
    try:
        fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _FS_IOC_SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno != errno.EIO:  # what a file system says that is shut down already
            raise Unavailable(f"{mountpoint}: cannot be shut down: {error.strerror}") from error


def make(
    device: str, fstype: str, *, options: Sequence[str], timeout_s: float, volume_label: str | None = None
) -> None:
    """Make a filesystem, overwriting what is there, without a discard and without writing what can stay unwritten.

    `options` is what `filesystem_options.check_mkfs_options` returned. When it fails or dies in the middle, the
    device is neither blank nor a filesystem: only a caller that remembers that it began may call it again.

    Raises:
        InvalidArgument: unknown filesystem, or a label that is too long for it.
        OutOfRange: the device is smaller than MINIMUM_SIZE_BYTES.
        Refused: mkfs refuses these options on this device; the message has its words.
        Unavailable: the device cannot be read or mkfs was killed; CommandTimedOut: mkfs did not end in time.
    """
    check_supported(fstype)
    size_bytes = device_size_bytes(device)
    if size_bytes < MINIMUM_SIZE_BYTES[fstype]:
        raise OutOfRange(f"{device}: {size_bytes} bytes; {fstype} needs at least {MINIMUM_SIZE_BYTES[fstype]}")
    argv = _mkfs_ext4(options) if fstype == "ext4" else ["mkfs.xfs", "-q", "-f", "-K", *options]
    if volume_label is not None:
        if len(volume_label.encode()) > _LABEL_BYTES[fstype]:
            raise InvalidArgument(f"label {volume_label!r}: longer than the {_LABEL_BYTES[fstype]} bytes of {fstype}")
        argv += ["-L", volume_label]
    argv = [*argv, device]
    if fstype == "xfs":
        # It looks at every mount point of the machine first.
        argv = mounts.out_of_reach_of_servers(argv)
    try:
        _run_or_refuse(argv, timeout_s, f"{device}: cannot be formatted as {fstype}")
    except Refused:
        # A device that broke meanwhile is no fault of the options; this raises Unavailable then.
        _check_readable(device)
        raise


def repair(device: str, fstype: str, *, timeout_s: float, after_growth: bool = False) -> None:
    """Bring an unmounted filesystem into a state that can be mounted: replay the journal, repair what is safe.

    xfs needs nothing: it replays its log when it is mounted, and xfs_repair refuses to run before that. With
    `after_growth` all that is wrong is of a `grow_unmounted` that was interrupted: e2fsck decides everything itself,
    but for a block that it cannot read, which its option -y would have it overwrite with zeros.

    Raises:
        Refused: e2fsck found what only a human may decide (exit status 4 or more); the message has its last line.
        Unavailable: the device cannot be read or written, or e2fsck was killed; CommandTimedOut: it did not end in
            time.
    """
    if fstype != "ext4":
        return
    if after_growth:
        _judge_e2fsck(
            device, command.run_answering(["e2fsck", "-f", device], _yes, timeout_s=timeout_s, ok_statuses=range(128))
        )
    else:
        _e2fsck(device, ("-p",), timeout_s)


def replay_journal(device: str, fstype: str, scratch_dir: str, *, timeout_s: float) -> None:
    """Make the journal of an unmounted, writable filesystem clean, so that it can be mounted from a read-only device.

    xfs is mounted read-write at `scratch_dir` and unmounted again; a mount that an earlier call left there is removed.

    Raises:
        Refused: it cannot be repaired without a human, or something uses `scratch_dir`.
        Unavailable: it cannot be mounted or unmounted, or not in time.
    """
    if fstype == "ext4":
        repair(device, fstype, timeout_s=timeout_s)
        return
    mounts.unmount(scratch_dir, timeout_s=timeout_s, lazy_after=False)
    mounts.mount(
        device,
        scratch_dir,
        fstype=fstype,
        options=filesystem_options.default_mount_options(fstype),
        timeout_s=timeout_s,
    )
    mounts.unmount(scratch_dir, timeout_s=timeout_s, lazy_after=False)


def needs_growth(device: str, fstype: str, mountpoint: str | None) -> bool:
    """Tell whether the filesystem could be made longer on its device; reads one block.

    A rest that is too short for a block group (ext4) or an allocation group (xfs) does not count. For a mounted xfs
    the mount point is needed: its superblock on the device is behind.

    Raises:
        Unavailable: the device cannot be read.
        Refused: there is no such filesystem on it.
    """
    extent = _xfs_extent(device, mountpoint) if fstype == "xfs" else _ext4_extent(device)
    return extent.reachable_blocks > extent.blocks


def grow(device: str, fstype: str, mountpoint: str, *, timeout_s: float = _GROW_TIMEOUT_S) -> None:
    """Grow a mounted filesystem to its device's size; nothing to do is success.

    xfs is grown by the ioctl that xfs_growfs uses: the tool looks at every mount point of the machine first, and
    hangs when any of them does.

    Raises:
        Refused: growing ext4 online takes CAP_SYS_RESOURCE and this process lacks it, or resize2fs refuses.
        Unavailable: the kernel refuses (for xfs), or resize2fs did not end in time.
    """
    if not needs_growth(device, fstype, mountpoint):
        return
    if fstype == "xfs":
        _grow_xfs(device, mountpoint)
        return
    try:
        _run_or_refuse(["resize2fs", device], timeout_s, f"{device}: cannot grow the ext4 mounted at {mountpoint}")
    except Refused as error:
        if _has_capability(_CAP_SYS_RESOURCE):
            raise
        raise Refused(
            f"{device}: growing a mounted ext4 takes CAP_SYS_RESOURCE, which this process lacks; it grows when the "
            "volume is staged the next time"
        ) from error


def has_to_grow_unmounted(device: str, fstype: str) -> bool:
    """Tell whether a filesystem has to grow before it is mounted: an ext4 on a device that has become longer, which
    the kernel grows for those with CAP_SYS_RESOURCE only, and with sparse_super2 for nobody. The errors of
    `needs_growth`.
    """
    if fstype != "ext4" or not needs_growth(device, fstype, None):
        return False
    return not _has_capability(_CAP_SYS_RESOURCE) or _read_ext4_superblock(device).sparse_super2


def grow_unmounted(
    device: str, fstype: str, *, begin: Callable[[], object] = lambda: None, timeout_s: float = _CHECK_TIMEOUT_S
) -> None:
    """Grow an unmounted ext4 to its device's size, after the full check that resize2fs demands.

    For what cannot grow mounted (see `has_to_grow_unmounted`), which is safer: resize2fs that is interrupted leaves
    what only `repair` with `after_growth` makes whole again. `begin` is called before it, when the check has found the
    filesystem whole. xfs only grows mounted: nothing is done.

    Raises:
        Refused: the check needs a human; or the growth exceeds what the filesystem has reserved room for (about a
            thousand times its first size): resize2fs would have to move metadata and can damage it then. It can
            still grow mounted.
        Unavailable: a tool was killed; CommandTimedOut: it did not end in time, the next call checks and goes on.
    """
    if fstype != "ext4" or not needs_growth(device, fstype, None):
        return
    superblock = _read_ext4_superblock(device)
    limit_blocks = _ext4_reserved_limit_blocks(superblock)
    target_blocks = device_size_bytes(device) // superblock.block_bytes
    if target_blocks > limit_blocks:
        raise Refused(
            f"{device}: this ext4 can grow unmounted to {limit_blocks * superblock.block_bytes} bytes at most, wanted "
            f"{target_blocks * superblock.block_bytes}; it has to be grown mounted"
        )
    _e2fsck(device, ("-f", "-p"), timeout_s)
    begin()
    _run_or_refuse(["resize2fs", device], timeout_s, f"{device}: cannot grow its ext4")


def usage(path: str) -> Usage:
    """Return how full the filesystem mounted at a path is; hangs if its server does.

    Raises:
        Unavailable: it cannot be asked.
    """
    try:
        found = os.statvfs(path)
    except OSError as error:
        raise Unavailable(f"{path}: cannot be asked for its usage: {error.strerror}") from error
    return Usage(
        total_bytes=found.f_blocks * found.f_frsize,
        available_bytes=found.f_bavail * found.f_frsize,
        used_bytes=(found.f_blocks - found.f_bfree) * found.f_frsize,
        total_inodes=found.f_files,
        free_inodes=found.f_ffree,
        used_inodes=found.f_files - found.f_ffree,
    )


def device_size_bytes(device: str) -> int:
    """Return the size of a block device.

    Raises:
        Unavailable: it cannot be opened.
    """
    fd = _open(device, os.O_RDONLY)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _signature(device: str) -> str | None:
    """Return what blkid recognises; None means nothing, or that it could not read (both are its status 2)."""
    argv = ["blkid", "-p", "-u", "filesystem,raid,crypto,other", "-o", "export", "--", device]
    done = command.run(argv, timeout_s=_PROBE_TIMEOUT_S, ok_statuses=(0, 2, 8))
    if done.status == 8:
        return AMBIGUOUS
    if done.status == 2:
        return None
    found = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    return found.get("TYPE") or f"{found.get('PTTYPE', 'unknown')} partition table"


def _check_readable(device: str) -> None:
    for _ in _end_pieces(device):
        pass  # it raises Unavailable


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"{path}: cannot be opened: {error.strerror}") from error


def _end_pieces(device: str) -> Iterator[bytes]:
    """Yield the first and the last 2 MiB of a device, read past the page cache (which may be older than the file)."""
    size_bytes = device_size_bytes(device)
    if size_bytes == 0:
        raise Unavailable(f"{device}: has no size")
    # Rounded down to what every logical block size divides; the device's own size is a multiple of its block size.
    last_offset = max(0, size_bytes - _BLANK_CHECK_BYTES) // 4096 * 4096
    fd = _open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        for offset, length in ((0, min(size_bytes, _BLANK_CHECK_BYTES)), (last_offset, size_bytes - last_offset)):
            yield _read_direct(device, fd, offset, length)
    finally:
        os.close(fd)


def _read_direct(device: str, fd: int, offset: int, length: int) -> bytes:
    with mmap.mmap(-1, length) as buffer:  # page-aligned, as O_DIRECT demands
        try:
            got = os.preadv(fd, [buffer], offset)
        except OSError as error:
            raise Unavailable(f"{device}: cannot be read at byte {offset}: {error.strerror}") from error
        if got != length:
            raise Unavailable(f"{device}: got {got} bytes at byte {offset}, wanted {length}")
        return buffer[:]


def _read_at(device: str, offset: int, length: int) -> bytes:
    """Read through the page cache, which a mounted ext4 shares: there its superblock is up to date."""
    fd = _open(device, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    except OSError as error:
        raise Unavailable(f"{device}: cannot be read at byte {offset}: {error.strerror}") from error
    finally:
        os.close(fd)


def _mkfs_ext4(options: Sequence[str]) -> list[str]:
    # mke2fs takes only the last -E, and in it the last value of an option: one list, the caller's at its end.
    extended = ["nodiscard", "lazy_itable_init=1", "lazy_journal_init=1"]
    argv = ["mkfs.ext4", "-q", "-F", "-m", "0"]
    for flag, value in zip(options[::2], options[1::2], strict=True):
        if flag == "-E":
            extended.append(value)
        else:
            argv += [flag, value]
    return [*argv, "-E", ",".join(extended)]


def _run_or_refuse(argv: Sequence[str], timeout_s: float, failure: str) -> None:
    """Run a tool whose failure means that it does not want to; killed or out of time, its outcome is unknown."""
    try:
        command.run(argv, timeout_s=timeout_s)
    except command.CommandTimedOut:
        raise
    except command.CommandFailed as error:
        if error.status >= 128:
            raise
        raise Refused(f"{failure}: {_one_line(error.stderr)}") from error


def _e2fsck(device: str, flags: Sequence[str], timeout_s: float) -> None:
    _judge_e2fsck(device, command.run(["e2fsck", *flags, device], timeout_s=timeout_s, ok_statuses=range(128)))


def _judge_e2fsck(device: str, done: command.Completed) -> None:
    # e2fsck(8): 1 = errors corrected, 2 = and reboot, which concerns mounted filesystems only, 4 = errors left,
    # 8 = operational error. It speaks on stdout.
    if done.status >= 4:
        _check_no_device_error(done.stdout + done.stderr)
        said = _one_line(f"{done.stdout}\n{done.stderr}")
        raise Refused(f"{device}: e2fsck ended with status {done.status}, this ext4 needs a human: {said}")


def _yes(said: str) -> str:
    """Answer a question of e2fsck with yes, but never one that comes with a block that it could not read or write."""
    _check_no_device_error(said)
    return "y" if _E2FSCK_QUESTION.search(said) else ""


def _check_no_device_error(said: str) -> None:
    if found := _E2FSCK_DEVICE_ERROR.search(said):
        raise Unavailable(f"the device does not answer properly: {found[0]}")


def _one_line(text: str, limit: int = 500) -> str:
    """Join a tool's last lines, with mkfs.xfs's page of usage cut off: the reason comes before it."""
    said = text.partition("Usage:")[0].split()
    return " ".join(said)[-limit:]


def _has_capability(number: int) -> bool:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _read_ext4_superblock(device: str) -> _Ext4Superblock:
    raw = _read_at(device, _EXT4_SUPERBLOCK_OFFSET, 1024)
    if len(raw) < 1024 or _u16(raw, 0x38) != _EXT4_MAGIC:
        raise Refused(f"{device}: has no ext4 superblock")
    incompatible = _u32(raw, 0x60)
    is_64bit = bool(incompatible & _EXT4_INCOMPAT_64BIT)
    block_bytes = 1024 << _u32(raw, 0x18)
    return _Ext4Superblock(
        block_bytes=block_bytes,
        blocks=_u32(raw, 0x4) | (_u32(raw, 0x150) << 32 if is_64bit else 0),
        first_data_block=_u32(raw, 0x14),
        blocks_per_group=_u32(raw, 0x20),
        inode_table_blocks=math.ceil(_u32(raw, 0x28) * _u16(raw, 0x58) / block_bytes),
        descriptors_per_block=block_bytes // (_u16(raw, 0xFE) if is_64bit else 32),
        reserved_descriptor_blocks=_u16(raw, 0xCE),
        meta_bg=bool(incompatible & _EXT4_INCOMPAT_META_BG),
        sparse_super2=bool(_u32(raw, 0x5C) & _EXT4_COMPAT_SPARSE_SUPER2),
    )


def _u16(raw: bytes, offset: int) -> int:
    return int.from_bytes(raw[offset : offset + 2], "little")


def _u32(raw: bytes, offset: int) -> int:
    return int.from_bytes(raw[offset : offset + 4], "little")


def _ext4_groups(superblock: _Ext4Superblock, blocks: int) -> int:
    return math.ceil((blocks - superblock.first_data_block) / superblock.blocks_per_group)


def _ext4_extent(device: str) -> _Extent:
    superblock = _read_ext4_superblock(device)
    blocks = device_size_bytes(device) // superblock.block_bytes
    # The most that a last group needs for itself: a copy of superblock and descriptors, two bitmaps, the inode table.
    descriptor_blocks = math.ceil(_ext4_groups(superblock, blocks) / superblock.descriptors_per_block)
    overhead = 1 + descriptor_blocks + superblock.reserved_descriptor_blocks + 2 + superblock.inode_table_blocks
    rest = (blocks - superblock.first_data_block) % superblock.blocks_per_group
    too_short = 0 < rest < overhead + _EXT4_LEAST_DATA_BLOCKS
    # A rest in the group that is the filesystem's last already needs no metadata of its own.
    same_group = _ext4_groups(superblock, blocks) == _ext4_groups(superblock, superblock.blocks)
    reachable = blocks - rest if too_short and not same_group else blocks
    return _Extent(superblock.block_bytes, superblock.blocks, reachable)


def _ext4_reserved_limit_blocks(superblock: _Ext4Superblock) -> int:
    """Return how long it can become while the descriptors stay in the blocks reserved for them."""
    if superblock.meta_bg:
        return 1 << 48
    groups = _ext4_groups(superblock, superblock.blocks)
    descriptor_blocks = math.ceil(groups / superblock.descriptors_per_block) + superblock.reserved_descriptor_blocks
    return superblock.first_data_block + (
        descriptor_blocks * superblock.descriptors_per_block * superblock.blocks_per_group
    )


def _xfs_extent(device: str, mountpoint: str | None) -> _Extent:
    if mountpoint is None:
        raw = _read_at(device, 0, 512)
        magic, block_bytes, blocks = _XFS_SUPERBLOCK.unpack_from(raw.ljust(512, b"\0"))
        if magic != b"XFSB":
            raise Refused(f"{device}: has no xfs superblock")
        group_blocks = int.from_bytes(raw[_XFS_SB_AGBLOCKS_OFFSET : _XFS_SB_AGBLOCKS_OFFSET + 4], "big")
    else:
        geometry = _xfs_geometry(mountpoint)
        block_bytes, group_blocks, blocks = geometry[0], geometry[2], geometry[8]
    device_blocks = device_size_bytes(device) // block_bytes
    rest = device_blocks % group_blocks
    reachable = device_blocks - rest if rest < _XFS_LEAST_AG_BLOCKS else device_blocks
    return _Extent(block_bytes, blocks, reachable)


def _xfs_geometry(mountpoint: str) -> tuple[int, ...]:
    answer = bytearray(_XFS_GEOMETRY_V1.size)
    _mountpoint_ioctl(mountpoint, _XFS_IOC_FSGEOMETRY_V1, answer)
    return tuple(_XFS_GEOMETRY_V1.unpack(answer))


def _grow_xfs(device: str, mountpoint: str) -> None:
    geometry = _xfs_geometry(mountpoint)
    block_bytes, inode_percentage = geometry[0], geometry[7]
    request = _XFS_GROWFS_DATA.pack(device_size_bytes(device) // block_bytes, inode_percentage)
    _mountpoint_ioctl(mountpoint, _XFS_IOC_FSGROWFSDATA, bytearray(request))


def _mountpoint_ioctl(mountpoint: str, request: int, argument: bytearray) -> None:
    fd = _open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise Unavailable(f"{mountpoint}: the xfs there refuses: {error.strerror}") from error
    finally:
        os.close(fd)
