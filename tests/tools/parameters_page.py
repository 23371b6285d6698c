#!/usr/bin/env python3
"""docs/parameters.md, made from the code that it describes.

Owns the words of the page. What the code decides is taken from the code: the parameters from their table, the options
from the allow-lists, and each refusal by asking for such a volume and quoting the answer.

Always holds: the page is only made while its example is accepted and all that it calls refused is refused.
"""

import argparse
import difflib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the script is started by its path, from a tree that is not installed

from csi_quobyte.config import DEFAULT_DRIVER_NAME, PoolSpec  # noqa: E402
from csi_quobyte.errors import DriverError, InvalidArgument  # noqa: E402
from csi_quobyte.host import filesystem, filesystem_options  # noqa: E402
from csi_quobyte.host.filesystem_options import words_of  # noqa: E402
from csi_quobyte.operations.volumes import DEFAULT_FILESYSTEM  # noqa: E402
from csi_quobyte.pb import csi_pb2 as csi  # noqa: E402
from csi_quobyte.pool.pools import Pools  # noqa: E402
from csi_quobyte.pool.records import Source  # noqa: E402
from csi_quobyte.pool.sizes import DEFAULT_SIZE_BYTES, GRANULARITY_BYTES, MAXIMUM_SIZE_BYTES  # noqa: E402
from csi_quobyte.rpc import convert, parameters  # noqa: E402
from csi_quobyte.rpc.parameters import FSTYPE, KUBERNETES_PREFIX, Parameter  # noqa: E402
from csi_quobyte.rpc.server import STATUS  # noqa: E402

PAGE = ROOT / "docs" / "parameters.md"

Claim = Mapping[str, str]
"""A claim and its class in one, as a user writes them: parameters of the class, and the fields in _FIELDS."""

_FIELDS = ("accessModes", "dataSource", "mountOptions", "storage", "volumeMode")
"""What is no parameter. `dataSource` stands for a source of the size that it has as its value."""

# kubernetes-csi/csi-lib-utils, accessmodes/access_modes.go, for a driver with the capability SINGLE_NODE_MULTI_WRITER
_ACCESS_MODES = {
    "ReadWriteOnce": "SINGLE_NODE_MULTI_WRITER",
    "ReadWriteOncePod": "SINGLE_NODE_SINGLE_WRITER",
    "ReadOnlyMany": "MULTI_NODE_READER_ONLY",
    "ReadWriteMany": "MULTI_NODE_MULTI_WRITER",
}
_ACCESS_MEANING = {
    "ReadWriteOnce": "One node. Several pods on it may use the volume at once.",
    "ReadWriteOncePod": "One pod.",
}

# Every parameter is in it, so that it shows how each is written.
EXAMPLE_PARAMETERS = {
    "pool": "main",
    "volumeFormat": "qcow2",
    "preallocation": "off",
    "dataPath": "auto",
    "cloneMode": "overlay",
    "sourceImage": "training-data",
    "mkfsOptions": "-m 1 -i 65536",
    "onDelete": "trash",
    "trashRetention": "7d",
    FSTYPE: "ext4",
}
EXAMPLE_SNAPSHOT_PARAMETERS = {"onDelete": "trash", "trashRetention": "24h"}
EXAMPLE_MOUNT_OPTIONS = ("noatime",)

# What the search for contradictions takes besides the values of the table.
_FURTHER_SETTINGS = (
    ("mkfsOptions", "-m 1"),
    ("mkfsOptions", "-d agcount=4"),
    ("mountOptions", "[commit=30]"),
    ("mountOptions", "[inode64]"),
    ("volumeMode", "Block"),
    ("dataSource", "1Gi"),
    ("trashRetention", "7d"),
)
_SINGLE_SETTINGS: Sequence[Claim] = (
    {"volumeformat": "raw"},
    {"volumeFormat": "vmdk"},
    {"dataPath": "nbd"},
    {FSTYPE: "btrfs"},
    {"mkfsOptions": "-O ^has_journal"},
    {"mountOptions": "[errors=panic]"},
    {"mountOptions": "[ro, rw]"},
    {"onDelete": "trash", "trashRetention": "1w"},
)
_TOO_SMALL_OR_LARGE: Sequence[Claim] = (
    {FSTYPE: "ext4", "storage": "4Mi"},
    {FSTYPE: "xfs", "storage": "100Mi"},
    {"storage": "1Gi", "dataSource": "2Gi"},
    {"storage": "65Ti"},
)

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}

