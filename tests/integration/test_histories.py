"""Random histories of calls against a plain model of names, sizes and contents: real servicers on a real directory.

Rules: create, clone, restore, snapshot, delete, expand, attach, detach, write, list, restart, collect, merge. Every
changing call may be killed with SIGKILL before one of its durable steps, and is then made again or left as it is; the
collector is killed at steps and in the middle of its jobs. Names are used again. Whole disks are compared, byte for
byte. At the end of each history everything that the model knows is there, `check` finds nothing, and when all is
deleted the pool is as new.

`make soak` makes 500 histories with one controller and 500 with two: two mounts of the directory, whose locks do
not reach each other, with a controller on each.
"""

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from controller_kit import BLOCK_BYTES, NODE, OWNER, Kit, Tree, qemu_io, read_disk, tree
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from servicer_kit import COLLECT, Servicer, as_line
from test_crash_merges import wait_for_the_daemons_end
from test_crash_steps import Runner, is_noticed

from csi_quobyte.errors import AlreadyExists, Busy, NotFound, Refused
from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pool import images, records
from csi_quobyte.pool import store as store_module
from csi_quobyte.pool.sizes import MIB
from lab.client import block_capability

SEED = int(os.environ.get("CSI_QUOBYTE_SEED", "0")) or random.SystemRandom().randrange(1 << 31)
HISTORIES = int(os.environ.get("CSI_QUOBYTE_HISTORIES", "5"))
STEPS = int(os.environ.get("CSI_QUOBYTE_HISTORY_STEPS", "30"))

