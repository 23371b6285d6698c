"""When layers are merged: the merger, a thread for each pool beside the collector's, and what calls for a merge.

It works off a queue of layers that have lost a reference or have been closed, and now and then all those that a look
at the whole pool has found, small ones first. One merge at a time, only with the lease of the pool, so in one process
of all that serve it; a merge steps back at once for whoever wants to use the chain, and comes again later. The
collector, which drops what nothing refers to, never waits for it.
"""

import heapq
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from csi_quobyte import telemetry
from csi_quobyte.engine import merging
from csi_quobyte.engine.check import is_needed_unmarked, unmarked_layers
from csi_quobyte.engine.index import Index
from csi_quobyte.engine.lease import Lease
from csi_quobyte.engine.merging import Ask, Plan
from csi_quobyte.errors import Busy, DriverError
from csi_quobyte.host.qemu import QemuTools
from csi_quobyte.pool.pace import no_pace
from csi_quobyte.pool.pools import Pool
from csi_quobyte.pool.records import LayerState, VolumeState, parse_marker
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

AGAIN_AFTER_S = 15.0  # after a merge that stepped back for somebody
NOT_OURS_AFTER_S = 60.0  # while the lease is another's
_QUIET_S = 5.0  # a layer that has lost a reference often loses the next one soon, and can be dropped then
_GRACE_AND_A_BIT_S = merging.GRACE_S + 1.0


