"""Traces of a server's requests, as a collector receives them over OTLP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from support.prompts import PROMPT
from support.serving import serving
from turret.v1 import inference_pb2, inference_pb2_grpc
from turret_client import Client, NotFoundError
from turret_server.config import ServerConfig

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[trace_pb2.Span] = []
        self.services: set[str] = set()

    def Export(self, request, context):  # noqa: ARG002, N802 (gRPC's)
        for each in request.resource_spans:
            self.services.add(attributes(each.resource)["service.name"])
            self.spans += [span for scope in each.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def request(self, request_id: str) -> tuple[trace_pb2.Span, dict[str, trace_pb2.Span]]:
        """The span of a request, and those within it by their names."""
        [found] = [each for each in self.spans if attributes(each).get("turret.request_id") == request_id]
        inside = [each for each in self.spans if each.parent_span_id == found.span_id]
        assert all(each.trace_id == found.trace_id for each in inside)
        return found, {each.name: each for each in inside}


def attributes(has) -> dict[str, object]:
    found = {}
    for each in has.attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    with ThreadPoolExecutor(2) as pool:
        server, collector = grpc.server(pool), Collector()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield collector, f"http://127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


@pytest.fixture(scope="module")
def config(base_of, quantised_cache) -> ServerConfig:
    return ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="2MiB",
        cache=quantised_cache,
        otel=True,
    )


@pytest.fixture(scope="module")
def collected(config, adapter_of) -> Collector:
    """What came of a few requests, once the server has stopped and sent all that it had."""
    with collecting() as (collector, endpoint), pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        with serving(config) as served, grpc.insecure_channel(served.address) as channel:
            served.parts.lifecycle.load("lora", str(adapter_of("llama", "lora")))
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.GenerateRequest(text=PROMPT, max_tokens=5)
            parent = ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")
            stub.Generate(request, metadata=[("x-request-id", "base"), parent])
            unsampled = ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-00")
            stub.Generate(request, metadata=[("x-request-id", "unsampled"), unsampled])
            stub.Generate(request, metadata=[("x-request-id", "bad"), ("traceparent", "00-nonsense")])
            request.adapters.add(name="lora")
            call = stub.GenerateStream(
                request, metadata=[("x-request-id", "adapted"), ("turret-tenant", "acme")]
            )
            assert len(list(call)) == 5
            call = stub.GenerateStream(
                inference_pb2.GenerateRequest(text=PROMPT, max_tokens=100),
                metadata=[("x-request-id", "cancelled")],
            )
            next(call)
            call.cancel()
            with Client(served.address) as client:
                with pytest.raises(NotFoundError):
                    client.generate(PROMPT, adapter="nobody")
                client.pin_prompt("rules", list(range(3, 40)))
        return collector


def test_a_request_is_a_span_of_its_callers_trace(collected):
    span, inside = collected.request("base")
    assert span.trace_id.hex() == TRACE_ID
    assert span.parent_span_id.hex() == PARENT_ID
    assert span.kind == trace_pb2.Span.SPAN_KIND_SERVER
    assert span.status.code == trace_pb2.Status.STATUS_CODE_UNSET
    assert list(inside) == ["queue", "prefill", "decode"]
    assert collected.services == {"turret"}


def test_parts_follow_each_other_within_the_request(collected):
    span, inside = collected.request("adapted")
    queue, prefill, decode = (inside[name] for name in ("queue", "prefill", "decode"))
    load = inside.get("adapter_load", queue)
    edges = [
        span.start_time_unix_nano,
        queue.start_time_unix_nano,
        load.start_time_unix_nano,
        load.end_time_unix_nano,
        queue.end_time_unix_nano,
        prefill.start_time_unix_nano,
        prefill.end_time_unix_nano,
        decode.start_time_unix_nano,
        decode.end_time_unix_nano,
        span.end_time_unix_nano,
    ]
    assert edges == sorted(edges)
    assert prefill.start_time_unix_nano < decode.start_time_unix_nano < decode.end_time_unix_nano


def test_a_span_says_whose_request_it_is_and_how_large(collected, config):
    span, _ = collected.request("adapted")
    found = attributes(span)
    assert span.name == f"text_completion {config.model}"
    assert found.pop("turret.revision")
    assert found.pop("gen_ai.usage.input_tokens") > 0
    assert found.pop("gen_ai.usage.cache_read.input_tokens") >= 0
    assert found == {
        "turret.request_id": "adapted",
        "turret.tenant": "acme",
        "turret.adapter": "lora",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "turret",
        "gen_ai.request.model": config.model,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0.0,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"],
    }


def test_what_a_caller_does_not_sample_is_not_sent_and_a_bad_parent_is_none(collected):
    assert not [each for each in collected.spans if attributes(each).get("turret.request_id") == "unsampled"]
    assert collected.request("bad")[0].parent_span_id == b""


def test_requests_that_end_otherwise_have_spans_as_well(collected):
    cancelled, inside = collected.request("cancelled")
    assert attributes(cancelled)["gen_ai.response.finish_reasons"] == ["cancelled"]
    assert {"queue", "prefill"} <= set(inside)
    [failed] = [each for each in collected.spans if each.status.code == trace_pb2.Status.STATUS_CODE_ERROR]
    assert attributes(failed)["error.type"] == "adapter_not_found"
    assert "nobody" in failed.status.message
    [pinned] = [each for each in collected.spans if each.name.startswith("pin_prompt")]
    assert attributes(pinned)["gen_ai.usage.output_tokens"] == 0


def test_a_collector_that_is_not_there_keeps_no_request(config, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with serving(config) as served, Client(served.address) as client:
        assert client.generate(PROMPT, max_tokens=3).usage.generated_tokens == 3


ABSENT = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from prometheus_client import CollectorRegistry
from turret_server.config import ServerConfig
from turret_server.app.build import open_request_log

with open_request_log(ServerConfig(model="m", otel=sys.argv[1] == "on"), CollectorRegistry()):
    assert not [name for name in sys.modules if name.startswith("opentelemetry")]
    print("served")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("otel", "said"), [("off", "served"), ("on", 'pip install ".[otel]"')])
def test_without_the_extra_a_server_without_traces_serves_and_one_with_them_says_what_it_needs(otel, said):
    done = subprocess.run(  # noqa: S603 (this interpreter)
        [sys.executable, "-c", ABSENT, otel], capture_output=True, text=True, check=False
    )
    assert said in (done.stdout if otel == "off" else done.stderr.splitlines()[-1])
    assert (done.returncode == 0) == (otel == "off")
