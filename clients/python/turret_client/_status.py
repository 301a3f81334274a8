"""Conversion of gRPC statuses to the exceptions of `turret_client.errors`."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from turret_client import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLASSES = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgumentError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPreconditionError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.CANCELLED: errors.CancelledError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.INTERNAL: errors.InternalError,
}

# For statuses of gRPC itself, which have no ErrorInfo and short messages.
_TRANSPORT_MESSAGES = {
    grpc.StatusCode.UNAVAILABLE: (
        "cannot reach a Turret server at {address} ({details}); "
        "start one with `turret serve`, wait until it serves, or check the address and the TLS options"
    ),
    grpc.StatusCode.DEADLINE_EXCEEDED: "the call to {address} did not finish within the timeout",
    grpc.StatusCode.UNIMPLEMENTED: (
        "the server at {address} does not implement the call ({details}); check the address and the versions"
    ),
}
# Why there is no connection, by words of gRPC's details, which are long and say it in its own terms.
_CAUSES = {
    "Connection refused": (
        "no server listens there; start one with `turret serve`, wait until it serves, or check the address"
    ),
    "errors resolving": "the host is unknown; check the address",
    "WRONG_VERSION_NUMBER": "what listens there does not use TLS; leave the TLS options out",
    "CERTIFICATE_VERIFY_FAILED": (
        "its certificate is not trusted; name the authority that signed it in the TLS options"
    ),
    "Hostname Verification Check": (
        "its certificate is for another host; use a name in the certificate as the host of the address"
    ),
    "Expected SETTINGS frame": (
        "what listens there is no gRPC server; check the port: that of the metrics is another one"
    ),
    "Socket closed": "it closed the connection; it has ended, or requires TLS or a client certificate",
}


class _Cancellable(Protocol):
    def cancel(self) -> object: ...


@contextmanager
def call_scope(call: _Cancellable, address: str) -> Iterator[None]:
    """Raises gRPC's errors of the block as `TurretError`s and cancels the call at the end of the block.

    To cancel a finished call has no effect; one that an exception such as KeyboardInterrupt interrupts would
    go on on the server.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise _turret_error(error, address) from error
    except asyncio.CancelledError as error:
        # grpc.aio raises this also in calls that closing the client cancelled. Then the awaiting task was
        # not cancelled and must not end as if it were.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise errors.CancelledError("the client was closed", code=grpc.StatusCode.CANCELLED) from error
    finally:
        call.cancel()


def _turret_error(error: grpc.RpcError, address: str) -> errors.TurretError:
    code = error.code()
    details = error.details() or ""
    info, retry_after, request_id = _details(error)
    if info is None:
        message = _transport_message(code, address, details)
        info = error_details_pb2.ErrorInfo()
    else:
        message = details
    return _CLASSES.get(code, errors.TurretError)(
        message or code.name,
        reason=info.reason,
        metadata=info.metadata,
        code=code,
        retry_after=retry_after,
        request_id=request_id,
    )


def _transport_message(code: grpc.StatusCode, address: str, details: str) -> str:
    if code is grpc.StatusCode.UNAVAILABLE:
        for words, cause in _CAUSES.items():
            if words in details:
                return f"cannot reach a Turret server at {address}: {cause}"
    return _TRANSPORT_MESSAGES.get(code, "{details}").format(address=address, details=details)


def _details(error: grpc.RpcError) -> tuple[error_details_pb2.ErrorInfo | None, float | None, str]:
    """The server's ErrorInfo, the seconds until a retry, and the request id."""
    try:
        status = rpc_status.from_call(cast("grpc.Call", error))
    except ValueError:
        # gRPC replaced the server's status, so the details do not belong to it.
        return None, None, ""
    found, retry_after, request_id = None, None, ""
    for detail in status.details if status else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        request = error_details_pb2.RequestInfo()
        if detail.Unpack(info) and info.domain == "turret":
            found = info
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Unpack(request):
            request_id = request.request_id
    return found, retry_after, request_id
