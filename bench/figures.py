"""Figures of a benchmark: samples, ratios of medians, and how they are shown. Beside it: what was measured on."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lab.machine import QEMU_DIR, run

MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One line of the table: samples in milliseconds, or a rate, or an amount of memory; the others are empty."""

    group: str
    what: str
    samples_ms: tuple[float, ...] = ()
    memory_bytes: int = 0
    per_s: float = 0.0
    ratio: float | None = None
    ratio_to: str = ""
    wanted: str = ""

    @property
    def median_ms(self) -> float:
        """The middle one of the samples."""
        return statistics.median(self.samples_ms)

    @property
    def p95_ms(self) -> float:
        """What 95 of 100 samples are not above; the largest one when there are fewer than 20."""
        return sorted(self.samples_ms)[min(len(self.samples_ms) - 1, int(len(self.samples_ms) * 0.95))]


def timed_ms(work: Callable[[], object]) -> float:
    """Do `work` once and give the milliseconds that it took."""
    begun_ns = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - begun_ns) / 1e6


def ratio(measured: Sequence[float], base: Sequence[float]) -> float:
    """Give the ratio of two medians."""
    return statistics.median(measured) / statistics.median(base)


def environment(base: Path) -> dict[str, str | int]:
    """Describe what was measured on; no names of the machine."""
    done = run("findmnt", "--noheadings", "--output", "FSTYPE", "--target", base)
    version = run(QEMU_DIR / "qemu-img", "--version").stdout.splitlines()[0].split()[2]
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "kernel": platform.release(),
        "cpus": os.cpu_count() or 0,
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "qemu": version,
        "file_system": done.stdout.strip(),
    }


def as_table(rows: Sequence[Row]) -> Table:
    """Lay the rows out for people."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "MEDIAN", "P95", "N", "RATIO", "WANTED"):
        table.add_column(heading, justify="left" if heading in ("", "RATIO", "WANTED") else "right", no_wrap=True)
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            table.add_row()
            table.add_row(Text(group, "bold"))
        if row.samples_ms:
            figures = (f"{row.median_ms:.2f} ms", f"{row.p95_ms:.2f} ms", str(len(row.samples_ms)))
        elif row.per_s:
            figures = (f"{row.per_s:.0f} / s", "", "")
        else:
            figures = (f"{row.memory_bytes / MIB:.1f} MiB", "", "")
        compared = f"{row.ratio:.2f} × {row.ratio_to}" if row.ratio is not None else ""
        table.add_row(*(Text(cell) for cell in (f"  {row.what}", *figures, compared, row.wanted)))
    return table


def as_objects(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Lay the rows out for programs."""
    return [
        {
            "group": row.group,
            "what": row.what,
            "median_ms": round(row.median_ms, 3) if row.samples_ms else None,
            "p95_ms": round(row.p95_ms, 3) if row.samples_ms else None,
            "n": len(row.samples_ms),
            "per_s": round(row.per_s, 2) or None,
            "memory_bytes": row.memory_bytes or None,
            "ratio": round(row.ratio, 3) if row.ratio is not None else None,
            "ratio_to": row.ratio_to,
            "wanted": row.wanted,
        }
        for row in rows
    ]


def show(rows: Sequence[Row], described: Mapping[str, str | int], *, as_json: bool) -> None:
    """Print everything: one JSON object, or the table, as wide as its terminal or wide enough for any row."""
    if as_json:
        click.echo(json.dumps({"environment": described, "rows": as_objects(rows)}, indent=1))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 190)
    console.print(as_table(rows))
    console.print("\n" + ", ".join(f"{name} {value}" for name, value in described.items()), soft_wrap=True)
    console.print("Ratios compare inside this run only; bench/README.md says how each figure is taken.", soft_wrap=True)
