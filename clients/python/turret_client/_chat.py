"""Chats in the form that OpenAI's clients use, as request messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from turret.v1 import chat_pb2
from turret_client._messages import generate_request, message_of
from turret_client._options import GenerationOptions
from turret_client.errors import invalid_argument

if TYPE_CHECKING:
    from turret.v1 import inference_pb2
    from turret_client.errors import InvalidArgumentError

ChatMessages: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages such as {"role": "user", "content": "Hello"}; see `AsyncClient.chat`."""

ToolChoice: TypeAlias = Literal["auto", "none", "required"] | Mapping[str, Any]


class ChatOptions(TypedDict, total=False):
    """Keyword arguments of `chat`, `stream_chat` and `tokenize` for chats; all are optional.

    Attributes:
        tools: Functions that the answer may call, as {"type": "function", "function": {"name": "get_weather",
            "description": "...", "parameters": {...}}} with a JSON schema as parameters.
        tool_choice: "auto": the model decides; "none": no calls; "required": the answer is one call; or the
            function that must be called, as {"type": "function", "function": {"name": "f"}}. Default: "auto".
        template_arguments: Further variables of the chat template, such as {"enable_thinking": False}.
        add_generation_prompt: End the prompt with the beginning of an assistant's message. Default: True.
        continue_final_message: The answer continues the last message. Default: False.
    """

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: ToolChoice | None
    template_arguments: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None


class ChatGenerationOptions(ChatOptions, GenerationOptions, total=False):
    """Keyword arguments of `chat` and `stream_chat`."""


_TOOL_CHOICES = {
    "auto": chat_pb2.TOOL_CHOICE_AUTO,
    "none": chat_pb2.TOOL_CHOICE_NONE,
    "required": chat_pb2.TOOL_CHOICE_REQUIRED,
}
# The first is OpenAI's and vLLM's own field, the others are names that servers answer with.
_REASONING = ("reasoning", "reasoning_content")
_MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", *_REASONING}


def chat_request(messages: ChatMessages, options: Mapping[str, Any]) -> inference_pb2.GenerateRequest:
    """The request for an answer to a chat, with `ChatGenerationOptions`.

    Raises:
        TypeError: An option does not exist.
        InvalidArgumentError: A value is not of its form.
    """
    chat = {name: value for name, value in options.items() if name in ChatOptions.__annotations__}
    others = {name: value for name, value in options.items() if name not in chat}
    return generate_request(chat_of(messages, **chat), **others)


def chat_of(
    messages: ChatMessages,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: ToolChoice | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
) -> chat_pb2.Chat:
    """The chat of these messages.

    Raises:
        InvalidArgumentError: A value is not of its form.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise invalid_argument("messages", "messages is a list of mappings with role and content")
    choice, name = _tool_choice(tool_choice)
    return message_of(
        chat_pb2.Chat,
        messages=[_message(f"messages[{index}]", each) for index, each in enumerate(messages)],
        tools=[_json(tool, "tools") for tool in tools or ()],
        tool_choice=choice,
        tool_name=name,
        template_arguments=_json(template_arguments, "template_arguments") if template_arguments else None,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )


def _tool_choice(choice: ToolChoice | None) -> tuple[int | None, str | None]:
    if choice is None:
        return None, None
    if isinstance(choice, str) and choice in _TOOL_CHOICES:
        return _TOOL_CHOICES[choice], None
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise invalid_argument(
            "tool_choice",
            'tool_choice is "auto", "none", "required" or {"type": "function", "function": {"name": ...}}',
        )
    return chat_pb2.TOOL_CHOICE_REQUIRED, name


def _message(name: str, message: object) -> chat_pb2.ChatMessage:
    if not isinstance(message, Mapping):
        raise _refusal(name, "is a mapping with role and content")
    unknown = [key for key in message if key not in _MESSAGE_KEYS]
    if unknown:
        raise _refusal(name, f"has no {unknown[0]!r}; it has {', '.join(sorted(_MESSAGE_KEYS))}")
    return message_of(
        chat_pb2.ChatMessage,
        role=message.get("role"),
        content=_parts(name, message.get("content")),
        reasoning=next((message[key] for key in _REASONING if message.get(key)), None),
        tool_calls=[_call(name, call) for call in message.get("tool_calls") or ()],
        tool_call_id=message.get("tool_call_id"),
        name=message.get("name"),
    )


def _parts(name: str, content: object) -> list[str]:
    """The texts of a content that is a text, a list of parts, or missing."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Iterable):
        raise _refusal(name, "has a text or a list of text parts as content")
    found = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise _refusal(name, 'has only parts of the form {"type": "text", "text": ...}')
        found.append(text)
    return found


def _call(name: str, call: object) -> chat_pb2.ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise _refusal(name, 'has tool_calls of the form {"id": ..., "function": {"name", "arguments"}}')
    arguments = function.get("arguments", "{}")
    return message_of(
        chat_pb2.ToolCall,
        id=call.get("id"),
        name=function.get("name"),
        arguments=arguments if isinstance(arguments, str) else _json(arguments, "messages"),
    )


def _json(value: object, field: str) -> str:
    try:
        if not isinstance(value, Mapping):
            raise TypeError(f"a mapping is expected, and found {type(value).__name__}")  # noqa: TRY301 (one message)
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise invalid_argument(field, f"{field}: expected what JSON can express; {error}") from error


def _refusal(name: str, allowed: str) -> InvalidArgumentError:
    return invalid_argument("messages", f"{name} {allowed}")
