from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import Counter
from typing import TYPE_CHECKING

import grpc
import pytest

from support import scripted_server as script
from support.prompts import until
from turret_client import AsyncClient, TurretError
from turret_client.bench import Latencies, LoadGenerator, Popularity, Record, Workload, percentile, summarise

if TYPE_CHECKING:
    from collections.abc import Callable


def generate(
    address: str, workload: Workload, *, warm_up: int = 0, clock: Callable[[], float] = time.perf_counter
) -> LoadGenerator:
    async def run() -> LoadGenerator:
        async with AsyncClient(address) as client:
            generator = LoadGenerator(client, workload, clock=clock)
            await generator.warm_up(warm_up)
            await generator.run()
            return generator

    return asyncio.run(run())


def test_a_closed_loop_sends_every_request_once_and_records_every_token(server):
    generator = generate(server.address, Workload(concurrency=3, num_requests=7, adapters=("pirate",)))
    assert len(generator.records) == len(server.requests) == 7
    assert {request.adapters[0].name for request in server.requests} == {"pirate"}
    for record in generator.records:
        assert record.succeeded
        assert len(record.token_seconds) == 4
        assert record.cached_tokens == 2
        assert record.due <= record.token_seconds[0]
        assert record.token_seconds == sorted(record.token_seconds)
        assert record.token_seconds[-1] <= record.ended <= generator.seconds
    assert generator.running == 0


def test_a_closed_loop_never_runs_more_than_its_concurrency(server):
    records = generate(server.address, Workload(concurrency=3, num_requests=20)).records
    moments = [record.due for record in records]
    assert max(sum(r.due <= moment < r.ended for r in records) for moment in moments) <= 3


def test_an_open_loop_sends_at_the_poisson_arrivals_however_slow_the_server_is(server):
    server.hold = True
    workload = Workload(rate=200.0, num_requests=4, seed=5)

    async def run() -> LoadGenerator:
        async with AsyncClient(server.address) as client:
            generator = LoadGenerator(client, workload)
            task = asyncio.create_task(generator.run())
            await asyncio.to_thread(until, lambda: generator.running == 4)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return generator

    generator = asyncio.run(run())
    assert [record.due for record in generator.records] == [plan.due for plan in workload.requests()]
    assert all(record.ended is None for record in generator.records)
    assert summarise(generator.records, generator.seconds).unfinished == 4


def test_an_open_loop_sends_no_request_before_it_is_due(server):
    records = generate(server.address, Workload(rate=40.0, num_requests=6, seed=5)).records
    assert all(record.token_seconds[0] >= record.due for record in records)


def test_a_closed_loop_pauses_after_a_failure(server):
    server.failure = script.failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL")
    records = generate(server.address, Workload(concurrency=1, num_requests=3)).records
    assert all(after.due - before.ended >= 0.09 for before, after in itertools.pairwise(records))


@pytest.mark.parametrize(
    ("workload", "allowed"), [({"concurrency": 2}, 2), ({"rate": 100.0}, 1)], ids=["closed", "open"]
)
def test_the_warm_up_keeps_to_the_concurrency(server, workload, allowed):
    running = Counter()

    class Counting(AsyncClient):
        async def generate(self, *args, **options):
            running["now"] += 1
            running["most"] = max(running["most"], running["now"])
            generation = await super().generate(*args, **options)
            running["now"] -= 1
            return generation

    async def run() -> None:
        async with Counting(server.address) as client:
            await LoadGenerator(client, Workload(num_requests=1, **workload)).warm_up(5)

    asyncio.run(run())
    assert running["most"] == allowed
    assert len(server.requests) == 5


def test_arrivals_are_spread_as_a_poisson_process_spreads_them():
    due = [planned.due for planned in Workload(rate=8.0, num_requests=4000, seed=1).requests()]
    gaps = [after - before for before, after in itertools.pairwise(due)]
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.1)
    # Exponential gaps: as wide as they are long.
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.1)


def test_no_request_is_due_after_the_duration(server):
    workload = Workload(rate=100.0, duration=0.2)
    assert all(record.due < 0.2 for record in generate(server.address, workload).records)


def test_a_closed_loop_sends_nothing_when_its_duration_is_over(server):
    """The clock advances by 1 s with every reading, and reaches the duration between any two of them."""
    for duration in range(1, 12):
        readings = itertools.count()
        workload = Workload(concurrency=2, duration=float(duration))
        records = generate(server.address, workload, clock=lambda readings=readings: next(readings)).records
        assert len(records) == len(server.requests)
        assert all(record.due < duration and record.succeeded for record in records)
        assert len(records) >= (duration > 1)
        server.requests.clear()


def test_the_warm_up_is_sent_but_not_recorded(server):
    generator = generate(server.address, Workload(concurrency=2, num_requests=3), warm_up=5)
    assert len(server.requests) == 8
    assert len(generator.records) == 3
    prompts = {tuple(request.token_ids.ids) for request in server.requests}
    assert len(prompts) == 8


