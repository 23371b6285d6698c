"""Everything a node does with one volume: open its chain, make a block device of it, format, mount, grow, take down.

    image files --storage daemon--> FUSE export --loop device--> /dev/loopN --mount--> staging path --bind--> targets
    raw image file --------------------- loop device ----------> (dataPath loop)

There is no local truth: what is there is asked of the kernel (devices by their tag, the mount table) and of the daemon
(QMP) each time, so a new node process goes on where the old one ended. The daemon's key and the device's tag follow
from driver, node and volume id.

Always true: a device is made only from exactly the recorded chain, for the attachment generation that the record
names; a file system is made only where the record says that nothing but our own mkfs ever wrote.
"""

import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest

from csi_quobyte import telemetry
from csi_quobyte.engine.layers import ready_volume
from csi_quobyte.errors import (
    FINAL,
    AlreadyExists,
    Busy,
    Corrupt,
    DriverError,
    InvalidArgument,
    Refused,
    Unavailable,
)
from csi_quobyte.host import filesystem, loop, mounts
from csi_quobyte.host.filesystem import Usage
from csi_quobyte.host.loop import LoopDevice
from csi_quobyte.host.qemu import ImageLayer, QemuTools, gate
from csi_quobyte.host.qsd import Daemon, Daemons, StopResult
from csi_quobyte.host.staged import StagedNote, StagedNotes
from csi_quobyte.operations import contents, targets
from csi_quobyte.operations.targets import PublishRequest
from csi_quobyte.pool import images
from csi_quobyte.pool.chain import chain_of
from csi_quobyte.pool.executor import Executor
from csi_quobyte.pool.records import AccessType, Attachment, LayerRecord, VolumeRecord, parse_id
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)

TAG_PREFIX = "cq"

# After these nothing of an attempt may be left. Not after AlreadyExists: it speaks of what stands here already.
_UNDONE_AFTER = tuple(error for error in FINAL if error is not AlreadyExists)


class _StaleError(Refused):
    """This node's attachment is gone or another one: what it has in memory must not be written."""


RELEASE_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 20.0
CUT_OFF_TIMEOUT_S = 10.0
STOPPED_AT_ONCE = 16
_FLUSH_SHARE = 0.6  # of what is left of the time to stop: the rest is for the daemon's own flush
_LEAST_S = 1.0


@dataclass(frozen=True, kw_only=True)
class StageRequest:
    """A checked NodeStageVolume request; `filesystem` is empty for block and when the request does not say."""

    volume_id: str
    generation: int
    staging_path: str
    access_type: AccessType
    filesystem: str
    mount_options: tuple[str, ...]


@dataclass(frozen=True)
class VolumeStats:
    """Usage of a mounted volume, or just the size of a block volume."""

    total_bytes: int
    usage: Usage | None


