#!/usr/bin/env python3
"""Row S18: what do writes beyond the end of a file cost through FUSE, and what helps?

Owns the comparison of three ways to open the head of a long chain on the stand-in for Quobyte: as it is, with QEMU's
`preallocate` filter below qcow2, and with the file's length set ahead. They take turns; each starts from a fresh head.
The driver's own options of nodes are used. Data through bindfs is slow: compare the three, nothing else.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "deploy"), str(ROOT / "bench")]  # started by its path, from a tree as it is

from figures import MIB, environment  # noqa: E402

from lab.machine import GIB, QEMU_DIR, StandIn, run, wait_for  # noqa: E402

BLOCK_BYTES = 64 * 1024
QUEUE_DEPTH = 16
WAYS = ("as it is", "preallocate filter", "length set ahead")
# What changes a file's length: a write beyond its end, or a call that says so. strace prints one of these a line.
VECTORS = re.compile(r"iov_len=(\d+)")
PWRITE = re.compile(r"pwrite(?:64|v|v2)\((\d+), .*, (\d+)(?:, \w+)?\)\s+= (\d+)")
TRUNCATE = re.compile(r"ftruncate\(\d+, (\d+)\)\s+= 0")
FALLOCATE = re.compile(r"fallocate\(\d+, ([A-Z_0|]+), (\d+), (\d+)\)\s+= (0|-1 \w+)")


@dataclass(frozen=True)
class Result:
    """What one run of fio has shown."""

    per_s: float
    allocated_bytes: int
    length_bytes: int


class Chain:
    """A chain of qcow2 layers on the stand-in, whose head can be made anew."""

    def __init__(self, pool: Path, depth: int, size_bytes: int) -> None:
        self._pool = pool
        self._depth = depth
        self._size_bytes = size_bytes
        base = self._path(0)
        run(QEMU_DIR / "qemu-img", "create", "-q", "-f", "qcow2", base, str(size_bytes))
        for number in range(1, depth - 1):
            self._overlay(number)

    @property
    def head(self) -> Path:
        """The layer that is written."""
        return self._path(self._depth - 1)

    def _path(self, number: int) -> Path:
        return self._pool / f"layer{number}.qcow2"

    def _overlay(self, number: int) -> None:
        backing = self._path(number - 1).name
        argv = ["create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "qcow2"]
        run(QEMU_DIR / "qemu-img", *argv, self._path(number), str(self._size_bytes))

    def renew(self, way: str) -> None:
        """Make the head an empty overlay again."""
        self.head.unlink(missing_ok=True)
        self._overlay(self._depth - 1)
        if way == "length set ahead":
            os.truncate(self.head, self._size_bytes + self._size_bytes // 1024 + 4 * MIB)

    def nodes(self, way: str) -> Iterator[dict[str, object]]:
        """Give the block nodes, as host/qsd opens them."""
        for number in range(self._depth):
            is_head = number == self._depth - 1
            file: dict[str, object] = {
                "driver": "file",
                "node-name": f"file{number}",
                "filename": str(self._path(number)),
                "aio": "native" if is_head else "threads",
                "cache": {"direct": True},
                "discard": "unmap",
                "locking": "on",
            }
            yield file if is_head else file | {"auto-read-only": True}
            below = f"file{number}"
            if is_head and way == "preallocate filter":
                below = "filter"
                yield {"driver": "preallocate", "node-name": below, "file": f"file{number}"}
            yield {
                "driver": "qcow2",
                "node-name": f"layer{number}",
                "file": below,
                "read-only": not is_head,
                "cache": {"direct": True},
                "discard": "unmap",
                "backing": f"layer{number - 1}" if number else None,
            }

    @contextmanager
    def served(self, way: str, export: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Run a storage daemon that shows the head as the file `export`."""
        export.touch()
        argv: list[str | Path] = [QEMU_DIR / "qemu-storage-daemon", "--object", "iothread,id=io"]
        for node in self.nodes(way):
            argv += ["--blockdev", json.dumps(node)]
        top = f"layer{self._depth - 1}"
        argv += [
            "--export",
            f"fuse,id=export,node-name={top},mountpoint={export},writable=on,iothread=io,allow-other=off",
        ]
        daemon = subprocess.Popen([str(part) for part in argv])
        try:
            wait_for("the export", lambda: export.stat().st_size == self._size_bytes or daemon.poll() is not None)
            if daemon.poll() is not None:
                raise RuntimeError("the storage daemon has ended")
            yield daemon
        finally:
            if daemon.poll() is None:
                daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(60)
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait(10)

    def result(self, per_s: float) -> Result:
        """Give what a run has left."""
        found = self.head.stat()
        return Result(per_s, found.st_blocks * 512, found.st_size)

    def check(self) -> None:
        """Check that the head is a clean image.

        Raises:
            RuntimeError: it is not.
        """
        run(QEMU_DIR / "qemu-img", "check", "-q", "-f", "qcow2", self.head)


def fio(export: Path, size_bytes: int, writes: int) -> float:
    """Write at random; gives how many writes were done in a second."""
    done = run(
        "fio",
        "--name=eof",
        f"--filename={export}",
        f"--size={size_bytes}",
        "--rw=randwrite",
        f"--bs={BLOCK_BYTES}",
        f"--iodepth={QUEUE_DEPTH}",
        "--ioengine=libaio",
        "--direct=1",
        "--randseed=5",
        f"--number_ios={writes}",
        "--allow_file_create=0",
        "--fallocate=none",
        "--end_fsync=1",
        "--output-format=json",
        timeout_s=300,
    )
    found = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(writes / (found["job_runtime"] / 1000))


