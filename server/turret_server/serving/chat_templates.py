"""Chats to prompts, by the chat template of an adapter or else of the model."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from turret_adapters.spec import AdapterSpec
from turret_server.errors import ChatTemplateError, InvalidRequestError, NoChatTemplateError
from turret_server.serving import render_template
from turret_server.serving.chat import Chat, Message, ToolCall, ToolChoice
from turret_server.serving.tools import AnswerFormat, answer_format, form_of

Templates: TypeAlias = "str | Mapping[str, str] | None"
"""A tokenizer's chat template, or several by their names, as transformers has them."""

# Longer than any prompt that fits into a request.
_MAX_CHARACTERS = 16 << 20
# How long a template that exceeded the limit of time is refused, so that it takes no more of it.
_REFUSED_SECONDS = 10.0
# Templates of adapters that are kept.
_CACHED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedChat:
    """The prompt of a chat, and how its answers are read; None as plain text."""

    prompt: str
    answers: AnswerFormat | None


class ChatTemplates:
    """Renders chats. Used on one event loop."""

    def __init__(
        self,
        base: Templates,
        read: Callable[[str], Templates],
        response_template: Mapping[str, Any] | None = None,
    ) -> None:
        """`base` are the templates of the model, and `read` reads those of a revision that has its own, see
        `AdapterLibrary.chat_template`. `response_template` is the tokenizer's, for answers to `base`.
        """
        self.base = base
        self._response_template = response_template
        self._read = read
        self._own: OrderedDict[str, Templates] = OrderedDict()
        # An operator's template does not wait for those of strangers.
        self._renderer = _Renderer(niceness=0)
        self._strangers = _Renderer(niceness=10)

    @property
    def calls_tools(self) -> bool:
        """Whether calls of tools in answers to `base` are found."""
        try:
            template = _chosen(self.base, with_tools=True)
        except NoChatTemplateError:
            return False
        return "tools" in template and (self._response_template is not None or form_of(template) is not None)

    def close(self) -> None:
        self._renderer.close()
        self._strangers.close()

    async def render(
        self, chat: Chat, adapters: Sequence[AdapterSpec], special_tokens: Mapping[str, str]
    ) -> RenderedChat:
        """The prompt of a chat for adapters that the caller holds.

        Args:
            chat: valid, see `validation.check_chat`.
            adapters: the first that has a chat template of its own decides.
            special_tokens: those of the vocabulary, by their names in templates.

        Raises:
            NoChatTemplateError: neither an adapter nor the model has a chat template.
            ChatTemplateError: the template refuses the chat, fails, or exceeds its limits.
            InvalidRequestError: the template has no tools, but the chat has.
            AdapterError: the template of an adapter is unreadable.
        """
        own = next((spec for spec in adapters if spec.chat_template), None)
        templates = await self._of_adapter(own) if own else self.base
        tools = () if chat.tool_choice is ToolChoice.NONE else chat.tools
        template = _chosen(templates, with_tools=bool(tools))
        if tools and "tools" not in template:
            raise InvalidRequestError(
                "the chat template has no place for tools; send none, or use a model that calls tools",
                field="tools",
            )
        request = {
            "template": template,
            "variables": {**special_tokens, **chat.template_arguments, **_variables(chat, tools)},
            "max_characters": _MAX_CHARACTERS,
            "continue_final_message": chat.continue_final_message,
        }
        prompt = await (self._strangers if own else self._renderer).render(template, request)
        response_template = None if own else self._response_template
        return RenderedChat(prompt=prompt, answers=answer_format(template, prompt, tools, response_template))

    async def _of_adapter(self, spec: AdapterSpec) -> Templates:
        if spec.chat_template not in self._own:
            self._own[spec.chat_template] = await asyncio.to_thread(self._read, spec.revision)
        self._own.move_to_end(spec.chat_template)
        if len(self._own) > _CACHED:
            self._own.popitem(last=False)
        return self._own[spec.chat_template]


def _chosen(templates: Templates, *, with_tools: bool) -> str:
    """The template for a chat, as transformers chooses it."""
    if isinstance(templates, str):
        return templates
    named = templates or {}
    for name in ("tool_use", "default") if with_tools else ("default",):
        if name in named:
            return named[name]
    raise NoChatTemplateError(
        "the model has no chat template; start the server with --chat-template FILE, use an adapter whose "
        "folder has one, or send the prompt as text"
    )


def _variables(chat: Chat, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "messages": [_message(message) for message in chat.messages],
        "tools": list(tools) or None,
        "documents": chat.template_arguments.get("documents"),
        "add_generation_prompt": chat.add_generation_prompt and not chat.continue_final_message,
    }


def _message(message: Message) -> dict[str, Any]:
    """A message as templates know it. What it does not have, it has no key for."""
    found = {
        "role": message.role,
        "content": list(message.content),
        "reasoning": message.reasoning,
        "tool_calls": [_call(call) for call in message.tool_calls],
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }
    return {name: value for name, value in found.items() if value}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


class _Renderer:
    """Runs `render_template`, one request at a time. A process that has exceeded its limits is replaced."""

    def __init__(self, niceness: int) -> None:
        self._niceness = niceness
        self._thread = ThreadPoolExecutor(1, "turret-render")
        self._process: subprocess.Popen[bytes] | None = None
        # Until when templates are refused.
        self._refused: dict[str, float] = {}

    async def render(self, template: str, request: Mapping[str, Any]) -> str:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._render, template, request)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._end()

    def _render(self, template: str, request: Mapping[str, Any]) -> str:
        if self._refused.get(template, 0.0) > time.monotonic():
            raise _too_slow()
        line = self._answer(_encoded(request))
        if not line:
            if self._end() == -render_template.TIME_SIGNAL:
                self._refuse(template)
                raise _too_slow()
            raise ChatTemplateError(
                "the chat template takes too much memory; shorten the chat, or correct it"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ChatTemplateError(f"the chat template refuses the chat: {answer['error']}")
        text = str(answer["text"])
        _check_text(text)
        return text

    def _answer(self, line: bytes) -> bytes:
        """The answer of the process; b"" if it ended instead."""
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            return b""
        return self._process.stdout.readline()

    def _start(self) -> subprocess.Popen[bytes]:
        # Nothing of the environment, which may have secrets, but the time zone.
        zone = {name: value for name, value in os.environ.items() if name == "TZ"}
        program = [sys.executable, "-I", render_template.__file__, str(self._niceness)]
        return subprocess.Popen(  # noqa: S603 (our own)
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=zone
        )

    def _end(self) -> int | None:
        """Ends the process; returns its exit status."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        assert process.stdin
        assert process.stdout
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        return process.wait()

    def _refuse(self, template: str) -> None:
        now = time.monotonic()
        self._refused = {each: until for each, until in self._refused.items() if until > now}
        self._refused[template] = now + _REFUSED_SECONDS


def _encoded(request: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(request).encode() + b"\n"
    except RecursionError as error:
        raise InvalidRequestError("the chat has tools or arguments that are nested too deeply") from error


def _check_text(text: str) -> None:
    """JSON can escape half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the chat has a lone surrogate, U+{ord(text[error.start]):04X}; send whole characters"
        ) from error


def _too_slow() -> ChatTemplateError:
    return ChatTemplateError(
        f"the chat template takes more than {render_template.MAX_SECONDS:g} s; shorten the chat, or correct "
        f"the template; it is refused for {_REFUSED_SECONDS:g} s"
    )
