"""Every operation on a pool that is a real file system of its own, filled up to some last blocks or inodes.

Axes: operation × file system (tmpfs short of pages or of inodes, ext4) × what is left. The same is wanted as where the
calls are made to fail (test_faults_each_step): Exhausted only when nothing of the attempt is left.
"""

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from controller_kit import Kit, Tree
from crash_runner import OPERATIONS
from test_crash_steps import template  # noqa: F401 - a fixture
from test_faults import fill
from test_faults_each_step import MAKES, after_a_final_error, after_retry, swept

from csi_quobyte.errors import Busy, DriverError, Exhausted, Unavailable
from csi_quobyte.pool.store import Store

pytestmark = pytest.mark.root

# How many amounts of space are tried for each operation: `make faults` sets 0, all; otherwise some, by the seed.
AMOUNTS = int(os.environ.get("CSI_QUOBYTE_FAULTS_CALLS", "1"))
SEED = int(os.environ.get("CSI_QUOBYTE_SEED", "0")) or random.SystemRandom().randrange(1 << 31)
MIB = 1 << 20
SIZE_BYTES = 48 * MIB
PAGE_BYTES = 4096


def command(*argv: str | Path) -> None:
    subprocess.run([str(word) for word in argv], check=True, timeout=60, capture_output=True)


@dataclass
class Small:
    """A mounted file system with a pool on it, of which some of the space can be taken away and given back."""

    mountpoint: Path

    @property
    def root(self) -> Path:
        return self.mountpoint / "pool"

    def leave(self, kind: str, amount: int) -> None:
        """Leave so many pages or inodes."""
        found = os.statvfs(self.mountpoint)
        if kind == "pages of tmpfs":
            used_bytes = (found.f_blocks - found.f_bfree) * found.f_frsize
            command("mount", "-o", f"remount,size={used_bytes + amount * PAGE_BYTES}", self.mountpoint)
        elif kind == "inodes of tmpfs":
            command("mount", "-o", f"remount,nr_inodes={found.f_files - found.f_ffree + amount}", self.mountpoint)
        else:
            fill(self.mountpoint, leave_bytes=amount * PAGE_BYTES)

    def give_back(self, kind: str) -> None:
        if "tmpfs" in kind:
            command("mount", "-o", f"remount,size={SIZE_BYTES},nr_inodes=100000", self.mountpoint)
        else:
            (self.mountpoint / "filler").unlink(missing_ok=True)


# What is left: from nothing to more than any of the operations takes.
LEFT: dict[str, range] = {
    "pages of tmpfs": range(12),
    "inodes of tmpfs": range(12),
    "pages of ext4": range(0, 24, 2),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Small]]:
    base = tmp_path_factory.mktemp("small")
    memory, disk, image = base / "memory", base / "disk", base / "image"
    memory.mkdir()
    disk.mkdir()
    image.touch()
    os.truncate(image, SIZE_BYTES)
    with ExitStack() as stack:
        command("mkfs.ext4", "-q", "-m", "0", "-b", str(PAGE_BYTES), "-N", "8192", image)
        command("mount", "-o", "loop", image, disk)
        stack.callback(command, "umount", disk)
        command("mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES},nr_inodes=100000", "small", memory)
        stack.callback(command, "umount", memory)
        yield {kind: Small(memory if "tmpfs" in kind else disk) for kind in LEFT}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_on_a_pool_with_little_space_left(
    operation: str,
    template: tuple[Path, Tree],  # noqa: F811
    places: dict[str, Small],
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # what the file system really has is to decide, and not the rule by which a create is refused beforehand
    monkeypatch.setattr(Store, "space", lambda _: (1 << 40, 1 << 40))
    cases = [(kind, amount) for kind, amounts in LEFT.items() for amount in amounts]
    random.Random(f"{operation} {SEED}").shuffle(cases)
    ended: list[str] = []
    for kind, amount in cases[: AMOUNTS or None]:
        small = places[kind]
        try:
            ended.append(one_case(small, kind, amount, operation, template))
        except BaseException as problem:
            problem.add_note(f"{operation} with {amount} {kind} left, seed {SEED}")
            raise
    print(f"{operation}: {', '.join(ended)}, seed {SEED}")


def one_case(small: Small, kind: str, amount: int, operation: str, template: tuple[Path, Tree]) -> str:  # noqa: F811
    """One operation with little space, then without that limit; gives how it ended."""
    source, as_new = template
    opened: list[Store] = []

    def copied() -> Kit:
        shutil.rmtree(small.root, ignore_errors=True)
        command("cp", "-a", source, small.root)
        opened.append(Store(str(small.root)))
        return Kit(opened[-1])

    try:
        before = swept(copied())
        kit = copied()
        small.leave(kind, amount)
        error = attempt(lambda: OPERATIONS[operation](kit))
        assert error is None or isinstance(error, Exhausted | Unavailable | Busy), repr(error)
        small.give_back(kind)
        if isinstance(error, Exhausted) and operation in MAKES:
            after_a_final_error(kit, operation, before)
        after_retry(kit, operation, as_new, inside=False)
    finally:
        small.give_back(kind)
        for store in opened:
            store.close()
    return f"{amount} {kind}: {type(error).__name__ if error else 'done'}"


def attempt(work: Callable[[], object]) -> DriverError | None:
    try:
        work()
    except DriverError as error:
        return error
    return None
