"""The trash: deleted volumes and snapshots that are kept for a while, or until somebody decides.

    volumes/V --delete--> trash/V-u --restore--> volumes/W (another uid, the same layers)
                              \\------purge----> nothing

An entry is the record of the deleted object, as it was. Its marker stays in its layer, so that nothing can merge or
drop what it needs; what was made from it lives on as after any delete. Always true, whatever dies:

- An entry comes from a record that is still there and from nothing else (`store.move_to_trash`), so that it cannot
  come back after it was restored or purged.
- Restore and purge both begin with a change of the entry by compare-and-set: one of them wins.
- A restore writes down the record that it will publish before it changes the entry, and publishes it by link(2) from
  there; who finishes it or gives it up takes that file away first. So nothing is published late, and whether something
  was published can be seen.
- The restored record names the entry that it comes from (`restored_from`). Who removes it removes that entry first: as
  long as the entry is there without the record, the record never was.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import cast

from csi_quobyte.errors import AlreadyExists, Busy, Corrupt, NotFound
from csi_quobyte.pool import records
from csi_quobyte.pool.records import (
    Deletable,
    Incarnation,
    LayerState,
    SnapshotState,
    Trash,
    TrashState,
    VolumeRecord,
    VolumeState,
    layer_of,
    marker_of,
    trash_id,
)
from csi_quobyte.pool.store import Store

log = logging.getLogger(__name__)


def decide(record: Deletable) -> Trash | None:
    """Say what becomes of an object that is deleted now; None: nothing of it is kept.

    What never was ready is always undone: nobody was ever told of it.
    """
    if record.unfinished or record.on_delete == "delete":
        return None
    deleted_at = records.now()
    keep = timedelta(seconds=record.trash_retention_s)
    return Trash(deleted_at=deleted_at, expires_at=deleted_at + keep if record.on_delete == "trash" else None)


def is_expired(entry: Deletable, at: datetime) -> bool:
    """Say whether an entry has been kept for long enough."""
    found = entry.trash
    return bool(found and found.state is TrashState.KEPT and found.expires_at and found.expires_at <= at)


# --- restore ---------------------------------------------------------------------------------------------------


def restore(store: Store, entry_id: str, name: str = "") -> Deletable:
    """Make what was deleted an object again, under its own CSI name or another one; durable and ready on return.

    Can be repeated after a crash, and after it was done. With another name than an earlier try, that one is given up
    if it can be.

    Raises:
        NotFound: there is no such entry, or it is being purged.
        AlreadyExists: the name is taken; nothing was changed.
        Corrupt: its layer is not what it must be, so that it cannot be used again.
        Busy: another operation on it or on the name is running.
    """
    wanted = _id_of_name(store, entry_id, name)
    with _locked(store, entry_id, wanted):
        try:
            entry = _entry(store, entry_id)
        except NotFound:
            find = store.find_volume if "-vol-" in entry_id else store.find_snapshot
            if (done := find(wanted)) and done.restored_from == entry_id:
                return done
            raise
        if _trash(entry).target and _target(entry).id != wanted:
            _give_up(store, entry)
            entry = _entry(store, entry_id)
        if _trash(entry).state is TrashState.PURGING:
            raise NotFound(f"{entry_id} is being purged")
        if _trash(entry).state is TrashState.KEPT:
            entry = _begin_restore(store, entry, wanted, name or entry.name)
        return _publish(store, entry)


def _id_of_name(store: Store, entry_id: str, name: str) -> str:
    """Give the id that an entry is to be restored under: that of the new name, else its own."""
    parsed = records.parse_trash_id(entry_id)
    if parsed is None:
        raise NotFound(f"{entry_id!r} is no id of something in the trash; csi-quobyte trash ls prints the ids")
    if not name:
        return parsed[1].id
    return (records.volume_id if parsed[0].kind == "vol" else records.snapshot_id)(store.prefix, name)


def _entry(store: Store, entry_id: str) -> Deletable:
    entry = store.find_trashed(entry_id)
    if entry is None:
        raise NotFound(f"the trash has no {entry_id}; csi-quobyte trash ls prints the ids")
    _trash(entry)
    return entry


def _trash(entry: Deletable) -> Trash:
    if entry.trash is None:
        raise Corrupt(f"the record of {trash_id(entry)} in the trash does not say that it was deleted")
    return entry.trash


def _target(entry: Deletable) -> Incarnation:
    target = _trash(entry).target
    if target is None:
        raise Corrupt(f"{trash_id(entry)} is being restored and its record does not say as what")
    return target


def _target_marker(entry: Deletable) -> str:
    target = _target(entry)
    return marker_of(replace(entry, id=target.id, uid=target.uid))


@contextmanager
def _locked(store: Store, entry_id: str, *also: str) -> Iterator[None]:
    """Hold the lock of the deleted object's id, which is that of its entry, too, and further ones."""
    with ExitStack() as stack:
        for name in sorted({entry_id.rpartition("-")[0], *also}):
            stack.enter_context(store.lock(name))
        yield


