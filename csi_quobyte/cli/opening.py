"""Opening pools for the commands that look at them."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from csi_quobyte.cli.options import parse_pools
from csi_quobyte.config import check_pools
from csi_quobyte.errors import DriverError
from csi_quobyte.pool.mount import RequireMount
from csi_quobyte.pool.pools import Pool
from csi_quobyte.pool.store import Store

TIMEOUT_S = 30.0


@contextmanager
def open_pools(texts: Sequence[str], require_mount: RequireMount) -> Iterator[list[tuple[Pool, Store]]]:
    """Open the pools of --pool options; after the block, exit with 2 if one of them could not be opened.

    One bad pool does not hide the others: it is named on standard error.

    Raises:
        InvalidArgument: the options are wrong.
    """
    specs = parse_pools(texts)
    check_pools(specs)
    opened = []
    for spec in specs:
        pool = Pool(spec, require_mount=require_mount, timeout_s=TIMEOUT_S)
        try:
            opened.append((pool, pool.run(lambda store: store)))
        except DriverError as error:
            click.echo(f"csi-quobyte: {error}", err=True)
    yield opened
    if len(opened) < len(specs):
        sys.exit(2)
