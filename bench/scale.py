#!/usr/bin/env python3
"""Does a large pool cost more? Measures a pool of 100 000 volumes against one of 100, in one run.

Owns how each figure is taken (bench/README.md says it in words). Both pools are on one ext4, on a file of the
machine's own disk, each with a controller process of its own; calls to the two alternate.

Always holds: nothing is asserted about time, only about results: a call that fails, or a list that lacks a volume,
fails the run.
"""

import argparse
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
import grpc
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "deploy"), str(ROOT / "bench")]  # started by its path, from a tree as it is

from disk import own_disk  # noqa: E402
from figures import Row, environment, ratio, show, timed_ms  # noqa: E402

from csi_quobyte.pb import csi_pb2 as csi  # noqa: E402
from csi_quobyte.pool import records  # noqa: E402
from csi_quobyte.pool.records import NodeRecord  # noqa: E402
from csi_quobyte.pool.store import Store  # noqa: E402
from lab.client import Client, block_capability  # noqa: E402
from lab.machine import GIB, NODE_ID, Machine, wait_for  # noqa: E402

SNAPSHOT_EVERY = 20
FILLERS = 2
PAGE = 1000
NEW_BYTES = 1 << 20
DISK_BYTES = 16 * GIB
DISK_FILES = 2_000_000
FILL_TIMEOUT_S = 900
PASS_TIMEOUT_S = 600
METRIC = re.compile(rb'csi_quobyte_collector_pass_seconds\{pool="main"\} ([0-9.e+-]+)')


@dataclass
class Times:
    """The samples of one pool, in milliseconds by operation."""

    of: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, work: Callable[[], Any]) -> None:
        """Do `work`, and keep how long it took."""
        self.of.setdefault(what, []).append(timed_ms(work))


class Subject:
    """One pool with its controller."""

    def __init__(self, base: Path, name: str, volumes: int, port: int) -> None:
        self.machine = Machine(base / name, standin=False)
        self.volumes = volumes
        self.times = Times()
        self._port = port
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """A client of the controller."""
        if self._client is None:
            self._client = Client(self.machine)
        return self._client

    def fill(self) -> None:
        """Fill the pool, with several processes, and make a node known in it."""
        store = Store(str(self.machine.pool_path))
        store.put_node(NodeRecord(id=NODE_ID, driver_version="bench", started_at=records.now()))
        store.close()
        bounds = [self.volumes * number // FILLERS for number in range(FILLERS + 1)]
        script = str(ROOT / "bench/filling.py")
        fillers = [
            subprocess.Popen(
                [sys.executable, script, str(self.machine.pool_path), str(first), str(end), str(SNAPSHOT_EVERY)]
            )
            for first, end in itertools.pairwise(bounds)
        ]
        try:
            if any(filler.wait(FILL_TIMEOUT_S) for filler in fillers):
                raise RuntimeError("the pool could not be filled")
        finally:
            for filler in fillers:
                filler.kill()
                filler.wait()

    def start(self) -> float:
        """Start the controller; gives the milliseconds until Probe says that it is ready."""
        return timed_ms(
            lambda: self.machine.start_controller(
                "--metrics-address", f"127.0.0.1:{self._port}", "--log-level", "warning"
            )
        )

    @property
    def process(self) -> psutil.Process:
        """The controller's process."""
        started = self.machine.controller_process
        if started is None or started.process is None:
            raise RuntimeError("the controller was not started")
        return psutil.Process(started.process.pid)

    def cpu_s(self) -> float:
        """The processor time that the controller has used."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def peak_bytes(self) -> int:
        """The most that was ever resident of the controller."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmHWM:\s*([0-9]+) kB", status)
        return int(found[1]) * 1024 if found else 0

    def last_pass_s(self) -> float:
        """How long the collector's last look at everything took; 0 before there was one."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=10) as answer:
            found = METRIC.search(answer.read())
        return float(found[1]) if found else 0.0

    def round(self, name: str) -> None:
        """Make, use and delete one volume and one snapshot of it."""
        client, add, made = self.client, self.times.add, [""]

        def create() -> None:
            made[0] = client.create(name, NEW_BYTES, capability=block_capability()).volume_id

        add("CreateVolume", create)
        volume_id = made[0]

        def snapshot() -> None:
            made[0] = client.snapshot(name, volume_id).snapshot_id

        # before the volume is detached by nobody who says that it has closed it: then snapshots have to wait
        add("CreateSnapshot", snapshot)
        add("ControllerGetVolume", partial(get_volume, client, volume_id))
        add("ControllerPublishVolume", lambda: client.attach(volume_id, capability=block_capability()))
        add("ControllerUnpublishVolume", lambda: client.detach(volume_id))
        add("DeleteSnapshot", lambda: client.delete_snapshot(made[0]))
        add("DeleteVolume", lambda: client.delete(volume_id))


def get_volume(client: Client, volume_id: str) -> None:
    """ControllerGetVolume."""
    client.controller.ControllerGetVolume(csi.ControllerGetVolumeRequest(volume_id=volume_id), timeout=60)


def volume_pages(client: Client, times: Times) -> Iterator[str]:
    """Walk through all pages of ListVolumes; gives the ids."""
    token = ""
    while True:
        answers: list[csi.ListVolumesResponse] = []
        request = csi.ListVolumesRequest(max_entries=PAGE, starting_token=token)
        times.add("ListVolumes", lambda: answers.append(client.controller.ListVolumes(request, timeout=60)))  # noqa: B023
        yield from (entry.volume.volume_id for entry in answers[0].entries)
        token = answers[0].next_token
        if not token:
            return


def snapshot_pages(client: Client, times: Times, source: str = "") -> Iterator[str]:
    """Walk through all pages of ListSnapshots, or those of one volume; gives the ids."""
    token, what = "", "ListSnapshots of one volume" if source else "ListSnapshots"
    while True:
        answers: list[csi.ListSnapshotsResponse] = []
        request = csi.ListSnapshotsRequest(max_entries=PAGE, starting_token=token, source_volume_id=source)
        times.add(what, lambda: answers.append(client.controller.ListSnapshots(request, timeout=60)))  # noqa: B023
        yield from (entry.snapshot.snapshot_id for entry in answers[0].entries)
        token = answers[0].next_token
        if not token:
            return


def check_complete(found: Sequence[str], what: str, at_least: int) -> None:
    """Check that a list has each object once.

    Raises:
        RuntimeError: it has not.
    """
    if len(set(found)) != len(found) or len(found) != at_least:
        raise RuntimeError(f"{what} gave {len(found)} entries, {len(set(found))} different ones, of {at_least}")


def end_controller(subject: Subject) -> None:
    """End a pool's controller; its files go with their disk."""
    started = subject.machine.controller_process
    if started and started.process and started.process.poll() is None:
        started.stop()


