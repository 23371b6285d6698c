"""A node process killed with SIGKILL in the middle of any of its calls: nothing that was written is lost.

Killed before every durable step of the pool, and before and after everything that it does to its host (daemon, loop
device, mkfs, fsck, mount); and at moments in between. Then either the next process of the node makes the call again, or
the node is given up: cut off, detached by force, and another node takes the volume. Both end with the volume on the
other node, which has to show all that was written (for a node that is given up: all that was synced), and with nothing
left on the hosts or in the pool.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from controller_kit import Kit, Tree, tree
from node_kit import AS_BLOCK, Host, as_line, host_on
from running import MIB, machine_of, read_tree, write_tree
from test_crash_steps import SEED, Runner, _named, retry

from csi_quobyte.errors import Busy, Unavailable
from csi_quobyte.host import mounts
from csi_quobyte.pool.records import VolumeRecord
from csi_quobyte.pool.sizes import SizeRange
from lab.machine import Machine

pytestmark = pytest.mark.root

EVERY = 1 if os.environ.get("CSI_QUOBYTE_CRASH_EVERY") == "1" else 25
MOMENTS = int(os.environ.get("CSI_QUOBYTE_CRASH_IN_JOB", "2"))
SIZE_BYTES = 32 * MIB
XFS_BYTES = 300 * MIB  # mkfs.xfs makes nothing smaller
XFS: dict[str, Any] = {"filesystem": "xfs", "size": SizeRange(XFS_BYTES)}
LOOP: dict[str, Any] = {"image_format": "raw", "data_path": "loop"}
AT_BYTES = (0, SIZE_BYTES - 4096)
BLOCK = b"written " * 512


@dataclass(frozen=True)
class Case:
    """A call, on a volume made with `changes`: after it was written to and closed, grown, or staged."""

    call: str
    changes: dict[str, Any] = field(default_factory=dict)
    is_written: bool = True
    is_grown: bool = False


CASES = {
    "stage new": Case("stage", is_written=False),
    "stage new xfs": Case("stage", XFS, is_written=False),
    "stage new loop": Case("stage", LOOP, is_written=False),
    "stage new block": Case("stage", AS_BLOCK, is_written=False),
    "stage written": Case("stage"),
    "stage written block": Case("stage", AS_BLOCK),
    "stage grown": Case("stage", is_grown=True),
    "stage grown loop": Case("stage", LOOP, is_grown=True),
    "unstage": Case("unstage"),
    "unstage loop": Case("unstage", LOOP),
    "unstage block": Case("unstage", AS_BLOCK),
    "expand xfs": Case("expand", XFS, is_grown=True),
    "expand block": Case("expand", AS_BLOCK, is_grown=True),
    "expand loop block": Case("expand", LOOP | AS_BLOCK, is_grown=True),
    "publish": Case("publish"),
    "publish block": Case("publish", AS_BLOCK),
    "publish read-only": Case("publish read-only"),
    "unpublish": Case("unpublish"),
    "unpublish block": Case("unpublish", AS_BLOCK),
}


@dataclass
class Place:
    """Two hosts, a and b, on a pool that was new."""

    machine: Machine
    root: Path
    as_new: Tree
    b: Host

    def host_a(self) -> Host:
        """Host a, as a process that has just been started sees it."""
        return host_on(self.machine.base, "a", self.root)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with machine_of(standin=False) as machine:
        root = machine.pools["main"]
        as_new = tree(root)
        b = host_on(machine.base, "b", root)
        for name in ("a", "b"):
            b.kit.add_node(name)
        yield Place(machine, root, as_new, b)
        b.kit.store.close()


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


# --- what a pod does -------------------------------------------------------------------------------------------


def write(host: Host, volume: VolumeRecord) -> dict[str, str]:
    """Write and sync; gives what `read` has to give then."""
    if volume.access_type == "mount":
        write_tree(host.staging_path, files=3)
    else:
        write_blocks(host, volume, sync=True)
    return read(host, volume)


def write_blocks(host: Host, volume: VolumeRecord, *, sync: bool) -> None:
    fd = os.open(host.device(volume), os.O_WRONLY)
    for offset in AT_BYTES:
        os.pwrite(fd, BLOCK, offset)
    if sync:
        os.fsync(fd)
    os.close(fd)


def write_unsynced(host: Host, volume: VolumeRecord) -> dict[str, str]:
    """Write more, which only the end of an unstage makes durable."""
    if volume.access_type == "mount":
        Path(host.staging_path, "file-late").write_bytes(os.urandom(MIB))
    else:
        write_blocks(host, volume, sync=False)
    return read(host, volume)


def read(host: Host, volume: VolumeRecord) -> dict[str, str]:
    if volume.access_type == "mount":
        return read_tree(host.staging_path)
    with Path(host.device(volume)).open("rb") as device:
        return {str(offset): os.pread(device.fileno(), len(BLOCK), offset).hex() for offset in AT_BYTES}


# --- one story -------------------------------------------------------------------------------------------------


@dataclass
class Story:
    """One volume on host a, up to the call that is killed."""

    place: Place
    case: Case
    volume: VolumeRecord
    generation: int
    durable: dict[str, str]
    written: dict[str, str]
    """What was written; all of it when the volume was closed in order."""

    @property
    def line(self) -> str:
        return as_line(self.place.b, self.case.call, self.volume, self.generation).replace('"b"', '"a"', 1)


def begin(place: Place, case: Case) -> Story:
    a = place.host_a()
    volume = a.kit.create("v", **{"size": SizeRange(SIZE_BYTES)} | case.changes)
    durable: dict[str, str] = {}
    written = durable
    generation = a.attach(volume)
    if case.is_written:
        a.stage(volume, generation)
        written = durable = write(a, volume)
    if case.call == "unstage":
        written = write_unsynced(a, volume)
    if case.call == "stage" and case.is_written:
        a.close(volume)
    if case.call in {"expand", "unpublish"}:
        a.publish(volume, generation)
    if case.is_grown:
        volume = a.kit.expand("v", 2 * volume.size_bytes)
    a.kit.store.close()
    return Story(place, case, volume, generation, durable, written)


def make_the_call(host: Host, story: Story) -> None:
    """Make the call of a story on a host."""
    calls: dict[str, Callable[[], object]] = {
        "stage": lambda: host.stage(story.volume, story.generation),
        "unstage": lambda: host.close(story.volume),
        "expand": lambda: host.expand(story.volume),
        "publish": lambda: host.publish(story.volume, story.generation),
        "publish read-only": lambda: host.publish(story.volume, story.generation, read_only=True),
        "unpublish": lambda: host.unpublish(story.volume),
    }
    calls[story.case.call]()


def call_again(story: Story) -> None:
    """The next node process makes the call again, and the volume is closed in order."""
    a = story.place.host_a()

    def call() -> None:
        try:
            make_the_call(a, story)
        except Unavailable as error:  # what the killed process had begun to start goes on, or ends, for a moment
            raise Busy(str(error)) from error

    retry(call)
    mounted = mounts.at(str(a.base / "target"))
    assert (mounted is not None) == (story.case.call in {"expand", "publish", "publish read-only"})
    if mounted:
        assert ("ro" in mounted.options) == (story.case.call == "publish read-only")
    if story.case.call != "unstage":
        if story.case.is_written:
            assert read(a, story.volume) == story.written
        if story.case.is_grown:
            found = a.find_device(story.volume)
            assert found
            assert found.size_bytes == story.volume.size_bytes
        if not story.case.is_written:
            story.written = write(a, story.volume)
        a.unpublish(story.volume)
        retry(lambda: a.close(story.volume))
    a.detach(story.volume)
    a.kit.store.close()
    check_on_b(story, story.written)


def give_up(story: Story) -> None:
    """The node is lost: what was synced has to be there, and may not be written over."""
    a = story.place.host_a()
    a.detach(story.volume)
    retry(lambda: a.node.fence(story.volume.id))
    a.unpublish(story.volume)
    retry(lambda: a.unstage(story.volume, stale=True))
    a.kit.store.close()
    check_on_b(story, story.durable)


def check_on_b(story: Story, expected: dict[str, str]) -> None:
    b, volume = story.place.b, story.volume
    generation = b.attach(volume)
    b.stage(volume, generation)
    found = read(b, volume)
    assert {name: found.get(name) for name in expected} == expected
    if not expected:
        expected = write(b, volume)
        b.unstage(volume)
        b.stage(volume, generation)
        assert read(b, volume) == expected
    b.close(volume)
    b.detach(volume)
    check_nothing_is_left(story.place, b.kit)


def check_nothing_is_left(place: Place, kit: Kit) -> None:
    assert place.machine.leftovers() == []
    for name in ("a", "b"):
        state = place.machine.base / f"state-{name}"
        assert [str(path) for path in state.glob("staged/*")] == []
    assert kit.errors() == []
    kit.delete("v")
    kit.sweep_until_quiet()
    assert kit.check() == []
    assert tree(place.root) == place.as_new


AFTERWARDS = {"called again": call_again, "given up": give_up}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("afterwards", AFTERWARDS)
@pytest.mark.parametrize("name", CASES)
def test_node_killed_before_any_step(name: str, afterwards: str, place: Place, runner: Runner, impatient: None) -> None:
    before, steps = runner.kills, range(1 + SEED % EVERY, 1000, EVERY)
    for step in steps:
        story = begin(place, CASES[name])
        with _named(f"{name}, {afterwards}", step):
            was_killed = runner.run(place.root, story.line, step)
            AFTERWARDS[afterwards](story)
        if not was_killed:
            break
    assert runner.kills - before == len(range(steps.start, step, steps.step))
    print(f"{name}, {afterwards}: killed before each of {step - 1} steps, seed {SEED}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["stage new", "stage new xfs", "stage grown", "unstage"])
def test_node_killed_at_any_moment(name: str, place: Place, runner: Runner, impatient: None) -> None:
    dice, before = random.Random(SEED), runner.kills
    for _ in range(MOMENTS):
        story, after_s = begin(place, CASES[name]), dice.uniform(0, 0.2)
        with _named(f"{name} after {after_s} s", 0):
            runner.run(place.root, story.line, 0, in_job_s=after_s)
            AFTERWARDS[dice.choice(sorted(AFTERWARDS))](story)
    assert runner.kills > before or MOMENTS < 10, "every call had ended before its moment"
