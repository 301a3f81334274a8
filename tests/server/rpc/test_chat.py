from __future__ import annotations

from types import SimpleNamespace

import grpc
import pytest

from turret.v1 import chat_pb2, inference_pb2
from turret_server.serving.chat import Chat, Message, ToolCall, ToolCallDelta, ToolChoice
from turret_server.serving.request import Chunk, FinishReason, Usage

USAGE = Usage(prompt_tokens=3, cached_tokens=2, generated_tokens=4)
TOOL = '{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}'
HELLO = chat_pb2.ChatMessage(role="user", content=["Hello"])
CHUNKS = (
    Chunk(text="", reasoning="Hm", token_ids=(7,), revision="r1"),
    Chunk(text="Well", reasoning=".", token_ids=(8,), revision="r1"),
    Chunk(
        text="",
        token_ids=(9,),
        revision="r1",
        tool_calls=(
            ToolCallDelta(index=0, id="call_1", name="f", arguments='{"a": 1}'),
            ToolCallDelta(index=1, id="call_2", name="g", arguments='{"b'),
        ),
    ),
    Chunk(
        text="",
        token_ids=(2,),
        revision="r1",
        tool_calls=(ToolCallDelta(index=1, arguments='": 2}'),),
        finish_reason=FinishReason.TOOL_CALLS,
        usage=USAGE,
    ),
)


@pytest.fixture
async def open_inference(open_door, scripted):
    async def open_inference(*chunks):
        generate = scripted(*(chunks or CHUNKS))
        door = await open_door(generation=SimpleNamespace(generate=generate))
        return door.inference, generate

    return open_inference


async def received(open_inference, chat):
    """The chat that a message becomes."""
    stub, generate = await open_inference()
    await stub.Generate(inference_pb2.GenerateRequest(chat=chat))
    [(request, _)] = generate.calls
    return request.prompt


async def test_every_field_of_a_chat_is_passed_on(open_inference):
    message = chat_pb2.Chat(
        messages=[
            HELLO,
            chat_pb2.ChatMessage(
                role="assistant",
                reasoning="Hm.",
                tool_calls=[chat_pb2.ToolCall(id="call_1", name="f", arguments="{}")],
            ),
            chat_pb2.ChatMessage(role="tool", content=["one", "two"], tool_call_id="call_1", name="f"),
        ],
        tools=[TOOL],
        tool_choice=chat_pb2.TOOL_CHOICE_REQUIRED,
        tool_name="f",
        add_generation_prompt=False,
        continue_final_message=True,
        template_arguments='{"enable_thinking": false, "n": 1}',
    )
    chat = await received(open_inference, message)
    assert chat == Chat(
        messages=(
            Message(role="user", content=("Hello",)),
            Message(
                role="assistant",
                reasoning="Hm.",
                tool_calls=(ToolCall(id="call_1", name="f", arguments="{}"),),
            ),
            Message(role="tool", content=("one", "two"), tool_call_id="call_1", name="f"),
        ),
        tools=({"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}},),
        tool_choice=ToolChoice.REQUIRED,
        tool_name="f",
        add_generation_prompt=False,
        continue_final_message=True,
        template_arguments={"enable_thinking": False, "n": 1},
    )
    assert list(chat.tools[0]["function"]["parameters"]) == ["z", "a"]
    assert type(chat.template_arguments["n"]) is int


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (chat_pb2.TOOL_CHOICE_UNSPECIFIED, ToolChoice.AUTO),
        (chat_pb2.TOOL_CHOICE_AUTO, ToolChoice.AUTO),
        (chat_pb2.TOOL_CHOICE_NONE, ToolChoice.NONE),
    ],
)
async def test_a_chat_of_messages_alone_has_defaults(open_inference, value, expected):
    chat = await received(open_inference, chat_pb2.Chat(messages=[HELLO], tool_choice=value))
    assert chat == Chat(messages=(Message(role="user", content=("Hello",)),), tool_choice=expected)


@pytest.mark.parametrize("text", ["{", "[1]", "1", "[" * 10000, "null"])
@pytest.mark.parametrize("field", ["tools", "template_arguments"])
async def test_what_is_no_json_object_is_refused_by_name(open_inference, field, text):
    stub, generate = await open_inference()
    chat = chat_pb2.Chat(messages=[HELLO], **{field: [text] if field == "tools" else text})
    with pytest.raises(grpc.aio.AioRpcError, match=f"{field}.* is a JSON object") as refused:
        await stub.Generate(inference_pb2.GenerateRequest(chat=chat))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert generate.calls == []


async def test_the_one_answer_has_the_calls_and_the_reasoning_of_all_chunks(open_inference):
    stub, _ = await open_inference()
    answer = await stub.Generate(inference_pb2.GenerateRequest(chat=chat_pb2.Chat(messages=[HELLO])))
    assert (answer.text, answer.reasoning) == ("Well", "Hm.")
    assert list(answer.tool_calls) == [
        chat_pb2.ToolCall(id="call_1", name="f", arguments='{"a": 1}'),
        chat_pb2.ToolCall(id="call_2", name="g", arguments='{"b": 2}'),
    ]
    assert answer.finish_reason == inference_pb2.FINISH_REASON_TOOL_CALLS


async def test_each_choice_has_its_own_calls(open_inference):
    first = Chunk(text="a", token_ids=(7,), revision="r1", finish_reason=FinishReason.STOP)
    second = Chunk(
        text="",
        reasoning="Hm.",
        token_ids=(8,),
        revision="r1",
        index=1,
        tool_calls=(ToolCallDelta(index=0, id="call_1", name="f", arguments="{}"),),
        finish_reason=FinishReason.TOOL_CALLS,
        usage=USAGE,
    )
    stub, _ = await open_inference(first, second)
    answer = await stub.Generate(inference_pb2.GenerateRequest(chat=chat_pb2.Chat(messages=[HELLO])))
    assert [(len(each.tool_calls), each.reasoning) for each in answer.choices] == [(0, ""), (1, "Hm.")]
    assert not answer.tool_calls


async def test_a_stream_has_the_deltas_of_each_chunk(open_inference):
    stub, _ = await open_inference()
    request = inference_pb2.GenerateRequest(chat=chat_pb2.Chat(messages=[HELLO]))
    found = [message async for message in stub.GenerateStream(request)]
    assert [message.reasoning for message in found] == ["Hm", ".", "", ""]
    assert [
        [(each.index, each.id, each.name, each.arguments) for each in message.tool_calls] for message in found
    ] == [
        [],
        [],
        [(0, "call_1", "f", '{"a": 1}'), (1, "call_2", "g", '{"b')],
        [(1, "", "", '": 2}')],
    ]
    assert found[-1].finish_reason == inference_pb2.FINISH_REASON_TOOL_CALLS
