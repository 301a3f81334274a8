"""What can be wrong with an adapter that somebody hands in.

AdapterError
├── AdapterNotFoundError  NOT_FOUND            ADAPTER_NOT_FOUND         no adapter has that name
├── AdapterTaskError      INVALID_ARGUMENT     ADAPTER_TASK              the task is missing or not its own
├── AdapterCompositionError  INVALID_ARGUMENT  ADAPTER_COMPOSITION       these cannot be in one request
├── AdapterSourceError    NOT_FOUND            ADAPTER_SOURCE_NOT_FOUND  there is none at that place
├── AdapterFormatError    INVALID_ARGUMENT     ADAPTER_INVALID           broken, or not served
└── AdapterBaseError      FAILED_PRECONDITION  ADAPTER_BASE_MISMATCH     made for another base model

Each class carries a stable reason and the name of a gRPC code.
"""

from __future__ import annotations

from typing import ClassVar


class AdapterError(ValueError):
    """An adapter cannot be used. The message is one sentence that says what was expected and found."""

    reason: ClassVar[str]
    code: ClassVar[str]


class AdapterNotFoundError(AdapterError):
    """No adapter of that name is loaded. `why` may tell of places on the server's disk: it is for those who
    may load the adapter.
    """

    reason = "ADAPTER_NOT_FOUND"
    code = "NOT_FOUND"

    def __init__(self, message: str, *, name: str = "", why: str = "") -> None:
        super().__init__(f"{message}: {why}" if why else message)
        self.message = message
        self.name = name
        self.why = why


class AdapterTaskError(AdapterError):
    """A multitask adapter was named without a task of its own, or another one with a task."""

    reason = "ADAPTER_TASK"
    code = "INVALID_ARGUMENT"


class AdapterCompositionError(AdapterError):
    """These adapters cannot be in one request."""

    reason = "ADAPTER_COMPOSITION"
    code = "INVALID_ARGUMENT"


class AdapterSourceError(AdapterError):
    """There is no adapter at that place."""

    reason = "ADAPTER_SOURCE_NOT_FOUND"
    code = "NOT_FOUND"


class AdapterFormatError(AdapterError):
    """The files are broken, or hold something that is not served."""

    reason = "ADAPTER_INVALID"
    code = "INVALID_ARGUMENT"


class AdapterBaseError(AdapterError):
    """The files are sound but made for another base model."""

    reason = "ADAPTER_BASE_MISMATCH"
    code = "FAILED_PRECONDITION"
