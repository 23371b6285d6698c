"""Every controller call, with the FUSE server of its pool killed (ENOTCONN) or stopped (a hang) before any step.

The controller is the real service behind a real gRPC server, in this process so that the steps can be counted; the pool
is one of the crash tests', on a stand-in. Wanted: UNAVAILABLE or ABORTED within the time limit, and once the server is
back, without a restart of anything, a retry that completes; then what must hold after a crash.
"""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import scratch
from controller_kit import NODE, SIZE_BYTES, Kit, Tree, tools
from running import Code, eventually
from test_crash_steps import (  # the same pool, operations and questions as after a crash
    check_all_deleted,
    check_effect,
    check_pool,
    fresh,  # noqa: F401 - a fixture
    template,  # noqa: F401 - a fixture
)

from csi_quobyte.config import PoolSpec
from csi_quobyte.engine.collector import Collector
from csi_quobyte.engine.copying import Copier
from csi_quobyte.pool import pools as pools_module
from csi_quobyte.pool.pools import Pools
from csi_quobyte.pool.store import Store
from csi_quobyte.rpc.controller import ControllerService
from csi_quobyte.rpc.identity import IdentityService
from csi_quobyte.rpc.server import Server, controller_services
from lab.client import Client
from lab.machine import StandIn

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("started_anew")]

# How many steps of each call meet each fault: `make faults` sets 0, all of them; otherwise some, by the seed.
STEPS = int(os.environ.get("CSI_QUOBYTE_FAULTS_CALLS", "1"))
SEED = int(os.environ.get("CSI_QUOBYTE_SEED", "0")) or random.SystemRandom().randrange(1 << 31)
POOL_TIMEOUT_S = 1.0
SLACK_S = 5.0

CALLS: dict[str, Callable[[Client, Kit], object]] = {
    "create blank": lambda client, _: client.create("new", 2 * SIZE_BYTES),
    "create raw": lambda client, _: client.create("new", 2 * SIZE_BYTES, volumeFormat="raw"),
    "create from snapshot": lambda client, kit: client.create("new", 2 * SIZE_BYTES, snapshot=kit.snapshot_id("s")),
    "create from volume": lambda client, kit: client.create("new", 2 * SIZE_BYTES, volume=kit.volume_id("v")),
    "create from untouched volume": lambda client, kit: client.create("new", 2 * SIZE_BYTES, volume=kit.volume_id("c")),
    "snapshot": lambda client, kit: client.snapshot("new", kit.volume_id("v")),
    "snapshot of untouched volume": lambda client, kit: client.snapshot("new", kit.volume_id("c")),
    "delete volume": lambda client, kit: client.delete(kit.volume_id("v")),
    "delete snapshot": lambda client, kit: client.delete_snapshot(kit.snapshot_id("s")),
    "attach": lambda client, kit: client.attach(kit.volume_id("v"), node=NODE),
    "detach": lambda client, kit: client.detach(kit.volume_id("a"), node=NODE),
    "expand": lambda client, kit: client.expand(kit.volume_id("v"), 2 * SIZE_BYTES),
}


def mount_again(standin: StandIn) -> None:
    standin.unmount()
    standin.mount()


FAULTS: dict[str, tuple[Callable[[StandIn], None], Callable[[StandIn], None]]] = {
    # what happens to the server, and what makes it well again
    "killed": (StandIn.kill, mount_again),
    "stopped": (StandIn.hang, StandIn.resume),
}


@dataclass
class Scene:
    """The controller's service on a socket, and what stands for a machine of it."""

    base: Path
    stack: ExitStack
    steps: int = 0
    strike_at: int = 0
    strike: Callable[[], None] = lambda: None

    def channel(self, name: str) -> grpc.Channel:
        """What a Client asks of a machine."""
        return self.stack.enter_context(grpc.insecure_channel(f"unix://{self.base}/{name}"))

    def observe(self, *_: str) -> None:
        self.steps += 1
        if self.steps == self.strike_at:
            self.strike()


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    base = Path(tempfile.mkdtemp(prefix="cq-", dir=scratch.directory()))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, base)
        made = Scene(base, stack)
        monkeypatch.setattr(pools_module, "Store", lambda root: Store(root, observer=made.observe))
        pools = Pools([PoolSpec("main", str(base / "pool"))], require_mount="quobyte-nosize", timeout_s=POOL_TIMEOUT_S)
        # not started: what it would do meanwhile would not be counted the same each time
        collectors = {"main": Collector(pools.all[0], tools())}
        service = ControllerService(pools, collectors, {"main": Copier(tools(), "main")})
        server = Server(
            f"unix://{base}/c.sock", controller_services(IdentityService("csi.quobyte.test", pools), service)
        )
        server.start()
        stack.callback(server.stop, 1.0)
        yield made


def code_in_time(call: Callable[[], object]) -> grpc.StatusCode:
    """Make a call, and give its code; it must not take longer than the pool's time limit allows."""
    started = time.monotonic()
    try:
        call()
        code = Code.OK
    except grpc.RpcError as error:
        code = error.code()
    assert time.monotonic() - started < POOL_TIMEOUT_S + SLACK_S
    return code


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("operation", CALLS)
def test_call_whose_pool_dies_or_hangs_before_any_step(
    operation: str,
    scene: Scene,
    template: tuple[Path, Tree],  # noqa: F811
    fresh: Callable[[], Kit],  # noqa: F811
    impatient: None,
) -> None:
    client = Client(scene)  # type: ignore[arg-type]
    kit = fresh()
    directory = Path(kit.store.root)
    steps = one_case(scene, client, operation, kit, template[1], "killed", 0)
    assert steps > 2
    cases = [(fault, step) for fault in FAULTS for step in range(1, steps + 1)]
    random.Random(f"{operation} {SEED}").shuffle(cases)
    for fault, step in cases[: STEPS or None]:
        kit = fresh()
        assert Path(kit.store.root) == directory
        try:
            one_case(scene, client, operation, kit, template[1], fault, step)
        except BaseException as problem:
            problem.add_note(f"{operation}, server {fault} before step {step}, seed {SEED}")
            raise
    print(f"{operation}: {cases[: STEPS or None]} of {steps} steps, seed {SEED}")


def one_case(scene: Scene, client: Client, operation: str, kit: Kit, as_new: Tree, fault: str, step: int) -> int:
    """One call that meets a fault before a step (0: it does not), its retry, and a look at all; gives its steps."""
    standin = StandIn(Path(kit.store.root), scene.base / "pool")
    strike, heal = FAULTS[fault]
    try:
        scene.steps, scene.strike_at, scene.strike = 0, step, lambda: strike(standin)
        code = code_in_time(lambda: CALLS[operation](client, kit))
        steps = scene.steps
        assert code in ((Code.UNAVAILABLE, Code.ABORTED) if step else (Code.OK,)), code
        assert steps >= step, "nothing was struck"
        if step:
            heal(standin)
        eventually(CALLS[operation], client, kit)
    finally:
        standin.kill()  # a stopped one too, and without waiting for what the controller has open
        standin.unmount()
    check_pool(kit, inside=False)
    check_effect(kit, operation)
    check_all_deleted(kit, as_new)
    return steps
