"""Sends a workload and notes when every token came."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, field

from turret_client._async import AsyncClient
from turret_client.bench._workload import Planned, Workload
from turret_client.errors import TurretError

# After a refusal a closed loop would ask again at once, and measure how fast the server refuses.
_AFTER_ERROR_SECONDS = 0.1


@dataclass(slots=True, kw_only=True)
class Record:
    """What became of one request. Times are seconds since the run began.

    Attributes:
        adapter: None is the base model.
        prompt_tokens: Length of its prompt.
        due: When it was to be sent. In an open loop this is not when it was sent where the generator lagged,
            so that a wait is a wait whoever caused it.
        token_seconds: When each token came; tokens of one message came together.
        ended: When it ended; None where the run was interrupted before.
        cached_tokens: Tokens that the server found in memory.
        error: The reason of the error that ended it; empty where it succeeded.
    """

    adapter: str | None
    prompt_tokens: int
    due: float
    token_seconds: list[float] = field(default_factory=list)
    ended: float | None = None
    cached_tokens: int = 0
    error: str = ""

    @property
    def succeeded(self) -> bool:
        return self.ended is not None and not self.error


class LoadGenerator:
    """Runs a workload once. Cancelling `run` ends it, and what was measured until then stays.

    Attributes:
        records: Every request that was sent, in their order; they fill while it runs.
        seconds: How long the run has taken so far, or took.
        running: Requests that wait for an answer now.
    """

    def __init__(self, client: AsyncClient, workload: Workload) -> None:
        self.records: list[Record] = []
        self.running = 0
        self._client = client
        self._workload = workload
        self._began: float | None = None
        self._took: float | None = None

    @property
    def seconds(self) -> float:
        if self._took is not None:
            return self._took
        return self._now() if self._began is not None else 0.0

    async def warm_up(self, count: int) -> None:
        """Send requests that are not recorded: `concurrency` at once, or one after another.

        Raises:
            TurretError: one of them failed; the run would too.
        """
        places = asyncio.Semaphore(self._workload.concurrency or 1)

        async def send(planned: Planned) -> None:
            async with places:
                await self._client.generate(
                    planned.prompt, adapter=planned.adapter, max_tokens=self._workload.max_tokens
                )

        await asyncio.gather(*map(send, self._workload.warm_up(count)))

    async def run(self) -> None:
        """Send the workload and wait until every request has ended. One that fails is recorded as such."""
        assert self._began is None, "a generator runs once"
        self._began = time.perf_counter()
        try:
            await (self._open_loop() if self._workload.rate else self._closed_loop())
        finally:
            self._took = self._now()

    async def _closed_loop(self) -> None:
        requests = self._workload.requests()

        async def keep_one_running() -> None:
            # Every task takes the next; there is no `await` between looking at the clock and sending.
            while not self._is_over(self._now()) and (planned := next(requests, None)):
                record = await self._send(planned, due=self._now())
                if record.error:
                    await asyncio.sleep(_AFTER_ERROR_SECONDS)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._workload.concurrency or 1):
                tasks.create_task(keep_one_running())

    async def _open_loop(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for planned in self._workload.requests():
                if self._is_over(planned.due):
                    break
                await asyncio.sleep(max(planned.due - self._now(), 0.0))
                tasks.create_task(self._send(planned, due=planned.due))

    async def _send(self, planned: Planned, due: float) -> Record:
        record = Record(adapter=planned.adapter, prompt_tokens=len(planned.prompt), due=due)
        self.records.append(record)
        self.running += 1
        chunks = self._client.stream(
            planned.prompt, adapter=planned.adapter, max_tokens=self._workload.max_tokens
        )
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    record.token_seconds += [self._now()] * len(chunk.token_ids)
                    if chunk.usage:
                        record.cached_tokens = chunk.usage.cached_tokens
            record.ended = self._now()
        except TurretError as error:
            record.error = error.reason or error.code.name
            record.ended = self._now()
        finally:
            self.running -= 1
        return record

    def _is_over(self, seconds: float) -> bool:
        return self._workload.duration is not None and seconds >= self._workload.duration

    def _now(self) -> float:
        assert self._began is not None
        return time.perf_counter() - self._began
