from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry

from turret_server.engine.admission import TenantLimits
from turret_server.engine.request import PromptPin, Request, SamplingParams, Times
from turret_server.errors import QueueFullError
from turret_server.observability import tracing as module
from turret_server.observability.metrics import RequestMetrics
from turret_server.observability.request_log import RequestRecord
from turret_server.observability.tracing import RequestSpans, tracing
from turret_server.tenancy.auth import Caller
from turret_server.tenancy.tenants import Tenant

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = Caller(tenant=Tenant(name="acme", limits=TenantLimits()), request_id="request-1")
SAMPLING = SamplingParams(max_tokens=5, temperature=0.5, top_p=0.25, top_k=6)


@pytest.fixture
def spans_of(monkeypatch):
    """Exports the spans of a record; returns them by name. The wall clock is 1000 s ahead of the other."""
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: 6000.0, monotonic=lambda: 5000.0))
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def export(record):
        exporter.clear()
        RequestSpans(provider.get_tracer("test"), "m")(record)
        return {span.name: span for span in exporter.get_finished_spans()}

    yield export
    provider.shutdown()


def job_of(kind=Request, times=None):
    more = {"sampling": SAMPLING, "stop_token_ids": frozenset()} if kind is Request else {}
    return kind(
        request_id=1,
        prompt_token_ids=(5, 6, 7),
        deadline=None,
        sink=lambda _: None,
        times=times or Times(),
        **more,
    )


def record_of(**fields):
    """A request that arrived at 10 and ended at 20."""
    known = {
        "prompt_tokens": 3,
        "caller": CALLER,
        "metrics": RequestMetrics(CollectorRegistry()),
        "about": {"tenant": "acme", "number": 3},
        "arrived": 10.0,
        "ended": 20.0,
        "finish_reason": "length",
    }
    return RequestRecord(**(known | fields))


def seconds(span):
    """Begin and end of a span by the other clock."""
    return span.start_time / 1e9 - 1000, span.end_time / 1e9 - 1000


FINISHED = {
    "submitted": 11.0,
    "first_token": 15.0,
    "last_token": 18.0,
    "cached_tokens": 2,
    "generated_tokens": 4,
}


def test_a_request_has_a_span_and_one_for_each_phase_within_it(spans_of):
    spans = spans_of(record_of(job=job_of(times=Times(awaited=11.5, ready=12.0, started=13.0)), **FINISHED))
    root = spans.pop("text_completion m")
    assert (seconds(root), root.kind, root.parent) == ((10, 20), SpanKind.SERVER, None)
    assert {name: seconds(span) for name, span in spans.items()} == {
        "queue": (11, 13),
        "adapter_load": (11.5, 12),
        "prefill": (13, 15),
        "decode": (15, 18),
    }
    assert {span.parent.span_id for span in spans.values()} == {root.context.span_id}
    assert {span.context.trace_id for span in spans.values()} == {root.context.trace_id}


def test_a_span_says_what_was_asked_and_what_it_took(spans_of):
    root = spans_of(record_of(job=job_of(times=Times(started=13.0)), **FINISHED))["text_completion m"]
    assert dict(root.attributes) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "turret",
        "gen_ai.request.model": "m",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.25,
        "gen_ai.request.top_k": 6.0,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.output_tokens": 4,
        "turret.tenant": "acme",
        "turret.number": "3",
    }
    assert root.status.status_code is StatusCode.UNSET


def test_a_pin_has_no_sampling(spans_of):
    spans = spans_of(record_of(job=job_of(PromptPin, Times(started=13.0)), submitted=11.0, cached_tokens=2))
    root = spans["pin_prompt m"]
    assert root.attributes["gen_ai.operation.name"] == "pin_prompt"
    assert root.attributes["gen_ai.usage.input_tokens"] == 3
    assert not [name for name in root.attributes if "temperature" in name]
    # Nothing is decoded; the prompt is computed until the end.
    assert {name: seconds(span) for name, span in spans.items() if span is not root} == {
        "queue": (11, 13),
        "prefill": (13, 20),
    }


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (Times(), {"queue": (11, 20)}),
        (Times(awaited=12.0), {"queue": (11, 20), "adapter_load": (12, 20)}),
        (Times(started=13.0), {"queue": (11, 13), "prefill": (13, 20)}),
    ],
)
def test_a_phase_that_did_not_end_ends_with_the_request(spans_of, times, expected):
    spans = spans_of(record_of(job=job_of(times=times), submitted=11.0))
    del spans["text_completion m"]
    assert {name: seconds(span) for name, span in spans.items()} == expected


def test_a_request_that_the_engine_never_had_says_why(spans_of):
    error = QueueFullError("full", retry_after=1.0)
    [root] = spans_of(record_of(error=error, finish_reason="queue_full")).values()
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "full")
    assert root.attributes["error.type"] == "queue_full"
    assert not [name for name in root.attributes if "usage" in name]


@pytest.mark.parametrize(
    ("metadata", "parent"),
    [
        (
            (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=x"), ("other", b"\xff")),
            PARENT,
        ),
        ((("traceparent", f"00-{TRACE}-{PARENT}-00"),), None),  # which its caller does not sample
        ((("traceparent", "nonsense"),), ""),
    ],
)
def test_a_span_belongs_to_its_callers_trace(spans_of, metadata, parent):
    spans = spans_of(record_of(caller=replace(CALLER, metadata=metadata)))
    if parent is None:
        assert spans == {}
        return
    [root] = spans.values()
    if parent:
        assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)
        assert root.context.trace_state["vendor"] == "x"
    else:
        assert root.parent is None


@pytest.mark.parametrize(("variable", "name"), [(None, "turret"), ("mine", "mine")])
def test_spans_are_exported_under_the_services_name_when_the_block_ends(monkeypatch, variable, name):
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(module, "OTLPSpanExporter", lambda: exporter)
    if variable:
        monkeypatch.setenv("OTEL_SERVICE_NAME", variable)
    else:
        monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    with tracing("m") as export:
        export(record_of())
    [span] = exporter.get_finished_spans()
    assert (span.name, span.resource.attributes["service.name"]) == ("text_completion m", name)
