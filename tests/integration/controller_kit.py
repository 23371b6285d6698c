"""What a controller does on one pool, without gRPC, and how a test looks at what that has left.

Owns: requests with sensible defaults, writing and reading disks through the recorded chain with the real qemu-io, and
the two questions that end most tests: does `check` find anything, and is the pool as it was when it was new.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest

from csi_quobyte.engine import check as check_module
from csi_quobyte.engine import collector, copying, index, layers, merging, trash
from csi_quobyte.engine.merger import end_begun, work_in
from csi_quobyte.errors import Busy
from csi_quobyte.host import qemu, qemu_img
from csi_quobyte.operations import golden, snapshots, volumes
from csi_quobyte.operations.capacity import Provisioned
from csi_quobyte.operations.snapshots import SnapshotRequest
from csi_quobyte.operations.volumes import AttachRequest, CreateRequest
from csi_quobyte.pool import images, presence, records
from csi_quobyte.pool import store as store_module
from csi_quobyte.pool.chain import chain_of
from csi_quobyte.pool.presence import Presence
from csi_quobyte.pool.records import (
    Attachment,
    LayerRecord,
    LayerState,
    NodeRecord,
    SnapshotRecord,
    Source,
    VolumeRecord,
    VolumeState,
    parse_marker,
)
from csi_quobyte.pool.sizes import MIB, SizeRange
from csi_quobyte.pool.store import Store

QEMU_DIR = os.environ.get("CSI_QUOBYTE_QEMU_DIR", "/var/cache/csi-quobyte/qemu/bin")
OWNER = records.Owner(uid=os.geteuid(), gid=os.getegid())
NODE = "node-1"
SIZE_BYTES = 4 * MIB
BLOCK_BYTES = 64 * 1024
_QEMU_IO_TIMEOUT_S = 20

# No test of this process detaches a volume from a node that is lost; test_merging has one that says it does.
merging.GRACE_S = 0.0
layers.FENCE_S = 0.0
# Nor do its stores have caches between them; test_merging_late has one that does.
merging.SETTLE_S = collector.SETTLE_S = 0.0

# a file's kind and size, a directory's children do not count
Tree = dict[str, str]


@cache
def tools() -> qemu.QemuTools:
    """The QEMU that the tests use; looked for once, because it is asked for its version."""
    return qemu.find_tools(QEMU_DIR)


def tree(root: str | Path) -> Tree:
    """Everything in a pool except what no operation owns: the reserve and the nodes' records."""
    found: Tree = {}
    for directory, names, files in os.walk(root):
        if directory == str(root):
            names[:] = [name for name in names if name not in {"reserve", "nodes"}]
        for name in (*names, *files):
            path = Path(directory, name)
            found[str(path.relative_to(root))] = "directory" if path.is_dir() else f"{path.stat().st_size} bytes"
    return found


def disagreements(store: Store) -> Iterator[tuple[str, str, str]]:
    """Give (layer id, marker, rule) where a rule does not see what a finished record needs by `check.needed`.

    Who drops layers and removes markers goes by these rules, each for its own moment; for a quiet pool they are one.
    """
    found, names = index.read(store), index.read_names(store)
    for layer_id, text, _ in check_module.needed(found):
        marker = parse_marker(text)
        assert marker, text
        rules = {
            "Index.needs": found.needs(layer_id, marker),
            "Index.named_layers": layer_id in found.named_layers,
            "read_names": layer_id in names.named,
            "is_needed_now": index.is_needed_now(store, layer_id, marker),
        }
        yield from ((layer_id, text, rule) for rule, sees in rules.items() if not sees)


