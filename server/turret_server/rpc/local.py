"""The gRPC door without a socket: calls of this process run on an event loop of this process.

They go the way of all calls, from the interceptor to the status. Only what gRPC's transport does is done
here: deadlines, cancellation, and the order of responses.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

import grpc

from turret_server.rpc.calls import CallInterceptor

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
_END = object()


class Methods:
    """The methods of servicers, which register themselves here as they do with a `grpc.Server`."""

    def __init__(self) -> None:
        self.by_name: dict[str, _Handler] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """The same methods as those of `add_registered_method_handlers`."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, _Handler]) -> None:
        self.by_name |= {f"/{service}/{name}": handler for name, handler in handlers.items()}


class LocalChannel:
    """What the stubs need of a `grpc.Channel`. Threads may share it."""

    def __init__(
        self, methods: Methods, interceptor: CallInterceptor, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Calls run on `loop`, which runs on another thread than theirs."""
        self._methods = methods
        self._interceptor = interceptor
        self._loop = loop
        self._running: set[LocalCall] = set()
        # No call begins after `close`: the loop would end before the call does, and its thread wait for ever.
        self._closing = threading.Lock()
        self._is_closed = False

    def unary_unary(self, method: str, request_serializer: Any, *_: Any, **__: Any) -> _Method:
        return _Method(self, method, lambda request: iter([request_serializer(request)]))

    unary_stream = unary_unary

    def stream_stream(self, method: str, request_serializer: Any, *_: Any, **__: Any) -> _Method:
        return _Method(self, method, lambda requests: map(request_serializer, requests))

    stream_unary = stream_stream

    def call(
        self, method: str, requests: Iterator[bytes], timeout: float | None, metadata: _Metadata
    ) -> LocalCall:
        details = _Details(method, metadata)
        call = LocalCall(timeout, metadata)

        async def answer() -> None:
            try:
                async with asyncio.timeout(timeout):
                    handler: Any = await self._interceptor.intercept_service(self._find, details)
                    await handler.stream_stream(_each(requests), call.context)
            except TimeoutError:
                call.context.end(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
            except asyncio.CancelledError:
                call.context.end(grpc.StatusCode.CANCELLED, "Cancelled")
            finally:
                self._running.discard(call)
                call.context.responses.put(_END)

        with self._closing:
            if self._is_closed:
                call.context.end(grpc.StatusCode.CANCELLED, "the channel is closed")
                call.context.responses.put(_END)
            else:
                self._running.add(call)
                call.begin(answer(), self._loop)
        return call

    async def _find(self, details: grpc.HandlerCallDetails) -> _Handler:
        return self._methods.by_name[details.method]

    def close(self) -> None:
        """Cancel the calls that run; later ones end as soon as they begin."""
        with self._closing:
            self._is_closed = True
        for call in list(self._running):
            call.cancel()


class _Method:
    """A method of a stub."""

    def __init__(
        self, channel: LocalChannel, name: str, serialized: Callable[[Any], Iterator[bytes]]
    ) -> None:
        self._channel = channel
        self._name = name
        self._serialized = serialized

    def __call__(self, request: Any, timeout: float | None = None, metadata: _Metadata = ()) -> Any:
        return self._channel.call(self._name, self._serialized(request), timeout, metadata)

    future = __call__


class _Details(grpc.HandlerCallDetails):
    def __init__(self, method: str, metadata: _Metadata) -> None:
        self.method = method
        self.invocation_metadata = tuple(metadata)


async def _each(requests: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Requests as the caller makes them, which may read files for them."""
    while (request := await asyncio.to_thread(next, requests, None)) is not None:
        yield request


class _Context:
    """What a handler needs of a `grpc.aio.ServicerContext`."""

    def __init__(self, timeout: float | None, metadata: _Metadata) -> None:
        self.responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.code = grpc.StatusCode.OK
        self.details = ""
        self.trailing_metadata: _Metadata = ()
        self._metadata = tuple(metadata)
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def invocation_metadata(self) -> _Metadata:
        return self._metadata

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        return {}

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else self._deadline - time.monotonic()

    async def write(self, response: Any) -> None:
        self.responses.put(response)

    def set_trailing_metadata(self, metadata: _Metadata) -> None:
        self.trailing_metadata = metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def end(self, code: grpc.StatusCode, details: str) -> None:
        self.code, self.details, self.trailing_metadata = code, details, ()


class LocalCall(grpc.RpcError):
    """A call that runs: an iterator of its responses, and the future of the only one. Ends by raising itself
    unless its status is OK.
    """

    def __init__(self, timeout: float | None, metadata: _Metadata) -> None:
        super().__init__()
        self.context = _Context(timeout, metadata)
        self._has_ended = False
        self._future: Future[None] | None = None

    def begin(self, answer: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._future = asyncio.run_coroutine_threadsafe(answer, loop)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        response = _END if self._has_ended else self.context.responses.get()
        if response is not _END:
            return response
        self._has_ended = True
        if self.context.code is grpc.StatusCode.OK:
            raise StopIteration
        raise self

    def result(self) -> Any:
        response = next(self)
        next(self, None)  # the status
        return response

    def cancel(self) -> None:
        if self._future:
            self._future.cancel()

    def code(self) -> grpc.StatusCode:
        return self.context.code

    def details(self) -> str:
        return self.context.details

    def trailing_metadata(self) -> Any:
        return self.context.trailing_metadata
