"""The command line: exit statuses, options and their environment variables, what the operator commands print.

The axes: command, right and wrong use, and text or JSON. What `check` finds is proved where damage is made; here only
the form of its answers, which users' scripts rely on.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from running import MIB, free_port, machine_of, running, volume_record

from csi_quobyte.pb import csi_pb2 as csi
from csi_quobyte.pb import csi_pb2_grpc, pluginregistration_pb2_grpc
from csi_quobyte.pb import pluginregistration_pb2 as registration
from lab.client import Client
from lab.machine import QEMU_DIR, Machine, wait_for

pytestmark = pytest.mark.root

VOLUME_BYTES = 64 * MIB
DOCTOR_LIMIT_S = 10.0
SLACK_S = 5.0


def csi_quobyte(*arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line in an environment of which only these variables are the driver's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CSI_", "NODE_ID"))}
    return subprocess.run(
        [sys.executable, "-m", "csi_quobyte", *map(str, arguments)],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Two pools; in the first a volume with a snapshot and a restored one, in the second one volume."""
    with running(pools=("main", "second")) as machine:
        calls = Client(machine)
        volume = calls.create("origin", VOLUME_BYTES, pool="main").volume_id
        (calls.use(volume) / "file").touch()
        calls.release(volume)
        snapshot = calls.snapshot("moment", volume).snapshot_id
        restored = calls.create("restored", 2 * VOLUME_BYTES, pool="main", snapshot=snapshot).volume_id
        other = calls.create("other", VOLUME_BYTES, pool="second").volume_id
        calls.attach(restored)
        yield machine
        calls.detach(restored)
        calls.delete_snapshot(snapshot)
        for one in (volume, restored, other):
            calls.delete(one)


def node_records(directory: Path) -> list[Path]:
    return list((directory / "nodes").glob("*.json"))


def printed(machine: Machine, *arguments: str, status: int = 0) -> Any:
    """Give what a command prints as JSON about both pools."""
    done = csi_quobyte(*arguments, *machine.pool_arguments, "--json")
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


# --- exit statuses ---------------------------------------------------------------------------------------------


def serving(machine: Machine, *changed: str | Path) -> list[str | Path]:
    """Give arguments with which the node would start; later ones replace earlier ones."""
    return [
        "node",
        "--endpoint",
        f"unix://{machine.base}/x.sock",
        *machine.pool_arguments,
        "--qemu-dir",
        QEMU_DIR,
        "--node-id",
        "x",
        "--state-dir",
        machine.base / "x",
        *changed,
    ]


