"""Real ext4 and xfs on loop devices: what is recognised as blank, made, repaired, grown; and the option tables.

Axes: filesystem × state of the device (blank, foreign, torn, dirty, broken, too small, unreadable).
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_quobyte.errors import InvalidArgument, OutOfRange, Refused, Unavailable
from csi_quobyte.host import filesystem, filesystem_options, loop, mounts

MIB = 1 << 20
SIZE_BYTES = {"ext4": 64 * MIB, "xfs": 320 * MIB}
NewDevice = Callable[..., loop.LoopDevice]

each_filesystem = pytest.mark.parametrize("fstype", filesystem_options.SUPPORTED)


def shell(*argv: str) -> str:
    return subprocess.run(argv, check=True, timeout=60, capture_output=True, text=True).stdout


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory below which everything is unmounted at the end."""
    yield tmp_path
    while below := [mount.target for mount in mounts.table() if mount.target.startswith(f"{tmp_path}/")]:
        subprocess.run(["umount", "-n", "-c", "-l", "--", below[-1]], check=True, timeout=20)


@pytest.fixture
def new_device(directory: Path) -> Iterator[NewDevice]:
    """Make a loop device on `directory/NAME`, which is made of zeros unless it exists."""
    tags: list[str] = []

    def make(size_bytes: int = 64 * MIB, *, name: str = "image") -> loop.LoopDevice:
        image = directory / name
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(size_bytes)
        tags.append(f"zt:{secrets.token_hex(6)}")
        return loop.ensure(tags[-1], str(image), read_only=False)

    yield make
    for mount in mounts.table():
        if mount.target.startswith(f"{directory}/"):
            subprocess.run(["umount", "-n", "-c", "-l", "--", mount.target], check=False, timeout=20)
    for tag in tags:
        loop.release(tag, timeout_s=10)


@pytest.fixture
def mountpoint(directory: Path) -> str:
    path = directory / "mnt"
    path.mkdir()
    return str(path)


def make(device: loop.LoopDevice, fstype: str, options: str = "") -> None:
    checked = filesystem_options.check_mkfs_options(fstype, options)
    filesystem.make(device.path, fstype, options=checked, timeout_s=60)


def mount(device: loop.LoopDevice, fstype: str, target: str, *options: str) -> None:
    every = [*filesystem_options.default_mount_options(fstype), *options]
    mounts.mount(device.path, target, fstype=fstype, options=every)


def unmount(target: str) -> None:
    assert mounts.unmount(target, timeout_s=20, lazy_after=False) is mounts.Unmounted.CLEAN


def write_at(device: loop.LoopDevice, offset: int, data: bytes) -> None:
    with Path(device.path).open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def image_of(directory: Path, name: str = "image") -> Path:
    return directory / name


# --- blank or not ---------------------------------------------------------------------------------------------


@pytest.mark.root
def test_fresh_device_is_blank(new_device: NewDevice) -> None:
    device = new_device()
    assert filesystem.probe(device.path) is None
    assert filesystem.is_blank(device.path)


@pytest.mark.root
@each_filesystem
def test_filesystem_is_recognised_and_not_blank(fstype: str, new_device: NewDevice) -> None:
    device = new_device(SIZE_BYTES[fstype])
    make(device, fstype)
    assert filesystem.probe(device.path) == fstype
    assert not filesystem.is_blank(device.path)


