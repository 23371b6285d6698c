"""Block jobs in a private daemon, and copies: what every layer shows before, during, after and instead of a job.

Axes: job (commit, stream to a base, stream all, copy) × format of the base (raw, qcow2, an old qcow2 with small
clusters) × what cuts it off (nothing, the watch, a killed caller at random moments, a killed daemon, a pool that dies
or hangs, no space, another's lock) × how often it is run.

Contents are compared with a plain model in Python. The strings in all images name files that do not exist.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
from host_fixtures import MIB, Standin, make_chain, wait_until, write_image

from csi_quobyte.errors import Busy, Corrupt, Exhausted, InvalidArgument, OutOfRange, Refused, Unavailable
from csi_quobyte.host import command, jobs, qemu_img, qsd
from csi_quobyte.host.qemu import ImageLayer, QemuTools
from csi_quobyte.pool.qcow2 import Backing, encode_image

pytest_plugins = ["host_fixtures"]

KIB = 1 << 10
CLUSTER_BYTES = 64 * KIB
NAME = "../ab/the-base.image"
BASES = {"raw": ["-f", "raw"], "qcow2": ["-f", "qcow2"], "old": ["-f", "qcow2", "-o", "compat=0.10,cluster_size=4k"]}

Kind = Literal["commit", "stream", "stream all", "copy"]
KINDS: tuple[Kind, ...] = ("commit", "stream", "stream all", "copy")
MERGES: tuple[Kind, ...] = ("commit", "stream", "stream all")
WRITTEN = {"commit": (0, 2), "stream": (3,), "stream all": (3,), "copy": ()}


def go_on(progress: jobs.Progress) -> jobs.Answer:
    return "go on"


@dataclass(frozen=True)
class Scene:
    """base ← lower ← upper ← head in a directory, and what the chain up to each of them shows."""

    tools: QemuTools
    directory: Path
    layers: tuple[ImageLayer, ...]
    shown: tuple[Path, ...]
    """A raw file for each layer, somewhere else."""

    @property
    def copy(self) -> ImageLayer:
        return ImageLayer("c" * 24, str(self.directory / "copy"), "qcow2")

    def run(self, kind: Kind, watch: jobs.Watch = go_on, **how: Any) -> None:
        """Commit lower into base, stream upper and lower or all into head, or copy all."""
        base, lower, _, head = (layer.id for layer in self.layers)
        how |= {"watch": watch}
        if kind == "commit":
            jobs.commit_down(self.tools, self.layers, top=lower, base=base, backing_name=NAME, **how)
        elif kind == "stream":
            jobs.stream_up(self.tools, self.layers, into=head, base=base, backing_name=NAME, **how)
        elif kind == "stream all":
            jobs.stream_up(self.tools, self.layers, into=head, base=None, backing_name=None, **how)
        else:
            size_bytes = self.shown[-1].stat().st_size
            jobs.copy_chain(self.tools, self.layers, self.copy.path, "qcow2", size_bytes=size_bytes, **how)

    def merged(self, kind: Kind) -> Sequence[ImageLayer]:
        """The chain that the caller records after the job."""
        base, _, upper, head = self.layers
        return {"commit": [base, upper, head], "stream": [base, head], "stream all": [head], "copy": [self.copy]}[kind]

    def shows(self, layers: Sequence[ImageLayer], like: int = -1) -> bool:
        return qemu_img.compare(self.tools, layers, [ImageLayer("shown", str(self.shown[like]), "raw")])

    def check(self, kind: Kind, *, leaks: bool = False) -> None:
        """What holds at every instant."""
        assert self.shows(self.layers)
        for number in WRITTEN[kind]:
            found = qemu_img.check(self.tools, self.layers[number].path, self.layers[number].format)
            assert (found.errors, found.corruptions) == (0, 0)
            assert leaks or found.leaks == 0

    def check_done(self, kind: Kind, *, leaks: bool = False) -> None:
        self.check(kind, leaks=leaks)
        assert self.shows(self.merged(kind))
        assert kind != "commit" or (self.shows(self.layers[:3], like=2) and self.shows(self.layers[:1], like=1))

    def contents(self, kind: Kind) -> list[bytes]:
        """The bytes of the files that a job must not touch."""
        return [Path(layer.path).read_bytes() for n, layer in enumerate(self.layers) if n not in WRITTEN[kind]]

    def is_locked(self) -> bool:
        return any(qsd.is_locked(layer.path, alone=True) for layer in self.layers)

    def moved_to(self, directory: Path) -> "Scene":
        """A copy of it."""
        shutil.copytree(self.directory, directory, dirs_exist_ok=True)
        layers = (ImageLayer(layer.id, str(directory / layer.id), layer.format) for layer in self.layers)
        return Scene(self.tools, directory, tuple(layers), self.shown)


def qemu_io(tools: QemuTools) -> str:
    return str(Path(tools.qemu_img).with_name("qemu-io"))


def writable_json(chain: Sequence[ImageLayer]) -> str:
    node: dict[str, Any] | None = None
    for layer in chain:
        lower = node
        node = {"driver": layer.format, "discard": "unmap", "file": {"driver": "file", "filename": layer.path}}
        node["read-only"] = layer is not chain[-1]
        node["file"] |= {"read-only": layer is not chain[-1], "discard": "unmap"}
        if layer.format == "qcow2":
            node["backing"] = lower
    return "json:" + json.dumps(node)


def write_randomly(tools: QemuTools, chain: Sequence[ImageLayer], model: bytearray, rng: random.Random) -> None:
    """Write, zero and discard in the last layer, and in the model."""
    script: list[str] = []
    for _ in range(24):
        what = rng.choice(["write", "write", "write", "zero", "discard"])
        unit = CLUSTER_BYTES if what == "discard" else rng.choice([512, 4 * KIB, CLUSTER_BYTES])
        length_bytes = rng.randrange(1, 8) * rng.choice([unit, max(unit, CLUSTER_BYTES)])
        offset_bytes = rng.randrange(0, (len(model) - length_bytes) // unit) * unit
        pattern = rng.randrange(1, 256) if what == "write" else 0
        order = {"write": f"write -q -P {pattern}", "zero": "write -q -z", "discard": "discard -q"}[what]
        script += ["-c", f"{order} {offset_bytes} {length_bytes}"]
        model[offset_bytes : offset_bytes + length_bytes] = bytes([pattern]) * length_bytes
    subprocess.run([qemu_io(tools), writable_json(chain), *script], check=True, timeout=30)


def make_scene(tools: QemuTools, directory: Path, base: str, seed: int) -> Scene:
    rng = random.Random(seed)
    sizes_bytes = [4 * MIB + 4 * KIB, 5 * MIB + 12 * KIB, 7 * MIB, 8 * MIB + 4 * KIB]
    elsewhere = directory.parent / f"{directory.name}-shown"
    elsewhere.mkdir()
    directory.mkdir(exist_ok=True)
    layers: list[ImageLayer] = []
    shown: list[Path] = []
    model = bytearray()
    for number, size_bytes in enumerate(sizes_bytes):
        layer_id = f"{seed:08x}{number:016x}"
        layer = ImageLayer(layer_id, str(directory / layer_id), "qcow2" if layers or base != "raw" else "raw")
        if layers:
            make_overlay(layer.path, size_bytes)
        else:
            argv = [tools.qemu_img, "create", "-q", *BASES[base], layer.path, str(size_bytes)]
            subprocess.run(argv, check=True, timeout=30)
        layers.append(layer)
        model += bytes(size_bytes - len(model))
        write_randomly(tools, layers, model, rng)
        shown.append(elsewhere / str(number))
        shown[-1].write_bytes(model)
    return Scene(tools, directory, tuple(layers), tuple(shown))


def make_overlay(path: str, size_bytes: int) -> None:
    """An overlay as the driver makes it, but for the name of its parent."""
    image = encode_image(size_bytes=size_bytes, backing=Backing("no/such/file", "raw"))
    with Path(path).open("wb") as file:
        for offset_bytes, content in image.extents():
            file.seek(offset_bytes)
            file.write(content)
        file.truncate(image.file_bytes)


@pytest.fixture(scope="module")
def scenes(tools: QemuTools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    """One for each base; only copies of them are changed."""
    directory = tmp_path_factory.mktemp("scenes")
    return {base: make_scene(tools, directory / base, base, seed) for seed, base in enumerate(BASES)}


@pytest.fixture
def scene(scenes: dict[str, Scene], tmp_path: Path) -> Scene:
    return scenes["qcow2"].moved_to(tmp_path / "images")


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def assert_no_children() -> None:
    def left() -> list[psutil.Process]:
        return [process for process in descendants(os.getpid()) if not has_ended(process)]

    with suppress(AssertionError):  # a killed one ends when it gets a processor
        wait_until(lambda: not left(), "every child has ended")
    assert [process.cmdline() for process in left()] == []


# --- contents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MERGES)
@pytest.mark.parametrize("base", BASES)
def test_merge_twice(scenes: dict[str, Scene], tmp_path: Path, base: str, kind: Kind) -> None:
    scene = scenes[base].moved_to(tmp_path)
    untouched = scene.contents(kind)
    upper = Path(scene.layers[2].path).read_bytes()
    for _ in range(2):
        scene.run(kind)
        scene.check_done(kind)
        assert Path(scene.layers[2].path).read_bytes()[CLUSTER_BYTES:] == upper[CLUSTER_BYTES:]  # its string at most
        info = qemu_img.info(scene.tools, scene.layers[2 if kind == "commit" else 3].path, "qcow2")
        wanted = (None, None) if kind == "stream all" else (NAME, scene.layers[0].format)
        assert (info.backing_file, info.backing_format) == wanted
    assert scene.contents(kind) == untouched
    assert_no_children()
    assert not scene.is_locked()


@pytest.mark.parametrize("kind", MERGES)
def test_merge_after_merge(scene: Scene, kind: Kind) -> None:
    """A job that was given up after it had been run leaves a chain for every other job."""
    scene.run("commit")
    scene.run(kind)
    scene.check_done(kind)


def test_commit_into_a_middle_layer(scene: Scene) -> None:
    base, lower, upper, head = scene.layers
    untouched = Path(base.path).read_bytes()
    for _ in range(2):
        jobs.commit_down(scene.tools, scene.layers, top=upper.id, base=lower.id, backing_name=NAME, watch=go_on)
        assert scene.shows(scene.layers) and scene.shows(scene.layers[:3], like=2)
        assert scene.shows([base, lower, head]) and scene.shows([base, lower], like=2)
    assert qemu_img.info(scene.tools, head.path, "qcow2").backing_file == NAME
    assert Path(base.path).read_bytes() == untouched


def test_commit_keeps_holes_of_a_raw_base(tools: QemuTools, scenes: dict[str, Scene], tmp_path: Path) -> None:
    scene = scenes["raw"].moved_to(tmp_path)
    base, *others = scene.layers
    spent = 512 * Path(base.path).stat().st_blocks
    for layer in others:
        make_overlay(layer.path, 2000 * MIB)
    write_image(tools, others[0], 7, 1900 * MIB, 2 * MIB)
    scene.run("commit")
    assert Path(base.path).stat().st_size == 2000 * MIB
    assert Path(base.path).stat().st_blocks * 512 < spent + 3 * MIB


def test_durable_on_return(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def spy(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", spy)
    base, _, upper, head = (layer.path for layer in scene.layers)
    for kind, files in (("commit", [base, upper]), ("stream", [head]), ("copy", [scene.copy.path])):
        synced.clear()
        scene.run(kind)  # type: ignore[arg-type]
        assert synced == files


def test_a_flush_that_fails_is_not_durable(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: qsd.PrivateDaemon) -> None:
        raise Unavailable("flush")

    with monkeypatch.context() as patched:
        patched.setattr(qsd.PrivateDaemon, "flush", fail)
        with pytest.raises(Unavailable, match="flush"):
            scene.run("stream")
    layers = qsd.PrivateDaemon.layers

    def writable(self: qsd.PrivateDaemon) -> dict[str, qsd.OpenLayer]:
        return {name: qsd.OpenLayer(layer.size_bytes, read_only=False) for name, layer in layers(self).items()}

    with monkeypatch.context() as patched:
        patched.setattr(qsd.PrivateDaemon, "layers", writable)
        with pytest.raises(Unavailable, match="could not be flushed"):
            scene.run("commit")
    scene.run("commit")
    scene.check_done("commit")


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_format", ["qcow2", "raw"])
@pytest.mark.parametrize("base", ["qcow2", "raw"])
def test_copy_is_whole_sparse_and_has_the_size(
    tools: QemuTools, scenes: dict[str, Scene], tmp_path: Path, base: str, target_format: Literal["qcow2", "raw"]
) -> None:
    scene = scenes[base].moved_to(tmp_path)
    path = str(scene.directory / "target")
    seen: list[jobs.Progress] = []

    def watch(progress: jobs.Progress) -> jobs.Answer:
        seen.append(progress)
        return "go on"

    before = scene.contents("copy")
    jobs.copy_chain(tools, scene.layers, path, target_format, size_bytes=3000 * MIB, watch=watch)
    info = qemu_img.info(tools, path, target_format)
    assert (info.virtual_size_bytes, info.backing_file) == (3000 * MIB, None)
    assert info.actual_size_bytes < 9 * MIB
    assert scene.shows([ImageLayer("t", path, target_format)])
    assert qemu_img.check(tools, path, target_format) == qemu_img.CheckResult(0, 0, 0)
    assert Path(path).stat().st_mode & 0o777 == 0o600
    assert seen[0] == jobs.Progress(0, 0)
    assert scene.contents("copy") == before


def test_copy_refuses_an_existing_target_and_a_small_size(scene: Scene) -> None:
    target = scene.directory / "target"
    size_bytes = scene.shown[-1].stat().st_size
    with pytest.raises(OutOfRange):
        jobs.copy_chain(scene.tools, scene.layers, str(target), "raw", size_bytes=size_bytes - 512, watch=go_on)
    assert not target.exists()
    target.write_text("mine")
    with pytest.raises(Refused):
        jobs.copy_chain(scene.tools, scene.layers, str(target), "raw", size_bytes=size_bytes, watch=go_on)
    assert target.read_text() == "mine"


def test_copy_of_the_deepest_chain_fits_into_the_memory(tools: QemuTools, tmp_path: Path) -> None:
    # With QEMU's default caches it does not: "Could not allocate metadata caches".
    chain = make_chain(tools, tmp_path, 64, 1 << 40)
    write_image(tools, chain[10], 9, 512 * MIB, MIB)
    jobs.copy_chain(tools, chain, str(tmp_path / "copy"), "qcow2", size_bytes=1 << 40, watch=go_on)
    copied = ImageLayer("copy", str(tmp_path / "copy"), "qcow2")
    script = ["-c", f"read -q -P 9 {512 * MIB} {MIB}", "-c", f"read -q -P 0 {513 * MIB} {MIB}"]
    subprocess.run([qemu_io(tools), "-r", "-f", "qcow2", *script, copied.path], check=True, timeout=30)


# --- requests that cannot be done ------------------------------------------------------------------------------------


def test_wrong_requests_touch_nothing(scene: Scene) -> None:
    tools, layers = scene.tools, scene.layers
    base, lower, upper, head = (layer.id for layer in layers)
    before = [Path(layer.path).read_bytes() for layer in layers]
    for top, into in ((head, upper), (upper, base), (base, lower), (lower, lower), (lower, "0" * 24), ("0" * 24, base)):
        with pytest.raises(InvalidArgument):
            jobs.commit_down(tools, layers, top=top, base=into, backing_name=NAME, watch=go_on)
    wrong = [(upper, base, NAME), (head, upper, NAME), (head, base, None), (head, None, NAME), (head, "0" * 24, NAME)]
    for into, below, name in wrong:
        with pytest.raises(InvalidArgument):
            jobs.stream_up(tools, layers, into=into, base=below, backing_name=name, watch=go_on)
    for kind in KINDS:
        with pytest.raises(InvalidArgument, match="speed"):
            scene.run(kind, speed_bytes_per_s=MIB - 1)
    assert [Path(layer.path).read_bytes() for layer in layers] == before
    assert not Path(scene.copy.path).exists()


@pytest.mark.parametrize("kind", MERGES)
def test_sizes_that_fall_are_refused(scene: Scene, kind: Kind) -> None:
    # Merging would let the base's data beyond the end of a smaller layer shine through.
    make_overlay(scene.layers[1].path, 4 * MIB)
    before = [Path(layer.path).read_bytes() for layer in scene.layers]
    with pytest.raises(Corrupt, match="lies on"):
        scene.run(kind)
    assert [Path(layer.path).read_bytes() for layer in scene.layers] == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_layer_is_corrupt(scene: Scene, kind: Kind) -> None:
    Path(scene.layers[1].path).unlink()
    with pytest.raises(Corrupt, match="does not exist"):
        scene.run(kind)
    assert not Path(scene.copy.path).exists()


# --- watch and speed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_stop(scene: Scene, kind: Kind) -> None:
    for call in (1, 2, 4):
        seen: list[float] = []

        def watch(progress: jobs.Progress) -> jobs.Answer:
            seen.append(time.monotonic())  # noqa: B023
            return "stop" if len(seen) >= call else "go on"  # noqa: B023

        with pytest.raises(jobs.Stopped):
            scene.run(kind, watch, speed_bytes_per_s=4 * MIB)
        assert time.monotonic() - seen[-1] < 2
        assert len(seen) == call
        assert_no_children()
        assert not scene.is_locked()
        assert not Path(scene.copy.path).exists()
    scene.check(kind)
    scene.run(kind)
    scene.check_done(kind)


@pytest.mark.parametrize("kind", MERGES)
def test_stop_that_is_known_when_the_layers_are_open_moves_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """As for a process that was stopped for minutes just before it started its daemon. The job would take a moment."""
    plain, is_open = qsd.PrivateDaemon.open, False

    def slow(daemon: qsd.PrivateDaemon, layers: Sequence[ImageLayer]) -> None:
        nonlocal is_open
        plain(daemon, layers)
        is_open = True

    monkeypatch.setattr(qsd.PrivateDaemon, "open", slow)
    before = [Path(layer.path).read_bytes() for layer in scene.layers]
    with pytest.raises(jobs.Stopped):
        scene.run(kind, lambda _: "stop" if is_open else "go on")
    assert [Path(layer.path).read_bytes() for layer in scene.layers] == before


@pytest.mark.parametrize("kind", ["commit", "copy"])
def test_an_error_of_the_watch_ends_the_job(scene: Scene, kind: Kind) -> None:
    calls = 0

    def watch(progress: jobs.Progress) -> jobs.Answer:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError
        return "go on"

    with pytest.raises(ZeroDivisionError):
        scene.run(kind, watch, speed_bytes_per_s=4 * MIB)
    assert_no_children()
    scene.check(kind, leaks=True)


@pytest.mark.parametrize("kind", KINDS)
def test_speed_and_progress(scene: Scene, kind: Kind) -> None:
    seen: list[jobs.Progress] = []

    def watch(progress: jobs.Progress) -> jobs.Answer:
        seen.append(progress)
        return "go on"

    started = time.monotonic()
    scene.run(kind, watch, speed_bytes_per_s=8 * MIB)
    assert time.monotonic() - started > 0.25
    assert len(seen) >= 3
    amounts = [progress.current_bytes for progress in seen]
    assert amounts == sorted(amounts)
    assert 0 < amounts[-1] <= seen[-1].total_bytes
    scene.check_done(kind)


# --- who dies --------------------------------------------------------------------------------------------------------

SPEED_BYTES_PER_S = 24 * MIB

_CALLER = """
import json, os, sys
from csi_quobyte.host import command, jobs
from csi_quobyte.host.qemu import ImageLayer, QemuTools
for line in sys.stdin:
    isolated, function, tools, layers, arguments, options = json.loads(line)
    pid = os.fork()
    if pid == 0:
        if isolated:
            command.isolate()
        chain = [ImageLayer(*layer) for layer in layers]
        getattr(jobs, function)(QemuTools(*tools), chain, *arguments, watch=lambda progress: "go on", **options)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Caller:
    """A process that runs one job after the other in children, which can be killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CALLER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def start(self, scene: Scene, kind: Kind, speed_bytes_per_s: int, *, isolated: bool) -> int:
        """Begin the job and return the pid of the process that called it."""
        base, lower, _, head = (layer.id for layer in scene.layers)
        arguments: list[object] = []
        options: dict[str, object] = {"speed_bytes_per_s": speed_bytes_per_s}
        if kind == "commit":
            options |= {"top": lower, "base": base, "backing_name": NAME}
        elif kind == "copy":
            arguments += [scene.copy.path, "qcow2"]
            options |= {"size_bytes": scene.shown[-1].stat().st_size}
        else:
            below = (base, NAME) if kind == "stream" else (None, None)
            options |= {"into": head, "base": below[0], "backing_name": below[1]}
        function = {"commit": "commit_down", "copy": "copy_chain"}.get(kind, "stream_up")
        tools = (scene.tools.qemu_img, scene.tools.storage_daemon, scene.tools.version)
        layers = [(layer.id, layer.path, layer.format) for layer in scene.layers]
        print(json.dumps([isolated, function, tools, layers, arguments, options]), file=self._stdin, flush=True)
        return int(self._stdout.readline())

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(int(self._stdout.readline()))

    def close(self) -> None:
        self._stdin.close()
        self._process.wait(10)
        self._stdout.close()


@pytest.fixture
def caller() -> Iterator[Caller]:
    made = Caller()
    yield made
    made.close()


def kill_with_witnesses(pid: int) -> list[psutil.Process]:
    """SIGKILL a process, and return its descendants of that moment."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # so that it starts nothing between the two lines
        found = descendants(pid)
        os.kill(pid, signal.SIGKILL)
        return found
    return []


