"""csi-quobyte controller and csi-quobyte node: the composition root of the serving processes.

Order: configuration is checked completely, then what serves is built, then the socket appears. A pool that is not
mounted is no configuration error: its calls are UNAVAILABLE until it is.
"""

import fcntl
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NoReturn

import click

from csi_quobyte import __version__, telemetry
from csi_quobyte.cli import options
from csi_quobyte.config import Common, NodeConfig, parse_address
from csi_quobyte.engine.collector import Collector
from csi_quobyte.engine.copying import Copier
from csi_quobyte.errors import Corrupt, DriverError, InvalidArgument, Unavailable
from csi_quobyte.host import command
from csi_quobyte.host.jobs import MINIMUM_SPEED_BYTES_PER_S
from csi_quobyte.host.qemu import QemuTools, find_tools, gate
from csi_quobyte.host.qsd import Daemons
from csi_quobyte.host.staged import StagedNotes
from csi_quobyte.operations.staging import Node
from csi_quobyte.pool import records
from csi_quobyte.pool.pools import Pool, Pools
from csi_quobyte.pool.records import NodeRecord
from csi_quobyte.pool.store import Store
from csi_quobyte.rpc.controller import ControllerService
from csi_quobyte.rpc.health import serve_health, serve_metrics
from csi_quobyte.rpc.identity import IdentityService
from csi_quobyte.rpc.node import Attachments, Fence, NodeService
from csi_quobyte.rpc.registration import Registration
from csi_quobyte.rpc.server import AddServices, Server, controller_services, node_services

log = logging.getLogger(__name__)

GRACE_S = 25.0
_GRACE_SHARE = 0.25
RETRY_POOL_S = 10.0
NODE_RECORD_EVERY_S = 600.0


@click.command()
@options.serving
@options.option(
    "--merge-layers/--no-merge-layers",
    default=True,
    help="Merge the layers of deleted snapshots and shorten long chains, while no node has them open.",
)
@options.option(
    "--merge-bandwidth",
    default="",
    metavar="SIZE",
    help="How much merging may move in a second, in each pool, such as 100Mi; at least 1Mi. No limit by default.",
)
def controller(
    pool_timeout: str, pool: tuple[str, ...], merge_layers: bool, merge_bandwidth: str, **settings: Any
) -> None:
    """Serve the CSI Controller: volumes, snapshots, attachments. Needs no privileges."""
    command.isolate()
    config = Common(
        pools=options.parse_pools(pool),
        pool_timeout_s=options.parse_duration_s("--pool-timeout", pool_timeout),
        **settings,
    )
    telemetry.setup_logging(config.log_level, config.log_format == "json")
    tools = find_tools(config.qemu_dir)
    pools = Pools(config.pools, require_mount=config.require_mount, timeout_s=config.pool_timeout_s)
    speed_bytes_per_s = _merge_speed_bytes_per_s(merge_bandwidth)
    copiers = {one.name: Copier(tools, one.name) for one in pools.all}
    collectors = {
        one.name: Collector(
            one,
            tools,
            merges=merge_layers,
            speed_bytes_per_s=speed_bytes_per_s,
            resume=copiers[one.name].resume,
        )
        for one in pools.all
    }
    identity = IdentityService(config.driver_name, pools)

    def stop() -> bool:
        # all at once: the grace of the pod is for all of them together
        workers = [*copiers.values(), *collectors.values()]
        with ThreadPoolExecutor(len(workers)) as threads:
            return all(list(threads.map(lambda worker: worker.stop(GRACE_S), workers)))

    for collector in collectors.values():
        collector.start()
    services = controller_services(identity, ControllerService(pools, collectors, copiers))
    _serve(config, identity, services, stop)


def _merge_speed_bytes_per_s(text: str) -> int | None:
    """Read --merge-bandwidth; None: no limit.

    Raises:
        InvalidArgument: it is no size, or less than a job can be held to.
    """
    if not text:
        return None
    speed_bytes_per_s = options.parse_size_bytes("--merge-bandwidth", text)
    if speed_bytes_per_s < MINIMUM_SPEED_BYTES_PER_S:
        raise InvalidArgument(f"--merge-bandwidth {text!r} is less than 1Mi")
    return speed_bytes_per_s


