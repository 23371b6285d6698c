"""The node over gRPC, one volume at a time: every call twice, out of order and against what is there already.

The axes: data path (storage daemon with qcow2 or raw, or a loop device on the file), access type, file system,
read-only, and images that somebody else has changed. Data under load is in test_data_path, crashes in test_restart.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from running import (
    GIB,
    MIB,
    PATHS,
    Code,
    discard,
    eventually,
    fails,
    head_of,
    qemu_img,
    qemu_io,
    read_tree,
    running,
    stage_request,
    volume_record,
    write_tree,
)

from csi_quobyte.pb import csi_pb2 as csi
from lab.client import Client, block_capability, mount_capability
from lab.machine import QEMU_DIR, Machine, mounted_at, run, wait_for

pytestmark = pytest.mark.root

EXT4_BYTES = 64 * MIB
XFS_BYTES = 300 * MIB
every_path = pytest.mark.parametrize("path", PATHS)
CAP_SYS_RESOURCE = 24  # linux/capability.h


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with running() as machine:
        yield machine


@pytest.fixture(scope="module")
def calls(machine: Machine) -> Client:
    return Client(machine)


@pytest.fixture(autouse=True)
def nothing_left(machine: Machine, calls: Client) -> Iterator[None]:
    """Each test releases what it used and nothing of it may be left on the node; its volumes are deleted here."""
    yield
    left = machine.leftovers()
    for pod in (machine.base / "pods").glob("*"):
        for target in pod.iterdir():
            calls.unpublish(target.name, pod=pod.name)
    for entry in calls.controller.ListSnapshots(csi.ListSnapshotsRequest()).entries:
        calls.delete_snapshot(entry.snapshot.snapshot_id)
    for listed in calls.controller.ListVolumes(csi.ListVolumesRequest()).entries:
        discard(calls, listed.volume.volume_id)
    assert left == []


def fs_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize


def size_bytes_of(device: Path) -> int:
    return int(run("blockdev", "--getsize64", device).stdout)


def write_device(device: Path, data: bytes, offset_bytes: int = 0) -> None:
    with device.open("r+b", buffering=0) as opened:
        os.pwrite(opened.fileno(), data, offset_bytes)
        os.fsync(opened.fileno())


def read_device(device: Path, length_bytes: int, offset_bytes: int = 0) -> bytes:
    with device.open("rb", buffering=0) as opened:
        return os.pread(opened.fileno(), length_bytes, offset_bytes)


def put_content(machine: Machine, volume: str, **note: str) -> None:
    """Write the note on what is on a volume's device, as docs/format.md has it."""
    record = volume_record(machine, volume)
    uid = json.loads(record.read_text())["uid"]
    record.with_name(f"{volume}.content-{uid}").write_text(json.dumps(note))


def content_of(machine: Machine, volume: str) -> dict[str, str]:
    record = volume_record(machine, volume)
    uid = json.loads(record.read_text())["uid"]
    return dict(json.loads(record.with_name(f"{volume}.content-{uid}").read_text()))


def kill_daemons(machine: Machine) -> None:
    for pid in machine.daemons():
        os.kill(pid, 9)
    wait_for("the daemons to end", lambda: not machine.daemons())


# --- the plain way, each call twice ----------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_a_file_system_each_call_twice(machine: Machine, calls: Client, path: str, filesystem: str) -> None:
    capability = mount_capability(filesystem, options=["noatime"])
    size_bytes = XFS_BYTES if filesystem == "xfs" else EXT4_BYTES
    volume = calls.create("twice", size_bytes, capability=capability, **PATHS[path]).volume_id
    context = calls.attach(volume, capability=capability)
    staged = next(calls.stage(volume, context, capability=capability) for _ in range(2))
    targets = [calls.publish(volume, context, capability=capability) for _ in range(2)]
    mounts = run("findmnt", "-rno", "TARGET,FSTYPE,OPTIONS", "--target", targets[0]).stdout.split()
    assert (mounts[0], mounts[1]) == (str(targets[0]), filesystem)
    assert "noatime" in mounts[2].split(",")
    sums = write_tree(targets[0], files=2)
    assert len(machine.daemons()) == (0 if path == "loop" else 1)
    for _ in range(2):
        calls.unpublish(volume)
        assert not targets[0].exists()
    for _ in range(2):
        calls.unstage(volume)
        assert machine.leftovers() == []
    assert not list(staged.iterdir()), "nothing was written below the mount"
    for _ in range(2):
        calls.detach(volume)
    target = calls.use(volume, capability=capability)
    assert read_tree(target) == sums
    calls.release(volume)


