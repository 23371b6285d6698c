"""The proto files equal the official ones, element by element.

Our files carry our own order and comments, so they are compared as compiled descriptors, not as text. The official
files come from Go modules, at a pinned version with a pinned checksum. A file is taken apart into its elements (file,
service, method, message, oneof, field, enum, value, extension), each with everything that the compiler knows about it
but its children; nothing is compared by a list of attributes, so nothing can be forgotten on it.

Axes: which file; for the comparison itself, which kind of element was changed, and on which side.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from google.protobuf import descriptor_pool, message_factory, text_format
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from google.protobuf.message import Message

PROTO = Path(__file__).resolve().parents[2] / "proto"
DOWNLOAD_TIMEOUT_S = 120  # a first download over a slow line; once in Go's module cache it takes less than a second
COMPILE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Official:
    """Where the official form of one of our files is, and what ours may have that it has not."""

    file: str
    module: str
    version: str
    checksum: str  # as in go.sum: of the whole module
    path: str  # inside the module
    extras: frozenset[str] = frozenset()  # elements, written as in the keys of `elements_of`


OFFICIALS = (
    Official(
        file="csi.proto",
        module="github.com/container-storage-interface/spec",
        version="v1.12.0",
        checksum="h1:zrFOEqpR5AghNaaDG4qyedwPBqU2fU0dWjLQMP/azK0=",
        path="csi.proto",
    ),
    # Up to 0.33 this file carried gogoproto options and an import for them; from 0.34 on it can be compared as it is.
    Official(
        file="pluginregistration.proto",
        module="k8s.io/kubelet",
        version="v0.34.0",
        checksum="h1:1nZt1Q6Kfx7xCaTS9vnqR9sjZDxf3cRSQkAFCczULmc=",
        path="pkg/apis/pluginregistration/v1/api.proto",
    ),
)


# --- getting the official files ---------------------------------------------------------------------------------------


def find_go() -> str:
    """Return the go command, from PATH or from the project's cache, or fail the test."""
    cached = Path(os.environ.get("CSI_QUOBYTE_CACHE", "/var/cache/csi-quobyte")) / "go" / "bin"
    go = shutil.which("go") or shutil.which("go", path=str(cached))
    if go is None:
        pytest.fail(f"no go command in PATH or in {cached}: it is needed to get the official proto files")
    return go


