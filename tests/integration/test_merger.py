"""The collector and the merger as threads: what makes them merge, when, and what they step back for."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from controller_kit import Kit, tools

from csi_quobyte.config import PoolSpec
from csi_quobyte.engine import collector as collector_module
from csi_quobyte.engine import lease as lease_module
from csi_quobyte.engine import merger as merger_module
from csi_quobyte.engine import merging
from csi_quobyte.engine.collector import Collector
from csi_quobyte.engine.lease import Lease
from csi_quobyte.host import jobs
from csi_quobyte.pool.pools import Pools
from csi_quobyte.pool.store import Store
from lab.machine import wait_for

DEADLINE_S = 30.0


@pytest.fixture
def start(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Collector]]:
    """Start the collector of another process on the pool."""
    monkeypatch.setattr(merger_module, "_QUIET_S", 0.1)
    started: list[Collector] = []

    def begin(**named: object) -> Collector:
        pools = Pools([PoolSpec("main", kit.store.root)], require_mount="any", timeout_s=DEADLINE_S)
        made = Collector(pools.all[0], tools(), **named)  # type: ignore[arg-type]
        made.start()
        started.append(made)
        return made

    yield begin
    for one in started:
        assert one.stop(DEADLINE_S)


def two_layers(kit: Kit) -> str:
    """A volume over a layer that its snapshot has left; gives the layer's id."""
    kit.create("v")
    kit.write("v", 1)
    kit.snapshot("s", of="v")
    kit.write("v", 2, block=1)
    layer_id = kit.chain("v")[1].id
    kit.delete_snapshot("s")
    return layer_id


def depth(kit: Kit) -> int:
    return len(kit.chain("v"))


