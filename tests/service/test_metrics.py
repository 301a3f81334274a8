"""What a server with tenants tells of those that it does not know, and of what it brings."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import grpc
import pytest

from support.prompts import until
from support.serving import TURRET, serving
from turret.v1 import adapters_pb2, adapters_pb2_grpc
from turret_client import Client, Download
from turret_server.config import ServerConfig
from turret_server.tenancy.keys import digest_of

HANG_S = 60
"""Only so that a failing test ends."""
FILES = ("adapter_config.json", "adapter_model.safetensors")


class HalfWay(io.BytesIO):
    """The second half of the file comes when `go_on` is set."""

    go_on = threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        half = len(self.getbuffer()) // 2
        if self.tell() < half:
            return super().read(half)
        assert self.go_on.wait(HANG_S)
        return super().read(size)


class Slow(fsspec.AbstractFileSystem):
    """An adapter whose tensors come slowly."""

    protocol = "slow"
    folder: Path

    def info(self, path, **_options):
        return {"name": path, "size": (self.folder / Path(path).name).stat().st_size, "type": "file"}

    def open(self, path, _mode="rb", **_options):
        content = (self.folder / Path(path).name).read_bytes()
        return HalfWay(content) if path.endswith(FILES[1]) else io.BytesIO(content)


@pytest.fixture(scope="module", autouse=True)
def _slow(adapter_of) -> None:
    Slow.folder = adapter_of("llama", "lora")
    fsspec.register_implementation("slow", Slow, clobber=True)


@pytest.fixture
def half_way() -> Iterator[threading.Event]:
    HalfWay.go_on.clear()
    yield HalfWay.go_on
    HalfWay.go_on.set()


@pytest.fixture(scope="module")
def served(base_of, quantised_cache, tmp_path_factory):
    file = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    file.write_text(
        f"""
        [tenants.acme]
        admin = true
        keys = ["{digest_of("acme-key")}"]
        [tenants.bolt]
        keys = ["{digest_of("bolt-key")}"]
        """
    )
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="2MiB",
        tenants=file,
        allow_source=("slow://bucket/", "/"),
        cache=quantised_cache,
    )
    with serving(config) as served:
        yield served


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ([], "no_key"),
        ([("authorization", "Bearer another-key")], "unknown_key"),
        ([("authorization", "Basic acme-key")], "malformed"),
        ([("authorization", "Bearer acme-key"), ("turret-tenant", "bolt")], "mismatch"),
    ],
)
def test_calls_of_nobody_that_is_known_are_counted_by_reason(served, metadata, reason):
    def counted() -> float:
        return served.metric("turret_failed_authentications_total", reason=reason)

    before = counted()
    with grpc.insecure_channel(served.address) as channel, pytest.raises(grpc.RpcError) as refused:
        adapters_pb2_grpc.AdapterServiceStub(channel).ListAdapters(
            adapters_pb2.ListAdaptersRequest(), metadata=metadata
        )
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert counted() == before + 1


def test_downloaded_bytes_are_counted(served, adapter_of):
    before = served.metric("turret_adapter_downloaded_bytes_total")
    with Client(served.address, api_key="acme-key") as client:
        client.load_adapter("lora", str(adapter_of("llama", "lora")))
    assert served.metric("turret_adapter_downloaded_bytes_total") == before + sum(sizes(adapter_of))
    assert served.metric("turret_adapter_downloads") == 0


def sizes(adapter_of) -> list[int]:
    return [(adapter_of("llama", "lora") / name).stat().st_size for name in FILES]


def test_who_may_load_sees_how_far_a_download_is(served, adapter_of, half_way):
    config, tensors = sizes(adapter_of)
    half = Download("poet", config + tensors // 2, config + tensors)
    with (
        ThreadPoolExecutor(1) as pool,
        Client(served.address, api_key="acme-key") as acme,
        Client(served.address, api_key="bolt-key") as bolt,
    ):
        loading = pool.submit(acme.load_adapter, "poet", "slow://bucket/poet")
        until(lambda: acme.list_downloads() == [half])
        assert bolt.list_downloads() == []
        assert served.metric("turret_adapter_downloads") == 1
        half_way.set()
        assert loading.result().name == "poet"
        assert acme.list_downloads() == []


def test_the_command_line_shows_on_a_terminal_how_far_it_is(served, half_way):
    terminal, end = pty.openpty()
    command = [TURRET, "adapters", "load", "bard", "slow://bucket/poet", "--server", served.address]
    environment = os.environ | {"TURRET_API_KEY": "acme-key", "TERM": "xterm"}
    with subprocess.Popen(  # noqa: S603 (the command is this test's)
        command, stderr=end, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        os.close(end)
        shown = b""
        while b"%" not in shown:
            shown += os.read(terminal, 4096)
        assert b"Loading" in shown
        half_way.set()
        told, _ = process.communicate(timeout=HANG_S)
    os.close(terminal)
    assert process.returncode == 0
    assert "bard" in told
