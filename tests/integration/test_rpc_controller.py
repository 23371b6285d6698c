"""The controller over gRPC: every row of bad input with its code, and what the calls promise each other.

The axes: arguments (names, sizes, capabilities, parameters, ids), sources, pools (two of them), concurrency, damaged
records, and paging. A second machine has one pool only, where the parameter `pool` may be left out.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from running import (
    GIB,
    MIB,
    TIB,
    Code,
    Parameters,
    discard,
    fails,
    findings_left,
    head_of,
    listing,
    objects,
    running,
    volume_record,
)

from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pool.store import Store
from lab.client import Client, Modes, block_capability, code_of, mount_capability
from lab.machine import NODE_ID, Machine, wait_for

pytestmark = pytest.mark.root

ELSEWHERE = "0badcafe-vol-" + "0" * 32
ELSEWHERE_SNAPSHOT = "0badcafe-snap-" + "0" * 32


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with running(pools=("main", "second")) as machine:
        yield machine


@pytest.fixture(scope="module")
def calls(machine: Machine) -> Client:
    return Client(machine)


@pytest.fixture(autouse=True)
def nothing_left(calls: Client) -> Iterator[None]:
    """Each test deletes what it made; after a failure it is done here, so that the next test starts from nothing."""
    yield
    snapshots = [entry.snapshot.snapshot_id for entry in snapshots_of(calls).entries]
    volumes = [entry.volume.volume_id for entry in volumes_of(calls).entries]
    for snapshot in snapshots:
        calls.delete_snapshot(snapshot)
    discard(calls, *volumes)
    assert snapshots + volumes == []


# --- arguments -------------------------------------------------------------------------------------------------


def test_empty_ids_are_refused(calls: Client) -> None:
    invalid = Code.INVALID_ARGUMENT
    fails(invalid, calls.create, "", pool="main", saying="name")
    fails(invalid, calls.delete, "", saying="volume id")
    fails(invalid, calls.attach, "", saying="volume id")
    fails(invalid, calls.attach, ELSEWHERE, node="", saying="node id")
    fails(invalid, calls.detach, "", saying="volume id")
    fails(invalid, calls.expand, "", 2 * GIB, saying="volume id")
    fails(invalid, calls.snapshot, "", ELSEWHERE, saying="name")
    fails(invalid, calls.snapshot, "s", "", saying="source volume")
    fails(invalid, calls.delete_snapshot, "", saying="snapshot id")
    stub = calls.controller
    fails(invalid, stub.ControllerGetVolume, csi.ControllerGetVolumeRequest(), saying="volume id")
    fails(invalid, stub.GetSnapshot, csi.GetSnapshotRequest(), saying="snapshot id")
    fails(invalid, stub.ValidateVolumeCapabilities, csi.ValidateVolumeCapabilitiesRequest(), saying="volume id")


@pytest.mark.parametrize(
    "name", ["x" * 129, "ü" * 65, "tab\there", "new\nline", "nul\0", "delete\x7f", "c1\x85"], ids=ascii
)
def test_names_that_are_too_long_or_hold_control_characters_are_refused(calls: Client, name: str) -> None:
    fails(Code.INVALID_ARGUMENT, calls.create, name, pool="main", saying="name of the volume")
    fails(Code.INVALID_ARGUMENT, calls.snapshot, name, ELSEWHERE, saying="name of the snapshot")


def test_names_of_the_snapshots_that_exports_take_are_refused(calls: Client) -> None:
    fails(Code.INVALID_ARGUMENT, calls.snapshot, "export-" + "0a" * 12, ELSEWHERE, saying="exports")


def test_other_names_are_accepted_and_never_become_a_path(machine: Machine, calls: Client) -> None:
    names = ["export-1", "/", "..", "/ ..", "../../etc/passwd", "Ü 漢字 \u202e", " ", "x" * 128, "ü" * 64]
    before = {path.name for path in machine.base.rglob("*")}
    volumes = [calls.create(name, pool="main").volume_id for name in names]
    snapshots = [calls.snapshot(name, volume).snapshot_id for name, volume in zip(names, volumes, strict=True)]
    assert all(re.fullmatch(r"[0-9a-f]{8}-vol-[0-9a-f]{32}", volume) for volume in volumes)
    assert all(re.fullmatch(r"[0-9a-f]{8}-snap-[0-9a-f]{32}", snapshot) for snapshot in snapshots)
    assert sorted(row["name"] for row in objects(machine)) == sorted(names * 2)
    made = {path.name for path in machine.base.rglob("*")} - before
    assert all(re.match(r"[0-9a-f]{8}-(vol|snap)-|[0-9a-f]{24}\.|[csv]-[0-9a-f]", name) for name in made)
    for snapshot, volume in zip(snapshots, volumes, strict=True):
        calls.delete_snapshot(snapshot)
        calls.delete(volume)


def test_sizes(calls: Client) -> None:
    made = calls.create("default", 0, pool="main")
    assert made.capacity_bytes == GIB
    calls.delete(made.volume_id)
    rounded = calls.create("rounded", 10 * MIB + 1, pool="main")
    assert rounded.capacity_bytes == 11 * MIB
    calls.delete(rounded.volume_id)


@pytest.mark.parametrize(
    ("size_bytes", "limit_bytes"),
    [
        (-1, 0),
        (0, -1),
        (64 * TIB + 1, 0),
        (2 * GIB, GIB),
        (10 * MIB + 1, 10 * MIB + 2),  # between two multiples of 1 MiB
    ],
)
def test_impossible_sizes_are_out_of_range(calls: Client, size_bytes: int, limit_bytes: int) -> None:
    fails(Code.OUT_OF_RANGE, calls.create, "bad", size_bytes, limit_bytes=limit_bytes, pool="main", saying="limit|TiB")


@pytest.mark.parametrize(("filesystem", "minimum_bytes"), [("xfs", 300 * MIB), ("ext4", 8 * MIB)])
def test_a_file_system_has_a_minimum(calls: Client, filesystem: str, minimum_bytes: int) -> None:
    capability = mount_capability(filesystem)
    details = fails(Code.OUT_OF_RANGE, calls.create, "small", minimum_bytes - MIB, capability=capability, pool="main")
    assert str(minimum_bytes) in details
    made = calls.create("small", minimum_bytes, capability=capability, pool="main")
    calls.delete(made.volume_id)


def test_the_minimum_of_a_file_system_does_not_hold_for_block(calls: Client) -> None:
    made = calls.create("tiny", MIB, capability=block_capability(), pool="main")
    assert made.capacity_bytes == MIB
    calls.delete(made.volume_id)


def test_capabilities_that_are_not_supported(calls: Client) -> None:
    invalid = Code.INVALID_ARGUMENT
    unsupported = ["UNKNOWN", "MULTI_NODE_READER_ONLY", "MULTI_NODE_SINGLE_WRITER", "MULTI_NODE_MULTI_WRITER"]
    for mode in unsupported:
        details = fails(invalid, calls.create, "bad", capability=mount_capability(mode=mode), pool="main", saying=mode)
        assert "SINGLE_NODE_WRITER" in details
        fails(invalid, calls.attach, ELSEWHERE, capability=mount_capability(mode=mode), saying=mode)
    fails(invalid, calls.create, "bad", capability=mount_capability("btrfs"), pool="main", saying="btrfs.*ext4, xfs")
    neither = csi.VolumeCapability(access_mode=Modes(mode=Modes.SINGLE_NODE_WRITER))
    fails(invalid, calls.create, "bad", capability=neither, pool="main", saying="neither mount nor block")
    for option in ("errors=panic", "nouuid", "noload", "barrier=0", "x,rw", "uid=0"):
        capability = mount_capability("ext4", options=[option])
        details = fails(invalid, calls.create, "bad", capability=capability, pool="main")
        assert option in details, "the refused option is named"
        assert "noatime" in details, "the allowed ones are listed"
    request = csi.CreateVolumeRequest(name="bad", parameters={"pool": "main"})
    fails(invalid, calls.controller.CreateVolume, request, saying="capabilities are missing")
    request.volume_capabilities.extend([mount_capability(), block_capability()])
    fails(invalid, calls.controller.CreateVolume, request)


def test_parameters_that_are_unknown_or_reserved_are_refused_and_the_known_ones_listed(calls: Client) -> None:
    known = ("pool", "volumeFormat", "preallocation", "dataPath", "mkfsOptions")
    for key in ("colour", "VolumeFormat", "volumeformat", "crashPolicy"):
        details = fails(Code.INVALID_ARGUMENT, calls.create, "bad", pool="main", **{key: "x"}, saying=key)
        assert all(name in details for name in known)
    fails(Code.INVALID_ARGUMENT, calls.create, "bad", pool="main", evictOnFailure="true", saying="evictOnFailure")
    fails(Code.INVALID_ARGUMENT, calls.snapshot, "bad", ELSEWHERE, fsfreeze="true", saying="fsfreeze")
    fails(Code.INVALID_ARGUMENT, calls.snapshot, "bad", ELSEWHERE, other="x", saying="other")
    added: Parameters = {"csi.storage.k8s.io/pvc/name": "data"}
    accepted = calls.create("sidecar", pool="main", **added)
    calls.delete(accepted.volume_id)


@pytest.mark.parametrize(
    ("parameters", "saying"),
    [
        ({"volumeFormat": "raw", "preallocation": "metadata"}, "metadata needs volumeFormat qcow2"),
        ({"volumeFormat": "qcow2", "dataPath": "loop"}, "loop needs volumeFormat raw"),
        ({"dataPath": "loop"}, "loop needs volumeFormat raw"),
        ({"dataPath": "nbd"}, "nbd is not in this version"),
        ({"volumeFormat": "vmdk"}, "qcow2, raw"),
        ({"cloneMode": "deep"}, "overlay, cache, copy"),
        ({"preallocation": "full"}, "off, metadata, falloc"),
        ({"dataPath": "iscsi"}, "auto"),
        ({"pool": "third"}, "main, second"),
        ({"pool": ""}, "main, second"),
        ({"csi.storage.k8s.io/fstype": "ntfs"}, "ext4, xfs"),
        ({"mkfsOptions": "-d /dev/sda"}, "not allowed for ext4"),
        ({"mkfsOptions": "-L 'unbalanced"}, "mkfsOptions"),
        ({"onDelete": "archive"}, "delete, retain, trash"),
        ({"trashRetention": "24h"}, "needs onDelete trash"),
        ({"onDelete": "retain", "trashRetention": "24h"}, "needs onDelete trash"),
        ({"onDelete": "trash", "trashRetention": "0h"}, "24h or 7d"),
        ({"onDelete": "trash", "trashRetention": "-1h"}, "24h or 7d"),
        ({"onDelete": "trash", "trashRetention": "24"}, "24h or 7d"),
        ({"onDelete": "trash", "trashRetention": "3651d"}, "at most 3650d"),
    ],
)
def test_S17_parameters_that_contradict_each_other(calls: Client, parameters: Parameters, saying: str) -> None:
    fails(Code.INVALID_ARGUMENT, calls.create, "bad", **{"pool": "main", **parameters}, saying=saying)


def test_the_pool_must_be_named_when_there_are_two(calls: Client) -> None:
    fails(Code.INVALID_ARGUMENT, calls.create, "which", saying="one of: main, second")
    fails(Code.INVALID_ARGUMENT, calls.controller.GetCapacity, csi.GetCapacityRequest(), saying="main, second")


def test_mkfs_options_make_no_sense_for_block(calls: Client) -> None:
    fails(
        Code.INVALID_ARGUMENT,
        calls.create,
        "bad",
        capability=block_capability(),
        pool="main",
        mkfsOptions="-m 1",
        saying="block volume",
    )


# --- sources ---------------------------------------------------------------------------------------------------


def test_sources(calls: Client) -> None:
    origin = calls.create("origin", 64 * MIB, pool="main").volume_id
    snapshot = calls.snapshot("moment", origin).snapshot_id
    prefix = origin.partition("-")[0]
    missing_snapshot, missing_volume = f"{prefix}-snap-{'0' * 32}", f"{prefix}-vol-{'0' * 32}"
    for source in ({"snapshot": missing_snapshot}, {"volume": missing_volume}, {"snapshot": "?"}, {"volume": "?"}):
        fails(Code.NOT_FOUND, calls.create, "copy", 64 * MIB, pool="main", **source)
    fails(Code.NOT_FOUND, calls.create, "copy", 64 * MIB, pool="main", snapshot=origin)
    fails(Code.NOT_FOUND, calls.create, "copy", 64 * MIB, pool="main", volume=snapshot)
    for source in ({"snapshot": snapshot}, {"volume": origin}):
        fails(Code.OUT_OF_RANGE, calls.create, "copy", 63 * MIB, pool="main", **source, saying="source")
        fails(Code.OUT_OF_RANGE, calls.create, "copy", 0, limit_bytes=63 * MIB, pool="main", **source)
        fails(Code.INVALID_ARGUMENT, calls.create, "copy", 64 * MIB, pool="second", **source, saying="another pool")
        for preallocation in ("metadata", "falloc"):
            fails(
                Code.INVALID_ARGUMENT,
                calls.create,
                "copy",
                64 * MIB,
                pool="main",
                preallocation=preallocation,
                **source,
                saying="source",
            )
    request = csi.CreateVolumeRequest(
        name="copy",
        parameters={"pool": "main"},
        volume_capabilities=[mount_capability()],
        volume_content_source=csi.VolumeContentSource(),
    )
    fails(Code.INVALID_ARGUMENT, calls.controller.CreateVolume, request, saying="neither")
    copy = calls.create("copy", 0, pool="main", snapshot=snapshot)
    assert copy.capacity_bytes == 64 * MIB
    assert copy.content_source.snapshot.snapshot_id == snapshot
    clone = calls.create("clone", 80 * MIB, pool="main", volume=origin)
    assert clone.capacity_bytes == 80 * MIB
    assert clone.content_source.volume.volume_id == origin
    calls.delete_snapshot(snapshot)
    for volume_id in (origin, copy.volume_id, clone.volume_id):
        calls.delete(volume_id)


def close(machine: Machine, volume_id: str) -> None:
    """Say that the node has closed the volume, as it does when it unstages it; there is no node's process here."""
    store = Store(str(machine.pools["main"]))
    volume = store.volume(volume_id)
    store.note_closed(volume, volume.attach_generation)
    store.close()


