from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from turret_client import AsyncClient, Client, InvalidArgumentError

CALLS = {
    "generate": ("Hello",),
    "load_adapter": ("pirate", "/srv/pirate"),
    "unload_adapter": ("pirate",),
    "get_adapter": ("pirate",),
    "rollback_adapter": ("pirate",),
    "set_traffic_split": ("pirate", "01234567", 10),
    "list_adapters": (),
    "pin_prompt": ("rules", "Answer briefly."),
    "unpin_prompt": ("rules",),
    "list_pinned_prompts": (),
}


@pytest.mark.parametrize("tenant", ["acme", None])
def test_every_call_is_made_for_the_tenant(server, tenant):
    with Client(server.address, tenant=tenant) as client:
        for method, arguments in CALLS.items():
            getattr(client, method)(*arguments)
        list(client.stream("Hello"))
        list(client.watch_adapters())
    assert server.tenants == [tenant] * (len(CALLS) + 2)


@pytest.mark.parametrize("tenant", ["acme", None])
def test_every_call_of_the_async_client_is_made_for_the_tenant(server, tenant):
    async def call_all() -> None:
        async with AsyncClient(server.address, tenant=tenant) as client:
            for method, arguments in CALLS.items():
                await getattr(client, method)(*arguments)
            async with aclosing(client.stream("Hello")) as chunks:
                assert [chunk async for chunk in chunks]
            async with aclosing(client.watch_adapters()) as adapters:
                assert [adapter async for adapter in adapters]

    asyncio.run(call_all())
    assert server.tenants == [tenant] * (len(CALLS) + 2)


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize("tenant", ["\N{LATIN SMALL LETTER E WITH ACUTE}", "a\nb", "\x00"])
def test_a_tenant_that_no_header_can_carry_is_refused_at_once(client, tenant):
    with pytest.raises(InvalidArgumentError, match="tenant") as refused:
        client("127.0.0.1:1", tenant=tenant)
    assert refused.value.metadata == {"field": "turret-tenant"}


@pytest.fixture(autouse=True)
def _no_key_around(monkeypatch):
    monkeypatch.delenv("TURRET_API_KEY", raising=False)


@pytest.mark.parametrize("api_key", ["turret_secret", None])
def test_every_call_goes_with_the_key(server, api_key):
    with Client(server.address, api_key=api_key) as client:
        for method, arguments in CALLS.items():
            getattr(client, method)(*arguments)
        list(client.stream("Hello"))
    assert server.authorizations == [api_key and f"Bearer {api_key}"] * (len(CALLS) + 1)


def test_every_call_of_the_async_client_goes_with_the_key(server):
    async def call_all() -> None:
        async with AsyncClient(server.address, api_key="turret_secret") as client:
            for method, arguments in CALLS.items():
                await getattr(client, method)(*arguments)
            async with aclosing(client.stream("Hello")) as chunks:
                assert [chunk async for chunk in chunks]

    asyncio.run(call_all())
    assert server.authorizations == ["Bearer turret_secret"] * (len(CALLS) + 1)


def test_the_environments_key_is_taken_where_none_is_given(server, monkeypatch):
    monkeypatch.setenv("TURRET_API_KEY", "around")
    for options in ({}, {"api_key": "given"}, {"api_key": ""}):
        with Client(server.address, **options) as client:
            client.generate("Hello")
    assert server.authorizations == ["Bearer around", "Bearer given", None]


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(client):
    with pytest.raises(InvalidArgumentError, match="API key") as refused:
        client("127.0.0.1:1", api_key="secret\n")
    assert refused.value.metadata == {"field": "authorization"}
    assert "secret" not in refused.value.message


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_an_option_that_is_not_known_is_a_mistake(client):
    with pytest.raises(TypeError, match="apikey"):
        client("127.0.0.1:1", apikey="x")
