"""Answers that share a prompt: it is computed once, and each answer is that of a request of its own."""

from __future__ import annotations

import pytest

from support.fake_device import Simulation, make_spec
from turret_adapters.spec import PrefixKind
from turret_server.engine.admission import Admission, TenantLimits
from turret_server.engine.request import FinishReason

LORA = make_spec("lora", slab_pages=1)
ACTIVATED = make_spec("activated", slab_pages=1, invocation=(3,))
ADAPTERS = {
    "none": None,
    "lora": LORA,
    "activated": ACTIVATED,
    **{
        f"{kind.value}-{count}": make_spec(f"{kind.value}-{count}", num_virtual=count, kind=kind)
        for kind in PrefixKind
        for count in (3, 4, 6)
    },
}


def submit(simulation, prompt, adapter=None, count=3, **options):
    """A leader and others that share its prompt."""
    leader = simulation.submit(prompt, adapter, seed=0, **options)
    others = [
        simulation.submit(prompt, adapter, seed=seed, leader=leader.job.request_id, **options)
        for seed in range(1, count)
    ]
    return [leader, *others]


def computed_by(simulation, runs):
    """Tokens that each request computes until all have ended."""
    computed = {run.job.request_id: 0 for run in runs}
    while any(run.end is None for run in runs):
        step = simulation.step()
        for part in step.sequences if step else ():
            if part.sequence_id in computed:
                computed[part.sequence_id] += len(part.token_ids)
    return list(computed.values())


@pytest.mark.parametrize("num_prompt", range(1, 11))
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("max_batch_tokens", [3, 64])
def test_the_prompt_is_computed_once_and_of_it_the_last_token_for_each_answer(
    num_prompt, adapter, max_batch_tokens
):
    """In blocks of 4, it ends before, at and after a block's end. Answers are checked in each step."""
    simulation = Simulation(max_batch_tokens=max_batch_tokens, max_batch_requests=3)
    if adapter:
        simulation.submit([1], adapter, max_tokens=1)
        simulation.finish()
    runs = submit(simulation, range(num_prompt), adapter, max_tokens=5)
    assert computed_by(simulation, runs) == [num_prompt + 4, 5, 5]
    simulation.check_nothing_is_left()


def test_other_requests_overtake_answers_that_wait_for_their_prompt():
    simulation = Simulation(max_batch_tokens=4)
    submit(simulation, range(11), max_tokens=2)
    other = simulation.submit([90], max_tokens=1)
    simulation.step()
    assert other.end is None
    simulation.step()
    simulation.step()
    assert other.end is FinishReason.LENGTH
    simulation.finish()


def test_a_leader_that_is_cancelled_leaves_its_prompt_to_the_others():
    for num_steps in range(6):
        simulation = Simulation(max_batch_tokens=4)
        leader, *others = submit(simulation, range(11), max_tokens=3)
        for _ in range(num_steps):
            simulation.step()
        simulation.cancel(leader)
        simulation.finish()
        assert [run.end for run in others] == [FinishReason.LENGTH] * 2
        simulation.check_nothing_is_left()


@pytest.mark.parametrize("num_pages", range(5, 14))
def test_answers_are_the_same_where_pages_are_short(num_pages):
    """Answers start one after another, and are preempted."""
    simulation = Simulation(num_pages=num_pages)
    runs = submit(simulation, range(7), count=4, max_tokens=12)
    simulation.finish()
    assert [run.end for run in runs] == [FinishReason.LENGTH] * 4
    simulation.check_nothing_is_left()


def test_the_blocks_of_the_prompt_are_shared():
    simulation = Simulation(num_pages=100)
    submit(simulation, range(42), count=8, max_tokens=4)
    simulation.step()
    simulation.step()
    tables = [set(sequence.block_table) for sequence in simulation.scheduler.running]
    assert len(tables) == 8
    # 40 tokens of the prompt, and the rest with the answer in a block of its own.
    assert (len(set.intersection(*tables)), len(set.union(*tables))) == (10, 18)
    simulation.finish()


def test_answers_that_share_a_prompt_queue_its_tokens_once():
    admission = Admission(lambda _: TenantLimits(max_queued_tokens=100 + 8 * 5))
    for run in submit(Simulation(num_pages=100), range(100), count=8, max_tokens=5):
        admission.enter(run.job)
    assert admission.num_queued == 8
