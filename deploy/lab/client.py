"""A small CSI client: the calls that the sidecars and the kubelet make, as plain methods."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc

from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pb import csi_pb2_grpc
from lab.machine import GIB, NODE_ID

Modes = csi.VolumeCapability.AccessMode
TIMEOUT_S = 60.0


def mount_capability(
    filesystem: str = "", *, mode: str = "SINGLE_NODE_WRITER", options: Sequence[str] = ()
) -> csi.VolumeCapability:
    """A capability of a mounted volume."""
    return csi.VolumeCapability(
        mount=csi.VolumeCapability.MountVolume(fs_type=filesystem, mount_flags=options),
        access_mode=Modes(mode=mode),
    )


def block_capability(*, mode: str = "SINGLE_NODE_WRITER") -> csi.VolumeCapability:
    """A capability of a raw block volume."""
    return csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume(), access_mode=Modes(mode=mode))


class Sockets(Protocol):
    """Where a driver is: `c.sock` is its controller's socket, `n.sock` its node's; `base` is for mount points."""

    base: Path

    def channel(self, socket: str) -> grpc.Channel:
        """Give a channel to one of them."""


class Client:
    """Talks to the controller and the node of one machine. Errors are grpc.RpcError, untouched."""

    def __init__(self, machine: Sockets) -> None:
        self._base = machine.base
        self.controller = csi_pb2_grpc.ControllerStub(machine.channel("c.sock"))
        self.node = csi_pb2_grpc.NodeStub(machine.channel("n.sock"))
        self.identity = csi_pb2_grpc.IdentityStub(machine.channel("c.sock"))
        self.node_identity = csi_pb2_grpc.IdentityStub(machine.channel("n.sock"))

    def create(
        self,
        name: str,
        size_bytes: int = GIB,
        *,
        limit_bytes: int = 0,
        capability: csi.VolumeCapability | None = None,
        snapshot: str = "",
        volume: str = "",
        **parameters: str,
    ) -> csi.Volume:
        """CreateVolume."""
        request = csi.CreateVolumeRequest(
            name=name,
            capacity_range=csi.CapacityRange(required_bytes=size_bytes, limit_bytes=limit_bytes),
            volume_capabilities=[capability or mount_capability()],
            parameters=parameters,
        )
        if snapshot:
            request.volume_content_source.snapshot.snapshot_id = snapshot
        if volume:
            request.volume_content_source.volume.volume_id = volume
        made: csi.Volume = self.controller.CreateVolume(request, timeout=TIMEOUT_S).volume
        return made

    def delete(self, volume_id: str) -> None:
        """DeleteVolume."""
        self.controller.DeleteVolume(csi.DeleteVolumeRequest(volume_id=volume_id), timeout=TIMEOUT_S)

    def snapshot(self, name: str, volume_id: str, **parameters: str) -> csi.Snapshot:
        """CreateSnapshot."""
        request = csi.CreateSnapshotRequest(name=name, source_volume_id=volume_id, parameters=parameters)
        made: csi.Snapshot = self.controller.CreateSnapshot(request, timeout=TIMEOUT_S).snapshot
        return made

    def delete_snapshot(self, snapshot_id: str) -> None:
        """DeleteSnapshot."""
        self.controller.DeleteSnapshot(csi.DeleteSnapshotRequest(snapshot_id=snapshot_id), timeout=TIMEOUT_S)

    def expand(self, volume_id: str, size_bytes: int) -> int:
        """ControllerExpandVolume; gives the new size."""
        request = csi.ControllerExpandVolumeRequest(
            volume_id=volume_id, capacity_range=csi.CapacityRange(required_bytes=size_bytes)
        )
        new_bytes: int = self.controller.ControllerExpandVolume(request, timeout=TIMEOUT_S).capacity_bytes
        return new_bytes

    def attach(
        self,
        volume_id: str,
        *,
        node: str = NODE_ID,
        readonly: bool = False,
        capability: csi.VolumeCapability | None = None,
    ) -> Mapping[str, str]:
        """ControllerPublishVolume; gives the publish context."""
        request = csi.ControllerPublishVolumeRequest(
            volume_id=volume_id,
            node_id=node,
            readonly=readonly,
            volume_capability=capability or mount_capability(),
        )
        context: Mapping[str, str] = self.controller.ControllerPublishVolume(request, timeout=TIMEOUT_S).publish_context
        return context

    def detach(self, volume_id: str, *, node: str = NODE_ID) -> None:
        """ControllerUnpublishVolume."""
        request = csi.ControllerUnpublishVolumeRequest(volume_id=volume_id, node_id=node)
        self.controller.ControllerUnpublishVolume(request, timeout=TIMEOUT_S)

    def staging_path(self, volume_id: str) -> Path:
        """Where this client stages a volume."""
        return self._base / "staging" / volume_id

    def target_path(self, volume_id: str, pod: str = "pod") -> Path:
        """Where this client publishes a volume."""
        return self._base / "pods" / pod / volume_id

    def stage(
        self, volume_id: str, context: Mapping[str, str], *, capability: csi.VolumeCapability | None = None
    ) -> Path:
        """NodeStageVolume; gives the staging path, which is made as the kubelet does."""
        path = self.staging_path(volume_id)
        if not path.is_mount():
            path.mkdir(parents=True, exist_ok=True)
        request = csi.NodeStageVolumeRequest(
            volume_id=volume_id,
            publish_context=context,
            staging_target_path=str(path),
            volume_capability=capability or mount_capability(),
        )
        self.node.NodeStageVolume(request, timeout=TIMEOUT_S)
        return path

    def publish(
        self,
        volume_id: str,
        context: Mapping[str, str],
        *,
        pod: str = "pod",
        readonly: bool = False,
        capability: csi.VolumeCapability | None = None,
    ) -> Path:
        """NodePublishVolume; gives the target path."""
        path = self.target_path(volume_id, pod)
        path.parent.mkdir(parents=True, exist_ok=True)
        request = csi.NodePublishVolumeRequest(
            volume_id=volume_id,
            publish_context=context,
            staging_target_path=str(self.staging_path(volume_id)),
            target_path=str(path),
            readonly=readonly,
            volume_capability=capability or mount_capability(),
        )
        self.node.NodePublishVolume(request, timeout=TIMEOUT_S)
        return path

    def unpublish(self, volume_id: str, *, pod: str = "pod") -> None:
        """NodeUnpublishVolume."""
        request = csi.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(self.target_path(volume_id, pod)))
        self.node.NodeUnpublishVolume(request, timeout=TIMEOUT_S)

    def unstage(self, volume_id: str) -> None:
        """NodeUnstageVolume."""
        request = csi.NodeUnstageVolumeRequest(
            volume_id=volume_id, staging_target_path=str(self.staging_path(volume_id))
        )
        self.node.NodeUnstageVolume(request, timeout=TIMEOUT_S)

    def node_expand(self, volume_id: str, path: Path) -> int:
        """NodeExpandVolume; gives the size."""
        request = csi.NodeExpandVolumeRequest(volume_id=volume_id, volume_path=str(path))
        new_bytes: int = self.node.NodeExpandVolume(request, timeout=TIMEOUT_S).capacity_bytes
        return new_bytes

    def stats(self, volume_id: str, path: Path) -> Sequence[csi.VolumeUsage]:
        """NodeGetVolumeStats."""
        request = csi.NodeGetVolumeStatsRequest(volume_id=volume_id, volume_path=str(path))
        usage: Sequence[csi.VolumeUsage] = self.node.NodeGetVolumeStats(request, timeout=TIMEOUT_S).usage
        return usage

    # --- whole ways --------------------------------------------------------------------------------------------

    def use(
        self,
        volume_id: str,
        *,
        node: str = NODE_ID,
        capability: csi.VolumeCapability | None = None,
        readonly: bool = False,
    ) -> Path:
        """Attach, stage and publish as for a pod; gives the target path."""
        context = self.attach(volume_id, node=node, capability=capability, readonly=readonly)
        self.stage(volume_id, context, capability=capability)
        return self.publish(volume_id, context, capability=capability, readonly=readonly)

    def release(self, volume_id: str, *, node: str = NODE_ID) -> None:
        """Unpublish, unstage and detach as after a pod."""
        self.unpublish(volume_id)
        self.unstage(volume_id)
        self.detach(volume_id, node=node)


def code_of(call: Callable[..., Any], *arguments: Any, **named: Any) -> grpc.StatusCode:
    """Make a call and give the code that it ends with."""
    try:
        call(*arguments, **named)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
