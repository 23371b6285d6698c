"""Which file systems there are, and which options of mkfs and mount a user may give: lists of what is allowed."""

import re
import shlex
from collections.abc import Mapping, Sequence

from csi_quobyte.errors import InvalidArgument

SUPPORTED = ("ext4", "xfs")

# How the patterns below are written for people, in messages and in docs/parameters.md; alternatives of plain words
# need no entry.
_PATTERN_WORDS = {
    "[0-9]+": "N",
    "[0-9]+[kKmM]?": "N[k|m]",
    "[0-9]+[kKmMgG]?": "N[k|m|g]",
    "[0-9]+[kKmMgGtT]?": "N[k|m|g|t]",
    "[0-9]+:[0-9]+": "N:N",
    "[0-9]{1,3}": "0…999",
    "[0-9]{1,4}": "0…9999",
    r"[0-9]{1,2}(\.[0-9]+)?": "0…99[.N]",
    "[01]": "0|1",
    "[012]": "0|1|2",
    "[2-8]": "2…8",
    "(usr|grp|prj)quota(:(usr|grp|prj)quota)*": "usrquota|grpquota|prjquota[:…]",
}

# A table of allowed options: name → pattern of what may follow it, "=" included.
Options = Mapping[str, str]

_NUMBER = "=[0-9]+"
_SIZE = "=[0-9]+[kKmMgG]?"
_SWITCH = "=[01]"


def _plain(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "")


def _either_way(features: str) -> dict[str, str]:
    return {name: "" for feature in features.split() for name in (feature, f"^{feature}")}


# has_journal cannot be switched off (a crashed volume must come back by replay), nothing may name another device or
# file, and nothing may discard or force.
MKFS: Mapping[str, Mapping[str, str | Options]] = {
    "ext4": {
        "-b": "1024|2048|4096",
        "-C": "[0-9]+[kKmM]?",
        "-E": {
            "lazy_itable_init": f"({_SWITCH})?",
            "lazy_journal_init": f"({_SWITCH})?",
            "num_backup_sb": "=[012]",
            "packed_meta_blocks": f"({_SWITCH})?",
            "quotatype": "=(usr|grp|prj)quota(:(usr|grp|prj)quota)*",
            "resize": "=[0-9]+[kKmMgGtT]?",
            "root_owner": "=[0-9]+:[0-9]+",
            "stride": _NUMBER,
            "stripe-width": _NUMBER,
            "stripe_width": _NUMBER,
        },
        "-G": "[0-9]+",
        "-I": "128|256|512|1024",
        "-i": "[0-9]+",
        "-m": r"[0-9]{1,2}(\.[0-9]+)?",
        "-N": "[0-9]+",
        "-O": _either_way(
            "64bit bigalloc dir_index dir_nlink ea_inode ext_attr extra_isize filetype flex_bg huge_file inline_data "
            "large_dir large_file meta_bg metadata_csum metadata_csum_seed orphan_file project quota resize_inode "
            "sparse_super sparse_super2 uninit_bg"
        )
        | _plain("extent has_journal"),
        "-T": _plain("big huge largefile largefile4 news small"),
    },
    "xfs": {
        "-b": {"size": "=(1024|2048|4096|1k|2k|4k)"},
        "-d": {
            "agcount": _NUMBER,
            "agsize": _SIZE,
            "noalign": "",
            "su": _SIZE,
            "sunit": _NUMBER,
            "sw": _NUMBER,
            "swidth": _NUMBER,
        },
        "-i": {"maxpct": _NUMBER, "nrext64": _SWITCH, "perblock": _NUMBER, "size": _NUMBER, "sparse": _SWITCH},
        "-l": {"lazy-count": _SWITCH, "size": _SIZE, "su": _SIZE, "sunit": _NUMBER, "version": "=2"},
        "-m": {
            "bigtime": _SWITCH,
            "crc": "=1",
            "finobt": _SWITCH,
            "inobtcount": _SWITCH,
            "reflink": _SWITCH,
            "rmapbt": _SWITCH,
        },
        "-n": {"ftype": _SWITCH, "size": _SIZE, "version": "=(2|ci)"},
        "-s": {"size": "=(512|1024|2048|4096|4k)"},
    },
}