def test_everything_is_looked_at_in_time_while_there_is_always_something_else_to_do(
    kit: Kit, start: Callable[..., Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[float] = []
    sweep = collector_module._sweep

    def counted(*given: object) -> object:
        passes.append(time.monotonic())
        return sweep(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(collector_module, "_sweep", counted)
    monkeypatch.setattr(collector_module, "PASS_EVERY_S", 0.5)
    collector = start()
    deadline = time.monotonic() + DEADLINE_S
    while len(passes) < 4:
        collector.release(f"{len(passes):024x}")
        time.sleep(0.1)
        assert time.monotonic() < deadline, "it only looks at what it is told of"


def test_what_was_left_before_the_start_is_merged(kit: Kit, start: Callable[..., Collector]) -> None:
    two_layers(kit)
    start()
    wait_for("the merge", lambda: depth(kit) == 1, timeout_s=DEADLINE_S)
    assert kit.holds("v", 1, 2)
    wait_for("the lease to be free", lambda: Lease().hold(kit.store), timeout_s=DEADLINE_S)


def test_released_layer_is_merged_at_once(kit: Kit, start: Callable[..., Collector]) -> None:
    running = start()
    layer_id = two_layers(kit)
    running.release(layer_id)
    wait_for("the merge", lambda: depth(kit) == 1, timeout_s=DEADLINE_S)
    assert kit.holds("v", 1, 2)


def test_closed_layer_is_merged_after_the_time_of_grace(
    kit: Kit, start: Callable[..., Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "GRACE_S", 2.0)
    monkeypatch.setattr(merger_module, "_GRACE_AND_A_BIT_S", 2.1)
    running = start()
    layer_id = two_layers(kit)
    opened = kit.attach("v").opened
    detached_at = time.monotonic()
    kit.detach("v")
    running.closed(opened)
    running.release(layer_id)
    wait_for("the merge", lambda: depth(kit) == 1, timeout_s=DEADLINE_S)
    assert time.monotonic() - detached_at >= 2.0
    assert kit.holds("v", 1, 2)


def test_layer_that_is_closed_twice_is_merged_after_the_later_time_of_grace(
    kit: Kit, start: Callable[..., Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "GRACE_S", 3.0)
    monkeypatch.setattr(merger_module, "_GRACE_AND_A_BIT_S", 3.1)
    running = start()
    layer_id = two_layers(kit)
    for pause_s in (1.5, 0.0):
        opened = kit.attach("v").opened
        kit.detach("v")
        running.closed(opened)
        running.release(layer_id)
        time.sleep(pause_s)
    wait_for("the merge", lambda: depth(kit) == 1, timeout_s=DEADLINE_S)
    assert kit.holds("v", 1, 2)


def test_nothing_is_begun_when_merging_is_off_but_what_was_begun_is_ended(
    kit: Kit, start: Callable[..., Collector]
) -> None:
    layer_id = two_layers(kit)
    (plan,) = kit.plans()
    answers = iter([True])  # the lease is lost after the note
    with pytest.raises(jobs.Stopped):
        kit.merge(plan, is_held=lambda: next(answers, False))
    assert kit.store.layer(layer_id).merge
    running = start(merges=False)
    wait_for("the end of the merge", lambda: kit.store.layer(layer_id).merge is None, timeout_s=DEADLINE_S)
    running.release(layer_id)
    time.sleep(1)
    assert depth(kit) == 2


def test_drops_do_not_wait_for_a_merge_and_the_end_does_not_either(
    kit: Kit, start: Callable[..., Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a merge is held back, a deleted volume's layer goes; then the process is told to end."""
    reached, held = threading.Event(), threading.Event()
    plain = jobs.stream_up

    def slow(*arguments: object, watch: jobs.Watch, **named: object) -> None:
        def hold(progress: jobs.Progress) -> jobs.Answer:
            reached.set()
            while not held.wait(0.05):
                if watch(progress) == "stop":
                    return "stop"
            return watch(progress)

        plain(*arguments, watch=hold, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(merging.jobs, "stream_up", slow)
    two_layers(kit)
    gone = kit.create("gone").head
    running = start()
    assert reached.wait(DEADLINE_S)
    kit.delete("gone")
    running.release(gone)
    wait_for("the drop", lambda: kit.store.find_layer(gone) is None, timeout_s=DEADLINE_S)
    held.set()
    assert running.stop(DEADLINE_S)
    assert depth(kit) == 2
    assert all(layer.merge is None for layer in kit.chain("v"))
    assert kit.holds("v", 1, 2)


def test_merge_that_stepped_back_comes_again(
    kit: Kit, start: Callable[..., Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merger_module, "AGAIN_AFTER_S", 0.5)
    plain = jobs.stream_up
    refused: list[int] = []

    def once_refused(*arguments: object, **named: object) -> None:
        if not refused:
            refused.append(1)
            raise jobs.Stopped("somebody wants the volume")
        plain(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(merging.jobs, "stream_up", once_refused)
    two_layers(kit)
    start()
    wait_for("the merge", lambda: depth(kit) == 1, timeout_s=DEADLINE_S)
    assert refused == [1]


def test_another_holder_of_the_lease_merges_alone(
    kit: Kit, start: Callable[..., Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector_module, "PASS_EVERY_S", 0.5)
    monkeypatch.setattr(merger_module, "NOT_OURS_AFTER_S", 0.5)
    holder, elsewhere = Lease(), Store(kit.store.root)
    assert holder.hold(elsewhere)
    two_layers(kit)
    start()
    time.sleep(2)
    assert depth(kit) == 2
    holder.release(elsewhere)
    wait_for("the merge", lambda: depth(kit) == 1, timeout_s=DEADLINE_S)


def test_merge_of_a_host_that_is_gone_is_ended_as_soon_as_its_lease_is_over(
    kit: Kit, start: Callable[..., Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Volumes above cannot be staged until then: it must not take another look at the whole pool."""
    monkeypatch.setattr(lease_module, "LEASE_S", 2.0)
    monkeypatch.setattr(merger_module, "AGAIN_AFTER_S", 0.5)
    layer_id = two_layers(kit)
    (plan,) = kit.plans()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Store, "place", "another boot id")
        gone = Store(kit.store.root)
        assert Lease().hold(gone)
        answers = iter([True])
        with pytest.raises(jobs.Stopped):
            merging.merge(gone, tools(), plan, is_held=lambda: next(answers, False))
    assert kit.store.layer(layer_id).merge
    start(merges=False)
    wait_for("the end of the merge", lambda: kit.store.layer(layer_id).merge is None, timeout_s=DEADLINE_S)
    assert kit.holds("v", 1, 2)


def test_layer_that_was_released_while_a_host_that_is_gone_had_the_lease_is_merged_when_that_is_over(
    kit: Kit, start: Callable[..., Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LEASE_S", 2.0)
    monkeypatch.setattr(merger_module, "NOT_OURS_AFTER_S", 0.5)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Store, "place", "another boot id")
        assert Lease().hold(Store(kit.store.root))
    running = start()
    time.sleep(1)  # the look at everything is over
    running.release(two_layers(kit))
    wait_for("the merge", lambda: depth(kit) == 1, timeout_s=DEADLINE_S)
    assert kit.holds("v", 1, 2)


def test_layer_that_loses_its_child_while_it_is_merged_is_dropped_soon(
    kit: Kit, start: Callable[..., Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drop comes upon a layer that is being merged; a look at everything would come minutes later."""
    monkeypatch.setattr(merging, "SETTLE_S", 2.0)
    running = start()
    layer_id = two_layers(kit)
    running.release(layer_id)
    wait_for("the note", lambda: kit.store.layer(layer_id).merge is not None, timeout_s=DEADLINE_S)
    head = kit.chain("v")[0].id
    kit.delete("v")
    running.release(head)
    wait_for("the drop", lambda: list(kit.store.layer_ids()) == [], timeout_s=DEADLINE_S)
