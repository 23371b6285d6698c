"""The qcow2 codec: the bytes of new images and overlays, and a strict reading of headers. Pure: bytes in, bytes out.

Owns what an image of ours looks like; hides qcow2's tables from everybody else. Source of every fact about the
format: QEMU's docs/interop/qcow2.

    cluster 0          header, at most 512 bytes of it used: header, backing format, end mark, backing name
    then, in clusters  refcount table | refcount blocks | L1 table | L2 tables | data
                                                                     `------.-----'
                                                          only with preallocation=metadata

Always true: version 3 (compat 1.1), clusters of 64 KiB, 16-bit refcounts, no feature bit, no internal snapshot, no
encryption; refcounts are exact, so that `qemu-img check` finds neither an error nor a leak. What is decoded may have
been written by anybody: nothing but Corrupt is raised for it, and no memory is taken by what a field says.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from csi_quobyte.errors import Corrupt, InvalidArgument

SECTOR_BYTES: Final = 512
CLUSTER_BITS: Final = 16
CLUSTER_BYTES: Final = 1 << CLUSTER_BITS
MAXIMUM_SIZE_BYTES: Final = 64 << 40

# How much of a file `decode_header` wants. QEMU puts its table of feature names (392 bytes) before the backing name
# when it rewrites a header, and a name may have 1023 bytes: about 1.6 KiB, so that this leaves room.
HEADER_READ_BYTES: Final = 4096

MAXIMUM_BACKING_NAME_BYTES: Final = 200

Preallocation = Literal["off", "metadata", "falloc"]
Extent = tuple[int, bytes]

_MAGIC: Final = b"QFI\xfb"
_VERSION: Final = 3
_REFCOUNT_ORDER: Final = 4
_BACKING_FORMAT: Final = 0xE2792ACA
_END_OF_EXTENSIONS: Final = 0

# Fields up to `snapshots_offset` are all of a version 2 header; version 3 goes on with three feature masks,
# refcount_order and header_length. QEMU writes 112 bytes: one more byte for the compression type, padded to 8.
_VERSION_2 = struct.Struct(">4sIQIIQIIQQIIQ")
_VERSION_3 = struct.Struct(">QQQII")
_VERSION_3_END: Final = _VERSION_2.size + _VERSION_3.size
_HEADER_BYTES: Final = 112
_EXTENSION = struct.Struct(">II")

_ENTRY_BYTES: Final = 8
_ENTRIES_PER_CLUSTER: Final = CLUSTER_BYTES // _ENTRY_BYTES
_REFCOUNTS_PER_CLUSTER: Final = CLUSTER_BYTES // 2
_REFCOUNT_ONE: Final = b"\x00\x01"
# Bit 63 of an L1 or L2 entry: what it points to has a refcount of exactly one and is written in place.
_COPIED: Final = 1 << 63

# Limits of QEMU, which opens nothing beyond them.
_CLUSTER_BITS_RANGE: Final = range(9, 22)
_MAXIMUM_L1_BYTES: Final = 32 << 20
_MAXIMUM_REFCOUNT_TABLE_BYTES: Final = 8 << 20
_MAXIMUM_SNAPSHOTS: Final = 65536
_MAXIMUM_NAME_BYTES: Final = 1023
_MAXIMUM_FORMAT_BYTES: Final = 15
_MAXIMUM_FILE_BYTES: Final = 1 << 63

_INCOMPATIBLE: Final = ("dirty", "corrupt", "external data file", "compression type", "extended L2 entries")
_COMPATIBLE: Final = ("lazy refcounts",)
_AUTOCLEAR: Final = ("bitmaps", "raw external data")


@dataclass(frozen=True)
class Backing:
    """What an overlay's header says about its parent: a path relative to the overlay's directory, and its format."""

    name: str
    format: Literal["raw", "qcow2"]


@dataclass(frozen=True)
class _Layout:
    """How many clusters each part of an image has; the parts follow each other in this order after the header."""

    refcount_table: int
    refcount_blocks: int
    l1: int
    l2: int
    data: int

    @property
    def refcount_table_at(self) -> int:
        return CLUSTER_BYTES

    @property
    def refcount_blocks_at(self) -> int:
        return self.refcount_table_at + self.refcount_table * CLUSTER_BYTES

    @property
    def l1_at(self) -> int:
        return self.refcount_blocks_at + self.refcount_blocks * CLUSTER_BYTES

    @property
    def l2_at(self) -> int:
        return self.l1_at + self.l1 * CLUSTER_BYTES

    @property
    def data_at(self) -> int:
        return self.l2_at + self.l2 * CLUSTER_BYTES

    @property
    def clusters(self) -> int:
        return self.data_at // CLUSTER_BYTES + self.data


@dataclass(frozen=True)
class ImageBytes:
    """A new image: extents to write into an empty file, and the length to give to that file.

    What no extent covers must read as zeros, so the file has to be new. With preallocation the writer may also
    allocate the whole length (fallocate) before or after writing: the data clusters are its last part.
    """

    _header: bytes
    _layout: _Layout

    @property
    def file_bytes(self) -> int:
        """Give the length of the finished file, a multiple of the cluster size."""
        return self._layout.clusters * CLUSTER_BYTES

    @property
    def metadata_bytes(self) -> int:
        """Give the length of all that lies before the data clusters: an upper bound of what the extents hold."""
        return self._layout.data_at

    def extents(self) -> Iterator[Extent]:
        """Generate (offset in bytes, contents) with rising offsets, each at most one cluster, anew at each call.

        Without preallocation three extents of a few bytes (64 KiB cluster, so written apart they stay sparse). With
        it everything before the data clusters: 160 MiB per TiB of virtual size (128 MiB L2 tables, 32 MiB
        refcounts), of which one cluster at a time is in memory.
        """
        layout = self._layout
        yield 0, self._header
        yield from _pointer_extents(layout.refcount_table_at, layout.refcount_blocks_at, layout.refcount_blocks, 0)
        yield from _refcount_extents(layout)
        yield from _pointer_extents(layout.l1_at, layout.l2_at, layout.l2, _COPIED)
        yield from _pointer_extents(layout.l2_at, layout.data_at, layout.data, _COPIED)


def encode_image(*, size_bytes: int, backing: Backing | None, preallocation: Preallocation = "off") -> ImageBytes:
    """Give the bytes of a new image that reads as zeros, or as its backing image.

    `falloc` gives the same bytes as `metadata`; allocating `file_bytes` is then up to the writer. Preallocated data
    clusters follow each other in guest order.

    Raises:
        InvalidArgument: the size is not a multiple of 512 between 512 bytes and 64 TiB; the backing name is empty,
            longer than 200 bytes, absolute, or could be read as something else than a relative path; preallocation
            together with a backing image, whose data it would hide.
    """
    if not 0 < size_bytes <= MAXIMUM_SIZE_BYTES or size_bytes % SECTOR_BYTES:
        raise InvalidArgument(
            f"an image cannot have {size_bytes} bytes: wanted is a multiple of {SECTOR_BYTES}, "
            f"at most {MAXIMUM_SIZE_BYTES} (64 TiB)"
        )
    if backing and preallocation != "off":
        raise InvalidArgument(
            f"preallocation {preallocation!r} would hide the data of the backing image {backing.name}"
        )
    layout = _plan(size_bytes, allocated=preallocation != "off")
    return ImageBytes(_encode_header(size_bytes, layout, backing), layout)


def _plan(size_bytes: int, *, allocated: bool) -> _Layout:
    """Cut an image into parts, with the fewest refcount structures that count every cluster, their own included."""
    l1_entries = l1_entries_for(size_bytes)
    layout = _Layout(
        refcount_table=1,
        refcount_blocks=1,
        l1=_divide_up(l1_entries, _ENTRIES_PER_CLUSTER),
        l2=l1_entries if allocated else 0,
        data=_divide_up(size_bytes, CLUSTER_BYTES) if allocated else 0,
    )
    # More refcount blocks are more clusters to count; the numbers only rise, and stop at the smallest that suffice.
    while True:
        blocks = _divide_up(layout.clusters, _REFCOUNTS_PER_CLUSTER)
        table = _divide_up(blocks, _ENTRIES_PER_CLUSTER)
        if (blocks, table) == (layout.refcount_blocks, layout.refcount_table):
            return layout
        layout = _Layout(table, blocks, layout.l1, layout.l2, layout.data)


def l1_entries_for(size_bytes: int, cluster_bits: int = CLUSTER_BITS) -> int:
    """Give how many L1 entries a virtual size needs: one for each L2 table, 512 MiB with clusters of 64 KiB."""
    l2_reach_bytes = 1 << (cluster_bits + cluster_bits - 3)
    return _divide_up(size_bytes, l2_reach_bytes)


def _divide_up(amount: int, unit: int) -> int:
    return -(-amount // unit)


def _encode_header(size_bytes: int, layout: _Layout, backing: Backing | None) -> bytes:
    """Encode header, extensions and backing name, all within the first 512 bytes.

    A disk writes a sector whole or not at all, so no torn write shows half a name. That is also why the table of
    feature names, which QEMU would write, is left out: with it the name begins in the second sector.
    """
    name = _checked_name(backing).encode("ascii") if backing else b""
    extensions = (_encode_extension(_BACKING_FORMAT, backing.format.encode("ascii")) if backing else b"") + bytes(8)
    fields = _VERSION_2.pack(
        _MAGIC,
        _VERSION,
        _HEADER_BYTES + len(extensions) if backing else 0,
        len(name),
        CLUSTER_BITS,
        size_bytes,
        0,
        l1_entries_for(size_bytes),
        layout.l1_at,
        layout.refcount_table_at,
        layout.refcount_table,
        0,
        0,
    ) + _VERSION_3.pack(0, 0, 0, _REFCOUNT_ORDER, _HEADER_BYTES)
    return fields.ljust(_HEADER_BYTES, b"\x00") + extensions + name


def _encode_extension(kind: int, data: bytes) -> bytes:
    return _EXTENSION.pack(kind, len(data)) + data.ljust(_padded(len(data)), b"\x00")


def _padded(length_bytes: int) -> int:
    return _divide_up(length_bytes, 8) * 8


def _checked_name(backing: Backing) -> str:
    """Give a backing name that QEMU takes for a relative path and nothing else (a colon could name a protocol)."""
    name = backing.name
    if backing.format not in ("raw", "qcow2"):
        raise InvalidArgument(f"backing format {backing.format!r} is neither raw nor qcow2")
    if not 0 < len(name) <= MAXIMUM_BACKING_NAME_BYTES:
        raise InvalidArgument(
            f"a backing name of {len(name)} bytes does not fit: wanted are 1 to {MAXIMUM_BACKING_NAME_BYTES}"
        )
    if not (name.isascii() and name.isprintable()) or name.startswith("/") or ":" in name:
        raise InvalidArgument(f"backing name {name!r} is not a relative path of printable ASCII without a colon")
    return name


def _pointer_extents(table_at: int, first_at: int, count: int, flags: int) -> Iterator[Extent]:
    """Generate a table whose `count` entries point to consecutive clusters from `first_at` on, cluster by cluster."""
    for done in range(0, count, _ENTRIES_PER_CLUSTER):
        entries = min(_ENTRIES_PER_CLUSTER, count - done)
        start = (first_at + done * CLUSTER_BYTES) | flags
        pointers = range(start, start + entries * CLUSTER_BYTES, CLUSTER_BYTES)
        yield table_at + done * _ENTRY_BYTES, struct.pack(f">{entries}Q", *pointers)


def _refcount_extents(layout: _Layout) -> Iterator[Extent]:
    """Generate the refcount blocks: one for every cluster of the file, none beyond its end."""
    for block in range(layout.refcount_blocks):
        counted = min(_REFCOUNTS_PER_CLUSTER, layout.clusters - block * _REFCOUNTS_PER_CLUSTER)
        yield layout.refcount_blocks_at + block * CLUSTER_BYTES, _REFCOUNT_ONE * counted


@dataclass(frozen=True)
class Header:
    """What the header of a qcow2 file says; offsets and lengths within QEMU's limits, everything else unjudged."""

    version: int
    size_bytes: int
    cluster_bits: int
    refcount_order: int
    backing_name: str | None
    backing_format: str | None
    crypt_method: int
    l1_offset_bytes: int
    l1_entries: int
    refcount_table_offset_bytes: int
    refcount_table_clusters: int
    snapshots: int
    incompatible_features: int
    compatible_features: int
    autoclear_features: int
    header_bytes: int


