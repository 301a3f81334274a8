"""Adapters that clients send, over connections that may break."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from support.prompts import PROMPT, until
from turret.v1 import adapters_pb2, adapters_pb2_grpc
from turret_client import (
    AdapterState,
    AsyncClient,
    Client,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    TurretError,
    UnavailableError,
)
from turret_client import _upload as sending
from turret_client._status import _turret_error
from turret_server.lifecycle import threads, uploads

_blanks = itertools.count(1)


@pytest.fixture
def folder(adapter_of, tmp_path):
    """An adapter that no other test sends: its config ends in some more blanks."""
    folder = Path(shutil.copytree(adapter_of("llama", "lora"), tmp_path / "adapter"))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text() + " " * next(_blanks))
    return folder


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(sending, "_CHUNK_BYTES", 1000)


@pytest.fixture
def store(served):
    return served.parts.lifecycle._library.store


@pytest.fixture
def forget(client):
    yield
    for adapter in client.list_adapters():
        if adapter.name in ("sent", "loaded"):
            client.unload_adapter(adapter.name)


@contextmanager
def raising_turret_errors(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _turret_error(error, address) from error


class Wire:
    """Messages of one upload, one by one."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._go = threading.Semaphore(0)
        self._messages: list[adapters_pb2.UploadAdapterRequest | None] = []
        self._call = adapters_pb2_grpc.AdapterServiceStub(self._channel).UploadAdapter(self._requests())

    def _requests(self):
        while True:
            self._go.acquire()
            message = self._messages.pop(0)
            if message is None:
                return
            yield message

    def send(self, message: adapters_pb2.UploadAdapterRequest | None) -> None:
        self._messages.append(message)
        self._go.release()

    def receive(self) -> adapters_pb2.UploadAdapterResponse:
        with raising_turret_errors("the server"):
            return next(self._call)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.send(None)
        self._call.cancel()
        self._channel.close()


def start(folder: Path, name: str = "sent") -> adapters_pb2.UploadAdapterRequest:
    return sending.AdapterFolder(name, folder, None).start()


def chunk(offset: int, data: bytes) -> adapters_pb2.UploadAdapterRequest:
    return adapters_pb2.UploadAdapterRequest(chunk=adapters_pb2.UploadChunk(offset=offset, data=data))


@pytest.mark.usefixtures("forget", "small_chunks")
def test_what_was_sent_is_served_like_what_was_loaded(client, folder):
    told = []
    sent = client.upload_adapter("sent", folder, progress=lambda *each: told.append(each))
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert told[0] == (0, size)
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    loaded = client.load_adapter("loaded", str(folder))
    assert sent.revision == loaded.revision
    assert sent.history[0].source == "upload"
    answers = [client.generate(PROMPT, adapter=name, max_tokens=8) for name in ("sent", "loaded")]
    assert answers[0].token_ids == answers[1].token_ids
    until(lambda: client.get_adapter("sent").state is AdapterState.RESIDENT)


@pytest.mark.usefixtures("forget", "small_chunks")
async def test_many_send_at_once(served, adapter_of):
    async with AsyncClient(served.address) as client:
        folders = {f"sent-{seed}": adapter_of("llama", "lora", seed=seed) for seed in (41, 42, 43)}
        sent = await asyncio.gather(
            *(client.upload_adapter(name, folder) for name, folder in folders.items())
        )
        assert len({adapter.revision for adapter in sent}) == 3
        for name in folders:
            await client.unload_adapter(name)


@pytest.mark.usefixtures("forget", "small_chunks")
def test_an_interrupted_upload_resumes(client, served, folder, store):
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    with Wire(served.address) as wire:
        wire.send(start(folder))
        assert wire.receive().offset == 0
        wire.send(chunk(0, tensors[:1500]))
        wire.send(chunk(1500, tensors[1500:4000]))
        [kept] = [
            place for place in (store.root / "uploads").iterdir() if place.name.startswith(str(len(tensors)))
        ]
        until(lambda: (kept / "adapter_model.safetensors").stat().st_size == 4000)
        # Half of it is to be seen nowhere, and nobody else can write to it.
        assert start(folder).start.digest[:32] not in store.revisions()
        with pytest.raises(NotFoundError):
            client.get_adapter("sent")
        with Wire(served.address) as other:
            other.send(start(folder))
            with pytest.raises(UnavailableError) as refused:
                other.receive()
            assert refused.value.reason == "STORE_BUSY"
    told = []

    def again() -> bool:
        try:
            client.upload_adapter("sent", folder, progress=lambda done, _: told.append(done))
        except UnavailableError:
            return False  # the server has not noticed yet that the other is gone
        return True

    until(again)
    assert told[0] == 4000
    assert client.generate(PROMPT, adapter="sent", max_tokens=2).token_ids


