"""What is written down of requests: under which id, in the log, and in the usage log."""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import count

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from support.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    RST_STREAM,
    SETTINGS,
    call_headers,
    connected,
    field,
    frame,
    frames,
)
from support.prompts import PROMPT, until
from support.serving import server_process, serving
from turret.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from turret_client import Client, NotFoundError, UnavailableError
from turret_server.config import ServerConfig
from turret_server.observability.usage_log import UsageLog

GENERATED = "turret_generated_tokens_total"
USED = 'turret_usage_tokens_total{adapter="",kind="generated",tenant="stalled"}'
CANCEL = frame(RST_STREAM, struct.pack(">I", 8), 0, 1)
MADE = re.compile(r"[0-9a-f]{32}")


@pytest.fixture(scope="module")
def config(base_of, quantised_cache) -> ServerConfig:
    return ServerConfig(
        model=str(base_of("llama")), dtype="float32", device="cpu", memory="2MiB", cache=quantised_cache
    )


@pytest.fixture(scope="module")
def usage_path(tmp_path_factory):
    return tmp_path_factory.mktemp("usage") / "usage.jsonl"


@pytest.fixture(scope="module")
def server(base_of, adapter_of, usage_path, quantised_cache):
    arguments = ("--log-format", "json", "--usage-log", str(usage_path), "--memory", "4MiB")
    with server_process(base_of("llama"), quantised_cache, *arguments) as server:
        with Client(server.address) as client:
            client.load_adapter("lora", str(adapter_of("llama", "lora")))
        yield server


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def generate(channel, *, adapter=None, metadata=(), stream=False, **fields):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = inference_pb2.GenerateRequest(text=PROMPT, **{"max_tokens": 3} | fields)
    if adapter:
        request.adapters.add(name=adapter)
    if not stream:
        return stub.Generate.with_call(request, metadata=metadata)
    call = stub.GenerateStream(request, metadata=metadata)
    return list(call), call


def request_id_of(call) -> str:
    [found] = [value for key, value in call.trailing_metadata() if key == "x-request-id"]
    return found


def lines_about(server, request_id: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in list(server.log)]
    return [line for line in lines if line.get("request_id") == request_id]


def end_of(server, request_id: str) -> dict[str, object]:
    """The line about a request's end, which is written once it has been told."""
    found: list[dict[str, object]] = []

    def ended() -> bool:
        lines = lines_about(server, request_id)
        found[:] = [line for line in lines if line["logger"] == "turret_server.observability.request_log"]
        return bool(found)

    until(ended)
    [line] = found
    return line


def entries(path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stream", [False, True])
def test_the_id_that_a_caller_sends_comes_back_and_stands_in_the_log(server, channel, stream):
    sent = f"a/b:{stream}@host-1._=+"
    answer, call = generate(channel, adapter="lora", metadata=[("x-request-id", sent)], stream=stream)
    assert request_id_of(call) == sent
    line = end_of(server, sent)
    revision = answer[-1].revision if stream else answer.revision
    assert {key: line[key] for key in ("level", "message", "tenant", "adapter", "revision")} == {
        "level": "info",
        "message": "request finished",
        "tenant": "default",
        "adapter": "lora",
        "revision": revision,
    }
    assert line["finish_reason"] == "length"
    assert line["generated_tokens"] == 3
    assert line["prompt_tokens"] > 0
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]


def test_what_strangers_send_adds_no_line_of_another_format(server, channel):
    with connected(server.address) as connection:
        connection.sendall(frame(GOAWAY, struct.pack(">II", 0, 2)) + b"no frame of HTTP/2")
        connection.shutdown(socket.SHUT_WR)
        list(frames(connection))
    generate(channel)
    assert all(isinstance(json.loads(line), dict) for line in list(server.log))


def test_a_call_without_an_id_gets_one(server, channel):
    ids = {request_id_of(generate(channel)[1]) for _ in range(3)}
    assert len(ids) == 3
    assert all(MADE.fullmatch(each) for each in ids)
    assert all(end_of(server, each)["message"] == "request finished" for each in ids)


def details(error) -> dict[str, object]:
    found = {}
    for detail in rpc_status.from_call(error).details:
        message = getattr(error_details_pb2, detail.TypeName().rpartition(".")[2])()
        assert detail.Unpack(message)
        found[type(message).__name__] = message
    return found