@pytest.mark.parametrize("kind", KINDS)
def test_the_caller_is_killed_at_random_moments(scene: Scene, caller: Caller, tmp_path: Path, kind: Kind) -> None:
    rng = random.Random(kind)
    saved = {Path(layer.path): Path(layer.path).read_bytes() for layer in scene.layers}
    whole_s: list[float] = []
    for isolated in (False, True):
        Path(scene.copy.path).unlink(missing_ok=True)
        began = time.monotonic()
        caller.start(scene, kind, SPEED_BYTES_PER_S, isolated=isolated)
        assert caller.wait() == 0
        whole_s.append(time.monotonic() - began)
    killed = with_daemon = 0
    for number in range(40):
        for path, content in saved.items():
            path.write_bytes(content)
        Path(scene.copy.path).unlink(missing_ok=True)
        pid = caller.start(scene, kind, SPEED_BYTES_PER_S, isolated=number % 2 == 0)
        time.sleep(rng.uniform(0, 0.9 * min(whole_s)))
        witnesses = kill_with_witnesses(pid)
        if caller.wait() == 0:
            continue  # it was faster than those
        killed += 1
        with_daemon += bool(witnesses)
        wait_until(lambda: all(has_ended(process) for process in witnesses), "all it had started has ended")  # noqa: B023
        wait_until(lambda: not scene.is_locked(), "its locks are gone with the last of its threads")
        scene.check(kind, leaks=True)
        Path(scene.copy.path).unlink(missing_ok=True)
        if killed % 3 == 0:
            scene.run(kind)
            scene.check_done(kind, leaks=True)
        if killed == 10:
            break
    assert killed == 10
    assert with_daemon >= 5


