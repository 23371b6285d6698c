"""What can be read of a record whose end is lost. Pure.

A record is written as one indented JSON object with its fields in a fixed order, so that what is left of one that was
cut off (or whose end reads as zeros) is a list of whole fields and one that is not. Nothing is believed of a text that
is damaged in any other way: then every byte of it may be wrong.
"""

import json
import re
from dataclasses import MISSING, fields
from typing import TypeVar

from csi_quobyte.errors import Corrupt
from csi_quobyte.pool import records
from csi_quobyte.pool.records import ImageRecord, LayerRecord, SnapshotRecord, VolumeRecord

S = TypeVar("S", bound=VolumeRecord | SnapshotRecord | ImageRecord | LayerRecord)

# What may be lost: the tags that `ls` shows, what says the same as the file's name, and the version, which is new
# with every write.
_MAY_BE_LOST = frozenset({"kubernetes", "kind", "generation", "nonce"})
# A field of the record itself has one space before its name, everything in it has more.
_FIELD = re.compile(rb'^ "', re.MULTILINE)


def salvage(kind: type[S], data: bytes) -> S | None:
    """Give the record that a cut-off text was, with empty tags and without a version; None when a field is lost."""
    text = data.rstrip(b"\0")
    starts = [found.start() for found in _FIELD.finditer(text)]
    if not text.startswith(b"{\n") or not starts:
        return None
    whole = text[: starts[-1]].rstrip().removesuffix(b",") + b"}"
    try:
        found = json.loads(whole)
    except ValueError:  # also bytes that are no UTF-8
        return None
    wanted = {field.name for field in fields(kind)} - _MAY_BE_LOST
    if not wanted <= found.keys():
        return None
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(kind)
        if field.name in _MAY_BE_LOST
    }
    try:
        return records.decode(kind, json.dumps({**defaults, **found}).encode(), where="what is left of a record")
    except Corrupt:
        return None
