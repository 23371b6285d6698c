"""The store: records, layers, markers and locks of one mounted pool; pool/naming has its paths.

Always true, whatever dies (docs/format.md has the steps): a record is complete or absent; an image or a record is
published by link(2) and never replaces another; a record changes by compare-and-set; `refs/` is removed only while
empty, and from then on nothing can refer to the layer again.
"""

import logging
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from csi_quobyte.errors import AlreadyExists, Busy, Corrupt, Exhausted, NotFound, Refused, Unavailable
from csi_quobyte.pool import files, layout, naming, primitives, records
from csi_quobyte.pool.locks import Locks, is_written_by_qemu
from csi_quobyte.pool.naming import Paths, is_record
from csi_quobyte.pool.presence import Presence
from csi_quobyte.pool.records import (
    Closed,
    Content,
    Deletable,
    ImageRecord,
    JobRecord,
    LayerRecord,
    LayerState,
    LeaseRecord,
    NodeRecord,
    Progress,
    R,
    SnapshotRecord,
    VolumeRecord,
    trash_id,
)
from csi_quobyte.pool.sizes import human
from csi_quobyte.pool.steps import Observer, Steps, translated, write_all, write_whole
from csi_quobyte.pool.versions import Prepared, Versions

log = logging.getLogger(__name__)

_RESERVE_FILES = 8
_RESERVE_BYTES = 64 * 1024
_REREAD_PAUSE_S = 1.1
_JOB_S = 600.0  # a job that is not renewed for so long, by the clock of who looks, is over
_NOTE_FRESH_S = 60.0  # so long a note of progress, which is written every second, tells of something alive


@dataclass(frozen=True)
class Begun:
    """A volume that is announced and not published yet."""

    volume: VolumeRecord
    path: str


