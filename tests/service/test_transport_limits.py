"""What a stranger may do to the transport, some of it in HTTP/2's own frames (RFC 9113)."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from support.prompts import PROMPT
from turret_client import Client

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_SIZE = 3, 6
ENHANCE_YOUR_CALM = 11


def frame(kind: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, 0]) + b"\0\0\0\0" + payload


def frames(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Kind and payload of all that comes until the server closes."""
    with connection.makefile("rb") as stream:
        while head := stream.read(9):
            yield head[3], stream.read(int.from_bytes(head[:3], "big"))


@contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(PREFACE + frame(SETTINGS))
        yield connection


def test_the_server_says_how_many_streams_and_how_long_headers_it_takes(served):
    with connected(served.address) as connection:
        settings = next(payload for kind, payload in frames(connection) if kind == SETTINGS)
    found = dict(struct.iter_unpack(">HI", settings))
    assert found[MAX_CONCURRENT_STREAMS] == 1024
    assert found[MAX_HEADER_LIST_SIZE] <= 16 * 1024


def test_who_pings_without_end_is_sent_away_and_nobody_else(served, client):
    with connected(served.address) as connection:
        connection.sendall(frame(PING, b"8 bytes.") * 100)
        [payload] = [payload for kind, payload in frames(connection) if kind == GOAWAY]
    assert int.from_bytes(payload[4:8], "big") == ENHANCE_YOUR_CALM
    assert client.generate(PROMPT, max_tokens=1).token_ids


def test_a_connection_that_speaks_something_else_is_closed(served, client):
    host, _, port = served.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        while connection.recv(4096):
            pass
    assert client.generate(PROMPT, max_tokens=1).token_ids


def test_metadata_beyond_the_limit_end_their_own_call_alone(served, client):
    with grpc.insecure_channel(served.address) as channel:
        method = channel.unary_unary("/turret.v1.AdapterService/ListAdapters")
        assert method(b"", metadata=[("x-small", "x" * 4096)]) is not None
        with pytest.raises(grpc.RpcError) as refused:
            method(b"", metadata=[("x-large", "x" * 65536)])
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert method(b"") is not None
    assert client.generate(PROMPT, max_tokens=1).token_ids


def test_a_thousand_idle_streams_hold_nobody_up(served):
    with grpc.insecure_channel(served.address) as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
        watches = [watch(b"") for _ in range(1000)]
        for each in watches:
            next(each)
        with Client(served.address) as client:
            assert client.generate(PROMPT, max_tokens=1).token_ids
        for each in watches:
            each.cancel()