class Node:
    """The node's side of all volumes. Methods that take a store touch the pool; the others never do."""

    def __init__(
        self,
        *,
        node_id: str,
        driver_name: str,
        tools: QemuTools,
        daemons: Daemons,
        notes: StagedNotes,
        allow_untested_qemu: bool,
    ) -> None:
        self._identity = f"{driver_name}\0{node_id}\0"
        self._node_id = node_id
        self._tools = tools
        self._daemons = daemons
        self._notes = notes
        self._allow_untested_qemu = allow_untested_qemu
        self._held: set[str] = set()
        self._guard = threading.Lock()

    def _key(self, volume_id: str) -> str:
        return hashlib.sha256((self._identity + volume_id).encode()).hexdigest()[:24]

    @contextmanager
    def _lock(self, volume_id: str) -> Iterator[None]:
        """Hold this node's lock of a volume; one process alone uses a state directory, so memory is enough.

        Raises:
            Busy: another operation on the volume is running here.
        """
        with self._guard:
            if volume_id in self._held:
                raise Busy(f"another operation on volume {volume_id} is running on this node")
            self._held.add(volume_id)
        try:
            yield
        finally:
            with self._guard:
                self._held.discard(volume_id)

    # --- stage -------------------------------------------------------------------------------------------------

    def stage(self, store: Store, request: StageRequest) -> None:
        """Make a volume's device, and for a mount volume its mounted file system, at the staging path.

        Raises:
            NotFound: no such volume.
            Refused: not attached to this node with this generation; the file system is damaged, or not there though
                the volume was formatted; the staging path is used for something else.
            AlreadyExists: it is staged, and the request wants another access type or file system.
            Corrupt: the layers are not what the records say.
            Busy, Unavailable: try again.
        """
        with self._lock(request.volume_id):
            key, admitted = self._key(request.volume_id), False
            try:
                volume, attachment = self._attached(store, request.volume_id, request.generation)
                self._check_request(volume, request)
                _check_staging_path(request)
                admitted = True
                self._stage(store, volume, attachment, request)
            except _UNDONE_AFTER as error:
                # the kubelet may never unstage what it has been told for good was not staged; but a call that came
                # late, or is wrong, takes nothing from the attachment that there is
                record = self._looked_again(store, request.volume_id, error)
                if admitted or not self._stands(record) or self._is_unfinished(record):
                    kill = isinstance(error, _StaleError) or self.is_stale(request.volume_id, record)
                    self._give_up(key, request.staging_path, kill=kill)
                raise
            self._count_staged()

    def _looked_again(self, store: Store, volume_id: str, error: DriverError) -> VolumeRecord | None:
        """Read a record again after a failure: only what is surely this node's still may be flushed.

        Raises:
            Unavailable: it cannot be read, and something of the volume is here: neither flushed nor dropped now.
        """
        try:
            return store.find_volume(volume_id)
        except DriverError as unreadable:
            if not self.is_staged(volume_id):
                raise error from unreadable
            raise Unavailable(f"{error}; and whose what is staged here is cannot be said: {unreadable}") from error

    def _is_unfinished(self, volume: VolumeRecord | None) -> bool:
        """Say whether a volume with a file system has a device here that was never mounted."""
        device = _device_of(self._key(volume.id)) if volume else None
        return bool(volume and volume.access_type == "mount" and device and not targets.of_device(device))

    def _stands(self, volume: VolumeRecord | None) -> bool:
        """Say whether a volume is staged here, at least in part, for the attachment that its record has."""
        return volume is not None and self.is_staged(volume.id) and not self.is_stale(volume.id, volume)

    def _check_request(self, volume: VolumeRecord, request: StageRequest) -> None:
        """Check what the request wants against what the volume was made for.

        Raises:
            AlreadyExists: it is something else, and the volume is staged: the code that the CSI specification asks for.
            Refused: it is something else.
        """
        kind = AlreadyExists if self._stands(volume) else Refused
        if request.access_type != volume.access_type:
            raise kind(f"volume {volume.id} was made for access type {volume.access_type}, not {request.access_type}")
        if request.filesystem and request.filesystem != volume.filesystem:
            raise kind(f"volume {volume.id} was made for file system {volume.filesystem}, not {request.filesystem}")

    def _stage(self, store: Store, volume: VolumeRecord, attachment: Attachment, request: StageRequest) -> None:
        key = self._key(volume.id)

        def check_attached() -> None:
            # a stage that hung for a while must not go on for an attachment that was taken away meanwhile
            self._attached(store, volume.id, attachment.generation)

        self._expel_stale(key, volume, attachment, request.staging_path)
        store.forget_closed(volume)
        device = self._ensure_device(store, volume, attachment, request.staging_path, check_attached)
        check_attached()
        if volume.access_type == "block":
            contents.note_raw_use(store, volume, attachment)
        else:
            contents.ensure_mounted(
                store,
                volume,
                attachment,
                device,
                request.staging_path,
                mount_options=request.mount_options,
                check_attached=check_attached,
            )

    def _expel_stale(self, key: str, volume: VolumeRecord, attachment: Attachment, staging_path: str) -> None:
        """End the daemon and the device of an earlier attachment without a flush.

        What they have in memory is older than what another node may have written since: used again they would show
        old data, flushed they would write it.

        Raises:
            Refused: a pod still has the device mounted: it must go first.
        """
        device = _device_of(key)
        if device is None and self._daemons.find(key) is None:
            return
        note = self._notes.find(key)
        if note and note.is_of(volume.uid, attachment.generation):
            return
        if device and (others := [target for target in targets.of_device(device) if target != staging_path]):
            raise Refused(f"{device.path} is of an earlier attachment and still mounted at {others[0]}")
        log.warning("what is left of an earlier attachment of volume key %s is ended without a flush", key)
        self._kill(key, staging_path)

    def _give_up(self, key: str, staging_path: str, *, kill: bool) -> None:
        """Take down what a failed stage has left, unless a pod uses it.

        Raises:
            Unavailable: it cannot be taken down now: then the failure is not final yet.
        """
        device = _device_of(key)
        if device and any(target != staging_path for target in targets.of_device(device)):
            return
        try:
            if kill:
                self._kill(key, staging_path)
            else:
                self._take_down(key, staging_path)
        except DriverError as error:
            raise Unavailable(f"what the failed stage has left cannot be taken down yet: {error}") from error

    def _kill(self, key: str, staging_path: str) -> None:
        """Take down a device and its daemon so that nothing that they have cached is written any more."""
        self._cut_off(key)
        self._take_down(key, staging_path)

    def _cut_off(self, key: str) -> None:
        """Let nothing that is cached above a volume be written any more: who uses it gets errors from now on.

        The way to the file is cut before the file system is shut down, because ext4 writes when it is.

        Raises:
            Unavailable: it is not certain: the daemon does not end, or the kernel does not answer.
        """
        device, daemon = _device_of(key), self._daemons.find(key)
        if device:
            loop.set_read_only(device)
        _kill_daemon(daemon, f"with key {key}")
        if device:
            _in_limited_time(device, lambda: _end_writing(device, is_cut=self._has_daemon(key)))

    def _has_daemon(self, key: str) -> bool:
        """Say whether a volume was staged with a daemon, running or not; the others have a loop device alone."""
        return key in self._daemons.keys()  # noqa: SIM118 - not a dict

    def _attached(self, store: Store, volume_id: str, generation: int) -> tuple[VolumeRecord, Attachment]:
        """Give a volume and this node's attachment of it.

        Raises:
            Refused: it is not attached to this node, or the generation is another one's: another stage may follow.
            Busy: its record is just being changed on another host.
        """
        try:
            volume = ready_volume(store, volume_id)
        except Corrupt as error:
            if store.is_damaged("volumes", volume_id):
                raise
            raise Busy(f"the record of volume {volume_id} was being changed; try again") from error
        for attachment in volume.attachments:
            if attachment.node == self._node_id:
                if attachment.generation != generation:
                    raise _StaleError(
                        f"volume {volume_id} is attached to node {self._node_id} with generation "
                        f"{attachment.generation}, not {generation}: the call is about another attachment"
                    )
                return volume, attachment
        raise _StaleError(f"volume {volume_id} is not attached to node {self._node_id}")

    def _ensure_device(
        self,
        store: Store,
        volume: VolumeRecord,
        attachment: Attachment,
        staging_path: str,
        check_attached: Callable[[], None],
    ) -> LoopDevice:
        """Make the volume's block device from exactly the recorded chain, at least as large as the record says."""
        chain = chain_of(volume.head, store.find_layer)
        if any(layer.merge for layer in chain):
            # the merge looks for attachments after it has said so in the record, and stops
            raise Unavailable(f"layers of volume {volume.id} are being merged, which stops for this call; try again")
        images.check_chain(store, chain)
        _check_backing_names(store, chain)
        read_only = attachment.readonly and volume.access_type == "block"
        key, tag = self._key(volume.id), loop.tag_of(TAG_PREFIX, self._key(volume.id))
        note = StagedNote(volume.id, attachment.generation, volume.uid)  # written before anything is started
        if is_plain_loop(volume, chain):
            self._clear_dead(key, staging_path, expect_daemon=False)
            self._stop_daemon(key, volume.id)  # of an attempt that had one; its directory would say that there is one
            self._daemons.forget(key)
            self._notes.put(key, note)
            store.check_not_written(chain[0])
            if not read_only:
                check_attached()  # to grow an image is to write it: it may be frozen, merged or another node's by now
                store.grow_raw_image(chain[0], volume.size_bytes)
            backing = store.image_path(chain[0])
        else:
            self._check_gate()
            self._clear_dead(key, staging_path, expect_daemon=True)
            self._notes.put(key, note)
            daemon = self._daemons.ensure(key)
            daemon.ensure_open(_image_layers(store, chain), read_only=read_only)
            if not read_only:
                check_attached()
                daemon.resize(volume.size_bytes)
            backing = daemon.ensure_fuse_export(writable=not read_only)
        present = loop.find(tag)
        if present and present.read_only and not read_only and attachment.readonly:
            # set read-only after its journal was replayed: done if it is mounted, else from the start
            if mounts.at(staging_path):
                return present
            loop.release(tag, timeout_s=RELEASE_TIMEOUT_S)
        device = loop.ensure(tag, backing, read_only=read_only)
        if not read_only and device.size_bytes < volume.size_bytes:
            device = loop.refresh_size(device)
        return device

    def _check_gate(self) -> None:
        """Check that this QEMU may serve data.

        Raises:
            Refused: it is not one that was measured to be right.
        """
        reason = gate(self._tools.version, "fuse")
        if reason and not self._allow_untested_qemu:
            raise Refused(reason)

    def _clear_dead(self, key: str, staging_path: str, *, expect_daemon: bool) -> None:
        """Take down a device that gives nothing but errors any more, so that a fresh one can be made.

        Raises:
            Refused: a pod still has it mounted: it must go first.
        """
        device = _device_of(key)
        if device is None:
            return
        daemon_lives = self._daemons.find(key) is not None
        if daemon_lives == expect_daemon and filesystem.is_readable(device.path):
            return
        others = [target for target in targets.of_device(device) if target != staging_path]
        if others:
            raise Refused(f"{device.path} is dead and still mounted at {others[0]}: the pod there must end first")
        log.warning("%s of key %s is dead (daemon alive: %s): making a new one", device.path, key, daemon_lives)
        self._take_down(key, staging_path)

    # --- unstage -----------------------------------------------------------------------------------------------

    def unstage(self, volume_id: str, staging_path: str, *, stale: bool = False) -> None:
        """Unmount, free the device and end the daemon; done before is success. Does not need the pool.

        Returns only when nothing of this node can write to the volume any more. With `stale` (see `is_stale`) nothing
        that is cached is written.

        Raises:
            Refused: still published, or something else is mounted at the staging path (nothing was done); or the file
                system is in use.
            Unavailable: the daemon or the device does not let go in time; call again.
        """
        with self._lock(volume_id):
            _check_unused(self._find_device(volume_id), volume_id, staging_path)
            if stale:
                log.error("volume %s was taken away from this node: its cached writes are dropped", volume_id)
                self._kill(self._key(volume_id), staging_path)
            else:
                self._take_down(self._key(volume_id), staging_path)
            self._count_staged()

    def note_closed(self, store: Store, volume_id: str) -> None:
        """Say in the pool that this node has closed a volume; after `unstage`, while no new `stage` can begin."""
        with self._lock(volume_id):
            volume = store.find_volume(volume_id)
            for attachment in volume.attachments if volume else ():
                if volume and attachment.node == self._node_id and not self.is_staged(volume_id):
                    store.note_closed(volume, attachment.generation)

    # --- an attachment that was taken away ---------------------------------------------------------------------

    def staged_volumes(self) -> list[str]:
        """Give the ids of the volumes that this node has staged, by its notes."""
        notes = [self._notes.find(key) for key in self._notes.keys()]  # noqa: SIM118 - not a dict
        return [note.volume_id for note in notes if note]

    def _name_of(self, key: str) -> str:
        """Give the id of the volume with a key, else words for it."""
        with suppress(Unavailable):
            if note := self._notes.find(key):
                return note.volume_id
        return f"of key {key}"

    def is_staged(self, volume_id: str) -> bool:
        """Say whether this node has a volume staged, by its note."""
        return self._notes.find(self._key(volume_id)) is not None

    def is_stale(self, volume_id: str, record: VolumeRecord | None) -> bool:
        """Say whether a volume is staged here for an attachment that its record does not have any more."""
        note = self._notes.find(self._key(volume_id))
        if note is None:
            return False
        if record is None:
            return True
        ours = (one for one in record.attachments if one.node == self._node_id)
        return not any(note.is_of(record.uid, one.generation) for one in ours)

    def fence(self, volume_id: str) -> None:
        """Cut off a volume that was taken away, without a flush; pods get errors from now on.

        Raises:
            Busy: a call on the volume is running.
            Unavailable: it is not certain that nothing is written any more; call again.
        """
        with self._lock(volume_id):
            key = self._key(volume_id)
            how = "its daemon is ended" if self._has_daemon(key) else "its device is cut off from its file"
            log.error("volume %s was taken away from this node while staged: %s", volume_id, how)
            self._cut_off(key)

    def cut_below(self, volume_id: str, is_taken: Callable[[], bool]) -> None:
        """Cut the way to the file below a call that runs for long (e2fsck, mkfs), which has the lock.

        What is found is judged after it was found: a later attachment's is never what is ended.

        Raises:
            Unavailable: it is not certain; call again.
        """
        key = self._key(volume_id)
        device, daemon = _device_of(key), self._daemons.find(key)
        if not is_taken():
            return
        log.error("volume %s was taken away from this node while a call on it runs: its writes end", volume_id)
        _kill_daemon(daemon, volume_id)
        if device and not self._has_daemon(key):
            _in_limited_time(device, lambda: loop.cut_off(device))

    def _take_down(self, key: str, staging_path: str) -> None:
        """Unmount a device at the staging path, free it and end its daemon. A foreign mount there is left alone."""
        device = _device_of(key)
        mounted = mounts.at(staging_path)
        if mounted and device and mounted.major_minor == device.major_minor:
            outcome = mounts.unmount(staging_path, timeout_s=targets.UNMOUNT_TIMEOUT_S, lazy_after=True)
            if outcome is mounts.Unmounted.LAZY:
                log.warning("%s did not answer and was unmounted lazily", staging_path)
        self._release(key)

    def _release(self, key: str) -> None:
        """Free the device, then end the daemon, in this order: an open device would keep the export busy."""
        name = self._name_of(key)
        released = loop.release(loop.tag_of(TAG_PREFIX, key), timeout_s=RELEASE_TIMEOUT_S)
        if released.flush_error:
            log.error("volume %s: data could not be written back and is lost: %s", name, released.flush_error)
        is_clean = self._stop_daemon(key, name)
        if released.flush_error or not is_clean:
            telemetry.UNFLUSHED_CLOSES.inc()
        self._daemons.forget(key)
        self._notes.remove(key)

    def _stop_daemon(self, key: str, name: str) -> bool:
        """End the daemon of a volume; False when it did not end cleanly, now."""
        daemon = self._daemons.find(key)
        if daemon is None:
            return True
        match daemon.stop(timeout_s=STOP_TIMEOUT_S):
            case StopResult.CLEAN:
                return True
            case StopResult.UNCLEAN:
                # nothing runs any more, so the volume may go elsewhere; unflushed writes are gone, as in a power cut
                log.error("volume %s: its daemon did not end cleanly: writes that were not flushed are lost", name)
                return False
            case StopResult.STILL_RUNNING:
                raise _still_running(name)

    # --- publish -----------------------------------------------------------------------------------------------

    def publish(self, store: Store, request: PublishRequest) -> None:
        """Make a staged volume visible at a pod's target path.

        Raises:
            Refused: not staged, a stale generation, or a second target of a single writer.
            AlreadyExists: published at this target in another way.
        """
        with self._lock(request.volume_id):
            volume, attachment = self._attached(store, request.volume_id, request.generation)
            if request.access_type != volume.access_type:
                raise Refused(f"volume {volume.id} was made for access type {volume.access_type}")
            device = self._device(volume.id)
            self._check_staged_for(attachment, volume)
            readonly = request.readonly or attachment.readonly
            if volume.access_type == "block" and request.readonly and not attachment.readonly:
                raise InvalidArgument("a block volume can be read-only only as a whole: attach it read-only")
            source = targets.source_of(device, request)
            key, staged = self._key(volume.id), mounts.at(source)
            is_read_only = readonly or bool(staged and "ro" in staged.options)  # a bind has the options of its source
            if readonly and self._notes.is_binding(key, request.target_path):
                targets.undo_half_bind(device, request.target_path)
            if targets.is_published(device, request.target_path, readonly=is_read_only):
                self._notes.end_binding(key, request.target_path)
                return
            self._check_alive(device, volume.id)
            targets.check_single_writer(device, request)
            targets.make(request)
            if readonly:
                self._notes.begin_binding(key, request.target_path)
            mounts.bind(source, request.target_path, read_only=readonly)
            self._notes.end_binding(key, request.target_path)

    def unpublish(self, volume_id: str, target_path: str) -> None:
        """Take a volume away from a pod's target path and remove that; done before is success.

        Raises:
            Refused: the file system is in use there; or it is none of this volume's: another volume, a FUSE mount, a
                file with contents.
        """
        with self._lock(volume_id):
            mounted = mounts.at(target_path)
            if mounted and mounted.fstype.startswith("fuse"):
                raise Refused(
                    f"{mounted.source} ({mounted.fstype}) is mounted at {target_path}: no volume of this driver"
                )
            if mounted:
                targets.check_not_another(
                    mounted, self._find_device(volume_id), volume_id, ours=loop.scan(f"{TAG_PREFIX}:")
                )
                mounts.unmount(target_path, timeout_s=targets.UNMOUNT_TIMEOUT_S, lazy_after=True)
            targets.remove(target_path)
            self._notes.end_binding(self._key(volume_id), target_path)

    def _check_staged_for(self, attachment: Attachment, volume: VolumeRecord) -> None:
        """Check that what is staged was staged for this attachment.

        Raises:
            Refused: it was staged for an earlier one.
        """
        note = self._notes.find(self._key(volume.id))
        if note is None or not note.is_of(volume.uid, attachment.generation):
            raise Refused(f"volume {volume.id} is staged here for another attachment; stage it again")

    def _check_alive(self, device: LoopDevice, volume_id: str) -> None:
        """Check that a staged volume's device gives more than errors.

        Raises:
            Refused: it does not; only when no pod has it any more it can be staged again.
        """
        key = self._key(volume_id)
        daemon_is_gone = self._has_daemon(key) and self._daemons.find(key) is None
        if daemon_is_gone or not filesystem.is_readable(device.path):
            raise Refused(
                f"volume {volume_id} gives only I/O errors on node {self._node_id}: delete all pods of the volume on "
                "this node (scale the workload to zero), then start them again"
            )

    def _device(self, volume_id: str) -> LoopDevice:
        """Give a volume's device.

        Raises:
            Refused: there is none: the volume is not staged here.
        """
        device = self._find_device(volume_id)
        if device is None:
            raise Refused(f"volume {volume_id} is not staged on node {self._node_id}")
        return device

    # --- expand and stats --------------------------------------------------------------------------------------

    def expand(self, store: Store, volume_id: str, volume_path: str, wanted_bytes: int) -> int:
        """Make image, device and file system as large as the record says, and give that size in bytes.

        Raises:
            NotFound: the volume is not at that path.
            Unavailable: the controller has not set the size yet.
            Refused: not staged here, or attached read-only.
        """
        with self._lock(volume_id):
            volume = ready_volume(store, volume_id)
            device = targets.device_at(self._find_device(volume_id), volume_id, volume_path)
            if volume.size_bytes < wanted_bytes:
                raise Unavailable(f"volume {volume_id} has {volume.size_bytes} bytes in its record, not {wanted_bytes}")
            attachment = next((one for one in volume.attachments if one.node == self._node_id), None)
            if attachment is None:
                raise Refused(f"volume {volume_id} is not attached to node {self._node_id}")
            self._check_staged_for(attachment, volume)
            if device.read_only:
                raise Refused(f"volume {volume_id} is attached read-only")
            chain = chain_of(volume.head, store.find_layer)
            if is_plain_loop(volume, chain):
                store.grow_raw_image(chain[0], volume.size_bytes)
            else:
                self._running_daemon(volume_id).resize(volume.size_bytes)
            device = loop.refresh_size(device)
            if volume.access_type == "mount":
                contents.grow_mounted(volume, device, volume_path)
            return volume.size_bytes

    def _running_daemon(self, volume_id: str) -> Daemon:
        daemon = self._daemons.find(self._key(volume_id))
        if daemon is None:
            raise Refused(f"the storage daemon of volume {volume_id} has ended; stage the volume again")
        return daemon

    def _find_device(self, volume_id: str) -> LoopDevice | None:
        return _device_of(self._key(volume_id))

    def stats(self, volume_id: str, volume_path: str) -> VolumeStats:
        """Give the usage of a volume that is staged or published at a path. Does not need the pool's records.

        Raises:
            NotFound: the volume is not at that path.
        """
        device = targets.device_at(self._find_device(volume_id), volume_id, volume_path)
        mounted = mounts.at(volume_path)
        if mounted and mounted.major_minor == device.major_minor:
            usage = filesystem.usage(volume_path)
            return VolumeStats(usage.total_bytes, usage)
        return VolumeStats(device.size_bytes, None)

    # --- life of the process -----------------------------------------------------------------------------------

    def recover(self) -> None:
        """At the start: clear the devices whose daemon is gone, where no pod has them; leave all that works alone."""
        for key in self._known_keys():
            device = _device_of(key)
            if self._daemons.find(key) is not None:
                log.info("found the daemon of key %s running (%s)", key, device.path if device else "no device")
                continue
            if device and not self._has_daemon(key):
                log.info("found the device %s of key %s, which needs no daemon", device.path, key)
                continue
            try:
                self._clear_leftover(key, device)
            except DriverError as error:
                log.warning("what is left of key %s cannot be cleared now: %s", key, error)
        self._count_staged()

    def _known_keys(self) -> list[str]:
        return sorted({*self._daemons.keys(), *self._notes.keys()})

    def _clear_leftover(self, key: str, device: LoopDevice | None) -> None:
        if device is None:
            # nothing of it can be written any more, whatever ended it: the machine was started again, say
            self._daemons.forget(key)
            self._notes.remove(key)
            return
        found = mounts.of_device(device.major_minor)
        if len({mounted.target for mounted in found}) > 1 or targets.block_targets(device):
            log.error("%s has lost its daemon; the pods that use it must be deleted", device.path)
            return
        for mounted in found:
            mounts.unmount(mounted.target, timeout_s=targets.UNMOUNT_TIMEOUT_S, lazy_after=True)
        self._release(key)

    def stop_all(self, *, timeout_s: float, is_taken: Callable[[str], bool]) -> bool:
        """End every daemon with its data flushed; unmounts what no pod uses. False if one did not end cleanly.

        Ends after `timeout_s` in any case. Volumes are stopped side by side, those of each pool apart from the others:
        one that hangs costs its own time. One that `is_taken` (its id is given) is cut off instead of flushed. A target
        that a pod has mounted stays, dead: an empty directory in its place would take the pod's writes.
        """
        deadline = time.monotonic() + timeout_s
        pools: dict[str, ThreadPoolExecutor] = {}
        futures: dict[Future[bool], str] = {}
        for key in self._known_keys():
            name = self._name_of(key)
            parsed = parse_id(name)
            pool = parsed.pool if parsed else ""
            if pool not in pools:
                pools[pool] = ThreadPoolExecutor(STOPPED_AT_ONCE, thread_name_prefix=f"stop {pool}")
            futures[pools[pool].submit(self._stop, key, name, deadline, is_taken)] = name
        ended, late = wait_for_futures(futures, max(0.0, deadline - time.monotonic()))
        for executor in pools.values():
            executor.shutdown(wait=False, cancel_futures=True)
        for future in late:
            log.error("volume %s: not flushed within the %g s that there are to stop", futures[future], timeout_s)
        return not late and all(future.result() for future in ended)

    def _stop(self, key: str, name: str, deadline: float, is_taken: Callable[[str], bool]) -> bool:
        """Stop one volume, and say whether nothing of it is lost; never raises."""
        try:
            if is_taken(name):
                log.error("volume %s was taken away from this node: its cached writes are dropped", name)
                self._cut_off(key)
                return True
            daemon = self._daemons.find(key)
            if daemon is None:
                return True  # a plain loop device needs nobody: the kernel goes on
            is_quiet = self._is_quiesced(key, name, deadline)
            result = daemon.stop(timeout_s=_left_s(deadline))
            log.info("daemon of volume %s ended: %s", name, result.name)
            return is_quiet and result is StopResult.CLEAN
        except DriverError as error:
            log.error("daemon of volume %s: %s", name, error)
        except Exception:  # a bug must not cost the other volumes their flush
            log.exception("volume %s cannot be stopped", name)
        return False

    def _is_quiesced(self, key: str, name: str, deadline: float) -> bool:
        """Say whether all that is cached above the daemon came down to it; it has to be stopped all the same."""
        try:
            self._quiesce(key, time.monotonic() + _FLUSH_SHARE * _left_s(deadline))
        except Exception as error:  # whatever it is: not to flush the daemon as well would lose more
            unexpected = not isinstance(error, DriverError)
            log.error("volume %s: writes of its pods may be lost: %s", name, error, exc_info=unexpected)
            return False
        return True

    def _quiesce(self, key: str, deadline: float) -> None:
        """Bring what is cached above a device down to the daemon, and free the device if nobody uses it."""
        tag = loop.tag_of(TAG_PREFIX, key)
        device = loop.find(tag)
        if device is None:
            return
        mounted, nodes = [one.target for one in mounts.of_device(device.major_minor)], targets.block_targets(device)
        if len(mounted) == 1 and not nodes:
            try:
                mounts.unmount(mounted[0], timeout_s=_left_s(deadline), lazy_after=False)
                mounted = []
            except Refused as error:  # flushed as a pod's is
                log.warning("%s stays mounted: %s", mounted[0], error)
        if mounted:
            filesystem.sync(mounted[0], timeout_s=_left_s(deadline))
        elif nodes:
            # the device itself: a sync of the file system that the node lies in would be one of /dev
            loop.flush(device, timeout_s=_left_s(deadline))
        else:
            released = loop.release(tag, timeout_s=_left_s(deadline))
            if released.flush_error:
                raise Unavailable(f"{device.path}: cannot be flushed: {released.flush_error}")

    def _count_staged(self) -> None:
        ours = {loop.tag_of(TAG_PREFIX, key) for key in self._notes.keys()}  # noqa: SIM118 - not a dict
        staged = ours & {device.tag for device in loop.scan(f"{TAG_PREFIX}:")}
        with_daemon = {loop.tag_of(TAG_PREFIX, key) for key in self._daemons.keys()}  # noqa: SIM118
        telemetry.STAGED_VOLUMES.labels("fuse").set(len(staged & with_daemon))
        telemetry.STAGED_VOLUMES.labels("loop").set(len(staged - with_daemon))


