#!/usr/bin/env python3
"""The benchmark: one run, one table, in which each figure stands beside what it is to be compared with.

Owns how each figure is taken (bench/README.md says it in words). Hides the machine that is set up and taken down.

Always holds: nothing is asserted about time, only about results: a call that fails fails the run. What is compared is
measured alternately, so that a machine that gets slower meanwhile slows both. Data never goes through the stand-in.
"""

import argparse
import cProfile
import itertools
import os
import pstats
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import click
import grpc
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "deploy"),
    str(ROOT / "bench"),
]  # started by its path, from a tree as it is

from disk import wait_until_recovered  # noqa: E402
from figures import MIB, Row, environment, ratio, show, timed_ms  # noqa: E402
from floor import floor, floor_directory  # noqa: E402
from speed import measure_speed  # noqa: E402

from csi_quobyte.engine.copying import Copier  # noqa: E402
from csi_quobyte.host.qemu import find_tools  # noqa: E402
from csi_quobyte.operations import volumes  # noqa: E402
from csi_quobyte.operations.capacity import Provisioned  # noqa: E402
from csi_quobyte.operations.volumes import CreateRequest  # noqa: E402
from csi_quobyte.pb import csi_pb2 as csi  # noqa: E402
from csi_quobyte.pool.sizes import SizeRange  # noqa: E402
from csi_quobyte.pool.store import Store  # noqa: E402
from lab.client import Client, mount_capability  # noqa: E402
from lab.machine import GIB, QEMU_DIR, Machine, Process, run, wait_for  # noqa: E402

LARGE_BYTES = 1024 * GIB
MANY_SNAPSHOTS = 25
COLLECT_TIMEOUT_S = 60.0
EXT4 = mount_capability("ext4")
PROFILED_CALLS = 200
PROFILE_LINES = 20


@dataclass(frozen=True)
class Counts:
    """How often each operation is measured."""

    create: int
    snapshot: int
    predecessor: int
    calls: int
    attach: int


# --- creating and deleting ---------------------------------------------------------------------------------------


def wait_until_collected(machine: Machine) -> None:
    """Wait until the collector has removed the layers of deleted volumes, so that it does not disturb what follows."""
    layers = machine.directories["main"] / "layers"
    wait_for("the collector", lambda: not any(layers.glob("*/*.json")), timeout_s=COLLECT_TIMEOUT_S)


def create_into(made: list[str], client: Client, name: str) -> None:
    """Make a blank volume of 1 GiB and add its id to `made`."""
    made.append(client.create(name).volume_id)


def snapshot_into(made: list[str], client: Client, name: str, volume_id: str) -> None:
    """Make a snapshot and add its id to `made`."""
    made.append(client.snapshot(name, volume_id).snapshot_id)


def measure_create(machine: Machine, client: Client, count: int, group: str) -> list[Row]:
    """Create and then delete blank volumes, alternating with the floor; the first of each is not counted."""
    floors: list[float] = []
    creates: list[float] = []
    deletes: list[float] = []
    calls: list[float] = []
    probe = csi.GetPluginInfoRequest()
    with floor_directory(machine.pool_path) as directory:
        made: list[str] = []
        for number in range(count + 1):
            floors.append(timed_ms(partial(floor, directory, str(number), 2)))
            calls.append(timed_ms(lambda: client.identity.GetPluginInfo(probe, timeout=10)))
            creates.append(timed_ms(partial(create_into, made, client, f"v{number}")))
        delete_floors: list[float] = []
        for number, volume_id in enumerate(made, start=count + 1):
            delete_floors.append(timed_ms(partial(floor, directory, str(number), 2)))
            deletes.append(timed_ms(partial(client.delete, volume_id)))
    wait_until_collected(machine)
    floors, creates, calls, deletes, delete_floors = (
        samples[1:] for samples in (floors, creates, calls, deletes, delete_floors)
    )
    return [
        Row(group, "floor: two files, write + fsync + rename + fsync of the directory", tuple(floors)),
        Row(group, "a call that does nothing (GetPluginInfo)", tuple(calls)),
        Row(
            group,
            "CreateVolume, blank, 1 GiB",
            tuple(creates),
            ratio=ratio(creates, floors),
            ratio_to="floor",
            wanted="≤ 2.5" if machine.standins == {} else "",
        ),
        Row(
            group,
            "DeleteVolume (the layer is removed later)",
            tuple(deletes),
            ratio=ratio(deletes, delete_floors),
            ratio_to="floor",
        ),
    ]


