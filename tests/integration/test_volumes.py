"""Volumes: create, clone, delete, attach, detach, expand: the plain case, the same again, a conflict, many at once.

Contents are compared through the recorded chains with the real qemu-io.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from controller_kit import SIZE_BYTES, Kit, tree

from csi_quobyte.errors import AlreadyExists, Busy, DriverError, Exhausted, NotFound, OutOfRange, Refused, Unavailable
from csi_quobyte.operations import volumes
from csi_quobyte.pool import chain as chain_module
from csi_quobyte.pool import images, records
from csi_quobyte.pool.records import Content, LayerState, Source, VolumeState
from csi_quobyte.pool.sizes import GIB, MIB, SizeRange
from csi_quobyte.pool.steps import Steps

FORMATTED = Content(state="formatted", filesystem="ext4")


# --- create ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_format", "preallocation"),
    [("qcow2", "off"), ("qcow2", "metadata"), ("qcow2", "falloc"), ("raw", "off"), ("raw", "falloc")],
)
def test_blank_volume_reads_as_zeros_and_is_sound(kit: Kit, image_format: str, preallocation: str) -> None:
    volume = kit.create("v", image_format=image_format, preallocation=preallocation)
    assert (volume.state, volume.size_bytes, volume.unfinished) == (VolumeState.READY, SIZE_BYTES, False)
    (head,) = kit.chain("v")
    assert (head.format, head.size_bytes, head.state) == (image_format, SIZE_BYTES, LayerState.HEAD)
    assert kit.holds("v", 0, 0)
    assert kit.check() == []


def test_create_without_a_size_gives_one_gibibyte(kit: Kit) -> None:
    assert kit.create("v", size=SizeRange()).size_bytes == GIB


def test_create_again_gives_the_same_volume_and_changes_nothing(kit: Kit) -> None:
    first = kit.create("v")
    before = tree(kit.store.root)
    assert kit.create("v") == first
    assert kit.create("v", size=SizeRange(SIZE_BYTES - 5, SIZE_BYTES)) == first
    assert tree(kit.store.root) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_format": "raw"}, "volumeFormat is qcow2, asked for raw"),
        ({"preallocation": "metadata"}, "preallocation is off, asked for metadata"),
        ({"data_path": "fuse"}, "dataPath is auto, asked for fuse"),
        ({"access_type": "block", "filesystem": ""}, "access type is mount, asked for block"),
        ({"filesystem": "xfs"}, "file system is ext4, asked for xfs"),
        ({"mkfs_options": ("-m", "1")}, "mkfsOptions is , asked for -m 1"),
        ({"source": Source(kind="volume", id="0-vol-0")}, "source is None, asked for"),
        ({"size": SizeRange(2 * SIZE_BYTES)}, f"size is {SIZE_BYTES} bytes"),
        ({"size": SizeRange(0, SIZE_BYTES - MIB)}, f"size is {SIZE_BYTES} bytes"),
    ],
)
def test_create_of_the_same_name_with_other_parameters_names_the_difference(
    kit: Kit, changes: dict[str, object], named: str
) -> None:
    first = kit.create("v")
    before = tree(kit.store.root)
    with pytest.raises(AlreadyExists) as raised:
        kit.create("v", **changes)
    assert named in str(raised.value)
    assert kit.store.volume(first.id) == first
    assert tree(kit.store.root) == before


def test_already_exists_names_all_differences_at_once(kit: Kit) -> None:
    kit.create("v")
    with pytest.raises(AlreadyExists, match=r"volumeFormat.*file system.*size"):
        kit.create("v", image_format="raw", filesystem="xfs", size=SizeRange(GIB))


def test_create_again_after_an_expansion_gives_the_larger_volume(kit: Kit) -> None:
    kit.create("v")
    kit.expand("v", 2 * SIZE_BYTES)
    assert kit.create("v").size_bytes == 2 * SIZE_BYTES


def test_settings_are_kept_in_the_record(kit: Kit) -> None:
    kubernetes = {"csi.storage.k8s.io/pvc/name": "data"}
    made = kit.create("v", mkfs_options=("-m", "5"), data_path="loop", image_format="raw", kubernetes=kubernetes)
    found = kit.store.volume(made.id)
    assert (found.mkfs_options, found.data_path, found.kubernetes) == (("-m", "5"), "loop", kubernetes)
    assert kit.create("v", mkfs_options=("-m", "5"), data_path="loop", image_format="raw") == made


def at_once(count: int, work: Callable[[], object]) -> list[object]:
    """Run `work` in threads that begin together; gives what each returned or raised."""
    barrier, results = threading.Barrier(count), []

    def one() -> None:
        barrier.wait(10)
        try:
            results.append(work())
        except DriverError as error:
            results.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == count
    return results


@pytest.mark.parametrize("source", ["blank", "snapshot", "volume"])
def test_sixteen_creates_of_one_name_make_one_volume(kit: Kit, source: str) -> None:
    kit.create("origin")
    kit.write("origin", 1)
    kit.snapshot("s", of="origin")
    kit.write("origin", 2)
    sources = {"blank": None, "snapshot": kit.from_snapshot("s"), "volume": kit.from_volume("origin")}
    before = set(kit.store.layer_ids())
    results = at_once(16, lambda: kit.create("v", source=sources[source], size=SizeRange(SIZE_BYTES)))
    assert {type(result) for result in results} <= {records.VolumeRecord, Busy}
    assert {result.uid for result in results if isinstance(result, records.VolumeRecord)} == {
        kit.store.volume(kit.volume_id("v")).uid
    }
    frozen = {"blank": 1, "snapshot": 1, "volume": 2}  # the clone of a written volume also gives that a new head
    assert len(set(kit.store.layer_ids()) - before) == frozen[source]
    assert kit.holds("v", {"blank": 0, "snapshot": 1, "volume": 2}[source])
    assert kit.check() == []


# --- clones ----------------------------------------------------------------------------------------------------


def test_clone_shows_its_source_at_that_moment_and_both_go_on_alone(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.create("c", source=kit.from_volume("v"))
    kit.write("v", 2)
    kit.write("c", 3, block=1)
    assert kit.holds("v", 2, 0)
    assert kit.holds("c", 1, 3)
    assert kit.check() == []
    kit.consistency()


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_larger_clone_reads_as_zeros_beyond_its_source(kit: Kit, image_format: str) -> None:
    kit.create("v", size=SizeRange(MIB), image_format=image_format)
    kit.write("v", 1, block=15)
    clone = kit.create("c", size=SizeRange(3 * MIB), source=kit.from_volume("v"), image_format=image_format)
    assert clone.size_bytes == 3 * MIB
    assert kit.holds("c", *[0] * 15, 1, *[0] * 32)
    assert kit.chain("c")[0].format == "qcow2"
    assert kit.check() == []


def test_clone_without_a_size_has_the_size_of_the_source(kit: Kit) -> None:
    kit.create("v", size=SizeRange(7 * MIB))
    assert kit.create("c", source=kit.from_volume("v")).size_bytes == 7 * MIB


@pytest.mark.parametrize("kind", ["volume", "snapshot"])
def test_clone_smaller_than_its_source_is_out_of_range(kit: Kit, kind: str) -> None:
    kit.create("v")
    kit.snapshot("s", of="v")
    before = tree(kit.store.root)
    source = kit.from_volume("v") if kind == "volume" else kit.from_snapshot("s")
    with pytest.raises(OutOfRange):
        kit.create("c", source=source, size=SizeRange(SIZE_BYTES - MIB))
    assert tree(kit.store.root) == before


def test_clone_of_an_attached_volume_is_refused_and_leaves_nothing(kit: Kit) -> None:
    kit.create("v")
    kit.attach("v")
    before = tree(kit.store.root)
    with pytest.raises(Refused, match="node-1"):
        kit.create("c", source=kit.from_volume("v"))
    assert tree(kit.store.root) == before


@pytest.mark.parametrize("kind", ["volume", "snapshot"])
def test_clone_of_what_does_not_exist_is_not_found(kit: Kit, kind: str) -> None:
    before = tree(kit.store.root)
    with pytest.raises(NotFound):
        kit.create("c", source=kit.from_volume("v") if kind == "volume" else kit.from_snapshot("s"))
    assert tree(kit.store.root) == before


@pytest.mark.parametrize("state", [VolumeState.CREATING, VolumeState.DELETING])
def test_clone_of_an_unfinished_volume_is_not_made(kit: Kit, state: VolumeState) -> None:
    volume = kit.create("v")
    kit.store.swap(volume, replace(volume, state=state))
    before = tree(kit.store.root)
    with pytest.raises({VolumeState.CREATING: Unavailable, VolumeState.DELETING: NotFound}[state]):
        kit.create("c", source=kit.from_volume("v"))
    assert tree(kit.store.root) == before


def test_clones_of_an_unwritten_clone_do_not_lengthen_the_chain(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.create("c0", source=kit.from_volume("v"))
    for number in range(5):
        kit.create(f"c{number + 1}", source=kit.from_volume(f"c{number}"))
    assert {len(kit.chain(f"c{number}")) for number in range(6)} == {2}
    assert len(kit.chain("v")) == 2
    assert kit.holds("c5", 1)


def test_clone_at_the_hard_depth_is_exhausted_and_leaves_nothing(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_quobyte.engine.layers.HARD_DEPTH", 3)
    kit.create("v")
    for pattern in (1, 2):
        kit.write("v", pattern)
        kit.snapshot(f"s{pattern}", of="v")
    kit.write("v", 3)
    assert len(kit.chain("v")) == 3
    before = tree(kit.store.root)
    with pytest.raises(Exhausted, match="3 layers"):
        kit.create("c", source=kit.from_volume("v"))
    with pytest.raises(Exhausted, match="3 layers"):
        kit.snapshot("s3", of="v")
    assert tree(kit.store.root) == before
    assert kit.holds("v", 3)
    kit.create("restored", source=kit.from_snapshot("s2"))


def test_chain_that_was_shortened_is_counted_anew_at_the_hard_depth(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noted of the depth is what it was once."""
    monkeypatch.setattr("csi_quobyte.engine.layers.HARD_DEPTH", 3)
    kit.create("v")
    for pattern in (1, 2):
        kit.write("v", pattern)
        kit.snapshot(f"s{pattern}", of="v")
    kit.write("v", 3)
    kit.delete_snapshot("s1")
    kit.sweep_until_quiet()
    kit.merge_all()
    assert len(kit.chain("v")) == 2
    assert kit.chain("v")[0].depth == 3
    kit.snapshot("s3", of="v")
    assert [layer.depth for layer in kit.chain("v")][:2] == [3, 3]
    assert kit.holds("v", 3)
    kit.write("v", 4)
    with pytest.raises(Exhausted):
        kit.snapshot("s4", of="v")


