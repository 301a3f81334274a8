"""POST /v1/chat/completions over a scripted service: what a request and what chunks become."""

from __future__ import annotations

import pytest

from server.web.conftest import USAGE, Generation, chunk, last
from server.web.test_completions import USED, events, logprob
from turret_server.serving.chat import Chat, Message, ToolCall, ToolCallDelta, ToolChoice
from turret_server.serving.request import FinishReason, GenerationRequest

PATH = "/v1/chat/completions"
HELLO = {"role": "user", "content": "Hello"}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "the weather", "parameters": {"type": "object"}},
}


async def asked(door, **fields) -> GenerationRequest:
    answer = await door.post(PATH, {"messages": [HELLO], **fields})
    assert answer.status_code == 200, answer.text
    return door.generation.request


def chat(*messages: Message, **more) -> Chat:
    return Chat(messages=messages or (Message(role="user", content=("Hello",)),), **more)


async def test_a_request_has_openais_defaults(door):
    assert await asked(door) == GenerationRequest(prompt=chat(), temperature=1.0)


@pytest.mark.parametrize(
    ("sent", "becomes"),
    [
        ({"max_tokens": 3}, {"max_tokens": 3}),
        ({"max_completion_tokens": 3}, {"max_tokens": 3}),
        ({"max_completion_tokens": 3, "max_tokens": 3}, {"max_tokens": 3}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 5}, {"logprobs": 5}),
        ({"logprobs": False, "top_logprobs": None}, {}),
        ({"n": 2, "stop": "."}, {"n": 2, "stop": (".",)}),
        ({"tools": [WEATHER]}, {"prompt": chat(tools=(WEATHER,))}),
        (
            {"tools": [WEATHER], "tool_choice": "none"},
            {"prompt": chat(tools=(WEATHER,), tool_choice=ToolChoice.NONE)},
        ),
        (
            {"tools": [WEATHER], "tool_choice": "required"},
            {"prompt": chat(tools=(WEATHER,), tool_choice=ToolChoice.REQUIRED)},
        ),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
            {"prompt": chat(tools=(WEATHER,), tool_choice=ToolChoice.REQUIRED, tool_name="weather")},
        ),
        ({"add_generation_prompt": False}, {"prompt": chat(add_generation_prompt=False)}),
        (
            {"continue_final_message": True},
            {"prompt": chat(continue_final_message=True, add_generation_prompt=False)},
        ),
        ({"chat_template_kwargs": {"a": 1}}, {"prompt": chat(template_arguments={"a": 1})}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"parallel_tool_calls": True, "store": False, "service_tier": "auto", "metadata": {}}, {}),
    ],
)
async def test_a_field_becomes_the_services(door, sent, becomes):
    assert await asked(door, **sent) == GenerationRequest(**{"prompt": chat(), "temperature": 1.0} | becomes)


@pytest.mark.parametrize(
    ("sent", "becomes"),
    [
        (
            {"role": "developer", "content": "x", "name": "me"},
            Message(role="developer", content=("x",), name="me"),
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            Message(role="user", content=("a", "b")),
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "hm",
                "refusal": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
                ],
            },
            Message(
                role="assistant",
                reasoning="hm",
                tool_calls=(ToolCall(id="1", name="weather", arguments="{}"),),
            ),
        ),
        (
            {"role": "tool", "content": "fine", "tool_call_id": "1"},
            Message(role="tool", content=("fine",), tool_call_id="1"),
        ),
    ],
)
async def test_a_message_becomes_the_services(door, sent, becomes):
    assert (await asked(door, messages=[HELLO, sent])).prompt.messages[1] == becomes


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages"),
        ({"messages": [HELLO | {"audio": {"id": "1"}}]}, "audio"),
        ({"messages": [HELLO | {"mood": "good"}]}, "messages"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"tools": [{"type": "custom"}]}, "tools"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"store": True}, "store"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"prompt": "x"}, "prompt"),
    ],
)
async def test_a_field_that_is_not_served_is_refused_by_its_name(door, sent, param):
    refused = await door.post(PATH, {"messages": [HELLO], **sent})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert door.generation.requests == []


