#!/usr/bin/env python3
"""The demo: one volume's life told on a terminal, with a real controller, a real node and real file systems.

Every sentence that it prints is checked before: the exit status is 0 only if all of them are true. All of it happens
below one temporary directory, and whatever ends the story (its end, a failed step, Ctrl-C), everything that was started
is ended and unmounted again.
"""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import grpc
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "deploy")]  # the script is started by its path, from a tree that is not installed

from csi_quobyte.pool.sizes import human  # noqa: E402
from lab.client import Client, mount_capability  # noqa: E402
from lab.machine import GIB, QEMU_DIR, Machine, mounted_at, wait_for  # noqa: E402

XFS = mount_capability("xfs")  # xfs grows while mounted, also without CAP_SYS_RESOURCE
EXPANDED_BYTES = 3 * GIB
COLLECT_TIMEOUT_S = 30.0
LOG_LINES = 15

Sums = Mapping[str, str]
"""SHA-256 in hex by file name."""


class StoryFailed(Exception):
    """Something that the story says is not true; the message says what was found."""


_EXPECTED = (StoryFailed, grpc.RpcError, RuntimeError, OSError, subprocess.SubprocessError)


class Teller:
    """Prints the steps, with a time and a number for each; knows which one is being told."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.current = ""
        self._number = 0
        self._begun_s = time.monotonic()

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[list[str]]:
        """Do what is inside and then print the title, the time it took, and the lines that were added to the list."""
        self._number += 1
        self.current = title
        details: list[str] = []
        begun_s = time.monotonic()
        with self.console.status(title) if self.console.is_terminal else contextlib.nullcontext():
            yield details
        elapsed_s = time.monotonic() - begun_s
        line = Text.assemble((f"{elapsed_s:6.2f} s  ", "cyan"), (f"{self._number:>2}  ", "bold"), (title, "bold"))
        self.console.print(line, soft_wrap=True)
        for detail in details:
            self.say(detail)

    def say(self, line: str, style: str = "") -> None:
        """Print a line below a step."""
        self.console.print(Text(f"{'':14}{line}", style), soft_wrap=True)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun_s


# --- what the "pod" does with its volume -------------------------------------------------------------------------


def write_files(directory: Path) -> Sums:
    """Write a few files as a program would, durably, and give their checksums."""
    source = random.Random(20)  # the same bytes each time: a failure can be looked at again
    contents = {
        "letter.txt": b"Dear reader, keep this.\n" * 200,
        "photo-1.bin": source.randbytes(3 << 20),
        "photo-2.bin": source.randbytes(8 << 20),
    }
    for name, content in contents.items():
        with (directory / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def damage_files(directory: Path) -> None:
    """Do what people do by mistake: delete a file, overwrite a part of another one, empty a third."""
    (directory / "letter.txt").unlink()
    with (directory / "photo-1.bin").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"\xde\xad" * 4096)
    (directory / "photo-2.bin").write_bytes(b"")


def checksums(directory: Path) -> Sums:
    """Give the checksums of all files in a directory."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def check(true: bool, otherwise: str) -> None:
    """Stop the story if what it says is not true.

    Raises:
        StoryFailed: it is not; `otherwise` says what was found.
    """
    if not true:
        raise StoryFailed(otherwise)


def filesystem_bytes(directory: Path) -> int:
    """Give the size of a mounted file system, as df shows it."""
    found = os.statvfs(directory)
    return found.f_blocks * found.f_frsize


def images(machine: Machine) -> list[Path]:
    """Give all image files that are in the pool."""
    layers = machine.directories["main"] / "layers"
    return [path for pattern in ("*/*.qcow2", "*/*.raw") for path in layers.glob(pattern)]


def used_bytes(machine: Machine) -> int:
    """Give the space that the image files in the pool really take."""
    return sum(path.stat().st_blocks * 512 for path in images(machine))


# --- the story ---------------------------------------------------------------------------------------------------


def tell(teller: Teller, machine: Machine) -> None:
    """Tell all of it, on a machine whose stand-in is mounted."""
    with teller.step("Controller and node are started, as two processes"):
        machine.start()
    client = Client(machine)
    diary, sums = write_first_volume(teller, machine, client)
    snapshot = take_snapshot(teller, machine, client, diary)
    damage(teller, client, diary, sums)
    restored = restore(teller, client, snapshot, sums)
    expand(teller, client, restored, sums)
    draw(teller, machine)
    delete_everything(teller, machine, client, [diary, restored], snapshot)