@every_path
def test_a_block_volume_each_call_twice(machine: Machine, calls: Client, path: str) -> None:
    capability = block_capability()
    volume = calls.create("twice", EXT4_BYTES, capability=capability, **PATHS[path]).volume_id
    context = calls.attach(volume, capability=capability)
    for _ in range(2):
        calls.stage(volume, context, capability=capability)
    target = next(calls.publish(volume, context, capability=capability) for _ in range(2))
    assert target.is_block_device()
    assert size_bytes_of(target) == EXT4_BYTES
    data = os.urandom(4096)
    write_device(target, data, EXT4_BYTES - 4096)
    for _ in range(2):
        calls.unpublish(volume)
    for _ in range(2):
        calls.unstage(volume)
    assert machine.leftovers() == []
    calls.detach(volume)
    target = calls.use(volume, capability=capability)
    assert read_device(target, 4096, EXT4_BYTES - 4096) == data
    calls.release(volume)


# --- the wrong order, the wrong arguments ----------------------------------------------------------------------


def test_calls_in_the_wrong_order(machine: Machine, calls: Client) -> None:
    volume = calls.create("order", EXT4_BYTES).volume_id
    refused = Code.FAILED_PRECONDITION
    fails(refused, calls.stage, volume, {"generation": "1"}, saying="not attached to node")
    context = calls.attach(volume)
    fails(refused, calls.publish, volume, context, saying="not staged")
    fails(Code.NOT_FOUND, calls.node_expand, volume, calls.target_path(volume), saying="not staged")
    calls.unpublish(volume)
    calls.unstage(volume)
    assert machine.leftovers() == []
    calls.release(volume)


@pytest.mark.parametrize("access_type", ["mount", "block"])
def test_unstage_before_unpublish_is_refused_and_changes_nothing(calls: Client, access_type: str) -> None:
    """A pod's device node must not stay while its device is freed: the next volume would get its number."""
    capability = mount_capability() if access_type == "mount" else block_capability()
    volume = calls.create("order", EXT4_BYTES, capability=capability).volume_id
    target = calls.use(volume, capability=capability)
    fails(Code.FAILED_PRECONDITION, calls.unstage, volume, saying=str(target))
    if access_type == "mount":
        assert mounted_at(calls.staging_path(volume))
        write_tree(target, files=1)
    else:
        write_device(target, b"x" * 512)
    calls.release(volume)


def test_arguments(calls: Client) -> None:
    volume = calls.create("arguments", EXT4_BYTES).volume_id
    context = calls.attach(volume)
    invalid = Code.INVALID_ARGUMENT
    stage = calls.node.NodeStageVolume
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"volume_id": ""}, "volume id"),
        ({"staging_target_path": ""}, "staging target path"),
        ({"staging_target_path": "relative/path"}, "absolute"),
        ({"staging_target_path": "/tmp/../etc"}, "absolute"),
        ({"volume_capability": None}, "capability"),
        ({"publish_context": {}}, "generation"),
        ({"publish_context": {"generation": "-1"}}, "generation"),
        ({"volume_capability": mount_capability(mode="MULTI_NODE_MULTI_WRITER")}, "MULTI_NODE_MULTI_WRITER"),
        ({"volume_capability": mount_capability("ntfs")}, "ntfs"),
        ({"volume_capability": mount_capability(options=["errors=panic"])}, "errors=panic"),
    ]
    for changed, saying in wrong:
        fails(invalid, stage, stage_request(calls, volume, context, **changed), saying=saying)
    refused = Code.FAILED_PRECONDITION
    fails(refused, stage, stage_request(calls, volume, context, volume_capability=block_capability()), saying="block")
    fails(refused, stage, stage_request(calls, volume, context, volume_capability=mount_capability("xfs")))
    unstage, publish = calls.node.NodeUnstageVolume, calls.node.NodePublishVolume
    fails(invalid, unstage, csi.NodeUnstageVolumeRequest(volume_id=volume))
    fails(invalid, unstage, csi.NodeUnstageVolumeRequest(staging_target_path="/tmp/x"))
    fails(invalid, publish, csi.NodePublishVolumeRequest(volume_id=volume, volume_capability=mount_capability()))
    unpublish = calls.node.NodeUnpublishVolume
    fails(invalid, unpublish, csi.NodeUnpublishVolumeRequest(volume_id=volume))
    fails(invalid, unpublish, csi.NodeUnpublishVolumeRequest(target_path="/tmp/x"))
    gone = f"{volume.partition('-')[0]}-vol-{'0' * 32}"
    fails(Code.NOT_FOUND, calls.stage, gone, context)
    fails(Code.NOT_FOUND, calls.publish, gone, context)
    calls.detach(volume)