def test_hard_depth_is_what_the_format_page_says() -> None:
    assert chain_module.HARD_DEPTH == 32


def test_clone_inherits_what_is_known_of_the_contents(kit: Kit) -> None:
    volume = kit.create("v")
    kit.store.put_content(volume, FORMATTED)
    clone = kit.create("c", source=kit.from_volume("v"))
    assert kit.store.content(clone) == FORMATTED
    blank = kit.create("b")
    assert kit.store.content(blank) is None


# --- names used again ------------------------------------------------------------------------------------------


def test_name_used_again_does_not_touch_the_clones_of_the_former_volume(kit: Kit) -> None:
    former = kit.create("v")
    kit.store.put_content(former, FORMATTED)
    kit.write("v", 1)
    kit.create("c", source=kit.from_volume("v"))
    kit.write("v", 2)
    kit.snapshot("s", of="v")
    kit.delete("v")
    again = kit.create("v")
    assert (again.id, again.uid != former.uid, again.head != former.head) == (former.id, True, True)
    assert kit.store.content(again) is None
    assert kit.holds("v", 0)
    kit.write("v", 9)
    kit.sweep_until_quiet()
    assert kit.holds("c", 1)
    assert kit.snapshot_holds("s", 2)
    assert kit.holds("v", 9)
    kit.delete("v")
    kit.sweep_until_quiet()
    assert kit.holds("c", 1)
    assert kit.check() == []


