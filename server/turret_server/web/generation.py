"""What both endpoints that generate have in common: fields, and the way from chunks to an answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from turret_server.doors.caller import caller, request_id
from turret_server.errors import InvalidRequestError
from turret_server.serving.generation import GenerationService
from turret_server.serving.request import AdapterRef, Chunk, GenerationRequest, Usage
from turret_server.web.bodies import Body, Int32, Priority, Refusal, Texts, TokenIds
from turret_server.web.gate import DONE, EVENT_STREAM
from turret_server.web.names import ModelNames

# Fields of a generation that have the same name and meaning here.
_SAME = (
    "max_tokens", "temperature", "top_p", "n", "presence_penalty", "frequency_penalty", "min_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens", "prompt_logprobs",
    "add_special_tokens", "cache_salt", "routing_key",
)  # fmt: skip
# OpenAI's, where the service has another.
_TEMPERATURE = 1.0
# Of a token id, which has 32 bits.
_MAX_DIGITS = 10


class StreamOptions(Body):
    include_usage: bool | None = None
    """Send the usage in a last chunk, which has no choices."""

    refused: ClassVar = {"include_obfuscation": Refusal("answers are not padded; leave it out", (False,))}


class Adapter(Body):
    name: Annotated[str, Field(min_length=1)]
    """NAME, or NAME@REVISION with at least 8 digits of the revision."""
    weight: float | None = None
    """Factor of what the adapter changes. Default: 1."""
    task: Annotated[Int32, Field(ge=0)] | None = None
    """Task of a multitask adapter."""


class JsonSchema(Body):
    name: str | None = None
    """Not used."""
    description: str | None = None
    """Not used."""
    form: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Answers keep to the schema in any case."""


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def fields(self) -> dict[str, Any]:
        """The fields of a `GenerationRequest`."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequestError(
                "response_format has a json_schema where its type is json_schema", field="response_format"
            )
        if self.json_schema:
            return {"json_schema": json.dumps(self.json_schema.form)}
        return {"json_object": True} if self.type == "json_object" else {}


class StructuredOutputs(Body):
    form: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None

    def fields(self) -> dict[str, Any]:
        """The fields of a `GenerationRequest`, which allows one of them."""
        found = self.model_dump(exclude_none=True, exclude={"form"})
        if self.choice is not None:
            found["choice"] = tuple(self.choice)
        if self.form is not None:
            found["json_schema"] = self.form if isinstance(self.form, str) else json.dumps(self.form)
        return found


class GenerationBody(Body):
    model: str | None = None
    """The base's name, an adapter's name, NAME@REVISION, or BASE:NAME. Default: the base."""
    max_tokens: Int32 | None = None
    """Maximum number of tokens to generate. Default: 16 for completions, 256 for chats."""
    temperature: float | None = None
    """0 is greedy. Default: 1."""
    top_p: float | None = None
    """Sample from the likeliest tokens whose probabilities add up to this value."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Number of answers; the prompt is computed once."""
    stream: bool | None = None
    """Send the answer in server-sent events as it comes."""
    stream_options: StreamOptions | None = None
    """`include_usage`: send the usage in a last event, which has no choices."""
    stop: str | Texts | None = None
    """Stop strings, at most 16."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    """The same seed, prompt, adapter revision and parameters give the same tokens."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens that are in the answer, from -2 to 2."""
    frequency_penalty: float | None = None
    """The same for each time that they are in it."""
    logit_bias: Annotated[dict[str, float], Field(max_length=300)] | None = None
    """Token ids with what is added to their logits, from -100 to 100."""
    user: Annotated[str, Field(max_length=128)] | None = None
    """Requests of the same user use the same revision while the traffic of an adapter is split."""

    response_format: ResponseFormat | None = None
    """`text`, `json_object`, or `json_schema`: the answer is an instance of the schema."""

    top_k: Int32 | None = None
    """Extension: sample from this many of the likeliest tokens; 0 and -1 are all."""
    min_p: float | None = None
    """Extension: the smallest probability relative to the likeliest token's."""
    repetition_penalty: float | None = None
    """Extension: 1 is off."""
    min_tokens: Int32 | None = None
    """Extension: tokens before which nothing ends the answer."""
    ignore_eos: bool | None = None
    """Extension: continue after end-of-sequence tokens."""
    stop_token_ids: TokenIds | None = None
    """Extension: tokens that end the answer."""
    include_stop_str_in_output: bool | None = None
    """Extension: include the stop string that ended the answer."""
    skip_special_tokens: bool | None = None
    """Extension: leave special tokens out of the text. Default: true."""
    prompt_logprobs: Int32 | None = None
    """Extension: log probabilities of the prompt's tokens, and of so many others in their places."""
    priority: Priority | None = None
    """Extension: from -10 to 10 among the tenant's waiting requests; lower ones are served earlier."""
    cache_salt: str | None = None
    """Extension: only requests with the same salt share cached blocks of prompts."""
    routing_key: Annotated[str, Field(max_length=128)] | None = None
    """Extension: the same as `user`, which it overrides."""
    structured_outputs: StructuredOutputs | None = None
    """Extension: one of `json` (a schema), `json_object`, `regex`, `choice`, `grammar` (Lark)."""
    adapters: Annotated[list[Adapter], Field(fail_fast=True, max_length=8)] | None = None
    """Extension: several adapters, or ones with weights and tasks; `model` is the base then."""

    refused: ClassVar = {
        "logprob_token_ids": Refusal("use logprobs"),
        "allowed_token_ids": Refusal("use logit_bias"),
        "bad_words": Refusal("use logit_bias"),
        "use_beam_search": Refusal("answers are sampled", (False,)),
        "truncate_prompt_tokens": Refusal("shorten the prompt before"),
        "guided_choice": Refusal("use structured_outputs"),
        "guided_grammar": Refusal("use structured_outputs"),
        "guided_json": Refusal("use structured_outputs"),
        "guided_regex": Refusal("use structured_outputs"),
    }

    def sampling(self, names: ModelNames) -> dict[str, Any]:
        """The fields of a `GenerationRequest` besides its prompt.

        Raises:
            InvalidRequestError: a field does not go with another.
            AdapterNotFoundError: `model` names nothing that could exist.
        """
        if self.stream_options and not self.stream:
            raise InvalidRequestError("stream_options need stream: true", field="stream_options")
        found = {name: value for name in _SAME if (value := getattr(self, name, None)) is not None}
        found = {"temperature": _TEMPERATURE} | found | self._renamed()
        if self.user is not None:
            found.setdefault("routing_key", self.user)
        for form in (self.response_format, self.structured_outputs):
            found |= form.fields() if form else {}
        return found | {"adapters": self._adapters(names)}

    def _renamed(self) -> dict[str, Any]:
        """The fields that have another name or form in a `GenerationRequest`."""
        found: dict[str, Any] = {}
        if self.stop is not None:
            found["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids is not None:
            found["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.seed is not None:
            found["seed"] = self.seed % 2**64
        if self.logit_bias is not None:
            found["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        if self.top_k is not None:
            found["top_k"] = 0 if self.top_k == -1 else self.top_k
        if self.include_stop_str_in_output is not None:
            found["include_stop"] = self.include_stop_str_in_output
        if self.priority is not None:
            found["priority"] = -self.priority
        return found

    def _adapters(self, names: ModelNames) -> tuple[AdapterRef, ...]:
        named = names.adapters_of(self.model)
        if not self.adapters:
            return named
        if named:
            raise InvalidRequestError(
                "adapters: model is the base, or left out, where adapters are given", field="adapters"
            )
        return tuple(
            AdapterRef(name=each.name, weight=1.0 if each.weight is None else each.weight, task=each.task)
            for each in self.adapters
        )


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= _MAX_DIGITS):
        raise InvalidRequestError(f"logit_bias has token ids as keys; found {key[:50]!r}", field="logit_bias")
    return int(key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What all parts of one answer begin with."""

    id: str
    object: str
    created: int
    model: str

    @classmethod
    def of(cls, prefix: str, kind: str, model: str) -> Head:
        """`kind` is the name that OpenAI gives to such an object."""
        return cls(id=f"{prefix}-{request_id()}", object=kind, created=int(time.time()), model=model)

    def with_choices(self, choices: Sequence[Any], revision: str, **more: Any) -> dict[str, Any]:
        """`revision` is that of the adapters."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": revision or None,
            **more,
        }


class EventStream(Response):
    """An answer in server-sent events. Its first event is made before the status is sent, so that what is
    wrong with a request has a status of its own.
    """

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(media_type=EVENT_STREAM, headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        authentication = scope["state"]["authentication"]
        async with aclosing(self._events) as events:
            data = await anext(events)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": True})
            async for data in events:
                # The key, or a permission, may be taken away meanwhile.
                await authentication.renew()
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": DONE})


@dataclass(slots=True)
class TotalUsage:
    """The usage of all requests of one call."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0

    def add(self, usage: Usage) -> None:
        self.prompt += usage.prompt_tokens
        # Virtual tokens of adapters are cached too, and are not part of the prompt.
        self.cached += min(usage.cached_tokens, usage.prompt_tokens)
        self.generated += usage.generated_tokens

    def as_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


async def chunks_of(
    service: GenerationService, requests: Sequence[GenerationRequest]
) -> AsyncGenerator[tuple[int, Chunk]]:
    """The chunks of several requests as they come, each with the number of its request. If a request fails,
    all do.
    """
    if len(requests) == 1:
        async with aclosing(service.generate(requests[0], caller())) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue(len(requests))
    tasks = [
        asyncio.create_task(_put_chunks(service, request, number, queue))
        for number, request in enumerate(requests)
    ]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _put_chunks(
    service: GenerationService,
    request: GenerationRequest,
    number: int,
    queue: asyncio.Queue[tuple[int, Chunk] | Exception | None],
) -> None:
    """Put the chunks of a request, then its error, or None if it has none."""
    failure = None
    try:
        async with aclosing(service.generate(request, caller())) as chunks:
            async for chunk in chunks:
                await queue.put((number, chunk))
    except Exception as error:  # noqa: BLE001 -- raised where the chunks are read
        failure = error
    await queue.put(failure)
