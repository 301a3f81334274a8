"""A call in a thread is waited for, whatever becomes of who waits."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from turret_server import logs
from turret_server.engine.admission import TenantLimits
from turret_server.errors import QuotaExceededError, TooManyCallsError
from turret_server.lifecycle import threads
from turret_server.lifecycle.threads import LoadQueue, run_to_completion
from turret_server.tenancy.tenants import Tenant


@pytest.fixture
def gate():
    """Open at the end: a thread that waited on would keep the process from ending, if a test fails."""
    gate = threading.Event()
    yield gate
    gate.set()


async def test_what_a_call_answers_is_answered(gate):
    gate.set()
    assert await run_to_completion(gate.is_set) is True


async def test_what_a_call_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        await run_to_completion(lambda: 1 // 0)


async def test_who_is_cancelled_waits_to_the_end_and_undoes(gate):
    began, undone = threading.Event(), []

    def call() -> str:
        began.set()
        gate.wait()
        return "made"

    task = asyncio.create_task(run_to_completion(call, undo=undone.append))
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

    task = asyncio.create_task(run_to_completion(call, undo=undone.append))
    await asyncio.to_thread(began.wait)
    task.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == []


async def reach(queue: LoadQueue, num_loads: int) -> None:
    """Wait until so many loads are queued or run."""

    async def wait() -> None:
        while queue._num_loads != num_loads:  # noqa: ASYNC110 (it counts on other threads)
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), 60)


@pytest.fixture
def one_at_a_time(monkeypatch):
    monkeypatch.setattr(threads, "MAX_LOADS", 1)
    monkeypatch.setattr(threads, "MAX_WAITING", 1)


@pytest.mark.usefixtures("one_at_a_time")
async def test_a_load_that_nobody_waits_for_is_not_begun_and_one_that_runs_ends(gate):
    queue, done = LoadQueue(), []

    def load(name: str) -> None:
        gate.wait()
        done.append(name)

    running = queue.submit(lambda: load("first"))
    waiting = queue.submit(lambda: load("second"))
    with pytest.raises(TooManyCallsError):
        queue.submit(lambda: load("third"))
    waiting.cancel()
    running.cancel()
    await reach(queue, 1)
    last = queue.submit(lambda: load("last"))
    # The one that runs holds its place though nobody waits for it.
    with pytest.raises(TooManyCallsError):
        queue.submit(lambda: load("too many"))
    gate.set()
    await last
    assert done == ["first", "last"]


@pytest.mark.usefixtures("one_at_a_time")
async def test_a_load_that_fails_gives_its_place_back():
    queue = LoadQueue()
    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            await queue.submit(lambda: 1 // 0)
        await reach(queue, 0)
    assert await queue.submit(lambda: "loaded") == "loaded"


async def test_a_tenant_has_so_many_loads_at_once_and_no_more(gate):
    acme, bolt = (
        Tenant(name=name, limits=TenantLimits(), max_concurrent_loads=2) for name in ("acme", "bolt")
    )
    queue = LoadQueue()
    with queue.slot(acme):
        first = queue.submit(gate.wait, acme)
        with pytest.raises(QuotaExceededError, match="2 loads of tenant 'acme'") as refused:
            queue.submit(gate.wait, acme)
        assert refused.value.metadata == {"tenant": "acme", "quota": "max_concurrent_loads"}
        assert refused.value.retry_after
        others = [queue.submit(gate.wait, bolt), queue.submit(gate.wait)]
        # It runs on, though nobody waits for it.
        first.cancel()
        await asyncio.sleep(0)
        with pytest.raises(QuotaExceededError):
            queue.submit(gate.wait, acme)
    second = queue.submit(gate.wait, acme)
    gate.set()
    await asyncio.gather(second, *others)
    await reach(queue, 0)
    for _ in range(2):
        with queue.slot(acme):
            await queue.submit(gate.wait, acme)
            await reach(queue, 0)
    assert queue._num_of_tenant == {}


async def test_log_lines_on_a_thread_name_the_request():
    with logs.about({"request_id": "request-1"}):
        assert await run_to_completion(logs.bound) == {"request_id": "request-1"}
        assert await LoadQueue().submit(logs.bound) == {"request_id": "request-1"}


async def test_a_call_runs_on_the_threads_that_it_is_given():
    with ThreadPoolExecutor(1, "mine") as mine:
        thread = await run_to_completion(threading.current_thread, executor=mine)
    assert thread.name.startswith("mine")
