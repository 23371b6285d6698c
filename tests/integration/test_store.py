"""The store on real files: publishing, compare-and-set, claims of dead processes, damaged files, owner and modes.

Axes: what is on disk (nothing, torn, empty, oversized, of another kind, a leftover claim) × operation.
"""

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from controller_kit import OWNER, Elsewhere, Kit, tree

from csi_quobyte.cli import serve
from csi_quobyte.errors import Busy, Corrupt, Exhausted, NotFound, Refused, Unavailable
from csi_quobyte.pool import images, presence, records, versions
from csi_quobyte.pool import store as store_module
from csi_quobyte.pool.layout import initialise, read_format
from csi_quobyte.pool.records import LayerRecord, LayerState, Modes, NodeRecord, Owner, Progress, VolumeState
from csi_quobyte.pool.store import Store

INCREMENTS = int(os.environ.get("CSI_QUOBYTE_INCREMENTS", "500"))  # by each of two processes; make scale: 5000
DEADLINE_S = 60 + INCREMENTS / 20
MARKER = records.child_marker("a" * 24)

INCREMENT = """
import sys
from dataclasses import replace
from csi_quobyte.errors import Busy
from csi_quobyte.pool.store import Store
root, layer_id, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = Store(root)
print("ready", flush=True)
sys.stdin.readline()
acknowledged = 0
while acknowledged < times:
    layer = store.layer(layer_id)
    try:
        store.swap(layer, replace(layer, size_bytes=layer.size_bytes + 1))
    except Busy:
        continue
    acknowledged += 1
print(acknowledged, flush=True)
"""


def layer_record(*, size_bytes: int = 0) -> LayerRecord:
    layer_id = records.new_layer_id()
    return LayerRecord(
        id=layer_id,
        file=f"{layer_id}.raw",
        format="raw",
        size_bytes=size_bytes,
        parent=None,
        state=LayerState.HEAD,
    )


def new_layer(store: Store, *, size_bytes: int = 0) -> LayerRecord:
    """A layer's record alone."""
    return store.create(layer_record(size_bytes=size_bytes))


def whole_layer(store: Store, marker: str) -> LayerRecord:
    """A layer with its image and one marker."""
    return store.make_layer(layer_record(), marker, lambda fd: os.ftruncate(fd, 100))


def record_path(store: Store, layer: LayerRecord) -> Path:
    return Path(store.root, "layers", layer.id[:2], f"{layer.id}.json")


def claim_path(store: Store, layer: LayerRecord, generation: int) -> Path:
    return Path(f"{record_path(store, layer)}.g{generation}")


def swap_until_done(store: Store, layer: LayerRecord, size_bytes: int, timeout_s: float = 5) -> LayerRecord:
    deadline = time.monotonic() + timeout_s
    while True:
        current = store.layer(layer.id)
        try:
            return store.swap(current, replace(current, size_bytes=size_bytes))
        except Busy:
            assert time.monotonic() < deadline, "the claim of a dead process is never settled"


# --- compare-and-set -------------------------------------------------------------------------------------------


def test_two_processes_lose_no_acknowledged_change(store: Store) -> None:
    layer = new_layer(store)
    argv = [sys.executable, "-c", INCREMENT, store.root, layer.id, str(INCREMENTS)]
    writers = [
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_environment())
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        answers = []
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        for writer in writers:
            answers.append(writer.communicate(timeout=DEADLINE_S)[0])
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert answers == [f"{INCREMENTS}\n"] * 2
    found = store.layer(layer.id)
    assert found.size_bytes >= 2 * INCREMENTS
    assert found.size_bytes == found.generation - 1
    assert [path.name for path in record_path(store, layer).parent.iterdir()] == [f"{layer.id}.json"]


def child_environment() -> dict[str, str]:
    """The environment in which a child finds the package that is under test."""
    package = Path(store_module.__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(package)}


def test_swap_of_what_was_read_before_another_change_is_busy(store: Store) -> None:
    old = new_layer(store)
    new = store.swap(old, replace(old, size_bytes=1))
    with pytest.raises(Busy):
        store.swap(old, replace(old, size_bytes=2))
    assert store.layer(old.id) == new
    assert new.generation == 2


