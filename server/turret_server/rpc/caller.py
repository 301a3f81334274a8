"""The header of a call: its id, by which client, logs and usage log mean the same call, and its caller."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar
from typing import Any

import grpc

from turret_server import logs
from turret_server.errors import InvalidRequestError
from turret_server.tenancy.auth import Authenticator, Caller, CallHeader
from turret_server.tenancy.tenants import TenantTable

REQUEST_ID = "x-request-id"

_ID = re.compile(r"[A-Za-z0-9._:/=+@-]{1,128}")
_NAMES = ("x509_common_name", "x509_subject_alternative_name")

_request_id: ContextVar[str] = ContextVar("turret_request_id")
_caller: ContextVar[Caller] = ContextVar("turret_caller")


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


def caller() -> Caller:
    """The caller of the call that runs now. Without authentication this fails, and the call with it."""
    return _caller.get()


class CallAuthentication:
    """Authenticates one call when it begins, and again after the tenants file has changed."""

    def __init__(
        self,
        authenticator: Authenticator,
        context: grpc.aio.ServicerContext[Any, Any],
        request_id: str,
    ) -> None:
        self._authenticator = authenticator
        # The transport gives names only of certificates that it verified.
        proven = context.auth_context()
        self._header = CallHeader(
            request_id=request_id,
            metadata=tuple(context.invocation_metadata() or ()),
            identities=tuple(
                name.decode(errors="replace") for kind in _NAMES for name in proven.get(kind, ())
            ),
        )
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
