from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from simulation.traces import Tenant, make_adapters, make_trace

ADAPTERS = make_adapters("a", 50, random.Random(0), prefixes=0.2)


def test_a_seed_makes_one_trace():
    tenants = [Tenant(name="a", rate=30, adapters=ADAPTERS), Tenant(name="b", rate=3)]
    assert make_trace(tenants, 1) == make_trace(tenants, 1)
    assert make_trace(tenants, 1) != make_trace(tenants, 2)


def test_what_a_tenant_asks_for_does_not_depend_on_the_others():
    a, b = Tenant(name="a", rate=30, adapters=ADAPTERS), Tenant(name="b", rate=3)
    alone = make_trace([b], 1)
    assert [arrival for arrival in make_trace([a, b], 1) if arrival.tenant == "b"] == alone


@pytest.mark.parametrize("burst", [1.0, 5.0])
def test_arrivals_come_at_their_rate(burst):
    trace = make_trace([Tenant(name="a", rate=20, start=10, end=1010, burst=burst)], 0)
    times = [arrival.at for arrival in trace]
    assert times == sorted(times)
    assert 10 <= times[0] <= times[-1] < 1010
    assert len(times) == pytest.approx(20_000, rel=0.15)
    counts = Counter(int(at) for at in times)
    mean = len(times) / 1000
    dispersion = sum((counts[second] - mean) ** 2 for second in range(10, 1010)) / 1000 / mean
    assert (dispersion > 2) == (burst > 1), "a Poisson process has as much variance as mean"


def test_adapters_are_asked_for_by_a_power_law():
    trace = make_trace([Tenant(name="a", rate=2000, adapters=ADAPTERS, skew=1.0)], 0)
    counts = Counter(arrival.adapter.revision for arrival in trace)
    total = sum(1 / rank for rank in range(1, 51))
    for rank in (1, 2, 10):
        assert counts[f"a/{rank - 1}"] / len(trace) == pytest.approx(1 / rank / total, rel=0.15)


def test_adapters_are_of_all_ranks():
    adapters = make_adapters("a", 500, random.Random(0), prefixes=0.5)
    assert {spec.max_rank for spec in adapters} == {0, 1, 2, 4, 8, 16}
    assert len({spec.prefix.kind for spec in adapters if spec.prefix}) == 2


def test_lengths_stay_within_their_bounds_and_reach_them():
    trace = make_trace([Tenant(name="a", rate=300, prompt=(3, 9), answer=(1, 1))], 0)
    assert {len(arrival.prompt) for arrival in trace} == set(range(3, 10))
    assert {arrival.max_tokens for arrival in trace} == {1}


def test_many_prompts_begin_alike():
    trace = make_trace([Tenant(name="a", rate=20, prompt=(40, 80), alike=0.5)], 0)
    same = [arrival for arrival in trace if len(set(arrival.prompt[:32])) == 1]
    assert len(same) / len(trace) == pytest.approx(0.5, abs=0.1)
    assert any(one.prompt[:32] == other.prompt[:32] for one, other in itertools.pairwise(same))


def test_some_have_less_patience():
    tenant = Tenant(name="a", rate=300, gives_up=0.3, has_deadline=0.2, pins=0.1)
    trace = make_trace([tenant], 0)
    assert sum(arrival.deadline is not None for arrival in trace) / len(trace) == pytest.approx(0.2, abs=0.03)
    assert sum(arrival.pinned for arrival in trace) / len(trace) == pytest.approx(0.1, abs=0.03)
    assert all(arrival.until for arrival in trace if arrival.pinned)