def test_swap_of_a_removed_record_is_busy_and_leaves_nothing(store: Store) -> None:
    before = tree(store.root)
    layer = new_layer(store)
    store.remove(layer)
    with pytest.raises(Busy):
        store.swap(layer, layer)
    assert tree(store.root) == before


def test_late_removal_does_not_hit_a_new_record_of_the_same_id(store: Store) -> None:
    old = new_layer(store)
    store.remove(old)
    new = store.create(old)
    with pytest.raises(Busy):
        store.remove(old)
    assert store.layer(old.id) == new


def test_remove_of_what_is_gone_succeeds(store: Store) -> None:
    layer = new_layer(store)
    store.remove(layer)
    store.remove(layer)


def test_record_of_a_node_is_written_again_only_when_it_is_lost_torn_or_another_process(store: Store) -> None:
    record = NodeRecord(id="n1", driver_version="1", started_at=records.now())
    path = Path(store._paths.node("n1"))
    serve._ensure_node_record(store, record)
    written = path.read_bytes()
    serve._ensure_node_record(store, record)
    assert path.read_bytes() == written
    for spoil in (path.unlink, lambda: path.write_bytes(b"{")):
        spoil()
        serve._ensure_node_record(store, record)
        found = store.find_node("n1")
        assert found
        assert found.started_at == record.started_at
    written = path.read_bytes()
    serve._ensure_node_record(store, replace(record, started_at=records.now()))
    assert path.read_bytes() != written


# --- claims of dead processes ----------------------------------------------------------------------------------


def test_claim_of_a_living_writer_is_waited_for_two_seconds(store: Store) -> None:
    assert versions._CLAIM_PATIENCE_S == 2.0
    layer = new_layer(store)
    claim_path(store, layer, 2).write_bytes(records.encode(replace(layer, generation=2)))
    with pytest.raises(Busy):
        store.swap(layer, layer)
    with pytest.raises(Busy):
        store.swap(layer, layer)
    assert claim_path(store, layer, 2).exists()


def test_complete_claim_becomes_the_record(store: Store, impatient: None) -> None:
    layer = new_layer(store)
    promised = replace(layer, generation=2, nonce="00000000", size_bytes=77)
    claim_path(store, layer, 2).write_bytes(records.encode(promised))
    last = swap_until_done(store, layer, 99)
    assert last.generation == 3, "the dead writer's change was skipped"
    assert not list(record_path(store, layer).parent.glob("*.g*"))


@pytest.mark.parametrize(
    "content",
    [
        lambda layer: records.encode(layer),
        lambda layer: records.encode(replace(layer, generation=5, nonce="00000000")),
        lambda _: b"",
        lambda layer: records.encode(replace(layer, generation=2))[:40],
    ],
    ids=["tombstone of an unfinished removal", "of another generation", "empty", "torn"],
)
def test_claim_that_is_no_next_version_is_dropped(
    store: Store, impatient: None, content: Callable[[LayerRecord], bytes]
) -> None:
    layer = new_layer(store)
    claim_path(store, layer, 2).write_bytes(content(layer))
    last = swap_until_done(store, layer, 99)
    assert (last.generation, last.size_bytes) == (2, 99)
    assert not list(record_path(store, layer).parent.glob("*.g*"))


def test_claim_of_a_former_object_of_the_name_does_not_become_the_new_one(kit: Kit, impatient: None) -> None:
    former = kit.create("v")
    path = Path(kit.store.root, "volumes", former.id.rpartition("-")[2][:2], f"{former.id}.json.g2")
    kit.delete("v")
    made = kit.create("v")
    assert made.generation == former.generation == 1
    path.write_bytes(records.encode(replace(former, generation=2, size_bytes=1, state=VolumeState.READY)))
    kit.sweep_until_quiet()
    assert kit.store.volume(made.id) == made


@pytest.mark.parametrize("with_record", [True, False], ids=["removal before its unlink", "removal after its unlink"])
def test_collector_drops_the_claim_of_an_unfinished_removal(kit: Kit, impatient: None, with_record: bool) -> None:
    volume = kit.create("v")
    path = Path(kit.store.root, "volumes", volume.id.rpartition("-")[2][:2], f"{volume.id}.json")
    os.link(path, f"{path}.g2")
    if not with_record:
        path.unlink()
    assert "stale-claim" in kit.findings()
    kit.sweep_until_quiet()
    assert not list(path.parent.glob("*.g*"))
    assert path.exists() is with_record