def test_an_attached_source_is_refused_with_advice(machine: Machine, calls: Client) -> None:
    volume = calls.create("attached", 64 * MIB, pool="main").volume_id
    calls.attach(volume)
    before = listing(machine.directories["main"])
    details = fails(Code.FAILED_PRECONDITION, calls.snapshot, "moment", volume, saying=NODE_ID)
    assert re.search("detach|end|stop|unpublish", details), "the message says what to do"
    fails(Code.FAILED_PRECONDITION, calls.create, "clone", 0, pool="main", volume=volume, saying=NODE_ID)
    assert listing(machine.directories["main"]) == before
    close(machine, volume)
    calls.detach(volume)
    snapshot = calls.snapshot("moment", volume)
    assert snapshot.ready_to_use
    calls.delete_snapshot(snapshot.snapshot_id)
    calls.delete(volume)


# --- the same name again ---------------------------------------------------------------------------------------


def test_the_same_name_with_other_parameters_exists_already(calls: Client) -> None:
    made = calls.create("taken", 64 * MIB, pool="main")
    again = calls.create("taken", 64 * MIB, pool="main")
    assert again == made
    exists = Code.ALREADY_EXISTS
    fails(exists, calls.create, "taken", 64 * MIB, pool="main", volumeFormat="raw", saying="volumeFormat is qcow2")
    fails(exists, calls.create, "taken", 64 * MIB, pool="main", preallocation="metadata", saying="preallocation")
    fails(exists, calls.create, "taken", 64 * MIB, pool="main", dataPath="fuse", saying="dataPath")
    fails(exists, calls.create, "taken", 64 * MIB, pool="main", mkfsOptions="-m 1", saying="mkfsOptions")
    fails(exists, calls.create, "taken", 400 * MIB, pool="main", saying="size")
    fails(exists, calls.create, "taken", 32 * MIB, limit_bytes=48 * MIB, pool="main", saying="size")
    fails(exists, calls.create, "taken", 64 * MIB, pool="main", capability=block_capability(), saying="access type")
    xfs = mount_capability("xfs")
    fails(exists, calls.create, "taken", 64 * MIB, pool="main", capability=xfs, saying="file system")
    other = calls.create("other", 64 * MIB, pool="main")
    fails(exists, calls.create, "taken", 64 * MIB, pool="main", volume=other.volume_id, saying="source")
    fails(exists, calls.create, "taken", 64 * MIB, pool="second", saying="pool main")
    snapshot = calls.snapshot("moment", made.volume_id)
    assert calls.snapshot("moment", made.volume_id) == snapshot
    fails(exists, calls.snapshot, "moment", other.volume_id, saying=made.volume_id)
    elsewhere = calls.create("elsewhere", 64 * MIB, pool="second")
    fails(exists, calls.snapshot, "moment", elsewhere.volume_id, saying="pool main")
    calls.delete_snapshot(snapshot.snapshot_id)
    for volume in (made, other, elsewhere):
        calls.delete(volume.volume_id)


