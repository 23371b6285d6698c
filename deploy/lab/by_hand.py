#!/usr/bin/env python3
"""The calls of Kubernetes' sidecars and kubelet by hand, for trying a driver without a Kubernetes.

    by_hand.py create NAME        by_hand.py use VOLUME        by_hand.py snapshot NAME VOLUME
    by_hand.py expand VOLUME GIB  by_hand.py release VOLUME    by_hand.py delete ID

`use` does what the kubelet does for a pod, and prints where the volume is; `release` is its opposite.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import click
import grpc

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # started by its path, from a tree as it is

from csi_quobyte.pb import csi_pb2 as csi  # noqa: E402
from lab.client import Client, block_capability, mount_capability  # noqa: E402
from lab.machine import GIB  # noqa: E402


class Driver:
    """The sockets of a driver's two processes."""

    def __init__(self, controller: str, node: str, base: Path) -> None:
        """`base` is where volumes are staged and published."""
        self.base = base
        self._sockets = {"c.sock": controller, "n.sock": node}
        self._exit = ExitStack()

    def channel(self, socket: str) -> grpc.Channel:
        """Give a channel that lives as long as this process."""
        return self._exit.enter_context(grpc.insecure_channel(f"unix://{self._sockets[socket]}"))


class _Group(click.Group):
    """Shows the code and message of a call that failed, and no traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except grpc.RpcError as error:
            raise click.ClickException(f"{error.code().name}: {error.details()}") from error


def _pairs(_: click.Context, __: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    if wrong := [one for one in given if "=" not in one]:
        raise click.BadParameter(f"{wrong[0]!r} is not NAME=VALUE")
    return {name: value for name, _, value in (one.partition("=") for one in given)}


_parameters: Callable[[Any], Any] = click.option(
    "-p", "--parameter", "parameters", multiple=True, callback=_pairs, help="NAME=VALUE, as in a class."
)


@click.group(cls=_Group)
@click.option("--controller", default="/run/csi-controller.sock", show_default=True, help="The controller's socket.")
@click.option("--node", default="/run/csi-node.sock", show_default=True, help="The node's socket.")
@click.option(
    "--directory",
    default="/run/csi-by-hand",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where volumes are staged and published.",
)
@click.pass_context
def main(ctx: click.Context, controller: str, node: str, directory: Path) -> None:
    """Make the calls that Kubernetes makes."""
    ctx.obj = Client(Driver(controller, node, directory))


def _node_id(client: Client) -> str:
    found: str = client.node.NodeGetInfo(csi.NodeGetInfoRequest(), timeout=10).node_id
    return found


@main.command()
@click.argument("name")
@click.option("--gib", default=1, show_default=True, help="The size.")
@click.option("--snapshot", default="", help="The id of a snapshot to restore.")
@click.option("--volume", default="", help="The id of a volume to clone.")
@click.option("--block", is_flag=True, help="A raw block volume.")
@_parameters
@click.pass_obj
def create(
    client: Client, name: str, gib: int, snapshot: str, volume: str, block: bool, parameters: dict[str, str]
) -> None:
    """Create a volume and print its id; ABORTED means that a copy is under way: call it again."""
    made = client.create(
        name,
        gib * GIB,
        snapshot=snapshot,
        volume=volume,
        capability=block_capability() if block else mount_capability(),
        **cast(Any, parameters),  # not what the named arguments are
    )
    click.echo(made.volume_id)


@main.command()
@click.argument("name")
@click.argument("volume")
@_parameters
@click.pass_obj
def snapshot(client: Client, name: str, volume: str, parameters: dict[str, str]) -> None:
    """Take a snapshot of a volume that is not in use, and print its id."""
    click.echo(client.snapshot(name, volume, **parameters).snapshot_id)


@main.command()
@click.argument("volume")
@click.option("--block", is_flag=True, help="As a device.")
@click.pass_obj
def use(client: Client, volume: str, block: bool) -> None:
    """Attach a volume to the node, stage and publish it, and print where it is."""
    click.echo(
        client.use(volume, node=_node_id(client), capability=block_capability() if block else mount_capability())
    )


@main.command()
@click.argument("volume")
@click.pass_obj
def release(client: Client, volume: str) -> None:
    """Unpublish, unstage and detach a volume."""
    client.release(volume, node=_node_id(client))


@main.command()
@click.argument("volume")
@click.argument("gib", type=int)
@click.pass_obj
def expand(client: Client, volume: str, gib: int) -> None:
    """Grow a volume, and its file system if it is in use."""
    client.expand(volume, gib * GIB)
    if (path := client.target_path(volume)).exists():
        client.node_expand(volume, path)


@main.command()
@click.argument("ids", nargs=-1, required=True)
@click.pass_obj
def delete(client: Client, ids: Sequence[str]) -> None:
    """Delete volumes and snapshots."""
    for one in ids:
        (client.delete_snapshot if "-snap-" in one else client.delete)(one)


if __name__ == "__main__":
    main()
