"""A request for a name that nobody loaded finds it at its source."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace

import pytest

from support.serving import serving
from turret_client import AsyncClient, Client, NotFoundError
from turret_server.app.build import assemble
from turret_server.config import ServerConfig
from turret_server.errors import ConfigError
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
        allow_sources=(str(tmp_path / "nothing"),),
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


async def test_many_requests_for_one_name_load_it_once(served, monkeypatch):
    loads = []
    load = served.parts.lifecycle.load
    monkeypatch.setattr(
        served.parts.lifecycle, "load", lambda name, source: (loads.append(name), load(name, source))[1]
    )
    async with AsyncClient(served.address) as client:
        wanted = ["poet", "bard", "poet", "seer"] * 6
        found = await asyncio.gather(
            *(client.generate(PROMPT, adapter=name, max_tokens=2) for name in wanted)
        )
    assert sorted(loads) == ["bard", "poet", "seer"]
    assert len({each.revision for each in found}) == 3


def test_that_there_is_nothing_is_remembered_for_a_while(client, source, served, monkeypatch):
    kept = served.parts.inference._requests._lazy
    monkeypatch.setattr(kept, "_clock", lambda: 100.0)
    for _ in range(2):
        with pytest.raises(NotFoundError, match="'late'") as refused:
            generate(client, "late")
        assert refused.value.reason == "ADAPTER_NOT_FOUND"
    shutil.copytree(source / "poet", source / "late")
    with pytest.raises(NotFoundError, match="'late'"):
        generate(client, "late")
    monkeypatch.setattr(kept, "_clock", lambda: 100.0 + lazy.MISSING_SECONDS)
    assert generate(client, "late").revision == generate(client, "poet").revision


def test_no_more_that_is_missing_is_remembered_than_may(client, served, monkeypatch):
    monkeypatch.setattr(lazy, "MAX_MISSING", 3)
    for number in range(6):
        with pytest.raises(NotFoundError):
            generate(client, f"missing-{number}")
    assert list(served.parts.inference._requests._lazy._missing) == ["missing-3", "missing-4", "missing-5"]


def test_no_more_is_brought_than_may_and_what_was_asked_for_longest_ago_goes(client, monkeypatch):
    monkeypatch.setattr(lazy, "MAX_BROUGHT", 2)
    for name in ("poet", "bard", "poet", "seer"):
        generate(client, name)
    assert names(client) == ["poet", "seer"]
    assert generate(client, "bard").token_ids
    assert names(client) == ["bard", "seer"]


def test_what_was_brought_before_a_restart_counts(config, monkeypatch):
    with serving(config) as served, Client(served.address) as client:
        generate(client, "poet")
        generate(client, "bard")
    monkeypatch.setattr(lazy, "MAX_BROUGHT", 2)
    with serving(config) as served, Client(served.address) as client:
        assert names(client) == ["bard", "poet"]
        generate(client, "bard")
        generate(client, "poet")
        generate(client, "seer")
        assert names(client) == ["poet", "seer"]


@pytest.mark.parametrize("source", ["hf://owner/name", "owner/{name}", "/a/{name}/{name}", ""])
def test_a_source_that_names_no_place_is_refused(config, source):
    with pytest.raises(ConfigError, match="--lazy-source"), assemble(replace(config, lazy_source=source)):
        pass
