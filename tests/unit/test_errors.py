"""The one table from errors to status codes: complete, and right for what nobody expected."""

import grpc
import pytest

from csi_quobyte import errors
from csi_quobyte.pb import csi_pb2
from csi_quobyte.rpc import server

SERVED = ("Identity", "Controller", "Node")

# Calls that change something: for the sidecars INTERNAL means "certainly not in progress", which nobody knows after
# an unexpected exception in the middle of one of these.
MUTATING = {
    "CreateVolume",
    "DeleteVolume",
    "ControllerPublishVolume",
    "ControllerUnpublishVolume",
    "ControllerExpandVolume",
    "ControllerModifyVolume",
    "CreateSnapshot",
    "DeleteSnapshot",
    "NodeStageVolume",
    "NodeUnstageVolume",
    "NodePublishVolume",
    "NodeUnpublishVolume",
    "NodeExpandVolume",
}
READING = {
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


def all_errors(base: type[errors.DriverError] = errors.DriverError) -> set[type[errors.DriverError]]:
    return {kind for direct in base.__subclasses__() for kind in (direct, *all_errors(direct))}


def of_the_module() -> set[type[errors.DriverError]]:
    return {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.DriverError) and kind is not errors.DriverError
    }


def served_methods() -> set[str]:
    services = csi_pb2.DESCRIPTOR.services_by_name
    return {method.name for service in SERVED for method in services[service].methods}


def test_table_has_every_error_class_and_nothing_else() -> None:
    assert set(server.STATUS) == of_the_module()


def test_every_error_class_anywhere_is_covered_by_the_table() -> None:
    uncovered = {kind for kind in all_errors() if not set(kind.__mro__) & set(server.STATUS)}
    assert not uncovered


def test_every_error_class_has_a_code_of_its_own() -> None:
    assert len(set(server.STATUS.values())) == len(server.STATUS)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
        (errors.NotFound, grpc.StatusCode.NOT_FOUND),
        (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
        (errors.OutOfRange, grpc.StatusCode.OUT_OF_RANGE),
        (errors.Exhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.Refused, grpc.StatusCode.FAILED_PRECONDITION),
        (errors.Busy, grpc.StatusCode.ABORTED),
        (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
        (errors.Corrupt, grpc.StatusCode.DATA_LOSS),
    ],
)
def test_code_is_the_same_in_every_call(kind: type[errors.DriverError], code: grpc.StatusCode) -> None:
    assert {server.status_of(kind("x"), method) for method in MUTATING | READING} == {code}


def test_subclass_has_the_code_of_its_base() -> None:
    class Special(errors.Unavailable):
        """As a module may have for its own purposes."""

    assert server.status_of(Special("x"), "CreateVolume") is grpc.StatusCode.UNAVAILABLE


def test_every_call_of_the_three_services_is_known_to_change_or_not() -> None:
    assert served_methods() - MUTATING - READING == set()
    assert set() == MUTATING & READING


@pytest.mark.parametrize("method", sorted(MUTATING))
def test_unexpected_exception_in_a_call_that_changes_something_is_aborted(method: str) -> None:
    assert server.status_of(ValueError("bug"), method) is grpc.StatusCode.ABORTED


@pytest.mark.parametrize("method", sorted(READING))
def test_unexpected_exception_in_a_call_that_reads_is_internal(method: str) -> None:
    assert server.status_of(ValueError("bug"), method) is grpc.StatusCode.INTERNAL