def test_sixteen_callers_at_once_on_one_name(machine: Machine, calls: Client) -> None:
    with ThreadPoolExecutor(16) as callers:
        attempts = [callers.submit(calls.create, "crowd", 64 * MIB, pool="main") for _ in range(16)]
    answers = {attempt.result().volume_id for attempt in attempts if attempt.exception() is None}
    errors = [error for attempt in attempts if isinstance(error := attempt.exception(), grpc.RpcError)]
    assert len(answers) == 1
    assert len(errors) < 16
    assert {error.code() for error in errors} <= {Code.ABORTED}
    assert len(objects(machine)) == 1
    volume = answers.pop()
    with ThreadPoolExecutor(16) as callers:
        codes = {one.result() for one in [callers.submit(code_of, calls.delete, volume) for _ in range(16)]}
    assert codes <= {Code.OK, Code.ABORTED}
    assert Code.OK in codes
    wait_for("the collector", lambda: machine.check() == [], timeout_s=30)


# --- ids of other pools ----------------------------------------------------------------------------------------


def test_an_id_of_an_unknown_pool_is_unavailable_for_every_call(calls: Client) -> None:
    stub = calls.controller
    context = {"generation": "1"}
    attempts: list[tuple[Any, ...]] = [
        (calls.delete, ELSEWHERE),
        (calls.delete_snapshot, ELSEWHERE_SNAPSHOT),
        (calls.attach, ELSEWHERE),
        (calls.detach, ELSEWHERE),
        (calls.expand, ELSEWHERE, 2 * GIB),
        (calls.snapshot, "moment", ELSEWHERE),
        (calls.stage, ELSEWHERE, context),
        (calls.publish, ELSEWHERE, context),
        (stub.ControllerGetVolume, csi.ControllerGetVolumeRequest(volume_id=ELSEWHERE)),
        (stub.GetSnapshot, csi.GetSnapshotRequest(snapshot_id=ELSEWHERE_SNAPSHOT)),
        (stub.ListSnapshots, csi.ListSnapshotsRequest(snapshot_id=ELSEWHERE_SNAPSHOT)),
        (
            stub.ValidateVolumeCapabilities,
            csi.ValidateVolumeCapabilitiesRequest(volume_id=ELSEWHERE, volume_capabilities=[mount_capability()]),
        ),
    ]
    for call, *arguments in attempts:
        fails(Code.UNAVAILABLE, call, *arguments, saying="not configured here or not mounted")
    fails(Code.UNAVAILABLE, calls.create, "copy", pool="main", snapshot=ELSEWHERE_SNAPSHOT)
    fails(Code.UNAVAILABLE, calls.create, "copy", pool="main", volume=ELSEWHERE)


