"""Calls of qemu-img: what is opened is what the caller named, never what an image names.

Axes: format × feature bits × what the backing string says (right, wrong, missing) × place (plain, stand-in pool).
"""

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from host_fixtures import MIB, SIZE_BYTES, make_chain, write_image

from csi_quobyte.errors import Corrupt, Refused, Unavailable
from csi_quobyte.host import command, qemu_img
from csi_quobyte.host.qemu import ImageLayer, QemuTools, find_tools

pytest_plugins = ["host_fixtures"]
pytestmark = pytest.mark.root  # the stand-in pool is a FUSE mount


def make_raw(directory: Path, name: str = "raw", size_bytes: int = SIZE_BYTES) -> ImageLayer:
    path = directory / name
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return ImageLayer(name, str(path), "raw")


def set_features(layer: ImageLayer, features: int) -> None:
    with Path(layer.path).open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", features))


def set_backing(tools: QemuTools, layer: ImageLayer, backing: str) -> None:
    argv = [tools.qemu_img, "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, layer.path]
    subprocess.run(argv, check=True, timeout=30)


def test_find_tools_gives_absolute_paths(tools: QemuTools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(tools.qemu_img).parent), prepend=":")
    assert find_tools(None) == tools


def test_find_tools_without_a_program_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no qemu-img in"):
        find_tools(str(tmp_path))


@pytest.mark.parametrize(
    ("printed", "said"), [("something else", "tells no version"), ("qemu-storage-daemon version 9.9.9", "one QEMU")]
)
def test_find_tools_with_a_wrong_daemon_is_unavailable(
    tools: QemuTools, tmp_path: Path, printed: str, said: str
) -> None:
    (tmp_path / "qemu-img").symlink_to(tools.qemu_img)
    daemon = tmp_path / "qemu-storage-daemon"
    daemon.write_text(f"#!/bin/sh\necho '{printed}'\n")
    daemon.chmod(0o755)
    with pytest.raises(Unavailable, match=said):
        find_tools(str(tmp_path))


def test_info_of_an_overlay_without_its_backing_file(tools: QemuTools, image_dir: Path) -> None:
    base, head = make_chain(tools, image_dir, 2)
    Path(base.path).unlink()
    info = qemu_img.info(tools, head.path, "qcow2")
    assert (info.format, info.virtual_size_bytes, info.cluster_size_bytes) == ("qcow2", SIZE_BYTES, 65536)
    assert (info.backing_file, info.backing_format, info.compat) == (base.id, "qcow2", "1.1")
    assert (info.is_dirty, info.is_marked_corrupt) == (False, False)
    assert info.actual_size_bytes < MIB


def test_info_of_raw_does_not_probe(tools: QemuTools, image_dir: Path) -> None:
    qcow2 = make_chain(tools, image_dir, 1)[0]
    raw = make_raw(image_dir)
    content = Path(qcow2.path).read_bytes()
    with Path(raw.path).open("r+b") as file:
        file.write(content)  # as a guest could: a raw disk that begins like a qcow2 image
    info = qemu_img.info(tools, raw.path, "raw")
    assert (info.format, info.virtual_size_bytes, info.backing_file) == ("raw", SIZE_BYTES, None)
    assert (info.cluster_size_bytes, info.compat, info.is_dirty, info.is_marked_corrupt) == (None, None, None, None)


@pytest.mark.parametrize("call", [qemu_img.info, qemu_img.check])
def test_missing_file_is_corrupt(tools: QemuTools, image_dir: Path, call: type) -> None:
    with pytest.raises(Corrupt, match="does not exist"):
        call(tools, str(image_dir / "absent"), "qcow2")


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"\0" * 4096, b"QFI\xfb" + struct.pack(">I", 4) + b"\0" * 4096])
def test_no_qcow2_header_is_corrupt(tools: QemuTools, image_dir: Path, content: bytes) -> None:
    (image_dir / "image").write_bytes(content)
    with pytest.raises(Corrupt, match="no qcow2 header"):
        qemu_img.info(tools, str(image_dir / "image"), "qcow2")


@pytest.mark.parametrize(("features", "said"), [(1 << 2, "external file"), (1 << 5, "unknown"), (1 << 63, "unknown")])
def test_refused_features_are_corrupt_everywhere(tools: QemuTools, image_dir: Path, features: int, said: str) -> None:
    chain = make_chain(tools, image_dir, 2)
    set_features(chain[0], features)
    for call in (
        lambda: qemu_img.info(tools, chain[0].path, "qcow2"),
        lambda: qemu_img.check(tools, chain[0].path, "qcow2"),
        lambda: qemu_img.compare(tools, chain, chain),
        lambda: qemu_img.convert(tools, chain, str(image_dir / "copy"), "raw"),
    ):
        with pytest.raises(Corrupt, match=said):
            call()
    assert not (image_dir / "copy").exists()


def test_external_data_file_is_not_opened(tools: QemuTools, image_dir: Path) -> None:
    secret, image = image_dir / "secret", image_dir / "image"
    options = f"data_file={secret},data_file_raw=on"
    argv = [tools.qemu_img, "create", "-q", "-f", "qcow2", "-o", options, str(image), "1M"]
    subprocess.run(argv, check=True, timeout=30)
    with pytest.raises(Corrupt, match="external file"):
        qemu_img.info(tools, str(image), "qcow2")


