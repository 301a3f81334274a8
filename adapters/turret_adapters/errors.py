"""The exceptions that a user's adapter, source or store can cause.

AdapterError
├── AdapterNotFoundError    NOT_FOUND           404 ADAPTER_NOT_FOUND        no adapter has this name
├── AdapterTaskError        INVALID_ARGUMENT    400 ADAPTER_TASK             a task is missing or out of range
├── AdapterCompositionError INVALID_ARGUMENT    400 ADAPTER_COMPOSITION      these adapters do not combine
├── AdapterSourceError      NOT_FOUND           404 ADAPTER_SOURCE_NOT_FOUND no adapter at the source
├── AdapterFormatError      INVALID_ARGUMENT    422 ADAPTER_INVALID          broken or unsupported files
├── AdapterBaseError        FAILED_PRECONDITION 422 ADAPTER_BASE_MISMATCH    made for another base model
├── SourceForbiddenError    PERMISSION_DENIED   403 SOURCE_FORBIDDEN         the policy forbids the source
├── SourceTooLargeError     INVALID_ARGUMENT    413 SOURCE_TOO_LARGE         more bytes than the limit
├── SourceUnavailableError  UNAVAILABLE         503 SOURCE_UNAVAILABLE       no answer from the source in time
├── UploadError             INVALID_ARGUMENT    400 UPLOAD_INVALID           not the announced bytes
├── RevisionNotFoundError   NOT_FOUND           404 REVISION_NOT_FOUND       not in the store or the history
├── RevisionCorruptError    DATA_LOSS           500 REVISION_CORRUPT         the stored bytes have changed
├── NamesCorruptError       DATA_LOSS           500 NAMES_CORRUPT            the names' database is unreadable
├── StoreBusyError          UNAVAILABLE         503 STORE_BUSY               in use by another server or call
├── OwnerLimitError         RESOURCE_EXHAUSTED  429 QUOTA_EXCEEDED           the owner's quota is used up
├── StoreFullError          RESOURCE_EXHAUSTED  503 STORE_FULL               the disk or the budget is full
│   └── UploadsFullError                                                 other uploads take the room
└── StoreFailedError        INTERNAL            500 STORE_FAILED             the disk or its permissions

Each class has a stable reason, the name of a gRPC code, and an HTTP status.
"""

from __future__ import annotations

from typing import ClassVar


class AdapterError(ValueError):
    """An adapter is not usable. The message names the field or file, what was expected and what was found.

    `retry_after` is in seconds; None if waiting does not help.
    """

    reason: ClassVar[str]
    code: ClassVar[str]
    http_status: ClassVar[int]

    retry_after: float | None = None


class AdapterNotFoundError(AdapterError):
    """No adapter of this name is loaded.

    `why` may contain paths of the server's disk: show it only to callers who may load the adapter.
    """

    reason = "ADAPTER_NOT_FOUND"
    code = "NOT_FOUND"
    http_status = 404

    def __init__(self, message: str, *, name: str = "", why: str = "") -> None:
        super().__init__(f"{message}: {why}" if why else message)
        self.message = message
        self.name = name
        self.why = why


class AdapterTaskError(AdapterError):
    """The task of a multitask adapter is missing or out of range, or another adapter was given a task."""

    reason = "ADAPTER_TASK"
    code = "INVALID_ARGUMENT"
    http_status = 400


class AdapterCompositionError(AdapterError):
    """These adapters do not work together in one request."""

    reason = "ADAPTER_COMPOSITION"
    code = "INVALID_ARGUMENT"
    http_status = 400


class AdapterSourceError(AdapterError):
    """There is no readable adapter at the source."""

    reason = "ADAPTER_SOURCE_NOT_FOUND"
    code = "NOT_FOUND"
    http_status = 404


class AdapterFormatError(AdapterError):
    """The files are broken, or contain something that is not supported."""

    reason = "ADAPTER_INVALID"
    code = "INVALID_ARGUMENT"
    http_status = 422


class AdapterBaseError(AdapterError):
    """The files are sound but were made for another base model."""

    reason = "ADAPTER_BASE_MISMATCH"
    code = "FAILED_PRECONDITION"
    http_status = 422


class SourceForbiddenError(AdapterError):
    """The policy does not allow this source."""

    reason = "SOURCE_FORBIDDEN"
    code = "PERMISSION_DENIED"
    http_status = 403


class SourceTooLargeError(AdapterError):
    """The source has more bytes, or an archive more members, than the limit."""

    reason = "SOURCE_TOO_LARGE"
    code = "INVALID_ARGUMENT"
    http_status = 413


class SourceUnavailableError(AdapterError):
    """The source does not answer, or not in time. Retrying later may succeed."""

    reason = "SOURCE_UNAVAILABLE"
    code = "UNAVAILABLE"
    http_status = 503
    retry_after = 5.0


class UploadError(AdapterError):
    """The bytes of an upload differ from the announced ones, or do not continue where it stopped."""

    reason = "UPLOAD_INVALID"
    code = "INVALID_ARGUMENT"
    http_status = 400


class RevisionNotFoundError(AdapterError):
    """The revision does not exist, or is no longer kept."""

    reason = "REVISION_NOT_FOUND"
    code = "NOT_FOUND"
    http_status = 404


class RevisionCorruptError(AdapterError):
    """The bytes of a stored revision no longer match its digest."""

    reason = "REVISION_CORRUPT"
    code = "DATA_LOSS"
    http_status = 500


class NamesCorruptError(AdapterError):
    """The database of names is unreadable, or a newer version of Turret made it."""

    reason = "NAMES_CORRUPT"
    code = "DATA_LOSS"
    http_status = 500


class StoreBusyError(AdapterError):
    """Another server or call uses what this one needs. Retrying later may succeed."""

    reason = "STORE_BUSY"
    code = "UNAVAILABLE"
    http_status = 503
    retry_after = 1.0


class OwnerLimitError(AdapterError):
    """The owner's quota is used up; `limit` names the setting."""

    reason = "QUOTA_EXCEEDED"
    code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, *, limit: str) -> None:
        super().__init__(message)
        self.limit = limit


class StoreFullError(AdapterError):
    """The disk, its quota or the store's budget has no room."""

    reason = "STORE_FULL"
    code = "RESOURCE_EXHAUSTED"
    http_status = 503


class UploadsFullError(StoreFullError):
    """Uploads that are in progress take all of the room for uploads, and give it back at their end."""

    retry_after = 5.0


class StoreFailedError(AdapterError):
    """The store's folder is not readable or not writable."""

    reason = "STORE_FAILED"
    code = "INTERNAL"
    http_status = 500
