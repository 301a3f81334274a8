"""Answers that have a form: what the engine asks of matchers, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from support.fake_device import Simulation, make_run
from turret_server.engine.request import FinishReason
from turret_server.errors import StructuredOutputError


@dataclass
class Matcher:
    """Complete after `length` tokens, broken after `broken_after`."""

    length: int
    broken_after: int = 1000
    accepted: list[int] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return len(self.accepted) == self.length

    def allowed(self) -> bytes:
        return b"\xff" * 8

    def accept(self, token_id: int) -> None:
        if len(self.accepted) == self.broken_after:
            raise StructuredOutputError("too complex")
        self.accepted.append(token_id)


@dataclass
class Grammar:
    length: int = 1000
    broken_after: int = 1000
    matchers: list[Matcher] = field(default_factory=list)

    def start(self) -> Matcher:
        self.matchers.append(Matcher(self.length, self.broken_after))
        return self.matchers[-1]


def submit(simulation, grammar, prompt=(1, 2), **options):
    run = make_run(prompt, **options)
    run.job = replace(run.job, grammar=grammar)
    return simulation.add(run)


@pytest.fixture
def simulation():
    return Simulation()


def test_an_answer_ends_when_its_form_is_complete(simulation):
    grammar = Grammar(length=3)
    run = submit(simulation, grammar, max_tokens=10)
    other = simulation.submit([1, 2], max_tokens=10)
    simulation.finish()
    assert run.end is FinishReason.STOP
    assert run.tokens == grammar.matchers[-1].accepted == other.tokens[:3]
    assert other.end is FinishReason.LENGTH


def test_an_answer_that_is_too_long_ends_before_its_form(simulation):
    run = submit(simulation, Grammar(length=4), max_tokens=3)
    simulation.finish()
    assert run.end is FinishReason.LENGTH


def test_a_token_that_ends_every_answer_is_no_part_of_the_form(simulation):
    grammar = Grammar()
    run = submit(simulation, grammar, stop_after=2, max_tokens=10)
    simulation.finish()
    assert run.end is FinishReason.STOP
    assert grammar.matchers[-1].accepted == run.tokens[:-1]


def test_an_answer_whose_form_cannot_be_followed_fails_alone(simulation):
    run = submit(simulation, Grammar(broken_after=2), max_tokens=10)
    other = simulation.submit([1, 2], max_tokens=10)
    simulation.finish()
    assert run.end is FinishReason.FAILED
    assert isinstance(run.error, StructuredOutputError)
    assert len(run.tokens) == 2
    assert len(other.tokens) == 10


def test_only_a_step_that_samples_asks_for_tokens():
    simulation = Simulation(max_batch_tokens=4)
    submit(simulation, Grammar(), prompt=range(10), max_tokens=2)
    asked = [step.sequences[0].allowed is not None for step in iter(simulation.step, None)]
    assert asked == [False, False, True, True]


def test_a_form_goes_on_where_it_was_after_a_preemption(simulation):
    grammar = Grammar()
    run = submit(simulation, grammar, max_tokens=6)
    for _ in range(3):
        simulation.step()
    simulation.scheduler._preempt(simulation.scheduler.running[0])
    num_matchers = len(grammar.matchers)
    simulation.finish()
    assert len(grammar.matchers) == num_matchers
    assert grammar.matchers[-1].accepted == run.tokens
    assert run.end is FinishReason.LENGTH


def test_answers_of_one_form_follow_it_each_for_itself(simulation):
    grammar = Grammar()
    runs = [submit(simulation, grammar, seed=seed) for seed in (1, 2)]
    simulation.finish()
    accepted = [matcher.accepted for matcher in grammar.matchers if matcher.accepted]
    assert accepted == [run.tokens for run in runs]