@pytest.mark.root
def test_other_content_is_recognised_and_not_blank(new_device: NewDevice) -> None:
    swap = new_device(name="swap")
    shell("mkswap", "-q", swap.path)
    assert filesystem.probe(swap.path) == "swap"
    assert not filesystem.is_blank(swap.path)
    table = new_device(name="table")
    entry = bytes([0, 0, 2, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (65536).to_bytes(4, "little")
    write_at(table, 446, entry + bytes(48) + b"\x55\xaa")
    assert filesystem.probe(table.path) == "dos partition table"
    assert not filesystem.is_blank(table.path)


@pytest.mark.root
def test_contradicting_content_is_ambiguous_and_not_blank(directory: Path, new_device: NewDevice) -> None:
    device = new_device(SIZE_BYTES["xfs"])
    make(device, "xfs")
    other = directory / "other"
    shell("mkfs.ext4", "-q", "-F", "-O", "^metadata_csum", str(other), "8M")
    write_at(device, 1024, other.read_bytes()[1024:2048])
    # blkid says so itself up to util-linux 2.38; 2.41 finds nothing, and the bytes still speak
    assert filesystem.probe(device.path) in (filesystem.AMBIGUOUS, None)
    assert not filesystem.is_blank(device.path)


@pytest.mark.root
def test_torn_superblock_is_unknown_but_not_blank(new_device: NewDevice) -> None:
    device = new_device()
    make(device, "ext4")
    write_at(device, 0, bytes(2048))
    assert filesystem.probe(device.path) is None
    assert not filesystem.is_blank(device.path)


@pytest.mark.root
@pytest.mark.parametrize("offset", [0, 2 * MIB - 1, 62 * MIB, 64 * MIB - 1])
def test_one_byte_at_either_end_is_not_blank(offset: int, new_device: NewDevice) -> None:
    device = new_device()
    write_at(device, offset, b"x")
    assert not filesystem.is_blank(device.path)


@pytest.mark.root
def test_tiny_device_can_be_blank(new_device: NewDevice) -> None:
    device = new_device(5 * 512)
    assert filesystem.is_blank(device.path)
    write_at(device, 4 * 512, b"x")
    assert not filesystem.is_blank(device.path)


@pytest.mark.root
def test_unreadable_device_is_never_blank(directory: Path, new_device: NewDevice) -> None:
    with bindfs(directory) as (server, pool):
        device = new_device(name=f"{pool.name}/image")
        assert filesystem.is_blank(device.path)
        server.kill()
        server.wait(10)
        for ask in (filesystem.probe, filesystem.is_blank):
            with pytest.raises(Unavailable):
                ask(device.path)
        with pytest.raises(Unavailable):
            filesystem.make(device.path, "ext4", options=(), timeout_s=20)
    with pytest.raises(Unavailable):
        filesystem.is_blank("/dev/nonexistent")
    with pytest.raises(Unavailable):
        filesystem.device_size_bytes("/dev/nonexistent")


@contextlib.contextmanager
def bindfs(directory: Path) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    source, target = directory / "source", directory / "pool"
    source.mkdir()
    target.mkdir()
    argv = ["bindfs", "-f", "--multithreaded", "--forward-odirect=512", str(source), str(target)]
    server = subprocess.Popen(argv)
    try:
        wait_until(lambda: mounts.at(str(target)) is not None, "bindfs has mounted")
        yield server, target
    finally:
        server.send_signal(signal.SIGCONT)
        server.kill()
        server.wait(10)


# --- making ---------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize(("fstype", "limit_bytes"), [("ext4", 4 * MIB), ("xfs", 80 * MIB)])
def test_make_keeps_the_file_thin(
    fstype: str, limit_bytes: int, directory: Path, new_device: NewDevice, mountpoint: str
) -> None:
    device = new_device(4096 * MIB)
    make(device, fstype)
    mount(device, fstype, mountpoint)
    unmount(mountpoint)
    # Of xfs nearly all is its log, 64 MiB, which mkfs has to write.
    assert image_of(directory).stat().st_blocks * 512 < limit_bytes


@pytest.mark.root
@each_filesystem
def test_make_at_the_minimum_size_has_a_journal_and_mounts(fstype: str, new_device: NewDevice, mountpoint: str) -> None:
    minimum = filesystem.MINIMUM_SIZE_BYTES[fstype]
    device = new_device(minimum)
    make(device, fstype, "-b 4096" if fstype == "ext4" else "")
    mount(device, fstype, mountpoint)
    if fstype == "ext4":
        assert "has_journal" in shell("dumpe2fs", "-h", device.path)
    unmount(mountpoint)
    small = new_device(minimum - 4096, name="small")
    with pytest.raises(OutOfRange, match=str(minimum)):
        make(small, fstype)
    assert filesystem.is_blank(small.path)


@pytest.mark.root
def test_make_takes_options_and_label(new_device: NewDevice) -> None:
    device = new_device()
    text = "-b4096 -E stride=16,lazy_itable_init=0 -m 1 -E stripe_width=32 -I 512"
    options = filesystem_options.check_mkfs_options("ext4", text)
    filesystem.make(device.path, "ext4", options=options, timeout_s=60, volume_label="name")
    shown = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in shell("dumpe2fs", "-h", device.path).splitlines())
    }
    assert shown["Block size"] == "4096"
    assert shown["Inode size"] == "512"
    assert shown["RAID stride"] == "16"
    assert shown["RAID stripe width"] == "32"
    assert int(shown["Reserved block count"]) > 0
    assert shown["Filesystem volume name"] == "name"


