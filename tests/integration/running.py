"""The running driver for tests: controller and node as real processes on a stand-in, and the calls of a client.

Owns making a machine with a path short enough for sockets, and the last word about it: `running` ends a test module by
checking that no mount, device or daemon is left, that no volume is attached, and that `csi-quobyte check` is content.

PYTEST_DONT_REWRITE: it is imported by test modules and not loaded as a plugin.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import scratch

from csi_quobyte.pb import csi_pb2 as csi
from lab.client import Client, mount_capability
from lab.machine import QEMU_DIR, Machine, run, wait_for

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

Parameters = dict[str, Any]
PATHS: dict[str, Parameters] = {
    "qcow2": {},
    "raw": {"volumeFormat": "raw"},
    "loop": {"volumeFormat": "raw", "dataPath": "loop"},
}
"""The parameters that lead to each data path: a storage daemon with either format, and a loop device on the file."""

Code = grpc.StatusCode
Attempt = Callable[..., Any]


@contextmanager
def machine_of(
    *, pools: Sequence[str] = ("main",), backing: Path | None = None, standin: bool = True
) -> Iterator[Machine]:
    """Make a machine without processes in a new directory with a short path, and clear it away in any case."""
    base = Path(tempfile.mkdtemp(prefix="cq-", dir=scratch.directory()))
    try:
        with Machine(base, pools=pools, backing=backing, standin=standin) as machine:
            yield machine
    finally:
        shutil.rmtree(base, ignore_errors=True)


@contextmanager
def running(*extra: str, pools: Sequence[str] = ("main",), backing: Path | None = None) -> Iterator[Machine]:
    """Make a machine with controller and node; at the end of the block nothing of its volumes may be left.

    `extra` are further options of both processes.
    """
    with machine_of(pools=pools, backing=backing) as machine:
        machine.start(*extra)
        yield machine
        assert_clean(machine)


def assert_clean(machine: Machine) -> None:
    """Check that everything was released: no mounts, devices, daemons or attachments; no findings in the pools."""
    assert machine.leftovers() == []
    attached = [row for row in objects(machine) if row["node"]]
    assert attached == []
    found = findings_left(machine)
    assert not found, found


def findings_left(machine: Machine, *, timeout_s: float = 40.0) -> list[dict[str, Any]]:
    """Give what `csi-quobyte check` still finds when the collector, which works behind the calls, has had its time."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = machine.check()
        return not found

    with suppress(TimeoutError):
        wait_for("check to find nothing", look, timeout_s=timeout_s)
    return found


def fails(code: grpc.StatusCode, call: Attempt, *arguments: Any, saying: str = "", **named: Any) -> str:
    """Make a call that must end with `code`, and give its message, in which the pattern `saying` must be found."""
    try:
        call(*arguments, **named)
    except grpc.RpcError as error:
        details = error.details() or ""
        assert error.code() is code, f"{error.code()}: {details}"
        assert re.search(saying, details), f"{saying!r} is not in {details!r}"
        return details
    raise AssertionError(f"the call succeeded, expected {code}")


def eventually(call: Attempt, *arguments: Any, timeout_s: float = 60.0, **named: Any) -> Any:
    """Repeat a call, as the sidecars and the kubelet do, while its code says that a retry may help."""
    answers: list[Any] = []

    def attempt() -> bool:
        try:
            answers.append(call(*arguments, **named))
        except grpc.RpcError as error:
            if error.code() in (Code.UNAVAILABLE, Code.ABORTED, Code.DEADLINE_EXCEEDED):
                return False
            raise
        return True

    wait_for(f"{call} to succeed", attempt, timeout_s=timeout_s)
    return answers[0]


def objects(machine: Machine) -> list[dict[str, Any]]:
    """Give what `csi-quobyte ls` lists."""
    found = machine.cli("ls", *machine.pool_arguments, "--json")
    return list(json.loads(found.stdout)["objects"])


def listing(directory: Path) -> list[str]:
    """Give every file below a pool's directory but the ones that come and go without meaning."""
    found = (str(path.relative_to(directory)) for path in directory.rglob("*"))
    return sorted(path for path in found if not path.startswith(("tmp/", "reserve/")))


def volume_record(machine: Machine, volume_id: str, pool: str = "main") -> Path:
    """Give the file of a volume's record, below the stand-in."""
    return next((machine.directories[pool] / "volumes").glob(f"*/{volume_id}.json"))


def head_of(machine: Machine, volume_id: str, pool: str = "main") -> Path:
    """Give the image file of a volume's head, below the stand-in."""
    head = json.loads(volume_record(machine, volume_id, pool).read_text())["head"]
    return next(path for path in (machine.directories[pool] / "layers").glob(f"*/{head}.*") if is_image(path))


def is_image(path: Path) -> bool:
    """Say whether a file of a layer is its image."""
    return path.suffix in (".qcow2", ".raw")


def qemu_io(image: Path, image_format: str, *commands: str) -> str:
    """Run commands of qemu-io on one image on its own, without its backing file, and give what it says."""
    options = f"driver={image_format},file.driver=file,file.filename={image}"
    backing = ",backing=" if image_format == "qcow2" else ""
    given = [word for command in commands for word in ("-c", command)]
    return run(QEMU_DIR / "qemu-io", "--image-opts", options + backing, *given).stdout


def qemu_img(*arguments: str | Path) -> str:
    """Run qemu-img and give what it says."""
    return run(QEMU_DIR / "qemu-img", *arguments).stdout


def write_tree(directory: Path, *, files: int = 8, size_bytes: int = 256 * 1024) -> dict[str, str]:
    """Write random files, durably, and give their checksums."""
    sums = {}
    for number in range(files):
        data = os.urandom(size_bytes)
        path = directory / f"file-{number}"
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sums[path.name] = hashlib.sha256(data).hexdigest()
    return sums


def read_tree(directory: Path) -> dict[str, str]:
    """Give the checksums of the files that `write_tree` writes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("file-*")}


def free_port() -> int:
    """Give a port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def release(client: Client, volume_id: str) -> None:
    """Unpublish, unstage and detach, as often as it takes."""
    for call in (client.unpublish, client.unstage, client.detach):
        eventually(call, volume_id)


def discard(client: Client, *volume_ids: str) -> None:
    """Take volumes away, whatever state a test left them in."""
    for volume_id in volume_ids:
        with suppress(grpc.RpcError):
            release(client, volume_id)
        eventually(client.delete, volume_id)


def stage_request(
    client: Client, volume: str, context: Mapping[str, str], **changed: Any
) -> csi.NodeStageVolumeRequest:
    """Give a NodeStageVolume request, for calls that the client would not make."""
    fields: dict[str, Any] = {
        "volume_id": volume,
        "publish_context": context,
        "staging_target_path": str(client.staging_path(volume)),
        "volume_capability": mount_capability(),
    }
    return csi.NodeStageVolumeRequest(**fields | changed)
