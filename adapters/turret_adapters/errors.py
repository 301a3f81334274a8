"""The exceptions that a user's adapter, source or store can cause.

AdapterError
├── AdapterNotFoundError    NOT_FOUND           ADAPTER_NOT_FOUND        no adapter has this name
├── AdapterTaskError        INVALID_ARGUMENT    ADAPTER_TASK             the task is missing or out of range
├── AdapterCompositionError INVALID_ARGUMENT    ADAPTER_COMPOSITION      these adapters do not combine
├── AdapterSourceError      NOT_FOUND           ADAPTER_SOURCE_NOT_FOUND no adapter at the source
├── AdapterFormatError      INVALID_ARGUMENT    ADAPTER_INVALID          broken files or unsupported content
├── AdapterBaseError        FAILED_PRECONDITION ADAPTER_BASE_MISMATCH    made for another base model
├── SourceForbiddenError    PERMISSION_DENIED   SOURCE_FORBIDDEN         the policy does not allow the source
├── SourceTooLargeError     INVALID_ARGUMENT    SOURCE_TOO_LARGE         more bytes than the limit
├── SourceUnavailableError  UNAVAILABLE         SOURCE_UNAVAILABLE       the source does not answer in time
├── UploadError             INVALID_ARGUMENT    UPLOAD_INVALID           not the announced bytes
├── RevisionNotFoundError   NOT_FOUND           REVISION_NOT_FOUND       not in the store or the history
├── RevisionCorruptError    DATA_LOSS           REVISION_CORRUPT         the stored bytes have changed
├── NamesCorruptError       DATA_LOSS           NAMES_CORRUPT            the database of names is unreadable
├── StoreBusyError          UNAVAILABLE         STORE_BUSY               in use by another server or call
├── OwnerLimitError         RESOURCE_EXHAUSTED  QUOTA_EXCEEDED           the owner's quota is used up
├── StoreFullError          RESOURCE_EXHAUSTED  STORE_FULL               the disk or the budget is full
│   └── UploadsFullError                                                 other uploads take the room
└── StoreFailedError        INTERNAL            STORE_FAILED             the disk failed, or its permissions

Each class has a stable reason and the name of a gRPC code.
"""

from __future__ import annotations

from typing import ClassVar


class AdapterError(ValueError):
    """An adapter is not usable. The message names the field or file, what was expected and what was found.

    `retry_after` is in seconds; None if waiting does not help.
    """

    reason: ClassVar[str]
    code: ClassVar[str]

    retry_after: float | None = None


class AdapterNotFoundError(AdapterError):
    """No adapter of this name is loaded.

    `why` may contain paths of the server's disk: show it only to callers who may load the adapter.
    """

    reason = "ADAPTER_NOT_FOUND"
    code = "NOT_FOUND"

    def __init__(self, message: str, *, name: str = "", why: str = "") -> None:
        super().__init__(f"{message}: {why}" if why else message)
        self.message = message
        self.name = name
        self.why = why


class AdapterTaskError(AdapterError):
    """The task of a multitask adapter is missing or out of range, or another adapter was given a task."""

    reason = "ADAPTER_TASK"
    code = "INVALID_ARGUMENT"


class AdapterCompositionError(AdapterError):
    """These adapters do not work together in one request."""

    reason = "ADAPTER_COMPOSITION"
    code = "INVALID_ARGUMENT"


class AdapterSourceError(AdapterError):
    """There is no readable adapter at the source."""

    reason = "ADAPTER_SOURCE_NOT_FOUND"
    code = "NOT_FOUND"


class AdapterFormatError(AdapterError):
    """The files are broken, or contain something that is not supported."""

    reason = "ADAPTER_INVALID"
    code = "INVALID_ARGUMENT"


class AdapterBaseError(AdapterError):
    """The files are sound but were made for another base model."""

    reason = "ADAPTER_BASE_MISMATCH"
    code = "FAILED_PRECONDITION"


class SourceForbiddenError(AdapterError):
    """The policy does not allow this source."""

    reason = "SOURCE_FORBIDDEN"
    code = "PERMISSION_DENIED"


class SourceTooLargeError(AdapterError):
    """The source has more bytes, or an archive more members, than the limit."""

    reason = "SOURCE_TOO_LARGE"
    code = "INVALID_ARGUMENT"


class SourceUnavailableError(AdapterError):
    """The source does not answer, or not in time. Retrying later may succeed."""

    reason = "SOURCE_UNAVAILABLE"
    code = "UNAVAILABLE"
    retry_after = 5.0


class UploadError(AdapterError):
    """The bytes of an upload differ from the announced ones, or do not continue where it stopped."""

    reason = "UPLOAD_INVALID"
    code = "INVALID_ARGUMENT"


class RevisionNotFoundError(AdapterError):
    """The revision does not exist, or is no longer kept."""

    reason = "REVISION_NOT_FOUND"
    code = "NOT_FOUND"


class RevisionCorruptError(AdapterError):
    """The bytes of a stored revision no longer match its digest."""

    reason = "REVISION_CORRUPT"
    code = "DATA_LOSS"


class NamesCorruptError(AdapterError):
    """The database of names is unreadable, or a newer version of Turret made it."""

    reason = "NAMES_CORRUPT"
    code = "DATA_LOSS"


class StoreBusyError(AdapterError):
    """Another server or call uses what this one needs. Retrying later may succeed."""

    reason = "STORE_BUSY"
    code = "UNAVAILABLE"
    retry_after = 1.0


class OwnerLimitError(AdapterError):
    """The owner's quota is used up; `limit` names the setting."""

    reason = "QUOTA_EXCEEDED"
    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, limit: str) -> None:
        super().__init__(message)
        self.limit = limit


class StoreFullError(AdapterError):
    """The disk, its quota or the store's budget has no room."""

    reason = "STORE_FULL"
    code = "RESOURCE_EXHAUSTED"


class UploadsFullError(StoreFullError):
    """Uploads that are in progress take all of the room for uploads, and give it back at their end."""

    retry_after = 5.0


class StoreFailedError(AdapterError):
    """The store's folder is not readable or not writable."""

    reason = "STORE_FAILED"
    code = "INTERNAL"