def test_S52_a_stale_generation_is_refused(machine: Machine, calls: Client) -> None:
    volume = calls.create("stale", EXT4_BYTES).volume_id
    old = calls.attach(volume)
    calls.detach(volume)
    new = calls.attach(volume)
    assert old != new
    refused = Code.FAILED_PRECONDITION
    fails(refused, calls.stage, volume, old, saying="generation")
    assert machine.leftovers() == []
    calls.stage(volume, new)
    fails(refused, calls.publish, volume, old, saying="generation")
    assert not mounted_at(calls.target_path(volume))
    calls.release(volume)


@every_path
@pytest.mark.parametrize("access_type", ["mount", "block"])
def test_a_wrong_call_takes_nothing_from_what_is_staged(
    machine: Machine, calls: Client, path: str, access_type: str
) -> None:
    """Neither a call of an attachment of before, which came late, nor one that wants something else."""
    capability = mount_capability() if access_type == "mount" else block_capability()
    volume = calls.create("wrong", EXT4_BYTES, capability=capability, **PATHS[path]).volume_id
    old = calls.attach(volume, capability=capability)
    calls.detach(volume)
    context = calls.attach(volume, capability=capability)
    staged = calls.stage(volume, context, capability=capability)
    held = calls.publish(volume, context, capability=capability) if access_type == "block" else staged
    data = os.urandom(4096)

    def write_unsynced() -> None:
        if access_type == "block":
            with held.open("r+b", buffering=0) as device:
                device.write(data)
        else:
            (held / "unsynced").write_bytes(data)

    write_unsynced()
    if access_type == "block":
        calls.unpublish(volume)  # staged only, as between two pods of a node
    stage = calls.node.NodeStageVolume
    plain = {"volume_capability": capability}
    other = block_capability() if access_type == "mount" else mount_capability()
    wrong: list[tuple[Code, dict[str, Any]]] = [
        (Code.FAILED_PRECONDITION, {**plain, "publish_context": old}),
        (Code.FAILED_PRECONDITION, {**plain, "publish_context": {"generation": "99"}}),
        (Code.ALREADY_EXISTS, {"volume_capability": other}),
        (Code.FAILED_PRECONDITION, {**plain, "staging_target_path": str(machine.base / "controller.log")}),
    ]
    if access_type == "mount":
        wrong.append((Code.ALREADY_EXISTS, {"volume_capability": mount_capability("xfs")}))
    for code, changed in wrong:
        fails(code, stage, stage_request(calls, volume, context, **changed))
        calls.publish(volume, context, capability=capability)  # staged as it was
        calls.unpublish(volume)
    calls.unstage(volume)
    calls.detach(volume)
    target = calls.use(volume, capability=capability)
    found = read_device(target, 4096, 0) if access_type == "block" else (target / "unsynced").read_bytes()
    assert found == data
    calls.release(volume)
    assert machine.leftovers() == []


