"""Loads run a few at a time, and give their places back however they end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from turret_server.engine.admission import TenantLimits
from turret_server.errors import QuotaExceededError, TooManyCallsError
from turret_server.lifecycle import loads
from turret_server.lifecycle.loads import LoadQueue
from turret_server.tenancy.tenants import Tenant


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


async def test_a_tenant_has_so_many_loads_at_once_and_no_more():
    acme, bolt = (
        Tenant(name=name, limits=TenantLimits(), max_concurrent_loads=2) for name in ("acme", "bolt")
    )
    queue, gate = LoadQueue(), threading.Event()
    with queue.place(acme):
        first = queue.start(gate.wait, acme)
        with pytest.raises(QuotaExceededError, match="2 loads of tenant 'acme'") as refused:
            queue.start(gate.wait, acme)
        assert refused.value.metadata == {"tenant": "acme", "quota": "max_concurrent_loads"}
        assert refused.value.retry_after
        others = [queue.start(gate.wait, bolt), queue.start(gate.wait)]
        # It runs on, though nobody waits for it.
        first.cancel()
        await asyncio.sleep(0.05)
        with pytest.raises(QuotaExceededError):
            queue.start(gate.wait, acme)
    second = queue.start(gate.wait, acme)
    gate.set()
    await asyncio.gather(second, *others)
    await asyncio.sleep(0.05)
    for _ in range(2):
        with queue.place(acme):
            await queue.start(gate.wait, acme)
            await asyncio.sleep(0.05)