def cold_start(large: Subject) -> list[Row]:
    """Start the controller on the large pool; single calls at once, and CreateVolume while it looks at everything."""
    store = Store(str(large.machine.pool_path))
    source = next(store.volume_ids())
    store.close()
    begun = time.monotonic()
    ready_ms = large.start()
    first = Times()
    first.add("ControllerGetVolume", partial(get_volume, large.client, source))
    first.add("CreateVolume", partial(large.client.create, "first", NEW_BYTES, capability=block_capability()))
    large.client.delete(records.volume_id(store.prefix, "first"))
    cpu_s = large.cpu_s()
    passed_s = wait_for("the collector's first pass", large.last_pass_s, timeout_s=PASS_TIMEOUT_S)
    return [
        Row("cold start", "Probe is ready after", (ready_ms,)),
        Row("cold start", "the first ControllerGetVolume", tuple(first.of["ControllerGetVolume"])),
        Row("cold start", "the first CreateVolume", tuple(first.of["CreateVolume"])),
        Row("cold start", "first look at everything, nothing else to do", (passed_s * 1000,), wanted="≤ 60 s"),
        Row("cold start", "of that processor time", ((large.cpu_s() - cpu_s) * 1000,)),
        Row("cold start", "from the process's start until everything was seen", ((time.monotonic() - begun) * 1000,)),
        Row("memory", "controller after that (RSS)", memory_bytes=large.process.memory_info().rss, wanted="≤ 250 MiB"),
    ]


def during_a_pass(large: Subject, small: Subject) -> list[Row]:
    """Restart the large pool's controller, and create and delete volumes in both while it looks at everything."""
    large.machine.controller_process.stop()  # type: ignore[union-attr]
    large.start()
    number = 0
    for subject in (large, small):  # the first call counts the volumes
        subject.times = Times()
        subject.round("warm")
    subject_times = {id(subject): Times() for subject in (large, small)}
    begun = time.monotonic()
    while not large.last_pass_s() and time.monotonic() - begun < PASS_TIMEOUT_S:
        number += 1
        for subject in (large, small):
            subject.times = subject_times[id(subject)]
            subject.round(f"during-{number}")
        time.sleep(0.05)
    passed_s = large.last_pass_s()
    rows = compare(large, small, "while everything is looked at", wanted="")
    return [*rows, Row(rows[0].group, "that look, with these calls beside it", (passed_s * 1000,))]


def compare(large: Subject, small: Subject, group: str, wanted: str = "≤ 1.2") -> list[Row]:
    """Lay the samples of both pools side by side."""
    rows = []
    for what, samples in large.times.of.items():
        base = small.times.of[what]
        compared = ratio(samples, base)
        rows.append(Row(group, f"{what}, {small.volumes} volumes", tuple(base)))
        title = f"{what}, {large.volumes} volumes"
        rows.append(Row(group, title, tuple(samples), ratio=compared, ratio_to="small", wanted=wanted))
    return rows


