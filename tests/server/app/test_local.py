"""`LocalClient`: the client's methods, with the model in this process and without a socket."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import turret_client
import turret_server
from support.gate import GatedSampler
from support.serving import serving
from turret_client import Client, DeadlineExceededError, InvalidArgumentError, NotFoundError
from turret_server import LocalClient
from turret_server.app import assembly
from turret_server.config import ServerConfig
from turret_server.errors import ConfigError


@pytest.fixture(scope="module")
def settings(quantised_cache):
    return {
        "dtype": "float32",
        "device": "cpu",
        "memory": "8MiB",
        "cache": quantised_cache,
    }


@pytest.fixture(scope="module")
def model(base_of):
    return base_of("llama")


@pytest.fixture(scope="module")
def local(model, settings):
    with LocalClient(model, **settings) as client:
        yield client


@pytest.fixture(scope="module")
def remote(model, settings):
    with serving(ServerConfig(model=str(model), **settings)) as served, Client(served.address) as client:
        yield client


def test_answers_are_those_of_a_server(local, remote, adapter_of):
    def ask(client):
        client.load_adapter("mine", str(adapter_of("llama", "lora")))
        options = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "logprobs": 2}
        whole = client.generate("the quick fox", adapter="mine", **options)
        chunks = list(client.stream("the quick fox", adapter="mine", **options))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        return whole, client.get_adapter("mine").revision

    assert ask(local) == ask(remote)


def test_adapters_are_uploaded_listed_and_unloaded(local, adapter_of):
    uploaded = local.upload_adapter("sent", adapter_of("llama", "prefix"))
    assert "sent" in [adapter.name for adapter in local.list_adapters()]
    assert local.generate("a", adapter="sent", max_tokens=2).revision == uploaded.revision
    local.unload_adapter("sent")
    with pytest.raises(NotFoundError, match="sent"):
        local.generate("a", adapter="sent")


def test_errors_are_the_clients_own_and_name_the_field(local):
    with pytest.raises(InvalidArgumentError, match="temperature is from 0 to 100") as refused:
        local.generate("a", temperature=101)
    assert refused.value.reason == "INVALID_REQUEST"
    assert refused.value.metadata["field"] == "temperature"
    assert refused.value.request_id


def test_threads_share_a_batch(local):
    def ask(seed):
        return local.generate("a prompt", temperature=1.0, seed=seed, max_tokens=8).token_ids

    alone = [ask(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone


@pytest.mark.slow
def test_no_port_is_opened(model, settings, monkeypatch):
    def refuse(*_):
        raise AssertionError("a socket is bound")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with LocalClient(model, **settings) as client:
        assert client.generate("a", max_tokens=1).token_ids


@pytest.mark.slow
def test_a_deadline_and_a_reader_who_leaves_end_their_calls(model, settings, monkeypatch):
    gate, assemble = GatedSampler(), assembly.assemble
    monkeypatch.setattr("turret_server.app.local.assemble", lambda config: assemble(config, gate))
    with LocalClient(model, **settings) as client:
        with gate.closed(), pytest.raises(DeadlineExceededError):
            client.generate("a", max_tokens=4, timeout=0.2)
        stream = client.stream("a", max_tokens=200)
        next(stream)
        stream.close()
        assert client.generate("a", max_tokens=2).token_ids, "the engine goes on"


@pytest.mark.slow
def test_closing_ends_calls_threads_and_the_store(model, settings):
    before = set(threading.enumerate())
    client = LocalClient(model, **settings)
    stream = client.stream("a", max_tokens=200)
    next(stream)
    client.close()
    with pytest.raises(turret_client.CancelledError):
        list(stream)
    with pytest.raises(turret_client.CancelledError, match="closed"):
        client.generate("a")
    left = {thread.name for thread in set(threading.enumerate()) - before if "turret-local" in thread.name}
    assert not left


def test_a_program_may_end_without_closing(model, settings):
    settings = settings | {"cache": str(settings["cache"])}
    program = f"""
import faulthandler
from turret_server import LocalClient

client = LocalClient({str(model)!r}, **{settings!r})
stream = client.stream("a", max_tokens=200)
print(len(next(stream).token_ids))
faulthandler.dump_traceback_later(60, exit=True)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603
    assert (ended.returncode, ended.stdout) == (0, "1\n"), ended.stderr


@pytest.mark.parametrize("setting", [{"memory": "much"}, {"memory": 3}, {"max_batch_tokens": "many"}])
def test_a_setting_that_is_invalid_is_named(model, setting):
    [name] = setting
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        LocalClient(model, **setting)


def test_folders_may_be_texts(model, settings, tmp_path, adapter_of):
    texts = {"cache": str(settings["cache"]), "store": str(tmp_path / "store")}
    with LocalClient(model, **settings | texts) as client:
        client.load_adapter("kept", str(adapter_of("llama", "lora")))
    with LocalClient(model, **settings | texts) as client:
        assert [adapter.name for adapter in client.list_adapters()] == ["kept"]


def test_its_libraries_print_nothing_when_they_are_imported():
    command = [sys.executable, "-c", "import turret_server.app.build"]
    imported = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 (Python)
    assert imported.stderr == ""


def test_the_package_has_no_other_attributes():
    with pytest.raises(AttributeError, match="nothing"):
        turret_server.nothing  # noqa: B018


def test_the_package_has_no_other_attribute():
    with pytest.raises(AttributeError, match="no attribute 'RemoteClient'"):
        _ = turret_server.RemoteClient
