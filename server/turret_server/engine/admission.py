"""How much every tenant may have in the queue, and when one that is refused should come back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from turret_server.engine.request import Job
from turret_server.errors import QueueFullError

_LEAST_RETRY_SECONDS = 0.1
_MOST_RETRY_SECONDS = 60.0

# How much a step counts against all before it when the speed of the engine is estimated.
_SMOOTHING = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """What a tenant is given: its share against others' weights, and how much of it may wait.

    The tokens of a request are those of its prompt and those that it may generate.
    """

    weight: float = 1.0
    max_queued_requests: int = 1024
    max_queued_tokens: int = 2**20


@dataclass(slots=True)
class _Queued:
    requests: int = 0
    tokens: int = 0


class Admission:
    """Counts what waits. Every method may be called from any thread."""

    def __init__(self, limits: Callable[[str], TenantLimits]) -> None:
        self._limits = limits
        self._queued: dict[str, _Queued] = {}
        self._tokens_per_second = 0.0
        self._lock = threading.Lock()

    @property
    def num_queued(self) -> int:
        with self._lock:
            return sum(queued.requests for queued in self._queued.values())

    def enter(self, job: Job) -> None:
        """Count a request that is about to wait.

        Raises:
            QueueFullError: its tenant has as much waiting as may; says when to try again.
        """
        limits = self._limits(job.tenant)
        with self._lock:
            queued = self._queued.get(job.tenant, _Queued())
            excess = queued.tokens + job.num_tokens - limits.max_queued_tokens
            if queued.requests >= limits.max_queued_requests:
                excess = max(excess, queued.tokens // queued.requests)
                self._refuse(
                    f"{queued.requests} requests of tenant {job.tenant!r} are waiting already, as many "
                    "as may",
                    job,
                    excess,
                )
            if queued.requests and excess > 0:
                self._refuse(
                    f"requests of {queued.tokens} tokens of tenant {job.tenant!r} are waiting already, "
                    f"and this one has {job.num_tokens}; {limits.max_queued_tokens} may wait",
                    job,
                    excess,
                )
            queued.requests += 1
            queued.tokens += job.num_tokens
            self._queued[job.tenant] = queued

    def leave(self, job: Job) -> None:
        """It waits no longer: it runs, or has ended."""
        with self._lock:
            queued = self._queued[job.tenant]
            queued.requests -= 1
            queued.tokens -= job.num_tokens
            if not queued.requests:
                del self._queued[job.tenant]

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        speed = num_tokens / max(seconds, 1e-6)
        with self._lock:
            known = self._tokens_per_second or speed
            self._tokens_per_second = known + _SMOOTHING * (speed - known)

    def _refuse(self, message: str, job: Job, excess: int) -> None:
        """`excess` tokens must leave the queue first; every tenant that waits is served as fast."""
        speed = self._tokens_per_second / len(self._queued)
        seconds = excess / speed if speed else 1.0
        seconds = min(max(seconds, _LEAST_RETRY_SECONDS), _MOST_RETRY_SECONDS)
        raise QueueFullError(
            f"{message}; try again in {seconds:.1f} s", retry_after=seconds, tenant=job.tenant
        )