def test_an_error_tells_the_id_so_that_it_can_be_quoted(server, channel):
    with pytest.raises(grpc.RpcError) as refused:
        generate(channel, adapter="nobody", metadata=[("x-request-id", "mine")])
    found = details(refused.value)
    assert found["RequestInfo"].request_id == "mine"
    assert found["ErrorInfo"].reason == "ADAPTER_NOT_FOUND"
    assert request_id_of(refused.value) == "mine"
    line = end_of(server, "mine")
    assert line["message"].startswith("request failed: ")
    assert (line["level"], line["finish_reason"]) == ("info", "adapter_not_found")


def test_the_clients_error_has_the_id_of_the_servers_log(server):
    with Client(server.address) as client, pytest.raises(NotFoundError) as refused:
        client.generate(PROMPT, adapter="nobody")
    assert "nobody" in str(end_of(server, refused.value.request_id)["message"])


@pytest.mark.parametrize("bad", ["", "a b", 'a"b', "a{b}", "x" * 129])
def test_an_id_that_cannot_be_is_refused_under_one_of_the_servers(channel, bad):
    with pytest.raises(grpc.RpcError) as refused:
        generate(channel, metadata=[("x-request-id", bad)])
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(refused.value)["ErrorInfo"].metadata == {"field": "x-request-id"}
    assert MADE.fullmatch(details(refused.value)["RequestInfo"].request_id)


def test_two_ids_are_refused(channel):
    with pytest.raises(grpc.RpcError, match="x-request-id is given once"):
        generate(channel, metadata=[("x-request-id", "a"), ("x-request-id", "b")])


def test_a_line_about_a_load_carries_its_id_and_stays_one_whatever_the_path(
    server, channel, adapter_of, tmp_path
):
    folder = tmp_path / 'a\n{"level": "critical"}'
    shutil.copytree(adapter_of("llama", "lora"), folder)
    stub = adapters_pb2_grpc.AdapterServiceStub(channel)
    request = adapters_pb2.LoadAdapterRequest(name="odd", path=str(folder))
    stub.LoadAdapter(request, metadata=[("x-request-id", "load")])
    until(lambda: lines_about(server, "load") != [])
    [line] = lines_about(server, "load")
    assert line["message"].startswith("loaded adapter odd")
    assert line["message"].endswith(f"from {folder}")
    assert line["tenant"] == "default"


def test_an_answer_is_in_the_usage_log_when_it_comes(channel, usage_path):
    answer, call = generate(channel, adapter="lora")
    entry = entries(usage_path)[-1]
    assert entry["request_id"] == request_id_of(call)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert MADE.fullmatch(entry.pop("id"))
    assert entry == {
        "request_id": request_id_of(call),
        "tenant": "default",
        "adapters": ["lora"],
        "revisions": [answer.revision],
        "prompt_tokens": answer.usage.prompt_tokens,
        "cached_tokens": answer.usage.cached_tokens,
        "generated_tokens": 3,
        "finish_reason": "length",
    }


def test_the_usage_log_has_what_ended_in_any_way_and_nothing_that_never_began(server, channel, usage_path):
    def generate_as(name: str, **options):
        return generate(channel, metadata=[("x-request-id", name)], **options)

    with pytest.raises(grpc.RpcError):
        generate_as("refused", max_tokens=-1)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    call = stub.GenerateStream(
        inference_pb2.GenerateRequest(text=PROMPT, max_tokens=100), metadata=[("x-request-id", "cancelled")]
    )
    next(call)
    call.cancel()
    with Client(server.address, tenant="acme") as client:
        client.pin_prompt("rules", list(range(3, 40)))
    until(lambda: "cancelled" in [entry["request_id"] for entry in entries(usage_path)])
    found = {entry["request_id"]: entry for entry in entries(usage_path)}
    assert "refused" not in found
    assert found["cancelled"]["finish_reason"] == "cancelled"
    assert 1 <= found["cancelled"]["generated_tokens"] <= 100
    [pinned] = [entry for entry in found.values() if entry["finish_reason"] == "pinned"]
    assert (pinned["tenant"], pinned["prompt_tokens"], pinned["generated_tokens"]) == ("acme", 37, 0)
    assert end_of(server, "cancelled")["message"] == "request cancelled"