@pytest.mark.parametrize(
    ("changed", "saying"),
    [
        (["--endpoint", "tcp://127.0.0.1:1"], "--endpoint"),
        (["--endpoint", "unix://relative.sock"], "--endpoint"),
        (["--endpoint", "unix:///" + "x" * 108], "--endpoint"),
        (["--state-dir", "relative"], "--state-dir"),
        (["--state-dir", "/tmp/" + "x" * 80], "--state-dir"),
        (["--state-dir", "/proc/cq"], "state directory"),
        (["--pool", "nonsense"], "NAME=PATH"),
        (["--pool", "UPPER=/tmp"], "NAME=PATH"),
        (["--pool", "third=relative"], "absolute"),
        (["--pool", "main=/elsewhere"], "same name"),
        (["--pool-timeout", "soon"], "--pool-timeout"),
        (["--pool-timeout", "0s"], "--pool-timeout"),
        (["--driver-name", "bad_name"], "--driver-name"),
        (["--health-address", "nonsense"], "--health-address"),
        (["--metrics-address", "127.0.0.1:70000"], "--metrics-address"),
        (["--max-volumes-per-node", "0"], "--max-volumes-per-node"),
        (["--require-mount", "nfs"], "--require-mount"),
        (["--log-level", "loud"], "--log-level"),
        (["--node-id", ""], "--node-id"),
        (["--qemu-dir", "/nowhere"], "qemu-img"),
        (["--colour"], "--colour"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_configuration_ends_with_2_before_anything_is_served(
    machine: Machine, changed: list[str], saying: str
) -> None:
    done = csi_quobyte(*serving(machine, *changed))
    assert done.returncode == 2
    assert saying in done.stderr
    assert "Traceback" not in done.stderr
    assert not (machine.base / "x.sock").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["controller"],
        ["node", "--endpoint", "unix:///tmp/x"],
        ["ls"],
        ["check"],
        ["show"],
        ["pool"],
        ["pool", "init"],
        ["nonsense"],
        ["--nonsense"],
        ["pool", "init", "/tmp", "--owner", "me"],
        ["pool", "init", "/tmp", "--require-mount", "any", "--file-mode", "0666"],
        ["pool", "init", "/tmp", "--require-mount", "any", "--file-mode", "rw"],
        ["ls", "--pool", "main=/nowhere"],
        ["check", "--pool", "main=/nowhere", "--qemu-dir", QEMU_DIR],
    ],
    ids=lambda words: " ".join(str(word) for word in words),
)
def test_wrong_use_ends_with_2(arguments: list[str]) -> None:
    done = csi_quobyte(*arguments)
    assert done.returncode == 2
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_refused_ends_with_1(machine: Machine) -> None:
    for arguments in (["show", "0" * 24], ["show", "nonsense"], ["tree", "0badcafe-vol-" + "0" * 32]):
        done = csi_quobyte(*arguments, *machine.pool_arguments)
        assert done.returncode == 1, arguments
        assert done.stderr.startswith("csi-quobyte: ")


def test_version_and_help() -> None:
    assert csi_quobyte("--version").returncode == 0
    assert csi_quobyte().returncode in (0, 2)
    for command, variables in (
        ("controller", {"CSI_ENDPOINT", "CSI_QUOBYTE_POOLS"}),
        ("node", {"CSI_ENDPOINT", "CSI_QUOBYTE_POOLS", "NODE_ID", "CSI_QUOBYTE_STATE_DIR"}),
    ):
        text = csi_quobyte(command, "--help").stdout
        flags = {
            "driver-name", "require-mount", "pool-timeout", "qemu-dir", "health-address", "metrics-address",
            "log-level", "log-format",
        }  # fmt: skip
        if command == "node":
            flags |= {
                "max-volumes-per-node", "register-dir", "kubelet-dir", "stop-daemons-on-exit", "stop-timeout",
                "allow-untested-qemu",
            }  # fmt: skip
        for flag in flags:
            assert f"--{flag}" in text
            variables.add("CSI_QUOBYTE_" + flag.upper().replace("-", "_"))
        assert {variable for variable in variables if variable not in text} == set()


# --- pool init -------------------------------------------------------------------------------------------------


def test_pool_init(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    done = csi_quobyte("pool", "init", pool)
    assert done.returncode == 2, "not a mounted Quobyte volume"
    assert "not a mount point" in done.stderr
    assert list(pool.iterdir()) == []
    for _ in range(2):
        done = csi_quobyte("pool", "init", pool, "--require-mount", "any", "--owner", "65532:65532")
        assert done.returncode == 0, done.stderr
        assert "format 1" in done.stdout
    assert (pool / "format.json").stat().st_uid == 65532
    other = csi_quobyte("pool", "init", pool, "--require-mount", "any", "--owner", "0:0")
    assert other.returncode == 1
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "theirs").touch()
    done = csi_quobyte("pool", "init", foreign, "--require-mount", "any")
    assert done.returncode == 1
    assert "theirs" in done.stderr
    assert [path.name for path in foreign.iterdir()] == ["theirs"]


def test_pool_init_looks_at_the_kind_and_the_size_of_the_mount() -> None:
    with machine_of() as machine:
        standin = machine.pools["main"]
        done = csi_quobyte("pool", "init", standin)
        assert done.returncode == 2
        assert "size" in done.stderr, "a real Quobyte volume's root has size 0, the stand-in's has not"
        assert csi_quobyte("pool", "init", standin, "--require-mount", "quobyte-nosize").returncode == 0
        done = csi_quobyte("pool", "init", "/proc", "--require-mount", "quobyte-nosize")
        assert done.returncode == 2
        assert "not Quobyte" in done.stderr


# --- environment -----------------------------------------------------------------------------------------------


def test_everything_can_come_from_the_environment() -> None:
    with machine_of(pools=("main", "second")) as machine:
        port = free_port()
        environment = {
            "CSI_ENDPOINT": f"unix://{machine.base}/n.sock",
            "NODE_ID": "from-env",
            "CSI_QUOBYTE_POOLS": "  ".join(f"{name}={path}" for name, path in machine.pools.items()),
            "CSI_QUOBYTE_REQUIRE_MOUNT": "quobyte-nosize",
            "CSI_QUOBYTE_STATE_DIR": str(machine.base / "state"),
            "CSI_QUOBYTE_QEMU_DIR": str(QEMU_DIR),
            "CSI_QUOBYTE_MAX_VOLUMES_PER_NODE": "7",
            "CSI_QUOBYTE_DRIVER_NAME": "env.example.com",
            "CSI_QUOBYTE_POOL_TIMEOUT": "500ms",
            "CSI_QUOBYTE_HEALTH_ADDRESS": f"127.0.0.1:{port}",
            "CSI_QUOBYTE_LOG_FORMAT": "json",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "csi_quobyte", "node"],
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_for("the node", lambda: answer(port, "/readyz")[0] == 200)
            info = csi_pb2_grpc.NodeStub(machine.channel("n.sock")).NodeGetInfo(csi.NodeGetInfoRequest(), timeout=10)
            assert (info.node_id, info.max_volumes_per_node) == ("from-env", 7)
            identity = csi_pb2_grpc.IdentityStub(machine.channel("n.sock"))
            assert identity.GetPluginInfo(csi.GetPluginInfoRequest(), timeout=10).name == "env.example.com"
            for directory in machine.directories.values():
                wait_for("the node's record", partial(node_records, directory))
        finally:
            process.terminate()
            _, log = process.communicate(timeout=30)
        assert process.returncode == 0
        assert all("message" in json.loads(line) for line in log.splitlines())


# --- operator commands -----------------------------------------------------------------------------------------


def test_ls(machine: Machine) -> None:
    rows = {row["name"]: row for row in printed(machine, "ls")["objects"]}
    assert set(rows) == {"origin", "moment", "restored", "other"}
    space = {"allocated_bytes", "exclusive_bytes", "shared_bytes"}  # test_space has them
    keys = {"pool", "kind", "id", "name", "size_bytes", "state", "node", "source"} | space
    assert all(set(row) == keys for row in rows.values())
    assert {key: value for key, value in rows["restored"].items() if key not in space} | {"id": ""} == {
        "pool": "main",
        "kind": "volume",
        "id": "",
        "name": "restored",
        "size_bytes": 2 * VOLUME_BYTES,
        "state": "ready",
        "node": "node-1",
        "source": rows["moment"]["id"],
    }
    assert (rows["moment"]["kind"], rows["moment"]["source"]) == ("snapshot", rows["origin"]["id"])
    assert rows["other"]["pool"] == "second"
    text = csi_quobyte("ls", *machine.pool_arguments).stdout
    lines = text.splitlines()
    assert lines[0].split() == ["ID", "NAME", "SIZE", "ALLOCATED", "EXCLUSIVE", "STATE", "NODE", "SOURCE"]
    assert len(lines) == 1 + len(rows)
    assert all(row["id"] in text for row in rows.values())


def test_show(machine: Machine) -> None:
    rows = {row["name"]: row["id"] for row in printed(machine, "ls")["objects"]}
    volume = printed(machine, "show", rows["restored"])
    assert (volume["name"], volume["pool"], volume["size_bytes"]) == ("restored", "main", 2 * VOLUME_BYTES)
    assert next(layer["layer"] for layer in volume["chain"]) == volume["head"]
    assert len(volume["chain"]) == 2
    snapshot = printed(machine, "show", rows["moment"])
    assert snapshot["layer"] == volume["chain"][1]["layer"]
    layer = printed(machine, "show", snapshot["layer"])
    assert layer["state"] == "frozen"
    assert sum(marker.startswith("s-") for marker in layer["references"]) == 1
    assert sum(marker.startswith("c-") for marker in layer["references"]) == 2
    text = csi_quobyte("show", rows["restored"], *machine.pool_arguments).stdout
    assert "name: restored" in text


def test_tree(machine: Machine) -> None:
    rows = {row["name"]: row["id"] for row in printed(machine, "ls")["objects"]}
    done = csi_quobyte("tree", *machine.pool_arguments, "--json")
    pools = [json.loads(line) for line in done.stdout.splitlines()]
    assert [pool["pool"] for pool in pools] == ["main", "second"]
    [base] = pools[0]["layers"]
    assert base["state"] == "frozen"
    assert {child["state"] for child in base["children"]} == {"head"}
    assert len(base["children"]) == 2
    main = ["--pool", f"main={machine.pools['main']}", "--require-mount", "quobyte-nosize"]
    text = csi_quobyte("tree", rows["restored"], *main).stdout
    assert base["layer"] in text
    assert "volume restored" in text
    assert "snapshot moment" in text


def test_check_of_a_pool_that_is_well(machine: Machine) -> None:
    done = csi_quobyte("check", *machine.pool_arguments, "--qemu-dir", QEMU_DIR, "--json")
    assert done.returncode == 0, done.stdout
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first == {
        "format": 1,
        "pool": "main",
        "checked": {"volumes": 2, "snapshots": 1, "layers": 3},
        "skipped_live": 1,
        "findings": [],
    }
    assert second["checked"] == {"volumes": 1, "snapshots": 0, "layers": 1}
    text = csi_quobyte("check", *machine.pool_arguments, "--qemu-dir", QEMU_DIR).stdout
    assert text.count("no findings") == 2


def test_check_that_finds_something_ends_with_1(machine: Machine) -> None:
    volume = next(row["id"] for row in printed(machine, "ls")["objects"] if row["name"] == "origin")
    record = volume_record(machine, volume)
    whole = record.read_bytes()
    record.write_bytes(whole[:50])
    try:
        done = csi_quobyte("check", *machine.pool_arguments, "--qemu-dir", QEMU_DIR, "--json")
        assert done.returncode == 1
        findings = json.loads(done.stdout.splitlines()[0])["findings"]
        assert all(set(one) == {"kind", "severity", "id", "path", "detail", "repairable"} for one in findings)
        [unreadable] = [one for one in findings if one["kind"] == "unreadable-record"]
        assert (unreadable["severity"], unreadable["id"], unreadable["repairable"]) == ("error", volume, False)
        assert unreadable["path"].endswith(f"{volume}.json")
        done = csi_quobyte("check", *machine.pool_arguments, "--qemu-dir", QEMU_DIR)
        assert done.returncode == 1
        assert "error: unreadable-record" in done.stdout
        assert done.stdout.count(f"{volume}.json") == 1
        damaged = [row for row in printed(machine, "ls")["objects"] if row["kind"] == "damaged"]
        assert [row["id"] for row in damaged] == [volume]
    finally:
        record.write_bytes(whole)


def test_check_repairs_next_to_the_running_controller(machine: Machine) -> None:
    """A lost marker of the volume that is attached, and what a crash has left, through the mount of the controller."""
    volume = next(row["id"] for row in printed(machine, "ls")["objects"] if row["name"] == "restored")
    (marker,) = machine.directories["main"].glob(f"layers/*/*.refs/v-{volume}-*")
    marker.unlink()
    stray = machine.directories["main"] / "layers" / "ab" / f"ab{'0' * 22}.raw"
    stray.touch()
    arguments = ("check", *machine.pool_arguments, "--qemu-dir", QEMU_DIR, "--repair")
    planned = csi_quobyte(*arguments)
    assert planned.returncode == 1
    assert planned.stdout.count("orphan-file") == 1, "each finding is said once, with what would be done"
    assert "--repair --yes" in planned.stdout
    assert stray.exists()
    assert not marker.exists()
    done = csi_quobyte(*arguments, "--yes", "--json")
    assert done.returncode == 0, done
    first = json.loads(done.stdout.splitlines()[0])
    assert {(one["kind"], one["done"]) for one in first["repair"]["actions"]} == {
        ("missing-marker", True),
        ("orphan-file", True),
    }
    assert marker.exists()
    assert not stray.exists()


def test_doctor(machine: Machine) -> None:
    done = csi_quobyte("doctor", *machine.pool_arguments, "--qemu-dir", QEMU_DIR, "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, [check for check in checks.values() if check["status"] == "fail"]
    assert all(set(check) == {"name", "status", "detail"} for check in checks.values())
    assert all(check["status"] in ("ok", "warn", "fail") for check in checks.values())
    for name in ("qemu", "qemu for fuse", "loop", "fuse", "root", "pool main", "pool second"):
        assert any(one == name or one.startswith(f"{name} ") for one in checks), name
    assert checks["qemu for fuse"]["status"] == "ok"
    missing = csi_quobyte("doctor", "--qemu-dir", "/nowhere", "--json")
    assert missing.returncode == 1
    assert {"name": "qemu", "status": "fail"}.items() <= json.loads(missing.stdout)["checks"][0].items()
    text = csi_quobyte("doctor", "--qemu-dir", QEMU_DIR).stdout
    assert text.startswith("ok")
    unmounted: list[str | Path] = ["--pool", "gone=/nowhere", "--qemu-dir", QEMU_DIR]
    assert csi_quobyte("doctor", *unmounted).returncode == 1


# --- health, metrics, registration -----------------------------------------------------------------------------


def answer(port: int, path: str) -> tuple[int, str]:
    """Give status and body of an HTTP answer; status 0 when nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (urllib.error.URLError, OSError):
        return 0, ""


def test_health_and_metrics() -> None:
    with machine_of() as machine:
        health, metrics = free_port(), free_port()
        addresses = ("--health-address", f"127.0.0.1:{health}", "--metrics-address", f"127.0.0.1:{metrics}")
        machine.start_controller(*addresses)
        assert answer(health, "/livez") == (200, "ok\n")
        assert answer(health, "/readyz") == (200, "ok\n")
        assert answer(health, "/other")[0] == 404
        calls = Client(machine)
        calls.delete(calls.create("counted", VOLUME_BYTES).volume_id)
        status, text = answer(metrics, "/metrics")
        assert status == 200
        assert 'csi_quobyte_operations_total{code="OK",method="CreateVolume"} 1.0' in text
        assert 'csi_quobyte_pool_up{pool="main"} 1.0' in text
        assert 'csi_quobyte_operation_seconds_count{method="DeleteVolume"} 1.0' in text
        machine.standins["main"].unmount()
        assert answer(health, "/livez") == (200, "ok\n"), "a restart would not help the pool"
        assert answer(health, "/readyz")[0] == 503
        assert 'csi_quobyte_pool_up{pool="main"} 0.0' in answer(metrics, "/metrics")[1]
        machine.standins["main"].mount()
        assert answer(health, "/readyz")[0] == 200
        taken = csi_quobyte(
            "controller", "--endpoint", f"unix://{machine.base}/x.sock", *machine.pool_arguments,
            "--qemu-dir", QEMU_DIR, "--health-address", f"127.0.0.1:{health}",
        )  # fmt: skip
        assert taken.returncode == 2
        assert "cannot serve health" in taken.stderr


def test_the_kubelet_can_register_the_node() -> None:
    with machine_of() as machine:
        registry = machine.base / "plugins_registry"
        registry.mkdir()
        machine.start_node("--register-dir", registry, "--kubelet-dir", "/kubelet")
        socket = registry / "block.csi.quobyte.com-reg.sock"
        wait_for("the registration socket", socket.exists)
        with grpc.insecure_channel(f"unix://{socket}") as channel:
            kubelet = pluginregistration_pb2_grpc.RegistrationStub(channel)
            info = kubelet.GetInfo(registration.InfoRequest(), timeout=10)
            assert (info.type, info.name) == ("CSIPlugin", "block.csi.quobyte.com")
            assert info.endpoint == "/kubelet/plugins/block.csi.quobyte.com/n.sock", "as the kubelet sees it"
            assert list(info.supported_versions) == ["1.0.0"]
            refusal = registration.RegistrationStatus(plugin_registered=False, error="no thanks")
            kubelet.NotifyRegistrationStatus(refusal, timeout=10)
            kubelet.NotifyRegistrationStatus(registration.RegistrationStatus(plugin_registered=True), timeout=10)
        assert machine.node_process is not None
        log = machine.node_process.log.read_text()
        assert "no thanks" in log
        assert "has registered" in log
        assert machine.node_process.stop() == 0
        assert not socket.exists()


# --- what goes wrong at the desk -------------------------------------------------------------------------------


def test_a_second_controller_leaves_the_socket_of_the_first_alone() -> None:
    with machine_of() as machine:
        machine.start_controller()
        socket = machine.base / "c.sock"
        before = socket.stat().st_ino
        second = csi_quobyte(
            "controller", "--endpoint", f"unix://{socket}", *machine.pool_arguments, "--qemu-dir", QEMU_DIR
        )
        assert second.returncode == 2, second.stderr
        assert str(socket) in second.stderr
        assert socket.stat().st_ino == before
        identity = csi_pb2_grpc.IdentityStub(machine.channel("c.sock"))
        assert identity.Probe(csi.ProbeRequest(), timeout=10).ready.value


def test_doctor_ends_although_a_pool_hangs() -> None:
    with machine_of() as machine:
        machine.standins["main"].hang()
        started = time.monotonic()
        done = csi_quobyte("doctor", *machine.pool_arguments, "--qemu-dir", QEMU_DIR, "--json")
        assert time.monotonic() - started < DOCTOR_LIMIT_S + SLACK_S
    assert done.returncode == 1
    [pool] = [check for check in json.loads(done.stdout)["checks"] if check["name"] == "pool main"]
    assert pool["status"] == "fail"
    assert "not answered" in pool["detail"]


def test_doctor_with_two_pools_of_one_name_is_wrong_use(machine: Machine) -> None:
    main = f"main={machine.pools['main']}"
    done = csi_quobyte("doctor", "--pool", main, "--pool", f"main={machine.pools['second']}", "--qemu-dir", QEMU_DIR)
    assert done.returncode == 2
    assert "main" in done.stderr
    assert "Traceback" not in done.stderr


def test_ls_prints_the_good_pool_and_names_the_bad_one(machine: Machine) -> None:
    done = csi_quobyte("ls", *machine.pool_arguments, "--pool", f"gone={machine.base}/nowhere", "--json")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert {"origin", "other"} <= {row["name"] for row in json.loads(done.stdout)["objects"]}


@pytest.mark.parametrize("command", ["show", "tree"])
def test_a_name_is_as_good_as_an_id(machine: Machine, command: str) -> None:
    volume = next(row["id"] for row in printed(machine, "ls")["objects"] if row["name"] == "origin")
    by_name, by_id = (csi_quobyte(command, one, *machine.pool_arguments) for one in ("origin", volume))
    assert (by_name.returncode, by_name.stdout) == (0, by_id.stdout)
    done = csi_quobyte(command, "nobody", *machine.pool_arguments)
    assert done.returncode == 1
    assert "csi-quobyte ls" in done.stderr
