"""A call in a thread is waited for, whatever becomes of who waits."""

from __future__ import annotations

import asyncio
import threading

import pytest

from turret_server.lifecycle.threads import to_its_end


@pytest.fixture
def gate():
    return threading.Event()


async def test_what_a_call_answers_is_answered(gate):
    gate.set()
    assert await to_its_end(gate.is_set) is True


async def test_what_a_call_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        await to_its_end(lambda: 1 // 0)


async def test_who_is_cancelled_waits_to_the_end_and_undoes(gate):
    began, undone = threading.Event(), []

    def call() -> str:
        began.set()
        gate.wait()
        return "made"

    task = asyncio.create_task(to_its_end(call, undo=undone.append))
    await asyncio.to_thread(began.wait)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
    assert undone == []
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == ["made"]


async def test_what_failed_is_not_undone(gate):
    began, undone = threading.Event(), []

    def call() -> None:
        began.set()
        gate.wait()
        raise ZeroDivisionError

    task = asyncio.create_task(to_its_end(call, undo=undone.append))
    await asyncio.to_thread(began.wait)
    task.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == []
