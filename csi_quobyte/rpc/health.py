"""The HTTP side: /livez (this process answers) and /readyz (calls can be served), and the metrics."""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import start_http_server

from csi_quobyte.errors import Unavailable


def _handler(is_ready: Callable[[], bool]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            if self.path == "/livez":
                self._answer(HTTPStatus.OK, "ok")
            elif self.path == "/readyz":
                ready = is_ready()
                self._answer(*((HTTPStatus.OK, "ok") if ready else (HTTPStatus.SERVICE_UNAVAILABLE, "not ready")))
            else:
                self._answer(HTTPStatus.NOT_FOUND, "only /livez and /readyz are here")

        def _answer(self, status: HTTPStatus, text: str) -> None:
            body = text.encode() + b"\n"
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Probes come every few seconds: not worth a line each."""

    return Handler


def serve_health(address: tuple[str, int], is_ready: Callable[[], bool]) -> ThreadingHTTPServer:
    """Answer health requests on an address until the server's `shutdown` is called.

    A hung pool never makes /livez fail: restarting the process would not help the pool.

    Raises:
        Unavailable: the address cannot be used.
    """
    try:
        server = ThreadingHTTPServer(address, _handler(is_ready))
    except OSError as error:
        raise Unavailable(f"cannot serve health on {address[0]}:{address[1]}: {error.strerror}") from error
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server


def serve_metrics(address: tuple[str, int]) -> None:
    """Answer metrics requests on an address for the life of the process.

    Raises:
        Unavailable: the address cannot be used.
    """
    try:
        start_http_server(address[1], addr=address[0] or "0.0.0.0")
    except OSError as error:
        raise Unavailable(f"cannot serve metrics on {address[0]}:{address[1]}: {error.strerror}") from error