def test_a_client_that_stalls_and_cancels_used_what_was_generated_for_it(server, usage_path):
    """Usage log, metrics and quota have one number, and the log no error."""

    num_lines, before = len(server.log), server.metrics()[GENERATED]
    with connected(server.address) as connection:
        call_without_reading(connection, "GenerateStream", "stalled", max_tokens=60)
        until(lambda: server.metrics()[GENERATED] == before + 60)
        connection.sendall(CANCEL)
        line = end_of(server, "stalled")
    assert (line["level"], line["message"]) == ("info", "request cancelled")
    assert line["generated_tokens"] == 60
    [entry] = [each for each in entries(usage_path) if each["request_id"] == "stalled"]
    assert (entry["finish_reason"], entry["generated_tokens"]) == ("cancelled", 60)
    assert server.metrics()[USED] == 60
    assert [each for each in server.log[num_lines:] if json.loads(each)["level"] != "info"] == []


def test_a_client_that_goes_while_it_gets_its_answer_is_no_error(server):
    num_lines = len(server.log)
    with connected(server.address) as connection:
        call_without_reading(connection, "Generate", "gone", max_tokens=2)
        end_of(server, "gone")
        connection.sendall(CANCEL)
        # Answered after the server knows of the cancellation.
        connection.sendall(frame(HEADERS, call_headers("/grpc.health.v1.Health/Check"), END_HEADERS, 3))
        connection.sendall(frame(DATA, bytes(5), END_STREAM, 3))
        assert any(kind == DATA for kind, _ in frames(connection))
    assert [each for each in server.log[num_lines:] if json.loads(each)["level"] != "info"] == []


def call_without_reading(connection, method: str, name: str, **fields) -> None:
    """Begin a call of the tenant and with the id `name`, for whose answer there is no room."""
    message = inference_pb2.GenerateRequest(text=PROMPT, **fields).SerializeToString()
    own = (field(b"x-request-id", name.encode()), field(b"turret-tenant", name.encode()))
    headers = call_headers(f"/turret.v1.InferenceService/{method}", *own)
    connection.sendall(frame(SETTINGS, struct.pack(">HI", 4, 7)))
    connection.sendall(frame(HEADERS, headers, END_HEADERS, 1))
    connection.sendall(frame(DATA, struct.pack(">BI", 0, len(message)) + message, END_STREAM, 1))


@pytest.mark.slow
def test_what_clients_got_is_in_the_usage_log_after_a_kill(base_of, quantised_cache, tmp_path):
    path, told = tmp_path / "usage.jsonl", list[str]()
    arguments = ("--usage-log", str(path), "--memory", "2MiB")
    with (
        server_process(base_of("llama"), quantised_cache, *arguments) as server,
        grpc.insecure_channel(server.address) as channel,
        ThreadPoolExecutor(8) as pool,
    ):

        def ask(thread: int) -> None:
            with suppress(grpc.RpcError):
                for number in count():
                    name = f"{thread}/{number}"
                    generate(channel, metadata=[("x-request-id", name)], max_tokens=1 + number % 5)
                    told.append(name)

        asking = [pool.submit(ask, thread) for thread in range(8)]
        until(lambda: len(told) >= 50)
        server.kill()
        for each in asking:
            each.result()
    UsageLog(path).close()
    found = [entry["request_id"] for entry in entries(path)]
    assert len(found) == len(set(found))
    assert set(told) <= set(found)
    assert len(found) - len(told) <= 8


def test_while_the_usage_log_cannot_be_written_nothing_is_begun(config, tmp_path):
    path = tmp_path / "usage" / "usage.jsonl"
    path.parent.mkdir()
    with serving(replace(config, usage_log=path)) as served, Client(served.address) as client:
        assert client.generate(PROMPT, max_tokens=2).usage.generated_tokens == 2
        path.unlink()
        path.parent.rmdir()
        with pytest.raises(UnavailableError, match="usage log cannot be written") as refused:
            client.generate(PROMPT, max_tokens=2)
        assert (refused.value.reason, refused.value.retry_after) == ("USAGE_LOG_FAILED", 1.0)
        computed = served.metric("turret_prompt_tokens_total")
        with pytest.raises(UnavailableError, match="usage log cannot be written"):
            client.generate(PROMPT, max_tokens=2)
        assert served.metric("turret_prompt_tokens_total") == computed
        assert served.metric("turret_requests_total", outcome="usage_log_failed") == 2
        path.parent.mkdir()

        def is_served() -> bool:
            # The line can be read a moment before it is known to be on the disk.
            with suppress(UnavailableError):
                return bool(client.generate(PROMPT, max_tokens=2))
            return False

        until(is_served)
        assert len(entries(path)) == 2