def write_first_volume(teller: Teller, machine: Machine, client: Client) -> tuple[str, Sums]:
    """Make a volume and write to it through a mount; gives its id and what it holds."""
    with teller.step("A volume of 1 GiB is made: CreateVolume") as details:
        diary = client.create("diary", GIB, capability=XFS).volume_id
        details.append(f"its image is one qcow2 file in the pool that takes {human(used_bytes(machine))} so far")
    with teller.step("It is attached, staged and published, as Kubernetes does for a pod") as details:
        target = client.use(diary, capability=XFS)
        check(target.is_mount(), f"nothing is mounted at {target}")
        details.append("image file > storage daemon > loop device > new xfs file system > the pod's directory")
    with teller.step("The pod writes three files and notes their checksums") as details:
        sums = write_files(target)
        details += [f"{name:<12} sha256 {digest[:16]}…" for name, digest in sums.items()]
    with teller.step("The pod ends: unpublished, unstaged, detached"):
        client.release(diary)
        check(not machine.leftovers(), f"still there: {', '.join(machine.leftovers())}")
    return diary, sums


def take_snapshot(teller: Teller, machine: Machine, client: Client, diary: str) -> str:
    """Take a snapshot of the detached volume and give its id."""
    with teller.step("A snapshot is taken: CreateSnapshot") as details:
        before = used_bytes(machine)
        snapshot = client.snapshot("monday", diary)
        check(snapshot.ready_to_use, "the snapshot is not ready")
        more = human(used_bytes(machine) - before)
        details.append(f"nothing is copied: the image is frozen and gets an empty overlay of {more} on top")
    return snapshot.snapshot_id


def damage(teller: Teller, client: Client, diary: str, sums: Sums) -> None:
    """Use the volume again and ruin what is in it."""
    with teller.step("The volume is used again, and an accident happens") as details:
        target = client.use(diary, capability=XFS)
        check(checksums(target) == sums, "the files are not what was written before the snapshot")
        damage_files(target)
        left = checksums(target)
        check(not set(left.items()) & set(sums.items()), "a file has survived the damage")
        details.append("one file is deleted, one overwritten in the middle, one emptied: no checksum is right")
        client.release(diary)


def restore(teller: Teller, client: Client, snapshot: str, sums: Sums) -> str:
    """Make a volume from the snapshot, use it and compare; gives its id, and it stays in use."""
    with teller.step("A new volume is made from the snapshot: CreateVolume with a source") as details:
        restored = client.create("diary-restored", GIB, capability=XFS, snapshot=snapshot).volume_id
        details.append("nothing is copied here either: it is a second overlay of the frozen image")
    with teller.step("A pod gets the new volume and reads") as details:
        found = checksums(client.use(restored, capability=XFS))
        check(found == sums, f"read back {dict(found)}, written were {dict(sums)}")
        details.append("all three files have the checksums that were noted before the accident")
    return restored


def expand(teller: Teller, client: Client, restored: str, sums: Sums) -> None:
    """Make the volume larger while it is in use, and end that use."""
    target = client.target_path(restored)
    before = filesystem_bytes(target)
    with teller.step("It grows to 3 GiB while the pod uses it: ControllerExpand, NodeExpand") as details:
        client.expand(restored, EXPANDED_BYTES)
        client.node_expand(restored, target)
        after = filesystem_bytes(target)
        check(after > EXPANDED_BYTES * 0.95, f"the file system has {human(after)} after growing")
        check(checksums(target) == sums, "the files changed while the volume grew")
        details.append(f"df said {human(before)} and says {human(after)} now; the files are still the same")
    with teller.step("That pod ends too"):
        client.release(restored)


def draw(teller: Teller, machine: Machine) -> None:
    """Show the layers with the driver's own command."""
    with teller.step("What the pool holds now: csi-quobyte tree") as details:
        drawing = machine.cli("tree", *machine.pool_arguments).stdout
        for word in ("volume diary", "volume diary-restored", "snapshot monday"):
            check(word in drawing, f"{word} is not in the drawing:\n{drawing}")
        details += drawing.rstrip().splitlines()


def delete_everything(teller: Teller, machine: Machine, client: Client, volumes: list[str], snapshot: str) -> None:
    """Delete all objects in an order that makes the layers outlive their names, and see that all is gone."""
    with teller.step("Everything is deleted, the snapshot first") as details:
        client.delete_snapshot(snapshot)
        for volume in volumes:
            client.delete(volume)
        details.append("a snapshot can go before the volumes that were made from it")
    with teller.step("The collector removes the layers that nothing refers to any more"):
        wait_for("the image files to be removed", lambda: not images(machine), timeout_s=COLLECT_TIMEOUT_S)
    with teller.step("The pool is checked: csi-quobyte check") as details:
        findings = machine.check()
        check(not findings, f"findings: {findings}")
        details.append("no findings")
    with teller.step("The machine is looked over: mounts, loop devices, storage daemons") as details:
        leftovers = machine.leftovers()
        check(not leftovers, f"still there: {', '.join(leftovers)}")
        details.append("nothing of the driver's is left")


