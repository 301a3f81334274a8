"""A disk that is full, and files that vanish or change while a server runs on them."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.prompts import PROMPT, until
from support.serving import Served, server_process, serving
from turret_client import (
    AdapterState,
    Client,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
)
from turret_server.config import ServerConfig


def answer(client: Client, adapter: str) -> tuple[int, ...]:
    return client.generate(PROMPT, adapter=adapter, max_tokens=6).token_ids


@pytest.mark.slow
def test_a_full_disk_fails_what_needs_it_and_nothing_else(base_of, adapter_of, tmp_path):
    """The kernel refuses to write beyond the limit as it would on a full disk."""
    store = tmp_path / "store"
    poet = adapter_of("llama", "lora")
    arguments = ("--store", str(store), "--memory", "8MiB")
    with (
        server_process(base_of("llama"), tmp_path / "cache", *arguments) as server,
        Client(server.address) as client,
    ):
        client.load_adapter("bard", str(adapter_of("llama", "prefix")))
        expected = answer(client, "bard")
        unlimited = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
        for bring in (client.load_adapter, client.upload_adapter):
            for name in ("poet", "bard"):
                with pytest.raises(ResourceExhaustedError, match="free some space") as refused:
                    bring(name, str(poet))
                assert refused.value.reason == "STORE_FULL"
        assert [adapter.name for adapter in client.list_adapters()] == ["bard"]
        assert len(list((store / "adapters").iterdir())) == 1
        assert list((store / "staging").iterdir()) == []
        assert answer(client, "bard") == expected
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)
        client.upload_adapter("sent", str(poet))
        client.load_adapter("poet", str(poet))
        assert answer(client, "poet") == answer(client, "sent")
        assert answer(client, "bard") == expected
        assert list((store / "uploads").iterdir()) == []
        server.kill()
    with (
        server_process(base_of("llama"), tmp_path / "cache", *arguments) as server,
        Client(server.address) as client,
    ):
        assert [adapter.name for adapter in client.list_adapters()] == ["bard", "poet", "sent"]
        assert answer(client, "bard") == expected


@pytest.fixture
def served(base_of, quantised_cache, tmp_path) -> Iterator[Served]:
    """A server that keeps no adapter in the host's memory: one that left the arena is read again."""
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="4MiB",
        host_memory="1KiB",
        store=tmp_path / "store",
        cache=quantised_cache,
    )
    with serving(config) as served:
        yield served


@pytest.fixture
def client(served) -> Iterator[Client]:
    with Client(served.address) as client:
        yield client
    served.parts.engine.check_integrity()


def leave_the_arena(served: Served, revision: str) -> None:
    """As if others had needed its pages."""
    served.parts.engine.drop(revision)
    until(lambda: not served.parts.engine.is_resident(revision))


def test_a_source_that_is_gone_is_not_needed(served, client, adapter_of, tmp_path):
    source = shutil.copytree(adapter_of("llama", "lora"), tmp_path / "poet")
    revision = client.load_adapter("poet", str(source)).revision
    expected = answer(client, "poet")
    shutil.rmtree(source)
    leave_the_arena(served, revision)
    assert answer(client, "poet") == expected


def flip_a_bit(folder: Path) -> None:
    tensors = folder / "adapter_model.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-2] ^= 1
    tensors.chmod(0o600)
    tensors.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "not in the store"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "nothing there"),
        (flip_a_bit, "found others"),
    ],
    ids=["gone", "half gone", "changed"],
)
def test_a_stored_adapter_that_is_lost_fails_with_its_reason_and_no_other_does(
    served, client, adapter_of, tmp_path, spoil: Callable[[Path], None], said
):
    poet = client.load_adapter("poet", str(adapter_of("llama", "lora")))
    client.load_adapter("bard", str(adapter_of("llama", "lora", 1)))
    expected = {name: answer(client, name) for name in ("poet", "bard")}
    running = client.stream(PROMPT, adapter="poet", max_tokens=6)
    first = next(running)
    spoil(tmp_path / "store" / "adapters" / poet.revision)
    tokens = [token for chunk in (first, *running) for token in chunk.token_ids]
    assert tuple(tokens) == expected["poet"]
    until(lambda: served.metric("turret_running_requests") == 0)
    leave_the_arena(served, poet.revision)
    with pytest.raises(FailedPreconditionError, match=said) as lost:
        answer(client, "poet")
    assert lost.value.reason == "ADAPTER_UNAVAILABLE"
    state = client.get_adapter("poet")
    assert state.state is AdapterState.FAILED
    assert said in state.error
    with pytest.raises(NotFoundError, match=said):
        answer(client, "poet")
    assert answer(client, "bard") == expected["bard"]
    client.load_adapter("poet", str(adapter_of("llama", "lora")))
    assert answer(client, "poet") == expected["poet"]