# YAML 1.1, which Kubernetes reads, takes these for booleans and null.
_YAML_NO_STRINGS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


# --- asking the code -------------------------------------------------------------------------------------------


def size_of(claim: Claim, pools: tuple[str, ...] = ("main",)) -> int:
    """Give the size in bytes that a volume gets: all that CreateVolume decides before it touches a pool.

    Raises:
        DriverError: the volume is refused.
    """
    # external-provisioner takes the file system out of the parameters and puts it into the capability
    given = parameters.volume_parameters({key: claim[key] for key in claim if key not in _FIELDS and key != FSTYPE})
    source_bytes = _bytes(claim.get("dataSource", "0"))
    source = Source(kind="snapshot", id="a-snapshot") if source_bytes else None
    checked = convert.create_request(_request(claim), given, source)
    _pools(pools).named(given.pool)
    return checked.size.choose(source_bytes=source_bytes, minimum_bytes=checked.minimum_bytes)


def find_refusal(claim: Claim, pools: tuple[str, ...] = ("main",)) -> DriverError | None:
    """Give the error with which a volume is refused, None when it is not."""
    try:
        size_of(claim, pools)
    except DriverError as error:
        return error
    return None


def refusal(claim: Claim, pools: tuple[str, ...] = ("main",)) -> DriverError:
    """Give the error with which a volume is refused.

    Raises:
        ValueError: it is accepted; the page would be wrong.
    """
    error = find_refusal(claim, pools)
    if error is None:
        raise ValueError(f"the page calls this refused, and it is accepted: {dict(claim)}")
    return error


def contradictions() -> Iterator[tuple[Claim, DriverError]]:
    """Yield what is refused of all that up to three settings can say together; only the smallest combinations."""
    refused: list[Claim] = []
    from_table = ((one.name, value) for one in parameters.VOLUME_PARAMETERS for value in one.values)
    settings = [*from_table, *_FURTHER_SETTINGS]
    for count in (1, 2, 3):
        for chosen in itertools.combinations(settings, count):
            claim = dict(chosen)
            if len(claim) < count or any(known.items() <= claim.items() for known in refused):
                continue
            if error := find_refusal(claim):
                refused.append(claim)
                yield claim, error


def check_example() -> None:
    """Check that the driver takes the page's example, and that it shows every parameter of both classes.

    Raises:
        ValueError: a parameter is not in it, or one in it is unknown.
        DriverError: the driver refuses it.
    """
    if set(EXAMPLE_PARAMETERS) != {one.name for one in parameters.VOLUME_PARAMETERS}:
        raise ValueError("the example of the page has not exactly the parameters of the table")
    if set(EXAMPLE_SNAPSHOT_PARAMETERS) != {one.name for one in parameters.SNAPSHOT_PARAMETERS}:
        raise ValueError("the example of the page has not exactly the parameters of a VolumeSnapshotClass")
    parameters.volume_parameters(EXAMPLE_PARAMETERS)
    parameters.snapshot_parameters(EXAMPLE_SNAPSHOT_PARAMETERS)
    size_of(EXAMPLE_PARAMETERS | {"mountOptions": f"[{', '.join(EXAMPLE_MOUNT_OPTIONS)}]"})


def _request(claim: Claim) -> csi.CreateVolumeRequest:
    mode = _ACCESS_MODES[claim.get("accessModes", "[ReadWriteOnce]").strip("[]")]
    capability = csi.VolumeCapability(access_mode=csi.VolumeCapability.AccessMode(mode=mode))
    if claim.get("volumeMode") == "Block":
        capability.block.SetInParent()
    else:
        capability.mount.fs_type = claim.get(FSTYPE, "")
        capability.mount.mount_flags.extend(re.findall(r"[^][, ]+", claim.get("mountOptions", "")))
        capability.mount.SetInParent()
    request = csi.CreateVolumeRequest(name="page", volume_capabilities=[capability])
    request.capacity_range.required_bytes = _bytes(claim.get("storage", "0")) or _bytes(claim.get("dataSource", "0"))
    return request


