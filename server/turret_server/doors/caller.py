"""The header of a call, whatever door it comes through: its id, by which client, logs and usage log mean the
same call, and its caller.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable
from contextvars import ContextVar

from turret_server import logs
from turret_server.errors import InvalidRequestError
from turret_server.tenancy.auth import Authenticator, Caller, CallHeader
from turret_server.tenancy.tenants import TenantTable

REQUEST_ID = "x-request-id"

_ID = re.compile(r"[A-Za-z0-9._:/=+@-]{1,128}")

_request_id: ContextVar[str] = ContextVar("turret_request_id")
_caller: ContextVar[Caller] = ContextVar("turret_caller")


def request_id() -> str:
    """The id of the call that runs now."""
    return _request_id.get()


def bind_request_id(metadata: Iterable[tuple[str, str | bytes]], return_it: Callable[[str], object]) -> str:
    """Give the call its id: the client's, or a new one. Log lines have it, and `return_it` puts it into the
    answer.

    Raises:
        InvalidRequestError: the client's id is invalid; the call has a new one.
    """
    sent = [str(value) for key, value in metadata if key == REQUEST_ID]
    valid = len(sent) == 1 and _ID.fullmatch(sent[0])
    found = sent[0] if valid else uuid.uuid4().hex
    _request_id.set(found)
    logs.bind(request_id=found)
    return_it(found)
    if sent and not valid:
        raise InvalidRequestError(
            f"{REQUEST_ID} is given once, as 1 to 128 of the characters a-z A-Z 0-9 and ._:/=+@-; found "
            "another form",
            field=REQUEST_ID,
        )
    return found


def caller() -> Caller:
    """The caller of the call that runs now. Without authentication this fails, and the call with it."""
    return _caller.get()


class CallAuthentication:
    """Authenticates one call when it begins, and again after the tenants file has changed."""

    def __init__(self, authenticator: Authenticator, header: CallHeader) -> None:
        self._authenticator = authenticator
        self._header = header
        self._version: TenantTable | None = None

    async def renew(self) -> None:
        """Set the caller for the task of this call, unless it is set and still valid.

        Raises:
            UnauthenticatedError, AuthUnavailableError, InvalidRequestError: see `Authenticator.authenticate`.
        """
        version = self._authenticator.version
        if version is self._version:
            return
        found = await self._authenticator.authenticate(self._header)
        _caller.set(found)
        logs.bind(tenant=found.tenant.name)
        self._version = version
