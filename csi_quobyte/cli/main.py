"""The command csi-quobyte.

Exit status: 0 fine, 1 findings or refused, 2 wrong use, wrong configuration or not able to run.
"""

import os
import sys
from contextlib import suppress

import click

from csi_quobyte import __version__
from csi_quobyte.cli import check, doctor, export, gc, image, pool, serve, show, trash
from csi_quobyte.errors import AlreadyExists, Busy, DriverError, NotFound, Refused

_REFUSED = (Refused, NotFound, AlreadyExists, Busy)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def cli() -> None:
    """Disks for Kubernetes pods, kept as image files on mounted Quobyte volumes."""


for command in (
    serve.controller,
    serve.node,
    pool.pool,
    check.check,
    gc.gc,
    show.ls,
    show.show,
    show.tree,
    trash.trash,
    doctor.doctor,
    image.image,
    export.export,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line and end the process; an expected failure is one line on standard error, no traceback."""
    try:
        cli(prog_name="csi-quobyte")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except DriverError as error:
        click.echo(f"csi-quobyte: {error}", err=True)
        status = 1 if isinstance(error, _REFUSED) else 2
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    # a thread that was abandoned in a hung pool would keep the interpreter from ending
    os._exit(status)
