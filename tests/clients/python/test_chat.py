from __future__ import annotations

import json
import re

import pytest

from support import scripted_server as script
from turret.v1 import chat_pb2, inference_pb2, model_pb2
from turret_client import (
    AdapterMethod,
    ChatOptions,
    Choice,
    FinishReason,
    Generation,
    InvalidArgumentError,
    Limits,
    Model,
    ToolCall,
    ToolCallDelta,
    Usage,
)

USAGE = Usage(prompt_tokens=3, cached_tokens=2, generated_tokens=4)
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}
CALL = chat_pb2.ToolCall(id="call_1", name="f", arguments='{"a": 1}')
METHODS = pytest.mark.parametrize("method", ["chat", "stream_chat"])


def sent(call, server, method, messages, **options) -> chat_pb2.Chat:
    call(method, messages, **options)
    [request] = server.requests
    assert request.WhichOneof("prompt") == "chat"
    return request.chat


@METHODS
def test_messages_reach_the_server(call, server, method):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Hello", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "Hm.",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": {"b": "é"}}},
            ],
        },
        {"role": "tool", "content": "", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "So.", "reasoning_content": "Ah."},
    ]
    chat = sent(call, server, method, messages)
    assert chat == chat_pb2.Chat(
        messages=[
            chat_pb2.ChatMessage(role="system", content=["Be", "brief."]),
            chat_pb2.ChatMessage(role="user", content=["Hello"], name="ann"),
            chat_pb2.ChatMessage(
                role="assistant",
                reasoning="Hm.",
                tool_calls=[CALL, chat_pb2.ToolCall(id="call_2", name="g", arguments='{"b": "é"}')],
            ),
            chat_pb2.ChatMessage(role="tool", content=[""], tool_call_id="call_1"),
            chat_pb2.ChatMessage(role="assistant", content=["So."], reasoning="Ah."),
        ]
    )


@METHODS
def test_options_of_the_chat_and_of_the_generation_reach_the_server(call, server, method):
    chat = sent(
        call,
        server,
        method,
        HELLO,
        tools=[TOOL],
        tool_choice="none",
        template_arguments={"enable_thinking": False},
        add_generation_prompt=False,
        continue_final_message=True,
        adapter="pirate",
        temperature=0.5,
    )
    assert [json.loads(tool) for tool in chat.tools] == [TOOL]
    assert list(json.loads(chat.tools[0])["function"]["parameters"]) == ["z", "a"]
    assert json.loads(chat.template_arguments) == {"enable_thinking": False}
    assert chat.tool_choice == chat_pb2.TOOL_CHOICE_NONE
    assert (chat.HasField("add_generation_prompt"), chat.add_generation_prompt) == (True, False)
    assert chat.continue_final_message
    [request] = server.requests
    assert ([each.name for each in request.adapters], request.temperature) == (["pirate"], 0.5)


@METHODS
def test_none_leaves_every_option_of_a_chat_unset(call, server, method):
    options = dict.fromkeys(ChatOptions.__annotations__)
    assert sent(call, server, method, HELLO, **options) == chat_pb2.Chat(
        messages=[chat_pb2.ChatMessage(role="user", content=["Hello"])]
    )


def test_the_options_are_the_fields_of_a_chat():
    fields = {field.name for field in chat_pb2.Chat.DESCRIPTOR.fields} - {"messages", "tool_name"}
    assert set(ChatOptions.__annotations__) == fields
    assert set(re.findall(r"^        (\w+): ", ChatOptions.__doc__, re.MULTILINE)) == fields


@pytest.mark.parametrize(
    ("choice", "value", "name"),
    [
        ("auto", chat_pb2.TOOL_CHOICE_AUTO, ""),
        ("required", chat_pb2.TOOL_CHOICE_REQUIRED, ""),
        ({"type": "function", "function": {"name": "f"}}, chat_pb2.TOOL_CHOICE_REQUIRED, "f"),
    ],
)
def test_a_tool_may_be_required(call, server, choice, value, name):
    chat = sent(call, server, "chat", HELLO, tool_choice=choice)
    assert (chat.tool_choice, chat.tool_name) == (value, name)


