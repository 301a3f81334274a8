"""What a client may do to the HTTP server's port."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import trustme

from server.web.conftest import Generation, chunk, last
from support.certificates import Files
from turret_server.engine.admission import TenantLimits
from turret_server.errors import ConfigError
from turret_server.tenancy.tenants_file import TenantsFile
from turret_server.web import server as module
from turret_server.web.server import WebServer

HEALTH = b"GET /health HTTP/1.1\r\nhost: turret\r\n\r\n"


def post(body: bytes, *headers: bytes) -> bytes:
    lines = (b"POST /v1/completions HTTP/1.1", b"host: turret", b"content-length: %d" % len(body), *headers)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@asynccontextmanager
async def opened(door, *, max_connections=100, tls=None):
    server = WebServer(door.app, max_connections=max_connections, tls=tls)
    port = await server.start("127.0.0.1:0")
    try:
        yield server, port
    finally:
        await server.stop(0)


@pytest.fixture
async def connect():
    """Opens connections, which are closed at the end of the test."""
    async with AsyncExitStack() as stack:

        async def connect(port, **options):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
            stack.push_async_callback(close, writer)
            return reader, writer

        yield connect


async def close(writer) -> None:
    writer.close()
    with suppress(ConnectionError, ssl.SSLError):
        await writer.wait_closed()


async def answer_of(reader) -> tuple[int, dict[str, str], bytes]:
    """Status, header and body of an answer whose length is given."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def is_closed(reader) -> bool:
    """Waits until the server closes the connection."""
    with suppress(ConnectionResetError):
        await reader.read()
    return True


async def test_a_connection_has_many_requests(connect, door):
    async with opened(door) as (_, port):
        reader, writer = await connect(port)
        for _ in range(3):
            writer.write(post(b'{"prompt": "x"}'))
            status, headers, body = await answer_of(reader)
            assert (status, json.loads(body)["object"]) == (200, "text_completion")
            assert "date" in headers
            assert "server" not in headers
        writer.write(HEALTH * 3)  # without waiting for the answers
        assert [(await answer_of(reader))[0] for _ in range(3)] == [200] * 3


async def test_a_client_that_disconnects_frees_its_request(connect, open_door):
    closed = asyncio.Event()

    class Held(Generation):
        async def generate(self, *_):
            try:
                yield chunk("Ahoy")
                await asyncio.Event().wait()
            finally:
                closed.set()

    for stream in (b"true", b"false"):
        closed.clear()
        async with opened(open_door(generation=Held())) as (_, port):
            reader, writer = await connect(port)
            writer.write(post(b'{"prompt": "x", "stream": %s}' % stream))
            if stream == b"true":
                await reader.readuntil(b"Ahoy")
            writer.close()
            await closed.wait()


async def test_a_port_that_is_in_use_is_named(door):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--http 127.0.0.1:{port}: the port cannot be opened"):
            await WebServer(door.app, max_connections=1).start(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/9\r\n\r\n",
        b"\0" * 100_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 100_000,
        b"GET /health HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 100_000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
    ids=range(8),
)
async def test_what_is_no_request_is_answered_and_the_connection_closed(connect, door, garbage, caplog):
    async with opened(door) as (_, port):
        reader, writer = await connect(port)
        with suppress(ConnectionError):
            writer.write(garbage)
            await writer.drain()
        assert await is_closed(reader)
        reader, writer = await connect(port)
        writer.write(HEALTH)
        assert (await answer_of(reader))[0] == 200
        writer.close()
    assert caplog.messages == []


async def test_a_header_that_is_too_long_is_told_the_limit(connect, door):
    async with opened(door) as (_, port):
        reader, writer = await connect(port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 17_000)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert b"at most 16384 bytes" in await reader.read()


async def test_garbage_behind_a_running_request_ends_the_connection(connect, open_door):
    go_on = asyncio.Event()

    class Later(Generation):
        async def generate(self, *_):
            yield chunk("Ahoy")
            await go_on.wait()
            yield last()

    async with opened(open_door(generation=Later())) as (_, port):
        reader, writer = await connect(port)
        writer.write(post(b'{"prompt": "x", "stream": true}'))
        await reader.readuntil(b"Ahoy")
        writer.write(b"\0garbage\r\n\r\n")
        go_on.set()
        assert await is_closed(reader)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", HEALTH])
async def test_a_connection_without_a_request_is_closed_in_time(connect, door, monkeypatch, sent):
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.05)
    async with opened(door) as (_, port):
        reader, writer = await connect(port)
        writer.write(sent)
        if sent == HEALTH:
            await answer_of(reader)
        assert await is_closed(reader)


async def test_bytes_now_and_then_do_not_keep_a_connection_open(connect, door, monkeypatch):
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.1)
    async with opened(door) as (_, port):
        reader, writer = await connect(port)
        closed = asyncio.create_task(is_closed(reader))
        while not closed.done():
            with suppress(ConnectionError):
                writer.write(b"G")
                await writer.drain()
            await asyncio.sleep(0.01)


async def test_a_request_that_runs_keeps_its_connection(connect, open_door, monkeypatch):
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.01)

    class Slow(Generation):
        async def generate(self, *_):
            await asyncio.sleep(0.1)
            yield last("late")

    async with opened(open_door(generation=Slow())) as (_, port):
        reader, writer = await connect(port)
        writer.write(post(b'{"prompt": "x"}'))
        assert b"late" in (await answer_of(reader))[2]


async def test_a_client_that_does_not_read_is_disconnected(connect, open_door, monkeypatch):
    monkeypatch.setattr(module, "STALLED_SECONDS", 0.05)
    closed = asyncio.Event()

    class Endless(Generation):
        async def generate(self, *_):
            try:
                while True:
                    yield chunk("x" * 10_000)
            finally:
                closed.set()

    async with opened(open_door(generation=Endless())) as (_, port):
        _, writer = await connect(port, limit=1)
        writer.write(post(b'{"prompt": "x", "stream": true}'))
        await closed.wait()


async def test_connections_beyond_the_limit_are_closed_and_others_served(connect, door):
    async with opened(door, max_connections=2) as (_, port):
        held = [await connect(port) for _ in range(2)]
        for reader, writer in held:
            writer.write(HEALTH)
            assert (await answer_of(reader))[0] == 200
        reader, writer = await connect(port)
        assert await is_closed(reader)
        writer.close()
        held.pop()[1].close()
        status = None
        while status is None:  # the server notices in its time that one has gone
            reader, writer = await connect(port)
            writer.write(HEALTH)
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                status = (await answer_of(reader))[0]
            writer.close()
        assert status == 200
        held.pop()[1].close()


async def test_idle_connections_are_closed_when_the_server_stops(connect, door):
    async with opened(door) as (server, port):
        reader, writer = await connect(port)
        writer.write(HEALTH)
        await answer_of(reader)
        await server.stop(600)
        assert await is_closed(reader)
        with pytest.raises(ConnectionRefusedError):
            await connect(port)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def trusting(files, certified_by=None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    files.authority.configure_trust(context)
    if certified_by:
        certified_by.issue_cert("bolt.example.com", common_name="bolt").configure_cert(context)
    return context


async def status_with(connect, port, context) -> int | None:
    """The status of an answer over a new connection; None if there is none."""
    try:
        reader, writer = await connect(port, ssl=context, server_hostname="127.0.0.1")
        writer.write(post(b'{"prompt": "x"}'))
        status = (await answer_of(reader))[0]
        writer.close()
    except (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError):
        return None
    return status


async def test_with_certificates_connections_are_encrypted(connect, door, files):
    async with opened(door, tls=files.opened()) as (server, port):
        assert server.scheme == "https"
        assert await status_with(connect, port, trusting(files)) == 200
        reader, writer = await connect(port)
        writer.write(HEALTH)
        assert await reader.read() == b""


async def test_with_an_authority_only_its_clients_come_in(connect, door, files):
    async with opened(door, tls=files.opened(mutual=True)) as (_, port):
        assert await status_with(connect, port, trusting(files, files.clients)) == 200
        for stranger in (None, files.authority):
            assert await status_with(connect, port, trusting(files, stranger)) is None


async def test_a_connection_has_the_certificates_of_its_time(connect, door, files):
    async with opened(door, tls=files.opened(mutual=True)) as (_, port):
        trusts_the_former, former = trusting(files, files.clients), files.clients
        assert await status_with(connect, port, trusts_the_former) == 200
        files.authority, files.clients = trustme.CA(), trustme.CA()
        files.renew()
        files.clients.cert_pem.write_to_path(files.client_ca)
        assert await status_with(connect, port, trusting(files, files.clients)) == 200
        assert await status_with(connect, port, trusts_the_former) is None
        assert await status_with(connect, port, trusting(files, former)) is None


async def test_a_tenant_is_known_by_the_names_in_its_certificate(connect, open_door, files, tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text('[tenants.acme]\nidentities = ["bolt"]\n[tenants.other]\nidentities = ["other"]')
    for identity in ("bolt", "bolt.example.com"):
        path.write_text(f'[tenants.acme]\nidentities = ["{identity}"]')
        door = open_door(tenants=TenantsFile(path, TenantLimits()))
        async with opened(door, tls=files.opened(mutual=True)) as (_, port):
            assert await status_with(connect, port, trusting(files, files.clients)) == 200
        assert door.generation.callers[0].tenant.name == "acme"