def test_an_id_that_cannot_be_ours_does_not_exist(calls: Client) -> None:
    stub = calls.controller
    for name in ("nonsense", "../../etc", "0badcafe-vol-XYZ"):
        calls.delete(name)
        calls.delete_snapshot(name)
        calls.detach(name)
        fails(Code.NOT_FOUND, calls.attach, name)
        fails(Code.NOT_FOUND, calls.expand, name, 2 * GIB)
        fails(Code.NOT_FOUND, calls.snapshot, "moment", name)
        fails(Code.NOT_FOUND, stub.ControllerGetVolume, csi.ControllerGetVolumeRequest(volume_id=name))
        fails(Code.NOT_FOUND, stub.GetSnapshot, csi.GetSnapshotRequest(snapshot_id=name))
        assert not stub.ListSnapshots(csi.ListSnapshotsRequest(snapshot_id=name)).entries


def test_deleting_what_is_gone_succeeds(calls: Client) -> None:
    volume = calls.create("short", 64 * MIB, pool="main").volume_id
    snapshot = calls.snapshot("brief", volume).snapshot_id
    for _ in range(2):
        calls.delete_snapshot(snapshot)
        calls.delete(volume)
        calls.detach(volume)
    fails(Code.NOT_FOUND, calls.attach, volume)