# --- pieces without state --------------------------------------------------------------------------------------


def _device_of(key: str) -> LoopDevice | None:
    """Give the loop device of a volume's key, None when there is none."""
    return loop.find(loop.tag_of(TAG_PREFIX, key))


def _left_s(deadline: float) -> float:
    return max(_LEAST_S, deadline - time.monotonic())


def _still_running(name: str) -> Unavailable:
    return Unavailable(f"the storage daemon of volume {name} does not end; is its pool hanging?")


def _kill_daemon(daemon: Daemon | None, name: str) -> None:
    """End a volume's daemon, if there is one, without a flush.

    Raises:
        Unavailable: it does not end.
    """
    if daemon and not daemon.kill():
        raise _still_running(name)


def _in_limited_time(device: LoopDevice, cut_off: Callable[[], None]) -> None:
    """Cut off a device on a thread of its own: the kernel may hang with the pool.

    Raises:
        Unavailable: it does not answer in time. What `cut_off` raises.
    """
    Executor(f"cutting off {device.path}", workers=1, callers=1, timeout_s=CUT_OFF_TIMEOUT_S).run(cut_off)


def _end_writing(device: LoopDevice, *, is_cut: bool) -> None:
    """Cut off a loop device from its file unless what served it is dead (`is_cut`); shut down the file system on it.

    Raises:
        Unavailable: neither can be done.
    """
    mounted = mounts.of_device(device.major_minor)
    if not is_cut:
        try:
            loop.cut_off(device)
            is_cut = True
        except Unavailable as error:
            if not mounted:
                raise
            log.error("only the file system is shut down: %s", error)
        if targets.block_targets(device):
            log.error("%s is a raw block device: what the kernel had cached of it was written before", device.path)
    if not mounted:
        return
    try:
        filesystem.shut_down(mounted[0].target)
    except Unavailable as error:
        if not is_cut:
            raise
        log.warning("nothing can be written any more, but the file system is not shut down: %s", error)


