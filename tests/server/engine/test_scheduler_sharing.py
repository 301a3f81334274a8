"""Who is served in which order and at whose cost: tenants, priorities, pinned prompts, salts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fake_device import Simulation, make_run, make_spec
from turret_server.engine import scheduler
from turret_server.engine.fairness import GENERATED_COST, YIELD_COST
from turret_server.engine.request import FinishReason
from turret_server.engine.sequence import Sequence
from turret_server.errors import GenerationFailedError, RequestTooLargeError

LORA = make_spec("lora", slab_pages=2)


def lengths(step):
    return {part.sequence_id: len(part.token_ids) for part in step.sequences}


def finished(*runs):
    return all(run.end in (FinishReason.LENGTH, FinishReason.STOP) for run in runs)


def step_until(simulation, condition):
    steps = []
    while not condition():
        steps.append(simulation.step())
        assert len(steps) < 200
    return [step for step in steps if step]


# Tenants and priorities


def starts(simulation, *, num_steps=200):
    """Requests in the order in which they leave the queue."""
    for _ in range(num_steps):
        simulation.step()
    by_id = {run.job.request_id: run for run in simulation.runs}
    return [by_id[request_id] for request_id in simulation.started]


def test_tenants_take_turns_although_one_asked_for_everything_first():
    simulation = Simulation(max_batch_requests=1)
    for _ in range(4):
        simulation.submit([1, 2], tenant="a", max_tokens=2)
    for _ in range(4):
        simulation.submit([3, 4], tenant="b", max_tokens=2)
    assert "".join(run.job.tenant for run in starts(simulation)) == "abababab"


def test_a_tenant_with_three_times_the_weight_gets_three_times_as_much():
    simulation = Simulation(max_batch_requests=2, weights={"b": 3.0})
    for _ in range(20):
        for tenant in "ab":
            simulation.submit([1, 2], tenant=tenant, max_tokens=2)
    tenants = "".join(run.job.tenant for run in starts(simulation))
    assert tenants[:20].count("b") == pytest.approx(15, abs=1)


def test_prompts_of_two_tenants_get_on_by_turns():
    """A step goes to the one that was given less, so neither waits for the whole prompt of the other."""
    simulation = Simulation(max_batch_tokens=8)
    long = [
        simulation.submit(range(first, first + 24), tenant=tenant) for first, tenant in ((0, "a"), (50, "b"))
    ]
    served = [next(iter(lengths(simulation.step()))) for _ in range(4)]
    assert served[:2] == [run.job.request_id for run in long]
    assert served[2] != served[3]


def test_what_is_found_in_the_cache_costs_nothing():
    simulation = Simulation()
    for _ in range(2):
        simulation.submit(range(9), max_tokens=1)
        before = simulation.scheduler.waiting.counter("default")
        simulation.step()
    assert simulation.scheduler.waiting.counter("default") - before == 1 + 2


def test_what_is_computed_again_is_charged_once():
    simulation = Simulation(num_pages=6, block_size=2)
    runs = [
        simulation.submit([1], tenant="a", max_tokens=9),
        simulation.submit([2, 3, 4, 5], tenant="b", max_tokens=7),
    ]
    step_until(simulation, lambda: simulation.scheduler.num_preempted)
    while runs[1].end is None:
        counter = simulation.scheduler.waiting.counter("b")
        simulation.step()
    assert counter + 2 == 4 + 2 * 7


def test_a_higher_priority_passes_those_of_its_tenant_that_came_a_while_before():
    simulation = Simulation(max_batch_requests=1)
    low = simulation.submit([1])
    simulation.step()
    waits = simulation.submit([1])
    simulation.now = 9.0
    urgent = simulation.submit([1], priority=1)
    simulation.now = 11.0
    too_late = simulation.submit([1], priority=1)
    assert starts(simulation) == [low, urgent, waits, too_late]


def test_a_priority_takes_nothing_from_another_tenant():
    simulation = Simulation(max_batch_requests=1)
    for _ in range(4):
        simulation.submit([1, 2], tenant="a", priority=0)
    for _ in range(4):
        simulation.submit([1, 2], tenant="b", priority=5)
    assert "".join(run.job.tenant for run in starts(simulation)) == "abababab"


def test_the_tenant_that_was_given_most_gives_way():
    simulation = Simulation(num_pages=8, block_size=1)
    greedy = [simulation.submit([token], tenant="greedy", max_tokens=8) for token in (1, 2)]
    for _ in range(2):
        simulation.step()
    modest = simulation.submit([3], tenant="modest", max_tokens=5)
    step_until(simulation, lambda: simulation.scheduler.num_preempted)
    [gone] = simulation.scheduler.waiting
    assert gone.job.request_id in {run.job.request_id for run in greedy}
    simulation.finish()
    assert finished(modest, *greedy)


def test_a_tenant_of_which_nothing_runs_gets_a_slot_once_the_others_are_ahead():
    simulation = Simulation(num_pages=200, max_batch_requests=4)
    heavy = [simulation.submit([token], tenant="heavy", max_tokens=150) for token in range(6)]
    for _ in range(3):
        simulation.step()
    light = [simulation.submit([9, token], tenant="light", max_tokens=20) for token in range(2)]
    steps = step_until(simulation, lambda: light[0].tokens)
    # The heavy tenant is charged for four tokens in a step, and the light one starts from its counter.
    assert len(steps) == YIELD_COST / (4 * GENERATED_COST) + 1
    assert simulation.scheduler.num_preempted == 1
    assert not light[1].tokens, "others give way to the first of a tenant only"
    running = [sequence.tenant for sequence in simulation.scheduler.running]
    assert sorted(running) == ["heavy"] * 3 + ["light"]
    simulation.finish()
    assert finished(*heavy, *light)


def test_a_tenant_that_is_not_ahead_does_not_give_way():
    simulation = Simulation(num_pages=200, max_batch_requests=2)
    runs = [
        simulation.submit([1], tenant="a", max_tokens=60),
        simulation.submit([2], tenant="a", max_tokens=4),
    ]
    simulation.step()
    late = simulation.submit([3], tenant="b", max_tokens=4)
    steps = step_until(simulation, lambda: late.tokens)
    assert len(steps) == 4, "a slot is free when the short one ends"
    assert not any(sequence.num_preempted for sequence in simulation.scheduler.sequences)
    simulation.finish()
    assert finished(late, *runs)


def test_nobody_gives_way_while_a_slot_is_free_or_the_adapter_is_loaded():
    simulation = Simulation(num_pages=200, max_batch_requests=2, immediate=False)
    heavy = [simulation.submit([token], tenant="heavy", max_tokens=150) for token in range(3)]
    waits = simulation.submit([9], LORA, tenant="light")
    for _ in range(int(YIELD_COST)):
        simulation.step()
        assert not simulation.scheduler.num_preempted
    simulation.device.complete()
    step_until(simulation, lambda: waits.tokens)
    assert simulation.scheduler.num_preempted == 1
    simulation.finish()
    assert finished(waits, *heavy)


def test_pages_are_given_up_for_a_tenant_of_which_nothing_runs():
    simulation = Simulation(num_pages=40, block_size=4, max_batch_requests=8)
    heavy = [simulation.submit(range(60), tenant="heavy", max_tokens=60) for _ in range(2)]
    for _ in range(10):
        simulation.step()
    light = simulation.submit(range(100, 140), tenant="light", max_tokens=20)
    steps = step_until(simulation, lambda: light.tokens)
    assert len(steps) <= YIELD_COST / GENERATED_COST + 2
    simulation.finish()
    assert finished(light, *heavy)


def test_prompts_of_two_tenants_that_do_not_fit_together_are_computed_once():
    simulation = Simulation(num_pages=110, block_size=4, max_batch_tokens=32)
    runs = [
        simulation.submit(range(1000 * index, 1000 * index + 400), tenant="ab"[index % 2], max_tokens=8)
        for index in range(4)
    ]
    steps = step_until(simulation, lambda: finished(*runs))
    assert sum(step.num_tokens for step in steps) <= 4 * (400 + 8)


ARRIVALS = st.tuples(st.integers(0, 10), st.sampled_from("abcd"), st.sampled_from([1, 10, 50]))


@settings(max_examples=40, deadline=None)
@given(
    arrivals=st.lists(ARRIVALS, min_size=2, max_size=8),
    weights=st.fixed_dictionaries(dict.fromkeys("abcd", st.sampled_from([0.5, 1.0, 2.0]))),
    slots=st.integers(1, 4),
)
def test_a_tenant_that_is_not_ahead_gets_a_slot_within_the_bound(arrivals, weights, slots):
    """YIELD_COST · w / GENERATED_COST + 1 steps for each tenant that waits likewise."""
    simulation = Simulation(num_pages=400, max_batch_requests=slots, weights=weights)
    yield_cost, waited = 8 * GENERATED_COST, Counter()
    bound = (yield_cost / GENERATED_COST * max(weights.values()) + 1) * len(weights)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scheduler, "YIELD_COST", yield_cost)
        for gap, tenant, max_tokens in [*arrivals, (1000, "a", 1)]:
            for _ in range(gap):
                if not simulation.step():
                    break
                running = {sequence.tenant for sequence in simulation.scheduler.running}
                counter = simulation.scheduler.waiting.counter
                least = min(map(counter, running), default=0.0)
                idle = {sequence.tenant for sequence in simulation.scheduler.waiting} - running
                waited = Counter({tenant: waited[tenant] + 1 for tenant in idle if counter(tenant) <= least})
                assert max(waited.values(), default=0) <= bound
            simulation.submit([len(simulation.runs)], tenant=tenant, max_tokens=max_tokens)
        simulation.finish()


def test_of_a_tenants_requests_the_one_with_the_least_to_compute_again_gives_way():
    simulation = Simulation(num_pages=11, block_size=1)
    short, long = simulation.submit([1], max_tokens=5), simulation.submit(range(6), max_tokens=5)
    step_until(simulation, lambda: simulation.scheduler.num_preempted)
    [gone] = simulation.scheduler.waiting
    assert gone.job is short.job
    simulation.finish()
    assert finished(long, short)


def test_for_a_slot_the_one_gives_way_whose_last_block_is_the_least_filled():
    simulation = Simulation(num_pages=200, block_size=16, max_batch_requests=3)
    heavy = [
        simulation.submit(range(100 * n, 100 * n + n), tenant="heavy", max_tokens=150) for n in (7, 20, 13)
    ]
    simulation.step()
    light = simulation.submit([9], tenant="light")
    before = step_until(simulation, lambda: simulation.scheduler.num_preempted)
    # Each computed its prompt in the first step, and a token in each one up to that of the preemption.
    remainders = [(n + len(before) - 1) % 16 for n in (7, 20, 13)]
    [gone] = simulation.scheduler.waiting
    assert gone.job is heavy[remainders.index(min(remainders))].job
    step_until(simulation, lambda: finished(light))
    [resumed] = [part for part in simulation.step().sequences if part.sequence_id == gone.job.request_id]
    assert len(resumed.token_ids) == min(remainders) + 1
    simulation.finish()
    assert finished(*heavy)


def test_one_that_gave_way_is_spared_the_next_time():
    simulation = Simulation(num_pages=11, block_size=1)
    short, long = simulation.submit([1], max_tokens=5), simulation.submit(range(6), max_tokens=5)
    step_until(simulation, lambda: simulation.scheduler.num_preempted)
    [gone] = simulation.scheduler.waiting
    assert gone.job is short.job
    assert gone.num_preempted == 1
    simulation.finish()
    [first, second] = [Sequence.of(run.job) for run in (simulation.submit([1]), simulation.submit(range(6)))]
    first.num_preempted, second.num_computed = 1, 6
    simulation.scheduler.running += [first, second]
    assert simulation.scheduler._victim(simulation.scheduler.running) is second
    simulation.scheduler.running.clear()
    simulation.finish()
    assert finished(long)


def test_chunks_that_are_computed_again_are_charged_once():
    simulation = Simulation(max_batch_tokens=3)
    run = simulation.submit(range(6), max_tokens=2)
    step_until(simulation, lambda: run.tokens)
    simulation.scheduler._preempt(simulation.scheduler.running[0])
    while simulation.cache.num_idle:
        simulation.cache.evict()
    assert len(step_until(simulation, lambda: run.end)) == 3
    assert simulation.scheduler.waiting.counter("default") == 6 + 2 * 2


def test_a_cold_adapter_holds_up_no_other_tenant():
    simulation = Simulation(immediate=False)
    cold = [simulation.submit([1], make_spec(f"r{index}", slab_pages=1), tenant="a") for index in range(12)]
    warm = simulation.submit([1], tenant="b")
    simulation.step()
    assert len(warm.tokens) == 1
    simulation.finish()
    assert finished(*cold)


# Pinned prompts and salts


def test_a_pinned_prompt_generates_nothing_and_is_found_for_ever():
    simulation = Simulation(num_pages=12)
    pinned = simulation.submit(range(8), pinned=True)
    simulation.finish()
    assert [output.finish_reason for output in pinned.outputs] == [FinishReason.PINNED]
    for start in range(100, 200, 10):
        simulation.submit(range(start, start + 12), max_tokens=4)
    simulation.finish()
    found = simulation.submit([*range(8), 9])
    simulation.finish()
    assert found.outputs[0].cached_tokens == 8
    simulation.check_nothing_is_left()


def test_a_pinned_prompt_keeps_its_adapter_resident():
    simulation = Simulation(num_pages=12)
    simulation.submit(range(8), LORA, pinned=True)
    simulation.finish()
    for index in range(6):
        simulation.submit([index], make_spec(f"r{index}", slab_pages=4))
    simulation.finish()
    assert simulation.residency.get("lora")
    simulation.scheduler.drop("lora")
    assert simulation.residency.get("lora") is None
    simulation.check_nothing_is_left()


def test_one_that_no_longer_fits_beside_a_pinned_prompt_fails_when_it_is_taken_in():
    simulation = Simulation(num_pages=8)
    late = make_run(range(100, 128), max_tokens=1)
    assert simulation.fits(late)
    simulation.submit(range(8), pinned=True)
    simulation.finish()
    simulation.scheduler.add(Sequence.of(late.job))
    assert isinstance(late.error, RequestTooLargeError)
    simulation.check()


def test_a_prompt_is_not_pinned_at_the_cost_of_one_that_waits():
    simulation = Simulation(num_pages=8, max_batch_requests=1)
    pinned = simulation.submit(range(8), pinned=True)
    waits = simulation.submit(range(100, 128), max_tokens=1)
    simulation.finish()
    assert isinstance(pinned.error, RequestTooLargeError)
    assert finished(waits)


def test_what_was_found_at_the_first_start_counts_as_cached_however_often_it_starts():
    simulation = Simulation(num_pages=6, block_size=2)
    runs = [
        simulation.submit([1], tenant="a", max_tokens=9),
        simulation.submit([2, 3, 4, 5], tenant="b", max_tokens=7),
    ]
    step_until(simulation, lambda: simulation.scheduler.num_preempted)
    simulation.finish()
    assert {output.cached_tokens for run in runs for output in run.outputs} == {0}


def test_a_prompt_may_be_pinned_although_it_takes_all_that_may_be_pinned_itself():
    """It is no obstacle to itself: neither is what it shares with others in the queue."""
    simulation = Simulation(num_pages=8)
    pinned = simulation.submit(range(16), pinned=True)
    waits = simulation.submit(range(50, 66), max_tokens=1)
    simulation.finish()
    assert pinned.end is FinishReason.PINNED
    assert finished(waits)


def test_of_two_prompts_that_cannot_both_be_pinned_the_first_is():
    simulation = Simulation(num_pages=8)
    first, second = (simulation.submit(range(start, start + 12), pinned=True) for start in (0, 50))
    simulation.finish()
    assert first.end is FinishReason.PINNED
    assert isinstance(second.error, RequestTooLargeError)


def test_a_prompt_that_is_cancelled_before_it_is_pinned_is_let_go():
    simulation = Simulation(max_batch_tokens=4)
    pinned = simulation.submit(range(8), pinned=True)
    simulation.step()
    simulation.cancel(pinned)
    assert pinned.end is FinishReason.CANCELLED
    simulation.check_nothing_is_left()


def test_a_prompt_whose_logits_are_not_finite_is_not_pinned():
    simulation = Simulation()
    pinned = simulation.submit(range(8), pinned=True)
    simulation.step(lambda _: {pinned.job.request_id: "NaN"})
    assert isinstance(pinned.error, GenerationFailedError)
    assert not simulation.scheduler.allocation.is_prompt_pinned(pinned.job.request_id)
    assert simulation.cache.pages == ()


def test_blocks_are_not_shared_across_salts():
    simulation = Simulation()
    for salt, cached in [("", 0), ("x", 0), ("y", 0), ("x", 8), ("", 8)]:
        run = simulation.submit(range(9), LORA, cache_salt=salt, max_tokens=1)
        simulation.finish()
        assert run.outputs[0].cached_tokens == cached
