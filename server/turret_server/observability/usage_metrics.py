"""Usage by tenant and adapter. Both may be many, and on an open server calls invent tenants, but Prometheus
keeps every series it ever saw: the heaviest users have series of their own, all others share "other".
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

OTHER = "other"

_SHOWN = 100
_TRACKED = 16 * _SHOWN
_REVIEW_SECONDS = 60.0
_MOST_CHANGES = 10
# A series is replaced only by a user with this many times its usage, so that equal users do not alternate.
_AHEAD = 2.0

# Names of a tenant and of the adapters of a request.
_Who = tuple[str, str]


@dataclass(slots=True)
class _Used:
    requests: int = 0
    prompt: int = 0
    generated: int = 0

    def add(self, prompt: int, generated: int) -> None:
        self.requests += 1
        self.prompt += prompt
        self.generated += generated


class UsageMetrics(Collector):
    """Counts requests and tokens by tenant and adapter. All methods may be called from any thread.

    Once a minute, users without a series whose recent usage is much higher replace those with one, a few at a
    time. What was counted as "other" stays there, and a series that comes back begins at 0, so that no series
    ever decreases while it exists.
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._shown: dict[_Who, _Used] = {}
        self._other = _Used()
        # Recent tokens of users that have a series or may get one.
        self._recent: dict[_Who, float] = {}
        self._review_at = clock() + _REVIEW_SECONDS
        registry.register(self)

    def add(self, tenant: str, adapters: Iterable[str], *, prompt: int, generated: int) -> None:
        """Count a request that has ended, with its tokens."""
        who = (tenant, "+".join(adapters))
        with self._lock:
            if who not in self._shown and len(self._shown) < _SHOWN:
                self._shown[who] = _Used()
            self._shown.get(who, self._other).add(prompt, generated)
            if who in self._recent or len(self._recent) < _TRACKED:
                self._recent[who] = self._recent.get(who, 0.0) + prompt + generated
            if self._clock() >= self._review_at:
                self._review()

    def _review(self) -> None:
        self._review_at = self._clock() + _REVIEW_SECONDS
        least = sorted(self._shown, key=lambda who: self._recent.get(who, 0.0))
        most = sorted(self._recent.keys() - self._shown.keys(), key=self._recent.__getitem__, reverse=True)
        for shown, hidden in list(zip(least, most, strict=False))[:_MOST_CHANGES]:
            if self._recent[hidden] <= _AHEAD * self._recent.get(shown, 0.0):
                break
            del self._shown[shown]
            self._shown[hidden] = _Used()
        self._recent = {who: tokens / 2 for who, tokens in self._recent.items() if tokens >= 1}

    def describe(self) -> Iterable[Metric]:
        return self._families([])

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            used = [((OTHER, OTHER), self._other), *self._shown.items()]
            return self._families(used)

    @staticmethod
    def _families(used: Iterable[tuple[_Who, _Used]]) -> list[Metric]:
        requests = CounterMetricFamily(
            "turret_usage_requests",
            'Requests that have ended, by tenant and adapters; light users are "other".',
            labels=["tenant", "adapter"],
        )
        tokens = CounterMetricFamily(
            "turret_usage_tokens",
            "Tokens of those requests, by kind: prompt or generated.",
            labels=["tenant", "adapter", "kind"],
        )
        for who, each in used:
            requests.add_metric(who, each.requests)
            tokens.add_metric((*who, "prompt"), each.prompt)
            tokens.add_metric((*who, "generated"), each.generated)
        return [requests, tokens]
