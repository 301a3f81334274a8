"""How much each tenant may queue, and after how long a refused request should be retried."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from turret_server.engine.request import Job
from turret_server.errors import QueueFullError

_MIN_RETRY_SECONDS = 0.1
_MAX_RETRY_SECONDS = 60.0

# The weight of the last step in the moving average of the engine's speed.
_SMOOTHING = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """A tenant's share of the engine relative to other weights, and its limits in the queue.

    The tokens of a job are those of its prompt and the most that it may generate.
    """

    weight: float = 1.0
    max_queued_requests: int = 1024
    max_queued_tokens: int = 2**20


@dataclass(slots=True)
class _Queued:
    requests: int = 0
    tokens: int = 0


class Admission:
    """Counts queued jobs and their tokens by tenant. All methods are thread-safe."""

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
        """Count a job that is about to be queued. A job larger than the token limit may wait alone.

        Raises:
            QueueFullError: the tenant's queue is full; it says after how long to retry.
        """
        limits = self._limits(job.tenant)
        with self._lock:
            queued = self._queued.get(job.tenant, _Queued())
            excess = queued.tokens + job.num_tokens - limits.max_queued_tokens
            if queued.requests >= limits.max_queued_requests:
                excess = max(excess, queued.tokens // queued.requests)
                limit = f"{limits.max_queued_requests} requests"
                self._refuse(f"the queue of tenant {job.tenant!r} is full (limit {limit})", job, excess)
            if queued.requests and excess > 0:
                self._refuse(
                    f"the queue of tenant {job.tenant!r} is full (limit {limits.max_queued_tokens} tokens): "
                    f"{queued.tokens} are queued and this request has {job.num_tokens}",
                    job,
                    excess,
                )
            queued.requests += 1
            queued.tokens += job.num_tokens
            self._queued[job.tenant] = queued

    def leave(self, job: Job) -> None:
        """Count a job that leaves the queue: it starts, or has ended."""
        with self._lock:
            queued = self._queued[job.tenant]
            queued.requests -= 1
            queued.tokens -= job.num_tokens
            if not queued.requests:
                del self._queued[job.tenant]

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """Take a step into the average speed."""
        speed = num_tokens / max(seconds, 1e-6)
        with self._lock:
            known = self._tokens_per_second or speed
            self._tokens_per_second = known + _SMOOTHING * (speed - known)

    def _refuse(self, message: str, job: Job, excess: int) -> None:
        """`excess` tokens must leave the queue first. Tenants with queued jobs share the engine equally."""
        speed = self._tokens_per_second / len(self._queued)
        seconds = excess / speed if speed else 1.0
        seconds = min(max(seconds, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)
        raise QueueFullError(
            f"{message}; try again in {seconds:.1f} s", retry_after=seconds, tenant=job.tenant
        )
