from __future__ import annotations

import asyncio
import ctypes
import threading
from types import SimpleNamespace

import pytest

from turret_server.doors import freed_memory
from turret_server.doors.freed_memory import FreedMemory

MUCH = 16 * 2**20


@pytest.fixture
def trims(monkeypatch):
    """Released once for each time that memory is given back."""
    monkeypatch.setattr(freed_memory, "_SETTLE_SECONDS", 0.0)
    return threading.Semaphore(0)


async def test_memory_is_given_back_when_requests_have_taken_much(trims):
    memory = FreedMemory(trims.release)
    for _ in range(2):
        for _ in range(64):
            memory.ended(MUCH // 64)
        await asyncio.to_thread(trims.acquire)
        await settled(trims)


async def settled(trims):
    """Nothing is given back any more."""
    for _ in range(10):
        await asyncio.sleep(0)
    await asyncio.get_running_loop().run_in_executor(None, lambda: None)
    assert not trims.acquire(blocking=False)


async def test_what_comes_meanwhile_is_given_back_once_more(trims):
    memory = FreedMemory(trims.release)
    memory.ended(MUCH)
    memory.ended(MUCH // 16)
    for _ in range(2):
        await asyncio.to_thread(trims.acquire)
    await settled(trims)


async def test_a_few_bytes_meanwhile_do_not_count(trims):
    memory = FreedMemory(trims.release)
    memory.ended(MUCH)
    memory.ended(MUCH // 16 - 1)
    await asyncio.to_thread(trims.acquire)
    await settled(trims)


async def test_little_is_not_worth_the_time(trims):
    memory = FreedMemory(trims.release)
    memory.ended(MUCH - 1)
    await settled(trims)


async def test_memory_is_given_back_on_a_thread(monkeypatch):
    monkeypatch.setattr(freed_memory, "_SETTLE_SECONDS", 0.0)
    found = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()
    tell = lambda: loop.call_soon_threadsafe(found.set_result, threading.current_thread())  # noqa: E731
    FreedMemory(tell).ended(MUCH)
    assert await found is not threading.main_thread()


def test_all_that_is_free_is_given_back_and_a_c_library_without_the_function_is_fine(monkeypatch):
    freed_memory._trim()
    kept: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=kept.append))
    freed_memory._trim()
    assert kept == [0]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    freed_memory._trim()
