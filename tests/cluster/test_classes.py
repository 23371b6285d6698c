"""What a class can ask for besides a blank disk: copies and caches of snapshots, the trash, golden images.

Axes: the clone mode; what is brought back from the trash and used by a PersistentVolume made by hand.
"""

import hashlib

import pytest

from tests.cluster.api import DRIVER, NAMESPACE, POOLS, Object, wait_for
from tests.cluster.kit import WRITTEN_MIB, Claim, Kind, Space

XFS = Kind("qcow2-xfs")
LINE = b"all of a golden image reads like this\n"


def layers_of(space: Space, claim: Claim) -> list[Object]:
    """Give the layers of a claim's volume, the head first."""
    (found,) = space.cluster.csi_quobyte(f"show {handle_of(space, claim)}")
    chain: list[Object] = found["chain"]
    return chain


def handle_of(space: Space, claim: Claim) -> str:
    volume = space.cluster.find("PersistentVolume", claim.volume)
    assert volume
    return str(volume["spec"]["csi"]["volumeHandle"])


@pytest.mark.parametrize(("mode", "layers"), [("copy-raw", 1), ("cache", 2)])
def test_clone_mode(space: Space, mode: str, layers: int) -> None:
    data = space.claim("data", XFS)
    writer = space.pod("writer", data)
    checksum = writer.write()
    writer.delete()
    data.wait_detached()
    snapshot = space.snapshot("snapshot", data)
    snapshot.wait_ready()
    claims = [space.claim(name, Kind(mode), source=snapshot, size="640Mi") for name in ("first", "second")]
    for claim in claims:
        assert len(layers_of(space, claim)) == layers
    snapshot.delete()
    data_pod = space.pod("data-again", data)
    data_pod.run("echo changed >/v/data && sync")
    for claim in claims:
        reader = space.pod(f"reads-{claim.name}", claim, node="node-b")
        assert reader.checksum() == checksum
        assert reader.size_mib() > 550


def test_volume_comes_back_from_the_trash(space: Space) -> None:
    data = space.claim("data", Kind("trash"))
    writer = space.pod("writer", data)
    checksum = writer.write()
    writer.delete()
    data.delete()
    (entry,) = wait_for("the volume in the trash", lambda: trashed(space))
    try:
        assert entry["claim"] == f"{space.name}/data"
        (restored,) = space.cluster.csi_quobyte(f"trash restore {entry['id']}")
        try:
            back = static_claim(space, "back", str(restored["id"]))
            assert space.pod("reader", back, node="node-b").checksum() == checksum
        finally:
            for kind, name in (("Pod", "reader"), ("PersistentVolumeClaim", "back")):
                space.delete(kind, name)
            space.cluster.delete("PersistentVolume", "back")
        # its reclaim policy has deleted it: into the trash again, as the class of its time said
        wait_for("the volume in the trash again", lambda: trashed(space))
    finally:
        for one in trashed(space):
            space.cluster.csi_quobyte(f"trash purge {one['id']}")
    assert trashed(space) == []
    space.cluster.csi_quobyte("gc")  # else its space is freed by the controller's next look, some minutes later


def trashed(space: Space) -> list[Object]:
    """Give what is in the trash of all pools."""
    return [entry for pool in space.cluster.csi_quobyte("trash ls") for entry in pool["entries"]]


def static_claim(space: Space, name: str, handle: str) -> Claim:
    """Make a PersistentVolume for a handle, and a claim for it."""
    spec = {
        "capacity": {"storage": "320Mi"},
        "accessModes": ["ReadWriteOnce"],
        "persistentVolumeReclaimPolicy": "Delete",
        "storageClassName": "",
        "csi": {"driver": DRIVER, "volumeHandle": handle, "fsType": "xfs"},
    }
    # the provisioner deletes only what says that it was provisioned by it
    metadata = {"name": name, "annotations": {"pv.kubernetes.io/provisioned-by": DRIVER}}
    space.cluster.create("PersistentVolume", {"metadata": metadata, "spec": spec})
    claim = {
        "storageClassName": "",
        "volumeName": name,
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "320Mi"}},
    }
    space.cluster.create("PersistentVolumeClaim", {"metadata": {"name": name}, "spec": claim}, space.name)
    return Claim(space, name, Kind(""))


def test_volumes_of_a_golden_image(space: Space) -> None:
    size_bytes = WRITTEN_MIB << 20
    content = (LINE * (size_bytes // len(LINE) + 1))[:size_bytes]
    in_controller(
        space,
        f"yes '{LINE.decode().strip()}' | head -c {size_bytes} | csi-quobyte image import disks golden -"
        " --source-format raw",
    )
    try:
        claims = [space.claim(name, Kind("golden", block=True)) for name in ("first", "second")]
        first = space.pod("first", claims[0], node="node-a")
        assert first.checksum().split()[0] == hashlib.sha256(content).hexdigest()
        first.write()
    finally:
        in_controller(space, "csi-quobyte image rm disks golden")
    second = space.pod("second", claims[1], node="node-b")
    assert second.checksum().split()[0] == hashlib.sha256(content).hexdigest(), "removed, and written by another volume"


def in_controller(space: Space, shell: str) -> str:
    """Run a shell command in the controller's pod, with the pools as the operator's commands take them."""
    pod = next(pod for pod in space.cluster.driver_pods("controller") if not pod["metadata"].get("deletionTimestamp"))
    pools = " ".join(f"--pool {pool}=/pools/{pool}/{pool}" for pool in POOLS)
    return space.cluster.exec(pod["metadata"]["name"], NAMESPACE, "sh", "-c", f"{shell} {pools}", container="driver")
