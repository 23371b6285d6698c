"""Random histories by dice: which step comes next, and with what; a seed gives the same history again.

Owns: declaring the steps of a machine (`step`), and drawing histories of them (`run_history`). No history is made
shorter when it fails: what is killed in one call is another thing when a call before it is left out. All its steps are
told instead.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Draw = Callable[[random.Random], Any]


@dataclass(frozen=True)
class Step:
    """One kind of step: how often it is drawn, when it can be, and what its arguments are drawn from."""

    weight: int
    when: Callable[[Any], object]
    draws: dict[str, Draw]
    work: Callable[..., None]


def step(
    weight: int, *, when: Callable[[Any], object] = lambda _: True, **draws: Draw
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare a method as a step; `weight` is its share among those that are possible at that moment."""

    def declare(work: Callable[..., None]) -> Callable[..., None]:
        work.step = Step(weight, when, draws, work)  # type: ignore[attr-defined]
        return work

    return declare


def one_of(*values: Any) -> Draw:
    """Draw one of these values; those that are draws themselves are drawn again."""

    def draw(dice: random.Random) -> Any:
        value = dice.choice(values)
        return value(dice) if callable(value) else value

    return draw


def between(low: int, high: int) -> Draw:
    """Draw a whole number from `low` to `high`."""
    return lambda dice: dice.randint(low, high)


def fraction(high: float) -> Draw:
    """Draw a number from 0 to `high`."""
    return lambda dice: dice.uniform(0.0, high)


def run_history(machine: Any, seed: int, length: int, end: Callable[[], None]) -> None:
    """Make a history of so many steps, and look at its `end`; an error says what they were."""
    dice = random.Random(seed)
    steps = [found.step for found in vars_of(type(machine)) if hasattr(found, "step")]
    told = []
    try:
        for _ in range(length):
            possible = [one for one in steps if one.when(machine)]
            (chosen,) = dice.choices(possible, [one.weight for one in possible])
            arguments = {name: draw(dice) for name, draw in chosen.draws.items()}
            told.append(f"{chosen.work.__name__}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")
            chosen.work(machine, **arguments)
        told.append("the end")
        end()
    except BaseException as error:
        error.add_note("\n".join([f"history of seed {seed}:", *told]))
        raise


def vars_of(machine: type) -> list[Any]:
    """Give what a class and those above it define, in the order of the text."""
    return [value for each in reversed(machine.__mro__) for value in vars(each).values()]
