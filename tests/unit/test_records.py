"""Records: JSON form, versions, ids and markers. Axes: kind of record × what is wrong with the bytes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_quobyte.errors import Corrupt
from csi_quobyte.pool import records
from csi_quobyte.pool.records import (
    Attachment,
    Content,
    LayerRecord,
    LayerState,
    Modes,
    NodeRecord,
    Owner,
    PoolFormat,
    PoolSettings,
    SnapshotRecord,
    SnapshotState,
    Source,
    VolumeRecord,
    VolumeState,
)

LAYER_ID = "0123456789abcdef01234567"

VOLUME = VolumeRecord(
    id=records.volume_id("7d3f09ab", "pvc-1"),
    uid="c2f7790e",
    name="pvc-1 ü /..",
    state=VolumeState.READY,
    size_bytes=1 << 46,
    head=LAYER_ID,
    image_format="qcow2",
    preallocation="metadata",
    data_path="fuse",
    access_type="mount",
    filesystem="xfs",
    mkfs_options=("-m", "crc=1"),
    created_at=records.now(),
    unfinished=False,
    source=Source(kind="snapshot", id=records.snapshot_id("7d3f09ab", "s")),
    inherited_content=Content(state="formatted", filesystem="xfs"),
    attach_generation=3,
    attachments=(
        Attachment(node="n", generation=3, readonly=True, access_mode="SINGLE_NODE_WRITER", opened=(LAYER_ID,)),
    ),
    kubernetes={"csi.storage.k8s.io/pvc/name": "data"},
)
SNAPSHOT = SnapshotRecord(
    id=records.snapshot_id("7d3f09ab", "s"),
    uid="5be0c1d2",
    name="s",
    state=SnapshotState.CREATING,
    source_volume=VOLUME.id,
    layer=LAYER_ID,
    next=None,
    size_bytes=1 << 30,
    content=None,
    created_at=records.now(),
)
LAYER = LayerRecord(
    id=LAYER_ID, file=f"{LAYER_ID}.raw", format="raw", size_bytes=1 << 20, parent=None, state=LayerState.HEAD
)
NODE = NodeRecord(id="node/1", driver_version="0.1", started_at=records.now())
FORMAT = PoolFormat(
    format=1,
    uuid="7d3f09ab-0000-4000-8000-000000000000",
    required_features=(),
    optional_features=("x",),
    owner=Owner(uid=1, gid=2),
    modes=Modes(),
    settings=PoolSettings(),
)
ALL = [VOLUME, SNAPSHOT, LAYER, NODE, FORMAT, Content(state="raw")]


@pytest.mark.parametrize("value", ALL, ids=lambda value: type(value).__name__)
def test_decode_gives_what_was_encoded(value: object) -> None:
    assert records.decode(type(value), records.encode(value), where="x") == value


@pytest.mark.parametrize("value", ALL, ids=lambda value: type(value).__name__)
def test_unknown_fields_are_ignored(value: object) -> None:
    data = records.encode(value).replace(b"{", b'{"of_a_later_version": [1],', 1)
    assert records.decode(type(value), data, where="x") == value


@pytest.mark.parametrize("value", ALL, ids=lambda value: type(value).__name__)
def test_every_torn_form_is_corrupt_and_names_the_file(value: object) -> None:
    whole = records.encode(value).rstrip()
    for length in range(len(whole)):
        with pytest.raises(Corrupt, match=r"pool/some\.json"):
            records.decode(type(value), whole[:length], where="pool/some.json")


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 512,
        b"[]",
        b"null",
        b'"ready"',
        records.encode(SNAPSHOT),
        records.encode(LAYER),
        records.encode(replace(VOLUME, size_bytes=1))
        .replace(b'"size_bytes":1', b'"size_bytes":"much"')
        .replace(b'"size_bytes": 1', b'"size_bytes": "much"'),
        records.encode(VOLUME).replace(b"qcow2", b"vmdk"),
        records.encode(VOLUME).replace(b'"ready"', b'"merging"'),
    ],
    ids=["zeros", "list", "null", "text", "a snapshot", "a layer", "size of text", "unknown format", "unknown state"],
)
def test_other_shapes_than_a_volume_are_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt, match="where it is"):
        records.decode(VolumeRecord, data, where="where it is")


def test_next_version_counts_and_draws_a_new_nonce() -> None:
    first = records.next_version(VOLUME)
    second = records.next_version(first, of=first)
    assert (first.generation, second.generation) == (1, 2)
    assert first.nonce != second.nonce
    assert replace(second, generation=0, nonce="") == VOLUME


def test_same_version_compares_generation_and_nonce() -> None:
    first = records.next_version(VOLUME)
    assert records.same_version(first, replace(first, size_bytes=1))
    assert not records.same_version(first, replace(first, generation=2))
    assert not records.same_version(first, replace(first, nonce="0"))


# --- ids -------------------------------------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=128))
def test_id_of_any_name_is_parsed_and_names_its_pool_and_kind(name: str) -> None:
    volume, snapshot = records.volume_id("7d3f09ab", name), records.snapshot_id("7d3f09ab", name)
    for text, kind in ((volume, "vol"), (snapshot, "snap")):
        parsed = records.parse_id(text)
        assert parsed is not None
        assert (parsed.pool, parsed.kind) == ("7d3f09ab", kind)


@given(st.text(max_size=60))
def test_no_text_makes_the_parser_fail(text: str) -> None:
    assert records.parse_id(text) is None or text.isascii()
    assert records.parse_marker(text) is None or text[0] in "cvs"


@pytest.mark.parametrize(
    "text", ["", "x", VOLUME.id + "0", VOLUME.id[:-1], VOLUME.id.upper(), f"../{VOLUME.id}", "a\n"]
)
def test_parse_id_refuses_what_cannot_be_ours(text: str) -> None:
    assert records.parse_id(text) is None


def test_parse_id_refuses_a_trailing_newline() -> None:
    assert records.parse_id(VOLUME.id + "\n") is None
    assert not records.is_layer_id(LAYER_ID + "\n")


def test_fresh_ids_differ_and_have_their_form() -> None:
    ids = {records.new_layer_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(records.is_layer_id(one) for one in ids)
    assert len({records.new_uid() for _ in range(100)}) == 100


# --- markers ---------------------------------------------------------------------------------------------------


def test_markers_are_parsed_back() -> None:
    assert records.parse_marker(records.child_marker(LAYER_ID)) == ("c", LAYER_ID, "")
    assert records.parse_marker(records.volume_marker(VOLUME)) == ("v", VOLUME.id, VOLUME.uid)
    assert records.parse_marker(records.snapshot_marker(SNAPSHOT)) == ("s", SNAPSHOT.id, SNAPSHOT.uid)


@pytest.mark.parametrize(
    "text",
    ["", "c-", "c-xyz", f"v-{SNAPSHOT.id}-c2f7790e", f"s-{VOLUME.id}-c2f7790e", f"v-{VOLUME.id}", f"k-{LAYER_ID}"],
)
def test_foreign_markers_are_none_of_ours(text: str) -> None:
    assert records.parse_marker(text) is None