def test_a_staging_path_that_is_something_else(machine: Machine, calls: Client) -> None:
    volume = calls.create("path", EXT4_BYTES).volume_id
    context = calls.attach(volume)
    path = calls.staging_path(volume)
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = calls.node.NodeStageVolume
    request = stage_request(calls, volume, context)
    makers: list[Callable[[Path], None]] = [Path.touch, lambda at: at.symlink_to("/tmp"), os.mkfifo]
    for make in makers:
        make(path)
        fails(Code.FAILED_PRECONDITION, stage, request, saying="staging path")
        assert machine.leftovers() == []
        path.unlink()
    path.mkdir()
    run("mount", "-t", "tmpfs", "none", path)
    (path / "theirs").touch()
    fails(Code.FAILED_PRECONDITION, stage, request, saying="staging path")
    fails(Code.FAILED_PRECONDITION, calls.unstage, volume, saying="staging path")
    assert (path / "theirs").exists(), "what others have mounted stays"
    assert machine.daemons() == []
    run("umount", path)
    calls.stage(volume, context)
    calls.release(volume)


def test_a_target_that_is_something_else(machine: Machine, calls: Client) -> None:
    block, filesystem = block_capability(), mount_capability()
    disk = calls.create("disk", EXT4_BYTES, capability=block).volume_id
    files = calls.create("files", EXT4_BYTES).volume_id
    disk_context = calls.attach(disk, capability=block)
    calls.stage(disk, disk_context, capability=block)
    files_context = calls.attach(files)
    calls.stage(files, files_context)
    calls.target_path(disk).mkdir(parents=True)
    calls.target_path(files).touch()
    refused = Code.FAILED_PRECONDITION
    fails(refused, calls.publish, disk, disk_context, capability=block, saying="not a file")
    fails(refused, calls.publish, files, files_context, saying="cannot be made|not a directory")
    calls.target_path(disk).rmdir()
    calls.target_path(files).unlink()
    fails(refused, calls.publish, disk, disk_context, capability=filesystem, saying="access type block")
    target = calls.publish(files, files_context)
    fails(Code.ALREADY_EXISTS, calls.publish, files, files_context, readonly=True, saying="readonly=False")
    theirs = csi.NodePublishVolumeRequest(
        volume_id=disk,
        publish_context=disk_context,
        staging_target_path=str(calls.staging_path(disk)),
        target_path=str(target),
        volume_capability=block,
    )
    fails(refused, calls.node.NodePublishVolume, theirs, saying="mounted at the target path")
    write_tree(target, files=1)
    calls.release(files)
    calls.release(disk)


def test_several_targets_and_a_read_only_one(calls: Client) -> None:
    capability = mount_capability(mode="SINGLE_NODE_MULTI_WRITER")
    volume = calls.create("shared", EXT4_BYTES, capability=capability).volume_id
    context = calls.attach(volume, capability=capability)
    calls.stage(volume, context, capability=capability)
    writer = calls.publish(volume, context, pod="one", capability=capability)
    reader = calls.publish(volume, context, pod="two", capability=capability, readonly=True)
    sums = write_tree(writer, files=1)
    assert read_tree(reader) == sums
    with pytest.raises(OSError, match="Read-only"):
        (reader / "file-9").touch()
    calls.unpublish(volume, pod="one")
    calls.unpublish(volume, pod="two")
    calls.release(volume)


@pytest.mark.parametrize("access_type", ["mount", "block"])
def test_a_single_writer_has_one_target(calls: Client, access_type: str) -> None:
    mode = "SINGLE_NODE_SINGLE_WRITER"
    capability = mount_capability(mode=mode) if access_type == "mount" else block_capability(mode=mode)
    volume = calls.create("single", EXT4_BYTES, capability=capability).volume_id
    context = calls.attach(volume, capability=capability)
    calls.stage(volume, context, capability=capability)
    first = calls.publish(volume, context, pod="one", capability=capability)
    assert calls.publish(volume, context, pod="one", capability=capability) == first
    fails(Code.FAILED_PRECONDITION, calls.publish, volume, context, pod="two", capability=capability, saying=str(first))
    calls.unpublish(volume, pod="one")
    calls.publish(volume, context, pod="two", capability=capability)
    calls.unpublish(volume, pod="two")
    calls.release(volume)


# --- read-only -------------------------------------------------------------------------------------------------


@every_path
def test_a_file_system_attached_read_only(calls: Client, path: str) -> None:
    volume = calls.create("readonly", EXT4_BYTES, **PATHS[path]).volume_id
    sums = write_tree(calls.use(volume), files=2)
    calls.release(volume)
    target = calls.use(volume, readonly=True)
    assert read_tree(target) == sums
    with pytest.raises(OSError, match="Read-only"):
        (target / "new").touch()
    fails(Code.FAILED_PRECONDITION, calls.node_expand, volume, target, saying="read-only")
    calls.release(volume)


