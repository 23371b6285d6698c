"""What the pages for operators must name: every metric, every kind of finding, every way to repair one."""

from pathlib import Path
from typing import get_args

import prometheus_client

from csi_quobyte import telemetry
from csi_quobyte.engine import check, repair

DOCS = Path(__file__).parents[2] / "docs"


def metrics() -> set[str]:
    """The names as Prometheus shows them."""
    found = set()
    for one in vars(telemetry).values():
        if isinstance(one, prometheus_client.metrics.MetricWrapperBase):
            (family,) = one.describe()
            found.add(f"{family.name}_total" if family.type == "counter" else family.name)
    return found


def test_every_metric_is_documented() -> None:
    page = (DOCS / "kubernetes.md").read_text()
    assert len(metrics()) > 10
    assert {name for name in metrics() if f"`{name}`" not in page} == set()


def test_every_finding_and_every_repair_is_documented() -> None:
    page = (DOCS / "format.md").read_text()
    assert {kind for kind in get_args(check.Kind) if f"| `{kind}` |" not in page} == set()
    assert {step for step in get_args(repair.Step) if f"`{step}`" not in page} == set()
