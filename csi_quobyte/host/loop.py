"""Kernel loop devices, found again by a tag and never by memory.

Owns: every loop device whose tag starts with a prefix of ours ("cq:").
Hides: the ioctls of linux/loop.h, races for free numbers, device nodes that are missing in a container's /dev, and
the lazy way in which the kernel clears a device that is still open.

A tag is two letters, a colon and 12 hex digits. The kernel keeps it for us in the device itself, in `sizelimit`: a
limit far above every file's size, which therefore limits nothing (the letters are its top two bytes, the digits the
rest). It is read from /sys. The usual place for a name, `lo_file_name`, carries the tag as well but is not
what we look for: LOOP_GET_STATUS64 asks the backing file for its attributes, so it hangs with a hung FUSE server and
fails with ENOTCONN when the server is dead (measured on 6.18), which is just when a device must be found. The
path in `backing_file` is no help either: it reads "/" once the FUSE mount is gone.

What always holds:
- At most one device has a tag: a lock per tag (an OFD lock on a byte of /dev/loop-control that the tag selects)
  excludes threads and processes, and dies with them.
- A device is only changed through a descriptor on which its tag was checked: while it is open the kernel does not
  give the number to another file.
- Looking for devices touches no backing file.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from csi_quobyte.errors import Busy, InvalidArgument, NotFound, Refused, Unavailable
from csi_quobyte.host import command, mounts

# linux/loop.h
_LOOP_CLR_FD = 0x4C01
_LOOP_SET_STATUS64 = 0x4C04
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_SET_CAPACITY = 0x4C07
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16
# struct loop_info64: lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit; lo_number, lo_encrypt_type,
# lo_encrypt_key_size, lo_flags; lo_file_name, lo_crypt_name, lo_encrypt_key; lo_init[2]
_LOOP_INFO64 = struct.Struct("=5Q4I64s64s32s2Q")
# struct loop_config: fd, block_size, info, 8 reserved words
_LOOP_CONFIG = struct.Struct(f"=2I{_LOOP_INFO64.size}s64x")
# linux/fs.h
_BLKROSET = 0x125D
_ON, _OFF = struct.pack("i", 1), struct.pack("i", 0)
# struct flock of fcntl_locking(2): l_type, l_whence, l_start, l_len, l_pid
_FLOCK = struct.Struct("hhqqi4x")

_BEYOND_EVERY_FILE = 1 << 62

_CONTROL_PATH = "/dev/loop-control"
_SYS_BLOCK = Path("/sys/block")
_SECTOR_BYTES = 512
_TAG = re.compile(r"([a-z]{2}):([0-9a-f]{12})")
_CONFIGURE_ATTEMPTS = 64
"""Each lost race means that another opener got the device: more than every thread of a busy node at once."""
_ENSURE_TIMEOUT_S = 10.0
"""Another call on the same tag takes milliseconds, unless its file hangs."""
_POLL_S = 0.01
_FINAL_OPEN_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ELOOP, errno.ENOTDIR, errno.ENXIO)
_GONE_ERRORS = (errno.ENOENT, errno.ENXIO, errno.ENODEV)
"""What the kernel says of a loop device that is unbound, being cleared or removed."""


@dataclass(frozen=True)
class LoopDevice:
    """A bound loop device as /sys described it at one moment."""

    path: str
    tag: str
    size_bytes: int
    read_only: bool
    direct_io: bool
    """False if the backing filesystem cannot do it: then data passes through the page cache a second time."""
    major_minor: str
    """As in the mount table: "7:0"."""
    clearing: bool
    """It was released while in use: the kernel frees it when the last user ends. Not to be used again."""

    @property
    def name(self) -> str:
        """The kernel's name: "loop0"."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Released:
    """What `release` found."""

    was_bound: bool
    flush_error: str | None
    """Why writing back cached data failed (a dead backing file); those writes are lost, the device is free."""


