"""What the stories speak in: claims, snapshots and pods of one namespace.

Everything waits on a condition with a deadline, and says what it waited for. Objects are Kubernetes' own, as dicts;
only what the stories need has a name here.
"""

import re
import time
from dataclasses import dataclass, field

from tests.cluster.api import DEADLINE_S, Cluster, Object, wait_for

SNAPSHOT_CLASS = "disks"
WRITTEN_MIB = 16


@dataclass(frozen=True)
class Kind:
    """What a claim asks for."""

    storage_class: str
    block: bool = False

    def __str__(self) -> str:
        return f"{self.storage_class}{'-block' if self.block else ''}"


@dataclass(frozen=True)
class Claim:
    """A PersistentVolumeClaim."""

    space: "Space"
    name: str
    kind: Kind

    @property
    def object(self) -> Object:
        """The claim as the API has it."""
        found = self.space.find("PersistentVolumeClaim", self.name)
        assert found, f"claim {self.name} is gone"
        return found

    @property
    def volume(self) -> str:
        """The name of its PersistentVolume; waits until it is bound."""

        def bound() -> str | None:
            claim = self.object
            return claim["spec"]["volumeName"] if claim["status"]["phase"] == "Bound" else None

        return wait_for(f"claim {self.name} bound", bound)

    def wait_detached(self) -> None:
        """Wait until no node has the volume any more."""
        volume = self.volume
        wait_for(f"volume of claim {self.name} detached", lambda: not self.space.cluster.attachments(volume))

    def grow(self, size: str) -> None:
        """Ask for a larger size."""
        change = {"spec": {"resources": {"requests": {"storage": size}}}}
        self.space.cluster.patch("PersistentVolumeClaim", self.name, change, self.space.name)

    def grow_detached(self, size: str) -> None:
        """Ask for a larger size, and wait until the controller has given it: a pod that comes now finds it."""
        self.grow(size)
        volume = self.volume

        def has_grown() -> bool:
            found = self.space.cluster.find("PersistentVolume", volume)
            return bool(found and found["spec"]["capacity"]["storage"] == size)

        wait_for(f"volume of claim {self.name} of {size}", has_grown)

    def wait_size(self, size: str) -> None:
        """Wait until the claim says that it has this size."""
        wait_for(f"claim {self.name} of {size}", lambda: self.object["status"]["capacity"]["storage"] == size)

    def delete(self) -> None:
        """Delete it, and wait until its PersistentVolume is gone too."""
        volume = self.object["spec"].get("volumeName")
        self.space.delete("PersistentVolumeClaim", self.name)
        if volume:
            wait_for(f"volume {volume} gone", lambda: self.space.cluster.find("PersistentVolume", volume) is None)

    def wait_event(self, pattern: str) -> str:
        """Wait for an event about it that matches a regular expression, and give its message."""
        return self.space.wait_event(self.name, pattern)


@dataclass(frozen=True)
class Snapshot:
    """A VolumeSnapshot."""

    space: "Space"
    name: str

    def wait_ready(self) -> None:
        """Wait until it can be restored."""

        def ready() -> bool:
            found = self.space.find("VolumeSnapshot", self.name)
            return bool(found and found.get("status", {}).get("readyToUse"))

        wait_for(f"snapshot {self.name} ready", ready)

    def delete(self) -> None:
        """Delete it, and wait until its content object is gone too."""
        found = self.space.find("VolumeSnapshot", self.name) or {}
        content = found.get("status", {}).get("boundVolumeSnapshotContentName")
        self.space.delete("VolumeSnapshot", self.name)
        if content:
            find = self.space.cluster.find
            wait_for(f"content of {self.name} gone", lambda: find("VolumeSnapshotContent", content) is None)


@dataclass(frozen=True)
class Pod:
    """A pod with one claim, mounted at /v or as the device /dev/xv."""

    space: "Space"
    name: str
    claim: Claim

    def run(self, script: str) -> str:
        """Run a shell script in it and give its output."""
        return self.space.cluster.exec(self.name, self.space.name, "sh", "-c", script).strip()

    def wait_running(self, deadline_s: float = DEADLINE_S) -> "Pod":
        """Wait until its container runs."""

        def running() -> bool:
            found = self.space.find("Pod", self.name)
            return bool(found and found["status"].get("phase") == "Running")

        wait_for(f"pod {self.name} running", running, deadline_s=deadline_s)
        return self

    @property
    def node(self) -> str:
        """The node it runs on."""
        found = self.space.find("Pod", self.name)
        assert found
        return str(found["spec"]["nodeName"])

    def write(self, *, flush: bool = True) -> str:
        """Write random data, flush it unless told not to, and give its checksum."""
        target = "/dev/xv" if self.claim.kind.block else "/v/data"
        how = "conv=fsync,notrunc" if flush else "conv=notrunc"
        self.run(f"dd if=/dev/urandom of=/tmp/data bs=1M count={WRITTEN_MIB} 2>/dev/null")
        self.run(f"dd if=/tmp/data of={target} bs=1M {how} 2>/dev/null")
        return self.run("sha256sum </tmp/data")

    def checksum(self) -> str:
        """Give the checksum of what `write` has written."""
        if self.claim.kind.block:
            return self.run(f"dd if=/dev/xv bs=1M count={WRITTEN_MIB} 2>/dev/null | sha256sum")
        return self.run("sha256sum </v/data")

    def size_mib(self) -> int:
        """Give the size of the file system or of the device that the pod sees."""
        if self.claim.kind.block:
            return int(self.run("blockdev --getsize64 /dev/xv")) >> 20
        return int(self.run("df -k /v | awk 'END {print $2}'")) >> 10

    def delete(self) -> None:
        """Delete it and wait until it is gone."""
        self.space.delete("Pod", self.name)