@cache
def _pools(names: tuple[str, ...]) -> Pools:
    return Pools([PoolSpec(name, f"/{name}") for name in names], require_mount="any", timeout_s=1.0)


def _bytes(quantity: str) -> int:
    unit = quantity.lstrip("0123456789")
    return int(quantity.removesuffix(unit)) * _UNITS[unit]


# --- writing ---------------------------------------------------------------------------------------------------


def page() -> str:
    """Give the whole page.

    Raises:
        ValueError, DriverError: what it says is not true any more.
    """
    check_example()
    parts = (_head(), _example(), _volume(), _refused(), _filesystems(), _access(), _sizes(), _snapshot())
    return "\n\n".join(parts) + "\n"


def _head() -> str:
    return """\
<!-- Made from the code by `make docs`; do not edit. -->
# Parameters of StorageClasses and VolumeSnapshotClasses
All values are strings. Names and values are case-sensitive. A key that the driver does not know is refused, so that a \
mistyped one is not overlooked. Kubernetes does not let you change the parameters of a class: delete it and make it \
again. Volumes that exist keep what they were made with.

A volume that is refused stays a pending PersistentVolumeClaim. `kubectl describe pvc` shows the code and the sentence \
from the tables below; it writes the code as InvalidArgument, OutOfRange. Where a sentence ends with “…”, the page \
leaves out a list that is in [File systems](#file-systems)."""


def _example() -> str:
    lines, snapshot_lines = (
        "\n".join(f"  {name}: {_yaml(value)}" for name, value in one.items())
        for one in (EXAMPLE_PARAMETERS, EXAMPLE_SNAPSHOT_PARAMETERS)
    )
    return f"""\
## Example
Every parameter is in it. None of them has to be given when there is only one pool.
```yaml
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: quobyte-disk
provisioner: {DEFAULT_DRIVER_NAME}
parameters:
{lines}
mountOptions: [{", ".join(map(_yaml, EXAMPLE_MOUNT_OPTIONS))}]
reclaimPolicy: Delete
volumeBindingMode: WaitForFirstConsumer
allowVolumeExpansion: true
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotClass
metadata:
  name: quobyte-disk
driver: {DEFAULT_DRIVER_NAME}
parameters:
{snapshot_lines}
deletionPolicy: Delete
```
`provisioner` and `driver` are the chart's `driverName`. `"off"` needs its quotes: YAML reads a bare `off` as false, \
which is not a string."""


def _volume() -> str:
    reserved = parameters.RESERVED_VOLUME_PARAMETERS
    sentences = [_answer(refusal({name: "x"})) for name in reserved]
    return f"""\
## StorageClass: parameters
{_parameter_table(parameters.VOLUME_PARAMETERS)}

Other keys that begin with `{KUBERNETES_PREFIX}` are accepted. The sidecars use them for the names of the \
PersistentVolumeClaim and the PersistentVolume, which the driver keeps in the volume's record.

Reserved for later versions, and refused: {_list(reserved)}.

> {sentences[0]}"""


def _refused() -> str:
    both = ("main", "second")
    pools = [
        ["no `pool`, with the pools main and second", _answer(refusal({}, both))],
        ["`pool: third`, with the pools main and second", _answer(refusal({"pool": "third"}, both))],
    ]
    single = [[_written(claim), _answer(refusal(claim))] for claim in _SINGLE_SETTINGS]
    together = [[_written(claim), _answer(error)] for claim, error in contradictions()]
    return f"""\
## StorageClass: what is refused
Settings that contradict each other, or contradict a default. The table comes from trying all values together, up to \
three at once; of the options for mkfs and mount, one for each file system. `volumeMode` and `dataSource` are fields \
of the claim.
{_table(["Given", "Answer"], together)}

A class with another `preallocation` than `"off"` therefore cannot be used to restore a snapshot or to clone a volume, \
unless it has `cloneMode: copy`.

Examples of unknown keys and values:
{_table(["Given", "Answer"], [*single, *pools])}"""


