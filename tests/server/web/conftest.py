"""The HTTP application over services that a test scripts, called without a port."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from turret_server.doors.health import Health
from turret_server.doors.running import RunningCalls
from turret_server.engine.admission import TenantLimits
from turret_server.serving.request import Chunk, FinishReason, Usage
from turret_server.tenancy.auth import Authenticator
from turret_server.tenancy.tenants_file import TenantsFile
from turret_server.web.app import Services, make_app
from turret_server.web.names import ModelNames

USAGE = Usage(prompt_tokens=5, cached_tokens=3, generated_tokens=2)


def chunk(text: str, **more: Any) -> Chunk:
    return Chunk(**{"text": text, "token_ids": (1,), "revision": "r1"} | more)


def last(text: str = "", **more: Any) -> Chunk:
    return chunk(text, **{"finish_reason": FinishReason.STOP, "usage": USAGE} | more)


class Generation:
    """Answers every request with the same chunks, then `error` if there is one, and keeps the requests."""

    def __init__(self, *chunks: Chunk, error: Exception | None = None) -> None:
        self.chunks = chunks or (chunk("Ahoy"), last(", matey"))
        self.error = error
        self.requests: list[Any] = []
        self.callers: list[Any] = []
        self.num_closed = 0

    async def generate(self, request, caller):
        self.requests.append(request)
        self.callers.append(caller)
        try:
            for each in self.chunks:
                yield each
            if self.error:
                raise self.error
        finally:
            self.num_closed += 1

    @property
    def request(self):
        [request] = self.requests
        return request


class Door:
    """The application, and what it stands before."""

    def __init__(
        self,
        *,
        generation=None,
        tokens=None,
        pooling=None,
        administration=None,
        tenants=None,
        origins=(),
    ):
        self.generation = generation or Generation()
        self.calls, self.health = RunningCalls(), Health(is_ready=True)
        services = Services(
            generation=self.generation,
            tokens=tokens,
            pooling=pooling,
            administration=administration or SimpleNamespace(),
            health=self.health,
            names=ModelNames(base="base", max_context=256, created=1),
        )
        authenticator = Authenticator(tenants or TenantsFile(None, TenantLimits()), None, lambda _: None)
        self.app = make_app(services, authenticator, self.calls, origins=origins)

    def client(self, **headers: str) -> httpx.AsyncClient:
        async def app(scope, receive, send):
            await self.app({**scope, "state": {}}, receive, send)

        transport = httpx.ASGITransport(app)
        return httpx.AsyncClient(transport=transport, base_url="http://turret", headers=headers)

    async def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        async with self.client(**headers) as client:
            return await client.post(path, json=body)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        async with self.client(**headers) as client:
            return await client.get(path)


@pytest.fixture
def open_door() -> type[Door]:
    return Door


@pytest.fixture
def door() -> Door:
    return Door()
