"""Putting right what `check` finds, as far as it is certain; what is not certain is reported and left as it is.

`plan` says what would be done and changes nothing. `repair` goes in rounds: look, do what can be done about each
finding, let the collector do what it does anyway, look again; it ends when a round has achieved nothing. It holds the
collector's lock and the lease of the pool, so that neither drops nor merges go on, and for each action the locks of
the objects concerned; what it decides by is read again under them. Each action is one durable step, or several of
which each leaves the pool no worse: it can be killed anywhere and run again.

An image is only touched while no volume that lies on it is attached, and no daemon has it open.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from csi_quobyte.engine import check as check_module
from csi_quobyte.engine import collector
from csi_quobyte.engine import index as index_module
from csi_quobyte.engine.check import CheckImage, Finding, Kind, Result
from csi_quobyte.engine.index import Index
from csi_quobyte.engine.lease import Lease
from csi_quobyte.engine.merging import is_in_grace
from csi_quobyte.engine.rebuild import (
    Uncertain,
    parents_by_marker,
    rebuild_layer,
    rebuild_object,
)
from csi_quobyte.errors import Busy, Corrupt, DriverError, NotFound, Refused
from csi_quobyte.host import qemu_img
from csi_quobyte.host.qemu import QemuTools
from csi_quobyte.pool import images, layout, records
from csi_quobyte.pool.naming import is_claim
from csi_quobyte.pool.records import (
    LayerRecord,
    LayerState,
    Owning,
    SnapshotRecord,
    SnapshotState,
    VolumeRecord,
    VolumeState,
    is_layer_id,
    layer_of,
    parse_id,
    parse_marker,
    parse_trash_id,
    same_version,
)
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

_Key = tuple[Kind, str, str]
Step = Literal["rebuild-record", "make-marker", "set-backing-name", "free-clusters", "remove-note", "collect", "none"]

_ROUNDS_AT_MOST = 6
_PATIENCE_S = 15.0  # for others that hold a lock or the lease
_PAUSE_S = 0.5
_IMAGE_TIMEOUT_S = 80.0  # together with what may have passed since the last renewal of the lease well below its end
_LOCKS_AT_MOST = 400  # each is an open file
# What has to be right before something else can be judged comes first.
_ORDER: tuple[Step, ...] = ("rebuild-record", "make-marker", "set-backing-name", "free-clusters", "remove-note")

_COLLECTED: frozenset[Kind] = frozenset(
    {"unfinished", "stale-marker", "orphan-layer", "orphan-file", "stale-claim", "stale-temporary"}
)
# seen only by looking into an image, which is not done while it is in use
_OF_IMAGES: frozenset[Kind] = frozenset({"wrong-size", "wrong-backing-name", "damaged-image", "leaked-clusters"})
_LOST: dict[Kind, str] = {
    "missing-image": "its contents are gone; volumes and snapshots that need it can be deleted",
    "broken-chain": "the records contradict each other, and nothing says which is right",
    "wrong-size": "the file or the record was changed, and nothing says which is right",
    "damaged-image": "nothing in the pool can bring its contents back",
    "foreign-file": "not ours to remove",
}


@dataclass(frozen=True)
class Action:
    """What is or would be done about a finding; `none` when nothing can be, `reason` says why or what."""

    kind: Kind
    id: str
    path: str
    action: Step
    done: bool
    reason: str


@dataclass
class Outcome:
    """What was done, what was found first, what is left, and how many images were left alone as they are in use."""

    actions: list[Action]
    before: Result
    after: Result
    skipped_live: int


class _InUse(Uncertain):
    """Nothing may be done about a finding now: a daemon has the image open, or may have."""


@dataclass(frozen=True)
class _Task:
    """The answer to a finding. `locks` are held and `unchanged` is asked before `work` is done."""

    step: Step
    reason: str
    locks: frozenset[str] = frozenset()
    work: Callable[[], object] = lambda: None
    is_live: bool = False


@dataclass
class _Users:
    """The volumes, snapshots and images that lie on a layer, and the records that cannot be read and may lie on it."""

    volumes: set[str] = field(default_factory=set)
    snapshots: set[str] = field(default_factory=set)
    images: set[str] = field(default_factory=set)
    trashed: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)


def plan(store: Store, tools: QemuTools, check_image: CheckImage) -> Outcome:
    """Say what `repair` would begin with; changes nothing."""
    result = check_module.check(store, check_image)
    found = index_module.read(store)
    tasks = [(finding, _task(store, tools, found, finding)) for finding in result.findings]
    live = sum(task.is_live for _, task in tasks)
    return Outcome([_as_action(finding, task, done=False) for finding, task in tasks], result, result, live)


def repair(store: Store, tools: QemuTools, check_image: CheckImage) -> Outcome:
    """Do what can be done about each finding, until nothing more can.

    Raises:
        Busy: another process collects or merges in this pool all the time; what was done so far stays done.
    """
    before = current = check_module.check(store, check_image)
    actions: dict[_Key, Action] = {}
    live: set[_Key] = set()
    for _ in range(_ROUNDS_AT_MOST):
        attempted = _round(store, tools, current.findings) if current.findings else []
        current = check_module.check(store, check_image) if attempted else current
        left = {_key(finding) for finding in current.findings}
        achieved = False
        for finding, task, failure in attempted:
            key = _key(finding)
            is_done = key not in left and _is_believable(finding, task, failure)
            achieved = achieved or (is_done and task.step != "none")
            live = live | {key} if task.is_live or isinstance(failure, Refused) else live - {key}
            actions[key] = _as_action(finding, task, done=is_done, failure=failure)
        if not achieved:
            break
    for finding in current.findings:  # what the last round has brought to light
        actions.setdefault(_key(finding), Action(*_key(finding), "none", False, "found by the last look: run it again"))
    return Outcome(list(actions.values()), before, current, len(live))


def _is_believable(finding: Finding, task: _Task, failure: DriverError | None) -> bool:
    """Say whether a finding that is not found any more is put right: an image may just have come into use since."""
    if finding.kind in _OF_IMAGES:
        return task.step != "none" and failure is None
    return failure is None or task.step == "rebuild-record"  # another finding may have asked for the same record


def _key(finding: Finding) -> _Key:
    """What tells one finding from another: the detail may change while it stays the same."""
    return finding.kind, finding.id, finding.path


def _as_action(finding: Finding, task: _Task, *, done: bool, failure: DriverError | None = None) -> Action:
    reason = str(failure) if failure and not done else task.reason
    if done and task.step == "none":
        reason = "it went away with what else was done"
    return Action(finding.kind, finding.id, finding.path, task.step, done, reason)


# --- one round -------------------------------------------------------------------------------------------------


def _round(
    store: Store, tools: QemuTools, findings: Sequence[Finding]
) -> list[tuple[Finding, _Task, DriverError | None]]:
    """Attempt something about each finding; gives what, and why it failed if it did."""
    attempted: list[tuple[Finding, _Task, DriverError | None]] = []
    found = index_module.read(store)
    tasks = [(finding, _task(store, tools, found, finding)) for finding in findings]
    if all(task.step == "none" for _, task in tasks):
        return [(finding, task, None) for finding, task in tasks]
    with _alone(store) as lease:
        found = index_module.read(store)
        tasks = [(finding, _task(store, tools, found, finding)) for finding in findings]
        for step in _ORDER:
            for finding, task in tasks:
                if task.step == step:
                    attempted.append((finding, task, _attempt(store, found, task, lease)))
        attempted += [(finding, task, None) for finding, task in tasks if task.step == "none"]
    collected = [(finding, task) for finding, task in tasks if task.step == "collect"]
    failure = _collect(store, tools) if collected else None
    return attempted + [(finding, task, failure) for finding, task in collected]


def _attempt(store: Store, found: Index, task: _Task, lease: Lease) -> DriverError | None:
    """Do one task if nothing that it was decided by has changed; gives why not."""
    try:
        with ExitStack() as stack:
            for name in sorted(task.locks):
                stack.enter_context(store.lock(name))
            _check_unchanged(store, found, task.locks)
            _hold(lease, store)  # each task takes less than what is left of the lease after that
            task.work()
    except DriverError as error:
        return error
    log.info("%s: %s", task.step, task.reason)
    return None


def _check_unchanged(store: Store, found: Index, record_ids: Iterable[str]) -> None:
    """Check under their locks that volumes and snapshots are as they were when the decision was made.

    Raises:
        Busy: one is not.
    """
    for record_id in record_ids:
        parsed = parse_id(record_id)
        if record_id in found.unreadable or parsed is None:
            continue
        current, seen = _now_and_then(store, found, record_id, parsed.kind)
        if (current is None) != (seen is None) or (current and seen and not same_version(current, seen)):
            raise Busy(f"{record_id} was changed by another operation at this moment")


def _now_and_then(
    store: Store, found: Index, record_id: str, kind: Literal["vol", "snap", "img"]
) -> tuple[Owning | None, Owning | None]:
    """Give a record as it is, and as it was when the pool was read."""
    match kind:
        case "vol":
            return store.find_volume(record_id), found.volumes.get(record_id)
        case "snap":
            return store.find_snapshot(record_id), found.snapshots.get(record_id)
        case "img":
            return store.find_image(record_id), found.images.get(record_id)


@contextmanager
def _alone(store: Store) -> Iterator[Lease]:
    """Keep the collector and merges of this pool out for a while.

    Raises:
        Busy: one of them is at work all the time.
    """
    lease = Lease()
    try:
        _until_free(lambda: _hold(lease, store))
        with ExitStack() as stack:
            _until_free(lambda: stack.enter_context(store.lock(records.LEASE_ID)))
            yield lease
    finally:
        lease.release(store)


def _hold(lease: Lease, store: Store) -> None:
    if not lease.hold(store):
        raise Busy("another process merges layers in this pool now, or collector.json cannot be read; run it again")


def _until_free(attempt: Callable[[], object]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            attempt()
        except Busy:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_PAUSE_S)
        else:
            return


def _collect(store: Store, tools: QemuTools) -> DriverError | None:
    """Let the collector do its work, and wait until claims count as dead processes'; gives the failure."""
    deadline = time.monotonic() + _PATIENCE_S
    try:
        while True:
            for _ in collector.collect(store, tools, merges=False, purges=False):
                pass
            folders = ("volumes", "snapshots", "images", "layers")
            listings = [listing for folder in folders for listing in store.listings(folder)]
            names = [name for _, shard in listings for name in shard] + store.trash_strays() + store.job_claims()
            names += store.lease_claims()
            if not any(is_claim(name) for name in names) or time.monotonic() >= deadline:
                return None
            time.sleep(_PAUSE_S)
    except DriverError as error:
        return error


