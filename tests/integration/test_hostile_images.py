"""Images that lie: what a pod writes into its disk, and what somebody with access to the pool puts in an image's place.

Axes: what the header says; where it stands (in the guest's data, or as the header of a head or of a layer below it);
what is done with it. Proved is that nothing outside the pool is opened: the kernel tells of every opening of a file
there (inotify), whoever does it. And that each operation takes it for data, or refuses with an error of ours.
"""

import ctypes
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from controller_kit import SIZE_BYTES, Kit, qemu_io, read_disk, tools, tree, write_disk
from running import Code, fails, head_of, qemu_img, running

from csi_quobyte.engine import collector
from csi_quobyte.engine import repair as repairing
from csi_quobyte.errors import DriverError
from csi_quobyte.host import qemu_img as product
from csi_quobyte.host.qemu import ImageLayer
from csi_quobyte.operations import exporting
from csi_quobyte.operations.exporting import ExportRequest
from csi_quobyte.pool.sizes import MIB, SizeRange
from lab.client import Client, block_capability
from lab.machine import Machine

_IN_ACCESS, _IN_OPEN = 0x1, 0x20  # inotify(7)
_BACKING_FORMAT = b"\xe2\x79\x2a\xca"  # QEMU, docs/interop/qcow2.rst, "Header extensions"

libc = ctypes.CDLL(None, use_errno=True)


