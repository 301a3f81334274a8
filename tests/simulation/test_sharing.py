"""Tenants beside each other: the bounds that `fairness` promises, over virtual time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from simulation.simulator import CheapDevice, Served, Simulator, hit_rate
from simulation.traces import NO_LIMITS, Tenant, make_adapters, make_trace
from turret_server.engine.admission import TenantLimits
from turret_server.engine.fairness import GENERATED_COST, PROMPT_COST

BATCH = 16

SHORT = {"prompt": (8, 64), "answer": (4, 64)}
LONG_PROMPTS = {"prompt": (300, 400), "answer": (1, 4)}
LONG_ANSWERS = {"prompt": (1, 2), "answer": (100, 200)}


def limits(weight: float) -> TenantLimits:
    return replace(NO_LIMITS, weight=weight)


def simulate(tenants: Sequence[Tenant], *, until: float, seed: int = 0, num_pages: int = 400) -> Simulator:
    simulator = Simulator(
        make_trace(tenants, seed),
        tenants,
        num_pages=num_pages,
        device=CheapDevice(),
        max_batch_requests=BATCH,
        checks=False,
    )
    simulator.run_until(until)
    simulator.check()
    return simulator


def cost(served: Served) -> float:
    return PROMPT_COST * len(served.arrival.prompt) + GENERATED_COST * served.arrival.max_tokens


def most(tenant: Tenant) -> float:
    """What the largest request of a tenant may cost."""
    return PROMPT_COST * tenant.prompt[1] + GENERATED_COST * tenant.answer[1]


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("other", [SHORT, LONG_PROMPTS, LONG_ANSWERS], ids=["short", "prompts", "answers"])
@pytest.mark.parametrize("num_pages", [400, 120])
def test_tenants_that_keep_asking_are_served_by_their_weights(weight, other, num_pages):
    numbers = random.Random(0)
    adapters = [make_adapters(name, 4, numbers) for name in "ab"]
    a = Tenant(name="a", rate=1000, end=0.5, alike=0, adapters=adapters[0], **SHORT)
    b = Tenant(name="b", rate=1000, end=0.5, alike=0, adapters=adapters[1], limits=limits(weight), **other)
    simulator = simulate([a, b], until=0.5, num_pages=num_pages)
    queue = simulator.engine._scheduler.waiting
    before = [queue.counter("a"), queue.counter("b")]
    for end in range(1, 7):
        simulator.run_until(end)
        given = [queue.counter(name) - counter for name, counter in zip("ab", before, strict=True)]
        assert abs(given[0] - given[1]) <= BATCH * max(most(a), most(b) / weight)
    assert {sequence.tenant for sequence in queue} == {"a", "b"}, "both kept asking"
    assert given[1] == pytest.approx(given[0], rel=0.25)


@pytest.mark.parametrize("flood", [SHORT, LONG_PROMPTS, LONG_ANSWERS], ids=["short", "prompts", "answers"])
@pytest.mark.parametrize("seed", range(2))
def test_a_flood_delays_a_light_tenant_by_no_more_than_what_runs_already(flood, seed):
    flooding = Tenant(
        name="flood", rate=150, end=6, alike=0, adapters=make_adapters("f", 5, random.Random(0)), **flood
    )
    light = Tenant(
        name="light", rate=2, end=6, alike=0, adapters=make_adapters("l", 2, random.Random(0)), **SHORT
    )
    simulator = simulate([flooding, light], until=8, seed=seed)
    assert len(simulator.engine._scheduler.waiting) > 100
    speed = simulator.service("flood", 1, 6) / 5
    load = 0.1
    for served in simulator.of("light"):
        # Its own cost besides, and that of another that came just before it.
        assert served.first_token_seconds <= (BATCH * most(flooding) + 2 * most(light)) / speed + load


@pytest.mark.parametrize("seed", range(2))
def test_no_request_waits_longer_than_its_bound(seed):
    """(Q + B · C) · W / w + B · C of work, as `fairness` says; with priorities, bursts and weights."""
    numbers = random.Random(seed)
    tenants = [
        Tenant(
            name=f"{index}",
            rate=25,
            end=5,
            burst=3,
            alike=0,
            adapters=make_adapters(f"{index}", 10, numbers),
            priorities=(0, 0, 1),
            limits=limits(weight),
            **shape,
        )
        for index, (weight, shape) in enumerate(
            [(1.0, SHORT), (2.0, LONG_PROMPTS), (1.0, LONG_ANSWERS), (4.0, SHORT)]
        )
    ]
    simulator = simulate(tenants, until=1000, seed=seed)
    end = max(served.times[-1] for served in simulator.served)
    speed = sum(map(cost, simulator.served)) / end
    load = 0.1
    owed = BATCH * max(map(most, tenants))
    total = sum(tenant.limits.weight for tenant in tenants)
    longest = 0.0
    for tenant in tenants:
        for served in simulator.of(tenant.name):
            ahead = sum(cost(other) for other in simulator.of(tenant.name) if goes_before(other, served))
            work = (ahead + owed) * total / tenant.limits.weight + owed
            assert served.first_token_seconds <= work / speed + load
            longest = max(longest, served.first_token_seconds)
    assert longest > 5, "they had to wait at all"


def goes_before(one: Served, other: Served) -> bool:
    """Whether it stands before the other in their tenant's queue and is not done when the other arrives."""
    return (
        one is not other
        and one.times[-1] > other.arrival.at
        and one.arrival.at - 10 * one.arrival.priority <= other.arrival.at - 10 * other.arrival.priority
    )