@every_path
def test_a_block_volume_attached_read_only(calls: Client, path: str) -> None:
    capability = block_capability()
    volume = calls.create("readonly", EXT4_BYTES, capability=capability, **PATHS[path]).volume_id
    data = os.urandom(4096)
    write_device(calls.use(volume, capability=capability), data)
    calls.release(volume)
    target = calls.use(volume, capability=capability, readonly=True)
    assert run("blockdev", "--getro", target).stdout.strip() == "1"
    assert read_device(target, 4096) == data
    with pytest.raises(OSError):
        write_device(target, b"x" * 4096)
    calls.release(volume)
    writable = calls.use(volume, capability=capability)
    write_device(writable, b"x" * 4096)
    calls.release(volume)


def test_the_mode_single_node_reader_only_is_read_only(calls: Client) -> None:
    volume = calls.create("mode", EXT4_BYTES).volume_id
    sums = write_tree(calls.use(volume), files=1)
    calls.release(volume)
    capability = mount_capability(mode="SINGLE_NODE_READER_ONLY")
    target = calls.use(volume, capability=capability)
    assert read_tree(target) == sums
    with pytest.raises(OSError, match="Read-only"):
        (target / "new").touch()
    calls.release(volume)


def has_dirty_journal(machine: Machine, volume: str, filesystem: str) -> bool:
    """Look at the file system in the single image of a volume, without changing it."""
    copy = machine.base / "copy.raw"
    qemu_img("convert", "-U", "-O", "raw", head_of(machine, volume), copy)
    try:
        if filesystem == "xfs":
            return "valuable metadata" in run("xfs_repair", "-n", copy, check=False).stderr
        return "needs_recovery" in run("dumpe2fs", "-h", copy).stdout
    finally:
        copy.unlink()


@pytest.mark.parametrize(("filesystem", "size_bytes"), [("ext4", EXT4_BYTES), ("xfs", XFS_BYTES)])
def test_a_read_only_stage_of_a_clone_with_a_dirty_journal(
    machine: Machine, calls: Client, filesystem: str, size_bytes: int
) -> None:
    capability = mount_capability(filesystem)
    volume = calls.create("crashed", size_bytes, capability=capability).volume_id
    sums = write_tree(calls.use(volume, capability=capability), files=4)
    kill_daemons(machine)
    for call in (calls.unpublish, calls.unstage, calls.detach):
        eventually(call, volume)
    assert has_dirty_journal(machine, volume, filesystem), "else the test shows nothing"
    snapshot = calls.snapshot("moment", volume).snapshot_id
    restored = calls.create("restored", 0, capability=capability, snapshot=snapshot).volume_id
    target = calls.use(restored, capability=capability, readonly=True)
    assert read_tree(target) == sums
    with pytest.raises(OSError, match="Read-only"):
        (target / "new").touch()
    calls.release(restored)
    assert read_tree(calls.use(volume, capability=capability)) == sums
    calls.release(volume)


def test_a_volume_from_a_golden_image_holds_its_file_system(machine: Machine, calls: Client, tmp_path: Path) -> None:
    tree, image = tmp_path / "tree", tmp_path / "image.raw"
    tree.mkdir()
    sums = write_tree(tree, files=2)
    with image.open("wb") as file:
        file.truncate(EXT4_BYTES)
    run("mkfs.ext4", "-q", "-d", tree, image)
    pool, qemu = machine.pool_arguments, ("--qemu-dir", QEMU_DIR)
    machine.cli("image", "import", "main", "golden", image, *pool, *qemu)
    given: dict[str, Any] = {"capability": mount_capability("ext4"), "sourceImage": "golden"}
    made = calls.create("golden", 2 * EXT4_BYTES, **given)
    assert not made.HasField("content_source")
    assert calls.create("golden", 2 * EXT4_BYTES, **given) == made
    fails(Code.ALREADY_EXISTS, calls.create, "golden", 2 * EXT4_BYTES, capability=given["capability"], saying="source")
    fails(Code.NOT_FOUND, calls.create, "other", 0, **{**given, "sourceImage": "other"}, saying="sourceImage")
    machine.cli("image", "rm", "main", "golden", *pool)
    target = calls.use(made.volume_id)
    assert read_tree(target) == sums
    assert fs_bytes(target) > 1.5 * EXT4_BYTES
    (target / "new").write_text("written")
    calls.release(made.volume_id)


