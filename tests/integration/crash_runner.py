"""A process that runs one operation after the other in children, each of which is killed at a chosen moment.

Reads lines of JSON from standard input: {"root", "operation", "kill_at", "in_job_s"}; answers each with one line
{"steps", "killed"}: how many durable steps the child began, and whether it was killed. An operation is a name, or a
call of the servicer (servicer_kit) or of a node (node_kit) as a line of text. The moment is before the durable step
number `kill_at` (0: none), or `in_job_s` seconds after a merge has begun to move data, or a call has begun (null: not
then). It has one thread and imports everything before the first fork, so that a kill costs milliseconds and not the
start of a Python.
"""

import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import node_kit
import servicer_kit
from controller_kit import SIZE_BYTES, Kit, tools

from csi_quobyte.engine import collector, layers, repair
from csi_quobyte.errors import AlreadyExists, Busy, Exhausted, NotFound
from csi_quobyte.host import command
from csi_quobyte.operations import volumes
from csi_quobyte.pool import store as store_module
from csi_quobyte.pool import versions
from csi_quobyte.pool.records import LayerRecord, VolumeRecord, VolumeState, trash_id, volume_marker
from csi_quobyte.pool.sizes import SizeRange
from csi_quobyte.pool.steps import Observer
from csi_quobyte.pool.store import Store

_COUNT = struct.Struct("<I")
_IN_JOB_OFFSET = 4
_POLL_S = 0.0002


def drop_released(kit: Kit) -> None:
    """What the collector does when it is told that the head of the volume "gone" has lost its reference."""
    for layer_id in list(kit.store.layer_ids()):
        layers.drop_upwards(kit.store, layer_id)


OPERATIONS: dict[str, Callable[[Kit], object]] = {
    "create blank": lambda kit: kit.create("new"),
    "create raw": lambda kit: kit.create("new", image_format="raw"),
    "create from snapshot": lambda kit: kit.create("new", source=kit.from_snapshot("s")),
    "create from volume": lambda kit: kit.create("new", source=kit.from_volume("v"), size=SizeRange(2 * SIZE_BYTES)),
    "create from untouched volume": lambda kit: kit.create("new", source=kit.from_volume("c")),
    "copy of snapshot": lambda kit: kit.create("new", source=kit.from_snapshot("s"), clone_mode="copy"),
    "cache copy of snapshot": lambda kit: kit.create("new", source=kit.from_snapshot("s"), clone_mode="cache"),
    "copy of volume": lambda kit: kit.create(
        "new", source=kit.from_volume("v"), size=SizeRange(2 * SIZE_BYTES), clone_mode="copy", image_format="raw"
    ),
    "snapshot": lambda kit: kit.snapshot("new", of="v"),
    "snapshot of untouched volume": lambda kit: kit.snapshot("new", of="c"),
    "delete volume": lambda kit: kit.delete("v"),
    "delete snapshot": lambda kit: kit.delete_snapshot("s"),
    "attach": lambda kit: kit.attach("v"),
    "detach": lambda kit: kit.detach("a"),
    "expand": lambda kit: kit.expand("v", 2 * SIZE_BYTES),
    "drop": drop_released,
    "sweep": lambda kit: collector.sweep(kit.store),
}


def import_new(kit: Kit) -> None:
    """Import the disk of the image "golden" once more; done before is success."""
    golden = kit.image("golden")
    with suppress(AlreadyExists):
        kit.import_image("new", kit.store.image_path(kit.store.layer(golden.layer)))


def remove_golden(kit: Kit) -> None:
    """Remove the image "golden"; done before is success."""
    with suppress(NotFound):
        kit.remove_image("golden")


IMAGES: dict[str, Callable[[Kit], object]] = {
    "create from image": lambda kit: kit.create("new", source_image="golden", size=SizeRange()),
    "copy of image": lambda kit: kit.create("new", source_image="golden", size=SizeRange(), clone_mode="copy"),
    "import image": import_new,
    "remove image": remove_golden,
}


def delete_snapshot_and_new(kit: Kit) -> None:
    kit.delete_snapshot("s")
    kit.delete("new")


