"""Records change and go by compare-and-set, on a file system that knows only link, rename and unlink.

    <record>              generation n
    <record>.g<n+1>       the claim: whoever links it is the only one who may change generation n, in any process on
                          any host; its contents are the next version (of a removal: the record itself)

A claim is held for about a millisecond. One that a process that died has left is finished or dropped by whoever meets
it, once it has stood for two seconds.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic

from csi_quobyte.errors import Busy, Corrupt
from csi_quobyte.pool import files, records
from csi_quobyte.pool.records import R
from csi_quobyte.pool.steps import Steps, translated, write_whole

log = logging.getLogger(__name__)

_CLAIM_PATIENCE_S = 2.0


@dataclass(frozen=True)
class Prepared(Generic[R]):
    """A change of a record that is written down under a temporary name and has not been made yet."""

    old: R
    following: R
    temporary: str
    path: str


class Versions:
    """The changes of a pool's records; `reserve` finds a file to be used up when there is no space left."""

    def __init__(self, steps: Steps, reserve: Callable[[], str | None]) -> None:
        self._steps = steps
        self._reserve = reserve
        self._claims_seen: dict[str, tuple[int, float]] = {}
        self._claims_guard = threading.Lock()

    def prepare(self, old: R, new: R, path: str, *, is_needed: bool = True) -> Prepared[R]:
        """Write a change down; one that is needed, by itself, is durable at once and may use up the reserve."""
        following = records.next_version(new, of=old)
        temporary = self._steps.write_temporary(
            lambda fd: write_whole(fd, records.encode(following)),
            reserve=self._reserve if is_needed else None,
            sync=is_needed,
        )
        return Prepared(old, following, temporary, path)

    def commit(self, prepared: Prepared[R], *, sync: bool = True) -> R:
        """Put a change that was prepared, and is durable, in the place of the record; durable, unless `sync` is False.

        Raises:
            Busy: the record is no longer what was read, or another writer is in the middle of it.
        """
        try:
            claim = self._claim(prepared.temporary, prepared.path, prepared.old)
        finally:
            self._steps.discard(prepared.temporary)
        try:
            self._steps.rename(claim, prepared.path, sync=sync)
        except FileNotFoundError as error:
            raise Busy(f"{prepared.old.id}: this change was overtaken") from error
        return prepared.following

    def remove(self, record: records.Record, path: str, *, keep_as: str | None = None) -> None:
        """Remove the record at a path, as it was read, after it was given a second name if it is to be kept.

        Gone already is success. Durable on return.

        Raises:
            Busy: the record is no longer what was read.
        """
        try:
            claim = self._claim(path, path, record)
        except Busy:
            if self._is_gone(path):
                return
            raise
        if keep_as:
            try:
                # From the claim, not from the path: where another process has dropped it and gone on, nothing is
                # published late.
                self._steps.link(claim, keep_as)
            except FileExistsError:
                # an earlier attempt has come so far, and may have died before that was durable
                self._steps.sync(os.path.dirname(keep_as))
            except FileNotFoundError as error:
                raise Busy(f"{record.id} was changed by another operation") from error
        # A process that was stopped for so long that its claim counts as a dead one's must not remove what others have
        # put there since. (What it cannot know is how long the removal itself is under way to the pool.)
        if not self._steps.unlink(path, only_if=lambda: files.read(claim) == files.read(path)):
            raise Busy(f"{record.id} was changed by another operation")
        self._steps.discard(claim)

    def _is_gone(self, path: str) -> bool:
        """Say whether a record is not there any more, durably: whoever removed it may have died before that.

        A look beside a rename may find nothing; then there is a claim, or a moment later the record is there.
        """
        if files.read(path) is not None:
            return False
        directory, _, name = path.rpartition("/")
        self._steps.sync(directory)
        is_claimed = any(other.startswith(f"{name}.g") for other in files.names(directory))
        return not is_claimed and files.read(path) is None

    def _claim(self, content: str, path: str, old: records.Record) -> str:
        """Link `content` to the one name that allows to change `old`, then compare; gives the claim's path."""
        claim = f"{path}.g{old.generation + 1}"
        try:
            self._steps.link(content, claim, sync=False)
        except FileExistsError as error:
            self.resolve_claim(path, claim)
            raise Busy(f"{old.id} is being changed by another operation") from error
        except FileNotFoundError as error:
            raise Busy(f"{old.id} was removed by another operation") from error
        current = files.find(type(old), path)
        if current is None or not records.same_version(current, old):
            self._steps.discard(claim)
            raise Busy(f"{old.id} was changed by another operation")
        return claim

    def resolve_claim(self, path: str, claim: str) -> bool:
        """Finish or drop a claim whose writer died; says whether it was one of those.

        A living writer holds its claim for about a millisecond; one that is still the same file two seconds after
        it was first met is a dead one's. Its contents are complete: it becomes the record if the record still is
        the generation before it, and is dropped otherwise (also when it is the mark of an unfinished removal).
        """
        with translated(claim), suppress(FileNotFoundError):
            inode = os.stat(claim).st_ino
            with self._claims_guard:
                seen_inode, since = self._claims_seen.setdefault(claim, (inode, time.monotonic()))
                if seen_inode != inode:
                    self._claims_seen[claim] = (inode, time.monotonic())
                    return False
                if time.monotonic() - since < _CLAIM_PATIENCE_S:
                    return False
                del self._claims_seen[claim]
            self._finish_claim(path, claim)
            return True
        return False

    def _finish_claim(self, path: str, claim: str) -> None:
        """Rename a dead writer's claim over its record if it is the next version of the same object, else drop it."""
        number = int(claim.rpartition(".g")[2])
        record = files.find(records.Versioned, path)
        try:
            claimed = files.find(records.Versioned, claim)
        except Corrupt as error:
            log.error("a claim that cannot be read is dropped: %s", error)
            claimed = None
        # the uid: a claim that lost its comparison may outlive its object and meet the next one of that name
        if record and claimed and _is_next(record, claimed, number):
            self._steps.rename(claim, path)
        else:
            self._steps.discard(claim)


def _is_next(record: records.Versioned, claimed: records.Versioned, generation: int) -> bool:
    return (record.generation, claimed.generation, claimed.uid) == (generation - 1, generation, record.uid)
