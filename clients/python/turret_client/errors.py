"""What can go wrong between a client and a Turret server.

TurretError
├── InvalidArgumentError       INVALID_ARGUMENT     the request can never be served as it is
├── UnauthenticatedError       UNAUTHENTICATED      the server does not know whose call it is
├── PermissionDeniedError      PERMISSION_DENIED    the tenant may not do that
├── NotFoundError              NOT_FOUND            no adapter or no pinned prompt has that name
├── ResourceExhaustedError     RESOURCE_EXHAUSTED   the server is full; try again later
├── FailedPreconditionError    FAILED_PRECONDITION  this server cannot serve it
├── DeadlineExceededError      DEADLINE_EXCEEDED    the timeout passed first
├── CancelledError             CANCELLED            the call was cancelled, or its client closed
├── UnavailableError           UNAVAILABLE          no server answers at the address, or it is stopping
└── InternalError              INTERNAL             the server failed

Any other status is a plain TurretError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from collections.abc import Mapping


class TurretError(Exception):
    """A call that did not succeed.

    Attributes:
        message: What went wrong, for a person.
        reason: Stable name of the cause such as ADAPTER_NOT_FOUND; empty where the server gave none.
        metadata: The cause's details, such as the adapter's name.
        code: gRPC status code.
        retry_after: In how many seconds the server says that it may go better; None where it says nothing.
        request_id: By which the server's log knows the call, for whoever is asked about it; empty where no
            server answered.
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
    """The request can never be served as it is."""


class UnauthenticatedError(TurretError):
    """The server does not know whose call it is: the API key is missing, or none of its own."""


class PermissionDeniedError(TurretError):
    """The tenant may not do that with the adapter, or not load from there."""


class NotFoundError(TurretError):
    """No adapter, or no pinned prompt, has that name."""


class ResourceExhaustedError(TurretError):
    """The server is full, or an answer exceeds what the client receives; the message says which."""


class FailedPreconditionError(TurretError):
    """This server cannot serve the request, though another might."""


class DeadlineExceededError(TurretError):
    """The timeout passed before the server had finished."""


class CancelledError(TurretError):
    """The call was cancelled, or its client closed."""


class UnavailableError(TurretError):
    """No server answers at the address, or the one that does is stopping."""


class InternalError(TurretError):
    """The server failed."""
