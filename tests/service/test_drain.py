"""A server that a signal stops, as its clients and its operator see it."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from support.prompts import PROMPT, until
from support.serving import ServerProcess, server_process
from turret.v1 import adapters_pb2, adapters_pb2_grpc
from turret_adapters.formats.files import digest_of_folder
from turret_client import Client, UnavailableError
from turret_server.rpc.server import LIVENESS

Status = health_pb2.HealthCheckResponse
LONG_ANSWER = 200


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@contextmanager
def server_of(base_of, cache, store, *arguments: str) -> Iterator[ServerProcess]:
    settings = ("--memory", "8MiB", "--store", str(store), "--max-batch-requests", "2", *arguments)
    with server_process(base_of("llama"), cache, *settings) as server:
        yield server


def health(address: str, service: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return answer.status


def told(server: ServerProcess, words: str) -> bool:
    return any(words in line for line in server.log)


def running(server: ServerProcess) -> int:
    return int(server.metrics()["turret_running_requests"])


class HalfUpload:
    """An upload that sends its second half on request."""

    def __init__(self, address: str, name: str, folder: Path) -> None:
        self.tensors = (folder / "adapter_model.safetensors").read_bytes()
        self.half = len(self.tensors) // 2
        self._start = adapters_pb2.UploadStart(
            name=name,
            digest=digest_of_folder(folder),
            config=(folder / "adapter_config.json").read_bytes(),
            size=len(self.tensors),
        )
        self.go_on = threading.Event()
        self._channel = grpc.insecure_channel(address)
        self.answers = adapters_pb2_grpc.AdapterServiceStub(self._channel).UploadAdapter(self._messages())
        assert next(self.answers).offset == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._channel.close()

    def _messages(self) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        yield adapters_pb2.UploadAdapterRequest(start=self._start)
        yield self._chunk(0, self.tensors[: self.half])
        self.go_on.wait(60)
        yield self._chunk(self.half, self.tensors[self.half :])

    @staticmethod
    def _chunk(offset: int, data: bytes) -> adapters_pb2.UploadAdapterRequest:
        return adapters_pb2.UploadAdapterRequest(chunk=adapters_pb2.UploadChunk(offset=offset, data=data))


@pytest.mark.slow
def test_what_runs_finishes_while_new_calls_are_refused(base_of, adapter_of, cache, tmp_path):
    folder = adapter_of("llama", "lora")
    with server_of(base_of, cache, tmp_path) as server, Client(server.address) as client:
        client.load_adapter("bard", str(folder))
        expected = client.generate(PROMPT, max_tokens=LONG_ANSWER).token_ids
        changes = client.watch_adapters()
        next(changes)
        stream = client.stream(PROMPT, max_tokens=LONG_ANSWER)
        first = next(stream)
        with HalfUpload(server.address, "poet", adapter_of("llama", "lora", 1)) as upload:
            server.process.send_signal(signal.SIGTERM)
            until(lambda: health(server.address) == Status.NOT_SERVING)
            assert health(server.address, LIVENESS) == Status.SERVING
            for call in (lambda: client.generate(PROMPT), client.list_adapters, lambda: list(changes)):
                with pytest.raises(UnavailableError) as refused:
                    call()
                assert refused.value.reason == "SHUTTING_DOWN"
                assert refused.value.retry_after == 1.0
            tokens = [token for chunk in (first, *stream) for token in chunk.token_ids]
            assert tokens == list(expected)
            assert server.process.poll() is None
            upload.go_on.set()
            assert next(upload.answers).adapter.name == "poet"
        assert server.wait() == 0
    with server_of(base_of, cache, tmp_path) as server, Client(server.address) as client:
        assert [adapter.name for adapter in client.list_adapters()] == ["bard", "poet"]


@pytest.mark.slow
def test_over_http_what_runs_finishes_too_while_new_calls_are_refused(base_of, cache, tmp_path):
    request = {"prompt": PROMPT, "max_tokens": LONG_ANSWER, "temperature": 0}
    with (
        server_of(base_of, cache, tmp_path) as server,
        httpx.Client(base_url=server.http, timeout=600) as web,
    ):
        assert web.get("/health").status_code == 200
        expected = web.post("/v1/completions", json=request).json()["choices"][0]["text"]
        with web.stream("POST", "/v1/completions", json=request | {"stream": True}) as answer:
            events = answer.iter_lines()
            first = next(events)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: web.get("/health").status_code == 503)
            assert web.get("/ping").status_code == 200
            refused = web.post("/v1/completions", json=request)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            found = [each.removeprefix("data: ") for each in (first, *events) if each]
        assert found.pop() == "[DONE]"
        assert "".join(json.loads(each)["choices"][0]["text"] for each in found) == expected
        assert server.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("hurried", [False, True])
def test_calls_that_do_not_finish_within_the_grace_time_fail(base_of, cache, tmp_path, hurried):
    grace = "600" if hurried else "0.2"
    with (
        server_of(base_of, cache, tmp_path, "--grace", grace) as server,
        Client(server.address) as client,
        ThreadPoolExecutor() as pool,
    ):
        asked = [pool.submit(client.generate, [3] * 50, max_tokens=200) for _ in range(6)]
        until(lambda: running(server) == 2)
        server.process.send_signal(signal.SIGTERM)
        if hurried:
            until(lambda: told(server, "stopping: "))
            server.process.send_signal(signal.SIGTERM)
        for answer in asked[2:]:
            with pytest.raises(UnavailableError) as ended:
                answer.result()
            assert ended.value.reason == "SHUTTING_DOWN"
            assert ended.value.retry_after == 1.0
        assert server.wait() == 0
        assert told(server, "have not finished and are ended now")


@pytest.mark.slow
def test_an_upload_interrupted_by_a_shutdown_resumes_at_the_next_server(base_of, adapter_of, cache, tmp_path):
    folder = adapter_of("llama", "lora")
    with (
        server_of(base_of, cache, tmp_path, "--grace", "0.2") as server,
        HalfUpload(server.address, "poet", folder) as upload,
    ):
        until(lambda: any(file.stat().st_size for file in tmp_path.glob("uploads/*/*.safetensors")))
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as ended:
            next(upload.answers)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert b"SHUTTING_DOWN" in rpc_status.from_call(ended.value).SerializeToString()
        assert server.wait() == 0
    assert list((tmp_path / "adapters").iterdir()) == []
    assert list((tmp_path / "staging").iterdir()) == []
    with server_of(base_of, cache, tmp_path) as server, Client(server.address) as client:
        sent: list[int] = []
        client.upload_adapter("poet", folder, progress=lambda done, _: sent.append(done))
        assert sent[0] >= upload.half
        assert client.generate(PROMPT, adapter="poet", max_tokens=2).token_ids
