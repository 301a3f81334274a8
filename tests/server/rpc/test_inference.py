from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc
import pytest

from turret.v1 import inference_pb2
from turret_server.errors import QueueFullError
from turret_server.rpc import inference
from turret_server.rpc.inference import deadline_of
from turret_server.serving.request import (
    AdapterRef,
    Chunk,
    FinishReason,
    GenerationRequest,
    TokenLogprob,
    Usage,
)

USAGE = Usage(prompt_tokens=3, cached_tokens=2, generated_tokens=4)
CHUNKS = (
    Chunk(text="Ahoy, ", token_ids=(7, 8), revision="r1"),
    Chunk(text="mátey", token_ids=(9,), revision="r1"),
    Chunk(text="!", token_ids=(2,), revision="r1", finish_reason=FinishReason.STOP, usage=USAGE),
)
USAGE_MESSAGE = inference_pb2.Usage(prompt_tokens=3, cached_tokens=2, generated_tokens=4)


@pytest.fixture
async def open_inference(open_door, scripted):
    """Opens a server whose generations are these chunks; returns its stub and what its service was asked."""

    async def open_inference(*chunks, error=None):
        generate = scripted(*(chunks or CHUNKS), error=error)
        door = await open_door(generation=SimpleNamespace(generate=generate))
        return door.inference, generate

    return open_inference


async def received(open_inference, message):
    """The request that a message becomes."""
    stub, generate = await open_inference()
    await stub.Generate(message)
    [(request, _)] = generate.calls
    return request


async def test_every_field_of_a_message_is_passed_on(open_inference):
    message = inference_pb2.GenerateRequest(
        text="Hello",
        adapters=[inference_pb2.AdapterRef(name="a", weight=0.5, task=3), inference_pb2.AdapterRef(name="b")],
        max_tokens=5,
        temperature=0.5,
        top_p=0.25,
        top_k=6,
        seed=2**64 - 1,
        stop=["x", "y"],
        priority=-4,
        cache_salt="salt",
        routing_key="key",
        logit_bias={7: -1.5},
        n=3,
        logprobs=0,
    )
    assert await received(open_inference, message) == GenerationRequest(
        prompt="Hello",
        adapters=(AdapterRef(name="a", weight=0.5, task=3), AdapterRef(name="b")),
        max_tokens=5,
        temperature=0.5,
        top_p=0.25,
        top_k=6,
        seed=2**64 - 1,
        stop=("x", "y"),
        priority=-4,
        cache_salt="salt",
        routing_key="key",
        logit_bias={7: -1.5},
        n=3,
        logprobs=0,
    )


async def test_fields_that_are_not_set_have_their_defaults(open_inference):
    found = await received(open_inference, inference_pb2.GenerateRequest(text="Hello"))
    assert found == GenerationRequest(prompt="Hello")


async def test_a_field_that_is_set_to_nothing_is_set(open_inference):
    message = inference_pb2.GenerateRequest(
        text="", max_tokens=0, top_p=0, seed=0, adapters=[inference_pb2.AdapterRef(weight=0, task=0)]
    )
    assert await received(open_inference, message) == GenerationRequest(
        prompt="", max_tokens=0, top_p=0.0, seed=0, adapters=(AdapterRef(name="", weight=0.0, task=0),)
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [({"token_ids": inference_pb2.TokenIds(ids=[3, 1])}, [3, 1]), ({}, None)],
)
async def test_a_prompt_is_text_or_token_ids_or_missing(open_inference, prompt, expected):
    assert (await received(open_inference, inference_pb2.GenerateRequest(**prompt))).prompt == expected


def test_the_deadline_of_a_call_is_a_time(monkeypatch):
    monkeypatch.setattr(inference.time, "monotonic", lambda: 1000.0)
    assert deadline_of(SimpleNamespace(time_remaining=lambda: 2.5)) == 1002.5
    assert deadline_of(SimpleNamespace(time_remaining=lambda: 0.0)) == 1000.0
    assert deadline_of(SimpleNamespace(time_remaining=lambda: None)) is None


async def test_a_request_has_the_deadline_and_the_caller_of_its_call(open_inference):
    stub, generate = await open_inference()
    message, metadata = inference_pb2.GenerateRequest(text="Hello"), (("turret-tenant", "acme"),)
    await stub.Generate(message, timeout=600, metadata=metadata)
    async for _ in stub.GenerateStream(message, timeout=600, metadata=metadata):
        pass
    assert [caller.tenant.name for _, caller in generate.calls] == ["acme", "acme"]
    assert all(request.deadline is not None for request, _ in generate.calls)


