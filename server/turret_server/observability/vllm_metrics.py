"""The gauges that routers in front of several servers scrape, with vLLM's names and labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from turret_server.engine.loop import EngineStats

# Pages that keys and values have, or may have at once: cached blocks of no running request give way.
_KV_OWNERS = ("sequence", "cache", "free")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedAdapters:
    """Names of the adapters in the arena, and of those that requests wait for."""

    resident: Sequence[str]
    awaited: Sequence[str]


class VllmMetrics(Collector):
    """`record` is called on the engine's thread; the rest is collected at each scrape."""

    def __init__(self, *, model: str, block_size: int, num_blocks: int, max_adapters: int) -> None:
        """`max_adapters` of a common size fit into the arena at once."""
        self._model = model
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._max_adapters = max_adapters
        self._listed = RoutedAdapters(resident=(), awaited=())
        self._changed = time.time()
        self._running = self._waiting = 0
        self._usage = 0.0

    def register(self, registry: CollectorRegistry, adapters: Callable[[], RoutedAdapters]) -> None:
        self._adapters = adapters
        registry.register(self)

    def record(self, stats: EngineStats) -> None:
        self._running, self._waiting = stats.num_running, stats.num_waiting
        pages = [stats.pages.get(owner, 0) for owner in _KV_OWNERS]
        self._usage = pages[0] / max(sum(pages), 1)

    def describe(self) -> Iterable[Metric]:
        return self._families(self._listed)

    def collect(self) -> Iterable[Metric]:
        return self._families(self._adapters())

    def _families(self, adapters: RoutedAdapters) -> list[Metric]:
        if adapters != self._listed:
            self._listed, self._changed = adapters, time.time()
        # An adapter that is idle is listed as long as it is resident: a request for it starts at once here.
        loras = {
            "max_lora": str(self._max_adapters),
            "running_lora_adapters": ",".join(adapters.resident),
            "waiting_lora_adapters": ",".join(adapters.awaited),
        }
        cache = {"block_size": str(self._block_size), "num_gpu_blocks": str(self._num_blocks)}
        return [
            self._gauge("num_requests_running", "Requests that hold pages.", self._running),
            self._gauge("num_requests_waiting", "Length of the queue.", self._waiting),
            self._gauge("kv_cache_usage_perc", "Used share of the pages for keys and values.", self._usage),
            self._gauge("cache_config_info", "The arena.", 1, cache),
            self._gauge(
                "lora_requests_info",
                "Adapters in the arena, and those that requests wait for; the time of the last change.",
                self._changed,
                loras,
            ),
        ]

    def _gauge(
        self, name: str, documentation: str, value: float, labels: dict[str, str] | None = None
    ) -> Metric:
        labels = {"model_name": self._model, **(labels or {})}
        family = GaugeMetricFamily(f"vllm:{name}", documentation, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family
