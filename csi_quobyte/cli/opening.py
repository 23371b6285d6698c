"""Opening pools for the commands that look at them."""

from collections.abc import Sequence

from csi_quobyte.cli.options import parse_pools
from csi_quobyte.config import check_pools
from csi_quobyte.pool.mount import RequireMount
from csi_quobyte.pool.pools import Pool
from csi_quobyte.pool.store import Store

TIMEOUT_S = 30.0


def open_pools(texts: Sequence[str], require_mount: RequireMount) -> list[tuple[Pool, Store]]:
    """Open the pools of --pool options.

    Raises:
        InvalidArgument: the options are wrong.
        Unavailable: a pool is not mounted, or does not answer within 30 s.
    """
    specs = parse_pools(texts)
    check_pools(specs)
    pools = [Pool(spec, require_mount=require_mount, timeout_s=TIMEOUT_S) for spec in specs]
    return [(pool, pool.run(lambda store: store)) for pool in pools]