def is_plain_loop(volume: VolumeRecord, chain: Sequence[LayerRecord]) -> bool:
    """Say whether a volume is served by a loop device on its file: asked for, and still a single raw layer."""
    return volume.data_path == "loop" and len(chain) == 1 and chain[0].format == "raw"


def _image_layers(store: Store, chain: Sequence[LayerRecord]) -> list[ImageLayer]:
    """Give the chain base first, as the daemon opens it."""
    return [ImageLayer(layer.id, store.image_path(layer), layer.format) for layer in reversed(chain)]


def _check_backing_names(store: Store, chain: Sequence[LayerRecord]) -> None:
    """Check that each image, head first, names its recorded parent.

    Nothing follows these names; a wrong one shows that somebody exchanged the file.

    Raises:
        Corrupt: one names another file, or none.
    """
    for layer, parent in zip_longest(chain, chain[1:]):
        found = images.backing_name(store, layer)
        wanted = store.backing_name(layer.id, parent) if parent else None
        if found != wanted:
            raise Corrupt(f"{store.image_path(layer)} names the backing file {found!r}, its record says {wanted!r}")


def _check_staging_path(request: StageRequest) -> None:
    """Check that the staging path is a directory; it is made when missing.

    Raises:
        Refused: it is something else.
    """
    if mounts.at(request.staging_path):
        return  # judged by whose mount it is, without touching it
    try:
        os.makedirs(request.staging_path, exist_ok=True)
        found = os.lstat(request.staging_path)
    except OSError as error:
        raise Refused(f"the staging path {request.staging_path} cannot be used: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise Refused(f"the staging path {request.staging_path} is not a directory")


def _check_unused(device: LoopDevice | None, volume_id: str, staging_path: str) -> None:
    """Check, before anything is taken down, that no pod has the volume and that the staging path holds nothing else.

    A device node in a pod does not keep its device busy: freed under it, it would become the next volume's.

    Raises:
        Refused: it is not so.
    """
    mounted = mounts.at(staging_path)
    if mounted and (device is None or mounted.major_minor != device.major_minor):
        raise Refused(f"{mounted.source} is mounted at the staging path {staging_path}, not volume {volume_id}")
    others = [target for target in targets.of_device(device) if target != staging_path] if device else []
    if others:
        raise Refused(f"volume {volume_id} is still published at {others[0]}")