@pytest.mark.parametrize(
    ("messages", "options", "field", "message"),
    [
        ("Hello", {}, "messages", "a list of mappings"),
        (HELLO[0], {}, "messages", "a list of mappings"),
        (["Hello"], {}, "messages", r"messages\[0\] is a mapping"),
        ([{"role": "user", "text": "x"}], {}, "messages", "has no 'text'"),
        ([{"role": "user", "content": 1}], {}, "messages", "a text or a list"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "messages", "only parts of the form"),
        ([{"role": "user", "content": "\udcff"}], {}, "content", "UTF-8"),
        ([{"role": 1, "content": ""}], {}, "role", "UTF-8"),
        ([{"role": "assistant", "tool_calls": ["f"]}], {}, "messages", "tool_calls of the form"),
        (HELLO, {"tools": [{"x": {1}}]}, "tools", "JSON"),
        (HELLO, {"tools": ["f"]}, "tools", "mapping"),
        (HELLO, {"tool_choice": "any"}, "tool_choice", "tool_choice is"),
        (HELLO, {"template_arguments": {"x": float("nan")}}, "template_arguments", "JSON"),
    ],
)
def test_what_is_no_chat_is_refused_before_it_is_sent(call, server, messages, options, field, message):
    with pytest.raises(InvalidArgumentError, match=message) as refused:
        call("chat", messages, **options)
    assert refused.value.metadata["field"] == field
    assert server.requests == []


def test_an_unknown_option_is_refused(call):
    with pytest.raises(TypeError, match="unknown option 'tool'"):
        call("chat", HELLO, tool=[TOOL])


def test_an_answer_with_calls_is_the_next_message(call, server):
    server.generation = inference_pb2.GenerateResponse(
        token_ids=[7],
        reasoning="Hm.",
        tool_calls=[CALL],
        finish_reason=inference_pb2.FINISH_REASON_TOOL_CALLS,
        usage=script.USAGE,
        choices=[inference_pb2.Choice(), inference_pb2.Choice(index=1, reasoning="So.", tool_calls=[CALL])],
    )
    answer = call("chat", HELLO)
    called = ToolCall(id="call_1", name="f", arguments='{"a": 1}')
    choices = tuple(
        Choice(
            index=index,
            text="",
            token_ids=(),
            finish_reason=FinishReason.UNSPECIFIED,
            reasoning=reasoning,
            tool_calls=calls,
        )
        for index, reasoning, calls in ((0, "", ()), (1, "So.", (called,)))
    )
    assert answer == Generation(
        text="",
        token_ids=(7,),
        finish_reason=FinishReason.TOOL_CALLS,
        usage=USAGE,
        revision="",
        reasoning="Hm.",
        tool_calls=(called,),
        choices=choices,
    )
    assert answer.message == {
        "role": "assistant",
        "reasoning": "Hm.",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        ],
    }
    call("chat", [*HELLO, answer.message])
    assert server.requests[1].chat.messages[1].tool_calls == [CALL]


def test_a_text_is_the_next_message(call):
    assert call("chat", HELLO).message == {"role": "assistant", "content": "Ahoy, mátey"}


def test_a_stream_has_what_is_new_of_calls(call, server):
    server.chunks = (
        inference_pb2.GenerateStreamResponse(reasoning="Hm."),
        inference_pb2.GenerateStreamResponse(
            tool_calls=[chat_pb2.ToolCallDelta(index=1, id="call_1", name="f", arguments="{")]
        ),
    )
    first, second = call("stream_chat", HELLO)
    assert (first.reasoning, first.tool_calls) == ("Hm.", ())
    assert second.tool_calls == (ToolCallDelta(index=1, id="call_1", name="f", arguments="{"),)


def test_the_model_is_described(call):
    assert call("model") == Model(
        name="tiny",
        max_context=64,
        vocab_size=320,
        has_chat_template=True,
        calls_tools=True,
        adapter_methods=(AdapterMethod.LORA, AdapterMethod.VERA),
        limits=Limits(
            max_adapters=8,
            max_messages=9,
            max_tools=10,
            max_queued_requests=11,
            max_queued_tokens=12,
            max_pinned_tokens=None,
        ),
    )


def test_prompts_become_tokens_and_tokens_text(call, server):
    assert call("tokenize", "ab", adapter="pirate", add_special_tokens=False) == (5, 6)
    assert call("tokenize", HELLO, add_generation_prompt=False) == (5, 6)
    assert call("detokenize", [5, 6], adapter="pirate") == "<s>ab"
    text, chat, ids = server.requests
    assert (text.text, text.adapters[0].name, text.add_special_tokens) == ("ab", "pirate", False)
    assert chat == model_pb2.TokenizeRequest(
        chat=chat_pb2.Chat(
            messages=[chat_pb2.ChatMessage(role="user", content=["Hello"])], add_generation_prompt=False
        )
    )
    assert (list(ids.token_ids), ids.adapters[0].name) == ([5, 6], "pirate")
