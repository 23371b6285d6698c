"""What is written is what is read: fio with checksums at depth 32 over every data path.

The axes: data path, through a file system or as a block volume; then the same data after a detach, after more writes
above a snapshot, and with a QEMU that is not known to be right (the gate; that such a one really fails is shown where
it can be installed).
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import MIB, PATHS, Code, discard, fails, running

from csi_quobyte.pb import csi_pb2 as csi
from lab.client import Client, block_capability, mount_capability
from lab.machine import QEMU_DIR, Machine, run

pytestmark = pytest.mark.root

VOLUME_BYTES = 64 * MIB
DATA_BYTES = 16 * MIB
CAPABILITIES = {"mount": mount_capability(), "block": block_capability()}


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with running() as machine:
        yield machine


@pytest.fixture
def calls(machine: Machine) -> Iterator[Client]:
    client = Client(machine)
    yield client
    for snapshot in client.controller.ListSnapshots(csi.ListSnapshotsRequest()).entries:
        client.delete_snapshot(snapshot.snapshot.snapshot_id)
    for volume in client.controller.ListVolumes(csi.ListVolumesRequest()).entries:
        discard(client, volume.volume.volume_id)


def fio(target: Path, *extra: str, seed: int = 1) -> str:
    """Write random blocks with checksums and read them all back; `extra` may turn it into reading alone.

    Raises:
        RuntimeError: a block does not hold what was written, or an error of the device.
    """
    file = target / "fio.dat" if target.is_dir() else target
    return run(
        "fio",
        "--name=verify",
        f"--filename={file}",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--iodepth=32",
        "--ioengine=libaio",
        "--direct=1",
        "--bs=4k",
        f"--size={DATA_BYTES}",
        "--rw=randwrite",
        f"--randseed={seed}",
        "--end_fsync=1",
        *extra,
        timeout_s=100,
    ).stdout


def verify_only(target: Path, *, seed: int = 1) -> None:
    """Read back what an earlier run with this seed wrote."""
    fio(target, "--verify_only", seed=seed)


def checksum(device: Path) -> str:
    with device.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("access_type", CAPABILITIES)
def test_fio_verify_and_again_after_a_detach(calls: Client, access_type: str, path: str) -> None:
    capability = CAPABILITIES[access_type]
    volume = calls.create("data", VOLUME_BYTES, capability=capability, **PATHS[path]).volume_id
    fio(calls.use(volume, capability=capability))
    calls.release(volume)
    verify_only(calls.use(volume, capability=capability))
    calls.release(volume)


def test_the_verify_pass_finds_one_wrong_block(calls: Client) -> None:
    """Without this the tests of this module might prove nothing."""
    volume = calls.create("wrong", VOLUME_BYTES, capability=block_capability(), **PATHS["loop"]).volume_id
    target = calls.use(volume, capability=block_capability())
    fio(target)
    with target.open("r+b", buffering=0) as device:
        block = os.pread(device.fileno(), 4096, DATA_BYTES // 2)
        os.pwrite(device.fileno(), block[:2048] + bytes([block[2048] ^ 1]) + block[2049:], DATA_BYTES // 2)
        os.fsync(device.fileno())
    with pytest.raises(RuntimeError, match="verify"):
        verify_only(target)
    calls.release(volume)


@pytest.mark.parametrize("path", ["qcow2", "loop"])
def test_a_restored_volume_shows_the_data_of_the_snapshot(calls: Client, path: str) -> None:
    capability = block_capability()
    volume = calls.create("origin", VOLUME_BYTES, capability=capability, **PATHS[path]).volume_id
    target = calls.use(volume, capability=capability)
    fio(target)
    before = checksum(target)
    calls.release(volume)
    snapshot = calls.snapshot("moment", volume).snapshot_id
    target = calls.use(volume, capability=capability)
    assert checksum(target) == before
    fio(target, seed=2)
    after = checksum(target)
    assert after != before
    calls.release(volume)
    restored = calls.create("restored", 0, capability=capability, snapshot=snapshot, **PATHS[path]).volume_id
    target = calls.use(restored, capability=capability)
    assert checksum(target) == before
    verify_only(target)
    fio(target, seed=3)
    calls.release(restored)
    assert checksum(calls.use(volume, capability=capability)) == after, "what is written to one is not seen in another"
    calls.release(volume)


def qemu_of_version(directory: Path, version: str) -> Path:
    """Make a QEMU that works like the real one and says that it is another version."""
    directory.mkdir()
    for name in ("qemu-img", "qemu-storage-daemon"):
        script = directory / name
        script.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{name} version {version} (Debian)"; exit 0; fi\n'
            f'exec {QEMU_DIR / name} "$@"\n'
        )
        script.chmod(0o755)
    return directory


@pytest.fixture
def restored_node(machine: Machine) -> Iterator[None]:
    """Give the module its ordinary node back after a test with another one."""
    yield
    assert machine.node_process is not None
    machine.node_process.stop()
    machine.start_node()


@pytest.mark.usefixtures("restored_node")
@pytest.mark.parametrize("version", ["7.2.17", "10.0.2", "10.1.0"])
def test_a_qemu_below_the_gate_is_refused(machine: Machine, calls: Client, tmp_path: Path, version: str) -> None:
    old = qemu_of_version(tmp_path / "qemu", version)
    assert machine.node_process is not None
    machine.node_process.stop()
    machine.start_node("--qemu-dir", old, ready=False)
    assert not calls.node_identity.Probe(csi.ProbeRequest(), wait_for_ready=True, timeout=10).ready.value
    assert f"QEMU {version}" in machine.node_process.log.read_text(), "the reason is in the log"
    volume = calls.create("gated", VOLUME_BYTES).volume_id
    context = calls.attach(volume)
    fails(Code.FAILED_PRECONDITION, calls.stage, volume, context, saying=f"QEMU {version}.*10.0.13")
    assert machine.leftovers() == []
    calls.detach(volume)
    simple = calls.create("loop", VOLUME_BYTES, **PATHS["loop"]).volume_id
    calls.use(simple)  # no QEMU is in this path
    calls.release(simple)


@pytest.mark.usefixtures("restored_node")
def test_an_untested_qemu_is_used_when_that_is_asked_for(machine: Machine, calls: Client, tmp_path: Path) -> None:
    old = qemu_of_version(tmp_path / "qemu", "10.0.2")
    assert machine.node_process is not None
    machine.node_process.stop()
    machine.start_node("--qemu-dir", old, "--allow-untested-qemu")
    volume = calls.create("untested", VOLUME_BYTES).volume_id
    (calls.use(volume) / "file").write_text("x")
    calls.release(volume)