def _filesystems() -> str:
    sections = "\n\n".join(_filesystem(name) for name in filesystem_options.SUPPORTED)
    return f"""\
## File systems
`{FSTYPE}` chooses: {_list(filesystem_options.SUPPORTED)}. Without it a volume with a source has the source's file \
system, and a blank one has {DEFAULT_FILESYSTEM}. A volume with a source cannot have another file system than the \
source holds. What a golden image holds is not known before a pod uses it: its class has to name the image's file \
system, else the pod does not start and its events say what was found.

`mkfsOptions` are used once, when a node stages the volume for the first time and nothing is on it. They are split \
into words as a shell does. What is not in the list is refused. The list leaves out what would discard, force, name \
another device, or leave ext4 without its journal.

`mountOptions` of the class are checked when the volume is made and each time it is mounted.

**Without `{FSTYPE}` both are checked against the lists of {DEFAULT_FILESYSTEM}**, whatever the source holds. Name the \
file system in a class that has `mkfsOptions` or `mountOptions`.

In the lists: `N` is a whole number, `0…9` a number from 0 to 9, `a|b` one of them. What is in `[…]` may be left out. \
Units may be capital letters.

{sections}"""


def _filesystem(name: str) -> str:
    # Private tables: the error messages, the only other place where the lists are, have the bare patterns.
    flags = "\n".join(f"- {_flag(flag, allowed)}" for flag, allowed in filesystem_options.MKFS[name].items())
    mount = filesystem_options.MOUNT[name]
    added = filesystem_options.default_mount_options(name)
    note = f" The driver itself adds {_list(added)}." if added else ""
    return f"""\
### {name}
`mkfsOptions`:
{flags}

`mountOptions`: {_list(sorted(f"{option}{words_of(pattern)}" for option, pattern in mount.items()))}.{note}"""


def _access() -> str:
    rows = []
    for name, mode in _ACCESS_MODES.items():
        error = find_refusal({"accessModes": f"[{name}]"})
        meaning = _answer(error) if error else _ACCESS_MEANING[name]
        rows.append([f"`{name}`", f"`{mode}`", "no" if error else "yes", meaning])
    others = [mode for mode in _supported_modes() if mode not in _ACCESS_MODES.values()]
    return f"""\
## Access modes and volume modes
{_table(["accessModes", "The sidecars ask for", "Supported", "Meaning, or answer"], rows)}

Other CSI clients may also ask for {_list(others)}. For read-only use in Kubernetes set `readOnly: true` where the pod \
names the claim.

`volumeMode: Filesystem` (the default) and `volumeMode: Block` work with each of the supported modes. A volume stays \
what it was made as. For `Block`, `{FSTYPE}` and `mountOptions` mean nothing."""


def _sizes() -> str:
    least = [[name, _size(filesystem.MINIMUM_SIZE_BYTES[name])] for name in filesystem_options.SUPPORTED]
    least.append(["none (`volumeMode: Block`)", _size(size_of({"volumeMode": "Block", "storage": "1"}))])
    refused = [[_written(claim), _answer(refusal(claim))] for claim in _TOO_SMALL_OR_LARGE]
    rounded = size_of({"storage": "1G"})
    return f"""\
## Sizes
Sizes are rounded up to a multiple of {_size(GRANULARITY_BYTES)}: `storage: 1G` gives {_size(rounded)}. The largest is \
{_size(MAXIMUM_SIZE_BYTES)}. A CSI client that names no size gets the source's, or \
{_size(DEFAULT_SIZE_BYTES)}; a PersistentVolumeClaim always names one. A volume is never smaller than its source, and \
never shrinks.
{_table(["File system", "Least size"], least)}

{_table(["Given", "Answer"], refused)}"""


def _snapshot() -> str:
    known = parameters.SNAPSHOT_PARAMETERS
    reserved = parameters.RESERVED_SNAPSHOT_PARAMETERS
    sentences = [_snapshot_answer(name) for name in reserved]
    return f"""\
## VolumeSnapshotClass: parameters
{_parameter_table(known)}

Keys that begin with `{KUBERNETES_PREFIX}` are accepted, \
as above. Reserved for later versions, and refused: {_list(reserved)}.

> {sentences[0]}"""


