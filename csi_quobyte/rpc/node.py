"""The CSI Node service: convert, one operation, convert.

Calls that read or write records run on the pool's executor. The others (unstage, unpublish, stats) must work while a
pool is dead or hanging, so they run on an executor of the node's own. Each call that changes something has its volume
to itself from its arrival until its work has really ended: an unstage is not answered while an abandoned stage hangs.

An unstage flushes only what it knows to be still this node's: "I could not look" is an answer of its own.
"""

import enum
import errno
import logging
import os
import threading
import time
from collections.abc import Mapping

import grpc

from csi_quobyte import telemetry
from csi_quobyte.errors import Busy, DriverError, InvalidArgument, NotFound, Unavailable
from csi_quobyte.host import mounts
from csi_quobyte.operations.staging import Node, StageRequest, VolumeStats
from csi_quobyte.operations.targets import PublishRequest
from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pb import csi_pb2_grpc
from csi_quobyte.pool.executor import Executor, Reservations
from csi_quobyte.pool.pools import Pool, Pools
from csi_quobyte.rpc import convert

_Rpc = csi.NodeServiceCapability.RPC
CAPABILITIES = (
    _Rpc.STAGE_UNSTAGE_VOLUME,
    _Rpc.GET_VOLUME_STATS,
    _Rpc.EXPAND_VOLUME,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
)

LOCAL_WORKERS = 32
FENCE_EVERY_S = 10.0
FENCE_OVERDUE_S = 60.0
_LOOK_WAIT_S = 1.0
_LOOKERS = 4
_GONE_ERRORS = (errno.ENOTCONN, errno.ENOENT, errno.ESTALE)
"""What the kernel says of a path whose FUSE server has ended, or that is not there."""

log = logging.getLogger(__name__)