@dataclass(frozen=True)
class _Backing:
    path: str
    fd: int
    device: int
    inode: int


def tag_of(prefix: str, key: str) -> str:
    """Derive the tag of a key, a volume id say: equal keys have equal tags, others do not but for a 48-bit hash."""
    return f"{prefix}:{hashlib.blake2b(key.encode(), digest_size=6).hexdigest()}"


def find(tag: str) -> LoopDevice | None:
    """Return the device with this tag, None if there is none."""
    _check_tag(tag)
    return next((device for device in scan(tag) if device.tag == tag), None)


def scan(prefix: str) -> list[LoopDevice]:
    """Return all devices whose tag starts with `prefix`, those that are being cleared included."""
    names = [entry.name for entry in _SYS_BLOCK.iterdir() if entry.name.startswith("loop")]
    devices = [_read(name) for name in sorted(names)]
    return [device for device in devices if device is not None and device.tag.startswith(prefix)]


def ensure(
    tag: str,
    backing_path: str,
    *,
    read_only: bool,
    logical_block_size: int = 512,
    timeout_s: float = _ENSURE_TIMEOUT_S,
) -> LoopDevice:
    """Bind a file to a loop device with direct I/O, or return the device of that tag if it is bound to that file.

    Opening the file may hang with its filesystem; `timeout_s` bounds only the wait for another call with this tag.
    Whether the kernel took direct I/O is in the result. The device outlives this process; a crash leaves either
    no device or a complete one.

    Raises:
        InvalidArgument: the tag is malformed.
        NotFound: the file does not exist.
        Refused: the file is not a regular file or may not be opened; or the device of that tag is read-only
            and should be writable (or the reverse), is bound to another file, or its file is dead: release it first.
        Busy: another call works on this tag, or others took every free device from under us.
        Unavailable: the file's filesystem does not answer; the device of that tag is still being cleared; no loop
            device can be had.
    """
    _check_tag(tag)
    # The file first: opening it may hang, and the lock must not be held then.
    with (
        _opened_backing(backing_path, read_only=read_only) as backing,
        _tag_lock(tag, time.monotonic() + timeout_s),
    ):
        device = find(tag)
        if device is None:
            return _configure(tag, backing.fd, read_only=read_only, logical_block_size=logical_block_size)
        _check_reusable(device, backing, read_only=read_only)
        return device


def refresh_size(device: LoopDevice) -> LoopDevice:
    """Make the kernel take the backing file's size anew, larger or smaller; open users see it at once.

    Raises:
        NotFound: there is no such device any more.
        Unavailable: the kernel could not ask the backing file.
    """
    with _opened(device) as fd:
        _ioctl(fd, _LOOP_SET_CAPACITY, 0, f"{device.path}: cannot take its file's new size")
        return _require(device)


def set_read_only(device: LoopDevice) -> LoopDevice:
    """Make every later write to the device fail; those under way and filesystems mounted read-write are not stopped.

    Raises:
        NotFound: there is no such device any more.
    """
    with _opened(device) as fd:
        _ioctl(fd, _BLKROSET, _ON, f"{device.path}: cannot be made read-only")
        return _require(device)


def flush(device: LoopDevice, *, timeout_s: float) -> None:
    """Bring what was written to the device node itself down to the file (fsync(2) of the device).

    Raises:
        Unavailable: the file refuses some of it; CommandTimedOut: it did not end in time.
    """
    if error := _flush(device, timeout_s):
        raise Unavailable(f"{device.path}: cannot be flushed: {error}")


