"""Chain algebra: from a head to its base by records alone. Pure.

    head -> parent -> ... -> base          (the order of `chain_of`)

The records decide the chain, never the backing string in an image (docs/format.md).
"""

from collections.abc import Callable

from csi_quobyte.errors import Corrupt
from csi_quobyte.pool.records import LayerRecord, LayerState

HARD_DEPTH = 32


def chain_of(head: str, find: Callable[[str], LayerRecord | None]) -> tuple[LayerRecord, ...]:
    """Follow the parents from layer `head`; the first of the result is the head, the last the base.

    What looks wrong is read once more: a merge may have been committed, and its layer dropped, between two reads.

    Raises:
        Corrupt: a layer is missing or retired, the parents form a circle, or sizes fall from base to head.
    """
    try:
        return _follow(head, find)
    except Corrupt:
        return _follow(head, find)


def _follow(head: str, find: Callable[[str], LayerRecord | None]) -> tuple[LayerRecord, ...]:
    chain: list[LayerRecord] = []
    wanted: str | None = head
    while wanted is not None:
        if any(layer.id == wanted for layer in chain):
            raise Corrupt(f"layer {wanted} is its own ancestor (chain of {head})")
        layer = find(wanted)
        if layer is None or layer.state is LayerState.RETIRED:
            raise Corrupt(f"layer {wanted} in the chain of {head} is {'missing' if layer is None else 'retired'}")
        if chain and layer.size_bytes > chain[-1].size_bytes:
            raise Corrupt(
                f"layer {chain[-1].id} ({chain[-1].size_bytes} bytes) is smaller than its parent {layer.id} "
                f"({layer.size_bytes} bytes)"
            )
        chain.append(layer)
        wanted = layer.parent
    return tuple(chain)