_MOUNT_ANY = _plain(
    "async dirsync sync atime noatime relatime norelatime strictatime nostrictatime diratime nodiratime lazytime "
    "nolazytime dev nodev exec noexec suid nosuid discard nodiscard ro rw"
)
# Left out on purpose. errors=panic: one volume must not stop the machine. barrier=0, nobarrier: acknowledged
# writes would be lost. noload, norecovery: mounts without replay. nouuid: the driver adds it. Quotas inside a
# volume, acl, user_xattr: not every kernel takes these options any more.
MOUNT: Mapping[str, Options] = {
    "ext4": _MOUNT_ANY
    | _plain(
        "auto_da_alloc noauto_da_alloc delalloc nodelalloc dioread_lock dioread_nolock journal_checksum noinit_itable "
        "noquota"
    )
    | {
        "commit": "=[0-9]{1,3}",
        "data": "=(ordered|journal|writeback)",
        "errors": "=(remount-ro|continue)",
        "init_itable": "(=[0-9]{1,4})?",
        "max_batch_time": _NUMBER,
        "min_batch_time": _NUMBER,
        "stripe": _NUMBER,
    },
    "xfs": _MOUNT_ANY
    | _plain("inode32 inode64 largeio nolargeio swalloc wsync noalign noquota")
    | {
        "allocsize": _SIZE,
        "logbsize": "=(0|16k|32k|64k|128k|256k|16384|32768|65536|131072|262144)",
        "logbufs": "=[2-8]",
    },
}


def check_mkfs_options(fstype: str, text: str) -> tuple[str, ...]:
    """Split and check a StorageClass's `mkfsOptions`; return arguments for `filesystem.make`, flag and value apart.

    Raises:
        InvalidArgument: unknown filesystem, unbalanced quotes, or anything that is not on the list of allowed flags,
            which the message contains.
    """
    check_supported(fstype)
    allowed = MKFS[fstype]
    try:
        words = iter(shlex.split(text))
    except ValueError as error:
        raise InvalidArgument(f"mkfsOptions {text!r}: {error}") from error
    arguments: list[str] = []
    for word in words:
        flag = word[:2]
        value = word[2:] or next(words, "") if flag in allowed else ""
        if flag not in allowed or not _value_matches(allowed[flag], value):
            refused = f"{flag} {value}".strip() if flag in allowed else word
            known = _flags_text(allowed)
            raise InvalidArgument(f"mkfsOptions: {refused!r} is not allowed for {fstype}; allowed: {known}")
        arguments += [flag, value]
    return tuple(arguments)


def check_mount_options(fstype: str, options: Sequence[str]) -> tuple[str, ...]:
    """Check mount options, one each, against the list for this filesystem, and return them.

    Raises:
        InvalidArgument: unknown filesystem, an option that is not on the list, which the message contains, or ro with
            rw.
    """
    check_supported(fstype)
    allowed = MOUNT[fstype]
    for option in options:
        if not _matches(allowed, option):
            raise InvalidArgument(f"mount option {option!r} is not allowed for {fstype}; allowed: {_text_of(allowed)}")
    if "ro" in options and "rw" in options:
        raise InvalidArgument("mount options 'ro' and 'rw' contradict each other")
    return tuple(options)


def default_mount_options(fstype: str) -> tuple[str, ...]:
    """Return the options that every mount of this filesystem needs: a clone of an xfs has the UUID of its source."""
    return ("nouuid",) if fstype == "xfs" else ()


def check_supported(fstype: str) -> None:
    """Check the name of a file system.

    Raises:
        InvalidArgument: it is none of `SUPPORTED`.
    """
    if fstype not in SUPPORTED:
        raise InvalidArgument(f"filesystem {fstype!r} is not supported; supported: {', '.join(SUPPORTED)}")


def _value_matches(allowed: str | Options, value: str) -> bool:
    if isinstance(allowed, str):
        return re.fullmatch(allowed, value) is not None
    return all(_matches(allowed, item) for item in value.split(","))


def _matches(allowed: Options, item: str) -> bool:
    name, equals, value = item.partition("=")
    return name in allowed and re.fullmatch(allowed[name], equals + value) is not None


def _text_of(allowed: Options) -> str:
    return ", ".join(f"{name}{words_of(pattern)}" for name, pattern in sorted(allowed.items()))


def _flags_text(allowed: Mapping[str, str | Options]) -> str:
    values = {flag: words_of(value) if isinstance(value, str) else _text_of(value) for flag, value in allowed.items()}
    return "; ".join(f"{flag} {value}" for flag, value in values.items())


def words_of(pattern: str) -> str:
    """Write a pattern of an allow-list for people.

    Raises:
        ValueError: it has no words yet.
    """
    if found := re.fullmatch(r"\((=.*)\)\?", pattern):
        return f"[{words_of(found[1])}]"
    equals, bare = ("=", pattern[1:]) if pattern.startswith("=") else ("", pattern)
    if bare in _PATTERN_WORDS:
        return equals + _PATTERN_WORDS[bare]
    if found := re.fullmatch(r"(\()?([\w-]*(?:\|[\w-]+)*)(?(1)\))", bare):
        return equals + str(found[2])
    raise ValueError(f"the pattern {pattern!r} has no words; add them")
