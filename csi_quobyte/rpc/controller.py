"""The CSI Controller service: convert, one operation on the pool's executor, convert."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import TypeVar

import grpc

from csi_quobyte.engine.collector import Collector
from csi_quobyte.engine.copying import Copies
from csi_quobyte.engine.layers import ready_volume
from csi_quobyte.errors import AlreadyExists, Busy, InvalidArgument, NotFound, Refused, Unavailable
from csi_quobyte.operations import capacity, snapshots, volumes
from csi_quobyte.operations.capacity import Provisioned
from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pb import csi_pb2_grpc
from csi_quobyte.pool import records
from csi_quobyte.pool.executor import Reservations
from csi_quobyte.pool.pools import Pool, Pools
from csi_quobyte.pool.records import SnapshotRecord, Source, VolumeRecord
from csi_quobyte.pool.sizes import GRANULARITY_BYTES, MAXIMUM_SIZE_BYTES
from csi_quobyte.pool.store import Store
from csi_quobyte.rpc import convert, parameters

PAGE_ENTRIES = 1000

_Rpc = csi.ControllerServiceCapability.RPC
CAPABILITIES = (
    _Rpc.CREATE_DELETE_VOLUME,
    _Rpc.PUBLISH_UNPUBLISH_VOLUME,
    _Rpc.PUBLISH_READONLY,
    _Rpc.LIST_VOLUMES,
    _Rpc.LIST_VOLUMES_PUBLISHED_NODES,
    _Rpc.GET_VOLUME,
    _Rpc.GET_CAPACITY,
    _Rpc.CREATE_DELETE_SNAPSHOT,
    _Rpc.LIST_SNAPSHOTS,
    _Rpc.GET_SNAPSHOT,
    _Rpc.CLONE_VOLUME,
    _Rpc.EXPAND_VOLUME,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
)

_R = TypeVar("_R", VolumeRecord, SnapshotRecord)


class ControllerService(csi_pb2_grpc.ControllerServicer):
    """Serves the controller RPCs for all pools of this process.

    Each call that changes something has its object to itself from its arrival until its work has really ended.
    """

    def __init__(self, pools: Pools, collectors: Mapping[str, Collector], copiers: Mapping[str, Copies]) -> None:
        """`collectors` and `copiers` are by pool name."""
        self._pools = pools
        self._copiers = copiers
        self._collectors = collectors
        self._provisioned = Provisioned()
        self._reservations = Reservations()

    # --- volumes -----------------------------------------------------------------------------------------------

    def CreateVolume(self, request: csi.CreateVolumeRequest, context: grpc.ServicerContext) -> csi.CreateVolumeResponse:
        given = parameters.volume_parameters(request.parameters)
        source = convert.source(request)
        checked = convert.create_request(request, given, source)
        pool = self._pools.named(given.pool)
        self._check_source(pool, source)
        self._check_other_pools(pool, lambda store: store.find_volume(records.volume_id(store.prefix, checked.name)))
        release, copies = self._collectors[pool.name].release, self._copiers[pool.name]
        taken = self._reservations.take(records.volume_id(pool.prefix or pool.name, checked.name))
        made = pool.run(
            lambda store: volumes.create(store, checked, self._provisioned, release, copies), finished=taken
        )
        return csi.CreateVolumeResponse(volume=convert.volume(made, pool.name))

    def _check_source(self, pool: Pool, source: Source | None) -> None:
        """Check that the source lies in the pool of the new volume: layers cannot refer across pools."""
        if source is None:
            return
        if self._pools.owner(source.id, f"the source {source.kind}") is not pool:
            raise InvalidArgument(f"the source {source.id} is in another pool than {pool.name}")
        parsed = records.parse_id(source.id)
        if parsed and parsed.kind != {"snapshot": "snap", "volume": "vol"}.get(source.kind):
            raise NotFound(f"{source.kind} {source.id} does not exist")

    def _check_other_pools(self, pool: Pool, find: Callable[[Store], object]) -> None:
        """Check that no other pool holds an object of the same name; a pool that does not answer is left out."""
        for other in self._pools.all:
            if other is pool or not other.health(wait_s=1.0).ok:
                continue
            with suppress(Unavailable):  # it has begun to hang since
                if other.run(find) is not None:
                    raise AlreadyExists(f"an object of this name exists in pool {other.name}")

    def DeleteVolume(self, request: csi.DeleteVolumeRequest, context: grpc.ServicerContext) -> csi.DeleteVolumeResponse:
        volume_id = convert.required(request.volume_id, "the volume id")
        if pool := self._pools.find_owner(volume_id):
            release, copies = self._collectors[pool.name].release, self._copiers[pool.name]
            taken = self._reservations.take(volume_id)
            pool.run(lambda store: volumes.delete(store, volume_id, self._provisioned, release, copies), finished=taken)
        return csi.DeleteVolumeResponse()

    def ControllerPublishVolume(
        self, request: csi.ControllerPublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerPublishVolumeResponse:
        checked = convert.attach_request(request)
        pool = self._pools.owner(checked.volume_id, "volume")
        taken = self._reservations.take(checked.volume_id)
        made = pool.run(lambda store: volumes.attach(store, checked), finished=taken)
        return csi.ControllerPublishVolumeResponse(publish_context={"generation": str(made.generation)})

    def ControllerUnpublishVolume(
        self, request: csi.ControllerUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerUnpublishVolumeResponse:
        volume_id = convert.required(request.volume_id, "the volume id")
        if pool := self._pools.find_owner(volume_id):
            taken = self._reservations.take(volume_id)
            closed = pool.run(lambda store: volumes.detach(store, volume_id, request.node_id), finished=taken)
            self._collectors[pool.name].closed(closed)
        return csi.ControllerUnpublishVolumeResponse()

    def ValidateVolumeCapabilities(
        self, request: csi.ValidateVolumeCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.ValidateVolumeCapabilitiesResponse:
        volume_id = convert.required(request.volume_id, "the volume id")
        if not request.volume_capabilities:
            raise InvalidArgument("volume capabilities are missing")
        pool = self._pools.owner(volume_id, "volume")
        record = pool.run(lambda store: ready_volume(store, volume_id))
        try:
            for checked in convert.capabilities(request.volume_capabilities):
                volumes.check_capability(record, checked.access_type, checked.filesystem)
        except (InvalidArgument, Refused) as error:
            return csi.ValidateVolumeCapabilitiesResponse(message=str(error))
        return csi.ValidateVolumeCapabilitiesResponse(
            confirmed=csi.ValidateVolumeCapabilitiesResponse.Confirmed(
                volume_capabilities=request.volume_capabilities,
                volume_context=request.volume_context,
                parameters=request.parameters,
            )
        )

    def ControllerExpandVolume(
        self, request: csi.ControllerExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerExpandVolumeResponse:
        volume_id = convert.required(request.volume_id, "the volume id")
        size = convert.expand_range(request)
        pool = self._pools.owner(volume_id, "volume")
        taken = self._reservations.take(volume_id)
        record = pool.run(lambda store: volumes.expand(store, volume_id, size, self._provisioned), finished=taken)
        return csi.ControllerExpandVolumeResponse(capacity_bytes=record.size_bytes, node_expansion_required=True)

    def ControllerGetVolume(
        self, request: csi.ControllerGetVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerGetVolumeResponse:
        volume_id = convert.required(request.volume_id, "the volume id")
        pool = self._pools.owner(volume_id, "volume")
        record = pool.run(lambda store: ready_volume(store, volume_id))
        status = csi.ControllerGetVolumeResponse.VolumeStatus(published_node_ids=[a.node for a in record.attachments])
        return csi.ControllerGetVolumeResponse(volume=convert.volume(record, pool.name), status=status)

    def ListVolumes(self, request: csi.ListVolumesRequest, context: grpc.ServicerContext) -> csi.ListVolumesResponse:
        page, token = self._page(request.starting_token, request.max_entries, volumes.list_page)
        entries = [
            csi.ListVolumesResponse.Entry(
                volume=convert.volume(record, pool.name),
                status=csi.ListVolumesResponse.VolumeStatus(published_node_ids=[a.node for a in record.attachments]),
            )
            for pool, record in page
        ]
        return csi.ListVolumesResponse(entries=entries, next_token=token)

    def GetCapacity(self, request: csi.GetCapacityRequest, context: grpc.ServicerContext) -> csi.GetCapacityResponse:
        given = parameters.volume_parameters(request.parameters)
        if request.volume_capabilities:
            convert.capabilities(request.volume_capabilities)
        pool = self._pools.named(given.pool)
        left = pool.run(lambda store: capacity.available_bytes(store, self._provisioned, given.preallocation))
        response = csi.GetCapacityResponse(available_capacity=left)
        response.maximum_volume_size.value = min(left, MAXIMUM_SIZE_BYTES)
        response.minimum_volume_size.value = GRANULARITY_BYTES
        return response

    # --- snapshots ---------------------------------------------------------------------------------------------

    def CreateSnapshot(
        self, request: csi.CreateSnapshotRequest, context: grpc.ServicerContext
    ) -> csi.CreateSnapshotResponse:
        checked = convert.snapshot_request(request)
        pool = self._pools.owner(checked.source_volume, "volume")
        self._check_other_pools(
            pool, lambda store: store.find_snapshot(records.snapshot_id(store.prefix, checked.name))
        )
        release = self._collectors[pool.name].release
        name_id = records.snapshot_id(pool.prefix or pool.name, checked.name)
        taken = self._reservations.take(checked.source_volume, name_id)
        made = pool.run(lambda store: snapshots.create(store, checked, release), finished=taken)
        return csi.CreateSnapshotResponse(snapshot=convert.snapshot(made))

    def DeleteSnapshot(
        self, request: csi.DeleteSnapshotRequest, context: grpc.ServicerContext
    ) -> csi.DeleteSnapshotResponse:
        snapshot_id = convert.required(request.snapshot_id, "the snapshot id")
        if pool := self._pools.find_owner(snapshot_id):
            release = self._collectors[pool.name].release
            taken = self._reservations.take(snapshot_id)
            pool.run(lambda store: snapshots.delete(store, snapshot_id, release), finished=taken)
        return csi.DeleteSnapshotResponse()

    def GetSnapshot(self, request: csi.GetSnapshotRequest, context: grpc.ServicerContext) -> csi.GetSnapshotResponse:
        snapshot_id = convert.required(request.snapshot_id, "the snapshot id")
        pool = self._pools.owner(snapshot_id, "snapshot")
        record = pool.run(lambda store: snapshots.find_ready(store, snapshot_id))
        return csi.GetSnapshotResponse(snapshot=convert.snapshot(record))

    def ListSnapshots(
        self, request: csi.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> csi.ListSnapshotsResponse:
        if request.snapshot_id:
            return csi.ListSnapshotsResponse(entries=_snapshot_entries(self._one_snapshot(request)))

        def page_of(store: Store, *, after: str, at_most: int) -> list[SnapshotRecord]:
            return snapshots.list_page(store, after=after, at_most=at_most, source_volume=request.source_volume_id)

        page, token = self._page(request.starting_token, request.max_entries, page_of)
        return csi.ListSnapshotsResponse(entries=_snapshot_entries(record for _, record in page), next_token=token)

    def _one_snapshot(self, request: csi.ListSnapshotsRequest) -> list[SnapshotRecord]:
        """Give the snapshot that a filter names, if it exists and satisfies the other filter."""
        pool = self._pools.find_owner(request.snapshot_id)
        if pool is None:
            return []
        record = pool.run(lambda store: store.find_snapshot(request.snapshot_id))
        if record is None or record.state is not records.SnapshotState.READY:
            return []
        if request.source_volume_id and record.source_volume != request.source_volume_id:
            return []
        return [record]

    # --- pages over all pools ----------------------------------------------------------------------------------

    def _page(
        self, token: str, max_entries: int, page_of: Callable[..., list[_R]]
    ) -> tuple[list[tuple[Pool, _R]], str]:
        """Give one page over all pools in their configured order, and the token of the next one.

        Raises:
            InvalidArgument: a negative number of entries.
            Busy: a token of another driver or configuration (ABORTED by the specification).
            Unavailable: a pool does not answer: a list that leaves its volumes out would say that they are gone.
        """
        if max_entries < 0:
            raise InvalidArgument("max_entries is negative")
        try:
            number, after = convert.page_token(token)
        except ValueError as error:
            raise Busy(str(error)) from error
        if number >= len(self._pools.all):
            raise Busy(f"the starting token {token!r} is of another configuration")
        at_most = min(max_entries or PAGE_ENTRIES, PAGE_ENTRIES)
        found = list(itertools.islice(self._walk(number, after, at_most, page_of), at_most + 1))
        page = [(self._pools.all[at], record) for at, record in found[:at_most]]
        if len(found) <= at_most:
            return page, ""
        last_number, last = found[at_most - 1]
        return page, convert.next_token(last_number, last.id)

    def _walk(
        self, number: int, after: str, at_most: int, page_of: Callable[..., list[_R]]
    ) -> Iterator[tuple[int, _R]]:
        for at in range(number, len(self._pools.all)):
            start = after if at == number else ""
            pool = self._pools.all[at]
            for record in pool.run(partial(page_of, after=start, at_most=at_most + 1)):
                yield at, record

    # --- capabilities ------------------------------------------------------------------------------------------

    def ControllerGetCapabilities(
        self, request: csi.ControllerGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.ControllerGetCapabilitiesResponse:
        return csi.ControllerGetCapabilitiesResponse(
            capabilities=[
                csi.ControllerServiceCapability(rpc=csi.ControllerServiceCapability.RPC(type=one))
                for one in CAPABILITIES
            ]
        )


def _snapshot_entries(found: Iterable[SnapshotRecord]) -> list[csi.ListSnapshotsResponse.Entry]:
    return [csi.ListSnapshotsResponse.Entry(snapshot=convert.snapshot(record)) for record in found]