def new_request(name: str, **changes: object) -> CreateRequest:
    """A CreateVolume request for 4 MiB of qcow2 with ext4, with the given fields changed."""
    plain = CreateRequest(
        name=name,
        size=SizeRange(SIZE_BYTES),
        image_format="qcow2",
        preallocation="off",
        data_path="auto",
        access_type="mount",
        filesystem="ext4",
        mkfs_options=(),
        source=None,
        kubernetes={},
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def read_disk(store: Store, layer_id: str) -> str:
    """The json: name of what a layer shows through its recorded chain, for reading."""
    chain = chain_of(layer_id, store.find_layer)
    layers = [qemu.ImageLayer(layer.id, store.image_path(layer), layer.format) for layer in reversed(chain)]
    return qemu_img.chain_json(layers)


def write_disk(store: Store, layer_id: str) -> str:
    """The json: name of a head for writing: every layer named by the records, the lower ones read-only."""
    node: dict[str, object] | None = None
    for layer in reversed(chain_of(layer_id, store.find_layer)):
        is_head = layer.id == layer_id
        file = {"driver": "file", "filename": store.image_path(layer), "read-only": not is_head}
        below = {"backing": node} if layer.format == "qcow2" else {}
        node = {"driver": layer.format, "file": file, "read-only": not is_head, **below}
    return "json:" + json.dumps(node)


def qemu_io(disk: str, *commands: str, read_only: bool) -> int:
    """Run qemu-io commands on a disk; 1 is its answer when a pattern is not what was read."""
    arguments = [argument for command in commands for argument in ("-c", command)]
    mode = ["-r"] if read_only else []
    done = subprocess.run(
        [f"{QEMU_DIR}/qemu-io", *mode, *arguments, disk],
        check=False,
        capture_output=True,
        text=True,
        timeout=_QEMU_IO_TIMEOUT_S,
    )
    if done.returncode and "Pattern verification failed" not in done.stdout:
        raise RuntimeError(f"qemu-io {commands} on {disk}: {done.stdout}{done.stderr}")
    return done.returncode


class _WithoutLocks(Presence):
    def is_held(self, token: str) -> bool:
        return token == self.token


class Elsewhere(Store):
    """The pool as another host has it mounted: no lock reaches there."""

    def __init__(self, root: str | Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(presence, "_place_of", lambda _: "another host")
            patch.setattr(store_module, "Presence", _WithoutLocks)
            super().__init__(str(root))


class CopiesAtOnce:
    """Makes copies in the calling thread: each durable step of one then is a step of the call."""

    def volume(self, store: Store, volume: VolumeRecord, release: Callable[[str | None], None]) -> VolumeRecord:
        made = copying.copy_volume(store, tools(), volume, lambda _: "go on")
        release(volume.parent)
        return made

    def cache(self, store: Store, snapshot_id: str) -> None:
        copying.fill_cache(store, tools(), snapshot_id, lambda _: "go on")

    def failure(self, _: str) -> None:
        return None

    def cancel(self, _: str) -> None:
        return


class CopiesNever(CopiesAtOnce):
    """Asked for a copy, it begins none, as a controller that dies then."""

    def volume(self, _: Store, volume: VolumeRecord, __: Callable[[str | None], None]) -> VolumeRecord:
        return volume


@dataclass
class Kit:
    """One controller on one store. Names are CSI names; `released` holds what the collector was told."""

    store: Store
    provisioned: Provisioned = field(default_factory=Provisioned)
    released: list[str | None] = field(default_factory=list)
    copies: copying.Copies = field(default_factory=lambda: CopiesAtOnce())

    # --- operations --------------------------------------------------------------------------------------------

    def volume_id(self, name: str) -> str:
        return records.volume_id(self.store.prefix, name)

    def snapshot_id(self, name: str) -> str:
        return records.snapshot_id(self.store.prefix, name)

    def from_volume(self, name: str) -> Source:
        return Source(kind="volume", id=self.volume_id(name))

    def from_snapshot(self, name: str) -> Source:
        return Source(kind="snapshot", id=self.snapshot_id(name))

    def create(self, name: str, **changes: object) -> VolumeRecord:
        """CreateVolume; a source without a size takes the source's."""
        if "source" in changes and "size" not in changes:
            changes["size"] = SizeRange()
        return volumes.create(
            self.store, new_request(name, **changes), self.provisioned, self.released.append, self.copies
        )

    def delete(self, name: str) -> None:
        volumes.delete(self.store, self.volume_id(name), self.provisioned, self.released.append, self.copies)

    def snapshot(self, name: str, of: str, **changes: object) -> SnapshotRecord:
        request = SnapshotRequest(name=name, source_volume=self.volume_id(of), kubernetes={})
        changed = replace(request, **changes)  # type: ignore[arg-type]
        return snapshots.create(self.store, changed, self.released.append)

    def delete_snapshot(self, name: str) -> None:
        snapshots.delete(self.store, self.snapshot_id(name), self.released.append)

    def image_id(self, name: str) -> str:
        return records.image_id(self.store.prefix, name)

    def image(self, name: str) -> records.ImageRecord:
        found = self.store.find_image(self.image_id(name))
        assert found is not None
        return found

    def import_image(self, name: str, path: str | Path, image_format: str = "qcow2") -> records.ImageRecord:
        request = golden.ImportRequest(name=name, format=image_format, path=str(path))  # type: ignore[arg-type]
        return golden.import_image(self.store, tools(), request, lambda _: "go on")

    def remove_image(self, name: str) -> None:
        golden.remove_image(self.store, name)

    # --- trash -------------------------------------------------------------------------------------------------

    def trashed(self, name: str) -> str:
        """The id of the one entry of the trash that was deleted under a CSI name."""
        found = [entry for entry in map(self.store.find_trashed, self.store.trash_ids()) if entry]
        (entry_id,) = [records.trash_id(entry) for entry in found if entry.name == name]
        return entry_id

    def restore(self, entry_id: str, name: str = "") -> records.Deletable:
        return trash.restore(self.store, entry_id, name)

    def purge(self, entry_id: str) -> None:
        self.released.append(trash.purge(self.store, entry_id))

    # --- nodes and sizes ---------------------------------------------------------------------------------------

    def add_node(self, node: str = NODE) -> None:
        self.store.put_node(NodeRecord(id=node, driver_version="test", started_at=records.now()))

    def attach(self, name: str, *, node: str = NODE, **changes: object) -> Attachment:
        request = AttachRequest(
            volume_id=self.volume_id(name),
            node=node,
            readonly=False,
            access_mode="SINGLE_NODE_WRITER",
            access_type="mount",
            filesystem="ext4",
        )
        return volumes.attach(self.store, replace(request, **changes))  # type: ignore[arg-type]

    def detach(self, name: str, *, node: str = NODE) -> None:
        volumes.detach(self.store, self.volume_id(name), node)

    def expand(self, name: str, size_bytes: int, *, limit_bytes: int = 0) -> VolumeRecord:
        wanted = SizeRange(size_bytes, limit_bytes)
        return volumes.expand(self.store, self.volume_id(name), wanted, self.provisioned)

    # --- merging -----------------------------------------------------------------------------------------------

    def plans(self) -> list[merging.Plan]:
        """The merges that the collector would do."""
        return collector.plans(self.store)

    def merge(
        self, plan: merging.Plan, may_go_on: merging.Ask = lambda: True, is_held: merging.Ask = lambda: True
    ) -> bool:
        return merging.merge(self.store, tools(), plan, is_held=is_held, may_go_on=may_go_on)

    def merge_all(self) -> list[str]:
        """Merge what can be merged, until nothing is left to merge or drop; gives the kinds."""
        done = []
        while found := self.plans():
            plan = found[0]
            assert self.merge(plan), f"what was planned for a quiet pool is not done: {plan}"
            done.append(plan.kind)
            self.sweep_until_quiet()
        return done

    def end_merges(self) -> bool:
        """Finish or undo what merges have begun or left, as the merger does; says whether that is done."""
        rest = end_begun(self.store, tools(), work_in(index.read(self.store), self.store), is_held=lambda: True)
        return not rest.begun and not rest.left

    # --- contents ----------------------------------------------------------------------------------------------

    def write(self, name: str, pattern: int, *, block: int = 0) -> None:
        """Fill one block of a detached volume with a byte."""
        disk = write_disk(self.store, self.store.volume(self.volume_id(name)).head)
        qemu_io(disk, f"write -P {pattern} {block * BLOCK_BYTES} {BLOCK_BYTES}", read_only=False)

    def layer_holds(self, layer_id: str, *patterns: int) -> bool:
        """Say whether the first blocks of what a layer shows are filled with these bytes."""
        commands = [f"read -P {byte} {block * BLOCK_BYTES} {BLOCK_BYTES}" for block, byte in enumerate(patterns)]
        return qemu_io(read_disk(self.store, layer_id), *commands, read_only=True) == 0

    def holds(self, name: str, *patterns: int) -> bool:
        return self.layer_holds(self.store.volume(self.volume_id(name)).head, *patterns)

    def snapshot_holds(self, name: str, *patterns: int) -> bool:
        return self.layer_holds(self.store.snapshot(self.snapshot_id(name)).layer, *patterns)

    def grow_image(self, name: str) -> None:
        """Do what the node does at the next stage after an expansion: the head's image gets the record's size."""
        volume = self.store.volume(self.volume_id(name))
        head = self.store.layer(volume.head)
        argv = [f"{QEMU_DIR}/qemu-img", "resize", "-q", "-f", head.format, self.store.image_path(head)]
        subprocess.run([*argv, str(volume.size_bytes)], check=True, timeout=_QEMU_IO_TIMEOUT_S, capture_output=True)

    def chain(self, name: str) -> tuple[LayerRecord, ...]:
        return chain_of(self.store.volume(self.volume_id(name)).head, self.store.find_layer)

    # --- looking -----------------------------------------------------------------------------------------------

    def check(self) -> list[check_module.Finding]:
        """All findings of `check`, with the real qemu-img looking into every image; a pool without any is also asked
        whether all rules of what needs a layer say the same.
        """
        findings = check_module.check(self.store, self.check_image).findings
        if not findings:
            assert list(disagreements(self.store)) == []
        return findings

    def check_image(self, path: str, image_format: str) -> tuple[int, int]:
        """Look into an image with the real qemu-img; gives errors and leaked clusters."""
        result = qemu_img.check(tools(), path, "raw" if image_format == "raw" else "qcow2")
        return result.errors + result.corruptions, result.leaks

    def _check_outside(self) -> list[check_module.Finding]:
        return check_module.check(self.store, lambda *_: (0, 0)).findings

    def findings(self) -> set[str]:
        """The kinds of what `check` finds, without looking into the images."""
        return {finding.kind for finding in self._check_outside()}

    def errors(self) -> list[check_module.Finding]:
        """The findings that are damage, without looking into the images."""
        return [finding for finding in self._check_outside() if finding.severity == "error"]

    def sweep_until_quiet(self, timeout_s: float = 10.0) -> None:
        """Collect until a pass does nothing and nothing is left that a pass may still have to wait for."""
        deadline = time.monotonic() + timeout_s
        with suppress(Busy):  # what a crash has left is met by the collector first, then by the merger
            collector.sweep(self.store)
        while True:
            try:
                done = self.end_merges()
                if not collector.sweep(self.store) and done and "stale-claim" not in self.findings():
                    return
            except Busy:
                pass
            assert time.monotonic() < deadline, f"the collector does not come to rest: {self.findings()}"

    def delete_everything(self, timeout_s: float = 10.0) -> None:
        """Delete all objects through the operations, empty the trash, and let the collector end."""
        deadline = time.monotonic() + timeout_s
        while ids := [
            *self.store.volume_ids(),
            *self.store.snapshot_ids(),
            *self.store.image_ids(),
            *self.store.trash_ids(),
        ]:
            for record_id in ids:
                try:
                    self._delete_id(record_id)
                except Busy:
                    assert time.monotonic() < deadline, f"{record_id} cannot be deleted"
        self.sweep_until_quiet()

    def _delete_id(self, record_id: str) -> None:
        if records.parse_trash_id(record_id):
            if entry := self.store.find_trashed(record_id):
                trash.go_on_restoring(self.store, record_id)
                if self.store.find_trashed(record_id) == entry:
                    self.purge(record_id)
            return
        if "-img-" in record_id:
            if image := self.store.find_image(record_id):
                golden.remove_image(self.store, image.name)
            return
        if "-snap-" in record_id:
            snapshots.delete(self.store, record_id, self.released.append)
            return
        volumes.detach(self.store, record_id, "")
        volumes.delete(self.store, record_id, self.provisioned, self.released.append, self.copies)

    def consistency(self) -> None:
        """Assert what must hold of every finished object, whatever happened before."""
        for volume_id in self.store.volume_ids():
            volume = self.store.volume(volume_id)
            if volume.state is not VolumeState.READY:
                continue
            chain = chain_of(volume.head, self.store.find_layer)
            assert all(layer.state is LayerState.FROZEN for layer in chain[1:]), f"{volume_id}: {chain}"
            head_bytes = images.virtual_size_bytes(self.store, chain[0])
            assert head_bytes <= volume.size_bytes, f"the image of {volume_id} is larger than its record says"
