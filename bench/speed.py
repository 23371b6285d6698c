"""The speed table: each operation against its floor and against the predecessor's commands, by one caller and by eight.

Owns what is compared with what (bench/README.md says it in words). One volume's life is measured again and again; the
four that are compared take turns within each round, so that a machine that gets slower meanwhile slows all of them.
"""

import itertools
import os
import shlex
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from behind_grpc import served_floor
from figures import MIB, Row, ratio, timed_ms
from floor import FLOOR_FILES, floor_directory, floor_of

from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pool.store import Store
from lab.client import Client
from lab.machine import GIB, QEMU_DIR, Machine, wait_for

COLLECT_TIMEOUT_S = 120.0
CALLERS = 8
OPERATIONS = ("create", "snapshot", "restore", "clone", "expand", "delete")
TITLES = {
    "create": "CreateVolume, blank, 1 GiB",
    "snapshot": "CreateSnapshot of a written volume",
    "restore": "CreateVolume from a snapshot",
    "clone": "CreateVolume from a written volume",
    "expand": "ControllerExpandVolume",
    "delete": "DeleteVolume",
}
NOTHING = "a call that does nothing (GetPluginInfo)"


# --- the predecessor ---------------------------------------------------------------------------------------------


class Tool:
    """A QEMU program, started without the wrapper that tests/tools/get-qemu.sh may have made for it."""

    def __init__(self, name: str) -> None:
        path = QEMU_DIR / name
        self._argv, self._environment = [str(path)], dict(os.environ)
        content = path.read_bytes()
        if content.startswith(b"#!/bin/sh"):
            for line in content.decode().splitlines():
                words = shlex.split(line)
                if words[:1] == ["export"]:
                    key, _, value = words[1].partition("=")
                    self._environment[key] = value
                elif words[:1] == ["exec"]:
                    self._argv = words[1:-1]

    def __call__(self, *arguments: str | Path) -> None:
        """Run it; a failure shows what it said."""
        command(*self._argv, *arguments, environment=self._environment)


def command(*argv: str | Path, environment: dict[str, str] | None = None) -> None:
    """Run a command as cheaply as a process can be started from here."""
    done = subprocess.run(
        [str(part) for part in argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        close_fds=False,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))} ended with {done.returncode}: {done.stderr.decode()}")


class Predecessor:
    """Its files and the commands that it runs on them, by operation; `name` tells one volume from another."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.qemu_img = Tool("qemu-img")

    def _path(self, name: str) -> Path:
        return self._directory / name

    def _info(self, name: str) -> None:
        self.qemu_img("info", "--force-share", "-f", "qcow2", "--output=json", self._path(name))

    def _overlay(self, name: str, base: str) -> None:
        backing = f"backing_file={self._path(base)},backing_fmt=qcow2"
        self.qemu_img("create", "-q", "-f", "qcow2", "-o", backing, self._path(name), str(GIB))

    def create(self, name: str) -> None:
        """A blank volume: two processes."""
        self.qemu_img(
            "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", self._path(f"{name}.base"), str(GIB)
        )
        command("chmod", "ugo+rw", self._path(f"{name}.base"))

    def _snapshot(self, name: str, base: str) -> None:
        self._info(base)
        self._overlay(name, base)
        self.qemu_img("rebase", "-u", "-b", self._path(base), "-F", "qcow2", self._path(name))
        command("chmod", "ugo+rw", self._path(name))

    def snapshot(self, name: str) -> None:
        """A snapshot, where there are snapshots already: four processes (the first one takes six)."""
        self._snapshot(f"{name}.snap", f"{name}.base")

    def restore(self, name: str, to: str = "restored") -> None:
        """A volume from a snapshot in its fastest way, an overlay of what is in its cache already: three processes."""
        self._info(f"{name}.snap")
        self._overlay(f"{name}.{to}", f"{name}.base")
        command("chmod", "ugo+rw", self._path(f"{name}.{to}"))

    def clone(self, name: str) -> None:
        """A temporary snapshot, a volume from it (the fastest way), the snapshot's deletion: eleven of its twelve."""
        self._snapshot(f"{name}.temporary", f"{name}.snap")
        self.restore(name, "cloned")
        self._info(f"{name}.temporary")
        self._info(f"{name}.snap")
        self.qemu_img("commit", "-q", "-d", "-f", "qcow2", self._path(f"{name}.temporary"))
        command("rm", "-f", self._path(f"{name}.temporary"))

    def expand(self, name: str) -> None:
        """One process."""
        self.qemu_img("resize", "-q", "-f", "qcow2", self._path(f"{name}.restored"), str(2 * GIB))

    def delete(self, name: str) -> None:
        """Two processes; the file of a restored volume goes."""
        self._info(f"{name}.restored")
        command("rm", "-f", self._path(f"{name}.restored"))

    def clear(self) -> None:
        """Remove all files."""
        for path in self._directory.iterdir():
            path.unlink()


