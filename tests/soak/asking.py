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

# A context that no request fits into.
TOO_MANY_TOKENS = 300
PAUSE_SECONDS = 0.3

# Tenant, adapters, revisions, tokens of the prompt, tokens generated.
Entry = tuple[str, tuple[str, ...], tuple[str, ...], int, int]

_numbers = itertools.count(1)


@dataclass
class Asked:
    """One request and its outcome. `names` are as sent, with `@revision` if given. `outcome` is ok, left,
    killed, or the reason of the error; `ends` counts the final messages of its stream.
    """

    tenant: str
    names: tuple[str, ...]
    question: int
    streamed: bool
    leave_after: int | None = None
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


Chunks = Callable[[Asked], None]


async def ask(client: AsyncClient, asked: Asked, on_chunk: Chunks = lambda _: None) -> None:
    """Send a request and fill in its outcome."""
    asked.began = time.monotonic()
    try:
        await (_stream if asked.streamed else _generate)(client, asked, on_chunk)
    except TurretError as error:
        asked.outcome, asked.message = error.reason or error.code.name, error.message
    asked.ended = time.monotonic()


def _options(asked: Asked) -> dict:
    question = QUESTIONS[asked.question]
    return {
        "prompt": question.prompt,
        "adapter": asked.names,
        "max_tokens": TOO_MANY_TOKENS if asked.too_long else question.max_tokens,
        "temperature": question.temperature,
        "seed": question.seed,
        "routing_key": asked.routing_key,
        "timeout": asked.timeout,
    }


async def _generate(client: AsyncClient, asked: Asked, _: Chunks) -> None:
    answer = await client.generate(**_options(asked))
    asked.revision, asked.tokens, asked.text = answer.revision, list(answer.token_ids), answer.text
    asked.finish, asked.ends = answer.finish_reason.value, 1
    asked.usage = (answer.usage.prompt_tokens, answer.usage.generated_tokens)
    asked.outcome = "ok"


async def _stream(client: AsyncClient, asked: Asked, on_chunk: Chunks) -> None:
    async with aclosing(client.stream(**_options(asked))) as chunks:
        async for chunk in chunks:
            assert asked.revision in (None, chunk.revision), "a stream changed its revision"
            asked.revision = chunk.revision
            asked.tokens += chunk.token_ids
            asked.text += chunk.text
            if chunk.finish_reason:
                assert chunk.usage
                asked.ends += 1
                asked.finish = chunk.finish_reason.value
                asked.usage = (chunk.usage.prompt_tokens, chunk.usage.generated_tokens)
            on_chunk(asked)
            if asked.leave_after is not None and len(asked.tokens) >= asked.leave_after and not asked.ends:
                asked.outcome = "left"
                return
    asked.outcome = "ok"


@dataclass(frozen=True)
class Asker:
    """A tenant's requests: `choose` draws the next one."""

    tenant: str
    choose: Callable[[random.Random], Asked]
    concurrency: int
    seed: int = 0

    async def run(self, address: str, over: Callable[[], bool], tell: Chunks, on_chunk: Chunks) -> None:
        """Send requests until `over` is set, then let in-flight ones finish."""
        async with AsyncClient(address, api_key=self.tenant) as client:
            chances = [
                random.Random(f"{self.tenant} {self.seed} {index}") for index in range(self.concurrency)
            ]
            await asyncio.gather(*(self._ask(client, chance, over, tell, on_chunk) for chance in chances))

    async def _ask(
        self,
        client: AsyncClient,
        chance: random.Random,
        over: Callable[[], bool],
        tell: Chunks,
        on_chunk: Chunks,
    ) -> None:
        while not over():
            asked = self.choose(chance)
            await ask(client, asked, on_chunk)
            tell(asked)
            if asked.outcome != "ok":
                await asyncio.sleep(PAUSE_SECONDS * chance.random())
