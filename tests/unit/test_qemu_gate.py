"""Which versions of QEMU are let through, and how distributions write them."""

import pytest

from csi_quobyte.host.qemu import DataPath, Version, gate, parse_version


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ("qemu-img version 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)\nCopyright (c) 2003-2025 …\n", (10, 0, 13)),
        ("qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\n", (7, 2, 22)),
        ("qemu-storage-daemon version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\n", (10, 0, 2)),
        ("qemu-storage-daemon version 11.1.0\n", (11, 1, 0)),
        ("qemu-img version 11.0.90 (v11.1.0-rc0)\n", (11, 0, 90)),
        ("qemu-img version 8.2.2 (qemu-kvm-8.2.2-1.el9)\n", (8, 2, 2)),
        ("qemu-img version 9.1.0-dirty\n", (9, 1, 0)),
        ("warning: something\nqemu-img version 10.0.13\n", (10, 0, 13)),
    ],
)
def test_parse_version_of_a_distribution(printed: str, version: Version) -> None:
    assert parse_version(printed) == version


@pytest.mark.parametrize("printed", ["", "qemu-img 10.0.13", "qemu-img version 10.0", "qemu-img version 10.0.13.4 (x)"])
def test_parse_version_without_a_version_is_none(printed: str) -> None:
    assert parse_version(printed) is None


@pytest.mark.parametrize(
    ("version", "paths"),
    [
        ((7, 2, 22), {"loop"}),
        ((9, 2, 4), {"loop"}),
        ((10, 0, 0), {"loop", "nbd"}),
        ((10, 0, 2), {"loop", "nbd"}),
        ((10, 0, 12), {"loop", "nbd"}),
        ((10, 0, 13), {"loop", "nbd", "fuse"}),
        ((10, 0, 14), {"loop", "nbd", "fuse"}),
        ((10, 0, 90), {"loop"}),  # a release candidate of 10.1
        ((10, 1, 0), {"loop"}),
        ((10, 1, 99), {"loop"}),
        ((10, 2, 3), {"loop"}),
        ((11, 0, 0), {"loop"}),
        ((11, 0, 90), {"loop"}),  # a release candidate of 11.1
        ((11, 1, 0), {"loop", "nbd", "fuse"}),
        ((11, 2, 0), {"loop", "nbd", "fuse"}),
        ((12, 0, 0), {"loop", "nbd", "fuse"}),
    ],
)
def test_gate_lets_only_measured_branches_through(version: Version, paths: set[DataPath]) -> None:
    every: list[DataPath] = ["loop", "nbd", "fuse"]
    assert {path for path in every if gate(version, path) is None} == paths


def test_gate_says_what_was_found_why_and_what_to_do() -> None:
    reason = gate((10, 0, 2), "fuse")
    assert reason is not None
    assert all(part in reason for part in ("10.0.2", "wrong data", "10.0.13", "--allow-untested-qemu"))
