from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from support.fake_device import Simulation, expected_tokens, make_run, make_spec
from turret_adapters.host import joined_spec
from turret_adapters.spec import PrefixKind
from turret_server.engine.request import FinishReason
from turret_server.engine.residency.residency import MAX_LOADING, Residency
from turret_server.engine.step import StepResult
from turret_server.errors import (
    AdapterUnavailableError,
    DeadlineError,
    GenerationFailedError,
    ShuttingDownError,
)

BLOCK = 4
LORA = make_spec("lora", slab_pages=2)
OTHER = make_spec("other", slab_pages=2)
KINDS = pytest.mark.parametrize("kind", PrefixKind)


def prefix(num_virtual, kind=PrefixKind.KEY_VALUE, name="prefix", slab_pages=0):
    return make_spec(name, num_virtual=num_virtual, kind=kind, slab_pages=slab_pages)


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


def steps_until_idle(simulation):
    return step_until(
        simulation,
        lambda: not (simulation.scheduler.running or simulation.scheduler.waiting or simulation.inbox),
    )


def test_nothing_to_do_is_no_step():
    assert Simulation().step() is None


def test_a_prompt_is_computed_in_one_step_and_then_a_token_each():
    simulation = Simulation()
    run = simulation.submit([1, 2, 3], max_tokens=3)
    steps = steps_until_idle(simulation)
    assert [step.num_tokens for step in steps] == [3, 1, 1]
    assert run.tokens == expected_tokens(run.job)
    assert run.end is FinishReason.LENGTH


def test_a_stop_token_is_the_last():
    simulation = Simulation()
    run = simulation.submit([1], max_tokens=9, stop_after=2)
    simulation.finish()
    assert (run.end, len(run.tokens)) == (FinishReason.STOP, 3)


def test_the_end_comes_with_the_last_token():
    simulation = Simulation()
    run = simulation.submit([1], max_tokens=2)
    simulation.finish()
    assert [output.finish_reason for output in run.outputs] == [None, FinishReason.LENGTH]


def test_long_prompts_are_computed_in_chunks_beside_running_streams():
    simulation = Simulation(max_batch_tokens=4)
    stream = simulation.submit([1], max_tokens=5)
    simulation.step()
    long = simulation.submit(range(10, 20), max_tokens=1)
    steps = [lengths(simulation.step()) for _ in range(4)]
    assert [step[stream.job.request_id] for step in steps] == [1, 1, 1, 1]
    assert [step[long.job.request_id] for step in steps] == [3, 3, 3, 1]
    assert finished(stream, long)


def test_streams_come_before_a_prompt_that_began_before_them():
    simulation = Simulation(max_batch_tokens=4, max_batch_requests=3)
    long = simulation.submit(range(30), max_tokens=1)
    simulation.step()
    simulation.scheduler.running[0].num_computed = 28
    simulation.submit([1], max_tokens=5)
    [first, *_] = simulation.scheduler.schedule(0).sequences
    assert first.sequence_id == long.job.request_id


def test_requests_start_in_their_order_within_the_limits():
    simulation = Simulation(max_batch_tokens=5, max_batch_requests=2)
    runs = [simulation.submit([1, 2], max_tokens=2) for _ in range(4)]
    ids = [run.job.request_id for run in runs]
    assert [sorted(lengths(step)) for step in steps_until_idle(simulation)] == [
        ids[:2], ids[:2], ids[2:], ids[2:],
    ]  # fmt: skip


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
@KINDS
def test_block_boundaries(max_batch_tokens, block_size, kind):
    """Virtual tokens, prompts and what is generated end before, at and after a block's end."""
    simulation = Simulation(
        num_pages=400, block_size=block_size, max_batch_tokens=max_batch_tokens, max_batch_requests=1
    )
    for num_virtual, num_prompt in itertools.product(range(6), range(1, 6)):
        adapter = prefix(num_virtual, kind, f"{num_virtual}") if num_virtual else None
        for seed in range(2):
            run = simulation.submit(range(num_prompt), adapter, max_tokens=5, seed=seed)
    simulation.finish()
    assert finished(*simulation.runs)
    assert run.outputs[0].cached_tokens
    simulation.check_nothing_is_left()