class Canary:
    """A file outside of the pool that nobody may open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"secret".ljust(SIZE_BYTES, b"!"))
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0
        watched = libc.inotify_add_watch(self._fd, os.fsencode(path), _IN_OPEN | _IN_ACCESS)
        assert watched >= 0, os.strerror(ctypes.get_errno())

    def was_opened(self) -> bool:
        """Say whether anybody has opened it since this was asked last."""
        try:
            return bool(os.read(self._fd, 65536))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._fd)


def patched(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


def made(path: Path, canary: Path, *options: str) -> bytes:
    """An image as qemu-img makes it."""
    names = [option.replace("CANARY", str(canary)) for option in options]
    qemu_img("create", "-q", "-f", "qcow2", *names, path, str(SIZE_BYTES))
    return path.read_bytes()


def with_snapshot(path: Path, canary: Path) -> bytes:
    made(path, canary)
    qemu_img("snapshot", "-c", "inside", path)
    return path.read_bytes()


def with_bitmap(path: Path, canary: Path) -> bytes:
    made(path, canary)
    qemu_img("bitmap", "--add", path, "changes")
    return path.read_bytes()


def encrypted(path: Path, canary: Path) -> bytes:
    luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu_img("create", "-q", "--object", "secret,id=s,data=key", "-f", "qcow2", "-o", luks, path, str(SIZE_BYTES))
    return path.read_bytes()


def without_format(path: Path, canary: Path) -> bytes:
    return made(path, canary, "-u", "-b", "CANARY", "-F", "raw").replace(_BACKING_FORMAT, b"\x11" * 4, 1)


def vmdk(path: Path, canary: Path) -> bytes:
    """A text that a prober takes for a VMware disk whose data are in another file."""
    sectors = SIZE_BYTES // 512
    lines = ["# Disk DescriptorFile", "version=1", "CID=12345678", "parentCID=ffffffff", 'createType="monolithicFlat"']
    lines += [f'RW {sectors} FLAT "{canary}" 0', 'ddb.adapterType = "ide"', 'ddb.geometry.sectors = "63"']
    lines += [
        'ddb.geometry.heads = "16"',
        f'ddb.geometry.cylinders = "{sectors // 1008}"',
        'ddb.virtualHWVersion = "4"',
    ]
    return "\n".join(lines).encode().ljust(1024, b"\n")


def field(offset: int, form: str, value: int) -> Callable[[Path, Path], bytes]:
    """An image of which one field of the header says something else."""
    return lambda path, canary: patched(made(path, canary), offset, struct.pack(form, value))


Maker = Callable[[Path, Path], bytes]
# What makes a reader open another file, if it believes it.
POINTING: dict[str, Maker] = {
    "external data file": lambda path, canary: made(path, canary, "-o", "data_file=CANARY"),
    "raw external data file": lambda path, canary: made(path, canary, "-o", "data_file=CANARY,data_file_raw=on"),
    "absolute backing file": lambda path, canary: made(path, canary, "-u", "-b", "CANARY", "-F", "raw"),
    "backing file that is probed": without_format,
    "backing file by json": lambda path, canary: made(
        path, canary, "-u", "-b", 'json:{"driver":"raw","file":{"driver":"file","filename":"CANARY"}}', "-F", "raw"
    ),
    "vmdk": vmdk,
}
OTHERS: dict[str, Maker] = {
    "internal snapshot": with_snapshot,
    "bitmap": with_bitmap,
    "encrypted": encrypted,
    "encrypted, old way": field(32, ">I", 1),
    "zstd": lambda path, canary: made(path, canary, "-o", "compression_type=zstd"),
    "extended L2": lambda path, canary: made(path, canary, "-o", "extended_l2=on"),
    "huge L1": field(36, ">I", 0x7FFFFFFF),
    "L1 on the header": field(40, ">Q", 0),
    "huge refcount table": field(56, ">I", 0xFFFFFFFF),
    "refcount order 63": field(96, ">I", 63),
    "many snapshots": field(60, ">I", 0xFFFFFFFF),
    "no cluster bits": field(20, ">I", 0),
    "cluster bits 63": field(20, ">I", 63),
    "no size": field(24, ">Q", 0),
    "endless size": field(24, ">Q", (1 << 63) - 512),
    "header without end": field(100, ">I", 0xFFFFFFF8),
    "backing name outside": lambda path, canary: patched(made(path, canary), 8, struct.pack(">QI", 1 << 40, 1000)),
    "dirty": field(72, ">Q", 1),
    "marked corrupt": field(72, ">Q", 2),
    "unknown feature": field(72, ">Q", 1 << 40),
    "version 4": field(4, ">I", 4),
    "cut off": lambda path, canary: made(path, canary)[:60],
    "empty": lambda *_: b"",
    "raw": lambda *_: b"QFJ\xfb".ljust(SIZE_BYTES, b"\0"),
}
HOSTILE = POINTING | OTHERS
IN_A_DISK = ["external data file", "absolute backing file", "vmdk", "internal snapshot", "huge L1", "encrypted"]


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    watched = Canary(tmp_path / "canary")
    yield watched
    watched.close()


def image_bytes(kind: str, folder: Path, canary: Path) -> bytes:
    """Give a hostile image as bytes; making it may open files, which is why the canary here is another one."""
    path = folder / "being-made"
    stand_in = folder / "stand-in"
    stand_in.write_bytes(bytes(SIZE_BYTES))
    # of the same length, so that the name can be put in the place of the other
    name = str(canary).encode()
    other = str(stand_in).encode()
    length = max(len(name), len(other))
    padded = Path("/" * (length - len(other)) + str(stand_in))
    data = HOSTILE[kind](path, padded)
    path.unlink(missing_ok=True)
    stand_in.unlink()
    return data.replace(b"/" * (length - len(other)) + other, b"/" * (length - len(name)) + name)


@pytest.mark.parametrize("kind", POINTING)
def test_reader_that_believes_it_opens_the_canary(tmp_path: Path, canary: Canary, kind: str) -> None:
    """The proof would notice."""
    path = tmp_path / "image"
    path.write_bytes(image_bytes(kind, tmp_path, canary.path))
    assert not canary.was_opened()
    qemu_img("convert", "-O", "raw", path, tmp_path / "copy")
    assert canary.was_opened()


# --- in a disk -------------------------------------------------------------------------------------------------


def put_into_disk(kit: Kit, name: str, data: Path) -> None:
    """Write to the beginning of a volume what its pod may write there."""
    length = data.stat().st_size
    head = kit.chain(name)[0]
    qemu_io(write_disk(kit.store, head.id), f"write -s {data} 0 {length}", read_only=False)


def export(kit: Kit, name: str, path: Path, image_format: str, *, snapshot: str = "") -> Path:
    """Export a volume, or one of its snapshots."""
    wanted = kit.snapshot_id(snapshot) if snapshot else ""
    request = ExportRequest(kit.volume_id(name), str(path), image_format, snapshot=wanted)  # type: ignore[arg-type]
    exporting.export(kit.store, tools(), request, lambda _: "go on")
    return path


def disk_begins_with(kit: Kit, layer_id: str, data: bytes, folder: Path) -> bool:
    """Say whether what a layer shows begins with these bytes, by the copy that the driver itself would make."""
    chain = [kit.store.layer(layer_id)]
    while chain[0].parent:
        chain.insert(0, kit.store.layer(chain[0].parent))
    target = folder / "copy-of-the-disk"
    layers = [ImageLayer(layer.id, kit.store.image_path(layer), layer.format) for layer in chain]
    product.convert(tools(), layers, str(target), "raw")
    with target.open("rb") as file:
        found = file.read(len(data))
    target.unlink()
    assert qemu_io(read_disk(kit.store, layer_id), "read 0 512", read_only=True) == 0
    return found == data


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_what_a_pod_writes_into_its_disk_is_data(kit: Kit, tmp_path: Path, canary: Canary, image_format: str) -> None:
    as_new = tree(kit.store.root)
    written = {}
    for number, kind in enumerate(IN_A_DISK):
        data = image_bytes(kind, tmp_path, canary.path)[: 256 * 1024]
        file = tmp_path / "data"
        file.write_bytes(data.ljust(-(-len(data) // 512) * 512, b"\0"))
        name = f"v{number}"
        kit.create(name, image_format=image_format)
        put_into_disk(kit, name, file)
        kit.snapshot(f"s{number}", of=name)
        kit.create(f"restored{number}", source=kit.from_snapshot(f"s{number}"))
        kit.expand(name, 2 * SIZE_BYTES)
        kit.grow_image(name)
        put_into_disk(kit, name, file)  # its own layer, too
        kit.create(f"cloned{number}", source=kit.from_volume(name))
        kit.create(f"copied{number}", source=kit.from_snapshot(f"s{number}"), clone_mode="copy")
        kit.create(f"cached{number}", source=kit.from_snapshot(f"s{number}"), clone_mode="cache")
        kit.attach(name)
        kit.detach(name)
        for file_format in ("raw", "qcow2"):
            exported = export(kit, name, tmp_path / f"{name}.{file_format}", file_format)
            if file_format == "raw":
                assert exported.read_bytes().startswith(data)
            kit.import_image(f"{name} {file_format}", exported, file_format)
            kit.create(f"imported-{file_format}{number}", source_image=f"{name} {file_format}", size=SizeRange())
            exported.unlink()
        written[name] = data
    assert kit.check() == []
    assert repairing.repair(kit.store, tools(), kit.check_image).actions == []
    for number in range(len(IN_A_DISK)):
        for image in ("raw", "qcow2"):
            kit.remove_image(f"v{number} {image}")
        kit.delete_snapshot(f"s{number}")
        kit.delete(f"restored{number}")
    kit.sweep_until_quiet()
    assert len(kit.merge_all()) >= len(IN_A_DISK)
    assert not canary.was_opened()
    for name, data in written.items():
        assert disk_begins_with(kit, kit.chain(name)[0].id, data, tmp_path), name
        for other in ("cloned", "copied", "cached", "imported-raw", "imported-qcow2"):
            assert disk_begins_with(kit, kit.chain(name.replace("v", other))[0].id, data, tmp_path), name
    assert [finding for finding in kit.check() if finding.severity == "error"] == []
    assert not canary.was_opened()
    kit.delete_everything()
    Path(kit.store.root, "collector.json").unlink(missing_ok=True)
    assert tree(kit.store.root) == as_new


# --- in the place of an image ----------------------------------------------------------------------------------


def attempts(kit: Kit, out: Path) -> dict[str, Callable[[], object]]:
    """Everything that can be done with v, whose head and base are hostile, and with its snapshot s."""
    return {
        "export the snapshot": lambda: export(kit, "v", out / "s.raw", "raw", snapshot="s"),
        "export the volume": lambda: export(kit, "v", out / "v.raw", "raw"),
        "snapshot": lambda: kit.snapshot("new", of="v"),
        "clone": lambda: kit.create("clone", source=kit.from_volume("v")),
        "restore": lambda: kit.create("restored", source=kit.from_snapshot("s")),
        "copy": lambda: kit.create("copied", source=kit.from_snapshot("s"), clone_mode="copy"),
        "cache": lambda: kit.create("cached", source=kit.from_snapshot("s"), clone_mode="cache"),
        "expand": lambda: kit.expand("v", 2 * SIZE_BYTES),
        "attach": lambda: kit.attach("v"),
        "detach": lambda: kit.detach("v"),
        "check": kit.check,
        "repair, dry run": lambda: repairing.plan(kit.store, tools(), kit.check_image),
        "delete the snapshot": lambda: kit.delete_snapshot("s"),
        "collect": lambda: collector.sweep(kit.store),
        "merge": kit.merge_all,
        "gc": lambda: list(collector.collect(kit.store, tools(), merges=True)),
        "check again": kit.check,
    }


@pytest.mark.parametrize("kind", HOSTILE)
def test_header_that_somebody_has_exchanged(
    kit: Kit, impatient: None, tmp_path: Path, canary: Canary, kind: str
) -> None:
    as_new = tree(kit.store.root)
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.write("v", 2)
    data = image_bytes(kind, tmp_path, canary.path)
    images = [Path(kit.store.image_path(layer)) for layer in kit.chain("v")]
    for image in images:
        image.write_bytes(data)
    for what, attempt in attempts(kit, tmp_path).items():
        try:
            attempt()
        except DriverError as error:
            assert str(error), what
        assert not canary.was_opened(), what
        assert all(image.read_bytes() == data for image in images if image.exists()), what
    found = {finding.path: finding.kind for finding in kit.check()}
    expected = {"damaged-image"} if kind not in POINTING or "backing" not in kind else {"wrong-backing-name"}
    assert {found.get(str(image)) for image in images} <= expected | {"damaged-image"}
    repairing.repair(kit.store, tools(), kit.check_image)
    assert not canary.was_opened()
    kit.delete_everything()
    Path(kit.store.root, "collector.json").unlink(missing_ok=True)
    assert tree(kit.store.root) == as_new


# --- through the storage daemon --------------------------------------------------------------------------------

VOLUME_BYTES = 64 * MIB


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with running() as machine:
        yield machine


@pytest.fixture(scope="module")
def calls(machine: Machine) -> Client:
    return Client(machine)


def below(machine: Machine, volume: str) -> Path:
    """Give the image of the layer that a restored volume's head lies on."""
    head = head_of(machine, volume).resolve()
    parent = product.info(tools(), str(head), "qcow2").backing_file
    assert parent
    return (head.parent / parent).resolve()


