from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

from turret_server.errors import ShuttingDownError
from turret_server.rpc.drain import RunningCalls

Method = Callable[[object, object], Awaitable[str]]


async def never(_requests: object, _context: object) -> str:
    await asyncio.Event().wait()
    return "done"


async def at_once(_requests: object, _context: object) -> str:
    return "done"


async def begin(calls: RunningCalls, method: Method) -> asyncio.Task[str]:
    task = asyncio.create_task(calls._unary(method)(None, None))
    await asyncio.sleep(0)
    return task


async def test_new_calls_are_refused_and_say_when_to_come_back():
    calls = RunningCalls()
    assert await calls._unary(at_once)(None, None) == "done"
    calls.refuse()
    with pytest.raises(ShuttingDownError) as refused:
        await calls._unary(at_once)(None, None)
    assert refused.value.retry_after == 1.0


async def test_a_wait_ends_with_the_last_call():
    calls, go_on = RunningCalls(), asyncio.Event()

    async def hold(_requests: object, _context: object) -> str:
        await go_on.wait()
        return "done"

    held = [await begin(calls, hold) for _ in range(2)]
    waiting = asyncio.create_task(calls.wait(600))
    await asyncio.sleep(0)
    assert (calls.num_running, waiting.done()) == (2, False)
    go_on.set()
    assert await asyncio.gather(*held) == ["done", "done"]
    await waiting
    await calls.wait(600)


async def test_a_wait_ends_when_somebody_hurries_or_its_time_is_over():
    calls = RunningCalls()
    held = await begin(calls, never)
    await calls.wait(0)
    waiting = asyncio.create_task(calls.wait(600))
    await asyncio.sleep(0)
    calls.hurry()
    await waiting
    assert calls.num_running == 1
    held.cancel()


async def test_a_call_that_is_ended_is_told_and_one_that_its_client_ends_is_not():
    calls = RunningCalls()
    left = await begin(calls, never)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    held = await begin(calls, never)
    calls.end()
    with pytest.raises(ShuttingDownError, match="stopped before the call was done"):
        await held
    assert calls.num_running == 0


async def test_a_stream_is_closed_when_it_is_ended():
    calls = RunningCalls()
    closed: list[bool] = []

    async def responses(_requests: object, _context: object) -> AsyncGenerator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def read() -> list[int]:
        async with contextlib.aclosing(calls._stream(responses)(None, None)) as stream:
            return [response async for response in stream]

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    calls.end()
    with pytest.raises(ShuttingDownError):
        await reading
    assert closed == [True]