def decode_header(first_bytes: bytes) -> Header:
    """Read the header in the first `HEADER_READ_BYTES` of a file (or all of a shorter one), whoever wrote it.

    Raises:
        Corrupt: this is no qcow2 header, a field is outside what QEMU opens, or header, extensions and backing name
            do not lie within these bytes.
    """
    _require(len(first_bytes) >= _VERSION_2.size, f"{len(first_bytes)} bytes are too few for a qcow2 header")
    (
        magic,
        version,
        name_at,
        name_bytes,
        cluster_bits,
        size_bytes,
        crypt_method,
        l1_entries,
        l1_at,
        refcount_table_at,
        refcount_table_clusters,
        snapshots,
        snapshots_at,
    ) = _VERSION_2.unpack_from(first_bytes)
    _require(magic == _MAGIC, f"the file begins with {magic!r}, a qcow2 image with {_MAGIC!r}")
    _require(version in (2, 3), f"qcow2 version {version}, known are 2 and 3")
    _require(cluster_bits in _CLUSTER_BITS_RANGE, f"cluster_bits {cluster_bits}, wanted is 9 to 21")
    _require(size_bytes < _MAXIMUM_FILE_BYTES, f"virtual size {size_bytes} is beyond every limit")
    _require(snapshots <= _MAXIMUM_SNAPSHOTS, f"{snapshots} internal snapshots, at most {_MAXIMUM_SNAPSHOTS} can be")
    _check_table("L1", l1_at, l1_entries * _ENTRY_BYTES, _MAXIMUM_L1_BYTES, cluster_bits)
    refcount_table_bytes = refcount_table_clusters << cluster_bits
    _check_table("refcount", refcount_table_at, refcount_table_bytes, _MAXIMUM_REFCOUNT_TABLE_BYTES, cluster_bits)
    # The length of the snapshot table is not in the header; one byte for each snapshot is a lower bound.
    _check_table("snapshot", snapshots_at if snapshots else 0, snapshots, _MAXIMUM_SNAPSHOTS, cluster_bits)
    features = _decode_version_3(first_bytes) if version == 3 else _VERSION_2_FEATURES
    header_end = min(len(first_bytes), 1 << cluster_bits)
    _require(
        features.header_bytes <= header_end, f"a header of {features.header_bytes} bytes ends outside {header_end}"
    )
    backing_name = _decode_name(first_bytes[:header_end], features.header_bytes, name_at, name_bytes)
    extensions = first_bytes[: name_at if name_at else header_end]
    return Header(
        version=version,
        size_bytes=size_bytes,
        cluster_bits=cluster_bits,
        refcount_order=features.refcount_order,
        backing_name=backing_name,
        backing_format=_decode_backing_format(extensions, features.header_bytes, ended=bool(name_at)),
        crypt_method=crypt_method,
        l1_offset_bytes=l1_at,
        l1_entries=l1_entries,
        refcount_table_offset_bytes=refcount_table_at,
        refcount_table_clusters=refcount_table_clusters,
        snapshots=snapshots,
        incompatible_features=features.incompatible,
        compatible_features=features.compatible,
        autoclear_features=features.autoclear,
        header_bytes=features.header_bytes,
    )