# --- publishing ------------------------------------------------------------------------------------------------


def test_record_of_a_taken_id_is_not_replaced(store: Store) -> None:
    layer = new_layer(store, size_bytes=5)
    before = tree(store.root)
    with pytest.raises(Busy):
        store.create(replace(layer, size_bytes=6))
    assert store.layer(layer.id) == layer
    assert tree(store.root) == before


def test_layer_made_again_is_not_replaced(store: Store) -> None:
    layer = whole_layer(store, MARKER)
    before = tree(store.root)
    assert store.make_layer(layer, MARKER, lambda fd: os.ftruncate(fd, 200)) == layer
    assert tree(store.root) == before


@pytest.mark.parametrize("missing", ["record", "image", "marker"])
def test_layer_of_which_a_power_cut_has_left_a_part_is_completed(store: Store, missing: str) -> None:
    layer = whole_layer(store, MARKER)
    before = tree(store.root)
    parts = {
        "record": record_path(store, layer),
        "image": Path(store.image_path(layer)),
        "marker": Path(store.root, "layers", layer.id[:2], f"{layer.id}.refs", MARKER),
    }
    parts[missing].unlink()
    store.make_layer(layer, MARKER, lambda fd: os.ftruncate(fd, 100))
    assert tree(store.root) == before


def test_image_that_fails_half_way_leaves_what_is_undone_with_the_intent(store: Store) -> None:
    layer = layer_record()
    before = tree(store.root)

    def fail(fd: int) -> None:
        os.ftruncate(fd, 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Exhausted):
        store.make_layer(layer, MARKER, fail)
    refs = f"layers/{layer.id[:2]}/{layer.id}.refs"
    assert set(tree(store.root)) - set(before) == {refs, f"{refs}/{MARKER}"}


# --- references ------------------------------------------------------------------------------------------------


def test_condemned_layer_can_never_be_referred_to(store: Store) -> None:
    layer = whole_layer(store, MARKER)
    with pytest.raises(Busy):
        store.condemn(layer.id)
    store.unmark(layer.id, MARKER)
    assert store.condemn(layer.id)
    assert not store.condemn(layer.id)
    with pytest.raises(NotFound):
        store.mark(layer.id, MARKER)
    assert store.markers(layer.id) is None


def test_last_marker_is_taken_away_while_the_layer_is_condemned(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory goes between the removal of its last name and the fsync that makes that durable."""
    layer = store.make_layer(layer_record(), MARKER, lambda _: None)
    unlink = os.unlink

    def unlink_and_condemn(path: str) -> None:
        unlink(path)
        monkeypatch.setattr(os, "unlink", unlink)
        assert store.condemn(layer.id)

    monkeypatch.setattr(os, "unlink", unlink_and_condemn)
    store.unmark(layer.id, MARKER)
    assert store.markers(layer.id) is None


def test_what_is_done_and_cannot_be_made_durable_is_not_final(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A final error would make the sidecars forget what is there."""
    layer = store.make_layer(layer_record(), MARKER, lambda _: None)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Unavailable, match="durable"):
            store.unmark(layer.id, MARKER)
        with pytest.raises(Unavailable, match="durable"):
            store.mark(layer.id, MARKER)
        with pytest.raises(Unavailable, match="durable"):
            store.settle(layer)
    assert store.markers(layer.id) == [MARKER]


