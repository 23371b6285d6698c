"""Random sequences of operations against a plain model: which names exist, how large they are, and what they hold.

At the end of each sequence every name is as the model says, `check` finds nothing once the collector is quiet, and
when all is deleted the pool is as new.
"""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from controller_kit import OWNER, SIZE_BYTES, Kit, tree
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from csi_quobyte.engine import collector
from csi_quobyte.errors import AlreadyExists, NotFound
from csi_quobyte.pool import records
from csi_quobyte.pool import store as store_module
from csi_quobyte.pool.sizes import SizeRange
from csi_quobyte.pool.store import Store

VOLUMES = st.sampled_from(["v1", "v2", "v3"])
SNAPSHOTS = st.sampled_from(["s1", "s2"])
MAXIMUM_BYTES = 4 * SIZE_BYTES


@dataclass
class Expected:
    """What the model knows of a volume or snapshot: its size, its first block and what it was made from."""

    size_bytes: int
    pattern: int
    source: str = ""


@dataclass
class Model:
    """The names that exist."""

    volumes: dict[str, Expected] = field(default_factory=dict)
    snapshots: dict[str, Expected] = field(default_factory=dict)
    writes: int = 0


class Operations(RuleBasedStateMachine):
    """Each rule does one operation on the pool and on the model, and compares the answers."""

    @initialize()
    def make_pool(self) -> None:
        memory = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(prefix="csi-quobyte-test-", dir=memory if memory.is_dir() else None))
        store_module.initialise(str(self.root), owner=OWNER, modes=records.Modes())
        self.as_new = tree(self.root)
        self.kit = Kit(Store(str(self.root)))
        self.model = Model()

    @rule(name=VOLUMES)
    def create(self, name: str) -> None:
        self._create(name, "", Expected(SIZE_BYTES, 0))

    @rule(name=VOLUMES, source=VOLUMES)
    def clone(self, name: str, source: str) -> None:
        if name != source:
            self._create(name, source, self.model.volumes.get(source))

    @rule(name=VOLUMES, source=SNAPSHOTS)
    def restore(self, name: str, source: str) -> None:
        self._create(name, source, self.model.snapshots.get(source))

    def _create(self, name: str, source: str, base: Expected | None) -> None:
        kit = self.kit
        origin = None
        if source:
            origin = kit.from_snapshot(source) if source.startswith("s") else kit.from_volume(source)
        size = SizeRange(0 if source else SIZE_BYTES)
        known = self.model.volumes.get(name)
        try:
            made = kit.create(name, source=origin, size=size)
        except AlreadyExists:
            assert known is not None
            assert known.source != source
        except NotFound:
            assert known is None
            assert base is None
        else:
            if known is None:
                assert base is not None
                self.model.volumes[name] = known = Expected(base.size_bytes, base.pattern, source)
            assert known.source == source
            assert made.size_bytes == known.size_bytes

    @rule(name=SNAPSHOTS, volume=VOLUMES)
    def snapshot(self, name: str, volume: str) -> None:
        known, base = self.model.snapshots.get(name), self.model.volumes.get(volume)
        try:
            made = self.kit.snapshot(name, of=volume)
        except AlreadyExists:
            assert known is not None
            assert known.source != volume
        except NotFound:
            assert known is None
            assert base is None
        else:
            if known is None:
                assert base is not None
                self.model.snapshots[name] = known = Expected(base.size_bytes, base.pattern, volume)
            assert (known.source, made.size_bytes) == (volume, known.size_bytes)

    @rule(name=VOLUMES)
    def delete(self, name: str) -> None:
        self.kit.delete(name)
        self.model.volumes.pop(name, None)

    @rule(name=SNAPSHOTS)
    def delete_snapshot(self, name: str) -> None:
        self.kit.delete_snapshot(name)
        self.model.snapshots.pop(name, None)

    @rule(name=VOLUMES)
    def expand(self, name: str) -> None:
        known = self.model.volumes.get(name)
        wanted = min(2 * known.size_bytes, MAXIMUM_BYTES) if known else SIZE_BYTES
        try:
            grown = self.kit.expand(name, wanted)
        except NotFound:
            assert known is None
        else:
            assert known is not None
            known.size_bytes = grown.size_bytes
            assert grown.size_bytes == wanted

    @precondition(lambda self: self.model.volumes)
    @rule(choice=st.integers(0, 2))
    def write(self, choice: int) -> None:
        names = sorted(self.model.volumes)
        name = names[choice % len(names)]
        self.model.writes += 1
        self.model.volumes[name].pattern = self.model.writes % 255 + 1
        self.kit.write(name, self.model.volumes[name].pattern)

    @rule()
    def collect(self) -> None:
        collector.sweep(self.kit.store)

    @precondition(lambda self: self.model.writes)
    @rule()
    def merge(self) -> None:
        for plan in self.kit.plans():
            self.kit.merge(plan)

    def teardown(self) -> None:
        kit = self.kit
        try:
            kit.sweep_until_quiet()
            # QEMU leaves clusters unused that a merge has moved twice
            assert [finding for finding in kit.check() if finding.kind != "leaked-clusters"] == []
            kit.consistency()
            for name, expected in self.model.volumes.items():
                assert kit.holds(name, expected.pattern), f"{name} does not hold {expected.pattern}"
            for name, expected in self.model.snapshots.items():
                assert kit.snapshot_holds(name, expected.pattern), f"{name} does not hold {expected.pattern}"
            kit.delete_everything()
            assert tree(self.root) == self.as_new
        finally:
            kit.store.close()
            shutil.rmtree(self.root)


Operations.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestRandomOperations = Operations.TestCase