# --- what to do about a finding --------------------------------------------------------------------------------


def _task(store: Store, tools: QemuTools, found: Index, finding: Finding) -> _Task:
    try:
        return _decide(store, tools, found, finding)
    except _InUse as why:
        return _Task("none", str(why), is_live=True)
    except Uncertain as why:
        return _Task("none", str(why))
    except Corrupt as error:  # something else is damaged, which has a finding of its own
        return _Task("none", str(error))


def _decide(store: Store, tools: QemuTools, found: Index, finding: Finding) -> _Task:
    """Give the task for a finding.

    Raises:
        Uncertain, Corrupt: nothing can be done about it.
    """
    match finding.kind:
        case "unreadable-record":
            return _rebuilding(store, found, finding)
        case "missing-layer":
            return _remaking(store, found, finding)
        case "missing-marker":
            return _marking(store, found, finding)
        case "wrong-backing-name":
            return _naming(store, tools, found, finding)
        case "leaked-clusters":
            return _freeing(store, tools, found, finding)
        case kind if kind in _COLLECTED:
            return _collecting(found, finding)
        case kind:
            return _Task("none", _LOST[kind])


def _rebuilding(store: Store, found: Index, finding: Finding) -> _Task:
    record_id = finding.id
    if finding.path.endswith(f"/{records.LEASE_ID}.json"):
        raise Uncertain("its holder may be merging layers: stop all controllers of this pool, then remove it")
    if not record_id:
        return _Task(
            "remove-note",
            "that of a node; where its plugin runs, it writes it anew within ten minutes",
            work=lambda: store.remove_damaged_node(finding.path.rpartition("/")[2]),
        )
    if ".closed-" in finding.path:
        return _forgetting(store, found, record_id)
    if record_id not in found.unreadable:
        raise Uncertain("it says what was written to the device, which is known to nobody else; delete the volume")
    if is_layer_id(record_id):
        if not found.refs.get(record_id) and record_id not in found.named_layers:
            if other := [one for one in found.unreadable if not is_layer_id(one)]:
                raise Uncertain(f"left alone while {other[0]} cannot be read: it may be the owner")
            return _Task("collect", "nothing refers to this layer")
        layer = rebuild_layer(store, found, record_id)
        locks = _direct_users(found, layer)
        return _Task("rebuild-record", _words(layer), locks, lambda: _replace_layer(store, found, layer))
    if parse_trash_id(record_id):
        raise Uncertain("it is in the trash: csi-quobyte trash purge removes it")
    if record_id.startswith("job-"):
        raise Uncertain("an import or another long command: when no such command runs anywhere, remove this file")
    record = rebuild_object(store, found, record_id)
    reason = f"its file was cut off behind all that matters; it refers to layer {layer_of(record)}"
    locks = frozenset({record_id, record.source_volume} if isinstance(record, SnapshotRecord) else {record_id})
    again = partial(rebuild_object, store, found, record_id)
    return _Task("rebuild-record", reason, locks, lambda: _replace(store, record, again))


