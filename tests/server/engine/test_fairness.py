from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fake_device import make_run
from turret_server.engine.fairness import GENERATED_COST, FairQueue
from turret_server.engine.sequence import HEAD_START_SECONDS, Sequence


def queue_of(**weights: float) -> FairQueue:
    return FairQueue(lambda tenant: weights.get(tenant, 1.0))


def waiting(
    queue: FairQueue, tenant: str, *, arrival: float = 0.0, tokens: int = 4, priority: int = 0
) -> Sequence:
    sequence = Sequence.of(make_run(range(tokens), tenant=tenant, priority=priority).job, arrival)
    queue.add(sequence)
    return sequence


def tenants(queue: FairQueue, count: int = 100) -> str:
    return "".join(sequence.tenant for sequence in itertools.islice(queue.in_order([]), count))


def test_requests_of_one_tenant_come_in_the_order_of_their_arrival():
    queue = queue_of()
    late, early = waiting(queue, "a", arrival=2.0), waiting(queue, "a", arrival=1.0)
    assert list(queue.in_order([])) == [early, late]
    assert len(queue) == 2
    assert set(queue) == {early, late}


def test_requests_that_arrive_at_once_come_in_the_order_of_their_ids():
    queue = queue_of()
    sequences = [waiting(queue, "a") for _ in range(5)]
    assert list(queue.in_order([])) == sequences


def test_a_priority_is_a_head_start():
    queue = queue_of()
    low = waiting(queue, "a", arrival=0.0)
    soon = waiting(queue, "a", arrival=HEAD_START_SECONDS - 1, priority=1)
    late = waiting(queue, "a", arrival=HEAD_START_SECONDS + 1, priority=1)
    assert list(queue.in_order([])) == [soon, low, late]


def test_a_priority_does_not_count_against_other_tenants():
    queue = queue_of()
    waiting(queue, "a", priority=9)
    waiting(queue, "b", arrival=1000.0)
    queue.charge("a", 100.0)
    queue.charge("b", 50.0)
    assert tenants(queue) == "ba"


def test_tenants_take_turns_although_one_asked_for_everything_first():
    queue = queue_of()
    for _ in range(4):
        waiting(queue, "a")
    for _ in range(4):
        waiting(queue, "b", arrival=1.0)
    assert tenants(queue) == "abababab"


def test_turns_go_by_cost_and_weight():
    queue = queue_of(c=2.0)
    for _ in range(12):
        waiting(queue, "a", tokens=8)
        waiting(queue, "b", tokens=16)
        waiting(queue, "c", tokens=8)
    assert Counter(tenants(queue, 21)) == {"a": 6, "b": 3, "c": 12}


def test_the_shortest_prompt_costs_as_much_as_the_token_that_it_generates():
    queue = queue_of()
    for _ in range(4):
        waiting(queue, "a", tokens=1)
        waiting(queue, "b", tokens=int(GENERATED_COST))
    assert tenants(queue) == "abababab"


def test_the_tenant_that_was_given_least_is_first():
    queue = queue_of(b=2.0)
    for tenant in "ab":
        for _ in range(6):
            waiting(queue, tenant)
    queue.charge("a", 8.0)
    queue.charge("b", 8.0)
    assert (queue.counter("a"), queue.counter("b")) == (8.0, 4.0)
    assert tenants(queue, 3) == "bba"


def test_nothing_is_saved_up_by_not_asking():
    queue = queue_of()
    waiting(queue, "a")
    queue.charge("a", 1000.0)
    waiting(queue, "b")
    assert queue.counter("b") == 1000.0


def test_what_a_tenant_owes_is_not_forgotten_while_it_asks_for_nothing():
    queue = queue_of()
    first = waiting(queue, "a")
    waiting(queue, "b")
    queue.remove(first)
    queue.charge("a", 50.0)
    waiting(queue, "a")
    assert queue.counter("a") == 50.0
    assert tenants(queue) == "ba"


def test_a_newcomer_stands_where_the_last_who_waited_stood():
    queue = queue_of()
    only = waiting(queue, "a")
    queue.charge("a", 70.0)
    queue.remove(only)
    assert queue.counter("never seen") == 70.0
    waiting(queue, "b")
    assert queue.counter("b") == 70.0


def test_all_is_forgotten_once_nobody_is_there():
    queue = queue_of()
    only = waiting(queue, "a")
    queue.charge("a", 70.0)
    queue.remove(only)
    queue.reset()
    assert queue.counter("a") == 0.0