# --- size must not matter ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SnapshotTimes:
    """One series of copy-on-write operations on a volume whose head was written to, in milliseconds."""

    snapshot_ms: float
    restore_ms: float
    clone_ms: float


def write_into_head(store: Store, volume_id: str, size_bytes: int) -> None:
    """Write 1 MiB at the beginning and at the end of a detached volume, so that its head is not untouched."""
    path = store.image_path(store.layer(store.volume(volume_id).head))
    commands = [f"write -q -P 7 0 {MIB}", f"write -q -P 7 {size_bytes - MIB} {MIB}"]
    options = [part for command in commands for part in ("-c", command)]
    run(QEMU_DIR / "qemu-io", "-f", "qcow2", *options, path)


class Made:
    """What series have made. It is kept until the end, but for large volumes, for which there is no space: an ext4 that
    has just removed many files makes new ones slowly, and the series that makes the most would pay for it.
    """

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._names = (f"{name}-{number}" for number in itertools.count())
        self.volumes: list[str] = []
        self.snapshots: list[str] = []

    def volume(self, size_bytes: int, *, snapshot: str = "", volume: str = "") -> str:
        """Create a volume, perhaps from a source, and give its id."""
        made = self._client.create(next(self._names), size_bytes, snapshot=snapshot, volume=volume)
        self.volumes.append(made.volume_id)
        return self.volumes[-1]

    def snapshot(self, volume_id: str) -> None:
        """Take a snapshot."""
        snapshot_into(self.snapshots, self._client, next(self._names), volume_id)

    def delete(self) -> None:
        """Delete all of it."""
        for snapshot_id in self.snapshots:
            self._client.delete_snapshot(snapshot_id)
        for volume_id in self.volumes:
            self._client.delete(volume_id)
        self.snapshots.clear()
        self.volumes.clear()


def snapshot_series(store: Store, made: Made, size_bytes: int, snapshots: int) -> SnapshotTimes:
    """Snapshot a written volume, restore the snapshot, write again and clone the volume.

    The snapshot that is measured is the volume's `snapshots`th.
    """
    source = made.volume(size_bytes)
    for _ in range(snapshots - 1):
        write_into_head(store, source, size_bytes)
        made.snapshot(source)
    write_into_head(store, source, size_bytes)
    snapshot_ms = timed_ms(lambda: made.snapshot(source))
    restore_ms = timed_ms(lambda: made.volume(size_bytes, snapshot=made.snapshots[-1]))
    write_into_head(store, source, size_bytes)
    clone_ms = timed_ms(lambda: made.volume(size_bytes, volume=source))
    return SnapshotTimes(snapshot_ms, restore_ms, clone_ms)


def measure_snapshots(machine: Machine, client: Client, count: int) -> list[Row]:
    """Compare copy-on-write operations of a large volume, and of one with many snapshots, with those of a small one.

    The first series is not counted.
    """
    cases = {"1 GiB": (GIB, 1), "1 TiB": (LARGE_BYTES, 1), f"1 GiB, snapshot {MANY_SNAPSHOTS}": (GIB, MANY_SNAPSHOTS)}
    series: dict[str, list[SnapshotTimes]] = {case: [] for case in cases}
    made, made_large = Made(client, "series"), Made(client, "large")
    store = Store(str(machine.pool_path))
    try:
        for _ in range(count + 1):
            for case, (size_bytes, snapshots) in cases.items():
                into = made_large if size_bytes == LARGE_BYTES else made
                series[case].append(snapshot_series(store, into, size_bytes, snapshots))
            made_large.delete()
    finally:
        store.close()
    made.delete()
    wait_until_collected(machine)
    rows = []
    for what, field in (
        ("CreateSnapshot of a written volume", "snapshot_ms"),
        ("CreateVolume from a snapshot (restore)", "restore_ms"),
        ("CreateVolume from a written volume (clone)", "clone_ms"),
    ):
        samples = {case: [getattr(one, field) for one in done[1:]] for case, done in series.items()}
        base = samples["1 GiB"]
        rows.append(Row("copy on write", f"{what}, 1 GiB", tuple(base)))
        rows += [
            Row(
                "copy on write",
                f"{what}, {case}",
                tuple(times),
                ratio=ratio(times, base),
                ratio_to="1 GiB",
                wanted="about 1",
            )
            for case, times in samples.items()
            if case != "1 GiB"
        ]
    return rows


# --- attach ------------------------------------------------------------------------------------------------------