def _forgetting(store: Store, found: Index, volume_id: str) -> _Task:
    """Remove a node's word that it has closed a volume: without it, freezing waits for half a minute, as after a loss.

    One of a volume in the trash goes with that.
    """
    volume = found.volumes.get(volume_id)
    if volume is None:
        raise Uncertain("it is removed with the volume, which is in the trash")
    _check_detached(found, {volume_id})
    return _Task(
        "remove-note",
        "a word of half a minute's worth, that the volume was closed in order",
        frozenset({volume_id}),
        lambda: store.forget_closed(volume),
    )


def _words(layer: LayerRecord) -> str:
    return f"state {layer.state}, {layer.size_bytes} bytes, parent {layer.parent or 'none'}"


def _replace_layer(store: Store, found: Index, layer: LayerRecord) -> None:
    _check_same_markers(store, found, layer.id)
    _replace(store, layer, lambda: layer)


def _replace(store: Store, record: Owning | LayerRecord, rebuild: Callable[[], Owning | LayerRecord]) -> None:
    """Put a rebuilt record in its place, unless the damaged one is readable after all, or says something else now."""
    parsed = parse_id(record.id)
    folder = layout.FOLDERS[parsed.kind] if parsed else "layers"
    damaged = store.damaged_bytes(folder, record.id)
    if damaged is None or not store.is_damaged(folder, record.id):
        raise Busy(f"{record.id} can be read now, or is gone")
    if rebuild() != record:
        raise Busy(f"{record.id} was changed by another operation")
    store.replace_damaged(record, damaged)


