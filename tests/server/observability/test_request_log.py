from __future__ import annotations

import asyncio
import json
import logging
import time
from concurrent.futures import Future
from contextlib import closing
from copy import copy

import pytest
from prometheus_client import CollectorRegistry

from support.fake_device import make_spec
from turret_adapters.errors import AdapterNotFoundError
from turret_server import logs
from turret_server.engine.admission import TenantLimits
from turret_server.engine.request import PromptPin
from turret_server.errors import (
    DeadlineError,
    GenerationFailedError,
    InvalidRequestError,
    UsageLogFailedError,
)
from turret_server.observability.metrics import RequestMetrics
from turret_server.observability.request_log import RequestLog, RequestRecord
from turret_server.observability.usage_log import UsageLog
from turret_server.tenancy.auth import Caller
from turret_server.tenancy.tenants import Tenant

CALLER = Caller(tenant=Tenant(name="acme", limits=TenantLimits()), request_id="request-1")
PROMPT_TOKENS = 3
PINS = (("pirate", make_spec("3f9a", slab_pages=1)), ("formal", make_spec("77aa", slab_pages=1)))


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def value(registry):
    return lambda name, **labels: registry.get_sample_value(name, labels) or 0


@pytest.fixture
def metrics(registry):
    return RequestMetrics(registry)


@pytest.fixture
def ended():
    return []


@pytest.fixture
def path(tmp_path):
    return tmp_path / "usage.jsonl"


@pytest.fixture
def usage(path):
    with closing(UsageLog(path)) as log:
        yield log


@pytest.fixture
def written(path):
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def request_log(metrics, usage, ended):
    return RequestLog(metrics, usage, lambda record: ended.append(copy(record)))


def job():
    return PromptPin(
        request_id=7, prompt_token_ids=(1, 2, 3), deadline=None, sink=lambda _: None, tenant="acme"
    )


def lines(caplog):
    return [record for record in caplog.records if record.name.endswith("request_log")]


async def test_an_answered_request_is_counted_logged_written_and_traced(
    request_log, written, ended, value, caplog
):
    caplog.set_level(logging.INFO)
    async with request_log.follow(CALLER) as record:
        record.begin(job(), PINS, PROMPT_TOKENS)
        record.job.times.started = record.submitted + 0.25
        record.token(2, record.arrived + 0.5, None)
        record.token(2, record.arrived + 0.75, record.arrived + 0.5)
        await request_log.finish(record, "length")
        # The client gets its end after this, and the line is there already.
        [line] = written()
        assert ended == []
    assert line.pop("time").endswith("Z")
    assert len(line.pop("id")) == 32
    assert line == {
        "request_id": "request-1",
        "tenant": "acme",
        "adapters": ["pirate", "formal"],
        "revisions": ["3f9a", "77aa"],
        "prompt_tokens": 3,
        "cached_tokens": 2,
        "generated_tokens": 2,
        "finish_reason": "length",
    }
    assert [each.finish_reason for each in ended] == [record.finish_reason]
    assert record.job is None
    assert written() == written()[:1]
    assert value("turret_requests_total", outcome="ok") == 1
    assert value("turret_prompt_tokens_total") == 3
    assert value("turret_generated_tokens_total") == 2
    assert value("turret_cached_tokens_total") == 2
    assert value("turret_queue_seconds_sum") == pytest.approx(0.25)
    assert value("turret_request_seconds_sum") == pytest.approx(record.ended - record.arrived)
    # The engine's times, not those of the reader.
    assert value("turret_time_to_first_token_seconds_sum") == pytest.approx(0.5)
    assert value("turret_inter_token_seconds_sum") == pytest.approx(0.25)
    [logged] = lines(caplog)
    assert (logged.levelno, logged.getMessage()) == (logging.INFO, "request finished")
    assert logged.fields["finish_reason"] == "length"


async def test_the_first_end_counts(request_log, written):
    async with request_log.follow(CALLER) as record:
        record.begin(job(), PINS, PROMPT_TOKENS)
        await request_log.finish(record, "stop")
        ended_at = record.ended
        await request_log.finish(record, "length")
    assert (record.finish_reason, record.ended) == ("stop", ended_at)
    assert [line["finish_reason"] for line in written()] == ["stop"]


