"""The way of every call through the gRPC door, in this order: it gets an id, it is counted (while the server
drains it is refused), its caller is authenticated, its request is read, its method runs, its error becomes a
status.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message

from turret_server.doors.caller import REQUEST_ID, CallAuthentication, bind_request_id
from turret_server.doors.freed_memory import freed_memory
from turret_server.doors.running import RunningCalls
from turret_server.errors import TooManyCallsError
from turret_server.rpc.errors import end_with
from turret_server.rpc.reading import RequestReader
from turret_server.tenancy.auth import Authenticator, CallHeader

# Health and reflection answer without authentication; a stream of theirs keeps its request in memory.
MAX_OPEN_BYTES = 4096
MAX_OPEN_STREAMS = 2048

_IDENTITIES = ("x509_common_name", "x509_subject_alternative_name")

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Requests: TypeAlias = AsyncIterator[bytes]


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """The only interceptor. Each call runs as one coroutine of one task, so that a cancellation closes all
    that the call has open before the task ends.
    """

    def __init__(self, authenticator: Authenticator, running: RunningCalls) -> None:
        self._authenticator = authenticator
        self._running = running
        self._num_open_streams = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        handler = await continuation(handler_call_details)
        if handler is None or not _is_implemented(_method(handler)):
            return None  # type: ignore[return-value]  # gRPC answers UNIMPLEMENTED, as its stubs do not know
        if handler_call_details.method.startswith("/turret."):
            return _replaced(handler, self._authenticated(handler))
        return _replaced(handler, self._open(handler))

    def _authenticated(self, handler: _Handler) -> Callable[..., Any]:
        method, reader = _method(handler), _reader(handler)

        async def answer(requests: _Requests, context: _Context) -> None:
            request = None
            try:
                request_id = _bind_id(context)
                with self._running.counted():
                    authentication = CallAuthentication(self._authenticator, _header(context, request_id))
                    await authentication.renew()
                    request = await _read(handler, reader, requests)
                    if not handler.response_streaming:
                        await context.write(await method(request, context))
                        return
                    async with aclosing(method(request, context)) as responses:
                        async for response in responses:
                            # The key, or a permission, may be taken away meanwhile.
                            await authentication.renew()
                            await context.write(response)
            except Exception as error:  # noqa: BLE001 (the edge: every error becomes a status)
                end_with(context, error)
            finally:
                freed_memory.ended(request.ByteSize() if isinstance(request, Message) else 0)

        return answer

    def _open(self, handler: _Handler) -> Callable[..., Any]:
        method, reader = _method(handler), _reader(handler, MAX_OPEN_BYTES)

        async def answer(requests: _Requests, context: _Context) -> None:
            try:
                _bind_id(context)
                request = await _read(handler, reader, requests)
                if not handler.response_streaming:
                    await context.write(await method(request, context))
                    return
                with self._open_stream():
                    if not inspect.isasyncgenfunction(method):
                        await method(request, context)  # the health service writes its answers itself
                        return
                    async with aclosing(method(request, context)) as responses:
                        async for response in responses:
                            await context.write(response)
            except Exception as error:  # noqa: BLE001 (the edge: every error becomes a status)
                end_with(context, error)

        return answer

    @contextmanager
    def _open_stream(self) -> Iterator[None]:
        if self._num_open_streams >= MAX_OPEN_STREAMS:
            raise TooManyCallsError(
                f"at most {MAX_OPEN_STREAMS} calls watch the server's health or use reflection at once; use "
                "health's Check instead",
                limit=MAX_OPEN_STREAMS,
            )
        self._num_open_streams += 1
        try:
            yield
        finally:
            self._num_open_streams -= 1


def _bind_id(context: _Context) -> str:
    """Give the call its id, which the answer has in its trailing metadata."""
    return bind_request_id(
        context.invocation_metadata() or (),
        lambda found: context.set_trailing_metadata(((REQUEST_ID, found),)),
    )


def _header(context: _Context, request_id: str) -> CallHeader:
    # The transport gives names only of certificates that it verified.
    proven = context.auth_context()
    return CallHeader(
        request_id=request_id,
        metadata=tuple(context.invocation_metadata() or ()),
        identities=tuple(
            name.decode(errors="replace") for kind in _IDENTITIES for name in proven.get(kind, ())
        ),
    )


def _method(handler: _Handler) -> Callable[..., Any]:
    methods = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    return next(filter(None, methods))


def _is_implemented(method: Callable[..., Any]) -> bool:
    """Whether a servicer has the method itself: those that it inherits from the stubs only raise."""
    return inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)


def _reader(handler: _Handler, max_bytes: int | None = None) -> RequestReader:
    assert handler.request_deserializer, "the stubs have one for every method"
    return RequestReader(handler.request_deserializer, max_bytes)


async def _read(handler: _Handler, reader: RequestReader, requests: _Requests) -> Any:
    return reader.many(requests) if handler.request_streaming else await reader.one(requests)


def _replaced(handler: _Handler, answer: Callable[[_Requests, _Context], Awaitable[None]]) -> _Handler:
    """A handler that gets bytes as a stream, and writes its responses itself, also if there is only one: what
    gRPC writes to a client that has gone, it logs as an error.
    """
    return grpc.stream_stream_rpc_method_handler(answer, None, handler.response_serializer)