def living() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def watchers() -> list[psutil.Process]:
    return [child for child in living() if "_watcher.py" in " ".join(child.cmdline())]


def workers() -> list[psutil.Process]:
    """The processes that do a job: without the watchdog of a storage daemon."""
    return [child for child in living() if child not in watchers()]


@pytest.mark.parametrize("kind", KINDS)
def test_its_process_is_killed(scene: Scene, kind: Kind) -> None:
    def watch(progress: jobs.Progress) -> jobs.Answer:
        if progress.current_bytes:
            for child in workers():
                child.kill()
        return "go on"

    with pytest.raises(Unavailable, match="137"):
        scene.run(kind, watch, speed_bytes_per_s=4 * MIB)
    assert not Path(scene.copy.path).exists()
    scene.check(kind, leaks=True)
    scene.run(kind)
    scene.check_done(kind, leaks=True)


def test_its_watchdog_is_killed(scene: Scene) -> None:
    def watch(progress: jobs.Progress) -> jobs.Answer:
        if progress.current_bytes:
            for watcher in watchers():
                watcher.kill()
        return "go on"

    with pytest.raises(Unavailable, match="watchdog"):
        scene.run("stream", watch, speed_bytes_per_s=4 * MIB)
    assert_no_children()
    scene.check("stream", leaks=True)


