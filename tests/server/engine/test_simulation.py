"""Random loads on small pools: whatever happens, every request gets its own tokens and one end.

`support.fake_device` says how a wrong page or position would be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.fake_cuda import FakeCuda, StreamedDevice
from support.fake_device import FakeDevice, Run, Simulation, make_run, make_spec
from turret_adapters.spec import AdapterSpec, HeadTask, PrefixKind
from turret_server.engine.pooling import Pooling, PoolingParams
from turret_server.engine.request import AdapterUse, FinishReason, LogitAdjustment, PoolingRequest, PromptPin
from turret_server.engine.step import Step
from turret_server.errors import (
    AdapterTooLargeError,
    AdapterUnavailableError,
    DeadlineError,
    GenerationFailedError,
    RequestTooLargeError,
)

SIMULATION = settings(
    max_examples=250,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

WEIGHTS = st.sampled_from([1.0, 4.0])

# The longest prompt, with virtual tokens.
_LONGEST = 14 + 11

# Prompts that begin alike, so that blocks are found again.
PROMPTS = st.tuples(st.integers(0, 2), st.integers(1, 14)).map(
    lambda drawn: [7 + position * (position < 2 + 4 * drawn[0]) for position in range(drawn[1])]
)


PENALTIES = LogitAdjustment(frequency_penalty=1.0)
PATIENT = LogitAdjustment(min_tokens=5)
# How requests are sampled besides, most of them in no special way.
SAMPLED = st.sampled_from(
    [
        *[{}] * 4,
        {"adjustment": PENALTIES, "logprobs": 2},
        {"adjustment": PATIENT},
        {"prompt_logprobs": 3},
        {"prompt_logprobs": 0, "adjustment": PENALTIES},
    ]
)


POOLED = st.sampled_from(
    [
        *(PoolingParams(pooling=pooling) for pooling in Pooling),
        *(PoolingParams(task=task) for task in HeadTask),
    ]
)


def _together(named: list[tuple[AdapterSpec, float]]) -> list[AdapterUse]:
    """As many of these as one request may name: each once, one prefix, activated ones alone."""
    uses: list[AdapterUse] = []
    for spec, weight in named:
        others = [use.spec for use in uses]
        if (
            spec not in others
            and not (spec.prefix and any(other.prefix for other in others))
            and not (others and (spec.invocation_tokens or others[0].invocation_tokens))
        ):
            uses.append(AdapterUse(spec, weight))
    return uses


class RandomLoad(RuleBasedStateMachine):
    runs = Bundle("runs")
    adapters = Bundle("adapters")
    make_device: Callable[..., FakeDevice] = FakeDevice
    bidirectional = False

    @initialize(
        target=adapters,
        num_pages=st.integers(6, 48),
        block_size=st.integers(1, 5),
        max_batch_tokens=st.integers(1, 16),
        max_batch_requests=st.integers(1, 6),
        immediate=st.booleans(),
        weights=st.fixed_dictionaries({"a": WEIGHTS, "b": WEIGHTS}),
    )
    def start(
        self,
        num_pages: int,
        block_size: int,
        max_batch_tokens: int,
        max_batch_requests: int,
        immediate: bool,  # noqa: FBT001
        weights: dict[str, float],
    ) -> AdapterSpec:
        """There is an adapter from the start, or a rule that names some would end the example."""
        self.simulation = Simulation(
            num_pages=num_pages,
            block_size=block_size,
            max_batch_tokens=max_batch_tokens + _LONGEST * self.bidirectional,
            max_batch_requests=min(max_batch_requests, max_batch_tokens),
            immediate=immediate,
            weights=weights,
            make_device=type(self).make_device,
            bidirectional=self.bidirectional,
        )
        self.num_revisions = 0
        self.excused: set[Run] = set()
        self.ended: set[Run] = set()
        self.pinned: set[Run] = set()
        self.kept_resident: set[str] = set()
        self.dropped: set[str] = set()
        self.crowded_out: set[Run] = set()
        return make_spec("first", slab_pages=1)

    @rule(
        target=adapters,
        slab_pages=st.integers(0, 4),
        num_virtual=st.integers(0, 11),
        kind=st.sampled_from(PrefixKind),
        invocation=st.sampled_from([(), (), (7,), (9,), (7, 7)]),
        head=st.none() | st.sampled_from(HeadTask),
    )
    def load(
        self,
        slab_pages: int,
        num_virtual: int,
        kind: PrefixKind,
        invocation: tuple[int, ...],
        head: HeadTask | None,
    ) -> AdapterSpec:
        self.num_revisions += 1
        return make_spec(
            f"revision{self.num_revisions}",
            slab_pages=slab_pages,
            num_virtual=num_virtual,
            kind=kind,
            invocation=() if num_virtual else invocation,
            per_request=self.bidirectional and kind is PrefixKind.EMBEDDING,
            head=head,
        )

    @rule(
        target=runs,
        named=st.lists(st.tuples(adapters, st.sampled_from([1.0, 0.5])), max_size=3),
        prompt=PROMPTS,
        max_tokens=st.integers(1, 12),
        seed=st.integers(0, 1),
        stop_after=st.none() | st.integers(0, 8),
        patience=st.none() | st.integers(1, 20),
        tenant=st.sampled_from("ab"),
        priority=st.integers(-1, 1),
        cache_salt=st.sampled_from(["", "", "x"]),
        pinned=st.integers(0, 5).map(lambda drawn: drawn == 5),
        sampled=SAMPLED,
        params=st.none() | st.none() | POOLED,
    )
    def submit(
        self,
        named: list[tuple[AdapterSpec, float]],
        prompt: list[int],
        max_tokens: int,
        seed: int,
        stop_after: int | None,
        patience: int | None,
        tenant: str,
        priority: int,
        cache_salt: str,
        pinned: bool,  # noqa: FBT001
        sampled: dict[str, Any],
        params: PoolingParams | None,
    ) -> Run:
        run = make_run(
            prompt,
            _together(named),
            max_tokens=max_tokens,
            seed=seed,
            stop_after=stop_after,
            deadline=None if patience is None else self.simulation.now + patience,
            tenant=tenant,
            priority=priority,
            cache_salt=cache_salt,
            pinned=pinned,
            params=params or (PoolingParams() if self.bidirectional else None),
            bidirectional=self.bidirectional,
            **sampled,
        )
        if self.simulation.fits(run):
            self.simulation.add(run)
        return run

    @rule(target=runs, leader=runs, seed=st.integers(2, 9), max_tokens=st.integers(1, 12))
    def submit_another_answer(self, leader: Run, seed: int, max_tokens: int) -> Run:
        """To the prompt of a request, which may wait, run or have ended."""
        job = leader.job
        if isinstance(job, PromptPin | PoolingRequest):
            return leader
        run = make_run(
            job.prompt_token_ids,
            job.adapters,
            max_tokens=max_tokens,
            seed=seed,
            deadline=job.deadline,
            tenant=job.tenant,
            priority=job.priority,
            cache_salt=job.cache_salt,
            leader=job.request_id,
        )
        if leader in self.simulation.runs and self.simulation.fits(run):
            self.simulation.add(run)
        return run

    @rule(adapter=adapters)
    def prefetch(self, adapter: AdapterSpec) -> None:
        if self.simulation.residency.num_pages(adapter) < self.simulation.pool.num_pages:
            self.simulation.residency.prefetch(adapter)

    @rule(
        name=st.sampled_from("ab"), named=st.lists(adapters, max_size=2, unique_by=lambda spec: spec.revision)
    )
    def pin_adapters(self, name: str, named: list[AdapterSpec]) -> None:
        """That they stay until they are dropped is looked at after each step."""
        scheduler = self.simulation.scheduler
        try:
            scheduler.allocation.check_pin_adapters(name, named)
        except AdapterTooLargeError:
            return
        running = [run for run in self.simulation.runs if run.end is None]
        scheduler.pin_adapters(name, tuple(named))
        self.crowded_out.update(run for run in running if run.end is FinishReason.FAILED)

    @rule(adapter=adapters)
    def drop(self, adapter: AdapterSpec) -> None:
        self.simulation.scheduler.drop(adapter.revision)
        self.dropped.add(adapter.revision)
        self.pinned -= {run for run in self.pinned if adapter in (use.spec for use in run.job.adapters)}

    @precondition(lambda self: self.simulation.device.pending)
    @rule(data=st.data(), fails=st.integers(0, 4).map(lambda drawn: drawn == 4))
    def complete_a_placement(self, data: st.DataObject, fails: bool) -> None:  # noqa: FBT001
        index = data.draw(st.integers(0, len(self.simulation.device.pending) - 1))
        spec = self.simulation.device.complete(index, "no" if fails else None)
        if fails:
            self.excuse(spec.revision)

    @rule(run=runs)
    def cancel(self, run: Run) -> None:
        ended = run.end
        self.simulation.cancel(run)
        if run in self.simulation.runs:
            assert run.end is (ended or FinishReason.CANCELLED)

    @rule(run=runs)
    def unpin(self, run: Run) -> None:
        """Only this lets a prompt go: what is pinned is looked at after each step."""
        self.simulation.scheduler.allocation.unpin_prompt(run.job.request_id)
        self.pinned.discard(run)

    @rule(seconds=st.integers(1, 6))
    def wait(self, seconds: int) -> None:
        self.simulation.now += seconds

    @rule(count=st.integers(1, 12))
    def run_steps(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    @rule(data=st.data())
    def run_step_that_fails_for_some(self, data: st.DataObject) -> None:
        def faults(step: Step) -> dict[int, str]:
            ids = [part.sequence_id for part in step.sequences]
            chosen = data.draw(st.sets(st.sampled_from(ids)))
            for part in step.sequences:
                if part.sequence_id in chosen and part.sequence_id < 0:
                    assert part.prompt is not None
                    self.excuse(part.prompt)
            self.excused.update(run for run in self.simulation.runs if run.job.request_id in chosen)
            return dict.fromkeys(chosen, "no")

        self.simulation.step(faults)

    def excuse(self, revision: str) -> None:
        """Requests that may wait for this adapter may fail from here on."""
        self.excused.update(
            run
            for run in self.simulation.runs
            if run.end is None and revision in {use.spec.revision for use in run.job.adapters}
        )

    @invariant()
    def failures_have_a_reason(self) -> None:
        for run in self.simulation.runs:
            if isinstance(run.error, DeadlineError):
                assert run.job.deadline is not None
                assert self.simulation.now >= run.job.deadline
            elif isinstance(run.error, RequestTooLargeError):
                assert run in self.crowded_out or isinstance(run.job, PromptPin), "refused, once let in"
            elif run.error is not None:
                assert isinstance(run.error, GenerationFailedError | AdapterUnavailableError)
                assert run in self.excused

    @invariant()
    def what_is_pinned_stays(self) -> None:
        allocation = self.simulation.scheduler.allocation
        for run in self.simulation.runs:
            if run.end is FinishReason.PINNED and run not in self.ended:
                self.ended.add(run)
                self.pinned.add(run)
        held = {run for run in self.ended if allocation.is_prompt_pinned(run.job.request_id)}
        assert held == self.pinned

    @invariant()
    def pinned_adapters_stay(self) -> None:
        residency = self.simulation.residency
        pinned = {spec.revision for spec in residency.pinned()}
        assert all(one.pinned == (one.spec.revision in pinned) for one in residency)
        gone = self.kept_resident - {one.spec.revision for one in residency}
        assert not (gone & pinned) - self.dropped
        self.kept_resident = {one.spec.revision for one in residency if one.pinned and one.ready}

    @invariant()
    def the_books_add_up(self) -> None:
        self.simulation.check()

    def teardown(self) -> None:
        self.simulation.finish()
        self.pinned_adapters_stay()
        self.failures_have_a_reason()
        self.simulation.check_nothing_is_left()


# Parts for several workers, and most for `make test-all`.
@pytest.mark.parametrize("part", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 2, 3))])
def test_every_request_gets_its_own_tokens_and_one_end(part):  # noqa: ARG001
    run_state_machine_as_test(RandomLoad, settings=SIMULATION)


def test_every_text_gets_its_own_numbers_of_an_encoder_and_one_end():
    class OfEncoder(RandomLoad):
        bidirectional = True

    run_state_machine_as_test(OfEncoder, settings=SIMULATION)


def test_no_page_goes_to_a_copy_or_a_step_while_the_other_uses_it(monkeypatch):
    """On a GPU, where steps and copies go on after the calls that launch them."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)

    class OnStreams(RandomLoad):
        make_device = partial(StreamedDevice, cuda=cuda)

    run_state_machine_as_test(OnStreams, settings=settings(SIMULATION, max_examples=40))
