"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from turret_server.errors import InvalidRequestError
from turret_server.serving.chat import Chat, Message, ToolCall, ToolCallDelta, ToolChoice
from turret_server.serving.generation import GenerationService
from turret_server.serving.request import Chunk, GenerationRequest
from turret_server.web.bodies import Body, Int32, Refusal, parse
from turret_server.web.gate import event
from turret_server.web.generation import EventStream, GenerationBody, Head, TotalUsage, chunks_of
from turret_server.web.logprobs import chat_logprob, prompt_logprobs
from turret_server.web.names import ModelNames


class Part(Body):
    type: str
    text: str | None = None


class FunctionCall(Body):
    name: str
    arguments: str


class Call(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True, max_length=4096)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[Call], Field(fail_fast=True, max_length=128)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """Extension: how the assistant came to its answer, where the template shows it."""

    refused: ClassVar = {
        "audio": Refusal("messages are text"),
        "function_call": Refusal("use tool_calls"),
        "refusal": Refusal("use content"),
        "annotations": Refusal("leave it out", ([],)),
    }

    def message(self) -> Message:
        return Message(
            role=self.role,
            content=self._texts(),
            reasoning=self.reasoning_content or "",
            tool_calls=tuple(
                ToolCall(id=each.id, name=each.function.name, arguments=each.function.arguments)
                for each in self.tool_calls or ()
            ),
            tool_call_id=self.tool_call_id or "",
            name=self.name or "",
        )

    def _texts(self) -> tuple[str, ...]:
        if self.content is None:
            return ()
        if isinstance(self.content, str):
            return (self.content,)
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise InvalidRequestError(
                    f"messages have parts of type text with a text; found {part.type[:50]!r}",
                    field="messages",
                )
        return tuple(part.text or "" for part in self.content)


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=4096)]
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=128)]


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(GenerationBody):
    messages: Messages
    """Messages with texts, or with parts of the type `text`."""
    max_completion_tokens: Int32 | None = None
    """The same as `max_tokens`."""
    logprobs: bool | None = None
    """Log probabilities of the tokens."""
    top_logprobs: Int32 | None = None
    """With `logprobs`: also those of so many of the likeliest tokens in their places, at most 20."""
    tools: Tools | None = None
    """Functions that the answer may call."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """Whether the answer may, or must, call them, or one of them."""
    add_generation_prompt: bool | None = None
    """Extension: end the prompt with the beginning of an assistant's message. Default: true."""
    continue_final_message: bool | None = None
    """Extension: the answer continues the last message; then `add_generation_prompt` is false."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Extension: further variables of the chat template."""

    refused: ClassVar = GenerationBody.refused | {
        "add_special_tokens": Refusal("the chat template adds them", (False,)),
        "audio": Refusal("answers are text"),
        "chat_template": Refusal("the model or the adapter has its own"),
        "documents": Refusal("use chat_template_kwargs"),
        "function_call": Refusal("use tool_choice", ("none", "auto")),
        "functions": Refusal("use tools"),
        "metadata": Refusal("answers are not stored", ({},)),
        "modalities": Refusal("answers are text", (["text"],)),
        "moderation": Refusal("answers are not moderated"),
        "parallel_tool_calls": Refusal("an answer may have several calls; leave it out", (True,)),
        "prediction": Refusal("leave it out"),
        "prompt_cache_key": Refusal("prompts are cached without one; leave it out"),
        "prompt_cache_options": Refusal("prompts are cached without them; leave it out"),
        "prompt_cache_retention": Refusal("prompts are cached while there is room", ("in_memory",)),
        "reasoning_effort": Refusal("use chat_template_kwargs, if the template knows it"),
        "safety_identifier": Refusal("use user"),
        "service_tier": Refusal("there is one", ("auto", "default")),
        "store": Refusal("answers are not stored", (False,)),
        "verbosity": Refusal("say it in a message", ("medium",)),
        "web_search_options": Refusal("the server does not search"),
    }

    def chat(self) -> Chat:
        continues, begins = bool(self.continue_final_message), self.add_generation_prompt
        choice, named = self.tool_choice, ""
        if isinstance(choice, NamedTool):
            named, choice = choice.function.name, "required"
        return Chat(
            messages=tuple(each.message() for each in self.messages),
            tools=tuple(each.model_dump(exclude_none=True) for each in self.tools or ()),
            tool_choice=ToolChoice(choice or "auto"),
            tool_name=named,
            add_generation_prompt=not continues if begins is None else begins,
            continue_final_message=continues,
            template_arguments=self.chat_template_kwargs or {},
        )

    def limits(self) -> dict[str, Any]:
        """The fields of a `GenerationRequest` whose names are those of chats alone."""
        found: dict[str, Any] = {}
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise InvalidRequestError(
                    "max_tokens is the former name of max_completion_tokens; give one of them",
                    field="max_tokens",
                )
            found["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            found["logprobs"] = self.top_logprobs or 0
        elif self.top_logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", field="top_logprobs")
        return found


class ChatCompletions:
    def __init__(self, generation: GenerationService, names: ModelNames) -> None:
        self._generation = generation
        self._names = names

    async def create(self, request: Request) -> Response:
        """Answer a chat."""
        body = await parse(ChatBody, request)
        sampling = body.sampling(self._names) | body.limits()
        wanted = GenerationRequest(prompt=body.chat(), **sampling)
        choices = [
            _Choice(
                index=index,
                wants_logprobs=bool(body.logprobs),
                wants_prompt=body.prompt_logprobs is not None,
            )
            for index in range(wanted.n)
        ]
        model = body.model or self._names.base
        chunks = chunks_of(self._generation, [wanted])
        if body.stream:
            head = Head.of("chatcmpl", "chat.completion.chunk", model)
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(_events(head, choices, chunks, include_usage=usage))
        head = Head.of("chatcmpl", "chat.completion", model)
        return JSONResponse(await _whole(head, choices, chunks))


@dataclass(slots=True, kw_only=True)
class _Choice:
    """One choice, and what of it has not been taken yet."""

    index: int
    wants_logprobs: bool
    wants_prompt: bool
    text: str = ""
    reasoning: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    of_prompt: list[Any] | None = None
    finish_reason: str | None = None
    is_begun: bool = False

    def add(self, chunk: Chunk) -> None:
        if self.wants_prompt and chunk.prompt_logprobs:
            self.of_prompt = prompt_logprobs(chunk.prompt_logprobs)
        self.text += chunk.text
        self.reasoning += chunk.reasoning
        self.calls += chunk.tool_calls
        if self.wants_logprobs:
            self.logprobs += map(chat_logprob, chunk.logprobs)
        self.finish_reason = chunk.finish_reason.value if chunk.finish_reason else None

    @property
    def has_news(self) -> bool:
        return bool(self.text or self.reasoning or self.calls or self.logprobs or self.finish_reason)

    def delta(self) -> dict[str, Any]:
        """The choice as an event has it, with what is new."""
        delta: dict[str, Any] = {}
        if not self.is_begun:
            delta = {"role": "assistant", "content": ""}
        if self.text:
            delta["content"] = self.text
        if self.reasoning:
            delta["reasoning_content"] = self.reasoning
        if self.calls:
            delta["tool_calls"] = [_call_delta(each) for each in self.calls]
        taken = self._with("delta", delta)
        self.text, self.reasoning, self.calls, self.logprobs = "", "", [], []
        self.is_begun, self.of_prompt = True, None
        return taken

    def whole(self) -> dict[str, Any]:
        """The choice as a whole answer has it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = _calls(self.calls)
            message["content"] = self.text or None
        return self._with("message", message)

    def _with(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        found = {
            "index": self.index,
            name: value,
            "logprobs": {"content": self.logprobs, "refusal": None} if self.wants_logprobs else None,
            "finish_reason": self.finish_reason,
        }
        if self.of_prompt is not None:
            found["prompt_logprobs"] = self.of_prompt
        return found


def _call_delta(each: ToolCallDelta) -> dict[str, Any]:
    if not each.id:
        return {"index": each.index, "function": {"arguments": each.arguments}}
    function = {"name": each.name, "arguments": each.arguments}
    return {"index": each.index, "id": each.id, "type": "function", "function": function}


def _calls(deltas: Sequence[ToolCallDelta]) -> list[dict[str, Any]]:
    """The calls that deltas add up to."""
    found: dict[int, dict[str, Any]] = {}
    for each in deltas:
        if each.index not in found:
            function = {"name": each.name, "arguments": ""}
            found[each.index] = {"id": each.id, "type": "function", "function": function}
        found[each.index]["function"]["arguments"] += each.arguments
    return list(found.values())


async def _whole(
    head: Head, choices: Sequence[_Choice], chunks: AsyncGenerator[tuple[int, Chunk]]
) -> dict[str, object]:
    usage, revision = TotalUsage(), ""
    async with aclosing(chunks):
        async for _, chunk in chunks:
            choices[chunk.index].add(chunk)
            revision = chunk.revision
            if chunk.usage:
                usage.add(chunk.usage)
    return head.with_choices([each.whole() for each in choices], revision, usage=usage.as_json())


async def _events(
    head: Head,
    choices: Sequence[_Choice],
    chunks: AsyncGenerator[tuple[int, Chunk]],
    *,
    include_usage: bool,
) -> AsyncGenerator[bytes]:
    usage, revision, more = TotalUsage(), "", {"usage": None} if include_usage else {}
    async with aclosing(chunks):
        async for _, chunk in chunks:
            choice, revision = choices[chunk.index], chunk.revision
            choice.add(chunk)
            if chunk.usage:
                usage.add(chunk.usage)
            if choice.has_news:
                yield event(head.with_choices([choice.delta()], revision, **more))
    if include_usage:
        yield event(head.with_choices([], revision, usage=usage.as_json()))