@dataclass(frozen=True)
class Work:
    """What a look at a whole pool has found, as ids; each is judged anew when its turn comes."""

    begun: tuple[str, ...] = ()
    """Layers whose merge a process has noted that may be dead."""
    left: tuple[tuple[str, str], ...] = ()
    """Pairs (layer, child) of markers of children that have another parent now."""
    free: tuple[str, ...] = ()
    """Layers that nothing but one other layer refers to, small ones first, and heads of long chains."""
    unmarked: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Layers that a record needs, with the markers of that which are lost: nothing may change or remove them."""


def work_in(found: Index, store: Store, *, pace: Callable[[], None] = no_pace) -> Work:
    """Give what is to be merged in a pool, or was begun; `pace` is called between small steps.

    Nothing new while a record cannot be read: it may be the owner. What was begun keeps volumes from being staged, and
    to end it only the records that it names are needed.
    """
    begun = tuple(sorted(layer.id for layer in found.layers.values() if layer.merge))
    left = tuple(_left_markers(found, pace))
    unmarked = unmarked_layers(found)
    if found.unreadable:
        return Work(begun, left, unmarked=unmarked)
    small_first = sorted(
        _single_parents(found, pace), key=lambda layer_id: merging.allocated_bytes(store, found.layers[layer_id])
    )
    return Work(begun, left, (*small_first, *_long_heads(found, pace)), unmarked)


def _left_markers(found: Index, pace: Callable[[], None]) -> Iterator[tuple[str, str]]:
    for layer_id, names in found.refs.items():
        pace()
        for marker in map(parse_marker, names):
            child = found.layers.get(marker.id) if marker and marker.kind == "c" else None
            # a copy that has its record already and is not its volume's head yet may have to be made anew
            is_copied = child is not None and child.parent is None and child.id in found.intended_layers
            if child and child.parent != layer_id and layer_id in found.layers and not is_copied:
                yield layer_id, child.id


def _single_parents(found: Index, pace: Callable[[], None]) -> Iterator[str]:
    for layer in found.layers.values():
        pace()
        names = found.refs.get(layer.id, [])
        if layer.state is LayerState.FROZEN and layer.id not in found.held_layers and len(names) == 1:
            yield layer.id


def _long_heads(found: Index, pace: Callable[[], None]) -> Iterator[str]:
    depths: dict[str, int] = {}

    def depth_of(layer_id: str) -> int:
        path = []
        current: str | None = layer_id
        while current and current not in depths and current not in path:
            path.append(current)
            layer = found.layers.get(current)
            current = layer.parent if layer else None
        below = depths.get(current, 0) if current else 0
        for above, one in enumerate(reversed(path), start=1):
            depths[one] = below + above
        return depths[layer_id]

    for volume in found.volumes.values():
        pace()
        ready = volume.state is VolumeState.READY and not volume.attachments and volume.head in found.layers
        if ready and depth_of(volume.head) > merging.SOFT_DEPTH:
            yield volume.head


def plan_near(store: Store, layer_id: str, *, unmarked: Mapping[str, Sequence[str]]) -> Plan | None:
    """Give the merge that a layer calls for: its own, or if it is a head, the flattening of what it lies on; see `Work`
    for `unmarked`.
    """
    layer = store.find_layer(layer_id)
    if layer is None or layer.state is not LayerState.HEAD:
        return merging.plan_for(store, layer_id, keep=lambda one: is_needed_unmarked(store, one, unmarked))
    for marker in map(parse_marker, store.markers(layer_id) or []):
        volume = store.find_volume(marker.id) if marker and marker.kind == "v" else None
        if volume and volume.head == layer_id:
            return merging.plan_flattening(store, volume)
    return None


def end_begun(store: Store, tools: QemuTools, work: Work, *, is_held: Ask) -> Work:
    """Finish or undo the merges that were begun, and remove the markers that merges have left; gives what is left.

    Only for who holds the lease, which `is_held` says, and does no merge itself at this moment. What fails is to be
    tried again.
    """
    begun: list[str] = []
    left: list[tuple[str, str]] = []
    for layer_id in work.begun:
        try:
            merging.resume(store, tools, layer_id, is_held=is_held)
        except DriverError as error:
            log.warning("the merge of layer %s is ended later: %s", layer_id, error)
            begun.append(layer_id)
    for number, (layer_id, child_id) in enumerate(work.left):
        if not is_held():
            left += work.left[number:]
            break
        try:
            merging.tidy(store, layer_id, child_id, is_held=is_held)
        except DriverError as error:
            log.warning("the marker of child %s on layer %s is removed later: %s", child_id, layer_id, error)
            left.append((layer_id, child_id))
    return Work(tuple(begun), tuple(left))


class Merger:
    """The merging thread of one pool; started once, stopped with `stop`. It may be told of work before it is started.

    All methods but `stop` return at once.
    """

    def __init__(
        self,
        pool: Pool,
        tools: QemuTools,
        drop: Callable[[str], None],
        *,
        begins: bool,
        speed_bytes_per_s: int | None = None,
    ) -> None:
        """Without `begins` it begins no merge, and still ends what another process has begun.

        `drop` is told, and returns at once, which layer nothing refers to: while it was merged, nobody could drop it.
        `speed_bytes_per_s` limits what is moved.
        """
        self._drop = drop
        self._pool = pool
        self._tools = tools
        self._begins = begins
        self._speed_bytes_per_s = speed_bytes_per_s
        self._lease = Lease()
        self._changed = threading.Condition()
        self._stopping = False
        self._work: Work | None = None
        self._unmarked: Mapping[str, Sequence[str]] | None = None  # not known before the first look at everything
        self._due: list[tuple[float, str]] = []
        self._queued: dict[str, float] = {}  # when each is due; other entries of the heap are outdated
        self._said = ""
        self._thread = threading.Thread(target=self._run, name=f"merger-{pool.name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def look_at(self, layer_id: str, *, closed: bool = False) -> None:
        """Tell that a layer has lost a reference, or that a node has closed it: then it is left alone for a while."""
        if self._begins:
            self._queue(layer_id, _GRACE_AND_A_BIT_S if closed else _QUIET_S)

    def take(self, work: Work) -> None:
        """Tell what a look at the whole pool has found; what an earlier one has found is forgotten."""
        with self._changed:
            self._work = work
            self._changed.notify()

    def stop(self, timeout_s: float) -> bool:
        """End after undoing what is at hand; False if that takes longer than the time limit."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _queue(self, layer_id: str, after_s: float) -> None:
        """Have a look at a layer in a while; at the later time if it is due already: it was detached again, say."""
        due = time.monotonic() + after_s
        with self._changed:
            if due > self._queued.get(layer_id, 0.0):
                self._queued[layer_id] = due
                heapq.heappush(self._due, (due, layer_id))
                self._changed.notify()

    def _run(self) -> None:
        while (thing := self._next()) is not None:
            try:
                self._do(self._pool.open(), thing)
                self._said = ""
            except DriverError as error:
                telemetry.COLLECTOR_FAILURES.labels(self._pool.name).inc()
                # a pool that is not mounted is said once, not with each layer
                level = logging.DEBUG if str(error) == self._said else logging.WARNING
                log.log(level, "merger of pool %s: %s", self._pool.name, error)
                self._said = str(error)
            except Exception:  # the thread must live on; the counter and the traceback tell of the bug
                telemetry.COLLECTOR_FAILURES.labels(self._pool.name).inc()
                log.exception("merger of pool %s", self._pool.name)

    def _next(self) -> Work | str | None:
        """Wait for the next thing to do; None at the end. The lease is given back before a wait."""
        while True:
            with self._changed:
                if thing := self._take_due():
                    return thing
                if self._stopping:
                    break
            self._release_lease()
            with self._changed:
                if not self._stopping and self._work is None:
                    self._changed.wait(max(0.0, self._due[0][0] - time.monotonic()) if self._due else None)
        self._release_lease()
        return None

    def _take_due(self) -> Work | str | None:
        if self._stopping:
            return None
        if work := self._work:
            self._work = None
            return work
        while self._due and self._due[0][0] <= time.monotonic():
            due, layer_id = heapq.heappop(self._due)
            if self._queued.get(layer_id) == due:
                del self._queued[layer_id]
                return layer_id
        return None

    def _release_lease(self) -> None:
        if self._lease.is_taken:
            with suppress(DriverError):  # it runs out by itself
                self._lease.release(self._pool.open())

    def _do(self, store: Store, thing: Work | str) -> None:
        if isinstance(thing, Work):
            self._unmarked = thing.unmarked
            self._end(store, thing)
            for layer_id in thing.free if self._begins else ():
                self._queue(layer_id, 0.0)
        elif (layer := store.find_layer(thing)) and layer.merge:
            self._end(store, Work(begun=(thing,)))
        elif not self._begins or self._unmarked is None:
            return  # the first look at everything finds what there is to be merged
        elif plan := plan_near(store, thing, unmarked=self._unmarked):
            # without space not even the lease is taken: the reserve of the pool is there for deleting
            if not merging.has_space(store, plan):
                log.info("pool %s: no space for a merge of layer %s", self._pool.name, plan.layer)
            elif self._lease.hold(store):
                self._merge(store, plan)
            else:
                # Who has it does not know what this process was told, or is dead: then it can be taken after a while.
                log.info("pool %s: another process merges layers; layer %s waits", self._pool.name, plan.layer)
                self._queue(thing, NOT_OURS_AFTER_S)

    def _end(self, store: Store, work: Work) -> None:
        """End what was begun; what fails comes again."""
        if not work.begun and not work.left:
            return
        rest = work
        if self._lease.hold(store):
            rest = end_begun(store, self._tools, work, is_held=lambda: self._lease.is_safe(store))
        # also those of another holder: if that is dead, they keep volumes from being staged until somebody ends them
        for layer_id in rest.begun:
            self._queue(layer_id, AGAIN_AFTER_S)

    def _merge(self, store: Store, plan: Plan) -> None:
        """Do one merge, with the lease."""
        started = time.monotonic()
        try:
            done = merging.merge(
                store,
                self._tools,
                plan,
                is_held=lambda: self._lease.is_safe(store),
                may_go_on=lambda: not self._stopping,
                speed_bytes_per_s=self._speed_bytes_per_s,
            )
        except Busy as error:  # somebody wants the volume: later
            log.info("merger of pool %s: %s", self._pool.name, error)
            if not store.markers(plan.layer):
                self._drop(plan.layer)
            self._queue(plan.layer, AGAIN_AFTER_S)
            return
        if done:
            telemetry.LAYERS_MERGED.labels(self._pool.name, plan.kind).inc()
            log.info("%s of layer %s took %.1f s", plan.kind, plan.layer, time.monotonic() - started)
            self.look_at(plan.parent or plan.child)
        elif not store.markers(plan.layer):
            self._drop(plan.layer)