def test_a_warm_up_that_fails_raises(server):
    server.failure = script.failure(grpc.StatusCode.NOT_FOUND, "no", reason="ADAPTER_NOT_FOUND")
    with pytest.raises(TurretError, match="no"):
        generate(server.address, Workload(concurrency=1, num_requests=1), warm_up=1)


def test_failures_are_recorded_under_their_reason(server):
    server.failure = script.failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL")
    generator = generate(server.address, Workload(concurrency=2, num_requests=4))
    summary = summarise(generator.records, generator.seconds)
    assert summary.errors == {"QUEUE_FULL": 4}
    assert (summary.succeeded, summary.failed) == (0, 4)
    # Each stream had given two tokens before it failed.
    assert summary.generated_tokens == 8
    assert summary.request_seconds is None


@pytest.mark.parametrize("popularity", ["uniform", "zipf:1.1", "round-robin"])
def test_the_same_seed_sends_the_same(popularity):
    def planned(seed: int) -> list[object]:
        workload = Workload(
            rate=3.0,
            num_requests=50,
            adapters=("a", "b", "c"),
            popularity=Popularity.parse(popularity),
            prompt_tokens=(5, 9),
            seed=seed,
        )
        return list(workload.requests())

    assert planned(1) == planned(1)
    assert planned(1) != planned(2)


def test_zipf_asks_for_adapters_in_proportion_to_their_rank():
    names = tuple("abcd")
    workload = Workload(rate=1.0, num_requests=20000, adapters=names, popularity=Popularity(zipf=1.0))
    counts = Counter(planned.adapter for planned in workload.requests())
    for rank, name in enumerate(names, start=1):
        assert counts[name] / counts["a"] == pytest.approx(1 / rank, rel=0.1)


def test_round_robin_gives_concurrent_requests_different_adapters():
    workload = Workload(
        concurrency=3, num_requests=6, adapters=("a", "b", "c"), popularity=Popularity(round_robin=True)
    )
    assert [planned.adapter for planned in workload.requests()] == ["a", "b", "c"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_requests": 1}, "set exactly one of concurrency and rate"),
        ({"num_requests": 1, "concurrency": 2, "rate": 1.0}, "set exactly one of concurrency and rate"),
        ({"concurrency": 2}, "set num_requests, duration or both"),
    ],
)
def test_an_invalid_workload_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Workload(**arguments)


def test_prompt_lengths_span_their_range():
    workload = Workload(rate=1.0, num_requests=500, prompt_tokens=(3, 6))
    assert {len(planned.prompt) for planned in workload.requests()} == {3, 4, 5, 6}


@pytest.mark.parametrize("text", ["zipf", "zipf:0", "zipf:-1", "zipf:a", "gauss", ""])
def test_an_invalid_popularity_is_refused(text):
    with pytest.raises(ValueError, match=r"expected uniform, round-robin or zipf:S"):
        Popularity.parse(text)


def test_percentiles_are_those_of_the_standard_library():
    values = sorted((index * 37 % 101) ** 1.5 for index in range(101))
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for percent, cut in enumerate(cuts, start=1):
        assert percentile(values, percent / 100) == pytest.approx(cut)
    assert percentile([4.0], 0.99) == 4.0
    assert percentile([1.0, 3.0], 0.5) == 2.0


def test_a_summary_of_known_records():
    records = [
        Record(adapter="a", prompt_tokens=10, due=0.0, token_seconds=[1.0, 1.5, 2.5], ended=2.5),
        Record(
            adapter=None, prompt_tokens=20, due=1.0, token_seconds=[4.0, 4.5], ended=5.0, cached_tokens=16
        ),
        Record(adapter="a", prompt_tokens=40, due=2.0, ended=2.1, error="QUEUE_FULL"),
        Record(adapter="b", prompt_tokens=80, due=3.0, token_seconds=[3.5]),
    ]
    summary = summarise(records, 5.0)
    assert (summary.succeeded, summary.failed, summary.unfinished) == (2, 1, 1)
    assert (summary.prompt_tokens, summary.cached_tokens, summary.generated_tokens) == (30, 16, 6)
    assert summary.requests_per_second == pytest.approx(0.4)
    assert summary.output_tokens_per_second == pytest.approx(1.2)
    assert summary.adapters == {"a": 1, "": 1}
    first, inter, whole = summary.first_token_seconds, summary.inter_token_seconds, summary.request_seconds
    assert (first.p50, first.max) == (1.0, 3.0)
    assert first.mean == pytest.approx(4.5 / 3)
    assert (inter.p50, inter.max) == (0.5, 1.0)
    assert (whole.p50, whole.max) == (3.25, 4.0)
    assert Latencies.of([]) is None
