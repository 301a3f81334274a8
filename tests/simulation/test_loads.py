"""Everything at once, over virtual time: the simulator looks at every invariant after every step.

`support.fake_device` says how a wrong page, position or adapter would change the tokens.
"""

from __future__ import annotations

import random

import pytest

from simulation.simulator import Costs, Simulator
from simulation.traces import Tenant, make_adapters, make_trace
from turret_server.engine.admission import TenantLimits
from turret_server.engine.request import FinishReason
from turret_server.errors import DeadlineError, QueueFullError, RequestTooLargeError


def mixed_tenants(seed: int) -> list[Tenant]:
    """Bursts and a steady stream; LoRAs of all ranks, prefixes, pins; long prompts beside short ones."""
    numbers = random.Random(seed)
    return [
        Tenant(
            name="bursty",
            rate=40,
            end=5,
            burst=4,
            adapters=make_adapters("bursty", 30, numbers, prefixes=0.2),
            priorities=(0, 0, 1, 2),
            gives_up=0.1,
            has_deadline=0.1,
            patience=0.5,
            limits=TenantLimits(max_queued_requests=60),
        ),
        Tenant(
            name="steady",
            rate=10,
            end=5,
            adapters=make_adapters("steady", 8, numbers, prefixes=0.2),
            prompt=(8, 400),
            alike=0.8,
            salts=("", "x"),
            pins=0.05,
            limits=TenantLimits(weight=2.0),
        ),
        Tenant(name="base", rate=4, end=5, prompt=(1, 200), answer=(1, 200)),
    ]


def drop_some(simulator: Simulator, tenants: list[Tenant], numbers: random.Random) -> None:
    """As if their names went to new revisions: whoever named the old ones still gets them."""
    for _ in range(20):
        tenant = numbers.choice([tenant for tenant in tenants if tenant.adapters])
        revision = numbers.choice(tenant.adapters).revision
        simulator.at(numbers.uniform(0, 5), lambda revision=revision: simulator.engine.drop(revision))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_pages", [60, 160])
def test_every_request_is_answered_once_and_right(seed, num_pages):
    tenants = mixed_tenants(seed)
    simulator = Simulator(
        make_trace(tenants, seed),
        tenants,
        num_pages=num_pages,
        costs=Costs(host_pages=60),
        max_batch_requests=16,
    )
    drop_some(simulator, tenants, random.Random(seed))
    simulator.run_to_the_end()
    simulator.check_nothing_is_left()
    for served in simulator.served:
        if served.refusal is not None:
            assert isinstance(served.refusal, QueueFullError | RequestTooLargeError)
            assert served.outputs == []
        elif served.end is FinishReason.CANCELLED:
            assert served.times[-1] >= served.arrival.until
        elif isinstance(served.error, DeadlineError):
            assert served.times[-1] >= served.arrival.deadline
        elif not served.is_answered:
            assert isinstance(served.error, RequestTooLargeError)
            assert served.arrival.pinned or any(other.arrival.pinned for other in simulator.served)
    answered = sum(served.is_answered for served in simulator.served)
    assert answered > 0.3 * len(simulator.served)
    assert sum(simulator.loads.values()) > len(simulator.loads), "adapters are evicted and come back"


def test_the_tight_arena_preempts_and_the_cache_is_hit():
    """The load above is worth its name: what it is meant to bring about happens."""
    tenants = mixed_tenants(0)
    simulator = Simulator(make_trace(tenants, 0), tenants, num_pages=60, max_batch_requests=16)
    simulator.run_to_the_end()
    assert simulator.num_preempted
    assert any(served.outputs[0].cached_tokens > 40 for served in simulator.served if served.tokens)
    assert {served.end for served in simulator.served} >= {
        FinishReason.CANCELLED,
        FinishReason.FAILED,
        FinishReason.LENGTH,
    }


def test_a_request_that_can_never_fit_is_refused_at_once():
    tenant = Tenant(name="a", rate=10, end=2, prompt=(300, 500), answer=(400, 600))
    simulator = Simulator(make_trace([tenant], 0), [tenant], num_pages=50)
    simulator.run_to_the_end()
    fits = [
        -(-(len(served.arrival.prompt) + served.arrival.max_tokens - 1) // 16) <= 50
        for served in simulator.served
    ]
    assert {True, False} == set(fits)
    for served, fit in zip(simulator.served, fits, strict=True):
        assert served.is_answered == fit
        assert isinstance(served.refusal, RequestTooLargeError) == (not fit)
        if not fit:
            assert served.refusal.metadata["arena_pages"] == "50"


def test_the_same_load_takes_the_same_time_again():
    tenants = mixed_tenants(1)
    ends = []
    for _ in range(2):
        simulator = Simulator(make_trace(tenants, 1), tenants, num_pages=100)
        simulator.run_to_the_end()
        ends.append([served.times for served in simulator.served])
    assert ends[0] == ends[1]
