from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fake_device import Simulation
from turret_server.engine.scheduler import Pacing

PROBE = 16


def paced(max_tokens: int = 10_000, max_seconds: float = 0.1) -> Pacing:
    return Pacing(max_tokens, max_seconds)


def settle(pacing: Pacing, num_streams: int, seconds, steps: int = 100) -> int:
    """Steps as large as they may be, of which one takes `seconds(prompt tokens)`; the last budget."""
    for _ in range(steps):
        pacing.record(num_streams, 0, seconds(0))
        prompt = pacing.budget(num_streams) - num_streams
        pacing.record(num_streams, prompt, seconds(prompt))
    return pacing.budget(num_streams)


def test_the_first_prompt_is_a_probe():
    assert paced().budget(0) == PROBE
    assert paced().budget(4) == 4 + PROBE


def test_a_step_takes_as_many_tokens_as_its_time_allows():
    pacing = paced()
    assert settle(pacing, 0, lambda prompt: prompt * 1e-3) == pytest.approx(100, abs=1)


@pytest.mark.parametrize("num_streams", [1, 8])
def test_beside_streams_it_takes_what_their_time_leaves(num_streams):
    budget = settle(paced(), num_streams, lambda prompt: 0.04 + prompt * 1e-3)
    assert budget - num_streams == pytest.approx(60, abs=2)


def test_the_budget_holds_in_any_case():
    pacing = paced(max_tokens=50)
    assert settle(pacing, 0, lambda _: 0.0) == 50
    assert settle(pacing, 8, lambda _: 0.0) == 50


def test_prompts_get_on_beside_streams_that_take_all_the_time():
    assert settle(paced(), 4, lambda prompt: 0.5 + prompt * 1e-3) == 4 + PROBE


def test_prompts_get_as_much_as_many_streams():
    """Or a server full of streams would take in new ones a few tokens at a time."""
    assert settle(paced(), 64, lambda prompt: 0.5 + prompt * 1e-3) == 128


def test_a_device_that_gets_slower_is_given_less():
    pacing = paced()
    before = settle(pacing, 0, lambda prompt: prompt * 1e-4)
    after = settle(pacing, 0, lambda prompt: prompt * 1e-3)
    assert (before, after) == (pytest.approx(1000, abs=5), pytest.approx(100, abs=3))


def test_a_few_tokens_say_little_and_change_nothing():
    pacing = paced()
    pacing.record(0, 100, 0.1)
    before = pacing.budget(0)
    pacing.record(0, PROBE - 1, 1.0)
    assert pacing.budget(0) == before


def test_streams_and_prompt_tokens_of_a_step_are_counted_separately(monkeypatch):
    simulation = Simulation()
    simulation.submit([1], max_tokens=9)
    simulation.step()
    recorded = []
    monkeypatch.setattr(Pacing, "record", lambda _, *step: recorded.append(step))
    simulation.submit(range(10, 13))
    simulation.step()
    simulation.step()
    assert recorded == [(1, 3, 0.0), (2, 0, 0.0)]


@given(
    max_tokens=st.integers(1, 5000),
    measured=st.lists(st.tuples(st.integers(0, 64), st.integers(0, 500), st.floats(0, 10))),
    num_streams=st.integers(0, 64),
)
def test_whatever_was_measured_streams_go_on_and_prompts_get_on(max_tokens, measured, num_streams):
    pacing = paced(max_tokens)
    for streams, prompt, seconds in measured:
        pacing.record(streams, prompt, seconds)
    budget = pacing.budget(num_streams)
    assert min(max_tokens, num_streams + PROBE) <= budget <= max_tokens
