from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from turret_adapters.errors import AdapterNotFoundError, AdapterTaskError
from turret_server.engine.loop import EngineStats
from turret_server.engine.step import SequenceStep, Step
from turret_server.errors import DeadlineError, UnauthenticatedError
from turret_server.observability.metrics import (
    AdapterMetrics,
    AuthMetrics,
    EngineMetrics,
    RequestMetrics,
    add_server_info,
    outcome_of,
)


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def value(registry):
    return lambda name, **labels: registry.get_sample_value(name, labels)


def stats(**values):
    counts = dict.fromkeys(
        ("num_running", "num_waiting", "num_preempted", "num_evicted", "num_loading", "num_failures"), 0
    )
    return EngineStats(**({"step": None, "seconds": 0.0, "pages": {}} | counts | values))


def test_a_step_is_counted_with_its_sequences_and_tokens(registry, value):
    metrics = EngineMetrics(registry, page_bytes=4096)
    sequences = tuple(
        SequenceStep(sequence_id=number, token_ids=(1,) * number, start=0, block_table=(0,))
        for number in (1, 2, 4)
    )
    metrics.record(stats(step=Step(sequences=sequences), seconds=0.25))
    assert value("turret_step_seconds_sum") == 0.25
    assert value("turret_batch_requests_sum") == 3
    assert value("turret_batch_tokens_sum") == 7
    assert value("turret_arena_page_bytes") == 4096


def test_a_turn_without_a_step_is_no_step(registry, value):
    EngineMetrics(registry, page_bytes=1).record(stats(seconds=0.25))
    for name in ("turret_step_seconds_count", "turret_batch_requests_count", "turret_batch_tokens_count"):
        assert value(name) == 0


def test_states_of_the_engine_are_gauges_and_events_add_up(registry, value):
    metrics = EngineMetrics(registry, page_bytes=1)
    for number in (1, 2):
        metrics.record(
            stats(
                num_running=10 * number,
                num_waiting=20 * number,
                num_loading=30 * number,
                num_preempted=number,
                num_evicted=2 * number,
                num_failures=3 * number,
                pages={"sequence": number, "free": 9 - number},
            )
        )
    assert value("turret_running_requests") == 20
    assert value("turret_waiting_requests") == 40
    assert value("turret_loading_adapters") == 60
    assert value("turret_preemptions_total") == 3
    assert value("turret_adapter_evictions_total") == 6
    assert value("turret_step_failures_total") == 9
    assert value("turret_arena_pages", owner="sequence") == 2
    assert value("turret_arena_pages", owner="free") == 7


def test_failed_authentications_are_counted_by_a_few_reasons(registry, value):
    metrics = AuthMetrics(registry)
    reasons = ("no_key", "unknown_key", "malformed", "mismatch", "hook")
    assert [value("turret_failed_authentications_total", reason=reason) for reason in reasons] == [0] * 5
    for cause in (*reasons[:4], "a word of the hook's", "another"):
        metrics.failed(UnauthenticatedError("no", cause=cause))
    metrics.failed(UnauthenticatedError("no"))
    assert [value("turret_failed_authentications_total", reason=reason) for reason in reasons] == [
        1,
        1,
        1,
        1,
        3,
    ]


def test_adapters_are_counted_when_they_are_asked_for(registry, value):
    states = {"resident": 2, "failed": 0}
    memory, downloads = SimpleNamespace(num_bytes=5, num_reads=2), SimpleNamespace(num_bytes=7, running=["a"])
    AdapterMetrics(lambda: states, memory, downloads, registry)
    assert value("turret_adapters", state="resident") == 2
    assert value("turret_adapters", state="failed") == 0
    assert value("turret_host_adapter_bytes") == 5
    assert value("turret_adapter_disk_reads_total") == 2
    assert value("turret_adapter_downloaded_bytes_total") == 7
    assert value("turret_adapter_downloads") == 1
    states["resident"] = 0
    memory.num_bytes = 6
    assert value("turret_adapters", state="resident") == 0
    assert value("turret_host_adapter_bytes") == 6


def test_every_outcome_is_there_before_the_first_request(registry, value):
    RequestMetrics(registry)
    errors = (
        DeadlineError("late"),
        AdapterNotFoundError("none"),
        AdapterTaskError("none"),
        ZeroDivisionError(),
    )
    for outcome in ("ok", "cancelled", *map(outcome_of, errors)):
        assert value("turret_requests_total", outcome=outcome) == 0, outcome


def test_the_server_the_model_and_the_process_are_described(registry, value):
    add_server_info(registry, model="/models/llama", device="cpu", dtype="bfloat16", context=2048)
    [build] = [each for each in registry.collect() if each.name == "turret_build"]
    assert build.samples[0].labels["version"] == version("turret")
    labels = {"model": "/models/llama", "device": "cpu", "dtype": "bfloat16", "context": "2048"}
    assert value("turret_model_info", **labels) == 1
    assert value("process_resident_memory_bytes") > 0
    assert value("process_open_fds") > 0


def test_requests_are_counted_by_outcome(registry, value):
    metrics = RequestMetrics(registry)
    metrics.requests.labels("ok").inc()
    metrics.first_token.observe(0.05)
    metrics.inter_token.observe(0.001)
    assert value("turret_requests_total", outcome="ok") == 1
    # Bounds are in seconds.
    assert value("turret_time_to_first_token_seconds_bucket", le="0.05") == 1
    assert value("turret_time_to_first_token_seconds_bucket", le="0.025") == 0
    assert value("turret_inter_token_seconds_bucket", le="0.001") == 1


def test_adapters_are_not_looked_at_when_they_are_registered(registry):
    """The server is not built yet; and names that are taken are found."""

    def not_yet():
        raise AssertionError

    memory, downloads = SimpleNamespace(num_bytes=5, num_reads=2), SimpleNamespace(num_bytes=7, running=[])
    AdapterMetrics(not_yet, memory, downloads, registry)
    with pytest.raises(ValueError, match="Duplicated"):
        AdapterMetrics(not_yet, memory, downloads, registry)
