"""Fixtures for tests on a real pool: a plain directory made a pool, opened without demands on its mount."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from controller_kit import OWNER, Kit

from csi_quobyte.pool import records
from csi_quobyte.pool import store as store_module
from csi_quobyte.pool.store import Store


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Close with how many processes were killed, and after how many of the tests that do so something was wrong."""
    crashes = sys.modules.get("test_crash_steps")
    if crashes and crashes.Runner.total:
        bad = len(terminalreporter.stats.get("failed", [])) + len(terminalreporter.stats.get("error", []))
        terminalreporter.write_line(f"{crashes.Runner.total} kills, {bad} bad")


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """The root of a new pool."""
    root = tmp_path / "pool"
    root.mkdir()
    store_module.initialise(str(root), owner=OWNER, modes=records.Modes())
    return root


@pytest.fixture
def store(pool: Path) -> Iterator[Store]:
    """The open pool."""
    opened = Store(str(pool))
    yield opened
    opened.close()


@pytest.fixture
def kit(store: Store) -> Kit:
    """A controller on the pool, with one node known."""
    made = Kit(store)
    made.add_node()
    return made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim counts as a dead process's after 10 ms instead of two seconds."""
    monkeypatch.setattr(store_module, "_CLAIM_PATIENCE_S", 0.01)
