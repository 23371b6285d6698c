"""Random histories of calls against a plain model of names, sizes and contents: real servicers on a real directory.

Steps: create, clone, restore, copy, snapshot, delete, expand, attach, detach, write, list, restart, collect, merge; the
trash: delete into it, restore, purge, let the time pass; golden images: import, volumes from them, remove. Copies
(`cloneMode: copy` and `cache`) go on in threads of the controller while other calls are made, or are waited for. Every
changing call may be killed with SIGKILL before one of its durable steps, a copy also at any moment, and is then made
again or left as it is; the collector is killed at steps and in the middle of its jobs. Names are used again. Whole
disks are compared, byte for byte. At the end of each history everything that the model knows is there, also in the
trash, `check` finds nothing, and when all is deleted the pool is as new.

`make soak` makes 500 histories with one controller and 500 with two: two mounts of the directory, whose locks do
not reach each other, with a controller on each.
"""

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from controller_kit import BLOCK_BYTES, NODE, OWNER, Tree, tree
from dice import between, fraction, one_of, run_history, step
from history_model import Disk, Kept, Model, Wish, shows
from servicer_kit import COLLECT, COLLECT_LATER, IMPORT, LATER, PURGE, REMOVE_IMAGE, RESTORE, Servicer, as_line
from test_crash_merges import wait_for_the_daemons_end
from test_crash_steps import Runner, is_noticed

from csi_quobyte.engine import trash
from csi_quobyte.errors import AlreadyExists, Busy, NotFound, Refused, Unavailable
from csi_quobyte.operations import golden
from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pool import images, layout, records
from csi_quobyte.pool.sizes import MIB
from csi_quobyte.pool.store import Store
from lab.client import block_capability

SEED = int(os.environ.get("CSI_QUOBYTE_SEED", "0")) or random.SystemRandom().randrange(1 << 31)
HISTORIES = int(os.environ.get("CSI_QUOBYTE_HISTORIES", "3"))
FURTHER = 1_000_003  # from the seed of one history to the next one's: runs of near seeds have no history in common
STEPS = int(os.environ.get("CSI_QUOBYTE_HISTORY_STEPS", "30"))