# Prefix cache


def test_a_prompt_that_came_before_is_not_computed_again():
    simulation = Simulation()
    first = simulation.submit(range(10), max_tokens=1)
    simulation.finish()
    second = simulation.submit(range(10), max_tokens=1)
    assert simulation.step().num_tokens == 2
    assert (first.outputs[0].cached_tokens, second.outputs[0].cached_tokens) == (0, 8)


def test_of_a_prompt_that_is_whole_blocks_the_last_is_computed_for_its_logits():
    simulation = Simulation()
    for _ in range(2):
        run = simulation.submit(range(8), max_tokens=1)
        step = simulation.step()
    assert step.num_tokens == 4
    assert run.outputs[0].cached_tokens == 4


def test_what_was_generated_is_found_again():
    simulation = Simulation()
    first = simulation.submit([1, 2], max_tokens=7)
    simulation.finish()
    second = simulation.submit([1, 2, *first.tokens], max_tokens=1)
    simulation.finish()
    assert second.outputs[0].cached_tokens == 8


def test_blocks_of_a_request_that_failed_are_not_found_again():
    simulation = Simulation(max_batch_tokens=4)
    failed = simulation.submit(range(8))
    simulation.step()
    simulation.step(lambda _: {failed.job.request_id: "NaN"})
    assert isinstance(failed.error, GenerationFailedError)
    again = simulation.submit(range(8))
    simulation.finish()
    assert again.outputs[0].cached_tokens == 0


def test_running_requests_share_a_beginning():
    simulation = Simulation()
    first = simulation.submit(range(8), max_tokens=9)
    simulation.step()
    second = simulation.submit([*range(8), 99], max_tokens=9)
    simulation.step()
    tables = [sequence.block_table for sequence in simulation.scheduler.running]
    assert tables[0][:2] == tables[1][:2]
    assert tables[0][2] != tables[1][2]
    simulation.cancel(first)
    simulation.finish()
    assert finished(second)


def test_blocks_are_not_shared_across_adapters():
    simulation = Simulation()
    for adapter in (None, LORA, OTHER, prefix(4)):
        run = simulation.submit(range(9), adapter, max_tokens=1)
        simulation.finish()
        assert run.outputs[0].cached_tokens == (adapter.num_virtual_tokens if adapter else 0)


def test_an_adapter_that_goes_and_comes_back_finds_its_blocks():
    simulation = Simulation()
    for cached in (0, 8):
        run = simulation.submit(range(9), LORA, max_tokens=1)
        simulation.finish()
        assert run.outputs[0].cached_tokens == cached
        simulation.residency.drop("lora")


def test_the_cache_makes_room():
    simulation = Simulation(num_pages=4)
    for start in range(0, 100, 10):
        simulation.submit(range(start, start + 12), max_tokens=4)
    simulation.finish()
    assert finished(*simulation.runs)


# Prefix adapters