def test_of_tenants_without_a_job_those_who_were_given_least_are_forgotten(monkeypatch):
    monkeypatch.setattr("turret_server.engine.fairness.MAX_IDLE_TENANTS", 2)
    queue = queue_of()
    for cost, tenant in enumerate(("active", "little", "more", "most")):
        queue.charge(tenant, float(cost))
    queue.forget_idle({"active"})
    assert set(queue._counters) == {"active", "more", "most"}
    queue.forget_idle({"active"})
    assert len(queue._counters) == 3


def test_started_prompts_come_before_what_their_tenant_has_waiting():
    queue = queue_of()
    older = waiting(queue, "a")
    started = Sequence.of(make_run(range(4), tenant="a").job, 5.0)
    other = Sequence.of(make_run(range(4), tenant="b").job, 9.0)
    assert list(queue.in_order([started, other])) == [started, other, older]


def test_what_is_given_out_may_be_removed():
    queue = queue_of()
    sequences = [waiting(queue, tenant, arrival=index) for index, tenant in enumerate("aababb")]
    seen = []
    for sequence in queue.in_order([]):
        seen.append(sequence)
        queue.remove(sequence)
    assert len(seen) == len(set(seen)) == len(sequences)
    assert len(queue) == 0
    assert list(queue.in_order([])) == []


def test_one_that_does_not_wait_cannot_be_removed():
    queue = queue_of()
    waiting(queue, "a")
    with pytest.raises(AssertionError):
        queue.remove(Sequence.of(make_run([1], tenant="a").job, -1.0))


COSTS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 10)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    loads=st.lists(st.tuples(st.sampled_from([0.5, 1.0, 3.0]), COSTS), min_size=2, max_size=4),
    num_slots=st.integers(1, 4),
)
def test_tenants_that_keep_asking_stay_within_what_their_running_requests_are_owed(loads, num_slots):
    """Each tenant has a weight and the (prompt, answer) lengths of its requests, over and over again."""
    weights = {str(index): weight for index, (weight, _) in enumerate(loads)}
    shapes = {str(index): itertools.cycle(costs) for index, (_, costs) in enumerate(loads)}
    queue = FairQueue(weights.__getitem__)
    left: dict[Sequence, int] = {}
    owed = {}

    def ask(tenant: str) -> None:
        prompt, owed_tokens = next(shapes[tenant])
        owed[waiting(queue, tenant, tokens=prompt)] = owed_tokens

    for tenant in weights:
        ask(tenant)
        ask(tenant)
    bound = num_slots * max(
        (prompt + GENERATED_COST * answer) / weight for weight, costs in loads for prompt, answer in costs
    )
    for _ in range(100):
        for sequence in queue.in_order([]):
            if len(left) == num_slots:
                break
            queue.remove(sequence)
            queue.charge(sequence.tenant, len(sequence.tokens))
            left[sequence] = owed[sequence]
            ask(sequence.tenant)
        for sequence in list(left):
            queue.charge(sequence.tenant, GENERATED_COST)
            left[sequence] -= 1
            if not left[sequence]:
                del left[sequence]
        counters = [queue.counter(tenant) for tenant in weights]
        assert max(counters) - min(counters) <= bound + 1e-6


@settings(max_examples=100, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 50), st.integers(0, 2)), max_size=20),
    data=st.data(),
)
def test_the_order_holds_everybody_once_and_each_tenant_in_its_own(arrivals, data):
    queue = queue_of()
    sequences = [waiting(queue, tenant, arrival=at, priority=priority) for tenant, at, priority in arrivals]
    gone = data.draw(st.sets(st.sampled_from(sequences))) if sequences else set()
    for sequence in gone:
        queue.remove(sequence)
    ordered = list(queue.in_order([]))
    assert len(ordered) == len(set(ordered)) == len(queue)
    assert set(ordered) == set(sequences) - gone
    for tenant in "abc":
        orders = [sequence.order for sequence in ordered if sequence.tenant == tenant]
        assert orders == sorted(orders)


def test_a_lead_is_over_those_of_whom_nothing_runs_though_they_wait_with_their_adapters_loaded():
    queue = queue_of()
    first = {tenant: waiting(queue, tenant) for tenant in ("loading", "ready", "behind", "running")}
    for tenant, cost in (("ahead", 100.0), ("loading", 10.0), ("ready", 40.0), ("behind", 30.0)):
        queue.charge(tenant, cost)
    assert queue.lead("ahead", {"ahead"}) == -math.inf
    for tenant in ("ready", "behind", "running"):
        first[tenant].job.times.found_adapters(0.0)
    assert queue.lead("ahead", {"ahead", "running"}) == 70.0
