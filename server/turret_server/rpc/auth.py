"""Authentication at the gRPC door."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import grpc

from turret_server import logs
from turret_server.rpc.calls import request_id
from turret_server.tenancy.auth import Authenticator, Caller, CallHeader
from turret_server.tenancy.tenants import TenantTable

_NAMES = ("x509_common_name", "x509_subject_alternative_name")

_caller: ContextVar[Caller] = ContextVar("turret_caller")


def caller() -> Caller:
    """Who makes the call that runs now. Fails, and the call with it, where the call was not authenticated."""
    return _caller.get()


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Authenticates the calls of this project's services. Health and reflection stay open."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

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
            await self._authenticate(context)
            return await method(request, context)

        return known

    def _known_stream(self, method: Callable[..., Any]) -> Callable[..., Any]:
        async def known(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            version = await self._authenticate(context)
            async with aclosing(method(request, context)) as responses:
                async for response in responses:
                    if version is not self._authenticator.version:
                        # The key may be taken away meanwhile, or a permission.
                        version = await self._authenticate(context)
                    yield response

        return known

    async def _authenticate(self, context: grpc.aio.ServicerContext[Any, Any]) -> TenantTable:
        """Sets the caller, which holds for this call: every call is a task, with a context of its own."""
        version = self._authenticator.version
        header = CallHeader(
            request_id=request_id(),
            metadata=tuple(context.invocation_metadata() or ()),
            identities=tuple(_identities(context)),
        )
        found = await self._authenticator.authenticate(header)
        _caller.set(found)
        logs.bind(tenant=found.tenant.name)
        return version


def _identities(context: grpc.aio.ServicerContext[Any, Any]) -> list[str]:
    """The transport tells these only of certificates that it verified: it asks for none without a CA."""
    proven = context.auth_context()
    return [name.decode(errors="replace") for kind in _NAMES for name in proven.get(kind, ())]
