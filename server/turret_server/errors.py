"""Errors that a user can cause, each with a stable reason and a gRPC code.

TurretError
├── InvalidRequestError       INVALID_ARGUMENT     INVALID_REQUEST
├── UnauthenticatedError      UNAUTHENTICATED      UNAUTHENTICATED
├── AuthUnavailableError      UNAVAILABLE          AUTH_UNAVAILABLE
├── PermissionDeniedError     PERMISSION_DENIED    PERMISSION_DENIED
├── PromptTooLongError        INVALID_ARGUMENT     PROMPT_TOO_LONG
├── PromptNotFoundError       NOT_FOUND            PROMPT_NOT_FOUND
├── AdapterTooLargeError      FAILED_PRECONDITION  ADAPTER_TOO_LARGE
├── RequestTooLargeError      FAILED_PRECONDITION  REQUEST_TOO_LARGE
├── QueueFullError            RESOURCE_EXHAUSTED   QUEUE_FULL
├── QuotaExceededError        RESOURCE_EXHAUSTED   QUOTA_EXCEEDED
├── TooManyCallsError         RESOURCE_EXHAUSTED   TOO_MANY_CALLS
├── SlowWatcherError          RESOURCE_EXHAUSTED   SLOW_WATCHER
├── DeadlineError             DEADLINE_EXCEEDED    DEADLINE_EXCEEDED
├── ShuttingDownError         UNAVAILABLE          SHUTTING_DOWN
├── UsageLogFailedError       UNAVAILABLE          USAGE_LOG_FAILED
├── GenerationFailedError     INTERNAL             GENERATION_FAILED
├── NonFiniteLogitsError      FAILED_PRECONDITION  NON_FINITE_LOGITS
├── OutOfMemoryError          RESOURCE_EXHAUSTED   OUT_OF_MEMORY
├── AdapterUnavailableError   FAILED_PRECONDITION  ADAPTER_UNAVAILABLE
├── UnsupportedModelError     FAILED_PRECONDITION  UNSUPPORTED_MODEL
└── ConfigError               INVALID_ARGUMENT     INVALID_CONFIG

Errors of adapters and their files are `turret_adapters.errors.AdapterError`.
"""

from __future__ import annotations

from typing import ClassVar


class TurretError(Exception):
    """An error that a user can cause. `metadata` becomes that of google.rpc.ErrorInfo, `retry_after`, in
    seconds, google.rpc.RetryInfo.
    """

    reason: ClassVar[str]
    code: ClassVar[str]

    retry_after: float | None = None

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidRequestError(TurretError):
    """A field of the request has an invalid value."""

    reason = "INVALID_REQUEST"
    code = "INVALID_ARGUMENT"


class UnauthenticatedError(TurretError):
    """The credentials of the call are missing or wrong."""

    reason = "UNAUTHENTICATED"
    code = "UNAUTHENTICATED"


class AuthUnavailableError(TurretError):
    """The authentication hook failed."""

    reason = "AUTH_UNAVAILABLE"
    code = "UNAVAILABLE"
    retry_after = 1.0


class PermissionDeniedError(TurretError):
    """The tenant may use the adapter, but lacks the permission for this operation."""

    reason = "PERMISSION_DENIED"
    code = "PERMISSION_DENIED"


class PromptTooLongError(TurretError):
    """Prompt and tokens to generate exceed the model's context."""

    reason = "PROMPT_TOO_LONG"
    code = "INVALID_ARGUMENT"


class PromptNotFoundError(TurretError):
    """No prompt is pinned under the name."""

    reason = "PROMPT_NOT_FOUND"
    code = "NOT_FOUND"


class AdapterTooLargeError(TurretError):
    """The adapter takes more pages than the arena has."""

    reason = "ADAPTER_TOO_LARGE"
    code = "FAILED_PRECONDITION"


class RequestTooLargeError(TurretError):
    """The request and its adapter take more pages than the arena has."""

    reason = "REQUEST_TOO_LARGE"
    code = "FAILED_PRECONDITION"


class QueueFullError(TurretError):
    """The tenant's queue is full. `retry_after` is in seconds."""

    reason = "QUEUE_FULL"
    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after: float, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_after = retry_after


class QuotaExceededError(TurretError):
    """The tenant has reached a limit. `retry_after` is in seconds; None if waiting does not help."""

    reason = "QUOTA_EXCEEDED"
    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after: float | None = None, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_after = retry_after


class TooManyCallsError(TurretError):
    """The server has reached its limit of calls of this kind."""

    reason = "TOO_MANY_CALLS"
    code = "RESOURCE_EXHAUSTED"
    retry_after = 1.0


class SlowWatcherError(TurretError):
    """A watcher reads changes slower than they come, and would miss some."""

    reason = "SLOW_WATCHER"
    code = "RESOURCE_EXHAUSTED"


class DeadlineError(TurretError):
    """The request's deadline passed before it finished."""

    reason = "DEADLINE_EXCEEDED"
    code = "DEADLINE_EXCEEDED"


class ShuttingDownError(TurretError):
    """The server is shutting down."""

    reason = "SHUTTING_DOWN"
    code = "UNAVAILABLE"
    # Another server can be tried at once; without one, this one may be back by then.
    retry_after = 1.0


class UsageLogFailedError(TurretError):
    """The usage log cannot be written; requests are refused until it can."""

    reason = "USAGE_LOG_FAILED"
    code = "UNAVAILABLE"
    retry_after = 1.0


class GenerationFailedError(TurretError):
    """Computing the request failed; the message says whether the whole engine did."""

    reason = "GENERATION_FAILED"
    code = "INTERNAL"


class NonFiniteLogitsError(TurretError):
    """Logits are not finite with these adapters."""

    reason = "NON_FINITE_LOGITS"
    code = "FAILED_PRECONDITION"


class OutOfMemoryError(TurretError):
    """The device has too little memory for the request, even alone."""

    reason = "OUT_OF_MEMORY"
    code = "RESOURCE_EXHAUSTED"


class AdapterUnavailableError(TurretError):
    """The adapter is loaded, but copying it to the device failed."""

    reason = "ADAPTER_UNAVAILABLE"
    code = "FAILED_PRECONDITION"


class UnsupportedModelError(TurretError):
    """The base model would be computed inexactly, or not at all."""

    reason = "UNSUPPORTED_MODEL"
    code = "FAILED_PRECONDITION"


class ConfigError(TurretError):
    """A setting of the server is invalid."""

    reason = "INVALID_CONFIG"
    code = "INVALID_ARGUMENT"
