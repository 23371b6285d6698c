"""The story of "Run it by hand" in README.md: the calls of Kubernetes by deploy/lab/by_hand.py."""

import sys
from pathlib import Path

import pytest
from running import machine_of

from lab.machine import run

pytestmark = pytest.mark.root

BY_HAND = Path(__file__).resolve().parents[2] / "deploy/lab/by_hand.py"


def test_volume_is_made_used_restored_and_deleted_by_hand() -> None:
    with machine_of() as machine:
        machine.start()

        def by_hand(*arguments: str, check: bool = True) -> str:
            sockets = ("--controller", machine.base / "c.sock", "--node", machine.base / "n.sock")
            done = run(sys.executable, BY_HAND, *sockets, "--directory", machine.base / "hand", *arguments, check=check)
            return (done.stdout if check else done.stderr).strip()

        xfs = ("-p", "csi.storage.k8s.io/fstype=xfs")
        volume = by_hand("create", "demo", *xfs)
        Path(by_hand("use", volume), "file").write_text("kept")
        assert by_hand("snapshot", "demo", volume, check=False).startswith("Error: FAILED_PRECONDITION: ")
        by_hand("expand", volume, "2")
        by_hand("release", volume)
        snapshot = by_hand("snapshot", "demo", volume)
        clone = by_hand("create", "clone", "--gib", "3", "--snapshot", snapshot, "-p", "cloneMode=cache", *xfs)
        assert Path(by_hand("use", clone), "file").read_text() == "kept"
        by_hand("release", clone)
        by_hand("delete", snapshot, volume, clone)
        assert by_hand("create", "demo", "-p", "wrong", check=False).endswith("'wrong' is not NAME=VALUE")
        assert machine.check() == []
        assert machine.leftovers() == []