def _find(store: Store, entry: Deletable, record_id: str) -> Deletable | None:
    """Give the live record of an id, of the kind that the entry is of."""
    return store.find_volume(record_id) if isinstance(entry, VolumeRecord) else store.find_snapshot(record_id)


def _finish_move(store: Store, entry: Deletable) -> None:
    """End the delete that has made an entry, if a crash has left the record at its old place, too.

    Must come before the entry can go: an entry would be made of that record again.
    """
    live = _find(store, entry, entry.id)
    if live and live.uid == entry.uid:
        store.move_to_trash(live)
    else:
        store.settle_name(entry.id)


def _begin_restore(store: Store, entry: Deletable, wanted: str, name: str) -> Deletable:
    """Write down what an entry is to be restored as: the record, then the entry's own word for it."""
    _finish_move(store, entry)
    if _find(store, entry, wanted):
        raise _is_taken(entry, name)
    _check_usable(store, entry)
    uid = records.new_uid()
    restored = _as_live(store, entry, Incarnation(id=wanted, uid=uid), name)
    store.begin_restore(entry, restored)
    # die here: a file that nobody names, which the collector removes
    target = Incarnation(id=wanted, uid=uid)
    following = replace(entry, trash=replace(_trash(entry), state=TrashState.RESTORING, target=target))
    try:
        return store.swap_trashed(entry, following)
    except Busy:
        store.revoke_restore(entry, uid)
        raise


def _is_taken(entry: Deletable, name: str) -> AlreadyExists:
    return AlreadyExists(f"a {entry.kind} named {name!r} exists; restore this one under another name with --name NAME")


def _check_usable(store: Store, entry: Deletable) -> None:
    """Check that an entry's layer is there, is referred to by it, and is in the state that a restored object needs.

    Raises:
        Corrupt: it is not.
    """
    layer = store.layer(layer_of(entry))
    wanted = LayerState.HEAD if isinstance(entry, VolumeRecord) else LayerState.FROZEN
    if layer.state is not wanted:
        raise Corrupt(f"layer {layer.id} of {trash_id(entry)} is {layer.state}, not {wanted}")
    if marker_of(entry) not in (store.markers(layer.id) or []):
        raise Corrupt(f"layer {layer.id} does not belong to {trash_id(entry)} any more: its marker is missing")


def _as_live(store: Store, entry: Deletable, target: Incarnation, name: str) -> Deletable:
    """Give the record of what an entry is restored as. What was on a volume's device goes with it, or it would be
    formatted.
    """
    changed = replace(
        entry, id=target.id, uid=target.uid, name=name, trash=None, restored_from=trash_id(entry), generation=0
    )
    if isinstance(changed, VolumeRecord):
        content = store.content(cast(VolumeRecord, entry))
        return replace(changed, state=VolumeState.READY, inherited_content=content)
    return replace(changed, state=SnapshotState.READY, cache=None)


