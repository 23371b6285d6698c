"""Export: what a volume or a snapshot shows, as an image file outside of the pool that needs no other file.

    FILE.<pool>-<job>.partial  --copied, synced-->  FILE        in one step: under its own name a file is always whole

While it is read nothing of the chain may change (engine/hold). Of a volume a snapshot is taken first, for this export
alone; it goes as soon as the layer is held. The volume or snapshot can be deleted meanwhile: what is held stays until
the end.
"""

import errno
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from csi_quobyte.engine import layers
from csi_quobyte.engine.hold import Hold, holding
from csi_quobyte.errors import AlreadyExists, Busy, NotFound, Refused, Unavailable
from csi_quobyte.host import jobs
from csi_quobyte.host.qemu import ImageFormat, ImageLayer, QemuTools
from csi_quobyte.operations import snapshots
from csi_quobyte.operations.snapshots import SnapshotRequest
from csi_quobyte.pool import images
from csi_quobyte.pool.chain import chain_of
from csi_quobyte.pool.records import LayerRecord, SnapshotRecord, SnapshotState
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

PATIENCE_S: Final = 60.0
"""So long an export waits for other operations on the volume, and for a merge to notice that the chain is held."""
_PAUSE_S = 0.2
# what link(2) says on a file system without hard links, or for files that may have none
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

T = TypeVar("T")


@dataclass(frozen=True)
class ExportRequest:
    """What is exported, a snapshot or (without `snapshot`) what a volume holds now, and where to; ids, not names."""

    volume: str
    path: str
    format: ImageFormat
    snapshot: str = ""
    replace: bool = False
    """An existing file is replaced, at the end; else it is refused."""


def export(store: Store, tools: QemuTools, request: ExportRequest, watch: jobs.Watch) -> int:
    """Write the image file; durable under its name on return, with mode 0600. Gives its virtual size in bytes.

    After an error nothing is left and an existing file is as it was, unless the error says otherwise (the very last
    fsync has failed). After SIGKILL the collector frees what
    was held, and the next export to the same file removes the unfinished one.

    Raises:
        NotFound: no such volume, snapshot or directory.
        Refused: the volume is attached, or its file system half grown; or the target lies in the pool, or is there and
            no plain file.
        AlreadyExists: the file is there and is not to be replaced.
        Exhausted: no space, in the pool (for the snapshot) or where the file is.
        Unavailable: the volume was detached by force a moment ago, or the pool or the target does not answer.
        Busy: another operation on the volume, or a merge, does not end.
        Stopped: the watch said so, or the hold was lost.
    """
    target = _checked_target(store, request)
    with holding(store, f"export of {request.snapshot or request.volume}") as hold:
        _remove_abandoned(store, target)
        patience = _Patience(hold.watched(watch))
        layer, size_bytes = _held_layer(store, hold, request, patience)
        chain = patience.with_it(lambda: _quiet_chain(store, layer))
        images.check_chain(store, chain)
        opened = [ImageLayer(one.id, store.image_path(one), one.format) for one in chain]
        with _partial(f"{target}.{store.prefix}-{hold.job.id}.partial") as partial:
            jobs.copy_chain(
                tools,
                opened,
                partial,
                request.format,
                size_bytes=size_bytes,
                watch=hold.watched(watch),
                bypass_cache=False,  # not every file system that may be there can do it
            )
            if watch(jobs.Progress(size_bytes, size_bytes)) == "stop":
                raise jobs.Stopped("stopped before the file got its name")
            hold.confirm()
            _publish(partial, target, may_replace=request.replace)
        return size_bytes


# --- what is read ----------------------------------------------------------------------------------------------


class _Patience:
    """How long an export waits for operations and merges that are in its way, while its hold is renewed."""

    def __init__(self, watch: jobs.Watch) -> None:
        self._watch = watch
        self._deadline = time.monotonic() + PATIENCE_S

    def with_it(self, work: Callable[[], T]) -> T:
        """Do `work`, again while it is Busy and there is time.

        Raises:
            Busy: something does not end.
            Stopped: the watch said so.
        """
        while True:
            try:
                return work()
            except Busy:
                if time.monotonic() > self._deadline:
                    raise
            if self._watch(jobs.Progress(0, 0)) == "stop":
                raise jobs.Stopped("stopped before it began")
            time.sleep(_PAUSE_S)


def _held_layer(store: Store, hold: Hold, request: ExportRequest, patience: _Patience) -> tuple[LayerRecord, int]:
    """Hold the chain of what is exported; gives its uppermost layer and the size."""
    if request.snapshot:
        snapshot = snapshots.find_ready(store, request.snapshot)
        if snapshot.source_volume != request.volume:
            raise NotFound(
                f"snapshot {snapshot.id} is one of volume {snapshot.source_volume}, not {request.volume}: give that id "
                "(a snapshot keeps it when its volume is deleted, or restored from the trash)"
            )
        _check_whole(snapshot)
        _hold(store, hold, snapshot)
    else:
        _check_detached(store, request.volume)
        wanted = SnapshotRequest(name=hold.snapshot_name, source_volume=request.volume, kubernetes={})
        snapshot = patience.with_it(lambda: snapshots.create(store, wanted, lambda _: None))
        _check_whole(snapshot)
        _hold(store, hold, snapshot)
        patience.with_it(hold.drop_snapshot)
    layer = store.layer(snapshot.layer)
    return layer, max(snapshot.size_bytes, layer.size_bytes)


