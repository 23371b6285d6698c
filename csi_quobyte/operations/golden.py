"""Golden images: import, list, remove. Volumes are made from them by name (`sourceImage`).

An image's life:   (nothing) -> creating -> ready -> deleting -> (nothing)

What is imported comes from outside and is not trusted: its format is what the caller says and never probed, it may
need no other file, and it is rewritten into an image as ours are. Until that is whole, nothing but temporary files and
a job record is in the pool; `creating` lasts for a moment.
"""

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import FileIO

from csi_quobyte.engine import removal
from csi_quobyte.engine.hold import holding
from csi_quobyte.errors import AlreadyExists, Busy, Corrupt, DriverError, InvalidArgument, NotFound, OutOfRange, Refused
from csi_quobyte.host import jobs, qemu_img
from csi_quobyte.host.qemu import QemuTools
from csi_quobyte.host.qemu_img import ForeignFormat
from csi_quobyte.pool import images, qcow2, records
from csi_quobyte.pool.records import Content, ImageRecord, ImageState, LayerRecord, LayerState, image_marker
from csi_quobyte.pool.sizes import MAXIMUM_SIZE_BYTES, round_up
from csi_quobyte.pool.steps import translated, write_all
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_COMPRESSION_TYPE = 1 << 3
_EXTENDED_L2 = 1 << 4
_READ_FEATURES = _COMPRESSION_TYPE | _EXTENDED_L2
"""Incompatible features of qcow2 that only concern how the image is laid out."""

# Gives what is read next: empty at the end, None if nothing has come for a moment.
Read = Callable[[int], bytes | None]


@dataclass(frozen=True)
class ImportRequest:
    """An image to be imported: a file's path, or `read` for a stream; `name` is any text."""

    name: str
    format: ForeignFormat
    path: str = ""
    read: Read | None = None


def import_image(store: Store, tools: QemuTools, request: ImportRequest, watch: jobs.Watch) -> ImageRecord:
    """Make a golden image of a file; durable and ready on return. After an error nothing is left.

    Raises:
        AlreadyExists: there is an image of this name.
        Refused: the file is not what it should be, or needs another file.
        OutOfRange: it is empty or too large.
        Exhausted: no space.
        Stopped: the watch said so.
    """
    image_id = records.image_id(store.prefix, request.name)
    _check_free(store, image_id, request.name)
    with (
        holding(store, f"import of image {request.name!r}") as hold,
        _source(store, request, hold.watched(watch)) as path,
        _held_still(path) as check_unchanged,
    ):
        size_bytes = _judged_size_bytes(tools, path, request.format)
        store.check_room(min(_allocated_bytes(path), size_bytes), f"image {request.name!r}")
        made = store.write_image(images.blank("qcow2", size_bytes=size_bytes, preallocation="off"))
        try:
            jobs.copy_foreign(tools, path, request.format, made, watch=hold.watched(watch))
            check_unchanged()
            hold.confirm()
            with store.lock(image_id):
                _make_free(store, image_id, request.name)
                return _publish(store, image_id, request.name, made, size_bytes)
        finally:
            store.discard_temporary(made)


def _check_free(store: Store, image_id: str, name: str) -> None:
    present = store.find_image(image_id)
    if present and present.state is ImageState.READY:
        store.settle(present)
        raise AlreadyExists(f"image {name!r} exists; remove it first, volumes made from it stay")


def _make_free(store: Store, image_id: str, name: str) -> None:
    """Check that a name is free, and end what a process that died has left of an image. The image's lock is held."""
    _check_free(store, image_id, name)
    if left := store.find_image(image_id):
        removal.remove_image(store, left)


@contextmanager
def _source(store: Store, request: ImportRequest, watch: jobs.Watch) -> Iterator[str]:
    """Give the path of the file to be imported; a stream is written into a temporary file of the pool first."""
    if request.read is None:
        yield _checked_path(request.path)
        return
    read = request.read
    spooled = store.write_image(lambda _: None)
    try:
        with translated(spooled), open(spooled, "r+b", buffering=0) as file:  # noqa: PTH123
            _spool(file.fileno(), read, watch)
        yield spooled
    finally:
        store.discard_temporary(spooled)


