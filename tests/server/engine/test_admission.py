from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fake_device import make_run
from support.guarded import guard
from turret_server.engine.admission import Admission, TenantLimits
from turret_server.errors import QueueFullError


def request(tokens: int = 10, tenant: str = "a"):
    """One of so many tokens, half of which it may generate."""
    return make_run(range(tokens - tokens // 2), max_tokens=tokens // 2, tenant=tenant).job


def admission(max_requests: int = 3, max_tokens: int = 1000) -> Admission:
    limits = TenantLimits(max_queued_requests=max_requests, max_queued_tokens=max_tokens)
    return Admission(lambda _: limits)


def refusal(queue: Admission, asked) -> QueueFullError:
    with pytest.raises(QueueFullError) as refused:
        queue.enter(asked)
    return refused.value


def test_so_many_requests_may_wait_and_no_more():
    queue = admission()
    entered = [request() for _ in range(3)]
    for one in entered:
        queue.enter(one)
    error = refusal(queue, request())
    assert "the queue of tenant 'a' is full (limit 3 requests)" in str(error)
    assert error.metadata["tenant"] == "a"
    assert queue.num_queued == 3
    queue.leave(entered[0])
    queue.enter(request())


def test_so_many_tokens_may_wait_and_no_more():
    queue = admission(max_tokens=100)
    queue.enter(request(60))
    error = refusal(queue, request(41))
    said = "the queue of tenant 'a' is full (limit 100 tokens): 60 are queued and this request has 41"
    assert said in str(error)
    queue.enter(request(40))
    assert queue.num_queued == 2


def test_the_tokens_of_one_that_leaves_make_room():
    queue = admission(max_tokens=100)
    first, second = request(60), request(40)
    queue.enter(first)
    queue.enter(second)
    queue.leave(first)
    queue.enter(request(60))


def test_one_that_is_larger_than_the_queue_may_wait_alone():
    queue = admission(max_tokens=100)
    large = request(500)
    queue.enter(large)
    refusal(queue, request(2))
    queue.leave(large)
    queue.enter(request(2))
    refusal(queue, large)


def test_tenants_have_queues_of_their_own():
    queue = admission(max_requests=1)
    queue.enter(request(tenant="a"))
    refusal(queue, request(tenant="a"))
    queue.enter(request(tenant="b"))
    assert queue.num_queued == 2


def test_each_tenant_has_its_own_limits():
    limits = {"a": TenantLimits(max_queued_requests=1), "b": TenantLimits(max_queued_requests=2)}
    queue = Admission(limits.__getitem__)
    for tenant in "ab":
        for _ in range(limits[tenant].max_queued_requests):
            queue.enter(request(tenant=tenant))
        refusal(queue, request(tenant=tenant))


def test_the_hint_of_a_full_queue_is_how_long_the_next_running_job_takes():
    queue = admission(max_requests=2)
    for _ in range(2):
        queue.enter(request(20))
    queue.record_step([70, 30, 50], 0.1)
    assert refusal(queue, request()).retry_after == pytest.approx(3.0)
    assert "try again in 3.0 s" in str(refusal(queue, request()))


def test_the_hint_knows_that_others_wait_too():
    queue = admission(max_requests=1)
    for tenant in "abc":
        queue.enter(request(20, tenant))
    queue.record_step([30, 50, 70, 90], 0.1)
    assert refusal(queue, request()).retry_after == pytest.approx(7.0)


def test_the_hint_counts_those_that_must_leave_for_their_tokens():
    """40 tokens too many, in jobs of 20: the second end makes room, after the queued ones on one slot."""
    queue = admission(max_requests=10, max_tokens=100)
    for _ in range(4):
        queue.enter(request(20))
    queue.record_step([30, 50], 0.1)
    assert refusal(queue, request(60)).retry_after == pytest.approx(5.0)
    queue.record_step([30], 0.1)
    assert refusal(queue, request(60)).retry_after == pytest.approx((30 + 20) * 0.1)
    assert refusal(queue, request(21)).retry_after == pytest.approx(3.0)


def test_the_hint_waits_for_the_limit_that_takes_longer():
    """Requests and tokens are both at their limit: one request more, but 40 tokens too many."""
    queue = admission(max_requests=2, max_tokens=100)
    for tokens in (20, 40):
        queue.enter(request(tokens))
    queue.record_step([10, 20], 1.0)
    assert refusal(queue, request(80)).retry_after == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("remaining", "seconds", "expected"),
    [(None, 0.0, 1.0), ([], 0.1, 1.0), ([1], 1e-9, 0.1), ([10], 1e3, 60.0)],
    ids=["unknown", "nothing runs", "fast", "slow"],
)
def test_the_hint_is_never_foolish(remaining, seconds, expected):
    queue = admission(max_requests=1)
    if remaining is not None:
        queue.record_step(remaining, seconds)
    queue.enter(request())
    assert refusal(queue, request()).retry_after == pytest.approx(expected)


def test_the_time_of_a_step_follows_what_is_measured():
    queue = admission(max_requests=1)
    queue.enter(request())
    for seconds in [0.5] * 50 + [0.1] * 200:
        queue.record_step([10], seconds)
    assert refusal(queue, request()).retry_after == pytest.approx(1.0, rel=0.05)


def test_one_slow_step_changes_it_a_little():
    queue = admission(max_requests=1)
    queue.enter(request())
    for seconds in (0.1, 0.1, 1.0):
        queue.record_step([10], seconds)
    assert 1.0 < refusal(queue, request()).retry_after < 2.0


def test_one_that_never_came_cannot_leave():
    with pytest.raises(KeyError):
        admission().leave(request())


@settings(max_examples=200, deadline=None)
@given(
    events=st.lists(st.tuples(st.sampled_from("ab"), st.integers(2, 60), st.booleans()), max_size=60),
    max_requests=st.integers(1, 4),
    max_tokens=st.integers(1, 100),
)
def test_the_counts_are_those_of_who_waits(events, max_requests, max_tokens):
    queue = admission(max_requests, max_tokens)
    waiting = []
    for tenant, tokens, leaves in events:
        if leaves and waiting:
            queue.leave(waiting.pop(tokens % len(waiting)))
        asked = request(tokens, tenant)
        mine = [one.num_tokens for one in waiting if one.tenant == tenant]
        fits = len(mine) < max_requests and (not mine or sum(mine) + tokens <= max_tokens)
        if fits:
            queue.enter(asked)
            waiting.append(asked)
        else:
            refusal(queue, asked)
        assert queue.num_queued == len(waiting)


def test_many_threads_may_enter_and_leave():
    queue = admission(max_requests=10**6, max_tokens=10**9)

    def come_and_go() -> None:
        for _ in range(200):
            one = request()
            queue.enter(one)
            queue.leave(one)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queue.num_queued == 0


def test_the_counts_are_read_and_written_under_their_lock():
    queue = admission(max_requests=1)
    guard(queue, queue._lock.locked, "_queued")
    queue.record_step([10], 1.0)
    one = request()
    queue.enter(one)
    refusal(queue, request())
    assert queue.num_queued == 1
    queue.leave(one)
    assert queue._lock.acquire(blocking=False), "also a refusal unlocks it"
