"""What a server serves after it was killed, or its folders changed while it was away."""

from __future__ import annotations

import shutil

import pytest

from support.serving import server_process, serving
from turret_adapters.host import HostAdapter
from turret_adapters.library import AdapterLibrary
from turret_client import AdapterState, Client, NotFoundError
from turret_server.config import ServerConfig

PROMPT = list(range(3, 15))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def answers(client: Client) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Revision and greedy tokens of every adapter."""
    found = {}
    for adapter in client.list_adapters():
        answer = client.generate(PROMPT, adapter=adapter.name, max_tokens=6)
        found[adapter.name] = (answer.revision, answer.token_ids)
    return found


@pytest.mark.slow
def test_the_same_names_serve_the_same_revisions_after_a_kill(base_of, adapter_of, cache, tmp_path):
    source = shutil.copytree(adapter_of("llama", "lora"), tmp_path / "source")
    arguments = ("--store", str(tmp_path / "store"), "--memory", "8MiB")
    with server_process(base_of("llama"), cache, *arguments) as server, Client(server.address) as client:
        client.load_adapter("poet", str(source))
        client.load_adapter("bard", str(adapter_of("llama", "prefix")))
        client.load_adapter("gone", str(source))
        client.load_adapter("poet", str(adapter_of("llama", "lora", 1)))
        client.unload_adapter("gone")
        before = answers(client)
        server.kill()
    # What was loaded is the server's own: it does not need the source any more.
    shutil.rmtree(source)
    with server_process(base_of("llama"), cache, *arguments) as server, Client(server.address) as client:
        assert answers(client) == before
        assert list(before) == ["bard", "poet"]
        with pytest.raises(NotFoundError):
            client.generate(PROMPT, adapter="gone")


@pytest.mark.slow
def test_a_folder_says_what_its_names_serve(base_of, adapter_of, cache, tmp_path):
    folder = tmp_path / "adapters"
    for name, seed in (("stays", 0), ("changes", 0), ("goes", 0)):
        shutil.copytree(adapter_of("llama", "lora", seed), folder / name)
    arguments = ("--store", str(tmp_path / "store"), "--memory", "8MiB", "--adapters", str(folder))
    with server_process(base_of("llama"), cache, *arguments) as server, Client(server.address) as client:
        client.load_adapter("beside", str(folder / "stays"))
        before = answers(client)
    shutil.rmtree(folder / "goes")
    shutil.rmtree(folder / "changes")
    shutil.copytree(adapter_of("llama", "lora", 1), folder / "changes")
    with server_process(base_of("llama"), cache, *arguments) as server, Client(server.address) as client:
        after = answers(client)
    assert list(after) == ["beside", "changes", "stays"]
    assert after["stays"] == before["stays"]
    assert after["beside"] == before["beside"]
    assert after["changes"] != before["changes"]


@pytest.mark.slow
def test_a_revision_that_was_corrupted_on_disk_is_not_served(base_of, adapter_of, cache, tmp_path):
    store = tmp_path / "store"
    arguments = ("--store", str(store), "--memory", "8MiB")
    with server_process(base_of("llama"), cache, *arguments) as server, Client(server.address) as client:
        client.load_adapter("poet", str(adapter_of("llama", "lora")))
        client.load_adapter("bard", str(adapter_of("llama", "prefix")))
        revision = client.get_adapter("poet").revision
    tensors = store / "adapters" / revision / "adapter_model.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.chmod(0o600)
    tensors.write_bytes(content)
    with server_process(base_of("llama"), cache, *arguments) as server, Client(server.address) as client:
        poet = client.get_adapter("poet")
        assert poet.state is AdapterState.FAILED
        assert revision in poet.error
        assert client.generate(PROMPT, adapter="bard", max_tokens=2).token_ids
        client.load_adapter("poet", str(adapter_of("llama", "lora")))
        assert client.generate(PROMPT, adapter="poet", max_tokens=2).token_ids


def test_a_reader_that_breaks_down_over_one_adapter_stops_no_other(
    base_of, adapter_of, cache, tmp_path, monkeypatch
):
    folder = tmp_path / "adapters"
    for name, kind in (("bard", "prefix"), ("poet", "lora")):
        shutil.copytree(adapter_of("llama", kind), folder / name)
    read = AdapterLibrary.read

    def break_down(library: AdapterLibrary, revision: str) -> HostAdapter:
        adapter = read(library, revision)
        if adapter.spec.prefix:
            raise ZeroDivisionError
        return adapter

    monkeypatch.setattr(AdapterLibrary, "read", break_down)
    config = ServerConfig(
        model=str(base_of("llama")),
        adapters=folder,
        dtype="float32",
        device="cpu",
        memory="8MiB",
        cache=cache,
    )
    with serving(config) as served, Client(served.address) as client:
        assert client.get_adapter("bard").state is AdapterState.FAILED
        assert "ZeroDivisionError" in client.get_adapter("bard").error
        assert client.generate(PROMPT, adapter="poet", max_tokens=2).token_ids