# --- attaching -------------------------------------------------------------------------------------------------


def test_attaching(calls: Client) -> None:
    volume = calls.create("disk", 64 * MIB, pool="main").volume_id
    fails(Code.NOT_FOUND, calls.attach, volume, node="node-9", saying="node-9")
    first = calls.attach(volume)
    assert calls.attach(volume) == first
    fails(Code.ALREADY_EXISTS, calls.attach, volume, readonly=True, saying="readonly=False")
    single = mount_capability(mode="SINGLE_NODE_SINGLE_WRITER")
    fails(Code.ALREADY_EXISTS, calls.attach, volume, capability=single, saying="SINGLE_NODE_WRITER")
    fails(Code.FAILED_PRECONDITION, calls.attach, volume, capability=block_capability())
    fails(Code.FAILED_PRECONDITION, calls.delete, volume, saying=NODE_ID)
    calls.detach(volume, node="node-9")
    fails(Code.FAILED_PRECONDITION, calls.delete, volume, saying=NODE_ID)
    calls.detach(volume)
    calls.detach(volume)
    second = calls.attach(volume)
    assert int(second["generation"]) > int(first["generation"])
    calls.detach(volume, node="")
    calls.delete(volume)


# --- growing ---------------------------------------------------------------------------------------------------


def test_expanding(calls: Client) -> None:
    volume = calls.create("grows", 64 * MIB, pool="main").volume_id
    assert calls.expand(volume, 96 * MIB) == 96 * MIB
    assert calls.expand(volume, 96 * MIB) == 96 * MIB
    assert calls.expand(volume, 32 * MIB) == 96 * MIB, "a volume never shrinks"
    fails(Code.OUT_OF_RANGE, calls.expand, volume, -1)
    fails(Code.OUT_OF_RANGE, calls.expand, volume, 65 * TIB)
    stub = calls.controller
    fails(Code.INVALID_ARGUMENT, stub.ControllerExpandVolume, csi.ControllerExpandVolumeRequest(volume_id=volume))
    limited = csi.CapacityRange(required_bytes=32 * MIB, limit_bytes=64 * MIB)
    request = csi.ControllerExpandVolumeRequest(volume_id=volume, capacity_range=limited)
    fails(Code.OUT_OF_RANGE, stub.ControllerExpandVolume, request)
    calls.delete(volume)
    fails(Code.NOT_FOUND, calls.expand, volume, GIB)


