"""A request for a name that nobody loaded finds it at its source."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace

import pytest

from support.serving import serving
from turret_client import AsyncClient, Client, NotFoundError
from turret_server.config import ServerConfig
from turret_server.lifecycle import lazy

PROMPT = list(range(3, 15))


@pytest.fixture
def source(tmp_path, adapter_of):
    for seed, name in enumerate(("poet", "bard", "seer")):
        shutil.copytree(adapter_of("llama", "lora", seed), tmp_path / "source" / name)
    return tmp_path / "source"


@pytest.fixture
def config(base_of, quantised_cache, source, tmp_path):
    return ServerConfig(
        model=str(base_of("llama")),
        lazy_source=f"{source}/{{name}}",
        # A list of its own: what is not below the source may not be loaded.
        allow_source=(str(tmp_path / "nothing"),),
        store=tmp_path / "store",
        dtype="float32",
        device="cpu",
        memory="8MiB",
        cache=quantised_cache,
    )


@pytest.fixture
def served(config):
    with serving(config) as served:
        yield served


@pytest.fixture
def client(served):
    with Client(served.address) as client:
        yield client


def generate(client: Client, name: str):
    return client.generate(PROMPT, adapter=name, max_tokens=2)


def names(client: Client) -> list[str]:
    return [adapter.name for adapter in client.list_adapters()]


def test_what_is_named_is_loaded_and_stays(client, source):
    assert names(client) == []
    first = generate(client, "poet")
    assert names(client) == ["poet"]
    assert client.get_adapter("poet").history[0].source == str(source / "poet")
    shutil.rmtree(source / "poet")
    assert generate(client, "poet") == replace(first, usage=generate(client, "poet").usage)
    with pytest.raises(NotFoundError):
        client.get_adapter("bard")


async def test_many_requests_for_unknown_names_at_once(served):
    async with AsyncClient(served.address) as client:
        wanted = ["poet", "bard", "poet", "seer"] * 6
        found = await asyncio.gather(
            *(client.generate(PROMPT, adapter=name, max_tokens=2) for name in wanted)
        )
        assert [len(adapter.history) for adapter in await client.list_adapters()] == [1, 1, 1]
    assert len({each.revision for each in found}) == 3


def test_a_name_that_the_source_does_not_have_is_not_found(client):
    with pytest.raises(NotFoundError, match="'late', and its source has none") as refused:
        generate(client, "late")
    assert refused.value.reason == "ADAPTER_NOT_FOUND"


def test_the_least_recently_used_is_unloaded_unless_it_was_also_loaded(client, source, monkeypatch):
    monkeypatch.setattr(lazy, "MAX_ON_DEMAND", 1)
    generate(client, "poet")
    generate(client, "bard")
    assert names(client) == ["bard"]
    client.load_adapter("bard", str(source / "bard"))
    generate(client, "poet")
    generate(client, "seer")
    assert names(client) == ["bard", "seer"]
