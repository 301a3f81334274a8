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
    "watch_adapters": (),
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
    assert server.tenants == [tenant] * (len(CALLS) + 1)


@pytest.mark.parametrize("tenant", ["acme", None])
def test_every_call_of_the_async_client_is_made_for_the_tenant(server, tenant):
    async def call_all() -> None:
        async with AsyncClient(server.address, tenant=tenant) as client:
            for method, arguments in CALLS.items():
                await getattr(client, method)(*arguments)
            async with aclosing(client.stream("Hello")) as chunks:
                assert [chunk async for chunk in chunks]

    asyncio.run(call_all())
    assert server.tenants == [tenant] * (len(CALLS) + 1)


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize("tenant", ["\N{LATIN SMALL LETTER E WITH ACUTE}", "a\nb", "\x00"])
def test_a_tenant_that_no_header_can_carry_is_refused_at_once(client, tenant):
    with pytest.raises(InvalidArgumentError, match="tenant") as refused:
        client("127.0.0.1:1", tenant=tenant)
    assert refused.value.metadata == {"field": "turret-tenant"}