# --- lists -----------------------------------------------------------------------------------------------------


def volumes_of(calls: Client, token: str = "", at_most: int = 0) -> csi.ListVolumesResponse:
    request = csi.ListVolumesRequest(starting_token=token, max_entries=at_most)
    found: csi.ListVolumesResponse = calls.controller.ListVolumes(request)
    return found


def test_volumes_are_listed_in_pages_over_both_pools(calls: Client) -> None:
    made = {calls.create(f"v{n}", 64 * MIB, pool="main").volume_id for n in range(3)}
    made |= {calls.create(f"w{n}", 64 * MIB, pool="second").volume_id for n in range(2)}
    attached = min(made)
    calls.attach(attached)
    whole = volumes_of(calls)
    assert {entry.volume.volume_id for entry in whole.entries} == made
    assert whole.next_token == ""
    seen: list[str] = []
    token, pages = "", 0
    while True:
        page = volumes_of(calls, token, 2)
        assert len(page.entries) <= 2
        seen += [entry.volume.volume_id for entry in page.entries]
        token, pages = page.next_token, pages + 1
        if not token:
            break
    assert pages == 3
    assert sorted(seen) == sorted(made), "each volume once"
    published = {entry.volume.volume_id: list(entry.status.published_node_ids) for entry in whole.entries}
    assert published == {volume: [NODE_ID] if volume == attached else [] for volume in made}
    assert {entry.volume.volume_context["pool"] for entry in whole.entries} == {"main", "second"}
    for token in ("nonsense", "9:", "0:../x", "7"):
        fails(Code.ABORTED, volumes_of, calls, token, saying="token")
    fails(Code.INVALID_ARGUMENT, volumes_of, calls, "", -1)
    calls.detach(attached)
    for volume in made:
        calls.delete(volume)


def snapshots_of(calls: Client, **fields: Any) -> csi.ListSnapshotsResponse:
    found: csi.ListSnapshotsResponse = calls.controller.ListSnapshots(csi.ListSnapshotsRequest(**fields))
    return found