def test_marker_that_is_there_already_is_made_durable(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made it may have died before he did that."""
    layer = store.make_layer(layer_record(), MARKER, lambda _: None)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    store.mark(layer.id, MARKER)
    assert synced == [store.refs_path(layer.id)]


def test_mark_and_unmark_done_before_are_success(store: Store) -> None:
    layer = whole_layer(store, MARKER)
    other = records.child_marker("b" * 24)
    for _ in range(2):
        store.mark(layer.id, other)
        assert store.markers(layer.id) == [MARKER, other]
    for _ in range(2):
        store.unmark(layer.id, other)
        assert store.markers(layer.id) == [MARKER]


# --- damaged records -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda _: b"",
        lambda data: data.rstrip() + b" " * (1 << 20),
        lambda data: b"\0" * len(data),
        lambda _: b'{"kind": "node", "generation": 1, "nonce": "0"}',
    ],
    ids=["torn", "empty", "oversized", "zeros", "of another kind"],
)
def test_damaged_record_is_corrupt_and_names_its_path(store: Store, damage: Callable[[bytes], bytes]) -> None:
    other, layer = new_layer(store), new_layer(store)
    path = record_path(store, layer)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Corrupt, match=re.escape(str(path))):
        store.find_layer(layer.id)
    assert store.layer(other.id) == other


# --- opening ---------------------------------------------------------------------------------------------------


def change_format(pool: Path, **changes: object) -> None:
    path = pool / "format.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("changes", [{"format": 2}, {"required_features": ["merge-groups"]}])
def test_pool_of_a_later_version_is_refused(pool: Path, changes: dict[str, object]) -> None:
    change_format(pool, **changes)
    with pytest.raises(Refused, match=r"format\.json"):
        Store(str(pool))


def test_unknown_optional_feature_is_ignored(pool: Path) -> None:
    change_format(pool, optional_features=["hints"], of_a_later_version=1)
    Store(str(pool)).close()


def test_damaged_format_is_corrupt(pool: Path) -> None:
    (pool / "format.json").write_bytes(b"{")
    with pytest.raises(Corrupt, match=r"format\.json"):
        Store(str(pool))
    with pytest.raises(Corrupt, match=r"format\.json"):
        initialise(str(pool), owner=OWNER, modes=Modes())


def test_directory_without_format_is_no_pool(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="pool init"):
        Store(str(tmp_path))


# --- pool init -------------------------------------------------------------------------------------------------


def test_init_again_gives_the_same_pool(pool: Path) -> None:
    before, found = tree(pool), read_format(str(pool))
    assert initialise(str(pool), owner=OWNER, modes=Modes()) == found
    assert tree(pool) == before


def test_init_goes_on_where_another_run_died(tmp_path: Path) -> None:
    root = tmp_path / "pool"
    (root / "layers" / "00").mkdir(parents=True)
    (root / "tmp").mkdir()
    (root / "lost+found").mkdir()
    initialise(str(root), owner=OWNER, modes=Modes())
    opened = Store(str(root))
    Kit(opened).create("v")
    opened.close()


def test_init_refuses_a_directory_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(Refused, match="photos"):
        initialise(str(tmp_path), owner=OWNER, modes=Modes())
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("owner", "modes"), [(Owner(uid=7, gid=OWNER.gid), Modes()), (OWNER, Modes(file="0660", directory="0770"))]
)
def test_init_with_another_owner_or_modes_refuses(pool: Path, owner: Owner, modes: Modes) -> None:
    with pytest.raises(Refused, match="is a pool already"):
        initialise(str(pool), owner=owner, modes=modes)


# --- owner and modes -------------------------------------------------------------------------------------------

UNPRIVILEGED = Owner(uid=65532, gid=65532)

# the imports come first: the test machine's Python need not be readable for that user
AS_CONTROLLER = """
import os, sys
sys.path.insert(0, sys.argv[2])
from controller_kit import Kit
from csi_quobyte.pool.store import Store
os.setgroups([]); os.setgid(65532); os.setuid(65532)
store = Store(sys.argv[1])
kit = Kit(store)
kit.create("from-root-source", source=kit.from_volume("of-root"))
kit.create("own"); kit.snapshot("s", of="own")
kit.attach("own"); kit.detach("own")
kit.delete("of-root")
kit.sweep_until_quiet()
"""


@pytest.mark.root
def test_root_and_an_unprivileged_controller_share_a_pool(tmp_path: Path) -> None:
    root = reachable_directory()
    try:
        initialise(str(root), owner=UNPRIVILEGED, modes=Modes(file="0640", directory="0750"))
        opened = Store(str(root))
        kit = Kit(opened)
        kit.add_node()
        kit.create("of-root")
        kit.sweep_until_quiet()  # fills the reserve
        here = str(Path(__file__).parent)
        done = subprocess.run(
            [sys.executable, "-c", AS_CONTROLLER, str(root), here],
            check=False,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            env={**child_environment(), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert_owned(root, UNPRIVILEGED, file_mode=0o640, directory_mode=0o750)
        kit.delete_everything()
        opened.close()
    finally:
        shutil.rmtree(root)


def reachable_directory() -> Path:
    """A directory that another user can reach: pytest's own are closed to others."""
    root = Path(tempfile.mkdtemp(prefix="csi-quobyte-test-"))
    root.chmod(0o755)
    return root


def assert_owned(root: Path, owner: Owner, *, file_mode: int, directory_mode: int) -> None:
    status = root.stat()
    assert (status.st_uid, status.st_gid) == (owner.uid, owner.gid)
    wrong = []
    for path in root.rglob("*"):
        status = path.stat()
        mode = directory_mode if path.is_dir() else file_mode
        if (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) != (owner.uid, owner.gid, mode):
            wrong.append(f"{path}: {status.st_uid}:{status.st_gid} {stat.S_IMODE(status.st_mode):o}")
    assert not wrong


def test_S12_every_file_has_the_default_modes_whatever_the_umask(tmp_path: Path) -> None:
    root = tmp_path / "pool"
    root.mkdir()
    before = os.umask(0o777)
    try:
        initialise(str(root), owner=OWNER, modes=Modes())
        opened = Store(str(root))
        kit = Kit(opened)
        kit.add_node()
        kit.create("v", image_format="raw")
        kit.snapshot("s", of="v")
        kit.sweep_until_quiet()
        opened.close()
    finally:
        os.umask(before)
    assert_owned(root, OWNER, file_mode=0o600, directory_mode=0o700)


# --- the rest --------------------------------------------------------------------------------------------------


def test_temporaries_of_a_dead_process_are_stale_and_those_of_a_living_one_are_not(pool: Path, store: Store) -> None:
    living, dead = Store(str(pool)), Store(str(pool))
    files = [pool / "tmp" / f"{one.token}.00000000000{number}" for number, one in enumerate((living, dead))]
    for file in files:
        file.touch()
    dead.close()
    assert store.stale_temporaries() == [str(files[1])]
    living.close()
    assert sorted(store.stale_temporaries()) == sorted(map(str, files))


class Clock:
    """Stands for the module time: an own clock that is turned on by hand."""

    time = staticmethod(time.time)

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


def test_temporaries_of_another_host_are_stale_when_none_of_them_has_changed_for_long(
    pool: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(presence, "time", clock)
    far = Elsewhere(pool)
    old, new = (pool / "tmp" / f"{far.token}.00000000000{number}" for number in range(2))
    for file in (old, new):
        file.touch()
    hour_ago = time.time() - 3600
    os.utime(old, (hour_ago, hour_ago))
    far.close()  # its lock says that it is dead; on another host nobody would see it
    assert store.stale_temporaries() == []
    clock.now_s += 61
    assert store.stale_temporaries() == [], "one is new"
    os.utime(new, (hour_ago, hour_ago))
    assert store.stale_temporaries() == [], "a clock may be wrong: it has changed since it was seen"
    clock.now_s += 61
    assert sorted(store.stale_temporaries()) == [str(old), str(new)]


@pytest.mark.parametrize("wrong_s", [-3 * 3600, 365 * 86400])
def test_wrong_clock_of_another_host_neither_keeps_a_file_for_ever_nor_takes_it_away(
    wrong_s: int, pool: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(presence, "time", clock)
    far, layer_id = Elsewhere(pool), records.new_layer_id()
    far.close()  # its lock says nothing; it is at work all the same
    for seconds in range(40):
        far.put_progress(layer_id, seconds, 100)
        note = pool / "tmp" / f"{far.token}.{layer_id[:12]}"
        os.utime(note, (time.time() + wrong_s + 30 * seconds,) * 2)
        assert store.stale_temporaries() == []
        assert store.may_be_filled(layer_id)
        clock.now_s += 30
    clock.now_s += 600
    assert store.stale_temporaries() == [str(note)]
    assert not store.may_be_filled(layer_id)


def test_locks_of_another_mount_at_the_same_path_say_nothing(pool: Path, store: Store) -> None:
    """A store that was opened before a remount still judges by the locks of the mount that it was opened on."""
    other = Store(str(pool))
    (pool / "lock").rename(pool / "lock.before")
    (pool / "lock").touch()
    assert store.is_alive(other.token)
    other.close()
    assert not store.is_alive(other.token)


def test_reserve_file_that_is_used_up_counts_as_new(pool: Path, store: Store) -> None:
    """It was made long ago: another host would take the temporary file that it becomes for a dead process's."""
    store.replenish_reserve()
    for spare in (pool / "reserve").iterdir():
        os.utime(spare, (0.0, 0.0))
    full = [OSError(errno.ENOSPC, "full")]

    def write(fd: int) -> None:
        if full:
            raise full.pop()
        os.write(fd, b"x")

    path = store._steps.write_temporary(write, reserve=store._reserve_file)
    assert time.time() - Path(path).stat().st_mtime < 60
    full.append(OSError(errno.ENOSPC, "full"))
    with pytest.raises(Unavailable, match="taken by another"):
        store._steps.write_temporary(write, reserve=lambda: f"{pool}/reserve/{'0' * 32}")


def test_progress_is_seen_from_another_host_while_it_is_noted(pool: Path, store: Store) -> None:
    far, layer_id = Elsewhere(pool), records.new_layer_id()
    store.put_progress(layer_id, 1, 2)
    assert far.progress(layer_id) == Progress(current_bytes=1, total_bytes=2)
    os.utime(pool / "tmp" / f"{store.token}.{layer_id[:12]}", (0.0, 0.0))
    assert far.progress(layer_id) is None
    assert store.progress(layer_id)
    store.drop_progress(layer_id)
    far.close()


def test_primitives_are_proved_and_nothing_is_left(store: Store) -> None:
    before = tree(store.root)
    store.prove_primitives()
    assert tree(store.root) == before


def test_raw_head_grows_and_never_shrinks(kit: Kit) -> None:
    volume = kit.create("v", image_format="raw")
    head = kit.store.layer(volume.head)
    kit.store.grow_raw_image(head, 2 * volume.size_bytes)
    kit.store.grow_raw_image(head, volume.size_bytes)
    assert images.virtual_size_bytes(kit.store, head) == 2 * volume.size_bytes


def test_missing_image_is_corrupt(kit: Kit) -> None:
    volume = kit.create("v", image_format="raw")
    head = kit.store.layer(volume.head)
    Path(kit.store.image_path(head)).unlink()
    with pytest.raises(Corrupt, match=head.id):
        kit.store.grow_raw_image(head, 1)
    with pytest.raises(Corrupt, match=head.id):
        kit.store.read_image(head, 0, 1)


def test_pool_that_loses_its_directories_is_unavailable(kit: Kit) -> None:
    shutil.rmtree(Path(kit.store.root, "tmp"))
    with pytest.raises(Unavailable):
        kit.create("v")
    Path(kit.store.root, "lock").unlink()
    with pytest.raises(Unavailable):
        kit.create("v")


# --- files of somebody else ------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", ["tmp/report.odt", "reserve/a.txt", "volumes/mydata", "volumes/00/a.txt", "lock"])
def test_init_refuses_what_it_cannot_have_made_and_changes_nothing(tmp_path: Path, foreign: str) -> None:
    root = tmp_path / "pool"
    path = root / foreign
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = sorted(root.rglob("*"))
    with pytest.raises(Refused, match=re.escape(foreign)):
        initialise(str(root), owner=OWNER, modes=Modes())
    assert sorted(root.rglob("*")) == before
    assert path.read_text() == "mine"


def test_init_goes_on_after_any_number_of_its_directories(tmp_path: Path) -> None:
    root = tmp_path / "pool"
    root.mkdir()
    initialise(str(root), owner=OWNER, modes=Modes())
    whole = tree(root)
    (root / "format.json").unlink()
    for shard in ("layers/ff", "layers/10", "snapshots/00"):
        (root / shard).rmdir()
    (root / "tmp" / f"init.{'0' * 12}").touch()
    initialise(str(root), owner=OWNER, modes=Modes())
    (root / "tmp" / f"init.{'0' * 12}").unlink()
    assert tree(root) == whole


def test_foreign_files_outside_of_the_shards_are_reported_and_never_touched(kit: Kit) -> None:
    root = Path(kit.store.root)
    names = {"notes.txt", "tmp/report.odt", "reserve/a.txt", "nodes/b.txt", "volumes/mydata"}
    for name in names:
        (root / name).write_text("mine")
    kit.create("v")
    kit.delete("v")
    kit.sweep_until_quiet()
    kit.store.replenish_reserve()
    assert {name: (root / name).read_text() for name in names} == dict.fromkeys(names, "mine")
    found = [finding for finding in kit.check() if finding.kind == "foreign-file"]
    assert {finding.path for finding in found} == names
    assert {finding.severity for finding in found} == {"warning"}
