"""The CSI Identity service. Probe looks at the pools and at QEMU and never hangs."""

import logging
import threading
from collections.abc import Callable, Sequence

import grpc

from csi_quobyte import __version__
from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pb import csi_pb2_grpc
from csi_quobyte.pool.pools import Pools

log = logging.getLogger(__name__)

PROBE_WAIT_S = 3.0

_Service = csi.PluginCapability.Service
_Expansion = csi.PluginCapability.VolumeExpansion


class IdentityService(csi_pb2_grpc.IdentityServicer):
    """Says who the plugin is, what it can do, and whether it can do it now."""

    def __init__(self, driver_name: str, pools: Pools, other_checks: Sequence[Callable[[], str]] = ()) -> None:
        """`other_checks` are functions that give a reason why the process is not ready, or an empty text."""
        self._driver_name = driver_name
        self._pools = pools
        self._other_checks = other_checks
        self._guard = threading.Lock()
        self._last_reasons: tuple[str, ...] = ()

    def GetPluginInfo(
        self, request: csi.GetPluginInfoRequest, context: grpc.ServicerContext
    ) -> csi.GetPluginInfoResponse:
        return csi.GetPluginInfoResponse(name=self._driver_name, vendor_version=__version__)

    def GetPluginCapabilities(
        self, request: csi.GetPluginCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.GetPluginCapabilitiesResponse:
        return csi.GetPluginCapabilitiesResponse(
            capabilities=[
                csi.PluginCapability(service=_Service(type=_Service.CONTROLLER_SERVICE)),
                csi.PluginCapability(volume_expansion=_Expansion(type=_Expansion.ONLINE)),
            ]
        )

    def Probe(self, request: csi.ProbeRequest, context: grpc.ServicerContext) -> csi.ProbeResponse:
        response = csi.ProbeResponse()
        response.ready.value = self.is_ready()
        return response

    def is_ready(self) -> bool:
        """Say whether calls can be served: QEMU is usable and at least one pool is well.

        One bad pool among several is logged and shown in the metrics, but the calls of the others go on, so the
        sidecars must not be held up by it.
        """
        waits = PROBE_WAIT_S / len(self._pools.all)
        health = {pool.name: pool.health(wait_s=waits) for pool in self._pools.all}
        reasons = [f"pool {name}: {found.reason}" for name, found in health.items() if not found.ok]
        blocking = [reason for check in self._other_checks if (reason := check())]
        self._log_changes((*blocking, *reasons))
        return not blocking and any(found.ok for found in health.values())

    def _log_changes(self, reasons: tuple[str, ...]) -> None:
        """Log why the process is not well when that changes, not at every probe."""
        with self._guard:
            changed, self._last_reasons = reasons != self._last_reasons, reasons
        if changed and reasons:
            log.warning("not well: %s", "; ".join(reasons))
        elif changed:
            log.info("all pools are well")
