"""What users see when something is wrong: one sentence in the events of their object, which says what to do.

These are what `kubectl describe pvc` and `kubectl describe volumesnapshot` show.
"""

import re
from collections.abc import Iterator

import pytest

from tests.cluster.api import DRIVER, wait_for
from tests.cluster.kit import Kind, Space


@pytest.fixture
def wrong_class(space: Space) -> Iterator[str]:
    name = "wrong-parameter"
    manifest = {
        "metadata": {"name": name},
        "provisioner": DRIVER,
        "parameters": {"pool": "disks", "volumeFormat": "vmdk"},
        "volumeBindingMode": "Immediate",
    }
    space.cluster.create("StorageClass", manifest)
    yield name
    space.cluster.delete("StorageClass", name)


def test_wrong_parameter(space: Space, wrong_class: str) -> None:
    claim = space.claim("data", Kind(wrong_class))
    message = claim.wait_event("ProvisioningFailed.*InvalidArgument")
    assert "volumeFormat 'vmdk' is not one of qcow2, raw" in message


def test_full_pool(space: Space) -> None:
    claim = space.claim("data", Kind("small"), size="40Gi")
    message = claim.wait_event("ProvisioningFailed.*ResourceExhausted")
    assert re.search(r"pool small: 40 GiB are asked for and [\d.]+ [GM]iB are left; delete volumes", message)
    assert "enlarge the Quobyte volume" in message


def test_pool_that_is_not_mounted(space: Space) -> None:
    claim = space.claim("data", Kind("absent"))
    message = claim.wait_event("ProvisioningFailed.*Unavailable")
    assert "pool absent" in message
    assert "mount the Quobyte volume there on every host" in message
    # and the calls of the other pools go on
    other = space.claim("other", Kind("qcow2-ext4"))
    assert other.volume


def test_snapshot_of_an_attached_volume(space: Space) -> None:
    data = space.claim("data", Kind("qcow2-xfs"))
    pod = space.pod("writer", data)
    checksum = pod.write()
    snapshot = space.snapshot("now", data)

    def failure() -> str:
        found = space.find("VolumeSnapshot", "now") or {}
        return str(found.get("status", {}).get("error", {}).get("message", ""))

    message = wait_for("the snapshot's error", failure)
    assert "is attached to node" in message
    assert "delete the pods that use it" in message
    assert pod.checksum() == checksum
    pod.delete()
    data.wait_detached()
    snapshot.wait_ready()  # the snapshotter tries again by itself
