"""A server that watches its folder serves what is in it."""

from __future__ import annotations

import shutil

import pytest

from support.prompts import until
from support.serving import serving
from turret_client import AdapterState, Client
from turret_server.config import ServerConfig

PROMPT = list(range(3, 15))


@pytest.fixture
def folder(tmp_path, adapter_of):
    folder = tmp_path / "adapters"
    shutil.copytree(adapter_of("llama", "lora"), folder / "there")
    return folder


@pytest.fixture
def client(base_of, quantised_cache, folder):
    config = ServerConfig(
        model=str(base_of("llama")),
        adapters=folder,
        watch=True,
        dtype="float32",
        device="cpu",
        memory="8MiB",
        cache=quantised_cache,
    )
    with serving(config) as served, Client(served.address) as client:
        yield client


def states(client: Client) -> dict[str, AdapterState]:
    return {adapter.name: adapter.state for adapter in client.list_adapters()}


def test_folders_come_change_and_go(client, folder, adapter_of):
    first = client.get_adapter("there").revision
    shutil.copytree(adapter_of("llama", "prefix"), folder / "new")
    until(lambda: states(client).get("new") is AdapterState.RESIDENT)
    shutil.copytree(adapter_of("llama", "lora", seed=1), folder / "there", dirs_exist_ok=True)
    until(lambda: client.get_adapter("there").revision != first)
    assert [each.revision for each in client.get_adapter("there").history][1:] == [first]
    shutil.rmtree(folder / "new")
    until(lambda: "new" not in states(client))
    assert client.generate(PROMPT, adapter="there", max_tokens=2).token_ids


def test_a_broken_folder_is_listed_and_touches_nothing_else(client, folder, adapter_of):
    before = client.get_adapter("there").revision
    whole = (adapter_of("llama", "lora") / "adapter_model.safetensors").read_bytes()
    new = folder / "new"
    shutil.copytree(adapter_of("llama", "lora"), new)
    (new / "adapter_model.safetensors").write_bytes(whole[:-10])
    (folder / "there" / "adapter_model.safetensors").write_bytes(b"")
    until(lambda: states(client).get("new") is AdapterState.FAILED)
    assert "adapter_model.safetensors" in client.get_adapter("new").error
    assert client.get_adapter("there").revision == before
    assert client.generate(PROMPT, adapter="there", max_tokens=2).token_ids
    (new / "adapter_model.safetensors").write_bytes(whole)
    until(lambda: states(client).get("new") in (AdapterState.STAGED, AdapterState.RESIDENT))
    shutil.rmtree(new)
    until(lambda: "new" not in states(client))


def test_what_was_loaded_from_elsewhere_under_a_folders_name_stays_when_the_folder_goes(
    client, folder, adapter_of
):
    loaded = client.load_adapter("there", str(adapter_of("llama", "lora", seed=1)))
    shutil.copytree(adapter_of("llama", "prefix"), folder / "new")
    shutil.rmtree(folder / "there")
    until(lambda: "new" in states(client))
    shutil.rmtree(folder / "new")
    until(lambda: "new" not in states(client))
    assert client.get_adapter("there").revision == loaded.revision