# --- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("filesystem", "size_bytes"), [("ext4", EXT4_BYTES), ("xfs", XFS_BYTES)])
def test_S44_a_larger_restore_has_a_larger_file_system(calls: Client, filesystem: str, size_bytes: int) -> None:
    capability = mount_capability(filesystem)
    volume = calls.create("small", size_bytes, capability=capability).volume_id
    target = calls.use(volume, capability=capability)
    sums, before_bytes = write_tree(target, files=2), fs_bytes(target)
    calls.release(volume)
    larger = calls.create("large", 2 * size_bytes, capability=capability, volume=volume).volume_id
    target = calls.use(larger, capability=capability)
    assert read_tree(target) == sums
    assert fs_bytes(target) > 1.8 * before_bytes
    source = calls.use(volume, capability=capability)
    assert fs_bytes(source) == before_bytes, "beside it: the source is as it was (for xfs: mounted with the same UUID)"
    assert read_tree(source) == sums
    calls.release(volume)
    calls.release(larger)


@every_path
def test_xfs_grows_while_it_is_mounted(calls: Client, path: str) -> None:
    capability = mount_capability("xfs")
    volume = calls.create("grows", XFS_BYTES, capability=capability, **PATHS[path]).volume_id
    target = calls.use(volume, capability=capability)
    sums, before_bytes = write_tree(target, files=2), fs_bytes(target)
    request = csi.NodeExpandVolumeRequest(volume_id=volume, volume_path=str(target))
    request.capacity_range.required_bytes = 2 * XFS_BYTES
    fails(Code.UNAVAILABLE, calls.node.NodeExpandVolume, request, saying="in its record")
    calls.expand(volume, 2 * XFS_BYTES)
    for _ in range(2):
        assert calls.node_expand(volume, target) == 2 * XFS_BYTES
    assert fs_bytes(target) > 1.8 * before_bytes
    assert read_tree(target) == sums
    fails(Code.NOT_FOUND, calls.node_expand, volume, target.parent, saying="is not at")
    calls.release(volume)


@every_path
def test_a_block_volume_grows_while_it_is_used(calls: Client, path: str) -> None:
    capability = block_capability()
    volume = calls.create("grows", EXT4_BYTES, capability=capability, **PATHS[path]).volume_id
    target = calls.use(volume, capability=capability)
    data = os.urandom(4096)
    with target.open("r+b", buffering=0) as held:
        os.pwrite(held.fileno(), data, 0)
        calls.expand(volume, 2 * EXT4_BYTES)
        assert calls.node_expand(volume, target) == 2 * EXT4_BYTES
        assert size_bytes_of(target) == 2 * EXT4_BYTES
        os.pwrite(held.fileno(), data, 2 * EXT4_BYTES - 4096)
        os.fsync(held.fileno())
    calls.release(volume)
    target = calls.use(volume, capability=capability)
    assert read_device(target, 4096) == read_device(target, 4096, 2 * EXT4_BYTES - 4096) == data
    calls.release(volume)


def test_ext4_grows_mounted_where_the_kernel_lets_it_else_at_the_next_stage(calls: Client) -> None:
    volume = calls.create("grows", EXT4_BYTES).volume_id
    target = calls.use(volume)
    sums, before_bytes = write_tree(target, files=2), fs_bytes(target)
    calls.expand(volume, 2 * EXT4_BYTES)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    effective = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    if effective >> CAP_SYS_RESOURCE & 1:
        assert calls.node_expand(volume, target) == 2 * EXT4_BYTES
    else:
        fails(Code.FAILED_PRECONDITION, calls.node_expand, volume, target, saying="staged the next time")
        assert fs_bytes(target) == before_bytes
        calls.release(volume)
        target = calls.use(volume)
    assert fs_bytes(target) > 1.8 * before_bytes
    assert read_tree(target) == sums
    calls.release(volume)


