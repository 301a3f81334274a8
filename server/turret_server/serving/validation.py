"""Validation of requests, field by field, before anything is done with them.

The bounds of the fields are in `request_fields`, which is generated from the protocol. What depends on the
model is checked by `ModelInfo`, once the prompt is tokenised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from turret_adapters.registry import Named
from turret_server.errors import InvalidRequestError
from turret_server.lifecycle.revisions import check_revision
from turret_server.serving.chat import Chat, Message, ToolChoice
from turret_server.serving.request import AdapterRef, GenerationRequest, PinRequest, TextBatch
from turret_server.serving.request_fields import (
    ADAPTER_FIELDS,
    BATCH_FIELDS,
    FIELDS,
    PIN_FIELDS,
    FieldRule,
)
from turret_server.serving.structured import form_of
from turret_server.tenancy.auth import Caller
from turret_server.tenancy.tenants import check_name

MAX_ADAPTERS = 8
MAX_MESSAGES = 4096
MAX_TOOLS = 128
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Variables of chat templates that the request has fields for.
_OWN_VARIABLES = {"messages", "tools", "add_generation_prompt", "continue_final_message"}


def validate(request: GenerationRequest | PinRequest) -> list[Named]:
    """Check all fields of a request; returns its adapters for the registry.

    Raises:
        InvalidRequestError: a field is invalid.
    """
    check_fields(request, FIELDS if isinstance(request, GenerationRequest) else PIN_FIELDS)
    if isinstance(request, GenerationRequest):
        _check_together(request)
    if request.prompt is None:
        raise InvalidRequestError("the request has no prompt; set text, token_ids or chat", field="prompt")
    if isinstance(request.prompt, Chat):
        check_chat(request.prompt)
    return check_adapters(request.adapters)


def _check_together(request: GenerationRequest) -> None:
    if request.n > 1 and request.temperature == 0:
        raise InvalidRequestError(
            f"n is {request.n}, and at temperature 0 all answers are the same; set a temperature, or n to 1",
            field="n",
        )
    if request.max_tokens is not None and request.min_tokens > request.max_tokens:
        raise InvalidRequestError(
            f"min_tokens is at most max_tokens, which is {request.max_tokens}; found {request.min_tokens}",
            field="min_tokens",
        )
    form_of(request)


def validate_batch(batch: TextBatch) -> list[Named]:
    """Check all fields of a batch of texts; returns its adapters for the registry.

    Raises:
        InvalidRequestError: a field is invalid.
    """
    check_fields(batch, BATCH_FIELDS)
    if not batch.inputs:
        raise InvalidRequestError("the batch has no inputs; give at least one", field="inputs")
    for number, each in enumerate(batch.inputs):
        if each is None:
            raise InvalidRequestError(
                f"inputs[{number}] is empty; set text, token_ids or pair", field="inputs", input=number
            )
    return check_adapters(batch.adapters)


def check_num_answers(num_answers: int, caller: Caller, field: str) -> None:
    """Check that the answers of one call, which are queued together, fit into the tenant's queue.

    Raises:
        InvalidRequestError: they do not, however empty the queue is.
    """
    most = caller.tenant.limits.max_queued_requests
    what = "inputs" if field == "inputs" else "answers"
    if num_answers > most:
        raise InvalidRequestError(
            f"a call has at most {most} {what}, as many as its tenant may queue; found {num_answers}; send "
            "several calls",
            field=field,
        )


def check_num_tokens(nums_tokens: Sequence[int], caller: Caller, field: str) -> None:
    """Check that several answers with so many tokens each, prompt and `max_tokens`, or several inputs of a
    batch, fit into the tenant's queue together. One alone always does.

    Raises:
        InvalidRequestError: they do not, however empty the queue is.
    """
    most, found = caller.tenant.limits.max_queued_tokens, sum(nums_tokens)
    if len(nums_tokens) > 1 and found > most:
        raise InvalidRequestError(
            f"a call has at most {most} tokens, as many as its tenant may queue; "
            f"found {found}; {'' if field == 'inputs' else 'lower n or max_tokens, or '}send several calls",
            field=field,
        )


def check_fields(request: object, rules: Mapping[str, FieldRule]) -> None:
    """Check the fields of a request that have a rule; a field that is None is not set.

    Raises:
        InvalidRequestError: a value is outside of its bounds.
    """
    for field, rule in rules.items():
        value = getattr(request, field)
        if isinstance(value, list | tuple):
            _check_items(field, value, rule)
        elif isinstance(value, Mapping):
            _check_items(field, list(value.values()), rule)
        elif isinstance(value, str):
            _check_length(field, value, rule)
        elif value is not None:
            _check_number(field, value, rule)


def _check_items(field: str, values: Sequence[str | float], rule: FieldRule) -> None:
    if rule.max_items is not None and len(values) > rule.max_items:
        raise InvalidRequestError(
            f"{field} has at most {rule.max_items} items; found {len(values)}", field=field
        )
    for value in values:
        if isinstance(value, str):
            _check_length(field, value, rule)
        else:
            _check_number(field, value, rule)


def _check_length(field: str, value: str, rule: FieldRule) -> None:
    low, high = rule.min_length or 0, math.inf if rule.max_length is None else rule.max_length
    if not low <= len(value) <= high:
        allowed = f"{low} to {high:g}" if low else f"at most {high:g}"
        raise InvalidRequestError(f"{field} has {allowed} characters; found {len(value)}", field=field)


def _check_number(field: str, value: float, rule: FieldRule) -> None:
    low = -math.inf if rule.min is None else rule.min
    high = math.inf if rule.max is None else rule.max
    above = value > low if rule.exclusive_min else value >= low
    if math.isfinite(value) and above and value <= high:
        return
    if rule.exclusive_min:
        allowed = f"above {low:g} and at most {high:g}"
    elif math.isfinite(high):
        allowed = f"from {low:g} to {high:g}"
    else:
        allowed = f"at least {low:g}"
    raise InvalidRequestError(f"{field} is {allowed}; found {value}", field=field)


def check_chat(chat: Chat) -> None:
    """Check a chat before it is rendered.

    Raises:
        InvalidRequestError: there is no message, one has no role or no content, a tool is not described as a
            function, or `tool_choice` or `template_arguments` ask for what is not possible.
    """
    if not 0 < len(chat.messages) <= MAX_MESSAGES:
        raise InvalidRequestError(
            f"messages has 1 to {MAX_MESSAGES} items; found {len(chat.messages)}", field="messages"
        )
    for number, message in enumerate(chat.messages):
        _check_message(f"messages[{number}]", message)
    if len(chat.tools) > MAX_TOOLS:
        raise InvalidRequestError(
            f"tools has at most {MAX_TOOLS} items; found {len(chat.tools)}", field="tools"
        )
    for number, tool in enumerate(chat.tools):
        _check_tool(f"tools[{number}]", tool)
    if chat.tool_choice is ToolChoice.REQUIRED and not chat.tools:
        raise InvalidRequestError("tool_choice is required, but the chat has no tools", field="tool_choice")
    names = [tool["function"]["name"] for tool in chat.tools]
    if chat.tool_name and chat.tool_name not in names:
        raise InvalidRequestError(
            f"tool_choice names a function that is not in tools: {chat.tool_name[:80]!r}; give one of "
            f"{', '.join(map(repr, names))[:200]}",
            field="tool_choice",
        )
    if taken := _OWN_VARIABLES & chat.template_arguments.keys():
        raise InvalidRequestError(
            f"template_arguments has no {min(taken)!r}, which is a field of the request; set that",
            field="template_arguments",
        )


def _check_message(name: str, message: Message) -> None:
    if message.role not in _ROLES:
        raise InvalidRequestError(
            f"{name}.role is one of {', '.join(_ROLES)}; found {message.role[:80]!r}", field="messages"
        )
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequestError(
            f"{name}.tool_calls: only an assistant calls tools; found role {message.role!r}", field="messages"
        )
    if not (message.content or message.tool_calls):
        raise InvalidRequestError(f"{name} has no content; give its text", field="messages")


def _check_tool(name: str, tool: Mapping[str, Any]) -> None:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise InvalidRequestError(
            f'{name} is {{"type": "function", "function": {{"name": ...}}}}; found another form',
            field="tools",
        )
    called = function.get("name")
    if not isinstance(called, str) or not called:
        raise InvalidRequestError(f"{name}.function.name is a text; found none", field="tools")


def check_adapters(adapters: Sequence[AdapterRef]) -> list[Named]:
    """Names, weights, tasks and revisions of a request's adapters, for the registry.

    Raises:
        InvalidRequestError: there are too many, one is named twice, or a name, revision or weight is invalid.
    """
    if len(adapters) > MAX_ADAPTERS:
        raise InvalidRequestError(
            f"a request names at most {MAX_ADAPTERS} adapters; found {len(adapters)}", field="adapters"
        )
    named = []
    for ref in adapters:
        name, mark, beginning = ref.name.partition("@")
        revision = check_revision(beginning, "adapters") if mark else None
        check_name(name, "adapters")
        check_fields(ref, ADAPTER_FIELDS)
        named.append(Named(name, ref.weight, ref.task, revision))
    if len({(each.name, each.task) for each in named}) < len(named):
        raise InvalidRequestError("an adapter is named twice; name each once", field="adapters")
    return named