def cut_off(device: LoopDevice) -> None:
    """Let nothing reach the file any more: the device gets the size 0 by an offset behind the file's end.

    It keeps its tag and is no use any more but to be released. Of what is cached in the device itself (not in a file
    system on it) the kernel writes what is left, once, before: nothing can keep it from that. May hang with the file:
    for a thread that can be abandoned.

    Raises:
        NotFound: there is no such device any more.
        Unavailable: this kernel refuses, as some do while a file system is mounted; 6.18 does not.
    """
    flags = _LO_FLAGS_AUTOCLEAR if device.clearing else 0  # the only one of the kernel's flags that would be lost
    tag = device.tag.encode()
    # made from what /sys says, because LOOP_GET_STATUS64 would ask the file
    info = _LOOP_INFO64.pack(0, 0, 0, _BEYOND_EVERY_FILE, _mark_of(device.tag), 0, 0, 0, flags, tag, b"", b"", 0, 0)
    with _opened(device) as fd:
        _ioctl(fd, _LOOP_SET_STATUS64, info, f"{device.path}: cannot be cut off from its file")


def release(tag: str, *, timeout_s: float) -> Released:
    """Write back what is cached, unbind the device and wait until it is really free; none bound is success.

    A dead backing file does not stop the release: what could not be written back is in the result.

    Raises:
        InvalidArgument: the tag is malformed.
        Refused: the device is mounted here; nothing was done.
        Busy: another call works on this tag.
        Unavailable: it cannot be flushed in time (its file hangs; nothing was done), or something still has it open:
            the kernel frees it when that ends, and a retry then finds nothing to do.
    """
    _check_tag(tag)
    deadline = time.monotonic() + timeout_s
    with _tag_lock(tag, deadline):
        device = find(tag)
        if device is None:
            return Released(was_bound=False, flush_error=None)
        mounted = mounts.of_device(device.major_minor)
        # Clearing it now would make the kernel drop the device later, at an unmount that somebody else does.
        if mounted and not device.clearing:
            raise Refused(f"{device.path}: still mounted at {', '.join(mount.target for mount in mounted)}")
        flush_error = _flush(device, max(0.1, deadline - time.monotonic()))
        _clear(device)
        _wait_until_free(device, deadline)
        return Released(was_bound=True, flush_error=flush_error)


def _check_tag(tag: str) -> None:
    if not _TAG.fullmatch(tag):
        raise InvalidArgument(f"{tag!r}: a loop device's tag is two letters, a colon and 12 hex digits")


def _mark_of(tag: str) -> int:
    letters, digits = tag.split(":")
    return int.from_bytes(letters.encode() + bytes.fromhex(digits), "big")


def _tag_from(mark: int) -> str | None:
    raw = mark.to_bytes(8, "big")
    if not all(ord("a") <= byte <= ord("z") for byte in raw[:2]):
        return None
    return f"{raw[:2].decode()}:{raw[2:].hex()}"


def _read(name: str) -> LoopDevice | None:
    """Describe one device from /sys; None if it is unbound, not ours, or vanishes while we look."""
    base = _SYS_BLOCK / name
    try:
        tag = _tag_from(int(_attribute(base / "loop/sizelimit")))
        if tag is None:
            return None
        return LoopDevice(
            path=f"/dev/{name}",
            tag=tag,
            size_bytes=int(_attribute(base / "size")) * _SECTOR_BYTES,
            read_only=_attribute(base / "ro") == "1",
            direct_io=_attribute(base / "loop/dio") == "1",
            major_minor=_attribute(base / "dev"),
            clearing=_attribute(base / "loop/autoclear") == "1",
        )
    except OSError:
        return None  # /sys/block/loopN/loop exists only while a file is bound


def _attribute(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


def _require(device: LoopDevice) -> LoopDevice:
    found = _read(device.name)
    if found is None or found.tag != device.tag:
        raise NotFound(f"{device.path}: no longer the loop device {device.tag}")
    return found


@contextlib.contextmanager
def _tag_lock(tag: str, deadline: float) -> Iterator[None]:
    """Exclude every other call with this tag, in any thread or process that sees the same /dev."""
    try:
        fd = os.open(_CONTROL_PATH, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"{_CONTROL_PATH}: {error.strerror}; is the loop module loaded, and is this root?") from error
    try:
        # Open file description locks: unlike POSIX locks they exclude threads of one process too.
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _mark_of(tag), 1, 0)
        while not _try_lock(fd, request):
            if time.monotonic() >= deadline:
                raise Busy(f"loop device {tag}: another operation holds it")
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int, request: bytes) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError):
        return False  # EAGAIN or EACCES: held (fcntl_locking(2) allows both)
    return True