# --- delete ----------------------------------------------------------------------------------------------------


def test_delete_again_and_of_what_never_was_succeeds(kit: Kit) -> None:
    new = tree(kit.store.root)
    kit.create("v")
    kit.delete("v")
    kit.delete("v")
    kit.delete("never")
    kit.sweep_until_quiet()
    assert tree(kit.store.root) == new


def test_delete_of_an_attached_volume_is_refused(kit: Kit) -> None:
    volume = kit.create("v")
    kit.attach("v")
    before = tree(kit.store.root)
    with pytest.raises(Refused, match="node-1"):
        kit.delete("v")
    assert tree(kit.store.root) == before
    kit.detach("v")
    kit.delete("v")
    assert kit.store.find_volume(volume.id) is None


def test_delete_tells_the_collector_which_layer_is_free(kit: Kit) -> None:
    volume = kit.create("v")
    kit.delete("v")
    assert kit.released == [volume.head]


@pytest.mark.parametrize("order", ["source first", "clone first", "clone's snapshot first"])
def test_deletes_in_any_order_keep_what_the_others_need(kit: Kit, order: str) -> None:
    new = tree(kit.store.root)
    kit.create("v")
    kit.write("v", 1)
    kit.create("c", source=kit.from_volume("v"))
    kit.write("c", 2, block=1)
    kit.snapshot("s", of="c")
    kit.create("r", source=kit.from_snapshot("s"))
    deletes: dict[str, list[Callable[[], None]]] = {
        "source first": [lambda: kit.delete("v"), lambda: kit.delete("c"), lambda: kit.delete_snapshot("s")],
        "clone first": [lambda: kit.delete("c"), lambda: kit.delete("v"), lambda: kit.delete_snapshot("s")],
        "clone's snapshot first": [lambda: kit.delete_snapshot("s"), lambda: kit.delete("c"), lambda: kit.delete("v")],
    }
    for delete in deletes[order]:
        delete()
        kit.sweep_until_quiet()
        assert kit.holds("r", 1, 2)
        assert kit.check() == []
    kit.delete("r")
    kit.sweep_until_quiet()
    assert tree(kit.store.root) == new


