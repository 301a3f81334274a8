from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from contextlib import ExitStack, closing

import pytest
from prometheus_client import CollectorRegistry, Counter

from support.prompts import until
from turret_server.observability import metrics_server
from turret_server.observability.metrics_server import MAX_CONNECTIONS, MetricsServer


@pytest.fixture
def server():
    registry = CollectorRegistry()
    Counter("turret_of_this_test", "A test's.", registry=registry)
    with closing(MetricsServer("127.0.0.1", 0, registry)) as server:
        yield server


def read(server, path="/metrics") -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}") as response:
        return response.read()


def connect(server, request=b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=60)
    connection.sendall(request)
    return connection


@pytest.mark.parametrize("path", ["/", "/metrics/", "/favicon.ico", "/metrics/../secret", "/x?/metrics"])
def test_only_the_path_of_the_metrics_is_answered(server, path):
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        read(server, path)
    assert refused.value.read() == b"the metrics are at /metrics\n"
    assert b"turret_of_this_test_total 0.0" in read(server)
    assert b"turret_of_this_test_total 0.0" in read(server, "/metrics?name[]=turret_of_this_test_total")


def test_half_requests_take_a_bounded_number_of_threads_and_connections(server):
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(connect(server, b"GET /metrics HTTP/1.1\r\n"))
        until(lambda: threading.active_count() == before + MAX_CONNECTIONS)
        for _ in range(5):
            with connect(server) as refused:
                assert refused.recv(1) == b""
        assert threading.active_count() == before + MAX_CONNECTIONS
    until(lambda: threading.active_count() == before)
    assert read(server)


@pytest.mark.parametrize("half", [b"", b"GET /metrics", b"GET /metrics HTTP/1.1\r\na: b\r\n"])
def test_a_request_that_does_not_end_is_ended(server, half, monkeypatch, caplog, capfd):
    monkeypatch.setattr(metrics_server, "MAX_SECONDS", 0.0)
    with connect(server, half) as connection:
        assert connection.recv(1) == b""
    until(lambda: not server._opened)
    assert caplog.text == capfd.readouterr().err == ""


def test_a_client_that_goes_leaves_no_line_in_the_log(server, caplog, capfd):
    connect(server, b"GET /metrics HTTP/1.1\r\n").close()
    until(lambda: not server._opened)
    assert read(server)
    assert caplog.text == capfd.readouterr().err == ""


def test_the_port_is_free_after_the_end():
    other = MetricsServer("127.0.0.1", 0, CollectorRegistry())
    other.close()
    with pytest.raises(ConnectionRefusedError):
        connect(other)


def test_an_ipv6_address_is_possible():
    try:
        server = MetricsServer("[::1]", 0, CollectorRegistry())
    except OSError:
        pytest.skip("this machine has no IPv6")
    with closing(server), socket.create_connection(("::1", server.server_port)):
        pass


def test_a_program_that_ends_does_not_wait_for_it(server):
    assert server._thread.daemon
