from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest

from support.fake_device import PAGE_ELEMENTS, FakeDevice, Run, make_run, make_spec
from support.guarded import guard
from turret_adapters.spec import AdapterSpec, PrefixKind
from turret_server import logs
from turret_server.engine.admission import TenantLimits
from turret_server.engine.fairness import FairQueue
from turret_server.engine.loop import Engine, EngineStats
from turret_server.engine.request import FinishReason, Output
from turret_server.engine.scheduler import Limits
from turret_server.engine.step import DeviceLostError, Step, StepResult
from turret_server.errors import (
    AdapterTooLargeError,
    DeadlineError,
    GenerationFailedError,
    QueueFullError,
    QuotaExceededError,
    RequestTooLargeError,
    ShuttingDownError,
)

# Far more than anything takes: it only keeps a broken engine from hanging the tests.
PATIENCE = 60.0
NUM_PAGES, BLOCK_SIZE = 16, 4
LORA = make_spec("lora", slab_pages=3)


class Gate(FakeDevice):
    """A device whose steps wait while the gate is shut, and go through `before` first."""

    def __init__(self) -> None:
        super().__init__(NUM_PAGES, BLOCK_SIZE, immediate=True)
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.before: Callable[[Step], None] = lambda _: None

    def shut(self) -> None:
        self.reached.clear()
        self.open.clear()

    def run(self, step: Step) -> StepResult:
        self.reached.set()
        assert self.open.wait(PATIENCE)
        self.before(step)
        return super().run(step)


class Served:
    def __init__(
        self,
        tenant_limits: TenantLimits = TenantLimits(),  # noqa: B008 (frozen)
        *,
        weights: Mapping[str, float] | None = None,
        max_adapter_pages: Mapping[str, int] | None = None,
    ) -> None:
        self.device = Gate()
        self.now = 0.0
        self.on_stats: Callable[[EngineStats], None] = lambda _: None
        self.engine = Engine(
            runner=self.device,
            memory=self.device,
            num_pages=NUM_PAGES,
            page_elements=PAGE_ELEMENTS,
            block_size=BLOCK_SIZE,
            limits=Limits(max_batch_tokens=32, max_batch_requests=2, max_step_seconds=1.0),
            tenants=lambda tenant: replace(tenant_limits, weight=(weights or {}).get(tenant, 1.0)),
            max_adapter_pages=(max_adapter_pages or {}).get,
            on_stats=self._record,
            clock=lambda: self.now,
        )
        self.ended: dict[int, threading.Event] = {}

    def _record(self, stats: EngineStats) -> None:
        self.on_stats(stats)

    def submit(self, run: Run, on_output: Callable[[Output], None] = lambda _: None) -> Run:
        event = self.ended[run.job.request_id] = threading.Event()

        def sink(output: Output) -> None:
            run.sink(output)
            if output.finish_reason:
                event.set()
            on_output(output)

        run.job = replace(run.job, sink=sink)
        self.engine.submit(run.job)
        return run

    def hold(self) -> Run:
        """A request in the middle of its second step, until the gate opens."""
        running = threading.Event()

        def shut_once(_: Output) -> None:
            if not running.is_set():
                self.device.shut()
                running.set()

        run = self.submit(make_run([1], max_tokens=5), shut_once)
        assert running.wait(PATIENCE)
        assert self.device.reached.wait(PATIENCE)
        return run

    def wait(self, *runs: Run) -> None:
        for run in runs:
            assert self.ended[run.job.request_id].wait(PATIENCE)
            run.check()

    def settle(self) -> None:
        """Whatever was posted before is done."""
        self.engine.check_integrity()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    served.engine.start()
    yield served
    served.device.open.set()
    served.engine.stop()
    served.engine.check_integrity()


def free_pages(served: Served) -> int:
    return served.engine._scheduler.pool.num_free


def adapter(num_virtual: int, slab_pages: int = 0, kind: PrefixKind = PrefixKind.KEY_VALUE) -> AdapterSpec:
    return make_spec(f"{num_virtual}-{slab_pages}", num_virtual=num_virtual, slab_pages=slab_pages, kind=kind)


def test_requests_of_all_kinds_run_beside_each_other(served):
    adapters = [None, LORA, adapter(5), adapter(5, 1, PrefixKind.EMBEDDING)]
    runs = [served.submit(make_run([1, 2, 3], spec, max_tokens=6)) for spec in adapters]
    served.wait(*runs)
    assert [run.end for run in runs] == [FinishReason.LENGTH] * 4


