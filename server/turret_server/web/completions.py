"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from turret_server.doors.caller import caller
from turret_server.errors import InvalidRequestError
from turret_server.serving.generation import GenerationService
from turret_server.serving.request import Chunk, GenerationRequest, TokenLogprob
from turret_server.serving.tokens import Tokens, TokenService
from turret_server.serving.validation import check_num_answers
from turret_server.web.bodies import Int32, Refusal, Texts, TokenIds, parse
from turret_server.web.gate import event
from turret_server.web.generation import EventStream, GenerationBody, Head, TotalUsage, chunks_of
from turret_server.web.logprobs import prompt_logprobs, text_of
from turret_server.web.names import ModelNames

# OpenAI's, where the service has another.
_MAX_TOKENS = 16
_MAX_PROMPTS = 128


class CompletionBody(GenerationBody):
    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    """Text, token ids, or several of either."""
    echo: bool | None = None
    """Begin the text with the prompt."""
    logprobs: Int32 | None = None
    """Log probabilities of the tokens, and of so many of the likeliest in their places, at most 20."""
    add_special_tokens: bool | None = None
    """Extension: add the tokenizer's special tokens to a text. Default: true."""

    refused: ClassVar = GenerationBody.refused | {
        "suffix": Refusal("the model continues texts, and fills no gaps"),
        "best_of": Refusal("choose among n answers by their logprobs", (1,)),
    }

    def prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequestError("prompt is empty; give a text or token ids", field="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # then all are
        if len(self.prompt) > _MAX_PROMPTS:
            raise InvalidRequestError(
                f"prompt has at most {_MAX_PROMPTS} prompts; found {len(self.prompt)}", field="prompt"
            )
        return self.prompt


class Completions:
    def __init__(self, generation: GenerationService, tokens: TokenService, names: ModelNames) -> None:
        self._generation = generation
        self._tokens = tokens
        self._names = names

    async def create(self, request: Request) -> Response:
        """Continue a text."""
        body = await parse(CompletionBody, request)
        sampling = {"max_tokens": _MAX_TOKENS} | body.sampling(self._names)
        if body.logprobs is not None:
            sampling["logprobs"] = body.logprobs
            if body.echo:
                sampling.setdefault("prompt_logprobs", body.logprobs)
        requests = [GenerationRequest(prompt=prompt, **sampling) for prompt in body.prompts()]
        num_choices = sampling.get("n", 1)
        check_num_answers(len(requests) * num_choices, caller(), "prompt" if len(requests) > 1 else "n")
        echoes = [await self._tokens.tokens(each, caller()) for each in requests] if body.echo else []
        choices = [
            _Choice(
                index=prompt * num_choices + index,
                logprobs=_Logprobs() if body.logprobs is not None else None,
                wants_prompt=body.prompt_logprobs is not None,
                echo=echoes[prompt] if echoes else None,
                prompt=requests[prompt].prompt,
            )
            for prompt in range(len(requests))
            for index in range(num_choices)
        ]
        answer = _Answer(
            head=Head.of("cmpl", "text_completion", body.model or self._names.base),
            choices=choices,
            per_prompt=num_choices,
        )
        chunks = chunks_of(self._generation, requests)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(answer.events(chunks, include_usage=usage))
        return JSONResponse(await answer.whole(chunks))


@dataclass(slots=True, kw_only=True)
class _Logprobs:
    """Log probabilities as the endpoint has them, with offsets into the text of the answer."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, text: str, offset: int, found: TokenLogprob | None) -> None:
        self.tokens.append(text)
        self.text_offset.append(offset)
        self.token_logprobs.append(found.logprob if found else None)
        top = {text_of(each.token): each.logprob for each in (*found.top, found)} if found else None
        self.top_logprobs.append(top)

    def take(self) -> dict[str, Any]:
        taken = {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }
        self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset = [], [], [], []
        return taken


@dataclass(slots=True, kw_only=True)
class _Choice:
    """One choice, and what of it has not been taken yet. `echo` is the prompt that its text begins with."""

    index: int
    logprobs: _Logprobs | None
    wants_prompt: bool
    echo: Tokens | None
    prompt: Any
    text: str = ""
    num_characters: int = 0
    is_begun: bool = False
    finish_reason: str | None = None
    of_prompt: list[Any] | None = None

    def add(self, chunk: Chunk, of_prompt: Sequence[TokenLogprob]) -> None:
        """`of_prompt` are the log probabilities of the prompt's tokens but the first, if they are wanted."""
        if not self.is_begun:
            self._begin(of_prompt)
        if self.logprobs:
            for found in chunk.logprobs:
                self.logprobs.add(text_of(found.token), self.num_characters, found)
        self.text += chunk.text
        self.num_characters += len(chunk.text)
        self.finish_reason = chunk.finish_reason.value if chunk.finish_reason else None

    def _begin(self, of_prompt: Sequence[TokenLogprob]) -> None:
        self.is_begun = True
        if self.wants_prompt:
            self.of_prompt = prompt_logprobs(of_prompt)
        if self.echo is None:
            return
        self.text = self.prompt if isinstance(self.prompt, str) else self.echo.text
        if self.logprobs:
            offset = 0
            for part, each in zip(self.echo.parts, (None, *of_prompt), strict=True):
                self.logprobs.add(text_of(part), offset, each)
                offset += len(part.decode(errors="ignore"))
        self.num_characters = len(self.text)

    def take(self) -> dict[str, Any]:
        """The choice as JSON, with what is new."""
        taken = {
            "index": self.index,
            "text": self.text,
            "logprobs": self.logprobs.take() if self.logprobs else None,
            "finish_reason": self.finish_reason,
        }
        if self.of_prompt is not None:
            taken["prompt_logprobs"] = self.of_prompt
        self.text, self.of_prompt = "", None
        return taken

    @property
    def has_news(self) -> bool:
        return bool(self.text or self.finish_reason or (self.logprobs and self.logprobs.tokens))


@dataclass(slots=True, kw_only=True)
class _Answer:
    head: Head
    choices: Sequence[_Choice]
    per_prompt: int
    usage: TotalUsage = field(default_factory=TotalUsage)
    of_prompts: dict[int, Sequence[TokenLogprob]] = field(default_factory=dict)

    def _add(self, prompt: int, chunk: Chunk) -> _Choice:
        if chunk.usage:
            self.usage.add(chunk.usage)
        # They come with the first chunk of all choices.
        of_prompt = self.of_prompts.setdefault(prompt, chunk.prompt_logprobs)
        choice = self.choices[prompt * self.per_prompt + chunk.index]
        choice.add(chunk, of_prompt)
        return choice

    async def whole(self, chunks: AsyncGenerator[tuple[int, Chunk]]) -> dict[str, object]:
        revision = ""
        async with aclosing(chunks):
            async for prompt, chunk in chunks:
                self._add(prompt, chunk)
                revision = chunk.revision
        taken = [choice.take() for choice in self.choices]
        return self.head.with_choices(taken, revision, usage=self.usage.as_json())

    async def events(
        self, chunks: AsyncGenerator[tuple[int, Chunk]], *, include_usage: bool
    ) -> AsyncGenerator[bytes]:
        revision, more = "", {"usage": None} if include_usage else {}
        async with aclosing(chunks):
            async for prompt, chunk in chunks:
                choice, revision = self._add(prompt, chunk), chunk.revision
                if choice.has_news:
                    yield event(self.head.with_choices([choice.take()], revision, **more))
        if include_usage:
            yield event(self.head.with_choices([], revision, usage=self.usage.as_json()))