# --- around it ---------------------------------------------------------------------------------------------------


def cannot_run() -> str:
    """Say in one sentence why the demo cannot run here; empty if it can."""
    if os.geteuid() != 0:
        return "the demo mounts file systems and so must run as root: sudo make demo"
    if not (QEMU_DIR / "qemu-storage-daemon").exists():
        return f"there is no qemu-storage-daemon in {QEMU_DIR}: make demo sets it up"
    return ""


def introduce(console: Console) -> None:
    """Say what will be seen."""
    console.print(Text("csi-quobyte: disks for pods, kept as image files on a Quobyte volume", "bold"))
    console.print(
        "Quobyte itself is not here. A stand-in takes its place: a FUSE mount of type fuse.quobyte (bindfs) over a\n"
        "local directory. It differs from a real Quobyte volume in that only this machine sees it, it keeps one copy\n"
        "of the data, has no quotas, and is slower. All else is real.\n",
        soft_wrap=True,
    )


def what_next(console: Console) -> None:
    """Say where to go from here."""
    console.print(Text("\nWhat to do next", "bold"))
    console.print("  make test            everything that proves the driver, 10 to 20 minutes", soft_wrap=True)
    console.print('  README.md            "Run it by hand": the same with your own commands', soft_wrap=True)
    console.print(f"  {Path(sys.executable).parent}/csi-quobyte --help    the commands", soft_wrap=True)


def explain(teller: Teller, error: BaseException, machine: Machine | None) -> None:
    """Say which step failed, why, and what the processes logged last."""
    words = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
    teller.console.print(Text(f"\nFAILED at: {teller.current}", "bold red"), soft_wrap=True)
    teller.console.print(Text(words), soft_wrap=True)
    for process in (machine.controller_process, machine.node_process) if machine else ():
        if process:
            teller.console.print(Text(f"\nthe end of {process.log.name}:", "bold"), soft_wrap=True)
            teller.console.print(Text(process.tail(LOG_LINES), "dim"), soft_wrap=True)


def clean_up(machine: Machine | None, base: Path) -> list[str]:
    """End and unmount all that was started, not to be interrupted, and name what is left after that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if machine:
        machine.close()
    elif base.exists():
        base.rmdir()  # empty: a machine that could not be made has cleaned up itself
    mounted = [str(base / name) for name in ("main",) if mounted_at(base / name)]
    return mounted + (machine.leftovers() if machine else []) + ([str(base)] if base.exists() else [])


def end(number: int, _frame: object) -> NoReturn:
    """Signal handler: leave the story as Ctrl-C does."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def run(teller: Teller, base: Path) -> int:
    """Tell the story in `base`, clean up, and give the exit status."""
    machine: Machine | None = None
    try:
        with teller.step("A stand-in for Quobyte is mounted and made a pool: csi-quobyte pool init") as details:
            machine = Machine(base)
            details.append(f"mounted at {machine.pool_path}")
        tell(teller, machine)
        status = 0
    except KeyboardInterrupt:
        teller.console.print(Text(f"\ninterrupted at: {teller.current}; cleaning up", "bold"), soft_wrap=True)
        status = 130
    except _EXPECTED as error:
        explain(teller, error, machine)
        status = 1
    finally:
        left = clean_up(machine, base)
    if left:
        teller.console.print(Text(f"\nFAILED to clean up: {', '.join(left)}", "bold red"), soft_wrap=True)
        return status or 1
    return status


def main() -> int:
    """Run the demo."""
    console = Console(highlight=False)
    if reason := cannot_run():
        console.print(reason, soft_wrap=True)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    os.environ["COLUMNS"] = "160"  # csi-quobyte tree writes into a pipe here, for which it would assume 80
    introduce(console)
    teller = Teller(console)
    status = run(teller, Path(tempfile.mkdtemp(prefix="cq-")))
    if status == 0:
        console.print(Text(f"\nAll of it was true, in {teller.elapsed_s:.1f} s, and nothing was left behind.", "bold"))
        what_next(console)
    return status


if __name__ == "__main__":
    sys.exit(main())