def test_snapshots_are_listed_by_id_by_volume_and_in_pages(calls: Client) -> None:
    one = calls.create("one", 64 * MIB, pool="main").volume_id
    two = calls.create("two", 64 * MIB, pool="second").volume_id
    of_one = {calls.snapshot(f"s{n}", one).snapshot_id for n in range(3)}
    of_two = {calls.snapshot(f"t{n}", two).snapshot_id for n in range(2)}
    assert {entry.snapshot.snapshot_id for entry in snapshots_of(calls).entries} == of_one | of_two
    by_volume = snapshots_of(calls, source_volume_id=one).entries
    assert {entry.snapshot.snapshot_id for entry in by_volume} == of_one
    picked = min(of_two)
    [entry] = snapshots_of(calls, snapshot_id=picked).entries
    assert entry.snapshot == calls.controller.GetSnapshot(csi.GetSnapshotRequest(snapshot_id=picked)).snapshot
    assert (entry.snapshot.source_volume_id, entry.snapshot.size_bytes) == (two, 64 * MIB)
    assert entry.snapshot.ready_to_use
    assert not snapshots_of(calls, snapshot_id=picked, source_volume_id=one).entries
    assert not snapshots_of(calls, source_volume_id="nobody").entries
    seen, token = [], ""
    for _ in range(3):
        page = snapshots_of(calls, starting_token=token, max_entries=2)
        seen += [entry.snapshot.snapshot_id for entry in page.entries]
        token = page.next_token
    assert token == ""
    assert sorted(seen) == sorted(of_one | of_two)
    fails(Code.ABORTED, snapshots_of, calls, starting_token="nonsense", saying="token")
    for snapshot in of_one | of_two:
        calls.delete_snapshot(snapshot)
    fails(Code.NOT_FOUND, calls.controller.GetSnapshot, csi.GetSnapshotRequest(snapshot_id=picked))
    assert not snapshots_of(calls, snapshot_id=picked).entries
    calls.delete(one)
    calls.delete(two)


# --- capacity --------------------------------------------------------------------------------------------------


def capacity_of(calls: Client, **parameters: str) -> csi.GetCapacityResponse:
    found: csi.GetCapacityResponse = calls.controller.GetCapacity(csi.GetCapacityRequest(parameters=parameters))
    return found


def test_capacity(calls: Client) -> None:
    """That CreateVolume accepts exactly this much is in test_faults, on a file system that nobody else writes to."""
    thin, thick = capacity_of(calls, pool="main"), capacity_of(calls, pool="main", preallocation="falloc")
    assert 0 < thick.available_capacity < thin.available_capacity
    assert thin.maximum_volume_size.value == min(thin.available_capacity, 64 * TIB)
    assert thin.minimum_volume_size.value == MIB
    fails(Code.INVALID_ARGUMENT, capacity_of, calls, pool="third", saying="main, second")
    fails(Code.INVALID_ARGUMENT, capacity_of, calls, pool="main", colour="red", saying="colour")


# --- capabilities, probe ---------------------------------------------------------------------------------------


def test_what_the_services_say_they_can(calls: Client) -> None:
    rpc = csi.ControllerServiceCapability.RPC
    answer = calls.controller.ControllerGetCapabilities(csi.ControllerGetCapabilitiesRequest())
    assert {rpc.Type.Name(one.rpc.type) for one in answer.capabilities} == {
        "CREATE_DELETE_VOLUME",
        "PUBLISH_UNPUBLISH_VOLUME",
        "PUBLISH_READONLY",
        "LIST_VOLUMES",
        "LIST_VOLUMES_PUBLISHED_NODES",
        "GET_VOLUME",
        "GET_CAPACITY",
        "CREATE_DELETE_SNAPSHOT",
        "LIST_SNAPSHOTS",
        "GET_SNAPSHOT",
        "CLONE_VOLUME",
        "EXPAND_VOLUME",
        "SINGLE_NODE_MULTI_WRITER",
    }
    node_rpc = csi.NodeServiceCapability.RPC
    node_answer = calls.node.NodeGetCapabilities(csi.NodeGetCapabilitiesRequest())
    assert {node_rpc.Type.Name(one.rpc.type) for one in node_answer.capabilities} == {
        "STAGE_UNSTAGE_VOLUME",
        "GET_VOLUME_STATS",
        "EXPAND_VOLUME",
        "SINGLE_NODE_MULTI_WRITER",
    }
    for identity in (calls.identity, calls.node_identity):
        info = identity.GetPluginInfo(csi.GetPluginInfoRequest())
        assert info.name == "block.csi.quobyte.com"
        assert info.vendor_version
        plugin = identity.GetPluginCapabilities(csi.GetPluginCapabilitiesRequest()).capabilities
        assert csi.PluginCapability.Service.CONTROLLER_SERVICE in {one.service.type for one in plugin}
        assert csi.PluginCapability.VolumeExpansion.ONLINE in {one.volume_expansion.type for one in plugin}
        assert identity.Probe(csi.ProbeRequest()).ready.value
    info = calls.node.NodeGetInfo(csi.NodeGetInfoRequest())
    assert (info.node_id, info.max_volumes_per_node) == (NODE_ID, 128)