def download(official: Official, directory: Path) -> Path:
    """Return the official file in Go's module cache, or fail the test; `directory` must be outside of any Go module."""
    # GOTOOLCHAIN: a module's wish for a newer Go must not start the download of one.
    environment = os.environ | {"GOFLAGS": "-mod=mod", "GOWORK": "off", "GOTOOLCHAIN": "local"}
    done = subprocess.run(
        [find_go(), "mod", "download", "-json", f"{official.module}@{official.version}"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DOWNLOAD_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{official.module}@{official.version} cannot be downloaded: {done.stdout}{done.stderr}")
    answer = json.loads(done.stdout)
    assert answer["Sum"] == official.checksum, f"{official.module}@{official.version} is not the module that was pinned"
    return Path(answer["Dir"]) / official.path


def compile_proto(source: Path, name: str, directory: Path) -> FileDescriptorProto:
    """Return the descriptor of `source`, compiled under `name` in the empty or new `directory`.

    It lives in a descriptor pool of its own: the default one may hold the same symbols already, from the stubs. The
    pool knows google.protobuf.*Options together with the file's extensions, so that custom options are read by name
    instead of staying unknown bytes.
    """
    directory.mkdir(exist_ok=True)
    (directory / name).write_bytes(source.read_bytes())
    output = directory / "descriptors"
    arguments = [f"-I{directory}", "--include_imports", f"-o{output}", name, "google/protobuf/descriptor.proto"]
    done = subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", *arguments],
        capture_output=True,
        text=True,
        timeout=COMPILE_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{source} does not compile: {done.stderr}")
    pool = descriptor_pool.DescriptorPool()
    for file in FileDescriptorSet.FromString(output.read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    set_class = message_factory.GetMessageClass(pool.FindMessageTypeByName("google.protobuf.FileDescriptorSet"))
    compiled = cast(FileDescriptorSet, set_class.FromString(output.read_bytes()))
    return next(file for file in compiled.file if file.name == name)


# --- the comparison ---------------------------------------------------------------------------------------------------


def facts(element: Message, *parts: str) -> str:
    """Return all that a descriptor says but `parts`, its fields that hold children, as one line of text."""
    own = deepcopy(element)
    for part in parts:
        own.ClearField(part)
    return text_format.MessageToString(own, as_one_line=True, print_unknown_fields=True).strip()


def elements_of(file: FileDescriptorProto) -> dict[str, str]:
    """Return every element of a file, keyed by kind and full name, with its facts."""
    found = {f"file {file.name}": facts(file, "message_type", "enum_type", "service", "extension")}
    for message in file.message_type:
        found |= _message_elements(file.package, message)
    for enum in file.enum_type:
        found |= _enum_elements(file.package, enum)
    for service in file.service:
        found |= _service_elements(file.package, service)
    for extension in file.extension:
        found[f"extension {file.package}.{extension.name}"] = facts(extension)
    return found


def _message_elements(scope: str, message: DescriptorProto) -> dict[str, str]:
    """Return a message with all that is in it; reserved numbers and names are among its own facts."""
    name = f"{scope}.{message.name}"
    found = {f"message {name}": facts(message, "field", "oneof_decl", "nested_type", "enum_type", "extension")}
    for oneof in message.oneof_decl:
        found[f"oneof {name}.{oneof.name}"] = facts(oneof)
    for field in message.field:
        found[f"field {name}.{field.name}"] = _field_facts(message, field)
    for nested in message.nested_type:
        found |= _message_elements(name, nested)
    for enum in message.enum_type:
        found |= _enum_elements(name, enum)
    for extension in message.extension:
        found[f"extension {name}.{extension.name}"] = facts(extension)
    return found


def _field_facts(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """Return a field's facts with its oneof by name: the index depends on the order in the file."""
    if not field.HasField("oneof_index"):
        return facts(field)
    return f"{facts(field, 'oneof_index')} oneof: {message.oneof_decl[field.oneof_index].name}"


def _enum_elements(scope: str, enum: EnumDescriptorProto) -> dict[str, str]:
    """Return an enum and its values, which are named below it although their protobuf scope is the one around it."""
    name = f"{scope}.{enum.name}"
    found = {f"enum {name}": facts(enum, "value")}
    return found | {f"value {name}.{value.name}": facts(value) for value in enum.value}


def _service_elements(scope: str, service: ServiceDescriptorProto) -> dict[str, str]:
    """Return a service and its methods."""
    name = f"{scope}.{service.name}"
    found = {f"service {name}": facts(service, "method")}
    return found | {f"method {name}.{method.name}": facts(method) for method in service.method}


def differences(
    wanted: FileDescriptorProto, found: FileDescriptorProto, extras: frozenset[str] = frozenset()
) -> dict[str, str]:
    """Return each element in which two files differ, with what was wanted and what was found.

    An element that only `found` has must be in `extras`; an entry of `extras` that is not such an element is reported
    too, so that the list cannot outlive its reason.
    """
    left, right = elements_of(wanted), elements_of(found)
    report = {
        key: f"wanted <{left.get(key, 'nothing')}>, found <{right.get(key, 'nothing')}>"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and not (key in extras and key not in left)
    }
    stale = extras - (right.keys() - left.keys())
    return report | dict.fromkeys(sorted(stale), "listed as an extra, but it is not one")


@pytest.mark.parametrize("official", OFFICIALS, ids=lambda official: official.file)
@pytest.mark.timeout(DOWNLOAD_TIMEOUT_S + 2 * COMPILE_TIMEOUT_S)
def test_proto_file_equals_the_official_one(official: Official, tmp_path: Path) -> None:
    wanted = compile_proto(download(official, tmp_path), official.file, tmp_path / "official")
    found = compile_proto(PROTO / official.file, official.file, tmp_path / "ours")
    report = differences(wanted, found, official.extras)
    lines = [f"  {element}: {difference}" for element, difference in report.items()]
    assert not report, "\n".join([f"{official.file} differs from {official.module}@{official.version}:", *lines])


# --- does the comparison see what it should? --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def csi(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorProto:
    """Our csi.proto, compiled; tests change copies of it."""
    return compile_proto(PROTO / "csi.proto", "csi.proto", tmp_path_factory.mktemp("csi"))


def message_of(file: FileDescriptorProto, name: str) -> DescriptorProto:
    """Return the message `name`, with dots for nested ones, below the package."""
    first, *rest = name.split(".")
    message = next(message for message in file.message_type if message.name == first)
    for part in rest:
        message = next(nested for nested in message.nested_type if nested.name == part)
    return message


def field_of(file: FileDescriptorProto, name: str) -> FieldDescriptorProto:
    """Return the field `name`, written as message.field."""
    message, _, last = name.rpartition(".")
    return next(field for field in message_of(file, message).field if field.name == last)


def service_of(file: FileDescriptorProto, name: str) -> ServiceDescriptorProto:
    return next(service for service in file.service if service.name == name)


def change_number(file: FileDescriptorProto) -> None:
    field_of(file, "Volume.volume_id").number = 20


def change_type(file: FileDescriptorProto) -> None:
    field_of(file, "CapacityRange.limit_bytes").type = FieldDescriptorProto.TYPE_UINT64


def change_type_name(file: FileDescriptorProto) -> None:
    field_of(file, "CreateSnapshotResponse.snapshot").type_name = ".csi.v1.Volume"


def change_label(file: FileDescriptorProto) -> None:
    field_of(file, "ListVolumesResponse.entries").label = FieldDescriptorProto.LABEL_OPTIONAL


def change_json_name(file: FileDescriptorProto) -> None:
    field_of(file, "Volume.volume_id").json_name = "volume"


def make_optional(file: FileDescriptorProto) -> None:
    field_of(file, "Volume.volume_id").proto3_optional = True


def leave_oneof(file: FileDescriptorProto) -> None:
    field_of(file, "VolumeCapability.mount").ClearField("oneof_index")


def rename_oneof(file: FileDescriptorProto) -> None:
    message_of(file, "VolumeCapability").oneof_decl[0].name = "access"


def forget_secret(file: FileDescriptorProto) -> None:
    field_of(file, "NodeStageVolumeRequest.secrets").ClearField("options")


def drop_field(file: FileDescriptorProto) -> None:
    del message_of(file, "ListVolumesResponse.VolumeStatus").field[0]


def drop_message(file: FileDescriptorProto) -> None:
    file.message_type.remove(message_of(file, "CapacityRange"))


def drop_message_option(file: FileDescriptorProto) -> None:
    message_of(file, "VolumeCondition").ClearField("options")


def change_map(file: FileDescriptorProto) -> None:
    message_of(file, "Topology.SegmentsEntry").ClearField("options")


def drop_method(file: FileDescriptorProto) -> None:
    methods = service_of(file, "Controller").method
    methods.remove(next(method for method in methods if method.name == "GetSnapshot"))


def flip_streaming(file: FileDescriptorProto) -> None:
    service_of(file, "SnapshotMetadata").method[1].server_streaming = False


def change_method_input(file: FileDescriptorProto) -> None:
    service_of(file, "Identity").method[2].input_type = ".csi.v1.ProbeResponse"


def drop_service_option(file: FileDescriptorProto) -> None:
    service_of(file, "SnapshotMetadata").ClearField("options")


def change_enum_value(file: FileDescriptorProto) -> None:
    message_of(file, "VolumeUsage").enum_type[0].value[2].number = 3


def add_enum_value(file: FileDescriptorProto) -> None:
    file.enum_type[0].value.add(name="SPARSE", number=3)


def reserve_enum_number(file: FileDescriptorProto) -> None:
    file.enum_type[0].reserved_range.add(start=9, end=9)


def change_extension(file: FileDescriptorProto) -> None:
    next(extension for extension in file.extension if extension.name == "csi_secret").number = 1061


def change_package_option(file: FileDescriptorProto) -> None:
    file.options.go_package = "example.com/csi"


def drop_import(file: FileDescriptorProto) -> None:
    del file.dependency[-1]


Mutation = Callable[[FileDescriptorProto], None]
MUTATIONS: tuple[tuple[Mutation, set[str]], ...] = (
    (change_number, {"field csi.v1.Volume.volume_id"}),
    (change_type, {"field csi.v1.CapacityRange.limit_bytes"}),
    (change_type_name, {"field csi.v1.CreateSnapshotResponse.snapshot"}),
    (change_label, {"field csi.v1.ListVolumesResponse.entries"}),
    (change_json_name, {"field csi.v1.Volume.volume_id"}),
    (make_optional, {"field csi.v1.Volume.volume_id"}),
    (leave_oneof, {"field csi.v1.VolumeCapability.mount"}),
    (
        rename_oneof,
        {
            "oneof csi.v1.VolumeCapability.access_type",
            "oneof csi.v1.VolumeCapability.access",
            "field csi.v1.VolumeCapability.block",
            "field csi.v1.VolumeCapability.mount",
        },
    ),
    (forget_secret, {"field csi.v1.NodeStageVolumeRequest.secrets"}),
    (drop_field, {"field csi.v1.ListVolumesResponse.VolumeStatus.published_node_ids"}),
    (
        drop_message,
        {
            "message csi.v1.CapacityRange",
            "field csi.v1.CapacityRange.required_bytes",
            "field csi.v1.CapacityRange.limit_bytes",
        },
    ),
    (drop_message_option, {"message csi.v1.VolumeCondition"}),
    (change_map, {"message csi.v1.Topology.SegmentsEntry"}),
    (drop_method, {"method csi.v1.Controller.GetSnapshot"}),
    (flip_streaming, {"method csi.v1.SnapshotMetadata.GetMetadataDelta"}),
    (change_method_input, {"method csi.v1.Identity.Probe"}),
    (drop_service_option, {"service csi.v1.SnapshotMetadata"}),
    (change_enum_value, {"value csi.v1.VolumeUsage.Unit.INODES"}),
    (add_enum_value, {"value csi.v1.BlockMetadataType.SPARSE"}),
    (reserve_enum_number, {"enum csi.v1.BlockMetadataType"}),
    (change_extension, {"extension csi.v1.csi_secret"}),
    (change_package_option, {"file csi.proto"}),
    (drop_import, {"file csi.proto"}),
)


def test_comparison_of_equal_files_reports_nothing(csi: FileDescriptorProto) -> None:
    assert differences(csi, deepcopy(csi)) == {}


@pytest.mark.parametrize(("mutate", "reported"), MUTATIONS, ids=[mutate.__name__ for mutate, _ in MUTATIONS])
@pytest.mark.parametrize("changed", ["ours", "official"])
def test_comparison_of_changed_file_reports_exactly_the_change(
    csi: FileDescriptorProto, mutate: Mutation, reported: set[str], changed: str
) -> None:
    mutant = deepcopy(csi)
    mutate(mutant)
    pair = (csi, mutant) if changed == "ours" else (mutant, csi)
    assert differences(*pair).keys() == reported


@pytest.mark.parametrize("kind", ["number", "name"])
def test_comparison_of_dropped_reservation_reports_the_message(csi: FileDescriptorProto, kind: str) -> None:
    official = deepcopy(csi)  # 1.12 reserves nothing, so the official side gets what ours then lacks
    if kind == "number":
        message_of(official, "NodeGetVolumeStatsResponse").reserved_range.add(start=9, end=10)
    else:
        message_of(official, "NodeGetVolumeStatsResponse").reserved_name.append("health")
    assert differences(official, csi).keys() == {"message csi.v1.NodeGetVolumeStatsResponse"}


def test_comparison_with_custom_option_names_the_option(csi: FileDescriptorProto) -> None:
    mutant = deepcopy(csi)
    forget_secret(mutant)
    report = differences(csi, mutant)["field csi.v1.NodeStageVolumeRequest.secrets"]
    assert "[csi.v1.csi_secret]: true" in report.partition(", found ")[0]
    assert "csi_secret" not in report.partition(", found ")[2]


def test_comparison_ignores_order_only(csi: FileDescriptorProto) -> None:
    shuffled = deepcopy(csi)
    for children in (shuffled.message_type, shuffled.service, message_of(shuffled, "Volume").field):
        children.reverse()
    assert differences(csi, shuffled) == {}


def test_comparison_with_listed_extra_reports_nothing(csi: FileDescriptorProto) -> None:
    mutant = deepcopy(csi)
    add_enum_value(mutant)
    assert differences(csi, mutant, frozenset({"value csi.v1.BlockMetadataType.SPARSE"})) == {}


@pytest.mark.parametrize("entry", ["field csi.v1.Volume.volume_id", "field csi.v1.Volume.colour"])
def test_comparison_with_extra_that_is_none_reports_the_entry(csi: FileDescriptorProto, entry: str) -> None:
    assert differences(csi, deepcopy(csi), frozenset({entry})).keys() == {entry}


def test_comparison_with_extra_hides_no_change_of_an_official_element(csi: FileDescriptorProto) -> None:
    mutant = deepcopy(csi)
    change_number(mutant)
    entry = "field csi.v1.Volume.volume_id"
    assert differences(csi, mutant, frozenset({entry})).keys() == {entry}


def test_missing_go_fails_with_a_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CSI_QUOBYTE_CACHE", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="no go command in PATH or in"):
        find_go()


def test_go_in_the_cache_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    go = tmp_path / "go" / "bin" / "go"
    go.parent.mkdir(parents=True)
    go.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CSI_QUOBYTE_CACHE", str(tmp_path))
    assert find_go() == str(go)
