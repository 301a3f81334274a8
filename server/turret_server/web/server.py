"""The HTTP server: uvicorn's protocol, with bounds on what a client may hold."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress
from functools import partial
from typing import Any

import h11
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from turret_server.config import split_address
from turret_server.doors.limits import HANDSHAKE_SECONDS
from turret_server.doors.tls import TlsFiles
from turret_server.errors import ConfigError
from turret_server.web.errors import Failure

# A key, a tenant and trace headers.
MAX_HEADER_BYTES = 16 * 2**10
# Within this time of its beginning, or of the last answer, a connection has sent the header of a request.
IDLE_SECONDS = 75.0
# A client that reads nothing of its answer for so long is disconnected.
STALLED_SECONDS = 60.0
# A peer that vanished is noticed after about two minutes.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 20), (socket.TCP_KEEPCNT, 3))
_BACKLOG = 2048


class WebServer:
    def __init__(self, app: ASGIApp, *, max_connections: int, tls: TlsFiles | None = None) -> None:
        """Without `tls` nothing is encrypted."""
        self._tls = tls
        self._state = ServerState()
        self._max_connections = max_connections
        self._config = Config(
            app,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # strangers could fill the log with warnings
            access_log=False,
            timeout_keep_alive=int(IDLE_SECONDS),
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            proxy_headers=False,
            reset_contextvars=True,
        )
        self._listener: asyncio.Server | None = None

    @property
    def scheme(self) -> str:
        return "https" if self._tls else "http"

    async def start(self, address: str) -> int:
        """Open the port; returns its number, which the system chooses if it is 0.

        Raises:
            ConfigError: the port cannot be opened.
        """
        self._config.load()
        host, port = split_address(address)
        make = partial(
            _Connection,
            config=self._config,
            server_state=self._state,
            app_state={},
            max_connections=self._max_connections,
        )
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                make,
                host.strip("[]"),
                port,
                backlog=_BACKLOG,
                ssl=self._context(),
                ssl_handshake_timeout=HANDSHAKE_SECONDS if self._tls else None,
            )
        except OSError as error:
            raise ConfigError(
                f"--http {address}: the port cannot be opened ({error.strerror}); stop the program that uses "
                "it, or choose another"
            ) from error
        return int(self._listener.sockets[0].getsockname()[1])

    async def stop(self, grace: float) -> None:
        """Close the port, let answers go out for at most `grace` seconds, and close the connections."""
        if self._listener:
            self._listener.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=grace)
        for connection in list(self._state.connections):
            connection.transport.abort()

    def _context(self) -> ssl.SSLContext | None:
        """A context that follows the certificates: each handshake is answered by the current one's."""
        if not (tls := self._tls):
            return None

        def use_current(handshake: ssl.SSLObject, _name: str, _context: ssl.SSLContext) -> None:
            handshake.context = tls.current().context

        context = tls.current().context
        context.sni_callback = use_current  # called for every client, whether it names a server or not
        return context


class _Connection(H11Protocol):
    def __init__(self, *, max_connections: int, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._max_connections = max_connections
        self._idle: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            transport.abort()
            return
        self.app_state = {"identities": _identities(transport)}
        raw: socket.socket | None = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                raw.setsockopt(socket.IPPROTO_TCP, option, value)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for timer in (self._idle, self._stalled):
            if timer:
                timer.cancel()

    def handle_events(self) -> None:
        super().handle_events()
        if self._idle and self.cycle is not None and not self.cycle.response_complete:
            self._idle.cancel()

    def on_response_complete(self) -> None:
        self._await_request()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or has too long a header; not in the midst of an answer."""
        if self.conn.our_state is h11.IDLE or self.conn.our_state is h11.SEND_RESPONSE:
            message = f"{msg} A header has at most {MAX_HEADER_BYTES} bytes."
            failure = Failure.of(400, message, "invalid_http")
            with suppress(h11.LocalProtocolError):
                for part in (
                    h11.Response(status_code=400, headers=[*failure.headers, (b"connection", b"close")]),
                    h11.Data(data=failure.body),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(part))
        self.transport.close()

    def _await_request(self) -> None:
        if self._idle:
            self._idle.cancel()
        self._idle = self.loop.call_later(IDLE_SECONDS, self.transport.abort)


def _identities(transport: asyncio.Transport) -> tuple[str, ...]:
    """The common and alternative names in the certificate of the client, which the transport verified."""
    secured: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    found: Any = secured.getpeercert() if secured else None
    if not found:
        return ()
    subject = [value for group in found.get("subject", ()) for key, value in group if key == "commonName"]
    return (*subject, *(str(value) for _, value in found.get("subjectAltName", ())))
