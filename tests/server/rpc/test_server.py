from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from turret.v1 import adapters_pb2, inference_pb2, prompts_pb2
from turret_server.errors import ConfigError
from turret_server.rpc.server import LIVENESS

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = [f"turret.v1.{name}Service" for name in ("Inference", "Adapter", "Prompt", "Model", "Pooling")]


async def test_services_are_ready_from_ready_to_drain_and_the_process_lives_all_the_time(door):
    async def statuses():
        return [await door.status(service) for service in ("", *SERVICES, LIVENESS)]

    assert await statuses() == [NOT_SERVING] * 6 + [SERVING]
    await door.server.ready()
    assert await statuses() == [SERVING] * 7
    await door.server.drain()
    assert await statuses() == [NOT_SERVING] * 6 + [SERVING]


async def test_services_are_ready_only_while_the_engine_is_and_the_process_lives_unless_it_hangs(door):
    async def statuses():
        return [await door.status(service) for service in ("", *SERVICES, LIVENESS)]

    await door.server.ready()
    watch = door.health.Watch(health_pb2.HealthCheckRequest(service=LIVENESS))
    assert (await watch.read()).status == SERVING
    await door.server.judge_engine(responsive=False, alive=True)
    assert await statuses() == [NOT_SERVING] * 6 + [SERVING]
    await door.server.judge_engine(responsive=False, alive=False)
    assert await statuses() == [NOT_SERVING] * 7
    assert (await watch.read()).status == NOT_SERVING
    watch.cancel()
    await door.server.judge_engine(responsive=True, alive=True)
    assert await statuses() == [SERVING] * 7
    # A server that drains stays so, however its engine does.
    await door.server.drain()
    await door.server.judge_engine(responsive=True, alive=True)
    assert await statuses() == [NOT_SERVING] * 6 + [SERVING]


async def test_a_server_that_drains_refuses_new_calls(open_door):
    door = await open_door(prompts=SimpleNamespace(list=lambda _: []))
    await door.prompts.ListPinnedPrompts(prompts_pb2.ListPinnedPromptsRequest())
    await door.server.drain()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await door.prompts.ListPinnedPrompts(prompts_pb2.ListPinnedPromptsRequest())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in refused.value.details()


async def test_a_server_that_stops_lets_running_calls_finish(open_door):
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def load(*_):
        entered.set()
        await go_on.wait()
        raise ConfigError("done")

    door = await open_door(administration=SimpleNamespace(load=load))
    call = door.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest())
    await entered.wait()
    watch = door.health.Watch(health_pb2.HealthCheckRequest(service=LIVENESS))
    assert (await watch.read()).status == SERVING
    stopping = asyncio.create_task(door.server.stop(600))
    # Whoever watches the health learns of the end before the connection is closed.
    assert (await watch.read()).status == NOT_SERVING
    watch.cancel()
    go_on.set()
    assert (await call.details(), await stopping) == ("done", None)


async def test_a_port_that_is_in_use_is_refused(open_door):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        door = await open_door()
        with pytest.raises(ConfigError, match=f"--listen {address}: .* choose another"):
            await door.server.start(address)


async def test_two_servers_do_not_share_a_port(open_door):
    first, second = await open_door(), await open_door()
    with pytest.raises(ConfigError):
        await second.server.start(f"127.0.0.1:{first.port}")


async def reflected(door, version: str, **question):
    """The answer of one version of the reflection service: their messages are the same on the wire."""
    call = door.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )()
    await call.write(reflection_pb2.ServerReflectionRequest(**question))
    answer = await call.read()
    await call.done_writing()
    return answer


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_and_describes_all_services(door, version):
    answer = await reflected(door, version, list_services="")
    found = {service.name for service in answer.list_services_response.service}
    own = {f"grpc.reflection.{each}.ServerReflection" for each in ("v1", "v1alpha")}
    assert found == {*SERVICES, health.SERVICE_NAME, *own}
    for name in found:
        answer = await reflected(door, version, file_containing_symbol=name)
        files = map(
            descriptor_pb2.FileDescriptorProto.FromString,
            answer.file_descriptor_response.file_descriptor_proto,
        )
        assert name in {f"{file.package}.{each.name}" for file in files for each in file.service}


async def test_the_health_of_all_services_can_be_listed(door):
    await door.server.ready()
    listed = await door.health.List(health_pb2.HealthListRequest())
    assert {name: each.status for name, each in listed.statuses.items()} == dict.fromkeys(
        ("", *SERVICES, LIVENESS), SERVING
    )


async def test_a_message_beyond_the_limit_of_the_transport_is_refused(open_door, scripted):
    generate = scripted()
    door = await open_door(generation=SimpleNamespace(generate=generate))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await door.inference.Generate(inference_pb2.GenerateRequest(text="x" * (5 << 20)))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert generate.calls == []


async def test_the_health_is_known_before_the_port_is_open(door, monkeypatch):
    """Otherwise the first who asks is told that all is ready, or that nothing is known."""
    server, found = door.server, []

    async def started():
        for service in ("", *SERVICES, LIVENESS):
            request = health_pb2.HealthCheckRequest(service=service)
            found.append((await server._health.Check(request, None)).status)

    opened = SimpleNamespace(add_insecure_port=lambda _: 7, start=started, stop=server._server.stop)
    monkeypatch.setattr(server, "_health", health.aio.HealthServicer())
    with monkeypatch.context() as patched:
        patched.setattr(server, "_server", opened)
        assert await server.start("127.0.0.1:0") == 7
    assert found == [NOT_SERVING] * 6 + [SERVING]


async def test_a_server_that_drains_refuses_calls_before_it_says_so(door, monkeypatch):
    refused = []

    async def report():
        refused.append((door.server._state.is_ready, door.server.calls._refusing))

    monkeypatch.setattr(door.server, "_report", report)
    await door.server.drain()
    assert refused == [(False, True)]
