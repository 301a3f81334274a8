"""What comes over the socket from who has no key, or the wrong one."""

from __future__ import annotations

import random
import socket
import struct
import threading
from contextlib import ExitStack, suppress
from functools import partial

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from security.conftest import EVIL, answer_of, nothing_until
from support.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    call_headers,
    connected,
    field,
    frame,
)
from turret.v1 import inference_pb2
from turret_client import Client

GENERATE = "/turret.v1.InferenceService/Generate"
LIST = call_headers("/turret.v1.AdapterService/ListAdapters")
MEBIBYTE = 1 << 20


def send(address: str, *parts: bytes) -> None:
    """Sends frames until all are sent or the server has enough."""
    with connected(address) as connection, suppress(BrokenPipeError, ConnectionResetError):
        for part in parts:
            connection.sendall(part)


def test_streams_that_are_reset_as_fast_as_they_are_opened(place):
    """CVE-2023-44487."""
    send(
        place.address,
        *(
            frame(HEADERS, LIST, END_STREAM | END_HEADERS, stream)
            + frame(RST_STREAM, b"\0\0\0\x08", 0, stream)
            for stream in range(1, 20_001, 2)
        ),
    )


def test_headers_without_end(place):
    """CVE-2024-27316."""
    more = frame(CONTINUATION, field(b"x-more", b"y" * 100) * 100, 0, 1)
    before = place.memory()
    send(place.address, frame(HEADERS, LIST, 0, 1), *[more] * 2000)
    assert place.memory() - before < 100 * MEBIBYTE


@pytest.mark.parametrize(
    "flood",
    [
        frame(SETTINGS, struct.pack(">HI", 4, 65535) * 100) * 2000,
        frame(SETTINGS, struct.pack(">HI", 1, 0) * 20_000),
        frame(SETTINGS, struct.pack(">HI", 4, 2**31)),
        frame(PING, b"8 bytes.") * 20_000,
        frame(WINDOW_UPDATE, struct.pack(">I", 2**31 - 1)) * 1000,
        frame(DATA, b"x" * 10_000, 0, 99) * 100,
        frame(DATA, b"", 0, 0) * 10_000,
        frame(HEADERS, field(b"x", b"y" * 100) * 1000, END_HEADERS | END_STREAM, 1),
        frame(HEADERS, b"\x3f\xe1\xff\xff\xff\x0f" + LIST, END_HEADERS | END_STREAM, 1),
        frame(HEADERS, b"\xff" * 1000, END_HEADERS | END_STREAM, 1),
        frame(CONTINUATION, b"", 0, 1),
        PREFACE * 1000,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000,
        b"\0" * 100_000,
    ],
    ids=range(14),
)
def test_frames_that_nobody_needs(place, flood):
    send(place.address, flood)


@pytest.mark.parametrize("seed", range(3))
def test_any_frames(place, seed):
    chosen = random.Random(seed)
    for _ in range(30):
        parts = [
            frame(
                chosen.randrange(12),
                chosen.choice((LIST, chosen.randbytes(chosen.choice((0, 4, 5, 6, 8, 100))))),
                chosen.randrange(256),
                chosen.choice((0, 1, 2, 3, 2**31 - 1, 2**32 - 1)),
            )
            for _ in range(30)
        ]
        send(place.address, *parts)


def test_a_handshake_that_is_never_finished(place):
    host, _, port = place.address.rpartition(":")
    with ExitStack() as stack:
        for beginning in (b"", PREFACE[:10], PREFACE, b"\x16\x03\x01"):
            for _ in range(50):
                connection = stack.enter_context(socket.create_connection((host, int(port))))
                connection.sendall(beginning)
        with Client(place.address, api_key="good") as client:
            assert client.list_adapters()


def test_messages_of_unauthenticated_clients_are_not_read(place):
    """Half a message on every stream of a few connections: what is not known is not read."""
    prefix = b"\0" + struct.pack(">I", 4_000_000)
    before = place.memory()
    with ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(connected(place.address))
            with suppress(BrokenPipeError, ConnectionResetError):
                for stream in range(1, 1000, 2):
                    connection.sendall(
                        frame(HEADERS, call_headers(GENERATE), END_HEADERS, stream)
                        + frame(DATA, prefix + b"x" * 10_000, 0, stream)
                    )
        with Client(place.address, api_key="good") as client:
            assert client.list_adapters()
        assert place.memory() - before < 100 * MEBIBYTE


