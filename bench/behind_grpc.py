"""The floor behind a call: a gRPC server in a process of its own that does nothing but the floor's files.

Owns the server and the client of it. What no driver with such a server can be faster than: the same library, threads
and kind of socket as the driver's, the work is the floor's and no more. Run as a program it is the server.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
from floor import floor_of

THREADS = 64  # as many as the driver's server has
METHOD = "/bench.Floor/Do"
READY_TIMEOUT_S = 30
CALL_TIMEOUT_S = 60


class _Handler(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # no type arguments at run time
    """Answers every call by doing a floor; requests are an operation and a name as text, answers are empty."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def service(self, _: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        return grpc.unary_unary_rpc_method_handler(self._do)

    def _do(self, request: bytes, _: grpc.ServicerContext) -> bytes:
        operation, name = request.decode().split(" ")
        floor_of(operation, self._directory, name)
        return b""


@contextmanager
def served_floor(directory: Path, socket: Path) -> Iterator[Callable[[str, str], None]]:
    """Start the server for floors in a directory; gives what calls it with an operation and a name."""
    process = subprocess.Popen([sys.executable, __file__, str(directory), str(socket)])
    try:
        with grpc.insecure_channel(f"unix://{socket}") as channel:
            grpc.channel_ready_future(channel).result(READY_TIMEOUT_S)
            call = partial(channel.unary_unary(METHOD, bytes, bytes), timeout=CALL_TIMEOUT_S)

            def do(operation: str, name: str) -> None:
                call(f"{operation} {name}".encode())

            yield do
    finally:
        process.terminate()
        process.wait(READY_TIMEOUT_S)


def main() -> None:
    """Serve until SIGTERM."""
    directory, socket = sys.argv[1:]
    server = grpc.server(ThreadPoolExecutor(THREADS), handlers=[_Handler(Path(directory))])
    server.add_insecure_port(f"unix://{socket}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
