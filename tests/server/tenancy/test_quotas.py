from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret_server.engine.admission import TenantLimits
from turret_server.errors import QuotaExceededError
from turret_server.tenancy.quotas import Charge, Quotas
from turret_server.tenancy.tenants import Tenant


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def quotas(clock):
    return Quotas(clock)


def tenant(name: str = "acme", **limits: int) -> Tenant:
    return Tenant(name=name, limits=TenantLimits(), **limits)


def used(charge: Charge, num_generated: int) -> None:
    charge.begun, charge.num_generated = True, num_generated


def test_without_a_quota_there_is_no_end(quotas):
    for _ in range(100):
        quotas.enter(tenant(), Charge(10**6, 10**6))


def test_as_many_requests_at_once_as_the_table_says(quotas):
    acme = tenant(max_concurrent_requests=2)
    leave = [quotas.enter(acme, Charge(1, 1)) for _ in range(2)]
    with pytest.raises(QuotaExceededError, match="2 requests of tenant 'acme' wait or run") as refused:
        quotas.enter(acme, Charge(1, 1))
    assert refused.value.metadata == {"tenant": "acme", "quota": "max_concurrent_requests"}
    assert refused.value.retry_after
    quotas.enter(tenant("bolt", max_concurrent_requests=1), Charge(1, 1))
    leave[0]()
    quotas.enter(acme, Charge(1, 1))


def test_tokens_come_back_evenly_and_the_refusal_says_when(quotas, clock):
    acme = tenant(tokens_per_minute=120)
    used(first := Charge(60, 40), 40)
    quotas.enter(acme, first)()
    with pytest.raises(QuotaExceededError, match=r"20 of its 120 tokens a minute left.*are 50") as refused:
        quotas.enter(acme, Charge(30, 20))
    # 30 are missing, and 2 come a second.
    assert refused.value.retry_after == pytest.approx(15)
    assert refused.value.metadata == {"tenant": "acme", "quota": "tokens_per_minute"}
    clock.now += 14.9
    with pytest.raises(QuotaExceededError):
        quotas.enter(acme, Charge(30, 20))
    clock.now += 0.2
    quotas.enter(acme, Charge(30, 20))


def test_what_was_not_generated_is_given_back(quotas):
    acme = tenant(tokens_per_minute=100)
    charge = Charge(10, 90)
    leave = quotas.enter(acme, charge)
    with pytest.raises(QuotaExceededError):
        quotas.enter(acme, Charge(1, 1))
    used(charge, 5)
    leave()
    quotas.enter(acme, Charge(10, 75))
    with pytest.raises(QuotaExceededError):
        quotas.enter(acme, Charge(1, 0))


def test_a_request_that_never_began_costs_nothing(quotas):
    acme = tenant(tokens_per_minute=100)
    for _ in range(10):
        quotas.enter(acme, Charge(50, 50))()


def test_a_request_larger_than_a_minutes_tokens_waits_for_all_of_them_and_holds_up_the_next(quotas, clock):
    acme = tenant(tokens_per_minute=100)
    used(large := Charge(250, 50), 50)
    quotas.enter(acme, large)()
    with pytest.raises(QuotaExceededError) as refused:
        quotas.enter(acme, Charge(1, 0))
    assert refused.value.retry_after == pytest.approx(201 * 0.6)
    clock.now += 201 * 0.6 + 0.01
    quotas.enter(acme, Charge(1, 0))


def test_no_more_tokens_are_saved_than_those_of_a_minute(quotas, clock):
    acme = tenant(tokens_per_minute=100)
    used(first := Charge(1, 0), 0)
    quotas.enter(acme, first)()
    clock.now += 3600
    quotas.enter(acme, Charge(100, 0))
    with pytest.raises(QuotaExceededError):
        quotas.enter(acme, Charge(1, 0))


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.floats(0, 30)), max_size=60
    )
)
def test_never_more_tokens_than_a_minutes_and_those_that_came_back(requests):
    """Whoever waits as long as told is let in, and what is used stays below the bucket's line."""
    clock = Clock()
    quotas, acme, total, start = Quotas(clock), tenant(tokens_per_minute=120), 0.0, clock.now
    for num_prompt, max_tokens, share, pause in requests:
        charge = Charge(num_prompt, max_tokens)
        try:
            leave = quotas.enter(acme, charge)
        except QuotaExceededError as refused:
            clock.now += (refused.retry_after or 0) + 1e-6
            leave = quotas.enter(acme, charge)
        used(charge, int(share * max_tokens))
        total += charge.num_used
        assert total <= 120 + (clock.now - start) * 2 + 1e-3
        leave()
        clock.now += pause