async def test_a_stream_has_a_message_for_each_chunk(open_inference):
    stub, generate = await open_inference()
    found = [message async for message in stub.GenerateStream(inference_pb2.GenerateRequest(text="Hello"))]
    assert found == [
        inference_pb2.GenerateStreamResponse(text="Ahoy, ", token_ids=[7, 8], revision="r1"),
        inference_pb2.GenerateStreamResponse(text="mátey", token_ids=[9], revision="r1"),
        inference_pb2.GenerateStreamResponse(
            text="!",
            token_ids=[2],
            revision="r1",
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            usage=USAGE_MESSAGE,
        ),
    ]
    assert not found[0].HasField("usage")
    [(request, _)] = generate.calls
    assert request == GenerationRequest(prompt="Hello")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (FinishReason.STOP, inference_pb2.FINISH_REASON_STOP),
        (FinishReason.LENGTH, inference_pb2.FINISH_REASON_LENGTH),
    ],
)
async def test_the_one_answer_is_all_chunks_together(open_inference, reason, expected):
    last = Chunk(text="!", token_ids=(2,), revision="r1", finish_reason=reason, usage=USAGE)
    stub, _ = await open_inference(*CHUNKS[:2], last)
    assert await stub.Generate(inference_pb2.GenerateRequest(text="Hello")) == inference_pb2.GenerateResponse(
        text="Ahoy, mátey!",
        token_ids=[7, 8, 9, 2],
        finish_reason=expected,
        usage=USAGE_MESSAGE,
        revision="r1",
    )


BEST = TokenLogprob(token_id=8, token=b"\xc3", logprob=-0.25, rank=1)
FOUND = TokenLogprob(token_id=7, token=b"A", logprob=-1.5, rank=2, top=(BEST,))
FOUND_MESSAGE = inference_pb2.TokenLogprob(
    token_id=7,
    token=b"A",
    logprob=-1.5,
    rank=2,
    top=[inference_pb2.TokenLogprob(token_id=8, token=b"\xc3", logprob=-0.25, rank=1)],
)


async def test_log_probabilities_are_passed_on(open_inference):
    first = Chunk(text="A", token_ids=(7,), revision="", logprobs=(FOUND,), prompt_logprobs=(BEST, FOUND))
    last = Chunk(
        text="A",
        token_ids=(7,),
        revision="",
        logprobs=(FOUND,),
        finish_reason=FinishReason.LENGTH,
        usage=USAGE,
    )
    stub, _ = await open_inference(first, last)
    message = inference_pb2.GenerateRequest(text="Hello", logprobs=1, prompt_logprobs=1)
    answer = await stub.Generate(message)
    assert list(answer.logprobs) == [FOUND_MESSAGE] * 2
    assert list(answer.prompt_logprobs) == [FOUND_MESSAGE.top[0], FOUND_MESSAGE]
    streamed = [message async for message in stub.GenerateStream(message)]
    assert [list(each.logprobs) for each in streamed] == [[FOUND_MESSAGE]] * 2
    assert [len(each.prompt_logprobs) for each in streamed] == [2, 0]


async def test_several_answers_are_told_apart(open_inference):
    chunks = [
        Chunk(text="a", token_ids=(1,), revision="r1", index=1, logprobs=(FOUND,)),
        Chunk(text="x", token_ids=(7,), revision="r1", index=0),
        Chunk(
            text="b",
            token_ids=(2,),
            revision="r1",
            index=1,
            finish_reason=FinishReason.STOP,
            stop_token_id=2,
            logprobs=(BEST,),
        ),
        Chunk(
            text="y",
            token_ids=(8,),
            revision="r1",
            index=0,
            finish_reason=FinishReason.LENGTH,
            usage=USAGE,
        ),
    ]
    stub, _ = await open_inference(*chunks)
    message = inference_pb2.GenerateRequest(text="Hello", n=2)
    length = {"text": "xy", "token_ids": [7, 8], "finish_reason": inference_pb2.FINISH_REASON_LENGTH}
    stop = inference_pb2.Choice(
        index=1,
        text="ab",
        token_ids=[1, 2],
        finish_reason=inference_pb2.FINISH_REASON_STOP,
        stop_token_id=2,
        logprobs=[FOUND_MESSAGE, FOUND_MESSAGE.top[0]],
    )
    assert await stub.Generate(message) == inference_pb2.GenerateResponse(
        **length, usage=USAGE_MESSAGE, revision="r1", choices=[inference_pb2.Choice(**length), stop]
    )
    streamed = [message async for message in stub.GenerateStream(message)]
    assert [(each.index, each.text) for each in streamed] == [(1, "a"), (0, "x"), (1, "b"), (0, "y")]
    assert [each.HasField("usage") for each in streamed] == [False, False, False, True]


async def test_an_error_after_some_chunks_ends_both_kinds_of_call(open_inference):
    stub, generate = await open_inference(CHUNKS[0], error=QueueFullError("full", retry_after=1.0))
    message = inference_pb2.GenerateRequest(text="Hello")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Generate(message)
    assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    stream = stub.GenerateStream(message)
    assert (await stream.read()).text == CHUNKS[0].text
    with pytest.raises(grpc.aio.AioRpcError):
        await stream.read()
    assert (await stream.code(), await stream.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    assert generate.closed


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_client_that_leaves_closes_its_generation(open_door, scripted, method):
    waiting, cancelled = asyncio.Event(), asyncio.Event()

    async def never():
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    generate = scripted(CHUNKS[0], never)
    door = await open_door(generation=SimpleNamespace(generate=generate))
    call = getattr(door.inference, method)(inference_pb2.GenerateRequest(text="Hello"))
    if method == "GenerateStream":
        await call.read()
    await waiting.wait()
    call.cancel()
    await cancelled.wait()
    await door.server.calls.wait(600)
    assert (generate.closed, door.server.calls.num_running) == (True, 0)
