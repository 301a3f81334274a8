"""Spans of requests for OpenTelemetry, made of their records when they have ended.

What serves a request knows nothing of this, for its record has the times: nothing is done for traces while
requests run, and nothing at all without `--otel`, without which this module is not imported. The names of
attributes are those of OpenTelemetry's semantic conventions for generative AI, as far as they have any.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import context as contexts
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from turret_server.engine.request import PromptPin, Request
from turret_server.observability.request_log import RequestRecord

_PROPAGATOR = TraceContextTextMapPropagator()
_FROM_CALLER = ("traceparent", "tracestate")
_NO_SERVICE_NAME = "unknown_service"


@contextmanager
def tracing(model: str) -> Iterator[RequestSpans]:
    """Send spans over OTLP to where the standard variables OTEL_* say, until the block ends."""
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith(_NO_SERVICE_NAME):
        resource = resource.merge(Resource({SERVICE_NAME: "turret"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield RequestSpans(provider.get_tracer("turret"), model)
    finally:
        provider.shutdown()


class RequestSpans:
    """Makes a span of each request, and one of each part of its life: queue, adapter_load (within the queue,
    where it had to wait for its adapters), prefill, decode.
    """

    def __init__(self, tracer: Tracer, model: str) -> None:
        self._tracer = tracer
        self._model = model

    def __call__(self, record: RequestRecord) -> None:
        """Of a request that has ended; its parent is the caller's span, if the call names one."""
        assert record.ended is not None
        operation = "pin_prompt" if isinstance(record.request, PromptPin) else "text_completion"
        # The wall clock is looked at once: however it jumps, what comes after begins after.
        offset = time.time() - time.monotonic()
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            _parent(record),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "turret",
                "gen_ai.request.model": self._model,
                **_attributes(record),
            },
            start_time=_nanoseconds(record.arrived + offset),
        )
        if record.error is not None:
            span.set_status(Status(StatusCode.ERROR, str(record.error)))
        inside = set_span_in_context(span)
        for name, (begin, end) in _parts(record).items():
            part = self._tracer.start_span(name, inside, start_time=_nanoseconds(begin + offset))
            part.end(_nanoseconds(end + offset))
        span.end(_nanoseconds(record.ended + offset))


def _parent(record: RequestRecord) -> contexts.Context:
    carrier = {key: str(value) for key, value in record.metadata if key in _FROM_CALLER}
    return _PROPAGATOR.extract(carrier, contexts.Context())


def _attributes(record: RequestRecord) -> Mapping[str, AttributeValue]:
    found: dict[str, AttributeValue] = {
        **{f"turret.{key}": str(value) for key, value in record.about.items()},
        "gen_ai.response.finish_reasons": [record.finish_reason],
    }
    if record.error is not None:
        found["error.type"] = record.finish_reason
    if isinstance(record.request, Request):
        sampling = record.request.sampling
        found |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": float(sampling.top_k),
        }
    if record.request:
        found |= {
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
            "gen_ai.usage.output_tokens": record.generated_tokens,
        }
    return found


def _parts(record: RequestRecord) -> dict[str, tuple[float, float]]:
    """Begin and end of each part that the request came to."""
    if record.request is None or record.submitted is None or record.ended is None:
        return {}
    times, ended = record.request.times, record.ended
    parts = {"queue": (record.submitted, times.started or ended)}
    if times.awaited is not None:
        parts["adapter_load"] = (times.awaited, times.ready or ended)
    if times.started is not None:
        parts["prefill"] = (times.started, record.first_token or ended)
    if record.first_token is not None and record.last_token is not None:
        parts["decode"] = (record.first_token, record.last_token)
    return parts


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
