"""Processes end, in order or not, and whoever starts again goes on: nothing is lost and a retry completes.

The axes: which process (node, controller, storage daemon), how it ends (SIGKILL, SIGTERM, SIGTERM with
--stop-daemons-on-exit), and when: between calls, in the middle of one, or under a writing pod.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from running import MIB, PATHS, discard, eventually, listing, read_tree, release, running, write_tree

from csi_quobyte.pb import csi_pb2 as csi
from lab.client import Client, block_capability, mount_capability
from lab.machine import QEMU_DIR, Machine, run, wait_for

pytestmark = pytest.mark.root

VOLUME_BYTES = 64 * MIB
KILLS = 20
LONGEST_CALL_S = 0.6
"""About what a stage or unstage takes on a busy machine with two cores: the kills are spread over it."""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with running() as machine:
        yield machine


@pytest.fixture
def calls(machine: Machine) -> Iterator[Client]:
    client = Client(machine)
    yield client
    for snapshot in eventually(client.controller.ListSnapshots, csi.ListSnapshotsRequest()).entries:
        client.delete_snapshot(snapshot.snapshot.snapshot_id)
    for volume in client.controller.ListVolumes(csi.ListVolumesRequest()).entries:
        discard(client, volume.volume.volume_id)
    assert machine.leftovers() == []


class Writer:
    """Writes a counter into a file and syncs it, for ever, as a pod does that must not notice anything."""

    def __init__(self, path: Path) -> None:
        self.written = 0
        self.error: OSError | None = None
        self._path = path
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        try:
            with self._path.open("r+b" if self._path.exists() else "w+b", buffering=0) as file:
                while not self._stopping.is_set():
                    os.pwrite(file.fileno(), b"%020d" % (self.written + 1), self.written % 512 * 4096)
                    os.fsync(file.fileno())
                    self.written += 1
        except OSError as error:
            self.error = error

    def await_progress(self) -> None:
        """Wait until ten more writes were acknowledged."""
        target = self.written + 10
        wait_for("the writer to go on", lambda: self.written >= target or self.error)
        assert self.error is None

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def check(self, path: Path) -> None:
        """Check that every acknowledged write is in `path`."""
        assert self.error is None
        with path.open("rb") as file:
            for number in range(max(0, self.written - 512), self.written):
                assert os.pread(file.fileno(), 20, number % 512 * 4096) == b"%020d" % (number + 1)


def kill_node(machine: Machine) -> None:
    assert machine.node_process is not None
    machine.node_process.kill()


def stop_node(machine: Machine) -> int:
    assert machine.node_process is not None
    return machine.node_process.stop()


def killed_in(call: Callable[[], Any], delay_s: float, kill: Callable[[], None], start: Callable[[], None]) -> Any:
    """Make a call, kill its server after a time, start that again, and repeat the call until it succeeds."""
    with ThreadPoolExecutor(1) as caller:
        first = caller.submit(call)
        with suppress(TimeoutError, grpc.RpcError):
            first.result(delay_s)
        kill()
        with suppress(grpc.RpcError):
            first.result(10)
    start()
    return eventually(call)


# --- the node --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["qcow2", "loop"])
def test_a_pod_does_not_notice_that_the_node_process_was_killed(machine: Machine, calls: Client, path: str) -> None:
    volume = calls.create("pod", VOLUME_BYTES, **PATHS[path]).volume_id
    target = calls.use(volume)
    daemons = machine.daemons()
    writer = Writer(target / "counter")
    try:
        writer.await_progress()
        kill_node(machine)
        writer.await_progress()
        machine.start_node()
        writer.await_progress()
        assert machine.daemons() == daemons, "the daemon went on and was found again"
        context = calls.attach(volume)
        calls.stage(volume, context)
        assert calls.publish(volume, context) == target
        writer.await_progress()
    finally:
        writer.stop()
    writer.check(target / "counter")
    calls.release(volume)
    writer.check(calls.use(volume) / "counter")
    calls.release(volume)


def test_the_node_is_killed_in_the_middle_of_stage_and_unstage(machine: Machine, calls: Client) -> None:
    """Also in the middle of mkfs: the first stages of the second volume."""
    old = calls.create("old", VOLUME_BYTES).volume_id
    sums = write_tree(calls.use(old), files=2)
    calls.release(old)
    for number in range(KILLS // 2):
        delay_s = LONGEST_CALL_S * number / (KILLS // 2)
        young = calls.create(f"young{number}", VOLUME_BYTES).volume_id
        volume = old if number % 2 else young
        context = calls.attach(volume)
        path = calls.staging_path(volume)
        path.mkdir(parents=True, exist_ok=True)
        request = csi.NodeStageVolumeRequest(
            volume_id=volume,
            publish_context=context,
            staging_target_path=str(path),
            volume_capability=mount_capability(),
        )
        kill, start = partial(kill_node, machine), machine.start_node
        killed_in(partial(calls.node.NodeStageVolume, request, timeout=30), delay_s, kill, start)
        target = calls.publish(volume, context)
        assert volume != old or read_tree(target) == sums
        (target / "touched").touch()
        calls.unpublish(volume)
        killed_in(partial(calls.unstage, volume), delay_s, kill, start)
        assert machine.leftovers() == []
        calls.detach(volume)
        calls.delete(young)
    assert read_tree(calls.use(old)) == sums
    calls.release(old)


def daemon_statuses(machine: Machine) -> list[str]:
    """Give the exit statuses that the supervisors of ended daemons have recorded."""
    return [path.read_text().split()[-1] for path in (machine.base / "state").glob("*/status")]


@pytest.mark.parametrize("access_type", ["mount", "block"])
def test_stop_daemons_on_exit_keeps_the_data_of_a_running_pod(
    machine: Machine, calls: Client, access_type: str
) -> None:
    is_block = access_type == "block"
    capability = block_capability() if is_block else mount_capability()
    stop_node(machine)
    machine.start_node("--stop-daemons-on-exit")
    volume = calls.create("drained", VOLUME_BYTES, capability=capability).volume_id
    target = calls.use(volume, capability=capability)
    data = os.urandom(4 * MIB)
    # not synced by the pod: that is the node's duty here; and it has the file open until it is killed
    with (target if is_block else target / "cached").open("r+b" if is_block else "wb", buffering=0) as file:
        file.write(data)
        assert stop_node(machine) == 0
        assert machine.daemons() == []
    assert daemon_statuses(machine) == ["0"]
    machine.start_node()
    context = calls.attach(volume, capability=capability)
    with pytest.raises(grpc.RpcError, match="pod"):
        calls.stage(volume, context, capability=capability)
    for call in (calls.unpublish, calls.unstage, calls.detach):
        eventually(call, volume)
    assert machine.leftovers() == []
    target = calls.use(volume, capability=capability)
    with (target if is_block else target / "cached").open("rb") as file:
        assert file.read(len(data)) == data
    calls.release(volume)


@pytest.mark.parametrize("access_type", ["mount", "block"])
def test_stop_daemons_on_exit_takes_down_what_no_pod_uses(machine: Machine, calls: Client, access_type: str) -> None:
    capability = mount_capability() if access_type == "mount" else block_capability()
    stop_node(machine)
    machine.start_node("--stop-daemons-on-exit")
    volume = calls.create("idle", VOLUME_BYTES, capability=capability).volume_id
    context = calls.attach(volume, capability=capability)
    calls.stage(volume, context, capability=capability)
    assert stop_node(machine) == 0
    assert machine.leftovers() == []
    machine.start_node()
    calls.stage(volume, context, capability=capability)
    release(calls, volume)


def test_a_device_without_its_daemon_is_cleared_at_the_start(machine: Machine, calls: Client) -> None:
    volume = calls.create("dead", VOLUME_BYTES).volume_id
    context = calls.attach(volume)
    calls.stage(volume, context)
    kill_node(machine)
    for pid in machine.daemons():
        os.kill(pid, signal.SIGKILL)
    wait_for("the daemon to end", lambda: not machine.daemons())
    assert machine.leftovers() != []
    machine.start_node()
    assert machine.leftovers() == []
    calls.stage(volume, context)
    (calls.publish(volume, context) / "file").touch()
    calls.release(volume)


def test_a_second_node_process_on_one_state_directory_ends_with_2(machine: Machine) -> None:
    arguments: list[str | Path] = [
        "--endpoint",
        f"unix://{machine.base}/other.sock",
        *machine.pool_arguments,
        "--qemu-dir",
        QEMU_DIR,
    ]
    done = machine.cli("node", *arguments, "--node-id", "x", "--state-dir", machine.base / "state", check=False)
    assert done.returncode == 2
    assert "another node process" in done.stderr
    assert not (machine.base / "other.sock").exists()


# --- the controller --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_s", [0.0, 0.02])
def test_the_controller_is_killed_at_every_call_of_a_story(machine: Machine, calls: Client, delay_s: float) -> None:
    before = listing(machine.directories["main"])

    def through(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        assert machine.controller_process is not None
        kill = machine.controller_process.kill
        return killed_in(partial(call, *arguments, **named), delay_s, kill, machine.start_controller)

    volume = through(calls.create, "story", VOLUME_BYTES).volume_id
    context = through(calls.attach, volume)
    calls.stage(volume, context)
    sums = write_tree(calls.publish(volume, context), files=2)
    calls.unpublish(volume)
    calls.unstage(volume)
    through(calls.detach, volume)
    snapshot = through(calls.snapshot, "moment", volume)
    assert snapshot.ready_to_use
    restored = through(calls.create, "restored", 0, snapshot=snapshot.snapshot_id).volume_id
    clone = through(calls.create, "clone", 0, volume=volume).volume_id
    assert through(calls.expand, restored, 2 * VOLUME_BYTES) == 2 * VOLUME_BYTES
    for one in (restored, clone):
        assert read_tree(calls.use(one)) == sums
        calls.release(one)
    through(calls.delete_snapshot, snapshot.snapshot_id)
    for one in (volume, restored, clone):
        through(calls.delete, one)
    wait_for("the collector to free everything", lambda: listing(machine.directories["main"]) == before)


def test_sigterm_ends_both_with_0_and_their_sockets_are_gone(machine: Machine) -> None:
    assert machine.controller_process is not None
    assert stop_node(machine) == 0
    assert machine.controller_process.stop() == 0
    assert not (machine.base / "n.sock").exists()
    assert not (machine.base / "c.sock").exists()
    machine.start_controller()
    machine.start_node()
    assert run("ls", machine.base / "c.sock", machine.base / "n.sock").returncode == 0
