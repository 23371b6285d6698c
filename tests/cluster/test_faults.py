"""A node that crashes, and upgrades and new installations of the driver under volumes that are in use.

A node here is a set of namespaces, and its crash is the end of all its processes at once: the kernel and its loop
devices live on, and no memory of the machine is lost. What is not shown: a power cut, a kernel panic, a node that
hangs.
"""

import pytest

from tests.cluster.api import DRIVER, NAMESPACE, RELEASE, Object, cluster_sh, wait_for
from tests.cluster.kit import Claim, Kind, Space, pod_spec

TAINT = {"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}


def deployment(claim: Claim) -> Object:
    """Give a Deployment of one pod that uses a claim."""
    labels = {"app": "writer"}
    spec = pod_spec(claim) | {"tolerations": [{"key": "node.kubernetes.io/unreachable", "operator": "Exists"}]}
    return {
        "metadata": {"name": "writer"},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def running_pod(space: Space, *, not_on: str = "") -> str | None:
    """Give the name of the Deployment's pod that runs and is not on a node."""
    for pod in space.cluster.all("Pod", space.name):
        is_there = pod["status"].get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp")
        if is_there and pod["spec"].get("nodeName") != not_on:
            return str(pod["metadata"]["name"])
    return None


def is_ready(space: Space, node: str) -> bool:
    found = space.cluster.find("Node", node)
    conditions = found["status"]["conditions"] if found else []
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def driver_is_back(space: Space) -> bool:
    found = space.cluster.find("DaemonSet", f"{RELEASE}-node", NAMESPACE)
    controller = space.cluster.find("Deployment", f"{RELEASE}-controller", NAMESPACE)
    return bool(
        found
        and found["status"].get("numberReady") == 2
        and controller
        and controller["status"].get("readyReplicas") == 1
    )


def test_node_crash(space: Space) -> None:
    data = space.claim("data", Kind("qcow2-xfs"))
    space.cluster.create("Deployment", deployment(data), space.name)
    first = wait_for("the first pod", lambda: running_pod(space))
    lost = str(space.find("Pod", first)["spec"]["nodeName"])  # type: ignore[index]

    def run(pod: str, script: str) -> str:
        return space.cluster.exec(pod, space.name, "sh", "-c", script).strip()

    run(first, "dd if=/dev/urandom of=/v/data bs=1M count=32 2>/dev/null; sync")
    checksum = run(first, "sha256sum </v/data")

    cluster_sh("node-crash", lost)
    try:
        wait_for(f"{lost} not ready", lambda: not is_ready(space, lost))
        space.cluster.patch("Node", lost, {"spec": {"taints": [TAINT]}})
        second = wait_for("the pod on the other node", lambda: running_pod(space, not_on=lost), deadline_s=180)
        assert run(second, "sha256sum </v/data") == checksum
    finally:
        cluster_sh("node-up", lost)
        space.cluster.patch("Node", lost, {"spec": {"taints": None}})
    wait_for("the driver on both nodes", lambda: driver_is_back(space), deadline_s=180)
    run(second, "echo more >>/v/log && sync")
    # not from the second pod's memory: what the returned node may have done would show in the image only
    space.delete("Deployment", "writer")
    wait_for("the pods gone", lambda: not space.cluster.all("Pod", space.name))
    data.wait_detached()
    fresh = space.pod("fresh", data, node=lost)
    assert fresh.checksum() == checksum
    assert fresh.run("tail -n 1 /v/log") == "more"


@pytest.mark.parametrize("block", [False, True], ids=["mount", "block"])
def test_node_pod_ends_under_a_volume_in_use(space: Space, block: bool) -> None:
    data = space.claim("data", Kind("qcow2-xfs", block=block))
    pod = space.pod("writer", data, node="node-a")
    checksum = pod.write(flush=False)
    before = next(one for one in space.cluster.driver_pods("node") if one["spec"]["nodeName"] == "node-a")
    space.cluster.delete("Pod", before["metadata"]["name"], NAMESPACE)
    wait_for("the driver on both nodes", lambda: driver_is_back(space), deadline_s=180)
    pod.delete()
    data.wait_detached()
    assert space.pod("reader", data, node="node-b").checksum() == checksum


def test_upgrade_leaves_the_nodes_alone(space: Space) -> None:
    data = space.claim("data", Kind("qcow2-xfs"))
    pod = space.pod("writer", data)
    checksum = pod.write()
    write = "i=0; while i=$((i+1)); do echo $i >>/v/log && sync /v/log || exit 1; done"
    pod.run(f"({write}) >/dev/null 2>&1 & echo $! >/tmp/pid")
    nodes = {one["metadata"]["uid"] for one in space.cluster.driver_pods("node")}
    controllers = {one["metadata"]["uid"] for one in space.cluster.driver_pods("controller")}
    try:
        cluster_sh("install", "--set", "logLevel=debug")
        assert {one["metadata"]["uid"] for one in space.cluster.driver_pods("node")} == nodes
        assert not controllers & {one["metadata"]["uid"] for one in space.cluster.driver_pods("controller")}
        pod.run("kill -0 $(cat /tmp/pid)")  # no write has failed
        pod.run("kill $(cat /tmp/pid); sync")
        count = int(pod.run("wc -l </v/log"))
        assert pod.run("sort -n /v/log | uniq | wc -l") == str(count)
        assert pod.checksum() == checksum
    finally:
        cluster_sh("install")


def test_volume_survives_an_uninstall(space: Space) -> None:
    data = space.claim("data", Kind("qcow2-xfs"))
    pod = space.pod("writer", data)
    checksum = pod.write()
    pod.delete()
    data.wait_detached()
    cluster_sh("helm", "uninstall", RELEASE, "--namespace", NAMESPACE, "--wait")
    assert space.cluster.find("CSIDriver", DRIVER) is None
    cluster_sh("install")
    reader = space.pod("reader", data)
    assert reader.checksum() == checksum