def test_who_is_not_known_is_refused_before_its_message_is_read(place):
    message = inference_pb2.GenerateRequest(text="x" * (3 << 20)).SerializeToString()
    with grpc.insecure_channel(place.address) as channel:
        for metadata in ((), (("authorization", "Bearer nobody"),)):
            answer = answer_of(partial(channel.unary_unary(GENERATE), message, metadata=metadata))
            assert (answer.code, answer.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        # No message comes at all: who waited for one would not answer.
        over = threading.Event()
        pending = channel.stream_unary(GENERATE).future(nothing_until(over))
        assert pending.code() is grpc.StatusCode.UNAUTHENTICATED
        over.set()


def test_a_call_without_a_message(channel):
    for method in ("InferenceService/Generate", "AdapterService/ListAdapters", "PromptService/PinPrompt"):
        call = channel.stream_unary(f"/turret.v1.{method}")
        answer = answer_of(partial(call, iter([]), metadata=EVIL))
        assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_messages_that_grow_when_they_are_unpacked(place):
    message = inference_pb2.GenerateRequest(text="x" * (200 << 20)).SerializeToString()
    before = place.memory()
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(place.address, options=options) as channel:
        call = channel.unary_unary(GENERATE)
        answer = answer_of(partial(call, message, metadata=EVIL, compression=grpc.Compression.Gzip))
    assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert place.memory() - before < 150 * MEBIBYTE


@pytest.mark.parametrize("size", [100, 20_000, 200_000])
def test_giant_metadata(channel, size):
    call = channel.unary_unary("/turret.v1.AdapterService/ListAdapters")
    answer = answer_of(partial(call, b"", metadata=(*EVIL, ("x-giant", "y" * size))))
    assert answer.code is (grpc.StatusCode.OK if size == 100 else grpc.StatusCode.RESOURCE_EXHAUSTED)


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", "Bearer ")], [("authorization", "Bearer")], [("authorization", "")],
        [("authorization", "Basic ZXZpbA==")],
        [*EVIL, ("authorization", "Bearer good")], [*EVIL, ("turret-tenant", "good")],
        [*EVIL, ("turret-tenant", "../good")], [("turret-tenant", "good")], [("authorization-bin", b"\0")],
        [("authorization", "Bearer sha256:" + "0" * 64)], [("authorization", "Bearer evil good")],
    ],
)  # fmt: skip
def test_keys_that_open_nothing(place, metadata):
    with grpc.insecure_channel(place.address) as channel:
        call = channel.unary_unary("/turret.v1.AdapterService/ListAdapters")
        answer = answer_of(partial(call, b"", metadata=metadata))
    assert answer.code in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT}
    assert answer.reason in {"UNAUTHENTICATED", "INVALID_REQUEST"}


def test_what_answers_anybody_remembers_little(place, channel):
    health = health_pb2_grpc.HealthStub(channel)
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)

    def ask(name: str) -> set[grpc.StatusCode]:
        named = health_pb2.HealthCheckRequest(service=name)
        mirrored = iter([reflection_pb2.ServerReflectionRequest(file_by_filename=name)])
        calls = (
            partial(health.Check, named),
            partial(next, health.Watch(named)),
            partial(next, reflection.ServerReflectionInfo(mirrored)),
        )
        return {answer_of(call).code for call in calls}

    assert ask("turret") == {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OK}
    giant = "x" * (3 << 20)
    # What the allocator keeps for the next is not remembered.
    for _ in range(30):
        assert ask(giant) == {grpc.StatusCode.INVALID_ARGUMENT}
    before = place.memory()
    for _ in range(60):
        ask(giant)
    assert place.memory() - before < 180 * len(giant) / 4
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def test_thousands_of_idle_streams_and_connections(place):
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connected(place.address))
        watches = []
        for _ in range(3):
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = stack.enter_context(grpc.insecure_channel(place.address, options=options))
            watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
            watches += [watch(b"") for _ in range(800)]
        answers = [answer_of(partial(next, each)) for each in watches]
        found = {(each.code, each.reason) for each in answers}
        assert found == {
            (grpc.StatusCode.OK, ""),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS"),
        }
        with Client(place.address, api_key="good") as client:
            assert client.generate("x", adapter="good-lora", max_tokens=1).token_ids
        for watch in watches:
            watch.cancel()


def test_watches_of_one_tenant_keep_nobody_out(place, good):
    with grpc.insecure_channel(place.address) as channel:
        watch = channel.unary_stream("/turret.v1.AdapterService/WatchAdapters")
        watches = [watch(b"", metadata=EVIL) for _ in range(100)]
        answers = [answer_of(partial(next, each)) for each in watches]
        assert {(each.code, each.reason) for each in answers} == {
            (grpc.StatusCode.OK, ""),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS"),
        }
        changes = good.watch_adapters()
        assert next(changes).name == "broken"
        changes.close()