@click.command()
@options.serving
@options.option("--node-id", envvar="NODE_ID", required=True, help="Name of this node, as Kubernetes knows it.")
@options.option("--state-dir", required=True, help="Directory for sockets and hints of staged volumes.")
@options.option("--max-volumes-per-node", type=int, default=128, help="How many volumes Kubernetes may attach here.")
@options.option("--kubelet-dir", default="/var/lib/kubelet", help="The kubelet's directory: where it finds the socket.")
@options.allow_untested_qemu
@options.option("--register-dir", default="", help="Register with the kubelet by a socket there, if given.")
@options.option(
    "--stop-daemons-on-exit",
    is_flag=True,
    default=False,
    help="On SIGTERM flush and end the storage daemons, which would be killed with this container anyway.",
)
@options.option(
    "--stop-timeout",
    type=str,
    default="90s",
    metavar="TIME",
    help="How long that may take from SIGTERM on, all volumes together; what is not flushed by then is lost.",
)
def node(pool_timeout: str, stop_timeout: str, pool: tuple[str, ...], **settings: Any) -> None:
    """Serve the CSI Node: devices and mounts on this machine. Needs root."""
    command.isolate()
    config = NodeConfig(
        pools=options.parse_pools(pool),
        pool_timeout_s=options.parse_duration_s("--pool-timeout", pool_timeout),
        stop_timeout_s=options.parse_duration_s("--stop-timeout", stop_timeout),
        **settings,
    )
    telemetry.setup_logging(config.log_level, config.log_format == "json")
    tools = find_tools(config.qemu_dir)
    _own_state_dir(config.state_dir)
    pools = Pools(config.pools, require_mount=config.require_mount, timeout_s=config.pool_timeout_s)
    staging = Node(
        node_id=config.node_id,
        driver_name=config.driver_name,
        tools=tools,
        daemons=Daemons(tools, config.state_dir),
        notes=StagedNotes(config.state_dir),
        allow_untested_qemu=config.allow_untested_qemu,
    )
    attachments = Attachments(staging, pools, timeout_s=config.pool_timeout_s)
    fence = Fence(staging, attachments)
    identity = IdentityService(config.driver_name, pools, [lambda: _gate_reason(config, tools), fence.overdue])
    service = NodeService(
        staging,
        pools,
        attachments,
        node_id=config.node_id,
        max_volumes=config.max_volumes_per_node,
        timeout_s=config.pool_timeout_s,
    )
    registration = (
        Registration(config.driver_name, config.kubelet_endpoint, config.register_dir) if config.register_dir else None
    )

    # one call that hangs must not take the time that the volumes need to be flushed
    grace_s = min(GRACE_S, config.stop_timeout_s * _GRACE_SHARE)

    def stop() -> bool:
        if registration:
            registration.stop()
        if not config.stop_daemons_on_exit:
            return True
        return staging.stop_all(timeout_s=config.stop_timeout_s - grace_s, is_taken=attachments.is_surely_taken)

    staging.recover()
    threading.Thread(target=fence.run_forever, name="fence", daemon=True).start()
    for one in pools.all:
        threading.Thread(target=_keep_node_record, args=(one, config.node_id), daemon=True).start()
    on_ready = registration.start if registration else None
    _serve(config, identity, node_services(identity, service), stop, on_ready=on_ready, grace_s=grace_s)


def _gate_reason(config: NodeConfig, tools: QemuTools) -> str:
    """Give the reason why this node's QEMU may not serve data, an empty text when it may."""
    return "" if config.allow_untested_qemu else gate(tools.version, "fuse") or ""


def _own_state_dir(state_dir: str) -> None:
    """Make the state directory and hold its lock for the life of the process.

    Raises:
        Unavailable: another node process has it, or it cannot be made.
    """
    try:
        os.makedirs(state_dir, mode=0o700, exist_ok=True)
        fd = os.open(f"{state_dir}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Unavailable(f"another node process uses the state directory {state_dir}") from error
    except OSError as error:
        raise Unavailable(f"the state directory {state_dir} cannot be used: {error.strerror}") from error


def _keep_node_record(pool: Pool, node_id: str) -> None:
    """Write this node's record into a pool as soon as it is mounted: without it nothing can be attached here.

    Later it is looked at now and then: it is written anew where it was lost, or the pool is another one.
    """
    record = NodeRecord(id=node_id, driver_version=__version__, started_at=records.now())
    waiter = threading.Event()
    said = ""
    while True:
        try:
            _ensure_node_record(pool.open(), record)
        except DriverError as error:
            if str(error) != said:  # not every ten seconds
                log.warning("the node's record cannot be written to pool %s yet: %s", pool.name, error)
            said = str(error)
            waiter.wait(RETRY_POOL_S)
        else:
            said = ""
            waiter.wait(NODE_RECORD_EVERY_S)


def _ensure_node_record(store: Store, record: NodeRecord) -> None:
    """Write the record of this node process, unless it is there."""
    with suppress(Corrupt):
        present = store.find_node(record.id)
        if present and present.started_at == record.started_at:
            return
    store.put_node(record)


def _serve(
    config: Common,
    identity: IdentityService,
    services: AddServices,
    stop: Callable[[], bool],
    on_ready: Callable[[], None] | None = None,
    grace_s: float = GRACE_S,
) -> NoReturn:
    """Serve until SIGTERM or SIGINT, then end in order; ends the process."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    server = Server(config.endpoint, services)
    if config.health_address:
        serve_health(parse_address("--health-address", config.health_address), identity.is_ready)
    if config.metrics_address:
        serve_metrics(parse_address("--metrics-address", config.metrics_address))
    server.start()
    if on_ready:
        on_ready()
    log.info("csi-quobyte %s serves on %s", __version__, config.endpoint)
    stopping.wait()
    log.info("ending: waiting for running calls")
    finished = server.stop(grace_s)
    finished = stop() and finished
    log.info("ended%s", "" if finished else "; something did not end in time")
    sys.stderr.flush()
    # abandoned threads may hang in a mount for ever: the interpreter must not wait for them
    os._exit(0)