def steady(large: Subject, small: Subject, rounds: int) -> list[Row]:
    """Measure single calls in both pools, in turns."""
    for subject in (large, small):
        subject.round("warm")
        subject.times = Times()
    for number in range(rounds):
        for subject in (large, small) if number % 2 else (small, large):
            subject.round(f"steady-{number}")
            time.sleep(0.05)  # for the collector: the layers of what was deleted
    return compare(large, small, "one call")


def lists(large: Subject) -> list[Row]:
    """Walk through the lists of the large pool, twice: the second walk counts."""
    times = Times()
    for _ in range(2):
        times = Times()
        check_complete(list(volume_pages(large.client, times)), "ListVolumes", large.volumes)
        snapshots = list(snapshot_pages(large.client, times))
        check_complete(snapshots, "ListSnapshots", -(-large.volumes // SNAPSHOT_EVERY))
    source = large.client.controller.GetSnapshot(csi.GetSnapshotRequest(snapshot_id=snapshots[-1]), timeout=60)
    for _ in range(5):
        found = list(snapshot_pages(large.client, times, source.snapshot.source_volume_id))
        check_complete(found, "ListSnapshots of one volume", 1)
    for _ in range(5):
        times.add("GetCapacity", lambda: large.client.controller.GetCapacity(csi.GetCapacityRequest(), timeout=60))
    wanted = {"ListVolumes": "≤ 200 ms", "ListSnapshots": "≤ 200 ms"}
    titles = {"ListVolumes": f"ListVolumes, page of {PAGE}", "ListSnapshots": f"ListSnapshots, page of {PAGE}"}
    return [
        Row("lists", titles.get(what, what), tuple(samples), wanted=wanted.get(what, ""))
        for what, samples in times.of.items()
    ]


def measure(
    base: Path,
    volumes: int,
    few: int,
    rounds: int,
    progress: Callable[[str], None],
    report: Callable[[Sequence[Row]], None],
) -> None:
    """Measure everything below `base`, an empty directory, and report the rows."""
    port = 19700 + os.getpid() % 200 * 2
    small = Subject(base, "s", few, port)
    try:
        large = Subject(base, "b", volumes, port + 1)
        try:
            progress(f"filling a pool with {volumes} volumes")
            fill_ms = timed_ms(large.fill)
            small.fill()
            small.start()
            progress("cold start")
            rows = cold_start(large)
            progress("single calls")
            rows += steady(large, small, rounds)
            progress("lists")
            rows += lists(large)
            progress("single calls while everything is looked at")
            rows += during_a_pass(large, small)
            rows += [
                Row("memory", "controller, the most of all this (VmHWM)", memory_bytes=large.peak_bytes()),
                Row("memory", f"controller, {few} volumes, the most", memory_bytes=small.peak_bytes()),
                Row("filling", f"{volumes} volumes, without syncing", (fill_ms,)),
            ]
            report(rows)
        finally:
            end_controller(large)
    finally:
        end_controller(small)


def end(number: int, _frame: object) -> NoReturn:
    """Signal handler: leave by an exception, so that everything is taken down."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Measure a pool of many volumes against one of few.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--directory", help="where the pools shall lie, on a disk (default: the temporary directory)")
    parser.add_argument("--volumes", type=int, default=100_000, help="volumes in the large pool (%(default)s)")
    parser.add_argument("--few", type=int, default=100, help="volumes in the small pool (%(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of single calls (%(default)s)")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        click.echo("this mounts a file system and so must run as root: sudo make scale", err=True)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    begun_s = time.monotonic()
    base = Path(tempfile.mkdtemp(prefix="cq-", dir=arguments.directory))
    try:
        described = environment(base)
        if described["file_system"] == "tmpfs":
            raise RuntimeError(f"{base} is in memory; give --directory on a disk")
        with own_disk(base, size_bytes=DISK_BYTES, files=DISK_FILES) as disk:
            measure(
                disk,
                arguments.volumes,
                arguments.few,
                arguments.rounds,
                lambda text: click.echo(f"measuring: {text} ({time.monotonic() - begun_s:.0f} s)", err=True),
                lambda rows: show(
                    rows, described | {"seconds": round(time.monotonic() - begun_s)}, as_json=arguments.json
                ),
            )
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        return 130
    except (grpc.RpcError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        words = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
        click.echo(f"the benchmark could not go on: {words}", err=True)
        return 1
    finally:
        base.rmdir()  # each machine has removed its own part
    return 0


if __name__ == "__main__":
    sys.exit(main())