def test_a_low_priority_is_passed_for_some_seconds_and_then_no_more():
    """While more important requests of its tenant keep coming, faster than they can be served."""
    important = Tenant(name="a", rate=100, end=20, priorities=(1,), alike=0, **SHORT)
    trace = make_trace([important], 0)
    low = replace(trace[0], at=0.5, priority=0)
    simulator = Simulator(
        [*trace, low],
        [important],
        num_pages=400,
        device=CheapDevice(),
        max_batch_requests=BATCH,
        checks=False,
    )
    simulator.run_until(20)
    [served] = [served for served in simulator.served if served.arrival.priority == 0]
    passed = [
        other
        for other in simulator.served
        if other.arrival.at > 0.5 and other.times and other.times[0] < served.times[0]
    ]
    assert served.is_answered
    assert max(other.arrival.at for other in passed) == pytest.approx(10.5, abs=0.5)
    assert served.first_token_seconds > 10


def test_nothing_is_left_undone_while_anybody_waits():
    """A tenant alone gets all of it, whatever its weight, and so do two whose adapters are all cold."""
    numbers = random.Random(0)
    speeds = []
    for weights in [(1.0,), (0.01,), (1.0, 100.0)]:
        tenants = [
            Tenant(
                name=f"{index}",
                rate=600 / len(weights),
                end=1,
                alike=0,
                limits=limits(weight),
                adapters=make_adapters(f"{index}", 6 // len(weights), numbers),
                **SHORT,
            )
            for index, weight in enumerate(weights)
        ]
        simulator = simulate(tenants, until=6)
        speeds.append(sum(simulator.service(tenant.name, 1, 6) for tenant in tenants))
    assert speeds == pytest.approx([speeds[0]] * 3, rel=0.1)


def test_a_tenant_with_a_thousand_cold_adapters_leaves_the_others_theirs():
    numbers = random.Random(0)
    hot = [
        Tenant(name=name, rate=8, end=30, skew=1.0, adapters=make_adapters(name, 8, numbers), **SHORT)
        for name in ("x", "y", "z")
    ]
    cold = Tenant(
        name="cold", rate=20, end=30, skew=0.0, adapters=make_adapters("cold", 1000, numbers), **SHORT
    )
    rates = []
    for tenants in (hot, [*hot, cold]):
        simulator = simulate(tenants, until=40)
        rates.append([hit_rate(simulator.of(tenant.name), simulator.loads) for tenant in hot])
    assert hit_rate(simulator.of("cold"), simulator.loads) < 0.2
    for alone, beside in zip(*rates, strict=True):
        assert alone > 0.95
        assert beside > alone - 0.03, "least recently used alone would lose a fifth"


def test_requests_for_adapters_that_are_there_pass_those_for_which_they_are_loaded():
    """A tenant whose adapters are all cold waits for its loads; the other does not notice."""
    numbers = random.Random(0)
    warm = Tenant(name="warm", rate=10, end=10, adapters=make_adapters("warm", 1, numbers), **SHORT)
    cold = Tenant(
        name="cold", rate=60, end=10, skew=0.0, adapters=make_adapters("cold", 5000, numbers), **SHORT
    )
    alone = simulate([warm], until=60).of("warm")
    beside = simulate([warm, cold], until=60).of("warm")
    slowest = [
        sorted(served.first_token_seconds for served in all_)[int(0.9 * len(all_))]
        for all_ in (alone, beside)
    ]
    assert slowest[1] < slowest[0] + 0.15


def test_the_longest_gap_of_streams_is_near_a_steps_time_while_a_long_prompt_enters():
    [arrival, *_] = make_trace([Tenant(name="a", rate=50)], 0)
    streams = [
        replace(arrival, at=index / 100, prompt=(index,) * 20, max_tokens=400, adapter=None)
        for index in range(8)
    ]
    # The speed of prompts is measured on the first.
    long = [replace(arrival, at=at, prompt=(int(at),) * 2000, max_tokens=2) for at in (1.0, 2.0)]
    gaps = []
    for trace in (streams, [*streams, *long]):
        simulator = Simulator(
            trace, [], num_pages=600, device=CheapDevice(), max_batch_tokens=4096, max_step_seconds=0.04
        )
        simulator.run_to_the_end()
        gaps.append(max(gap for served in simulator.served[:8] for gap in served.gaps[50:]))
    assert gaps[0] < 0.011
    assert 0.03 < gaps[1] <= 1.05 * 0.04
    assert all(served.first_token_seconds < 0.4 for served in simulator.served[8:]), (
        "they get on all the same"
    )
