"""The life of a volume on two nodes: written, snapshotted, restored, cloned, grown, moved, deleted.

Axes: the class (format, file system, binding mode, data path) and the volume mode.
"""

import pytest

from tests.cluster.api import DEADLINE_S, wait_for
from tests.cluster.below import node_processes
from tests.cluster.kit import Kind, Space

KINDS = (
    Kind("qcow2-xfs"),  # WaitForFirstConsumer
    Kind("qcow2-ext4"),  # Immediate
    Kind("raw-xfs"),
    Kind("raw-ext4-loop"),
    Kind("qcow2-xfs", block=True),
)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_life_of_a_volume(space: Space, kind: Kind) -> None:
    data = space.claim("data", kind)
    writer = space.pod("writer", data, node="node-a")
    checksum = writer.write()
    has_daemon = bool(node_processes("qemu-storage-daemon"))
    assert has_daemon == (kind.storage_class != "raw-ext4-loop")
    writer.delete()
    data.wait_detached()

    snapshot = space.snapshot("yesterday", data)
    snapshot.wait_ready()
    restored = space.claim("restored", kind, source=snapshot)
    larger = space.claim("larger", kind, source=snapshot, size="640Mi")
    clone = space.claim("clone", kind, source=data)
    readers = [
        space.pod(f"reads-{claim.name}", claim, node="node-b", wait=False) for claim in (restored, larger, clone)
    ]
    for reader in readers:
        assert reader.wait_running().checksum() == checksum
    assert readers[0].size_mib() < 400
    assert readers[1].size_mib() > 550
    for reader in readers:
        reader.delete()

    data.grow_detached("960Mi")
    moved = space.pod("moved", data, node="node-b")
    data.wait_size("960Mi")
    assert moved.checksum() == checksum
    wait_for("the size in the pod", lambda: moved.size_mib() > 850)
    changed = moved.write(flush=False)  # a detach brings it to the pool
    moved.delete()

    snapshot.delete()  # its children live on, and so does its source
    again = space.pod("again", restored, node="node-a")
    assert again.checksum() == checksum
    back = space.pod("back", data, node="node-a")
    assert back.checksum() == changed


def test_layer_of_a_deleted_snapshot_is_merged(space: Space) -> None:
    data = space.claim("data", Kind("raw-xfs"))
    first = space.pod("first", data)
    first.write()
    first.delete()
    data.wait_detached()
    snapshot = space.snapshot("snapshot", data)
    snapshot.wait_ready()
    second = space.pod("second", data, node="node-b")
    checksum = second.write()
    second.delete()
    data.wait_detached()
    assert layers_in_use(space) == 2
    snapshot.delete()
    wait_for("one layer", lambda: layers_in_use(space) == 1, deadline_s=180)  # a minute of it: see GRACE_S in merging
    assert space.pod("third", data, node="node-a").checksum() == checksum


def layers_in_use(space: Space) -> int:
    """Give the number of layers in the pool that the test uses."""
    disks = next(pool for pool in space.cluster.csi_quobyte("check") if pool["pool"] == "disks")
    return int(disks["checked"]["layers"])


def test_xfs_grows_while_a_pod_writes(space: Space) -> None:
    data = space.claim("data", Kind("qcow2-xfs"))
    pod = space.pod("writer", data)
    checksum = pod.write()
    pod.run("(while sleep 0.05; do date >>/v/log || exit 1; done) >/dev/null 2>&1 & echo $! >/tmp/pid")
    data.grow("1Gi")
    data.wait_size("1Gi")
    wait_for("the size in the pod", lambda: pod.size_mib() > 900)
    assert pod.checksum() == checksum
    pod.run("kill -0 $(cat /tmp/pid)")  # no write has failed


def test_second_pod_waits_for_the_first_one(space: Space) -> None:
    data = space.claim("data", Kind("qcow2-ext4"))
    first = space.pod("first", data, node="node-a")
    checksum = first.write()
    second = space.pod("second", data, node="node-b", wait=False)
    space.wait_event("second", "FailedAttachVolume.*(already used by pod|already exclusively attached)")
    assert first.checksum() == checksum
    first.delete()
    assert second.wait_running(deadline_s=2 * DEADLINE_S).checksum() == checksum


def test_file_system_group_may_write(space: Space) -> None:
    data = space.claim("data", Kind("qcow2-xfs"))
    spec = {
        "terminationGracePeriodSeconds": 0,
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000, "runAsNonRoot": True},
        "containers": [
            {
                "name": "main",
                "image": "busybox:stable",
                "imagePullPolicy": "Never",
                "command": ["sh", "-c", "echo mine >/v/file && sleep 86400"],
                "volumeMounts": [{"name": "disk", "mountPath": "/v"}],
            }
        ],
        "volumes": [{"name": "disk", "persistentVolumeClaim": {"claimName": data.name}}],
    }
    space.cluster.create("Pod", {"metadata": {"name": "user"}, "spec": spec}, space.name)
    wait_for("the file", lambda: _reads(space, "user", "/v/file") == "mine 2000")


def _reads(space: Space, pod: str, path: str) -> str:
    """Give a file's text and group; an empty text while it cannot be read."""
    try:
        return space.cluster.exec(pod, space.name, "sh", "-c", f"echo $(cat {path}) $(stat -c %g {path})").strip()
    except Exception:  # noqa: BLE001 - the container does not run yet
        return ""
