"""Who calls: as the operator's hook says, by an API key, by a client's certificate, or, where the server is
open, by saying so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import grpc

from turret_server import logs
from turret_server.engine.request import DEFAULT_TENANT
from turret_server.errors import UnauthenticatedError
from turret_server.serving.validation import named_tenant
from turret_server.tenancy.auth_hook import AuthHook
from turret_server.tenancy.tenants import Tenant, TenantTable
from turret_server.tenancy.tenants_file import TenantsFile

_SCHEME = "bearer"
_NAMES = ("x509_common_name", "x509_subject_alternative_name")

_caller: ContextVar[Tenant] = ContextVar("turret_caller")


def caller() -> Tenant:
    """Who makes the call that runs now. Where nobody looked who it is, this fails, and the call with it."""
    return _caller.get()


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Lets a call of this project's services through once it is known whose it is. Health and reflection stay
    open: what asks for a server's health holds no keys, and reflection tells what this repository does.
    """

    def __init__(
        self, tenants: TenantsFile, hook: AuthHook | None, on_failure: Callable[[UnauthenticatedError], None]
    ) -> None:
        self._tenants = tenants
        self._hook = hook
        self._on_failure = on_failure

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/turret."):
            return handler
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(
                self._known_stream(handler.stream_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        assert handler.stream_unary
        return grpc.stream_unary_rpc_method_handler(
            self._known_unary(handler.stream_unary), handler.request_deserializer, handler.response_serializer
        )

    def _known_unary(self, method: Callable[..., Any]) -> Callable[..., Any]:
        async def known(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            await self._recognise(context)
            return await method(request, context)

        return known

    def _known_stream(self, method: Callable[..., Any]) -> Callable[..., Any]:
        async def known(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            table = await self._recognise(context)
            async with aclosing(method(request, context)) as responses:
                async for response in responses:
                    if table is not self._tenants.table:
                        # The key may be taken away meanwhile, or what the tenant may do.
                        table = await self._recognise(context)
                    yield response

        return known

    async def _recognise(self, context: grpc.aio.ServicerContext[Any, Any]) -> TenantTable:
        """Sets the caller, which holds for this call: every one is a task, with a context of its own."""
        table = self._tenants.table
        metadata, identities = tuple(context.invocation_metadata() or ()), _identities(context)
        try:
            named = await self._hook.ask(metadata, identities) if self._hook else None
            tenant = authenticate(table, metadata, identities, named)
        except UnauthenticatedError as error:
            self._on_failure(error)
            raise
        _caller.set(tenant)
        logs.bind(tenant=tenant.name)
        return table


def authenticate(
    tenants: TenantTable,
    metadata: Iterable[tuple[str, str | bytes]],
    identities: Iterable[str] = (),
    named: str | None = None,
) -> Tenant:
    """Whose call this is. `identities` are the names in the certificate that the client proved to hold;
    `named` is whose it is by the hook, which has the last word.

    What is refused is refused with the same words whoever exists.

    Raises:
        UnauthenticatedError: nobody's, or somebody else's than it says.
        InvalidRequestError: it says what cannot be the name of a tenant.
    """
    metadata = tuple(metadata)
    claimed = named_tenant(metadata)
    if named is not None:
        if claimed not in (None, named):
            raise UnauthenticatedError(
                "the metadata turret-tenant names another tenant than the one that you are known as; leave "
                "it out",
                cause="mismatch",
            )
        return tenants.by_name(named)
    if tenants.is_open:
        return tenants.unproven(claimed or DEFAULT_TENANT)
    key, by_identity = _key(metadata), tenants.by_identities(identities)
    found = by_identity if key is None else tenants.by_key(key)
    if found is None and key is None:
        raise UnauthenticatedError(
            "this server answers only tenants that it knows; send an API key as the metadata "
            '"authorization: Bearer KEY" (the client\'s api_key, or TURRET_API_KEY)',
            cause="no_key",
        )
    if found is None:
        raise UnauthenticatedError(
            "the API key is none of this server's; ask its operator for one", cause="unknown_key"
        )
    if by_identity not in (None, found) or claimed not in (None, found.name):
        raise UnauthenticatedError(
            "the API key, the client's certificate and the metadata turret-tenant must all name the same "
            "tenant; leave out what does not belong to it",
            cause="mismatch",
        )
    return found


def _key(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    sent = {value for name, value in metadata if name == "authorization"}
    if not sent:
        return None
    scheme, _, key = str(sent.pop()).partition(" ")
    if sent or scheme.lower() != _SCHEME or not key.strip():
        raise UnauthenticatedError(
            'expected one metadata "authorization: Bearer KEY"; found another', cause="malformed"
        )
    return key.strip()


def _identities(context: grpc.aio.ServicerContext[Any, Any]) -> list[str]:
    """The transport tells these only of certificates that it verified: it asks for none without a CA."""
    proven = context.auth_context()
    return [name.decode(errors="replace") for kind in _NAMES for name in proven.get(kind, ())]
