"""How far a long command is: a bar on a terminal, JSON lines otherwise. Ctrl-C and SIGTERM end it in order."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from csi_quobyte.host import jobs
from csi_quobyte.pool.records import FORMAT

_LINE_EVERY_S = 1.0


def print_event(event: str, **fields: Any) -> None:
    """Print what has happened as a line of JSON, where standard output is no terminal."""
    click.echo(json.dumps({"format": FORMAT, "event": event, **fields}))


@contextmanager
def shown(what: str) -> Iterator[jobs.Watch]:
    """Give the watch of a job that shows how far it is."""
    signal.signal(signal.SIGTERM, _end)
    if sys.stderr.isatty() and sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)

            def draw(progress: jobs.Progress) -> jobs.Answer:
                bar.update(task, completed=progress.current_bytes, total=progress.total_bytes or None)
                return "go on"

            yield draw
        return
    printed_at = 0.0

    def print_line(progress: jobs.Progress) -> jobs.Answer:
        nonlocal printed_at
        if time.monotonic() - printed_at >= _LINE_EVERY_S:
            printed_at = time.monotonic()
            print_event("progress", current_bytes=progress.current_bytes, total_bytes=progress.total_bytes)
        return "go on"

    yield print_line


def _end(_: int, __: FrameType | None) -> NoReturn:
    """End as after Ctrl-C: what was begun is taken away on the way out."""
    raise KeyboardInterrupt
