"""What a power cut leaves of a directory: changes are recorded as they are made, and replayed without unsynced ones.

Owns: recording the calls of this process that change files below a directory (`Recorder`), and what a file system may
show after a cut between any two of them (`after_cut`). Model, on purpose weaker than any journaling file system:

- fsync of a file makes its data durable, not its names; fsync of a directory makes the names in it durable, no others.
- Of what was not synced anything may be there: any set of names, only in the order of changes of each name (a rename
  is there as a whole or not at all); of a file's data nothing, the first part, all, or its length with zeros.

What another process writes (a storage daemon, qemu-img) is seen when this process makes its next recorded call; it
is durable once this process has synced the file, and until then all or nothing: the writing process's own order of
writes and flushes is not seen. Of a temporary file it fills, a part may be there, too: nobody trusts it before it is
synced.
"""

import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

_BLOCK_BYTES = 4096
_IMAGES = (".qcow2", ".raw")
_TEMPORARIES = "tmp/"
ROOT = 0


@dataclass(frozen=True)
class Content:
    """What a file holds: its length, and the blocks that are not zero."""

    length_bytes: int = 0
    blocks: dict[int, bytes] = field(default_factory=dict)

    def written(self, offset_bytes: int, data: bytes) -> "Content":
        """Give the contents after a write."""
        blocks = dict(self.blocks)
        view = memoryview(data)
        while view:
            number, start = divmod(offset_bytes, _BLOCK_BYTES)
            part = view[: _BLOCK_BYTES - start]
            block = bytearray(blocks.get(number, bytes(_BLOCK_BYTES)))
            block[start : start + len(part)] = part
            blocks[number] = bytes(block)
            view, offset_bytes = view[len(part) :], offset_bytes + len(part)
        return Content(max(self.length_bytes, offset_bytes), blocks)

    def resized(self, length_bytes: int) -> "Content":
        """Give the contents after a change of the length."""
        whole, rest = divmod(length_bytes, _BLOCK_BYTES)
        blocks = {number: block for number, block in self.blocks.items() if number < whole}
        if rest and whole in self.blocks:
            blocks[whole] = self.blocks[whole][:rest] + bytes(_BLOCK_BYTES - rest)
        return Content(length_bytes, blocks)

    def key(self) -> tuple[int, frozenset[tuple[int, bytes]]]:
        """Give what is equal for equal contents."""
        zero = bytes(_BLOCK_BYTES)
        return self.length_bytes, frozenset((number, block) for number, block in self.blocks.items() if block != zero)


