"""An operation killed with SIGKILL before a step, then what comes after it killed, too: the undo, a retry, a sweep.

Axes: operation × its step × what is killed then × its step: a sample of the pairs, by the seed; more with `make crash`.
What a retry finds after one death is tested step by step in test_crash_steps; here it finds an undo that is half done.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from controller_kit import Kit, Tree
from crash_runner import DELETES, THEN, retry
from test_crash_steps import (
    EVERY,
    SEED,
    UNTOUCHED,
    Runner,
    _named,
    check_all_deleted,
    check_contents,
    check_pool,
    fresh,  # noqa: F401 - a fixture
    runner,  # noqa: F401 - a fixture
    template,  # noqa: F401 - a fixture
)

PAIRS = 25 if EVERY == 1 else 1  # of each operation and each second
_STEPS = 32  # of the first; some have fewer, and are whole then
_SECOND_STEPS = 24


@pytest.mark.timeout(600)
@pytest.mark.parametrize("second", ["delete", "retry", "sweep"])
@pytest.mark.parametrize("operation", DELETES)
def test_what_comes_after_a_death_dies_too(
    operation: str,
    second: str,
    runner: Runner,  # noqa: F811
    template: tuple[Path, Tree],  # noqa: F811
    fresh: Callable[[], Kit],  # noqa: F811
    impatient: None,
) -> None:
    dice = random.Random(f"{SEED} {operation} {second}")
    then = {"delete": f"delete after {operation}", "retry": operation, "sweep": "sweep"}[second]
    for _ in range(PAIRS):
        first_step, second_step = dice.randrange(1, _STEPS), dice.randrange(1, _SECOND_STEPS)
        kit = fresh()
        root = Path(kit.store.root)
        runner.run(root, operation, first_step)
        runner.run(root, THEN + then, second_step)
        with _named(f"{operation}, before step {first_step} killed, then {second}", second_step):
            retry(lambda kit=kit: DELETES[operation](kit))  # type: ignore[misc]
            check_pool(kit, inside=False)
            left = dict(UNTOUCHED)
            if operation == "expand":
                del left["v"]
            check_contents(kit, left)
            check_all_deleted(kit, template[1])