def test_another_tenant_does_not_go_on_with_it(served, folder):
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    with Wire(served.address) as wire:
        wire.send(start(folder))
        wire.receive()
        wire.send(chunk(0, tensors[:100]))
        with Client(served.address, tenant="acme") as other:
            told = []
            other.upload_adapter("sent", folder, progress=lambda done, _: told.append(done))
            assert told[0] == 0
            other.unload_adapter("sent")


@pytest.mark.parametrize(
    ("change", "messages", "said"),
    [
        ({}, [chunk(5, b"x")], "offset: expected 0"),
        ({}, [chunk(0, b"")], "chunks with data"),
        ({}, [adapters_pb2.UploadAdapterRequest()], "chunks with data"),
        ({}, [None], "found 0"),
        ({"digest": "0" * 64, "size": 3}, [chunk(0, b"abc")], "digest: expected 000"),
        ({"size": 2}, [chunk(0, b"abc")], "expected 2 bytes, found 3"),
        ({"digest": "xyz"}, [], "64 hexadecimal digits"),
        ({"size": -1}, [], "expected a number of bytes"),
        ({"size": 1 << 40}, [], "expected at most"),
        ({"config": b"x" * ((1 << 20) + 1)}, [], "expected at most"),
        ({"name": "../up"}, [], "name has 1 to 128"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_as_announced_is_refused_and_leaves_nothing(
    served, folder, store, change, messages, said
):
    first = start(folder)
    for field, value in change.items():
        setattr(first.start, field, value)
    before = store.revisions()
    with Wire(served.address) as wire:
        wire.send(first)
        for message in messages:
            wire.send(message)
        with pytest.raises(InvalidArgumentError, match=said):
            list(iter(wire.receive, None))
    assert store.revisions() == before
    assert "sent" not in served.parts.lifecycle._library.names.current()


def test_chunks_without_a_start_are_refused(served):
    for first in (chunk(0, b"x"), None):
        with Wire(served.address) as wire:
            wire.send(first)
            with pytest.raises(InvalidArgumentError, match="first message"):
                wire.receive()


def test_what_cannot_be_served_leaves_the_name_as_it_was(client, folder, store):
    before = client.load_adapter("sent", str(folder))
    held = store.revisions()
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(InvalidArgumentError) as refused:
        client.upload_adapter("sent", folder)
    assert refused.value.reason == "ADAPTER_INVALID"
    assert client.get_adapter("sent").revision == before.revision
    assert store.revisions().keys() == held.keys()
    client.unload_adapter("sent")


def test_a_folder_without_tensors_is_refused_before_anything_is_sent(client, folder):
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        client.upload_adapter("sent", folder)


def test_who_sends_nothing_is_cut_off(served, folder, monkeypatch):
    monkeypatch.setattr(uploads, "IDLE_SECONDS", 0.2)
    with Wire(served.address) as wire:
        wire.send(start(folder))
        wire.receive()
        with pytest.raises(DeadlineExceededError, match="continue where it stopped"):
            wire.receive()


def test_bytes_that_are_no_message_are_refused(served):
    with grpc.insecure_channel(served.address) as channel:
        upload = channel.stream_stream("/turret.v1.AdapterService/UploadAdapter")
        with pytest.raises(InvalidArgumentError, match="valid protobuf"), raising_turret_errors("the server"):
            next(upload(iter([b"\xff\xff"])))


def test_no_more_loads_wait_than_may(client, folder, monkeypatch):
    monkeypatch.setattr(threads, "MAX_WAITING", -threads.MAX_LOADS)
    for call in (client.load_adapter, client.upload_adapter):
        with pytest.raises(TurretError) as refused:
            call("sent", str(folder))
        assert refused.value.reason == "TOO_MANY_CALLS"
