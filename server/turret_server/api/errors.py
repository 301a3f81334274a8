"""Errors become gRPC statuses with google.rpc.ErrorInfo, and RetryInfo, here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from turret_adapters.errors import AdapterError
from turret_server.errors import InvalidRequestError, TurretError

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
    """A status travels in a header, which is lost whole if it is too long."""
    encoded = message.encode()
    if len(encoded) <= _MAX_MESSAGE_BYTES:
        return message
    return encoded[:_MAX_MESSAGE_BYTES].decode(errors="ignore") + " …"


async def _abort(context: Any, error: Exception) -> None:
    if isinstance(error, TurretError | AdapterError):
        await context.abort_with_status(rpc_status.to_status(to_status(error)))
    else:
        log.error("a call failed", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log says more")


class _Undecodable:
    """Stands in for a request whose bytes are no message, so that the handler can say so."""


def _decode_or_mark(deserialize: Callable[..., Any]) -> Callable[[bytes], Any]:
    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Undecodable()

    return decode


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Wraps every handler of this project's services; health and reflection answer for themselves."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/turret."):
            return handler
        assert handler.request_deserializer
        decode = _decode_or_mark(handler.request_deserializer)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream), decode, handler.response_serializer
            )
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(
                _guard_both(handler.stream_stream), decode, handler.response_serializer
            )
        assert handler.unary_unary
        return grpc.unary_unary_rpc_method_handler(
            _guard_unary(handler.unary_unary), decode, handler.response_serializer
        )


def _check_decoded(request: Message | _Undecodable) -> None:
    if isinstance(request, _Undecodable):
        raise InvalidRequestError(
            "the request is no valid protobuf message of this method; strings must be valid UTF-8"
        )


def _guard_unary(method: Callable[..., Any]) -> Callable[..., Any]:
    async def guarded(request: Message, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            _check_decoded(request)
            return await method(request, context)
        except Exception as error:  # noqa: BLE001 (the edge: whatever it is becomes a status)
            await _abort(context, error)

    return guarded


def _guard_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    async def guarded(request: Message, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            _check_decoded(request)
            async for response in method(request, context):
                yield response
        except Exception as error:  # noqa: BLE001 (the edge: whatever it is becomes a status)
            await _abort(context, error)

    return guarded


def _guard_both(method: Callable[..., Any]) -> Callable[..., Any]:
    async def decoded(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
        async for request in requests:
            _check_decoded(request)
            yield request

    async def guarded(requests: AsyncIterator[Message], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            async for response in method(decoded(requests), context):
                yield response
        except Exception as error:  # noqa: BLE001 (the edge: whatever it is becomes a status)
            await _abort(context, error)

    return guarded
