"""An unmounted ext4 whose growth was interrupted at any write, or by a power cut, is made whole and keeps its files.

The writes of the real resize2fs are recorded (QEMU's blklogwrites below a FUSE export), and images are made that have
them up to a moment: all of them (the process was killed), or of those after the last flush a random part (a power cut).
`make power-loss` tries every moment.
"""

import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from controller_kit import QEMU_DIR
from node_kit import host_on
from running import MIB, machine_of, read_tree, write_tree
from test_crash_steps import SEED

from csi_quobyte.errors import Refused, Unavailable
from csi_quobyte.host import filesystem, loop, mounts
from csi_quobyte.pool.records import Content
from csi_quobyte.pool.sizes import SizeRange
from lab.machine import wait_for

pytestmark = pytest.mark.root

EVERY_CUT = os.environ.get("CSI_QUOBYTE_POWER_CUTS") == "0"
CUTS = 8
STAGED = 100 if EVERY_CUT else 4
BYTES, GROWN_BYTES = 32 * MIB, 96 * MIB
TAG = "zt:0123456789ab"

# include/linux/dm-log-writes format: a superblock, then entries, each on a sector boundary
_SUPERBLOCK = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_FLUSH, _DISCARD = 1, 4


@dataclass(frozen=True)
class Write:
    """One write; without data zeros are written."""

    offset: int
    length: int
    data: bytes | None


@dataclass(frozen=True)
class Recorded:
    """An image before its growth, what then was written (None: a flush), and the files that are in it."""

    image: Path
    writes: list[Write | None]
    files: dict[str, str]
    directory: Path


def shell(*argv: str | Path) -> None:
    subprocess.run(argv, check=True, timeout=60, capture_output=True)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    directory = tmp_path_factory.mktemp("growth")
    image, mountpoint = directory / "image", directory / "mnt"
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(BYTES)
    device = loop.ensure(TAG, str(image), read_only=False)
    filesystem.make(device.path, "ext4", options=(), timeout_s=60)
    files = mounted(device, mountpoint, write=True)
    loop.release(TAG, timeout_s=10)
    os.truncate(image, GROWN_BYTES)
    shell("e2fsck", "-f", "-p", image)
    yield Recorded(image, record(directory, image), files, directory)
    loop.release(TAG, timeout_s=10)


def mounted(device: loop.LoopDevice, mountpoint: Path, *, write: bool = False) -> dict[str, str]:
    """Give what is in the file system of a device, which is filled to a good part first."""
    mounts.mount(device.path, str(mountpoint), fstype="ext4", options=())
    if write:
        write_tree(mountpoint, files=150, size_bytes=150_000)
    found = read_tree(mountpoint)
    mounts.unmount(str(mountpoint), timeout_s=10, lazy_after=False)
    return found


def record(directory: Path, image: Path) -> list[Write | None]:
    """Let resize2fs grow a copy of the image, and give what it wrote."""
    grown, log, export = directory / "grown", directory / "log", directory / "export"
    shutil.copy(image, grown)
    log.touch()
    export.touch()
    daemon = subprocess.Popen(
        [
            f"{QEMU_DIR}/qemu-storage-daemon",
            *("--blockdev", f"file,node-name=image,filename={grown}"),
            *("--blockdev", f"file,node-name=log,filename={log}"),
            *("--blockdev", "blklogwrites,node-name=both,file=image,log=log"),
            *("--export", f"fuse,id=export,node-name=both,mountpoint={export},writable=on"),
        ]
    )
    try:
        wait_for("the export", lambda: export.stat().st_size == GROWN_BYTES)
        shell("resize2fs", export)
    finally:
        daemon.terminate()
        daemon.wait(20)
    return list(parsed(log.read_bytes()))


def parsed(log: bytes) -> Iterator[Write | None]:
    _, _, count, sector = _SUPERBLOCK.unpack_from(log)
    at = sector
    for _ in range(count):
        first, sectors, flags, _ = _ENTRY.unpack_from(log, at)
        at += sector
        length = sectors * sector
        if flags & _FLUSH:
            yield None
        if flags & _DISCARD:
            yield Write(first * sector, length, None)
        elif length:
            yield Write(first * sector, length, log[at : at + length])
            at += length


def cuts(writes: list[Write | None]) -> Iterator[list[Write | None]]:
    """Give what may have come to the disk when the process was killed, or the power went, at each of the moments."""
    dice = random.Random(SEED)
    moments = range(len(writes) + 1) if EVERY_CUT else sorted(dice.sample(range(len(writes) + 1), CUTS))
    for moment in moments:
        yield writes[:moment]
        flushed = max((number for number in range(moment) if writes[number] is None), default=0)
        yield writes[:flushed] + [write for write in writes[flushed:moment] if dice.random() < 0.5]


def cut_image(recorded: Recorded, done: list[Write | None]) -> Path:
    image = recorded.directory / "cut"
    shutil.copy(recorded.image, image)
    with image.open("r+b") as file:
        for write in done:
            if write:
                file.seek(write.offset)
                file.write(bytes(write.length) if write.data is None else write.data)
    return image


