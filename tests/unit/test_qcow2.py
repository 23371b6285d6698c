"""The qcow2 codec by itself: round trips, the first-sector rule, exact refcounts, and headers written by an enemy.

Axes: virtual size, backing image, preallocation; for decoding every field, random bytes and mutated headers.
That QEMU agrees is tested in tests/integration/test_qcow2_against_qemu.py.
"""

import itertools
import struct
import time
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from csi_quobyte.errors import Corrupt, InvalidArgument
from csi_quobyte.pool import qcow2
from csi_quobyte.pool.qcow2 import CLUSTER_BYTES, MAXIMUM_SIZE_BYTES, SECTOR_BYTES, Backing

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

sizes = st.integers(1, MAXIMUM_SIZE_BYTES // SECTOR_BYTES).map(lambda sectors: sectors * SECTOR_BYTES)
name_characters = st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters=":")
backings = st.builds(
    Backing,
    name=st.text(name_characters, min_size=1, max_size=200).filter(lambda name: not name.startswith("/")),
    format=st.sampled_from(["raw", "qcow2"]),
)


def first_bytes(image: qcow2.ImageBytes) -> bytes:
    """The header as it is read from the finished file."""
    _, header = next(image.extents())
    return header.ljust(qcow2.HEADER_READ_BYTES, b"\x00")


def blank_header(size_bytes: int = GIB, backing: Backing | None = None) -> bytes:
    return first_bytes(qcow2.encode_image(size_bytes=size_bytes, backing=backing))


def patched(header: bytes, at: int, layout: str, *values: int | bytes) -> bytes:
    """`header` with the field at a byte offset replaced."""
    changed = bytearray(header)
    struct.pack_into(layout, changed, at, *values)
    return bytes(changed)


# --- encoding ----------------------------------------------------------------------------------------------------


@given(sizes, st.none() | backings)
def test_what_is_encoded_is_decoded_and_accepted(size_bytes: int, backing: Backing | None) -> None:
    image = qcow2.encode_image(size_bytes=size_bytes, backing=backing)
    header = qcow2.decode_header(first_bytes(image))
    qcow2.check_header(header, maximum_size_bytes=size_bytes)
    qcow2.check_backing(header, backing)
    assert (header.version, header.size_bytes, header.cluster_bits, header.refcount_order) == (3, size_bytes, 16, 4)
    assert (header.incompatible_features, header.compatible_features, header.autoclear_features) == (0, 0, 0)
    assert (header.snapshots, header.crypt_method) == (0, 0)
    offset_bytes, length_bytes = qcow2.l1_extent(header)
    assert length_bytes == -(-size_bytes // (512 * MIB)) * 8
    assert offset_bytes + length_bytes <= image.file_bytes == image.metadata_bytes


@given(sizes, backings)
def test_header_extensions_and_backing_name_lie_in_the_first_sector(size_bytes: int, backing: Backing) -> None:
    offset_bytes, header = next(qcow2.encode_image(size_bytes=size_bytes, backing=backing).extents())
    assert offset_bytes == 0
    assert len(header) <= SECTOR_BYTES
    assert header.endswith(backing.name.encode())
    assert qcow2.decode_header(header[:SECTOR_BYTES]).backing_name == backing.name


def test_the_longest_backing_name_fits_and_one_more_byte_is_refused() -> None:
    longest = Backing("n" * 200, "qcow2")
    assert qcow2.decode_header(blank_header(backing=longest)).backing_name == longest.name
    with pytest.raises(InvalidArgument, match="201"):
        qcow2.encode_image(size_bytes=GIB, backing=replace(longest, name="n" * 201))


@pytest.mark.parametrize("size_bytes", [-512, 0, 511, 513, GIB + 1, 64 * TIB + 512])
def test_sizes_that_no_image_has_are_refused(size_bytes: int) -> None:
    with pytest.raises(InvalidArgument, match=str(size_bytes)):
        qcow2.encode_image(size_bytes=size_bytes, backing=None)


@pytest.mark.parametrize("name", ["", "/absolute", "nbd:host:10809", "json:{}", "a\x00b", "a\nb", "ü"])
def test_backing_names_that_are_no_plain_relative_path_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        qcow2.encode_image(size_bytes=GIB, backing=Backing(name, "raw"))


def test_an_unknown_backing_format_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="vmdk"):
        qcow2.encode_image(size_bytes=GIB, backing=Backing("base", "vmdk"))  # type: ignore[arg-type]