# --- stats -----------------------------------------------------------------------------------------------------


def test_stats(calls: Client) -> None:
    volume = calls.create("files", EXT4_BYTES).volume_id
    disk = calls.create("disk", EXT4_BYTES, capability=block_capability()).volume_id
    target = calls.use(volume)
    before = {usage.unit: usage for usage in calls.stats(volume, target)}
    write_tree(target, files=4, size_bytes=MIB)
    run("sync", "-f", target)
    after = {usage.unit: usage for usage in calls.stats(volume, target)}
    assert set(after) == {csi.VolumeUsage.BYTES, csi.VolumeUsage.INODES}
    assert after[csi.VolumeUsage.BYTES].total == fs_bytes(target)
    assert after[csi.VolumeUsage.BYTES].used - before[csi.VolumeUsage.BYTES].used >= 4 * MIB
    assert after[csi.VolumeUsage.INODES].used - before[csi.VolumeUsage.INODES].used == 4
    assert {usage.unit for usage in calls.stats(volume, calls.staging_path(volume))} == set(after)
    device = calls.use(disk, capability=block_capability())
    [usage] = calls.stats(disk, device)
    assert (usage.unit, usage.total) == (csi.VolumeUsage.BYTES, EXT4_BYTES)
    missing = Code.NOT_FOUND
    fails(missing, calls.stats, volume, target.parent)
    fails(missing, calls.stats, volume, Path("/nowhere"))
    fails(missing, calls.stats, volume, device)
    fails(missing, calls.stats, "0badcafe-vol-" + "0" * 32, target)
    fails(Code.INVALID_ARGUMENT, calls.stats, "", target)
    fails(Code.INVALID_ARGUMENT, calls.node.NodeGetVolumeStats, csi.NodeGetVolumeStatsRequest(volume_id=volume))
    calls.release(volume)
    calls.release(disk)
    fails(missing, calls.stats, volume, target)


# --- what is never formatted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["raw", "loop"])
@pytest.mark.parametrize("offset_bytes", [0, 1024 * 1024, EXT4_BYTES - 512])
def test_a_device_that_is_not_blank_is_never_formatted(
    machine: Machine, calls: Client, path: str, offset_bytes: int
) -> None:
    volume = calls.create("foreign", EXT4_BYTES, **PATHS[path]).volume_id
    image = head_of(machine, volume)
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), b"somebody's data", offset_bytes)
    before = image.read_bytes()
    context = calls.attach(volume)
    for _ in range(2):
        fails(Code.FAILED_PRECONDITION, calls.stage, volume, context, saying="not blank")
        assert machine.leftovers() == []
    assert image.read_bytes() == before
    calls.detach(volume)


def test_an_interrupted_mkfs_is_done_again(machine: Machine, calls: Client) -> None:
    volume = calls.create("interrupted", EXT4_BYTES).volume_id
    qemu_io(head_of(machine, volume), "qcow2", "write -q -P 0x5a 0 2M")
    put_content(machine, volume, state="formatting", filesystem="ext4")
    target = calls.use(volume)
    assert content_of(machine, volume) == {
        "state": "formatted",
        "filesystem": "ext4",
        "generation": 1,
        "growing": False,
    }
    write_tree(target, files=1)
    calls.release(volume)


def test_a_file_system_that_vanished_is_not_made_anew(machine: Machine, calls: Client) -> None:
    volume = calls.create("vanished", EXT4_BYTES, **PATHS["raw"]).volume_id
    write_tree(calls.use(volume), files=1)
    calls.release(volume)
    image = head_of(machine, volume)
    os.truncate(image, 0)
    os.truncate(image, EXT4_BYTES)
    context = calls.attach(volume)
    fails(Code.FAILED_PRECONDITION, calls.stage, volume, context, saying="should hold ext4.*nothing known")
    assert machine.leftovers() == []
    assert not image.read_bytes().strip(b"\0")
    calls.detach(volume)


