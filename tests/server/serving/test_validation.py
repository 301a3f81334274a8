from __future__ import annotations

from dataclasses import fields, replace

import pytest

from turret_server.engine.admission import TenantLimits
from turret_server.errors import InvalidRequestError
from turret_server.serving.chat import Chat, Message, ToolCall, ToolChoice
from turret_server.serving.request import AdapterRef, GenerationRequest
from turret_server.serving.request_fields import FIELDS, RequestFields
from turret_server.serving.validation import (
    check_adapters,
    check_chat,
    check_fields,
    check_num_tokens,
    validate,
)

REQUEST = GenerationRequest(prompt="Hello")


def refusal(**values: object) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as refused:
        check_fields(replace(REQUEST, **values), FIELDS)
    return refused.value


def test_every_field_has_a_rule_and_a_default_that_keeps_it():
    assert {field.name for field in fields(RequestFields)} == set(FIELDS)
    check_fields(REQUEST, FIELDS)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [1, 2**31 - 1]),
        ("temperature", [0.0, 1e-9, 100.0]),
        ("top_p", [1e-9, 1.0]),
        ("top_k", [0, 1]),
        ("seed", [0, 2**64 - 1]),
        ("stop", [(), ("x",) * 16, ("x" * 256,), ["as", "a", "list"]]),
        ("priority", [-10, 0, 10]),
        ("cache_salt", ["", "ü" * 128]),
        ("routing_key", ["", "ü" * 128]),
        ("logit_bias", [{}, dict.fromkeys(range(300), 100.0), {5: -100.0}]),
    ],
)
def test_values_within_their_bounds_are_valid(field, values):
    for value in values:
        check_fields(replace(REQUEST, **{field: value}), FIELDS)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens is at least 1; found 0"),
        ("max_tokens", -(2**31), "max_tokens is at least 1; found -2147483648"),
        ("temperature", -0.001, "temperature is from 0 to 100; found -0.001"),
        ("temperature", 100.1, "temperature is from 0 to 100; found 100.1"),
        ("temperature", float("nan"), "temperature is from 0 to 100; found nan"),
        ("temperature", float("inf"), "temperature is from 0 to 100; found inf"),
        ("top_p", 0.0, "top_p is above 0 and at most 1; found 0.0"),
        ("top_p", 1.001, "top_p is above 0 and at most 1; found 1.001"),
        ("top_p", float("nan"), "top_p is above 0 and at most 1; found nan"),
        ("top_k", -1, "top_k is at least 0; found -1"),
        ("logit_bias", dict.fromkeys(range(301), 0.0), "logit_bias has at most 300 items; found 301"),
        ("logit_bias", {5: -101.0}, "logit_bias is from -100 to 100; found -101.0"),
        ("logit_bias", {5: float("nan")}, "logit_bias is from -100 to 100; found nan"),
        ("stop", ("x",) * 17, "stop has at most 16 items; found 17"),
        ("stop", ("x", ""), "stop has 1 to 256 characters; found 0"),
        ("stop", ("x" * 257,), "stop has 1 to 256 characters; found 257"),
        ("priority", -11, "priority is from -10 to 10; found -11"),
        ("priority", 11, "priority is from -10 to 10; found 11"),
        ("cache_salt", "x" * 129, "cache_salt has at most 128 characters; found 129"),
        ("routing_key", "x" * 129, "routing_key has at most 128 characters; found 129"),
    ],
)
def test_a_value_outside_of_its_bounds_is_refused_by_name(field, value, message):
    refused = refusal(**{field: value})
    assert (str(refused), refused.metadata) == (message, {"field": field})


def test_an_adapter_is_named_with_weight_task_and_revision():
    [named] = check_adapters([AdapterRef(name="pirate@3f9a1c07", weight=-0.5, task=2)])
    assert (named.name, named.weight, named.task, named.revision) == ("pirate", -0.5, 2, "3f9a1c07")
    [plain] = check_adapters([AdapterRef(name="pirate")])
    assert (plain.weight, plain.task, plain.revision) == (1.0, None, None)