VOLUMES = st.sampled_from(["v1", "v2", "v3"])
SNAPSHOTS = st.sampled_from(["s1", "s2", "s3"])
FORMATS = st.sampled_from(["qcow2", "qcow2", "raw"])
SIZE_BYTES = 4 * MIB
MAXIMUM_BYTES = 16 * MIB
QUIET_S = 20.0
BLOCKS = SIZE_BYTES // BLOCK_BYTES
SLOTS = (0, 1, 2, BLOCKS // 2, BLOCKS - 1)
"""The blocks that are written, and the last one of the volume."""

# Before which durable step a call is killed, if it is, and whether it is left so.
KILL_AT = st.one_of(st.none(), st.integers(1, 12), st.integers(1, 40))
LEFT = st.sampled_from([False, False, True])
AT = st.integers(0, 1)


@dataclass
class Disk:
    """What the model knows of a volume or snapshot: size, what its blocks are filled with, what it was made from."""

    size_bytes: int
    blocks: dict[int, int]
    source: str = ""
    image_format: str = "qcow2"
    is_attached: bool = False

    def copy(self, *, source: str, image_format: str = "qcow2") -> "Disk":
        return Disk(self.size_bytes, dict(self.blocks), source, image_format)


@dataclass
class Model:
    """The names that exist, and those of which a killed call has left what only the pool knows."""

    disks: dict[str, Disk] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    writes: int = 0

    def names(self, kind: str) -> list[str]:
        return sorted(name for name in self.disks if name.startswith(kind))


@dataclass
class Tally:
    """What a run did, for its last line."""

    histories: int = 0
    steps: int = 0
    kills: int = 0


TALLY = Tally()


def shows(kit: Kit, layer_id: str, blocks: dict[int, int]) -> bool:
    """Say whether a layer's disk holds these blocks and zeros everywhere else, comparing every byte."""
    layer = kit.store.layer(layer_id)
    end = images.virtual_size_bytes(kit.store, layer) // BLOCK_BYTES
    assert all(block < end for block in blocks), f"{blocks} and only {end} blocks"
    commands = []
    start = 0
    for at in range(1, end + 1):
        if at == end or blocks.get(at, 0) != blocks.get(start, 0):
            commands.append(f"read -P {blocks.get(start, 0)} {start * BLOCK_BYTES} {(at - start) * BLOCK_BYTES}")
            start = at
    return qemu_io(read_disk(kit.store, layer_id), *commands, read_only=True) == 0


class Histories(RuleBasedStateMachine):
    """Each rule makes one call and does the same to the model, and compares the answers."""

    controllers = 1
    runner: Runner

    @initialize()
    def make_pool(self) -> None:
        memory = Path("/dev/shm")
        self.base = Path(tempfile.mkdtemp(prefix="csi-quobyte-test-", dir=memory if memory.is_dir() else None))
        root = self.base / "pool"
        root.mkdir()
        store_module.initialise(str(root), owner=OWNER, modes=records.Modes())
        self.as_new: Tree = tree(root)
        self.roots = [root]
        if self.controllers == 2:
            self.roots.append(self._second_mount(root))
        self.servicers = [Servicer(str(each)) for each in self.roots]
        self.kit = self.servicers[0].kit
        self.kit.add_node()
        self.model = Model()
        TALLY.histories += 1

    def _second_mount(self, root: Path) -> Path:
        """Mount the pool a second time, with a lock file of its own: locks do not reach from one to the other."""
        second, lock = self.base / "second", self.base / "lock"
        second.mkdir()
        lock.touch()
        _mount("--bind", root, second)
        _mount("--bind", lock, second / "lock")
        return second

    # --- calls -------------------------------------------------------------------------------------------------

    def _call(self, at: int, method: str, request: Any, *, kill_at: int | None = None) -> Any:
        """Make a call, which is killed first and made again if that is wanted."""
        TALLY.steps += 1
        at %= self.controllers
        if kill_at:
            self._kill(at, as_line(method, request), kill_at=kill_at)
        return self.servicers[at].eventually(method, request, meanwhile=self._end_merges)

    def _end_merges(self) -> None:
        """What the mergers of the controllers do beside the calls: end what a killed one has left."""
        for servicer in self.servicers:
            with suppress(Busy):  # the lease is a dead process's of the other mount
                servicer.collect(merges=False)

    def _kill(self, at: int, line: str, *, kill_at: int = 0, after_s: float | None = None) -> None:
        TALLY.kills += self.runner.run(self.roots[at % self.controllers], line, kill_at, in_job_s=after_s)

    def _leave(self, at: int, method: str, request: Any, name: str, kill_at: int) -> None:
        """Kill a call and leave what it has done: from now on only the pool knows what there is of this name."""
        TALLY.steps += 1
        self._kill(at, as_line(method, request), kill_at=kill_at)
        self.model.disks.pop(name, None)
        self.model.unknown.add(name)

    def _settle(self, *names: str) -> None:
        """Delete what a killed call has left of these names."""
        for name in set(names) & self.model.unknown:
            self._delete(0, name)
            self.model.unknown.discard(name)

    def _delete(self, at: int, name: str, kill_at: int | None = None) -> None:
        if name.startswith("s"):
            request = csi.DeleteSnapshotRequest(snapshot_id=self.kit.snapshot_id(name))
            self._call(at, "DeleteSnapshot", request, kill_at=kill_at)
        else:
            request = csi.DeleteVolumeRequest(volume_id=self.kit.volume_id(name))
            self._call(at, "DeleteVolume", request, kill_at=kill_at)

    # --- volumes -----------------------------------------------------------------------------------------------

    @rule(at=AT, name=VOLUMES, image_format=FORMATS, kill_at=KILL_AT, left=LEFT)
    def create(self, at: int, name: str, image_format: str, kill_at: int | None, left: bool) -> None:
        self._create(at, name, "", image_format, kill_at, left=left)

    @rule(at=AT, name=VOLUMES, source=st.one_of(VOLUMES, SNAPSHOTS), kill_at=KILL_AT, left=LEFT)
    def create_from(self, at: int, name: str, source: str, kill_at: int | None, left: bool) -> None:
        if name != source:
            self._create(at, name, source, "qcow2", kill_at, left=left)

    def _create(self, at: int, name: str, source: str, image_format: str, kill_at: int | None, *, left: bool) -> None:
        self._settle(name, source)
        request = csi.CreateVolumeRequest(
            name=name, volume_capabilities=[block_capability()], parameters={"volumeFormat": image_format}
        )
        if source.startswith("s"):
            request.volume_content_source.snapshot.snapshot_id = self.kit.snapshot_id(source)
        elif source:
            request.volume_content_source.volume.volume_id = self.kit.volume_id(source)
        else:
            request.capacity_range.required_bytes = SIZE_BYTES
        if kill_at and left and name not in self.model.disks:
            self._leave(at, "CreateVolume", request, name, kill_at)
            return
        known = self.model.disks.get(name)
        base = self.model.disks.get(source) if source else Disk(SIZE_BYTES, {})
        try:
            made = self._call(at, "CreateVolume", request, kill_at=kill_at).volume
        except AlreadyExists:
            assert known
            assert (known.source, known.image_format) != (source, image_format)
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
                known = self.model.disks[name] = base.copy(source=source, image_format=image_format)
            assert (known.source, known.image_format) == (source, image_format)
            assert made.capacity_bytes == known.size_bytes

    @rule(at=AT, name=st.one_of(VOLUMES, SNAPSHOTS), kill_at=KILL_AT, left=LEFT)
    def delete(self, at: int, name: str, kill_at: int | None, left: bool) -> None:
        self.model.unknown.discard(name)
        known = self.model.disks.get(name)
        if kill_at and left and not (known and known.is_attached):
            method = "DeleteSnapshot" if name.startswith("s") else "DeleteVolume"
            ids = {"snapshot_id": self.kit.snapshot_id(name)} if name.startswith("s") else {}
            ids = ids or {"volume_id": self.kit.volume_id(name)}
            self._leave(at, method, getattr(csi, f"{method}Request")(**ids), name, kill_at)
            return
        try:
            self._delete(at, name, kill_at)
        except Refused:
            assert known
            assert known.is_attached
        else:
            assert not (known and known.is_attached)
            self.model.disks.pop(name, None)

    @rule(at=AT, name=VOLUMES, kill_at=KILL_AT)
    def expand(self, at: int, name: str, kill_at: int | None) -> None:
        self._settle(name)
        known = self.model.disks.get(name)
        wanted = min(2 * known.size_bytes, MAXIMUM_BYTES) if known else SIZE_BYTES
        request = csi.ControllerExpandVolumeRequest(volume_id=self.kit.volume_id(name))
        request.capacity_range.required_bytes = wanted
        try:
            grown = self._call(at, "ControllerExpandVolume", request, kill_at=kill_at)
        except NotFound:
            assert known is None
        else:
            assert known
            known.size_bytes = wanted
            assert grown.capacity_bytes == wanted

    @rule(at=AT, name=VOLUMES, kill_at=KILL_AT)
    def attach(self, at: int, name: str, kill_at: int | None) -> None:
        self._settle(name)
        known = self.model.disks.get(name)
        request = csi.ControllerPublishVolumeRequest(
            volume_id=self.kit.volume_id(name), node_id=NODE, volume_capability=block_capability()
        )
        try:
            self._call(at, "ControllerPublishVolume", request, kill_at=kill_at)
        except NotFound:
            assert known is None
        else:
            assert known
            known.is_attached = True

    @rule(at=AT, name=VOLUMES, kill_at=KILL_AT)
    def detach(self, at: int, name: str, kill_at: int | None) -> None:
        self._settle(name)
        request = csi.ControllerUnpublishVolumeRequest(volume_id=self.kit.volume_id(name), node_id=NODE)
        self._call(at, "ControllerUnpublishVolume", request, kill_at=kill_at)
        if known := self.model.disks.get(name):
            known.is_attached = False

    # --- snapshots ---------------------------------------------------------------------------------------------

    @rule(at=AT, name=SNAPSHOTS, volume=VOLUMES, kill_at=KILL_AT, left=LEFT)
    def snapshot(self, at: int, name: str, volume: str, kill_at: int | None, left: bool) -> None:
        self._settle(name, volume)
        request = csi.CreateSnapshotRequest(name=name, source_volume_id=self.kit.volume_id(volume))
        if kill_at and left and name not in self.model.disks:
            self._leave(at, "CreateSnapshot", request, name, kill_at)
            return
        known, base = self.model.disks.get(name), self.model.disks.get(volume)
        try:
            made = self._call(at, "CreateSnapshot", request, kill_at=kill_at).snapshot
        except AlreadyExists:
            assert known
            assert known.source != volume
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
                known = self.model.disks[name] = base.copy(source=volume)
            assert (known.source, made.size_bytes) == (volume, known.size_bytes)
            assert made.ready_to_use

    # --- contents, and what goes on beside the calls ------------------------------------------------------------

    @precondition(lambda self: self.model.names("v"))
    @rule(choice=st.integers(0, 2), slot=st.sampled_from([*SLOTS, -1]))
    def write(self, choice: int, slot: int) -> None:
        """What a pod does, on the explicit chain of the records; the node has given the image the volume's size."""
        TALLY.steps += 1
        names = self.model.names("v")
        name = names[choice % len(names)]
        disk = self.model.disks[name]
        block = disk.size_bytes // BLOCK_BYTES - 1 if slot < 0 else slot
        self.kit.grow_image(name)
        self.model.writes += 1
        disk.blocks[block] = self.model.writes % 255 + 1
        self.kit.write(name, disk.blocks[block], block=block)

    @precondition(lambda self: self.model.disks)
    @rule(choice=st.integers(0, 5))
    def compare(self, choice: int) -> None:
        names = sorted(self.model.disks)
        self._compare(names[choice % len(names)])

    def _compare(self, name: str) -> None:
        disk, store = self.model.disks[name], self.kit.store
        if name.startswith("s"):
            record: Any = store.snapshot(self.kit.snapshot_id(name))
            layer_id = record.layer
        else:
            record = store.volume(self.kit.volume_id(name))
            layer_id = record.head
            assert bool(record.attachments) == disk.is_attached
        assert record.size_bytes == disk.size_bytes, name
        assert shows(self.kit, layer_id, disk.blocks), f"{name} does not hold {disk.blocks}"

    @rule(at=AT)
    def list_all(self, at: int) -> None:
        """Both lists hold what the model knows, and at most what is unknown besides."""
        volumes = self._call(at, "ListVolumes", csi.ListVolumesRequest()).entries
        snapshots = self._call(at, "ListSnapshots", csi.ListSnapshotsRequest()).entries
        found = {entry.volume.volume_id for entry in volumes} | {entry.snapshot.snapshot_id for entry in snapshots}
        known = {self._id(name) for name in self.model.disks}
        assert known <= found <= known | {self._id(name) for name in self.model.unknown}

    def _id(self, name: str) -> str:
        return self.kit.snapshot_id(name) if name.startswith("s") else self.kit.volume_id(name)

    @rule(at=AT, kill_at=KILL_AT, after_s=st.one_of(st.none(), st.floats(0, 0.3)))
    def collect(self, at: int, kill_at: int | None, after_s: float | None) -> None:
        """Collect and merge; a collector that is killed is followed by nothing: what it leaves stays as it is."""
        TALLY.steps += 1
        if kill_at or after_s is not None:
            self._kill(at, as_line(COLLECT), kill_at=kill_at or 0, after_s=after_s)
            wait_for_the_daemons_end(self.kit)
            return
        with suppress(Busy):  # the lease of a process whose locks do not reach here
            self.servicers[at % self.controllers].collect()

    @rule(at=AT)
    def restart(self, at: int) -> None:
        """A new controller process takes over."""
        at %= self.controllers
        self.servicers[at].close()
        self.servicers[at] = Servicer(str(self.roots[at]))
        self.kit = self.servicers[0].kit

    # --- the end -----------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "base"):
            return
        try:
            self._check_the_end()
        finally:
            for servicer in self.servicers:
                servicer.close()
            for mounted in (self.base / "second" / "lock", self.base / "second"):
                if self.controllers == 2:
                    subprocess.run(["umount", "-l", str(mounted)], check=False, timeout=20)
            shutil.rmtree(self.base)

    def _check_the_end(self) -> None:
        kit = self.kit
        self._settle(*self.model.unknown)
        kit.sweep_until_quiet()
        # QEMU leaves clusters unused that a merge has moved twice
        assert [finding for finding in kit.check() if finding.kind != "leaked-clusters"] == []
        kit.consistency()
        for name in self.model.disks:
            self._compare(name)
        self._merge_until_quiet()
        for name in self.model.disks:
            self._compare(name)
        assert kit.errors() == []
        kit.delete_everything()
        self._merge_until_quiet()
        left = tree(self.roots[0])
        left.pop("collector.json", None)  # who may merge is written down once, and stays
        assert left == self.as_new

    def _merge_until_quiet(self) -> None:
        """Collect with merges; what a killed collector has left of a claim of the lease is dropped some time later."""
        deadline = time.monotonic() + QUIET_S
        while True:
            self._end_merges()
            try:
                self.servicers[0].collect()
            except Busy:
                assert time.monotonic() < deadline, "the lease stays taken"
                time.sleep(0.02)
            else:
                return


class TwoControllers(Histories):
    """The same with a controller on each of two mounts: each call goes to either."""

    controllers = 2


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, timeout=20)


