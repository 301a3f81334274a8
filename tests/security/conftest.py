"""One hostile tenant, `evil`, on a server that `good` uses as well, who gets its answers whatever happens."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from support.prompts import PROMPT, until
from support.serving import ServerProcess, server_process
from turret_client import Client
from turret_server.tenancy.keys import digest_of

# What a call may end with. INTERNAL and UNKNOWN say that something happened that nobody thought of.
CLEAN = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
# Each one's key is its name.
EVIL = (("authorization", "Bearer evil"),)
MAX_FEW = 20


@dataclass(frozen=True)
class Answer:
    """How a call ended; `reason` is that of its ErrorInfo."""

    code: grpc.StatusCode
    reason: str
    message: str


@dataclass(frozen=True)
class Place:
    """The server, and the folder from which `evil` may load."""

    server: ServerProcess
    folder: Path
    secret: Path

    @property
    def address(self) -> str:
        return self.server.address

    def metrics(self) -> dict[str, float]:
        return self.server.metrics()

    def num_open(self) -> int:
        """Files and connections that the server has open."""
        return len(list(Path(f"/proc/{self.server.process.pid}/fd").iterdir()))

    def memory(self) -> int:
        """Bytes that the server holds."""
        status = Path(f"/proc/{self.server.process.pid}/statm").read_text()
        return int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def answer_of(call: Callable[[], Any]) -> Answer:
    """Calls, and says how it ended; a refusal without ErrorInfo has no reason."""
    try:
        call()
    except grpc.RpcError as error:
        status = rpc_status.from_call(error)
        reason = ""
        for detail in status.details if status else ():
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                reason = info.reason
        return Answer(error.code(), reason, error.details())
    return Answer(grpc.StatusCode.OK, "", "")


def nothing_until(over: threading.Event, *first: Any) -> Iterator[Any]:
    """Messages, after which a stream stays open."""
    yield from first
    over.wait()


@pytest.fixture(scope="session")
def place(base_of, adapter_of, tmp_path_factory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("sources")
    for name in ("good", "evil"):
        (root / name).mkdir()
    secret = Path(shutil.copytree(adapter_of("llama", "lora"), root / "good" / "secret"))
    shutil.copytree(adapter_of("llama", "lora", seed=9), root / "evil" / "own")
    tenants = root / "tenants.toml"
    tenants.write_text(
        "".join(
            f'[tenants.{name}]\nkeys = ["{digest_of(name)}"]\nuse = ["{name}-*", "shared", "broken"]\n'
            f'load = ["{name}-*"]\nunload = ["{name}-*"]\nsources = ["{root / name}", "http://", "https://"]\n'
            for name in ("good", "evil")
        )
        + f'[tenants.operator]\nkeys = ["{digest_of("operator")}"]\nadmin = true\n'
    )
    folders = root / "served"
    (folders / "broken").mkdir(parents=True)
    shutil.copytree(adapter_of("llama", "lora", seed=3), folders / "shared")
    arguments = ["--tenants", str(tenants), "--memory", "8MiB", "--adapters", str(folders)]
    for source in (str(root), "http://", "https://"):
        arguments += ["--allow-source", source]
    cache = tmp_path_factory.mktemp("security-cache")
    with server_process(base_of("llama"), cache, *arguments) as server:
        place = Place(server, root / "evil", secret)
        with Client(server.address, api_key="good") as client:
            client.load_adapter("good-lora", str(secret))
        yield place


@pytest.fixture(scope="session")
def good(place) -> Iterator[Client]:
    with Client(place.address, api_key="good") as client:
        yield client


@pytest.fixture(scope="session")
def expected(good) -> tuple[int, ...]:
    return good.generate(PROMPT, adapter="good-lora", max_tokens=8).token_ids


@pytest.fixture
def evil(place) -> Iterator[Client]:
    with Client(place.address, api_key="evil") as client:
        yield client


@pytest.fixture
def channel(place) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(place.address) as channel:
        yield channel


@pytest.fixture(autouse=True)
def _unharmed(place, good, expected) -> Iterator[None]:
    """After each attack the other tenant has its answer and its adapter, and nothing is left behind."""
    num_open, num_lines = place.num_open(), len(place.server.log)
    yield
    assert good.generate(PROMPT, adapter="good-lora", max_tokens=8).token_ids == expected
    assert [adapter.name for adapter in good.list_adapters()] == ["broken", "good-lora", "shared"]

    def is_quiet() -> bool:
        found = place.metrics()
        idle = ("turret_running_requests", "turret_waiting_requests", 'turret_arena_pages{owner="sequence"}')
        return not any(found[name] for name in idle) and place.num_open() <= num_open + MAX_FEW

    until(is_quiet)
    assert place.server.process.poll() is None
    told = "".join(place.server.log[num_lines:])
    # What the server logs of an error that nobody thought of.
    assert "a call failed" not in told, told
