"""Authentication: which tenant makes a call, whatever door it comes through.

The operator's hook decides first, then an API key, then a client certificate. On an open server the call
names its tenant itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turret_server.engine.request import DEFAULT_TENANT
from turret_server.errors import InvalidRequestError, UnauthenticatedError
from turret_server.tenancy.auth_hook import AuthHook
from turret_server.tenancy.tenants import Tenant, TenantTable, check_name
from turret_server.tenancy.tenants_file import TenantsFile

_SCHEME = "bearer"
_TENANT_KEY = "turret-tenant"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallHeader:
    """What a door knows of a call before its body is read.

    `metadata` are its header fields with lower-case names; `identities` the names in the client certificate
    that the transport verified.
    """

    request_id: str
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    identities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """An authenticated call: its tenant, with permissions and limits, and what logs and traces say of it."""

    tenant: Tenant
    request_id: str
    metadata: tuple[tuple[str, str | bytes], ...] = ()


class Authenticator:
    """Turns the header of a call into a `Caller`. `on_failure` is called with each refusal."""

    def __init__(
        self, tenants: TenantsFile, hook: AuthHook | None, on_failure: Callable[[UnauthenticatedError], None]
    ) -> None:
        self._tenants = tenants
        self._hook = hook
        self._on_failure = on_failure

    @property
    def version(self) -> TenantTable:
        """Another object after the tenants file has changed: long calls are then authenticated again."""
        return self._tenants.table

    async def authenticate(self, header: CallHeader) -> Caller:
        """Authenticate a call.

        Raises:
            UnauthenticatedError: the credentials are missing, wrong, or of another tenant than the call
                names.
            AuthUnavailableError: the hook failed.
            InvalidRequestError: the call names an invalid tenant.
        """
        table = self._tenants.table
        try:
            named = await self._hook.ask(header.metadata, header.identities) if self._hook else None
            tenant = tenant_of(table, header.metadata, header.identities, named)
        except UnauthenticatedError as error:
            self._on_failure(error)
            raise
        return Caller(tenant=tenant, request_id=header.request_id, metadata=header.metadata)


def tenant_of(
    tenants: TenantTable,
    metadata: Sequence[tuple[str, str | bytes]],
    identities: Sequence[str] = (),
    named: str | None = None,
) -> Tenant:
    """The tenant of a call with this metadata and these certificate names. `named` is the hook's answer,
    which overrides both.

    Refusals read the same whether the named tenant exists or not.

    Raises:
        UnauthenticatedError: the credentials are missing, wrong, or of another tenant than the call names.
        InvalidRequestError: the call names an invalid tenant.
    """
    claimed = claimed_tenant(metadata)
    if named is not None:
        if claimed not in (None, named):
            raise UnauthenticatedError(
                f"the metadata {_TENANT_KEY} names another tenant than the one that was authenticated; "
                "leave it out",
                cause="mismatch",
            )
        return tenants.by_name(named)
    if tenants.is_open:
        return tenants.unproven(claimed or DEFAULT_TENANT)
    key, by_identity = _key(metadata), tenants.by_identities(identities)
    found = by_identity if key is None else tenants.by_key(key)
    if found is None and key is None:
        raise UnauthenticatedError(
            'an API key is required: send "authorization: Bearer KEY" as metadata or header '
            "(the client's api_key, or TURRET_API_KEY)",
            cause="no_key",
        )
    if found is None:
        raise UnauthenticatedError("invalid API key; ask the server's operator for one", cause="unknown_key")
    if by_identity not in (None, found) or claimed not in (None, found.name):
        raise UnauthenticatedError(
            f"the API key, the client certificate and the metadata {_TENANT_KEY} name different tenants; "
            "leave out those of other tenants",
            cause="mismatch",
        )
    return found


def claimed_tenant(metadata: Sequence[tuple[str, str | bytes]]) -> str | None:
    """The tenant that a call names; None if it names none.

    Raises:
        InvalidRequestError: it names several, or an invalid name.
    """
    named = {str(value) for key, value in metadata if key == _TENANT_KEY}
    if len(named) > 1:
        raise InvalidRequestError(
            f"the metadata {_TENANT_KEY} names one tenant; found {len(named)}", field=_TENANT_KEY
        )
    return check_name(named.pop(), _TENANT_KEY, "a tenant") if named else None


def _key(metadata: Sequence[tuple[str, str | bytes]]) -> str | None:
    sent = {value for name, value in metadata if name == "authorization"}
    if not sent:
        return None
    scheme, _, key = str(sent.pop()).partition(" ")
    if sent or scheme.lower() != _SCHEME or not key.strip():
        raise UnauthenticatedError(
            '"authorization" must be "Bearer KEY", once; found another form', cause="malformed"
        )
    return key.strip()
