from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from turret_server.config import ServerConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).parents[2] / "deploy" / "healthcheck.py"


def check(address: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, address], capture_output=True, text=True, check=False)  # noqa: S603 -- our own


@pytest.fixture
def servicer() -> health.HealthServicer:
    return health.HealthServicer()


@pytest.fixture
def address(servicer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_serving(address):
    assert check(address).returncode == 0


def test_stopping(address, servicer):
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    run = check(address)
    assert (run.returncode, run.stderr) == (1, f"{address}: NOT_SERVING\n")


def test_nobody_there():
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*unheard.getsockname())
        run = check(address)
    assert run.returncode == 1
    assert run.stderr.startswith(f"{address}: UNAVAILABLE: ")


def test_it_asks_where_the_server_listens():
    assert f'"{ServerConfig(model="").listen}"' in SCRIPT.read_text()
