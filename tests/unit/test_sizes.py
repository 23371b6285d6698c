"""Size rules: what a capacity range allows, with and without a source and a file system's minimum."""

import pytest

from csi_quobyte.errors import OutOfRange
from csi_quobyte.pool.sizes import GIB, MAXIMUM_SIZE_BYTES, MIB, SizeRange, round_up


@pytest.mark.parametrize(("given", "rounded"), [(0, 0), (1, MIB), (MIB, MIB), (MIB + 1, 2 * MIB)])
def test_round_up_gives_whole_mebibytes(given: int, rounded: int) -> None:
    assert round_up(given) == rounded


@pytest.mark.parametrize(
    ("required", "limit"),
    [(-1, 0), (0, -1), (2 * MIB, MIB), (MAXIMUM_SIZE_BYTES + 1, 0)],
    ids=["required negative", "limit negative", "limit below required", "above 64 TiB"],
)
def test_range_that_no_volume_can_have_is_out_of_range(required: int, limit: int) -> None:
    with pytest.raises(OutOfRange):
        SizeRange(required, limit)


def test_range_up_to_the_maximum_is_given() -> None:
    assert SizeRange(MAXIMUM_SIZE_BYTES).choose() == MAXIMUM_SIZE_BYTES


@pytest.mark.parametrize(
    ("asked", "source", "minimum", "chosen"),
    [
        (SizeRange(), 0, MIB, GIB),
        (SizeRange(5), 0, MIB, MIB),
        (SizeRange(3 * MIB + 1), 0, MIB, 4 * MIB),
        (SizeRange(0, 10 * MIB + 5), 0, MIB, 10 * MIB),
        (SizeRange(0, 2 * GIB), 0, MIB, GIB),
        (SizeRange(0, 400 * MIB), 0, 300 * MIB, 400 * MIB),
        (SizeRange(), 7 * MIB, MIB, 7 * MIB),
        (SizeRange(9 * MIB), 7 * MIB, MIB, 9 * MIB),
        (SizeRange(7 * MIB, 7 * MIB), 7 * MIB, MIB, 7 * MIB),
        (SizeRange(0, 8 * MIB), 7 * MIB, MIB, 7 * MIB),
    ],
)
def test_choose_gives_the_least_size_that_satisfies_all(
    asked: SizeRange, source: int, minimum: int, chosen: int
) -> None:
    assert asked.choose(source_bytes=source, minimum_bytes=minimum) == chosen


@pytest.mark.parametrize(
    ("asked", "source", "minimum"),
    [
        (SizeRange(6 * MIB), 7 * MIB, MIB),
        (SizeRange(0, 6 * MIB), 7 * MIB, MIB),
        (SizeRange(MIB), 0, 300 * MIB),
        (SizeRange(0, 299 * MIB), 0, 300 * MIB),
        (SizeRange(MIB + 1, 2 * MIB - 1), 0, MIB),
        (SizeRange(0, 5), 0, MIB),
    ],
    ids=["below source", "limit below source", "below minimum", "limit below minimum", "no MiB inside", "limit of 5"],
)
def test_choose_without_a_possible_size_is_out_of_range(asked: SizeRange, source: int, minimum: int) -> None:
    with pytest.raises(OutOfRange):
        asked.choose(source_bytes=source, minimum_bytes=minimum)


@pytest.mark.parametrize(
    ("asked", "size", "accepted"),
    [
        (SizeRange(), MIB, True),
        (SizeRange(MIB + 1), 2 * MIB, True),
        (SizeRange(MIB + 1), MIB, False),
        (SizeRange(MIB), 5 * MIB, True),
        (SizeRange(MIB, 4 * MIB), 5 * MIB, False),
        (SizeRange(0, 5 * MIB), 5 * MIB, True),
    ],
)
def test_accepts_an_existing_size_inside_the_range(asked: SizeRange, size: int, accepted: bool) -> None:
    assert asked.accepts(size) is accepted


@pytest.mark.parametrize("required", [0, 1, MIB, 5 * MIB + 3, GIB])
def test_what_was_chosen_is_accepted_when_asked_again(required: int) -> None:
    asked = SizeRange(required, 2 * GIB)
    assert asked.accepts(asked.choose())
