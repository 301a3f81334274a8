"""Everything a user can cause, each with a stable reason and a gRPC code.

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

What is wrong with an adapter's files is `turret_adapters.errors.AdapterError`.
"""

from __future__ import annotations

from typing import ClassVar


class TurretError(Exception):
    """Something a user can cause. `metadata` travels as the metadata of google.rpc.ErrorInfo, `retry_after`,
    in seconds, as google.rpc.RetryInfo.
    """

    reason: ClassVar[str]
    code: ClassVar[str]

    retry_after: float | None = None

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidRequestError(TurretError):
    """A field of the request has a value that it cannot have."""

    reason = "INVALID_REQUEST"
    code = "INVALID_ARGUMENT"


class UnauthenticatedError(TurretError):
    """Nobody knows whose call it is."""

    reason = "UNAUTHENTICATED"
    code = "UNAUTHENTICATED"


class AuthUnavailableError(TurretError):
    """Whose call it is cannot be found out now."""

    reason = "AUTH_UNAVAILABLE"
    code = "UNAVAILABLE"
    retry_after = 1.0


class PermissionDeniedError(TurretError):
    """The tenant may see the adapter, but not do that with it."""

    reason = "PERMISSION_DENIED"
    code = "PERMISSION_DENIED"


class PromptTooLongError(TurretError):
    """Prompt and tokens to generate do not fit into the model's context."""

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
    """As much of the tenant waits as may. `retry_after` is in seconds."""

    reason = "QUEUE_FULL"
    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after: float, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_after = retry_after


class QuotaExceededError(TurretError):
    """The tenant has as much as it may. `retry_after` is in seconds; None where waiting does not help."""

    reason = "QUOTA_EXCEEDED"
    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after: float | None = None, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_after = retry_after


class TooManyCallsError(TurretError):
    """As many calls of this kind run, or wait, as may."""

    reason = "TOO_MANY_CALLS"
    code = "RESOURCE_EXHAUSTED"


class SlowWatcherError(TurretError):
    """Who watches takes changes slower than they come, and would miss some."""

    reason = "SLOW_WATCHER"
    code = "RESOURCE_EXHAUSTED"


class DeadlineError(TurretError):
    """The request's deadline passed before it finished."""

    reason = "DEADLINE_EXCEEDED"
    code = "DEADLINE_EXCEEDED"


class ShuttingDownError(TurretError):
    """The server is about to stop."""

    reason = "SHUTTING_DOWN"
    code = "UNAVAILABLE"
    # Elsewhere it can be tried at once. Where there is no other server, this one may be back by then.
    retry_after = 1.0


class UsageLogFailedError(TurretError):
    """What is used cannot be written down now, and nothing is given away."""

    reason = "USAGE_LOG_FAILED"
    code = "UNAVAILABLE"
    retry_after = 1.0


class GenerationFailedError(TurretError):
    """A step failed for this request; the others went on."""

    reason = "GENERATION_FAILED"
    code = "INTERNAL"


class NonFiniteLogitsError(TurretError):
    """Numbers of the request grew beyond the dtype: with these adapters it cannot be answered."""

    reason = "NON_FINITE_LOGITS"
    code = "FAILED_PRECONDITION"


class OutOfMemoryError(TurretError):
    """The device has no memory to compute the request, even alone."""

    reason = "OUT_OF_MEMORY"
    code = "RESOURCE_EXHAUSTED"


class AdapterUnavailableError(TurretError):
    """The adapter was loaded, but cannot be brought into the arena now."""

    reason = "ADAPTER_UNAVAILABLE"
    code = "FAILED_PRECONDITION"


class UnsupportedModelError(TurretError):
    """The base model would not be computed exactly, or not at all."""

    reason = "UNSUPPORTED_MODEL"
    code = "FAILED_PRECONDITION"


class ConfigError(TurretError):
    """A setting of the server has a value that it cannot have."""

    reason = "INVALID_CONFIG"
    code = "INVALID_ARGUMENT"
