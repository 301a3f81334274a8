"""Reading the requests of a call, after its caller is known.

gRPC would hand a method its request whole and parsed, whoever calls. Here every method takes a stream of
bytes from gRPC instead: what an unknown client sends stays on the connection, where HTTP/2's flow control
holds it back, until the call is authenticated, and errors in it are answered like all others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from turret_server.doors.freed_memory import freed_memory
from turret_server.doors.limits import READ_SECONDS
from turret_server.errors import DeadlineError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class RequestReader:
    """Reads and parses the messages of a method, of at most `max_bytes` each if that is not None."""

    deserialize: Callable[[bytes], Any]
    max_bytes: int | None = None

    async def one(self, requests: AsyncIterator[bytes]) -> Any:
        """The one request of a call.

        Raises:
            DeadlineError: it did not come in time.
            InvalidRequestError: there is none, or it is invalid.
        """
        try:
            # Not `wait_for`, which on Python 3.11 loses a cancellation that comes with the request.
            async with asyncio.timeout(READ_SECONDS):
                data = await anext(requests, None)
        except TimeoutError as error:
            raise DeadlineError(f"no request came within {READ_SECONDS:g} s; send it again") from error
        if data is None:
            raise InvalidRequestError("the call has no request; send one")
        return self._parse(data)

    async def many(self, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        """The requests of a call as they come.

        Raises:
            InvalidRequestError: one is invalid.
        """
        async for data in requests:
            yield self._parse(data)
            freed_memory.ended(len(data))

    def _parse(self, data: bytes) -> Any:
        if self.max_bytes is not None and len(data) > self.max_bytes:
            raise InvalidRequestError(
                f"a request of this method has at most {self.max_bytes} bytes; found {len(data)}"
            )
        try:
            return self.deserialize(data)
        except DecodeError as error:
            raise InvalidRequestError(
                "the request is not a valid protobuf message of this method; strings must be valid UTF-8"
            ) from error