@pytest.mark.parametrize("kind", ["stream", "copy"])
def test_its_process_hangs(scene: Scene, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    def watch(progress: jobs.Progress) -> jobs.Answer:
        if progress.current_bytes:
            for child in workers():
                child.suspend()
        return "go on"

    with monkeypatch.context() as patched:
        patched.setattr(qsd, "is_locked", None)  # perhaps it is the pool that hangs: better not touch it
        with pytest.raises(Unavailable, match="no progress for 1"):
            scene.run(kind, watch, speed_bytes_per_s=4 * MIB, stall_timeout_s=1.0)
    assert_no_children()
    scene.check(kind, leaks=True)
    assert not Path(scene.copy.path).exists()


@pytest.mark.root
@pytest.mark.parametrize("kind", ["commit", "stream", "copy"])
def test_the_pool_dies(scene: Scene, standin: Standin, tmp_path: Path, kind: Kind) -> None:
    pristine, scene = scene, scene.moved_to(standin.mountpoint)

    def watch(progress: jobs.Progress) -> jobs.Answer:
        if progress.current_bytes:
            os.kill(standin.pid, signal.SIGKILL)
        return "go on"

    with pytest.raises(Unavailable):
        scene.run(kind, watch, speed_bytes_per_s=4 * MIB)
    assert_no_children()
    below = pristine.moved_to(tmp_path / "again")
    shutil.copytree(standin.directory, below.directory, dirs_exist_ok=True)
    below.check(kind, leaks=True)
    Path(below.copy.path).unlink(missing_ok=True)
    below.run(kind)
    below.check_done(kind, leaks=True)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["commit", "copy"])
