"""csi-quobyte trash, as a user runs it."""

import json
import os
import subprocess
import sys

from controller_kit import Kit

from csi_quobyte.pool import records


def run(kit: Kit, *arguments: str, command: tuple[str, ...] = ("trash",)) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "csi_quobyte", *command, *arguments, "--pool", f"main={kit.store.root}"],
        env={**os.environ, "CSI_QUOBYTE_REQUIRE_MOUNT": "any"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_list_restore_and_purge(kit: Kit) -> None:
    named = {"pvc/name": "data", "pvc/namespace": "shop"}
    entries = []
    for name in ("v", "w"):
        entries.append(records.trash_id(kit.create(name, on_delete="trash", kubernetes=named)))
        kit.write(name, 1)
        kit.delete(name)
    status, out, _ = run(kit, "ls", "--json")
    found = json.loads(out)["entries"]
    assert (status, {entry["id"] for entry in found}) == (0, set(entries))
    assert {entry["claim"] for entry in found} == {"shop/data"}
    assert all(entry["exclusive_bytes"] == entry["allocated_bytes"] > 64 * 1024 for entry in found)
    assert "shop/data" in run(kit, "ls")[1]
    kit.create("v")
    status, _, err = run(kit, "restore", entries[0])
    assert status == 1
    assert "--name NAME" in err
    status, out, _ = run(kit, "restore", entries[0], "--name", "old", "--json")
    assert (status, json.loads(out)["id"]) == (0, kit.volume_id("old"))
    assert kit.holds("old", 1)
    assert run(kit, "purge", "--expired")[:2] == (0, "")
    assert run(kit, "purge", entries[1], "--json")[0] == 0
    assert run(kit, "purge", entries[1])[0] == 1
    assert run(kit, "purge")[0] == 2
    assert run(kit, "purge", entries[1], "--all")[0] == 2
    assert json.loads(run(kit, "ls", "--json")[1])["entries"] == []
    kit.sweep_until_quiet()
    assert kit.findings() == set(), "what was purged has freed its layer"


def test_the_tree_says_what_is_in_the_trash(kit: Kit) -> None:
    kit.create("v", on_delete="trash")
    kit.write("v", 1)
    kit.snapshot("s", of="v", on_delete="trash")
    kit.delete("v")
    kit.create("v")
    kit.delete_snapshot("s")
    status, out, _ = run(kit, command=("tree",))
    assert status == 0
    assert out.count("volume v (in the trash)") == 1
    assert out.count("snapshot s (in the trash)") == 1
    assert out.count("volume v (") == 2, "the other one is alive"
    assert kit.volume_id("v") not in out
