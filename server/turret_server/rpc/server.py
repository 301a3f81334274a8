"""The gRPC server: this project's services, the standard health service, and reflection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from turret.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    pooling_pb2,
    pooling_pb2_grpc,
    prompts_pb2,
    prompts_pb2_grpc,
)
from turret_server.doors.health import Health
from turret_server.doors.limits import HANDSHAKE_SECONDS, MAX_MESSAGE_BYTES
from turret_server.doors.running import RunningCalls
from turret_server.errors import ConfigError

# Bounds on what any client, authenticated or not, may do to the transport.
_OPTIONS: tuple[tuple[str, int], ...] = (
    # Otherwise two servers could share one port in silence.
    ("grpc.so_reuseport", 0),
    # A call that is not authenticated yet may have one message in memory.
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A key, a tenant and trace headers. Beyond the first some calls are refused, beyond the second all.
    ("grpc.max_metadata_size", 8 * 2**10),
    ("grpc.absolute_max_metadata_size", 16 * 2**10),
    # Every stream has a task and buffers. A client with more calls waits, or opens another connection.
    ("grpc.max_concurrent_streams", 1024),
    # Calls that have arrived and are not handled yet. Beyond the first number gRPC cancels some of them at
    # random, so that one client could end the calls of others.
    ("grpc.server.max_pending_requests", 2**16),
    ("grpc.server.max_pending_requests_hard_limit", 2**17),
    # TLS, and the connection's first settings.
    ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_SECONDS * 1000)),
    # The streams of a peer that vanished end within about two minutes.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # gRPC's clients ping every 10 s at most, and a few milliseconds early. The third violation ends the
    # connection.
    ("grpc.http2.min_ping_interval_without_data_ms", 9_000),
    ("grpc.http2.max_ping_strikes", 2),
    # An idle connection costs a file descriptor; clients reconnect by themselves.
    ("grpc.max_connection_idle_ms", 15 * 60_000),
)

# The health service name that reports only that the process answers, also while it starts and drains.
LIVENESS = "liveness"

_SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    prompts_pb2.DESCRIPTOR.services_by_name["PromptService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    pooling_pb2.DESCRIPTOR.services_by_name["PoolingService"].full_name,
)


class RpcServer:
    def __init__(
        self,
        inference: inference_pb2_grpc.InferenceServiceServicer,
        adapters: adapters_pb2_grpc.AdapterServiceServicer,
        prompts: prompts_pb2_grpc.PromptServiceServicer,
        model: model_pb2_grpc.ModelServiceServicer,
        pooling: pooling_pb2_grpc.PoolingServiceServicer,
        interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]],
        calls: RunningCalls,
        state: Health,
        max_connections: int,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """`calls` are those that the interceptor counts. Without credentials nothing is encrypted."""
        self.calls = calls
        self._state = state
        self._credentials = credentials
        most = ("grpc.max_allowed_incoming_connections", max_connections)
        self._server = grpc.aio.server(interceptors=interceptors, options=(*_OPTIONS, most))
        add_servicers(inference, adapters, prompts, model, pooling, self._server)
        self._health = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        _add_reflection([*_SERVICES, health.SERVICE_NAME], self._server)

    async def start(self, address: str) -> int:
        """Open the port; returns its number, which the system chooses if it is 0. Health reports that the
        process is alive, and no service ready.

        Raises:
            ConfigError: the port cannot be opened.
        """
        try:
            if self._credentials:
                port = self._server.add_secure_port(address, self._credentials)
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(
                f"--listen {address}: the port cannot be opened; stop the program that uses it, or choose "
                "another"
            ) from error
        await self._report()
        await self._server.start()
        return port

    async def ready(self) -> None:
        """Report every service as SERVING, while the engine is responsive."""
        self._state.is_ready = True
        await self._report()

    async def judge_engine(self, *, responsive: bool, alive: bool) -> None:
        """Report every service as NOT_SERVING while the engine is not responsive, and the process while it is
        not alive.
        """
        self._state.is_responsive, self._state.is_alive = responsive, alive
        await self._report()

    async def drain(self) -> None:
        """Report every service as NOT_SERVING, and refuse new calls."""
        self.calls.refuse()
        self._state.is_ready = False
        await self._report()

    async def stop(self, grace: float) -> None:
        """Close the port, and give running calls `grace` seconds to finish."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)

    async def _report(self) -> None:
        answers = health_pb2.HealthCheckResponse
        for service in ("", *_SERVICES, LIVENESS):
            # Decided now: what another report decided during the last wait counts.
            good = self._state.is_alive if service == LIVENESS else self._state.is_serving
            await self._health.set(service, answers.SERVING if good else answers.NOT_SERVING)


def add_servicers(
    inference: inference_pb2_grpc.InferenceServiceServicer,
    adapters: adapters_pb2_grpc.AdapterServiceServicer,
    prompts: prompts_pb2_grpc.PromptServiceServicer,
    model: model_pb2_grpc.ModelServiceServicer,
    pooling: pooling_pb2_grpc.PoolingServiceServicer,
    server: Any,
) -> None:
    """Register the methods of all services of this project with a server."""
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, server)
    prompts_pb2_grpc.add_PromptServiceServicer_to_server(prompts, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(model, server)
    pooling_pb2_grpc.add_PoolingServiceServicer_to_server(pooling, server)


class _Health(health.aio.HealthServicer):  # type: ignore[name-defined,misc]  # the stubs are behind
    """The health service, with the method that the library lacks."""

    async def List(
        self, request: health_pb2.HealthListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthListResponse:
        return health_pb2.HealthListResponse(
            statuses={
                service: health_pb2.HealthCheckResponse(status=status)
                for service, status in self._server_status.items()
            }
        )


def _add_reflection(services: Sequence[str], server: grpc.aio.Server) -> None:
    """Add reflection, also in version v1, which the library lacks: only its name differs from v1alpha."""
    alpha = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    renamed = text_format.MessageToString(alpha).replace("v1alpha", "v1")
    file = text_format.Parse(renamed, descriptor_pb2.FileDescriptorProto())
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    name = f"{file.package}.{file.service[0].name}"
    names = [*services, reflection.SERVICE_NAME, name]
    reflection.enable_server_reflection(names, server)
    servicer = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]  # the stubs are behind
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler}),)
    )