def _check_detached(store: Store, volume_id: str) -> None:
    """Check that a volume is not attached, for a clear answer; whoever freezes it looks again.

    Raises:
        Refused: it is.
    """
    volume = store.find_volume(volume_id)
    if volume and volume.attachments:
        raise Refused(
            f"volume {volume_id} is attached to node {volume.attachments[0].node}: what it holds now can be exported "
            "only while it is detached; a snapshot of it can be exported at any time (--snapshot)"
        )


def _check_whole(snapshot: SnapshotRecord) -> None:
    """Check that nobody but this driver would have to repair what is exported: an image has no note beside it.

    Raises:
        Refused: the growth of its file system was interrupted, and only the next stage may make it whole.
    """
    if snapshot.content and snapshot.content.growing:
        raise Refused(
            f"the file system of volume {snapshot.source_volume} was being grown when its node died: start a pod with "
            "the volume (or with one made from the snapshot) once, which repairs it, and export that"
        )


def _hold(store: Store, hold: Hold, snapshot: SnapshotRecord) -> None:
    """Hold the layer of a snapshot, and look again: what is held too late may be gone already."""
    hold.change(replace(hold.job, layer=snapshot.layer))
    store.mark(snapshot.layer, hold.marker)
    current = store.find_snapshot(snapshot.id)
    if current is None or current.uid != snapshot.uid or current.state is not SnapshotState.READY:
        raise NotFound(f"snapshot {snapshot.id} is not ready, or was deleted a moment ago")


def _quiet_chain(store: Store, layer: LayerRecord) -> list[LayerRecord]:
    """Give the chain of a held layer, base first.

    Raises:
        Busy: a merge changes it still; it sees the marker, and stops.
    """
    chain = list(reversed(chain_of(layer.id, store.find_layer)))
    layers.check_quiet(store, chain)
    return chain


# --- where it goes ---------------------------------------------------------------------------------------------


def _checked_target(store: Store, request: ExportRequest) -> str:
    """Give the absolute path of the file to be made."""
    directory, name = os.path.split(os.path.abspath(request.path))
    with _spoken(directory):
        directory = os.path.realpath(directory, strict=True)
        root = os.path.realpath(store.root)
        if os.path.commonpath([directory, root]) == root or _is_in_a_pool(directory):
            raise Refused(f"{request.path} lies in a pool: what is not the driver's own has no place there")
        target = os.path.join(directory, name)
        try:
            mode = os.lstat(target).st_mode
        except FileNotFoundError:
            return target
    if not stat.S_ISREG(mode):
        raise Refused(f"{request.path} is there and is no plain file")
    if not request.replace:
        raise AlreadyExists(f"{request.path} exists")
    return target


def _is_in_a_pool(directory: str) -> bool:
    """Say whether a directory lies in some pool, by what is in the directories above it."""
    above = [Path(directory), *Path(directory).parents]
    return any((one / "format.json").is_file() and (one / "layers").is_dir() for one in above)


@contextmanager
def _spoken(path: str) -> Iterator[None]:
    """Turn what the operating system says of the target into our errors."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no directory {path}") from error
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror}") from error


def _remove_abandoned(store: Store, target: str) -> None:
    """Remove what exports from this pool to the same file have left whose processes were killed."""
    ours = re.compile(re.escape(f"{os.path.basename(target)}.{store.prefix}-") + r"([0-9a-f]{24})\.partial")
    directory = os.path.dirname(target)
    with _spoken(directory):
        for name in os.listdir(directory):
            if (found := ours.fullmatch(name)) and _is_over(store, found[1]):
                log.warning("removing what an export that was killed has left: %s", name)
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, name))


def _is_over(store: Store, job_id: str) -> bool:
    job = store.find_job(job_id)
    return job is None or store.is_over(job)


@contextmanager
def _partial(path: str) -> Iterator[str]:
    """Give the path of a file to be made inside the block; after it the file is gone, unless it was renamed."""
    try:
        yield path
    finally:
        with suppress(OSError):
            os.unlink(path)


def _publish(partial: str, target: str, *, may_replace: bool) -> None:
    """Give the whole file its name, durably.

    Raises:
        AlreadyExists: it is there and may not be replaced.
    """
    directory = os.path.dirname(target)
    with _spoken(directory):
        if may_replace:
            os.rename(partial, target)
        else:
            _rename_to_new(partial, target)
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise Unavailable(
            f"{target} is there and whole, but a power cut may still take its name away: {error.strerror}"
        ) from error


def _rename_to_new(partial: str, target: str) -> None:
    """Rename a file to a name that must not exist."""
    try:
        os.link(partial, target)
    except FileExistsError as error:
        raise AlreadyExists(f"{target} exists: it was made meanwhile") from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if Path(target).exists():
            raise AlreadyExists(f"{target} exists: it was made meanwhile") from None
        os.rename(partial, target)