def _checked_path(path: str) -> str:
    """Give the absolute path of a plain file.

    Raises:
        NotFound, Refused: there is none.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise Refused(f"{path} is not a plain file")
    return os.path.abspath(path)


def _spool(fd: int, read: Read, watch: jobs.Watch) -> None:
    """Write a stream, whose length nobody knows, into a file, with holes for what is zero."""
    length_bytes = 0
    zeros = bytes(_BLOCK_BYTES)
    while (block := read(_BLOCK_BYTES)) != b"":
        if watch(jobs.Progress(length_bytes, 0)) == "stop":
            raise jobs.Stopped(f"stopped after {length_bytes} bytes of the stream")
        if block is None:
            continue
        if block != zeros[: len(block)]:
            write_all(fd, block, length_bytes)
        length_bytes += len(block)
    os.ftruncate(fd, length_bytes)


@contextmanager
def _held_still(path: str) -> Iterator[Callable[[], None]]:
    """Open a file, and give what says at the end whether it is what it was: judged and copied are one file, not two.

    The time of its last change of any kind (ctime) cannot be set by its owner.

    Raises:
        Refused: it cannot be read; by what is given: it has changed, or another one has its name.
    """
    with _opened(path) as file:
        before = _state_of(file.fileno())

        def check_unchanged() -> None:
            with suppress(OSError):
                if _state_of(path) == before == _state_of(file.fileno()):
                    return
            raise Refused(f"{path} has changed while it was imported")

        yield check_unchanged


def _allocated_bytes(path: str) -> int:
    with _opened(path) as file:
        return os.fstat(file.fileno()).st_blocks * 512


def _opened(path: str) -> FileIO:
    try:
        return open(path, "rb", buffering=0)  # noqa: PTH123
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error


def _state_of(file: str | int) -> tuple[int, ...]:
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _judged_size_bytes(tools: QemuTools, path: str, image_format: ForeignFormat) -> int:
    """Judge a file, of qcow2 the header before QEMU sees it, and give the size of the image to be made.

    Raises:
        Refused: it needs another file, or is not of this format.
        OutOfRange: its size is not one that an image can have.
    """
    if image_format == "qcow2":
        _check_header(path)
    shown_bytes = qemu_img.foreign_size_bytes(tools, path, image_format)
    if image_format == "qcow2":
        qemu_img.check_foreign(tools, path)
    elif image_format == "vdi":
        _check_vdi_length(path)
    size_bytes = round_up(shown_bytes)
    if not 0 < size_bytes <= MAXIMUM_SIZE_BYTES:
        raise OutOfRange(f"{path} has a virtual size of {shown_bytes} bytes; from 1 byte to 64 TiB are possible")
    return size_bytes


def _check_vdi_length(path: str) -> None:
    """Check that the blocks that a vdi image counts are there: QEMU reads what is beyond the end as zeros."""
    with _opened(path) as file:
        header = file.read(512)
        data_at = int.from_bytes(header[344:348], "little")
        block_bytes = int.from_bytes(header[376:380], "little")
        blocks = int.from_bytes(header[388:392], "little")
        if os.fstat(file.fileno()).st_size < data_at + block_bytes * blocks:
            raise Refused(f"{path} is cut off: {blocks} blocks of {block_bytes} bytes do not end in it")


def _check_header(path: str) -> None:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            header = qcow2.decode_header(file.read(qcow2.HEADER_READ_BYTES))
    except Corrupt as error:
        raise Refused(f"{path}: {error}") from error
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    what = ""
    if header.backing_name is not None:
        what = f"lies on another image ({header.backing_name!r})"
    elif header.incompatible_features & ~_READ_FEATURES:
        what = f"keeps its data in another file, is damaged or unknown (features {header.incompatible_features:#x})"
    elif header.crypt_method:
        what = "is encrypted"
    elif header.snapshots:
        what = "has internal snapshots"
    if what:
        raise Refused(f"{path} {what}: convert it into a plain image first (qemu-img convert)")


def _publish(store: Store, image_id: str, name: str, made: str, size_bytes: int) -> ImageRecord:
    """Give a whole image its layer and its record. The image's lock is held."""
    image = store.create(
        ImageRecord(
            id=image_id,
            uid=records.new_uid(),
            name=name,
            state=ImageState.CREATING,
            layer=records.new_layer_id(),
            size_bytes=size_bytes,
            content=Content(state="raw"),  # our mkfs never runs over it
            created_at=records.now(),
        )
    )
    layer = LayerRecord(
        id=image.layer,
        file=f"{image.layer}.qcow2",
        format="qcow2",
        size_bytes=size_bytes,
        parent=None,
        state=LayerState.FROZEN,
        depth=1,
    )
    try:
        store.make_layer(layer, image_marker(image), made)
        return store.swap(image, replace(image, state=ImageState.READY, unfinished=False))
    except DriverError:
        current = store.find_image(image_id)
        if current and current.uid == image.uid:
            with removal.undoing():
                removal.remove_image(store, current)
        raise


def list_images(store: Store) -> list[ImageRecord]:
    """Give all golden images that are ready, sorted by name. Damaged records are logged and skipped."""
    found = []
    for image_id in store.image_ids():
        try:
            image = store.find_image(image_id)
        except Corrupt as error:
            log.error("left out of the list: %s", error)
            continue
        if image and image.state is ImageState.READY:
            found.append(image)
    return sorted(found, key=lambda one: one.name)


def remove_image(store: Store, name: str) -> None:
    """Remove a golden image; volumes that lie on it live on. The collector frees its layer once none does.

    One whose record cannot be read is removed, too.

    Raises:
        NotFound: there is none of this name.
        Busy: another process works on it.
    """
    if not name:
        raise InvalidArgument("the name of the image is missing")
    image_id = records.image_id(store.prefix, name)
    with store.lock(image_id):
        try:
            image = store.find_image(image_id)
        except Corrupt as error:
            if not store.is_damaged("images", image_id):
                raise Busy(f"the record of image {name!r} was being changed") from error
            log.error("removing an image whose record cannot be read: %s", error)
            store.remove_damaged("images", image_id)
            return
        if image is None:
            raise NotFound(f"there is no image {name!r}")
        removal.remove_image(store, image)