def _check_same_markers(store: Store, found: Index, layer_id: str) -> None:
    if store.markers(layer_id) != found.refs.get(layer_id):
        raise Busy(f"the references to layer {layer_id} change at this moment")


def _remaking(store: Store, found: Index, finding: Finding) -> _Task:
    """Make the record of a layer that has lost it; its name decides, so that none is ever replaced."""
    layer_id = finding.path.rpartition("/")[2].removesuffix(".json")
    layer = rebuild_layer(store, found, layer_id)

    def work() -> None:
        _check_same_markers(store, found, layer_id)
        store.create(layer)

    return _Task("rebuild-record", _words(layer), _direct_users(found, layer), work)


def _direct_users(found: Index, layer: LayerRecord) -> frozenset[str]:
    """Name who may change a layer's record: the volume whose head it is or was, and the snapshots and images of it.

    Nobody can open a chain through a record that cannot be read. The image of an attached head grows, so that its size
    is not read under its daemon's hands.

    Raises:
        _InUse: it is the head of an attached volume.
    """
    markers = [parse_marker(name) for name in found.refs.get(layer.id, [])]
    users = {marker.id for marker in markers if marker and marker.kind != "c"}
    users |= {volume.id for volume in found.volumes.values() if volume.head == layer.id}
    if layer.state is LayerState.HEAD:
        _check_detached(found, users)
    return frozenset(users)