# --- attach and detach -----------------------------------------------------------------------------------------


def test_attach_again_gives_the_same_attachment(kit: Kit) -> None:
    kit.create("v")
    first = kit.attach("v")
    assert kit.attach("v") == first
    assert (first.node, first.generation, first.opened) == ("node-1", 1, tuple(one.id for one in kit.chain("v")))


def test_each_attachment_has_a_generation_of_its_own(kit: Kit) -> None:
    kit.create("v")
    kit.add_node("node-2")
    generations = []
    for node in ("node-1", "node-2", "node-1"):
        generations.append(kit.attach("v", node=node).generation)
        kit.detach("v", node=node)
    assert generations == [1, 2, 3]


def test_attach_to_a_second_node_is_refused_by_name(kit: Kit) -> None:
    kit.create("v")
    kit.add_node("node-2")
    first = kit.attach("v")
    with pytest.raises(Refused, match="node-1"):
        kit.attach("v", node="node-2")
    assert kit.store.volume(kit.volume_id("v")).attachments == (first,)


@pytest.mark.parametrize("changes", [{"readonly": True}, {"access_mode": "SINGLE_NODE_SINGLE_WRITER"}])
def test_attach_to_the_same_node_in_another_way_already_exists(kit: Kit, changes: dict[str, Any]) -> None:
    kit.create("v")
    kit.attach("v")
    with pytest.raises(AlreadyExists):
        kit.attach("v", **changes)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"access_type": "block", "filesystem": ""}, Refused),
        ({"filesystem": "xfs"}, Refused),
        ({"node": "unknown"}, NotFound),
    ],
)
def test_attach_in_a_way_that_cannot_work_changes_nothing(
    kit: Kit, changes: dict[str, str], kind: type[DriverError]
) -> None:
    volume = kit.create("v")
    with pytest.raises(kind):
        kit.attach("v", **changes)
    assert kit.store.volume(volume.id) == volume


def test_attach_of_what_does_not_exist_is_not_found(kit: Kit) -> None:
    with pytest.raises(NotFound):
        kit.attach("v")


def test_detach_of_another_node_changes_nothing(kit: Kit) -> None:
    kit.create("v")
    kit.attach("v")
    before = kit.store.volume(kit.volume_id("v"))
    kit.detach("v", node="node-2")
    assert kit.store.volume(before.id) == before
    kit.detach("v", node="")
    assert kit.store.volume(before.id).attachments == ()
    kit.detach("v")
    kit.detach("never")


# --- expand ----------------------------------------------------------------------------------------------------


def test_expand_sets_the_record_and_leaves_the_image_to_the_node(kit: Kit) -> None:
    volume = kit.create("v")
    assert kit.expand("v", SIZE_BYTES + 1).size_bytes == SIZE_BYTES + MIB
    assert images.virtual_size_bytes(kit.store, kit.store.layer(volume.head)) == SIZE_BYTES
    assert kit.check() == []


