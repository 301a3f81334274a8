from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
import trustme
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from turret_server.config import ServerConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).parents[2] / "deploy" / "healthcheck.py"


def check(address: str, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, address, *files]
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- our own


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


def test_an_encrypted_server(servicer, tmp_path):
    authority, other = trustme.CA(), trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    for name, ca in (("ca", authority), ("other", other)):
        ca.cert_pem.write_to_path(tmp_path / name)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    chain = b"".join(blob.bytes() for blob in made.cert_chain_pems)
    credentials = grpc.ssl_server_credentials([(made.private_key_pem.bytes(), chain)])
    address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    server.start()
    codes = [check(address, *files).returncode for files in ([tmp_path / "ca"], [tmp_path / "other"], [])]
    server.stop(None).wait()
    assert codes == [0, 1, 1]


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
    assert f'"{ServerConfig(model="m").listen}"' in SCRIPT.read_text()
