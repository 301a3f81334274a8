"""Authentication at the gRPC door: the header of a call becomes the `Caller` of its task."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import grpc

from turret_server import logs
from turret_server.tenancy.auth import Authenticator, Caller, CallHeader
from turret_server.tenancy.tenants import TenantTable

_NAMES = ("x509_common_name", "x509_subject_alternative_name")

_caller: ContextVar[Caller] = ContextVar("turret_caller")


def caller() -> Caller:
    """The caller of the call that runs now. Fails, and the call with it, if the call was not "
    "authenticated.
    """
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
