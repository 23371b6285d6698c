"""The CSI Node service: convert, one operation, convert.

Calls that read or write records run on the pool's executor. The others (unstage, unpublish, stats) must work while a
pool is dead or hanging, so they run on an executor of the node's own. Each call that changes something has its volume
to itself from its arrival until its work has really ended: an unstage is not answered while an abandoned stage hangs.
"""

import logging
import threading
from collections.abc import Mapping

import grpc

from csi_quobyte.errors import DriverError, InvalidArgument, NotFound
from csi_quobyte.operations.staging import Node, PublishRequest, StageRequest, VolumeStats
from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pb import csi_pb2_grpc
from csi_quobyte.pool.executor import Executor, Reservations
from csi_quobyte.pool.pools import Pools
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
_LOOK_WAIT_S = 1.0

log = logging.getLogger(__name__)


class NodeService(csi_pb2_grpc.NodeServicer):
    """Serves the node RPCs."""

    def __init__(self, node: Node, pools: Pools, *, node_id: str, max_volumes: int, timeout_s: float) -> None:
        self._node = node
        self._pools = pools
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
        self._local.run(
            lambda: self._node.unstage(
                volume_id, staging_path, stale=is_taken_away(self._node, self._pools, volume_id)
            ),
            finished=taken,
        )
        return csi.NodeUnstageVolumeResponse()

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


def is_taken_away(node: Node, pools: Pools, volume_id: str) -> bool:
    """Say whether a volume is staged for an attachment that is gone; False when its pool does not answer now."""
    try:
        pool = pools.find_owner(volume_id)
        if pool is None or not pool.health(wait_s=_LOOK_WAIT_S).ok:
            return False
        return node.is_stale(volume_id, pool.run(lambda store: store.find_volume(volume_id)))
    except DriverError:
        return False


class Fence:
    """Looks now and then whether a staged volume was taken away from this node (a forced detach), and ends its daemon.

    Twice in a row, because a client may show a record as it was a moment ago. Where locks do not reach between hosts
    this is what keeps a node that comes back from writing to what another one uses; it is not instantaneous.
    """

    def __init__(self, node: Node, pools: Pools) -> None:
        self._node = node
        self._pools = pools
        self._suspects: set[str] = set()

    def run_forever(self, every_s: float = FENCE_EVERY_S) -> None:
        """Look every `every_s` seconds for the life of the process."""
        waiter = threading.Event()
        while not waiter.wait(every_s):
            self.look()

    def look(self) -> None:
        """Look once at every staged volume."""
        taken = {one for one in self._node.staged_volumes() if is_taken_away(self._node, self._pools, one)}
        for volume_id in taken & self._suspects:
            try:
                self._node.fence(volume_id)
            except DriverError as error:
                log.warning("volume %s was taken away and cannot be ended now: %s", volume_id, error)
        self._suspects = taken


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
