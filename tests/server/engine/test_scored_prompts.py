"""Log probabilities of a prompt: all of it is computed, in any chunks, and they come with the first token.

`Run.check` compares each with what it has to be, after every step.
"""

from __future__ import annotations

import pytest

from support.fake_device import Simulation, make_spec
from turret_adapters.spec import PrefixKind
from turret_server.engine import scheduler as scheduler_module
from turret_server.engine.request import FinishReason


def num_scored(step):
    return [len(part.targets) for part in step.sequences]


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 3, 64])
@pytest.mark.parametrize("num_virtual", [0, 3, 4])
@pytest.mark.parametrize("kind", PrefixKind)
def test_they_are_those_of_all_tokens_but_the_first(max_batch_tokens, num_virtual, kind):
    simulation = Simulation(num_pages=64, max_batch_tokens=max_batch_tokens, max_batch_requests=1)
    adapter = make_spec("prefix", num_virtual=num_virtual, kind=kind) if num_virtual else None
    for num_prompt in range(1, 10):
        run = simulation.submit(range(num_prompt), adapter, prompt_logprobs=2)
        simulation.finish()
        assert len(run.outputs[0].prompt_logprobs) == num_prompt - 1


def test_the_prompt_is_not_taken_from_the_cache_but_left_there():
    simulation = Simulation()
    simulation.submit(range(9))
    simulation.finish()
    scored = simulation.submit(range(9), prompt_logprobs=0)
    step = simulation.step()
    assert num_scored(step) == [8]
    simulation.finish()
    assert scored.outputs[-1].cached_tokens == 0
    found = simulation.submit(range(9))
    simulation.finish()
    assert found.outputs[-1].cached_tokens == 8


def test_a_prompt_that_was_scored_is_taken_from_the_cache_after_a_preemption():
    simulation = Simulation()
    run = simulation.submit(range(9), prompt_logprobs=0, max_tokens=8)
    simulation.step()
    [sequence] = simulation.scheduler.running
    simulation.scheduler._preempt(sequence)
    step = simulation.step()
    assert [len(part.token_ids) for part in step.sequences] == [2]
    simulation.finish()
    assert run.end is FinishReason.LENGTH


def test_a_prompt_that_is_preempted_half_way_is_scored_again():
    simulation = Simulation(max_batch_tokens=4)
    run = simulation.submit(range(11), prompt_logprobs=0, max_tokens=2)
    for _ in range(2):
        simulation.step()
    [sequence] = simulation.scheduler.running
    simulation.scheduler._preempt(sequence)
    simulation.finish()
    assert run.end is FinishReason.LENGTH


def test_a_step_scores_no_more_tokens_than_there_is_memory_for(monkeypatch):
    """But every prompt advances."""
    monkeypatch.setattr(scheduler_module, "_MAX_SCORED_TOKENS", 6)
    simulation = Simulation(num_pages=64, max_batch_tokens=64)
    runs = [simulation.submit(range(start, start + 9), prompt_logprobs=1) for start in (0, 20)]
    plain = simulation.submit(range(40, 50))
    step = simulation.step()
    assert sorted(len(part.token_ids) for part in step.sequences) == [1, 6, 10]
    assert sorted(num_scored(step)) == [0, 1, 6]
    simulation.finish()
    assert all(run.end is FinishReason.LENGTH for run in (*runs, plain))
