#!/usr/bin/env python3
"""Runs csi-sanity against the driver as it is deployed: controller and node as two processes with a socket each.

For every access type (mount, block) on a new pool of its own, on the bindfs stand-in:

    pool init -> controller, node -> csi-sanity -> everything deleted? -> SIGTERM, both exit 0 -> check is clean

Passing means: no spec failed, the skipped ones are exactly those of skipped.txt, both processes ended with status 0,
the pool holds no volume, snapshot or layer, and nothing is left on the machine. The last is tests/tools/contained.py's
work: this script runs itself under it, also when it is started by hand.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import grpc

from csi_quobyte.pb import csi_pb2, csi_pb2_grpc

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent / "tools"
ACCESS_TYPES = ("mount", "block")

SIZE_BYTES = 1 << 30  # what most specs create; xfs, the larger of the two file systems, needs 300 MiB
EXPANDED_BYTES = 2 << 30
START_S = 30
SANITY_S = 270  # for one access type; a healthy run takes a fraction
COLLECT_S = 30  # the collector drops the layers of deleted volumes in the background
STOP_S = 30
COMMAND_S = 60
LOG_LINES = 40


class SanityFailed(Exception):
    """The driver did not pass; the message says what was found and what was wanted."""


@dataclass(frozen=True)
class Programs:
    """What is run: the driver, csi-sanity, and the directory with the QEMU commands."""

    driver: Path
    sanity: Path
    qemu_dir: Path


@dataclass(frozen=True)
class Site:
    """Where one access type is tried: a directory that holds all there is of it."""

    root: Path
    access_type: str

    @property
    def pool(self) -> Path:
        """Return the mount point of the stand-in."""
        return self.root / "pool"

    @property
    def report(self) -> Path:
        """Return the JUnit file that csi-sanity writes."""
        return self.root / "junit.xml"

    def log(self, name: str) -> Path:
        """Return the log file of one program."""
        return self.root / f"{name}.log"

    def endpoint(self, service: str) -> str:
        """Return the address of a service: a unix socket."""
        return f"unix://{self.root}/{service}.sock"


@dataclass(frozen=True)
class Verdict:
    """What csi-sanity said, by names of specs."""

    passed: frozenset[str]
    failed: frozenset[str]
    skipped: frozenset[str]


NO_VERDICT = Verdict(passed=frozenset(), failed=frozenset(), skipped=frozenset())


def pool_flags(programs: Programs, site: Site) -> list[str]:
    """Return the flags by which every command of the driver finds the pool and QEMU."""
    # The stand-in differs from Quobyte in the size that it says its root directory has.
    return ["--pool", f"main={site.pool}", "--require-mount", "quobyte-nosize", "--qemu-dir", str(programs.qemu_dir)]


def run(argv: Sequence[str | Path], *, ok: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run a short command and return what it said.

    Raises:
        SanityFailed: it ended with a status that is not in `ok`, or not in time.
    """
    words = " ".join(str(word) for word in argv)
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S)
    except subprocess.TimeoutExpired:
        raise SanityFailed(f"{words}: not ended after {COMMAND_S} s") from None
    if done.returncode not in ok:
        raise SanityFailed(f"{words}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for `condition`; say whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@contextlib.contextmanager
def stand_in(site: Site) -> Iterator[None]:
    """Have the stand-in for Quobyte mounted."""
    run([TOOLS / "standin.sh", "up", site.root / "bricks", site.pool])
    try:
        yield
    finally:
        run([TOOLS / "standin.sh", "down", site.pool])


@contextlib.contextmanager
def serving(programs: Programs, site: Site, service: str, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """Have one service of the driver running, with a log file; it is ended here if nobody did before."""
    argv = [str(programs.driver), service, "--endpoint", site.endpoint(service), *pool_flags(programs, site), *flags]
    with site.log(service).open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            process.kill()
            process.wait(STOP_S)


def is_ready(endpoint: str) -> bool:
    """Say whether the service at `endpoint` answers Probe and is ready (CSI: an answer without the field is ready)."""
    with grpc.insecure_channel(endpoint) as channel:
        try:
            answer: Any = csi_pb2_grpc.IdentityStub(channel).Probe(csi_pb2.ProbeRequest(), timeout=2)
        except grpc.RpcError:
            return False
    return not answer.HasField("ready") or bool(answer.ready.value)


def await_ready(site: Site, service: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a service is ready.

    Raises:
        SanityFailed: it ended, or is not ready in time.
    """
    wait_until(lambda: process.poll() is not None or is_ready(site.endpoint(service)), START_S)
    if (status := process.poll()) is not None:
        raise SanityFailed(f"{service}: ended with status {status} at its start")
    if not is_ready(site.endpoint(service)):
        raise SanityFailed(f"{service}: not ready after {START_S} s")


def stop(service: str, process: subprocess.Popen[bytes]) -> None:
    """Ask a service to end.

    Raises:
        SanityFailed: it had ended before, does not end in time, or not with status 0.
    """
    if (status := process.poll()) is not None:
        raise SanityFailed(f"{service}: ended by itself with status {status}")
    process.terminate()
    try:
        status = process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        raise SanityFailed(f"{service}: not ended {STOP_S} s after SIGTERM") from None
    if status != 0:
        raise SanityFailed(f"{service}: ended with status {status} after SIGTERM, wanted 0")


def run_sanity(programs: Programs, site: Site) -> Verdict:
    """Run csi-sanity and return its verdict; its exit status adds nothing to its report.

    Raises:
        SanityFailed: it did not end in time, or wrote no report.
    """
    argv = [
        str(programs.sanity),
        f"--csi.endpoint={site.endpoint('node')}",
        f"--csi.controllerendpoint={site.endpoint('controller')}",
        f"--csi.testvolumeaccesstype={site.access_type}",
        f"--csi.testvolumesize={SIZE_BYTES}",
        f"--csi.testvolumeexpandsize={EXPANDED_BYTES}",
        f"--csi.mountdir={site.root}/published",
        f"--csi.stagingdir={site.root}/staged",
        f"--ginkgo.junit-report={site.report}",
        "--ginkgo.no-color",
    ]
    with site.log("csi-sanity").open("wb") as log:
        try:
            subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, timeout=SANITY_S)
        except subprocess.TimeoutExpired:
            raise SanityFailed(f"csi-sanity: not ended after {SANITY_S} s") from None
    if not site.report.exists():
        raise SanityFailed("csi-sanity: wrote no report")
    return read_report(site.report)


def read_report(path: Path) -> Verdict:
    """Read a JUnit file of Ginkgo; whatever is neither passed, skipped nor pending counts as failed.

    The suite's own set-up steps are among the cases only when they failed.
    """
    by_status: dict[str, set[str]] = {"passed": set(), "skipped": set(), "failed": set()}
    for case in ElementTree.parse(path).iter("testcase"):
        status = {"passed": "passed", "skipped": "skipped", "pending": "skipped"}.get(case.get("status", ""), "failed")
        by_status[status].add(case.get("name", "?"))
    return Verdict(**{status: frozenset(names) for status, names in by_status.items()})


def allowed_skips() -> frozenset[str]:
    """Return the names in skipped.txt."""
    lines = (HERE / "skipped.txt").read_text().splitlines()
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def check_verdict(verdict: Verdict) -> None:
    """Compare with what is wanted.

    Raises:
        SanityFailed: a spec failed, none passed, or the skipped ones are not exactly the allowed ones.
    """
    allowed = allowed_skips()
    problems = [
        *(f"failed: {name}" for name in sorted(verdict.failed)),
        *(f"skipped, but not in skipped.txt: {name}" for name in sorted(verdict.skipped - allowed)),
        *(f"in skipped.txt, but not skipped: {name}" for name in sorted(allowed - verdict.skipped)),
    ]
    if not verdict.passed:
        problems.append("no spec passed")
    if problems:
        raise SanityFailed("\n".join(problems))


def counts(programs: Programs, site: Site) -> dict[str, int]:
    """Ask `csi-quobyte check` how many volumes, snapshots and layers the pool holds; findings are for the last call."""
    said = run([programs.driver, "check", *pool_flags(programs, site), "--json"], ok=(0, 1)).stdout
    try:
        checked = json.loads(said)["checked"]
        return {kind: int(checked[kind]) for kind in ("volumes", "snapshots", "layers")}
    except (ValueError, KeyError, TypeError) as error:
        raise SanityFailed(f"check --json: not the agreed form ({error!r}): {said[:500]}") from None


def check_pool(programs: Programs, site: Site) -> None:
    """Look at the pool after everything was deleted and nobody serves it.

    Raises:
        SanityFailed: `check` has findings, or something is left.
    """
    run([programs.driver, "check", *pool_flags(programs, site)])
    left = {kind: number for kind, number in counts(programs, site).items() if number}
    if left:
        raise SanityFailed(f"left in the pool: {left}, wanted nothing")


def check_mounts(site: Site) -> None:
    """Look for mounts below the site other than the stand-in.

    Raises:
        SanityFailed: there are some.
    """
    targets = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    left = [target for target in targets if target.startswith(f"{site.root}/") and target != str(site.pool)]
    if left:
        raise SanityFailed(f"still mounted: {', '.join(left)}")


def try_access_type(programs: Programs, site: Site) -> Verdict:
    """Take one access type from an empty directory to an empty pool.

    Raises:
        SanityFailed: anything is not as wanted.
    """
    with stand_in(site):
        run([programs.driver, "pool", "init", site.pool, "--require-mount", "quobyte-nosize"])
        with (
            serving(programs, site, "controller") as controller,
            serving(programs, site, "node", "--node-id", "node-1", "--state-dir", str(site.root / "node")) as node,
        ):
            await_ready(site, "controller", controller)
            await_ready(site, "node", node)
            verdict = run_sanity(programs, site)
            check_verdict(verdict)
            # What is still there after this wait is reported below, when nobody works on it any more.
            wait_until(lambda: not any(counts(programs, site).values()), COLLECT_S)
            stop("node", node)
            stop("controller", controller)
        check_pool(programs, site)
        check_mounts(site)
    return verdict


def print_logs(site: Site) -> None:
    """Print the end of every log of the site."""
    for log in sorted(site.root.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()
        print(f"--- {log.name}, last {min(LOG_LINES, len(lines))} of {len(lines)} lines")
        print("\n".join(lines[-LOG_LINES:]))


def sanity(programs: Programs, access_types: Sequence[str], parent: Path) -> int:
    """Try every access type and print what came out; return the exit status."""
    passed = failed = skipped = 0
    for access_type in access_types:
        start = time.monotonic()
        site = Site(parent / access_type, access_type)
        site.root.mkdir()
        outcome = "as wanted"
        try:
            verdict = try_access_type(programs, site)
        except SanityFailed as problem:
            print_logs(site)
            print(problem)
            outcome = "FAILED, see above"
            verdict = read_report(site.report) if site.report.exists() else NO_VERDICT
            failed += max(1, len(verdict.failed))  # also when the specs passed and what came after did not
        passed += len(verdict.passed)
        skipped += len(verdict.skipped)
        print(f"{access_type}: {outcome} ({time.monotonic() - start:.1f} s)", flush=True)
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed else 0


def find_programs() -> Programs:
    """Return the programs where the set-up puts them.

    Raises:
        SystemExit: one is missing.
    """
    cache = Path(os.environ.get("CSI_QUOBYTE_CACHE", "/var/cache/csi-quobyte"))
    programs = Programs(
        driver=Path(sys.executable).parent / "csi-quobyte",
        sanity=cache / "bin" / "csi-sanity",
        qemu_dir=Path(os.environ.get("CSI_QUOBYTE_QEMU_DIR", cache / "qemu" / "bin")),
    )
    for path in (programs.driver, programs.sanity, programs.qemu_dir / "qemu-img"):
        if not path.exists():
            sys.exit(f"{path} is missing: run make setup")
    return programs


def leave(number: int, _frame: FrameType | None) -> NoReturn:
    """Signal handler: end as on Ctrl-C, so that everything that was opened is closed."""
    raise SystemExit(128 + number)


def main() -> int:
    """Read the arguments and run, contained."""
    parser = argparse.ArgumentParser(description="Run csi-sanity against controller and node.")
    parser.add_argument("--access-type", choices=ACCESS_TYPES, action="append", help="only this one (default: both)")
    arguments = parser.parse_args()
    if "CSI_QUOBYTE_RUN" not in os.environ:
        keeper = [sys.executable, str(TOOLS / "contained.py"), "sanity", "--", sys.executable]
        os.execv(sys.executable, [*keeper, *sys.argv])
    signal.signal(signal.SIGTERM, leave)
    parent = Path(tempfile.mkdtemp(prefix="s-"))  # in the run directory, which the keeper removes
    return sanity(find_programs(), arguments.access_type or ACCESS_TYPES, parent)


if __name__ == "__main__":
    sys.exit(main())
