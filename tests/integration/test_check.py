"""`check`: each kind of finding that the format page lists, made on purpose; it changes nothing."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from controller_kit import Kit, tree
from test_collector import tear

from csi_quobyte.engine import check as check_module
from csi_quobyte.pool import records
from csi_quobyte.pool.records import VolumeState


def image(kit: Kit, name: str, position: int = 0) -> Path:
    return Path(kit.store.image_path(kit.chain(name)[position]))


def raw_write(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, data, offset)
    os.close(fd)


def lose_layer_record(kit: Kit) -> None:
    base = kit.chain("v")[-1]
    Path(kit.store.root, "layers", base.id[:2], f"{base.id}.json").unlink()


def lose_marker(kit: Kit) -> None:
    volume = kit.store.volume(kit.volume_id("v"))
    kit.store.unmark(volume.head, records.volume_marker(volume))


def make_circle(kit: Kit) -> None:
    head, base = kit.chain("v")
    kit.store.swap(base, replace(base, parent=head.id))


def grow_record(kit: Kit) -> None:
    head = kit.chain("v")[0]
    kit.store.swap(head, replace(head, size_bytes=head.size_bytes * 2))


def put_other_backing_name(kit: Kit) -> None:
    path = image(kit, "v")
    data = path.read_bytes()[:512]
    name = kit.store.backing_name(kit.chain("v")[0].id, kit.chain("v")[1]).encode()
    raw_write(path, data.index(name), name[:-6] + b"_" + name[-5:])


def leak(kit: Kit) -> None:
    """Give a cluster beyond the end a refcount, as a killed daemon leaves it."""
    path = image(kit, "v", 1)
    data = path.read_bytes()
    table = int.from_bytes(data[48:56])
    block = int.from_bytes(data[table : table + 8])
    used = -(-len(data) // 65536)
    os.truncate(path, (used + 1) * 65536)
    raw_write(path, block + 2 * used, b"\0\1")


def leave_unfinished(kit: Kit) -> None:
    volume = kit.create("w")
    kit.store.swap(volume, replace(volume, state=VolumeState.DELETING))


def leave_orphan(kit: Kit) -> None:
    kit.create("w")
    kit.delete("w")


def leave_claim(kit: Kit) -> None:
    volume_id = kit.volume_id("v")
    path = Path(kit.store.root, "volumes", volume_id.rpartition("-")[2][:2], f"{volume_id}.json")
    os.link(path, f"{path}.g9")


def leave_temporary(kit: Kit) -> None:
    """What a process of a host that was started anew since has left."""
    path = Path(kit.store.root, "tmp", "0123456789abcdef.0123456789ab")
    path.touch()
    os.utime(path, (0.0, 0.0))


MADE: dict[str, Callable[[Kit], object]] = {
    "unreadable-record": lambda kit: tear(kit, "snapshots", kit.snapshot_id("s")),
    "missing-layer": lose_layer_record,
    "missing-image": lambda kit: image(kit, "v").unlink(),
    "missing-marker": lose_marker,
    "broken-chain": make_circle,
    "wrong-size": grow_record,
    "wrong-backing-name": put_other_backing_name,
    "damaged-image": lambda kit: raw_write(image(kit, "v", 1), 0, b"XXXX"),
    "leaked-clusters": leak,
    "unfinished": leave_unfinished,
    "stale-marker": lambda kit: kit.store.mark(kit.chain("v")[0].id, records.child_marker(records.new_layer_id())),
    "orphan-layer": leave_orphan,
    "orphan-file": lambda kit: Path(kit.store.root, "layers", "ab", "ab" + "0" * 22 + ".raw").touch(),
    "stale-claim": leave_claim,
    "stale-temporary": leave_temporary,
    "foreign-file": lambda kit: Path(kit.store.root, "layers", "00", "README").touch(),
}
ERRORS = {"unreadable-record", "missing-layer", "missing-image", "missing-marker"} | {
    "broken-chain",
    "wrong-backing-name",
    "wrong-size",
    "damaged-image",
}


def test_every_kind_is_made_here() -> None:
    assert set(MADE) == set(get_args(check_module.Kind))


@pytest.mark.parametrize("kind", MADE)
def test_kind_is_found_and_nothing_is_changed(kit: Kit, kind: str) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    assert kit.check() == []
    MADE[kind](kit)
    before = tree(kit.store.root)
    found = [finding for finding in kit.check() if finding.kind == kind]
    assert found, f"{kit.check()} has no {kind}"
    assert {finding.severity for finding in found} == {"error" if kind in ERRORS else "warning"}
    certain = kind not in ERRORS | {"foreign-file"} or kind in {"missing-marker", "wrong-backing-name"}
    assert {finding.repairable for finding in found} == {certain}
    assert tree(kit.store.root) == before


def test_image_that_an_unfinished_clone_has_not_made_yet_is_no_damage(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    made = kit.create("c", source=kit.from_snapshot("s"))
    lies_on = kit.chain("c")[1].id
    kit.store.swap(made, replace(made, state=VolumeState.CREATING, unfinished=True, parent=lies_on))
    image(kit, "c").unlink()
    assert kit.findings() == {"unfinished"}
    kit.create("c", source=kit.from_snapshot("s"))
    assert kit.holds("c", 1)
    assert kit.check() == []


def test_head_of_an_attached_volume_is_not_opened(kit: Kit) -> None:
    kit.create("v")
    kit.attach("v")
    raw_write(image(kit, "v"), 0, b"XXXX")
    result = check_module.check(kit.store, lambda *_: (1, 0))
    assert (result.volumes, result.layers, result.skipped_live) == (1, 1, 1)
    assert result.findings == []


def test_findings_name_the_damaged_image(kit: Kit) -> None:
    kit.create("v")
    path = image(kit, "v")
    raw_write(path, 65536, b"\xff" * 64)
    (found,) = {(finding.kind, finding.path) for finding in kit.check()}
    assert found == ("damaged-image", str(path))
