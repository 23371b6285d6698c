"""One cluster for all tests, a namespace for each, and after each nothing left: neither in the cluster nor below it."""

import re
import time
from collections.abc import Iterator

import pytest

from tests.cluster.api import RUN, Cluster, wait_for
from tests.cluster.below import explain, left_behind
from tests.cluster.kit import Space, end_space, make_space

LEFT_DEADLINE_S = 60.0  # the collector frees layers after the calls that deleted what needed them


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The cluster that `make cluster-test` has started."""
    assert (RUN / "admin.kubeconfig").exists(), "no cluster is up: use `make cluster-test`, or `make cluster-up` first"
    return Cluster()


@pytest.fixture
def space(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Space]:
    """A namespace; at the end it goes with all that is in it, and nothing may be left of it anywhere."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower()).strip("-")[:60].strip("-")
    made = make_space(cluster, name)
    request.node.stash[SPACE] = made
    yield made
    end_space(made)
    left: list[str] = []

    def nothing_left() -> bool:
        left[:] = left_behind(cluster)
        return not left

    try:
        wait_for("nothing left behind", nothing_left, deadline_s=LEFT_DEADLINE_S)
    except TimeoutError:
        pytest.fail("left behind:\n" + "\n".join(left))


SPACE = pytest.StashKey[Space]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add to a failure the events and logs that explain it, while they are still there."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed and SPACE in item.stash:
        space = item.stash[SPACE]
        since_s = int(time.monotonic() - space.started) + 5
        report.sections.append(("events and logs", explain(space.cluster, space.name, since_s=since_s)))
