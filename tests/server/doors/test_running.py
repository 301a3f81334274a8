from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from turret_server.doors.running import RunningCalls
from turret_server.errors import ShuttingDownError

Method = Callable[[], Awaitable[str]]


async def never() -> str:
    await asyncio.Event().wait()
    return "done"


async def at_once() -> str:
    return "done"


async def run(calls: RunningCalls, method: Method) -> str:
    with calls.counted():
        return await method()


async def begin(calls: RunningCalls, method: Method) -> asyncio.Task[str]:
    task = asyncio.create_task(run(calls, method))
    await asyncio.sleep(0)
    return task


async def test_new_calls_are_refused_and_say_when_to_come_back():
    calls = RunningCalls()
    assert await run(calls, at_once) == "done"
    calls.refuse()
    with pytest.raises(ShuttingDownError) as refused:
        await run(calls, at_once)
    assert refused.value.retry_after == 1.0


async def test_a_wait_ends_with_the_last_call():
    calls, go_on = RunningCalls(), asyncio.Event()

    async def hold() -> str:
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


async def test_the_grace_period_ends_with_its_time_or_when_it_is_skipped_also_before_it_began():
    calls = RunningCalls()
    held = await begin(calls, never)
    await calls.wait_grace(0)
    waiting = asyncio.create_task(calls.wait_grace(600))
    await asyncio.sleep(0)
    assert not waiting.done()
    calls.skip_grace()
    await waiting
    await calls.wait_grace(600)
    assert calls.num_running == 1
    held.cancel()


async def test_what_skips_the_grace_period_does_not_shorten_the_wait_for_statuses():
    calls = RunningCalls()
    held = await begin(calls, never)
    calls.skip_grace()
    waiting = asyncio.create_task(calls.wait(600))
    await asyncio.sleep(0)
    assert not waiting.done()
    calls.end()
    with pytest.raises(ShuttingDownError):
        await held
    await waiting


async def test_a_call_ended_by_the_drain_is_shutting_down_and_one_ended_by_its_client_is_cancelled():
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
