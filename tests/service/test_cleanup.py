"""Whatever holds up the disk when a revision is no longer needed, streams, health and signals go on."""

from __future__ import annotations

import resource
import signal
import socket
import sqlite3
from contextlib import ExitStack, closing

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.prompts import PROMPT, until
from support.serving import server_process
from turret_client import AdapterState, Client
from turret_server.rpc.server import LIVENESS

NUM_TOKENS = 100


def is_alive(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=LIVENESS))
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def begin(client: Client, adapter: str | None = None):
    """A stream that has begun."""
    stream = client.stream(PROMPT, adapter=adapter, max_tokens=250)
    next(stream)
    return stream


def advance(stream) -> None:
    for _ in range(NUM_TOKENS):
        next(stream)


def test_nothing_waits_while_something_holds_the_store(client, served, adapter_of):
    parts = served.parts
    first = client.load_adapter("poet", str(adapter_of("llama", "lora", seed=61))).revision
    ending, other = begin(client, "poet"), begin(client)
    newer = client.load_adapter("poet", str(adapter_of("llama", "lora", seed=62))).revision
    with parts.lifecycle._library.store._lock:
        ending.close()
        until(lambda: not parts.registry.has(first))
        advance(other)
        assert is_alive(served.address)
        assert client.generate(PROMPT, adapter="poet", max_tokens=2).revision == newer
        until(lambda: not parts.engine.is_resident(first))
    other.close()
    client.unload_adapter("poet")


@pytest.fixture
def tenants(tmp_path):
    """A tenants file with a tenant whose adapters have room for one revision."""
    file = tmp_path / "tenants.toml"
    file.write_text("[tenants.acme]\nmax_adapter_bytes = 60_000\n")
    return file


@pytest.mark.slow
def test_nothing_waits_while_something_holds_the_database(base_of, adapter_of, tenants, tmp_path):
    store = tmp_path / "store"
    arguments = ("--memory", "8MiB", "--store", str(store), "--tenants", str(tenants))
    with (
        server_process(base_of("llama"), tmp_path / "cache", *arguments) as server,
        Client(server.address, tenant="acme") as client,
    ):
        first = client.load_adapter("poet", str(adapter_of("llama", "lora", seed=61)))
        ending, other = begin(client, "poet"), begin(client)
        second = client.load_adapter("poet", str(adapter_of("llama", "lora", seed=62)))
        assert [each.revision for each in second.history] == [second.revision]
        assert (store / "adapters" / first.revision).exists()
        with closing(sqlite3.connect(store / "names.sqlite", isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            ending.close()
            advance(other)
            assert is_alive(server.address)
            assert client.generate(PROMPT, adapter="poet", max_tokens=2).revision == second.revision
            server.process.send_signal(signal.SIGTERM)
            until(lambda: any("stopping" in line for line in server.log))
            assert len(list(other)) > 0
        assert server.wait() == 0
    assert [folder.name for folder in (store / "adapters").iterdir()] == [second.revision]


def pages(server, owner: str) -> float:
    return server.metrics()[f'turret_arena_pages{{owner="{owner}"}}']


@pytest.mark.slow
def test_connections_that_take_every_file_leak_no_page_and_no_revision(base_of, adapter_of, tmp_path):
    store = tmp_path / "store"
    arguments = ("--memory", "8MiB", "--store", str(store))
    with (
        server_process(base_of("llama"), tmp_path / "cache", *arguments) as server,
        Client(server.address) as client,
    ):
        newest = client.load_adapter("poet", str(adapter_of("llama", "lora", seed=63)))
        until(lambda: client.get_adapter("poet").state is AdapterState.RESIDENT)
        expected = pages(server, "lora")
        streams = []
        for seed in (61, 62, 63):
            streams.append(begin(client, "poet"))
            client.load_adapter("poet", str(adapter_of("llama", "lora", seed=seed)))
        unlimited = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (64, unlimited[1]))
        host, _, port = server.address.rpartition(":")
        with ExitStack() as stack:
            for _ in range(80):
                stack.enter_context(closing(socket.create_connection((host, int(port)))))
            for stream in streams:
                assert list(stream)[-1].usage
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, unlimited)
        until(lambda: client.get_adapter("poet").draining_revisions == ())
        until(lambda: pages(server, "lora") == expected)
        assert client.unload_adapter("poet").revision == newest.revision
        until(lambda: pages(server, "lora") == 0)
        assert client.load_adapter("poet", str(adapter_of("llama", "lora", seed=61))).revision
        assert server.stop() == 0