async def test_ids_of_the_usage_log_are_the_servers_own(request_log, written):
    for _ in range(2):
        async with request_log.follow(CALLER) as record:
            record.begin(job(), PINS, PROMPT_TOKENS)
            await request_log.finish(record, "stop")
    assert len({line["id"] for line in written()}) == 2
    assert {line["request_id"] for line in written()} == {"request-1"}


async def test_a_request_that_the_engine_never_had_uses_nothing(request_log, written, ended, value):
    with pytest.raises(InvalidRequestError):
        async with request_log.follow(CALLER):
            raise InvalidRequestError("top_k", field="top_k")
    assert written() == []
    assert [record.finish_reason for record in ended] == ["invalid_request"]
    assert value("turret_requests_total", outcome="invalid_request") == 1
    # Refusals, which take no time, are not among the durations.
    assert value("turret_request_seconds_count") == value("turret_queue_seconds_count") == 0


@pytest.mark.parametrize(
    ("error", "reason", "level"),
    [
        (InvalidRequestError("top_k", field="top_k"), "invalid_request", logging.INFO),
        (AdapterNotFoundError("pirate"), "adapter_not_found", logging.INFO),
        (GenerationFailedError("a step failed"), "generation_failed", logging.ERROR),
        (ZeroDivisionError("a bug"), "internal_error", logging.ERROR),
    ],
)
async def test_an_error_is_the_end_and_what_is_ours_is_an_error_of_the_log(
    request_log, written, ended, value, caplog, error, reason, level
):
    caplog.set_level(logging.INFO)

    async def fail():
        async with request_log.follow(CALLER) as record:
            record.begin(job(), PINS, PROMPT_TOKENS)
            raise error

    with pytest.raises(type(error)):
        await fail()
    assert [line["finish_reason"] for line in written()] == [reason]
    assert value("turret_requests_total", outcome=reason) == 1
    assert ended[0].error is error
    [logged] = lines(caplog)
    assert (logged.levelno, logged.getMessage()) == (level, f"request failed: {error}")


@pytest.mark.parametrize(
    ("allowed", "left", "outcome"),
    [
        (10.0, -1.0, "deadline_exceeded"),
        # Clients send timeouts rounded up, so that their own clock is ahead.
        (10.0, 0.09, "deadline_exceeded"),
        (10.0, 5.0, "cancelled"),
        (None, None, "cancelled"),
    ],
)
async def test_a_call_that_its_deadline_ended_is_told_from_one_that_its_client_cancelled(
    request_log, written, value, ended, allowed, left, outcome
):
    begun = asyncio.Event()
    deadline = None if allowed is None else time.monotonic() + left

    async def serve():
        async with request_log.follow(CALLER, deadline) as record:
            if deadline is not None:
                record.arrived = deadline - allowed
            record.begin(job(), PINS, PROMPT_TOKENS)
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [line["finish_reason"] for line in written()] == [outcome]
    assert value("turret_requests_total", outcome=outcome) == 1
    assert [isinstance(record.error, DeadlineError) for record in ended] == [outcome != "cancelled"]


@pytest.mark.parametrize("finished", [True, False])
async def test_a_client_that_closes_its_answer_cancels_it_unless_it_has_the_end(
    request_log, value, ended, finished
):
    async def answer():
        async with request_log.follow(CALLER) as record:
            record.begin(job(), PINS, PROMPT_TOKENS)
            if finished:
                await request_log.finish(record, "stop")
            yield record

    chunks = answer()
    await anext(chunks)
    await chunks.aclose()
    assert value("turret_requests_total", outcome="ok" if finished else "cancelled") == 1
    assert [record.finish_reason for record in ended] == ["stop" if finished else "cancelled"]


async def test_while_the_usage_log_cannot_be_written_nothing_begins(request_log, usage, value, monkeypatch):
    monkeypatch.setattr(usage, "_error", "the disk is full")
    with pytest.raises(UsageLogFailedError):
        async with request_log.follow(CALLER):
            pytest.fail("it began")
    assert value("turret_requests_total", outcome="usage_log_failed") == 1


