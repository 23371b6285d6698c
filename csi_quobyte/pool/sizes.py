"""Size rules: what a capacity range of a request means. Pure."""

from dataclasses import dataclass

from csi_quobyte.errors import OutOfRange

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

GRANULARITY_BYTES = MIB
DEFAULT_SIZE_BYTES = GIB
MAXIMUM_SIZE_BYTES = 64 * TIB


def human(size_bytes: int) -> str:
    """Give a size as people read it, in four digits at most."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def round_up(size_bytes: int) -> int:
    """Give the least size that images can have and that is not below `size_bytes`."""
    return -(-size_bytes // GRANULARITY_BYTES) * GRANULARITY_BYTES


@dataclass(frozen=True)
class SizeRange:
    """A CSI capacity range in bytes; 0 means "not given" on either side."""

    required_bytes: int = 0
    limit_bytes: int = 0

    def __post_init__(self) -> None:
        if self.required_bytes < 0 or self.limit_bytes < 0:
            raise OutOfRange(
                f"a capacity cannot be negative (required {self.required_bytes}, limit {self.limit_bytes})"
            )
        if self.limit_bytes and self.limit_bytes < self.required_bytes:
            raise OutOfRange(f"the limit of {self.limit_bytes} bytes is below the required {self.required_bytes} bytes")
        if self.required_bytes > MAXIMUM_SIZE_BYTES:
            raise OutOfRange(f"{self.required_bytes} bytes is above the maximum of {MAXIMUM_SIZE_BYTES} (64 TiB)")

    def choose(self, *, source_bytes: int = 0, minimum_bytes: int = GRANULARITY_BYTES) -> int:
        """Give the size in bytes of a new volume: what is required, else the source's size, else 1 GiB.

        A source is never made smaller: a clone has at least the size of what it shows.

        Raises:
            OutOfRange: the range leaves no size that is a multiple of 1 MiB, holds the source and the file system.
        """
        size = round_up(self.required_bytes or source_bytes or self._default(minimum_bytes))
        if size < source_bytes:
            raise OutOfRange(f"{size} bytes is less than the source's {source_bytes} bytes")
        if size < minimum_bytes:
            raise OutOfRange(f"{size} bytes is less than the minimum of {minimum_bytes} bytes for this file system")
        if self.limit_bytes and size > self.limit_bytes:
            raise OutOfRange(f"{size} bytes (a multiple of 1 MiB) is above the limit of {self.limit_bytes} bytes")
        return size

    def accepts(self, size_bytes: int) -> bool:
        """Say whether an existing volume of `size_bytes` satisfies this range."""
        wanted = round_up(self.required_bytes)
        return size_bytes >= wanted and not (self.limit_bytes and size_bytes > self.limit_bytes)

    def _default(self, minimum_bytes: int) -> int:
        if self.limit_bytes and self.limit_bytes < DEFAULT_SIZE_BYTES:
            return max(minimum_bytes, self.limit_bytes // GRANULARITY_BYTES * GRANULARITY_BYTES)
        return DEFAULT_SIZE_BYTES
