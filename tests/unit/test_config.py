"""Settings: everything that is refused before anything is served, and the message that names the flag."""

from typing import Any

import pytest

from csi_quobyte.config import Common, NodeConfig, PoolSpec, check_endpoint, parse_address
from csi_quobyte.errors import InvalidArgument

ONE_POOL = (PoolSpec("a", "/pools/a"),)


def common(**changes: Any) -> Common:
    return Common(**{"endpoint": "unix:///csi/csi.sock", "pools": ONE_POOL, **changes})


def node(**changes: Any) -> NodeConfig:
    plain = {"endpoint": "unix:///csi/csi.sock", "pools": ONE_POOL, "node_id": "n", "state_dir": "/run/x"}
    return NodeConfig(**{**plain, **changes})


def test_pool_is_read_and_its_path_normalised() -> None:
    assert PoolSpec.parse("fast.1=/mnt//q/./x/") == PoolSpec("fast.1", "/mnt/q/x")


def test_pool_path_may_hold_an_equals_sign() -> None:
    assert PoolSpec.parse("a=/mnt/x=y").path == "/mnt/x=y"


@pytest.mark.parametrize("text", ["", "a", "=/x", "A=/x", "a=", "a=x", "-a=/x", "a b=/x", "a" * 64 + "=/x", "a=./x"])
def test_pool_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--pool"):
        PoolSpec.parse(text)


def test_defaults_are_those_of_the_contract() -> None:
    found = common()
    assert (found.driver_name, found.require_mount, found.pool_timeout_s) == ("block.csi.quobyte.com", "quobyte", 30.0)
    assert (found.health_address, found.metrics_address) == ("", "")
    assert node().max_volumes_per_node == 128


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pools": ()}, "--pool"),
        ({"pools": (PoolSpec("a", "/1"), PoolSpec("a", "/2"))}, "same name"),
        ({"pools": (PoolSpec("a", "/1"), PoolSpec("b", "/1"))}, "same path"),
        ({"driver_name": ""}, "--driver-name"),
        ({"driver_name": "a" * 64}, "--driver-name"),
        ({"driver_name": "a_b"}, "--driver-name"),
        ({"pool_timeout_s": 0}, "--pool-timeout"),
        ({"health_address": "9000"}, "--health-address"),
        ({"metrics_address": "x:0"}, "--metrics-address"),
        ({"endpoint": "tcp://1:2"}, "--endpoint"),
    ],
)
def test_common_settings_that_cannot_work_are_refused_by_flag(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        common(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"node_id": ""}, "--node-id"),
        ({"node_id": "ü" * 97}, "--node-id"),
        ({"state_dir": "run"}, "--state-dir"),
        ({"state_dir": "/" + "x" * 78}, "--state-dir"),
        ({"kubelet_dir": "k"}, "--kubelet-dir"),
        ({"max_volumes_per_node": 0}, "--max-volumes-per-node"),
        ({"pools": ()}, "--pool"),
    ],
)
def test_node_settings_that_cannot_work_are_refused_by_flag(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        node(**changes)


def test_longest_state_directory_leaves_room_for_its_longest_socket() -> None:
    state_dir = node(state_dir="/" + "x" * 77).state_dir
    assert len(f"{state_dir}/{'0' * 24}/qmp".encode()) <= 107


@pytest.mark.parametrize("endpoint", ["", "/csi.sock", "unix://csi.sock", "unix:///" + "x" * 107, "UNIX:///x"])
def test_endpoint_that_no_socket_can_have_is_refused(endpoint: str) -> None:
    with pytest.raises(InvalidArgument, match="--endpoint"):
        check_endpoint(endpoint)


def test_endpoint_of_the_greatest_length_is_taken() -> None:
    check_endpoint("unix:///" + "x" * 106)


@pytest.mark.parametrize(
    ("text", "address"),
    [(":80", ("", 80)), ("127.0.0.1:1", ("127.0.0.1", 1)), ("[::1]:65535", ("::1", 65535)), ("h:9", ("h", 9))],
)
def test_address_is_taken_apart(text: str, address: tuple[str, int]) -> None:
    assert parse_address("--x", text) == address


@pytest.mark.parametrize("text", ["", "80", "h:", "h:0", "h:65536", "h:-1", "h:x"])
def test_address_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--x"):
        parse_address("--x", text)
