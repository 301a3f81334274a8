"""Errors of calls to a Turret server.

TurretError
├── InvalidArgumentError       INVALID_ARGUMENT     the request is invalid; do not retry it unchanged
├── UnauthenticatedError       UNAUTHENTICATED      the API key is missing or invalid
├── PermissionDeniedError      PERMISSION_DENIED    the tenant lacks the permission
├── NotFoundError              NOT_FOUND            no such adapter or pinned prompt
├── ResourceExhaustedError     RESOURCE_EXHAUSTED   a queue, quota or store is full; retry later
├── FailedPreconditionError    FAILED_PRECONDITION  this server's model or memory does not allow it
├── DeadlineExceededError      DEADLINE_EXCEEDED    the timeout passed
├── CancelledError             CANCELLED            the call was cancelled, or the client closed
├── UnavailableError           UNAVAILABLE          the server cannot be reached, or is shutting down
└── InternalError              INTERNAL             the server failed

Every other status is a plain TurretError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from collections.abc import Mapping


class TurretError(Exception):
    """A failed call.

    Attributes:
        message: Description of the error.
        reason: Stable name of the cause, such as ADAPTER_NOT_FOUND; empty if the server gave none.
        metadata: Details of the cause, such as the adapter's name.
        code: gRPC status code.
        retry_after: Seconds after which the server suggests a retry; None if it does not suggest one.
        request_id: Id of the call in the server's log; empty if no server answered.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.code = code
        self.retry_after = retry_after
        self.request_id = request_id


class InvalidArgumentError(TurretError):
    """The request, or an argument of the client, is invalid; a retry without changes fails again."""


def invalid_argument(field: str, message: str) -> InvalidArgumentError:
    """The error for an argument that the client finds invalid, like that of a server."""
    return InvalidArgumentError(
        message,
        reason="INVALID_REQUEST",
        metadata={"field": field},
        code=grpc.StatusCode.INVALID_ARGUMENT,
    )


class UnauthenticatedError(TurretError):
    """The API key is missing or invalid."""


class PermissionDeniedError(TurretError):
    """The tenant lacks the permission for the adapter or its source."""


class NotFoundError(TurretError):
    """No adapter or pinned prompt has the name."""


class ResourceExhaustedError(TurretError):
    """A queue, quota or store is full, or the answer exceeds the client's message limit."""


class FailedPreconditionError(TurretError):
    """This server's model, memory or configuration does not allow the request."""


class DeadlineExceededError(TurretError):
    """The timeout passed before the call finished."""


class CancelledError(TurretError):
    """The call was cancelled, or the client closed."""


class UnavailableError(TurretError):
    """The server cannot be reached, or is shutting down."""


class InternalError(TurretError):
    """The server failed."""
