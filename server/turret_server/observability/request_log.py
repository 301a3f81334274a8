"""The request log: at its end every request is counted, logged, written to the usage log and traced."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from turret_adapters.errors import AdapterError
from turret_adapters.spec import AdapterSpec
from turret_server import logs
from turret_server.engine.request import Job
from turret_server.errors import DeadlineError, TurretError, UsageLogFailedError
from turret_server.observability.metrics import CANCELLED, OK, RequestMetrics, outcome_of
from turret_server.observability.usage_log import UsageLog
from turret_server.tenancy.auth import Caller

log = logging.getLogger(__name__)

# How much longer a request may take to the server than its cancellation.
_TRANSIT_SECONDS = 0.05


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request from its arrival to its end. Times are of `time.monotonic`; None is not reached."""

    caller: Caller
    metrics: RequestMetrics
    about: Mapping[str, object]
    arrived: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    job: Job | None = None
    prompt_tokens: int = 0
    adapters: tuple[str, ...] = ()
    revisions: tuple[str, ...] = ()
    submitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    cached_tokens: int = 0
    generated_tokens: int = 0
    finish_reason: str = ""
    error: Exception | None = None

    def begin(self, job: Job, pins: Sequence[tuple[str, AdapterSpec]], prompt_tokens: int) -> None:
        """The engine has accepted the request, of which this is the first job, with these adapters: from now
        on the request has a line in the usage log, however it ends.
        """
        self.job = job
        self.prompt_tokens = prompt_tokens
        self.adapters = tuple(name for name, _ in pins)
        self.revisions = tuple(spec.revision for _, spec in pins)
        self.about = job.about
        self.submitted = time.monotonic()
        self.metrics.prompt_tokens.inc(self.prompt_tokens)

    def token(self, num_cached_tokens: int, emitted: float, previous: float | None) -> None:
        """The engine emitted a token at this time, whether or not the client has read those before, and the
        one before it in the same answer at `previous`. `num_cached_tokens` were found in the prefix cache
        when the answer's job started; those of the first count, which computes the prompt.
        """
        if self.first_token is None:
            self.first_token = emitted
            self.cached_tokens = num_cached_tokens
            self.metrics.first_token.observe(emitted - self.arrived)
        if previous is not None:
            self.metrics.inter_token.observe(emitted - previous)
        self.last_token = emitted
        self.generated_tokens += 1
        self.metrics.generated_tokens.inc()

    def count(self, outcome: str) -> None:
        """Count the request in the metrics at its end."""
        assert self.ended is not None
        self.metrics.requests.labels(outcome).inc()
        if self.queue_seconds is not None:
            self.metrics.queue.observe(self.queue_seconds)
            self.metrics.duration.observe(self.ended - self.arrived)
            self.metrics.cached_tokens.inc(self.cached_tokens)

    @property
    def queue_seconds(self) -> float | None:
        """Time between submission and first step, or the end without one."""
        if self.job is None or self.submitted is None:
            return None
        return max((self.job.times.started or self.ended or time.monotonic()) - self.submitted, 0.0)

    def usage(self) -> dict[str, object]:
        """The entry of the usage log. `id` is the server's own: clients may repeat a request id."""
        assert self.job
        return {
            "time": logs.timestamp(time.time()),
            "id": uuid.uuid4().hex,
            "request_id": self.caller.request_id,
            "tenant": self.job.tenant,
            "adapters": self.adapters,
            "revisions": self.revisions,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "finish_reason": self.finish_reason,
        }

    def log_fields(self) -> dict[str, object]:
        """Fields of the log line at the end, without those that were not reached. Times are in seconds."""
        assert self.ended is not None
        first = None if self.first_token is None else self.first_token - self.arrived
        found: dict[str, object] = {"finish_reason": self.finish_reason}
        if self.job:
            found["prompt_tokens"] = self.prompt_tokens
            found["cached_tokens"] = self.cached_tokens
            found["generated_tokens"] = self.generated_tokens
        seconds = {
            "queue_seconds": self.queue_seconds,
            "first_token_seconds": first,
            "seconds": self.ended - self.arrived,
        }
        return found | {name: round(value, 6) for name, value in seconds.items() if value is not None}


class RequestLog:
    """Follows requests. The usage log has a request's line before its client gets the end of the answer;
    `on_end` is called after that.
    """

    def __init__(
        self,
        metrics: RequestMetrics,
        usage_log: UsageLog | None = None,
        on_end: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self._metrics = metrics
        self._usage_log = usage_log
        self._on_end = on_end

    @asynccontextmanager
    async def follow(self, caller: Caller, deadline: float | None = None) -> AsyncIterator[RequestRecord]:
        """The record of a request that is served in the block.

        Raises:
            UsageLogFailedError: the usage log cannot be written.
        """
        record = RequestRecord(caller=caller, metrics=self._metrics, about=logs.bound(), deadline=deadline)
        outcome = OK
        try:
            if self._usage_log:
                self._usage_log.check()
            yield record
        except GeneratorExit:
            # The client has gone, or does not want the rest.
            outcome = _interruption(record) if record.ended is None else outcome
            self._end(record, outcome)
            raise
        except asyncio.CancelledError:
            outcome = _interruption(record)
            with suppress(UsageLogFailedError):
                await self.finish(record, outcome)
            raise
        except Exception as error:
            outcome, record.error = outcome_of(error), error
            await self.finish(record, outcome)
            raise
        finally:
            record.count(outcome)
            with logs.about(record.about):
                _log(record, outcome)
            if self._on_end:
                self._on_end(record)
            # Both lead back to this record, the job by its sink and the error by the frames that it passed. A
            # cycle is freed late, and a request may have megabytes.
            record.job = record.error = None

    async def finish(self, record: RequestRecord, reason: str) -> None:
        """Record how the request ended; after that its client may get the end of the answer.

        Raises:
            UsageLogFailedError: the usage log cannot be written.
        """
        written = self._end(record, reason)
        if written:
            await asyncio.wrap_future(written)

    def _end(self, record: RequestRecord, reason: str) -> Future[None] | None:
        """The first end counts: an error while it is sent is not another."""
        if record.ended is not None:
            return None
        record.ended = time.monotonic()
        record.finish_reason = reason
        return self._usage_log.append(record.usage()) if self._usage_log and record.job else None


def _interruption(record: RequestRecord) -> str:
    """Why a request is interrupted: it has failed while its client read nothing, the deadline of its call
    has passed, or the client cancelled it.
    """
    if record.error is not None:
        return outcome_of(record.error)
    if record.deadline is None:
        return CANCELLED
    # The client's clock ends the call a moment before the server's would: gRPC sends timeouts rounded up, by
    # 1 % at most.
    early = 0.01 * (record.deadline - record.arrived) + _TRANSIT_SECONDS
    if time.monotonic() < record.deadline - early:
        return CANCELLED
    record.error = DeadlineError("the deadline passed before the request finished")
    return outcome_of(record.error)


def _log(record: RequestRecord, outcome: str) -> None:
    extra = {"fields": record.log_fields()}
    if record.error is None:
        log.info("request %s", "finished" if outcome == OK else outcome, extra=extra)
        return
    ours = not isinstance(record.error, TurretError | AdapterError) or record.error.code == "INTERNAL"
    log.log(logging.ERROR if ours else logging.INFO, "request failed: %s", record.error, extra=extra)
