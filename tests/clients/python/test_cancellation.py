from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import pytest

from turret_client import AsyncClient, CancelledError, Client

HANG_S = 60
"""Only so that a failing test ends."""


@pytest.fixture(autouse=True)
def holding(server):
    server.hold = True


def ended(server) -> bool:
    return server.ended.wait(HANG_S)


async def async_ended(server) -> bool:
    return await asyncio.to_thread(ended, server)


def test_leaving_the_loop_cancels(server):
    with Client(server.address) as client:
        for chunk in client.stream("Hello"):
            assert chunk.text == "Ahoy, "
            break
        assert ended(server)


def test_closing_the_stream_cancels(server):
    with Client(server.address) as client:
        stream = client.stream("Hello")
        next(stream)
        stream.close()
        assert ended(server)


def test_a_stream_that_nobody_reads_makes_no_call(server):
    with Client(server.address) as client:
        client.stream("Hello").close()
        server.hold = False
        client.generate("Another")
        assert [request.text for request in server.requests] == ["Another"]


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_closing_the_client_cancels(server, method):
    client = Client(server.address)
    closer = threading.Thread(target=lambda: (server.began.wait(HANG_S), client.close()))
    closer.start()
    with pytest.raises(CancelledError):
        for _ in [client.generate("Hello")] if method == "generate" else client.stream("Hello"):
            pass
    closer.join()
    assert ended(server)


async def test_async_leaving_the_loop_cancels(server):
    async with AsyncClient(server.address) as client:
        async for chunk in client.stream("Hello"):
            assert chunk.text == "Ahoy, "
            break
        assert await async_ended(server)


async def test_async_closing_the_stream_cancels(server):
    async with AsyncClient(server.address) as client:
        async with aclosing(client.stream("Hello")) as stream:
            await anext(stream)
        assert await async_ended(server)


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_cancelling_the_task_cancels(server, method):
    async with AsyncClient(server.address) as client:

        async def consume() -> None:
            if method == "generate":
                await client.generate("Hello")
            async for _ in client.stream("Hello"):
                pass

        task = asyncio.create_task(consume())
        await asyncio.to_thread(server.began.wait, HANG_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await async_ended(server)


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_async_closing_the_client_cancels(server, method):
    client = AsyncClient(server.address)

    async def consume() -> None:
        if method == "generate":
            await client.generate("Hello")
        async for _ in client.stream("Hello"):
            pass

    task = asyncio.create_task(consume())
    await asyncio.to_thread(server.began.wait, HANG_S)
    await client.close()
    with pytest.raises(CancelledError):
        await task
    assert await async_ended(server)
