"""Stage, unstage, expand and publish, with every call on the pool's files failing: ENOSPC, EDQUOT, EIO, ENOTCONN.

Axes: the calls and volumes of test_crash_node × way to fail × call × what comes after. Wanted of each: an error that
the kubelet retries; then the call is made again, or the node is given up, and all that test_crash_node asks for holds.
"""

import os
import random

import pytest
from faulty_os import MODES, FaultyOs
from test_crash_node import (
    AFTERWARDS,
    CASES,
    Place,
    begin,
    call_again,
    make_the_call,
    place,  # noqa: F401 - a fixture
)
from test_faults_each_step import SEED, SPREAD, attempt, check_class

pytestmark = pytest.mark.root

# How many calls fail in all ways together: `make faults` sets 0, all of them; otherwise some, by the seed.
CALLS = int(os.environ.get("CSI_QUOBYTE_FAULTS_CALLS", "1"))


TOUCHING = [name for name, case in CASES.items() if case.call != "unpublish"]
"""An unpublish never touches the pool."""


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", TOUCHING)
def test_node_call_on_a_pool_that_fails_at_any_call(name: str, place: Place, impatient: None) -> None:  # noqa: F811
    whole = FaultyOs(str(place.root), MODES["ENOTCONN"], at=0)
    story, a = begin(place, CASES[name]), place.host_a()
    assert attempt(lambda: make_the_call(a, story), whole) is None
    a.kit.store.close()
    call_again(story)
    counts = {way: sum(mode.counts(kind, spare=spare) for kind, spare in whole.seen) for way, mode in MODES.items()}
    todo = [(way, at) for way, count in counts.items() for at in range(1, count + 1)]
    random.Random(f"{name} {SEED}").shuffle(todo)
    for number, (way, at) in enumerate(todo[: CALLS or None]):
        story, a = begin(place, CASES[name]), place.host_a()
        faults = FaultyOs(str(place.root), MODES[way], at)
        error = attempt(lambda a=a, story=story: make_the_call(a, story), faults)  # type: ignore[misc]
        a.kit.store.close()
        afterwards = sorted(AFTERWARDS)[(number + SEED) % 2]
        try:
            assert faults.failed or counts[way] - at < SPREAD, "nothing failed"
            check_class(error, MODES[way])
            AFTERWARDS[afterwards](story)
        except BaseException as problem:
            problem.add_note(f"{name}, {way} at call {at} ({faults.failed}) gave {error!r}, {afterwards}, seed {SEED}")
            raise
    print(f"{name}: {len(todo[: CALLS or None])} of {counts}, seed {SEED}")