@dataclass(frozen=True)
class _Features:
    """The fields that version 3 added to the header."""

    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    header_bytes: int


_VERSION_2_FEATURES: Final = _Features(0, 0, 0, _REFCOUNT_ORDER, _VERSION_2.size)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise Corrupt(message)


def _check_table(what: str, at: int, length_bytes: int, limit_bytes: int, cluster_bits: int) -> None:
    """Check that a table is no longer than QEMU opens and lies on a cluster boundary behind the header."""
    _require(length_bytes <= limit_bytes, f"the {what} table has {length_bytes} bytes, at most {limit_bytes} can be")
    cluster_bytes = 1 << cluster_bits
    _require(at % cluster_bytes == 0, f"the {what} table at {at} is not on a boundary of {cluster_bytes} bytes")
    _require(at <= _MAXIMUM_FILE_BYTES - length_bytes, f"the {what} table at {at} is beyond every limit")
    _require(at > 0 or length_bytes == 0, f"the {what} table lies on the header")


def _decode_version_3(first_bytes: bytes) -> _Features:
    _require(len(first_bytes) >= _VERSION_3_END, f"{len(first_bytes)} bytes are too few for a version 3 header")
    features = _Features(*_VERSION_3.unpack_from(first_bytes, _VERSION_2.size))
    _require(features.refcount_order <= 6, f"refcount_order {features.refcount_order}, at most 6 can be")
    wrong_length = features.header_bytes < _VERSION_3_END or features.header_bytes % 8
    _require(not wrong_length, f"header length {features.header_bytes}, wanted is a multiple of 8 from 104 on")
    return features


