"""The real gRPC server with its interceptor on a loopback port, over services that a test scripts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from turret.v1 import (
    adapters_pb2_grpc,
    inference_pb2_grpc,
    model_pb2_grpc,
    pooling_pb2_grpc,
    prompts_pb2_grpc,
)
from turret_server.doors.health import Health
from turret_server.doors.running import RunningCalls
from turret_server.engine.admission import TenantLimits
from turret_server.rpc.adapters import AdapterServicer
from turret_server.rpc.calls import CallInterceptor
from turret_server.rpc.inference import InferenceServicer
from turret_server.rpc.model import ModelServicer
from turret_server.rpc.pooling import PoolingServicer
from turret_server.rpc.prompts import PromptServicer
from turret_server.rpc.server import RpcServer
from turret_server.tenancy.auth import Authenticator
from turret_server.tenancy.tenants_file import TenantsFile


@dataclass(frozen=True)
class Door:
    server: RpcServer
    port: int
    channel: grpc.aio.Channel

    @property
    def inference(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def adapters(self) -> Any:
        return adapters_pb2_grpc.AdapterServiceStub(self.channel)

    @property
    def prompts(self) -> Any:
        return prompts_pb2_grpc.PromptServiceStub(self.channel)

    @property
    def model(self) -> Any:
        return model_pb2_grpc.ModelServiceStub(self.channel)

    @property
    def pooling(self) -> Any:
        return pooling_pb2_grpc.PoolingServiceStub(self.channel)

    @property
    def health(self) -> Any:
        return health_pb2_grpc.HealthStub(self.channel)

    async def status(self, service: str = "") -> int:
        """What the health service answers of a service."""
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)

    async def is_reached_with(self, credentials: grpc.ChannelCredentials) -> bool:
        """Whether a new connection with these credentials gets an answer."""
        async with grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials) as channel:
            try:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return False
            return True


@pytest.fixture
async def open_door() -> AsyncIterator[Callable[..., Awaitable[Door]]]:
    """Opens a server over these services. It is open to everybody unless it is given a tenants file."""
    async with AsyncExitStack() as stack:

        async def open_door(
            *,
            generation: Any = None,
            prompts: Any = None,
            model: Any = None,
            tokens: Any = None,
            pooling: Any = None,
            administration: Any = None,
            tenants: TenantsFile | None = None,
            credentials: grpc.ServerCredentials | None = None,
        ) -> Door:
            calls = RunningCalls()
            everybody = TenantsFile(None, TenantLimits())
            authenticator = Authenticator(tenants or everybody, None, lambda _: None)
            server = RpcServer(
                InferenceServicer(generation),
                AdapterServicer(administration),
                PromptServicer(prompts),
                ModelServicer(model, tokens),
                PoolingServicer(pooling),
                interceptors=[CallInterceptor(authenticator, calls)],
                calls=calls,
                state=Health(),
                max_connections=100,
                credentials=credentials,
            )
            port = await server.start("127.0.0.1:0")
            stack.push_async_callback(server.stop, 0)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            return Door(server, port, channel)

        yield open_door


@pytest.fixture
async def door(open_door: Callable[..., Awaitable[Door]]) -> Door:
    """A server whose services are never reached."""
    return await open_door()


class Scripted:
    """The items of a stream that a service answers with, then `error` if there is one.

    `closed` is whether the stream has been closed or has come to its end.
    """

    def __init__(self, *items: Any, error: Exception | None = None) -> None:
        self._items = items
        self._error = error
        self.calls: list[tuple[Any, ...]] = []
        self.closed = False

    async def __call__(self, *arguments: Any) -> AsyncGenerator[Any]:
        self.calls.append(arguments)
        try:
            for item in self._items:
                yield await item() if callable(item) else item
            if self._error:
                raise self._error
        finally:
            self.closed = True


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted
