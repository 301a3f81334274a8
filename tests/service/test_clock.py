"""A wall clock that jumps while a server runs: nothing that is measured is measured by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from support.prompts import PROMPT
from support.serving import Served, serving
from turret_client import Client, ResourceExhaustedError
from turret_server.config import ServerConfig

HOURS = 6 * 3600.0
TOKENS = 40


@pytest.fixture(scope="module")
def served(base_of, adapter_of, quantised_cache, tmp_path_factory) -> Iterator[Served]:
    tenants = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    tenants.write_text("[tenants.ahead]\ntokens_per_minute = 60\n[tenants.back]\ntokens_per_minute = 60\n")
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="4MiB",
        tenants=tenants,
        lazy_source=f"{tmp_path_factory.mktemp('lazy')}/{{name}}",
        cache=quantised_cache,
    )
    with serving(config) as served:
        served.parts.lifecycle.load("lora", str(adapter_of("llama", "lora")))
        yield served


@pytest.fixture
def jump(monkeypatch) -> Callable[[float], None]:
    """Sets the clock of this process, in which the server runs."""
    told = time.time

    def by(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: told() + seconds)

    return by


@pytest.mark.parametrize(("seconds", "tenant"), [(HOURS, "ahead"), (-HOURS, "back")])
def test_deadlines_quotas_and_hints_stay_what_they_were(served, jump, seconds, tenant):
    with Client(served.address) as client, Client(served.address, tenant=tenant) as metered:
        expected = client.generate(PROMPT, adapter="lora", max_tokens=TOKENS).token_ids
        stream = client.stream(PROMPT, adapter="lora", max_tokens=TOKENS, timeout=600)
        first = next(stream)
        metered.generate([5] * 20, max_tokens=20)
        jump(seconds)
        tokens = [token for chunk in (first, *stream) for token in chunk.token_ids]
        assert tuple(tokens) == expected
        # 40 of 60 tokens are used, and one comes back a second: neither all at once, nor never.
        with pytest.raises(ResourceExhaustedError) as refused:
            metered.generate([5] * 20, max_tokens=35)
        assert refused.value.reason == "QUOTA_EXCEEDED"
        assert 0 < refused.value.retry_after <= 35
        # Nor does what is new know of it.
        assert client.generate(PROMPT, adapter="lora", max_tokens=TOKENS).token_ids == expected
        newer = client.load_adapter("later", client.get_adapter("lora").history[0].source)
        assert client.generate(PROMPT, adapter=newer.name, max_tokens=TOKENS).token_ids == expected
        client.unload_adapter("later")
        latency = served.metric("turret_time_to_first_token_seconds_sum")
        assert 0 < latency < HOURS
    served.parts.engine.check_integrity()
