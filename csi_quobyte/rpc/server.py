"""Building, running and stopping a gRPC server; the one table from errors to status codes.

Synchronous handlers on threads: an operation is a short sequence of durable steps that a client's deadline must not
cut in the middle. 64 workers, of which all calls but Identity's may use 48, so that Probe always finds one.
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc

from csi_quobyte import errors, telemetry
from csi_quobyte.pb import csi_pb2_grpc

log = logging.getLogger(__name__)

WORKERS = 64
ADMITTED = 48
MESSAGE_CHARACTERS = 1500

STATUS: dict[type[errors.DriverError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Refused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Busy: grpc.StatusCode.ABORTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Corrupt: grpc.StatusCode.DATA_LOSS,
}

# The sidecars take INTERNAL for "certainly not in progress", so only calls that change nothing may answer it.
_READING = {
    "GetPluginInfo",
    "GetPluginCapabilities",
    "Probe",
    "ValidateVolumeCapabilities",
    "ListVolumes",
    "GetCapacity",
    "ControllerGetCapabilities",
    "ListSnapshots",
    "GetSnapshot",
    "ControllerGetVolume",
    "NodeGetVolumeStats",
    "NodeGetCapabilities",
    "NodeGetInfo",
}
_ALWAYS_ADMITTED = {"GetPluginInfo", "GetPluginCapabilities", "Probe"}
_QUIET = {*_ALWAYS_ADMITTED, "ControllerGetCapabilities", "NodeGetCapabilities", "NodeGetInfo", "NodeGetVolumeStats"}
_ID_FIELDS = ("name", "volume_id", "snapshot_id", "source_volume_id", "node_id", "staging_target_path", "target_path")


def status_of(error: BaseException, method: str) -> grpc.StatusCode:
    """Give the status code for an exception of a handler of `method`."""
    for kind in type(error).__mro__:
        if code := STATUS.get(kind):
            return code
    return grpc.StatusCode.INTERNAL if method in _READING else grpc.StatusCode.ABORTED


class Interceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Around every unary call: admission, request id, duration and result, and the error table."""

    def __init__(self) -> None:
        self._admitted = threading.BoundedSemaphore(ADMITTED)

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        method = handler_call_details.method.rpartition("/")[2]

        def call(request: Any, context: grpc.ServicerContext) -> Any:
            return self._call(method, handler.unary_unary, request, context)

        return grpc.unary_unary_rpc_method_handler(call, handler.request_deserializer, handler.response_serializer)

    def _call(self, method: str, behaviour: Callable[..., Any], request: Any, context: grpc.ServicerContext) -> Any:
        admitted = method in _ALWAYS_ADMITTED or self._admitted.acquire(blocking=False)
        if not admitted:
            context.abort(grpc.StatusCode.UNAVAILABLE, f"{ADMITTED} calls are running already; try again")
        try:
            with telemetry.bind(request=uuid.uuid4().hex[:8], method=method, **_ids(request)):
                return self._measured(method, behaviour, request, context)
        finally:
            if method not in _ALWAYS_ADMITTED:
                self._admitted.release()

    def _measured(self, method: str, behaviour: Callable[..., Any], request: Any, context: grpc.ServicerContext) -> Any:
        started = time.monotonic()
        code, message = grpc.StatusCode.OK, ""
        telemetry.OPERATIONS_RUNNING.inc()
        try:
            return behaviour(request, context)
        except errors.DriverError as error:
            code, message = status_of(error, method), str(error)
        except Exception:  # a bug: the one place where it is turned into an answer
            telemetry.UNEXPECTED_ERRORS.labels(method).inc()
            log.exception("unexpected error in %s", method)
            code, message = status_of(Exception(), method), "unexpected error in the driver; its log has the traceback"
        finally:
            telemetry.OPERATIONS_RUNNING.dec()
            telemetry.OPERATIONS.labels(method, code.name).inc()
            telemetry.OPERATION_SECONDS.labels(method).observe(time.monotonic() - started)
            _log_end(method, code, message, time.monotonic() - started)
        context.abort(code, message[:MESSAGE_CHARACTERS])
        raise AssertionError("abort returned")  # pragma: no cover - grpc's abort always raises


def _log_end(method: str, code: grpc.StatusCode, message: str, seconds: float) -> None:
    level = logging.INFO
    if code is not grpc.StatusCode.OK:
        level = logging.WARNING
    elif method in _QUIET:
        level = logging.DEBUG
    log.log(level, "%s %s in %.1f ms%s", method, code.name, seconds * 1000, f": {message}" if message else "")


def _ids(request: Any) -> dict[str, str]:
    """Give the fields of a request that say what it is about; never a secret, a parameter or a context."""
    found = {}
    for field in _ID_FIELDS:
        value = getattr(request, field, "")
        if isinstance(value, str) and value:
            found[field] = value[:200]
    return found


class Server:
    """One gRPC server on a unix socket."""

    def __init__(self, endpoint: str, add_services: Callable[[grpc.Server], None]) -> None:
        self._path = endpoint.removeprefix("unix://")
        self._inode = -1
        self._server = grpc.server(
            ThreadPoolExecutor(WORKERS, thread_name_prefix="rpc"),
            interceptors=[Interceptor()],
            options=[("grpc.max_receive_message_length", 4 << 20), ("grpc.so_reuseport", 0)],
        )
        add_services(self._server)

    def start(self) -> None:
        """Listen; a socket that a process before us has left is replaced, one that answers is not.

        Raises:
            Unavailable: the socket cannot be made, or another process serves on it.
        """
        if _is_served(self._path):
            raise errors.Unavailable(f"another process serves on {self._path}")
        try:
            with suppress(FileNotFoundError):
                os.unlink(self._path)
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(self._path), 0o750)
            self._server.add_insecure_port(f"unix://{self._path}")
            self._server.start()
            self._inode = os.stat(self._path).st_ino
        except (RuntimeError, OSError) as error:
            raise errors.Unavailable(f"cannot listen on {self._path}: {error}") from error

    def stop(self, grace_s: float) -> bool:
        """Take no more calls and wait for the running ones; False if some did not end in time."""
        finished = self._server.stop(grace_s).wait(grace_s + 1)
        with suppress(FileNotFoundError):
            if os.stat(self._path).st_ino == self._inode:  # not one that somebody has put in its place
                os.unlink(self._path)
        return finished


def _is_served(path: str) -> bool:
    """Say whether a process accepts connections on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


AddServices = Callable[[grpc.Server], None]


def controller_services(
    identity: csi_pb2_grpc.IdentityServicer, controller: csi_pb2_grpc.ControllerServicer
) -> AddServices:
    """Give what a controller's server serves."""

    def add(server: grpc.Server) -> None:
        csi_pb2_grpc.add_IdentityServicer_to_server(identity, server)
        csi_pb2_grpc.add_ControllerServicer_to_server(controller, server)

    return add


def node_services(identity: csi_pb2_grpc.IdentityServicer, node: csi_pb2_grpc.NodeServicer) -> AddServices:
    """Give what a node's server serves."""

    def add(server: grpc.Server) -> None:
        csi_pb2_grpc.add_IdentityServicer_to_server(identity, server)
        csi_pb2_grpc.add_NodeServicer_to_server(node, server)

    return add
