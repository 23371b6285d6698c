"""Fixtures for tests on a real pool: a plain directory made a pool, opened without demands on its mount."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import scratch
from controller_kit import OWNER, Kit

from csi_quobyte.pool import layout, presence, records, versions
from csi_quobyte.pool import store as store_module
from csi_quobyte.pool.records import PoolSettings
from csi_quobyte.pool.sizes import MIB
from csi_quobyte.pool.store import Store


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Close with how many processes were killed, and after how many of the tests that do so something was wrong."""
    crashes = sys.modules.get("test_crash_steps")
    if crashes and crashes.Runner.total:
        bad = len(terminalreporter.stats.get("failed", [])) + len(terminalreporter.stats.get("error", []))
        terminalreporter.write_line(f"{crashes.Runner.total} kills, {bad} bad")


@pytest.fixture
def pool() -> Iterator[Path]:
    """The root of a new pool."""
    with tempfile.TemporaryDirectory(prefix="csi-quobyte-test-", dir=scratch.directory()) as name:
        root = Path(name, "pool")
        root.mkdir()
        layout.initialise(str(root), owner=OWNER, modes=records.Modes())
        yield root


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
    monkeypatch.setattr(versions, "_CLAIM_PATIENCE_S", 0.01)


@pytest.fixture
def started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes have gone since whoever worked on the pool elsewhere, as before a host was started anew, has died."""
    monkeypatch.setattr(presence, "UNTOUCHED_S", -1.0)
    monkeypatch.setattr(store_module, "_JOB_S", -1.0)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Kit]:
    """A controller on a pool of 24 MiB that is a file system of its own, thinly provisioned without end."""
    image, root = tmp_path / "pool.img", tmp_path / "small"
    root.mkdir()
    with image.open("wb") as file:
        file.truncate(24 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-N", "4096", str(image)], check=True, timeout=30)
    subprocess.run(["mount", "-o", "loop", str(image), str(root)], check=True, timeout=30)
    opened: list[Store] = []
    try:
        layout.initialise(str(root), owner=OWNER, modes=records.Modes())
        opened.append(Store(str(root)))
        settings = PoolSettings(reservedPercentage=0, maxOverSubscription=1e9)
        opened[0].format = replace(opened[0].format, settings=settings)
        kit = Kit(opened[0])
        kit.add_node()
        yield kit
    finally:
        for store in opened:
            store.close()
        subprocess.run(["umount", str(root)], check=True, timeout=30)
