from __future__ import annotations

import contextlib
from contextlib import ExitStack

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


def begin(quotas: Quotas, tenant: Tenant, num_prompt: int, max_tokens: int) -> tuple[Charge, ExitStack]:
    """A request that the engine has accepted, and what ends it."""
    end = ExitStack()
    charge = end.enter_context(quotas.charge(tenant, num_prompt, max_tokens))
    charge.begin()
    return charge, end


def run(quotas: Quotas, tenant: Tenant, num_prompt: int, max_tokens: int, num_generated: int) -> None:
    """A request from its begin to its end."""
    charge, end = begin(quotas, tenant, num_prompt, max_tokens)
    charge.num_generated = num_generated
    end.close()


def test_without_a_quota_there_is_no_limit(quotas):
    held = [begin(quotas, tenant(), 10**6, 10**6) for _ in range(100)]
    assert len(held) == 100


def test_as_many_requests_at_once_as_the_table_says(quotas):
    acme = tenant(max_concurrent_requests=2)
    held = [begin(quotas, acme, 1, 1) for _ in range(2)]
    with pytest.raises(QuotaExceededError, match="may have 2 requests at once") as refused:
        begin(quotas, acme, 1, 1)
    assert refused.value.metadata == {"tenant": "acme", "quota": "max_concurrent_requests"}
    assert refused.value.retry_after
    held.append(begin(quotas, tenant("bolt", max_concurrent_requests=1), 1, 1))
    held[0][1].close()
    held.append(begin(quotas, acme, 1, 1))
    with pytest.raises(QuotaExceededError):
        begin(quotas, acme, 1, 1)


def test_tokens_come_back_evenly_and_the_refusal_says_when(quotas, clock):
    acme = tenant(tokens_per_minute=120)
    run(quotas, acme, 60, 40, 40)
    with pytest.raises(QuotaExceededError, match=r"20 of its 120 tokens a minute left.*are 50") as refused:
        begin(quotas, acme, 30, 20)
    # 30 are missing, and 2 come a second.
    assert refused.value.retry_after == pytest.approx(15)
    assert refused.value.metadata == {"tenant": "acme", "quota": "tokens_per_minute"}
    clock.now += 14.9
    with pytest.raises(QuotaExceededError):
        begin(quotas, acme, 30, 20)
    clock.now += 0.2
    run(quotas, acme, 30, 20, 20)


def test_what_was_not_generated_is_given_back(quotas):
    acme = tenant(tokens_per_minute=100)
    charge, end = begin(quotas, acme, 10, 90)
    with pytest.raises(QuotaExceededError):
        begin(quotas, acme, 1, 1)
    charge.num_generated = 5
    end.close()
    held = begin(quotas, acme, 10, 75)
    with pytest.raises(QuotaExceededError):
        begin(quotas, acme, 1, 0)
    held[1].close()


def test_a_request_that_never_began_costs_nothing(quotas):
    acme = tenant(tokens_per_minute=100)
    for _ in range(10):
        with quotas.charge(acme, 50, 50):
            pass


def test_a_request_that_fails_gives_back_what_it_did_not_generate(quotas):
    acme = tenant(tokens_per_minute=100, max_concurrent_requests=1)
    with contextlib.suppress(RuntimeError), quotas.charge(acme, 50, 50) as charge:
        charge.begin()
        raise RuntimeError
    run(quotas, acme, 50, 0, 0)


def test_a_request_larger_than_a_minutes_tokens_waits_for_all_of_them_and_holds_up_the_next(quotas, clock):
    acme = tenant(tokens_per_minute=100)
    run(quotas, acme, 250, 50, 50)
    with pytest.raises(QuotaExceededError) as refused:
        begin(quotas, acme, 1, 0)
    assert refused.value.retry_after == pytest.approx(201 * 0.6)
    clock.now += 201 * 0.6 + 0.01
    run(quotas, acme, 1, 0, 0)


def test_no_more_tokens_are_saved_than_those_of_a_minute(quotas, clock):
    acme = tenant(tokens_per_minute=100)
    run(quotas, acme, 1, 0, 0)
    clock.now += 3600
    run(quotas, acme, 100, 0, 0)
    with pytest.raises(QuotaExceededError):
        begin(quotas, acme, 1, 0)


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
        try:
            charge, end = begin(quotas, acme, num_prompt, max_tokens)
        except QuotaExceededError as refused:
            clock.now += (refused.retry_after or 0) + 1e-6
            charge, end = begin(quotas, acme, num_prompt, max_tokens)
        charge.num_generated = int(share * max_tokens)
        end.close()
        total += charge.num_used
        assert total <= 120 + (clock.now - start) * 2 + 1e-3
        clock.now += pause


def test_without_a_quota_of_tokens_none_are_owed_when_there_is_one(quotas):
    run(quotas, tenant(max_concurrent_requests=5), 10**6, 10, 10)
    _, end = begin(quotas, tenant(tokens_per_minute=100, max_concurrent_requests=5), 50, 50)
    end.close()
