from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from turret_server.engine.loop import EngineStats
from turret_server.observability.vllm_metrics import RoutedAdapters, VllmMetrics


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def adapters():
    return {"resident": ["a", "b"], "awaited": ["c"]}


@pytest.fixture
def metrics(registry, adapters):
    metrics = VllmMetrics(model="base", block_size=16, num_blocks=100, max_adapters=7)
    metrics.register(registry, lambda: RoutedAdapters(**adapters))
    return metrics


def loras(registry) -> tuple[dict[str, str], float]:
    [found] = [each for each in registry.collect() if each.name == "vllm:lora_requests_info"]
    [sample] = found.samples
    return sample.labels, sample.value


def test_the_gauges_are_those_that_routers_scrape(registry, metrics):
    stats = EngineStats(
        step=None, seconds=0, num_running=3, num_waiting=5, num_preempted=0, num_evicted=0, num_loading=0,
        num_failures=0, pages={"lora": 50, "prefix": 10, "sequence": 10, "cache": 20, "free": 10},
    )  # fmt: skip
    metrics.record(stats)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"vllm:{name}", {"model_name": "base", **labels})

    assert value("num_requests_running") == 3
    assert value("num_requests_waiting") == 5
    assert value("kv_cache_usage_perc") == 0.25  # of what keys and values may have, cached blocks are free
    assert value("cache_config_info", block_size="16", num_gpu_blocks="100") == 1


def test_resident_adapters_are_listed_and_the_time_is_that_of_the_last_change(registry, metrics, adapters):
    del metrics
    labels, changed = loras(registry)
    assert labels == {
        "model_name": "base",
        "max_lora": "7",
        "running_lora_adapters": "a,b",
        "waiting_lora_adapters": "c",
    }
    assert loras(registry) == (labels, changed)
    adapters["resident"] = ["b"]
    labels, later = loras(registry)
    assert labels["running_lora_adapters"] == "b"
    assert later > changed
