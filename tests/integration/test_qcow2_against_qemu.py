"""QEMU's judgement of the qcow2 codec's images, and the codec's judgement of QEMU's: real qemu-img and qemu-io.

Axes: virtual size, backing image (none, raw, qcow2), preallocation; what happened to the image since (nothing, writes,
growth, a header rewritten by QEMU); features that QEMU offers and we refuse.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from csi_quobyte.errors import Corrupt
from csi_quobyte.pool import qcow2
from csi_quobyte.pool.qcow2 import CLUSTER_BYTES, Backing, Preallocation

QEMU_DIR = Path(os.environ.get("CSI_QUOBYTE_QEMU_DIR", "/var/cache/csi-quobyte/qemu/bin"))
TOOL_TIMEOUT_S = 60

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

SIZES = [512, 64 * KIB, 64 * KIB + 512, MIB, GIB, GIB + 512, 100 * GIB, 16 * TIB, 64 * TIB]
# With 32760 data clusters all clusters of the file fill exactly one refcount block; one less, and one more.
PREALLOCATED_SIZES = [*SIZES[:7], *(clusters * CLUSTER_BYTES for clusters in (32759, 32760, 32761))]


def qemu_img(*arguments: str | Path) -> str:
    """Run qemu-img; an exit status other than 0 fails the test (`check` has 3 for leaks, `compare` 1)."""
    return _tool("qemu-img", *arguments)


def qemu_io(image: str | Path, *commands: str, options: tuple[str, ...] = ("-f", "qcow2")) -> str:
    """Run qemu-io commands on an image; a pattern that is not found fails the test."""
    arguments = [word for command in commands for word in ("-c", command)]
    output = _tool("qemu-io", *options, *arguments, image)
    assert "failed" not in output, output
    return output


def _tool(name: str, *arguments: str | Path) -> str:
    ended = subprocess.run(
        [QEMU_DIR / name, *arguments],
        capture_output=True,
        text=True,
        timeout=TOOL_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert ended.returncode == 0, f"{name} {arguments} ended with {ended.returncode}: {ended.stdout}{ended.stderr}"
    return ended.stdout


def write_image(
    path: Path, size_bytes: int, *, backing: Backing | None = None, preallocation: Preallocation = "off"
) -> qcow2.ImageBytes:
    """Write a new image of the codec's, as the product does."""
    image = qcow2.encode_image(size_bytes=size_bytes, backing=backing, preallocation=preallocation)
    with path.open("xb") as file:
        for offset_bytes, data in image.extents():
            os.pwrite(file.fileno(), data, offset_bytes)
        os.ftruncate(file.fileno(), image.file_bytes)
    return image


def read_header(path: Path) -> qcow2.Header:
    with path.open("rb") as file:
        return qcow2.decode_header(file.read(qcow2.HEADER_READ_BYTES))


def read_l1(path: Path) -> bytes:
    offset_bytes, length_bytes = qcow2.l1_extent(read_header(path))
    with path.open("rb") as file:
        return os.pread(file.fileno(), length_bytes, offset_bytes)


def check_clean(path: Path) -> dict[str, Any]:
    """Check an image with qemu-img: no error, no leak. Give what was found."""
    found: dict[str, Any] = json.loads(qemu_img("check", "--output=json", "-f", "qcow2", path))
    assert (found["check-errors"], found.get("corruptions", 0), found.get("leaks", 0)) == (0, 0, 0)
    return found


def info(path: Path) -> dict[str, Any]:
    """What `qemu-img info` says, without what differs between two files by nature (names, blocks on the disk)."""
    found: dict[str, Any] = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", path))
    for varying in ("filename", "actual-size", "children"):
        found.pop(varying, None)
    return found


def on_parent(overlay: Path, parent: Path, parent_format: str) -> str:
    """An overlay opened with explicit nodes, without following its backing string."""
    backing = {"driver": parent_format, "file": {"driver": "file", "filename": str(parent)}}
    nodes = {"driver": "qcow2", "file": {"driver": "file", "filename": str(overlay)}, "backing": backing}
    return f"json:{json.dumps(nodes)}"


def make_parent(path: Path, parent_format: str, size_bytes: int) -> Backing:
    """Make a parent by qemu-img and give the backing of an overlay in the same directory."""
    qemu_img("create", "-q", "-f", parent_format, path, str(size_bytes))
    return Backing(path.name, "raw" if parent_format == "raw" else "qcow2")