@pytest.mark.parametrize("weight", [-100.5, 100.5, -1e30, 1e30, float("nan"), float("-inf")])
def test_a_weight_outside_of_its_bounds_is_refused(weight):
    with pytest.raises(InvalidRequestError, match="weight is from -100 to 100") as refused:
        check_adapters([AdapterRef(name="pirate", weight=weight)])
    assert refused.value.metadata == {"field": "weight"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a b"], "an adapter's name has"),
        ([""], "an adapter's name has"),
        (["pirate@"], "first 8 to 32 digits"),
        (["pirate@3f9a1c0"], "first 8 to 32 digits"),
        (["pirate@" + "3" * 33], "first 8 to 32 digits"),
        (["pirate@3F9A1C07"], "first 8 to 32 digits"),
        (["pirate", "pirate"], "named twice"),
        (["pirate", "pirate@3f9a1c07"], "named twice"),
        ([f"a{number}" for number in range(9)], "at most 8 adapters; found 9"),
    ],
)
def test_adapters_that_cannot_be_named_so_are_refused(names, message):
    with pytest.raises(InvalidRequestError, match=message) as refused:
        check_adapters([AdapterRef(name=name) for name in names])
    assert refused.value.metadata == {"field": "adapters"}


def test_two_tasks_of_one_adapter_are_two_adapters():
    assert len(check_adapters([AdapterRef(name="multi", task=0), AdapterRef(name="multi", task=1)])) == 2
    assert len(check_adapters([AdapterRef(name=f"a{number}") for number in range(8)])) == 8


USER = Message(role="user", content=("Hello",))
CALL = ToolCall(id="1", name="f", arguments="{}")
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    "chat",
    [
        Chat(messages=(USER,) * 4096, tools=(TOOL,) * 128),
        Chat(messages=(USER,), tools=(TOOL,), tool_choice=ToolChoice.NONE),
        Chat(messages=(Message(role="assistant", tool_calls=(CALL,)), Message(role="tool", content=("",)))),
        Chat(messages=(Message(role="developer", content=("a", "b")),), template_arguments={"documents": []}),
    ],
)
def test_chats_that_can_be_rendered_are_valid(chat):
    check_chat(chat)
    validate(GenerationRequest(prompt=chat))


@pytest.mark.parametrize(
    ("chat", "field", "message"),
    [
        (Chat(messages=()), "messages", "messages has 1 to 4096 items; found 0"),
        (Chat(messages=(USER,) * 4097), "messages", "found 4097"),
        (
            Chat(messages=(USER, Message(role="bot", content=("x",)))),
            "messages",
            "messages[1].role is one of system, developer, user, assistant, tool; found 'bot'",
        ),
        (Chat(messages=(Message(role="user"),)), "messages", "messages[0] has no content; give its text"),
        (
            Chat(messages=(Message(role="user", content=("x",), tool_calls=(CALL,)),)),
            "messages",
            "messages[0].tool_calls: only an assistant calls tools; found role 'user'",
        ),
        (Chat(messages=(USER,), tools=(TOOL,) * 129), "tools", "tools has at most 128 items; found 129"),
        (Chat(messages=(USER,), tools=({"name": "f"},)), "tools", "tools[0] is"),
        (Chat(messages=(USER,), tools=({**TOOL, "function": {}},)), "tools", "tools[0].function.name is"),
        (Chat(messages=(USER,), tool_choice=ToolChoice.REQUIRED), "tool_choice", "has no tools"),
        (
            Chat(messages=(USER,), tools=(TOOL,), tool_choice=ToolChoice.REQUIRED, tool_name="g"),
            "tool_choice",
            "not in tools: 'g'; give one of 'f'",
        ),
        (Chat(messages=(USER,), tool_name="f"), "tool_choice", "not in tools: 'f'"),
        (
            Chat(messages=(USER,), template_arguments={"tools": []}),
            "template_arguments",
            "template_arguments has no 'tools'",
        ),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_refused_by_the_fields_name(chat, field, message):
    with pytest.raises(InvalidRequestError) as refused:
        validate(GenerationRequest(prompt=chat))
    assert message in str(refused.value)
    assert refused.value.metadata == {"field": field}


def test_answers_of_a_call_must_fit_into_its_tenants_queue_together_and_one_alone_always_does(caller_of):
    few = caller_of(limits=TenantLimits(max_queued_tokens=100))
    check_num_tokens([101], few, "n")
    check_num_tokens([60, 40], few, "n")
    with pytest.raises(InvalidRequestError, match="found 101"):
        check_num_tokens([60, 41], few, "n")