VOLUMES = one_of("v1", "v2", "v3", "v4")
SNAPSHOTS = one_of("s1", "s2", "s3")
IMAGES = one_of("i1", "i2")
FORMATS = one_of("qcow2", "qcow2", "raw")
CLONE_MODES = one_of("overlay", "copy", "cache")
ON_DELETE = one_of("delete", "trash", "retain")
SIZE_BYTES = 4 * MIB
MAXIMUM_BYTES = 16 * MIB
QUIET_S = 20.0
IN_BACKGROUND_S = 0.0
BLOCKS = SIZE_BYTES // BLOCK_BYTES
SLOTS = (0, 1, 2, BLOCKS // 2, BLOCKS - 1)
"""The blocks that are written, and the last one of the volume."""
FILES: tuple[dict[int, int], ...] = ({0: 201, BLOCKS - 1: 202}, {1: 203})
"""What the files hold that images are imported from."""

Kill = int | float | None
"""Before which durable step a call is killed, or after how many seconds; None: it is not."""
KILL_AT = one_of(None, None, between(1, 12), between(1, 40))
KILL_COPY = one_of(None, KILL_AT, fraction(0.15))
LEFT = one_of(False, False, True)
"""Whether a call that is killed, or answered ABORTED, is left so."""
AT = between(0, 1)
CHOICE = between(0, 59)
"""One of what there is then."""


@dataclass
class Tally:
    """What a run did, for its last line; `left` are copies that went on beside other calls."""

    histories: int = 0
    kills: int = 0
    left: int = 0
    calls: Counter[str] = field(default_factory=Counter)


class Histories:
    """Each step makes one call and does the same to the model, and compares the answers."""

    controllers = 1

    def __init__(self, runner: Runner, tally: Tally) -> None:
        self.runner = runner
        self.tally = tally
        memory = Path("/dev/shm")
        self.base = Path(tempfile.mkdtemp(prefix="csi-quobyte-test-", dir=memory if memory.is_dir() else None))
        root = self.base / "pool"
        root.mkdir()
        layout.initialise(str(root), owner=OWNER, modes=records.Modes())
        self.as_new: Tree = tree(root)
        self.roots = [root]
        if self.controllers == 2:
            self.roots.append(self._second_mount(root))
        self.servicers = [self._servicer(at) for at in range(self.controllers)]
        self.kit = self.servicers[0].kit
        self.kit.add_node()
        self.model = Model()
        self.tally.histories += 1
        # most steps need something to work on
        self._create(0, "v1", Wish())
        self.write(0, 0)
        self._snapshot(0, "s1", Wish("v1", on_delete="trash"))

    def _servicer(self, at: int) -> Servicer:
        return Servicer(str(self.roots[at]), in_background_s=IN_BACKGROUND_S)

    def _second_mount(self, root: Path) -> Path:
        """Mount the pool a second time, with a lock file of its own: locks do not reach from one to the other."""
        second, lock = self.base / "second", self.base / "lock"
        second.mkdir()
        lock.touch()
        _mount("--bind", root, second)
        _mount("--bind", lock, second / "lock")
        return second

    # --- calls -------------------------------------------------------------------------------------------------

    def _call(self, at: int, method: str, request: Any, *, kill: Kill = None) -> Any:
        """Make a call, which is killed first and made again if that is wanted."""
        self.tally.calls[method] += 1
        at %= self.controllers
        if kill is not None:
            self._kill(at, as_line(method, request), kill)
        return self.servicers[at].eventually(method, request, meanwhile=self._end_merges)

    def _end_merges(self) -> None:
        """What the mergers of the controllers do beside the calls: end what a killed one has left."""
        for servicer in self.servicers:
            with suppress(Busy):  # the lease is a dead process's of the other mount
                servicer.collect(merges=False)

    def _kill(self, at: int, line: str, kill: Kill) -> None:
        steps, after_s = (0, kill) if isinstance(kill, float) else (kill or 0, None)
        self.tally.kills += self.runner.run(self.roots[at % self.controllers], line, steps, in_job_s=after_s)

    def _leave(self, at: int, method: str, request: Any, name: str, kill: Kill) -> None:
        """Kill a call and leave what it has done: from now on only the pool knows what there is of this name."""
        self.tally.calls[method] += 1
        self._kill(at, as_line(method, request), kill)
        self.model.leave(name)

    def _settle(self, *names: str) -> None:
        """End what was begun of these names: a restore, a copy; and delete what else a killed call has left of them."""
        for name in names:
            self._settle_restore(name)
            if name in self.model.unknown:
                self._delete(0, name)
                self._settled(name)
            if name in self.model.copying:
                self._create(0, name, self.model.copying[name].wish)

    def _settle_restore(self, name: str) -> None:
        if name in self.model.restoring:
            entry_id, kept = self.model.restoring.pop(name)
            self._call(0, RESTORE, [entry_id, name])
            self._restored(entry_id, name, kept)

    def _settled(self, name: str) -> None:
        """A name that was unknown is deleted, into the trash if a killed delete had said so before."""
        self.model.unknown.discard(name)
        if name in self.model.moving:
            entry_id, kept = self.model.moving.pop(name)
            self.model.trash[entry_id] = kept

    def _id(self, name: str) -> str:
        of_kind = {"v": self.kit.volume_id, "s": self.kit.snapshot_id, "i": self.kit.image_id}
        return of_kind[name[0]](name)

    def _record(self, name: str) -> Any:
        find = {"v": self.kit.store.volume, "s": self.kit.store.snapshot}
        return find[name[0]](self._id(name)) if name[0] in find else self.kit.image(name)

    # --- volumes -----------------------------------------------------------------------------------------------

    @step(4, at=AT, name=VOLUMES, image_format=FORMATS, on_delete=ON_DELETE, kill=KILL_AT, left=LEFT)
    def create(self, at: int, name: str, image_format: str, on_delete: str, kill: Kill, left: bool) -> None:
        self._settle_but_copies(name)
        self._create(at, name, Wish(image_format=image_format, on_delete=on_delete), kill, left=left)

    @step(
        10,
        at=AT,
        name=VOLUMES,
        source=one_of(VOLUMES, SNAPSHOTS, IMAGES),
        image_format=FORMATS,
        clone_mode=CLONE_MODES,
        on_delete=ON_DELETE,
        kill=KILL_COPY,
        left=one_of(False, True),
    )
    def create_from(
        self,
        at: int,
        name: str,
        source: str,
        image_format: str,
        clone_mode: str,
        on_delete: str,
        kill: Kill,
        left: bool,
    ) -> None:
        if name == source:
            return
        self._settle_but_copies(name)
        self._settle(source)
        image_format = image_format if clone_mode == "copy" else "qcow2"
        self._create(at, name, Wish(source, image_format, clone_mode, on_delete), kill, left=left)

    def _settle_but_copies(self, name: str) -> None:
        if name not in self.model.copying:
            self._settle(name)

    def _volume_request(self, name: str, wish: Wish) -> csi.CreateVolumeRequest:
        parameters = {"volumeFormat": wish.image_format, "cloneMode": wish.clone_mode, "onDelete": wish.on_delete}
        request = csi.CreateVolumeRequest(name=name, volume_capabilities=[block_capability()], parameters=parameters)
        match wish.source[:1]:
            case "s":
                request.volume_content_source.snapshot.snapshot_id = self._id(wish.source)
            case "v":
                request.volume_content_source.volume.volume_id = self._id(wish.source)
            case "i":
                request.parameters["sourceImage"] = wish.source
            case _:
                request.capacity_range.required_bytes = SIZE_BYTES
        return request

    def _create(self, at: int, name: str, wish: Wish, kill: Kill = None, *, left: bool = False) -> None:
        request = self._volume_request(name, wish)
        known = self.model.disks.get(name) or self.model.copying.get(name)
        if kill is not None and left and not known:
            self._leave(at, "CreateVolume", request, name, kill)
            return
        base = self.model.disks.get(wish.source) if wish.source else Disk(SIZE_BYTES, {})
        try:
            if left and kill is None:
                made = self.servicers[at % self.controllers].call("CreateVolume", request).volume
            else:
                made = self._call(at, "CreateVolume", request, kill=kill).volume
        except AlreadyExists:
            assert known
            assert known.wish != wish
        except NotFound:
            assert known is None
            assert base is None
        except Refused:
            assert known is None
            assert base
            assert base.is_attached
        except (Busy, Unavailable):
            assert left
            self._answered_busy(name, base.copy(wish) if base else None)
        else:
            if known is None:
                assert base
                assert not base.is_attached or wish.source[0] != "v"
                known = base.copy(wish)
            self.model.copying.pop(name, None)
            self.model.disks[name] = known
            assert known.wish == wish
            assert made.capacity_bytes == known.size_bytes

    def _answered_busy(self, name: str, promised: Disk | None) -> None:
        """A call is not made again: its copy goes on if the source is pinned, else there is nothing to rely on."""
        if name in self.model.disks or name in self.model.copying:
            return
        found = self.kit.store.find_volume(self._id(name))
        if found and promised and (found.pinned or not found.unfinished):
            self.tally.left += 1
            self.model.copying[name] = promised
        else:
            self.model.unknown.add(name)

    @step(8, at=AT, name=one_of(VOLUMES, VOLUMES, SNAPSHOTS, SNAPSHOTS, IMAGES), kill=KILL_AT, left=LEFT)
    def delete(self, at: int, name: str, kill: Kill, left: bool) -> None:
        self._settle_restore(name)
        known = self.model.disks.get(name)
        is_kept = known and known.wish.on_delete != "delete"
        entry_id = records.trash_id(self._record(name)) if is_kept else ""
        if kill is not None and left and not (known and known.is_attached):
            self._leave(at, *self._deletion(name), name, kill)
            if known and is_kept:
                self.model.moving[name] = (entry_id, Kept(name, known))
            return
        try:
            self._delete(at, name, kill)
        except Refused:
            assert known
            assert known.is_attached
        else:
            assert not (known and known.is_attached)
            self._settled(name)
            self.model.copying.pop(name, None)
            self.model.disks.pop(name, None)
            if known and is_kept:
                self.model.trash[entry_id] = Kept(name, known)

    def _deletion(self, name: str) -> tuple[str, Any]:
        match name[0]:
            case "v":
                return "DeleteVolume", csi.DeleteVolumeRequest(volume_id=self._id(name))
            case "s":
                return "DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=self._id(name))
            case _:
                return REMOVE_IMAGE, [name]

    def _delete(self, at: int, name: str, kill: Kill = None) -> None:
        """Delete something; no image of this name is an error unless a killed command may have removed it, or the
        collector has ended what the command has begun, before it was repeated.
        """
        try:
            self._call(at, *self._deletion(name), kill=kill)
        except NotFound:
            assert name[0] == "i"
            was_repeated = self.servicers[at % self.controllers].was_repeated
            assert kill is not None or was_repeated or name not in self.model.disks

    @step(1, at=AT, name=VOLUMES, kill=KILL_AT)
    def expand(self, at: int, name: str, kill: Kill) -> None:
        self._settle(name)
        known = self.model.disks.get(name)
        wanted = min(2 * known.size_bytes, MAXIMUM_BYTES) if known else SIZE_BYTES
        request = csi.ControllerExpandVolumeRequest(volume_id=self._id(name))
        request.capacity_range.required_bytes = wanted
        try:
            grown = self._call(at, "ControllerExpandVolume", request, kill=kill)
        except NotFound:
            assert known is None
        else:
            assert known
            known.size_bytes = wanted
            assert grown.capacity_bytes == wanted

    @step(1, at=AT, name=VOLUMES, kill=KILL_AT)
    def attach(self, at: int, name: str, kill: Kill) -> None:
        self._settle(name)
        known = self.model.disks.get(name)
        request = csi.ControllerPublishVolumeRequest(
            volume_id=self._id(name), node_id=NODE, volume_capability=block_capability()
        )
        try:
            self._call(at, "ControllerPublishVolume", request, kill=kill)
        except NotFound:
            assert known is None
        else:
            assert known
            known.is_attached = True

    @step(3, at=AT, name=VOLUMES, kill=KILL_AT)
    def detach(self, at: int, name: str, kill: Kill) -> None:
        self._settle(name)
        request = csi.ControllerUnpublishVolumeRequest(volume_id=self._id(name), node_id=NODE)
        self._call(at, "ControllerUnpublishVolume", request, kill=kill)
        if known := self.model.disks.get(name):
            known.is_attached = False

    # --- snapshots and images -----------------------------------------------------------------------------------

    @step(7, at=AT, name=SNAPSHOTS, volume=VOLUMES, on_delete=ON_DELETE, kill=KILL_AT, left=LEFT)
    def snapshot(self, at: int, name: str, volume: str, on_delete: str, kill: Kill, left: bool) -> None:
        self._settle(name, volume)
        self._snapshot(at, name, Wish(volume, on_delete=on_delete), kill, left=left)

    def _snapshot(self, at: int, name: str, wish: Wish, kill: Kill = None, *, left: bool = False) -> None:
        request = csi.CreateSnapshotRequest(
            name=name, source_volume_id=self._id(wish.source), parameters={"onDelete": wish.on_delete}
        )
        if kill is not None and left and name not in self.model.disks:
            self._leave(at, "CreateSnapshot", request, name, kill)
            return
        known, base = self.model.disks.get(name), self.model.disks.get(wish.source)
        try:
            made = self._call(at, "CreateSnapshot", request, kill=kill).snapshot
        except AlreadyExists:
            assert known
            assert known.wish != wish
        except NotFound:
            assert known is None
            assert base is None
        except Refused:
            assert known is None
            assert base
            assert base.is_attached
        else:
            if known is None:
                assert base
                assert not base.is_attached
                known = self.model.disks[name] = base.copy(wish)
            assert (known.wish, made.size_bytes) == (wish, known.size_bytes)
            assert made.ready_to_use

    @step(2, at=AT, name=IMAGES, file=between(0, len(FILES) - 1), kill=KILL_COPY, left=LEFT)
    def import_image(self, at: int, name: str, file: int, kill: Kill, left: bool) -> None:
        self._settle(name)
        request = [name, str(self._file(file))]
        is_known = name in self.model.disks
        if kill is not None and left and not is_known:
            self._leave(at, IMPORT, request, name, kill)
            return
        try:
            self._call(at, IMPORT, request, kill=kill)
        except AlreadyExists:
            assert is_known or kill is not None
        else:
            assert not is_known
        if not is_known:
            self.model.disks[name] = Disk(SIZE_BYTES, dict(FILES[file]))

    def _file(self, number: int) -> Path:
        """Give a raw file, made when it is used for the first time."""
        path = self.base / f"file-{number}"
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(SIZE_BYTES)
                for block, byte in FILES[number].items():
                    file.seek(block * BLOCK_BYTES)
                    file.write(bytes([byte]) * BLOCK_BYTES)
        return path

    # --- the trash ---------------------------------------------------------------------------------------------

    @step(6, when=lambda self: self.model.trash, at=AT, choice=CHOICE, number=between(0, 3), kill=KILL_AT, left=LEFT)
    def restore(self, at: int, choice: int, number: int, kill: Kill, left: bool) -> None:
        """Restore what is in the trash, under a name of the same kind or (0) its own."""
        entry_id = sorted(self.model.trash)[choice % len(self.model.trash)]
        kept = self.model.trash[entry_id]
        name = f"{kept.name[0]}{number}" if number else kept.name
        self._settle(name)
        request = [entry_id, name if number else ""]
        is_taken = name in self.model.disks
        if kill is not None and left and not is_taken:
            self._leave(at, RESTORE, request, name, kill)
            self.model.restoring[name] = (entry_id, self.model.trash.pop(entry_id))
            return
        try:
            self._call(at, RESTORE, request, kill=kill)
        except AlreadyExists:
            assert is_taken
        else:
            assert not is_taken
            self._restored(entry_id, name, kept)

    def _restored(self, entry_id: str, name: str, kept: Kept) -> None:
        self.model.trash.pop(entry_id, None)
        self.model.gone.add(entry_id)
        self.model.unknown.discard(name)
        self.model.disks[name] = kept.disk

    @step(3, when=lambda self: self.model.restoring, at=AT, choice=CHOICE, number=between(1, 3))
    def restore_otherwise(self, at: int, choice: int, number: int) -> None:
        """Restore under another name what a killed command was to restore: that may have come to its end."""
        before = sorted(self.model.restoring)[choice % len(self.model.restoring)]
        name = f"{before[0]}{number}"
        if name == before:
            return
        self._settle(name)
        entry_id, kept = self.model.restoring.pop(before)
        self.model.unknown.discard(before)
        try:
            self._call(at, RESTORE, [entry_id, name])
        except NotFound:
            self._restored(entry_id, before, kept)
        except AlreadyExists:
            assert name in self.model.disks
            self.model.trash[entry_id] = kept
        else:
            assert name not in self.model.disks
            self._restored(entry_id, name, kept)

    @step(3, when=lambda self: self.model.trash, at=AT, choice=CHOICE, kill=KILL_AT, left=LEFT)
    def purge(self, at: int, choice: int, kill: Kill, left: bool) -> None:
        entry_id = sorted(self.model.trash)[choice % len(self.model.trash)]
        del self.model.trash[entry_id]
        if kill is not None and left:
            self._kill(at, as_line(PURGE, [entry_id]), kill)
            return
        try:
            self._call(at, PURGE, [entry_id], kill=kill)
        except NotFound:
            assert kill is not None
        self.model.gone.add(entry_id)

    @step(1, at=AT, kill=KILL_AT)
    def let_time_pass(self, at: int, kill: Kill) -> None:
        """What is kept for a time is purged by the collector; what is retained, or restored before, is not."""
        for name in list(self.model.restoring):
            self._settle(name)
        self.model.forget_expired()
        self.tally.calls[COLLECT_LATER] += 1
        if kill is not None:
            self._kill(at, as_line(COLLECT_LATER), kill)
            return
        with suppress(Busy):  # as in `collect`
            self.servicers[at % self.controllers].collect_later()
            left = map(self.kit.store.find_trashed, self.kit.store.trash_ids())
            assert not [entry for entry in left if entry and trash.is_expired(entry, records.now() + LATER)]

    # --- contents, and what goes on beside the calls ------------------------------------------------------------

    @step(5, when=lambda self: self.model.names("v"), choice=CHOICE, slot=one_of(*SLOTS, -1))
    def write(self, choice: int, slot: int) -> None:
        """What a pod does, on the explicit chain of the records; the node has given the image the volume's size."""
        self.tally.calls["write"] += 1
        names = self.model.names("v")
        name = names[choice % len(names)]
        disk = self.model.disks[name]
        block = disk.size_bytes // BLOCK_BYTES - 1 if slot < 0 else slot
        self.kit.grow_image(name)
        self.model.writes += 1
        disk.blocks[block] = self.model.writes % 200 + 1
        self.kit.write(name, disk.blocks[block], block=block)

    @step(2, when=lambda self: self.model.disks, choice=CHOICE)
    def compare(self, choice: int) -> None:
        names = sorted(self.model.disks)
        self._compare(names[choice % len(names)])

    def _compare(self, name: str) -> None:
        disk, record = self.model.disks[name], self._record(name)
        if name.startswith("v"):
            assert bool(record.attachments) == disk.is_attached
        assert record.size_bytes == disk.size_bytes, name
        layer_id = record.head if name.startswith("v") else record.layer
        assert shows(self.kit, layer_id, disk.blocks), f"{name} does not hold {disk.blocks}"

    def _compare_all(self) -> None:
        for name in self.model.disks:
            self._compare(name)
        for entry_id, kept in self.model.trash.items():
            entry = self.kit.store.find_trashed(entry_id)
            assert entry, f"{entry_id} is not in the trash"
            assert shows(self.kit, records.layer_of(entry), kept.disk.blocks), f"{entry_id} is not {kept.disk.blocks}"

    @step(1, at=AT)
    def list_all(self, at: int) -> None:
        """The lists hold what the model knows, and at most what is unknown besides."""
        volumes = self._call(at, "ListVolumes", csi.ListVolumesRequest()).entries
        snapshots = self._call(at, "ListSnapshots", csi.ListSnapshotsRequest()).entries
        found = {entry.volume.volume_id for entry in volumes} | {entry.snapshot.snapshot_id for entry in snapshots}
        found |= {image.id for image in golden.list_images(self.servicers[at % self.controllers].store)}
        known = {self._id(name) for name in self.model.disks}
        assert known <= found <= known | {self._id(name) for name in (*self.model.unknown, *self.model.copying)}
        kept = set(self.kit.store.trash_ids())
        assert set(self.model.trash) <= kept
        assert not kept & self.model.gone

    @step(2, at=AT, kill_at=KILL_AT, after_s=one_of(None, fraction(0.3)))
    def collect(self, at: int, kill_at: int | None, after_s: float | None) -> None:
        """Collect and merge; a collector that is killed is followed by nothing: what it leaves stays as it is."""
        self.tally.calls[COLLECT] += 1
        if kill_at or after_s is not None:
            self._kill(at, as_line(COLLECT), kill_at if after_s is None else after_s)
            wait_for_the_daemons_end(self.kit)
            return
        with suppress(Busy):  # the lease of a process whose locks do not reach here
            self.servicers[at % self.controllers].collect()

    @step(1, at=AT, resumes=one_of(True, False))
    def restart(self, at: int, resumes: bool) -> None:
        """A new controller process takes over. Copies begin again at its first look at all, or when asked for."""
        at %= self.controllers
        self.servicers[at].close()
        self.servicers[at] = self._servicer(at)
        self.kit = self.servicers[0].kit
        if resumes:
            self.servicers[at].resume_copies()

    # --- the end -----------------------------------------------------------------------------------------------

    def clear_away(self) -> None:
        for servicer in self.servicers:
            servicer.close()
        for mounted in (self.base / "second" / "lock", self.base / "second"):
            if self.controllers == 2:
                subprocess.run(["umount", "-l", str(mounted)], check=False, timeout=20)
        shutil.rmtree(self.base)

    def check_the_end(self) -> None:
        kit = self.kit
        self._settle(*self.model.restoring, *self.model.unknown, *self.model.copying)
        for servicer in self.servicers:
            servicer.stop_copies()  # of caches, which go on without anybody who wants them
        kit.sweep_until_quiet()
        # QEMU leaves clusters unused that a merge has moved twice
        assert [finding for finding in kit.check() if finding.kind != "leaked-clusters"] == []
        kit.consistency()
        self._compare_all()
        self._merge_until_quiet()
        self._compare_all()
        assert kit.errors() == []
        kit.delete_everything()
        self._merge_until_quiet()
        left = tree(self.roots[0])
        left.pop("collector.json", None)  # who may merge is written down once, and stays
        assert left == self.as_new

    def _merge_until_quiet(self) -> None:
        """Collect with merges, on each mount: only there the temporaries and the lease of who was killed are a dead
        process's at once. What a killed collector has left of a claim of the lease is dropped some time later.
        """
        deadline = time.monotonic() + QUIET_S
        left = list(self.servicers)
        while left:
            assert time.monotonic() < deadline, "the lease stays taken"
            self._end_merges()
            for servicer in list(left):
                with suppress(Busy):
                    servicer.collect()
                    left.remove(servicer)


class TwoControllers(Histories):
    """The same with a controller on each of two mounts: each call goes to either."""

    controllers = 2


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, timeout=20)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("machine", [Histories, pytest.param(TwoControllers, marks=pytest.mark.root)])
def test_random_histories(machine: type[Histories], runner: Runner, impatient: None) -> None:
    tally = Tally()
    for number in range(HISTORIES):
        with made(machine(runner, tally)) as history:
            run_history(history, SEED + number * FURTHER, STEPS, history.check_the_end)
    print(f"{machine.__name__}: {tally}, seed {SEED}")
    assert tally.kills


