"""The way of a call, over a real port."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from turret.v1 import inference_pb2, prompts_pb2
from turret_server.doors.caller import REQUEST_ID
from turret_server.engine.admission import TenantLimits
from turret_server.rpc import calls
from turret_server.rpc.calls import MAX_OPEN_BYTES
from turret_server.serving.request import Chunk, FinishReason, Usage
from turret_server.tenancy.keys import digest_of
from turret_server.tenancy.tenants_file import TenantsFile


def of(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str | None]:
    """The code of an error, and its reason."""
    [status] = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    for detail in status_pb2.Status.FromString(status).details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return error.code(), info.reason
    return error.code(), None


async def refusal(call) -> tuple[grpc.StatusCode, str | None]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await (call.read() if hasattr(call, "read") else call)
    return of(refused.value)


CHUNK = Chunk(text="a", token_ids=(1,), revision="")
MESSAGE = inference_pb2.GenerateRequest(text="Hello")
LIST = prompts_pb2.ListPinnedPromptsRequest()


@pytest.fixture
def tenants(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(f'[tenants.acme]\nkeys = ["{digest_of("key")}"]')
    return TenantsFile(path, TenantLimits())


KEY = (("authorization", "Bearer key"),)


async def test_every_call_has_an_id_which_the_client_may_choose(open_door):
    door = await open_door(prompts=SimpleNamespace(list=lambda _: []))
    for call in (
        door.prompts.ListPinnedPrompts(LIST, metadata=((REQUEST_ID, "mine"),)),
        door.health.Check(health_pb2.HealthCheckRequest(), metadata=((REQUEST_ID, "mine"),)),
    ):
        await call
        assert dict(await call.trailing_metadata())[REQUEST_ID] == "mine"
    for call in (
        door.prompts.ListPinnedPrompts(LIST, metadata=((REQUEST_ID, "two words"),)),
        door.health.Check(health_pb2.HealthCheckRequest(), metadata=((REQUEST_ID, "two words"),)),
    ):
        assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_a_method_that_does_not_exist_is_not_implemented(door):
    for method in ("/turret.v1.InferenceService/None", "/other.Service/None"):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await door.channel.unary_unary(method)(b"")
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_method_of_a_service_that_has_no_code_is_not_implemented():
    """As one that a later version of a library's stubs declares."""
    stub = health_pb2_grpc.HealthServicer().Watch
    handlers = {
        "Later": grpc.unary_unary_rpc_method_handler(stub),
        "LaterStream": grpc.unary_stream_rpc_method_handler(stub),
    }
    intercepted = calls.CallInterceptor(None, None).intercept_service
    for method, handler in handlers.items():

        async def continuation(_, handler=handler):
            return handler

        for service in ("turret.v1.InferenceService", "grpc.health.v1.Health"):
            details = SimpleNamespace(method=f"/{service}/{method}")
            assert await intercepted(continuation, details) is None


async def test_a_caller_is_authenticated_before_the_request_is_read(open_door, tenants, scripted):
    """The request never comes."""
    upload = scripted(0)
    door = await open_door(tenants=tenants, administration=SimpleNamespace(upload=upload))
    assert await refusal(door.adapters.UploadAdapter()) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "UNAUTHENTICATED",
    )
    unary = door.channel.stream_unary("/turret.v1.PromptService/ListPinnedPrompts")
    assert (await refusal(unary()))[1] == "UNAUTHENTICATED"
    assert upload.calls == []


async def test_a_method_knows_its_caller_and_the_id_of_its_call(open_door, tenants):
    callers = []

    def list_prompts(caller):
        callers.append((caller.tenant.name, caller.request_id))
        return []

    door = await open_door(tenants=tenants, prompts=SimpleNamespace(list=list_prompts))
    await door.prompts.ListPinnedPrompts(LIST, metadata=(*KEY, (REQUEST_ID, "mine")))
    assert callers == [("acme", "mine")]


