"""Move data between the layers of a chain that nobody else has open: commit down, stream up, copy.

Owns: what a job is told, how it is watched, held back and ended, and when what it did is durable.
Hides: block jobs, `qemu-img convert`, what QEMU does with backing strings.

    before        commit_down(top=F, base=P)       stream_up(into=C, base=P)       copy_chain
    P ← F ← C     P+F ← F ← C                      P ← F ← F+C                     P ← F ← C   N = P+F+C
                  the caller then records          the caller then records
                  P+F ← C, and drops F             P ← F+C, and drops F

What always holds:
- Every layer that is not written keeps its bytes. What is read through the given chain, and through any part of it
  that ends at or above the written layer's child (commit) or the written layer (stream), is the same at every instant.
- The work is done by a process that dies with this one, whatever ends it (SIGKILL too), and needs no file of its own.
  A job that was cut off at any instant is run again from the same chain, or given up: nothing has to be undone. Only
  clusters may be left that are allocated and unused; `copy_chain` leaves an unfinished target.
- The chain is what the caller says, driver, file and parent of each layer. The string in the upper layer is only
  written: QEMU puts `backing_name` there *before* the moved data is durable, so for a while, and after a crash for
  good, the string may be ahead of the record. Running the job again makes it right.
- When a call returns, all it did is durable: flushed by the process that did it with an error check, that process has
  ended with status 0, and the files were synced again by us.

Measured with QEMU 10.0.13: `backing_name` is written as it is given, with the base's format beside it; without it QEMU
would write the base's absolute path. A stream without base removes both. Each rewrites the whole header in QEMU's own
layout, with the table of feature names, so the name then begins at byte 528.
"""

import errno
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from csi_quobyte.errors import Busy, Corrupt, DriverError, Exhausted, InvalidArgument, OutOfRange, Refused, Unavailable
from csi_quobyte.host import command, qemu_img, qsd
from csi_quobyte.host.qemu import ImageFormat, ImageLayer, QemuTools

STALL_TIMEOUT_S: Final = 60.0
"""Without any progress for so long a job is given up."""
MINIMUM_SPEED_BYTES_PER_S: Final = 1 << 20
"""A slower job would look like a stalled one: QEMU moves up to 2 MiB at once, and then pauses."""

_WATCH_INTERVAL_S = 0.1
_FIRST_POLL_S = 0.005
_LEAVE_TIMEOUT_S = 1.0  # for a daemon that is not needed any more: with it a stopped job leaves no unused clusters
_JOB = "job"
# A pool with less than this available counts as full: QEMU writes up to 2 MiB at once.
_FULL_BYTES = 4 << 20
_CREATE_TIMEOUT_S = 60.0
_FLUSH_TIMEOUT_S = 3600.0  # of what the page cache has taken for a slow disk: nothing shows how far that is
_COPY_MEMORY_BYTES = 1 << 30
# As in a private daemon; QEMU's default does not fit into the limit of memory for a chain of 64 layers of 1 TiB.
_COPY_L2_CACHE_BYTES = 1 << 20
# qemu-img(1), -p: "    (12.34/100%)\r"
_PERCENT = re.compile(r"\((\d+(?:\.\d+)?)/100%\)")

Answer = Literal["go on", "stop"]


@dataclass(frozen=True)
class Progress:
    """How far a job is. The unit is a job's own: both numbers count from zero again when a job is run again."""

    current_bytes: int
    total_bytes: int
    """0 until it is known; may still change."""


Watch = Callable[[Progress], Answer]
"""Called every 100 ms on the thread of the call, from before the first byte is moved; it must not wait for long.
"stop" ends the job at once, within about a second, and what it raises too. Not called any more once the process that
did the job has ended, while the files are synced."""


class Stopped(Busy):
    """The watch said "stop"; the job can be run again, or never."""


class _Stalled(Unavailable):
    """Nothing moves: the pool may hang, so it is better not touched again."""


