"""Errors that a user can cause, each with a stable reason, a gRPC code and an HTTP status.

TurretError
├── InvalidRequestError       INVALID_ARGUMENT     400  INVALID_REQUEST
├── BodyTooLargeError         INVALID_ARGUMENT     413  BODY_TOO_LARGE
├── UnauthenticatedError      UNAUTHENTICATED      401  UNAUTHENTICATED
├── AuthUnavailableError      UNAVAILABLE          503  AUTH_UNAVAILABLE
├── PermissionDeniedError     PERMISSION_DENIED    403  PERMISSION_DENIED
├── PromptTooLongError        INVALID_ARGUMENT     400  PROMPT_TOO_LONG
├── ChatTemplateError         INVALID_ARGUMENT     400  CHAT_TEMPLATE
├── NoChatTemplateError       FAILED_PRECONDITION  422  NO_CHAT_TEMPLATE
├── PromptNotFoundError       NOT_FOUND            404  PROMPT_NOT_FOUND
├── AdapterTooLargeError      FAILED_PRECONDITION  422  ADAPTER_TOO_LARGE
├── RequestTooLargeError      FAILED_PRECONDITION  422  REQUEST_TOO_LARGE
├── UnsupportedTaskError      FAILED_PRECONDITION  422  UNSUPPORTED_TASK
├── QueueFullError            RESOURCE_EXHAUSTED   429  QUEUE_FULL
├── QuotaExceededError        RESOURCE_EXHAUSTED   429  QUOTA_EXCEEDED
├── TooManyCallsError         RESOURCE_EXHAUSTED   429  TOO_MANY_CALLS
├── SlowWatcherError          RESOURCE_EXHAUSTED   429  SLOW_WATCHER
├── DeadlineError             DEADLINE_EXCEEDED    408  DEADLINE_EXCEEDED
├── ShuttingDownError         UNAVAILABLE          503  SHUTTING_DOWN
├── UsageLogFailedError       UNAVAILABLE          503  USAGE_LOG_FAILED
├── GenerationFailedError     INTERNAL             500  GENERATION_FAILED
├── NonFiniteLogitsError      FAILED_PRECONDITION  422  NON_FINITE_LOGITS
├── StructuredOutputError     FAILED_PRECONDITION  422  STRUCTURED_OUTPUT
├── OutOfMemoryError          RESOURCE_EXHAUSTED   503  OUT_OF_MEMORY
├── AdapterUnavailableError   FAILED_PRECONDITION  409  ADAPTER_UNAVAILABLE
├── UnsupportedModelError     FAILED_PRECONDITION  500  UNSUPPORTED_MODEL
└── ConfigError               INVALID_ARGUMENT     500  INVALID_CONFIG

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
    http_status: ClassVar[int]

    retry_after: float | None = None

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidRequestError(TurretError):
    """A field of the request has an invalid value."""

    reason = "INVALID_REQUEST"
    code = "INVALID_ARGUMENT"
    http_status = 400


class BodyTooLargeError(TurretError):
    """The body of an HTTP request is larger than any that the server needs."""

    reason = "BODY_TOO_LARGE"
    code = "INVALID_ARGUMENT"
    http_status = 413


class UnauthenticatedError(TurretError):
    """The credentials of the call are missing or wrong."""

    reason = "UNAUTHENTICATED"
    code = "UNAUTHENTICATED"
    http_status = 401


class AuthUnavailableError(TurretError):
    """The authentication hook failed."""

    reason = "AUTH_UNAVAILABLE"
    code = "UNAVAILABLE"
    http_status = 503
    retry_after = 1.0


class PermissionDeniedError(TurretError):
    """The tenant may use the adapter, but lacks the permission for this operation."""

    reason = "PERMISSION_DENIED"
    code = "PERMISSION_DENIED"
    http_status = 403


class PromptTooLongError(TurretError):
    """Prompt and tokens to generate exceed the model's context."""

    reason = "PROMPT_TOO_LONG"
    code = "INVALID_ARGUMENT"
    http_status = 400


class ChatTemplateError(TurretError):
    """The chat template refuses the chat, is wrong, or takes too much time or memory."""

    reason = "CHAT_TEMPLATE"
    code = "INVALID_ARGUMENT"
    http_status = 400