async def test_a_stream_ends_when_its_key_is_taken_away(open_door, tenants, scripted):
    go_on = asyncio.Event()

    async def later():
        await go_on.wait()
        return CHUNK

    generate = scripted(CHUNK, later, CHUNK)
    door = await open_door(tenants=tenants, generation=SimpleNamespace(generate=generate))
    stream = door.inference.GenerateStream(MESSAGE, metadata=KEY)
    assert (await stream.read()).text == CHUNK.text
    tenants._path.write_text(f'[tenants.acme]\nkeys = ["{digest_of("another")}"]')
    tenants.look()
    go_on.set()
    assert await refusal(stream) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    await door.server.calls.wait(600)
    assert generate.closed


async def test_running_calls_are_counted_and_new_ones_refused_while_the_server_drains(open_door):
    counts = []
    door = await open_door(prompts=SimpleNamespace(list=lambda _: counts.append(calls.num_running) or []))
    calls = door.server.calls
    await door.prompts.ListPinnedPrompts(LIST)
    assert (counts, calls.num_running) == ([1], 0)
    calls.refuse()
    assert await refusal(door.prompts.ListPinnedPrompts(LIST)) == (
        grpc.StatusCode.UNAVAILABLE,
        "SHUTTING_DOWN",
    )
    # Whoever asks for the health must get an answer now above all.
    await door.status()


async def test_the_error_of_a_method_becomes_a_status(open_door, caplog):
    def list_prompts(_):
        raise ZeroDivisionError

    door = await open_door(prompts=SimpleNamespace(list=list_prompts))
    assert await refusal(door.prompts.ListPinnedPrompts(LIST)) == (grpc.StatusCode.INTERNAL, None)
    assert [record.message for record in caplog.records] == ["a call failed"]


async def test_health_and_reflection_need_no_authentication(open_door, tenants):
    door = await open_door(tenants=tenants)
    await door.status()
    watch = door.health.Watch(health_pb2.HealthCheckRequest())
    await watch.read()
    watch.cancel()
    reflect = reflection_pb2_grpc.ServerReflectionStub(door.channel).ServerReflectionInfo()
    for _ in range(2):
        await reflect.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert (await reflect.read()).list_services_response.service
    await reflect.done_writing()
    assert await reflect.read() is grpc.aio.EOF


async def test_requests_without_authentication_are_small(door):
    """Those of streams as well, for a stream keeps its request."""
    request = health_pb2.HealthCheckRequest(service="x" * MAX_OPEN_BYTES)
    for call in (door.health.Check(request), door.health.Watch(request)):
        assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_a_service_that_is_not_there_has_no_health(door):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await door.status("nobody")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_requests_with_authentication_may_be_larger(open_door, scripted):
    last = Chunk(
        text="",
        token_ids=(),
        revision="",
        finish_reason=FinishReason.STOP,
        usage=Usage(prompt_tokens=1, cached_tokens=0, generated_tokens=0),
    )
    generate = scripted(last)
    door = await open_door(generation=SimpleNamespace(generate=generate))
    await door.inference.Generate(inference_pb2.GenerateRequest(text="x" * 2 * MAX_OPEN_BYTES))
    assert len(generate.calls) == 1


@pytest.mark.parametrize("kind", ["health", "reflection"])
async def test_a_stream_without_authentication_takes_a_place_until_it_ends(door, monkeypatch, kind):
    monkeypatch.setattr(calls, "MAX_OPEN_STREAMS", 1)

    async def opened():
        if kind == "health":
            return door.health.Watch(health_pb2.HealthCheckRequest())
        call = reflection_pb2_grpc.ServerReflectionStub(door.channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        return call

    first = await opened()
    await first.read()
    assert await refusal(await opened()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
    await door.status()
    first.cancel()
    while True:  # the server learns of it a moment later
        again = await opened()
        try:
            if await again.read() is not grpc.aio.EOF:
                break
        except grpc.aio.AioRpcError as error:
            if of(error)[1] != "TOO_MANY_CALLS":
                raise
    again.cancel()