def delete_image_and_new(kit: Kit) -> None:
    with suppress(NotFound):
        kit.remove_image("golden")
    kit.delete("new")


def delete_new_image(kit: Kit) -> None:
    """Remove what was imported, if it came so far that there is something to remove."""
    with suppress(NotFound):
        kit.remove_image("new")


# What deletes the object that an operation works on.
DELETES: dict[str, Callable[[Kit], object]] = {
    "create blank": lambda kit: kit.delete("new"),
    "create from snapshot": lambda kit: kit.delete("new"),
    "create from volume": lambda kit: kit.delete("new"),
    "create from untouched volume": lambda kit: kit.delete("new"),
    "copy of snapshot": lambda kit: kit.delete("new"),
    "copy of volume": lambda kit: kit.delete("new"),
    "create from image": delete_image_and_new,
    "copy of image": delete_image_and_new,
    "import image": delete_new_image,
    "cache copy of snapshot": delete_snapshot_and_new,
    "snapshot": lambda kit: kit.delete_snapshot("new"),
    "snapshot of untouched volume": lambda kit: kit.delete_snapshot("new"),
    "delete snapshot": lambda kit: kit.delete_snapshot("s"),
    "expand": lambda kit: kit.delete("v"),
}
UNDOES = {f"delete after {operation}": work for operation, work in DELETES.items()}


def entries_of(kit: Kit, name: str) -> list[str]:
    """The ids of what is in the trash and had a CSI name; none when a call before this one has done its work."""
    found = [entry for entry in map(kit.store.find_trashed, kit.store.trash_ids()) if entry]
    return [trash_id(entry) for entry in found if entry.name == name]


# k and its snapshot ks go to the trash when they are deleted; tv and ts are in it.
TRASH: dict[str, Callable[[Kit], object]] = {
    "trash volume": lambda kit: kit.delete("k"),
    "trash snapshot": lambda kit: kit.delete_snapshot("ks"),
    "restore volume": lambda kit: [kit.restore(entry_id) for entry_id in entries_of(kit, "tv")],
    "restore snapshot": lambda kit: [kit.restore(entry_id) for entry_id in entries_of(kit, "ts")],
    "purge volume": lambda kit: [kit.purge(entry_id) for entry_id in entries_of(kit, "tv")],
    "purge snapshot": lambda kit: [kit.purge(entry_id) for entry_id in entries_of(kit, "ts")],
}


def merge(kit: Kit, kind: str, in_job: Callable[[], None]) -> None:
    """Do the merges of a kind that the pool calls for; a merge that a crash has ended is ended first."""

    def may_go_on() -> bool:
        in_job()
        return True

    kit.sweep_until_quiet()
    while plans := [plan for plan in kit.plans() if plan.kind == kind]:
        kit.merge(plans[0], may_go_on)


MERGES = ("up", "down", "flatten")
REPAIR = "repair"
THEN = "then "  # before an operation that comes after a death, and is repeated while it is Busy
RETRY_S = 5.0


def retry(work: Callable[[], object]) -> None:
    """Repeat an operation as a sidecar does: until it is not Busy."""
    deadline = time.monotonic() + RETRY_S
    while True:
        try:
            work()
        except Busy:
            assert time.monotonic() < deadline, "the retry does not complete"
        else:
            return


def repair_all(kit: Kit, observe: Observer) -> None:
    """Repair a pool; here the start of each qemu-img counts as a step, and dead processes count as such at once."""
    run = command.run

    def counted(argv: Sequence[str], **options: Any) -> command.Completed:
        observe("run", argv[0])
        return run(argv, **options)

    command.run = counted
    store_module._REREAD_PAUSE_S = versions._CLAIM_PATIENCE_S = 0.0
    repair.repair(kit.store, tools(), kit.check_image)


def publish_before_data() -> None:
    """A blank volume's record is published before its layer is made."""

    def create_blank(store: Store, planned: VolumeRecord) -> VolumeRecord:
        volume = replace(planned, state=VolumeState.READY, unfinished=False)
        published = store.publish_begun(store.begin_volume(volume))
        layers.make_base(
            store,
            volume.head,
            volume_marker(volume),
            image_format=volume.image_format,
            size_bytes=volume.size_bytes,
            preallocation=volume.preallocation,
        )
        return published

    volumes._create_blank = create_blank


