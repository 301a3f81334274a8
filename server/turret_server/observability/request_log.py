"""What becomes of every request: at its end it is counted, logged, written to the usage log, and traced."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from turret_adapters.errors import AdapterError
from turret_server import logs
from turret_server.engine.request import Job
from turret_server.errors import TurretError, UsageLogFailedError
from turret_server.observability.metrics import RequestMetrics
from turret_server.observability.usage_log import UsageLog
from turret_server.rpc.calls import request_id
from turret_server.serving.requests import Prepared

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """Follows one request from its arrival to its end. Times are those of `time.monotonic`."""

    request_id: str
    metadata: tuple[tuple[str, str | bytes], ...]
    metrics: RequestMetrics
    about: Mapping[str, object]
    arrived: float = field(default_factory=time.monotonic)
    request: Job | None = None
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

    def begin(self, prepared: Prepared) -> None:
        """The engine has it now, and it goes to the usage log, however it ends."""
        self.request = prepared.request
        self.adapters = tuple(name for name, _ in prepared.lease.pins)
        self.revisions = tuple(spec.revision for _, spec in prepared.lease.pins)
        self.about = prepared.request.about
        self.submitted = time.monotonic()
        self.metrics.prompt_tokens.inc(self.prompt_tokens)

    def token(self, num_cached_tokens: int) -> None:
        """One token goes out now. So many were found in memory when the request started."""
        now = time.monotonic()
        if self.last_token is None:
            self.first_token = now
            self.metrics.first_token.observe(now - self.arrived)
        else:
            self.metrics.inter_token.observe(now - self.last_token)
        self.last_token = now
        self.cached_tokens = num_cached_tokens
        self.generated_tokens += 1
        self.metrics.generated_tokens.inc()

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids) if self.request else 0

    @property
    def queue_seconds(self) -> float | None:
        """How long it waited in the engine before its first step; None where it never came there."""
        if self.request is None or self.submitted is None:
            return None
        return max((self.request.times.started or self.ended or time.monotonic()) - self.submitted, 0.0)

    def usage(self) -> dict[str, object]:
        """An entry of the usage log. `id` is the server's own: who sends request ids may send one twice."""
        assert self.request
        return {
            "time": logs.timestamp(time.time()),
            "id": uuid.uuid4().hex,
            "request_id": self.request_id,
            "tenant": self.request.tenant,
            "adapters": self.adapters,
            "revisions": self.revisions,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "finish_reason": self.finish_reason,
        }

    def numbers(self) -> dict[str, object]:
        """What the log says of its end; of what it never came to, nothing. Times are in seconds."""
        assert self.ended is not None
        first = None if self.first_token is None else self.first_token - self.arrived
        found: dict[str, object] = {"finish_reason": self.finish_reason}
        if self.request:
            found["prompt_tokens"] = self.prompt_tokens
            found["cached_tokens"] = self.cached_tokens
            found["generated_tokens"] = self.generated_tokens
        seconds = {
            "queue_seconds": self.queue_seconds,
            "first_token_seconds": first,
            "seconds": self.ended - self.arrived,
        }
        return found | {what: round(each, 6) for what, each in seconds.items() if each is not None}


class RequestRecords:
    """Keeps the records of requests and tells who wants to know of them: of each request's end the usage log,
    before the client is told, and `on_end` afterwards.
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
    async def follow(self, context: Any) -> AsyncIterator[RequestRecord]:
        """The record of a request that lives in the block.

        Raises:
            UsageLogFailedError: what is used cannot be written down.
        """
        record = RequestRecord(
            request_id=request_id(),
            metadata=tuple(context.invocation_metadata() or ()),
            metrics=self._metrics,
            about=logs.bound(),
        )
        outcome = "ok"
        try:
            if self._usage_log:
                self._usage_log.check()
            yield record
        except GeneratorExit:
            # Nobody listens, and nothing can be waited for.
            outcome = "cancelled"
            self._end(record, outcome)
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            with suppress(UsageLogFailedError):
                await self.finish(record, outcome)
            raise
        except Exception as error:
            outcome, record.error = _reason(error), error
            await self.finish(record, outcome)
            raise
        finally:
            self._metrics.requests.labels(outcome).inc()
            self._metrics.cached_tokens.inc(record.cached_tokens)
            with logs.about(record.about):
                _log(record, outcome)
            if self._on_end:
                self._on_end(record)

    async def finish(self, record: RequestRecord, reason: str) -> None:
        """Note how the request ended; its client may be told when this returns.

        Raises:
            UsageLogFailedError: what it used could not be written down.
        """
        written = self._end(record, reason)
        if written:
            await asyncio.wrap_future(written)

    def _end(self, record: RequestRecord, reason: str) -> Future[None] | None:
        """The first end counts: what goes wrong while it is told is no other."""
        if record.ended is not None:
            return None
        record.ended = time.monotonic()
        record.finish_reason = reason
        return self._usage_log.append(record.usage()) if self._usage_log and record.request else None


def _reason(error: Exception) -> str:
    return error.reason.lower() if isinstance(error, TurretError | AdapterError) else "internal_error"


def _log(record: RequestRecord, outcome: str) -> None:
    extra = {"fields": record.numbers()}
    if record.error is None:
        log.info("request %s", "finished" if outcome == "ok" else outcome, extra=extra)
        return
    ours = not isinstance(record.error, TurretError | AdapterError) or record.error.code == "INTERNAL"
    log.log(logging.ERROR if ours else logging.INFO, "request failed: %s", record.error, extra=extra)
