"""The HTTP port of the metrics. It answers without authentication, so what a client may hold is bounded."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

PATH = "/metrics"
# Each has a thread; a Prometheus needs one.
MAX_CONNECTIONS = 16
# For one request and its answer, however slowly the bytes come and go.
MAX_SECONDS = 10.0


class MetricsServer(ThreadingMixIn, WSGIServer):
    """Serves a registry at `PATH` from threads of its own until it is closed."""

    daemon_threads = True

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        """Open the port; 0 lets the system choose one, which is `server_port`.

        Raises:
            OSError: the port cannot be opened.
        """
        self.address_family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self._opened: dict[Any, float] = {}
        super().__init__((str(address[0]), port), _Handler)
        self.set_app(_at_path(make_wsgi_app(registry)))
        self._thread = threading.Thread(target=self.serve_forever, name="turret-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        return len(self._opened) < MAX_CONNECTIONS

    def process_request(self, request: Any, client_address: Any) -> None:
        self._opened[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._opened.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called about twice a second: end what takes too long."""
        oldest = time.monotonic() - MAX_SECONDS
        for request, opened in list(self._opened.items()):
            if opened < oldest:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Called for each that ends early: its client was too slow, or has gone."""


class _Handler(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """No line for each scrape."""


def _at_path(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == PATH:
            return app(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"the metrics are at {PATH}\n".encode()]

    return answer
