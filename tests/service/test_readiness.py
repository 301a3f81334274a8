"""Adapters that stay in the arena, and a server that is ready once they are there."""

from __future__ import annotations

import shutil

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.prompts import PROMPT, until
from support.serving import server_process, serving
from turret_client import AdapterState, Client, FailedPreconditionError
from turret_server.config import ServerConfig
from turret_server.rpc.server import LIVENESS

Status = health_pb2.HealthCheckResponse


def health(address: str, service: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service)).status


@pytest.mark.slow
def test_a_server_is_ready_once_what_is_pinned_is_resident(base_of, adapter_of, tmp_path):
    folder = tmp_path / "adapters"
    shutil.copytree(adapter_of("llama", "p-tuning"), folder / "bard")
    arguments = ("--adapters", str(folder), "--memory", "8MiB", "--pin", "bard", "--pin", "poet")
    with (
        server_process(base_of("llama"), tmp_path / "cache", *arguments) as server,
        Client(server.address) as client,
    ):
        until(lambda: any("not in the arena: poet" in line for line in server.log))
        for service in ("", "turret.v1.InferenceService"):
            assert health(server.address, service) == Status.NOT_SERVING
        assert health(server.address, LIVENESS) == Status.SERVING
        # It answers all the same, and what is missing can be loaded.
        assert client.generate(PROMPT, adapter="bard", max_tokens=2).token_ids
        client.load_adapter("poet", str(adapter_of("llama", "lora")))
        until(lambda: health(server.address) == Status.SERVING)
        states = {adapter.name: adapter.state for adapter in client.list_adapters()}
        assert states == {"bard": AdapterState.RESIDENT, "poet": AdapterState.RESIDENT}


@pytest.fixture
def config(base_of, quantised_cache, tmp_path):
    return ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="256KiB",
        store=tmp_path / "store",
        cache=quantised_cache,
        pin=("poet",),
    )


def test_a_pinned_adapter_stays_while_others_come_and_go(config, adapter_of):
    with serving(config) as served, Client(served.address) as client:
        poet = client.load_adapter("poet", str(adapter_of("llama", "lora"))).revision
        names = "abcd"
        for name in names:
            client.load_adapter(name, str(adapter_of("llama", "lora", ord(name))))
        engine = served.parts.engine
        until(lambda: engine.is_resident(poet))
        # There is no room for all of them, and nobody asks for the one that is pinned.
        for name in names * 2:
            client.generate([5] * 20, adapter=name, max_tokens=1)
        assert served.metric("turret_adapter_evictions_total") > 0
        assert engine.is_resident(poet)
        # Replaced, its new revision is; unloaded, nothing is.
        newer = client.load_adapter("poet", str(adapter_of("llama", "lora", 1))).revision
        until(lambda: engine.is_resident(newer) and not engine.is_resident(poet))
        assert [spec.revision for spec in engine._scheduler.residency.pinned()] == [newer]
        client.rollback_adapter("poet")
        until(lambda: engine.is_resident(poet) and not engine.is_resident(newer))
        client.unload_adapter("poet")
        until(lambda: not engine.is_resident(poet))
        assert engine._scheduler.residency.pinned() == []
        engine.check_integrity()


def test_what_would_leave_too_little_for_requests_is_not_pinned(config, adapter_of):
    with serving(config) as served, Client(served.address) as client:
        folder = str(adapter_of("llama", "lora"))
        arena = served.parts.arena
        needed = client.load_adapter("bard", folder).arena_bytes // arena.page_bytes
        client.pin_prompt("rules", [5] * (arena.num_pages // 2 - needed + 1) * arena.block_size)
        said = f"'poet' needs {needed} and others take"
        with pytest.raises(FailedPreconditionError, match=said) as refused:
            client.load_adapter("poet", folder)
        assert refused.value.reason == "ADAPTER_TOO_LARGE"
        assert [adapter.name for adapter in client.list_adapters()] == ["bard"]
        client.unpin_prompt("rules")
        served.parts.engine.check_integrity()  # the engine has let it go by then
        assert client.load_adapter("poet", folder).revision
