"""Chats as plain data: what a chat template makes a prompt of, and what is parsed from its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class ToolChoice(StrEnum):
    """Whether an answer may call the tools of its chat."""

    AUTO = "auto"  # the model decides
    NONE = "none"  # it may not: the template gets no tools, and what looks like a call is text
    REQUIRED = "required"  # it must call one, or the one that `Chat.tool_name` names


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a function. `arguments` is JSON as the model wrote it, which need not be valid."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """What is new of the call number `index` of an answer, from 0. `id` and `name` come with the first delta
    of a call and are "" in the others; the `arguments` of all make those of the call.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message of a chat.

    Attributes:
        role: "system", "developer", "user", "assistant" or "tool".
        content: text parts, mostly one; () is none, as in a message that only calls tools.
        reasoning: how an assistant came to its answer; a template may leave it out.
        tool_calls: calls that an assistant made.
        tool_call_id: the call that a tool's message is the result of.
        name: name of the author, or of the tool.
    """

    role: str
    content: tuple[str, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A prompt that is rendered by the chat template of the adapter, or else of the model.

    Attributes:
        messages: in their order; at least one.
        tools: functions that the answer may call, as {"type": "function", "function": {"name": ...}}.
        tool_choice: whether it may, or must.
        tool_name: the function that it must call, with `ToolChoice.REQUIRED`; "" is any.
        add_generation_prompt: end with the beginning of an assistant's message.
        continue_final_message: end within the last message, which the answer continues; without a generation
            prompt.
        template_arguments: further variables of the template, such as {"enable_thinking": False}.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: ToolChoice = ToolChoice.AUTO
    tool_name: str = ""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
