"""The durable steps that everything on a pool is made of, at one place.

Each method is one step of docs/format.md: when it returns, its effect is on disk. Nothing else in the product
writes, links, renames or removes a file of a pool. `observer` sees every step before it happens, which is how the
crash tests number them; it never changes what a step does.
"""

import errno
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from csi_quobyte.errors import Busy, DriverError, Exhausted, OutOfRange, Refused, Unavailable

Observer = Callable[[str, str], None]

# the files of one new layer and the record that will name it
_SYNCERS = 4

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM}


class translated:  # noqa: N801 - reads as the function that it is used as; a generator would take longer than a read
    """Turn an OSError of a file operation on `path` into the error class that says what a caller may do about it.

    FileExistsError and FileNotFoundError pass: their meaning depends on the step.
    """

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, (FileExistsError, FileNotFoundError)):
            raise _translation(self._path, error) from error


def _translation(path: str, error: OSError) -> DriverError:
    words = f"{path}: {error.strerror}"
    if error.errno in _NO_SPACE:
        return Exhausted(f"no space left in the pool ({words})")
    if error.errno == errno.EFBIG:
        return OutOfRange(f"the pool cannot hold a file of this size ({words})")
    if error.errno in _NOT_ALLOWED:
        return Refused(f"this process may not do that in the pool; check owner and modes ({words})")
    return Unavailable(f"the pool does not answer properly ({words})")


@dataclass(frozen=True)
class Ownership:
    """What every file and directory of a pool belongs to; ids of -1 leave the creator's."""

    uid: int
    gid: int
    file_mode: int
    directory_mode: int