def _check_detached(found: Index, volume_ids: Iterable[str]) -> None:
    for volume_id in volume_ids:
        volume = found.volumes.get(volume_id)
        if volume and volume.attachments:
            raise _InUse(f"volume {volume_id} is attached to node {volume.attachments[0].node}")
        if volume and is_in_grace(volume):
            raise _InUse(f"volume {volume_id} was detached a moment ago: its node may have been lost, and still write")


def _marking(store: Store, found: Index, finding: Finding) -> _Task:
    layer_id, marker = finding.id, finding.path
    parsed = parse_marker(marker)
    layer = found.layers.get(layer_id)
    if parsed is None or layer is None or (layer_id, marker) not in {one[:2] for one in check_module.needed(found)}:
        raise Uncertain("it changes at this moment")
    if layer.state is LayerState.RETIRED:
        raise Uncertain("the layer was condemned: its image may be gone")
    child = found.layers.get(parsed.id) if parsed.kind == "c" else None
    if child:
        _check_parent(store, found, child, layer)

    def work() -> None:
        try:
            store.mark(layer_id, marker)
        except NotFound:
            # die here: an empty directory, with which the collector keeps what a record names
            store.remake_refs(layer_id)
            store.mark(layer_id, marker)

    # a child without a record is the head of a volume that is being copied
    copied = {volume.id for volume in found.volumes.values() if parsed.kind == "c" and volume.head == parsed.id}
    locks = frozenset({parsed.id} if parsed.kind != "c" else copied)
    return _Task("make-marker", finding.detail, locks, work)


def _check_parent(store: Store, found: Index, child: LayerRecord, parent: LayerRecord) -> None:
    """Check that a child's image bears its record out, and that no other layer has its marker.

    Raises:
        Uncertain: it may be the record that is wrong.
    """
    name = images.backing_name(store, child)
    if name != store.backing_name(child.id, parent) or parents_by_marker(found, child.id):
        raise Uncertain(f"its record alone says that it is the parent of {child.id}, whose image names {name!r}")


def _naming(store: Store, tools: QemuTools, found: Index, finding: Finding) -> _Task:
    layer = found.layers.get(finding.id)
    if layer is None:
        raise Uncertain("it changes at this moment")
    parent = found.layers.get(layer.parent) if layer.parent else None
    if layer.parent and parent is None:
        raise Uncertain(f"its parent {layer.parent} has no record that can be read")
    if layer.merge or (parent and parent.merge):
        return _Task("collect", "a merge is under way, or was left by a dead process")
    name = store.backing_name(layer.id, parent) if parent else None
    marked = parents_by_marker(found, layer.id)
    if marked != ([layer.parent] if layer.parent else []):
        raise Uncertain(f"it may be the record that is wrong: {', '.join(marked) or 'no layer'} has its child marker")

    def work() -> None:
        _check_same_markers(store, found, layer.id)
        store.check_not_written(layer)
        qemu_img.set_backing_name(tools, store.image_path(layer), name, parent.format if parent else None)
        found_name = images.backing_name(store, layer)
        if found_name != name:
            raise Corrupt(f"{store.image_path(layer)} names {found_name!r} after it was given the name {name!r}")

    return _Task("set-backing-name", f"{name!r}, as the records say", _idle(found, layer.id), work)


