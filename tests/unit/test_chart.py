"""The Helm chart: what it renders, what it refuses, and that it fits the commands that it starts.

Golden renders lie beside their values: chart/<case>.values.yaml gives chart/<case>.yaml, byte for byte. After a wanted
change of the chart make them again, and read the difference before it is committed:

    CSI_QUOBYTE_WRITE_GOLDEN=1 make unit        # or only: python -m pytest tests/unit/test_chart.py

helm, kubeconform and the descriptions of Kubernetes' objects are built by tests/tools/helm.sh, the first time within
some minutes. helm also is the YAML parser here: what it makes of a file is what users get.

Axes: the case (a file of values); the value that is refused; controller or node.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from csi_quobyte import __version__
from csi_quobyte.cli import options
from csi_quobyte.cli.main import cli
from csi_quobyte.cli.serve import GRACE_S, controller, node
from csi_quobyte.config import Common, NodeConfig
from csi_quobyte.pool.mount import REQUIRE_MOUNT_CHOICES
from csi_quobyte.rpc.parameters import SNAPSHOT_PARAMETERS, VOLUME_PARAMETERS

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "csi-quobyte"
CASES = ("minimal", "classes", "everything")
# values whose fields are Kubernetes' or the user's own
FREE = ("commonLabels", "resources", "nodeSelector", "affinity", "podAnnotations", "podLabels")
SIDECARS = ("provisioner", "attacher", "resizer", "snapshotter")
COMMANDS = ((controller, "Deployment"), (node, "DaemonSet"))  # with the kind of object that runs it
BUILD_TIMEOUT_S = 600
HELM_TIMEOUT_S = 30

pytestmark = pytest.mark.timeout(BUILD_TIMEOUT_S + 60)

Object = dict[str, Any]


@dataclass(frozen=True)
class Helm:
    """The built programs; `environment` keeps helm away from the user's own settings and cluster."""

    bin: Path
    environment: Mapping[str, str]
    reader: Path  # a chart whose only template turns YAML into JSON

    @property
    def descriptions(self) -> Path:
        """The directory with Kubernetes' OpenAPI description and the CRD."""
        return self.bin.parent / "kubernetes"

    def run(self, program: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        """Run one of the programs."""
        return subprocess.run(
            [self.bin / program, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=HELM_TIMEOUT_S,
            check=False,
        )

    def render(self, values: Path, *arguments: str) -> str:
        """Return the rendered objects, or fail the test."""
        done = self.run("helm", "template", "disks", CHART, "--namespace", "storage", "-f", values, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def documents(self, file: Path) -> list[Object]:
        """Return the documents of a YAML file."""
        done = self.run("helm", "template", "reader", self.reader, "--set-file", f"text={file}")
        assert done.returncode == 0, done.stderr
        found: list[Object] = json.loads(done.stdout[done.stdout.index("{") :])["documents"]
        assert not any("Error" in document for document in found), f"{file} is not YAML: {found}"
        return found


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    built = subprocess.run(
        [ROOT / "tests" / "tools" / "helm.sh"], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
    )
    if built.returncode:
        pytest.fail(f"helm cannot be built: {built.stderr}")
    home = tmp_path_factory.mktemp("helm")
    homes = {f"HELM_{name}_HOME": str(home) for name in ("CACHE", "CONFIG", "DATA")}
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": os.devnull} | homes
    reader = home / "reader"
    (reader / "templates").mkdir(parents=True)
    (reader / "Chart.yaml").write_text("apiVersion: v2\nname: reader\nversion: 0.0.0\n")
    (reader / "templates" / "all.yaml").write_text(
        "{{- $found := list }}\n"
        '{{- range regexSplit "(?m)^---\\\\s*$" .Values.text -1 }}\n'
        "{{- with fromYaml . }}{{ $found = append $found . }}{{ end }}\n"
        "{{- end }}\n"
        '{{ dict "documents" $found | toJson }}\n'
    )
    return Helm(Path(built.stdout.strip()), environment, reader)


@pytest.fixture(scope="session")
def renders(helm: Helm) -> dict[str, str]:
    return {case: helm.render(values_of(case)) for case in CASES}


@pytest.fixture(scope="session")
def objects(helm: Helm, renders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Object]]:
    """Every case's objects."""
    found = {}
    for case, text in renders.items():
        file = tmp_path_factory.mktemp("objects") / "all.yaml"
        file.write_text(text)
        found[case] = helm.documents(file)
    return found


@pytest.fixture(scope="session")
def schema() -> Object:
    read: Object = json.loads((CHART / "values.schema.json").read_text())
    return read


def values_of(case: str) -> Path:
    return Path(__file__).parent / "chart" / f"{case}.values.yaml"


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [one for one in objects if one["kind"] == kind]


def pod_of(objects: list[Object], kind: str) -> Object:
    """Return the specification of the pods of the only Deployment or DaemonSet."""
    (found,) = of_kind(objects, kind)
    spec: Object = found["spec"]["template"]["spec"]
    return spec


def driver_of(objects: list[Object], kind: str) -> Object:
    (found,) = [one for one in pod_of(objects, kind)["containers"] if one["name"] == "driver"]
    driver: Object = found
    return driver


def host_paths(pod: Object) -> dict[str, tuple[str, str]]:
    """Return what of the host the driver's container has: (path on the host, propagation) by path in the container."""
    sources = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    mounts = pod["containers"][0]["volumeMounts"]
    return {
        mount["mountPath"]: (sources[mount["name"]], mount.get("mountPropagation", "None"))
        for mount in mounts
        if mount["name"] in sources
    }


def leaves(values: Object, prefix: str = "") -> Iterator[str]:
    """Give the dotted names of all values; what users may fill freely is one value."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and key not in FREE:
            yield from leaves(value, f"{name}.")
        else:
            yield name


# --- renders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_render_equals_the_golden_one(case: str, renders: dict[str, str]) -> None:
    golden = Path(__file__).parent / "chart" / f"{case}.yaml"
    if os.environ.get("CSI_QUOBYTE_WRITE_GOLDEN"):
        golden.write_text(renders[case])
    assert renders[case] == golden.read_text(), f"see this module's docstring for how {golden.name} is made again"


@pytest.mark.parametrize("case", CASES)
def test_lint_is_clean(case: str, helm: Helm) -> None:
    done = helm.run("helm", "lint", "--strict", CHART, "-f", values_of(case))
    assert done.returncode == 0, done.stdout + done.stderr


def test_version_is_that_of_the_driver(helm: Helm) -> None:
    (chart,) = helm.documents(CHART / "Chart.yaml")
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


# --- objects fit their kinds ------------------------------------------------------------------------------------------


def strict(definition: Object) -> Object:
    """Return an OpenAPI definition as a JSON schema that refuses fields which it does not name."""
    if definition.get("format") == "int-or-string" or definition.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = dict(definition)
    if "properties" in found:
        found["properties"] = {name: strict(value) for name, value in found["properties"].items()}
        if not found.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
    for name in ("items", "additionalProperties"):
        if isinstance(found.get(name), dict):
            found[name] = strict(found[name])
    return found


def with_definitions(schema: Object, definitions: Object) -> Object:
    """Return a schema together with the definitions that it needs, also indirectly, and no others: they are 4 MB."""
    needed: Object = {}
    open_ends = [schema]
    while open_ends:
        for name in re.findall(r'"#/definitions/([^"]+)"', json.dumps(open_ends.pop())):
            if name not in needed:
                needed[name] = definitions[name]
                open_ends.append(definitions[name])
    return schema | {"definitions": needed}


def write_schemas(helm: Helm, directory: Path) -> str:
    """Write a schema for each kind that the chart renders, and return kubeconform's location of them."""
    definitions = {
        name: strict(value)
        for name, value in json.loads((helm.descriptions / "swagger.json").read_text())["definitions"].items()
    }
    # Kubernetes reads a quantity from a number as well as from a string.
    definitions["io.k8s.apimachinery.pkg.api.resource.Quantity"] = {"type": ["string", "number"]}
    for kind, group, name in (
        ("ServiceAccount", "", "io.k8s.api.core.v1.ServiceAccount"),
        ("ClusterRole", "rbac-", "io.k8s.api.rbac.v1.ClusterRole"),
        ("ClusterRoleBinding", "rbac-", "io.k8s.api.rbac.v1.ClusterRoleBinding"),
        ("Deployment", "apps-", "io.k8s.api.apps.v1.Deployment"),
        ("DaemonSet", "apps-", "io.k8s.api.apps.v1.DaemonSet"),
        ("CSIDriver", "storage-", "io.k8s.api.storage.v1.CSIDriver"),
        ("StorageClass", "storage-", "io.k8s.api.storage.v1.StorageClass"),
    ):
        schema = with_definitions({"$ref": f"#/definitions/{name}"}, definitions)
        (directory / f"{kind.lower()}-{group}v1.json").write_text(json.dumps(schema))
    (crd,) = helm.documents(helm.descriptions / "volumesnapshotclasses.yaml")
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    schema = with_definitions(schema, definitions)
    (directory / "volumesnapshotclass-snapshot-v1.json").write_text(json.dumps(schema))
    return f"{directory}/{{{{ .ResourceKind }}}}{{{{ .KindSuffix }}}}.json"


def test_objects_fit_their_kinds(helm: Helm, renders: dict[str, str], tmp_path: Path) -> None:
    location = write_schemas(helm, tmp_path)
    files = {case: tmp_path / f"{case}.yaml" for case in CASES}
    for case, file in files.items():
        file.write_text(renders[case])
    arguments = ("-strict", "-summary", "-output", "json", "-schema-location", location)
    done = helm.run("kubeconform", *arguments, *files.values())
    summary = json.loads(done.stdout)["summary"]
    assert (done.returncode, summary["invalid"], summary["errors"], summary["skipped"]) == (0, 0, 0, 0), done.stdout
    assert summary["valid"] == sum(len(re.findall("(?m)^kind: ", text)) for text in renders.values())
    # the same check must see a field that does not exist, deep inside a referenced definition, and a wrong type
    for old, new in (
        ("mountPropagation:", "mountPropagated:"),
        ("allowVolumeExpansion: false", "allowVolumeExpansion: 0"),
    ):
        assert old in renders["classes"]
        files["classes"].write_text(renders["classes"].replace(old, new))
        assert helm.run("kubeconform", *arguments, files["classes"]).returncode == 1


# --- values -----------------------------------------------------------------------------------------------------------

TWO_POOLS = "pools=[{name: a, hostPath: /a}, {name: b, hostPath: /b}]"

REFUSED = {
    "no pools": ("pools=[]", "/pools"),
    "unknown value": ("poolTimeOut=30s", "poolTimeOut"),
    "unknown value of the controller": ("controller.replicas=2", "replicas"),
    "unknown value of the nodes": ("node.updateStrategy=RollingUpdate", "updateStrategy"),
    "unknown value of a sidecar": ("sidecars.attacher.args=[]", "'args' not allowed"),
    "unknown sidecar": ("sidecars.registrar={}", "registrar"),
    "unknown field of a pool": ("pools=[{name: a, hostPath: /a, path: x}]", "'path' not allowed"),
    "pool without a directory": ("pools=[{name: a}]", "missing property 'hostPath'"),
    "pool with a relative directory": ("pools=[{name: a, hostPath: mnt}]", "/pools/0/hostPath"),
    "pool with a directory above": ("pools=[{name: a, hostPath: /mnt/../etc}]", "/pools/0/hostPath"),
    "pool with a mount point outside": ("pools=[{name: a, hostPath: /a, subPath: ../b}]", "/pools/0/subPath"),
    "pool with a bad name": ("pools=[{name: A, hostPath: /a}]", "/pools/0/name"),
    "one name twice": ("pools=[{name: a, hostPath: /a}, {name: a, hostPath: /b}]", "the name a comes twice"),
    "one directory twice": (
        "pools=[{name: a, hostPath: /a/b}, {name: b, hostPath: /a, subPath: b}]",
        "/a/b is given twice",
    ),
    "wrong log level": ("logLevel=trace", "logLevel"),
    "number as a string": ("healthPort='9808'", "healthPort"),
    "both ports the same": ("metrics={enabled: true, port: 9808}", "metrics.port and healthPort"),
    "controller as root": ("controller.runAsUser=0", "runAsUser"),
    "too little time to flush": ("node.terminationGracePeriodSeconds=30", "terminationGracePeriodSeconds"),
    "state directory too long": (f"node.stateDir=/{'s' * 78}", "stateDir"),
    "kubelet's directory too long": (f"kubeletDir=/{'k' * 70}", "at most 107"),
    "no image": ("image.repository=''", "image.repository"),
    "unknown parameter": ("storageClasses=[{name: a, parameters: {volumeFormatt: raw}}]", "volumeFormatt"),
    "reserved parameter": ("storageClasses=[{name: a, parameters: {crashPolicy: x}}]", "crashPolicy"),
    "unknown pool of a class": ("storageClasses=[{name: a, parameters: {pool: other}}]", "names the pool other"),
    "class without a name": ("storageClasses=[{reclaimPolicy: Delete}]", "missing property 'name'"),
    "unknown field of a class": ("storageClasses=[{name: a, reclaim: Delete}]", "'reclaim' not allowed"),
    "parameter of a snapshot class": ("volumeSnapshotClasses=[{name: a, parameters: {fsfreeze: 'true'}}]", "fsfreeze"),
}


def values_file(directory: Path, text: str) -> Path:
    """Write one dotted value, `a.b=YAML`, as a file of values."""
    name, _, value = text.partition("=")
    keys = name.split(".")
    lines = [f"{'  ' * depth}{key}:" for depth, key in enumerate(keys)]
    file = directory / "values.yaml"
    file.write_text("\n".join(lines) + f" {value}\n")
    return file


@pytest.mark.parametrize(("value", "named"), REFUSED.values(), ids=REFUSED)
def test_value_is_refused_by_name(value: str, named: str, helm: Helm, tmp_path: Path) -> None:
    file = values_file(tmp_path, value)
    done = helm.run("helm", "template", "disks", CHART, "-f", values_of("minimal"), "-f", file)
    assert done.returncode != 0
    assert named in done.stderr


def test_class_must_name_its_pool_when_there_are_several(helm: Helm, tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(TWO_POOLS.replace("=", ": ", 1) + "\nstorageClasses: [{name: plain}]\n")
    done = helm.run("helm", "template", "disks", CHART, "-f", values_of("minimal"), "-f", file)
    assert done.returncode != 0
    assert "plain must have the parameter pool" in done.stderr


def test_defaults_alone_are_refused_because_of_the_pools(helm: Helm) -> None:
    done = helm.run("helm", "template", "disks", CHART)
    assert done.returncode != 0
    assert "/pools" in done.stderr


def test_kubernetes_that_is_too_old_is_refused_by_name(helm: Helm) -> None:
    done = helm.run("helm", "template", "disks", CHART, "-f", values_of("minimal"), "--kube-version", "1.30.9")
    assert done.returncode != 0
    assert "requires kubeVersion: >=1.31.0-0" in done.stderr
    helm.render(values_of("minimal"), "--kube-version", "1.31.4-gke.1")


def test_schema_names_exactly_the_values(helm: Helm, schema: Object) -> None:
    def known(part: Object) -> Object:
        part = schema["definitions"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        return {name: known(value) for name, value in part.get("properties", {}).items()}

    (values,) = helm.documents(CHART / "values.yaml")
    named = known(schema)
    assert named.pop("global") == {}
    assert sorted(leaves(named)) == sorted(leaves(values))


def test_schema_refuses_unknown_fields_everywhere(schema: Object) -> None:
    def visit(part: object) -> None:
        if isinstance(part, dict):
            if "properties" in part and part.get("type") == "object":
                assert part["additionalProperties"] is False, f"unknown fields pass in {part}"
            for value in part.values():
                visit(value)

    visit(schema)


def test_schema_knows_the_parameters_of_the_driver(schema: Object) -> None:
    volumes = schema["properties"]["storageClasses"]["items"]["properties"]["parameters"]["properties"]
    assert {name: tuple(value.get("enum", ())) for name, value in volumes.items()} == {
        parameter.name: parameter.values for parameter in VOLUME_PARAMETERS
    }
    snapshots = schema["properties"]["volumeSnapshotClasses"]["items"]["properties"]["parameters"]["properties"]
    assert set(snapshots) == {parameter.name for parameter in SNAPSHOT_PARAMETERS}
    assert tuple(schema["properties"]["requireMount"]["enum"]) == REQUIRE_MOUNT_CHOICES


def test_case_everything_sets_every_value_and_none_to_its_default(helm: Helm) -> None:
    (defaults,) = helm.documents(CHART / "values.yaml")
    (given,) = helm.documents(values_of("everything"))
    assert sorted(leaves(given)) == sorted(leaves(defaults))

    def at(values: Object, name: str) -> object:
        found: Any = values
        for key in name.split("."):
            found = found[key]
        return found

    assert [name for name in leaves(defaults) if at(given, name) == at(defaults, name)] == []


def test_readme_lists_every_value(helm: Helm) -> None:
    (values,) = helm.documents(CHART / "values.yaml")
    wanted = {re.sub(r"^sidecars\.\w+\.", "sidecars.<name>.", name) for name in leaves(values)}
    listed = set(re.findall(r"(?m)^\| `([^`]+)` \|", (CHART / "README.md").read_text()))
    assert listed == wanted


# --- the chart fits the driver ----------------------------------------------------------------------------------------


def parsed(command: click.Command, container: Object, monkeypatch: pytest.MonkeyPatch) -> Common:
    """Read a container's arguments and environment as the command does, down to its checked configuration."""
    for name in [name for name in os.environ if name.startswith("CSI_")]:
        monkeypatch.delenv(name)
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", "a-node"))
    name, *arguments = container["args"]
    assert name == command.name
    settings = dict(command.make_context(name, arguments).params)
    pools = options.parse_pools(settings.pop("pool"))
    timeout_s = options.parse_duration_s("--pool-timeout", settings.pop("pool_timeout"))
    if command is not node:
        for flag in ("merge_layers", "merge_bandwidth"):  # for the collector, no part of the configuration
            settings.pop(flag)
        return Common(pools=pools, pool_timeout_s=timeout_s, **settings)
    stop_s = options.parse_duration_s("--stop-timeout", settings.pop("stop_timeout"))
    return NodeConfig(pools=pools, pool_timeout_s=timeout_s, stop_timeout_s=stop_s, **settings)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("command", "kind"), COMMANDS, ids=("controller", "node"))
def test_command_accepts_what_the_chart_gives(
    case: str, command: click.Command, kind: str, objects: dict[str, list[Object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    container = driver_of(objects[case], kind)
    config = parsed(command, container, monkeypatch)
    (csi_driver,) = of_kind(objects[case], "CSIDriver")
    assert config.driver_name == csi_driver["metadata"]["name"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert config.health_address == f":{ports['health']}"
    assert config.metrics_address == (f":{ports['metrics']}" if "metrics" in ports else "")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("command", "kind"), COMMANDS, ids=("controller", "node"))
def test_flags_and_environment_are_known_and_agree(
    case: str, command: click.Command, kind: str, objects: dict[str, list[Object]]
) -> None:
    container = driver_of(objects[case], kind)
    shown = command.get_help(click.Context(command, info_name=str(command.name), terminal_width=200))
    given: dict[str, list[str]] = {}
    for argument in container["args"][1:]:
        flag, _, value = argument.partition("=")
        given.setdefault(flag, []).append(value)
    assert [flag for flag in given if f"  {flag} " not in shown] == []
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert [name for name in environment if not re.search(rf"env\s+var:\s+{name}\b", shown)] == []
    assert environment["CSI_QUOBYTE_POOLS"] == " ".join(given["--pool"])
    assert [environment["CSI_QUOBYTE_REQUIRE_MOUNT"]] == given["--require-mount"]


def test_defaults_are_those_of_the_commands(helm: Helm) -> None:
    (values,) = helm.documents(CHART / "values.yaml")
    defaults = {parameter.name: parameter.default for parameter in node.params}
    assert values["driverName"] == defaults["driver_name"]
    assert values["requireMount"] == defaults["require_mount"]
    assert values["poolTimeout"] == defaults["pool_timeout"]
    assert values["logLevel"] == defaults["log_level"]
    assert values["logFormat"] == defaults["log_format"]
    assert values["kubeletDir"] == defaults["kubelet_dir"]
    assert values["node"]["maxVolumesPerNode"] == defaults["max_volumes_per_node"]


@pytest.mark.parametrize("case", CASES)
def test_node_paths_are_the_same_on_the_host(
    case: str, objects: dict[str, list[Object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = pod_of(objects[case], "DaemonSet")
    config = parsed(node, driver_of(objects[case], "DaemonSet"), monkeypatch)
    assert isinstance(config, NodeConfig)
    places = host_paths(pod)
    assert places[config.kubelet_dir] == (config.kubelet_dir, "Bidirectional")
    assert places[config.state_dir] == (config.state_dir, "Bidirectional")
    assert places["/dev"] == ("/dev", "None")
    assert config.endpoint == f"unix://{config.kubelet_endpoint}"
    assert config.kubelet_endpoint.startswith(f"{config.kubelet_dir}/plugins/{config.driver_name}/")
    assert config.register_dir == f"{config.kubelet_dir}/plugins_registry"
    assert config.stop_daemons_on_exit
    assert GRACE_S < config.stop_timeout_s < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("case", CASES)
def test_pools_are_at_the_same_place_in_both_pods(
    case: str, helm: Helm, objects: dict[str, list[Object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (values,) = helm.documents(values_of(case))
    wanted = {f"/pools/{pool['name']}": (pool["hostPath"], "HostToContainer") for pool in values["pools"]}
    for command, kind in COMMANDS:
        places = host_paths(pod_of(objects[case], kind))
        assert {place: given for place, given in places.items() if place.startswith("/pools/")} == wanted
        config = parsed(command, driver_of(objects[case], kind), monkeypatch)
        assert [(pool.name, pool.path) for pool in config.pools] == [
            (pool["name"], f"/pools/{pool['name']}" + (f"/{pool['subPath']}" if "subPath" in pool else ""))
            for pool in values["pools"]
        ]


@pytest.mark.parametrize("case", CASES)
def test_restarts_are_only_those_that_are_meant(case: str, objects: dict[str, list[Object]]) -> None:
    (deployment,) = of_kind(objects[case], "Deployment")
    assert (deployment["spec"]["replicas"], deployment["spec"]["strategy"]) == (1, {"type": "Recreate"})
    (daemon_set,) = of_kind(objects[case], "DaemonSet")
    assert daemon_set["spec"]["updateStrategy"] == {"type": "OnDelete"}
    for kind in ("Deployment", "DaemonSet"):
        # running calls are waited for, then what serves them
        assert pod_of(objects[case], kind)["terminationGracePeriodSeconds"] >= 2 * GRACE_S
        driver = driver_of(objects[case], kind)
        probed = {name: driver[name]["httpGet"]["path"] for name in driver if name.endswith("Probe")}
        assert probed == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}


@pytest.mark.parametrize("case", CASES)
def test_privileges_are_the_least(case: str, objects: dict[str, list[Object]]) -> None:
    pod = pod_of(objects[case], "Deployment")
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    with_token = {
        container["name"]
        for container in pod["containers"]
        if any(mount["name"] == "api-access" for mount in container["volumeMounts"])
    }
    assert with_token == {f"csi-{name}" for name in SIDECARS}
    node_pod = pod_of(objects[case], "DaemonSet")
    assert [one["name"] for one in node_pod["containers"]] == ["driver"]
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(node_pod)
    assert [one["automountServiceAccountToken"] for one in (pod, node_pod)] == [False, False]


@pytest.mark.parametrize("case", CASES)
def test_roles_are_bound_to_the_controller_only(case: str, objects: dict[str, list[Object]]) -> None:
    roles = {role["metadata"]["name"]: role["rules"] for role in of_kind(objects[case], "ClusterRole")}
    bound = {one["roleRef"]["name"]: one["subjects"] for one in of_kind(objects[case], "ClusterRoleBinding")}
    account = pod_of(objects[case], "Deployment")["serviceAccountName"]
    assert set(roles) == set(bound)
    assert len(roles) == len(SIDECARS)
    assert all(
        subjects == [{"kind": "ServiceAccount", "name": account, "namespace": "storage"}] for subjects in bound.values()
    )
    assert account != pod_of(objects[case], "DaemonSet")["serviceAccountName"]
    named = {word for rules in roles.values() for rule in rules for words in rule.values() for word in words}
    assert not {"*", "secrets", "pods", "nodes", "leases", "create/token"} & named


@pytest.mark.parametrize("case", CASES)
def test_labels_that_select_are_those_of_the_pods(case: str, objects: dict[str, list[Object]]) -> None:
    (deployment,) = of_kind(objects[case], "Deployment")
    (daemon_set,) = of_kind(objects[case], "DaemonSet")
    selectors = [one["spec"]["selector"]["matchLabels"] for one in (deployment, daemon_set)]
    assert selectors[0] != selectors[1]
    for one, selector in zip((deployment, daemon_set), selectors, strict=True):
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
        # what changes with the chart's version only would restart the controller for nothing
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(labels)


# --- notes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_notes_name_commands_that_exist(case: str, helm: Helm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSI_QUOBYTE_POOLS", "main=/pools/main")  # the pods have it
    done = helm.run(
        "helm", "install", "disks", CHART, "--namespace", "storage", "-f", values_of(case), "--dry-run=client"
    )
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    assert "OnDelete" in notes
    lines = re.findall(r"-- csi-quobyte (.+)", notes)
    assert [line.split()[:2] for line in lines if line.startswith("pool")] != []
    for line in lines:
        command: click.Command = cli
        context = click.Context(cli)
        words = line.split()
        while isinstance(command, click.Group):
            found = command.get_command(context, words.pop(0))
            assert found is not None, f"there is no command: csi-quobyte {line}"
            command = found
        command.make_context(str(command.name), words)
