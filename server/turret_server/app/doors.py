"""The doors to the services of a server: gRPC, HTTP, and calls of this process."""

from __future__ import annotations

import asyncio
from typing import Any

from turret_server.app.build import Parts
from turret_server.config import ServerConfig
from turret_server.doors.health import Health
from turret_server.doors.limits import max_connections
from turret_server.doors.running import RunningCalls
from turret_server.observability.metrics import AuthMetrics
from turret_server.rpc.adapters import AdapterServicer
from turret_server.rpc.calls import CallInterceptor
from turret_server.rpc.inference import InferenceServicer
from turret_server.rpc.local import LocalChannel, Methods
from turret_server.rpc.model import ModelServicer
from turret_server.rpc.pooling import PoolingServicer
from turret_server.rpc.prompts import PromptServicer
from turret_server.rpc.server import RpcServer, add_servicers
from turret_server.rpc.tls import credentials
from turret_server.tenancy.auth import Authenticator
from turret_server.web.app import Services, make_app
from turret_server.web.names import ModelNames
from turret_server.web.server import WebServer


def make_channel(parts: Parts, loop: asyncio.AbstractEventLoop) -> Any:
    """The door for callers in this process, a `grpc.Channel` as far as stubs need one. `loop` runs on another
    thread than theirs.
    """
    methods = Methods()
    add_servicers(*_servicers(parts), methods)
    return LocalChannel(methods, CallInterceptor(_authenticator(parts), RunningCalls()), loop)


def _servicers(
    parts: Parts,
) -> tuple[InferenceServicer, AdapterServicer, PromptServicer, ModelServicer, PoolingServicer]:
    return (
        InferenceServicer(parts.generation),
        AdapterServicer(parts.administration),
        PromptServicer(parts.prompts),
        ModelServicer(parts.model, parts.tokens),
        PoolingServicer(parts.pooling),
    )


def _authenticator(parts: Parts) -> Authenticator:
    access = parts.access
    return Authenticator(access.tenants, access.auth_hook, AuthMetrics(parts.metrics).failed)


def make_doors(parts: Parts, config: ServerConfig) -> tuple[RpcServer, WebServer | None]:
    """The doors to the services: gRPC, and HTTP unless it is switched off."""
    calls, state, access = RunningCalls(), Health(), parts.access
    authenticator = _authenticator(parts)
    # Files are of all; each door gets its share.
    most = max_connections() // (2 if config.http else 1)
    server = RpcServer(
        *_servicers(parts),
        interceptors=[CallInterceptor(authenticator, calls)],
        calls=calls,
        state=state,
        max_connections=most,
        credentials=credentials(access.tls) if access.tls else None,
    )
    if not config.http:
        return server, None
    services = Services(
        generation=parts.generation,
        tokens=parts.tokens,
        pooling=parts.pooling,
        administration=parts.administration,
        health=state,
        names=ModelNames(base=parts.model.model.name, max_context=parts.model.model.max_context),
    )
    app = make_app(services, authenticator, calls, origins=config.http_cors)
    return server, WebServer(app, max_connections=most, tls=access.tls)
