"""Storage daemons: their life, what they have open, what a client wrote, and how they end.

Axes: place (plain directory, stand-in pool) × who asks (same process, another thread, another process, a later one) ×
state of the daemon (running, stopped, killed, ended, its pool dead). Every daemon is ended by the fixture.
"""

import errno
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from host_fixtures import MIB, SIZE_BYTES, DaemonSet, Standin, kill_daemon, make_chain, wait_until, write_image

from csi_quobyte.errors import Corrupt, InvalidArgument, Refused, Unavailable
from csi_quobyte.host import command, mounts, qemu_img
from csi_quobyte.host.qemu import ImageLayer, QemuTools
from csi_quobyte.host.qsd import Daemon, Daemons, StopResult

pytest_plugins = ["host_fixtures"]
pytestmark = pytest.mark.root


def start(daemon_set: DaemonSet, chain: Sequence[ImageLayer], *, read_only: bool = False) -> tuple[Daemon, str]:
    """A daemon that exports a chain, and the path of its export."""
    daemon = daemon_set.daemons.ensure(daemon_set.key)
    daemon.ensure_open(chain, read_only=read_only)
    return daemon, daemon.ensure_fuse_export(writable=not read_only)


def write(path: str, data: bytes, offset_bytes: int, *, sync: bool = False) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, data, offset_bytes)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def read(path: str, length_bytes: int, offset_bytes: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length_bytes, offset_bytes)
    finally:
        os.close(fd)


def close_dead(fd: int) -> None:
    """Close a file whose daemon may be dead: close(2) flushes and then reports that."""
    with suppress(OSError):
        os.close(fd)


def is_silent(daemons: Daemons, key: str) -> bool:
    """Nothing of a daemon is left: no process, no directory, no mount."""
    directory = daemons.directory(key)
    return daemons.find(key) is None and not Path(directory).exists() and mounts.at(f"{directory}/export") is None


# --- life ------------------------------------------------------------------------------------------------------------


def test_write_through_the_export_and_stop_clean(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir)
    for number, layer in enumerate(chain):
        write_image(tools, layer, number + 1, number * 4 * MIB, 8 * MIB)
    frozen = [Path(layer.path).read_bytes() for layer in chain[:-1]]
    daemon, path = start(daemon_set, chain)
    assert Path(path).stat().st_size == SIZE_BYTES == daemon.virtual_size_bytes()
    assert [read(path, 1, offset * MIB) for offset in (0, 4, 8, 20)] == [b"\1", b"\2", b"\3", b"\0"]
    write(path, b"written" * 1000, 10 * MIB)
    assert read(path, 7000, 10 * MIB) == b"written" * 1000
    assert daemon.stop(timeout_s=10) is StopResult.CLEAN
    assert daemon_set.daemons.find(daemon_set.key) is None
    assert daemon_set.daemons.ended(daemon_set.key) is StopResult.CLEAN
    assert mounts.at(path) is None
    assert [Path(layer.path).read_bytes() for layer in chain[:-1]] == frozen
    assert qemu_img.check(tools, chain[-1].path, "qcow2") == qemu_img.CheckResult(0, 0, 0)
    again, path = start(daemon_set, chain)
    assert read(path, 7000, 10 * MIB) == b"written" * 1000
    assert again.pid != daemon.pid
    assert again.stop(timeout_s=10) is StopResult.CLEAN
    daemon_set.daemons.forget(daemon_set.key)
    assert is_silent(daemon_set.daemons, daemon_set.key)
    assert daemon_set.daemons.ended(daemon_set.key) is None