@pytest.mark.root
@pytest.mark.parametrize("which", ["head", "layer below"])
def test_S54_stage_of_an_exchanged_image_is_refused_before_a_daemon_sees_it(
    machine: Machine, calls: Client, tmp_path: Path, canary: Canary, which: str
) -> None:
    capability = block_capability()
    source = calls.create("source", VOLUME_BYTES, capability=capability).volume_id
    target = calls.use(source, capability=capability)
    with target.open("r+b", buffering=0) as device:
        os.write(device.fileno(), b"data".ljust(4096, b"."))
        os.fsync(device.fileno())
    calls.release(source)
    snapshot = calls.snapshot("snapshot", source).snapshot_id
    volume = calls.create("restored", 0, capability=capability, snapshot=snapshot).volume_id
    image = head_of(machine, volume).resolve() if which == "head" else below(machine, volume)
    # through the mount, so that no old length of it is cached there
    image = machine.pools["main"] / image.relative_to(machine.directories["main"].resolve())
    whole = tmp_path / "whole"
    shutil.copyfile(image, whole)
    for kind in HOSTILE:
        image.write_bytes(image_bytes(kind, tmp_path, canary.path))
        context = calls.attach(volume, capability=capability)
        fails(Code.DATA_LOSS, calls.stage, volume, context, capability=capability, saying=image.stem)
        assert not canary.was_opened(), kind
        assert machine.leftovers() == [], kind
        calls.detach(volume)
    shutil.copyfile(whole, image)
    target = calls.use(volume, capability=capability)
    with target.open("rb", buffering=0) as device:
        assert os.read(device.fileno(), 4) == b"data"
    calls.release(volume)
    for one in (volume, source):
        calls.delete(one)
    calls.delete_snapshot(snapshot)


