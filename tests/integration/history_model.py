"""The plain model that random histories are compared with: names, what they were asked for as, and what they hold.

Knows nothing of layers, records or steps: what a user of the driver may rely on, and what a killed call leaves open.
"""

from dataclasses import dataclass, field, replace

from controller_kit import BLOCK_BYTES, Kit, qemu_io, read_disk

from csi_quobyte.pool import images


@dataclass(frozen=True)
class Wish:
    """What an object was asked for with: a call of its name that asks for anything else is refused."""

    source: str = ""
    image_format: str = "qcow2"
    clone_mode: str = "overlay"
    on_delete: str = "delete"


@dataclass
class Disk:
    """What is known of a volume, snapshot or image: size, what its blocks are filled with, what it was asked for as."""

    size_bytes: int
    blocks: dict[int, int]
    wish: Wish = Wish()
    is_attached: bool = False

    def copy(self, wish: Wish) -> "Disk":
        return replace(self, blocks=dict(self.blocks), wish=wish, is_attached=False)


@dataclass(frozen=True)
class Kept:
    """A disk in the trash, and the name under which it was deleted."""

    name: str
    disk: Disk


@dataclass
class Model:
    """What there is, and what calls that were killed or go on have left open.

    `disks` are the volumes (v1, ...), snapshots (s1, ...) and images (i1, ...). A name is in at most one of them and
    of `unknown` and `copying`.
    """

    disks: dict[str, Disk] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    """Names of which a killed call has left what only the pool knows."""
    copying: dict[str, Disk] = field(default_factory=dict)
    """Volumes whose copy was begun: what they were promised to hold, whatever becomes of the source."""
    trash: dict[str, Kept] = field(default_factory=dict)
    """What the trash holds by the ids of its entries, and more: what killed calls have left is not here."""
    moving: dict[str, tuple[str, Kept]] = field(default_factory=dict)
    """Unknown names whose delete into the trash was killed: the entry that it comes to."""
    restoring: dict[str, tuple[str, Kept]] = field(default_factory=dict)
    """Unknown names as which an entry was to be restored, by a command that was killed."""
    gone: set[str] = field(default_factory=set)
    """Entries that were purged or restored: they never come back."""
    writes: int = 0

    def names(self, kind: str) -> list[str]:
        return sorted(name for name in self.disks if name.startswith(kind))

    def leave(self, name: str) -> None:
        """A call that was to change an object was killed."""
        self.disks.pop(name, None)
        self.copying.pop(name, None)
        self.unknown.add(name)

    def forget_expired(self) -> None:
        """Time passes: what is kept for a time is gone, or goes when its delete is ended."""
        self.trash = {entry: kept for entry, kept in self.trash.items() if kept.disk.wish.on_delete != "trash"}
        self.moving = {name: moved for name, moved in self.moving.items() if moved[1].disk.wish.on_delete != "trash"}


def shows(kit: Kit, layer_id: str, blocks: dict[int, int]) -> bool:
    """Say whether a layer's disk holds these blocks and zeros everywhere else, comparing every byte."""
    layer = kit.store.layer(layer_id)
    end = images.virtual_size_bytes(kit.store, layer) // BLOCK_BYTES
    assert all(block < end for block in blocks), f"{blocks} and only {end} blocks"
    commands = []
    start = 0
    for at in range(1, end + 1):
        if at == end or blocks.get(at, 0) != blocks.get(start, 0):
            commands.append(f"read -P {blocks.get(start, 0)} {start * BLOCK_BYTES} {(at - start) * BLOCK_BYTES}")
            start = at
    return qemu_io(read_disk(kit.store, layer_id), *commands, read_only=True) == 0
