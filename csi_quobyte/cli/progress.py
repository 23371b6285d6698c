"""How far a long command is: a bar on a terminal, JSON lines otherwise. Ctrl-C and SIGTERM end it in order.

In order means at the next question to the watch. An exception out of a signal handler may come anywhere, as between the
start of a child and the line that would end it; measured: then `qemu-img create` made the file that was just removed.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

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
    """Give the watch of a job that shows how far it is, and stops it after a signal; a second one ends it at once.

    Raises:
        KeyboardInterrupt: it was stopped by a signal.
    """
    interrupted = False

    def interrupt(_: int, __: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with _drawn(what) as draw:

            def watch(progress: jobs.Progress) -> jobs.Answer:
                draw(progress)
                return "stop" if interrupted else "go on"

            yield watch
    except jobs.Stopped as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise


@contextmanager
def _drawn(what: str) -> Iterator[Callable[[jobs.Progress], None]]:
    if sys.stderr.isatty() and sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)

            def draw(progress: jobs.Progress) -> None:
                bar.update(task, completed=progress.current_bytes, total=progress.total_bytes or None)

            yield draw
        return
    printed_at = 0.0

    def print_line(progress: jobs.Progress) -> None:
        nonlocal printed_at
        if time.monotonic() - printed_at >= _LINE_EVERY_S:
            printed_at = time.monotonic()
            print_event("progress", current_bytes=progress.current_bytes, total_bytes=progress.total_bytes)

    yield print_line