def test_raw_layer_is_served(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    path = image_dir / "raw"
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
    raw = ImageLayer(secrets.token_hex(12), str(path), "raw")
    daemon, export = start(daemon_set, [raw])
    header = Path(make_chain(tools, image_dir, 1)[0].path).read_bytes()
    write(export, header, 0)  # a guest may write what looks like an image
    assert read(export, len(header), 0) == header
    assert daemon.stop(timeout_s=10) is StopResult.CLEAN
    assert path.read_bytes()[: len(header)] == header
    assert path.stat().st_size == SIZE_BYTES


def test_every_call_is_idempotent(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir)
    first, path = start(daemon_set, chain)
    second, same_path = start(daemon_set, chain)
    assert (second.pid, same_path) == (first.pid, path)
    assert len([mount for mount in mounts.table() if mount.target == path]) == 1
    assert first.stop(timeout_s=10) is second.stop(timeout_s=10) is StopResult.CLEAN
    daemon_set.daemons.forget(daemon_set.key)
    daemon_set.daemons.forget(daemon_set.key)


def test_another_process_finds_and_stops_the_daemon(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir)
    program = (
        "import json, os, signal, sys\n"
        "from csi_quobyte.host.qemu import ImageLayer, QemuTools\n"
        "from csi_quobyte.host.qsd import Daemons\n"
        "tools, state_dir, key, layers = json.loads(sys.argv[1])\n"
        "daemon = Daemons(QemuTools(*tools), state_dir).ensure(key)\n"
        "daemon.ensure_open([ImageLayer(*layer) for layer in layers], read_only=False)\n"
        "print(daemon.pid, daemon.ensure_fuse_export(writable=True), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    layers = [(layer.id, layer.path, layer.format) for layer in chain]
    tool_fields = (tools.qemu_img, tools.storage_daemon, tools.version)
    argument = json.dumps([tool_fields, daemon_set.state_dir, daemon_set.key, layers])
    starter = subprocess.run(
        [sys.executable, "-c", program, argument], check=False, timeout=30, capture_output=True, text=True
    )
    assert starter.returncode == -signal.SIGKILL, starter.stderr
    pid, path = starter.stdout.split()
    assert daemon_set.daemons.keys() == [daemon_set.key]
    daemon, same_path = start(daemon_set, chain)
    assert (daemon.pid, same_path) == (int(pid), path)
    write(path, b"late", 0)
    assert daemon.stop(timeout_s=10) is StopResult.CLEAN


def test_ensure_by_many_threads_starts_one_daemon(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir)
    pids: list[int] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            daemon, _ = start(daemon_set, chain)
            daemon.virtual_size_bytes()
            pids.append(daemon.pid)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert len(pids) == 8
    assert len(set(pids)) == 1


def test_killed_daemon_is_not_found_and_a_new_one_clears_its_dead_mount(
    tools: QemuTools, daemon_set: DaemonSet, image_dir: Path
) -> None:
    chain = make_chain(tools, image_dir)
    daemon, path = start(daemon_set, chain)
    write(path, b"synced", 0, sync=True)
    held = os.open(path, os.O_RDWR)  # keeps the dead mount busy
    try:
        os.kill(daemon.pid, signal.SIGKILL)
        wait_until(lambda: daemon_set.daemons.find(daemon_set.key) is None, "the daemon is dead")
        assert mounts.at(path) is not None
        assert not daemon.is_healthy()
        assert daemon_set.daemons.ended(daemon_set.key) is StopResult.UNCLEAN
        assert daemon.stop(timeout_s=10) is StopResult.UNCLEAN
        with pytest.raises(Unavailable, match="has ended"):
            daemon.virtual_size_bytes()
        _, path = start(daemon_set, chain)
        assert read(path, 6, 0) == b"synced"
        assert len([mount for mount in mounts.table() if mount.target == path]) == 1
    finally:
        close_dead(held)


def test_forget_of_a_killed_daemon_leaves_nothing(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    start(daemon_set, make_chain(tools, image_dir))
    with pytest.raises(Refused):
        daemon_set.daemons.forget(daemon_set.key)
    kill_daemon(daemon_set.daemons, daemon_set.key)
    daemon_set.daemons.forget(daemon_set.key)
    assert is_silent(daemon_set.daemons, daemon_set.key)


def test_daemon_that_cannot_start_is_unavailable_and_leaves_no_process(daemon_set: DaemonSet) -> None:
    failing = QemuTools("/bin/false", "/bin/false", (10, 0, 13))
    daemons = Daemons(failing, daemon_set.state_dir)
    with pytest.raises(Unavailable, match="its log ends with"):
        daemons.ensure(daemon_set.key)
    hanging = Path(daemon_set.state_dir) / "hanging"
    hanging.write_text(f"#!{sys.executable}\nimport time\nprint('starting slowly', flush=True)\ntime.sleep(1000)\n")
    hanging.chmod(0o755)
    daemons = Daemons(QemuTools("/bin/false", str(hanging), (10, 0, 13)), daemon_set.state_dir)
    with pytest.raises(Unavailable, match="starting slowly"):
        daemons.ensure(daemon_set.key, timeout_s=1)
    detached = command.find_detached(f"{daemons.directory(daemon_set.key)}/pid")
    assert detached is not None
    assert command.wait_exit(detached.process, 0)


def test_state_directory_too_long_for_a_socket_is_invalid(tools: QemuTools) -> None:
    Daemons(tools, "/" + "x" * 77)
    for wrong in ("/" + "x" * 79, "relative"):
        with pytest.raises(InvalidArgument):
            Daemons(tools, wrong)


def test_longest_state_directory_and_a_comma_work(tools: QemuTools, daemon_set: DaemonSet) -> None:
    state_dir = daemon_set.state_dir + "/" + ",a" * 40
    state_dir = state_dir[:78]
    daemons = Daemons(tools, state_dir)
    try:
        assert daemons.ensure(daemon_set.key).is_healthy()
    finally:
        kill_daemon(daemons, daemon_set.key)
        daemons.forget(daemon_set.key)


@pytest.mark.parametrize("key", ["", "../../etc", "A" * 24, "a" * 23, "a" * 25])
def test_malformed_key_is_invalid(daemon_set: DaemonSet, key: str) -> None:
    with pytest.raises(InvalidArgument):
        daemon_set.daemons.ensure(key)


def test_keys_are_only_state_directories(daemon_set: DaemonSet) -> None:
    (Path(daemon_set.state_dir) / "lock").touch()
    assert daemon_set.daemons.keys() == []
    assert Daemons(daemon_set.daemons._tools, daemon_set.state_dir + "/absent").keys() == []


def test_memory_and_threads_of_a_daemon_are_small(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    daemon, path = start(daemon_set, make_chain(tools, image_dir))
    for offset in range(0, SIZE_BYTES, MIB):
        write(path, b"x" * MIB, offset)
    process = psutil.Process(daemon.pid)
    print(f"resident: {process.memory_info().rss / MIB:.1f} MiB, threads: {process.num_threads()}")
    assert process.memory_info().rss < 60 * MIB


# --- what is open ----------------------------------------------------------------------------------------------------


def test_another_chain_is_corrupt_and_changes_nothing(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir)
    daemon, path = start(daemon_set, chain)
    other = make_chain(tools, image_dir)
    overlay = make_chain(tools, image_dir, 1)
    wrong_path = [*chain[:2], ImageLayer(chain[2].id, overlay[0].path, "qcow2")]
    for wrong in (other, chain[:2], chain[1:], [*chain, *overlay], [chain[1], chain[0], chain[2]], wrong_path):
        with pytest.raises(Corrupt, match=chain[2].id) as caught:
            daemon.ensure_open(wrong, read_only=False)
        assert wrong[-1].id in str(caught.value)
    with pytest.raises(Corrupt):
        daemon.ensure_open(chain, read_only=True)
    daemon.ensure_open(chain, read_only=False)
    write(path, b"still works", 0, sync=True)


def test_interrupted_opening_is_completed(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir)
    daemon = daemon_set.daemons.ensure(daemon_set.key)
    # The two lower layers, as a process leaves them that dies before it has added the head.
    daemon.ensure_open(chain[:2], read_only=True)
    daemon.ensure_open(chain, read_only=False)
    assert daemon.virtual_size_bytes() == SIZE_BYTES
    write(daemon.ensure_fuse_export(writable=True), b"x", 0, sync=True)


def test_failed_opening_takes_back_what_it_added(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir)
    hidden = Path(chain[2].path).read_bytes()
    with Path(chain[2].path).open("r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 8)  # an impossible offset of the L1 table
    daemon = daemon_set.daemons.ensure(daemon_set.key)
    with pytest.raises(Unavailable, match=chain[2].path) as caught:
        daemon.ensure_open(chain, read_only=False)
    assert "another process" not in str(caught.value)
    with pytest.raises(Refused, match="0 chains"):
        daemon.virtual_size_bytes()
    other = make_chain(tools, image_dir)
    daemon.ensure_open(other, read_only=False)
    assert daemon.stop(timeout_s=10) is StopResult.CLEAN
    Path(chain[2].path).write_bytes(hidden)
    start(daemon_set, chain)


def test_strings_in_images_are_not_followed(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir)
    write_image(tools, chain[0], 1, 0, MIB)
    decoy = make_chain(tools, image_dir, 1)[0]
    write_image(tools, decoy, 9, 0, MIB)
    for layer in chain:
        argv = [tools.qemu_img, "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", decoy.path, layer.path]
        subprocess.run(argv, check=True, timeout=30)
    _, path = start(daemon_set, chain)
    assert read(path, 1, 0) == b"\1"


def test_refused_image_is_corrupt_before_anything_is_opened(
    tools: QemuTools, daemon_set: DaemonSet, image_dir: Path
) -> None:
    chain = make_chain(tools, image_dir)
    with Path(chain[1].path).open("r+b") as file:
        file.seek(79)
        file.write(b"\4")
    daemon = daemon_set.daemons.ensure(daemon_set.key)
    with pytest.raises(Corrupt, match="external file"):
        daemon.ensure_open(chain, read_only=False)
    with pytest.raises(Refused):
        daemon.virtual_size_bytes()


def test_second_writer_is_kept_out_by_the_image_lock(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir)
    first, path = start(daemon_set, chain)
    second = daemon_set.daemons.ensure(secrets.token_hex(12))
    for read_only in (False, True):
        with pytest.raises(Unavailable, match="another process has the image open"):
            second.ensure_open(chain, read_only=read_only)
        with pytest.raises(Refused):
            second.virtual_size_bytes()
    with pytest.raises(Unavailable):
        qemu_img.check(tools, chain[-1].path, "qcow2")
    assert qemu_img.info(tools, chain[-1].path, "qcow2").virtual_size_bytes == SIZE_BYTES
    write(path, b"undisturbed", 0, sync=True)
    assert first.stop(timeout_s=10) is StopResult.CLEAN
    second.ensure_open(chain, read_only=False)


def test_two_overlays_share_their_lower_layers(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    lower = make_chain(tools, image_dir, 2)
    write_image(tools, lower[0], 7, 0, MIB)
    one, two = (make_chain(tools, image_dir, 1)[0] for _ in range(2))
    _, path = start(daemon_set, [*lower, one])
    other = daemon_set.daemons.ensure(secrets.token_hex(12))
    other.ensure_open([*lower, two], read_only=False)
    other_path = other.ensure_fuse_export(writable=True)
    write(path, b"1", 0, sync=True)
    write(other_path, b"2", 0, sync=True)
    assert (read(path, 2, 0), read(other_path, 2, 0)) == (b"1\7", b"2\7")


def test_read_only_chain_may_be_opened_many_times_and_not_written(
    tools: QemuTools, daemon_set: DaemonSet, image_dir: Path
) -> None:
    chain = make_chain(tools, image_dir)
    write_image(tools, chain[2], 7, 0, MIB)
    before = Path(chain[2].path).read_bytes()
    daemon, path = start(daemon_set, chain, read_only=True)
    other = daemon_set.daemons.ensure(secrets.token_hex(12))
    other.ensure_open(chain, read_only=True)
    assert read(path, 1, 0) == read(other.ensure_fuse_export(writable=False), 1, 0) == b"\7"
    with pytest.raises(PermissionError):
        write(path, b"x", 0)
    with pytest.raises(Refused, match="export"):
        daemon.ensure_fuse_export(writable=True)
    assert daemon.stop(timeout_s=10) is other.stop(timeout_s=10) is StopResult.CLEAN
    assert Path(chain[2].path).read_bytes() == before


@pytest.mark.parametrize("format", ["twice", "raw above"])
def test_impossible_chain_is_corrupt(
    tools: QemuTools,
    daemon_set: DaemonSet,
    image_dir: Path,
    format: str,  # noqa: A002
) -> None:
    chain = make_chain(tools, image_dir, 2)
    wrong = [chain[0], chain[0]] if format == "twice" else [chain[0], ImageLayer(chain[1].id, chain[1].path, "raw")]
    daemon = daemon_set.daemons.ensure(daemon_set.key)
    with pytest.raises(Corrupt):
        daemon.ensure_open(wrong, read_only=False)


# --- size and export -------------------------------------------------------------------------------------------------


def test_resize_under_the_export_is_seen_at_once(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir)
    daemon, path = start(daemon_set, chain)
    held = os.open(path, os.O_RDWR)
    try:
        assert os.fstat(held).st_size == SIZE_BYTES
        daemon.resize(2 * SIZE_BYTES)
        assert os.fstat(held).st_size == Path(path).stat().st_size == 2 * SIZE_BYTES
        os.pwrite(held, b"end", 2 * SIZE_BYTES - 3)
        daemon.resize(SIZE_BYTES)
        assert daemon.virtual_size_bytes() == 2 * SIZE_BYTES
    finally:
        os.close(held)
    assert daemon.stop(timeout_s=10) is StopResult.CLEAN
    assert qemu_img.info(tools, chain[-1].path, "qcow2").virtual_size_bytes == 2 * SIZE_BYTES
    _, path = start(daemon_set, chain)
    assert read(path, 3, 2 * SIZE_BYTES - 3) == b"end"


def test_export_does_not_grow_by_writing(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    daemon, path = start(daemon_set, make_chain(tools, image_dir))
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(OSError) as caught:
            os.pwrite(fd, b"x" * 4096, SIZE_BYTES)
        assert caught.value.errno in (errno.EFBIG, errno.ENOSPC, errno.EIO)
    finally:
        os.close(fd)
    assert daemon.virtual_size_bytes() == SIZE_BYTES


def test_nothing_open_is_refused(daemon_set: DaemonSet) -> None:
    daemon = daemon_set.daemons.ensure(daemon_set.key)
    for call in (
        daemon.virtual_size_bytes,
        lambda: daemon.resize(MIB),
        lambda: daemon.ensure_fuse_export(writable=True),
    ):
        with pytest.raises(Refused):
            call()
    daemon.flush()
    assert daemon.stop(timeout_s=10) is StopResult.CLEAN


# --- how it ends -----------------------------------------------------------------------------------------------------


def test_flush_makes_unsynced_writes_survive_a_kill(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    chain = make_chain(tools, image_dir)
    daemon, path = start(daemon_set, chain)
    held = os.open(path, os.O_RDWR)  # closing would flush
    try:
        os.pwrite(held, b"flushed" * 10_000, MIB)
        daemon.flush()
        os.pwrite(held, b"lost" * 10_000, 32 * MIB)
        kill_daemon(daemon_set.daemons, daemon_set.key)
    finally:
        close_dead(held)
    _, path = start(daemon_set, chain)
    assert read(path, 70_000, MIB) == b"flushed" * 10_000
    assert read(path, 40_000, 32 * MIB) == b"\0" * 40_000


def test_stopped_daemon_is_unavailable_in_time_and_works_afterwards(
    tools: QemuTools, daemon_set: DaemonSet, image_dir: Path
) -> None:
    chain = make_chain(tools, image_dir)
    _, path = start(daemon_set, chain)
    daemon = Daemons(tools, daemon_set.state_dir, qmp_timeout_s=0.5).ensure(daemon_set.key)
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert not daemon.is_healthy()
        for call in (daemon.virtual_size_bytes, daemon.flush, lambda: daemon.ensure_open(chain, read_only=False)):
            with pytest.raises(Unavailable):
                call()
        with pytest.raises(Unavailable):
            daemon_set.daemons.ensure(daemon_set.key, timeout_s=0.5)
        assert time.monotonic() - started < 10
        assert daemon_set.daemons.find(daemon_set.key) is not None
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    wait_until(daemon.is_healthy, "the daemon answers again")
    write(path, b"x", 0, sync=True)
    assert daemon.stop(timeout_s=10) is StopResult.CLEAN


def test_stop_of_a_stopped_daemon_is_unclean_and_in_time(
    tools: QemuTools, daemon_set: DaemonSet, image_dir: Path
) -> None:
    daemon, _ = start(daemon_set, make_chain(tools, image_dir))
    os.kill(daemon.pid, signal.SIGSTOP)
    started = time.monotonic()
    # It ends by itself once SIGCONT comes with SIGTERM, but whether all was flushed nobody could ask.
    assert daemon.stop(timeout_s=2) is StopResult.UNCLEAN
    assert time.monotonic() - started < 10
    assert daemon_set.daemons.find(daemon_set.key) is None


def test_stop_by_somebody_else_is_not_taken_for_clean(tools: QemuTools, daemon_set: DaemonSet, image_dir: Path) -> None:
    daemon, path = start(daemon_set, make_chain(tools, image_dir))
    write(path, b"x", 0)
    os.kill(daemon.pid, signal.SIGTERM)
    wait_until(lambda: daemon_set.daemons.find(daemon_set.key) is None, "the daemon has ended")
    detached = command.find_detached(f"{daemon_set.daemons.directory(daemon_set.key)}/pid")
    assert detached is not None
    assert command.wait_exit(detached.supervisor, 5)
    status_path = f"{daemon_set.daemons.directory(daemon_set.key)}/status"
    assert command.find_exit_status(detached, status_path) == 0
    assert daemon_set.daemons.ended(daemon_set.key) is StopResult.UNCLEAN


def test_stop_with_the_pool_dead_is_unclean_although_qemu_exits_with_0(
    tools: QemuTools, daemon_set: DaemonSet, standin: Standin
) -> None:
    chain = make_chain(tools, standin.mountpoint)
    daemon, path = start(daemon_set, chain)
    held = os.open(path, os.O_RDWR)  # closing would flush
    try:
        for offset in range(0, SIZE_BYTES, MIB):
            os.pwrite(held, b"x" * 4096, offset)
        os.kill(standin.pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{standin.pid}/fd/0").exists(), "bindfs is dead")
        with pytest.raises(Unavailable):
            daemon.flush()
        assert daemon.stop(timeout_s=10) is StopResult.UNCLEAN
    finally:
        close_dead(held)
    directory = daemon_set.daemons.directory(daemon_set.key)
    detached = command.find_detached(f"{directory}/pid")
    assert detached is not None
    assert command.find_exit_status(detached, f"{directory}/status") == 0  # the trap that CLEAN must not fall into


def test_stop_with_the_pool_hanging_says_still_running_and_ends_later(
    tools: QemuTools, daemon_set: DaemonSet, standin: Standin
) -> None:
    chain = make_chain(tools, standin.mountpoint)
    daemon, path = start(daemon_set, chain)
    held = os.open(path, os.O_RDWR)
    try:
        os.pwrite(held, b"x" * 4096, 0)
        os.kill(standin.pid, signal.SIGSTOP)
        started = time.monotonic()
        result = daemon.stop(timeout_s=2)
        assert time.monotonic() - started < 15
        assert result in (StopResult.UNCLEAN, StopResult.STILL_RUNNING)
        os.kill(standin.pid, signal.SIGCONT)
        wait_until(lambda: daemon_set.daemons.find(daemon_set.key) is None, "the daemon has ended")
        assert daemon.stop(timeout_s=2) is StopResult.UNCLEAN
    finally:
        close_dead(held)
