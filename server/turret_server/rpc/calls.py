"""What every call has: an id, by which its caller and the server's log mean the same one."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar
from typing import Any

from turret_server import logs
from turret_server.errors import InvalidRequestError

REQUEST_ID = "x-request-id"

_ID = re.compile(r"[A-Za-z0-9._:/=+@-]{1,128}")

_request_id: ContextVar[str] = ContextVar("turret_request_id")


def request_id() -> str:
    """Of the call that runs now."""
    return _request_id.get()


def begin(context: Any) -> None:
    """Give the call its id: the one that it brings, or one of the server's. Its answer tells it in the
    trailing metadata, and its log lines carry it.

    Raises:
        InvalidRequestError: it brings none that can be; the call has one of the server's.
    """
    sent = [value for key, value in context.invocation_metadata() or () if key == REQUEST_ID]
    valid = len(sent) == 1 and _ID.fullmatch(sent[0])
    found = sent[0] if valid else uuid.uuid4().hex
    _request_id.set(found)
    logs.bind(request_id=found)
    context.set_trailing_metadata(((REQUEST_ID, found),))
    if sent and not valid:
        raise InvalidRequestError(
            f"a request's id is one metadata {REQUEST_ID} of 1 to 128 of the characters a-z A-Z 0-9 and "
            "._:/=+@-; found another",
            field=REQUEST_ID,
        )
