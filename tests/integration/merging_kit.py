"""What the tests of merging start from: pools that call for one, one that was only begun, another controller."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from controller_kit import Kit

from csi_quobyte.engine.merging import Plan
from csi_quobyte.pool.records import LayerState, Merge
from csi_quobyte.pool.steps import Observer
from csi_quobyte.pool.store import Store


def other(kit: Kit, observer: Observer | None = None) -> Kit:
    """Another controller of the same pool."""
    return Kit(Store(kit.store.root, observer=observer))


def is_clean(kit: Kit) -> bool:
    kit.consistency()
    return [finding for finding in kit.check() if finding.kind != "leaked-clusters"] == []


def two_layers(kit: Kit) -> Plan:
    """A volume whose base calls for a merge up into its head."""
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.write("v", 2, block=1)
    kit.delete_snapshot("s")
    (plan,) = kit.plans()
    assert plan.kind == "up"
    return plan


def three_layers(kit: Kit) -> Plan:
    """A volume whose middle layer calls for a merge down into its base."""
    kit.create("v")
    for number, name in enumerate(("first", "second"), start=1):
        kit.write("v", number, block=number - 1)
        kit.snapshot(name, of="v")
    kit.write("v", 3, block=2)
    for name in ("first", "second"):
        kit.delete_snapshot(name)
    (plan,) = [plan for plan in kit.plans() if plan.kind == "down"]
    return plan


@contextmanager
def no_lock(store: Store, name: str) -> Iterator[None]:
    """What a lock is worth between two hosts."""
    yield


def begin(kit: Kit, plan: Plan) -> Merge:
    """Note a merge, as its first step does."""
    layer = kit.store.layer(plan.layer)
    noted = Merge(kind=plan.kind, child=plan.child, parent=plan.parent)
    kit.store.swap(layer, replace(layer, state=LayerState.MERGING, merge=noted))
    return noted