async def test_an_answer_is_a_message(door):
    answer = (
        await door.post(PATH, {"messages": [HELLO], "model": "pirate"}, **{"x-request-id": "mine"})
    ).json()
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "id": "chatcmpl-mine",
        "object": "chat.completion",
        "model": "pirate",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Ahoy, matey", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "system_fingerprint": "r1",
        "usage": USED,
    }


CALLS = (
    chunk("", reasoning="hm"),
    chunk("", tool_calls=(ToolCallDelta(index=0, id="1", name="weather"),)),
    chunk(
        "", tool_calls=(ToolCallDelta(index=0, arguments="{"), ToolCallDelta(index=1, id="2", name="time"))
    ),
    last("", tool_calls=(ToolCallDelta(index=0, arguments="}"),), finish_reason=FinishReason.TOOL_CALLS),
)


async def test_an_answer_has_its_reasoning_and_its_calls(open_door):
    answer = (await open_door(generation=Generation(*CALLS)).post(PATH, {"messages": [HELLO]})).json()
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            {"id": "2", "type": "function", "function": {"name": "time", "arguments": ""}},
        ],
    }


async def test_the_deltas_of_a_stream_add_up_to_the_message(open_door):
    door = open_door(generation=Generation(*CALLS))
    found = events((await door.post(PATH, {"messages": [HELLO], "stream": True})).text)
    assert {each["object"] for each in found} == {"chat.completion.chunk"}
    assert [each["choices"][0]["delta"] for each in found] == [
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
        {
            "tool_calls": [
                {"index": 0, "id": "1", "type": "function", "function": {"name": "weather", "arguments": ""}}
            ]
        },
        {
            "tool_calls": [
                {"index": 0, "function": {"arguments": "{"}},
                {"index": 1, "id": "2", "type": "function", "function": {"name": "time", "arguments": ""}},
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
    ]
    assert [each["choices"][0]["finish_reason"] for each in found] == [None, None, None, "tool_calls"]


async def test_the_first_delta_of_each_answer_has_the_role(open_door):
    chunks = (chunk("a"), chunk("b", index=1), last("c", usage=None), last("d", index=1))
    door = open_door(generation=Generation(*chunks))
    options = {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
    *found, usage = events((await door.post(PATH, {"messages": [HELLO], **options})).text)
    assert [(each["choices"][0]["index"], each["choices"][0]["delta"]) for each in found] == [
        (0, {"role": "assistant", "content": "a"}),
        (1, {"role": "assistant", "content": "b"}),
        (0, {"content": "c"}),
        (1, {"content": "d"}),
    ]
    assert (usage["choices"], usage["usage"]) == ([], USED)
    answer = (
        await open_door(generation=Generation(*chunks)).post(PATH, {"messages": [HELLO], "n": 2})
    ).json()
    assert [each["message"]["content"] for each in answer["choices"]] == ["ac", "bd"]


async def test_log_probabilities_have_the_bytes_of_the_tokens(open_door):
    scored = last("ü", logprobs=(logprob("ü", -1.0, logprob("B", -0.5)),), usage=USAGE)
    door = open_door(generation=Generation(scored))
    options = {"logprobs": True, "top_logprobs": 1}
    answer = (await door.post(PATH, {"messages": [HELLO], **options})).json()
    assert answer["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "ü",
                "logprob": -1.0,
                "bytes": [195, 188],
                "top_logprobs": [{"token": "B", "logprob": -0.5, "bytes": [66]}],
            }
        ],
        "refusal": None,
    }


async def test_the_log_probabilities_of_the_prompt_are_those_of_vllm(open_door):
    door = open_door(generation=Generation(last("A", prompt_logprobs=(logprob("y", -4.0),))))
    answer = (await door.post(PATH, {"messages": [HELLO], "prompt_logprobs": 0})).json()
    [choice] = answer["choices"]
    assert choice["prompt_logprobs"][1][str(ord("y"))]["decoded_token"] == "y"
