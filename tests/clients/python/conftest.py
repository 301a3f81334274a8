from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from turret_client import AsyncClient, Client

if TYPE_CHECKING:
    from collections.abc import Callable


STREAMS = {"stream", "stream_chat", "watch_adapters"}


def call_client(address: str, method: str, *args: object, **options: object) -> Any:
    with Client(address) as client:
        result = getattr(client, method)(*args, **options)
        return list(result) if method in STREAMS else result


def call_async_client(address: str, method: str, *args: object, **options: object) -> Any:
    async def run() -> Any:
        async with AsyncClient(address) as client:
            if method not in STREAMS:
                return await getattr(client, method)(*args, **options)
            async with aclosing(getattr(client, method)(*args, **options)) as chunks:
                return [chunk async for chunk in chunks]

    return asyncio.run(run())


@pytest.fixture(params=[call_client, call_async_client], ids=["Client", "AsyncClient"])
def call_at(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls one method, named, of a new client of an address; a stream comes back as a list."""
    return request.param


@pytest.fixture
def call(call_at, server) -> Callable[..., Any]:
    return partial(call_at, server.address)