def _snapshot_answer(name: str) -> str:
    try:
        parameters.snapshot_parameters({name: "x"})
    except InvalidArgument as error:
        return _answer(error)
    raise ValueError(f"the page calls this parameter of a VolumeSnapshotClass refused, and it is accepted: {name}")


def _supported_modes() -> Iterator[str]:
    for mode in csi.VolumeCapability.AccessMode.Mode.keys():  # noqa: SIM118 - not a dict
        asked = csi.VolumeCapability(access_mode=csi.VolumeCapability.AccessMode(mode=mode))
        asked.mount.SetInParent()
        try:
            convert.capability(asked)
        except InvalidArgument:
            continue
        yield mode


# --- pieces of Markdown ----------------------------------------------------------------------------------------


def _parameter_table(known: Iterable[Parameter]) -> str:
    rows = [
        [
            f"`{one.name}`",
            _list(one.values) or "text",
            f"`{one.default}`" if one.default in one.values else one.default or "none",
            one.meaning,
        ]
        for one in known
    ]
    return _table(["Name", "Values", "Default", "Meaning"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _written(claim: Claim) -> str:
    source = "a `dataSource`" + (f" of {claim['dataSource']}" if {"dataSource", "storage"} <= claim.keys() else "")
    return ", ".join(source if key == "dataSource" else f"`{key}: {_yaml(claim[key])}`" for key in claim)


def _answer(error: DriverError) -> str:
    sentence, cut, _ = str(error).partition("; allowed: ")
    return f"{STATUS[type(error)].name}: {sentence.strip()}{cut and f'{cut}…'}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _size(size_bytes: int) -> str:
    unit = next(unit for unit in ("Ti", "Gi", "Mi", "Ki", "") if size_bytes % _UNITS[unit] == 0)
    return f"{size_bytes // _UNITS[unit]} {unit}B"


def _yaml(value: str) -> str:
    is_plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9./-]*|[0-9]+[A-Za-z]+|\[.*\]", value)
    return value if is_plain and value not in _YAML_NO_STRINGS else json.dumps(value)


def _flag(flag: str, allowed: str | Mapping[str, str]) -> str:
    """Write a flag of mkfs with what may follow it: one value, or several with commas between them."""
    if isinstance(allowed, str):
        return f"`{flag} {words_of(allowed)}`"
    if len(allowed) == 1:
        return "".join(f"`{flag} {name}{words_of(pattern)}`" for name, pattern in allowed.items())
    switches = sorted(name for name in allowed if f"^{name}" in allowed)
    others = sorted(f"{name}{words_of(allowed[name])}" for name in allowed if name.lstrip("^") not in switches)
    text = f"`{flag}` with one or more, commas between them: {_list(others)}"
    return f"{text}; and these, which `^` before the name switches off: {_list(switches)}" if switches else text


# --- the command -----------------------------------------------------------------------------------------------


def difference(present: str, made: str) -> str:
    """Give what has to change in the text that is present, as a unified diff; empty when nothing has to."""
    texts = (present.splitlines(keepends=True), made.splitlines(keepends=True))
    return "".join(difflib.unified_diff(*texts, "docs/parameters.md", "made from the code"))


def main(arguments: Sequence[str]) -> int:
    """Print the page, write it, or check the one that is there; return the exit status."""
    parser = argparse.ArgumentParser(description="Make docs/parameters.md from the code; print it by default.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="write the page to its place")
    what.add_argument("--check", action="store_true", help="change nothing; print a diff and exit with 1 if it is old")
    chosen = parser.parse_args(arguments)
    try:
        made = page()
    except (ValueError, DriverError) as error:
        print(f"docs/parameters.md cannot be made: {error}", file=sys.stderr)
        return 1
    if chosen.write:
        PAGE.write_text(made, encoding="utf-8")
    elif not chosen.check:
        print(made, end="")
    elif changes := difference(PAGE.read_text(encoding="utf-8") if PAGE.exists() else "", made):
        print(f"{changes}\ndocs/parameters.md is not what the code says; run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
