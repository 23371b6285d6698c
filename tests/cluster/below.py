"""What is below the cluster: the machine with its pools, devices, processes and mounts, where nothing may be left."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.cluster.api import NAMESPACE, NODES, POOLS, RUN, Cluster

_LOG_CHARACTERS = 6000
_OUR_MOUNTS = re.compile(r"/kubernetes\.io~csi/|/kubernetes\.io/csi/|^/var/lib/csi-quobyte/")


def left_behind(cluster: Cluster) -> list[str]:
    """Name what is on the machine although no volume is in use and none exists."""
    return [*_pool_files(), *_findings(cluster), *_daemons(), *_devices(), *_mounts()]


def explain(cluster: Cluster, namespace: str, *, since_s: int) -> str:
    """Give the events and logs that explain a failure."""
    parts = []
    for event in cluster.all("Event", namespace):
        about = event["involvedObject"]
        parts.append(f"--- {about['kind']} {about.get('name')}: {event.get('reason')}: {event.get('message')}")
    for component in ("controller", "node"):
        for pod in cluster.driver_pods(component):
            name = pod["metadata"]["name"]
            for container in pod["spec"]["containers"]:
                text = cluster.log(name, NAMESPACE, container["name"], since_s=since_s)
                node = pod["spec"].get("nodeName")
                parts.append(f"--- {name} {container['name']} on {node}\n{text[-_LOG_CHARACTERS:]}")
    return "\n".join(parts)


def node_processes(name: str) -> list[int]:
    """Give the pids of the processes of a name that run in a node of the cluster."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            groups = (entry / "cgroup").read_text(encoding="utf-8")
        except OSError:  # ended meanwhile
            continue
        if Path(command).name == name and "/cq-node-" in groups:
            found.append(int(entry.name))
    return found


def _pool_files() -> Iterator[str]:
    """Name what is in a pool besides what every pool has."""
    for directory in (RUN / "volumes" / "disks", RUN / "small.mnt" / "volume"):
        for part in ("volumes", "snapshots", "layers", "tmp"):
            for path in sorted((directory / part).rglob("*")):
                if not (path.is_dir() and re.fullmatch(r"[0-9a-f]{2}", path.name)):
                    yield f"file {path}"


def _findings(cluster: Cluster) -> Iterator[str]:
    checked = cluster.csi_quobyte("check")
    assert [pool["pool"] for pool in checked] == list(POOLS)
    return (f"check: {finding}" for pool in checked for finding in pool["findings"])


def _daemons() -> Iterator[str]:
    return (f"storage daemon {pid}" for pid in node_processes("qemu-storage-daemon"))


def _devices() -> Iterator[str]:
    before: Sequence[str] = json.loads((RUN / "loops.json").read_text(encoding="utf-8"))
    for entry in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        device = f"/dev/{entry.parents[1].name}"
        try:
            backing = entry.read_text(encoding="utf-8").strip()
        except OSError:  # not bound any more
            continue
        if device not in before and not backing.endswith("/small.img"):
            yield f"loop device {device} on {backing}"


def _mounts() -> Iterator[str]:
    for node in NODES:
        pid = (RUN / node / "init.pid").read_text(encoding="utf-8").strip()
        for line in Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8").splitlines():
            target = line.split(" ")[4]
            if _OUR_MOUNTS.search(target):
                yield f"mount {target} on {node}"
