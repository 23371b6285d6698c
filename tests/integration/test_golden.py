"""Golden images: import through the real command line, sourceImage, removal; hostile files; interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from controller_kit import QEMU_DIR, Elsewhere, Kit, qemu_io, tools, tree
from test_collector import add_garbage, tear
from test_crash_steps import EVERY, SEED
from test_repair import same

from csi_quobyte.engine import collector, repair
from csi_quobyte.engine.hold import holding
from csi_quobyte.errors import AlreadyExists, Busy, Exhausted, NotFound, OutOfRange, Refused, Unavailable
from csi_quobyte.host import jobs, qemu_img
from csi_quobyte.host.qemu import ImageLayer
from csi_quobyte.operations import golden
from csi_quobyte.operations.golden import ImportRequest
from csi_quobyte.pool import records
from csi_quobyte.pool import store as store_module
from csi_quobyte.pool.records import Content, ImageState, Source, VolumeState
from csi_quobyte.pool.sizes import MIB, SizeRange
from csi_quobyte.pool.store import Store

CLUSTER_BYTES = 64 * 1024


def qemu(*argv: str | Path) -> None:
    subprocess.run([f"{QEMU_DIR}/qemu-img", *map(str, argv)], check=True, timeout=30, capture_output=True)


def source(path: Path, image_format: str = "qcow2", *options: str, size: str = "10000000") -> Path:
    """An image with the byte 5 in its second cluster, of a size that is no multiple of 1 MiB."""
    qemu("create", "-q", "-f", image_format, *(("-o", ",".join(options)) if options else ()), path, size)
    disk = f'json:{{"driver": "{image_format}", "file": {{"driver": "file", "filename": "{path}"}}}}'
    qemu_io(disk, f"write -P 5 {CLUSTER_BYTES} {CLUSTER_BYTES}", read_only=False)
    return path


def import_file(kit: Kit, path: Path, image_format: str = "qcow2", name: str = "debian") -> records.ImageRecord:
    request = ImportRequest(name=name, format=image_format, path=str(path))  # type: ignore[arg-type]
    return golden.import_image(kit.store, tools(), request, lambda _: "go on")


def cli(kit: Kit, *argv: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_argv(kit, *argv), timeout=60, text=True, capture_output=True, **options)  # type: ignore[call-overload,no-any-return]


def _argv(kit: Kit, *argv: str | Path) -> list[str]:
    pool = ["--pool", f"main={kit.store.root}", "--require-mount", "any"]
    qemu_dir = ["--qemu-dir", QEMU_DIR] if "import" in argv else []
    return [sys.executable, "-m", "csi_quobyte", *map(str, argv), *pool, *qemu_dir]


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("qcow2", ()), ("qcow2", ("cluster_size=4k", "extended_l2=off")), ("qcow2", ("compat=0.10",)), ("raw", ()),
     ("vdi", ()), ("vpc", ("force_size=on",)), ("vhdx", ())],
)  # fmt: skip
def test_import_rewrites_a_file_into_an_image_as_ours_are(
    kit: Kit, tmp_path: Path, image_format: str, options: tuple[str, ...]
) -> None:
    path = source(tmp_path / "file", image_format, *options, size="10485760" if image_format == "vpc" else "10000000")
    made = import_file(kit, path, image_format)
    assert made.state is ImageState.READY
    assert made.size_bytes == 10 * MIB
    assert made.content == Content(state="raw")
    layer = kit.store.layer(made.layer)
    found = qemu_img.info(tools(), kit.store.image_path(layer), "qcow2")
    assert (found.compat, found.cluster_size_bytes, found.backing_file) == ("1.1", CLUSTER_BYTES, None)
    assert kit.layer_holds(made.layer, 0, 5, 0)
    assert kit.store.image_bytes(layer)[1] < MIB  # type: ignore[index]
    kit.sweep_until_quiet()
    assert kit.check() == []
    assert os.listdir(f"{kit.store.root}/jobs") == os.listdir(f"{kit.store.root}/tmp") == []


def test_compressed_image_is_written_uncompressed(kit: Kit, tmp_path: Path) -> None:
    source(tmp_path / "plain")
    qemu("convert", "-c", "-f", "qcow2", "-O", "qcow2", tmp_path / "plain", tmp_path / "small")
    made = import_file(kit, tmp_path / "small")
    image = ImageLayer(made.layer, kit.store.image_path(kit.store.layer(made.layer)), "qcow2")
    assert qemu_img.compare(tools(), [image], [ImageLayer("p", str(tmp_path / "plain"), "qcow2")])
    assert kit.store.image_bytes(kit.store.layer(made.layer))[1] >= CLUSTER_BYTES  # type: ignore[index]


def test_image_that_cannot_fit_is_not_begun(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = tree(kit.store.root)
    monkeypatch.setattr(kit.store, "space", lambda: (64 * MIB, 4096))
    monkeypatch.setattr("csi_quobyte.host.jobs.copy_foreign", None)
    with pytest.raises(Exhausted, match="pool has 4 KiB left"):
        import_file(kit, source(tmp_path / "file"))
    assert tree(kit.store.root) == new


def test_volumes_lie_on_the_image_and_outlive_it(kit: Kit, tmp_path: Path) -> None:
    new = tree(kit.store.root)
    made = import_file(kit, source(tmp_path / "file"))
    volume = kit.create("v", source_image="debian", size=SizeRange())
    assert volume.source == Source(kind="image", id=made.id)
    assert volume.size_bytes == made.size_bytes
    assert volume.inherited_content == Content(state="raw")
    assert kit.create("v", source_image="debian", size=SizeRange()) == volume
    kit.create("large", source_image="debian", size=SizeRange(64 * MIB), clone_mode="cache")
    kit.create("copy", source_image="debian", size=SizeRange(), clone_mode="copy", image_format="raw")
    assert [layer.id for layer in kit.chain("large")[1:]] == [made.layer]
    assert len(kit.chain("copy")) == 1
    for name in ("v", "large", "copy"):
        assert kit.holds(name, 0, 5, 0)
    with pytest.raises(AlreadyExists):
        kit.create("v", size=SizeRange())
    golden.remove_image(kit.store, "debian")
    kit.sweep_until_quiet()
    assert kit.holds("v", 0, 5)
    assert kit.check() == []
    with pytest.raises(NotFound, match=r"golden image 'debian'.*sourceImage"):
        kit.create("w", source_image="debian", size=SizeRange())
    again = import_file(kit, tmp_path / "file")
    assert (again.id, again.uid == made.uid) == (made.id, False)
    golden.remove_image(kit.store, "debian")
    kit.delete_everything()
    assert tree(kit.store.root) == new


def test_name_is_taken_once(kit: Kit, tmp_path: Path) -> None:
    path = source(tmp_path / "file")
    import_file(kit, path)
    before = tree(kit.store.root)
    with pytest.raises(AlreadyExists):
        import_file(kit, path)
    assert tree(kit.store.root) == before
    with pytest.raises(NotFound):
        golden.remove_image(kit.store, "other")


def backing(path: Path) -> None:
    secret = path.with_name("secret")
    secret.write_bytes(b"secret" * 1000)
    qemu("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", path)


def data_file(path: Path) -> None:
    qemu("create", "-q", "-f", "qcow2", "-o", f"data_file={path}.data", path, "1M")


def internal_snapshot(path: Path) -> None:
    source(path)
    qemu("snapshot", "-c", "one", path)


def encrypted(path: Path) -> None:
    secret = "secret,id=k,data=geheim"
    options = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10"
    qemu("create", "-q", "--object", secret, "-f", "qcow2", "-o", options, path, "1M")


def huge_l1(path: Path) -> None:
    source(path)
    with path.open("r+b") as file:
        file.seek(36)
        file.write((0x7FFFFFFF).to_bytes(4))


def not_qcow2(path: Path) -> None:
    path.write_bytes(bytes(MIB))


def truncated(path: Path) -> None:
    path.write_bytes(b"QFI\xfb\0\0\0\3")


@pytest.mark.parametrize("hostile", [backing, data_file, internal_snapshot, encrypted, huge_l1, not_qcow2, truncated])
def test_file_that_is_not_plain_is_refused_and_leaves_nothing(
    kit: Kit, tmp_path: Path, hostile: Callable[[Path], None]
) -> None:
    before = tree(kit.store.root)
    hostile(tmp_path / "file")
    with pytest.raises(Refused):
        import_file(kit, tmp_path / "file")
    assert tree(kit.store.root) == before


def test_raw_file_that_begins_like_qcow2_is_taken_as_it_is(kit: Kit, tmp_path: Path) -> None:
    backing(tmp_path / "file")
    made = import_file(kit, tmp_path / "file", "raw")
    qemu("convert", "-f", "raw", "-O", "raw", tmp_path / "file", tmp_path / "raw")
    image = ImageLayer(made.layer, kit.store.image_path(kit.store.layer(made.layer)), "qcow2")
    assert qemu_img.compare(tools(), [image], [ImageLayer("p", str(tmp_path / "raw"), "raw")])


@pytest.mark.parametrize("what", ["directory", "missing", "empty"])
def test_what_is_no_image_file_is_refused(kit: Kit, tmp_path: Path, what: str) -> None:
    before = tree(kit.store.root)
    path = tmp_path / what
    if what == "directory":
        path.mkdir()
    if what == "empty":
        path.touch()
    with pytest.raises((Refused, NotFound, OutOfRange)):
        import_file(kit, path, "raw")
    assert tree(kit.store.root) == before


# --- the collector, check, repair, merges ----------------------------------------------------------------------


@pytest.fixture
def two_clones(kit: Kit, tmp_path: Path) -> Kit:
    """The image debian (0, 5), and the volumes v and w made from it."""
    import_file(kit, source(tmp_path / "file"))
    for name in ("v", "w"):
        kit.create(name, source_image="debian", size=SizeRange())
    return kit


def test_marker_of_an_image_that_is_no_more_is_removed(two_clones: Kit) -> None:
    kit = two_clones
    layer_id = kit.image("debian").layer
    stale = f"i-{kit.image('debian').id}-00000000"
    kit.store.mark(layer_id, stale)
    assert kit.findings() == {"stale-marker"}
    kit.sweep_until_quiet()
    assert stale not in (kit.store.markers(layer_id) or [])
    assert records.image_marker(kit.image("debian")) in (kit.store.markers(layer_id) or [])
    assert kit.check() == []


def test_layer_of_an_image_that_has_lost_its_marker_is_kept(two_clones: Kit) -> None:
    kit = two_clones
    made = kit.image("debian")
    for name in ("v", "w"):
        kit.delete(name)
    kit.store.unmark(made.layer, records.image_marker(made))
    kit.sweep_until_quiet()
    assert kit.findings() == {"missing-marker"}
    repaired = repair.repair(kit.store, tools(), kit.check_image)
    assert [(done.action, done.done) for done in repaired.actions] == [("make-marker", True)]
    assert kit.layer_holds(made.layer, 0, 5)


def test_layers_above_an_image_are_merged_and_its_own_never_is(two_clones: Kit) -> None:
    kit = two_clones
    layer_id = kit.image("debian").layer
    kit.delete("w")
    for number in range(3):
        kit.write("v", number + 6, block=number + 2)
        kit.snapshot("s", of="v")
        kit.delete_snapshot("s")
        kit.sweep_until_quiet()
    assert set(kit.merge_all()) <= {"up", "down"}
    assert [layer.id for layer in kit.chain("v")[1:]] == [layer_id]
    assert kit.holds("v", 0, 5, 6, 7, 8)
    assert kit.layer_holds(layer_id, 0, 5, 0, 0, 0)
    assert kit.check() == []
    kit.remove_image("debian")
    kit.sweep_until_quiet()
    kit.merge_all()
    assert len(kit.chain("v")) == 1, "it is merged once nothing but the volume needs it"
    assert kit.holds("v", 0, 5, 6, 7, 8)
    assert kit.check() == []


@pytest.mark.parametrize("damaged", ["image", "job"])
def test_nothing_without_a_known_owner_goes_while_an_image_or_job_cannot_be_read(
    two_clones: Kit, impatient: None, damaged: str
) -> None:
    kit = two_clones
    garbage = add_garbage(kit)
    kit.store.mark(garbage, "c-" + "0" * 24)
    made = kit.image("debian")
    with holding(kit.store, "a test") as hold:
        if damaged == "image":
            path = Path(kit.store.root, "images", records.shard_of(made.id), f"{made.id}.json")
        else:
            path = Path(kit.store.job_record_path(hold.job.id))
        whole = path.read_bytes()
        path.write_bytes(whole[:50])
        collector.sweep(kit.store)
        assert kit.store.markers(garbage) == ["c-" + "0" * 24]
        assert "unreadable-record" in kit.findings()
        outcome = repair.repair(kit.store, tools(), kit.check_image)
        assert not any(action.done for action in outcome.actions)
        assert path.read_bytes() == whole[:50]
        path.write_bytes(whole)
    kit.sweep_until_quiet()
    assert kit.store.find_layer(garbage) is None
    assert kit.check() == []


def test_unfinished_image_on_which_a_volume_lies_can_be_undone(two_clones: Kit) -> None:
    kit = two_clones
    made = kit.image("debian")
    kit.store.swap(made, replace(made, state=ImageState.CREATING, unfinished=True))
    kit.sweep_until_quiet()
    assert kit.store.find_image(made.id) is None
    assert kit.holds("v", 0, 5)
    assert kit.check() == []


def test_damaged_image_can_be_removed(two_clones: Kit, impatient: None) -> None:
    kit = two_clones
    made = kit.image("debian")
    tear(kit, "images", made.id)
    kit.remove_image("debian")
    kit.sweep_until_quiet()
    assert kit.check() == []
    assert kit.holds("v", 0, 5)
    assert kit.store.markers(made.layer) == sorted(f"c-{kit.chain(name)[0].id}" for name in ("v", "w"))


def test_record_of_an_image_that_was_cut_off_behind_all_that_matters_is_rebuilt(
    two_clones: Kit, impatient: None
) -> None:
    kit = two_clones
    made = kit.image("debian")
    path = Path(kit.store.root, "images", records.shard_of(made.id), f"{made.id}.json")
    text = path.read_bytes()
    path.write_bytes(text[: text.index(b'"nonce"') + 5])
    repair.repair(kit.store, tools(), kit.check_image)
    assert replace(kit.image("debian"), generation=0, nonce="") == replace(made, generation=0, nonce="")
    assert kit.check() == []


@pytest.mark.parametrize("lost", [True, False])
def test_record_of_a_layer_of_an_image_is_rebuilt(two_clones: Kit, impatient: None, lost: bool) -> None:
    kit = two_clones
    before = kit.store.layer(kit.image("debian").layer)
    for name in ("v", "w"):
        kit.delete(name)
    kit.sweep_until_quiet()
    path = Path(kit.store.layer_record_path(before.id))
    path.unlink() if lost else path.write_bytes(b"")
    repair.repair(kit.store, tools(), kit.check_image)
    assert same(kit.store.layer(before.id), before)
    assert kit.check() == []


# --- jobs --------------------------------------------------------------------------------------------------------


def test_job_holds_what_it_reads(two_clones: Kit) -> None:
    kit = two_clones
    kit.write("v", 6, block=2)
    kit.snapshot("s", of="v")
    layer_id = kit.chain("v")[1].id
    kit.delete("w")
    with holding(kit.store, "a test") as hold:
        hold.change(replace(hold.job, layer=layer_id))
        kit.store.mark(layer_id, hold.marker)
        kit.delete_snapshot("s")
        kit.delete("v")
        kit.remove_image("debian")
        kit.sweep_until_quiet()
        assert kit.store.markers(layer_id) == [hold.marker]
        assert kit.layer_holds(layer_id, 0, 5, 6)
        assert not any(kit.merge(plan) for plan in kit.plans())
        assert kit.check() == []
        kit.store.unmark(layer_id, hold.marker)  # a marker that was lost is damage; the record keeps the layer
        kit.sweep_until_quiet()
        assert kit.layer_holds(layer_id, 0, 5, 6)
    kit.sweep_until_quiet()
    assert list(kit.store.layer_ids()) == []


def test_layers_that_a_job_reads_are_not_merged(two_clones: Kit) -> None:
    kit = two_clones
    kit.write("v", 6, block=2)
    kit.snapshot("s", of="v")
    layer_id = kit.chain("v")[1].id
    with holding(kit.store, "a test") as hold:
        hold.change(replace(hold.job, layer=layer_id))
        kit.store.mark(layer_id, hold.marker)
        kit.delete_snapshot("s")
        kit.sweep_until_quiet()
        assert kit.merge_all() == []
    assert kit.merge_all() == ["up"]
    assert kit.holds("v", 0, 5, 6)


def test_import_on_another_host_is_left_alone_until_it_is_not_renewed(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(kit.store.root)
    elsewhere = Elsewhere(str(kit.store.root))
    seen = []

    def watch(_: jobs.Progress) -> jobs.Answer:
        for _ in range(2):
            collector.sweep(elsewhere)
        seen.append(os.listdir(f"{kit.store.root}/tmp"))
        return "go on"

    request = ImportRequest(name="debian", format="qcow2", path=str(source(tmp_path / "file")))
    golden.import_image(kit.store, tools(), request, watch)
    assert seen
    assert all(seen)
    golden.remove_image(kit.store, "debian")
    # the same, but its record counts as not renewed for too long
    monkeypatch.setattr(store_module, "_JOB_S", -1.0)
    with pytest.raises((jobs.Stopped, Unavailable, Refused)):
        golden.import_image(kit.store, tools(), request, watch)
    assert kit.store.find_image(kit.image_id("debian")) is None
    kit.sweep_until_quiet()
    assert tree(kit.store.root) == before
    elsewhere.close()


def test_image_that_is_being_made_on_another_host_is_not_undone(kit: Kit, tmp_path: Path) -> None:
    elsewhere = Elsewhere(str(kit.store.root))
    made = import_file(kit, source(tmp_path / "file"))
    with holding(kit.store, "a test"):
        kit.store.swap(made, replace(made, state=ImageState.CREATING, unfinished=True))
        collector.sweep(elsewhere)
        assert kit.image("debian").state is ImageState.CREATING
    elsewhere.close()
    again = import_file(kit, tmp_path / "file")
    assert (again.id, again.uid == made.uid) == (made.id, False)
    kit.sweep_until_quiet()
    assert list(kit.store.layer_ids()) == [again.layer]
    assert kit.check() == []


def test_intent_on_an_image_that_was_imported_anew_is_begun_anew(kit: Kit, tmp_path: Path) -> None:
    import_file(kit, source(tmp_path / "file"))
    volume = kit.create("v", source_image="debian", size=SizeRange())
    kit.delete("v")
    old = kit.image("debian")
    kit.store.create(
        replace(volume, state=VolumeState.CREATING, unfinished=True, parent=old.layer, head=records.new_layer_id())
    )
    golden.remove_image(kit.store, "debian")
    import_file(kit, tmp_path / "file")
    kit.create("v", source_image="debian", size=SizeRange())
    assert kit.chain("v")[1].id == kit.image("debian").layer != old.layer
    kit.sweep_until_quiet()
    assert kit.check() == []


# --- overtaking each other -------------------------------------------------------------------------------------


class Beside:
    """Does something else, once, before the durable step of a number."""

    def __init__(self, at: int, work: Callable[[], object]) -> None:
        self._left = at
        self._work = work
        self.is_done = False

    def __call__(self, _: str, __: str) -> None:
        self._left -= 1
        if self._left == 0:
            self.is_done = True
            self._work()


def attempt(work: Callable[[], object]) -> None:
    """Do what may meet another call that is under way, or find that it has come too late."""
    with suppress(Busy, NotFound):
        work()


def check_volume(kit: Kit) -> None:
    """A volume that is there holds what the image held, and nothing else is left."""
    kit.sweep_until_quiet()
    assert kit.check() == []
    if kit.store.find_volume(kit.volume_id("v")):
        assert kit.holds("v", 0, 5)


@pytest.mark.parametrize("stopped", ["create", "remove", "import"])
def test_create_and_remove_and_collector_between_any_two_steps_of_each_other(
    kit: Kit, tmp_path: Path, stopped: str
) -> None:
    path, before = source(tmp_path / "file"), tree(kit.store.root)
    elsewhere = Elsewhere(str(kit.store.root))

    def create(on: Kit) -> None:
        on.create("v", source_image="debian", size=SizeRange())

    def remove_and_collect() -> None:
        attempt(lambda: kit.remove_image("debian"))
        attempt(lambda: collector.sweep(kit.store))

    def create_and_collect() -> None:
        attempt(lambda: create(kit))
        attempt(lambda: collector.sweep(kit.store))
        if kit.store.job_ids():  # the job's record keeps what no lock keeps there
            attempt(lambda: collector.sweep(elsewhere))

    for step in range(1 + SEED % EVERY, 1000, EVERY):
        if stopped != "import":
            import_file(kit, path)
        beside = Beside(step, remove_and_collect if stopped == "create" else create_and_collect)
        other = Kit(Store(kit.store.root, observer=beside))
        match stopped:
            case "create":
                attempt(lambda other=other: create(other))  # type: ignore[misc]
            case "remove":
                attempt(lambda other=other: other.remove_image("debian"))  # type: ignore[misc]
            case "import":
                import_file(other, path)  # nothing that happens meanwhile is in its way
        other.store.close()
        check_volume(kit)
        kit.delete_everything()
        assert tree(kit.store.root) == before, step
        if not beside.is_done:
            break
    assert step > EVERY
    elsewhere.close()


# --- the command line ------------------------------------------------------------------------------------------


def test_command_line_imports_lists_and_removes(kit: Kit, tmp_path: Path) -> None:
    path = source(tmp_path / "debian.qcow2")
    done = cli(kit, "image", "import", "main", "debian", path)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "done"
    assert events[0]["event"] == "progress"
    assert "debian" in cli(kit, "image", "ls").stdout
    assert json.loads(cli(kit, "image", "ls", "--json").stdout)["images"][0]["size_bytes"] == 10 * MIB
    assert cli(kit, "image", "import", "main", "debian", path).returncode == 1
    assert cli(kit, "image", "import", "main", "x", tmp_path / "file.img").returncode == 2
    assert cli(kit, "image", "import", "other", "x", path).returncode == 1
    assert cli(kit, "image", "rm", "main", "debian").returncode == 0
    kit.sweep_until_quiet()
    assert list(kit.store.layer_ids()) == []
    with path.open("rb") as file:
        done = cli(kit, "image", "import", "main", "piped", "-", "--source-format", "qcow2", stdin=file)
    assert done.returncode == 0, done.stderr
    assert kit.layer_holds(golden.list_images(kit.store)[0].layer, 0, 5, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_import_leaves_nothing(kit: Kit, number: signal.Signals) -> None:
    before = tree(kit.store.root)
    argv = _argv(kit, "image", "import", "main", "piped", "-", "--source-format", "raw")
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin
    process.stdin.write(b"x" * MIB)
    process.stdin.flush()
    deadline = time.monotonic() + 30
    while not (os.listdir(f"{kit.store.root}/jobs") and os.listdir(f"{kit.store.root}/tmp")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kit.sweep_until_quiet()  # the collector leaves it alone meanwhile
    assert os.listdir(f"{kit.store.root}/jobs")
    process.send_signal(number)
    process.wait(timeout=30)
    process.stdin.close()
    if number is signal.SIGKILL:
        kit.sweep_until_quiet()
    assert tree(kit.store.root) == before
    assert kit.check() == []


# --- files that are not whole, or not still --------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["qcow2", "vdi", "vpc", "vhdx"])
@pytest.mark.parametrize("missing", ["half", "the end"])
def test_file_that_is_cut_off_is_refused(kit: Kit, tmp_path: Path, image_format: str, missing: str) -> None:
    """Of qcow2 and vdi, QEMU reads what is beyond the end as zeros."""
    path, before = tmp_path / "file", tree(kit.store.root)
    options = ["-o", "force_size=on"] if image_format == "vpc" else []
    qemu("create", "-q", "-f", image_format, *options, path, "64M")
    disk = f'json:{{"driver": "{image_format}", "file": {{"driver": "file", "filename": "{path}"}}}}'
    qemu_io(disk, f"write -P 5 0 {16 * MIB}", read_only=False)
    length = path.stat().st_size
    os.truncate(path, length // 2 if missing == "half" else length - 3 * CLUSTER_BYTES)
    with pytest.raises(Refused):
        import_file(kit, path, image_format)
    assert tree(kit.store.root) == before


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes([9]) * MIB)


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-CLUSTER_BYTES, os.SEEK_END)
        file.write(bytes([9]) * CLUSTER_BYTES)


def exchange(path: Path) -> None:
    """By an image whose data are in another file of the host."""
    secret, evil = path.with_name("secret"), path.with_name("evil")
    secret.write_bytes(b"\x42" * (10 * MIB))
    qemu("create", "-q", "-f", "qcow2", "-o", f"data_file={evil}.data,data_file_raw=on", evil, "10M")
    Path(f"{evil}.data").unlink()
    Path(f"{evil}.data").symlink_to(secret)
    evil.rename(path)


@pytest.mark.parametrize("change", [grow, shrink, rewrite, exchange])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_file_that_changes_after_it_was_judged_is_refused(
    kit: Kit, tmp_path: Path, image_format: str, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = source(tmp_path / "file", image_format, size="10M"), tree(kit.store.root)
    right = jobs.copy_foreign

    def late(*arguments: Any, **named: Any) -> None:
        change(path)
        right(*arguments, **named)

    monkeypatch.setattr(jobs, "copy_foreign", late)
    with pytest.raises((Refused, Unavailable)):
        import_file(kit, path, image_format)
    assert tree(kit.store.root) == before
