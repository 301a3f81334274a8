"""Loads run a few at a time, and give their places back however they end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from turret_server.api import loads
from turret_server.api.loads import LoadQueue
from turret_server.errors import TooManyCallsError


@pytest.fixture
def one_at_a_time(monkeypatch):
    monkeypatch.setattr(loads, "MAX_LOADS", 1)
    monkeypatch.setattr(loads, "MAX_WAITING", 1)


@pytest.mark.usefixtures("one_at_a_time")
async def test_a_load_that_nobody_waits_for_is_not_begun_and_one_that_runs_ends():
    queue, gate, done = LoadQueue(), threading.Event(), []

    def load(name: str) -> None:
        gate.wait()
        done.append(name)

    running = queue.start(lambda: load("first"))
    waiting = queue.start(lambda: load("second"))
    with pytest.raises(TooManyCallsError):
        queue.start(lambda: load("third"))
    waiting.cancel()
    running.cancel()
    await asyncio.sleep(0.05)
    last = queue.start(lambda: load("last"))
    # The one that runs holds its place though nobody waits for it.
    with pytest.raises(TooManyCallsError):
        queue.start(lambda: load("too many"))
    gate.set()
    await last
    assert done == ["first", "last"]


@pytest.mark.usefixtures("one_at_a_time")
async def test_a_load_that_fails_gives_its_place_back():
    queue = LoadQueue()
    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            await queue.start(lambda: 1 // 0)
        await asyncio.sleep(0)
    assert await queue.start(lambda: "loaded") == "loaded"