def changes_of_length(trace: Path, length_bytes: int) -> tuple[int, int]:
    """Count in a trace the requests that make the file longer; gives that, and the number of writes."""
    longer = writes = 0

    def see(end_bytes: int) -> None:
        nonlocal longer, length_bytes
        if end_bytes > length_bytes:
            longer, length_bytes = longer + 1, end_bytes

    for line in trace.read_text(errors="replace").splitlines():
        if "io_submit(" in line:
            for part in line.split("aio_lio_opcode=")[1:]:
                if part.startswith("IOCB_CMD_PWRITE"):
                    writes += 1
                    offset = re.search(r"aio_offset=(\d+)", part)
                    bytes_ = sum(map(int, VECTORS.findall(part))) or int(re.search(r"aio_nbytes=(\d+)", part)[1])  # type: ignore[index]
                    see((int(offset[1]) if offset else 0) + bytes_)
        elif found := PWRITE.search(line):
            writes += 1
            see(int(found[2]) + int(found[3]))
        elif found := TRUNCATE.search(line):
            see(int(found[1]))
        elif (found := FALLOCATE.search(line)) and found[4] == "0" and "KEEP_SIZE" not in found[1]:
            see(int(found[2]) + int(found[3]))
    return longer, writes


def traced(chain: Chain, way: str, export: Path, base: Path, size_bytes: int, writes: int) -> tuple[int, int]:
    """Run once more under strace and count; slow, so its time does not count."""
    chain.renew(way)
    trace = base / "trace"
    with chain.served(way, export) as daemon:
        length_bytes = chain.head.stat().st_size
        calls = "trace=io_submit,pwrite64,pwritev,pwritev2,ftruncate,fallocate"
        argv = ["strace", "-f", "-v", "-s", "1", "-e", calls, "-o", str(trace), "-p", str(daemon.pid)]
        tracer = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        try:
            wait_for("strace", trace.exists)
            time.sleep(0.5)  # it attaches to one thread after the other and does not say when it is done
            fio(export, size_bytes, writes)
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(10)
    return changes_of_length(trace, length_bytes)


def killed(chain: Chain, way: str, export: Path, size_bytes: int, writes: int) -> tuple[Result, str]:
    """Kill the daemon after a run, and say what it leaves."""
    chain.renew(way)
    with chain.served(way, export) as daemon:
        per_s = fio(export, size_bytes, writes)
        daemon.kill()
        daemon.wait(10)
    run("umount", "-l", export, check=False)
    done = run(QEMU_DIR / "qemu-img", "check", "-f", "qcow2", chain.head, check=False)
    return chain.result(per_s), done.stdout.strip().splitlines()[0] if done.stdout else done.stderr.strip()


def measure(base: Path, pool: Path | None, depth: int, writes: int, rounds: int, say: Callable[[str], None]) -> Table:
    """Measure with volumes of 1 GiB in an empty directory: `pool`, or one on the stand-in below `base`."""
    size_bytes = GIB
    table = Table(box=None, pad_edge=False)
    for heading in ("", "OPS/S", "MB/S", "RATIO", "LONGER / WRITES", "LENGTH", "ALLOCATED", "AFTER kill -9"):
        table.add_column(heading, no_wrap=True)
    standin = None if pool else StandIn(base / "dir", base / "pool")
    try:
        chain = Chain(pool or base / "pool", depth, size_bytes)
        export = base / "export"
        found: dict[str, list[Result]] = {way: [] for way in WAYS}
        for number in range(rounds + 1):
            for way in WAYS[number % 3 :] + WAYS[: number % 3]:
                say(f"round {number}: {way}")
                chain.renew(way)
                with chain.served(way, export):
                    per_s = fio(export, size_bytes, writes)
                chain.check()
                if number:  # the first round is not counted
                    found[way].append(chain.result(per_s))
        plain = statistics.median(result.per_s for result in found[WAYS[0]])
        for way, results in found.items():
            say(f"tracing and killing: {way}")
            longer, seen = traced(chain, way, export, base, size_bytes, min(writes, 1000))
            left, verdict = killed(chain, way, export, size_bytes, writes)
            per_s = statistics.median(result.per_s for result in results)
            table.add_row(
                way,
                f"{per_s:.0f}",
                f"{per_s * BLOCK_BYTES / 1e6:.1f}",
                f"{per_s / plain:.2f}",
                f"{longer} / {seen}",
                f"{results[-1].length_bytes / MIB:.0f} MiB",
                f"{results[-1].allocated_bytes / MIB:.0f} MiB",
                f"{left.length_bytes / MIB:.0f} MiB, {left.allocated_bytes / MIB:.0f} allocated; {verdict}",
            )
    finally:
        if standin:
            standin.unmount()
    return table


def end(number: int, _frame: object) -> NoReturn:
    """Signal handler: leave by an exception, so that everything is taken down."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description="Compare ways to keep writes inside the file, over the stand-in.")
    parser.add_argument("--depth", type=int, default=16, help="layers in the chain (%(default)s)")
    parser.add_argument("--writes", type=int, default=4000, help="random writes of 64 KiB in a run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way (%(default)s)")
    parser.add_argument("--directory", help="where to measure instead of the stand-in: a mounted volume, a local disk")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        click.echo("this mounts file systems and so must run as root", err=True)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    base = Path(tempfile.mkdtemp(prefix="cq-"))
    pool = Path(tempfile.mkdtemp(prefix="cq-", dir=arguments.directory)) if arguments.directory else None
    try:
        table = measure(
            base,
            pool,
            arguments.depth,
            arguments.writes,
            arguments.rounds,
            lambda text: click.echo(text, err=True),
        )
        Console(highlight=False, width=200).print(table)
        click.echo(", ".join(f"{name} {value}" for name, value in environment(pool or base).items()))
        return 0
    finally:
        shutil.rmtree(base, ignore_errors=True)
        if pool:
            shutil.rmtree(pool, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