class NoChatTemplateError(TurretError):
    """Neither the model nor an adapter of the request has a chat template."""

    reason = "NO_CHAT_TEMPLATE"
    code = "FAILED_PRECONDITION"
    http_status = 422


class PromptNotFoundError(TurretError):
    """No prompt is pinned under the name."""

    reason = "PROMPT_NOT_FOUND"
    code = "NOT_FOUND"
    http_status = 404


class AdapterTooLargeError(TurretError):
    """The adapter takes more pages than the arena has."""

    reason = "ADAPTER_TOO_LARGE"
    code = "FAILED_PRECONDITION"
    http_status = 422


class RequestTooLargeError(TurretError):
    """The request and its adapter take more pages than the arena has."""

    reason = "REQUEST_TOO_LARGE"
    code = "FAILED_PRECONDITION"
    http_status = 422


class UnsupportedTaskError(TurretError):
    """The model or the adapter does not do what the request asks for."""

    reason = "UNSUPPORTED_TASK"
    code = "FAILED_PRECONDITION"
    http_status = 422


class QueueFullError(TurretError):
    """The tenant's queue is full. `retry_after` is in seconds."""

    reason = "QUEUE_FULL"
    code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, *, retry_after: float, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_after = retry_after


class QuotaExceededError(TurretError):
    """The tenant has reached a limit. `retry_after` is in seconds; None if waiting does not help."""

    reason = "QUOTA_EXCEEDED"
    code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, *, retry_after: float | None = None, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_after = retry_after


class TooManyCallsError(TurretError):
    """The server has reached its limit of calls of this kind."""

    reason = "TOO_MANY_CALLS"
    code = "RESOURCE_EXHAUSTED"
    http_status = 429
    retry_after = 1.0


class SlowWatcherError(TurretError):
    """A watcher reads changes slower than they come, and would miss some."""

    reason = "SLOW_WATCHER"
    code = "RESOURCE_EXHAUSTED"
    http_status = 429


class DeadlineError(TurretError):
    """The request's deadline passed before it finished."""

    reason = "DEADLINE_EXCEEDED"
    code = "DEADLINE_EXCEEDED"
    http_status = 408


class ShuttingDownError(TurretError):
    """The server is shutting down."""

    reason = "SHUTTING_DOWN"
    code = "UNAVAILABLE"
    http_status = 503
    # Another server can be tried at once; without one, this one may be back by then.
    retry_after = 1.0


class UsageLogFailedError(TurretError):
    """The usage log cannot be written; requests are refused until it can."""

    reason = "USAGE_LOG_FAILED"
    code = "UNAVAILABLE"
    http_status = 503
    retry_after = 1.0


class GenerationFailedError(TurretError):
    """Computing the request failed; the message says whether the whole engine did."""

    reason = "GENERATION_FAILED"
    code = "INTERNAL"
    http_status = 500


class NonFiniteLogitsError(TurretError):
    """Logits are not finite with these adapters."""

    reason = "NON_FINITE_LOGITS"
    code = "FAILED_PRECONDITION"
    http_status = 422


class StructuredOutputError(TurretError):
    """The form of an answer cannot be followed further."""

    reason = "STRUCTURED_OUTPUT"
    code = "FAILED_PRECONDITION"
    http_status = 422


class OutOfMemoryError(TurretError):
    """The device has too little memory for the request, even alone."""

    reason = "OUT_OF_MEMORY"
    code = "RESOURCE_EXHAUSTED"
    http_status = 503


class AdapterUnavailableError(TurretError):
    """The adapter is loaded, but copying it to the device failed."""

    reason = "ADAPTER_UNAVAILABLE"
    code = "FAILED_PRECONDITION"
    http_status = 409


class UnsupportedModelError(TurretError):
    """The base model would be computed inexactly, or not at all."""

    reason = "UNSUPPORTED_MODEL"
    code = "FAILED_PRECONDITION"
    http_status = 500


class ConfigError(TurretError):
    """A setting of the server is invalid."""

    reason = "INVALID_CONFIG"
    code = "INVALID_ARGUMENT"
    http_status = 500