class Steps:
    """The durable file operations of one pool.

    `temporary` is the directory for unfinished files; it is on the same mount, so that link(2) can publish them.
    `token` starts the name of each of them: it tells whose they are (see store.Store).
    """

    def __init__(self, temporary: str, token: str, ownership: Ownership, observer: Observer | None = None) -> None:
        self._temporary = temporary
        self._token = token
        self._ownership = ownership
        self._observer = observer
        self.abandoned: set[str] = set()
        """Temporaries that could not be removed when they were of no use any more: to be removed by the collector."""
        self._syncers = ThreadPoolExecutor(_SYNCERS, thread_name_prefix="sync")

    def _note(self, step: str, path: str) -> None:
        if self._observer:
            self._observer(step, path)

    def _own(self, fd: int, mode: int) -> None:
        """Give an open file its mode, and its owner when this process (the root node plugin) is somebody else."""
        os.fchmod(fd, mode)
        status = os.fstat(fd)
        wanted = (self._ownership.uid, self._ownership.gid)
        if -1 not in wanted and (status.st_uid, status.st_gid) != wanted:
            os.fchown(fd, *wanted)

    # --- unfinished files --------------------------------------------------------------------------------------

    def write_temporary(
        self, write: Callable[[int], None], *, reserve: Callable[[], str | None] | None = None, sync: bool = True
    ) -> str:
        """Make a complete, durable file under a temporary name and give its path. `write` fills the descriptor.

        `sync=False` leaves making it durable to `sync_all`, which must come before the file gets its name.

        `reserve` finds a preallocated file to be used up when the pool has no space left, so that what frees space
        (deleting is a record write) still works on a full pool.

        Raises:
            Exhausted: no space; the temporary is removed.
            Unavailable: the directory for it is gone: the pool is not mounted any more.
        """
        path = f"{self._temporary}/{self._token}.{secrets.token_hex(6)}"
        self._note("write", path)
        with translated(path):
            try:
                self._fill(path, write, os.O_CREAT | os.O_EXCL, sync=sync)
            except FileNotFoundError as error:
                raise Unavailable(f"{self._temporary} is gone: is the pool still mounted?") from error
            except OSError as error:
                self._remove_temporary(path)
                spare = reserve() if error.errno in _NO_SPACE and reserve else None
                if spare is None:
                    raise
                self._fill_spare(spare, path, write, sync=sync)
        return path

    def _fill_spare(self, spare: str, path: str, write: Callable[[int], None], *, sync: bool) -> None:
        """Make a preallocated file the temporary `path`, and overwrite it in place."""
        try:
            os.utime(spare)  # it was made long ago: as a temporary it would count as a dead process's
            os.rename(spare, path)
            self._fill(path, write, 0, sync=sync)
        except FileNotFoundError as error:
            raise Unavailable(f"{spare} was taken by another process") from error
        except OSError:
            self._remove_temporary(path)
            raise

    def _remove_temporary(self, path: str) -> None:
        """Remove a temporary; one that stays because that fails is remembered as of no use."""
        self.abandoned.add(path)
        with suppress(FileNotFoundError):
            try:
                os.unlink(path)
            except IsADirectoryError:  # of `prove_primitives`, which was killed
                for name in os.listdir(path):
                    os.unlink(f"{path}/{name}")
                os.rmdir(path)
        self.abandoned.discard(path)

    def _fill(self, path: str, write: Callable[[int], None], flags: int, *, sync: bool) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, self._ownership.file_mode)
        try:
            if flags:
                self._own(fd, self._ownership.file_mode)
            write(fd)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)

    def begin(self, path: str, data: bytes) -> None:
        """Make a file under a name that says what is under way; its contents become durable with `sync_all`.

        Raises:
            Exhausted: no space; nothing is left.
        """
        self._note("begin", path)
        with translated(path):
            try:
                self._fill(path, lambda fd: write_all(fd, data), os.O_CREAT | os.O_EXCL, sync=False)
            except OSError:
                with suppress(FileNotFoundError):
                    os.unlink(path)
                raise

    def discard(self, path: str) -> None:
        """Remove a file that means nothing any more (a temporary, a lost claim); not made durable."""
        self._note("discard", path)
        with translated(path):
            self._remove_temporary(path)

    def grow(self, fd: int, path: str, size_bytes: int) -> None:
        """Make the file at `path`, open as `fd`, at least so long, sparse and durably; never shorter."""
        self._note("grow", path)
        with translated(path):
            if os.fstat(fd).st_size < size_bytes:
                os.ftruncate(fd, size_bytes)
                os.fsync(fd)

    def scribble(self, path: str, data: bytes | None) -> None:
        """Write a small file whose contents nothing rests on, or remove it (None). No step: it is neither durable nor
        whole, a reader may find half of it, and where it cannot be written it is not.
        """
        with suppress(OSError):
            if data is None:
                self._remove_temporary(path)
            else:
                self.abandoned.discard(path)
                self._fill(path, lambda fd: write_whole(fd, data), os.O_CREAT, sync=False)

    # --- names -------------------------------------------------------------------------------------------------

    def link(self, path: str, name: str, *, sync: bool = True) -> None:
        """Give the file at `path` a second name that must not exist yet.

        `sync=False` leaves it to a later `sync` of the same directory to make the name durable.

        Raises:
            FileExistsError: `name` is taken; nothing changed.
        """
        self._note("link", name)
        with translated(name):
            os.link(path, name)
            if sync:
                self.sync(os.path.dirname(name))

    def rename(self, path: str, name: str, *, sync: bool = True) -> None:
        """Move a name over another one, atomically, and durably but for `sync=False`, as in `link`.

        Raises:
            FileNotFoundError: `path` is gone.
        """
        self._note("rename", name)
        with translated(name):
            os.rename(path, name)
            if sync:
                self.sync(os.path.dirname(name))

    def unlink(self, path: str, *, only_if: Callable[[], bool] | None = None, sync: bool = True) -> bool:
        """Remove a name durably; False when it was gone already, or when `only_if`, asked right before, says no.

        `sync=False` is for a name that means nothing any more: if a power cut brings it back, it is removed as a stray.
        """
        self._note("unlink", path)
        if only_if and not only_if():
            return False
        with translated(path):
            try:
                os.unlink(path)
            except FileNotFoundError:
                return False
            if not sync:
                return True
            directory = os.path.dirname(path)
            try:
                self._sync(directory)
            except FileNotFoundError:
                # It had become empty, and somebody has removed it (a layer that lost its last marker): that it is gone
                # says the same.
                self.sync(os.path.dirname(directory))
            return True

    # --- directories and markers -------------------------------------------------------------------------------

    def make_directory(self, path: str, *, sync: bool = True) -> None:
        """Make a directory; nothing happens when it is there."""
        with translated(path):
            try:
                self._note("mkdir", path)
                os.mkdir(path, self._ownership.directory_mode)
            except FileExistsError:
                return
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._own(fd, self._ownership.directory_mode)
            finally:
                os.close(fd)
            if sync:
                self.sync(os.path.dirname(path))

    def remove_directory(self, path: str) -> bool:
        """Remove an empty directory durably; False when it was gone already.

        Raises:
            Busy: something is in it; nothing changed.
        """
        self._note("rmdir", path)
        with translated(path):
            try:
                os.rmdir(path)
            except FileNotFoundError:
                return False
            except OSError as error:
                if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                    raise Busy(f"{path} is not empty") from error
                raise
            self.sync(os.path.dirname(path))
            return True

    def touch(self, path: str, *, sync: bool = True) -> None:
        """Make an empty file that marks something; nothing happens when it is there.

        `sync=False` leaves it to `sync_all` of its directory to make it durable.

        Raises:
            FileNotFoundError: its directory is gone.
        """
        self._note("touch", path)
        with translated(path):
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._ownership.file_mode)
            except FileExistsError:
                pass  # whoever made it may have died before it was durable
            else:
                try:
                    self._own(fd, self._ownership.file_mode)
                finally:
                    os.close(fd)
            if sync:
                self.sync(os.path.dirname(path))

    def sync_all(self, paths: Sequence[str]) -> None:
        """Make several files and directories durable, at once: for the disk that is hardly more work than one.

        Raises:
            Exhausted, Unavailable: one of them is not; the others may be.
            Busy: one of them is gone: where locks do not reach, another process has taken it for a dead one's.
        """
        if not paths:
            return
        self._note("sync", " ".join(paths))
        done = list(self._syncers.map(_sync_one, paths))
        for path, error in zip(paths, done, strict=True):
            if isinstance(error, FileNotFoundError):
                raise Busy(f"{path} was removed by another operation; try again") from error
            if error:
                with translated(path):
                    raise error

    def sync(self, directory: str) -> None:
        """Make the names in a directory durable.

        Raises:
            Unavailable: they may not be. Also without space: they are there, for everybody, so that nothing final may
                be said; to do it again is right.
        """
        try:
            self._sync(directory)
        except FileNotFoundError as error:
            raise Unavailable(f"{directory} is gone: is the pool still mounted?") from error

    def _sync(self, directory: str) -> None:
        try:
            with translated(directory):
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        except Exhausted as error:
            raise Unavailable(f"what was done may not be durable yet: {error}") from error


def _sync_one(path: str) -> OSError | None:
    """Make one file or directory durable, and give the error if that fails."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        return error
    return None


def write_all(fd: int, data: bytes, offset_bytes: int = 0) -> None:
    """Write all of `data` at an offset; a short write (a pool that fills up) is continued until the error shows."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset_bytes)
        view, offset_bytes = view[written:], offset_bytes + written


def write_whole(fd: int, data: bytes) -> None:
    """Make `data` the whole contents of a file, also of one that was longer."""
    write_all(fd, data)
    os.ftruncate(fd, len(data))
