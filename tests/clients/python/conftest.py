from __future__ import annotations

import asyncio
import importlib.util
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from turret_client import AsyncClient, Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType


STREAMS = {"stream", "watch_adapters"}


@pytest.fixture(scope="session")
def script() -> ModuleType:
    """The module scripted_server: tests are no package that could import it."""
    spec = importlib.util.spec_from_file_location(
        "scripted_server", Path(__file__).with_name("scripted_server.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(script) -> Iterator[Any]:
    with script.ScriptedServer() as server:
        yield server


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
