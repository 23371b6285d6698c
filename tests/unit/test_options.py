"""What options mean that are more than one word or number."""

import pytest

from csi_quobyte.cli.options import parse_size_bytes
from csi_quobyte.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("512", 512), ("1Ki", 1 << 10), ("100Mi", 100 << 20), ("2Gi", 2 << 30), ("3Ti", 3 << 40)],
)
def test_size_is_read_as_kubernetes_writes_it(text: str, size_bytes: int) -> None:
    assert parse_size_bytes("--merge-bandwidth", text) == size_bytes


@pytest.mark.parametrize("text", ["", "Mi", "1.5Gi", "10M", "10MB", "1iM", "ten", "-Mi"])
def test_other_texts_are_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--merge-bandwidth"):
        parse_size_bytes("--merge-bandwidth", text)