@pytest.mark.timeout(1200)
def test_interrupted_growth_is_made_whole_and_goes_on(recorded: Recorded) -> None:
    assert len(recorded.writes) > 50
    assert None in recorded.writes
    tried = undecided = 0
    for done in cuts(recorded.writes):
        image = cut_image(recorded, done)
        undecided += is_undecided(recorded, image)
        device = loop.ensure(TAG, str(image), read_only=False)
        filesystem.repair(device.path, "ext4", timeout_s=60, after_growth=True)
        filesystem.grow_unmounted(device.path, "ext4")
        assert not filesystem.needs_growth(device.path, "ext4", None)
        shell("e2fsck", "-f", "-n", device.path)
        assert mounted(device, recorded.directory / "mnt") == recorded.files, f"cut {tried}, seed {SEED}"
        loop.release(TAG, timeout_s=10)
        tried += 1
    print(f"{tried} cuts, 0 bad; {undecided} of them e2fsck -p leaves to a human")
    assert undecided or not EVERY_CUT  # else nothing of this would be needed


def test_block_that_cannot_be_read_is_never_overwritten_by_the_repair(recorded: Recorded) -> None:
    """e2fsck -y answers "Ignore error" and "Force rewrite" with yes: the block's files are gone, and all is well."""
    done = next(one for one in cuts(recorded.writes) if is_undecided(recorded, cut_image(recorded, one)))
    image = cut_image(recorded, done)
    with (
        unreadable(recorded, image, block=inode_table(recorded.image) + 4) as device,
        pytest.raises(Unavailable, match="Error reading block"),
    ):
        filesystem.repair(device.path, "ext4", timeout_s=60, after_growth=True)
    device = loop.ensure(TAG, str(image), read_only=False)
    filesystem.repair(device.path, "ext4", timeout_s=60, after_growth=True)
    assert mounted(device, recorded.directory / "mnt") == recorded.files
    loop.release(TAG, timeout_s=10)


def inode_table(image: Path) -> int:
    """Give the first block of the inode table of the first block group."""
    said = subprocess.run(["dumpe2fs", image], check=True, timeout=60, capture_output=True, text=True).stdout
    return int(said.partition("Inode table at ")[2].partition("-")[0])


@contextmanager
def unreadable(recorded: Recorded, image: Path, *, block: int) -> Iterator[loop.LoopDevice]:
    """Give a device on an image of which a block of 1 KiB cannot be read the first four times, as on an ill pool."""
    export = recorded.directory / "unreadable"
    export.touch()
    error = {"event": "none", "iotype": "read", "sector": block * 2, "errno": 5, "once": True}
    debug = {"driver": "blkdebug", "node-name": "bad", "image": "image", "inject-error": [error] * 4}
    daemon = subprocess.Popen(
        [
            f"{QEMU_DIR}/qemu-storage-daemon",
            *("--blockdev", f"file,node-name=image,filename={image}"),
            *("--blockdev", json.dumps(debug)),
            *("--export", f"fuse,id=export,node-name=bad,mountpoint={export},writable=on"),
        ]
    )
    try:
        wait_for("the export", lambda: export.stat().st_size == GROWN_BYTES)
        yield loop.ensure(TAG, str(export), read_only=False)
    finally:
        loop.release(TAG, timeout_s=10)
        daemon.terminate()
        daemon.wait(20)


@pytest.mark.timeout(600)
def test_volume_whose_growth_was_interrupted_is_staged_by_the_next_node(recorded: Recorded) -> None:
    """The note of the node that grew it says what may be repaired; without it nothing is touched."""
    with machine_of(standin=False) as machine:
        host = host_on(machine.base, "b", machine.pools["main"])
        host.kit.add_node("b")
        for number, done in enumerate(cuts(recorded.writes)):
            if not is_undecided(recorded, cut_image(recorded, done)):
                continue
            volume = host.kit.create(f"v{number}", size=SizeRange(GROWN_BYTES), image_format="raw", data_path="loop")
            image = Path(host.kit.store.image_path(host.kit.store.layer(volume.head)))
            shutil.copyfile(cut_image(recorded, done), image)
            formatted = Content(state="formatted", filesystem="ext4", generation=0)
            host.kit.store.put_content(volume, formatted)
            before = image.read_bytes()
            generation = host.attach(volume)
            with pytest.raises(Refused):
                host.stage(volume, generation)
            if filesystem.probe(str(image)) != "ext4":
                assert image.read_bytes() == before
            shutil.copyfile(cut_image(recorded, done), image)
            host.kit.store.put_content(volume, replace(formatted, growing=True))
            assert read_tree(host.stage(volume, generation)) == recorded.files
            assert host.kit.store.content(volume) == replace(formatted, generation=generation)
            host.unstage(volume)
            if number >= STAGED:
                break
        host.kit.store.close()


def is_undecided(recorded: Recorded, image: Path) -> bool:
    """Say whether an image is one that is not repaired without a word that it may be."""
    copy = recorded.directory / "copy"
    shutil.copy(image, copy)
    try:
        filesystem.repair(str(copy), "ext4", timeout_s=60)
    except Refused:
        return True
    return False
