from __future__ import annotations

import pytest

from support.gate import GatedSampler
from support.serving import serving
from turret_client import Client
from turret_server.config import ServerConfig

ADAPTERS = ("lora", "prefix", "prompt", "p-tuning")


@pytest.fixture(scope="module")
def gate() -> GatedSampler:
    """Holds the steps of `served` while it is closed."""
    return GatedSampler()


@pytest.fixture(scope="module")
def served(base_of, adapter_of, quantised_cache, gate):
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="8MiB",
        max_batch_tokens=32,
        max_batch_requests=8,
        max_queue=64,
        cache=quantised_cache,
    )
    with serving(config, gate) as served:
        for name in ADAPTERS:
            served.parts.lifecycle.load(name, str(adapter_of("llama", name)))
        yield served


@pytest.fixture
def client(served):
    with Client(served.address) as client:
        yield client
    served.parts.engine.check_integrity()