# --- ours ----------------------------------------------------------------------------------------------------------


class Ours:
    """The driver's calls, by operation; `name` tells one volume from another."""

    def __init__(self, machine: Machine, client: Client, store: Store) -> None:
        self._machine = machine
        self._client = client
        self._store = store
        self._qemu_io = Tool("qemu-io")
        self._ids: dict[str, str] = {}

    def nothing(self, _: str) -> None:
        """GetPluginInfo: what any call costs before it does anything."""
        self._client.identity.GetPluginInfo(csi.GetPluginInfoRequest(), timeout=10)

    def create(self, name: str) -> None:
        """CreateVolume."""
        self._ids[f"{name}.base"] = self._client.create(name).volume_id

    def snapshot(self, name: str) -> None:
        """CreateSnapshot."""
        self._ids[f"{name}.snap"] = self._client.snapshot(name, self._ids[f"{name}.base"]).snapshot_id

    def restore(self, name: str) -> None:
        """CreateVolume from the snapshot."""
        made = self._client.create(f"{name}.restored", snapshot=self._ids[f"{name}.snap"])
        self._ids[f"{name}.restored"] = made.volume_id

    def clone(self, name: str) -> None:
        """CreateVolume from the volume."""
        made = self._client.create(f"{name}.cloned", volume=self._ids[f"{name}.base"])
        self._ids[f"{name}.cloned"] = made.volume_id

    def expand(self, name: str) -> None:
        """ControllerExpandVolume of the restored volume."""
        self._client.expand(self._ids[f"{name}.restored"], 2 * GIB)

    def delete(self, name: str) -> None:
        """DeleteVolume of the restored volume."""
        self._client.delete(self._ids.pop(f"{name}.restored"))

    def write(self, name: str) -> None:
        """Write into the volume, so that its head is not untouched: that would be used again instead of frozen."""
        volume = self._store.volume(self._ids[f"{name}.base"])
        path = self._store.image_path(self._store.layer(volume.head))
        self._qemu_io("-f", "qcow2", "-c", f"write -q -P 7 0 {MIB}", path)

    def clear(self) -> None:
        """Delete what is left, and wait for the collector: it shall not disturb what follows."""
        for name, record_id in self._ids.items():
            (self._client.delete_snapshot if name.endswith(".snap") else self._client.delete)(record_id)
        self._ids.clear()
        layers = self._machine.directories["main"] / "layers"
        wait_for("the collector", lambda: not any(layers.glob("*/*.json")), timeout_s=COLLECT_TIMEOUT_S)


class Floors:
    """The floor's files, by operation; `name` tells one volume from another."""

    def __init__(self, directory: Path, serve: Callable[[str, str], None]) -> None:
        """`serve` lets another process do a floor in that directory."""
        self._directory = directory
        self._serve = serve

    def here(self, operation: str, name: str) -> None:
        """Do it in this process."""
        floor_of(operation, self._directory, f"{name}-{operation}")

    def behind_grpc(self, operation: str, name: str) -> None:
        """Let the server do it."""
        self._serve(operation, f"{name}-{operation}-served")


# --- the rounds ----------------------------------------------------------------------------------------------------


@dataclass
class Samples:
    """Milliseconds of single calls, or calls in a second, of the four, by operation."""

    floor: dict[str, list[float]] = field(default_factory=dict)
    behind_grpc: dict[str, list[float]] = field(default_factory=dict)
    """The floor again, done by a gRPC server that does nothing else."""
    predecessor: dict[str, list[float]] = field(default_factory=dict)
    ours: dict[str, list[float]] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)
    nothing: list[float] = field(default_factory=list)
    """Of calls that do nothing, as a series of their own and in the same surroundings as the others."""


Measure = Callable[[Callable[[str], object], Sequence[str]], float]


def one_after_the_other(work: Callable[[str], object], names: Sequence[str]) -> float:
    """Do `work` for each name; gives the median of the milliseconds."""
    return statistics.median(timed_ms(partial(work, name)) for name in names)


def all_at_once(work: Callable[[str], object], names: Sequence[str]) -> float:
    """Do `work` for each name, by eight callers; gives how many were done in a second."""
    begin = threading.Barrier(CALLERS + 1)

    def caller(mine: Sequence[str]) -> None:
        begin.wait(30)
        for name in mine:
            work(name)

    with ThreadPoolExecutor(CALLERS) as callers:
        done = [callers.submit(caller, names[number::CALLERS]) for number in range(CALLERS)]
        begin.wait(30)
        begun = time.perf_counter()
        for future in done:
            future.result()
        return len(names) / (time.perf_counter() - begun)


