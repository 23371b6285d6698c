#!/usr/bin/env python3
"""Fills a pool with many volumes and snapshots, quickly: bench/scale.py starts it, in several processes.

It makes them with the driver's own operations, so that they are what the driver makes; only nothing is made durable
while it does so. A pool filled by this is for measuring, and is thrown away.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "deploy")]  # the script is started by its path, from a tree that is not installed

from csi_quobyte.engine.copying import Copier  # noqa: E402
from csi_quobyte.host.qemu import find_tools  # noqa: E402
from csi_quobyte.operations import snapshots, volumes  # noqa: E402
from csi_quobyte.operations.capacity import Provisioned  # noqa: E402
from csi_quobyte.operations.snapshots import SnapshotRequest  # noqa: E402
from csi_quobyte.operations.volumes import CreateRequest  # noqa: E402
from csi_quobyte.pool.records import Content  # noqa: E402
from csi_quobyte.pool.sizes import SizeRange  # noqa: E402
from csi_quobyte.pool.steps import Steps  # noqa: E402
from csi_quobyte.pool.store import Store  # noqa: E402
from lab.machine import QEMU_DIR  # noqa: E402

SIZE_BYTES = 1 << 20


class Nothing(Provisioned):
    """Takes every volume: the pool that is filled need not have the space."""

    def total_bytes(self, store: Store) -> int:  # noqa: ARG002
        """Say that nothing is provisioned yet."""
        return 0


def forget_syncing() -> None:
    """Make this process sync nothing any more."""

    def no_fsync(fd: int) -> None:
        pass

    def no_sync(self: Steps, directory: str) -> None:
        pass

    def no_sync_all(self: Steps, paths: Sequence[str]) -> None:
        pass

    os.fsync = no_fsync  # type: ignore[assignment]
    Steps.sync = no_sync  # type: ignore[method-assign]
    Steps.sync_all = no_sync_all  # type: ignore[method-assign]


def fill(store: Store, numbers: range, snapshot_every: int) -> None:
    """Make the volumes of these numbers, and a snapshot of every so many of them."""
    provisioned, copier = Nothing(), Copier(find_tools(str(QEMU_DIR)), "filling")  # there is nothing to copy
    for number in numbers:
        request = CreateRequest(
            name=f"pvc-{number:08x}-0000-4000-8000-000000000000",
            size=SizeRange(required_bytes=SIZE_BYTES),
            image_format="qcow2",
            preallocation="off",
            data_path="auto",
            access_type="block",
            filesystem="",
            mkfs_options=(),
            source=None,
            kubernetes={"pvc": f"data-{number}", "namespace": "default", "pv": f"pvc-{number:08x}"},
        )
        made = volumes.create(store, request, provisioned, lambda _: None, copier)
        store.put_content(made, Content(state="raw", generation=1))  # as one that was used once
        if snapshot_every and number % snapshot_every == 0:
            wanted = SnapshotRequest(name=f"snapshot-{number:08x}", source_volume=made.id, kubernetes={})
            snapshots.create(store, wanted, lambda _: None)


def main() -> int:
    """Fill."""
    parser = argparse.ArgumentParser(description="Fill a pool with volumes, without making anything durable.")
    parser.add_argument("pool", help="a directory that is a pool")
    parser.add_argument("first", type=int, help="number of the first volume")
    parser.add_argument("end", type=int, help="number after the last one")
    parser.add_argument("snapshot_every", type=int, help="a snapshot of every so many; 0: none")
    arguments = parser.parse_args()
    forget_syncing()
    store = Store(arguments.pool)
    try:
        fill(store, range(arguments.first, arguments.end), arguments.snapshot_every)
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
