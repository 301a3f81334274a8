"""Sends a workload and records when each token arrived."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from turret_client._async import AsyncClient
from turret_client.bench._workload import Planned, Workload
from turret_client.errors import TurretError

# Without a pause a closed loop would send failing requests as fast as the server rejects them.
_AFTER_ERROR_SECONDS = 0.1


@dataclass(slots=True, kw_only=True)
class Record:
    """The record of one request. Times are seconds since the start of the run.

    Attributes:
        adapter: Name of the adapter; None is the base model.
        prompt_tokens: Length of the prompt.
        due: When the request was due. In an open loop it may be sent later, if the generator lags; latencies
            count from here, so that they include the lag.
        token_seconds: When each token arrived; tokens of one message have the same time.
        ended: When the request ended; None if the run was interrupted before.
        cached_tokens: Tokens that the server found in memory.
        error: Reason of the error; empty if the request succeeded.
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
    """Runs a workload once. Cancelling `run` stops it and keeps the records.

    Attributes:
        records: The requests in the order of sending; filled during the run.
        seconds: Duration of the run until now, or until its end.
        running: Number of requests in flight.
    """

    def __init__(
        self, client: AsyncClient, workload: Workload, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.records: list[Record] = []
        self.running = 0
        self._client = client
        self._workload = workload
        self._clock = clock
        self._began: float | None = None
        self._took: float | None = None

    @property
    def seconds(self) -> float:
        if self._took is not None:
            return self._took
        return self._now() if self._began is not None else 0.0

    async def warm_up(self, count: int) -> None:
        """Sends requests that are not recorded, `concurrency` at a time; one at a time in an open loop.

        Raises:
            TurretError: A request failed.
        """
        free = asyncio.Semaphore(self._workload.concurrency or 1)

        async def send(planned: Planned) -> None:
            async with free:
                await self._client.generate(
                    planned.prompt, adapter=planned.adapter, max_tokens=self._workload.max_tokens
                )

        await asyncio.gather(*map(send, self._workload.warm_up(count)))

    async def run(self) -> None:
        """Sends the workload and waits until every request has ended; failures are recorded."""
        assert self._began is None, "a generator runs once"
        self._began = self._clock()
        try:
            await (self._open_loop() if self._workload.rate else self._closed_loop())
        finally:
            self._took = self._now()

    async def _closed_loop(self) -> None:
        requests = self._workload.requests()

        async def keep_one_running() -> None:
            # A request is due when the clock is compared with the duration: a second reading may be past it.
            while not self._is_over(due := self._now()) and (planned := next(requests, None)):
                record = await self._send(planned, due)
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
                tasks.create_task(self._send(planned, planned.due))

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
        return self._clock() - self._began
