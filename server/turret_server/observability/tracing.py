"""OpenTelemetry spans of requests, built from their records after they have ended.

Nothing is done for traces while a request runs; without `--otel` this module is not imported. Attribute names
are those of OpenTelemetry's semantic conventions for generative AI where these have one.
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

from turret_server.engine.request import Job, PoolingRequest, PromptPin, Request
from turret_server.observability.request_log import RequestRecord

_PROPAGATOR = TraceContextTextMapPropagator()
_FROM_CALLER = ("traceparent", "tracestate")
_NO_SERVICE_NAME = "unknown_service"


@contextmanager
def tracing(model: str) -> Iterator[RequestSpans]:
    """Export spans over OTLP, as the standard variables OTEL_* configure it, until the block ends."""
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
    """Exports a span for each request, with child spans for its phases: queue, adapter_load (within the
    queue, if the request waited for its adapters), prefill, decode.
    """

    def __init__(self, tracer: Tracer, model: str) -> None:
        self._tracer = tracer
        self._model = model

    def __call__(self, record: RequestRecord) -> None:
        """Export the spans of a request that has ended, below the caller's span if the call names one."""
        assert record.ended is not None
        operation = _operation(record.job)
        # The wall clock is read once, so that phases keep their order when it jumps.
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
    carrier = {key: str(value) for key, value in record.caller.metadata if key in _FROM_CALLER}
    return _PROPAGATOR.extract(carrier, contexts.Context())


def _operation(job: Job | None) -> str:
    """In the words of OpenTelemetry's conventions for generative AI, where they have one."""
    if isinstance(job, PromptPin):
        return "pin_prompt"
    if isinstance(job, PoolingRequest):
        return "classification" if job.params.task else "embeddings"
    return "text_completion"


def _attributes(record: RequestRecord) -> Mapping[str, AttributeValue]:
    found: dict[str, AttributeValue] = {
        **{f"turret.{key}": str(value) for key, value in record.about.items()},
        "gen_ai.response.finish_reasons": [record.finish_reason],
    }
    if record.error is not None:
        found["error.type"] = record.finish_reason
    if isinstance(record.job, Request):
        sampling = record.job.sampling
        found |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": float(sampling.top_k),
        }
    if record.job:
        found |= {
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
            "gen_ai.usage.output_tokens": record.generated_tokens,
        }
    return found


def _parts(record: RequestRecord) -> dict[str, tuple[float, float]]:
    """Begin and end of each phase that the request reached."""
    if record.job is None or record.submitted is None or record.ended is None:
        return {}
    times, ended = record.job.times, record.ended
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
