"""Image files as the store writes and reads them: what the qcow2 codec says, put to files.

Owns how the bytes of a blank or overlay image get into a file, and what of an image is believed: its header is checked
against the layer's record, because a file may have been damaged or exchanged.
"""

import os
from collections.abc import Callable, Sequence

from csi_quobyte.errors import Corrupt
from csi_quobyte.pool import qcow2
from csi_quobyte.pool.qcow2 import Backing, Header
from csi_quobyte.pool.records import ImageFormat, LayerRecord, Preallocation
from csi_quobyte.pool.steps import write_all
from csi_quobyte.pool.store import Store

# Fills an empty file, given its descriptor.
Writer = Callable[[int], None]


def blank(image_format: ImageFormat, *, size_bytes: int, preallocation: Preallocation) -> Writer:
    """Give a writer of an image that reads as zeros.

    With preallocation falloc all of its space is taken at once (row S11) by fallocate(2); where a mount lacks that, the
    C library touches every block instead, which is as good and takes long.
    """
    if image_format == "raw":
        return lambda fd: _set_length(fd, size_bytes, allocate=preallocation == "falloc")
    image = qcow2.encode_image(size_bytes=size_bytes, backing=None, preallocation=preallocation)
    return lambda fd: _write_image(fd, image, allocate=preallocation == "falloc")


def overlay(*, size_bytes: int, backing_name: str, backing_format: ImageFormat) -> Writer:
    """Give a writer of an empty qcow2 overlay; the backing name is relative to the overlay's directory."""
    image = qcow2.encode_image(size_bytes=size_bytes, backing=Backing(backing_name, backing_format))
    return lambda fd: _write_image(fd, image, allocate=False)


def _set_length(fd: int, length_bytes: int, *, allocate: bool) -> None:
    if allocate:
        os.posix_fallocate(fd, 0, length_bytes)
    else:
        os.ftruncate(fd, length_bytes)


def _write_image(fd: int, image: qcow2.ImageBytes, *, allocate: bool) -> None:
    """Set the length first: what no extent covers reads as zeros, and writes stay inside the end of the file (S18)."""
    _set_length(fd, image.file_bytes, allocate=allocate)
    for offset_bytes, data in image.extents():
        write_all(fd, data, offset_bytes)


def read_header(store: Store, layer: LayerRecord) -> Header:
    """Read and judge the header of a qcow2 layer.

    Raises:
        Corrupt: the file is missing, not a qcow2 image as ours are, or asks for another file (row S54).
    """
    first_bytes = store.read_image(layer, 0, qcow2.HEADER_READ_BYTES)
    try:
        header = qcow2.decode_header(first_bytes)
        qcow2.check_header(header)
    except Corrupt as error:
        raise Corrupt(f"{store.image_path(layer)}: {error}") from error
    return header


def is_untouched(store: Store, layer: LayerRecord) -> bool:
    """Say whether nothing was ever written into a qcow2 layer that no daemon has open: its L1 table maps nothing.

    Raises:
        Corrupt: see `read_header`, or the file ends inside the table.
    """
    offset_bytes, length_bytes = qcow2.l1_extent(read_header(store, layer))
    table = store.read_image(layer, offset_bytes, length_bytes)
    if len(table) != length_bytes:
        raise Corrupt(f"{store.image_path(layer)}: the file ends inside its L1 table")
    return qcow2.l1_is_empty(table)


def virtual_size_bytes(store: Store, layer: LayerRecord) -> int:
    """Give the virtual size of a layer's image: a raw file's length, or what the qcow2 header says.

    Raises:
        Corrupt: the file is missing or its header is refused.
    """
    if layer.format == "qcow2":
        return read_header(store, layer).size_bytes
    found = store.image_bytes(layer)
    if found is None:
        raise Corrupt(f"layer {layer.id} has no image file {store.image_path(layer)}")
    return found[0]


def backing_name(store: Store, layer: LayerRecord) -> str | None:
    """Give the backing string in a layer's image, None when it has none. Nothing follows it.

    Raises:
        Corrupt: see `read_header`.
    """
    return read_header(store, layer).backing_name if layer.format == "qcow2" else None


def check_chain(store: Store, chain: Sequence[LayerRecord]) -> None:
    """Check, before a daemon opens a chain, that every image is what its record says.

    Raises:
        Corrupt: a file is missing, has a refused header, or is smaller than its record.
    """
    for layer in chain:
        found = virtual_size_bytes(store, layer)
        if found < layer.size_bytes:
            raise Corrupt(f"the image of layer {layer.id} has {found} bytes, its record says {layer.size_bytes}")
