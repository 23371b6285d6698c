"""Chain algebra on records alone: order, and every shape that must not be opened."""

from collections.abc import Iterable

import pytest

from csi_quobyte.errors import Corrupt
from csi_quobyte.pool.chain import chain_of
from csi_quobyte.pool.records import LayerRecord, LayerState


def layer(name: str, parent: str | None, *, size: int = 10, state: LayerState = LayerState.FROZEN) -> LayerRecord:
    return LayerRecord(id=name, file=f"{name}.qcow2", format="qcow2", size_bytes=size, parent=parent, state=state)


def walk(head: str, layers: Iterable[LayerRecord]) -> list[str]:
    return [one.id for one in chain_of(head, {one.id: one for one in layers}.get)]


def test_chain_goes_from_head_to_base() -> None:
    assert walk("c", [layer("a", None), layer("b", "a"), layer("c", "b", state=LayerState.HEAD)]) == ["c", "b", "a"]


def test_chain_of_a_base_is_itself() -> None:
    assert walk("a", [layer("a", None, state=LayerState.HEAD)]) == ["a"]


def test_chain_with_growing_sizes_is_given() -> None:
    assert walk("b", [layer("a", None, size=10), layer("b", "a", size=11)]) == ["b", "a"]


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ([layer("b", "a")], "a"),
        ([], "b"),
        ([layer("b", "b")], "b"),
        ([layer("b", "a"), layer("a", "b")], "b"),
        ([layer("b", "a"), layer("a", None, state=LayerState.RETIRED)], "a"),
        ([layer("b", "a", size=9), layer("a", None, size=10)], "b"),
    ],
    ids=["parent missing", "head missing", "own parent", "circle", "retired", "size falls"],
)
def test_chain_that_does_not_hold_together_is_corrupt(layers: list[LayerRecord], named: str) -> None:
    with pytest.raises(Corrupt, match=f"layer {named}"):
        walk("b", layers)


def test_merge_that_is_committed_between_two_reads_is_no_damage() -> None:
    before = {one.id: one for one in (layer("a", None), layer("b", "a"), layer("c", "b"))}
    after = {one.id: one for one in (layer("a", None), layer("c", "a"))}
    reads: list[str] = []

    def find(layer_id: str) -> LayerRecord | None:
        reads.append(layer_id)
        return (before if len(reads) == 1 else after).get(layer_id)

    assert [one.id for one in chain_of("c", find)] == ["c", "a"]
    assert reads == ["c", "b", "c", "a"]