def series(
    floors: Floors, predecessor: Predecessor, ours: Ours, measure: Measure, rounds: int, names_a_round: int
) -> Samples:
    """Measure the life of volumes; the first round is not counted."""
    samples = Samples()
    number = itertools.count()
    for round_number in range(rounds + 1):
        kept = samples if round_number else Samples()
        names = [f"v{next(number)}" for _ in range(names_a_round)]
        kept.starts.append(measure(lambda _: predecessor.qemu_img("--version"), names))
        kept.nothing.append(measure(ours.nothing, names))
        for operation in OPERATIONS:
            if operation in {"snapshot", "clone"}:
                for name in names:
                    ours.write(name)
            turns: list[tuple[dict[str, list[float]], Callable[[str], object]]] = [
                (kept.floor, partial(floors.here, operation)),
                (kept.behind_grpc, partial(floors.behind_grpc, operation)),
                (kept.predecessor, getattr(predecessor, operation)),
                (kept.ours, getattr(ours, operation)),
            ]
            first = round_number % len(turns)
            turned = turns[first:] + turns[:first]
            for into, work in turned:
                into.setdefault(operation, []).append(measure(work, names))
        predecessor.clear()
        ours.clear()
    return samples


def single_rows(samples: Samples) -> list[Row]:
    """Lay out the milliseconds of one caller."""
    group = "one caller"
    rows = [
        Row(group, "start of qemu-img (--version)", tuple(samples.starts)),
        Row(group, NOTHING, tuple(samples.nothing)),
    ]
    for operation in OPERATIONS:
        base, served, old, new = (
            s[operation] for s in (samples.floor, samples.behind_grpc, samples.predecessor, samples.ours)
        )
        faster = ratio(old, new)
        rows += [
            Row(group, TITLES[operation], tuple(new), ratio=ratio(new, base), ratio_to="floor"),
            Row(group, f"  floor: {FLOOR_FILES[operation]} durable files", tuple(base)),
            Row(
                group,
                "  the floor behind a gRPC call",
                tuple(served),
                ratio=ratio(old, served),
                ratio_to="as fast as the predecessor",
            ),
            Row(
                group,
                "  predecessor's commands",
                tuple(old),
                ratio=faster,
                ratio_to="ours",
                wanted=verdict(faster >= 5, "≥ 5"),
            ),
        ]
    return rows


def many_rows(samples: Samples) -> list[Row]:
    """Lay out the calls in a second of eight callers."""
    group = f"{CALLERS} callers"
    rows = [
        Row(group, "start of qemu-img (--version)", per_s=statistics.median(samples.starts)),
        Row(group, NOTHING, per_s=statistics.median(samples.nothing)),
    ]
    for operation in OPERATIONS:
        base, served, old, new = (
            s[operation] for s in (samples.floor, samples.behind_grpc, samples.predecessor, samples.ours)
        )
        of_floor, faster = ratio(new, base), ratio(new, old)
        wanted = verdict(of_floor >= 0.6 or faster >= 20, "≥ 0.6 or 20 ×")
        rows += [
            Row(
                group, TITLES[operation], per_s=statistics.median(new), ratio=of_floor, ratio_to="floor", wanted=wanted
            ),
            Row(group, f"  floor: {FLOOR_FILES[operation]} durable files", per_s=statistics.median(base)),
            Row(
                group,
                "  the floor behind a gRPC call",
                per_s=statistics.median(served),
                ratio=ratio(served, base),
                ratio_to="floor",
            ),
            Row(
                group,
                "  predecessor's commands",
                per_s=statistics.median(old),
                ratio=faster,
                ratio_to="as fast",
            ),
        ]
    return rows


def verdict(is_met: bool, wanted: str) -> str:
    """Say what was wanted, and whether it was reached."""
    return f"{wanted}: {'met' if is_met else 'not met'}"


def measure_speed(machine: Machine, client: Client, rounds: int, calls_a_round: int) -> list[Row]:
    """Measure the speed table."""
    directory = machine.base / "predecessor"
    directory.mkdir()
    store = Store(str(machine.pool_path))
    try:
        with (
            floor_directory(machine.pool_path) as floor_files,
            served_floor(floor_files, machine.base / "floor.sock") as serve,
        ):
            floors = Floors(floor_files, serve)
            predecessor, ours = Predecessor(directory), Ours(machine, client, store)
            single = series(floors, predecessor, ours, one_after_the_other, rounds, 1)
            many = series(floors, predecessor, ours, all_at_once, max(1, rounds // 4), calls_a_round)
    finally:
        store.close()
    return single_rows(single) + many_rows(many)
