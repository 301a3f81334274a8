"""Clean-up that must happen in the end: files and records of revisions that are no longer needed.

It waits for file locks and for SQLite, so it runs on a thread of its own and never on the event loop.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 60.0

# How long the end of the server waits for jobs that are stuck; the next start cleans up after them.
_CLOSE_SECONDS = 10.0


@dataclass(slots=True, order=True)
class _Job:
    """Ordered by `due` and `number`, which no two share."""

    due: float
    number: int
    name: str
    run: Callable[[], None]
    retry_seconds: float


class CleanupWorker:
    """Runs jobs in order on one thread. A job that fails is logged and retried with back-off; others go on
    meanwhile.

    Jobs must be safe to repeat. All methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._jobs: list[_Job] = []
        # Names of queued jobs: a job that is queued already is not queued twice.
        self._names: set[str] = set()
        self._num_submitted = 0
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="turret-cleanup", daemon=True)
        self._thread.start()

    def submit(self, name: str, run: Callable[[], None]) -> None:
        """Queue a job without waiting. `name` says in the log what it does, and identifies it."""
        with self._wake:
            if name in self._names or self._closing:
                return
            self._push(_Job(0.0, self._num_submitted, name, run, FIRST_RETRY_SECONDS))
            self._num_submitted += 1

    def run_now(self, name: str, run: Callable[[], None]) -> None:
        """Run a job on this thread; if it fails, log it and leave it to the worker."""
        try:
            run()
        except Exception as error:  # noqa: BLE001 (it is retried)
            log.warning("%s failed and will be retried: %s", name, error)
            self.submit(name, run)

    def close(self) -> None:
        """Try each queued job once more, then end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("%d clean-up jobs are left to the next start", len(self._jobs) + 1)

    def _push(self, job: _Job) -> None:
        heapq.heappush(self._jobs, job)
        self._names.add(job.name)
        self._wake.notify()

    def _loop(self) -> None:
        while job := self._next():
            try:
                job.run()
            except Exception as error:  # noqa: BLE001 (whatever it is, the other jobs go on)
                self._retry(job, error)

    def _next(self) -> _Job | None:
        """Wait for the next job that is due; None at the end."""
        with self._wake:
            while not self._closing and not (self._jobs and self._jobs[0].due <= time.monotonic()):
                self._wake.wait(self._jobs[0].due - time.monotonic() if self._jobs else None)
            if not self._jobs:
                return None
            job = heapq.heappop(self._jobs)
            self._names.discard(job.name)
            return job

    def _retry(self, job: _Job, error: Exception) -> None:
        with self._wake:
            if self._closing:
                log.warning("%s failed and is left to the next start: %s", job.name, error)
                return
            log.warning("%s failed and will be retried in %g s: %s", job.name, job.retry_seconds, error)
            if job.name not in self._names:
                job.due = time.monotonic() + job.retry_seconds
                job.retry_seconds = min(2 * job.retry_seconds, MAX_RETRY_SECONDS)
                self._push(job)
