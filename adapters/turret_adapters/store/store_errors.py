"""What can go wrong between an adapter's source and the store.

AdapterError
├── SourceForbiddenError    PERMISSION_DENIED   SOURCE_FORBIDDEN    the policy does not let it be read
├── SourceTooLargeError     INVALID_ARGUMENT    SOURCE_TOO_LARGE    more bytes than are taken
├── SourceUnavailableError  UNAVAILABLE         SOURCE_UNAVAILABLE  no answer, or none in time
├── UploadError             INVALID_ARGUMENT    UPLOAD_INVALID      not the bytes that were announced
├── RevisionNotFoundError   NOT_FOUND           REVISION_NOT_FOUND  the store or the history has none such
├── RevisionCorruptError    DATA_LOSS           REVISION_CORRUPT    the stored bytes have changed
├── NamesCorruptError       DATA_LOSS           NAMES_CORRUPT       the database of names cannot be read
├── StoreBusyError          UNAVAILABLE         STORE_BUSY          somebody else is at it
├── OwnerLimitError         RESOURCE_EXHAUSTED  QUOTA_EXCEEDED      its owner has as much as they may
├── StoreFullError          RESOURCE_EXHAUSTED  STORE_FULL          no room on the disk or in the budget
└── StoreFailedError        INTERNAL            STORE_FAILED        the disk or its permissions
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from turret_adapters.errors import AdapterError


class SourceForbiddenError(AdapterError):
    """The policy allows no adapter from there."""

    reason = "SOURCE_FORBIDDEN"
    code = "PERMISSION_DENIED"


class SourceTooLargeError(AdapterError):
    """The source holds more bytes, or an archive more members, than are taken."""

    reason = "SOURCE_TOO_LARGE"
    code = "INVALID_ARGUMENT"


class SourceUnavailableError(AdapterError):
    """The source does not answer, or not in time; a later try may succeed."""

    reason = "SOURCE_UNAVAILABLE"
    code = "UNAVAILABLE"


class UploadError(AdapterError):
    """An upload's bytes are not those that were announced, or not where they go on."""

    reason = "UPLOAD_INVALID"
    code = "INVALID_ARGUMENT"


class RevisionNotFoundError(AdapterError):
    """There is no such revision, or it is no longer kept."""

    reason = "REVISION_NOT_FOUND"
    code = "NOT_FOUND"


class RevisionCorruptError(AdapterError):
    """A stored revision no longer has the bytes that it is named after."""

    reason = "REVISION_CORRUPT"
    code = "DATA_LOSS"


class NamesCorruptError(AdapterError):
    """The database of names cannot be read, or another version of Turret made it."""

    reason = "NAMES_CORRUPT"
    code = "DATA_LOSS"


class StoreBusyError(AdapterError):
    """Another call or process is using what this one needs; a later try may succeed."""

    reason = "STORE_BUSY"
    code = "UNAVAILABLE"


class OwnerLimitError(AdapterError):
    """Its owner has as much as they may; `limit` says of what."""

    reason = "QUOTA_EXCEEDED"
    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, limit: str) -> None:
        super().__init__(message)
        self.limit = limit


class StoreFullError(AdapterError):
    """The disk, its quota or the store's budget has no room for it."""

    reason = "STORE_FULL"
    code = "RESOURCE_EXHAUSTED"


class StoreFailedError(AdapterError):
    """The store's folder cannot be read or written."""

    reason = "STORE_FAILED"
    code = "INTERNAL"


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def errors_of_the_store(root: Path) -> Iterator[None]:
    """Tells what the system reports of the store's own files as an `AdapterError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StoreFullError(
                f"store {str(root)!r}: {str(error.strerror).lower()} "
                "(free some space, lower the store's budget, or unload adapters)"
            ) from error
        raise StoreFailedError(
            f"store {str(root)!r}: {str(error.strerror or error).lower()} "
            "(the server must be able to write in that folder)"
        ) from error