def _publish(store: Store, entry: Deletable) -> Deletable:
    """Do what a restore that has begun says, as far as it is not done."""
    target = _target(entry)
    try:
        if _find_restored(store, entry) is None:
            store.mark(layer_of(entry), _target_marker(entry))
            # die here, before or after: the collector, or a retry, goes on
            store.publish_restored(entry, target)
    except (AlreadyExists, Busy, Corrupt) as error:
        restored = _find_restored(store, entry)
        if restored is None:
            _give_up(store, entry)
            raise _is_taken(entry, target.id) if isinstance(error, AlreadyExists) else error from None
    except NotFound as error:
        _give_up(store, entry)  # so that it can be purged
        raise Corrupt(f"the layer of {trash_id(entry)} is gone") from error
    restored = _find_restored(store, entry)
    if restored is None:
        raise Busy(f"{target.id} was deleted again at this moment")
    _finish_restore(store, entry)
    log.info("%s was restored from the trash as %s", trash_id(entry), target.id)
    return restored


def _find_restored(store: Store, entry: Deletable) -> Deletable | None:
    """Give the record that a restore under way has published, None when it has not."""
    target = _target(entry)
    found = _find(store, entry, target.id)
    return found if found and found.uid == target.uid else None


def _finish_restore(store: Store, entry: Deletable) -> None:
    """Take an entry away whose restored record is published; can be repeated."""
    store.settle_name(_target(entry).id)
    store.revoke_restore(entry, _target(entry).uid)
    _remove(store, entry)


def _give_up(store: Store, entry: Deletable) -> None:
    """Make an entry that is being restored one that is kept, unless its record was published: then finish it.

    The entry changes before the marker goes. What was published and deleted again meanwhile has taken the entry away,
    and its own entry may need that marker.
    """
    store.revoke_restore(entry, _target(entry).uid)
    if _find_restored(store, entry):
        _finish_restore(store, entry)
        return
    store.swap_trashed(entry, replace(entry, trash=replace(_trash(entry), state=TrashState.KEPT, target=None)))
    # die here: a marker that belongs to nothing, which the collector removes
    store.unmark(layer_of(entry), _target_marker(entry))


def finish_restored(store: Store, record: Deletable) -> None:
    """Before a record is removed: end the restore that it comes from, so that it cannot be published again."""
    if record.restored_from is None:
        return
    try:
        entry = store.find_trashed(record.restored_from)
    except Corrupt as error:
        # what cannot be read cannot be restored, either
        log.error("an entry of the trash is left as it is: %s", error)
        return
    if entry and entry.trash and entry.trash.target and entry.trash.target.uid == record.uid:
        _finish_restore(store, entry)


def go_on_restoring(store: Store, entry_id: str) -> None:
    """Finish the restore of an entry that a crash has left, or make it one that is kept if its new name is taken now.

    Raises:
        Busy: it is under way.
    """
    entry = store.find_trashed(entry_id)
    if entry is None or _trash(entry).state is not TrashState.RESTORING:
        return
    with _locked(store, entry_id, _target(entry).id), suppress(AlreadyExists):
        current = store.find_trashed(entry_id)
        if current and records.same_version(current, entry):
            _publish(store, current)


# --- purge -----------------------------------------------------------------------------------------------------


def purge(store: Store, entry_id: str) -> str | None:
    """Give up for good what is kept; gives the layer that has lost a reference by that (None: it is not known).

    Raises:
        NotFound: there is no such entry.
        Busy: it is being restored, or another operation on it is running.
    """
    with _locked(store, entry_id):
        try:
            entry = _entry(store, entry_id)
        except Corrupt as error:
            if not store.is_damaged("trash", entry_id):
                raise Busy(f"the record of {entry_id} was being changed") from error
            log.error("purging an entry of the trash that cannot be read: %s", error)
            store.remove_damaged_trashed(entry_id)
            return None
        if _trash(entry).state is TrashState.RESTORING:
            raise Busy(f"{entry_id} is being restored as {_target(entry).id}")
        if _trash(entry).state is TrashState.KEPT:
            _finish_move(store, entry)
            entry = store.swap_trashed(entry, replace(entry, trash=replace(_trash(entry), state=TrashState.PURGING)))
        else:
            store.settle_name(entry.id)  # whoever decided it may have died before that was durable; its marker goes now
        _remove(store, entry)
        return layer_of(entry)


def _remove(store: Store, entry: Deletable) -> None:
    """Take an entry away with all that belongs to it alone; the entry goes last."""
    store.unmark(layer_of(entry), marker_of(entry))
    if isinstance(entry, VolumeRecord):
        store.remove_content(entry)
    store.remove_trashed(entry)
