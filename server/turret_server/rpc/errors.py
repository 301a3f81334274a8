"""Errors become gRPC statuses with google.rpc.ErrorInfo, RetryInfo and RequestInfo, here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from turret_adapters.errors import AdapterError
from turret_server.errors import TurretError
from turret_server.rpc.calls import REQUEST_ID, begin, request_id

log = logging.getLogger(__name__)

_DOMAIN = "turret"
# Twice in a header of at most 8 KiB, once of them with up to three bytes for one.
_MAX_MESSAGE_BYTES = 1024


def to_status(error: TurretError | AdapterError) -> status_pb2.Status:
    metadata = error.metadata if isinstance(error, TurretError) else {}
    details = [_packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN, metadata=metadata))]
    if isinstance(error, TurretError) and error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromTimedelta(timedelta(seconds=error.retry_after))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(
        code=code_pb2.Code.Value(error.code), message=_shorten(str(error)), details=details
    )


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _shorten(message: str) -> str:
    """A status travels in a header, which is lost whole if it is too long. Names of files may be no UTF-8."""
    encoded = message.encode(errors="backslashreplace")
    cut = encoded[:_MAX_MESSAGE_BYTES].decode(errors="ignore")
    return cut if len(encoded) <= _MAX_MESSAGE_BYTES else f"{cut} …"


def _end(context: Any, error: Exception) -> None:
    """Makes the call end with the error's status once its handler returns.

    `context.abort` is not for that: gRPC keeps the exception that it raises with the call, and the frames of
    its traceback keep the call: nothing ever frees the two, nor the request, and strangers could fill the
    memory.
    """
    if isinstance(error, grpc.aio.AbortError):
        # Health has told it already.
        error.__traceback__ = error.__context__ = None
        return
    if isinstance(error, TurretError | AdapterError):
        status = to_status(error)
    else:
        log.error("a call failed", exc_info=error)
        status = status_pb2.Status(
            code=code_pb2.INTERNAL, message="internal error; the server's log says more"
        )
    status.details.append(_packed(error_details_pb2.RequestInfo(request_id=request_id())))
    told = rpc_status.to_status(status)
    context.set_trailing_metadata((*told.trailing_metadata, (REQUEST_ID, request_id())))
    context.set_code(told.code)
    context.set_details(told.details)


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """The first interceptor. To it every method takes a stream (`reading`)."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(
                _guard_stream(handler.stream_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        assert handler.stream_unary
        return grpc.stream_unary_rpc_method_handler(
            _guard_unary(handler.stream_unary), handler.request_deserializer, handler.response_serializer
        )


def _guard_unary(method: Callable[..., Any]) -> Callable[..., Any]:
    async def guarded(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            begin(context)
            return await method(requests, context)
        except Exception as error:  # noqa: BLE001 (the edge: whatever it is becomes a status)
            _end(context, error)

    return guarded


def _guard_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    async def guarded(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            begin(context)
            async for response in method(requests, context):
                yield response
        except Exception as error:  # noqa: BLE001 (the edge: whatever it is becomes a status)
            _end(context, error)

    return guarded
