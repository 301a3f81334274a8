"""What Prometheus is told. The engine hands out data; it is recorded here, at the edge."""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from turret_adapters.errors import AdapterError
from turret_adapters.host_memory import HostMemory
from turret_server.engine.loop import EngineStats
from turret_server.errors import TurretError

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class RequestRecord:
    """Follows one request from its arrival to its end."""

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics = metrics
        self._last = time.monotonic()
        self._started = False

    def submitted(self, num_prompt_tokens: int) -> None:
        self._metrics.prompt_tokens.inc(num_prompt_tokens)

    def tokens(self, count: int, num_cached_tokens: int) -> None:
        """`count` tokens go out now; `num_cached_tokens` is known with the last of them, before that 0."""
        now = time.monotonic()
        latency = self._metrics.inter_token if self._started else self._metrics.first_token
        latency.observe(now - self._last)
        self._last, self._started = now, True
        self._metrics.generated_tokens.inc(count)
        self._metrics.cached_tokens.inc(num_cached_tokens)


class RequestMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "turret_requests",
            "Generate calls by outcome: ok, cancelled, or the reason of the error.",
            ["outcome"],
            registry=registry,
        )
        self.first_token = Histogram(
            "turret_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "turret_inter_token_seconds",
            "Between two tokens of a request.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "turret_prompt_tokens", "Tokens of prompts, without virtual ones.", registry=registry
        )
        self.generated_tokens = Counter("turret_generated_tokens", "Tokens generated.", registry=registry)
        self.cached_tokens = Counter(
            "turret_cached_tokens",
            "Tokens whose keys and values were found in memory when a request that has finished started.",
            registry=registry,
        )

    @contextmanager
    def request(self) -> Iterator[RequestRecord]:
        """Count the request under how it ends."""
        outcome = "internal_error"
        try:
            yield RequestRecord(self)
            outcome = "ok"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        except (TurretError, AdapterError) as error:
            outcome = error.reason.lower()
            raise
        finally:
            self.requests.labels(outcome).inc()


class EngineMetrics:
    """Records the engine's statistics; `record` is called on its thread."""

    def __init__(self, registry: CollectorRegistry, page_bytes: int) -> None:
        self._step_seconds = Histogram(
            "turret_step_seconds", "Time of one step of the batch.", buckets=_SECONDS, registry=registry
        )
        self._batch_requests = Histogram(
            "turret_batch_requests", "Sequences in a step.", buckets=_SIZES, registry=registry
        )
        self._batch_tokens = Histogram(
            "turret_batch_tokens", "Tokens computed in a step.", buckets=_SIZES, registry=registry
        )
        self._running = Gauge("turret_running_requests", "Requests that hold pages.", registry=registry)
        self._waiting = Gauge("turret_waiting_requests", "Length of the queue.", registry=registry)
        self._preemptions = Counter(
            "turret_preemptions", "Requests put back because pages ran out.", registry=registry
        )
        self._evictions = Counter(
            "turret_adapter_evictions", "Adapters that gave their pages up to others.", registry=registry
        )
        self._filling = Gauge(
            "turret_filling_adapters", "Adapters on their way into the arena.", registry=registry
        )
        self._pages = Gauge("turret_arena_pages", "Pages by owner.", ["owner"], registry=registry)
        Gauge("turret_arena_page_bytes", "Size of a page.", registry=registry).set(page_bytes)

    def record(self, stats: EngineStats) -> None:
        if stats.step:
            self._step_seconds.observe(stats.seconds)
            self._batch_requests.observe(len(stats.step.sequences))
            self._batch_tokens.observe(stats.step.num_tokens)
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._preemptions.inc(stats.num_preempted)
        self._evictions.inc(stats.num_evicted)
        self._filling.set(stats.num_filling)
        for owner, count in stats.pages.items():
            self._pages.labels(owner).set(count)


class AdapterMetrics(Collector):
    """Counts adapters by state, and what is in host memory, when it is asked, so that there is nothing to
    keep in step.
    """

    def __init__(
        self, states: Callable[[], Iterable[str]], memory: HostMemory, registry: CollectorRegistry
    ) -> None:
        self._states = states
        self._memory = memory
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return self._families([], 0, 0)

    def collect(self) -> Iterable[Metric]:
        return self._families(self._states(), self._memory.num_bytes, self._memory.num_reads)

    @staticmethod
    def _families(states: Iterable[str], num_bytes: int, num_reads: int) -> list[Metric]:
        adapters = GaugeMetricFamily("turret_adapters", "Adapters by state.", labels=["state"])
        for state, count in Count(states).items():
            adapters.add_metric([state], count)
        return [
            adapters,
            GaugeMetricFamily("turret_host_adapter_bytes", "Adapters in host memory.", num_bytes),
            CounterMetricFamily(
                "turret_adapter_disk_reads", "Adapters read again from the store.", num_reads
            ),
        ]
