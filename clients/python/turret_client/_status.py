"""From gRPC statuses to the exceptions of `turret_client.errors`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

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

# Statuses that gRPC itself makes say little to a person. Those of the server carry an ErrorInfo and
# speak for themselves.
_TRANSPORT_MESSAGES = {
    grpc.StatusCode.UNAVAILABLE: (
        "cannot reach a Turret server at {address} ({details}); "
        "start one with `turret serve`, or check the address of the one that runs"
    ),
    grpc.StatusCode.DEADLINE_EXCEEDED: "the server at {address} did not finish within the timeout",
    grpc.StatusCode.UNIMPLEMENTED: "the server at {address} does not speak turret.v1 ({details})",
}


@contextmanager
def raising_turret_errors(address: str) -> Iterator[None]:
    """Raises gRPC's errors of the block as `TurretError`s."""
    try:
        yield
    except grpc.RpcError as error:
        raise _turret_error(error, address) from error


def _turret_error(error: grpc.RpcError, address: str) -> errors.TurretError:
    code = error.code()
    details = error.details() or ""
    info, retry_after, request_id = _details(error)
    if info is None:
        template = _TRANSPORT_MESSAGES.get(code, "{details}")
        message = template.format(address=address, details=details)
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


def _details(error: grpc.RpcError) -> tuple[error_details_pb2.ErrorInfo | None, float | None, str]:
    """What the server said of the cause, in how many seconds to try again, and how it calls the call."""
    try:
        status = rpc_status.from_call(cast("grpc.Call", error))
    except ValueError:
        # The transport gave the call another status than the server did: the details are not its own.
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