@dataclass
class Space:
    """A namespace of one test, and what is in it."""

    cluster: Cluster
    name: str
    started: float = field(default_factory=time.monotonic)

    def find(self, kind: str, name: str) -> Object | None:
        """Give an object of this namespace."""
        return self.cluster.find(kind, name, self.name)

    def delete(self, kind: str, name: str) -> None:
        """Delete an object of this namespace, and wait until it is gone."""
        self.cluster.delete(kind, name, self.name)

    def claim(self, name: str, kind: Kind, *, size: str = "320Mi", source: Claim | Snapshot | None = None) -> Claim:
        """Make a claim, of a snapshot or another claim if `source` is given."""
        spec: Object = {
            "storageClassName": kind.storage_class,
            "accessModes": ["ReadWriteOnce"],
            "volumeMode": "Block" if kind.block else "Filesystem",
            "resources": {"requests": {"storage": size}},
        }
        if isinstance(source, Snapshot):
            source_object = {"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": source.name}
            spec["dataSource"] = source_object
        elif source:
            spec["dataSource"] = {"kind": "PersistentVolumeClaim", "name": source.name}
        self.cluster.create("PersistentVolumeClaim", {"metadata": {"name": name}, "spec": spec}, self.name)
        return Claim(self, name, kind)

    def snapshot(self, name: str, claim: Claim, *, snapshot_class: str = SNAPSHOT_CLASS) -> Snapshot:
        """Take a snapshot; does not wait."""
        spec = {
            "volumeSnapshotClassName": snapshot_class,
            "source": {"persistentVolumeClaimName": claim.name},
        }
        self.cluster.create("VolumeSnapshot", {"metadata": {"name": name}, "spec": spec}, self.name)
        return Snapshot(self, name)

    def pod(self, name: str, claim: Claim, *, node: str | None = None, wait: bool = True) -> Pod:
        """Make a pod that uses a claim, and wait until it runs."""
        spec = pod_spec(claim)
        if node:
            spec["nodeSelector"] = {"kubernetes.io/hostname": node}
        self.cluster.create("Pod", {"metadata": {"name": name}, "spec": spec}, self.name)
        pod = Pod(self, name, claim)
        return pod.wait_running() if wait else pod

    def wait_event(self, name: str, pattern: str) -> str:
        """Wait for an event about an object that matches a regular expression, and give its message."""

        def matching() -> str | None:
            return next((one for one in self.cluster.events(name, self.name) if re.search(pattern, one)), None)

        return wait_for(f"an event about {name} like {pattern!r}", matching)


def pod_spec(claim: Claim) -> Object:
    """Give the specification of a pod that waits, with a claim at /v or /dev/xv."""
    container: Object = {
        "name": "main",
        "image": "busybox:stable",
        "imagePullPolicy": "Never",
        "command": ["sleep", "86400"],
    }
    if claim.kind.block:
        container["volumeDevices"] = [{"name": "disk", "devicePath": "/dev/xv"}]
    else:
        container["volumeMounts"] = [{"name": "disk", "mountPath": "/v"}]
    return {
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [{"name": "disk", "persistentVolumeClaim": {"claimName": claim.name}}],
    }


def make_space(cluster: Cluster, name: str) -> Space:
    """Make a namespace."""
    cluster.create("Namespace", {"metadata": {"name": name}})
    wait_for(f"the service account of namespace {name}", lambda: cluster.has_service_account(name))
    return Space(cluster, name)


def end_space(space: Space) -> None:
    """Delete a namespace with all that is in it, pods first, and wait until their volumes are gone."""
    for kind in ("Deployment", "Pod", "VolumeSnapshot", "PersistentVolumeClaim"):
        for one in space.cluster.all(kind, space.name):
            space.delete(kind, one["metadata"]["name"])
    space.cluster.delete("Namespace", space.name)
    for kind in ("PersistentVolume", "VolumeAttachment", "VolumeSnapshotContent"):
        wait_for(f"every {kind} gone", lambda kind=kind: not space.cluster.all(kind))  # type: ignore[misc]
