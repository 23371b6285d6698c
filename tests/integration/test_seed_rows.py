"""The measured ways in which another driver for the same file system failed, each with a test named after its row.

Each test does what breaks that way of doing it and shows that it holds here. Next to it, where it is cheap, the other
way is done with the same qemu-img and fails the same assertion: so the test is known to be able to fail. The table of
all rows, also of those that are proved elsewhere, is in docs/guarantees.md.
"""

import json
import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from controller_kit import BLOCK_BYTES, QEMU_DIR, SIZE_BYTES, Kit, qemu_io, tree

from csi_quobyte.errors import Busy, DriverError, InvalidArgument
from csi_quobyte.pool import qcow2, records
from csi_quobyte.pool.sizes import MIB, SizeRange
from csi_quobyte.pool.store import Store
from csi_quobyte.rpc import parameters

_ROUNDS = 15


def qemu_img(*arguments: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run qemu-img as the other driver does; `ok` says whether it has to succeed."""
    argv = [f"{QEMU_DIR}/qemu-img", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) is ok, done
    return done


def virtual_size(path: Path, image_format: str) -> int:
    found = qemu_img("info", "-U", "-f", image_format, "--output=json", path)
    return int(json.loads(found.stdout)["virtual-size"])


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def image_of(kit: Kit, name: str, position: int = 0) -> Path:
    return Path(kit.store.image_path(kit.chain(name)[position]))


def is_private(path: Path) -> bool:
    return stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_S12_files_are_private_whatever_the_umask(kit: Kit, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        kit.create("v", image_format="raw")
        kit.snapshot("s", of="v")
        kit.create("restored", source=kit.from_snapshot("s"))
        kit.expand("v", 2 * SIZE_BYTES)
        others = tmp_path / "volume-1"
        qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", others, str(SIZE_BYTES))
        others.chmod(others.stat().st_mode | 0o666)
    finally:
        os.umask(before)
    made = [path for name in ("volumes", "snapshots", "layers") for path in Path(kit.store.root, name).rglob("*")]
    assert [path for path in made if not is_private(path)] == []
    assert not is_private(others)


def read_whole(path: Path) -> bool:
    """Say whether a record can be read at this moment."""
    with suppress(ValueError):
        return bool(json.loads(path.read_bytes()))
    return False


def test_S14_record_is_whole_at_every_step_of_its_change(kit: Kit, tmp_path: Path) -> None:
    volume = kit.create("v")
    path = next(Path(kit.store.root, "volumes").glob(f"*/{volume.id}.json"))
    seen: list[bool] = []
    watched = Kit(Store(kit.store.root, observer=lambda *_: seen.append(read_whole(path))))
    for _ in range(3):
        watched.attach("v")
        watched.detach("v")
    watched.store.close()
    assert len(seen) > 10
    assert all(seen)
    others = tmp_path / "volume-1.info"
    others.write_text(json.dumps({"active": "volume-1"}))
    with others.open("w") as file:  # what is there when it is killed here
        assert not read_whole(others)
        file.write("{}")


def test_S14_torn_record_keeps_nobody_from_deleting(kit: Kit) -> None:
    as_new = tree(kit.store.root)
    volume = kit.create("v")
    next(Path(kit.store.root, "volumes").glob(f"*/{volume.id}.json")).write_text("{")
    kit.delete("v")
    kit.sweep_until_quiet()
    assert tree(kit.store.root) == as_new
    kit.create("v")


def test_S15_create_of_what_exists_keeps_its_contents(kit: Kit, tmp_path: Path) -> None:
    kit.create("v")
    kit.write("v", 7)
    kit.create("v")
    again = Kit(Store(kit.store.root))  # a controller that was started again
    again.create("v")
    assert again.holds("v", 7)
    again.store.close()
    others = tmp_path / "volume-1"
    for _ in range(2):
        qemu_img("create", "-q", "-f", "qcow2", others, str(SIZE_BYTES))
        held = qemu_io(str(others), f"read -P 7 0 {BLOCK_BYTES}", read_only=True) == 0
        qemu_io(str(others), f"write -P 7 0 {BLOCK_BYTES}", read_only=False)
    assert not held


def test_S22_deleted_volume_leaves_none_of_its_overlays(kit: Kit, tmp_path: Path) -> None:
    as_new = tree(kit.store.root)
    kit.create("v")
    for number in range(3):
        kit.write("v", number + 1)
        kit.snapshot(f"s{number}", of="v")
    kit.delete("v")
    for number in (1, 0, 2):
        kit.delete_snapshot(f"s{number}")
    kit.sweep_until_quiet()
    assert tree(kit.store.root) == as_new
    base, overlay = tmp_path / "volume-1", tmp_path / "volume-1.s"
    qemu_img("create", "-q", "-f", "qcow2", base, str(SIZE_BYTES))
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.name, overlay)
    overlay.unlink()  # a delete there removes the active file
    assert base.exists()


def put_header(path: Path, canary: Path) -> None:
    """Write what a pod may write at the beginning of its raw disk: a qcow2 header that keeps its data elsewhere."""
    header = path.with_name("header.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={canary},data_file_raw=on", header, str(SIZE_BYTES))
    data = header.read_bytes()
    with path.open("r+b") as file:
        file.write(data)
    header.unlink()


def test_S24_bytes_of_a_guest_never_decide_the_format_at_a_resize(kit: Kit, tmp_path: Path) -> None:
    canary, others = tmp_path / "canary", tmp_path / "volume-1"
    kit.create("v", image_format="raw")
    image = image_of(kit, "v")
    put_header(image, canary)
    canary.write_bytes(b"mine")
    kit.expand("v", 2 * SIZE_BYTES)
    head = kit.chain("v")[0]
    kit.store.grow_raw_image(head, 2 * SIZE_BYTES)  # what a stage does after an expansion
    assert image.stat().st_size == 2 * SIZE_BYTES
    assert canary.read_bytes() == b"mine"
    others.write_bytes(image.read_bytes())
    put_header(others, canary)
    canary.write_bytes(b"mine")
    with others.open("r+b") as file:
        file.truncate(2 * SIZE_BYTES)
    qemu_img("resize", "-q", others, str(2 * SIZE_BYTES))  # without -f, it goes by the bytes
    assert canary.read_bytes() != b"mine"


def at_once(*works: Callable[[], object]) -> None:
    """Do things at the same moment, each again while it is Busy."""
    start = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        start.wait()
        while True:
            try:
                work()
            except Busy:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            else:
                return

    with ThreadPoolExecutor(len(works)) as threads:
        for done in [threads.submit(run, work) for work in works]:
            done.result(60)


def test_S34_snapshot_that_is_made_beside_a_delete_is_not_lost(kit: Kit, tmp_path: Path) -> None:
    kit.create("v")
    kit.snapshot("old-0", of="v")
    for number in range(_ROUNDS):
        kit.write("v", number + 1)
        at_once(
            lambda number=number: kit.snapshot(f"new-{number}", of="v"),  # type: ignore[misc]
            lambda number=number: kit.delete_snapshot(f"old-{number}"),  # type: ignore[misc]
        )
        assert kit.snapshot_holds(f"new-{number}", number + 1)
        kit.snapshot(f"old-{number + 1}", of="v")
    kit.sweep_until_quiet()
    assert len(list(kit.store.snapshot_ids())) == _ROUNDS + 1
    assert [finding for finding in kit.check() if finding.severity == "error"] == []

    info = tmp_path / "volume-1.info"
    info.write_text(json.dumps({"active": "a", "old": "b"}))
    read = threading.Barrier(2)

    def change(edit: Callable[[dict[str, str]], object]) -> None:
        """Read, change and write one file, as two operations do there that hold different locks."""
        text = json.loads(info.read_text())
        read.wait()
        edit(text)
        info.write_text(json.dumps(text))

    made = threading.Thread(target=change, args=(lambda text: text.update(new="c"),))
    made.start()
    change(lambda text: text.pop("old"))
    made.join()
    assert info.read_text() != json.dumps({"active": "a", "new": "c"})  # one of the two changes is lost, or both


def test_S35_snapshot_whose_file_is_missing_can_be_deleted(kit: Kit, tmp_path: Path) -> None:
    as_new = tree(kit.store.root)
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.write("v", 2)
    kit.snapshot("t", of="v")
    image_of(kit, "v", 1).unlink()
    kit.delete_snapshot("t")
    kit.delete_snapshot("s")
    kit.delete("v")
    kit.sweep_until_quiet()
    assert tree(kit.store.root) == as_new
    base, overlay, active = (tmp_path / name for name in ("volume-1", "volume-1.s", "volume-1.t"))
    qemu_img("create", "-q", "-f", "qcow2", base, str(SIZE_BYTES))
    for path, backing in ((overlay, base), (active, overlay)):
        qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing.name, path)
    overlay.unlink()
    qemu_img("commit", "-f", "qcow2", overlay, ok=False)  # its delete of a snapshot in the middle
    qemu_img("rebase", "-f", "qcow2", "-F", "qcow2", "-b", base.name, active, ok=False)


@contextmanager
def held(kit: Kit, name: str) -> Iterator[None]:
    """Be in the middle of a long operation on a volume, in another process."""
    other = Store(kit.store.root)
    with other.lock(kit.volume_id(name)):
        yield
    other.close()


def test_S36_long_operation_of_one_volume_holds_up_no_other(kit: Kit) -> None:
    for name in ("long", "v", "going"):
        kit.create(name)
    kit.write("v", 1)
    with held(kit, "long"):
        with pytest.raises(Busy):
            kit.snapshot("in the way", of="long")
        kit.create("new")
        kit.snapshot("s", of="v")
        kit.create("clone", source=kit.from_volume("v"))
        kit.expand("v", 2 * SIZE_BYTES)
        kit.attach("v")
        kit.detach("v")
        kit.delete_snapshot("s")
        kit.delete("going")
    assert kit.holds("clone", 1)


def test_S51_attach_does_not_wait_for_a_copy_of_another_volume(kit: Kit) -> None:
    """A merge, the longest work there is, goes on in the same controller meanwhile."""
    kit.create("busy", size=SizeRange(64 * MIB))
    kit.write("busy", 1)
    kit.snapshot("s", of="busy")
    kit.write("busy", 9)
    kit.delete_snapshot("s")
    kit.create("v")
    (plan,) = kit.plans()
    at_work, may_end, attached = threading.Event(), threading.Event(), []

    def may_go_on() -> bool:
        at_work.set()
        assert may_end.wait(30)
        return True

    merge = threading.Thread(target=kit.merge, args=(plan, may_go_on))
    merge.start()
    try:
        assert at_work.wait(30)
        attached.append(kit.attach("v"))
        assert not may_end.is_set()
    finally:
        may_end.set()
        merge.join(60)
    assert attached
    assert len(kit.chain("busy")) == 1


def test_S43_middle_snapshot_of_a_volume_with_children_can_be_deleted_and_nothing_leaks(kit: Kit) -> None:
    as_new = tree(kit.store.root)
    kit.create("base")
    kit.write("base", 1)
    kit.snapshot("image", of="base")
    kit.create("v", source=kit.from_snapshot("image"))
    for number in range(3):
        kit.write("v", number + 2, block=number + 1)
        kit.snapshot(f"s{number}", of="v")
        kit.create(f"child-{number}", source=kit.from_snapshot(f"s{number}"))
    kit.delete_snapshot("s1")
    kit.delete_snapshot("image")
    kit.delete("base")
    kit.merge_all()
    assert kit.holds("child-1", 1, 2, 3)
    assert kit.holds("v", 1, 2, 3, 4)
    references = sum(len(kit.store.markers(layer_id) or []) for layer_id in kit.store.layer_ids())
    layers = list(kit.store.layer_ids())
    needed = sum(kit.store.layer(layer_id).parent is not None for layer_id in layers)
    assert references == needed + len(list(kit.store.volume_ids())) + len(list(kit.store.snapshot_ids()))
    kit.delete_everything()
    Path(kit.store.root, "collector.json").unlink(missing_ok=True)
    assert tree(kit.store.root) == as_new


@pytest.mark.parametrize("mode", ["overlay", "cache", "copy"])
@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_S44_larger_size_is_honoured_and_stays_thin(kit: Kit, tmp_path: Path, image_format: str, mode: str) -> None:
    kit.create("v", image_format=image_format)
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    for name, source in (("restored", kit.from_snapshot("s")), ("cloned", kit.from_volume("v"))):
        if mode == "cache" and source.kind == "volume":
            continue
        volume = kit.create(name, source=source, size=SizeRange(64 * MIB), clone_mode=mode)
        image = image_of(kit, name)
        assert (volume.size_bytes, virtual_size(image, "qcow2")) == (64 * MIB, 64 * MIB)
        assert allocated(image) < 2 * MIB
        assert kit.holds(name, 1, 0)
    source_image, copied = image_of(kit, "v", -1), tmp_path / "volume-1"
    qemu_img("convert", "-f", image_format, "-O", "raw", source_image, copied)
    assert virtual_size(copied, "raw") != 64 * MIB  # nobody there grows it
    with copied.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 64 * MIB)  # what becomes of its copies in the cache
    assert allocated(copied) >= 64 * MIB


@pytest.mark.parametrize("mode", ["overlay", "cache", "copy"])
def test_S45_half_made_image_is_never_taken_for_a_whole_one(
    kit: Kit, impatient: None, tmp_path: Path, mode: str
) -> None:
    """A controller dies in the middle of writing an image; what it has written has no name that means anything."""
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")

    class Killed(Exception):
        pass

    for last in range(1, 60, 4):
        steps = 0

        def die(step: str, path: str, last: int = last) -> None:
            nonlocal steps
            steps += 1
            if steps >= last:
                raise Killed

        dying = Kit(Store(kit.store.root, observer=die))
        try:
            dying.create("restored", source=kit.from_snapshot("s"), clone_mode=mode)
        except Killed:
            pass
        else:
            break
        finally:
            dying.store.close()
        for path in Path(kit.store.root, "layers").glob("*/*.qcow2"):
            header = qcow2.decode_header(path.read_bytes()[: qcow2.HEADER_READ_BYTES])
            assert (header.size_bytes, path.stat().st_size >= 4 * qcow2.CLUSTER_BYTES) == (SIZE_BYTES, True)
        at_once(lambda: kit.create("restored", source=kit.from_snapshot("s"), clone_mode=mode))
        assert kit.holds("restored", 1)
        at_once(lambda: kit.delete("restored"))
    assert last > 12
    whole, torn = tmp_path / "whole", tmp_path / "cache-entry"
    qemu_img("create", "-q", "-f", "raw", whole, str(SIZE_BYTES))
    qemu_io(str(whole), f"write -P 1 0 {SIZE_BYTES}", read_only=False)
    torn.write_bytes(whole.read_bytes()[: SIZE_BYTES // 2])
    assert torn.exists()  # all that is asked there
    assert virtual_size(torn, "raw") != SIZE_BYTES


def magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def test_S47_recorded_format_of_a_clone_is_that_of_its_file(kit: Kit, tmp_path: Path) -> None:
    kit.create("v", image_format="raw")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.create("restored", source=kit.from_snapshot("s"))
    kit.create("cloned", source=kit.from_volume("v"))
    kit.create("copied", source=kit.from_volume("cloned"), clone_mode="copy", image_format="raw")
    for name in ("v", "restored", "cloned", "copied"):
        for layer in kit.chain(name):
            assert (layer.format == "qcow2") == (magic(Path(kit.store.image_path(layer))) == b"QFI\xfb"), layer
        assert kit.holds(name, 1)
    base, overlay = tmp_path / "volume-1", tmp_path / "volume-2"
    qemu_img("create", "-q", "-f", "raw", base, str(SIZE_BYTES))
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.name, overlay)
    assert virtual_size(overlay, "raw") != SIZE_BYTES  # with the format that the source's metadata say
    assert virtual_size(overlay, "qcow2") == SIZE_BYTES


def test_S52_lost_node_has_no_right_left_when_another_one_has_the_volume(kit: Kit) -> None:
    """Of the attachment; that its daemon is ended, too, is proved in test_interleavings and test_node_faults."""
    kit.create("v")
    kit.add_node("node-2")
    lost = kit.attach("v")
    kit.detach("v")  # by force: the node does not answer
    new = kit.attach("v", node="node-2")
    assert new.generation > lost.generation
    volume = kit.store.volume(kit.volume_id("v"))
    assert [(one.node, one.generation) for one in volume.attachments] == [("node-2", new.generation)]
    kit.store.put_content(volume, records.Content(state="raw", generation=new.generation))
    with pytest.raises(DriverError, match="later attachment"):
        kit.store.put_content(volume, records.Content(state="formatted", filesystem="ext4", generation=lost.generation))


@pytest.mark.parametrize("key", ["encrypted", "encryption", "luks"])
def test_S56_encryption_is_refused_and_not_silently_left_out(key: str) -> None:
    with pytest.raises(InvalidArgument, match=key):
        parameters.volume_parameters({key: "true", "pool": "main"})


def test_S56_encrypted_image_is_refused(kit: Kit) -> None:
    """What a volume of an encrypted golden image would be: its header asks for a key that nobody has."""
    kit.create("v")
    image = image_of(kit, "v")
    image.unlink()
    secret = ["--object", "secret,id=s,data=key"]
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", options, image, str(SIZE_BYTES))
    for attempt in (
        lambda: kit.snapshot("s", of="v"),
        lambda: kit.create("clone", source=kit.from_volume("v")),
    ):
        with pytest.raises(DriverError, match=r"crypt|encryption"):
            attempt()
    assert {finding.kind for finding in kit.check() if finding.severity == "error"} == {"damaged-image"}
