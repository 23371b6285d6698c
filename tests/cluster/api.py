"""The cluster that is up: its API, its operators' commands, and waiting with a deadline."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kubernetes import client, config, dynamic, stream
from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic.exceptions import NotFoundError

T = TypeVar("T")
Object = dict[str, Any]

HERE = Path(__file__).resolve().parent
RUN = Path(os.environ.get("CLUSTER_RUN", "/var/cache/csi-quobyte/cluster/run"))
NAMESPACE = "csi-quobyte"
RELEASE = "csi-quobyte"
DRIVER = "block.csi.quobyte.com"
NODES = ("node-a", "node-b")
POOLS = ("disks", "small")

DEADLINE_S = 90.0  # for one step of a story; a step takes a few seconds
EXEC_TIMEOUT_S = 60
COMMAND_TIMEOUT_S = 300

_API_VERSIONS = {
    "Pod": "v1",
    "PersistentVolumeClaim": "v1",
    "PersistentVolume": "v1",
    "Namespace": "v1",
    "Node": "v1",
    "Event": "v1",
    "ConfigMap": "v1",
    "Deployment": "apps/v1",
    "DaemonSet": "apps/v1",
    "StorageClass": "storage.k8s.io/v1",
    "VolumeAttachment": "storage.k8s.io/v1",
    "CSINode": "storage.k8s.io/v1",
    "CSIDriver": "storage.k8s.io/v1",
    "VolumeSnapshot": "snapshot.storage.k8s.io/v1",
    "VolumeSnapshotContent": "snapshot.storage.k8s.io/v1",
}


def wait_for(what: str, attempt: Callable[[], T | None], *, deadline_s: float = DEADLINE_S) -> T:
    """Call `attempt` until it gives something true, and give that.

    Raises:
        TimeoutError: it did not within the time limit; `what` is named.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        found = attempt()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {deadline_s:g} s for: {what}")
        time.sleep(0.1)


def cluster_sh(*arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Run cluster.sh and give its output.

    Raises:
        RuntimeError: it failed; the message has what it said.
    """
    done = subprocess.run(
        [HERE / "cluster.sh", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        raise RuntimeError(f"cluster.sh {' '.join(arguments)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


class Cluster:
    """The API of the cluster that is up."""

    def __init__(self) -> None:
        config.load_kube_config(str(RUN / "admin.kubeconfig"))
        api = client.ApiClient()
        self._dynamic = dynamic.DynamicClient(api)
        self._core = client.CoreV1Api(api)

    def _resource(self, kind: str) -> Any:
        return self._dynamic.resources.get(api_version=_API_VERSIONS[kind], kind=kind)

    def create(self, kind: str, manifest: Object, namespace: str | None = None) -> None:
        """Create an object."""
        body = {"apiVersion": _API_VERSIONS[kind], "kind": kind, **manifest}
        self._resource(kind).create(body=body, namespace=namespace)

    def find(self, kind: str, name: str, namespace: str | None = None) -> Object | None:
        """Give an object, None if there is none."""
        try:
            found: Object = self._resource(kind).get(name=name, namespace=namespace).to_dict()
        except NotFoundError:
            return None
        return found

    def all(self, kind: str, namespace: str | None = None, **selectors: str) -> list[Object]:
        """Give all objects of a kind."""
        found = self._resource(kind).get(namespace=namespace, **selectors).to_dict()
        items: list[Object] = found["items"]
        return items

    def patch(self, kind: str, name: str, change: Object, namespace: str | None = None) -> None:
        """Change an object by a merge patch."""
        self._resource(kind).patch(
            body=change, name=name, namespace=namespace, content_type="application/merge-patch+json"
        )

    def delete(self, kind: str, name: str, namespace: str | None = None) -> None:
        """Delete an object and wait until it is gone; gone already is success."""
        try:
            self._resource(kind).delete(name=name, namespace=namespace)
        except NotFoundError:
            return
        wait_for(f"{kind} {name} gone", lambda: self.find(kind, name, namespace) is None)

    def exec(self, pod: str, namespace: str, *argv: str, container: str | None = None) -> str:
        """Run a command in a pod and give what it printed.

        Raises:
            RuntimeError: it failed; the message has its output.
        """
        session = stream.stream(
            self._core.connect_get_namespaced_pod_exec,
            pod,
            namespace,
            command=list(argv),
            stdout=True,
            stderr=True,
            stdin=False,
            tty=False,
            _preload_content=False,
            **({"container": container} if container else {}),
        )
        session.run_forever(timeout=EXEC_TIMEOUT_S)
        output = str(session.read_stdout()) + str(session.read_stderr())
        if session.is_open():
            session.close()
            raise RuntimeError(f"{' '.join(argv)} in pod {pod} has not ended after {EXEC_TIMEOUT_S} s: {output}")
        if session.returncode:
            raise RuntimeError(f"{' '.join(argv)} in pod {pod} ended with {session.returncode}: {output}")
        return output

    def events(self, name: str, namespace: str) -> list[str]:
        """Give the messages of the events about an object, as `kubectl describe` shows them."""
        found = self.all("Event", namespace, field_selector=f"involvedObject.name={name}")
        return [f"{one.get('reason')}: {one.get('message')}" for one in found]

    def log(self, pod: str, namespace: str, container: str, *, since_s: int) -> str:
        """Give what a container printed in the last `since_s` seconds."""
        try:
            return str(
                self._core.read_namespaced_pod_log(pod, namespace, container=container, since_seconds=max(1, since_s))
            )
        except ApiException as error:
            return f"(no log: {error.reason})"

    def driver_pods(self, component: str) -> list[Object]:
        """Give the driver's pods, of the `controller` or the `node`s."""
        label = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component={component}"
        return self.all("Pod", NAMESPACE, label_selector=label)

    def csi_quobyte(self, command: str) -> list[Object]:
        """Run an operator's command about the mounted pools in the controller's pod, and give the JSON of each pool."""
        pod = next(pod for pod in self.driver_pods("controller") if not pod["metadata"].get("deletionTimestamp"))
        pools = " ".join(f"--pool {pool}=/pools/{pool}/{pool}" for pool in POOLS)
        shell = f"csi-quobyte {command} --json {pools}; test $? -le 1"  # status 1 means findings, which the JSON has
        text = self.exec(pod["metadata"]["name"], NAMESPACE, "sh", "-c", shell, container="driver")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def attachments(self, volume: str) -> list[Object]:
        """Give the VolumeAttachments of a PersistentVolume."""
        found = self.all("VolumeAttachment")
        return [one for one in found if one["spec"]["source"].get("persistentVolumeName") == volume]

    def has_service_account(self, namespace: str) -> bool:
        """Say whether pods can be made in a new namespace."""
        try:
            self._core.read_namespaced_service_account("default", namespace)
        except ApiException:
            return False
        return True
