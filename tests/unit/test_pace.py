"""The pace of background work: how long it rests, by whether calls are served."""

import time

import pytest

from csi_quobyte.pool.pace import Pace


def worked(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.parametrize(("is_serving", "least", "most"), [(False, 0.2, 0.3), (True, 5.0, 6.0)])
def test_rests_longer_than_it_works_while_calls_are_served(is_serving: bool, least: float, most: float) -> None:
    rests: list[float] = []
    begun = time.monotonic()
    pace = Pace(lambda: is_serving, sleep=rests.append)
    worked(0.01)
    before = time.monotonic() - begun
    pace()
    after = time.monotonic() - begun
    assert len(rests) == 1
    assert before * least <= rests[0] <= after * most


def test_does_not_rest_for_long_after_a_step_that_hung() -> None:
    rests: list[float] = []
    pace = Pace(lambda: True, sleep=rests.append)
    worked(0.3)
    pace()
    assert rests == [1.0]


def test_does_not_rest_after_each_small_piece() -> None:
    rests: list[float] = []
    pace = Pace(sleep=rests.append)
    begun, pieces = time.monotonic(), 0
    while len(rests) < 3:
        pace()
        pieces += 1
        assert time.monotonic() - begun < 10
    assert pieces > 30