def test_a_hung_pool_is_given_up(scene: Scene, standin: Standin, kind: Kind) -> None:
    scene = scene.moved_to(standin.mountpoint)
    hung_at = 0.0

    def watch(progress: jobs.Progress) -> jobs.Answer:
        nonlocal hung_at
        if progress.current_bytes and not hung_at:
            hung_at = time.monotonic()
            os.kill(standin.pid, signal.SIGSTOP)
        return "go on"

    # a copy has to unlink its target, which waits for the mount as everything does that touches it
    resume = threading.Timer(2.5, os.kill, (standin.pid, signal.SIGCONT))
    if kind == "copy":
        resume.start()
    try:
        with pytest.raises(Unavailable, match="no progress for 1"):
            scene.run(kind, watch, speed_bytes_per_s=4 * MIB, stall_timeout_s=1.0)
        assert kind == "copy" or time.monotonic() - hung_at < 6
    finally:
        resume.cancel()
        os.kill(standin.pid, signal.SIGCONT)
    wait_until(lambda: not scene.is_locked(), "the process that hung has ended")
    scene.check(kind, leaks=True)


# --- no space, locks -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    image, mountpoint = tmp_path / "disk", tmp_path / "small"
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(128 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True, timeout=30)
    subprocess.run(["mount", "-o", "loop", str(image), str(mountpoint)], check=True, timeout=30)
    yield mountpoint
    subprocess.run(["umount", str(mountpoint)], check=True, timeout=30)


