"""Is a recorded history of concurrent calls one that a single caller could have made, in some order that respects time?

Owns: the search (Wing and Gong 1993, with the sets of configurations of Lowe 2017), and the model of what the calls
on one volume name, its snapshots and its clone may answer. A history is linearizable when each call can be given one
moment between its start and its end, so that the model, taking the calls in the order of their moments, gives their
answers.

A call that was answered ABORTED may have happened in that time, or not at all. One that was answered UNAVAILABLE or
not at all may also happen later: its end is open.

One call has two moments by design (`without_early_looks`): a clone of a snapshot refers to the layer first, from when
on the snapshot can be deleted, and is there last.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple

State = Hashable
Apply = Callable[[Any, "Call"], "State | None"]
"""Gives the state after a call, None when the call cannot have its answer in this state."""


@dataclass(frozen=True)
class Call:
    """One call as it was seen. `code` is the name of a gRPC code, `answer` what the model compares."""

    method: str
    began: float
    ended: float
    code: str = "OK"
    argument: Any = None
    answer: Any = None

    @property
    def is_sure(self) -> bool:
        """Whether it is known what it has done."""
        return self.code not in {"ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}

    @property
    def is_look(self) -> bool:
        """Whether it surely has changed nothing, whenever it had its moment."""
        return self.is_sure and (self.code != "OK" or self.method == "look")

    @property
    def open_until(self) -> float:
        """When it has ended for certain."""
        return inf if self.code in {"UNAVAILABLE", "DEADLINE_EXCEEDED"} else self.ended


class Config(NamedTuple):
    """One way in which it may have been up to now: the state, and which unfinished calls have had their moment."""

    state: State
    taken: frozenset[int]


def first_impossible(calls: Sequence[Call], start: State, apply: Apply) -> Call | None:
    """Give the call at whose end no order is left that explains everything, None when the history is linearizable."""
    events = sorted(
        [(call.began, 0, number) for number, call in enumerate(calls)]
        + [(call.open_until, 1, number) for number, call in enumerate(calls) if call.open_until < inf]
    )
    configs = {Config(start, frozenset())}
    running: set[int] = set()
    for _, is_end, number in events:
        if not is_end:
            running.add(number)
            continue
        configs = _ended(configs, number, running, calls, apply)
        if not configs:
            return calls[number]
        running.discard(number)
    return None


def without_early_looks(calls: Sequence[Call]) -> list[Call]:
    """Leave out the looks that came too early for a clone whose snapshot was deleted while the clone was being made.

    A delete of a snapshot never waits for a clone of it. The model gives such a clone its moment before the delete;
    until the call returns, it need not be seen.
    """

    def is_early(look: Call) -> bool:
        is_missing = look.method == "look" and look.argument == ("clone",) and look.is_sure and look.answer is None
        return is_missing and any(_overlap(look, clone) for clone in overtaken)

    def is_overtaken(clone: Call) -> bool:
        return any(each.argument == clone.argument and _overlap(each, clone) for each in deletes)

    # the clone of a volume holds that volume's lock
    deletes = [call for call in calls if call.method == "delete" and call.argument != ("volume",)]
    overtaken = [call for call in calls if call.method == "clone" and is_overtaken(call)]
    return [call for call in calls if not is_early(call)]


def _overlap(one: Call, other: Call) -> bool:
    return one.began < other.open_until and other.began < one.open_until


def _ended(
    configs: set[Config], number: int, running: Iterable[int], calls: Sequence[Call], apply: Apply
) -> set[Config]:
    """Give the configurations that are left when a call has ended: those in which it has had its moment.

    Of a call that may not have happened also those in which it has not.
    """
    left: set[Config] = set()
    seen = set(configs)
    todo = list(configs)
    order = sorted(running, key=lambda each: calls[each].began)
    while todo:
        config = todo.pop()
        if number in config.taken:
            left.add(Config(config.state, config.taken - {number}))
            continue
        if not calls[number].is_sure:
            left.add(config)
        for following in _followers(config, order, calls, apply):
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return left


def _followers(config: Config, order: Sequence[int], calls: Sequence[Call], apply: Apply) -> list[Config]:
    """Give the configurations that one more call makes of this one, without those that cannot matter.

    A call that never changes anything may as well have its moment now. An unsure one that would change nothing need not
    happen. Of several open ones that ask for the same the first one is as good as the others.
    """
    found = []
    tried = set()
    for other in order:
        call = calls[other]
        if other in config.taken:
            continue
        if not call.is_sure:
            same = (call.method, call.argument, call.open_until)
            if same in tried:
                continue
            tried.add(same)
        state = apply(config.state, call)
        if state is None or (state == config.state and not call.is_sure):
            continue
        following = Config(state, config.taken | {other})
        if call.is_look:
            return [following]
        found.append(following)
    return found


# --- the model of one volume name ------------------------------------------------------------------------------


class Volume(NamedTuple):
    """A volume: its size, its attachments so far, whether it is attached, and what it was made from."""

    size_bytes: int
    generation: int = 0
    is_attached: bool = False
    source: str = ""


class Family(NamedTuple):
    """A volume, its two snapshots (their sizes), and the clone of any of the three."""

    volume: Volume | None = None
    clone: Volume | None = None
    first: int | None = None
    second: int | None = None


Object = Literal["volume", "clone", "first", "second"]
NOTHING = Family()


def family(state: Family, call: Call) -> Family | None:
    """Give what a call makes of a family; see `Apply`. Which object a call is on is the first of its arguments."""
    return _METHODS[call.method](state, call, *call.argument)


def _is(call: Call, code: str, answer: Any = None) -> bool:
    """Say whether a call was answered so, or may have been."""
    return not call.is_sure or (call.code == code and (answer is None or call.answer == answer))


def _create(state: Family, call: Call, size_bytes: int) -> Family | None:
    made = state.volume or Volume(size_bytes)
    return state._replace(volume=made) if _is(call, "OK", made.size_bytes) else None


def _clone(state: Family, call: Call, source: Object) -> Family | None:
    if state.clone:
        if state.clone.source != source:
            return state if _is(call, "ALREADY_EXISTS") else None
        return state if _is(call, "OK", state.clone.size_bytes) else None
    base = getattr(state, source)
    if base is None:
        return state if _is(call, "NOT_FOUND") else None
    if source == "volume" and base.is_attached:
        return state if _is(call, "FAILED_PRECONDITION") else None
    size_bytes = base.size_bytes if source == "volume" else base
    return state._replace(clone=Volume(size_bytes, source=source)) if _is(call, "OK", size_bytes) else None


def _snapshot(state: Family, call: Call, name: Object) -> Family | None:
    made = getattr(state, name)
    if made is None:
        if state.volume is None:
            return state if _is(call, "NOT_FOUND") else None
        if state.volume.is_attached:
            return state if _is(call, "FAILED_PRECONDITION") else None
        made = state.volume.size_bytes
    return state._replace(**{name: made}) if _is(call, "OK", made) else None


def _delete(state: Family, call: Call, name: Object) -> Family | None:
    present = getattr(state, name)
    if isinstance(present, Volume) and present.is_attached:
        return state if _is(call, "FAILED_PRECONDITION") else None
    return state._replace(**{name: None}) if _is(call, "OK") else None


def _expand(state: Family, call: Call, size_bytes: int) -> Family | None:
    if state.volume is None:
        return state if _is(call, "NOT_FOUND") else None
    grown = state.volume._replace(size_bytes=max(size_bytes, state.volume.size_bytes))
    return state._replace(volume=grown) if _is(call, "OK", grown.size_bytes) else None


def _attach(state: Family, call: Call) -> Family | None:
    present = state.volume
    if present is None:
        return state if _is(call, "NOT_FOUND") else None
    if not present.is_attached:
        present = present._replace(generation=present.generation + 1, is_attached=True)
    return state._replace(volume=present) if _is(call, "OK", present.generation) else None


def _detach(state: Family, call: Call) -> Family | None:
    if not _is(call, "OK"):
        return None
    return state._replace(volume=state.volume._replace(is_attached=False)) if state.volume else state


def _look(state: Family, call: Call, name: Object) -> Family | None:
    """A look at one object: its size and whether it is attached, None when it is not there."""
    present = getattr(state, name)
    if not call.is_sure:
        return state
    if present is None:
        return state if call.code in {"OK", "NOT_FOUND"} and call.answer is None else None
    seen = (present.size_bytes, present.is_attached) if isinstance(present, Volume) else (present, False)
    return state if call.code == "OK" and call.answer == seen else None


_METHODS: dict[str, Callable[..., Family | None]] = {
    "create": _create,
    "clone": _clone,
    "snapshot": _snapshot,
    "delete": _delete,
    "expand": _expand,
    "attach": _attach,
    "detach": _detach,
    "look": _look,
}