def attach_calls(client: Client, volume_id: str) -> tuple[float, float, float]:
    """Publish, stage and node-publish a volume; gives the milliseconds of each."""
    context: dict[str, str] = {}
    attach_ms = timed_ms(lambda: context.update(client.attach(volume_id, capability=EXT4)))
    stage_ms = timed_ms(lambda: client.stage(volume_id, context, capability=EXT4))
    publish_ms = timed_ms(lambda: client.publish(volume_id, context, capability=EXT4))
    return attach_ms, stage_ms, publish_ms


def write_durably(path: Path, seed: int) -> None:
    """Write a file of 64 MiB to its disk, so that the storage daemon has worked."""
    block = random.Random(seed).randbytes(MIB)
    with path.open("wb") as file:
        for _ in range(64):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def measure_attach(machine: Machine, client: Client, count: int) -> tuple[list[Row], list[Row]]:
    """Use and release ext4 volumes of 1 GiB; gives the rows of time, and those of the daemons' memory."""
    first: list[float] = []
    whole: list[float] = []
    stages: list[float] = []
    releases: list[float] = []
    memory: list[Row] = []
    for number in range(count):
        volume_id = client.create(f"attach-{number}", capability=EXT4).volume_id
        first.append(sum(attach_calls(client, volume_id)))
        write_durably(client.target_path(volume_id) / "file", number)
        client.release(volume_id)
        parts = attach_calls(client, volume_id)
        whole.append(sum(parts))
        stages.append(parts[1])
        if number == count - 1:
            write_durably(client.target_path(volume_id) / "more", number)
            memory = daemon_memory(machine)
        releases.append(timed_ms(partial(client.release, volume_id)))
        client.delete(volume_id)
    wait_until_collected(machine)
    rows = [
        Row("attach", "first use: ControllerPublish + NodeStage with mkfs + NodePublish", tuple(first)),
        Row(
            "attach",
            "use, formatted: ControllerPublish + NodeStage + NodePublish",
            tuple(whole),
            wanted="≤ 300 ms",
        ),
        Row("attach", "of that NodeStage", tuple(stages)),
        Row("attach", "release: NodeUnpublish + NodeUnstage + ControllerUnpublish", tuple(releases)),
    ]
    return rows, memory


# --- memory ------------------------------------------------------------------------------------------------------


def memory_rows(who: str, pid: int, wanted: str) -> list[Row]:
    """Give what a process keeps resident (RSS), and the part of it that nobody shares (USS)."""
    found = psutil.Process(pid).memory_full_info()
    return [
        Row("memory", f"{who}: resident (RSS)", memory_bytes=found.rss, wanted=wanted),
        Row("memory", f"{who}: its own alone (USS)", memory_bytes=found.uss),
    ]


def daemon_memory(machine: Machine) -> list[Row]:
    """Give the memory of each storage daemon that runs now."""
    return [row for pid in machine.daemons() for row in memory_rows("storage daemon, in use", pid, "< 60 MiB")]


def pid_of(process: Process | None) -> int:
    """Give the pid of a process of the machine that was started."""
    if process is None or process.process is None:
        raise RuntimeError("the process was not started")
    return process.process.pid


# --- the whole run -----------------------------------------------------------------------------------------------


def measure(base: Path, counts: Counts, progress: Callable[[str], None]) -> list[Row]:
    """Measure everything below `base`, an empty directory, and give the rows."""
    progress("a pool on a plain directory")
    with Machine(base / "p", standin=False) as machine:
        # merges would come between the calls that are measured, and are not what is compared
        machine.start_controller("--no-merge-layers")
        machine.start_node()
        client = Client(machine)
        memory = memory_rows("controller, idle", pid_of(machine.controller_process), "< 100 MiB")
        memory += memory_rows("node, idle", pid_of(machine.node_process), "")
        progress("CreateVolume and DeleteVolume")
        rows = measure_create(machine, client, counts.create, "plain directory")
        progress("snapshots and clones")
        rows += measure_snapshots(machine, client, counts.snapshot)
        progress("the predecessor's commands, by one caller and by eight")
        rows += measure_speed(machine, client, counts.predecessor, counts.calls)
        progress("attach and release")
        attach, daemons = measure_attach(machine, client, counts.attach)
        rows += attach
        memory += memory_rows("controller, after the run", pid_of(machine.controller_process), "")
        memory += memory_rows("node, after the run", pid_of(machine.node_process), "")
        if findings := machine.check():
            raise RuntimeError(f"csi-quobyte check found after the run: {findings}")
    progress("CreateVolume through the stand-in")
    with Machine(base / "s") as machine:
        machine.start_controller("--no-merge-layers")
        rows += measure_create(machine, Client(machine), counts.create, "through bindfs")
    return rows + memory + daemons