def _freeing(store: Store, tools: QemuTools, found: Index, finding: Finding) -> _Task:
    layer = found.layers.get(finding.id)
    if layer is None:
        raise Uncertain("it changes at this moment")

    def work() -> None:
        _check_same_markers(store, found, layer.id)
        store.check_not_written(layer)
        images.read_header(store, layer)
        qemu_img.free_leaks(tools, store.image_path(layer), timeout_s=_IMAGE_TIMEOUT_S)

    return _Task("free-clusters", finding.detail, _idle(found, layer.id), work)


def _collecting(found: Index, finding: Finding) -> _Task:
    volume, snapshot = found.volumes.get(finding.id), found.snapshots.get(finding.id)
    if finding.kind == "unfinished" and (
        (volume and volume.state is VolumeState.CREATING) or (snapshot and snapshot.state is SnapshotState.CREATING)
    ):
        return _Task("none", "its making did not end: repeat the call, or delete it")
    if found.unreadable and finding.kind not in {"unfinished", "stale-temporary"}:
        unreadable = next(iter(found.unreadable))
        return _Task("none", f"left alone while {unreadable} cannot be read: it may be the owner")
    return _Task("collect", finding.detail)


# --- who uses a layer ------------------------------------------------------------------------------------------


def _idle(found: Index, layer_id: str) -> frozenset[str]:
    """Name everything that lies on a layer, to be locked while its image is changed.

    Raises:
        _InUse: a volume that lies on it is attached, or may be.
        Uncertain: too much lies on it.
    """
    users = _users(found, layer_id)
    if users.unknown:
        raise _InUse(f"{min(users.unknown)} refers to it and cannot be read: it may be in use")
    _check_detached(found, users.volumes)
    trashed = [found.trash[entry_id] for entry_id in users.trashed]
    if any(isinstance(entry, VolumeRecord) and is_in_grace(entry) for entry in trashed):
        raise _InUse("a volume that lies on it was deleted a moment ago: its node may have been lost, and still write")
    names = users.volumes | users.snapshots | users.images | {entry.id for entry in trashed}
    if len(names) > _LOCKS_AT_MOST:
        raise Uncertain(f"{len(names)} volumes, snapshots and images lie on it, too many to keep all of them still")
    return frozenset(names)


def _users(found: Index, layer_id: str) -> _Users:
    """Find what lies on a layer, by records and by markers."""
    users = _Users()
    above = _layers_above(found, layer_id)
    users.unknown |= above & found.unreadable.keys()
    for layer in above:
        markers = [marker for marker in map(parse_marker, found.refs.get(layer, [])) if marker]
        owners = {marker.id for marker in markers if marker.kind != "c"}
        users.unknown |= {owner for marker in markers for owner in marker.owners} & found.unreadable.keys()
        # a child without a record is the marker of a job that reads it, or of a layer that is being made
        users.unknown |= {marker.id for marker in markers if marker.kind == "c"} - found.layers.keys()
        users.volumes |= owners & found.volumes.keys()
        users.snapshots |= owners & found.snapshots.keys()
        users.images |= owners & found.images.keys()
    for volume in found.volumes.values():
        if above & {volume.head, volume.parent, volume.source_next}:
            users.volumes |= {volume.id} | ({volume.source.id} if volume.source_next and volume.source else set())
    users.snapshots |= {one.id for one in found.snapshots.values() if above & {one.layer, one.next, one.cache}}
    users.images |= {image.id for image in found.images.values() if image.layer in above}
    users.unknown |= {job.id for job in found.jobs.values() if job.layer in above}
    users.trashed |= {entry_id for entry_id, entry in found.trash.items() if layer_of(entry) in above}
    return users


def _layers_above(found: Index, layer_id: str) -> set[str]:
    """Give a layer and all that lie on it, by records and by markers."""
    children: dict[str, set[str]] = {}
    for layer in found.layers.values():
        if layer.parent:
            children.setdefault(layer.parent, set()).add(layer.id)
    for parent, names in found.refs.items():
        markers = (parse_marker(name) for name in names)
        children.setdefault(parent, set()).update(marker.id for marker in markers if marker and marker.kind == "c")
    todo, seen = [layer_id], {layer_id}
    while todo:
        fresh = children.get(todo.pop(), set()) - seen
        seen |= fresh
        todo += fresh
    return seen