@KINDS
@pytest.mark.parametrize(("num_virtual", "copies"), [(3, 1), (4, 0), (6, 1), (8, 0)])
def test_only_a_partial_page_of_a_prefix_is_copied(kind, num_virtual, copies):
    simulation = Simulation()
    adapter = prefix(num_virtual, kind)
    simulation.submit([1], adapter, max_tokens=9)
    simulation.submit([2], adapter, max_tokens=9)
    *_, step = step_until(simulation, lambda: len(simulation.scheduler.running) == 2)
    [resident] = simulation.residency
    assert len(step.copies) == 2 * copies
    assert {copy.source for copy in step.copies} <= {resident.prefix_pages[-1]}
    whole = resident.prefix_pages[: num_virtual // BLOCK]
    for sequence in simulation.scheduler.running:
        assert sequence.block_table[: len(whole)] == whole
        assert not set(sequence.block_table[len(whole) :]) & set(resident.prefix_pages)
    simulation.finish()
    assert finished(*simulation.runs)


def test_a_partial_page_that_was_completed_before_is_found_in_the_prefix_cache():
    simulation = Simulation()
    for _ in range(2):
        run = simulation.submit(range(6), prefix(3), max_tokens=1)
        [step] = steps_until_idle(simulation)
    assert run.outputs[0].cached_tokens == 8
    assert step.copies == ()


def test_virtual_tokens_are_computed_in_chunks_before_the_requests_start():
    simulation = Simulation(max_batch_tokens=4)
    stream = simulation.submit([1], max_tokens=6)
    simulation.step()
    run = simulation.submit([1, 2], prefix(7, PrefixKind.EMBEDDING), max_tokens=1)
    steps = step_until(simulation, lambda: run.end)
    assert all(stream.job.request_id in lengths(step) for step in steps)
    computed = [part for step in steps for part in step.sequences if part.sequence_id < 0]
    assert [(part.start, len(part.token_ids)) for part in computed] == [(0, 3), (3, 3), (6, 1)]
    assert {part.prompt for part in computed} == {"prefix"}
    assert all(run.job.request_id not in lengths(step) for step in steps[:-1])
    simulation.finish()
    assert finished(stream, run)


def test_only_the_embeddings_of_a_joined_prefix_are_computed():
    simulation = Simulation(max_batch_tokens=4)
    kinds = [(PrefixKind.EMBEDDING, 5), (PrefixKind.KEY_VALUE, 3), (PrefixKind.EMBEDDING, 2)]
    joined = joined_spec([prefix(count, kind, str(index)) for index, (kind, count) in enumerate(kinds)])
    run = simulation.submit([1, 2], joined, max_tokens=2)
    steps = step_until(simulation, lambda: run.end)
    computed = [part for step in steps for part in step.sequences if part.sequence_id < 0]
    assert [(part.start, len(part.token_ids)) for part in computed] == [(0, 4), (4, 1), (8, 2)]
    simulation.finish()
    assert finished(run)


def test_virtual_tokens_of_several_adapters_are_computed_in_one_step():
    simulation = Simulation()
    for name in "ab":
        simulation.residency.prefetch(prefix(3, PrefixKind.EMBEDDING, name))
    simulation.drain_inbox()
    assert sorted(lengths(simulation.step()).values()) == [3, 3]
    assert [(resident.ready, resident.last_used) for resident in simulation.residency] == [
        (True, simulation.pool.clock)
    ] * 2


def test_virtual_tokens_are_computed_once_for_all_requests():
    simulation = Simulation()
    adapter = prefix(7, PrefixKind.EMBEDDING, slab_pages=1)
    for token in range(4):
        simulation.submit([token], adapter)
    steps = steps_until_idle(simulation)
    assert sum(part.sequence_id < 0 for step in steps for part in step.sequences) == 1
    assert finished(*simulation.runs)


def test_virtual_tokens_are_computed_although_streams_fill_the_batch():
    simulation = Simulation(max_batch_tokens=2, max_batch_requests=2)
    for _ in range(6):
        simulation.submit([1], max_tokens=4)
    run = simulation.submit([1], prefix(9, PrefixKind.EMBEDDING))
    simulation.finish()
    assert finished(run)


# Adapters that come and go


def test_others_pass_a_request_whose_adapter_is_on_its_way():
    simulation = Simulation(immediate=False)
    first = simulation.submit([1], LORA)
    second = simulation.submit([2])
    simulation.step()
    assert (first.tokens, len(second.tokens)) == ([], 1)
    simulation.device.complete()
    simulation.step()
    assert len(first.tokens) == 1


def test_others_pass_requests_whose_adapters_cannot_be_loaded_yet():
    """Those of the same tenant as well, where as many are being loaded as may be at once."""
    simulation = Simulation(num_pages=32, immediate=False)
    for index in range(MAX_LOADING + 2):
        simulation.submit([1], make_spec(f"r{index}", slab_pages=1))
    warm = simulation.submit([2])
    simulation.step()
    assert len(warm.tokens) == 1
    simulation.finish()


def test_adapters_are_loaded_ahead_for_a_few_requests_only():
    simulation = Simulation(num_pages=64, max_batch_requests=4)
    running = [simulation.submit([1], max_tokens=12) for _ in range(4)]
    simulation.step()
    for index in range(20):
        simulation.submit([1], make_spec(f"r{index}", slab_pages=1))
    for _ in range(6):
        simulation.step()
    assert not any(run.end for run in running)
    assert len(list(simulation.residency)) == 8
    simulation.finish()


def test_of_many_that_wait_a_few_are_looked_at(monkeypatch):
    simulation = Simulation(num_pages=64, max_batch_requests=2, immediate=False)
    for index in range(50):
        simulation.submit([1], make_spec(f"r{index}", slab_pages=1))
    looked_at = []
    ensure_all = Residency.ensure_all

    def count(residency, specs, tenant):
        looked_at.append(specs)
        return ensure_all(residency, specs, tenant)

    monkeypatch.setattr(Residency, "ensure_all", count)
    simulation.step()
    assert len(looked_at) == 2 * 4
    simulation.finish()


def test_nobody_passes_a_request_for_which_there_are_no_pages():
    simulation = Simulation(num_pages=4)
    running = simulation.submit(range(4), max_tokens=5)
    simulation.step()
    large = simulation.submit(range(14), max_tokens=1)
    small = simulation.submit([1], max_tokens=1)
    step_until(simulation, lambda: running.end)
    assert not small.outputs
    simulation.finish()
    assert finished(large, small)


def test_nobody_passes_a_request_for_whose_adapter_there_are_no_pages():
    simulation = Simulation(num_pages=4)
    running = simulation.submit(range(4), max_tokens=5)
    simulation.step()
    large = simulation.submit([1], make_spec("large", slab_pages=3), max_tokens=1)
    small = simulation.submit([1], max_tokens=1)
    step_until(simulation, lambda: running.end)
    assert not small.outputs
    simulation.finish()
    assert finished(large, small)


def test_nobody_takes_the_pages_that_a_pinned_adapter_waits_for():
    simulation = Simulation(num_pages=6)
    running = [simulation.submit(range(12), max_tokens=4), simulation.submit([1], max_tokens=4)]
    simulation.step()
    simulation.scheduler.pin_adapters("name", (make_spec("pinned", slab_pages=2),))
    small = simulation.submit([2], max_tokens=4)
    num_waits = 0
    while not simulation.residency.get("pinned"):
        assert not small.outputs
        num_waits += 1
        simulation.step()
    assert num_waits > 1
    simulation.finish()
    assert finished(small, *running)


def test_a_prompt_that_has_started_goes_on_behind_one_that_may_not_start():
    simulation = Simulation(num_pages=5, max_batch_tokens=4)
    stream = simulation.submit([1], max_tokens=4, tenant="a")
    long = simulation.submit(range(11), max_tokens=2, tenant="a")
    simulation.step()
    simulation.scheduler.pin_adapters("name", (make_spec("pinned", slab_pages=2),))
    waits = simulation.submit([2], tenant="b")
    steps = [lengths(simulation.step()) for _ in range(2)]
    assert simulation.residency.get("pinned") is None
    assert [step[long.job.request_id] for step in steps] == [3, 3]
    assert not waits.outputs
    simulation.finish()
    assert finished(stream, long, waits)


@pytest.mark.parametrize(
    ("slab_pages", "max_batch_requests", "every", "answer"),
    [(6, 3, 2, (2, 2)), (3, 4, 3, (3, 3)), (3, 2, 4, (5, 8))],
)
def test_a_request_is_not_passed_for_ever_while_its_adapter_comes_and_goes(
    slab_pages, max_batch_requests, every, answer
):
    """Others may pass it, but their growth takes the adapter's pages again before it can start."""
    numbers = random.Random(0)
    simulation = Simulation(
        num_pages=10,
        block_size=1,
        max_batch_tokens=max_batch_requests + 1,
        max_batch_requests=max_batch_requests,
        immediate=False,
    )
    filled = []

    def more_arrives() -> None:
        while len(simulation.scheduler.waiting) < 4:
            simulation.submit([numbers.randrange(99)], max_tokens=numbers.randint(*answer))

    more_arrives()
    simulation.step()
    run = simulation.submit([1, 2], make_spec("adapter", slab_pages=slab_pages), max_tokens=2)
    for number in itertools.count():
        more_arrives()
        if number % every == 0 and simulation.device.pending:
            filled.append(simulation.device.complete())
        simulation.step()
        if run.end:
            break
        assert number < 60
    assert len(filled) <= 6


@pytest.mark.parametrize("num_pages", [7, 8, 12])
def test_more_adapters_than_there_is_room_for_take_turns(num_pages):
    simulation = Simulation(num_pages=num_pages)
    for token in range(12):
        adapter = make_spec(f"r{token % 5}", slab_pages=3, num_virtual=token % 5)
        simulation.submit([token, 1], adapter, max_tokens=3)
    simulation.finish()
    assert finished(*simulation.runs)
    simulation.check_nothing_is_left()


def test_a_copy_that_fails_fails_those_who_wait_for_it_and_nobody_else():
    simulation = Simulation(immediate=False)
    waiting = [simulation.submit([1], LORA), simulation.submit([2], LORA)]
    others = [simulation.submit([1]), simulation.submit([1], OTHER)]
    simulation.step()
    simulation.device.complete(error="no memory")
    simulation.drain_inbox()
    later = simulation.submit([3], LORA)
    simulation.finish()
    for run in waiting:
        assert isinstance(run.error, AdapterUnavailableError)
        assert "no memory" in str(run.error)
    assert finished(*others, later)
    simulation.check_nothing_is_left()


def test_virtual_tokens_that_fail_fail_those_who_wait_for_them():
    simulation = Simulation()
    run = simulation.submit([1], prefix(3, PrefixKind.EMBEDDING))
    other = simulation.submit([1])
    simulation.step()
    simulation.step(lambda step: {part.sequence_id: "NaN" for part in step.sequences if part.sequence_id < 0})
    simulation.step()
    assert isinstance(run.error, AdapterUnavailableError)
    assert "NaN" in str(run.error)
    simulation.finish()
    assert finished(other)
    simulation.check_nothing_is_left()


def test_a_failed_prefetch_fails_nobody():
    simulation = Simulation(immediate=False)
    simulation.residency.prefetch(LORA)
    simulation.device.complete(error="no memory")
    run = simulation.submit([1], LORA)
    simulation.finish()
    assert finished(run)


def test_a_revision_that_is_dropped_ends_its_requests_first():
    simulation = Simulation()
    run = simulation.submit([1], LORA, max_tokens=6)
    simulation.step()
    simulation.step()
    simulation.residency.drop("lora")
    new = simulation.submit([1], OTHER, max_tokens=6)
    simulation.finish()
    assert finished(run, new)
    assert [resident.spec for resident in simulation.residency] == [OTHER]


# Pages that run out


def test_what_gave_way_is_counted_by_the_step():
    simulation = Simulation(num_pages=5, block_size=2)
    simulation.residency.prefetch(make_spec("idle", slab_pages=2))
    runs = [simulation.submit([token], max_tokens=8) for token in range(2)]
    counted = []
    while not finished(*runs):
        simulation.step()
        counted.append((simulation.scheduler.num_preempted, simulation.residency.num_evicted))
    assert sum(num_preempted for num_preempted, _ in counted) == 1
    assert sum(num_evicted for _, num_evicted in counted) == 1


def test_the_youngest_gives_way_and_goes_on_later():
    simulation = Simulation(num_pages=5, block_size=2, max_batch_requests=3)
    runs = [simulation.submit([token], max_tokens=8) for token in range(3)]
    preempted = []
    for _ in range(100):
        before = list(simulation.scheduler.running)
        simulation.step()
        preempted += [
            before.index(sequence) for sequence in simulation.scheduler.waiting if sequence in before
        ]
    assert preempted
    assert 0 not in preempted, "the oldest goes on"
    assert finished(*runs)
    assert [run.tokens for run in runs] == [expected_tokens(run.job) for run in runs]


def test_those_that_gave_way_come_back_in_their_order_before_all_others():
    simulation = Simulation(num_pages=8, block_size=1, max_batch_requests=4)
    runs = [simulation.submit([token], max_tokens=6) for token in range(5)]
    ends = []
    for _ in range(100):
        simulation.step()
        ends += [run for run in runs if run.end and run not in ends]
    assert ends == runs


def test_one_that_gave_way_says_no_token_twice():
    simulation = Simulation(num_pages=6, block_size=2)
    old = simulation.submit([1], max_tokens=9)
    young = simulation.submit([2, 3, 4, 5], max_tokens=7)
    simulation.step()
    step_until(simulation, lambda: simulation.scheduler.num_preempted)
    simulation.finish()
    assert finished(old, young)
    assert young.outputs[-1].cached_tokens == 0, "counted when it first started"


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
@KINDS
def test_a_request_that_just_fits_runs_and_one_more_page_would_not(kind, block_size):
    for num_virtual, slab_pages, num_prompt, max_tokens in itertools.product(
        range(6), range(2), range(1, 5), range(1, 5)
    ):
        adapter = prefix(num_virtual, kind, slab_pages=slab_pages) if num_virtual or slab_pages else None
        room = num_virtual // block_size + slab_pages + (num_virtual % block_size > 0)
        room += -(-(num_virtual + num_prompt + max_tokens - 1) // block_size) - num_virtual // block_size
        simulation = Simulation(
            num_pages=room, block_size=block_size, max_batch_tokens=4, max_batch_requests=2
        )
        run = simulation.submit(range(num_prompt), adapter, max_tokens=max_tokens)
        simulation.finish(max_steps=60)
        assert finished(run)
        assert not Simulation(num_pages=room - 1, block_size=block_size).fits(run)


def test_a_request_that_just_fits_runs_beside_others():
    simulation = Simulation(num_pages=6, block_size=2, max_batch_tokens=3, max_batch_requests=3)
    for number in range(12):
        adapter = [None, prefix(3, name="a"), prefix(4, PrefixKind.EMBEDDING, "b"), LORA][number % 4]
        simulation.submit([number], adapter, max_tokens=6)
    simulation.finish()
    assert finished(*simulation.runs)


# Ends from outside


@pytest.mark.parametrize("num_steps", range(4))
def test_a_cancelled_request_gives_everything_back_and_hears_one_word(num_steps):
    simulation = Simulation(max_batch_tokens=4)
    run = simulation.submit(range(6), LORA, max_tokens=9)
    other = simulation.submit(range(6), LORA)
    for _ in range(num_steps):
        simulation.step()
    simulation.cancel(run)
    simulation.cancel(run)
    simulation.check()
    assert run.end is FinishReason.CANCELLED
    simulation.finish()
    assert finished(other)
    simulation.check_nothing_is_left()


def test_cancelling_what_has_ended_or_never_was_does_nothing():
    simulation = Simulation()
    run = simulation.submit([1])
    simulation.finish()
    simulation.cancel(run)
    simulation.scheduler.cancel(10**9)
    assert finished(run)


def test_the_deadline_ends_requests_that_run_and_that_wait():
    simulation = Simulation(max_batch_requests=1, immediate=False)
    running = simulation.submit([1], max_tokens=9, deadline=5.0)
    waiting = simulation.submit([1], LORA, deadline=5.0)
    patient = simulation.submit([1], deadline=5.1)
    simulation.step()
    simulation.now = 5.0
    simulation.step()
    assert isinstance(running.error, DeadlineError)
    assert isinstance(waiting.error, DeadlineError)
    simulation.finish()
    assert finished(patient)
    simulation.check_nothing_is_left()


def test_a_step_that_fails_for_one_request_goes_on_for_the_others():
    simulation = Simulation()
    bad, good = simulation.submit([1], max_tokens=5), simulation.submit([2], max_tokens=5)
    simulation.step()
    simulation.step(lambda _: {bad.job.request_id: "NaN"})
    assert isinstance(bad.error, GenerationFailedError)
    assert len(bad.tokens) == 1
    simulation.finish()
    assert finished(good)


def test_what_a_failed_step_wrote_is_not_found_again():
    simulation = Simulation()
    bad = simulation.submit(range(9), max_tokens=5)
    simulation.step(lambda _: {bad.job.request_id: "NaN"})
    run = simulation.submit(range(9))
    simulation.finish()
    assert run.outputs[0].cached_tokens == 0


@pytest.mark.parametrize("good", [0, 1, 2])
def test_a_sink_that_raises_ends_its_request_and_nobody_elses(good, caplog):
    simulation = Simulation()
    told = []

    def sink(output):
        told.append(output)
        if len(told) > good:
            raise RuntimeError("the event loop is closed")

    run = make_run([1], max_tokens=3)
    run.job = replace(run.job, sink=sink)
    simulation.add(run)
    other = simulation.submit([2])
    steps_until_idle(simulation)
    assert len(told) == good + 1
    assert finished(other)
    assert f"the sink of request {run.job.request_id} failed" in caplog.text
    simulation.check_nothing_is_left()


def test_a_sink_that_raises_at_the_end_holds_nothing_up(caplog):
    simulation = Simulation()
    run = make_run([1])

    def sink(_):
        raise RuntimeError

    run.job = replace(run.job, sink=sink)
    simulation.add(run)
    for sequence in list(simulation.scheduler.sequences):
        simulation.scheduler.fail(sequence, ShuttingDownError("stop"))
    assert f"the sink of request {run.job.request_id} failed" in caplog.text
    simulation.check_nothing_is_left()


def test_a_runner_that_owes_a_token_is_noticed():
    simulation = Simulation()
    simulation.submit([1])
    step = simulation.scheduler.schedule(0)
    with pytest.raises(KeyError):
        simulation.scheduler.update(step, StepResult(token_ids={}), 0.0)


# Everything at once


@pytest.mark.parametrize("seed", range(8))
def test_answers_do_not_depend_on_what_else_runs(seed):
    """A longer load than hypothesis makes: streams, swaps, cancellations and deadlines on few pages."""
    numbers = random.Random(seed)
    block_size = numbers.randint(1, 4)
    simulation = Simulation(
        num_pages=numbers.randint(36, 60) // block_size + 6,
        block_size=block_size,
        max_batch_tokens=numbers.choice([5, 8, 20]),
        max_batch_requests=5,
        immediate=False,
    )
    revisions = itertools.count()

    def fresh():
        return make_spec(
            f"r{next(revisions)}",
            slab_pages=numbers.randint(0, 3),
            num_virtual=numbers.choice([0, 0, 3, 4, 9]),
            kind=numbers.choice(list(PrefixKind)),
        )

    adapters = [None, *(fresh() for _ in range(4))]
    num_preempted = 0
    for _ in range(400):
        if numbers.random() < 0.3:
            end = (numbers.randint(0, 1) for _ in range(numbers.randint(0, 4)))
            prompt = [*range(numbers.randint(1, 9)), *end]
            deadline = simulation.now + numbers.randint(1, 40) if numbers.random() < 0.1 else None
            simulation.submit(
                prompt,
                numbers.choice(adapters),
                max_tokens=numbers.randint(1, 12),
                seed=numbers.randint(0, 1),
                stop_after=numbers.randint(0, 11) if numbers.random() < 0.3 else None,
                deadline=deadline,
            )
        if numbers.random() < 0.03:
            simulation.cancel(numbers.choice(simulation.runs)) if simulation.runs else None
        if numbers.random() < 0.05:
            index = numbers.randint(1, 4)
            old, adapters[index] = adapters[index], fresh()
            simulation.residency.drop(old.revision)
        if simulation.device.pending and numbers.random() < 0.4:
            simulation.device.complete(numbers.randrange(len(simulation.device.pending)))
        simulation.now += 1
        simulation.step()
        num_preempted += simulation.scheduler.num_preempted
    simulation.finish()
    simulation.check_nothing_is_left()
    assert sum(finished(run) for run in simulation.runs) > len(simulation.runs) // 2
