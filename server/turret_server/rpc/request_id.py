"""The id by which the client, the server's log and the usage log mean the same call."""

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
    """The id of the call that runs now."""
    return _request_id.get()


def bind_request_id(context: Any) -> str:
    """Give the call its id: the client's, or a new one. The answer has it in the trailing metadata, and log
    lines have it.

    Raises:
        InvalidRequestError: the client's id is invalid; the call has a new one.
    """
    sent = [value for key, value in context.invocation_metadata() or () if key == REQUEST_ID]
    valid = len(sent) == 1 and _ID.fullmatch(sent[0])
    found = sent[0] if valid else uuid.uuid4().hex
    _request_id.set(found)
    logs.bind(request_id=found)
    context.set_trailing_metadata(((REQUEST_ID, found),))
    if sent and not valid:
        raise InvalidRequestError(
            f"{REQUEST_ID} is one metadata of 1 to 128 of the characters a-z A-Z 0-9 and ._:/=+@-; found "
            "another form",
            field=REQUEST_ID,
        )
    return str(found)