def test_many_threads_may_ask_at_once():
    served = Served(TenantLimits(max_queued_requests=1000))
    served.engine.start()
    runs: list[Run] = []

    def ask(number: int) -> None:
        for token in range(10):
            run = served.submit(make_run([token, number], [None, LORA][number % 2]))
            runs.append(run)
            if token % 3 == 0:
                served.engine.cancel(run.job.request_id)
            served.engine.is_resident("lora")
            served.engine.num_pages(LORA)
            served.engine.drop("lora")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served.wait(*runs)
    served.engine.check_integrity()
    served.engine.stop()
    assert {run.end for run in runs} <= {FinishReason.LENGTH, FinishReason.CANCELLED}
    assert len(runs) == 60


@pytest.mark.parametrize("what", ["a request", "a command", "the stop"])
def test_what_arrives_just_before_the_engine_sleeps_is_not_slept_through(what):
    served, arrived, seen = Served(), threading.Event(), threading.Event()
    stopping = threading.Thread(target=served.engine.stop, daemon=True)

    def arrive(stats: EngineStats) -> None:
        if arrived.is_set():
            if stats.step or served.engine.is_resident("lora"):
                seen.set()
            return
        match what:
            case "a request":
                served.submit(make_run([1]))
            case "a command":
                served.engine.prefetch(LORA)
            case "the stop":
                stopping.start()
                while not served.engine._stopping:
                    pass
        arrived.set()

    served.on_stats = arrive
    served.engine.start()
    assert arrived.wait(PATIENCE)
    if what != "the stop":
        assert seen.wait(PATIENCE)
        stopping.start()
    served.engine._thread.join(PATIENCE)
    assert not served.engine._thread.is_alive()
    stopping.join()


# What is refused


@pytest.mark.parametrize(
    ("spec", "num_prompt", "max_tokens", "pages"),
    [
        pytest.param(None, 60, 5, 16, id="the last token is not computed"),
        pytest.param(None, 60, 6, 17, id="one token more"),
        pytest.param(None, 64, 1, 16, id="a prompt of whole blocks"),
        pytest.param(LORA, 52, 1, 16, id="beside its rows"),
        pytest.param(LORA, 53, 1, 17, id="no more beside its rows"),
        pytest.param(adapter(8), 56, 1, 16, id="whole pages of a prefix are shared"),
        pytest.param(adapter(8), 57, 1, 17, id="one token more than with them"),
        pytest.param(adapter(7), 53, 1, 16, id="a partly filled page is there twice"),
        pytest.param(adapter(7), 54, 1, 17, id="one token more than that"),
    ],
)
def test_a_request_that_could_never_fit_is_refused(served, spec, num_prompt, max_tokens, pages):
    run = make_run([1] * num_prompt, spec, max_tokens=max_tokens)
    if pages <= NUM_PAGES:
        served.submit(run)
        served.wait(run)
        assert run.end is FinishReason.LENGTH
    else:
        with pytest.raises(RequestTooLargeError) as refused:
            served.submit(run)
        assert refused.value.metadata["needed_pages"] == str(pages)
        assert refused.value.metadata["arena_pages"] == "16"
        assert run.outputs == []


def test_an_adapter_that_leaves_no_page_is_refused(served):
    served.engine.check_adapter(adapter(4, 14))
    with pytest.raises(AdapterTooLargeError) as refused:
        served.engine.check_adapter(adapter(4, 15))
    assert refused.value.metadata == {"adapter_pages": "16", "arena_pages": "16"}