def test_version_2_image_is_accepted(tools: QemuTools, image_dir: Path) -> None:
    path = str(image_dir / "old")
    argv = [tools.qemu_img, "create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "1M"]
    subprocess.run(argv, check=True, timeout=30)
    assert qemu_img.info(tools, path, "qcow2").compat == "0.10"


def test_check_of_a_sound_layer_without_its_backing_file(tools: QemuTools, image_dir: Path) -> None:
    base, head = make_chain(tools, image_dir, 2)
    write_image(tools, head, 7, MIB, MIB)
    Path(base.path).unlink()
    assert qemu_img.check(tools, head.path, "qcow2") == qemu_img.CheckResult(0, 0, 0)


def test_check_finds_leaks_and_corruption(tools: QemuTools, image_dir: Path) -> None:
    layer = make_chain(tools, image_dir, 1)[0]
    write_image(tools, layer, 7, 0, MIB)
    leaking, damaged = image_dir / "leaking", image_dir / "damaged"
    shutil.copy(layer.path, leaking)
    shutil.copy(layer.path, damaged)
    header = Path(layer.path).read_bytes()[:104]
    l1_table_offset, refcount_table_offset = struct.unpack(">QQ", header[40:56])
    with leaking.open("r+b") as file:  # without the mapping table nothing uses the clusters
        file.seek(l1_table_offset)
        file.write(b"\0" * 8)
    with damaged.open("r+b") as file:  # without reference counts everything in use counts as free
        file.seek(refcount_table_offset)
        refcount_block_offset = struct.unpack(">Q", file.read(8))[0]
        file.seek(refcount_block_offset)
        file.write(b"\0" * 64)
    leaks = qemu_img.check(tools, str(leaking), "qcow2")
    assert (leaks.errors, leaks.corruptions) == (0, 0)
    assert leaks.leaks >= 16
    assert qemu_img.check(tools, str(damaged), "qcow2").corruptions > 0


def test_check_of_raw_has_nothing_to_find(tools: QemuTools, image_dir: Path) -> None:
    assert qemu_img.check(tools, make_raw(image_dir).path, "raw") == qemu_img.CheckResult(0, 0, 0)


def test_compare_follows_the_given_chain_and_not_the_strings(tools: QemuTools, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir, 3)
    for number, layer in enumerate(chain):
        write_image(tools, layer, number + 1, number * 4 * MIB, 8 * MIB)
    other = make_chain(tools, image_dir, 1)[0]
    write_image(tools, other, 1, 0, 4 * MIB)
    write_image(tools, other, 2, 4 * MIB, 4 * MIB)
    write_image(tools, other, 3, 8 * MIB, 8 * MIB)
    assert qemu_img.compare(tools, chain, [other])
    assert not qemu_img.compare(tools, chain[:2], [other])
    set_backing(tools, chain[2], other.id)
    set_backing(tools, chain[1], "absent")
    assert qemu_img.compare(tools, chain, [other])
    write_image(tools, other, 9, 0, 512)
    assert not qemu_img.compare(tools, chain, [other])


def test_compare_longer_with_zeros_is_equal(tools: QemuTools, image_dir: Path) -> None:
    short = make_raw(image_dir, "short")
    long = make_raw(image_dir, "long", 2 * SIZE_BYTES)
    assert qemu_img.compare(tools, [short], [long])
    with Path(long.path).open("r+b") as file:
        file.seek(SIZE_BYTES)
        file.write(b"x")
    assert not qemu_img.compare(tools, [short], [long])


@pytest.mark.parametrize("target_format", ["qcow2", "raw"])
def test_convert_copies_what_the_chain_shows(tools: QemuTools, image_dir: Path, target_format: str) -> None:
    raw = make_raw(image_dir)
    overlays = make_chain(tools, image_dir, 2)
    chain = [raw, *overlays]
    with Path(raw.path).open("r+b") as file:
        file.write(b"base" * 1024)
    write_image(tools, overlays[1], 5, MIB, MIB)
    set_backing(tools, overlays[1], "absent")
    target = image_dir / "copy"
    match target_format:
        case "qcow2":
            copy = ImageLayer("copy", str(target), "qcow2")
        case _:
            copy = ImageLayer("copy", str(target), "raw")
    qemu_img.convert(tools, chain, copy.path, copy.format)
    info = qemu_img.info(tools, copy.path, copy.format)
    assert (info.virtual_size_bytes, info.backing_file) == (SIZE_BYTES, None)
    assert target.stat().st_mode & 0o777 == 0o600
    assert qemu_img.compare(tools, chain, [copy])


def test_convert_never_replaces_a_file(tools: QemuTools, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir, 1)
    (image_dir / "copy").write_text("precious")
    with pytest.raises(Refused):
        qemu_img.convert(tools, chain, str(image_dir / "copy"), "raw")
    assert (image_dir / "copy").read_text() == "precious"


def test_convert_that_takes_too_long_leaves_nothing(tools: QemuTools, image_dir: Path) -> None:
    raw = make_raw(image_dir, size_bytes=256 * MIB)
    write_image(tools, raw, 7, 0, 256 * MIB)
    with pytest.raises(command.CommandTimedOut):
        qemu_img.convert(tools, [raw], str(image_dir / "copy"), "raw", timeout_s=0.05)
    assert not (image_dir / "copy").exists()


def test_chain_json_names_everything(tools: QemuTools, image_dir: Path) -> None:
    raw = make_raw(image_dir, 'odd,name "x"')
    head = make_chain(tools, image_dir, 1)[0]
    node = json.loads(qemu_img.chain_json([raw, head]).removeprefix("json:"))
    assert (node["driver"], node["read-only"], node["file"]["filename"]) == ("qcow2", True, head.path)
    assert (node["backing"]["driver"], node["backing"]["file"]["filename"]) == ("raw", raw.path)
    assert json.loads(qemu_img.chain_json([head]).removeprefix("json:"))["backing"] is None
    assert qemu_img.compare(tools, [raw, head], [raw])