@pytest.mark.root
@pytest.mark.parametrize(("fstype", "options"), [("ext4", "-O bigalloc -C 1"), ("xfs", "-d su=64k")])
def test_options_that_mkfs_refuses_are_refused_with_its_words(fstype: str, options: str, new_device: NewDevice) -> None:
    device = new_device(SIZE_BYTES[fstype])
    with pytest.raises(Refused, match=f"cannot be formatted as {fstype}: .+"):
        make(device, fstype, options)


@pytest.mark.root
@each_filesystem
def test_make_checks_label_and_name_before_it_writes(fstype: str, new_device: NewDevice) -> None:
    device = new_device(SIZE_BYTES[fstype])
    with pytest.raises(InvalidArgument, match="label"):
        filesystem.make(device.path, fstype, options=(), timeout_s=60, volume_label="x" * 17)
    with pytest.raises(InvalidArgument, match="not supported"):
        filesystem.make(device.path, "btrfs", options=(), timeout_s=60)
    assert filesystem.is_blank(device.path)


@pytest.mark.root
@each_filesystem
def test_clone_mounts_beside_its_source(fstype: str, directory: Path, new_device: NewDevice, mountpoint: str) -> None:
    source = new_device(SIZE_BYTES[fstype])
    make(source, fstype)
    shutil.copyfile(image_of(directory), image_of(directory, "clone"))
    clone = new_device(name="clone")
    beside = directory / "beside"
    beside.mkdir()
    mounts.mount(source.path, mountpoint, fstype=fstype, options=[])
    if fstype == "xfs":  # without the default options it is refused, which is why they exist
        with pytest.raises(Unavailable):
            mounts.mount(clone.path, str(beside), fstype=fstype, options=[])
    mount(clone, fstype, str(beside))
    write_durably(beside / "file", b"clone")
    assert not Path(mountpoint, "file").exists()
    unmount(str(beside))
    unmount(mountpoint)


# --- repairing ------------------------------------------------------------------------------------------------


@pytest.mark.root
@each_filesystem
def test_dirty_journal_is_replayed_for_a_read_only_mount(
    fstype: str, directory: Path, new_device: NewDevice, mountpoint: str
) -> None:
    source = new_device(SIZE_BYTES[fstype])
    make(source, fstype)
    mount(source, fstype, mountpoint)
    write_durably(Path(mountpoint, "file"), b"data" * 1000)
    shutil.copyfile(image_of(directory), image_of(directory, "clone"))  # as a snapshot of a mounted volume
    unmount(mountpoint)
    clone = new_device(name="clone")
    loop.set_read_only(clone)
    with pytest.raises(Unavailable):  # the proof that the journal is dirty
        mount(clone, fstype, mountpoint, "ro")
    loop.release(clone.tag, timeout_s=10)
    clone = new_device(name="clone")
    scratch = directory / "scratch"
    scratch.mkdir()
    for _ in range(2):
        filesystem.replay_journal(clone.path, fstype, str(scratch), timeout_s=30)
    assert mounts.at(str(scratch)) is None
    loop.set_read_only(clone)
    mount(clone, fstype, mountpoint, "ro")
    assert Path(mountpoint, "file").read_bytes() == b"data" * 1000
    unmount(mountpoint)