@pytest.mark.root
@pytest.mark.parametrize(("base", "kind"), [("raw", "commit"), *(("qcow2", kind) for kind in KINDS)])
def test_no_space(
    tools: QemuTools, scenes: dict[str, Scene], small_disk: Path, tmp_path: Path, kind: Kind, base: str
) -> None:
    layers = scenes[base].moved_to(small_disk).layers
    for number, layer in enumerate(layers[1:]):
        make_overlay(layer.path, 32 * MIB)
        if number < 2:
            write_image(tools, layer, number + 1, (6 + 10 * number) * MIB, 8 * MIB)
    shown = tuple(tmp_path / f"shown{number}" for number in range(4))
    for number, path in enumerate(shown):
        qemu_img.convert(tools, layers[: number + 1], str(path), "raw")
    scene = Scene(tools, small_disk, layers, shown)
    untouched = scene.contents(kind)
    filler = small_disk / "filler"
    for left_bytes in (256 * KIB, 3 * MIB):
        found = os.statvfs(small_disk)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - left_bytes)
        with pytest.raises(Exhausted):
            scene.run(kind)
        assert_no_children()
        assert not Path(scene.copy.path).exists()
        scene.check(kind)
        assert scene.contents(kind) == untouched
        filler.unlink()
    scene.run(kind)
    scene.check_done(kind)


