"""Registering the node with the kubelet: what node-driver-registrar does, in this process.

The kubelet watches a directory for sockets, asks each who it is (GetInfo) and says how that went
(NotifyRegistrationStatus). Protocol: k8s.io/kubelet pkg/apis/pluginregistration/v1.
"""

import logging

import grpc

from csi_quobyte.pb import pluginregistration_pb2 as registration
from csi_quobyte.pb import pluginregistration_pb2_grpc as registration_grpc
from csi_quobyte.rpc.server import Server

log = logging.getLogger(__name__)

CSI_VERSION = "1.0.0"


class _Service(registration_grpc.RegistrationServicer):
    def __init__(self, info: registration.PluginInfo) -> None:
        self._info = info

    def GetInfo(self, request: registration.InfoRequest, context: grpc.ServicerContext) -> registration.PluginInfo:
        return self._info

    def NotifyRegistrationStatus(
        self, request: registration.RegistrationStatus, context: grpc.ServicerContext
    ) -> registration.RegistrationStatusResponse:
        if request.plugin_registered:
            log.info("the kubelet has registered this node plugin")
        else:
            log.error("the kubelet refused to register this node plugin: %s", request.error)
        return registration.RegistrationStatusResponse()


class Registration:
    """The registration socket of one node process."""

    def __init__(self, driver_name: str, endpoint: str, directory: str) -> None:
        """`endpoint` is the path of the CSI socket as the kubelet sees it; `directory` is its plugins_registry."""
        info = registration.PluginInfo(
            type="CSIPlugin",
            name=driver_name,
            endpoint=endpoint,
            supported_versions=[CSI_VERSION],
        )

        def add_services(server: grpc.Server) -> None:
            registration_grpc.add_RegistrationServicer_to_server(_Service(info), server)

        self._server = Server(f"unix://{directory}/{driver_name}-reg.sock", add_services)

    def start(self) -> None:
        """Show the socket to the kubelet; only once the CSI socket answers."""
        self._server.start()

    def stop(self) -> None:
        """Take the socket away: the kubelet forgets the plugin."""
        self._server.stop(1.0)
