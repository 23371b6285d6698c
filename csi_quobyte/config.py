"""The settings of the serving processes: one frozen object each, checked completely before anything is served."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from csi_quobyte.errors import InvalidArgument

DEFAULT_DRIVER_NAME = "block.csi.quobyte.com"

_POOL_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_DRIVER_NAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?")
_UNIX_PATH_BYTES = 107
# below a state directory: "/" + 24 hex + "/qmp" is the longest socket path
_STATE_SUFFIX_BYTES = 29


@dataclass(frozen=True)
class PoolSpec:
    """One `--pool NAME=PATH`."""

    name: str
    path: str

    @classmethod
    def parse(cls, text: str) -> "PoolSpec":
        """Read NAME=PATH; the path must be absolute and is normalised, not resolved (the mount may hang).

        Raises:
            InvalidArgument: it is not of that form.
        """
        name, separator, path = text.partition("=")
        if not separator or not _POOL_NAME.fullmatch(name):
            raise InvalidArgument(f"--pool {text!r} is not NAME=PATH with a name of a-z, 0-9, '.', '_' or '-'")
        if not path.startswith("/"):
            raise InvalidArgument(f"--pool {text!r}: the path must be absolute")
        return cls(name, os.path.normpath(path))


@dataclass(frozen=True, kw_only=True)
class Common:
    """What controller and node have in common. Times in seconds; an address is HOST:PORT, empty means off."""

    endpoint: str
    pools: tuple[PoolSpec, ...]
    driver_name: str = DEFAULT_DRIVER_NAME
    require_mount: Literal["quobyte", "quobyte-nosize", "any"] = "quobyte"
    pool_timeout_s: float = 30.0
    qemu_dir: str | None = None
    health_address: str = ""
    metrics_address: str = ""
    log_level: str = "info"
    log_format: Literal["json", "text"] = "text"

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint)
        check_pools(self.pools)
        if not _DRIVER_NAME.fullmatch(self.driver_name):
            raise InvalidArgument(f"--driver-name {self.driver_name!r} is not a domain name of at most 63 characters")
        if self.pool_timeout_s <= 0:
            raise InvalidArgument("--pool-timeout must be above zero")
        for flag, address in (("health", self.health_address), ("metrics", self.metrics_address)):
            if address:
                parse_address(f"--{flag}-address", address)


@dataclass(frozen=True, kw_only=True)
class NodeConfig(Common):
    """The settings of `csi-quobyte node`."""

    node_id: str
    state_dir: str
    max_volumes_per_node: int = 128
    kubelet_dir: str = "/var/lib/kubelet"
    register_dir: str = ""
    stop_daemons_on_exit: bool = False
    allow_untested_qemu: bool = False
    stop_timeout_s: float = 90.0
    """From SIGTERM to the end: at most a quarter of it for running calls, the rest for flushing."""

    @property
    def kubelet_endpoint(self) -> str:
        """The path of the CSI socket as the kubelet sees it.

        That is the endpoint itself when it lies in the kubelet's directory; otherwise (in a pod, where the directory
        is mounted elsewhere) the place where every CSI driver's socket is: plugins/<driver name>/.
        """
        path = self.endpoint.removeprefix("unix://")
        if path.startswith(f"{self.kubelet_dir.rstrip('/')}/"):
            return path
        return f"{self.kubelet_dir.rstrip('/')}/plugins/{self.driver_name}/{os.path.basename(path)}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.node_id or len(self.node_id.encode()) > 192:
            raise InvalidArgument("--node-id must have 1 to 192 bytes")
        for flag, path in (("state-dir", self.state_dir), ("kubelet-dir", self.kubelet_dir)):
            if not path.startswith("/"):
                raise InvalidArgument(f"--{flag} {path!r} must be an absolute path")
        if len(self.state_dir.encode()) + _STATE_SUFFIX_BYTES > _UNIX_PATH_BYTES:
            longest = _UNIX_PATH_BYTES - _STATE_SUFFIX_BYTES
            raise InvalidArgument(
                f"--state-dir {self.state_dir!r} is longer than {longest} bytes: sockets would not fit"
            )
        if self.max_volumes_per_node < 1:
            raise InvalidArgument("--max-volumes-per-node must be at least 1")
        if not 1 <= self.stop_timeout_s < float("inf"):
            raise InvalidArgument("--stop-timeout must be at least 1s")


def check_endpoint(endpoint: str) -> None:
    """Check that an endpoint is unix:///PATH that a socket can have.

    Raises:
        InvalidArgument: it is not.
    """
    path = endpoint.removeprefix("unix://")
    if path == endpoint or not path.startswith("/"):
        raise InvalidArgument(f"--endpoint {endpoint!r} must be unix:// and an absolute path")
    if len(path.encode()) > _UNIX_PATH_BYTES:
        raise InvalidArgument(f"--endpoint {endpoint!r}: a socket path has at most {_UNIX_PATH_BYTES} bytes")


def check_pools(pools: Sequence[PoolSpec]) -> None:
    """Check that there is a pool and that neither a name nor a path comes twice.

    Raises:
        InvalidArgument: it is not so.
    """
    if not pools:
        raise InvalidArgument("at least one --pool NAME=PATH is needed")
    for attribute in ("name", "path"):
        values = [getattr(pool, attribute) for pool in pools]
        if len(set(values)) != len(values):
            raise InvalidArgument(f"two pools have the same {attribute}: {', '.join(sorted(values))}")


def parse_address(flag: str, text: str) -> tuple[str, int]:
    """Read HOST:PORT (HOST may be empty: all addresses, or an IPv6 one in brackets).

    Raises:
        InvalidArgument: it is not of that form.
    """
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidArgument(f"{flag} {text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)