@pytest.mark.root
def test_replay_takes_away_the_mount_that_an_interrupted_one_left(
    directory: Path, new_device: NewDevice, mountpoint: str
) -> None:
    device = new_device(SIZE_BYTES["xfs"])
    make(device, "xfs")
    mount(device, "xfs", mountpoint)
    filesystem.replay_journal(device.path, "xfs", mountpoint, timeout_s=30)
    assert mounts.at(mountpoint) is None


@pytest.mark.root
def test_repair_of_a_clean_ext4_changes_nothing(directory: Path, new_device: NewDevice) -> None:
    device = new_device()
    make(device, "ext4")
    before = image_of(directory).read_bytes()
    filesystem.repair(device.path, "ext4", timeout_s=60)
    # All but the superblock, in which e2fsck notes when it looked.
    assert image_of(directory).read_bytes()[4096:] == before[4096:]


@pytest.mark.root
def test_repair_of_a_broken_ext4_is_refused_and_formats_nothing(new_device: NewDevice) -> None:
    device = new_device()
    make(device, "ext4")
    shell("debugfs", "-w", "-R", "clri <2>", device.path)
    shell("debugfs", "-w", "-R", "ssv state 2", device.path)  # "has errors", so that it is checked
    with pytest.raises(Refused, match="needs a human"):
        filesystem.repair(device.path, "ext4", timeout_s=60)
    assert filesystem.probe(device.path) == "ext4"


# --- growing --------------------------------------------------------------------------------------------------


def enlarge(directory: Path, device: loop.LoopDevice, size_bytes: int) -> None:
    os.truncate(image_of(directory), size_bytes)
    loop.refresh_size(device)


def may_grow_ext4_mounted() -> bool:
    (effective,) = [
        line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")
    ]
    return bool(int(effective, 16) & 1 << 24)


@pytest.mark.root
def test_mounted_xfs_grows_to_its_device(directory: Path, new_device: NewDevice, mountpoint: str) -> None:
    device = new_device(SIZE_BYTES["xfs"])
    make(device, "xfs")
    assert not filesystem.needs_growth(device.path, "xfs", None)
    mount(device, "xfs", mountpoint)
    before = filesystem.usage(mountpoint).total_bytes
    assert not filesystem.needs_growth(device.path, "xfs", mountpoint)
    enlarge(directory, device, 2 * SIZE_BYTES["xfs"])
    assert filesystem.needs_growth(device.path, "xfs", mountpoint)
    assert filesystem.needs_growth(device.path, "xfs", None)
    filesystem.grow_unmounted(device.path, "xfs")
    for _ in range(2):
        filesystem.grow(device.path, "xfs", mountpoint)
    assert not filesystem.needs_growth(device.path, "xfs", mountpoint)
    assert filesystem.usage(mountpoint).total_bytes == before + SIZE_BYTES["xfs"]
    unmount(mountpoint)
    assert not filesystem.needs_growth(device.path, "xfs", None)


@pytest.mark.root
def test_mounted_xfs_grows_while_another_mount_hangs(directory: Path, new_device: NewDevice, mountpoint: str) -> None:
    device = new_device(SIZE_BYTES["xfs"])
    make(device, "xfs")
    mount(device, "xfs", mountpoint)
    enlarge(directory, device, 2 * SIZE_BYTES["xfs"])
    with bindfs(directory) as (server, _):
        server.send_signal(signal.SIGSTOP)
        filesystem.grow(device.path, "xfs", mountpoint)
    assert not filesystem.needs_growth(device.path, "xfs", mountpoint)


@pytest.mark.root
def test_mounted_ext4_grows_or_says_which_right_is_missing(
    directory: Path, new_device: NewDevice, mountpoint: str
) -> None:
    device = new_device()
    make(device, "ext4")
    mount(device, "ext4", mountpoint)
    filesystem.grow(device.path, "ext4", mountpoint)
    enlarge(directory, device, 256 * MIB)
    assert filesystem.needs_growth(device.path, "ext4", mountpoint)
    if may_grow_ext4_mounted():
        for _ in range(2):
            filesystem.grow(device.path, "ext4", mountpoint)
    else:
        with pytest.raises(Refused, match="CAP_SYS_RESOURCE"):
            filesystem.grow(device.path, "ext4", mountpoint)
        unmount(mountpoint)
        filesystem.grow_unmounted(device.path, "ext4")
        mount(device, "ext4", mountpoint)
    assert not filesystem.needs_growth(device.path, "ext4", mountpoint)
    assert filesystem.usage(mountpoint).total_bytes > 200 * MIB