@contextmanager
def made(history: Histories) -> Iterator[Histories]:
    """Clear a history's pool away at the end."""
    try:
        yield history
    finally:
        history.clear_away()


def written_and_deleted(history: Histories) -> None:
    """A history that shows what a wrong engine does; before it are a volume v1 and its snapshot s1, to be kept."""
    plain: dict[str, Any] = {"at": 0, "kill": None, "left": False, "on_delete": "delete"}
    history.write(choice=0, slot=1)
    history.snapshot(name="s2", volume="v1", **plain)
    history.write(choice=0, slot=0)
    history.create_from(name="v2", source="s2", image_format="qcow2", clone_mode="overlay", **plain)
    history.create_from(name="v3", source="s2", image_format="raw", clone_mode="copy", **{**plain, "left": True})
    for name in ("s2", "v2", "s1"):
        history.delete(at=0, name=name, kill=None, left=False)
    history.restart(at=0, resumes=False)
    history.collect(at=0, kill_at=None, after_s=None)


def forget_writes(patch: pytest.MonkeyPatch) -> None:
    """Every head counts as never written to: a snapshot refers to what is below it."""
    patch.setattr(images, "is_untouched", lambda *_: True)


def hold_nothing(patch: pytest.MonkeyPatch) -> None:
    """Nothing keeps what a copy is made from."""
    right = Store.mark
    patch.setattr(Store, "mark", lambda *given: None if given[-1].startswith("c-") else right(*given))


def keep_nothing(patch: pytest.MonkeyPatch) -> None:
    """What is deleted is gone, whatever its class says."""
    patch.setattr(trash, "decide", lambda _: None)


@pytest.mark.parametrize("wrong", [None, forget_writes, hold_nothing, keep_nothing])
def test_wrong_engine_would_be_noticed(
    wrong: Callable[[pytest.MonkeyPatch], None] | None, runner: Runner, impatient: None
) -> None:
    with pytest.MonkeyPatch.context() as patch, made(Histories(runner, Tally())) as history:
        if wrong:
            wrong(patch)

        def whole() -> None:
            written_and_deleted(history)
            history.check_the_end()

        assert is_noticed(whole) == bool(wrong)
