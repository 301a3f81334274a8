"""Prometheus metrics. The engine emits statistics as data; they are recorded here."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from turret_adapters.errors import AdapterError
from turret_adapters.host_memory import HostMemory
from turret_adapters.sources.fetch import Downloads
from turret_server.engine.loop import EngineStats
from turret_server.errors import TurretError, UnauthenticatedError

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LONG_SECONDS = (*_SECONDS, 120.0, 300.0, 600.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


OK, CANCELLED, BUG = "ok", "cancelled", "internal_error"


def outcome_of(error: Exception) -> str:
    return error.reason.lower() if isinstance(error, TurretError | AdapterError) else BUG


def _outcomes() -> set[str]:
    """Every outcome of a request."""
    return {OK, CANCELLED, BUG, *_reasons(TurretError), *_reasons(AdapterError)}


def _reasons(kind: type[TurretError | AdapterError]) -> Iterator[str]:
    for each in kind.__subclasses__():
        yield each.reason.lower()
        yield from _reasons(each)


def add_server_info(
    registry: CollectorRegistry, *, model: str, device: str, dtype: str, context: int
) -> None:
    """Add metrics of the process, and which version of the server serves which model; `context` in tokens."""
    ProcessCollector(registry=registry)
    build = {"version": version("turret"), "python": platform.python_version()}
    Info("turret_build", "Versions of the server and of Python.", registry=registry).info(build)
    Info("turret_model", "The base model.", registry=registry).info(
        {"model": model, "device": device, "dtype": dtype, "context": str(context)}
    )


class RequestMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "turret_requests",
            "Requests to generate and to pin by outcome: ok, cancelled, or the reason of the error.",
            ["outcome"],
            registry=registry,
        )
        for outcome in _outcomes():
            self.requests.labels(outcome)
        self.duration = Histogram(
            "turret_request_seconds",
            "From the arrival of a request that the engine accepts to its end.",
            buckets=_LONG_SECONDS,
            registry=registry,
        )
        self.queue = Histogram(
            "turret_queue_seconds",
            "From when the engine accepts a request to its first step, or to its end without one.",
            buckets=_LONG_SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "turret_time_to_first_token_seconds",
            "From a request's arrival to when the engine emits its first token.",
            buckets=_LONG_SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "turret_inter_token_seconds",
            "Between two tokens of a request, as the engine emits them.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "turret_prompt_tokens", "Tokens of prompts, without virtual ones.", registry=registry
        )
        self.generated_tokens = Counter("turret_generated_tokens", "Tokens generated.", registry=registry)
        self.cached_tokens = Counter(
            "turret_cached_tokens",
            "Tokens whose keys and values were found in memory when a request that has ended started.",
            registry=registry,
        )


class EngineMetrics:
    """Records the engine's statistics; `record` is called on the engine's thread."""

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
        self._failures = Counter(
            "turret_step_failures",
            "Steps that failed as a whole, and parts of them that failed when computed again.",
            registry=registry,
        )
        self._loading = Gauge(
            "turret_loading_adapters", "Adapters that are being copied into the arena.", registry=registry
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
        self._loading.set(stats.num_loading)
        self._failures.inc(stats.num_failures)
        for owner, count in stats.pages.items():
            self._pages.labels(owner).set(count)


class WatchdogMetrics:
    """The age of the current step."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.age = Gauge(
            "turret_step_age_seconds", "Age of the current step, to about a second.", registry=registry
        )
        self.late = Counter(
            "turret_late_steps", "Steps that took so long that the server was not ready.", registry=registry
        )


class AuthMetrics:
    """Calls whose authentication failed."""

    _REASONS = ("no_key", "unknown_key", "malformed", "mismatch")
    # A hook may give any cause, and each would be a series.
    _OTHER = "hook"

    def __init__(self, registry: CollectorRegistry) -> None:
        self._failures = Counter(
            "turret_failed_authentications",
            f"Calls whose authentication failed, by reason: {', '.join((*self._REASONS, self._OTHER))}.",
            ["reason"],
            registry=registry,
        )
        for reason in (*self._REASONS, self._OTHER):
            self._failures.labels(reason)

    def failed(self, error: UnauthenticatedError) -> None:
        cause = error.metadata.get("cause", "")
        self._failures.labels(cause if cause in self._REASONS else self._OTHER).inc()


class AdapterMetrics(Collector):
    """Adapters by state, host memory and downloads, collected at each scrape."""

    def __init__(
        self,
        states: Callable[[], Mapping[str, int]],
        memory: HostMemory,
        downloads: Downloads,
        registry: CollectorRegistry,
    ) -> None:
        self._states = states
        self._memory = memory
        self._downloads = downloads
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return self._families({})

    def collect(self) -> Iterable[Metric]:
        return self._families(self._states())

    def _families(self, states: Mapping[str, int]) -> list[Metric]:
        adapters = GaugeMetricFamily("turret_adapters", "Adapters by state.", labels=["state"])
        for state, count in states.items():
            adapters.add_metric([state], count)
        memory, downloads = self._memory, self._downloads
        return [
            adapters,
            GaugeMetricFamily("turret_host_adapter_bytes", "Adapters in host memory.", memory.num_bytes),
            CounterMetricFamily(
                "turret_adapter_disk_reads", "Adapters read again from the store.", memory.num_reads
            ),
            CounterMetricFamily(
                "turret_adapter_downloaded_bytes",
                "Bytes that have come from adapters' sources, folders of this machine among them.",
                downloads.num_bytes,
            ),
            GaugeMetricFamily(
                "turret_adapter_downloads",
                "Adapters on their way from their sources.",
                len(downloads.running),
            ),
        ]
