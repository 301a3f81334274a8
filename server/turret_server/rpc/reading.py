"""Requests, read when those who stand before have let the call through.

gRPC hands a method of one request that request whole and parsed, whoever calls. Here every method takes a
stream of bytes from it instead: what a stranger sends stays on the connection, where HTTP/2's window holds it
back, until it is known who calls, and what is wrong with it can be told like any other error.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from turret_server.errors import DeadlineError, InvalidRequestError, TooManyCallsError

# How long the one request of a call may take to come. One of 4 MiB takes as long at 140 kB a second.
READ_SECONDS = 30.0
# Health and reflection answer anybody, and remember what they were asked while it runs.
MAX_OPEN_BYTES = 4096
MAX_OPEN_STREAMS = 2048

_Parse: TypeAlias = Callable[[bytes], Any]
_Method: TypeAlias = Callable[[Any, Any], AsyncGenerator[Any]]


class ReadingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """The last interceptor, next to the services: to those before it every method takes a stream."""

    def __init__(self) -> None:
        self._num_open_streams = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        is_open = not handler_call_details.method.startswith("/turret.")
        assert handler.request_deserializer, "the stubs have one for every method"
        parse = partial(_parse, handler.request_deserializer, MAX_OPEN_BYTES if is_open else None)
        if handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(
                _read_unary(handler.unary_unary, parse), None, handler.response_serializer
            )
        method = handler.unary_stream or handler.stream_stream
        assert method, "there are no other kinds here"
        answer = partial(_responses, method)
        if is_open:
            answer = partial(self._counted, answer)
        read = _read_one if handler.unary_stream else _read_many
        return grpc.stream_stream_rpc_method_handler(read(answer, parse), None, handler.response_serializer)

    async def _counted(self, method: _Method, request: Any, context: Any) -> AsyncGenerator[Any]:
        with self._one_more():
            async with aclosing(method(request, context)) as responses:
                async for response in responses:
                    yield response

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        if self._num_open_streams >= MAX_OPEN_STREAMS:
            raise TooManyCallsError(
                f"at most {MAX_OPEN_STREAMS} calls watch the server's health or reflect at once; ask for the "
                "health with Check",
                limit=MAX_OPEN_STREAMS,
            )
        self._num_open_streams += 1
        try:
            yield
        finally:
            self._num_open_streams -= 1


def _parse(deserialize: _Parse, most: int | None, data: bytes) -> Any:
    if most is not None and len(data) > most:
        raise InvalidRequestError(f"a request of this method has at most {most} bytes; found {len(data)}")
    try:
        return deserialize(data)
    except DecodeError as error:
        raise InvalidRequestError(
            "the request is no valid protobuf message of this method; strings must be valid UTF-8"
        ) from error


async def _one(requests: AsyncIterator[bytes], parse: _Parse) -> Any:
    try:
        data = await asyncio.wait_for(anext(requests, None), READ_SECONDS)
    except TimeoutError as error:
        raise DeadlineError(f"the request did not come within {READ_SECONDS:g} s; send it again") from error
    if data is None:
        raise InvalidRequestError("the call came without a request; send one")
    return parse(data)


def _read_unary(method: Callable[..., Any], parse: _Parse) -> Callable[..., Any]:
    async def read(requests: AsyncIterator[bytes], context: Any) -> Any:
        return await method(await _one(requests, parse), context)

    return read


async def _responses(method: Callable[..., Any], request: Any, context: Any) -> AsyncGenerator[Any]:
    if not inspect.isasyncgenfunction(method):
        await method(request, context)  # the health service writes its answers itself
        return
    async with aclosing(method(request, context)) as responses:
        async for response in responses:
            yield response


def _read_one(method: _Method, parse: _Parse) -> _Method:
    async def read(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[Any]:
        async with aclosing(method(await _one(requests, parse), context)) as responses:
            async for response in responses:
                yield response

    return read


def _read_many(method: _Method, parse: _Parse) -> _Method:
    async def parsed(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in requests:
            yield parse(data)

    async def read(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[Any]:
        async with aclosing(method(parsed(requests), context)) as responses:
            async for response in responses:
                yield response

    return read