@pytest.mark.parametrize("num_virtual", range(9))
def test_the_largest_adapter_can_be_used(served, num_virtual):
    spec = adapter(num_virtual, 15 - -(-num_virtual // BLOCK_SIZE))
    served.engine.check_adapter(spec)
    run = served.submit(make_run([1], spec, max_tokens=1))
    served.wait(run)
    assert run.end is FinishReason.LENGTH


def test_no_more_wait_than_may():
    served = Served(TenantLimits(max_queued_requests=2))
    served.engine.start()
    held = served.hold()
    waiting = [served.submit(make_run([1])) for _ in range(2)]
    with pytest.raises(QueueFullError) as refused:
        served.submit(make_run([1]))
    assert refused.value.metadata["tenant"] == "default"
    assert refused.value.retry_after > 0
    other = served.submit(make_run([1], tenant="other"))
    served.device.open.set()
    served.wait(held, other, *waiting)
    later = served.submit(make_run([1]))
    served.wait(later)
    served.engine.stop()


# What fails


def test_a_step_that_raises_fails_its_request_and_the_engine_goes_on(served, caplog):
    def fail(_: Step) -> None:
        raise ValueError("no such page")

    counted: list[int] = []
    served.on_stats = lambda stats: counted.append(stats.num_failures)
    served.device.before = fail
    failed = served.submit(make_run([1], LORA))
    served.wait(failed)
    assert isinstance(failed.error, GenerationFailedError)
    assert "ValueError: no such page" in str(failed.error)
    assert f"request {failed.job.request_id} failed: the step failed" in caplog.text
    served.device.before = lambda _: None
    run = served.submit(make_run([1], LORA))
    served.wait(run)
    assert run.end is FinishReason.LENGTH
    served.settle()
    assert sum(counted) == 1


def test_a_step_that_raises_over_one_request_fails_no_other(served):
    def fail(step: Step) -> None:
        if any(-7 in part.token_ids for part in step.sequences):
            raise ValueError("token -7")

    served.device.before = fail
    held = served.hold()
    guilty, innocent = served.submit(make_run([-7], LORA)), served.submit(make_run([3], LORA, max_tokens=6))
    served.device.open.set()
    served.wait(held, guilty, innocent)
    assert isinstance(guilty.error, GenerationFailedError)
    assert held.end is innocent.end is FinishReason.LENGTH


def test_a_device_that_is_lost_ends_the_engine(served, caplog):
    def fail(_: Step) -> None:
        raise DeviceLostError("an illegal memory access was encountered")

    told = threading.Event()
    served.engine.on_failure = told.set
    served.device.before = fail
    run = served.submit(make_run([1]))
    served.wait(run)
    assert told.wait(PATIENCE)
    assert served.engine.failed
    assert "illegal memory access" in str(run.error)
    assert "the engine failed" in caplog.text


def test_a_sink_that_raises_ends_its_own_request_only(served, caplog):
    def fail(_: Output) -> None:
        raise RuntimeError("Event loop is closed")

    deaf = served.submit(make_run([1], max_tokens=5), fail)
    run = served.submit(make_run([2], max_tokens=9))
    served.wait(run)
    assert run.end is FinishReason.LENGTH
    assert len(deaf.outputs) == 1
    assert f"the sink of request {deaf.job.request_id} failed" in caplog.text


@pytest.mark.parametrize("where", ["stats", "schedule", "update", "command"])
def test_an_engine_that_fails_ends_every_request_and_refuses_more(served, where, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise AssertionError("page 3 is free")

    told = threading.Event()
    served.engine.on_failure = told.set
    held = served.hold()
    waiting = [served.submit(make_run([1])) for _ in range(4)]
    scheduler = served.engine._scheduler
    match where:
        case "stats":
            served.on_stats = fail
        case "command":
            monkeypatch.setattr(scheduler.residency.memory, "copy_to_device", fail)
            served.engine.prefetch(LORA)
        case _:
            # The scheduler has slots.
            monkeypatch.setattr(type(scheduler), where, fail)
    served.device.open.set()
    served.wait(held, *waiting)
    served.engine._thread.join(PATIENCE)
    for run in (held, *waiting):
        assert isinstance(run.error, GenerationFailedError)
        assert "page 3 is free" in str(run.error)
    assert "the engine failed" in caplog.text
    assert served.engine.failed
    assert told.is_set()
    with pytest.raises(ShuttingDownError):
        served.submit(make_run([1]))
    served.engine.cancel(held.job.request_id)


@pytest.mark.parametrize("ended_by", ["its last token", "a cancellation", "an error"])
def test_a_release_that_raises_loses_no_answer(ended_by, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("page 3 is free")

    def refuse(_: Step) -> None:
        raise ValueError("no such token")

    served = Served()
    served.engine.start()
    held, other = served.hold(), served.submit(make_run([2], max_tokens=9))
    monkeypatch.setattr(served.engine._scheduler.allocation, "release", fail)
    match ended_by:
        case "a cancellation":
            served.engine.cancel(held.job.request_id)
        case "an error":
            monkeypatch.setattr(served.device, "before", refuse)
    served.device.open.set()
    served.wait(held, other)
    served.engine._thread.join(PATIENCE)
    assert "page 3 is free" in str(other.error)
    match ended_by:
        case "its last token":
            assert held.end is FinishReason.LENGTH
        case "a cancellation":
            assert held.end is FinishReason.CANCELLED
        case "an error":
            assert "no such token" in str(held.error)


# Ends from outside


def test_a_cancelled_request_gives_its_pages_back_before_the_next_step(served):
    before = free_pages(served)
    run = served.hold()
    served.engine.cancel(run.job.request_id)
    served.device.open.set()
    served.settle()
    assert run.end is FinishReason.CANCELLED
    assert len(run.tokens) <= 2
    assert free_pages(served) == before


def test_a_request_that_is_cancelled_as_it_arrives_does_not_run(served):
    held = served.hold()
    run = served.submit(make_run([1]))
    served.engine.cancel(run.job.request_id)
    served.device.open.set()
    served.wait(held, run)
    assert (run.tokens, run.end) == ([], FinishReason.CANCELLED)


def test_the_deadline_ends_a_request_whose_adapter_never_comes(served):
    def pass_deadline(stats: EngineStats) -> None:
        # The engine sleeps next, and nothing that arrives wakes it.
        served.now = 5.0 * stats.num_waiting

    served.device.immediate = False
    served.on_stats = pass_deadline
    run = served.submit(make_run([1], LORA, deadline=5.0))
    served.wait(run)
    assert isinstance(run.error, DeadlineError)
    assert run.job.times.awaited == 0.0


def test_stop_ends_what_is_left_once(served):
    held = served.hold()
    waiting = [served.submit(make_run([1], spec)) for spec in (None, LORA, None)]
    stopping = threading.Thread(target=served.engine.stop)
    stopping.start()
    while not served.engine._stopping:
        pass
    with pytest.raises(ShuttingDownError):
        served.submit(make_run([1]))
    served.device.open.set()
    stopping.join()
    served.engine.stop()
    served.wait(held, *waiting)
    for run in (held, *waiting):
        assert isinstance(run.error, ShuttingDownError)
        assert sum(output.finish_reason is not None for output in run.outputs) == 1


def ask_until_refused(served: Served, accepted: list[Run], started: threading.Event) -> None:
    with contextlib.suppress(ShuttingDownError):
        for _ in range(200):
            run = served.submit(make_run([1], max_tokens=2))
            accepted.append(run)
            started.set()


def test_whatever_is_asked_while_it_stops_is_refused_or_ended():
    for _ in range(30):
        served = Served(TenantLimits(max_queued_requests=1000))
        served.engine.start()
        accepted: list[Run] = []
        started = threading.Event()
        thread = threading.Thread(target=ask_until_refused, args=(served, accepted, started))
        thread.start()
        assert started.wait(PATIENCE)
        served.engine.stop()
        thread.join()
        assert all(run.end for run in accepted)


def test_books_can_be_checked_after_the_end_and_before_the_start():
    served = Served()
    served.engine.check_integrity()
    served.engine.start()
    served.engine.stop()
    served.engine.check_integrity()


# Adapters


def test_an_adapter_is_made_resident_before_a_request_names_it(served):
    spec = adapter(5, 2, PrefixKind.EMBEDDING)
    assert not served.engine.is_resident(spec.revision)
    computed = threading.Event()
    served.on_stats = lambda stats: computed.set() if stats.step else None
    served.engine.prefetch(spec)
    assert computed.wait(PATIENCE)
    served.settle()
    assert served.engine.is_resident(spec.revision)
    assert served.engine.num_pages(spec) == 4
    served.engine.drop(spec.revision)
    served.settle()
    assert not served.engine.is_resident(spec.revision)
    assert free_pages(served) == NUM_PAGES


def test_an_adapter_is_resident_once_it_is_loaded():
    served = Served()
    served.device.immediate = False
    served.engine.prefetch(LORA)
    served.engine.step()
    assert not served.engine.is_resident("lora")
    served.device.complete()
    served.engine.step()
    assert served.engine.is_resident("lora")


# What the engine's parts tell each other, seen from outside: the engine is stepped by hand


def steps(served: Served, count: int = 20) -> None:
    for _ in range(count):
        served.engine.step()


def test_an_adapter_is_checked_against_its_tenants_quota():
    served = Served(max_adapter_pages={"a": 4})
    served.engine.check_adapter(adapter(0, 4), "a")
    said = "'a' may take 4 pages of the arena, and this one needs 5"
    with pytest.raises(QuotaExceededError, match=said) as refused:
        served.engine.check_adapter(adapter(0, 5), "a")
    assert refused.value.metadata == {"tenant": "a", "quota": "max_device_bytes"}
    assert refused.value.retry_after is None, "waiting makes it no smaller"
    served.engine.check_adapter(adapter(0, 5), "b")


def test_an_adapter_is_loaded_ahead_within_its_tenants_quota():
    served = Served(max_adapter_pages={"a": 4})
    for spec in (adapter(0, 3), adapter(0, 2)):
        served.engine.prefetch(spec, "a")
    steps(served)
    assert [served.engine.is_resident(revision) for revision in ("0-3", "0-2")] == [True, False]


def test_a_request_fails_where_its_tenants_quota_is_lowered_while_it_waits():
    quotas = {"a": 4}
    served = Served(max_adapter_pages=quotas)
    runs = served.submit(make_run([1], LORA, tenant="a", max_tokens=9))
    waits = served.submit(make_run([1], adapter(0, 3), tenant="a"))
    steps(served, 3)
    assert runs.tokens
    assert not waits.outputs
    quotas["a"] = 2
    served.engine.step()
    assert isinstance(waits.error, QuotaExceededError)
    assert not runs.end


def test_a_prompt_that_would_leave_too_little_is_refused_before_it_is_computed():
    served = Served()
    for num_tokens, refused in ((8 * BLOCK_SIZE, False), (8 * BLOCK_SIZE + 1, True)):
        pin = make_run(range(num_tokens), pinned=True).job
        with pytest.raises(RequestTooLargeError) if refused else contextlib.nullcontext():
            served.engine.pin_prompt(pin)


def test_requests_that_no_longer_fit_beside_adapters_that_are_pinned_fail():
    served = Served()
    large, small = (make_run(range(BLOCK_SIZE * blocks), max_tokens=1) for blocks in (14, 12))
    served.submit(large)
    served.submit(small)
    served.engine.pin_adapters("name", (LORA,))
    steps(served)
    assert isinstance(large.error, RequestTooLargeError)
    assert small.end is FinishReason.LENGTH


def test_adapters_are_pinned_in_place_of_those_of_their_name_only():
    served = Served()
    served.engine.pin_adapters("name", (adapter(0, 5),))
    steps(served)
    served.engine.check_pin_adapters("name", (adapter(0, 8),))
    with pytest.raises(AdapterTooLargeError, match="needs 8 and others take 5"):
        served.engine.check_pin_adapters("another", (adapter(0, 8),))
    served.engine.pin_adapters("name", ())
    steps(served)
    served.engine.check_pin_adapters("another", (adapter(0, 8),))


def test_retry_after_of_a_refused_request_is_when_the_next_running_one_ends():
    served = Served(TenantLimits(max_queued_requests=1))

    def second(_: Step) -> None:
        served.now += 1.0

    served.device.before = second
    served.submit(make_run(range(8), max_tokens=20))
    for _ in range(3):
        served.engine.step()
    served.submit(make_run(range(20), max_tokens=10))
    with pytest.raises(QueueFullError) as refused:
        served.submit(make_run([1]))
    assert refused.value.retry_after == pytest.approx(20 - 3)


def test_steps_are_made_as_large_as_their_time_allows():
    served = Served()

    def slow(step: Step) -> None:
        served.now += 0.05 * step.num_tokens

    served.device.before = slow
    sizes: list[int] = []
    served.on_stats = lambda stats: sizes.append(stats.step.num_tokens if stats.step else 0)
    for first in (0, 100):
        served.submit(make_run(range(first, first + 50), max_tokens=1))
        steps(served)
    # A step may take a second.
    assert max(sizes) == 20


def test_the_adapter_of_the_tenant_with_less_weight_goes_first():
    for heavy in "ab":
        served = Served(weights={heavy: 4.0})
        for tenant, spec in (("a", adapter(0, 6)), ("b", adapter(0, 5))):
            served.engine.prefetch(spec, tenant)
        steps(served)
        served.submit(make_run([1], adapter(0, 7), tenant="c"))
        steps(served)
        assert served.engine.is_resident("0-6") == (heavy == "a")
        assert served.engine.is_resident("0-5") == (heavy == "b")


def test_service_is_charged_by_the_weight_of_the_tenant():
    served = Served(weights={"a": 4.0})
    for tenant in "ab":
        served.submit(make_run(range(8), tenant=tenant, max_tokens=9))
    served.engine.step()
    queue = served.engine._scheduler.waiting
    assert queue.counter("b") == 4 * queue.counter("a") > 0


def test_the_log_line_of_a_failed_request_has_its_fields(caplog):
    def fail(_: Step) -> None:
        raise ValueError("no such page")

    seen: list[dict[str, object]] = []
    served = Served()
    served.device.before = fail
    run = make_run([1])
    run.job = replace(run.job, about={"request_id": "abc"})
    served.submit(run)

    def see(record: logging.LogRecord) -> bool:
        if "failed: the step failed" in record.getMessage():
            seen.append(dict(logs.bound()))
        return True

    caplog.handler.addFilter(see)
    steps(served)
    assert seen == [{"request_id": "abc"}]


def test_a_step_is_progress_and_an_engine_without_work_is_idle(served):
    progress, numbers = served.engine.progress, []
    served.device.before = lambda _: numbers.append((progress.number, progress.is_idle))
    served.wait(served.submit(make_run([1], max_tokens=3)))
    assert [is_idle for _, is_idle in numbers] == [False] * 3
    assert [number for number, _ in numbers] == sorted({number for number, _ in numbers})
    served.settle()
    while not progress.is_idle:
        pass


def test_a_step_that_hangs_is_not_waited_for_and_its_requests_end(served):
    held = served.hold()
    waiting = served.submit(make_run([1]))
    assert not served.engine.stop(timeout=0.01)
    served.engine.abandon()
    served.wait(held, waiting)
    assert isinstance(held.error, ShuttingDownError)
    assert isinstance(waiting.error, ShuttingDownError)
    served.device.open.set()
    assert served.engine.stop(PATIENCE)


def test_an_engine_that_stops_has_not_failed(served):
    told: list[str] = []
    served.engine.on_failure = lambda: told.append("failed")
    served.engine.stop()
    assert not served.engine.failed
    assert told == []


# Statistics


def test_statistics_say_who_has_the_pages(served):
    seen: list[EngineStats] = []
    served.on_stats = seen.append
    served.wait(served.submit(make_run(range(9), adapter(6, 3), max_tokens=3)))
    served.settle()
    assert all(sum(stats.pages.values()) == NUM_PAGES for stats in seen)
    # Six virtual tokens: a page that is shared, and one that the request has a copy of.
    during = next(stats for stats in seen if stats.num_running)
    assert during.pages == {"lora": 3, "prefix": 2, "cache": 0, "free": 8, "pinned": 0, "sequence": 3}
    assert seen[-1].pages == {"lora": 3, "prefix": 2, "cache": 3, "free": 8, "pinned": 0, "sequence": 0}
    assert sum(stats.step.num_tokens for stats in seen if stats.step) == 9 + 2


def test_statistics_of_each_step_count_what_happened_in_it():
    served, seen = Served(), list[EngineStats]()
    served.on_stats = seen.append

    def second(_: Step) -> None:
        served.now += 1.0

    served.device.before = second
    served.engine.step()
    idle = seen.pop()
    assert (idle.step, idle.seconds, idle.num_running, idle.num_waiting, idle.num_failures) == (
        *(None, 0.0, 0, 0, 0),
    )
    assert (idle.num_preempted, idle.num_evicted, idle.num_loading) == (0, 0, 0)
    # Two may run; the pages of both last for a while.
    runs = [served.submit(make_run(range(12), tenant=tenant, max_tokens=30)) for tenant in "abc"]
    served.engine.step()
    assert (seen[-1].seconds, seen[-1].num_running, seen[-1].num_waiting) == (1.0, 2, 1)
    steps(served, 60)
    assert {stats.num_preempted for stats in seen} == {0, 1}
    steps(served, 100)
    assert {run.end for run in runs} == {FinishReason.LENGTH}
    served.device.immediate = False
    served.engine.prefetch(adapter(0, 5))
    steps(served, 2)
    assert seen[-1].num_loading == 1
    served.device.complete()
    served.device.immediate = True
    served.submit(make_run([1], adapter(0, 12), max_tokens=1))
    del seen[:]
    steps(served, 2)
    assert sum(stats.num_evicted for stats in seen) == 1


def test_pinned_prompts_have_pages_of_their_own_in_the_statistics():
    served, seen = Served(), list[EngineStats]()
    served.on_stats = seen.append
    pin = make_run(range(8), pinned=True)
    served.engine.pin_prompt(pin.job)
    steps(served, 3)
    assert pin.end is FinishReason.PINNED
    assert served.engine.is_prompt_pinned(pin.job.request_id)
    assert {name: count for name, count in seen[-1].pages.items() if count} == {"pinned": 2, "free": 14}
    served.engine.unpin_prompt(pin.job.request_id)
    steps(served, 1)
    assert not served.engine.is_prompt_pinned(pin.job.request_id)
    assert {name: count for name, count in seen[-1].pages.items() if count} == {"cache": 2, "free": 14}


@pytest.mark.parametrize("runs", [True, False])
def test_a_page_that_is_lost_is_found_by_a_check_whether_the_engine_runs_or_not(runs):
    served = Served()
    if runs:
        served.engine.start()
    served.engine.check_integrity()
    pages = served.engine._scheduler.pool.allocate(1)
    with pytest.raises(AssertionError, match="0 hold it, 1 are counted"):
        served.engine.check_integrity()
    served.engine._scheduler.pool.release(pages)
    served.engine.check_integrity()
    assert not served.engine.failed
    served.engine.stop()


class WatchedEngine(Engine):
    """Whether the engine stops is written under the lock under which requests are accepted."""

    _wake = threading.Condition()
    _stops = False

    @property
    def _stopping(self) -> bool:
        return self._stops

    @_stopping.setter
    def _stopping(self, stops: bool) -> None:
        assert self._wake._is_owned() or not stops
        self._stops = stops


@pytest.mark.parametrize("ended_by", ["stop", "a failure"])
def test_no_request_is_accepted_between_the_end_of_the_engine_and_that_of_its_requests(
    ended_by, monkeypatch, caplog
):
    def fail(_: EngineStats) -> None:
        raise AssertionError("page 3 is free")

    monkeypatch.setitem(globals(), "Engine", WatchedEngine)
    served = Served()
    if ended_by == "a failure":
        served.on_stats = fail
    run = served.submit(make_run([1], max_tokens=30))
    if ended_by == "a failure":
        served.engine._loop()
        assert "page 3 is free" in caplog.text
    else:
        served.engine.stop()
        served.engine._loop()
    assert served.engine._stopping
    assert isinstance(run.error, GenerationFailedError if ended_by == "a failure" else ShuttingDownError)


def test_arrivals_and_commands_are_taken_together(monkeypatch):
    served, owned = Served(), list[bool]()
    scheduler = served.engine._scheduler
    add = type(scheduler).add

    def see(_self: object, sequence: object) -> None:
        owned.append(served.engine._wake._is_owned())
        add(scheduler, sequence)

    monkeypatch.setattr(type(scheduler), "add", see)
    runs = [served.submit(make_run([1])) for _ in range(2)]
    served.engine.step()
    assert owned == [True, True], "a cancellation that comes between them would find no request"
    steps(served)
    assert {run.end for run in runs} == {FinishReason.LENGTH}


def test_a_request_whose_queueing_fails_the_engine_gets_its_end_too(monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise AssertionError("the queue is broken")

    served = Served()
    runs = [served.submit(make_run([1])) for _ in range(2)]
    monkeypatch.setattr(FairQueue, "add", fail)
    served.engine._loop()
    assert "the queue is broken" in caplog.text
    for run in runs:
        assert "the queue is broken" in str(run.error)
        assert len(run.outputs) == 1


def test_what_other_threads_hand_over_is_written_and_taken_under_the_lock():
    served = Served()
    engine = served.engine
    guard(engine, lambda: engine._wake._is_owned() or engine._stopping, "_arriving")
    run = make_run([1], max_tokens=1)
    served.submit(run)
    engine.cancel(run.job.request_id)
    engine.step()
    assert served.ended[run.job.request_id].is_set()
    engine.stop()
