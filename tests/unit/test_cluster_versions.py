"""The test cluster runs the sidecars in the versions that the chart installs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = ROOT / "tests" / "cluster" / "modules"
MODULE_OF = {
    "provisioner": ("provisioner", "github.com/kubernetes-csi/external-provisioner/v6"),
    "attacher": ("kubernetes", "github.com/kubernetes-csi/external-attacher/v4"),
    "resizer": ("kubernetes", "github.com/kubernetes-csi/external-resizer/v2"),
    "snapshotter": ("kubernetes", "github.com/kubernetes-csi/external-snapshotter/v8"),
}


@pytest.mark.parametrize("sidecar", MODULE_OF)
def test_chart_and_cluster_have_the_same_sidecar(sidecar: str) -> None:
    directory, module = MODULE_OF[sidecar]
    wanted = re.search(rf"^\s*(?:require )?{module} (v\S+)", (MODULES / directory / "go.mod").read_text(), re.MULTILINE)
    values = (ROOT / "charts" / "csi-quobyte" / "values.yaml").read_text()
    found = re.search(rf"^  {sidecar}:\n(?:    .*\n)*?      tag: (\S+)", values, re.MULTILINE)
    assert wanted is not None
    assert found is not None
    assert found[1] == wanted[1]
