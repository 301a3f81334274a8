"""Errors as gRPC statuses with google.rpc.ErrorInfo, RetryInfo and RequestInfo."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from turret_adapters.errors import AdapterError
from turret_server.doors.caller import REQUEST_ID, request_id
from turret_server.errors import TurretError

log = logging.getLogger(__name__)

_DOMAIN = "turret"
# The message stands twice in a header of at most 8 KiB, once with up to three bytes for one.
_MAX_MESSAGE_BYTES = 1024


def to_status(error: TurretError | AdapterError) -> status_pb2.Status:
    """The status of an error, without the id of its call."""
    metadata = error.metadata if isinstance(error, TurretError) else {}
    details = [_packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN, metadata=metadata))]
    if error.retry_after is not None:
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
    """A header that is too long is lost as a whole. File names may be invalid UTF-8."""
    encoded = message.encode(errors="backslashreplace")
    cut = encoded[:_MAX_MESSAGE_BYTES].decode(errors="ignore")
    return cut if len(encoded) <= _MAX_MESSAGE_BYTES else f"{cut} …"


def end_with(context: Any, error: Exception) -> None:
    """End the call with the error's status when its handler returns.

    Not with `context.abort`: gRPC keeps the exception that this raises with the call, and the frames of its
    traceback keep the call, so that neither is ever freed, nor the request.

    Raises:
        CancelledError: the client has gone, and nobody reads a status.
    """
    if isinstance(error, grpc.aio.AbortError):
        # Raised by the health service, which has set the status.
        error.__traceback__ = error.__context__ = None
        return
    if isinstance(error, grpc.aio.BaseError):
        # A response could not be written. gRPC would try to send a status, and log that as an error.
        raise asyncio.CancelledError from error
    if isinstance(error, TurretError | AdapterError):
        status = to_status(error)
    else:
        log.error("a call failed", exc_info=error)
        status = status_pb2.Status(
            code=code_pb2.INTERNAL, message="internal error; the server's log says more"
        )
    status.details.append(_packed(error_details_pb2.RequestInfo(request_id=request_id())))
    answer = rpc_status.to_status(status)
    context.set_trailing_metadata((*answer.trailing_metadata, (REQUEST_ID, request_id())))
    context.set_code(answer.code)
    context.set_details(answer.details)
