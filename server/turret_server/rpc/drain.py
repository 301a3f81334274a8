"""The calls that run, and how they end when the server does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any

import grpc

from turret_server.errors import ShuttingDownError


class RunningCalls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Counts the calls of this project's services, refuses new ones once it is told to, and ends those that
    are left. Health and reflection go on to the end. Used on one event loop.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._refusing = False
        self._ending = False
        self._settled = asyncio.Event()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def refuse(self) -> None:
        """Answer new calls with UNAVAILABLE from now on: whoever makes them can go elsewhere at once."""
        self._refusing = True

    async def wait(self, seconds: float) -> None:
        """Wait until no call runs, or somebody hurries; so long at most."""
        self._settled.clear()
        if self._running:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), seconds)

    def hurry(self) -> None:
        """Whoever waits, waits no longer."""
        self._settled.set()

    def end(self) -> None:
        """Tell every call that is left that it does not get done."""
        self._ending = True
        for task in self._running:
            task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/turret."):
            return handler
        coders = handler.request_deserializer, handler.response_serializer
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(self._stream(handler.stream_stream), *coders)
        assert handler.stream_unary
        return grpc.stream_unary_rpc_method_handler(self._unary(handler.stream_unary), *coders)

    def _unary(self, method: Callable[..., Any]) -> Callable[..., Any]:
        async def counted(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with self._counted():
                return await method(request, context)

        return counted

    def _stream(self, method: Callable[..., Any]) -> Callable[..., Any]:
        async def counted(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with self._counted():
                async with aclosing(method(request, context)) as responses:
                    async for response in responses:
                        yield response

        return counted

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self._refusing:
            raise ShuttingDownError("the server is shutting down; send the call to another")
        task = asyncio.current_task()
        assert task, "gRPC runs every call as a task of its own"
        self._running.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._ending:
                raise
            raise ShuttingDownError("the server stopped before the call was done; make it again") from None
        finally:
            self._running.discard(task)
            if not self._running:
                self._settled.set()