def remove_before_condemning() -> None:
    """A layer's image is removed before it is decided that nothing refers to it."""
    right = layers.drop

    def drop(store: Store, layer_id: str, **named: bool) -> str | None:
        if layer := store.find_layer(layer_id):
            store.remove_image(layer_id, layer.file)
        return right(store, layer_id, **named)

    layers.drop = drop


def mark_after_the_record() -> None:
    """A merge gives the child its parent's record before the marker is in the parent."""
    mark, swap = Store.mark, Store.swap
    late: list[tuple[str, str]] = []

    def late_mark(store: Store, layer_id: str, marker: str) -> None:
        late.append((layer_id, marker))

    def swap_then_mark(store: Store, old: LayerRecord, new: LayerRecord) -> LayerRecord:
        made = swap(store, old, new)
        while late:
            mark(store, *late.pop())
        return made

    Store.mark, Store.swap = late_mark, swap_then_mark  # type: ignore[assignment,method-assign]


# Wrong orders of steps, which the crash tests have to notice.
WRONG: dict[str, Callable[[], None]] = {
    "publish before data": publish_before_data,
    "remove before condemning": remove_before_condemning,
    "mark after the record": mark_after_the_record,
}


def run_child(root: str, operation: str, kill_at: int, report: int) -> None:
    """Run an operation in this process, which dies before its step number `kill_at`; counts the steps to `report`."""
    steps = 0

    def observe(step: str, path: str) -> None:
        nonlocal steps
        steps += 1
        os.pwrite(report, _COUNT.pack(steps), 0)
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def in_job() -> None:
        os.pwrite(report, b"\1", _IN_JOB_OFFSET)

    if operation.startswith('{"node"'):
        node_kit.make_call(root, operation, observe, in_job)
        return
    if operation.startswith("{"):
        servicer_kit.make_call(root, operation, observe, in_job)
        return
    kit = Kit(Store(root, observer=observe))
    if operation.startswith(THEN):
        versions._CLAIM_PATIENCE_S = 0.01
        work = (OPERATIONS | IMAGES | UNDOES)[operation.removeprefix(THEN)]
        retry(lambda: work(kit))
    elif operation == REPAIR:
        repair_all(kit, observe)
    elif operation in MERGES:
        merge(kit, operation, in_job)
    else:
        with suppress(Exhausted):  # where the pool is nearly full: then it has undone what it did, which is steps, too
            (OPERATIONS | IMAGES | TRASH)[operation](kit)


def wait_in_job(child: int, report: int, in_job_s: float) -> int | None:
    """Kill a child some time after its merge has begun to move data; gives its status if it ended before."""
    while os.pread(report, 1, _IN_JOB_OFFSET) != b"\1":
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(_POLL_S)
    time.sleep(in_job_s)
    os.kill(child, signal.SIGKILL)  # not reaped yet, so the pid is still its
    return None


def run(root: str, operation: str, kill_at: int, in_job_s: float | None, wrong: str | None) -> dict[str, object]:
    """Run an operation in a child and say how it ended."""
    report = os.memfd_create("steps")
    os.pwrite(report, _COUNT.pack(0) + b"\0", 0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if wrong:
                WRONG[wrong]()
            run_child(root, operation, kill_at, report)
            status = 0
        finally:
            os._exit(status)
    ended = wait_in_job(child, report, in_job_s) if in_job_s is not None else None
    status = os.waitpid(child, 0)[1] if ended is None else ended
    (steps,) = _COUNT.unpack(os.pread(report, _COUNT.size, 0))
    os.close(report)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"{operation} failed by itself at step {steps}")
    return {"steps": steps, "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL}


def main() -> None:
    """Serve requests until standard input ends."""
    tools()  # once, for all children
    for line in sys.stdin:
        asked = json.loads(line)
        done = run(asked["root"], asked["operation"], asked["kill_at"], asked["in_job_s"], asked["wrong"])
        print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