@contextmanager
def held(tools: QemuTools, layer: ImageLayer, *, writable: bool) -> Iterator[None]:
    """Another process has a layer open."""
    node = {"driver": layer.format, "read-only": not writable, "file": {"driver": "file", "filename": layer.path}}
    if layer.format == "qcow2":
        node["backing"] = None
    argv = [qemu_io(tools), *([] if writable else ["-r"]), "json:" + json.dumps(node)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    try:
        process.stdin.write("length\n")
        process.stdin.flush()
        assert "iB" in process.stdout.readline()
        yield
    finally:
        process.communicate("quit\n", timeout=10)


@pytest.mark.parametrize(
    ("kind", "layer", "writable", "refused"),
    [
        ("commit", 0, False, True),
        ("commit", 0, True, True),
        ("commit", 1, False, True),
        ("commit", 2, False, True),
        ("commit", 2, True, True),
        ("commit", 3, True, False),
        ("stream", 0, False, False),
        ("stream", 0, True, True),
        ("stream", 1, False, False),
        ("stream", 3, False, True),
        ("stream", 3, True, True),
        ("copy", 0, False, False),
        ("copy", 3, True, True),
    ],
)
def test_a_lock_of_another(scene: Scene, kind: Kind, layer: int, writable: bool, refused: bool) -> None:
    before = scene.contents("copy")
    with held(scene.tools, scene.layers[layer], writable=writable):
        if not refused:
            scene.run(kind)
        else:
            with pytest.raises(Busy, match=scene.layers[layer].id):
                scene.run(kind)
    if refused:
        assert scene.contents("copy") == before
        assert not Path(scene.copy.path).exists()
        scene.run(kind)
    scene.check_done(kind)


def test_nobody_can_open_what_a_job_writes(scene: Scene) -> None:
    refused: list[int] = []

    def watch(progress: jobs.Progress) -> jobs.Answer:
        if progress.current_bytes and not refused:
            for layer in scene.layers[:3]:
                argv = [qemu_io(scene.tools), "-c", "length", writable_json([layer])]
                refused.append(subprocess.run(argv, check=False, capture_output=True, timeout=30).returncode)
        return "go on"

    scene.run("commit", watch, speed_bytes_per_s=4 * MIB)
    assert refused == [1, 1, 1]


# --- the child that a job runs in ------------------------------------------------------------------------------------


def test_a_tied_child_gives_its_output_and_its_status() -> None:
    with command.tied(["sh", "-c", "echo out; echo error >&2; exit 7"]) as child:
        assert child.wait(10) == child.wait(0) == 7
        assert (child.read_stdout(), child.read_stdout(), child.stderr_tail()) == ("out\n", "", "error\n")
        assert child.activity().strip() == ""


def test_a_tied_child_ends_with_the_block_and_its_group_too() -> None:
    with command.tied(["sh", "-c", "sleep 1000 & echo $!; exec sleep 1000"]) as child:
        said: list[str] = []
        wait_until(lambda: said.append(child.read_stdout()) or "\n" in "".join(said), "it says the pid")  # type: ignore[func-returns-value]
        group = [psutil.Process(child.pid), psutil.Process(int("".join(said)))]
        assert child.wait(0) is None
    wait_until(lambda: all(has_ended(process) for process in group), "both have ended")


def test_a_tied_child_never_waits_for_a_reader() -> None:
    with command.tied(["sh", "-c", "yes | head -c 300000; yes >&2 | head -c 300000 >&2; exit 3"]) as child:
        assert child.wait(10) is not None


def test_a_tied_child_gets_a_descriptor_and_limits() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"given\n")
    os.close(write_end)
    limits = command.Limits(address_space_bytes=1 << 30, cpu_s=None)
    with command.tied(["sh", "-c", "cat; ulimit -v; exit 0"], stdin=read_end, limits=limits) as child:
        os.close(read_end)
        assert child.wait(10) == 0
        assert child.read_stdout() == f"given\n{1 << 20}\n"
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_tied_child_whose_parent_has_died_already_does_nothing() -> None:
    argv = ["sh", "-c", command._TIED, "sh", "0", "echo", "ran"]
    done = subprocess.run(argv, check=False, capture_output=True, timeout=10)
    assert (done.returncode, done.stdout) == (125, b"")