# --- the same as qemu-img's own --------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", SIZES)
def test_a_blank_image_equals_qemus(tmp_path: Path, size_bytes: int) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_image(ours, size_bytes)
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=1.1,cluster_size=65536", theirs, str(size_bytes))
    check_clean(ours)
    assert info(ours) == info(theirs)
    qemu_img("compare", "-s", "-f", "qcow2", "-F", "qcow2", ours, theirs)
    qcow2.check_header(read_header(ours), maximum_size_bytes=size_bytes)
    qcow2.check_header(read_header(theirs), maximum_size_bytes=size_bytes)


@pytest.mark.parametrize("parent_format", ["raw", "qcow2"])
@pytest.mark.parametrize("size_bytes", SIZES)
def test_an_overlay_equals_qemus(tmp_path: Path, size_bytes: int, parent_format: str) -> None:
    ours, theirs, parent = tmp_path / "ours", tmp_path / "theirs", tmp_path / "parent"
    parent_bytes = min(size_bytes, GIB)
    backing = make_parent(parent, parent_format, parent_bytes)
    qemu_io(parent, f"write -P 0x5a 0 {min(parent_bytes, 128 * KIB)}", options=("-f", parent_format))
    write_image(ours, size_bytes, backing=backing)
    qemu_img("create", "-q", "-f", "qcow2", "-b", parent.name, "-F", parent_format, theirs, str(size_bytes))
    check_clean(ours)
    assert info(ours) == info(theirs)
    assert (info(ours)["backing-filename"], info(ours)["backing-filename-format"]) == (parent.name, parent_format)
    qemu_img("compare", "-s", "-f", "qcow2", "-F", "qcow2", ours, theirs)
    qcow2.check_backing(read_header(theirs), backing)


@pytest.mark.parametrize("size_bytes", PREALLOCATED_SIZES)
def test_preallocated_metadata_equals_qemus(tmp_path: Path, size_bytes: int) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    image = write_image(ours, size_bytes, preallocation="metadata")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", theirs, str(size_bytes))
    found, wanted = check_clean(ours), check_clean(theirs)
    assert found["allocated-clusters"] == found["total-clusters"] == wanted["allocated-clusters"]
    assert found["image-end-offset"] == image.file_bytes == ours.stat().st_size
    assert abs(image.file_bytes - theirs.stat().st_size) <= CLUSTER_BYTES
    assert info(ours) == info(theirs)
    # QEMU writes zeros behind the end of the disk into the last cluster, where ours has a hole: the same contents, but
    # not the same for `-s`, which compares what is allocated in the file too.
    strict = [] if size_bytes % CLUSTER_BYTES else ["-s"]
    qemu_img("compare", *strict, "-f", "qcow2", "-F", "qcow2", ours, theirs)
    assert ours.stat().st_blocks * 512 <= image.metadata_bytes, "data clusters take no space yet"


def test_every_write_into_a_preallocated_image_finds_its_cluster(tmp_path: Path) -> None:
    path = tmp_path / "falloc"
    image = write_image(path, 8 * MIB + 512, preallocation="falloc")
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, image.file_bytes)
    assert path.stat().st_blocks * 512 >= image.file_bytes
    check_clean(path)
    qemu_io(path, "read -P 0 0 8M", "write -P 0x11 0 8M", f"write -P 0x22 {8 * MIB} 512")
    qemu_io(path, "read -P 0x11 0 8M", f"read -P 0x22 {8 * MIB} 512")
    check_clean(path)
    assert path.stat().st_size == image.file_bytes, "nothing was allocated"


# --- life after creation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preallocation", ["off", "metadata"])
@pytest.mark.parametrize("size_bytes", [512, MIB, GIB + 512, 100 * GIB])
def test_writes_at_both_ends_stay_clean(tmp_path: Path, size_bytes: int, preallocation: Preallocation) -> None:
    path = tmp_path / "image"
    write_image(path, size_bytes, preallocation=preallocation)
    write_and_check(path, size_bytes)