def test_validate_volume_capabilities(calls: Client) -> None:
    volume = calls.create("valid", 64 * MIB, pool="main").volume_id

    def validate(*capabilities: csi.VolumeCapability) -> csi.ValidateVolumeCapabilitiesResponse:
        request = csi.ValidateVolumeCapabilitiesRequest(volume_id=volume, volume_capabilities=capabilities)
        answer: csi.ValidateVolumeCapabilitiesResponse = calls.controller.ValidateVolumeCapabilities(request)
        return answer

    assert validate(mount_capability("ext4")).HasField("confirmed")
    for wrong in (block_capability(), mount_capability("xfs"), mount_capability(mode="MULTI_NODE_MULTI_WRITER")):
        answer = validate(wrong)
        assert not answer.HasField("confirmed")
        assert answer.message
    fails(Code.INVALID_ARGUMENT, validate)
    calls.delete(volume)
    fails(Code.NOT_FOUND, validate, mount_capability())


# --- damage ----------------------------------------------------------------------------------------------------


def test_S14_a_torn_record_is_data_loss_for_its_volume_alone_and_can_be_deleted(
    machine: Machine, calls: Client
) -> None:
    good = calls.create("good", 64 * MIB, pool="main").volume_id
    torn = calls.create("torn", 64 * MIB, pool="main").volume_id
    record, image = volume_record(machine, torn), head_of(machine, torn)
    record.write_bytes(record.read_bytes()[:100])
    get = calls.controller.ControllerGetVolume
    for call, *arguments in (
        (get, csi.ControllerGetVolumeRequest(volume_id=torn)),
        (calls.attach, torn),
        (calls.expand, torn, GIB),
        (calls.snapshot, "moment", torn),
    ):
        fails(Code.DATA_LOSS, call, *arguments, saying=record.name)
    fails(Code.DATA_LOSS, calls.create, "torn", 64 * MIB, pool="main")
    path_in_pool = machine.pools["main"] / record.relative_to(machine.directories["main"])
    assert machine.controller_process is not None
    assert str(path_in_pool) in machine.controller_process.log.read_text()
    listed = {entry.volume.volume_id for entry in volumes_of(calls).entries}
    assert good in listed
    assert torn not in listed
    copy = calls.create("copy", 0, pool="main", volume=good).volume_id
    found = {(finding["kind"], finding["id"]) for finding in machine.check() if finding["severity"] == "error"}
    assert ("unreadable-record", torn) in found
    assert image.exists(), "its layer is kept"
    calls.delete(torn)
    wait_for("the collector to free its layer", lambda: not image.exists())
    fails(Code.NOT_FOUND, get, csi.ControllerGetVolumeRequest(volume_id=torn))
    for volume in (good, copy):
        calls.delete(volume)
    assert findings_left(machine) == []


def test_a_torn_snapshot_record_can_be_deleted_and_its_restore_lives_on(machine: Machine, calls: Client) -> None:
    volume = calls.create("origin", 64 * MIB, pool="main").volume_id
    snapshot = calls.snapshot("moment", volume).snapshot_id
    restored = calls.create("restored", 0, pool="main", snapshot=snapshot).volume_id
    record: Path = next((machine.directories["main"] / "snapshots").glob(f"*/{snapshot}.json"))
    record.write_bytes(b"")
    fails(Code.DATA_LOSS, calls.create, "another", 0, pool="main", snapshot=snapshot, saying=record.name)
    fails(Code.DATA_LOSS, calls.controller.GetSnapshot, csi.GetSnapshotRequest(snapshot_id=snapshot))
    assert not snapshots_of(calls).entries
    calls.delete_snapshot(snapshot)
    assert findings_left(machine) == []
    calls.delete(volume)
    request = csi.ControllerGetVolumeRequest(volume_id=restored)
    assert calls.controller.ControllerGetVolume(request).volume.capacity_bytes == 64 * MIB
    calls.delete(restored)


# --- one pool --------------------------------------------------------------------------------------------------


def test_the_only_pool_is_the_default() -> None:
    with running() as machine:
        calls = Client(machine)
        made = calls.create("disk", 64 * MIB)
        assert made.volume_context["pool"] == "main"
        assert calls.create("disk", 64 * MIB, pool="main") == made
        calls.delete(made.volume_id)