async def test_without_a_usage_log_and_traces_requests_are_counted(metrics, value):
    log = RequestLog(metrics)
    async with log.follow(CALLER) as record:
        record.begin(job(), PINS, PROMPT_TOKENS)
        await log.finish(record, "stop")
    assert value("turret_requests_total", outcome="ok") == 1


async def test_the_line_of_the_log_has_the_fields_of_its_job(request_log, caplog):
    formatter = logs.JsonFormatter()
    written: list[dict[str, object]] = []

    class Handler(logging.Handler):
        def emit(self, record):
            written.append(json.loads(formatter.format(record)))

    logger, handler = logging.getLogger("turret_server.observability.request_log"), Handler()
    logger.addHandler(handler)
    caplog.set_level(logging.INFO)
    try:
        with logs.about({"tenant": "acme"}):
            pinned = PromptPin(
                request_id=7,
                prompt_token_ids=(1,),
                deadline=None,
                sink=lambda _: None,
                about={"tenant": "acme", "adapter": "pirate"},
            )
            async with request_log.follow(CALLER) as record:
                record.begin(pinned, PINS, PROMPT_TOKENS)
                await request_log.finish(record, "pinned")
        with logs.about({"tenant": "bolt"}):
            # One that the engine never had is logged with the fields of its call.
            async with request_log.follow(CALLER) as record:
                await request_log.finish(record, "stop")
    finally:
        logger.removeHandler(handler)
    assert [(line.get("tenant"), line.get("adapter")) for line in written] == [
        ("acme", "pirate"),
        ("bolt", None),
    ]


def test_times_are_parts_of_the_request(metrics):
    record = RequestRecord(caller=CALLER, metrics=metrics, about={}, arrived=10.0)
    record.ended = 20.0
    assert record.queue_seconds is None
    assert record.log_fields() == {"finish_reason": "", "seconds": 10.0}
    record.job, record.submitted, record.prompt_tokens = job(), 11.0, PROMPT_TOKENS
    # It never started: it waited until its end.
    assert record.queue_seconds == 9.0
    record.job.times.started = 13.5
    record.first_token, record.generated_tokens, record.cached_tokens = 15.0, 4, 2
    assert record.log_fields() == {
        "finish_reason": "",
        "prompt_tokens": 3,
        "cached_tokens": 2,
        "generated_tokens": 4,
        "queue_seconds": 2.5,
        "first_token_seconds": 5.0,
        "seconds": 10.0,
    }
    # The engine may have started it before the submission returned.
    record.job.times.started = 10.5
    assert record.queue_seconds == 0.0


class BrokenUsageLog:
    """Can be written when a request begins, and not any more when it ends."""

    def check(self):
        pass

    def append(self, _):
        written = Future()
        written.set_exception(UsageLogFailedError("the disk is full"))
        return written


async def test_a_request_whose_line_cannot_be_written_fails_at_its_end(metrics, ended, value):
    log = RequestLog(metrics, BrokenUsageLog(), lambda record: ended.append(copy(record)))

    async def serve():
        async with log.follow(CALLER) as record:
            record.begin(job(), PINS, PROMPT_TOKENS)
            await log.finish(record, "stop")

    with pytest.raises(UsageLogFailedError):
        await serve()
    assert [isinstance(record.error, UsageLogFailedError) for record in ended] == [True]
    assert value("turret_requests_total", outcome="usage_log_failed") == 1
    assert value("turret_requests_total", outcome="ok") == 0


async def test_a_cancelled_task_whose_line_cannot_be_written_is_cancelled(metrics, ended, value):
    log, begun = (
        RequestLog(metrics, BrokenUsageLog(), lambda record: ended.append(copy(record))),
        asyncio.Event(),
    )

    async def serve():
        async with log.follow(CALLER) as record:
            record.begin(job(), PINS, PROMPT_TOKENS)
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert value("turret_requests_total", outcome="cancelled") == 1
    assert len(ended) == 1
