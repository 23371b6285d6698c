"""The options that several commands share, with the environment variable of each: CSI_QUOBYTE_<FLAG>."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from csi_quobyte.config import DEFAULT_DRIVER_NAME, PoolSpec
from csi_quobyte.errors import InvalidArgument
from csi_quobyte.pool.mount import REQUIRE_MOUNT_CHOICES

F = TypeVar("F", bound=Callable[..., Any])


def option(flag: str, *, envvar: str | None = None, **settings: Any) -> Callable[[F], F]:
    """A click option that is also read from CSI_QUOBYTE_<FLAG> (or `envvar`), which --help shows."""
    name = envvar or "CSI_QUOBYTE_" + flag.removeprefix("--").partition("/")[0].replace("-", "_").upper()
    return click.option(
        flag, envvar=name, show_envvar=True, show_default=settings.pop("show_default", True), **settings
    )


def combined(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Apply several options in the order in which --help shall show them."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


require_mount = option(
    "--require-mount",
    type=click.Choice(REQUIRE_MOUNT_CHOICES),
    default="quobyte",
    help="What must be mounted at a pool's path: a Quobyte volume; one whose root need not have size 0 (a stand-in); "
    "any: no check, so that an unmounted volume's directory would be written to.",
)
qemu_dir = option("--qemu-dir", default=None, help="Directory of qemu-img and qemu-storage-daemon; PATH if not given.")
allow_untested_qemu = option(
    "--allow-untested-qemu", is_flag=True, default=False, help="Serve data with a QEMU version that was not measured."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def pools(required: bool) -> Callable[[F], F]:
    """--pool NAME=PATH, any number of times."""
    return option(
        "--pool",
        envvar="CSI_QUOBYTE_POOLS",
        multiple=True,
        required=required,
        metavar="NAME=PATH",
        help="A pool: its name in StorageClasses, and where its Quobyte volume is mounted. Can be given several times.",
    )


log_options = combined(
    option(
        "--log-level", type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False), default="info"
    ),
    option("--log-format", type=click.Choice(["json", "text"]), default="text"),
)

serving = combined(
    option("--endpoint", envvar="CSI_ENDPOINT", required=True, metavar="unix:///PATH", help="Socket to listen on."),
    pools(required=True),
    option("--driver-name", default=DEFAULT_DRIVER_NAME, help="Name of the CSIDriver object."),
    require_mount,
    option(
        "--pool-timeout",
        type=str,
        default="30s",
        metavar="TIME",
        help="How long a call waits for its pool before it answers UNAVAILABLE.",
    ),
    qemu_dir,
    option("--health-address", default="", metavar="HOST:PORT", help="Serve /livez and /readyz there, if given."),
    option("--metrics-address", default="", metavar="HOST:PORT", help="Serve Prometheus metrics there, if given."),
    log_options,
)


def parse_pools(texts: Sequence[str]) -> tuple[PoolSpec, ...]:
    """Read all --pool values.

    Raises:
        InvalidArgument: one is not NAME=PATH.
    """
    return tuple(PoolSpec.parse(text) for text in texts)


_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration_s(flag: str, text: str) -> float:
    """Read a time such as 30s, 500ms or 2m (a bare number is seconds).

    Raises:
        InvalidArgument: it is not of that form.
    """
    number = text.rstrip("msh")
    try:
        return float(number) * _UNITS_S[text[len(number) :] or "s"]
    except (ValueError, KeyError) as error:
        raise InvalidArgument(f"{flag} {text!r} is not a time such as 30s, 500ms or 2m") from error


_UNITS_BYTES = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def parse_size_bytes(flag: str, text: str) -> int:
    """Read a size such as 100Mi or 2Gi (a bare number is bytes).

    Raises:
        InvalidArgument: it is not of that form.
    """
    number = text.rstrip("KMGTi")
    try:
        return int(number) * _UNITS_BYTES[text[len(number) :]]
    except (ValueError, KeyError) as error:
        raise InvalidArgument(f"{flag} {text!r} is not a size such as 100Mi or 2Gi") from error