class Store:
    """One open pool. All methods may be called from many threads; every one may raise Unavailable.

    A store lives as long as the mount that it was opened on (`is_same_mount`); after a remount a new one is opened.
    """

    def __init__(self, root: str, *, observer: Observer | None = None) -> None:
        """Open the pool at `root` (an absolute path).

        Raises:
            NotFound, Corrupt, Refused: see `layout.read_format`.
        """
        self.root = root
        self._paths = Paths(root)
        self.format = layout.read_format(root)
        self._identity = layout.identity_of(root)
        self.locks = Locks(f"{root}/lock")
        self._presence = Presence(root)
        self._steps = Steps(f"{root}/tmp", self.token, layout.ownership_of(self.format), observer)
        self._versions = Versions(self._steps, self._reserve_file)
        self._jobs_over: set[str] = set()
        self._jobs_seen: dict[str, tuple[int, str, float]] = {}

    def close(self) -> None:
        """Let go of the pool; what is still running keeps its own open files."""
        self._presence.close()

    @property
    def token(self) -> str:
        """What tells this process from all others, for as long as the store is open."""
        return self._presence.token

    @property
    def place(self) -> str:
        """What tells this mount on this running host from all others: inside one place, locks are right."""
        return self._presence.place

    def is_alive(self, token: str) -> bool:
        """Say whether the process of a token lives, as far as this mount's locks tell (see `place`)."""
        return self._presence.is_alive(token)

    @property
    def prefix(self) -> str:
        """The part of every id that names this pool."""
        return self.format.prefix

    def is_same_mount(self) -> bool:
        """Say whether `root` still is the mount that this store was opened on, with the same format.json.

        Raises:
            Unavailable: the mount does not answer.
        """
        return self._identity is not None and layout.identity_of(self.root) == self._identity

    def space(self) -> tuple[int, int]:
        """Give the total and the available bytes of the mounted volume."""
        with translated(self.root):
            found = os.statvfs(self.root)
        return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize

    def time(self) -> datetime:
        """Give the time that the file system gives to what is written now; no client's clock need be right for that."""
        path = self._steps.write_temporary(lambda _: None, sync=False)
        try:
            with translated(path):
                return datetime.fromtimestamp(os.stat(path).st_mtime, UTC)
        finally:
            self._steps.discard(path)

    def check_room(self, needed_bytes: int, what: str) -> None:
        """Check that there is space for something large before any of it is written: pods write into the rest.

        Raises:
            Exhausted: there is less than that.
        """
        _, available_bytes = self.space()
        if available_bytes < needed_bytes:
            raise Exhausted(f"{what} may take {human(needed_bytes)}, and the pool has {human(available_bytes)} left")

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock of a record id (or of a task such as "collector") in a with block.

        Raises:
            Busy: somebody else has it.
        """
        return self.locks.hold(name)

    # --- paths -------------------------------------------------------------------------------------------------

    def image_path(self, layer: LayerRecord) -> str:
        """The path of a layer's image file."""
        return self._paths.layer_file(layer.id, layer.file)

    def layer_record_path(self, layer_id: str) -> str:
        """The path of a layer's record, for messages."""
        return self._paths.record("layers", layer_id)

    def job_record_path(self, job_id: str) -> str:
        """The path of a job's record, for messages."""
        return self._paths.job(job_id)

    def backing_name(self, child_id: str, parent: LayerRecord) -> str:
        """The backing string for an image: relative, for people and tools; nothing of ours follows it."""
        if child_id[:2] == parent.id[:2]:
            return parent.file
        return f"../{parent.id[:2]}/{parent.file}"

    # --- reading records ---------------------------------------------------------------------------------------

    def _find_own(self, kind: type[R], path: str, record_id: str) -> R | None:
        """Give the record at a path; one that says it is another's is as good as damaged.

        Raises:
            Corrupt: it cannot be read, or is another object's.
        """
        found = files.find(kind, path)
        if found and found.id != record_id:
            raise Corrupt(f"{path} holds the record of {found.id}")
        return found

    def find_volume(self, volume_id: str) -> VolumeRecord | None:
        """Give a volume's record, None when there is none.

        Raises:
            Corrupt: it cannot be read.
        """
        return self._find_own(VolumeRecord, self._paths.record("volumes", volume_id), volume_id)

    def find_snapshot(self, snapshot_id: str, *, of: str = "") -> SnapshotRecord | None:
        """Give a snapshot's record, None when there is none, or with `of` when it surely is none of that volume's."""
        path = self._paths.record("snapshots", snapshot_id)
        data = files.read(path)
        if data is None or of.encode() not in data:
            return None
        found = records.decode(SnapshotRecord, data, where=path)
        if found.id != snapshot_id:
            raise Corrupt(f"{path} holds the record of {found.id}")
        return found

    def find_image(self, image_id: str) -> ImageRecord | None:
        """Give a golden image's record, None when there is none."""
        return self._find_own(ImageRecord, self._paths.record("images", image_id), image_id)

    def find_job(self, job_id: str) -> JobRecord | None:
        """Give the record of a job, None when there is none."""
        return self._find_own(JobRecord, self._paths.job(job_id), job_id)

    def find_layer(self, layer_id: str) -> LayerRecord | None:
        """Give a layer's record, None when there is none."""
        return self._find_own(LayerRecord, self._paths.record("layers", layer_id), layer_id)

    def find_lease(self) -> LeaseRecord | None:
        """Give the record that says who may merge layers, None in a pool where nobody ever did."""
        return files.find(LeaseRecord, self._paths.lease)

    def find_node(self, node_id: str) -> NodeRecord | None:
        """Give a node's record, None when it never had this pool."""
        return files.find(NodeRecord, self._paths.node(node_id))

    def volume(self, volume_id: str) -> VolumeRecord:
        """Give a volume's record.

        Raises:
            NotFound: there is none.
            Corrupt: it cannot be read.
        """
        found = self.find_volume(volume_id)
        if found is None:
            raise NotFound(f"volume {volume_id} does not exist")
        return found

    def snapshot(self, snapshot_id: str) -> SnapshotRecord:
        """Give a snapshot's record.

        Raises:
            NotFound: there is none.
        """
        found = self.find_snapshot(snapshot_id)
        if found is None:
            raise NotFound(f"snapshot {snapshot_id} does not exist")
        return found

    def layer(self, layer_id: str) -> LayerRecord:
        """Give a layer's record; one that a record names must be there.

        Raises:
            Corrupt: it is missing or cannot be read.
        """
        found = self.find_layer(layer_id)
        if found is None:
            raise Corrupt(f"layer {layer_id} is named by a record and does not exist")
        return found

    def volume_ids(self, *, after: str = "") -> Iterator[str]:
        """Give the ids of all volumes in ascending order, those above `after` only."""
        return self._ids("volumes", after)

    def snapshot_ids(self, *, after: str = "") -> Iterator[str]:
        """Give the ids of all snapshots in ascending order, those above `after` only."""
        return self._ids("snapshots", after)

    def image_ids(self) -> Iterator[str]:
        """Give the ids of all golden images in ascending order."""
        return self._ids("images", "")

    def job_ids(self) -> list[str]:
        """Give the ids of all jobs, sorted."""
        return [name.removesuffix(".json") for name in self._job_names() if is_record(name)]

    def layer_ids(self) -> Iterator[str]:
        """Give the ids of all layers that have a record, in ascending order."""
        return self._ids("layers", "")

    def unreadable_aside(self) -> Iterator[str]:
        """Say of each damaged record of a node, and of the lease, what is wrong: its path, and the rest."""
        directory = f"{self.root}/nodes"
        paths: list[tuple[str, type]] = [(f"{directory}/{name}", NodeRecord) for name in files.names(directory)]
        for path, kind in [*paths, (self._paths.lease, LeaseRecord)]:
            if is_record(os.path.basename(path)):
                try:
                    files.find(kind, path)
                except Corrupt as error:
                    yield str(error)

    def _ids(self, folder: str, after: str) -> Iterator[str]:
        """Walk the shards in order. The ids of one folder differ only after a common prefix, so this sorts them all."""
        first = records.shard_of(after) if after else layout.SHARDS[0]
        for shard in layout.SHARDS:
            if shard >= first:
                for name in files.names_in(f"{self.root}/{folder}/{shard}"):
                    if is_record(name) and (record_id := name.removesuffix(".json")) > after:
                        yield record_id

    def changed_ns(self, folder: str, shard: str) -> int:
        """Give the time at which a name in a shard was last made, replaced or removed: that of its directory."""
        path = f"{self.root}/{folder}/{shard}"
        with translated(path):
            try:
                return os.stat(path).st_mtime_ns
            except FileNotFoundError as error:
                raise Unavailable(f"{path} is gone: is the pool still mounted?") from error

    def volume_sizes(self, shard: str) -> Iterator[int]:
        """Give the sizes of the volumes of a shard; a damaged record (check reports it) counts as none."""
        directory = f"{self.root}/volumes/{shard}"
        for name in files.names(directory):
            if is_record(name):
                with suppress(Corrupt):
                    found = files.find(records.Sized, f"{directory}/{name}")
                    yield found.size_bytes if found else 0

    # --- writing records ---------------------------------------------------------------------------------------

    def create(self, record: R, *, sync: bool = True) -> R:
        """Publish a new record, whole; its name is durable on return, without `sync` with the next step there.

        Raises:
            Busy: somebody else made one of this id in the meantime.
            Exhausted: no space; nothing is left.
        """
        path = self._paths.of(record)
        first = records.next_version(record)
        temporary = self._steps.write_temporary(lambda fd: write_whole(fd, records.encode(first)))
        try:
            self._steps.link(temporary, path, sync=sync)
        except FileExistsError as error:
            raise Busy(f"{record.id} was made by another operation at this moment") from error
        except FileNotFoundError as error:
            raise Busy(f"{temporary} was removed by another operation; try again") from error
        finally:
            self._steps.discard(temporary)
        return first

    def begin_volume(self, volume: VolumeRecord) -> "Begun":
        """Announce a new volume, before anything of it exists: `<id>.new-<head>` holds the record that is to come.

        The announcement keeps the collector off the layer that is being made. It says nothing to anybody else.

        Raises:
            Exhausted: no space; nothing is left.
        """
        first = records.next_version(volume)
        path = self._paths.announcement(volume.id, volume.head)
        self._steps.begin(path, records.encode(first))
        return Begun(first, path)

    def publish_begun(self, begun: "Begun") -> VolumeRecord:
        """Make an announced volume's record its record, durably: `make_layer` has made the announcement durable.

        Raises:
            Busy: somebody else made a volume of this id, or took the announcement away: nothing was published.
        """
        path = self._paths.of(begun.volume)
        try:
            self._steps.link(begun.path, path, sync=False)
        except (FileExistsError, FileNotFoundError) as error:
            raise Busy(f"{begun.volume.id} was made, or this attempt was given up, by another operation") from error
        if not self._steps.unlink(begun.path):
            # Another host has taken it away, too late to undo anything: the name is not durable by that removal.
            self._steps.sync(os.path.dirname(path))
        return begun.volume

    def revoke(self, volume_id: str, head: str) -> None:
        """Take an announcement away, durably; gone already is success.

        From then on whoever was making that volume cannot publish it any more; what was published before can be seen.
        """
        self._steps.unlink(self._paths.announcement(volume_id, head))

    def swap(self, old: R, new: R) -> R:
        """Replace the record `old`, as it was read, by `new`: compare-and-set, durable on return.

        The claim `<record>.g<n+1>` can be linked once only, so that among all writers of this generation, in any
        process on any host, one gets on. Works on a full pool (it may use up a reserve file).

        Raises:
            Busy: the record is no longer what was read, or another writer is in the middle of it.
        """
        return self.commit(self._versions.prepare(old, new, self._paths.of(old)))

    def settle(self, record: records.Record) -> None:
        """Make durable what a record was found to say, before it is answered to a retry.

        Whoever wrote it may have died before he could: then a power cut would take back what was acknowledged.
        """
        self._steps.sync(self.directory_of(record))

    def settle_name(self, record_id: str) -> None:
        """Make durable what is seen of an id: that its record is as it is, or gone, and not in the trash.

        Before that is answered to a retry, or anything is done because of it: whoever changed it may have died before
        he could, and a power cut would take it back. An id that cannot be one of ours never had a record.
        """
        if records.is_layer_id(record_id):
            self._steps.sync(os.path.dirname(self.layer_record_path(record_id)))
        elif parsed := records.parse_id(record_id):
            self._steps.sync(os.path.dirname(self._paths.record(layout.FOLDERS[parsed.kind], record_id)))
            self._steps.sync(f"{self.root}/trash")

    @contextmanager
    def prepared(self, old: R, new: R) -> Iterator[Prepared[R]]:
        """Write the successor of `old` down already, so that it becomes durable together with what it will name.

        Inside the block, `make_layer` makes it durable and `commit` takes it over; without that it is forgotten. It
        never uses up the reserve: that is for what makes space, and this is for what needs more of it.

        Raises:
            Exhausted: no space; nothing is left.
        """
        prepared = self._versions.prepare(old, new, self._paths.of(old), is_needed=False)
        try:
            yield prepared
        finally:
            self._steps.discard(prepared.temporary)

    def commit(self, prepared: Prepared[R], *, sync: bool = True) -> R:
        """Do the swap of a record that was prepared and that has been made durable; see `swap`.

        Without `sync` the caller has `directory_of` the record made durable.
        """
        return self._versions.commit(prepared, sync=sync)

    def directory_of(self, record: records.Record) -> str:
        """Give the directory whose names make a record's changes durable."""
        return os.path.dirname(self._paths.of(record))

    def make_durable(self, paths: Sequence[str]) -> None:
        """Make files and directories of the pool durable, all at once; nothing for none.

        Raises:
            Busy: one of them is gone.
        """
        self._steps.sync_all(paths)

    def remove(self, record: records.Record) -> None:
        """Remove a record, as it was read; gone already is success. Durable on return.

        Takes the same claim as a change does: a late removal cannot hit a new record of the same id.

        Raises:
            Busy: the record is no longer what was read.
        """
        self._versions.remove(record, self._paths.of(record))

    # --- trash -------------------------------------------------------------------------------------------------

    def trash_ids(self) -> Iterator[str]:
        """Give the ids of everything in the trash, in ascending order."""
        names = files.names_in(f"{self.root}/trash")
        yield from (name.removesuffix(".json") for name in names if is_record(name) and naming.TRASH.fullmatch(name))

    def find_trashed(self, entry_id: str) -> Deletable | None:
        """Give an entry of the trash: the record of what was deleted; None when there is none.

        Raises:
            Corrupt: it cannot be read.
        """
        parsed = records.parse_trash_id(entry_id)
        if parsed is None:
            return None
        path = self._paths.trashed(entry_id)
        found: Deletable | None
        found = files.find(VolumeRecord, path) if parsed[0].kind == "vol" else files.find(SnapshotRecord, path)
        if found and trash_id(found) != entry_id:
            raise Corrupt(f"{path} holds the record of {trash_id(found)}")
        return found

    def move_to_trash(self, record: Deletable) -> None:
        """Move a record, as it was read, to the trash; gone already is success. Durable on return.

        The record's own file gets its second name while its claim is held. So an entry can only come from a record
        that is still there: never again after it was restored or purged.

        Raises:
            Busy: the record is no longer what was read.
        """
        self._versions.remove(record, self._paths.of(record), keep_as=self._paths.trashed(trash_id(record)))

    def swap_trashed(self, old: Deletable, new: Deletable) -> Deletable:
        """Change an entry of the trash by compare-and-set, as `swap` does a record."""
        return self.commit(self._versions.prepare(old, new, self._paths.trashed(trash_id(old))))

    def remove_trashed(self, entry: Deletable) -> None:
        """Remove an entry of the trash, as it was read; gone already is success.

        Raises:
            Busy: it is no longer what was read.
        """
        self._versions.remove(entry, self._paths.trashed(trash_id(entry)))

    def remove_damaged_trashed(self, entry_id: str) -> None:
        """Remove an entry that cannot be read, at the explicit wish to purge it."""
        self._steps.unlink(self._paths.trashed(entry_id))

    def begin_restore(self, entry: Deletable, restored: Deletable) -> None:
        """Write down, durably, the record that is to be published when `entry` is restored. It says nothing yet.

        Raises:
            Busy: the collector took it for one that nobody needs any more.
        """
        path = self._paths.restore(entry, restored.uid)
        self._steps.begin(path, records.encode(records.next_version(restored)))
        try:
            self._steps.sync_all([path, os.path.dirname(path)])
        except FileNotFoundError as error:
            raise Busy(f"another operation on {trash_id(entry)} is running") from error

    def publish_restored(self, entry: Deletable, restored: records.Incarnation) -> None:
        """Give the record that `begin_restore` has written its name, durably.

        Raises:
            AlreadyExists: the name is taken.
            Busy: another operation has finished this or given it up.
        """
        folder = "volumes" if isinstance(entry, VolumeRecord) else "snapshots"
        files.find(type(entry), self._paths.restore(entry, restored.uid))  # what cannot be read is not published
        try:
            self._steps.link(self._paths.restore(entry, restored.uid), self._paths.record(folder, restored.id))
        except FileExistsError as error:
            raise AlreadyExists(f"{restored.id} exists") from error
        except FileNotFoundError as error:
            raise Busy(f"{trash_id(entry)} was restored, or given up, by another operation") from error

    def revoke_restore(self, entry: Deletable, uid: str) -> None:
        """Take away what `begin_restore` has written, durably; gone already is success.

        From then on nobody can publish it any more; what was published before can be seen.
        """
        self._steps.unlink(self._paths.restore(entry, uid))

    def trash_strays(self) -> list[str]:
        """Give the names of the files in the trash that are not its entries' own."""
        names = files.names_in(f"{self.root}/trash")
        return [name for name in names if naming.TRASH.fullmatch(name) and not is_record(name)]

    # --- damage ------------------------------------------------------------------------------------------------

    def is_damaged(self, folder: str, record_id: str) -> bool:
        """Say whether a record cannot be read, looking at it three times over two seconds.

        A reader whose client has an old length of the file cached sees a changed record cut off, for about a second.
        """
        finders: dict[str, Callable[[str], object]] = {
            "volumes": self.find_volume,
            "snapshots": self.find_snapshot,
            "images": self.find_image,
            "layers": self.find_layer,
            "trash": self.find_trashed,
        }
        return _stays_corrupt(lambda: finders[folder](record_id))

    def damaged_bytes(self, folder: str, record_id: str) -> bytes | None:
        """Give what stands in a record's file, whatever it is; None when there is none.

        Raises:
            Corrupt: it is larger than any record.
        """
        return files.read(self._paths.record(folder, record_id))

    def replace_damaged(self, record: R, damaged: bytes) -> R:
        """Put a whole record in the place of one that cannot be read and whose file holds `damaged`; durable.

        No compare-and-set is possible without a version. The caller holds the locks of all who might write it, and
        `is_damaged` has found it unreadable for two seconds, which no writer that is under way would leave it.

        Raises:
            Busy: the file holds something else now; nothing was changed.
        """
        path = self._paths.of(record)
        directory, _, name = path.rpartition("/")
        claims = [other for other in files.names(directory) if other.startswith(f"{name}.g")]
        numbers = [int(claim.rpartition(".g")[2]) for claim in claims if claim.rpartition(".g")[2].isdecimal()]
        made = replace(records.next_version(record), generation=1 + max(numbers, default=0))
        temporary = self._steps.write_temporary(
            lambda fd: write_whole(fd, records.encode(made)), reserve=self._reserve_file
        )
        try:
            for claim in claims:
                # one of the damaged record must not become a change of the new one
                self._steps.discard(f"{directory}/{claim}")
            if files.read(path) != damaged:
                raise Busy(f"{record.id} was changed by another operation")
            self._steps.rename(temporary, path)
        finally:
            self._steps.discard(temporary)
        return made

    def remove_damaged(self, folder: str, record_id: str) -> None:
        """Remove a record that cannot be read, at the explicit wish to delete it; its layers stay for the collector."""
        path = self._paths.record(folder, record_id)
        directory, _, name = path.rpartition("/")
        for other in files.names(directory):
            if other.startswith(f"{name}.g"):
                # a claim of the damaged record must not become a change of a later record of this id
                self._steps.discard(f"{directory}/{other}")
        self._steps.unlink(path)

    def remove_damaged_node(self, name: str) -> None:
        """Remove the record of a node, by its file's name, that cannot be read; the node, if there is one, writes anew.

        Raises:
            Busy: it can be read now, or was written at this moment.
        """
        path = f"{self.root}/nodes/{name}"
        damaged = files.read(path)
        if damaged is None:
            return
        if not _stays_corrupt(lambda: files.find(NodeRecord, path)):
            raise Busy(f"{path} can be read now")
        if not self._steps.unlink(path, only_if=lambda: files.read(path) == damaged):
            raise Busy(f"{path} was written by its node")

    # --- images ------------------------------------------------------------------------------------------------

    def make_layer(
        self,
        record: LayerRecord,
        marker: str,
        write: Callable[[int], None] | str,
        *,
        also: Sequence[str] = (),
        is_commit: bool = False,
    ) -> LayerRecord:
        """Make a layer, referred to by `marker`: refs, image, record; durable on return.

        The image is filled by `write`, or is the complete temporary file of that path, which is discarded then.

        What an earlier attempt of the same intent has made is kept: each part is published whole, under a random id.
        They are looked for one by one, because after a power cut some of the names may be there and others not. The
        names come in this order: a record without refs would mean a condemned layer. The files `also` are made durable
        with them. With `is_commit` no other record follows that says that all of it is there: the layer's own then gets
        its name when the others are durable.

        Raises:
            Exhausted: no space; no name was made but that of the refs directory.
            Busy: another operation has given this layer up.
        """
        path = self._paths.layer_file(record.id, record.file)
        refs = self._paths.refs(record.id)
        found = self.find_layer(record.id)
        if found and found.state is LayerState.RETIRED:
            raise Busy(f"layer {record.id} was given up by another operation")
        self._steps.make_directory(refs, sync=False)
        self._steps.touch(f"{refs}/{marker}", sync=False)
        made = found or records.next_version(record)
        unnamed: dict[str, str] = {}
        try:
            if self.image_bytes(record) is None:
                unnamed[path] = write if isinstance(write, str) else self._steps.write_temporary(write, sync=False)
            if found is None:
                content = records.encode(made)
                unnamed[self._paths.of(made)] = self._steps.write_temporary(
                    lambda fd: write_whole(fd, content), sync=False
                )
            self._steps.sync_all([refs, *unnamed.values(), *also])
            for name, temporary in unnamed.items():
                if is_commit and name != path:
                    self._steps.sync(os.path.dirname(path))
                try:
                    self._steps.link(temporary, name, sync=False)
                except FileExistsError:
                    pass
                except FileNotFoundError as error:
                    raise Busy(f"{temporary} was removed by another operation; try again") from error
            self._steps.sync(os.path.dirname(path))
        finally:
            with ExitStack() as stack:  # each of them, also when one fails
                for temporary in unnamed.values():
                    stack.callback(self._steps.discard, temporary)
        return made

    def write_image(self, write: Callable[[int], None]) -> str:
        """Make a file for an image that is filled before it gets its name, by `make_layer`; gives its temporary path.

        Raises:
            Exhausted: no space; nothing is left.
        """
        return self._steps.write_temporary(write, sync=False)

    def remove_image(self, layer_id: str, file: str) -> None:
        """Remove a layer's image durably; gone already is success. Only after `condemn`, or for an undone intent."""
        self._steps.unlink(self._paths.layer_file(layer_id, file))

    def check_not_written(self, layer: LayerRecord) -> None:
        """Check that no storage daemon has a layer's image open for writing, where this mount's locks can tell.

        The third guard, after attachments and generations: it keeps a node that was detached by force and goes on
        writing out of what is frozen or opened elsewhere.

        Raises:
            Refused: one has.
            Corrupt: the file is missing.
        """
        with self._opened_image(layer, os.O_RDONLY) as fd:
            if is_written_by_qemu(fd):
                raise Refused(f"a storage daemon still has {self.image_path(layer)} open for writing")

    def read_image(self, layer: LayerRecord, offset_bytes: int, length_bytes: int) -> bytes:
        """Give bytes of a layer's image file (not of the disk in it); fewer at its end.

        Raises:
            Corrupt: the file is missing.
        """
        with self._opened_image(layer, os.O_RDONLY) as fd:
            return os.pread(fd, length_bytes, offset_bytes)

    @contextmanager
    def _opened_image(self, layer: LayerRecord, flags: int) -> Iterator[int]:
        """Open a layer's image file; one that is missing is damage.

        Raises:
            Corrupt: the file is missing.
        """
        path = self.image_path(layer)
        with translated(path):
            try:
                fd = os.open(path, flags | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise Corrupt(f"layer {layer.id} has no image file {path}") from error
            try:
                yield fd
            finally:
                os.close(fd)

    def image_bytes(self, layer: LayerRecord) -> tuple[int, int] | None:
        """Give the length and the allocated bytes of a layer's image file, None when it is missing."""
        path = self.image_path(layer)
        with translated(path):
            try:
                found = os.stat(path)
            except FileNotFoundError:
                return None
        return found.st_size, found.st_blocks * 512

    # --- references --------------------------------------------------------------------------------------------

    def mark(self, layer_id: str, marker: str, *, sync: bool = True) -> None:
        """Refer to a layer, durably; done before is success.

        Without `sync` everybody sees it from now on, too; what needs it must not be made durable before `refs_path` is.

        Raises:
            NotFound: the layer is condemned or gone: it can never be referred to again.
        """
        try:
            self._steps.touch(f"{self._paths.refs(layer_id)}/{marker}", sync=sync)
        except FileNotFoundError as error:
            raise NotFound(f"layer {layer_id} is gone") from error

    def refs_path(self, layer_id: str) -> str:
        """Give the directory of a layer's markers, for `make_layer` and `make_durable`."""
        return self._paths.refs(layer_id)

    def unmark(self, layer_id: str, marker: str, *, sync: bool = True) -> None:
        """Take a reference back, durably; gone already is success.

        Without `sync` a power cut may bring it back: the collector removes what no record justifies.
        """
        self._steps.unlink(f"{self._paths.refs(layer_id)}/{marker}", sync=sync)

    def markers(self, layer_id: str) -> list[str] | None:
        """Give the markers of a layer, sorted; None when its refs directory is gone."""
        directory = self._paths.refs(layer_id)
        with translated(directory):
            try:
                return sorted(os.listdir(directory))
            except FileNotFoundError:
                return None

    def remake_refs(self, layer_id: str) -> None:
        """Make the refs directory of a layer again that is needed and has lost it; only `check --repair` does this.

        Nothing else ever does: without the directory a layer counts as condemned.
        """
        self._steps.make_directory(self._paths.refs(layer_id))

    def condemn(self, layer_id: str) -> bool:
        """Remove a layer's empty refs directory: the atomic decision that nothing will ever refer to it.

        False when it had been condemned (or never made) already.

        Raises:
            Busy: something refers to it.
        """
        return self._steps.remove_directory(self._paths.refs(layer_id))

    # --- what is on a volume's device --------------------------------------------------------------------------

    def content(self, volume: VolumeRecord) -> Content | None:
        """Give what is known to be on a volume: the node's own word, else what it inherited; None = never written.

        What is inherited is of no attachment of this volume: its generation, the source's, would be taken for one.
        """
        if own := files.find(Content, self._paths.content(volume)):
            return own
        return replace(volume.inherited_content, generation=0) if volume.inherited_content else None

    def put_content(self, volume: VolumeRecord, content: Content) -> None:
        """Write down what is on a volume; only the node that has it attached does this.

        Raises:
            Refused: a later attachment has written its note already: this node's is a stale one.
        """
        present = files.find(Content, self._paths.content(volume))
        if present and present.generation > content.generation:
            raise Refused(f"volume {volume.id} has been used under a later attachment ({present.generation})")
        temporary = self._steps.write_temporary(lambda fd: write_whole(fd, records.encode(content)))
        self._steps.rename(temporary, self._paths.content(volume))

    def remove_content(self, volume: VolumeRecord, *, sync: bool = True) -> None:
        """Forget what was on a volume that is being deleted, or without `sync` one that is: these are strays then."""
        self._steps.unlink(self._paths.content(volume), sync=sync)
        self._steps.unlink(self._paths.closed(volume), sync=sync)

    def closed_generation(self, volume: VolumeRecord) -> int:
        """Give the generation of the attachment whose node said last that it has closed the volume; 0: none has."""
        closed = files.find(Closed, self._paths.closed(volume))
        return closed.generation if closed else 0

    def note_closed(self, volume: VolumeRecord, generation: int) -> None:
        """Say that the node of this attachment has closed the volume in order; only that node does."""
        closed = Closed(generation=generation)
        temporary = self._steps.write_temporary(lambda fd: write_whole(fd, records.encode(closed)))
        self._steps.rename(temporary, self._paths.closed(volume))

    def forget_closed(self, volume: VolumeRecord) -> None:
        """Take that back, before the volume is opened again; never said is success."""
        self._steps.unlink(self._paths.closed(volume))

    # --- nodes -------------------------------------------------------------------------------------------------

    def put_node(self, node: NodeRecord) -> None:
        """Write this node's record; only the node itself does, so a plain replace is right."""
        following = replace(node, nonce=uuid.uuid4().hex[:8], generation=1)
        temporary = self._steps.write_temporary(lambda fd: write_whole(fd, records.encode(following)))
        self._steps.rename(temporary, self._paths.node(node.id))

    # --- housekeeping ------------------------------------------------------------------------------------------

    def _reserve_file(self) -> str | None:
        found = [name for name in files.names(f"{self.root}/reserve") if naming.RESERVE.fullmatch(name)]
        return f"{self.root}/reserve/{found[0]}" if found else None

    def replenish_reserve(self) -> None:
        """Bring the number of reserve files back to eight.

        Raises:
            Exhausted: there is no space for that now.
        """
        missing = _RESERVE_FILES - len(files.names(f"{self.root}/reserve"))
        for _ in range(missing):
            temporary = self._steps.write_temporary(lambda fd: write_all(fd, bytes(_RESERVE_BYTES)))
            self._steps.rename(temporary, f"{self.root}/reserve/{uuid.uuid4().hex}")

    def listings(self, folder: str) -> Iterator[tuple[str, list[str]]]:
        """Give each shard of `folder` with the names of all that is in it: records, and what `is_record` is not."""
        for shard in layout.SHARDS:
            yield shard, files.names_in(f"{self.root}/{folder}/{shard}")

    def foreign_files(self) -> list[str]:
        """Name what lies outside of the shards and is not of this format; nothing of it is ever touched."""
        known = {*layout.SHARDED, *layout.PLAIN, "lock", "format.json", f"{records.LEASE_ID}.json", "lost+found"}
        foreign = [
            name for name in files.names(self.root) if name not in known and not naming.LEASE_CLAIM.fullmatch(name)
        ]
        forms = {
            "tmp": naming.TEMPORARY,
            "reserve": naming.RESERVE,
            "nodes": naming.NODE,
            "jobs": naming.JOB,
            "trash": naming.TRASH,
        }
        for folder, form in forms.items():
            foreign += [f"{folder}/{name}" for name in files.names(f"{self.root}/{folder}") if not form.fullmatch(name)]
        for folder in layout.SHARDED:
            foreign += [
                f"{folder}/{name}" for name in files.names(f"{self.root}/{folder}") if not naming.SHARD.fullmatch(name)
            ]
        return foreign

    def stale_temporaries(self) -> list[str]:
        """Give the temporary files that nobody will use, and those of this process that could not be removed at their
        time. Nobody uses those whose process does not live: as this mount's locks tell, or in another place, when no
        file of the process has changed for ten minutes; in both, when its job's record does not say otherwise.
        """
        directory = f"{self.root}/tmp"
        paths_of: defaultdict[str, list[str]] = defaultdict(list)
        for name in files.names(directory):
            if naming.TEMPORARY.fullmatch(name):  # another is not ours: check reports it
                paths_of[name.partition(".")[0]].append(f"{directory}/{name}")
        working = self._working_tokens()  # a job is there before its files are, so it is looked for after them
        stale = []
        for token, paths in paths_of.items():
            is_kept = working is None or token in working or self._presence.is_using(token, paths)
            is_kept = is_kept and token != layout.INIT  # there is a format.json: another would be refused
            stale += [path for path in paths if path in self._steps.abandoned or not is_kept]
        return stale

    def _working_tokens(self) -> set[str] | None:
        """Give the tokens of the jobs that go on; None when it is not known, because a job's record is damaged."""
        try:
            return {job.token for job in map(self.find_job, self.job_ids()) if job and not self.is_over(job)}
        except Corrupt as error:
            log.error("no temporary file of others is removed: %s", error)
            return None

    # --- jobs --------------------------------------------------------------------------------------------------

    def _job_names(self) -> list[str]:
        return [name for name in files.names_in(f"{self.root}/jobs") if naming.JOB.fullmatch(name)]

    def job_claims(self) -> list[str]:
        """Give the names of the claims in the folder of jobs."""
        return [name for name in self._job_names() if not is_record(name)]

    def lease_claims(self) -> list[str]:
        """Give the names of the claims on the lease, which lie in the pool's top directory."""
        return [name for name in files.names(self.root) if naming.LEASE_CLAIM.fullmatch(name)]

    def note_over(self, job: JobRecord) -> None:
        """Say that a job of this process is over, though its record could not be removed."""
        self._jobs_over.add(job.id)

    def is_over(self, job: JobRecord) -> bool:
        """Say whether a job goes on no more: this process knows its own, of others on this mount their locks tell
        whether they are dead; one that is not surely dead is over when it is not renewed any more, because it may hang.
        """
        if job.id in self._jobs_over:
            return True
        if job.place == self.place and not self.is_alive(job.token):
            return True
        seen = self._jobs_seen.get(job.id)
        if seen is None or seen[:2] != (job.generation, job.nonce):
            self._jobs_seen[job.id] = (job.generation, job.nonce, time.monotonic())
            return False
        return time.monotonic() - seen[2] > _JOB_S

    def discard_temporary(self, path: str) -> None:
        """Remove a temporary file, a stale one or one's own.

        A writer that lives after all fails cleanly: its link finds nothing.
        """
        self._steps.discard(path)

    # --- how far something is ----------------------------------------------------------------------------------

    def _progress_paths(self, layer_id: str) -> list[str]:
        ending = f".{layer_id[:12]}"
        return [f"{self.root}/tmp/{name}" for name in files.names(f"{self.root}/tmp") if name.endswith(ending)]

    def put_progress(self, layer_id: str, current_bytes: int, total_bytes: int) -> None:
        """Note how far the filling of a layer is, for whoever asks; not durable, and gone with this process."""
        path = f"{self.root}/tmp/{self.token}.{layer_id[:12]}"
        self._steps.scribble(path, records.encode(Progress(current_bytes=current_bytes, total_bytes=total_bytes)))

    def drop_progress(self, layer_id: str) -> None:
        """Forget this process's note of how far the filling of a layer is."""
        self._steps.scribble(f"{self.root}/tmp/{self.token}.{layer_id[:12]}", None)

    def progress(self, layer_id: str) -> Progress | None:
        """Give how far some process, here or on another host, is with filling a layer, None if none says so."""
        for path in self._progress_paths(layer_id):
            token = os.path.basename(path).partition(".")[0]
            if self._presence.is_fresh(token, path, within_s=_NOTE_FRESH_S):
                with suppress(Corrupt):  # it is being written
                    if found := files.find(Progress, path):
                        return found
        return None

    def may_be_filled(self, layer_id: str) -> bool:
        """Say whether some process may be filling a layer: it lives, or is elsewhere and was not silent for long."""
        tokens = {path: os.path.basename(path).partition(".")[0] for path in self._progress_paths(layer_id)}
        using = (self._presence.is_using(token, [path], untouched_s=_NOTE_FRESH_S) for path, token in tokens.items())
        return any(using)

    def prove_primitives(self) -> None:
        """Try the file operations that everything rests on; see `primitives.prove`."""
        primitives.prove(self._steps, self._presence, f"{self.root}/tmp")

    def grow_raw_image(self, layer: LayerRecord, size_bytes: int) -> None:
        """Make a raw head's file at least `size_bytes` long, sparse; never shorter. Durable on return.

        Raises:
            Corrupt: the file is missing.
        """
        with self._opened_image(layer, os.O_RDWR) as fd:
            self._steps.grow(fd, self.image_path(layer), size_bytes)

    def settle_claim(self, folder: str, shard: str, name: str) -> bool:
        """Look at a claim that was found lying about: finish or drop it once it is old enough to be a dead one's.

        Says whether it did that; the record may have changed then.
        """
        directory = f"{self.root}/{folder}/{shard}".rstrip("/")  # the trash has no shards, the lease no folder
        return self._versions.resolve_claim(f"{directory}/{name.rpartition('.g')[0]}", f"{directory}/{name}")

    def discard_stray(self, folder: str, shard: str, name: str) -> None:
        """Remove a file in a shard that the caller has proved to belong to nothing."""
        self._steps.unlink(f"{self.root}/{folder}/{shard}/{name}")


def _stays_corrupt(find: Callable[[], object]) -> bool:
    """Say whether what `find` looks at cannot be read, in three looks over two seconds; see `Store.is_damaged`."""
    for pause_s in (0.0, _REREAD_PAUSE_S, _REREAD_PAUSE_S):
        time.sleep(pause_s)
        try:
            find()
        except Corrupt:
            continue
        return False
    return True
