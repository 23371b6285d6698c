"""One host as a test has it: its mount of the pool, what a controller does there, and its node, without gRPC.

PYTEST_DONT_REWRITE: it is imported by test modules and not loaded as a plugin.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controller_kit import Kit
from controller_kit import tools as find_qemu

from csi_quobyte.host import command, loop
from csi_quobyte.host.loop import LoopDevice
from csi_quobyte.host.qsd import Daemon, Daemons
from csi_quobyte.host.staged import StagedNotes
from csi_quobyte.operations.staging import TAG_PREFIX, Node, StageRequest
from csi_quobyte.operations.targets import PublishRequest
from csi_quobyte.pool.records import VolumeRecord
from csi_quobyte.pool.steps import Observer
from csi_quobyte.pool.store import Store

AS_BLOCK: dict[str, Any] = {"access_type": "block", "filesystem": ""}


@dataclass(frozen=True)
class Host:
    """One host: its mount of the pool, its operations, its node."""

    name: str
    base: Path
    kit: Kit
    node: Node
    daemons: Daemons

    def observed(self, observer: Observer) -> Kit:
        """The same host with another process whose steps are observed."""
        return Kit(Store(self.kit.store.root, observer=observer))

    @property
    def staging_path(self) -> Path:
        return self.base / f"staging-{self.name}"

    def attach(self, volume: VolumeRecord) -> int:
        changes = AS_BLOCK if volume.access_type == "block" else {}
        return self.kit.attach(volume.name, node=self.name, **changes, **_filesystem_of(volume)).generation

    def detach(self, volume: VolumeRecord) -> None:
        self.kit.detach(volume.name, node=self.name)

    def stage(self, volume: VolumeRecord, generation: int, **changes: Any) -> Path:
        """Stage a volume; `changes` make the request another one than the right one."""
        request = StageRequest(
            volume_id=volume.id,
            generation=generation,
            staging_path=str(self.staging_path),
            access_type=volume.access_type,
            filesystem=volume.filesystem,
            mount_options=(),
        )
        self.node.stage(self.kit.store, replace(request, **changes))
        return self.staging_path

    def publish(self, volume: VolumeRecord, generation: int, name: str = "target", *, read_only: bool = False) -> Path:
        """Publish a staged volume to a pod."""
        target = self.base / name
        request = PublishRequest(
            volume_id=volume.id,
            generation=generation,
            staging_path=str(self.staging_path),
            target_path=str(target),
            access_type=volume.access_type,
            readonly=read_only,
            single_writer=False,
        )
        self.node.publish(self.kit.store, request)
        return target

    def unpublish(self, volume: VolumeRecord, name: str = "target") -> None:
        self.node.unpublish(volume.id, str(self.base / name))

    def unstage(self, volume: VolumeRecord, *, stale: bool = False) -> None:
        self.node.unstage(volume.id, str(self.staging_path), stale=stale)

    def close(self, volume: VolumeRecord) -> None:
        """Unstage as the RPC does, with the word in the pool that nothing is written any more."""
        self.unstage(volume)
        self.node.note_closed(self.kit.store, volume.id)

    def expand(self, volume: VolumeRecord) -> int:
        """Grow a published volume to what its record says."""
        return self.node.expand(self.kit.store, volume.id, str(self.base / "target"), 0)

    def find_device(self, volume: VolumeRecord) -> LoopDevice | None:
        return loop.find(loop.tag_of(TAG_PREFIX, self.node._key(volume.id)))

    def device(self, volume: VolumeRecord) -> str:
        found = self.find_device(volume)
        assert found is not None
        return found.path

    def daemon_pid(self, volume: VolumeRecord) -> int | None:
        found = self.daemons.find(self.node._key(volume.id))
        return found.pid if found else None


def _filesystem_of(volume: VolumeRecord) -> dict[str, Any]:
    return {"filesystem": volume.filesystem} if volume.filesystem else {}


def host_on(base: Path, name: str, root: Path, observer: Observer | None = None) -> Host:
    """Give a host whose files are below `base` and that sees the pool at `root`; one of the same name goes on there."""
    qemu, state = find_qemu(), str(base / f"state-{name}")
    daemons = Daemons(qemu, state)
    node = Node(
        node_id=name,
        driver_name="interleavings",
        tools=qemu,
        daemons=daemons,
        notes=StagedNotes(state),
        allow_untested_qemu=False,
    )
    kit = Kit(Store(str(root), observer=observer))
    return Host(name, base, kit, node, daemons)


# --- calls as text, for a process that is killed ----------------------------------------------------------------

_ACTIONS: tuple[tuple[Any, str], ...] = (
    (command, "run"),
    (loop, "ensure"),
    (loop, "refresh_size"),
    (loop, "release"),
    (Daemons, "ensure"),
    (Daemons, "forget"),
    (Daemon, "ensure_open"),
    (Daemon, "resize"),
    (Daemon, "ensure_fuse_export"),
    (Daemon, "stop"),
    (StagedNotes, "put"),
    (StagedNotes, "remove"),
    (StagedNotes, "begin_binding"),
    (StagedNotes, "end_binding"),
)
"""What a node does to its host; before and after each is a step, besides the durable ones of the pool."""


def as_line(host: Host, method: str, volume: VolumeRecord, generation: int = 0) -> str:
    """Give a call of a host's node as text, for `make_call`."""
    asked = {"node": host.name, "base": str(host.base), "call": method, "volume": volume.id, "generation": generation}
    return json.dumps(asked)


def make_call(root: str, line: str, observe: Observer, began: Callable[[], None]) -> None:
    """Make the call of a line, by a node process that is started for it."""
    asked = json.loads(line)
    for owner, name in _ACTIONS:
        setattr(owner, name, _counted(getattr(owner, name), name, observe))
    host = host_on(Path(asked["base"]), asked["node"], Path(root), observe)
    volume = host.kit.store.volume(asked["volume"])
    began()
    match asked["call"]:
        case "stage":
            host.stage(volume, asked["generation"])
        case "unstage":
            host.close(volume)
        case "expand":
            host.expand(volume)
        case "publish":
            host.publish(volume, asked["generation"])
        case "publish read-only":
            host.publish(volume, asked["generation"], read_only=True)
        case "unpublish":
            host.unpublish(volume)
        case other:
            raise ValueError(other)


def _counted(action: Callable[..., Any], name: str, observe: Observer) -> Callable[..., Any]:
    def counted(*given: Any, **named: Any) -> Any:
        observe(f"before {name}", "")
        try:
            return action(*given, **named)
        finally:
            observe(f"after {name}", "")

    return counted
