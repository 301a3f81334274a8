"""Adapters on their way into the arena."""

from __future__ import annotations

import logging
import queue

import pytest

from turret_server.app.build import assemble
from turret_server.config import ServerConfig


@pytest.fixture
def parts(base_of, adapter_of, quantised_cache, tmp_path):
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="1MiB",
        cache=quantised_cache,
        store=tmp_path / "store",
    )
    with assemble(config) as parts:
        parts.lifecycle.load("poet", str(adapter_of("llama", "lora")))
        yield parts


def test_one_that_was_replaced_before_its_copy_began_is_no_error(parts, caplog):
    """Nobody waits for it: what a request needs cannot go."""
    spec = parts.registry.status("poet").spec
    parts.lifecycle.unload("poet")
    told: queue.Queue[str | None] = queue.Queue()
    with caplog.at_level(logging.WARNING):
        parts.engine._scheduler.residency.memory.copy_to_device(spec, (), (), told.put)
        assert told.get(timeout=60) == "nobody needs it any more"
    assert caplog.records == []
