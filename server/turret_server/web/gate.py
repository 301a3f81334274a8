"""The way of every call through the HTTP door, in this order: it gets an id, it is counted (while the server
drains it is refused), its caller is authenticated, its body is read, its handler runs, its error becomes a
status. A client that disconnects ends its call at once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import TypeAlias

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret_server.doors.caller import REQUEST_ID, CallAuthentication, bind_request_id
from turret_server.doors.freed_memory import freed_memory
from turret_server.doors.limits import MAX_MESSAGE_BYTES, READ_SECONDS
from turret_server.doors.running import RunningCalls
from turret_server.errors import BodyTooLargeError, DeadlineError, PermissionDeniedError
from turret_server.tenancy.auth import Authenticator, CallHeader
from turret_server.web.errors import to_failure

EVENT_STREAM = "text/event-stream"
DONE = b"data: [DONE]\n\n"

_Metadata: TypeAlias = tuple[tuple[str, str], ...]


class Gate:
    """An ASGI application around `app`. Calls of the paths in `public` need no authentication and are
    answered while the server drains. Web pages of `origins` may call it, "*" is all.
    Bodies of PUT on paths that end with a name in `streamed` are read by their handlers.
    """

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        calls: RunningCalls,
        *,
        public: frozenset[str],
        streamed: frozenset[str],
        origins: tuple[str, ...],
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._calls = calls
        self._public = public
        self._origins = origins
        self._streamed = streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(send)
        metadata = tuple((key.decode("latin-1"), value.decode("latin-1")) for key, value in scope["headers"])
        scope["app"] = self  # for starlette, which then raises where it would answer in a form of its own
        try:
            request_id = bind_request_id(metadata, answer.name)
            if scope["path"] in self._public:
                await self._app(scope, receive, answer.send)
                return
            self._check_origin(metadata)
            with self._calls.counted():
                identities = scope["state"].get("identities", ())
                header = CallHeader(request_id=request_id, metadata=metadata, identities=identities)
                scope["state"]["authentication"] = authentication = CallAuthentication(
                    self._authenticator, header
                )
                await authentication.renew()
                if scope["method"] == "PUT" and scope["path"].rpartition("/")[2] in self._streamed:
                    await self._app(scope, receive, answer.send)
                    return
                body = await _read(metadata, receive)
                try:
                    async with _ended_with_its_client(receive, answer):
                        await self._app(scope, _replay(body), answer.send)
                finally:
                    freed_memory.ended(len(body))
        except (ClientGoneError, ClientDisconnect):
            return
        except Exception as error:  # noqa: BLE001 (the edge: every error becomes a status)
            await answer.end_with(error)

    def _check_origin(self, metadata: _Metadata) -> None:
        """Refuse calls of web pages, by which a browser names the page. Otherwise any page that a user of
        this machine looks at could call a server on loopback, which needs no key.
        """
        origins = {value for key, value in metadata if key == "origin"}
        if "*" not in self._origins and not origins.issubset(self._origins):
            raise PermissionDeniedError(
                f"web pages of {origins.pop()[:200]} may not call this server; allow them with --http-cors"
            )


class ClientGoneError(Exception):
    """The client has disconnected: nobody reads an answer."""


class _Answer:
    """What has been sent of an answer. Every answer has the id of its call."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._headers: list[tuple[bytes, bytes]] = []
        self._is_stream = False
        self.is_begun = False
        self.is_complete = False

    def name(self, request_id: str) -> None:
        self._headers.append((REQUEST_ID.encode(), request_id.encode()))

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_begun = True
            date = (b"date", formatdate(usegmt=True).encode())
            message["headers"] = [*message.get("headers", ()), *self._headers, date]
            self._is_stream = (b"content-type", f"{EVENT_STREAM}; charset=utf-8".encode()) in message[
                "headers"
            ]
        self.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def end_with(self, error: Exception) -> None:
        """Send an error: as the answer, or as the last event of one that is a stream."""
        failure = to_failure(error)
        if not self.is_begun:
            length = (b"content-length", str(len(failure.body)).encode())
            headers = [*failure.headers, length]
            await self.send({"type": "http.response.start", "status": failure.status, "headers": headers})
            await self.send({"type": "http.response.body", "body": failure.body})
        elif self._is_stream and not self.is_complete:
            await self.send({"type": "http.response.body", "body": b"data: " + failure.body + b"\n\n" + DONE})
        elif not self.is_complete:
            raise error  # the connection is closed, which tells the client that the answer is not whole


async def _read(metadata: _Metadata, receive: Receive) -> bytes:
    """The body of a call.

    Raises:
        BodyTooLargeError: it is too large.
        DeadlineError: it did not come in time.
        ClientGoneError: the client disconnected.
    """
    announced = next((value for key, value in metadata if key == "content-length"), "0")
    parts, size = [], int(announced) if announced.isdigit() else 0
    _check_size(size)
    size = 0
    try:
        async with asyncio.timeout(READ_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                _check_size(size)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise DeadlineError(f"the body did not come within {READ_SECONDS:g} s; send it again") from error


def _check_size(size: int) -> None:
    if size > MAX_MESSAGE_BYTES:
        raise BodyTooLargeError(f"a body has at most {MAX_MESSAGE_BYTES} bytes; found {size} or more")


def _replay(body: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


@asynccontextmanager
async def _ended_with_its_client(receive: Receive, answer: _Answer) -> AsyncIterator[None]:
    """Cancel the block when the client disconnects, so that all that the call has open is closed.

    Raises:
        ClientGoneError: it has.
    """
    task = asyncio.current_task()
    assert task, "every call is a task of its own"
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        # It is also reported once the answer is complete.
        if not answer.is_complete:
            gone = True
            task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise ClientGoneError from None
    finally:
        watcher.cancel()


def event(data: object) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