def profile(base: Path) -> None:
    """Print where the time of CreateVolume goes: its durable steps one by one, and cProfile's view of the process."""
    with Machine(base / "p", standin=False) as machine:
        notes: list[tuple[str, float]] = []
        store = Store(str(machine.pool_path), observer=lambda step, _: notes.append((step, time.perf_counter())))
        provisioned = Provisioned()
        provisioned.total_bytes(store)
        copier = Copier(find_tools(str(QEMU_DIR)), "p")
        create = partial(volumes.create, store, provisioned=provisioned, release=lambda _: None, copies=copier)
        create(_blank_request("warm"))
        steps: dict[int, list[float]] = {}
        names: list[str] = []
        for number in range(PROFILED_CALLS):
            notes.clear()
            create(_blank_request(f"steps-{number}"))
            notes.append(("end", time.perf_counter()))
            names = [name for name, _ in notes[:-1]]
            for at, ((_, begun), (_, ended)) in enumerate(itertools.pairwise(notes)):
                steps.setdefault(at, []).append((ended - begun) * 1000)
        click.echo("durable steps of one blank CreateVolume, median ms until the next one begins:")
        for at, name in enumerate(names):
            click.echo(f"  {statistics.median(steps[at]):7.3f}  {name}")
        profiler = cProfile.Profile()
        profiler.enable()
        for number in range(PROFILED_CALLS):
            create(_blank_request(f"profile-{number}"))
        profiler.disable()
        store.close()
    click.echo(f"\ncProfile of {PROFILED_CALLS} calls, without gRPC and threads:")
    pstats.Stats(profiler, stream=sys.stdout).strip_dirs().sort_stats("tottime").print_stats(PROFILE_LINES)


def _blank_request(name: str) -> CreateRequest:
    return CreateRequest(
        name=name,
        size=SizeRange(required_bytes=GIB, limit_bytes=0),
        image_format="qcow2",
        preallocation="off",
        data_path="auto",
        access_type="mount",
        filesystem="ext4",
        mkfs_options=(),
        source=None,
        kubernetes={},
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure the driver against the machine's floor and its predecessor.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--profile", action="store_true", help="show where CreateVolume's time goes, and nothing else")
    parser.add_argument("--directory", help="where the pools shall lie (default: the temporary directory)")
    parser.add_argument("--create", type=int, default=50, help="volumes created in each of the two pools (%(default)s)")
    parser.add_argument("--snapshot", type=int, default=10, help="series of snapshot and clone (%(default)s)")
    parser.add_argument("--predecessor", type=int, default=20, help="rounds of the speed table (%(default)s)")
    parser.add_argument("--calls", type=int, default=32, help="calls in a round by eight callers (%(default)s)")
    parser.add_argument("--attach", type=int, default=8, help="volumes used and released (%(default)s)")
    arguments = parser.parse_args()
    if min(arguments.create, arguments.snapshot, arguments.predecessor, arguments.calls, arguments.attach) < 1:
        parser.error("every count must be at least 1")
    return arguments


def end(number: int, _frame: object) -> NoReturn:
    """Signal handler: leave by an exception, so that everything is taken down."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Run the benchmark."""
    arguments = parse_arguments()
    if os.geteuid() != 0:
        click.echo("the benchmark mounts file systems and so must run as root: sudo make bench", err=True)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    counts = Counts(arguments.create, arguments.snapshot, arguments.predecessor, arguments.calls, arguments.attach)
    begun_s = time.monotonic()
    base = Path(tempfile.mkdtemp(prefix="cq-", dir=arguments.directory))
    try:
        if arguments.profile:
            profile(base)
            return 0
        described = environment(base)

        def progress(text: str) -> None:
            click.echo(f"measuring: {text}", err=True)

        described["new_file_us"] = round(wait_until_recovered(base, progress))
        rows = measure(base, counts, progress)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        return 130
    except (grpc.RpcError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        words = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
        click.echo(f"the benchmark could not go on: {words}", err=True)
        return 1
    finally:
        base.rmdir()  # each machine has removed its own part
    described["seconds"] = round(time.monotonic() - begun_s)
    show(rows, described, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
