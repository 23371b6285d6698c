"""Export: what it writes, what it holds meanwhile, and what is left when anything ends it.

Axes: the source (volume, snapshot, clone, golden image, grown, copied), the format of the file, the moment at which it
ends, and what happens to the source while it is read.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from controller_kit import OWNER, QEMU_DIR, SIZE_BYTES, Elsewhere, Kit, qemu_io, tools, tree, write_disk
from merging_kit import begin, two_layers
from running import qemu_img
from test_crash_steps import EVERY, SEED, Runner

from csi_quobyte.engine import collector, hold
from csi_quobyte.errors import AlreadyExists, Busy, DriverError, Exhausted, NotFound, Refused, Unavailable
from csi_quobyte.host import jobs
from csi_quobyte.host import qemu_img as product
from csi_quobyte.host.qemu import ImageFormat, ImageLayer
from csi_quobyte.operations import exporting
from csi_quobyte.operations.exporting import ExportRequest
from csi_quobyte.pool import store as store_module
from csi_quobyte.pool.layout import initialise
from csi_quobyte.pool.records import Content, Modes
from csi_quobyte.pool.sizes import MIB, SizeRange
from csi_quobyte.pool.steps import Observer
from csi_quobyte.pool.store import Store
from lab.machine import wait_for

DEADLINE_S = 60.0
CLUSTER_BYTES = 64 * 1024


def go_on(_: jobs.Progress) -> jobs.Answer:
    return "go on"


def export(
    kit: Kit,
    path: Path,
    name: str = "v",
    image_format: ImageFormat = "qcow2",
    *,
    snapshot: str = "",
    may_replace: bool = False,
    watch: jobs.Watch = go_on,
) -> int:
    request = ExportRequest(
        kit.volume_id(name),
        str(path),
        image_format,
        snapshot=kit.snapshot_id(snapshot) if snapshot else "",
        replace=may_replace,
    )
    return exporting.export(kit.store, tools(), request, watch)


def chain_of(kit: Kit, name: str = "v") -> list[ImageLayer]:
    return [ImageLayer(one.id, kit.store.image_path(one), one.format) for one in reversed(kit.chain(name))]


def is_same(kit: Kit, path: Path, name: str = "v", image_format: ImageFormat = "qcow2") -> bool:
    """Say whether a file shows what a volume shows, byte for byte, and what is beyond it zero."""
    return product.compare(tools(), chain_of(kit, name), [ImageLayer("file", str(path), image_format)])


def holds(path: Path, image_format: ImageFormat, *patterns: int) -> bool:
    disk = f'json:{{"driver": "{image_format}", "file": {{"driver": "file", "filename": "{path}"}}}}'
    script = [f"read -P {pattern} {at * CLUSTER_BYTES} {CLUSTER_BYTES}" for at, pattern in enumerate(patterns)]
    return all(qemu_io(disk, line, read_only=True) == 0 for line in script)


def fill(kit: Kit, name: str, length_bytes: int) -> None:
    """Write so much into the head of a volume."""
    disk = write_disk(kit.store, kit.store.volume(kit.volume_id(name)).head)
    qemu_io(disk, f"write -P 4 0 {length_bytes}", read_only=False)


def described(path: Path, image_format: str) -> dict[str, object]:
    found = subprocess.run(
        [f"{QEMU_DIR}/qemu-img", "info", "--output=json", "-f", image_format, path],
        check=True,
        capture_output=True,
        timeout=30,
    )
    info: dict[str, object] = json.loads(found.stdout)
    return info


@pytest.fixture
def out(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    return made


@pytest.fixture
def written(kit: Kit) -> Kit:
    """A volume v: 1 2 3 in three layers, of which snapshot s shows 1 2."""
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("first", of="v")
    kit.write("v", 2, block=1)
    kit.snapshot("s", of="v")
    kit.write("v", 3, block=2)
    return kit


def is_left_clean(kit: Kit) -> bool:
    """Say whether nothing of an export is in the pool, and `check` finds nothing."""
    kit.sweep_until_quiet()
    return kit.check() == [] and os.listdir(f"{kit.store.root}/jobs") == os.listdir(f"{kit.store.root}/tmp") == []


# --- what it writes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_volume_and_its_snapshots(written: Kit, out: Path, image_format: ImageFormat) -> None:
    size_bytes = export(written, out / "now", image_format=image_format)
    assert size_bytes == SIZE_BYTES
    assert is_same(written, out / "now", image_format=image_format)
    assert holds(out / "now", image_format, 1, 2, 3)
    export(written, out / "then", image_format=image_format, snapshot="s")
    assert holds(out / "then", image_format, 1, 2, 0)
    export(written, out / "before", image_format=image_format, snapshot="first")
    assert holds(out / "before", image_format, 1, 0, 0)
    for path in out.iterdir():
        info = described(path, image_format)
        assert "backing-filename" not in info
        assert info["virtual-size"] == SIZE_BYTES
        assert path.stat().st_blocks * 512 < 2 * MIB, "sparse"
        assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(out)) == ["before", "now", "then"]
    assert len(list(written.store.snapshot_ids())) == 2
    assert is_left_clean(written)


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_volumes_of_every_origin(written: Kit, out: Path, image_format: ImageFormat) -> None:
    kit = written
    kit.expand("v", SIZE_BYTES + 64 * MIB)
    kit.create("clone", source=kit.from_volume("v"), size=SizeRange(SIZE_BYTES + 128 * MIB))
    kit.create("copy", source=kit.from_snapshot("s"), clone_mode="copy", image_format="raw")
    kit.create("cached", source=kit.from_snapshot("s"), clone_mode="cache")
    kit.create("blank")
    qemu_img("create", "-q", "-f", "raw", out / "golden.raw", str(8 * MIB))
    qemu_io(f"json:{{\"driver\": \"raw\", \"file\": {{\"driver\": \"file\", \"filename\": \"{out}/golden.raw\"}}}}",
            f"write -P 9 0 {CLUSTER_BYTES}", read_only=False)  # fmt: skip
    kit.import_image("golden", out / "golden.raw", "raw")
    kit.create("of image", source_image="golden", size=SizeRange())
    for name in ("v", "clone", "copy", "cached", "blank", "of image"):
        volume = kit.store.volume(kit.volume_id(name))
        assert export(kit, out / "file", name, image_format, may_replace=True) == volume.size_bytes
        assert described(out / "file", image_format)["virtual-size"] == volume.size_bytes
        assert is_same(kit, out / "file", name, image_format), name
    assert is_left_clean(kit)


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_what_was_exported_and_is_imported_is_the_same(written: Kit, out: Path, image_format: ImageFormat) -> None:
    export(written, out / "file", image_format=image_format)
    written.import_image("back", out / "file", image_format)
    written.create("w", source_image="back", size=SizeRange())
    assert product.compare(tools(), chain_of(written, "v"), chain_of(written, "w"))
    assert is_left_clean(written)


# --- what is refused, and leaves nothing -----------------------------------------------------------------------


def test_attached_volume_is_refused_and_its_snapshot_is_not(written: Kit, out: Path) -> None:
    written.attach("v")
    before = tree(written.store.root)
    with pytest.raises(Refused, match="attached"):
        export(written, out / "file")
    assert tree(written.store.root) == before
    export(written, out / "file", snapshot="s")
    assert holds(out / "file", "qcow2", 1, 2, 0)
    assert tree(written.store.root) == before


def test_what_only_a_stage_may_repair_is_refused(written: Kit, out: Path) -> None:
    """An image has no note beside it: whoever gets it could not know that e2fsck may decide all by itself."""
    growing = Content(state="formatted", filesystem="ext4", generation=1, growing=True)
    written.store.put_content(written.store.volume(written.volume_id("v")), growing)
    written.snapshot("later", of="v")
    before = tree(written.store.root)
    for snapshot in ("", "later"):
        with pytest.raises(Refused, match="being grown"):
            export(written, out / "file", snapshot=snapshot)
        assert tree(written.store.root) == before
    assert not list(out.iterdir())
    export(written, out / "file", snapshot="s")


def test_what_is_not_there_is_named(written: Kit, out: Path) -> None:
    before = tree(written.store.root)
    written.create("other")
    after = tree(written.store.root)
    for error, attempt in {
        "no volume": lambda: export(written, out / "f", "unknown"),
        "no snapshot": lambda: export(written, out / "f", snapshot="unknown"),
        "one of volume": lambda: export(written, out / "f", "other", snapshot="s"),
        "no directory": lambda: export(written, out / "nowhere" / "f"),
    }.items():
        with pytest.raises(NotFound) as raised:
            attempt()
        assert error in str(raised.value) or "does not exist" in str(raised.value)
        assert tree(written.store.root) == after
    assert before != after
    assert os.listdir(out) == []


def test_target_is_a_new_plain_file_outside_of_any_pool(written: Kit, out: Path, tmp_path: Path) -> None:
    before = tree(written.store.root)
    other = tmp_path / "other"
    other.mkdir()
    initialise(str(other), owner=OWNER, modes=Modes())
    (out / "file").write_bytes(b"mine")
    (out / "link").symlink_to(out / "file")
    (out / "pool").symlink_to(written.store.root)
    with pytest.raises(AlreadyExists):
        export(written, out / "file")
    for target in (
        out / "link",
        out,
        Path("/dev/null"),
        out / "pool" / "file",
        Path(written.store.root, "tmp", "file"),
        other / "file",
        other / "jobs" / "file",
    ):
        with pytest.raises(Refused):
            export(written, target, may_replace=True)
    assert tree(written.store.root) == before
    assert (out / "file").read_bytes() == b"mine"
    export(written, out / "file", may_replace=True)
    assert is_same(written, out / "file")
    assert sorted(os.listdir(out)) == ["file", "link", "pool"]


def test_name_that_may_not_be_durable_is_said(written: Kit, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is there all the same: nothing else may say that it is not."""
    fsync = os.fsync

    def fails(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") == str(out):
            raise OSError(errno.EIO, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(exporting.os, "fsync", fails)
    with pytest.raises(Unavailable, match="is there and whole"):
        export(written, out / "file")
    assert is_same(written, out / "file")
    assert os.listdir(out) == ["file"]


def test_file_that_appears_meanwhile_is_not_replaced(written: Kit, out: Path) -> None:
    def watch(_: jobs.Progress) -> jobs.Answer:
        (out / "file").write_bytes(b"mine")
        return "go on"

    with pytest.raises(AlreadyExists):
        export(written, out / "file", watch=watch)
    assert (out / "file").read_bytes() == b"mine"
    assert os.listdir(out) == ["file"]
    assert is_left_clean(written)


@pytest.mark.root
@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_target_that_is_full(kit: Kit, tmp_path: Path, image_format: ImageFormat) -> None:
    small = tmp_path / "small"
    small.mkdir()
    kit.create("v", size=SizeRange(32 * MIB))
    fill(kit, "v", 32 * MIB)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", small], check=True, timeout=30)
    try:
        with pytest.raises(Exhausted, match="no space"):
            export(kit, small / "file", image_format=image_format)
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=True, timeout=30)
    assert list(kit.store.snapshot_ids()) == []
    assert is_left_clean(kit)


def test_watch_that_says_stop(written: Kit, out: Path) -> None:
    with pytest.raises(jobs.Stopped):
        export(written, out / "file", watch=lambda _: "stop")
    assert os.listdir(out) == []
    assert is_left_clean(written)


# --- what happens to the source meanwhile ----------------------------------------------------------------------


class Once:
    """A watch that does something when it is asked for the first time."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work: Callable[[], object] | None = work

    def __call__(self, _: jobs.Progress) -> jobs.Answer:
        work, self._work = self._work, None
        if work:
            work()
        return "go on"

    @property
    def is_done(self) -> bool:
        return self._work is None


@pytest.mark.parametrize("snapshot", ["", "s"])
def test_source_deleted_and_collected_and_merged_meanwhile(written: Kit, out: Path, snapshot: str) -> None:
    def give_up_everything() -> None:
        for name in ("first", "s"):
            written.delete_snapshot(name)
        written.delete("v")
        written.sweep_until_quiet()
        assert not any(written.merge(plan) for plan in written.plans())
        assert [one for one in written.check() if one.kind != "unfinished"] == []

    once = Once(give_up_everything)
    export(written, out / "file", snapshot=snapshot, watch=once)
    assert once.is_done
    assert holds(out / "file", "qcow2", 1, 2, 0 if snapshot else 3)
    assert is_left_clean(written)
    assert list(written.store.layer_ids()) == [], "freed once the export has ended"


def test_volume_that_is_attached_and_written_meanwhile(written: Kit, out: Path) -> None:
    once = Once(lambda: (written.attach("v"), written.write("v", 7)))
    export(written, out / "file", watch=once)
    assert once.is_done
    assert holds(out / "file", "qcow2", 1, 2, 3)
    written.detach("v")
    assert written.holds("v", 7, 2, 3)


def test_merge_below_is_waited_for(kit: Kit, out: Path) -> None:
    plan = two_layers(kit)
    begin(kit, plan)
    seen: list[jobs.Progress] = []

    def watch(progress: jobs.Progress) -> jobs.Answer:
        if not seen:
            assert kit.end_merges(), "what has only been noted is given up"
        seen.append(progress)
        return "go on"

    export(kit, out / "file", watch=watch)
    assert seen
    assert holds(out / "file", "qcow2", 1, 2, 0)
    assert is_left_clean(kit)


def test_merge_that_does_not_end_is_said(kit: Kit, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "PATIENCE_S", 0.1)
    begin(kit, two_layers(kit))
    with pytest.raises(Busy, match="being merged"):
        export(kit, out / "file")
    assert os.listdir(out) == []


def test_hold_that_was_lost_is_noticed_before_the_file_has_its_name(written: Kit, out: Path) -> None:
    def lose() -> None:
        (job_id,) = written.store.job_ids()
        job = written.store.find_job(job_id)
        assert job
        written.store.swap(job, replace(job, what="ended by somebody else"))

    with pytest.raises(jobs.Stopped):
        export(written, out / "file", watch=Once(lose))
    assert os.listdir(out) == []


def test_snapshot_that_is_taken_after_the_job_was_ended_is_found_and_goes(written: Kit) -> None:
    """Its process was stopped for ten minutes, another host has ended its job, it goes on for a moment and dies."""
    with hold.holding(written.store, "export") as held:
        name = held.snapshot_name
        written.store.remove(held.job)
        written.snapshot(name, of="v")
        with pytest.raises(Busy):
            held.change(replace(held.job, layer="0" * 24))
        written.store.note_over(held.job)  # the block ends as by death: it finds nothing to end
        assert written.store.find_snapshot(written.snapshot_id(name))
        assert [finding.kind for finding in written.check()] == ["unfinished"]
        written.sweep_until_quiet()
        assert written.store.find_snapshot(written.snapshot_id(name)) is None
    assert is_left_clean(written)


def test_renewal_that_was_made_and_failed_does_not_end_the_hold(written: Kit) -> None:
    """The record was renamed, the fsync behind that failed once, as by a lost connection."""
    right = written.store.swap
    failed: list[Any] = []

    def swap(old: Any, new: Any) -> Any:
        made = right(old, new)
        if not failed:
            failed.append(made)
            raise Unavailable("lost for a moment")
        return made

    written.store.swap = swap  # type: ignore[method-assign]
    with hold.holding(written.store, "export") as held:
        with pytest.raises(jobs.Stopped):
            held.confirm()
        held.confirm()
        right(held.job, held.job)  # somebody ends it
        with pytest.raises(jobs.Stopped):
            held.confirm()
        with pytest.raises(jobs.Stopped):
            held.confirm()
    assert failed


def test_two_exports_of_one_volume_at_once(written: Kit, out: Path) -> None:
    failed: list[DriverError] = []

    def run(path: Path) -> None:
        for _ in range(100):
            try:
                export(written, path)
            except Busy:
                continue
            except DriverError as error:
                failed.append(error)
            return

    threads = [Thread(target=run, args=(out / f"file-{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert failed == []
    for number in range(3):
        assert holds(out / f"file-{number}", "qcow2", 1, 2, 3)
    assert is_left_clean(written)


# --- what ends it ----------------------------------------------------------------------------------------------


def argv(kit: Kit, *arguments: str | Path, qemu_dir: str | Path = QEMU_DIR) -> list[str]:
    pool = ["--pool", f"main={kit.store.root}", "--require-mount", "any", "--qemu-dir", str(qemu_dir)]
    return [sys.executable, "-m", "csi_quobyte", "export", *map(str, arguments), *pool]


@contextmanager
def killer(kit: Kit, number: int) -> Iterator[Observer]:
    """An observer that lets the process die before its n-th durable step."""
    left = number

    def observe(_: str, __: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    yield observe


def test_killed_before_any_step(written: Kit, out: Path) -> None:
    """The collector frees what is held, the snapshot is gone, and the next export to the same file cleans up there."""
    kills = 0
    for step in range(1 + SEED % EVERY, 1000, EVERY):
        child = os.fork()
        if child == 0:
            try:
                with killer(written, step) as observer:
                    kit = Kit(Store(written.store.root, observer=observer))
                    export(kit, out / "file")
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        was_killed = os.WIFSIGNALED(status)
        kills += was_killed
        Runner.total += was_killed
        written.sweep_until_quiet()
        assert written.errors() == [], step
        assert len(list(written.store.snapshot_ids())) == 2, step
        assert os.listdir(f"{written.store.root}/jobs") == [], step
        assert written.holds("v", 1, 2, 3), step
        export(written, out / "file", may_replace=True)
        assert os.listdir(out) == ["file"], step
        assert holds(out / "file", "qcow2", 1, 2, 3), step
        written.merge_all()
        (out / "file").unlink()
        if not was_killed:
            break
    assert kills
    assert is_left_clean(written)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_command_that_is_interrupted_leaves_nothing(written: Kit, out: Path, number: signal.Signals) -> None:
    written.expand("v", 256 * MIB)
    written.grow_image("v")
    fill(written, "v", 256 * MIB)
    snapshots = list(written.store.snapshot_ids())
    process = subprocess.Popen(argv(written, "v", out / "file.raw"), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert json.loads(process.stdout.readline())["event"] == "progress"
    process.send_signal(number)
    process.wait(timeout=DEADLINE_S)
    process.stdout.close()
    if number is signal.SIGKILL:
        written.sweep_until_quiet()
        cleared = subprocess.run(
            argv(written, "v", out / "file.raw"), check=True, timeout=DEADLINE_S, capture_output=True
        )
        assert cleared.returncode == 0
        assert os.listdir(out) == ["file.raw"]
    else:
        assert os.listdir(out) == []
    assert list(written.store.snapshot_ids()) == snapshots
    assert is_left_clean(written)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_interrupted_while_a_child_makes_the_file_leaves_nothing(
    written: Kit, out: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The child must not make it, or make it again, after it was taken away."""
    slow, begun = tmp_path / "qemu", tmp_path / "begun"
    slow.mkdir()
    for one in os.listdir(QEMU_DIR):
        (slow / one).symlink_to(f"{QEMU_DIR}/{one}")
    (slow / "qemu-img").unlink()
    script = f"""#!/bin/sh
        case "$1 $*" in create*.partial*) touch {begun}; sleep 1 ;; esac
        exec {QEMU_DIR}/qemu-img "$@"
    """
    (slow / "qemu-img").write_text(script)
    (slow / "qemu-img").chmod(0o755)
    process = subprocess.Popen(argv(written, "v", out / "file.raw", qemu_dir=slow), stdout=subprocess.DEVNULL)
    wait_for("the child", lambda: begun.exists() or None)
    process.send_signal(number)
    assert process.wait(timeout=DEADLINE_S) == 1
    assert os.listdir(out) == []
    assert is_left_clean(written)


def test_unfinished_file_of_an_export_that_lives_is_left_alone(
    written: Kit, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, seen = jobs.copy_chain, []

    def copy_and_more(*arguments: object, **named: object) -> None:
        plain(*arguments, **named)  # type: ignore[arg-type]
        monkeypatch.setattr(jobs, "copy_chain", plain)
        seen.extend(os.listdir(out))
        export(written, out / "file")
        seen.extend(sorted(os.listdir(out)))

    monkeypatch.setattr(jobs, "copy_chain", copy_and_more)
    export(written, out / "file", may_replace=True)
    (partial,) = set(seen) - {"file"}
    assert seen == [partial, "file", partial]
    assert os.listdir(out) == ["file"]
    assert holds(out / "file", "qcow2", 1, 2, 3)


def test_process_of_another_host_that_is_gone(written: Kit, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector there sees none of its locks: it waits until the record is not renewed any more."""

    elsewhere = Elsewhere(written.store.root)
    once = Once(lambda: [collector.sweep(elsewhere) for _ in range(3)])
    export(written, out / "file", watch=once)
    assert once.is_done
    assert holds(out / "file", "qcow2", 1, 2, 3)
    elsewhere.close()
    assert is_left_clean(written)


def test_process_that_lives_and_hangs_is_ended_and_notices(
    written: Kit, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_JOB_S", -1.0)
    controller = Store(written.store.root)

    def look() -> None:
        for _ in range(2):
            collector.sweep(controller)

    with pytest.raises(jobs.Stopped):
        export(written, out / "file", watch=Once(look))
    assert os.listdir(out) == []
    controller.close()
    assert is_left_clean(written)


# --- the command line ------------------------------------------------------------------------------------------


def test_command_line(written: Kit, out: Path) -> None:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv(written, *arguments), timeout=DEADLINE_S, text=True, capture_output=True)

    done = run("v", out / "now.qcow2")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["event"] == "progress"
    assert events[-1] | {"event": "done", "image_format": "qcow2", "size_bytes": SIZE_BYTES} == events[-1]
    assert is_same(written, out / "now.qcow2")
    done = run(written.volume_id("v"), out / "then", "--format", "raw", "--snapshot", written.snapshot_id("s"))
    assert done.returncode == 0, done.stderr
    assert holds(out / "then", "raw", 1, 2, 0)
    assert run("v", out / "then.raw", "--snapshot", "s").returncode == 0
    assert run("v", out / "now.qcow2").returncode == 1
    assert run("v", out / "now.qcow2", "--force").returncode == 0
    assert run("unknown", out / "x.raw").returncode == 1
    for wrong in (("v", out / "x.img"), ("v", "-"), ("v", out / "x.raw", "--format", "vdi")):
        assert run(*wrong).returncode == 2, wrong
    written.delete("v")
    assert run("v", out / "late.raw", "--snapshot", "s").returncode == 0, "its volume is gone, it is not"
    assert holds(out / "late.raw", "raw", 1, 2, 0)
    assert sorted(os.listdir(out)) == ["late.raw", "now.qcow2", "then", "then.raw"]
    assert is_left_clean(written)