def test_a_damaged_file_system_is_refused_and_not_formatted(machine: Machine, calls: Client) -> None:
    volume = calls.create("damaged", EXT4_BYTES, **PATHS["raw"]).volume_id
    write_tree(calls.use(volume), files=1)
    calls.release(volume)
    image = head_of(machine, volume)
    # the inode of the root directory, which e2fsck -p does not dare to make anew; and the flag that makes it look
    for change in ("clri <2>", "set_super_value state 2"):
        run("debugfs", "-w", "-R", change, image)
    context = calls.attach(volume)
    fails(Code.FAILED_PRECONDITION, calls.stage, volume, context)
    assert machine.leftovers() == []
    assert content_of(machine, volume)["state"] == "formatted"
    calls.detach(volume)


# --- hostile images --------------------------------------------------------------------------------------------


def hostile(image: Path, kind: str, size_bytes: int) -> Sequence[str | Path]:
    """Replace an image by one that makes a trusting reader open another file, and say what it is."""
    secret = image.with_name("secret")
    image.unlink()
    match kind:
        case "external data":
            qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={secret}", image, str(size_bytes))
        case "backing file":
            qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "/etc/hostname", "-F", "raw", image, str(size_bytes))
        case "internal snapshot":
            qemu_img("create", "-q", "-f", "qcow2", image, str(size_bytes))
            qemu_img("snapshot", "-c", "inside", image)
        case "no qcow2":
            image.write_bytes(b"QFJ" + bytes(size_bytes - 3))
        case "smaller":
            qemu_img("create", "-q", "-f", "qcow2", image, str(size_bytes // 2))
        case "missing":
            pass
    return [secret]


@pytest.mark.parametrize(
    "kind", ["external data", "backing file", "internal snapshot", "no qcow2", "smaller", "missing"]
)
def test_an_image_that_somebody_exchanged_is_data_loss(machine: Machine, calls: Client, kind: str) -> None:
    volume = calls.create("hostile", EXT4_BYTES).volume_id
    image = head_of(machine, volume)
    extra = hostile(image, kind, EXT4_BYTES)
    context = calls.attach(volume)
    for _ in range(2):
        fails(Code.DATA_LOSS, calls.stage, volume, context)
        assert machine.leftovers() == []
    calls.detach(volume)
    calls.delete(volume)
    for path in extra:
        Path(path).unlink(missing_ok=True)


@pytest.mark.parametrize("path", ["raw", "loop"])
def test_S24_a_qcow2_header_that_a_pod_writes_means_nothing(
    machine: Machine, calls: Client, tmp_path: Path, path: str
) -> None:
    capability = block_capability()
    volume = calls.create("tricky", EXT4_BYTES, capability=capability, **PATHS[path]).volume_id
    header = tmp_path / "header.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "/etc/hostname", "-F", "raw", header, str(GIB))
    data = header.read_bytes()[:4096].ljust(4096, b"\0")
    assert data.startswith(b"QFI\xfb")
    write_device(calls.use(volume, capability=capability), data)
    calls.release(volume)
    assert machine.check() == []
    target = calls.use(volume, capability=capability)
    assert size_bytes_of(target) == EXT4_BYTES
    assert read_device(target, 4096) == data
    calls.release(volume)
    clone = calls.create("clone", 0, capability=capability, volume=volume).volume_id
    target = calls.use(clone, capability=capability)
    assert size_bytes_of(target) == EXT4_BYTES
    assert read_device(target, 4096) == data
    calls.release(clone)


def test_two_openers_of_one_image_are_kept_apart(machine: Machine, calls: Client) -> None:
    """What holds is QEMU's lock: a second opener through the same mount fails while the daemon has the image."""
    volume = calls.create("locked", EXT4_BYTES).volume_id
    calls.use(volume)
    image = machine.pools["main"] / head_of(machine, volume).relative_to(machine.directories["main"])
    with pytest.raises(RuntimeError, match="lock"):
        qemu_io(image, "qcow2", "write 0 512")
    calls.release(volume)
    qemu_io(image, "qcow2", "read 0 512")


def test_a_process_that_uses_the_volume_is_named(calls: Client) -> None:
    volume = calls.create("busy", EXT4_BYTES).volume_id
    target = calls.use(volume)
    with subprocess.Popen(["sleep", "60"], cwd=target) as user:
        try:
            fails(Code.FAILED_PRECONDITION, calls.unpublish, volume, saying=str(user.pid))
            assert mounted_at(target)
        finally:
            user.kill()
    calls.release(volume)