@pytest.mark.root
@pytest.mark.parametrize("block_bytes", [1024, 4096])
def test_unmounted_ext4_grows_and_keeps_its_data(
    block_bytes: int, directory: Path, new_device: NewDevice, mountpoint: str
) -> None:
    device = new_device()
    make(device, "ext4", f"-b {block_bytes}")
    mount(device, "ext4", mountpoint)
    write_durably(Path(mountpoint, "file"), b"data" * 1000)
    unmount(mountpoint)
    enlarge(directory, device, 1024 * MIB)
    for _ in range(2):
        filesystem.grow_unmounted(device.path, "ext4")
    assert not filesystem.needs_growth(device.path, "ext4", None)
    shell("e2fsck", "-f", "-n", device.path)
    mount(device, "ext4", mountpoint)
    assert Path(mountpoint, "file").read_bytes() == b"data" * 1000
    unmount(mountpoint)


@pytest.mark.root
def test_ext4_that_no_kernel_grows_mounted_grows_before_it_is_mounted(
    directory: Path, new_device: NewDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a node that may grow others mounted."""
    monkeypatch.setattr(filesystem, "_has_capability", lambda _: True)
    for options, is_wanted in (("-O sparse_super2", True), ("", False)):
        device = new_device()
        make(device, "ext4", options)
        assert not filesystem.has_to_grow_unmounted(device.path, "ext4")
        enlarge(directory, device, 1024 * MIB)
        assert filesystem.has_to_grow_unmounted(device.path, "ext4") == is_wanted
        filesystem.grow_unmounted(device.path, "ext4")
        shell("e2fsck", "-f", "-n", device.path)
        assert not filesystem.needs_growth(device.path, "ext4", None)


@pytest.mark.root
@pytest.mark.parametrize("rest_bytes", [4096, MIB, 2 * MIB, 3 * MIB, 8 * MIB, 16 * MIB])
def test_growth_ends_also_when_the_last_group_does_not_fit(
    rest_bytes: int, directory: Path, new_device: NewDevice
) -> None:
    device = new_device(256 * MIB)
    make(device, "ext4", "-b 4096")
    enlarge(directory, device, 384 * MIB + rest_bytes)
    filesystem.grow_unmounted(device.path, "ext4")
    assert not filesystem.needs_growth(device.path, "ext4", None)
    shown = shell("dumpe2fs", "-h", device.path).partition("Block count:")[2].split()[0]
    assert (int(shown) * 4096 == 384 * MIB + rest_bytes) == (rest_bytes > 8 * MIB)


@pytest.mark.root
def test_unmounted_ext4_is_not_grown_beyond_what_is_safe(directory: Path, new_device: NewDevice) -> None:
    device = new_device(8 * MIB)
    make(device, "ext4", "-b 1024")
    enlarge(directory, device, 16 << 30)
    with pytest.raises(Refused, match="mounted"):
        filesystem.grow_unmounted(device.path, "ext4")
    shell("e2fsck", "-f", "-n", device.path)
    enlarge(directory, device, 8 << 30)
    filesystem.grow_unmounted(device.path, "ext4")
    shell("e2fsck", "-f", "-n", device.path)


@pytest.mark.root
@each_filesystem
def test_growth_of_something_else_is_refused(fstype: str, new_device: NewDevice) -> None:
    with pytest.raises(Refused, match="superblock"):
        filesystem.needs_growth(new_device().path, fstype, None)


@pytest.mark.root
@each_filesystem
def test_usage_follows_what_is_written(fstype: str, new_device: NewDevice, mountpoint: str) -> None:
    device = new_device(SIZE_BYTES[fstype])
    make(device, fstype)
    mount(device, fstype, mountpoint)
    before = filesystem.usage(mountpoint)
    write_durably(Path(mountpoint, "file"), bytes(8 * MIB))
    after = filesystem.usage(mountpoint)
    assert after.used_bytes - before.used_bytes >= 8 * MIB
    assert before.available_bytes - after.available_bytes >= 8 * MIB
    assert after.used_bytes + after.available_bytes <= after.total_bytes <= SIZE_BYTES[fstype]
    assert after.used_inodes == before.used_inodes + 1
    assert after.used_inodes + after.free_inodes == after.total_inodes
    assert filesystem.device_size_bytes(device.path) == SIZE_BYTES[fstype]
    unmount(mountpoint)


# --- options: pure --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fstype", "text", "expected"),
    [
        ("ext4", "", ()),
        ("ext4", "-b 4096", ("-b", "4096")),
        ("ext4", "-b4096 -m 0.5", ("-b", "4096", "-m", "0.5")),
        ("ext4", "-E stride=4,stripe_width=8", ("-E", "stride=4,stripe_width=8")),
        ("ext4", "-E lazy_itable_init", ("-E", "lazy_itable_init")),
        ("ext4", "-O '^metadata_csum,has_journal'", ("-O", "^metadata_csum,has_journal")),
        ("ext4", "-T largefile -N 1000 -I 512", ("-T", "largefile", "-N", "1000", "-I", "512")),
        ("xfs", "-b size=4k -d su=64k,sw=4", ("-b", "size=4k", "-d", "su=64k,sw=4")),
        ("xfs", "-m reflink=0,rmapbt=1 -i size=1024", ("-m", "reflink=0,rmapbt=1", "-i", "size=1024")),
        ("xfs", "-d noalign -l size=64m", ("-d", "noalign", "-l", "size=64m")),
    ],
)
def test_allowed_mkfs_options(fstype: str, text: str, expected: tuple[str, ...]) -> None:
    assert filesystem_options.check_mkfs_options(fstype, text) == expected


@pytest.mark.parametrize(
    ("fstype", "text"),
    [
        ("ext4", "/dev/vda"),
        ("ext4", "-b 4096 /dev/vda"),
        ("ext4", "-b"),
        ("ext4", "-b 65536"),
        ("ext4", "-b -4096"),
        ("ext4", "-F"),
        ("ext4", "-FF"),
        ("ext4", "-J device=/dev/vda"),
        ("ext4", "-E offset=1024"),
        ("ext4", "-E stride=4,offset=1024"),
        ("ext4", "-E discard"),
        ("ext4", "-E"),
        ("ext4", "-E ''"),
        ("ext4", "-E stride=4,,"),
        ("ext4", "-O ^has_journal"),
        ("ext4", "-O journal_dev"),
        ("ext4", "-O ^extent"),
        ("ext4", "-O none"),
        ("ext4", "-m 0\n1"),
        ("ext4", "-d /etc"),
        ("ext4", "-L label"),
        ("ext4", "-U clear"),
        ("ext4", "--help"),
        ("ext4", "--"),
        ("ext4", "-"),
        ("ext4", "'-b 4096"),
        ("ext4", "-N 1;reboot"),
        ("xfs", "-b 4096"),
        ("xfs", "-f"),
        ("xfs", "-K"),
        ("xfs", "-l logdev=/dev/vda"),
        ("xfs", "-l size=64m,logdev=/dev/vda"),
        ("xfs", "-d file"),
        ("xfs", "-d name=/dev/vda"),
        ("xfs", "-d size=1g"),
        ("xfs", "-r rtdev=/dev/vda"),
        ("xfs", "-p /etc/passwd"),
        ("xfs", "-c options=/etc/passwd"),
        ("xfs", "-m uuid=0"),
        ("xfs", "-m crc=0"),
        ("btrfs", ""),
    ],
)
def test_other_mkfs_options_are_invalid(fstype: str, text: str) -> None:
    with pytest.raises(InvalidArgument):
        filesystem_options.check_mkfs_options(fstype, text)


def test_refused_mkfs_option_is_named_with_the_allowed_ones() -> None:
    with pytest.raises(InvalidArgument, match=r"'-J size=4' is not allowed|'-J'.*-b .*stride"):
        filesystem_options.check_mkfs_options("ext4", "-J size=4")


@pytest.mark.parametrize(
    ("fstype", "options"),
    [
        ("ext4", []),
        ("ext4", ["noatime", "nodiratime", "discard", "nosuid", "nodev", "noexec"]),
        ("ext4", ["data=journal", "commit=30", "errors=remount-ro"]),
        ("ext4", ["ro"]),
        ("xfs", ["relatime", "lazytime", "nodiscard", "rw"]),
        ("xfs", ["inode64", "logbufs=8", "logbsize=256k", "largeio", "noquota", "wsync", "allocsize=64k"]),
    ],
)
def test_allowed_mount_options(fstype: str, options: list[str]) -> None:
    assert filesystem_options.check_mount_options(fstype, options) == tuple(options)


@pytest.mark.parametrize(
    ("fstype", "option"),
    [
        ("ext4", ""),
        ("ext4", "barrier=0"),
        ("ext4", "nobarrier"),
        ("ext4", "noload"),
        ("ext4", "errors=panic"),
        ("ext4", "data=other"),
        ("ext4", "commit=-1"),
        ("ext4", "commit=5\n"),
        ("ext4", "commit"),
        ("ext4", "noatime=1"),
        ("ext4", "noatime,barrier=0"),
        ("ext4", "inode64"),
        ("ext4", "journal_path=/dev/vda"),
        ("ext4", "bind"),
        ("ext4", "remount"),
        ("ext4", "loop"),
        ("ext4", "X-mount.mkdir"),
        ("xfs", "nouuid"),
        ("xfs", "norecovery"),
        ("xfs", "logdev=/dev/vda"),
        ("xfs", "data=ordered"),
        ("xfs", "NOATIME"),
        ("btrfs", "noatime"),
    ],
)
def test_other_mount_options_are_invalid(fstype: str, option: str) -> None:
    with pytest.raises(InvalidArgument):
        filesystem_options.check_mount_options(fstype, ["noatime", option])


def test_refused_mount_option_is_named_with_the_allowed_ones() -> None:
    with pytest.raises(InvalidArgument, match=r"'barrier=0'.*allowed:.*commit=0…999.*noatime"):
        filesystem_options.check_mount_options("ext4", ["noatime", "barrier=0"])
    with pytest.raises(InvalidArgument, match="contradict"):
        filesystem_options.check_mount_options("ext4", ["ro", "rw"])


@pytest.mark.root
@each_filesystem
def test_every_allowed_mount_option_is_one_that_the_kernel_takes(
    fstype: str, new_device: NewDevice, mountpoint: str
) -> None:
    """The tables are promises: an option that is let through and then fails the mount would be a bad surprise."""
    samples = {"allocsize": "=64k", "data": "=ordered", "errors": "=continue", "logbsize": "=64k", "logbufs": "=8"}
    device = new_device(SIZE_BYTES[fstype])
    make(device, fstype)
    refused = []
    for name, pattern in filesystem_options.MOUNT[fstype].items():
        option = name + (samples.get(name, "=10") if pattern.startswith("=") else "")
        assert filesystem_options.check_mount_options(fstype, [option])
        try:
            mount(device, fstype, mountpoint, option)
            unmount(mountpoint)
        except Unavailable as error:
            refused.append((option, str(error)))
    assert not refused


@pytest.mark.root
def test_a_mkfs_that_hangs_keeps_no_other_volume_s_device(new_device: NewDevice, mountpoint: str) -> None:
    """mkfs.xfs has a mount namespace of its own, with a copy of every mount that there is when it begins."""
    device = new_device()
    make(device, "ext4")
    mount(device, "ext4", mountpoint)
    argv = mounts.out_of_reach_of_servers(["sh", "-c", "echo began; exec sleep 60"])
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as tool:
        try:
            assert tool.stdout is not None
            assert tool.stdout.readline() == b"began\n"
            mounts.unmount(mountpoint, timeout_s=10, lazy_after=False)
            assert loop.release(device.tag, timeout_s=5).was_bound
            assert loop.find(device.tag) is None
        finally:
            tool.kill()