def _decode_name(header: bytes, header_bytes: int, name_at: int, name_bytes: int) -> str | None:
    """Give the backing name, None when the header names none; its offset alone decides (the length is then junk)."""
    if name_at == 0:
        return None
    _require(1 <= name_bytes <= _MAXIMUM_NAME_BYTES, f"a backing name of {name_bytes} bytes, 1 to 1023 can be")
    inside = header_bytes <= name_at <= len(header) - name_bytes
    _require(inside, f"a backing name at {name_at} of {name_bytes} bytes lies outside the header's {len(header)}")
    return _decode_text("backing name", header[name_at : name_at + name_bytes])


def _decode_text(what: str, raw: bytes) -> str:
    """Decode text that will be compared and shown: with a zero byte QEMU would read a shorter one than we."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Corrupt(f"the {what} {raw!r} is not UTF-8") from error
    _require("\x00" not in text, f"the {what} {raw!r} contains a zero byte")
    return text


def _decode_backing_format(extensions: bytes, at: int, *, ended: bool) -> str | None:
    """Find the backing format among the header extensions, which end at their end mark or, if `ended`, at the end."""
    found: str | None = None
    while at < len(extensions) or not ended:
        _require(at + _EXTENSION.size <= len(extensions), f"a header extension at {at} is cut off")
        kind, length_bytes = _EXTENSION.unpack_from(extensions, at)
        if kind == _END_OF_EXTENSIONS:
            break
        at += _EXTENSION.size
        fits = length_bytes <= len(extensions) - at
        _require(fits, f"header extension {kind:#x} at {at} with {length_bytes} bytes is cut off")
        if kind == _BACKING_FORMAT:
            _require(found is None, "there are two backing formats")
            _require(length_bytes <= _MAXIMUM_FORMAT_BYTES, f"a backing format of {length_bytes} bytes, 15 can be")
            found = _decode_text("backing format", extensions[at : at + length_bytes])
        at += _padded(length_bytes)
    return found


def check_header(header: Header, *, maximum_size_bytes: int = MAXIMUM_SIZE_BYTES) -> None:
    """Check that a header is one of ours: nothing in it makes QEMU open, trust or repair what we did not write.

    No feature bit of any kind is set in an image of ours, and QEMU sets none by itself but `corrupt`. The dirty bit
    too is refused: it belongs to lazy refcounts, which are never on, and would cost a rebuild at each open.

    Raises:
        Corrupt: another version, cluster size or refcount width; a feature bit, encryption or internal snapshots; a
            virtual size of zero, above `maximum_size_bytes` or not a multiple of 512; an L1 table of another length
            than this size needs.
    """
    _require(header.version == _VERSION, f"qcow2 version {header.version}, wanted is {_VERSION} (compat 1.1)")
    _check_features("incompatible", header.incompatible_features, _INCOMPATIBLE)
    _check_features("compatible", header.compatible_features, _COMPATIBLE)
    _check_features("autoclear", header.autoclear_features, _AUTOCLEAR)
    _require(header.crypt_method == 0, f"encryption method {header.crypt_method}, wanted is none (0)")
    _require(header.snapshots == 0, f"{header.snapshots} internal snapshots, wanted are none")
    _require(header.cluster_bits == CLUSTER_BITS, f"cluster_bits {header.cluster_bits}, wanted is {CLUSTER_BITS}")
    _require(
        header.refcount_order == _REFCOUNT_ORDER, f"refcount_order {header.refcount_order}, wanted is {_REFCOUNT_ORDER}"
    )
    size_is_right = 0 < header.size_bytes <= maximum_size_bytes and header.size_bytes % SECTOR_BYTES == 0
    _require(size_is_right, f"virtual size {header.size_bytes}, wanted is a multiple of 512 up to {maximum_size_bytes}")
    needed = l1_entries_for(header.size_bytes)
    _require(
        header.l1_entries == needed,
        f"{header.l1_entries} L1 entries, a virtual size of {header.size_bytes} bytes needs {needed}",
    )


def _check_features(kind: str, bits: int, names: tuple[str, ...]) -> None:
    if bits:
        found = [names[bit] if bit < len(names) else f"bit {bit}" for bit in range(64) if bits >> bit & 1]
        raise Corrupt(f"{kind} features {', '.join(found)}, wanted are none")


def check_backing(header: Header, backing: Backing | None) -> None:
    """Check that a header names exactly this backing image, or none.

    The string is for people and tools and never followed by us; it may lag behind the record in the last steps of a
    merge, so the caller decides when a difference is an error.

    Raises:
        Corrupt: another name or format, or a name where none is wanted.
    """
    wanted = (backing.name, backing.format) if backing else (None, None)
    found = (header.backing_name, header.backing_format if header.backing_name else None)
    _require(found == wanted, f"backing name and format {found}, wanted is {wanted}")


def l1_extent(header: Header) -> tuple[int, int]:
    """Give (offset, length) in bytes of the L1 table in the file; at most 1 MiB of a header that was checked."""
    return header.l1_offset_bytes, header.l1_entries * _ENTRY_BYTES


def l1_is_empty(l1_bytes: bytes) -> bool:
    """Say whether a whole L1 table maps nothing: nothing was ever written into this overlay.

    The reader compares the length with `l1_extent` first: a table that was cut off could have mapped something.

    Raises:
        Corrupt: no bytes at all, or not whole entries: the file ends before the table does.
    """
    _require(
        len(l1_bytes) > 0 and len(l1_bytes) % _ENTRY_BYTES == 0, f"an L1 table of {len(l1_bytes)} bytes is cut off"
    )
    return l1_bytes == bytes(len(l1_bytes))