@pytest.mark.parametrize("size_bytes", [16 * TIB, 64 * TIB])
def test_writes_into_the_largest_images_stay_clean(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "image"
    write_image(path, size_bytes)
    write_and_check(path, size_bytes)


def write_and_check(path: Path, size_bytes: int) -> None:
    """Write at the beginning, across each end of an L2 table that there is, and the last sector; read it all back."""
    places = {0: 512, size_bytes - 512: 512}
    places |= {border - 4 * KIB: 8 * KIB for border in (512 * MIB, 50 * GIB, 8 * TIB) if border + 8 * KIB < size_bytes}
    patterns = {at: (number + 1, length) for number, (at, length) in enumerate(sorted(places.items()))}
    qemu_io(path, *(f"write -P {pattern} {at} {length}" for at, (pattern, length) in patterns.items()))
    check_clean(path)
    qemu_io(path, *(f"read -P {pattern} {at} {length}" for at, (pattern, length) in patterns.items()))
    assert not qcow2.l1_is_empty(read_l1(path))


def test_refcount_blocks_are_added_when_the_file_grows(tmp_path: Path) -> None:
    path = tmp_path / "image"
    write_image(path, 4 * GIB)
    # One refcount block counts 2 GiB of file; allocated clusters that are holes of the file cost no space and no time.
    qemu_img("resize", "-q", "-f", "qcow2", "--preallocation=metadata", path, str(8 * GIB))
    qemu_io(path, "write -P 0x33 0 4M", f"write -P 0x44 {8 * GIB - MIB} 1M")
    found = check_clean(path)
    assert found["image-end-offset"] > 4 * GIB, "more than two refcount blocks are in use"
    qemu_io(path, "read -P 0x33 0 4M", f"read -P 0x44 {8 * GIB - MIB} 1M", f"read -P 0 {6 * GIB} 64M")


@pytest.mark.parametrize("clusters", [32759, 32760, 32761])
def test_a_full_refcount_block_is_followed_by_a_new_one(tmp_path: Path, clusters: int) -> None:
    path = tmp_path / "image"
    size_bytes = clusters * CLUSTER_BYTES
    write_image(path, size_bytes, preallocation="metadata")
    qemu_img("resize", "-q", "-f", "qcow2", path, str(size_bytes + 64 * MIB))
    qemu_io(path, f"write -P 0x55 {size_bytes} 64M", "write -P 0x66 0 64k")
    check_clean(path)
    qemu_io(path, f"read -P 0x55 {size_bytes} 64M", "read -P 0x66 0 64k")


@pytest.mark.parametrize(("before", "after"), [(MIB, 2 * MIB), (GIB, 10 * GIB), (GIB, 10 * TIB), (16 * TIB, 64 * TIB)])
def test_a_grown_image_is_still_accepted(tmp_path: Path, before: int, after: int) -> None:
    path = tmp_path / "image"
    write_image(path, before)
    qemu_io(path, "write -P 0x77 0 64k")
    qemu_img("resize", "-q", "-f", "qcow2", path, str(after))
    check_clean(path)
    header = read_header(path)
    assert header.size_bytes == after
    qcow2.check_header(header, maximum_size_bytes=after)
    qemu_io(path, "read -P 0x77 0 64k", f"write {after - 512} 512")
    check_clean(path)


@pytest.mark.parametrize("parent_format", ["raw", "qcow2"])
def test_an_overlay_shows_its_parent_and_keeps_its_own_writes(tmp_path: Path, parent_format: str) -> None:
    (tmp_path / "aa").mkdir()
    (tmp_path / "bb").mkdir()
    parent, overlay = tmp_path / "aa" / "parent", tmp_path / "bb" / "overlay"
    make_parent(parent, parent_format, 4 * MIB)
    qemu_io(parent, "write -P 0xa1 0 4M", options=("-f", parent_format))
    frozen = parent.read_bytes()
    write_image(overlay, 6 * MIB, backing=Backing("../aa/parent", "raw" if parent_format == "raw" else "qcow2"))
    by_record = on_parent(overlay, parent, parent_format)
    qemu_io(by_record, "read -P 0xa1 0 4M", "read -P 0 4M 2M", options=())
    assert qcow2.l1_is_empty(read_l1(overlay)), "reading maps nothing"
    qemu_io(by_record, "write -P 0xb2 1M 4k", "write -P 0xb3 5M 64k", options=())
    assert not qcow2.l1_is_empty(read_l1(overlay))
    for opened, options in ((by_record, ()), (str(overlay), ("-f", "qcow2"))):  # by the record, and by the string
        qemu_io(opened, "read -P 0xa1 0 1M", "read -P 0xb2 1M 4k", "read -P 0xb3 5M 64k", options=options)
        qemu_io(opened, "read -P 0xa1 1052672 61440", "read -P 0 4M 1M", options=options)
    check_clean(overlay)
    assert parent.read_bytes() == frozen


def test_an_overlay_that_was_only_zeroed_is_not_untouched(tmp_path: Path) -> None:
    parent, overlay = tmp_path / "parent", tmp_path / "overlay"
    write_image(overlay, MIB, backing=make_parent(parent, "raw", MIB))
    qemu_io(parent, "write -P 1 0 1M", options=("-f", "raw"))
    qemu_io(overlay, "write -z 0 64k")
    assert not qcow2.l1_is_empty(read_l1(overlay))


# --- headers -----------------------------------------------------------------------------------------------------


def test_all_of_the_header_is_in_the_first_sector_of_the_file(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    backing = Backing("../00/" + "n" * 194, "qcow2")
    write_image(overlay, 64 * TIB, backing=backing)
    first_cluster = overlay.read_bytes()[:CLUSTER_BYTES]
    assert not any(first_cluster[512:])
    assert qcow2.decode_header(first_cluster[:512]) == read_header(overlay)
    found = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", overlay))
    assert (found["backing-filename"], found["backing-filename-format"]) == (backing.name, backing.format)


def test_a_header_that_qemu_rewrote_is_still_read(tmp_path: Path) -> None:
    overlay, parent, other = tmp_path / "overlay", tmp_path / "parent", tmp_path / "other"
    backing = make_parent(parent, "raw", MIB)
    make_parent(other, "qcow2", MIB)
    write_image(overlay, MIB, backing=backing)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", other.name, "-F", "qcow2", overlay)
    header = read_header(overlay)
    qcow2.check_header(header, maximum_size_bytes=MIB)
    qcow2.check_backing(header, Backing(other.name, "qcow2"))
    with pytest.raises(Corrupt, match="other"):
        qcow2.check_backing(header, backing)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", overlay)
    qcow2.check_backing(read_header(overlay), None)
    check_clean(overlay)


def test_the_longest_name_that_qemu_writes_is_read(tmp_path: Path) -> None:
    name = "/".join(["d" * 200] * 5) + "/" + "n" * 18
    assert len(name) == 1023
    overlay = tmp_path / "overlay"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", overlay, "1M")
    assert read_header(overlay).backing_name == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("compat=0.10", "version 2"),
        ("cluster_size=4096", "cluster_bits 12"),
        ("refcount_bits=8", "refcount_order 3"),
        ("lazy_refcounts=on", "lazy refcounts"),
        ("extended_l2=on", "extended L2 entries"),
        ("compression_type=zstd", "compression type"),
        ("data_file=data.raw", "external data file"),
        ("data_file=data.raw,data_file_raw=on", "external data file"),
        ("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", "encryption method 2"),
    ],
)
def test_features_that_are_never_ours_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a data file is named relative to where qemu-img runs
    path = tmp_path / "image"
    qemu_img("create", "-q", "--object", "secret,id=key,data=x", "-f", "qcow2", "-o", options, path, "1M")
    with pytest.raises(Corrupt, match=message):
        qcow2.check_header(read_header(path))


def test_an_internal_snapshot_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    write_image(path, MIB)
    qemu_img("snapshot", "-c", "hidden", path)
    with pytest.raises(Corrupt, match="1 internal snapshots"):
        qcow2.check_header(read_header(path))


def test_a_persistent_bitmap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    write_image(path, MIB)
    qemu_img("bitmap", "--add", "-f", "qcow2", path, "changes")
    with pytest.raises(Corrupt, match="bitmaps"):
        qcow2.check_header(read_header(path))


def test_an_image_that_qemu_marked_corrupt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    write_image(path, MIB)
    qemu_io(path, "write 0 64k")
    offset_bytes, _ = qcow2.l1_extent(read_header(path))
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), (1 << 63 | 0x200).to_bytes(8, "big"), offset_bytes)  # an L2 table off its boundary
    ended = subprocess.run(
        [QEMU_DIR / "qemu-io", "-f", "qcow2", "-c", "write 0 64k", path],
        capture_output=True,
        timeout=TOOL_TIMEOUT_S,
        check=False,
    )
    assert ended.returncode != 0
    with pytest.raises(Corrupt, match="incompatible features corrupt"):
        qcow2.check_header(read_header(path))