class NodeService(csi_pb2_grpc.NodeServicer):
    """Serves the node RPCs."""

    def __init__(
        self,
        node: Node,
        pools: Pools,
        attachments: "Attachments",
        *,
        node_id: str,
        max_volumes: int,
        timeout_s: float,
    ) -> None:
        self._node = node
        self._pools = pools
        self._attachments = attachments
        self._node_id = node_id
        self._max_volumes = max_volumes
        self._reservations = Reservations()
        self._local = Executor(f"node {node_id}", workers=LOCAL_WORKERS, callers=LOCAL_WORKERS, timeout_s=timeout_s)

    def NodeStageVolume(
        self, request: csi.NodeStageVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeStageVolumeResponse:
        volume_id = convert.required(request.volume_id, "the volume id")
        staging_path = convert.path(request.staging_target_path, "the staging target path")
        checked = _capability(request)
        pool = self._pools.owner(volume_id, "volume")
        stage = StageRequest(
            volume_id=volume_id,
            generation=_generation(request.publish_context),
            staging_path=staging_path,
            access_type=checked.access_type,
            filesystem=checked.filesystem,
            mount_options=checked.mount_options,
        )
        pool.run(lambda store: self._node.stage(store, stage), finished=self._reservations.take(volume_id))
        return csi.NodeStageVolumeResponse()

    def NodeUnstageVolume(
        self, request: csi.NodeUnstageVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeUnstageVolumeResponse:
        volume_id = convert.required(request.volume_id, "the volume id")
        staging_path = convert.path(request.staging_target_path, "the staging target path")
        taken = self._reservations.take(volume_id)
        self._local.run(lambda: self._unstage(volume_id, staging_path), finished=taken)
        return csi.NodeUnstageVolumeResponse()

    def _unstage(self, volume_id: str, staging_path: str) -> None:
        standing = self._attachments.standing(volume_id)
        if standing is Standing.UNKNOWN:
            raise Unavailable(
                f"the pool of volume {volume_id} is mounted and does not say whether the volume is still attached "
                "here; nothing is flushed or dropped before it does"
            )
        if standing is Standing.UNREACHABLE:
            log.warning("volume %s is unstaged without a look at its pool, which is not mounted", volume_id)
        self._node.unstage(volume_id, staging_path, stale=standing is Standing.TAKEN)
        if standing is Standing.OURS:
            self._attachments.say_closed(volume_id)

    def NodePublishVolume(
        self, request: csi.NodePublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodePublishVolumeResponse:
        volume_id = convert.required(request.volume_id, "the volume id")
        target_path = convert.path(request.target_path, "the target path")
        checked = _capability(request)
        pool = self._pools.owner(volume_id, "volume")
        publish = PublishRequest(
            volume_id=volume_id,
            generation=_generation(request.publish_context),
            staging_path=convert.path(request.staging_target_path, "the staging target path"),
            target_path=target_path,
            access_type=checked.access_type,
            readonly=request.readonly or checked.readonly,
            single_writer=checked.access_mode == convert.SINGLE_WRITER,
        )
        pool.run(lambda store: self._node.publish(store, publish), finished=self._reservations.take(volume_id))
        return csi.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi.NodeUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeUnpublishVolumeResponse:
        volume_id = convert.required(request.volume_id, "the volume id")
        target_path = convert.path(request.target_path, "the target path")
        taken = self._reservations.take(volume_id)
        self._local.run(lambda: self._node.unpublish(volume_id, target_path), finished=taken)
        return csi.NodeUnpublishVolumeResponse()

    def NodeGetVolumeStats(
        self, request: csi.NodeGetVolumeStatsRequest, context: grpc.ServicerContext
    ) -> csi.NodeGetVolumeStatsResponse:
        volume_id = convert.required(request.volume_id, "the volume id")
        volume_path = _existing_path(request.volume_path)
        found = self._local.run(lambda: self._node.stats(volume_id, volume_path))
        return csi.NodeGetVolumeStatsResponse(usage=_usage(found))

    def NodeExpandVolume(
        self, request: csi.NodeExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeExpandVolumeResponse:
        volume_id = convert.required(request.volume_id, "the volume id")
        if not request.volume_path:
            raise InvalidArgument("the volume path is missing")
        pool = self._pools.owner(volume_id, "volume")
        volume_path = _existing_path(request.volume_path)
        wanted = convert.size_range(request.capacity_range if request.HasField("capacity_range") else None)
        size_bytes = pool.run(
            lambda store: self._node.expand(store, volume_id, volume_path, wanted.required_bytes),
            finished=self._reservations.take(volume_id),
        )
        return csi.NodeExpandVolumeResponse(capacity_bytes=size_bytes)

    def NodeGetCapabilities(
        self, request: csi.NodeGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.NodeGetCapabilitiesResponse:
        return csi.NodeGetCapabilitiesResponse(
            capabilities=[
                csi.NodeServiceCapability(rpc=csi.NodeServiceCapability.RPC(type=one)) for one in CAPABILITIES
            ]
        )

    def NodeGetInfo(self, request: csi.NodeGetInfoRequest, context: grpc.ServicerContext) -> csi.NodeGetInfoResponse:
        return csi.NodeGetInfoResponse(node_id=self._node_id, max_volumes_per_node=self._max_volumes)


class Standing(enum.Enum):
    """Whose a volume is that is staged here, as far as its record can be asked."""

    OURS = "ours"
    """Attached here as it was staged; or not staged here at all."""
    TAKEN = "taken"
    """Not attached here any more, or for another attachment: what is cached here is older than the volume."""
    UNKNOWN = "unknown"
    """Its pool is mounted and does not answer: writes may still reach it."""
    UNREACHABLE = "unreachable"
    """Its pool is not mounted, or its client has died: nothing of this node can reach it."""


class Attachments:
    """Looks whether what is staged here is still attached here; a pool that hangs costs threads of its own only."""

    def __init__(self, node: Node, pools: Pools, *, timeout_s: float) -> None:
        self._node = node
        self._pools = pools
        self._executors = {
            pool.name: Executor(
                f"look at pool {pool.name} ({pool.path})", workers=_LOOKERS, callers=LOCAL_WORKERS, timeout_s=timeout_s
            )
            for pool in pools.all
        }

    def standing(self, volume_id: str) -> Standing:
        """Look at the record of a volume, as long as the time limit of its pool allows."""
        try:
            if not self._node.is_staged(volume_id):
                return Standing.OURS
        except Unavailable as error:
            log.warning("whether volume %s is staged here cannot be said: %s", volume_id, error)
            return Standing.UNKNOWN
        try:
            pool = self._pools.find_owner(volume_id)
        except Unavailable:
            # that of a pool which was not opened since this process began; one that is mounted may be it
            never_opened = [one for one in self._pools.all if one.prefix is None]
            gone = all(self._is_gone(one) for one in never_opened)
            return Standing.UNREACHABLE if gone else Standing.UNKNOWN
        except DriverError as error:
            log.error("whose volume %s is cannot be said: %s", volume_id, error)
            return Standing.UNKNOWN
        if pool is None:
            return Standing.OURS
        try:
            # opened here and not by pool.run, which calls that wait for this pool may have filled
            record = self._executors[pool.name].run(lambda: pool.open().find_volume(volume_id))
        except DriverError as error:
            log.warning("the record of volume %s cannot be read: %s", volume_id, error)
            return Standing.UNREACHABLE if self._is_gone(pool) else Standing.UNKNOWN
        try:
            return Standing.TAKEN if self._node.is_stale(volume_id, record) else Standing.OURS
        except Unavailable as error:
            log.warning("for which attachment volume %s is staged here cannot be said: %s", volume_id, error)
            return Standing.UNKNOWN

    def say_closed(self, volume_id: str) -> None:
        """Write down in the pool that this node has closed a volume, so that it can be frozen once it is detached.

        Where that fails, freezing waits until this node would have fenced itself.
        """
        try:
            if pool := self._pools.find_owner(volume_id):
                self._executors[pool.name].run(lambda: self._node.note_closed(pool.open(), volume_id))
        except DriverError as error:
            log.warning("that volume %s is closed here cannot be written down: %s", volume_id, error)

    def is_surely_taken(self, volume_id: str) -> bool:
        """Say whether a volume's record is there to be read now and says that it was taken away; does not wait long."""
        try:
            pool = self._pools.find_owner(volume_id)
            if pool is None or not pool.health(wait_s=_LOOK_WAIT_S).ok:
                return False
        except DriverError:
            return False
        return self.standing(volume_id) is Standing.TAKEN

    def _is_gone(self, pool: Pool) -> bool:
        """Say whether a pool is not mounted or its client dead; False for one that hangs."""
        try:
            return self._executors[pool.name].run(lambda: _is_gone(pool.path))
        except Unavailable:
            return False


def _is_gone(path: str) -> bool:
    try:
        os.statvfs(path)  # not answered from a cache
    except OSError as error:
        return error.errno in _GONE_ERRORS
    return mounts.at(path) is None


class Fence:
    """Looks now and then whether a staged volume was taken away from this node (a forced detach), and cuts it off.

    Twice in a row, because a client may show a record as it was a moment ago. Where locks do not reach between hosts
    this is what keeps a node that comes back from writing to what another one uses; it is not instantaneous.
    """

    def __init__(self, node: Node, attachments: Attachments) -> None:
        self._node = node
        self._attachments = attachments
        self._suspects: set[str] = set()
        self._fenced: set[str] = set()
        self._last_look = time.monotonic()

    def run_forever(self, every_s: float = FENCE_EVERY_S) -> None:
        """Look every `every_s` seconds for the life of the process."""
        waiter = threading.Event()
        while not waiter.wait(every_s):
            try:
                self.look()
            except Exception:  # a bug here must not end the looking: the node would write to what is not its own
                telemetry.UNEXPECTED_ERRORS.labels("Fence").inc()
                log.exception("the look at the staged volumes failed")

    def look(self) -> None:
        """Look once at every staged volume."""
        taken = {one for one in self._node.staged_volumes() if self._attachments.is_surely_taken(one)}
        self._fenced &= taken
        for volume_id in (taken & self._suspects) - self._fenced:
            try:
                self._node.fence(volume_id)
                self._fenced.add(volume_id)
            except Busy as error:
                log.error("volume %s was taken away while a call on it runs: %s", volume_id, error)
                self._cut_below(volume_id)
            except DriverError as error:
                log.error("volume %s was taken away and cannot be ended now: %s", volume_id, error)
        self._suspects = taken
        self._last_look = time.monotonic()
        telemetry.FENCE_LAST_LOOK.set_to_current_time()

    def _cut_below(self, volume_id: str) -> None:
        try:
            self._node.cut_below(volume_id, lambda: self._attachments.is_surely_taken(volume_id))
        except DriverError as error:
            log.error("volume %s was taken away and cannot be ended now: %s", volume_id, error)

    def overdue(self) -> str:
        """Give the reason why attachments that were taken away may go unseen; an empty text when they do not."""
        seconds = time.monotonic() - self._last_look
        if seconds <= FENCE_OVERDUE_S:
            return ""
        return "the staged volumes have not been looked at for more than a minute: taken away ones go on writing"


def _capability(request: csi.NodeStageVolumeRequest | csi.NodePublishVolumeRequest) -> convert.Capability:
    if not request.HasField("volume_capability"):
        raise InvalidArgument("the volume capability is missing")
    return convert.capability(request.volume_capability)


def _existing_path(volume_path: str) -> str:
    """Give a volume path of a request about a volume that must be there.

    Raises:
        InvalidArgument: it is missing.
        NotFound: it is no path at which a volume can be.
    """
    if not volume_path:
        raise InvalidArgument("the volume path is missing")
    try:
        return convert.path(volume_path, "the volume path")
    except InvalidArgument as error:
        raise NotFound(str(error)) from error


def _generation(publish_context: Mapping[str, str]) -> int:
    """Give the attachment generation that ControllerPublishVolume answered.

    Raises:
        InvalidArgument: it is missing or no number.
    """
    text = publish_context.get("generation", "")
    if not text.isdecimal():
        raise InvalidArgument("the publish context has no generation: did this driver's controller publish the volume?")
    return int(text)


def _usage(found: VolumeStats) -> list[csi.VolumeUsage]:
    if found.usage is None:
        return [csi.VolumeUsage(unit=csi.VolumeUsage.BYTES, total=found.total_bytes)]
    usage = found.usage
    return [
        csi.VolumeUsage(
            unit=csi.VolumeUsage.BYTES,
            total=usage.total_bytes,
            used=usage.used_bytes,
            available=usage.available_bytes,
        ),
        csi.VolumeUsage(
            unit=csi.VolumeUsage.INODES,
            total=usage.total_inodes,
            used=usage.used_inodes,
            available=usage.free_inodes,
        ),
    ]