@pytest.mark.parametrize("preallocation", ["metadata", "falloc"])
def test_preallocation_over_a_backing_image_is_refused(preallocation: qcow2.Preallocation) -> None:
    with pytest.raises(InvalidArgument, match="backing"):
        qcow2.encode_image(size_bytes=GIB, backing=Backing("base", "raw"), preallocation=preallocation)


@pytest.mark.parametrize("size_bytes", [512, GIB, 16 * TIB, 64 * TIB])
def test_a_blank_image_of_any_size_is_a_few_bytes_to_write(size_bytes: int) -> None:
    image = qcow2.encode_image(size_bytes=size_bytes, backing=None)
    assert sum(len(data) for _, data in image.extents()) <= SECTOR_BYTES
    assert image.file_bytes <= 2 * MIB


def read_image(image: qcow2.ImageBytes) -> dict[int, bytes]:
    """The metadata clusters of an image by cluster number, as a reader of the finished file sees them."""
    clusters: dict[int, bytes] = {}
    end = 0
    for offset_bytes, data in image.extents():
        assert offset_bytes % CLUSTER_BYTES == 0
        assert offset_bytes >= end, "extents rise and do not overlap"
        assert 0 < len(data) <= CLUSTER_BYTES
        end = offset_bytes + len(data)
        clusters[offset_bytes // CLUSTER_BYTES] = data.ljust(CLUSTER_BYTES, b"\x00")
    assert end <= image.metadata_bytes
    return clusters


def pointers(clusters: dict[int, bytes], at_bytes: int, count: int) -> list[int]:
    """`count` 8-byte entries of a table in the image."""
    first, length = at_bytes // CLUSTER_BYTES, -(-count * 8 // CLUSTER_BYTES)
    table = b"".join(clusters.get(number, bytes(CLUSTER_BYTES)) for number in range(first, first + length))
    return list(struct.unpack_from(f">{count}Q", table))


def counted(clusters: dict[int, bytes], header: qcow2.Header) -> tuple[list[int], list[int]]:
    """The recorded refcount of each cluster up to the end of the last block, and the addresses of the blocks."""
    entries = pointers(clusters, header.refcount_table_offset_bytes, header.refcount_table_clusters * 8192)
    blocks = list(itertools.takewhile(bool, entries))
    assert not any(entries[len(blocks) :])
    counts: list[int] = []
    for block in blocks:
        counts += struct.unpack(">32768H", clusters[block // CLUSTER_BYTES])
    return counts, blocks


# 32760 data clusters make 32768 clusters in all: exactly one refcount block full, then one short of it and one more.
@pytest.mark.parametrize(
    "size_bytes", [512, MIB, GIB, GIB + 512, *(clusters * CLUSTER_BYTES for clusters in (32759, 32760, 32761)), 5 * GIB]
)
def test_preallocated_metadata_is_complete_and_every_cluster_is_counted_once(size_bytes: int) -> None:
    image = qcow2.encode_image(size_bytes=size_bytes, backing=None, preallocation="metadata")
    clusters = read_image(image)
    header = qcow2.decode_header(first_bytes(image))
    counts, blocks = counted(clusters, header)
    l1 = pointers(clusters, header.l1_offset_bytes, header.l1_entries)
    data = [entry for table in l1 for entry in pointers(clusters, table & ~(1 << 63), 8192)]
    wanted = -(-size_bytes // CLUSTER_BYTES)
    assert all(entry >> 63 for entry in [*l1, *data[:wanted]]), "refcount one, written in place"
    assert not any(data[wanted:])
    used = [0, *range(header.refcount_table_offset_bytes, header.refcount_table_offset_bytes + CLUSTER_BYTES, 65536)]
    used += [*blocks, header.l1_offset_bytes]
    used += [entry & ~(1 << 63) for entry in [*l1, *data[:wanted]]]
    assert sorted(used) == list(range(0, image.file_bytes, CLUSTER_BYTES)), "each cluster has exactly one use"
    assert counts[: len(used)] == [1] * len(used)
    assert not any(counts[len(used) :])


def test_preallocation_of_64_tib_counts_every_cluster_and_streams() -> None:
    tracemalloc.start()
    try:
        image = qcow2.encode_image(size_bytes=64 * TIB, backing=None, preallocation="metadata")
        header = qcow2.decode_header(first_bytes(image))
        table_at, l1_at = header.refcount_table_offset_bytes, header.l1_offset_bytes
        blocks_at = table_at + header.refcount_table_clusters * CLUSTER_BYTES
        before_l1 = itertools.takewhile(lambda extent: extent[0] < l1_at, image.extents())
        counts, blocks = 0, 0
        for offset_bytes, data in before_l1:
            if offset_bytes >= blocks_at:
                counts += len(data) // 2
            elif offset_bytes >= table_at:
                blocks += len(data) // 8
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert counts == image.file_bytes // CLUSTER_BYTES
    assert blocks == (l1_at - blocks_at) // CLUSTER_BYTES == -(-counts // 32768)
    assert image.file_bytes == image.metadata_bytes + 64 * TIB
    assert image.metadata_bytes < 64 * 161 * MIB
    assert peak_bytes < 4 * MIB


def test_falloc_has_the_bytes_of_metadata() -> None:
    metadata = qcow2.encode_image(size_bytes=GIB, backing=None, preallocation="metadata")
    falloc = qcow2.encode_image(size_bytes=GIB, backing=None, preallocation="falloc")
    assert falloc == metadata
    assert falloc.file_bytes > GIB


# --- decoding what anybody may have written ----------------------------------------------------------------------


def only_corrupt(data: bytes) -> None:
    """Decode and judge bytes: whatever they are, Corrupt is all that may come."""
    try:
        header = qcow2.decode_header(data)
        offset_bytes, length_bytes = qcow2.l1_extent(header)
        assert 0 <= offset_bytes <= (1 << 63) - length_bytes
        assert length_bytes <= 32 * MIB
        qcow2.check_header(header)
        assert length_bytes <= MIB, "a header that was checked asks for little memory"
        qcow2.check_backing(header, None)
    except Corrupt:
        pass


@given(st.binary(max_size=6000))
def test_random_bytes_raise_nothing_but_corrupt(data: bytes) -> None:
    only_corrupt(data)


@given(st.binary(max_size=6000), st.sampled_from([2, 3]))
def test_random_bytes_behind_a_right_beginning_raise_nothing_but_corrupt(data: bytes, version: int) -> None:
    only_corrupt(b"QFI\xfb" + struct.pack(">I", version) + data)


@given(sizes, st.none() | backings, st.data())
def test_mutated_headers_raise_nothing_but_corrupt(
    size_bytes: int, backing: Backing | None, data: st.DataObject
) -> None:
    header = bytearray(blank_header(size_bytes, backing))
    for _ in range(data.draw(st.integers(1, 4))):
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        at = data.draw(st.integers(0, 400 // width)) * width
        value = data.draw(st.integers(0, (1 << 8 * width) - 1) | st.sampled_from([0, 1, (1 << 8 * width) - 1]))
        header[at : at + width] = value.to_bytes(width, "big")
    only_corrupt(bytes(header[: data.draw(st.sampled_from([len(header), 512, 200, 120, 104, 103, 72, 71, 8, 0]))]))


@given(st.integers(0, 4096))
def test_a_header_that_was_cut_off_is_corrupt_or_reads_the_same(length_bytes: int) -> None:
    backing = Backing("../ab/parent.qcow2", "qcow2")
    whole = blank_header(backing=backing)
    end = whole.index(b"parent.qcow2") + len("parent.qcow2")
    if length_bytes < end:
        with pytest.raises(Corrupt):
            qcow2.decode_header(whole[:length_bytes])
    else:
        assert qcow2.decode_header(whole[:length_bytes]) == qcow2.decode_header(whole)


BACKED = blank_header(backing=Backing("parent", "raw"))  # format extension at 112, end mark at 128, name at 136


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "too few"),
        (bytes(4096), "begins with"),
        (patched(BACKED, 0, ">4s", b"QFI\xfa"), "begins with"),
        (patched(BACKED, 4, ">I", 1), "version 1"),
        (patched(BACKED, 4, ">I", 4), "version 4"),
        (BACKED[:103], "version 3 header"),
        (patched(BACKED, 8, ">Q", 100), "outside the header"),
        (patched(BACKED, 8, ">Q", 4095), "outside the header"),
        (patched(BACKED, 8, ">Q", (1 << 64) - 1), "outside the header"),
        (patched(BACKED, 16, ">I", 0), "name of 0 bytes"),
        (patched(BACKED, 16, ">I", 1024), "name of 1024 bytes"),
        (patched(BACKED, 20, ">I", 8), "cluster_bits 8"),
        (patched(BACKED, 20, ">I", 22), "cluster_bits 22"),
        (patched(BACKED, 20, ">I", 0xFFFFFFFF), "cluster_bits"),
        (patched(BACKED, 24, ">Q", 1 << 63), "virtual size"),
        (patched(BACKED, 36, ">I", 0xFFFFFFFF), "L1 table has"),
        (patched(BACKED, 36, ">I", (32 * MIB) // 8 + 1), "L1 table has"),
        (patched(BACKED, 40, ">Q", 512), "L1 table at 512"),
        (patched(BACKED, 40, ">Q", 0), "L1 table lies on the header"),
        (patched(BACKED, 40, ">Q", (1 << 64) - CLUSTER_BYTES), "L1 table at .* beyond"),
        (patched(BACKED, 48, ">Q", 1), "refcount table at 1"),
        (patched(BACKED, 48, ">Q", 0), "refcount table lies on the header"),
        (patched(BACKED, 56, ">I", 129), "refcount table has"),
        (patched(BACKED, 60, ">I", 65537), "65537 internal snapshots"),
        (patched(BACKED, 60, ">IQ", 1, 512), "snapshot table at 512"),
        (patched(BACKED, 60, ">IQ", 1, 0), "snapshot table lies on the header"),
        (patched(BACKED, 96, ">I", 7), "refcount_order 7"),
        (patched(BACKED, 100, ">I", 96), "header length 96"),
        (patched(BACKED, 100, ">I", 108), "header length 108"),
        (patched(BACKED, 100, ">I", 8192), "header of 8192 bytes"),
        (patched(BACKED, 116, ">I", 25), "cut off"),
        (patched(BACKED, 116, ">I", 0xFFFFFFFF), "cut off"),
        (patched(BACKED, 128, ">II", 0xE2792ACA, 0), "two backing formats"),
        (patched(BACKED, 120, ">3s", b"r\xffw"), "not UTF-8"),
        (patched(BACKED, 120, ">3s", b"r\x00w"), "zero byte"),
        (patched(BACKED, 136, ">6s", b"par\xffnt"), "not UTF-8"),
        (patched(BACKED, 136, ">6s", b"par\x00nt"), "zero byte"),
        (patched(blank_header(), 112, ">II", 0xE2792ACA, 16), "backing format of 16 bytes"),
        (patched(blank_header(), 112, ">II", 0x6803F857, 4000), "cut off"),
        (patched(blank_header(), 112, ">II", 0x6803F857, 3976), "cut off"),
    ],
)
def test_each_rule_of_decoding(header: bytes, message: str) -> None:
    with pytest.raises(Corrupt, match=message):
        qcow2.decode_header(header)


def test_unknown_extensions_are_passed_over_and_the_name_may_end_them() -> None:
    unknown_instead_of_end_mark = patched(BACKED, 128, ">I", 0x12345678)
    assert qcow2.decode_header(unknown_instead_of_end_mark) == qcow2.decode_header(BACKED)


def test_a_version_2_header_is_read_and_refused() -> None:
    fields = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, GIB, 0, 2, 0x30000, 0x10000, 1, 0, 0)
    header = qcow2.decode_header(fields.ljust(4096, b"\x00"))
    assert (header.version, header.size_bytes, header.header_bytes, header.refcount_order) == (2, GIB, 72, 4)
    with pytest.raises(Corrupt, match="version 2"):
        qcow2.check_header(header)


def test_decoding_takes_no_memory_that_a_field_asks_for() -> None:
    hostile = patched(patched(BACKED, 36, ">I", (32 * MIB) // 8), 56, ">I", 128)
    tracemalloc.start()
    try:
        qcow2.decode_header(hostile)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 * 1024


# --- judging a header --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "layout", "values", "message"),
    [
        (72, ">Q", (1 << 0,), "incompatible features dirty,"),
        (72, ">Q", (1 << 1,), "incompatible features corrupt,"),
        (72, ">Q", (1 << 2,), "external data file"),
        (72, ">Q", (1 << 3,), "compression type"),
        (72, ">Q", (1 << 4,), "extended L2 entries"),
        (72, ">Q", (1 << 5 | 1 << 63,), "bit 5, bit 63"),
        (80, ">Q", (1,), "lazy refcounts"),
        (88, ">Q", (3,), "bitmaps, raw external data"),
        (32, ">I", (2,), "encryption method 2"),
        (60, ">IQ", (1, 0x50000), "1 internal snapshots"),
        (20, ">I", (12,), "cluster_bits 12"),
        (96, ">I", (6,), "refcount_order 6"),
        (24, ">Q", (0,), "virtual size 0"),
        (24, ">Q", (GIB - 1,), "virtual size"),
        (24, ">Q", (2 * GIB,), "virtual size 2147483648"),
        (36, ">I", (1,), "1 L1 entries"),
        (36, ">I", (3,), "3 L1 entries"),
        (36, ">I", (4 * MIB,), "4194304 L1 entries"),
    ],
)
def test_each_rule_of_judging(at: int, layout: str, values: tuple[int, ...], message: str) -> None:
    qcow2.check_header(qcow2.decode_header(BACKED), maximum_size_bytes=GIB)
    with pytest.raises(Corrupt, match=message):
        qcow2.check_header(qcow2.decode_header(patched(BACKED, at, layout, *values)), maximum_size_bytes=GIB)


def test_an_image_may_still_be_smaller_than_its_volume() -> None:
    qcow2.check_header(qcow2.decode_header(blank_header(GIB)), maximum_size_bytes=2 * GIB)


@given(st.none() | backings, st.none() | backings)
def test_only_the_wanted_backing_is_accepted(found: Backing | None, wanted: Backing | None) -> None:
    assume(found != wanted)
    header = qcow2.decode_header(blank_header(backing=found))
    qcow2.check_backing(header, found)
    with pytest.raises(Corrupt, match="backing name and format"):
        qcow2.check_backing(header, wanted)


def test_the_same_name_with_another_format_is_refused() -> None:
    header = qcow2.decode_header(BACKED)
    with pytest.raises(Corrupt, match="'raw'"):
        qcow2.check_backing(header, Backing("parent", "qcow2"))


# --- the L1 table ------------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 17))
def test_one_byte_anywhere_makes_an_l1_table_used(at: int) -> None:
    table = bytearray(1 << 17)
    assert qcow2.l1_is_empty(bytes(table))
    table[min(at, len(table) - 1)] = 1
    assert not qcow2.l1_is_empty(bytes(table))


@pytest.mark.parametrize("length_bytes", [0, 1, 7, 9])
def test_an_l1_table_that_was_cut_off_is_corrupt(length_bytes: int) -> None:
    with pytest.raises(Corrupt, match="cut off"):
        qcow2.l1_is_empty(bytes(length_bytes))


def test_judging_the_largest_l1_table_is_quick() -> None:
    table = bytes(MIB)
    started = time.monotonic()
    assert qcow2.l1_is_empty(table)
    assert time.monotonic() - started < 0.1