def test_a_tied_program_that_is_missing() -> None:
    with command.tied(["no-such-program-here"]) as child:
        assert child.wait(10) == 127
        assert "no-such-program-here" in child.stderr_tail()


def test_jobs_from_several_threads_of_an_isolated_process(
    tools: QemuTools, scenes: dict[str, Scene], tmp_path: Path
) -> None:
    """The descriptors of several starts at once do not get mixed up."""
    made = [scene.moved_to(tmp_path / base) for base, scene in scenes.items()]
    program = (
        "import json, sys, threading\n"
        "from csi_quobyte.host import command, jobs\n"
        "from csi_quobyte.host.qemu import ImageLayer, QemuTools\n"
        "command.isolate()\n"
        "tools, chains = json.loads(sys.argv[1])\n"
        "def work(layers):\n"
        "    chain = [ImageLayer(*layer) for layer in layers]\n"
        "    how = {'into': chain[-1].id, 'base': None, 'backing_name': None, 'watch': lambda progress: 'go on'}\n"
        "    for _ in range(3):\n"
        "        jobs.stream_up(QemuTools(*tools), chain, **how)\n"
        "        done.append(1)\n"
        "done = []\n"
        "threads = [threading.Thread(target=work, args=(layers,)) for layers in chains]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(len(done))\n"
    )
    fields = (tools.qemu_img, tools.storage_daemon, tools.version)
    argument = json.dumps(
        [fields, [[(layer.id, layer.path, layer.format) for layer in scene.layers] for scene in made]]
    )
    done = subprocess.run(
        [sys.executable, "-c", program, argument],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.stdout == "9\n", done.stderr
    for scene in made:
        scene.check_done("stream all")


def test_copy_is_made_durable_by_a_descriptor_that_was_there_before_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only such a one is surely told of an error of writing back."""
    target = scene.directory / "target"
    seen: list[int] = []
    right, fsync = jobs._convert, os.fsync

    def opened() -> list[int]:
        links = [entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return [int(entry.name) for entry in links if os.path.realpath(entry) == str(target)]

    def convert(*arguments: Any, **named: Any) -> None:
        right(*arguments, **named)
        seen.extend(opened())

    def fails(fd: int) -> None:
        if fd in seen:
            raise OSError(errno.EIO, "told once")
        fsync(fd)

    monkeypatch.setattr(jobs, "_convert", convert)
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(Unavailable, match="told once"):
        jobs.copy_chain(scene.tools, scene.layers, str(target), "raw", size_bytes=64 * MIB, watch=go_on)
    assert len(seen) == 1
    assert not target.exists()
