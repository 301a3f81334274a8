from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fake_device import FakeDevice, Run, Simulation, make_spec
from turret_adapters.spec import PrefixKind
from turret_server.engine.pooling import PoolingParams
from turret_server.engine.recovery import RecoveringRunner
from turret_server.engine.request import FinishReason
from turret_server.engine.step import DeviceLostError, Step, StepResult
from turret_server.errors import GenerationFailedError, OutOfMemoryError

# Needs a copied page: its virtual tokens end in the middle of one.
PREFIX = make_spec("prefix", num_virtual=6)
EMBEDDING = make_spec("embedding", num_virtual=6, kind=PrefixKind.EMBEDDING)
LORA = make_spec("lora", slab_pages=2)


class BrokenDevice(FakeDevice):
    """Fails over one of a step's sequences, before or after it computed all, or over the step's size."""

    def __init__(self, num_pages: int, block_size: int) -> None:
        super().__init__(num_pages, block_size, immediate=True)
        self.guilty: set[int] = set()
        self.early = False
        self.most = 1000
        self.num_runs = 0

    def run(self, step: Step) -> StepResult:
        self.num_runs += 1
        broken = any(part.sequence_id in self.guilty for part in step.sequences)
        if broken and self.early:
            raise ValueError("broken")
        done = super().run(step)
        if broken:
            raise ValueError("broken")
        if step.num_tokens > self.most:
            raise MemoryError
        return done


class BrokenSimulation(Simulation):
    def __init__(self) -> None:
        super().__init__(num_pages=64)
        self.device = self.broken = self.residency.memory = BrokenDevice(64, 4)
        self.num_told = 0
        self.runner = RecoveringRunner(self.broken, self.told)

    def told(self) -> None:
        self.num_told += 1

    def failed(self, *guilty: Run) -> None:
        self.broken.guilty = {run.job.request_id for run in guilty}
        self.finish()


@pytest.fixture
def simulation():
    simulation = BrokenSimulation()
    yield simulation
    simulation.check_nothing_is_left()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, PREFIX, LORA, EMBEDDING]), st.booleans()), max_size=8),
    st.booleans(),
)
def test_only_those_at_fault_fail_and_all_others_get_their_tokens(requests, early):
    simulation = BrokenSimulation()
    simulation.broken.early = early
    runs = [
        (simulation.submit([index, *range(5)], adapter, max_tokens=5), guilty)
        for index, (adapter, guilty) in enumerate(requests)
    ]
    simulation.failed(*(run for run, guilty in runs if guilty))
    for run, guilty in runs:
        # `finish` has held the tokens of every run against those that it has to answer.
        assert run.end is (FinishReason.FAILED if guilty else FinishReason.LENGTH)
        assert isinstance(run.error, GenerationFailedError) == guilty
    simulation.check_nothing_is_left()


def test_a_step_that_needs_too_much_memory_goes_through_in_parts(simulation):
    simulation.broken.most = 9
    runs = [simulation.submit([index, *range(7)], PREFIX) for index in range(4)]
    simulation.finish()
    assert [run.end for run in runs] == [FinishReason.LENGTH] * 4
    assert simulation.runner.num_failures > 0
    # Every part is progress.
    assert simulation.num_told == simulation.broken.num_runs > 4


def test_numbers_of_texts_come_from_all_parts(simulation):
    simulation.broken.most = 9
    runs = [simulation.submit([index, *range(7)], params=PoolingParams()) for index in range(4)]
    simulation.finish()
    assert [run.end for run in runs] == [FinishReason.POOLED] * 4
    assert simulation.runner.num_failures > 0


def test_a_request_that_runs_out_of_memory_alone_fails_with_out_of_memory(simulation):
    simulation.broken.most = 9
    large, small = simulation.submit(range(20)), simulation.submit(range(3), LORA)
    simulation.finish()
    assert isinstance(large.error, OutOfMemoryError)
    assert small.end is FinishReason.LENGTH


def test_one_among_many_is_found_in_few_runs(simulation):
    runs = [simulation.submit([index]) for index in range(8)]
    simulation.broken.guilty = {runs[5].job.request_id}
    simulation.step()
    # Of 8, of 4, of 2 and of 1 with it in, and the three without.
    assert simulation.broken.num_runs == 7
    assert simulation.runner.num_failures == 4
    simulation.finish()


def test_a_lost_device_is_not_asked_again():
    class Lost:
        num_runs = 0

        def run(self, _: Step) -> StepResult:
            self.num_runs += 1
            raise DeviceLostError

    lost = Lost()
    with pytest.raises(DeviceLostError):
        RecoveringRunner(lost).run(Step(sequences=()))
    assert lost.num_runs == 1


def test_what_failed_is_not_found_in_the_cache(simulation):
    """Blocks that were computed in good steps, too: what made the last one fail may have been in them."""
    run = simulation.submit(range(12), max_tokens=8)
    for _ in range(3):
        simulation.step()
    assert simulation.cache.pages
    simulation.failed(run)
    assert run.end is FinishReason.FAILED
    assert simulation.cache.pages == ()
    again = simulation.submit(range(12))
    simulation.broken.guilty = set()
    simulation.finish()
    assert again.outputs[-1].cached_tokens == 0
