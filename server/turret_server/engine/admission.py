"""How much each tenant may queue, and after how long a refused request should be retried."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from turret_server.engine.request import Job
from turret_server.errors import QueueFullError

_MIN_RETRY_SECONDS = 0.1
_MAX_RETRY_SECONDS = 60.0

# The weight of the last step in the moving average of a step's time.
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
        self._step_seconds = 0.0
        # Tokens that running jobs may still generate, ascending.
        self._remaining: list[int] = []
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
            num_ends = math.ceil(max(excess, 1) * queued.requests / max(queued.tokens, 1))
            if queued.requests >= limits.max_queued_requests:
                limit = f"{limits.max_queued_requests} requests"
                self._refuse(f"the queue of tenant {job.tenant!r} is full (limit {limit})", job, num_ends)
            if queued.requests and excess > 0:
                self._refuse(
                    f"the queue of tenant {job.tenant!r} is full (limit {limits.max_queued_tokens} tokens): "
                    f"{queued.tokens} are queued and this request has {job.num_tokens}",
                    job,
                    num_ends,
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

    def record_step(self, remaining: Iterable[int], seconds: float) -> None:
        """Take a step into the average, after which the running jobs may generate so many tokens more."""
        seconds = max(seconds, 1e-6)
        with self._lock:
            self._remaining = sorted(remaining)
            known = self._step_seconds or seconds
            self._step_seconds = known + _SMOOTHING * (seconds - known)

    def _refuse(self, message: str, job: Job, num_ends: int) -> None:
        """`num_ends` jobs of the tenant must leave its queue first."""
        seconds = self._seconds_until(num_ends * len(self._queued)) if self._step_seconds else 1.0
        seconds = min(max(seconds, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)
        raise QueueFullError(
            f"{message}; try again in {seconds:.1f} s", retry_after=seconds, tenant=job.tenant
        )

    def _seconds_until(self, num_ends: int) -> float:
        """How long it takes until so many jobs leave the queue, one when a running job ends. Each is taken to
        generate all tokens that it may.
        """
        if not self._remaining:  # all wait for their adapters
            return 1.0
        rounds, index = divmod(num_ends - 1, len(self._remaining))
        tokens = sum(queued.tokens for queued in self._queued.values())
        mean = tokens / sum(queued.requests for queued in self._queued.values())
        return (self._remaining[index] + rounds * mean) * self._step_seconds
