"""What a user of the cluster waits for, beside a reference driver in the same cluster, in alternating rounds.

The reference (reference/) is a small driver in Go without crash safety: image files under loop devices, snapshots and
restores by copying. What both have in common (API server, sidecars, kubelet, mkfs) is most of the time here; read the
ratios. Nothing is asserted about time, but every checksum is compared.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.api import DRIVER, NAMESPACE, RUN, Cluster, cluster_sh, wait_for
from tests.cluster.kit import Kind, Space, end_space, make_space

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "reference.csi-quobyte.test"
CLASSES = {"ours": ("bench", "disks"), "reference": ("reference", "reference")}  # StorageClass, VolumeSnapshotClass
SIZE, LARGER = "1Gi", "2Gi"

Times = dict[str, dict[str, list[float]]]


class Clock:
    """Collects seconds by what was waited for and for whom."""

    def __init__(self) -> None:
        self.times: Times = defaultdict(lambda: defaultdict(list))

    @contextmanager
    def measure(self, what: str, whose: str) -> Iterator[None]:
        """Time a block."""
        began = time.monotonic()
        yield
        self.times[what][whose].append(time.monotonic() - began)


def install(cluster: Cluster, images: Path) -> None:
    """Bring the reference driver into the cluster, and a class of ours that binds at once."""
    cluster_sh("load", str(images / "bench" / "reference.tar"))
    manifest = (ROOT / "tests/cluster/reference/reference.yaml").read_text(encoding="utf-8")
    rendered = RUN / "reference.yaml"
    rendered.write_text(manifest.replace("@DATA@", str(RUN / "reference")), encoding="utf-8")
    cluster_sh("kubectl", "apply", "-f", str(rendered))
    cluster_sh(
        "kubectl",
        "-n",
        "reference",
        "rollout",
        "status",
        "--timeout=120s",
        "deployment/reference-controller",
        "daemonset/reference-node",
    )
    parameters = {"pool": "disks", "csi.storage.k8s.io/fstype": "xfs"}
    body = {"metadata": {"name": "bench"}, "provisioner": DRIVER, "parameters": parameters}
    cluster.create("StorageClass", body | {"allowVolumeExpansion": True, "volumeBindingMode": "Immediate"})
    for node in cluster.all("CSINode"):
        name = node["metadata"]["name"]
        wait_for(f"the drivers on {name}", lambda name=name: registered(cluster, name) == {DRIVER, REFERENCE})  # type: ignore[misc]


def registered(cluster: Cluster, node: str) -> set[str]:
    """Give the names of the drivers that are registered on a node."""
    found = cluster.find("CSINode", node) or {}
    return {driver["name"] for driver in found.get("spec", {}).get("drivers") or []}


def one_round(space: Space, clock: Clock, whose: str) -> None:
    """Follow one volume, and time each thing that a user waits for."""
    storage_class, snapshot_class = CLASSES[whose]
    kind = Kind(storage_class)
    with clock.measure("claim bound", whose):
        data = space.claim("data", kind, size=SIZE)
        _ = data.volume
    with clock.measure("pod has attached it and written 16 MiB", whose):
        pod = space.pod("writer", data, node="node-a")
        checksum = pod.write()
    with clock.measure("grown while in use", whose):
        data.grow(LARGER)
        wait_for("the size", lambda: pod.size_mib() > 1600)
    with clock.measure("moved to the other node", whose):
        pod.delete()
        moved = space.pod("moved", data, node="node-b")
    moved.delete()
    data.wait_detached()
    with clock.measure("snapshot ready", whose):
        snapshot = space.snapshot("snapshot", data, snapshot_class=snapshot_class)
        snapshot.wait_ready()
    with clock.measure("restored and read on the other node", whose):
        restored = space.claim("restored", kind, size=LARGER, source=snapshot)
        reader = space.pod("reader", restored, node="node-b")
        assert reader.checksum() == checksum, f"{whose}: the restored volume holds something else"


def memory_mib(cluster: Cluster, namespace: str) -> dict[str, float]:
    """Give the working set of each container of a namespace, the largest where there are several of a name."""
    found: dict[str, float] = {}
    for node in cluster.all("Node"):
        summary = json.loads(
            cluster_sh("kubectl", "get", "--raw", f"/api/v1/nodes/{node['metadata']['name']}/proxy/stats/summary")
        )
        for pod in summary["pods"]:
            if pod["podRef"]["namespace"] == namespace:
                component = pod["podRef"]["name"].rpartition("-")[0]
                for container in pod.get("containers", []):
                    name = f"{component.split('-')[-1] if 'node' in component else 'controller'}/{container['name']}"
                    used = container.get("memory", {}).get("workingSetBytes", 0) / (1 << 20)
                    found[name] = max(found.get(name, 0.0), used)
    return found


def table(times: Times) -> str:
    """Give the figures as a Markdown table, in seconds."""
    lines = ["| | ours, median (worst) | reference, median (worst) | ratio of medians |", "|---|---|---|---|"]
    for what, by in times.items():
        median = {whose: statistics.median(found) for whose, found in by.items()}
        cells = [f"{median[whose]:.2f} s ({max(by[whose]):.2f})" for whose in CLASSES]
        lines.append(f"| {what} | {' | '.join(cells)} | {median['ours'] / median['reference']:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=Path, required=True, help="where images.sh has put them")
    arguments = parser.parse_args()
    cluster, clock = Cluster(), Clock()
    install(cluster, arguments.images)
    for number in range(arguments.rounds + 1):
        if number == 1:
            clock = Clock()  # the first round pays for what is loaded once
        for whose in CLASSES if number % 2 else reversed(CLASSES):
            space = make_space(cluster, f"{whose}-{number}")
            one_round(space, clock, whose)
            if number == arguments.rounds and whose == "ours":
                memory = memory_mib(cluster, NAMESPACE)
            end_space(space)
    print(table(clock.times))
    print("\n| container | working set |\n|---|---|")
    for name, used in sorted(memory.items()):
        print(f"| {name} | {used:.0f} MiB |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