def read_content(path: str | Path) -> Content:
    """Read a file, which may be sparse."""
    with Path(path).open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        blocks = {}
        at = 0
        while at < length:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // _BLOCK_BYTES * _BLOCK_BYTES
            except OSError:  # ENXIO: no data up to the end
                break
            block = os.pread(file.fileno(), _BLOCK_BYTES, at)
            if any(block):
                blocks[at // _BLOCK_BYTES] = block.ljust(_BLOCK_BYTES, b"\0")
            at += _BLOCK_BYTES
    return Content(length, blocks)


@dataclass
class Tree:
    """Directories and files by number; `ROOT` is the top."""

    directories: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    files: dict[int, Content] = field(default_factory=dict)

    def copy(self) -> "Tree":
        return Tree({number: dict(names) for number, names in self.directories.items()}, dict(self.files))

    def walk(self) -> Iterator[tuple[str, int]]:
        """Give path and number of everything that can be reached, directories before what is in them."""
        todo = [("", ROOT)]
        while todo:
            above, directory = todo.pop()
            for name, number in self.directories[directory].items():
                path = f"{above}/{name}" if above else name
                yield path, number
                if number in self.directories:
                    todo.append((path, number))

    def key(self) -> frozenset[object]:
        """Give what is equal for trees that look the same."""
        first: dict[int, str] = {}
        found: set[object] = set()
        for path, number in sorted(self.walk()):
            content = self.files.get(number)
            found.add((path, first.setdefault(number, path), content.key() if content else None))
        return frozenset(found)

    @staticmethod
    def read(root: str | Path) -> "Tree":
        """Read a directory; files with several names are kept as one."""
        tree, numbers = Tree(), iter(range(1, 1 << 30))
        by_inode: dict[int, int] = {}
        todo = [(str(root), ROOT)]
        while todo:
            path, directory = todo.pop()
            for entry in os.scandir(path):
                number = by_inode.setdefault(entry.inode(), -1)
                if number < 0:
                    number = by_inode[entry.inode()] = next(numbers)
                    if entry.is_dir(follow_symlinks=False):
                        tree.directories[number] = {}
                        todo.append((entry.path, number))
                    else:
                        tree.files[number] = read_content(entry.path)
                tree.directories[directory][entry.name] = number
        return tree

    def put(self, root: Path) -> None:
        """Make a directory look like this tree."""
        wanted = dict(self.walk())
        top, there = str(root), set()
        for directory, names, files in os.walk(top, topdown=False):
            for name in files:
                os.unlink(f"{directory}/{name}")
            for name in names:
                path = f"{directory}/{name}"[len(top) + 1 :]
                if wanted.get(path) in self.directories:
                    there.add(path)
                else:
                    os.rmdir(f"{top}/{path}")
        made: dict[int, str] = {}
        for path, number in wanted.items():
            target = f"{top}/{path}"
            if number in self.directories:
                if path not in there:
                    os.mkdir(target, 0o700)
            elif number in made:
                os.link(made[number], target)
            else:
                made[number] = target
                _write_file(Path(target), self.files[number])


def _write_file(path: Path, content: Content) -> None:
    with path.open("wb") as file:
        path.chmod(0o600)
        for number, block in content.blocks.items():
            os.pwrite(file.fileno(), block, number * _BLOCK_BYTES)
        os.ftruncate(file.fileno(), content.length_bytes)


# --- what happened ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Names that change together: (directory, name, what it names from now on or None)."""

    changes: tuple[tuple[int, str, int | None], ...]
    makes: Literal["", "file", "directory"] = ""
    """What the name of the only change is for, when that is new."""

    def make(self, tree: "Tree") -> None:
        """Let what is new exist, without its name."""
        number = self.changes[0][2]
        if self.makes == "file" and number is not None:
            tree.files.setdefault(number, Content())
        elif self.makes and number is not None:
            tree.directories.setdefault(number, {})

    def name(self, tree: "Tree") -> None:
        """Change the names."""
        for directory, name, number in self.changes:
            if number is None:
                tree.directories[directory].pop(name, None)
            else:
                tree.directories[directory][name] = number


@dataclass(frozen=True)
class Written:
    """Data of a file. `length_bytes` instead of data sets the length, `whole` is what another process made of it.

    `is_torn`: of that, a part may be left.
    """

    file: int
    offset_bytes: int = 0
    data: bytes = b""
    length_bytes: int | None = None
    whole: Content | None = None
    is_torn: bool = False

    def on(self, before: Content) -> Content:
        """Give what the file holds after it."""
        if self.whole is not None:
            return self.whole
        if self.length_bytes is not None:
            return before.resized(self.length_bytes)
        return before.written(self.offset_bytes, self.data)


@dataclass(frozen=True)
class Synced:
    """fsync of a file or directory."""

    number: int


Event = Names | Written | Synced


class Recorder:
    """Records what this process changes below a directory, and keeps the tree as it is now.

    It takes the place of the functions of `os`. What goes past those is noticed: see `check_complete`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self.start = Tree.read(root)
        self.events: list[Event] = []
        self._now = self.start.copy()
        self._next = 1 << 30
        self._numbers: dict[int, int] = {}  # of open files
        self._lock = threading.RLock()
        self._stamps: dict[int, tuple[int, int]] = {}
        self._look(note=False)

    # --- looking -----------------------------------------------------------------------------------------------

    def _find(self, path: str) -> int | None:
        number = ROOT
        for name in os.path.relpath(path, self.root).split("/"):
            if name != ".":
                below = self._now.directories.get(number, {}).get(name)
                if below is None:
                    return None
                number = below
        return number

    def _place(self, path: str) -> tuple[int, str]:
        above, name = os.path.split(path)
        directory = self._find(above)
        assert directory is not None, path
        return directory, name

    def _is_ours(self, path: object) -> bool:
        return isinstance(path, str | Path) and f"{path}/".startswith(f"{self.root}/")

    def _look(self, *, note: bool = True) -> None:
        """See what other processes have written into images, and into temporary files that are to become some."""
        for path, number in list(self._now.walk()):
            is_temporary = path.startswith(_TEMPORARIES)
            if path.endswith(_IMAGES) or is_temporary:
                found = os.stat(f"{self.root}/{path}")
                stamp = (found.st_mtime_ns, found.st_size)
                if self._stamps.get(number) != stamp:
                    self._stamps[number] = stamp
                    content = read_content(f"{self.root}/{path}")
                    if note and content.key() != self._now.files[number].key():
                        self._do(Written(number, whole=content, is_torn=is_temporary))

    def flushed_outside(self) -> None:
        """Say that the processes that write images have flushed what they wrote."""
        with self._lock:
            before = len(self.events)
            self._look()
            for event in self.events[before:]:
                if isinstance(event, Written):
                    self.events.append(Synced(event.file))

    def _do(self, event: Event) -> None:
        if isinstance(event, Written) and event.whole:
            self._forget_earlier(event.file)
        self.events.append(event)
        _apply(self._now, event)

    def _forget_earlier(self, file: int) -> None:
        """Forget what another process wrote into a file before, if nothing else happened since: the end counts."""
        at = len(self.events)
        while at and isinstance(event := self.events[at - 1], Written) and event.whole:
            at -= 1
            if event.file == file:
                del self.events[at]

    def check_complete(self) -> None:
        """Check that the recorded events make of the start what is really there now."""
        replayed = self.start.copy()
        for event in self.events:
            _apply(replayed, event)
        assert replayed.key() == Tree.read(self.root).key(), "something was changed past the recorder"

    # --- recording ---------------------------------------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record inside the block."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "link", "rename", "replace", "unlink", "remove", "mkdir", "rmdir"):
                patch.setattr(os, name, self._of_path(name, getattr(os, name)))
            for name in ("pwrite", "write", "ftruncate", "posix_fallocate", "fsync", "fdatasync", "close"):
                patch.setattr(os, name, self._of_open_file(name, getattr(os, name)))
            yield
        with self._lock:
            self._look()

    def _of_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: object, *arguments: Any, **named: Any) -> Any:
            if not self._is_ours(path):
                return real(path, *arguments, **named)
            with self._lock:
                self._look()
                result = real(path, *arguments, **named)
                if name == "open":
                    self._opened(str(path), result, arguments[0])
                else:
                    self._named(name, str(path), *map(str, arguments[:1]))
                return result

        return call

    def _named(self, name: str, path: str, second: str = "") -> None:
        """Note what a call has done to names."""
        number = self._find(path)
        match name:
            case "link":
                self._do(Names(((*self._place(second), number),)))
            case "rename" | "replace":
                self._do(Names(((*self._place(path), None), (*self._place(second), number))))
            case "mkdir":
                self._make(path, "directory")
            case _:
                self._do(Names(((*self._place(path), None),)))

    def _make(self, path: str, kind: Literal["file", "directory"]) -> int:
        self._next += 1
        self._do(Names(((*self._place(path), self._next),), kind))
        return self._next

    def _opened(self, path: str, fd: int, flags: int) -> None:
        number = self._find(path)
        assert number is not None or flags & os.O_CREAT, f"{path} was made past the recorder"
        assert not flags & os.O_TRUNC, "a file of a pool is never cut off in place"
        self._numbers[fd] = self._make(path, "file") if number is None else number

    def _of_open_file(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *arguments: Any) -> Any:
            with self._lock:
                if fd not in self._numbers:
                    return real(fd, *arguments)
                if name == "close":
                    del self._numbers[fd]
                    return real(fd)
                if name in {"fsync", "fdatasync"}:
                    self._stamps.pop(self._numbers[fd], None)  # two writes in one tick of the clock have one time
                self._look()
                result = real(fd, *arguments)
                self._changed(name, fd, result, *arguments)
                return result

        return call

    def _changed(self, name: str, fd: int, result: Any, *arguments: Any) -> None:
        number = self._numbers[fd]
        match name:
            case "pwrite":
                self._do(Written(number, arguments[1], bytes(arguments[0][:result])))
            case "ftruncate":
                self._do(Written(number, length_bytes=arguments[0]))
            case "posix_fallocate":
                length = max(sum(arguments), self._now.files[number].length_bytes)
                self._do(Written(number, length_bytes=length))
            case "fsync" | "fdatasync":
                self._do(Synced(number))
            case _:
                raise AssertionError(f"os.{name} is not known to the recorder")
        if number in self._now.files:
            found = os.fstat(fd)
            self._stamps[number] = (found.st_mtime_ns, found.st_size)


def _apply(tree: Tree, event: Event) -> None:
    match event:
        case Names():
            event.make(tree)
            event.name(tree)
        case Written():
            tree.files[event.file] = event.on(tree.files[event.file])


# --- the cut ---------------------------------------------------------------------------------------------------

Fate = Literal["none", "part", "zeros", "all"]
"""What becomes of the unsynced data of a file: nothing of it, its first part, its length without data, all of it."""


@dataclass(frozen=True)
class Luck:
    """What becomes of what was not synced, asked for each set of names and each file."""

    name: str
    names: Callable[[], bool]
    data: Callable[[], Fate]
    part: Callable[[int], int] = lambda length: length // 2
    """How much is there of so many bytes, or of so many writes."""


ALL_LOST = Luck("all lost", lambda: False, lambda: "none")
ALL_THERE = Luck("all there", lambda: True, lambda: "all")
NAMES_ONLY = Luck("names without data", lambda: True, lambda: "none")
ZEROS = Luck("names and lengths of zeros", lambda: True, lambda: "zeros")
EXTREMES = (ALL_LOST, ALL_THERE, NAMES_ONLY, ZEROS)


def chance(seed: int) -> Luck:
    """Give a luck by dice, the same for the same seed."""
    dice = random.Random(seed)
    often = dice.random()
    fates: tuple[Fate, ...] = ("none", "part", "zeros", "all")
    return Luck(
        f"chance {seed}",
        lambda: dice.random() < often,
        lambda: dice.choice(fates),
        lambda length: dice.randrange(length + 1),
    )


def all_but(number: int) -> Luck:
    """Give the luck that loses one of the unsynced sets of names, counted from the latest; all data are there."""
    asked = itertools.count(1)
    return Luck(f"all but name {number}", lambda: next(asked) != number, lambda: "all")


def after_cut(start: Tree, events: Sequence[Event], luck: Luck) -> Tree:
    """Give what is there when the power goes after these events."""
    tree = start.copy()
    _keep_names(tree, events, luck)
    _keep_data(tree, events, luck)
    return tree


def _keep_names(tree: Tree, events: Sequence[Event], luck: Luck) -> None:
    named = [(at, event) for at, event in enumerate(events) if isinstance(event, Names)]
    synced = {event.number: at for at, event in enumerate(events) if isinstance(event, Synced)}
    kept: list[Names] = []
    later: set[tuple[int, str]] = set()
    for at, event in reversed(named):
        event.make(tree)
        names = {(directory, name) for directory, name, _ in event.changes}
        is_synced = any(synced.get(directory, -1) > at for directory, _ in names)
        # a later change of one of the names is there, so this one was before it
        if is_synced or names & later or luck.names():
            kept.append(event)
            later |= names
    for event in reversed(kept):
        event.name(tree)


def _keep_data(tree: Tree, events: Sequence[Event], luck: Luck) -> None:
    pending: dict[int, list[Written]] = {}
    for event in events:
        if isinstance(event, Written):
            pending.setdefault(event.file, []).append(event)
        elif isinstance(event, Synced):
            for written in pending.pop(event.number, []):
                _apply(tree, written)
    for file, writes in pending.items():
        before = tree.files[file]
        if any(write.whole for write in writes):
            writes = _surviving_of_others(writes, luck)
        else:
            writes = _surviving(writes, luck)
        for write in writes:
            before = write.on(before)
        tree.files[file] = before


def _surviving_of_others(writes: list[Written], luck: Luck) -> list[Written]:
    fate = luck.data()
    last = writes[-1]
    if fate == "all":
        return writes
    if fate == "none" or last.whole is None or not last.is_torn:
        return []
    numbers = sorted(last.whole.blocks)
    kept = numbers[: luck.part(len(numbers))] if fate == "part" else []
    return [Written(last.file, whole=replace(last.whole, blocks={one: last.whole.blocks[one] for one in kept}))]


def _surviving(writes: list[Written], luck: Luck) -> list[Written]:
    fate = luck.data()
    if fate == "none":
        return []
    if fate == "zeros":
        ends = [write.length_bytes or write.offset_bytes + len(write.data) for write in writes]
        return [Written(writes[0].file, length_bytes=max(ends))]
    if fate == "all":
        return writes
    whole = luck.part(len(writes) - 1)
    torn = writes[whole]
    if torn.length_bytes is None:
        torn = replace(torn, data=torn.data[: luck.part(len(torn.data))])
    return [*writes[:whole], torn]