SETTINGS = settings(
    max_examples=HISTORIES,
    stateful_step_count=STEPS,
    deadline=None,
    database=None,
    # a history is not made shorter by leaving calls out: what is killed at step 7 is something else then
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("machine", [Histories, pytest.param(TwoControllers, marks=pytest.mark.root)])
def test_random_histories(machine: type[Histories], runner: Runner, impatient: None) -> None:
    machine.runner = runner
    before = Tally(**vars(TALLY))
    print(f"seed {SEED}")
    run_state_machine_as_test(seed(SEED)(machine), settings=SETTINGS)
    done = {key: value - getattr(before, key) for key, value in vars(TALLY).items()}
    print(f"{machine.__name__}: {done}, seed {SEED}")
    assert done["histories"] >= HISTORIES
    assert done["kills"]


def written_and_snapshotted(machine: Histories) -> None:
    """A history that shows what a wrong engine does."""
    plain: dict[str, Any] = {"at": 0, "kill_at": None, "left": False}
    machine.create(name="v1", image_format="qcow2", **plain)
    machine.write(choice=0, slot=0)
    machine.snapshot(name="s1", volume="v1", **plain)
    machine.write(choice=0, slot=1)
    machine.snapshot(name="s2", volume="v1", **plain)
    machine.write(choice=0, slot=0)
    machine.create_from(name="v2", source="s2", **plain)
    machine.delete(name="s1", **plain)


def forget_writes(patch: pytest.MonkeyPatch) -> None:
    """Every head counts as never written to: a snapshot refers to what is below it."""
    patch.setattr(images, "is_untouched", lambda *_: True)


@pytest.mark.parametrize("wrong", [None, forget_writes])
def test_wrong_engine_would_be_noticed(
    wrong: Callable[[pytest.MonkeyPatch], None] | None, runner: Runner, impatient: None
) -> None:
    machine = Histories()
    machine.runner = runner
    machine.make_pool()
    with pytest.MonkeyPatch.context() as patch:
        if wrong:
            wrong(patch)

        def whole() -> None:
            try:
                written_and_snapshotted(machine)
            finally:
                machine.teardown()

        assert is_noticed(whole) == bool(wrong)
