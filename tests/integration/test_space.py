"""Allocated, shared and exclusive bytes add up to what is on the disk, and exclusive is what a delete frees."""

from controller_kit import Kit

from csi_quobyte.cli import show
from csi_quobyte.engine import index


def rows(kit: Kit) -> dict[str, dict[str, int]]:
    found = {row["name"]: row for row in show._rows("main", kit.store, index.read(kit.store))}
    for row in found.values():  # one object alone says the same
        details = show._details(kit.store, str(row["id"]))
        assert details is not None
        sizes = ("allocated_bytes", "exclusive_bytes", "shared_bytes")
        assert [details[name] for name in sizes] == [row[name] for name in sizes]
        assert row["allocated_bytes"] == row["exclusive_bytes"] + row["shared_bytes"]
    return found


def on_disk(kit: Kit) -> int:
    layers = [kit.store.layer(layer_id) for layer_id in kit.store.layer_ids()]
    return sum(length[1] for length in map(kit.store.image_bytes, layers) if length)


def test_exclusive_is_what_a_delete_frees(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    assert rows(kit)["v"]["exclusive_bytes"] == on_disk(kit)
    kit.snapshot("s", of="v")
    kit.write("v", 2, block=1)
    kit.create("c", source=kit.from_snapshot("s"))
    kit.write("c", 3)
    found = rows(kit)
    assert found["s"]["exclusive_bytes"] == 0
    base = found["s"]["allocated_bytes"]
    assert base > 64 * 1024
    assert found["v"]["shared_bytes"] == found["c"]["shared_bytes"] == base
    assert found["v"]["exclusive_bytes"] + found["c"]["exclusive_bytes"] + base == on_disk(kit)
    for name, delete in (("c", kit.delete), ("s", kit.delete_snapshot), ("v", kit.delete)):
        wanted, before = rows(kit)[name]["exclusive_bytes"], on_disk(kit)
        delete(name)
        kit.sweep_until_quiet()
        assert before - on_disk(kit) == wanted, name
    assert on_disk(kit) == 0