def test_expand_to_what_it_has_changes_nothing(kit: Kit) -> None:
    volume = kit.create("v")
    assert kit.expand("v", SIZE_BYTES) == volume
    assert kit.expand("v", MIB) == volume
    assert kit.expand("v", 0, limit_bytes=GIB) == volume


def test_expand_above_its_limit_is_out_of_range(kit: Kit) -> None:
    volume = kit.create("v")
    with pytest.raises(OutOfRange):
        kit.expand("v", MIB, limit_bytes=2 * MIB)
    assert kit.store.volume(volume.id) == volume


def test_expand_of_an_attached_volume_keeps_the_attachment(kit: Kit) -> None:
    kit.create("v")
    attached = kit.attach("v")
    assert kit.expand("v", 2 * SIZE_BYTES).attachments == (attached,)


def test_expand_of_what_does_not_exist_is_not_found(kit: Kit) -> None:
    with pytest.raises(NotFound):
        kit.expand("v", GIB)


def test_clone_of_an_expanded_volume_has_its_new_size(kit: Kit) -> None:
    kit.create("v")
    kit.write("v", 1)
    kit.expand("v", 2 * SIZE_BYTES)
    assert kit.create("c", source=kit.from_volume("v")).size_bytes == 2 * SIZE_BYTES
    assert kit.holds("c", 1)
    kit.consistency()
    assert kit.check() == []


# --- lists -----------------------------------------------------------------------------------------------------


def test_list_is_complete_in_pages_of_any_size(kit: Kit) -> None:
    made = sorted(kit.create(f"v{number}").id for number in range(7))
    for at_most in (1, 3, 7, 100):
        listed: list[str] = []
        while page := volumes.list_page(kit.store, after=listed[-1] if listed else "", at_most=at_most):
            assert len(page) <= at_most
            listed += [volume.id for volume in page]
        assert listed == made


def test_pages_stay_right_while_volumes_come_and_go(kit: Kit) -> None:
    throughout = {kit.create(f"stays-{number}").id for number in range(8)}
    for number in range(6):
        kit.create(f"goes-{number}")
    listed: list[str] = []
    changes = 0
    while page := volumes.list_page(kit.store, after=listed[-1] if listed else "", at_most=3):
        assert len(page) <= 3
        listed += [volume.id for volume in page]
        if changes < 6:
            kit.delete(f"goes-{changes}")  # one that was listed, or one that would come
            kit.create(f"comes-{changes}")
            changes += 1
    assert changes >= 3
    assert len(listed) == len(set(listed))
    assert throughout <= set(listed)


def test_list_leaves_out_what_is_not_ready_and_what_cannot_be_read(kit: Kit) -> None:
    good = kit.create("good")
    unfinished = kit.create("unfinished")
    kit.store.swap(unfinished, replace(unfinished, state=VolumeState.CREATING))
    torn = kit.create("torn")
    Path(kit.store.root, "volumes", torn.id.rpartition("-")[2][:2], f"{torn.id}.json").write_bytes(b"{")
    assert volumes.list_page(kit.store, after="", at_most=10) == [good]


RETRIES: dict[str, Callable[[Kit], object]] = {
    "create": lambda kit: kit.create("v"),
    "snapshot": lambda kit: kit.snapshot("s", of="v"),
    "expand": lambda kit: kit.expand("v", 2 * SIZE_BYTES),
    "attach": lambda kit: kit.attach("v"),
    "detach": lambda kit: kit.detach("v"),
}


@pytest.mark.parametrize("name", RETRIES)
def test_retry_of_what_is_done_makes_it_durable(kit: Kit, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The first call may have died after its last rename and before the fsync of that directory."""
    kit.create("v")
    if name == "detach":
        kit.attach("v")
    first = RETRIES[name](kit)
    synced: list[str] = []
    plain = Steps.sync

    def sync(steps: Steps, directory: str) -> None:
        synced.append(directory)
        plain(steps, directory)

    monkeypatch.setattr(Steps, "sync", sync)
    before = tree(kit.store.root)
    assert RETRIES[name](kit) == first
    assert tree(kit.store.root) == before
    record_id = kit.snapshot_id("s") if name == "snapshot" else kit.volume_id("v")
    folder = "snapshots" if name == "snapshot" else "volumes"
    assert f"{kit.store.root}/{folder}/{records.shard_of(record_id)}" in synced
