"""How much space a volume, a snapshot or an entry of the trash has, and how much of it is its own. Pure.

allocated   the blocks of all image files in its chain (and of a snapshot's cache)
exclusive   of these, what deleting it alone would free without a merge: its layer and the ones below, as long as
            nothing else refers to them
shared      the rest
"""

from collections.abc import Iterable
from dataclasses import dataclass

from csi_quobyte.pool.records import child_marker


@dataclass(frozen=True)
class LayerSpace:
    """One layer of a chain: its allocated bytes (None: its file is missing) and its markers."""

    id: str
    allocated_bytes: int | None
    markers: frozenset[str]


@dataclass(frozen=True)
class Space:
    """Bytes; see the module."""

    allocated_bytes: int
    exclusive_bytes: int

    @property
    def shared_bytes(self) -> int:
        """What stays when the object is deleted."""
        return self.allocated_bytes - self.exclusive_bytes


def space_of(marker: str, chain: Iterable[LayerSpace], cache: LayerSpace | None = None) -> Space:
    """Give the space of what has `marker` in the first layer of a chain, head first."""
    allocated = exclusive = 0
    wanted, is_own = marker, True
    for layer in chain:
        is_own = is_own and layer.markers == {wanted}
        wanted = child_marker(layer.id)
        allocated += layer.allocated_bytes or 0
        exclusive += (layer.allocated_bytes or 0) if is_own else 0
    if cache:
        allocated += cache.allocated_bytes or 0
        exclusive += (cache.allocated_bytes or 0) if cache.markers == {marker} else 0
    return Space(allocated, exclusive)
