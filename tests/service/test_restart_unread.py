"""A start reads no tensors of what it knows; what turns out to be something else ends in FAILED."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import contextmanager
from dataclasses import replace

import pytest

from support.serving import serving
from turret_adapters.library import AdapterLibrary
from turret_adapters.store import records
from turret_client import AdapterState, Client, TurretError
from turret_server.config import ServerConfig

PROMPT = list(range(3, 15))


@pytest.fixture
def read(monkeypatch):
    """The revisions that were read, in order."""
    found: list[str] = []
    original = AdapterLibrary.read

    def read(library: AdapterLibrary, revision: str):
        found.append(revision)
        return original(library, revision)

    monkeypatch.setattr(AdapterLibrary, "read", read)
    return found


@pytest.fixture
def start(base_of, quantised_cache, tmp_path, monkeypatch):
    # Nothing is brought ahead: what is read is read for a request.
    monkeypatch.setattr("turret_server.engine.loop.Engine.prefetch", lambda *_: None)

    @contextmanager
    def start(adapters=None):
        config = ServerConfig(
            model=str(base_of("llama")),
            adapters=adapters,
            dtype="float32",
            device="cpu",
            memory="8MiB",
            cache=quantised_cache,
            store=tmp_path / "store",
        )
        with serving(config) as served, Client(served.address) as client:
            yield client

    return start


def answers(client: Client) -> dict[str, tuple[int, ...]]:
    return {
        adapter.name: client.generate(PROMPT, adapter=adapter.name, max_tokens=6).token_ids
        for adapter in client.list_adapters()
    }


KINDS = ("lora", "prefix", "prompt", "p-tuning")


def test_every_kind_is_known_and_described_unread_and_answers_as_before(start, adapter_of, read):
    with start() as client:
        for kind in KINDS:
            client.load_adapter(kind, str(adapter_of("llama", kind)))
        before, described = answers(client), client.list_adapters()
    read.clear()
    with start() as client:
        assert read == []
        again = client.list_adapters()
        assert [(one.name, one.revision, one.arena_bytes) for one in again] == [
            (one.name, one.revision, one.arena_bytes) for one in described
        ]
        assert {adapter.state for adapter in again} == {AdapterState.STAGED}
        assert answers(client) == before
        assert len(read) == len(KINDS)


def test_folders_that_are_as_they_were_are_not_read(start, adapter_of, read, tmp_path, monkeypatch):
    # As if it had been written a while ago.
    monkeypatch.setattr(records, "SETTLED_SECONDS", -60.0)
    folder = tmp_path / "adapters"
    for name, seed in (("stays", 0), ("changes", 0)):
        shutil.copytree(adapter_of("llama", "lora", seed), folder / name)
    with start(folder) as client:
        before = answers(client)
    shutil.copytree(adapter_of("llama", "lora", 1), folder / "changes", dirs_exist_ok=True)
    read.clear()
    with start(folder) as client:
        assert len(read) == 1
        after = answers(client)
    assert after["stays"] == before["stays"]
    assert after["changes"] != before["changes"]


def test_a_corrupted_revision_becomes_failed_at_its_first_request(start, adapter_of, tmp_path):
    with start() as client:
        revision = client.load_adapter("poet", str(adapter_of("llama", "lora"))).revision
        client.load_adapter("bard", str(adapter_of("llama", "prefix")))
    with start() as client:
        tensors = tmp_path / "store" / "adapters" / revision / "adapter_model.safetensors"
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.chmod(0o600)
        tensors.write_bytes(content)
        assert client.get_adapter("poet").state is AdapterState.STAGED
        with pytest.raises(TurretError):
            client.generate(PROMPT, adapter="poet", max_tokens=2)
        poet = client.get_adapter("poet")
        assert poet.state is AdapterState.FAILED
        assert revision in poet.error
        assert client.generate(PROMPT, adapter="bard", max_tokens=2).token_ids
    with start() as client:
        assert client.get_adapter("poet").state is AdapterState.FAILED
        client.load_adapter("poet", str(adapter_of("llama", "lora")))
        assert client.generate(PROMPT, adapter="poet", max_tokens=2).token_ids


@pytest.mark.parametrize("spoilt", ["bytes", "reader", "marks", "spec"])
def test_a_stale_or_corrupt_record_gives_no_wrong_answer(start, adapter_of, tmp_path, read, spoilt):
    with start() as client:
        client.load_adapter("poet", str(adapter_of("llama", "lora")))
        before = answers(client)
    database = sqlite3.connect(tmp_path / "store" / "names.sqlite")
    [(spec,)] = database.execute("SELECT spec FROM record").fetchall()
    match spoilt:
        case "bytes":
            database.execute("UPDATE record SET spec = ?", (spec[:-3],))
        case "reader" | "marks":
            database.execute(f"UPDATE record SET {spoilt} = 'another'")  # noqa: S608 (a constant)
        case "spec":
            # Sound, but of another adapter.
            known = records.decode(spec)
            assert known
            other = records.encode(replace(known, rows=known.rows[:-1]))
            database.execute("UPDATE record SET spec = ?", (other,))
    database.commit()
    database.close()
    read.clear()
    with start() as client:
        if spoilt == "spec":
            assert read == []
            with pytest.raises(TurretError):
                client.generate(PROMPT, adapter="poet", max_tokens=2)
            assert client.get_adapter("poet").state is AdapterState.FAILED
            assert "recorded" in client.get_adapter("poet").error
        else:
            assert len(read) == 1
            assert answers(client) == before
    read.clear()
    with start() as client:
        # It was read, and is known again.
        assert len(read) == (spoilt == "spec")
        assert answers(client) == before


def test_a_store_that_was_copied_is_read_once(start, adapter_of, tmp_path, read):
    with start() as client:
        client.load_adapter("poet", str(adapter_of("llama", "lora")))
        before = answers(client)
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "copy").rename(tmp_path / "store")
    for number_read in (1, 0):
        read.clear()
        with start() as client:
            assert len(read) == number_read
            assert answers(client) == before
