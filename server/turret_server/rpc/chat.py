"""Chats and calls of tools over gRPC."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from turret.v1 import chat_pb2
from turret_server.errors import InvalidRequestError
from turret_server.serving.chat import Chat, Message, ToolCall, ToolCallDelta, ToolChoice

_TOOL_CHOICES = {
    chat_pb2.TOOL_CHOICE_NONE: ToolChoice.NONE,
    chat_pb2.TOOL_CHOICE_REQUIRED: ToolChoice.REQUIRED,
}


def chat_of(message: chat_pb2.Chat) -> Chat:
    """The chat of a message.

    Raises:
        InvalidRequestError: a tool or the template's arguments are no JSON object.
    """
    return Chat(
        messages=tuple(map(_message_of, message.messages)),
        tools=tuple(_object(tool, f"tools[{index}]", "tools") for index, tool in enumerate(message.tools)),
        tool_choice=_TOOL_CHOICES.get(message.tool_choice, ToolChoice.AUTO),
        tool_name=message.tool_name,
        add_generation_prompt=(
            message.add_generation_prompt if message.HasField("add_generation_prompt") else True
        ),
        continue_final_message=message.continue_final_message,
        template_arguments=(
            _object(message.template_arguments, "template_arguments", "template_arguments")
            if message.template_arguments
            else {}
        ),
    )


def _message_of(message: chat_pb2.ChatMessage) -> Message:
    return Message(
        role=message.role,
        content=tuple(message.content),
        reasoning=message.reasoning,
        tool_calls=tuple(
            ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in message.tool_calls
        ),
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _object(text: str, name: str, field: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} is a JSON object; found: {error}", field=field) from error
    if not isinstance(found, dict):
        raise InvalidRequestError(f"{name} is a JSON object; found a JSON value of another type", field=field)
    return found


def delta_messages(deltas: Iterable[ToolCallDelta]) -> list[chat_pb2.ToolCallDelta]:
    return [
        chat_pb2.ToolCallDelta(index=each.index, id=each.id, name=each.name, arguments=each.arguments)
        for each in deltas
    ]


def add_deltas(deltas: Sequence[ToolCallDelta], calls: Any) -> None:
    """Add what is new to the calls of an answer, a repeated field."""
    for delta in deltas:
        if delta.index == len(calls):
            calls.add(id=delta.id, name=delta.name)
        calls[delta.index].arguments += delta.arguments
