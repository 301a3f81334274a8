"""Clients that send requests without pause and record each request with its outcome."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from soak.known import QUESTIONS
from turret_client import AsyncClient, TurretError

# More than the context holds.
TOO_MANY_TOKENS = 300
PAUSE_SECONDS = 0.3

# Tenant, adapters, revisions, tokens of the prompt, tokens generated.
Entry = tuple[str, tuple[str, ...], tuple[str, ...], int, int]

_numbers = itertools.count(1)


@dataclass
class Request:
    """One request and its outcome. `names` are as sent, with `@revision` if given. `outcome` is ok,
    cancelled, killed, or the reason of the error; `ends` counts the final messages of its stream.
    """

    tenant: str
    names: tuple[str, ...]
    question: int
    streamed: bool
    cancel_after: int | None = None
    timeout: float | None = None
    too_long: bool = False
    routing_key: str = ""
    number: int = field(default_factory=lambda: next(_numbers))
    began: float = 0.0
    ended: float = 0.0
    outcome: str = ""
    message: str = ""
    revision: str | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    usage: tuple[int, int] | None = None
    ends: int = 0

    @property
    def entry(self) -> Entry:
        """The entry that the usage log must have if the request was answered."""
        revisions = tuple(self.revision.split("+")) if self.revision else ()
        names = tuple(name.partition("@")[0] for name in self.names)
        return self.tenant, names, revisions, len(QUESTIONS[self.question].prompt), len(self.tokens)


OnRequest = Callable[[Request], None]


async def ask(client: AsyncClient, request: Request, on_chunk: OnRequest = lambda _: None) -> None:
    """Send a request and fill in its outcome."""
    request.began = time.monotonic()
    try:
        await (_stream if request.streamed else _generate)(client, request, on_chunk)
    except TurretError as error:
        request.outcome, request.message = error.reason or error.code.name, error.message
    request.ended = time.monotonic()


def _options(request: Request) -> dict:
    question = QUESTIONS[request.question]
    return {
        "prompt": question.prompt,
        "adapter": request.names,
        "max_tokens": TOO_MANY_TOKENS if request.too_long else question.max_tokens,
        "temperature": question.temperature,
        "seed": question.seed,
        "routing_key": request.routing_key,
        "timeout": request.timeout,
    }


async def _generate(client: AsyncClient, request: Request, _: OnRequest) -> None:
    answer = await client.generate(**_options(request))
    request.revision, request.tokens, request.text = answer.revision, list(answer.token_ids), answer.text
    request.finish, request.ends = answer.finish_reason.value, 1
    request.usage = (answer.usage.prompt_tokens, answer.usage.generated_tokens)
    request.outcome = "ok"


async def _stream(client: AsyncClient, request: Request, on_chunk: OnRequest) -> None:
    async with aclosing(client.stream(**_options(request))) as chunks:
        async for chunk in chunks:
            assert request.revision in (None, chunk.revision), "a stream changed its revision"
            request.revision = chunk.revision
            request.tokens += chunk.token_ids
            request.text += chunk.text
            if chunk.finish_reason:
                assert chunk.usage
                request.ends += 1
                request.finish = chunk.finish_reason.value
                request.usage = (chunk.usage.prompt_tokens, chunk.usage.generated_tokens)
            on_chunk(request)
            if (
                request.cancel_after is not None
                and len(request.tokens) >= request.cancel_after
                and not request.ends
            ):
                request.outcome = "cancelled"
                return
    request.outcome = "ok"


@dataclass(frozen=True)
class RequestLoop:
    """A closed loop of one tenant: `choose` draws the next request."""

    tenant: str
    choose: Callable[[random.Random], Request]
    concurrency: int
    seed: int = 0

    async def run(
        self, address: str, over: Callable[[], bool], on_end: OnRequest, on_chunk: OnRequest
    ) -> None:
        """Send requests until `over` is set, then let in-flight ones finish."""
        async with AsyncClient(address, api_key=self.tenant) as client:
            rngs = [random.Random(f"{self.tenant} {self.seed} {index}") for index in range(self.concurrency)]
            await asyncio.gather(*(self._loop(client, rng, over, on_end, on_chunk) for rng in rngs))

    async def _loop(
        self,
        client: AsyncClient,
        rng: random.Random,
        over: Callable[[], bool],
        on_end: OnRequest,
        on_chunk: OnRequest,
    ) -> None:
        while not over():
            request = self.choose(rng)
            await ask(client, request, on_chunk)
            on_end(request)
            if request.outcome != "ok":
                await asyncio.sleep(PAUSE_SECONDS * rng.random())