def commit_down(
    tools: QemuTools,
    chain: Sequence[ImageLayer],
    *,
    top: str,
    base: str,
    backing_name: str,
    watch: Watch,
    speed_bytes_per_s: int | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> None:
    """Write what `top` has into its parent `base`, which grows to its size.

    `chain` (base first) has to go on above `top`, with the layer whose parent `base` is to become: that layer's
    string is set to `backing_name`. What lies above it is not opened. Durable on return: the files of `base` and of
    that layer.

    One layer at a time: with a layer between them a base that has grown is larger than that one, and a second run
    after a crash would show the base's data beyond its end.

    Raises:
        Stopped: the watch said so.
        Busy: another process has one of the layers open.
        Exhausted: no space; what was written so far stays and is hidden by the layer above.
        Corrupt: sizes fall along the chain (contents would change), or as `qemu_img.check_features`.
        InvalidArgument: `base` is not the parent of `top`, no layer is above `top`, or the speed is too low.
        Unavailable: no progress for `stall_timeout_s`, or any other failure; run it again.
    """
    at, below = _position(chain, top), _position(chain, base)
    if below + 1 != at or at == len(chain) - 1:
        raise InvalidArgument(f"{top} cannot be committed into {base}: wanted are its parent, and a layer above it")
    arguments = {
        "device": qsd.node_name(chain[at + 1]),
        "top-node": qsd.node_name(chain[at]),
        "base-node": qsd.node_name(chain[below]),
        "backing-file": backing_name,
    }
    opened = chain[: at + 2]
    plan = _Plan("block-commit", arguments, opened, written=(chain[below], chain[at + 1]), alone=opened[below:])
    _run(tools, plan, _Vigil(watch, stall_timeout_s), speed_bytes_per_s)


def stream_up(
    tools: QemuTools,
    chain: Sequence[ImageLayer],
    *,
    into: str,
    base: str | None,
    backing_name: str | None,
    watch: Watch,
    speed_bytes_per_s: int | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> None:
    """Write into `into`, the last layer of the chain, what it does not have itself and the layers above `base` have.

    Without `base`: all of them, and `into` needs no parent any more. Its string is set to `backing_name`, which is
    None exactly if `base` is. Durable on return: the file of `into`.

    Raises:
        As `commit_down`; what was written before an error stays in `into`, which shows the same.
    """
    below = -1 if base is None else _position(chain, base)
    if _position(chain, into) != len(chain) - 1 or below >= len(chain) - 2:
        raise InvalidArgument(f"nothing can be streamed from above {base} into {into}: wanted is base, layers, into")
    if (base is None) != (backing_name is None):
        raise InvalidArgument(f"base {base} and the backing name {backing_name!r} do not fit together")
    arguments: dict[str, object] = {"device": qsd.node_name(chain[-1])}
    if base is not None:
        arguments |= {"base-node": qsd.node_name(chain[below]), "backing-file": backing_name}
    plan = _Plan("block-stream", arguments, chain, written=chain[-1:], alone=chain[-1:])
    _run(tools, plan, _Vigil(watch, stall_timeout_s), speed_bytes_per_s)


def copy_foreign(
    tools: QemuTools,
    source_path: str,
    source_format: qemu_img.ForeignFormat,
    target_path: str,
    *,
    watch: Watch,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> None:
    """Copy an image from outside of a pool into `target_path`, which is a qcow2 image that is at least as large, reads
    as zeros and that nobody else can write. Durable on return; after an error its contents mean nothing.

    The caller has had `qemu_img.foreign_size_bytes` judge the source.

    Raises:
        Stopped, Exhausted, Unavailable: as `commit_down`.
    """
    source = qemu_img.foreign_json(source_path, source_format)
    options = ["-p", "-n", "--target-is-zero", "-t", "none", "-O", "qcow2"]
    vigil = _Vigil(watch, stall_timeout_s)
    vigil.tick()
    shown_bytes = qemu_img.foreign_size_bytes(tools, source_path, source_format)
    with _durable(target_path):
        try:
            _convert([tools.qemu_img, "convert", *options, source, target_path], shown_bytes, vigil)
        except _Stalled:
            raise
        except Unavailable as error:
            _raise_if_full(target_path, error)
            raise


def copy_chain(
    tools: QemuTools,
    chain: Sequence[ImageLayer],
    target_path: str,
    target_format: ImageFormat,
    *,
    size_bytes: int,
    watch: Watch,
    target_is_made: bool = False,
    bypass_cache: bool = True,
    speed_bytes_per_s: int | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> None:
    """Copy what a chain (base first) shows into a new image without parent, sparse, with zeros up to `size_bytes`.

    On return the file is durable, its directory entry is not; it has mode 0600. After an error there is no target,
    unless the pool is gone. With `target_is_made` the caller has made it: an image of that format and size that reads
    as zeros and that nobody else can write; then it stays after an error, and has the mode that it had.
    A crash leaves one that passes `qemu-img check` and is incomplete: only a record says that an image is whole.
    The target is written past the page cache; without `bypass_cache` through it, which every file system can.

    This is `qemu-img convert` and no block job, because it is much faster for what is large and mostly empty: for
    1 TiB with 20 MiB of data 0.4 s, a stream takes 13 s, and a mirror 23 s and 130 MiB more space (measured).

    Raises:
        Refused: `target_path` exists; it was not touched.
        OutOfRange: the chain shows more than `size_bytes`.
        Stopped, Busy, Exhausted, Corrupt, InvalidArgument, Unavailable: as `commit_down`.
    """
    rate = [] if speed_bytes_per_s is None else ["-r", str(_checked_speed(speed_bytes_per_s))]
    shown_bytes = qemu_img.info(tools, chain[-1].path, chain[-1].format).virtual_size_bytes
    if size_bytes < shown_bytes:
        raise OutOfRange(f"{chain[-1].path} shows {shown_bytes} bytes, which do not fit into {size_bytes}")
    source = _with_small_caches(qemu_img.chain_json(chain))
    cache = "none" if bypass_cache else "writeback"
    options = ["-p", "-n", "--target-is-zero", "-t", cache, *rate, "-O", target_format]
    vigil = _Vigil(watch, stall_timeout_s)
    vigil.tick()
    with nullcontext() if target_is_made else _new_file(target_path):
        if not target_is_made:
            _make_image(tools, target_path, target_format, size_bytes)
        with _durable(target_path):
            try:
                argv = [tools.qemu_img, "convert", *options, source, target_path]
                _convert(argv, shown_bytes, vigil, flushes_long=not bypass_cache)
            except _Stalled:
                raise
            except Unavailable as error:
                _raise_if_locked(chain, alone=(), error=error)
                _raise_if_full(target_path, error)
                raise


@dataclass(frozen=True)
class _Plan:
    """A block job: the command with its arguments, the chain to open, and what it does to its layers."""

    name: str
    arguments: Mapping[str, object]
    chain: Sequence[ImageLayer]
    """Its last layer is opened for writing, so that its lock is taken before a byte is moved. Measured: where QEMU
    could not get that lock at the end of a commit, to change the string, it crashed (status 139)."""
    written: Sequence[ImageLayer]
    alone: Sequence[ImageLayer]
    """What QEMU lets nobody else open, also for reading: what is written, and what is committed."""


class _Vigil:
    """What is asked while a job runs: does somebody want it to stop, and does it move at all?"""

    def __init__(self, watch: Watch, stall_timeout_s: float) -> None:
        self.stall_timeout_s = stall_timeout_s
        self._watch = watch
        self._progress = Progress(0, 0)
        self._sign: object = None
        self._moved_at = time.monotonic()
        self._asked_at = 0.0

    def saw(self, progress: Progress, sign: object = None) -> None:
        """Note how far it is; `sign` is anything that changes when it moves."""
        if (progress, sign) != (self._progress, self._sign):
            self._progress, self._sign, self._moved_at = progress, sign, time.monotonic()

    def moved(self) -> None:
        """Note that something else begins, which has the whole time for itself."""
        self._moved_at = time.monotonic()

    def tick(self, *, at_once: bool = False) -> None:
        """Ask the watch if it was not asked for 100 ms, or `at_once`.

        Raises:
            Stopped: it says stop.
            _Stalled: nothing has moved for too long.
        """
        now = time.monotonic()
        if at_once or now - self._asked_at >= _WATCH_INTERVAL_S:
            self._asked_at = now
            if self._watch(self._progress) == "stop":
                raise Stopped(f"stopped at {self._progress.current_bytes} of {self._progress.total_bytes} bytes")
        if now - self._moved_at > self.stall_timeout_s:
            raise _Stalled(
                f"no progress for {self.stall_timeout_s:.1f} s at {self._progress.current_bytes} of "
                f"{self._progress.total_bytes} bytes"
            )


def _run(tools: QemuTools, plan: _Plan, vigil: _Vigil, speed_bytes_per_s: int | None) -> None:
    arguments = {**plan.arguments, "job-id": _JOB, "auto-dismiss": False, "on-error": "enospc"}
    if speed_bytes_per_s is not None:
        arguments["speed"] = _checked_speed(speed_bytes_per_s)
    vigil.tick()
    try:
        # A command that gets no answer is a stall first.
        answer_timeout_s = vigil.stall_timeout_s + _LEAVE_TIMEOUT_S
        with qsd.private_daemon(tools, tick=vigil.tick, answer_timeout_s=answer_timeout_s) as daemon:
            daemon.open(plan.chain)
            opened = daemon.layers()
            _check_growing([(layer.id, opened[layer.id].size_bytes) for layer in plan.chain])
            # Who was stopped for long before there was a daemon to be killed must not move anything now; and a short
            # job may end before the next question.
            vigil.tick(at_once=True)
            with _leaving_in_order(daemon):
                daemon.execute(plan.name, arguments)
                _follow(daemon, plan, vigil)
            vigil.moved()
            _flush(daemon, plan)
            vigil.moved()
            daemon.end(vigil.stall_timeout_s)
    except _Stalled:
        raise
    except Unavailable as error:
        # The daemon is dead now: locks that are still there are another's.
        _raise_if_locked(plan.chain, plan.alone, error)
        raise
    for layer in plan.written:
        qemu_img.sync(layer.path)


def _follow(daemon: qsd.PrivateDaemon, plan: _Plan, vigil: _Vigil) -> None:
    """Wait for the end of the job, and take it away: until then QEMU keeps a node of its own above the chain."""
    pause_s = _FIRST_POLL_S
    while True:
        job = _find_job(daemon)
        vigil.saw(Progress(job["current-progress"], job["total-progress"]))
        if job["status"] == "concluded":
            break
        if _is_out_of_space(daemon):
            raise Exhausted(f"no space left for writing into {plan.written[0].path}")
        daemon.tick()
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _WATCH_INTERVAL_S)
    if "error" in job:
        failed = Unavailable(f"{plan.name} into {plan.written[0].path} failed: {job['error']}")
        _raise_if_full(plan.written[0].path, failed)
        raise failed
    daemon.execute("job-dismiss", {"id": _JOB})


def _find_job(daemon: qsd.PrivateDaemon) -> Mapping[str, Any]:
    jobs = {job["id"]: job for job in daemon.execute("query-jobs")}
    if _JOB not in jobs:
        raise Unavailable("the storage daemon does not know its job any more")
    found: Mapping[str, Any] = jobs[_JOB]
    return found


def _is_out_of_space(daemon: qsd.PrivateDaemon) -> bool:
    # on-error=enospc: at ENOSPC the job waits with this status, at any other error it ends.
    return any(job["io-status"] == "nospace" for job in daemon.execute("query-block-jobs"))


def _flush(daemon: qsd.PrivateDaemon, plan: _Plan) -> None:
    """Flush what the job wrote.

    Raises:
        Unavailable: it was not flushed: run the job again.
    """
    try:
        daemon.flush()
        # QEMU flushes the base of a commit by reopening it read-only. If that fails it says nothing, and leaves it so.
        opened = daemon.layers()
        writable = [layer.path for layer in plan.chain[:-1] if not opened[layer.id].read_only]
        if writable:
            raise Unavailable(f"{', '.join(writable)} could not be flushed")
    except _Stalled:
        raise
    except Unavailable as error:
        _raise_if_full(plan.written[0].path, error)
        raise


@contextmanager
def _leaving_in_order(daemon: qsd.PrivateDaemon) -> Iterator[None]:
    """Where a job is broken off, give the daemon a moment to write down which clusters it has taken."""
    try:
        yield
    except DriverError:
        with suppress(Unavailable):  # it is killed then, which is as safe
            daemon.end(_LEAVE_TIMEOUT_S, quietly=True)
        raise


def _convert(argv: Sequence[str], total_bytes: int, vigil: _Vigil, *, flushes_long: bool = False) -> None:
    limits = command.Limits(address_space_bytes=_COPY_MEMORY_BYTES, cpu_s=None)
    percent = flushed_since = 0.0
    pause_s = _FIRST_POLL_S
    with command.tied(argv, limits=limits) as child:
        while (status := child.wait(pause_s)) is None:
            pause_s = min(2 * pause_s, _WATCH_INTERVAL_S)
            said = _PERCENT.findall(child.read_stdout())
            percent = float(said[-1]) if said else percent
            # qemu-img speaks once for each whole percent, which of a large image is minutes.
            vigil.saw(Progress(int(total_bytes * percent / 100), total_bytes), child.activity())
            if percent >= 100 and flushes_long:
                flushed_since = flushed_since or time.monotonic()
                if time.monotonic() - flushed_since < _FLUSH_TIMEOUT_S:
                    vigil.moved()
            vigil.tick()
        if status != 0 or _has_complained(child.stderr_tail()):
            raise command.CommandFailed(argv, status, child.stderr_tail())


def _has_complained(stderr: str) -> bool:
    """Say whether a qemu-img that ended with status 0 has failed all the same.

    What it writes when it closes the target, its last L2 tables and reference counts, is not in its status: of a
    failure there it only prints "Failed to flush the L2 table cache".
    """
    return any(line.strip() and "warning:" not in line for line in stderr.splitlines())


@contextmanager
def _durable(path: str) -> Iterator[None]:
    """Make durable at the end what others write to a file inside the block, by a descriptor that was there before them.

    The kernel tells of an error of writing back to each descriptor that was open then, once; one that is opened later
    may hear nothing if somebody was told, and QEMU does not pass on the last such error.

    Raises:
        Unavailable: it may not be durable.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"{path} cannot be opened: {error}") from error
    try:
        yield
        try:
            os.fsync(fd)
        except OSError as error:
            raise Unavailable(f"{path} cannot be made durable: {error}") from error
    finally:
        os.close(fd)


@contextmanager
def _new_file(path: str) -> Iterator[None]:
    """Make an empty file, and take it away again if the block fails."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError as error:
        raise Refused(f"{path} exists already: a copy never replaces a file") from error
    except OSError as error:
        failed = Unavailable(f"{path} cannot be made: {error}")
        _raise_if_full(path, failed)
        raise failed from error
    try:
        yield
    except BaseException:
        with suppress(OSError):  # a pool that has died keeps it
            Path(path).unlink()
        raise


def _make_image(tools: QemuTools, path: str, format: ImageFormat, size_bytes: int) -> None:  # noqa: A002
    options = ["-o", "compat=1.1,lazy_refcounts=off"] if format == "qcow2" else []
    argv = [tools.qemu_img, "create", "-q", "-f", format, *options, path, str(size_bytes)]
    try:
        command.run(argv, timeout_s=_CREATE_TIMEOUT_S, limits=command.QEMU_IMG_LIMITS)
    except Unavailable as error:
        _raise_if_full(path, error)
        raise


def _with_small_caches(chain_json: str) -> str:
    chain: dict[str, Any] = json.loads(chain_json.removeprefix("json:"))
    node: dict[str, Any] | None = chain
    while node is not None:
        if node["driver"] == "qcow2":
            node["l2-cache-size"] = _COPY_L2_CACHE_BYTES
        node = node.get("backing")
    return "json:" + json.dumps(chain)


def _position(chain: Sequence[ImageLayer], layer_id: str) -> int:
    for position, layer in enumerate(chain):
        if layer.id == layer_id:
            return position
    raise InvalidArgument(f"layer {layer_id} is not in the chain {' <- '.join(layer.id for layer in chain)}")


def _checked_speed(speed_bytes_per_s: int) -> int:
    if speed_bytes_per_s < MINIMUM_SPEED_BYTES_PER_S:
        raise InvalidArgument(f"a speed of {speed_bytes_per_s} bytes/s: at least {MINIMUM_SPEED_BYTES_PER_S} is needed")
    return speed_bytes_per_s


def _check_growing(sizes: Sequence[tuple[str, int]]) -> None:
    for (lower, lower_bytes), (upper, upper_bytes) in itertools.pairwise(sizes):
        if upper_bytes < lower_bytes:
            raise Corrupt(f"layer {upper} has {upper_bytes} bytes and lies on {lower}, which has {lower_bytes}")


def _raise_if_locked(chain: Sequence[ImageLayer], alone: Sequence[ImageLayer], error: Unavailable) -> None:
    """Raise Busy if a lock on a layer explains an error."""
    for layer in chain:
        try:
            locked = qsd.is_locked(layer.path, alone=layer in alone)
        except Unavailable:
            return  # the error is worth more than that
        if locked:
            raise Busy(f"another process has layer {layer.path} open: {error}") from error


def _raise_if_full(path: str, error: Unavailable) -> None:
    """Raise Exhausted if there is no space where `path` is: of most errors QEMU gives the text only, not the number."""
    if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
        raise Exhausted(f"no space left: {error}") from error  # a quota shows nowhere else
    try:
        found = os.statvfs(Path(path).parent)  # qemu-img may have removed the file itself
    except OSError:
        return
    if found.f_bavail * found.f_frsize < _FULL_BYTES:
        raise Exhausted(f"no space left: {error}") from error