@pytest.mark.root
@pytest.mark.parametrize("volume_format", ["raw", "qcow2"])
def test_S24_what_a_pod_writes_into_its_device_is_data_at_every_stage(
    machine: Machine, calls: Client, tmp_path: Path, canary: Canary, volume_format: str
) -> None:
    capability = block_capability()
    volume = calls.create("guest", VOLUME_BYTES, capability=capability, volumeFormat=volume_format).volume_id
    for kind in POINTING:
        data = image_bytes(kind, tmp_path, canary.path)[:65536].ljust(65536, b"\0")
        target = calls.use(volume, capability=capability)
        with target.open("r+b", buffering=0) as device:
            os.pwrite(device.fileno(), data, 0)
            os.fsync(device.fileno())
        calls.release(volume)
        snapshot = calls.snapshot(f"of-{kind}", volume).snapshot_id
        restored = calls.create(
            f"restored-{kind}", 2 * VOLUME_BYTES, capability=capability, snapshot=snapshot
        ).volume_id
        target = calls.use(restored, capability=capability)
        with target.open("rb", buffering=0) as device:
            assert os.pread(device.fileno(), 65536, 0) == data, kind
            assert device.seek(0, os.SEEK_END) == 2 * VOLUME_BYTES
        calls.release(restored)
        calls.delete(restored)
        calls.delete_snapshot(snapshot)
        assert not canary.was_opened(), kind
    calls.delete(volume)
