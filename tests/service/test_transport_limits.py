"""What a stranger may do to the transport, some of it in HTTP/2's own frames (RFC 9113)."""

from __future__ import annotations

import shutil
import socket
import struct
from contextlib import ExitStack, suppress

import grpc
import pytest

from support.http2 import GOAWAY, PING, SETTINGS, connected, frame, frames
from support.prompts import PROMPT
from support.serving import TURRET, server_process
from turret_client import Client

MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_SIZE = 3, 6
ENHANCE_YOUR_CALM = 11


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


def test_connections_leave_the_server_the_files_that_it_needs_itself(
    base_of, adapter_of, quantised_cache, tmp_path
):
    """Of 400 files that the server may open, connections may take half: of both doors."""
    source = shutil.copytree(adapter_of("llama", "lora"), tmp_path / "lora")
    few = ("sh", "-c", 'ulimit -n 400 && exec "$0" "$@"', TURRET)
    with (
        server_process(base_of("llama"), quantised_cache, "--memory", "8MiB", program=few) as server,
        Client(server.address) as client,
        ExitStack() as stack,
    ):
        client.generate(PROMPT, max_tokens=1)
        num_open = 0
        for _ in range(600):
            with suppress(ConnectionError):
                connection = stack.enter_context(connected(server.address))
                num_open += connection.recv(1) != b""
        assert 50 < num_open <= 100
        client.load_adapter("mine", str(source))
        assert client.generate(PROMPT, adapter="mine", max_tokens=1).token_ids