@contextlib.contextmanager
def _opened_backing(path: str, *, read_only: bool) -> Iterator[_Backing]:
    mode = os.O_RDONLY if read_only else os.O_RDWR
    with contextlib.ExitStack() as stack:
        try:
            # O_NONBLOCK: a FIFO put in the file's place must not stop us; for a regular file it means nothing.
            fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, fd)
            found = os.fstat(fd)
        except FileNotFoundError as error:
            raise NotFound(f"{path}: no such file to put a loop device on") from error
        except OSError as error:
            error_class = Refused if error.errno in _FINAL_OPEN_ERRORS else Unavailable
            raise error_class(f"{path}: cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise Refused(f"{path}: not a regular file")
        yield _Backing(path, fd, found.st_dev, found.st_ino)


def _check_reusable(device: LoopDevice, backing: _Backing, *, read_only: bool) -> None:
    if device.clearing:
        raise Unavailable(f"{device.path}: is being cleared, held by {_holders(device)}")
    if device.read_only != read_only:
        found, wanted = ("read-only", "writable") if device.read_only else ("writable", "read-only")
        raise Refused(f"{device.path}: is {found}, wanted {wanted}; release it first")
    with _opened(device) as fd:
        status = bytearray(_LOOP_INFO64.size)
        try:
            fcntl.ioctl(fd, _LOOP_GET_STATUS64, status)
        except OSError as error:
            raise Refused(f"{device.path}: its file is dead ({error.strerror}); release it first") from error
    lo_device, lo_inode = _LOOP_INFO64.unpack(status)[:2]
    if (lo_device, lo_inode) != (backing.device, backing.inode):
        raise Refused(f"{device.path}: is bound to another file than {backing.path}; release it first")


def _configure(tag: str, backing_fd: int, *, read_only: bool, logical_block_size: int) -> LoopDevice:
    flags = _LO_FLAGS_DIRECT_IO | (_LO_FLAGS_READ_ONLY if read_only else 0)
    info = _LOOP_INFO64.pack(0, 0, 0, 0, _mark_of(tag), 0, 0, 0, flags, tag.encode(), b"", b"", 0, 0)
    config = _LOOP_CONFIG.pack(backing_fd, logical_block_size, info)
    for _ in range(_CONFIGURE_ATTEMPTS):
        device = _try_configure(_free_name(), config, read_only=read_only)
        if device is not None:
            return device
    raise Busy(f"loop device {tag}: lost the race for a free device {_CONFIGURE_ATTEMPTS} times")


def _try_configure(name: str, config: bytes, *, read_only: bool) -> LoopDevice | None:
    """Bind one free device; None if somebody else was faster or it was removed since it was offered."""
    try:
        # Without write permission on this descriptor the kernel makes the device read-only.
        fd = os.open(_device_node(name), (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except NotFound:
        return None
    except OSError as error:
        if error.errno in _GONE_ERRORS:
            return None
        raise Unavailable(f"/dev/{name}: cannot be opened: {error.strerror}") from error
    try:
        fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
        if not read_only:
            # BLKROSET belongs to the number and outlives what was bound to it. Dying here leaves a device that the
            # next ensure refuses as read-only.
            fcntl.ioctl(fd, _BLKROSET, _OFF)
        return _read(name)
    except OSError as error:
        if error.errno == errno.EBUSY or error.errno in _GONE_ERRORS:
            return None
        raise Unavailable(f"/dev/{name}: cannot be bound to a file: {error.strerror}") from error
    finally:
        os.close(fd)


def _free_name() -> str:
    fd = os.open(_CONTROL_PATH, os.O_RDWR | os.O_CLOEXEC)
    try:
        return f"loop{_ioctl(fd, _LOOP_CTL_GET_FREE, 0, 'no free loop device')}"
    finally:
        os.close(fd)


def _device_node(name: str) -> str:
    """Return the path of a device's node, made if it is missing: a container's /dev may be a copy.

    Raises:
        NotFound: the kernel has no such device.
        Refused: the path is something else.
        Unavailable: the node is missing and cannot be made.
    """
    path = f"/dev/{name}"
    try:
        # Not 7:N: with the module parameter max_part the minor numbers are N << k.
        major, minor = (int(part) for part in _attribute(_SYS_BLOCK / name / "dev").split(":"))
    except OSError as error:
        raise NotFound(f"{path}: no such loop device") from error
    try:
        with contextlib.suppress(FileExistsError):
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(major, minor))
        found = os.stat(path, follow_symlinks=False)
    except OSError as error:
        raise Unavailable(f"{path}: cannot be made: {error.strerror}") from error
    if not stat.S_ISBLK(found.st_mode) or found.st_rdev != os.makedev(major, minor):
        raise Refused(f"{path}: is not the block device {major}:{minor}")
    return path


@contextlib.contextmanager
def _opened(device: LoopDevice) -> Iterator[int]:
    """Open a device and check its tag on the descriptor, which from then on pins the binding."""
    try:
        # Read-only: closing a writable descriptor makes udev probe the device, which keeps it open for a while.
        fd = os.open(_device_node(device.name), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _GONE_ERRORS:
            raise NotFound(f"{device.path}: no longer the loop device {device.tag}") from error
        raise Unavailable(f"{device.path}: cannot be opened: {error.strerror}") from error
    try:
        _require(device)
        yield fd
    finally:
        os.close(fd)


def _ioctl(fd: int, request: int, argument: int | bytes, failure: str) -> int:
    try:
        result = fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise Unavailable(f"{failure}: {error.strerror}") from error
    return result if isinstance(result, int) else 0


def _flush(device: LoopDevice, timeout_s: float) -> str | None:
    """Write back cached data; return why that failed, None if it did not.

    In a process of its own, because fsync on a hung file cannot be interrupted.
    """
    flushed = command.run(["sync", "--", _device_node(device.name)], timeout_s=timeout_s, ok_statuses=(0, 1))
    return None if flushed.status == 0 else flushed.stderr.strip()


def _clear(device: LoopDevice) -> None:
    # Since 6.11 the kernel clears the device when the last descriptor is closed, ours included; before, at once if
    # nobody else has it open.
    try:
        with _opened(device) as fd:
            fcntl.ioctl(fd, _BLKROSET, _OFF)  # the number's next user, who may not be us, wants to write
            fcntl.ioctl(fd, _LOOP_CLR_FD, 0)
    except NotFound:
        return
    except OSError as error:
        if error.errno not in _GONE_ERRORS:
            raise Unavailable(f"{device.path}: cannot be cleared: {error.strerror}") from error


def _wait_until_free(device: LoopDevice, deadline: float) -> None:
    while True:
        found = _read(device.name)
        if found is None or found.tag != device.tag:
            return
        if time.monotonic() >= deadline:
            raise Unavailable(f"{device.path}: cleared, but still held by {_holders(device)}")
        time.sleep(_POLL_S)


def _holders(device: LoopDevice) -> str:
    stacked = _SYS_BLOCK / device.name / "holders"
    names = [f"the device {entry.name}" for entry in stacked.iterdir()] if stacked.is_dir() else []
    names += [f"the mount {mount.target}" for mount in mounts.of_device(device.major_minor)]
    names += mounts.users_of(device.path)
    return ", ".join(names) or "something unseen: a lazily unmounted filesystem, or one of another mount namespace"
