"""The real engine on a device that takes virtual time: seconds go by as steps and loads would take them.

The engine is not started: `Engine.turn` is called in its thread's place, on a clock that the simulator sets.
What happens while a step runs (arrivals, cancellations, loads that end) happens at its own time, before the
step ends, as from other threads.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from simulation.traces import Arrival, Tenant
from support.fake_device import PAGE_ELEMENTS, FakeDevice, Run, make_run
from turret_adapters.spec import AdapterSpec
from turret_server.engine.admission import TenantLimits
from turret_server.engine.loop import Engine, EngineStats
from turret_server.engine.request import FinishReason, Output, PromptPin, Request
from turret_server.engine.residency.residency import AdapterMemory
from turret_server.engine.scheduler import Limits
from turret_server.engine.step import Step, StepResult
from turret_server.errors import TurretError

# How long the engine's thread sleeps at most while requests wait.
_IDLE_SECONDS = 0.05

# A run that has not ended after so many turns never will.
_MOST_TURNS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds that things take: about those of a small model on a GPU.

    A step: fixed, for each token, for each sequence. A load by one of `num_loaders` threads: from the host's
    memory, which holds `host_pages` pages of adapters, or from disk; fixed and for each page.
    """

    step: float = 8e-3
    token: float = 5e-5
    sequence: float = 1e-4
    host_load: float = 2e-3
    host_page: float = 2e-4
    disk_load: float = 20e-3
    disk_page: float = 2e-3
    num_loaders: int = 4
    host_pages: int = 10_000

    def of_step(self, step: Step) -> float:
        return self.step + self.token * step.num_tokens + self.sequence * len(step.sequences)


class Device(AdapterMemory, Protocol):
    def run(self, step: Step) -> StepResult: ...


class CheapDevice:
    """Computes nothing: for loads that are too large for `FakeDevice`."""

    def copy_to_device(
        self,
        spec: AdapterSpec,  # noqa: ARG002 (the signature is the engine's)
        slab_pages: tuple[int, ...],  # noqa: ARG002
        prefix_pages: tuple[int, ...],  # noqa: ARG002
        done: Callable[[str | None], None],
    ) -> None:
        done(None)

    def forget(self, revision: str) -> None:
        pass

    def run(self, step: Step) -> StepResult:
        return StepResult(
            token_ids={
                part.sequence_id: hash((part.sequence_id, part.num_generated)) % 1000
                for part in step.sequences
                if part.sampling
            }
        )


@dataclass(eq=False, kw_only=True)
class Served(Run):
    """One request: what it was told, and when."""

    arrival: Arrival
    clock: Callable[[], float]
    times: list[float] = field(default_factory=list)
    refusal: TurretError | None = None

    def sink(self, output: Output) -> None:
        super().sink(output)
        self.times.append(self.clock())

    @property
    def is_answered(self) -> bool:
        return self.end in (FinishReason.LENGTH, FinishReason.STOP, FinishReason.PINNED)

    @property
    def first_token_seconds(self) -> float:
        return self.times[0] - self.arrival.at

    @property
    def gaps(self) -> list[float]:
        """Seconds between each token and the next."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]


class Simulator:
    """A trace, an engine, and time. With `checks`, every invariant is looked at after every turn."""

    def __init__(
        self,
        trace: Iterable[Arrival],
        tenants: Iterable[Tenant],
        *,
        num_pages: int,
        block_size: int = 16,
        device: Device | None = None,
        costs: Costs = Costs(),
        max_batch_tokens: int = 512,
        max_batch_requests: int = 64,
        max_step_seconds: float = 0.05,
        checks: bool = True,
        on_stats: Callable[[float, EngineStats], None] = lambda _now, _stats: None,
    ) -> None:
        limits = {tenant.name: tenant.limits for tenant in tenants}
        self.now = 0.0
        self.served: list[Served] = []
        self.loads: Counter[str] = Counter()
        self.disk_reads: Counter[str] = Counter()
        self.num_preempted = 0
        self._device = device or FakeDevice(num_pages, block_size, immediate=True)
        self._costs = costs
        self._checks = checks
        self._watch = on_stats
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._event_ids = itertools.count()
        self._host: OrderedDict[str, int] = OrderedDict()
        self._loaders = [0.0] * costs.num_loaders
        self._loading: set[str] = set()
        self._alive: dict[int, Served] = {}
        self.engine = Engine(
            runner=self,
            memory=self,
            num_pages=num_pages,
            page_elements=PAGE_ELEMENTS,
            block_size=block_size,
            limits=Limits(
                max_batch_tokens=max_batch_tokens,
                max_batch_requests=max_batch_requests,
                max_step_seconds=max_step_seconds,
            ),
            tenants=lambda name: limits.get(name, TenantLimits()),
            on_stats=self._on_stats,
            clock=lambda: self.now,
        )
        for arrival in trace:
            self.at(arrival.at, lambda arrival=arrival: self.submit(arrival))

    # Time

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._event_ids), what))

    def run_to_the_end(self) -> None:
        """Until everything has arrived and ended, and nothing is loaded any more."""
        self.run_until(float("inf"))

    def run_until(self, end: float) -> None:
        for _ in range(_MOST_TURNS):
            if self.now >= end or not (self._events or self._alive):
                break
            worked = self.engine.step()
            if self._checks:
                self.check()
            if not worked:
                self._sleep(end)
        else:
            raise AssertionError("the load never ends")
        if isinstance(self._device, FakeDevice):
            for served in self.served:
                if served.refusal is None:
                    served.check()

    def _sleep(self, end: float) -> None:
        wake = self._events[0][0] if self._events else end
        if self._alive:
            wake = min(wake, self.now + _IDLE_SECONDS)
        self._advance(min(wake, end))

    def _advance(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            when, _, what = heapq.heappop(self._events)
            self.now = max(self.now, when)
            what()
        self.now = max(self.now, until)

    # Clients

    def submit(self, arrival: Arrival) -> Served:
        made = make_run(
            arrival.prompt,
            arrival.adapter,
            max_tokens=arrival.max_tokens,
            seed=arrival.seed,
            deadline=arrival.deadline,
            tenant=arrival.tenant,
            priority=arrival.priority,
            cache_salt=arrival.cache_salt,
            pinned=arrival.pinned,
        )
        served = Served(arrival=arrival, clock=lambda: self.now)
        request_id = made.job.request_id

        def sink(output: Output) -> None:
            served.sink(output)
            if output.finish_reason:
                del self._alive[request_id]

        served.job = replace(made.job, sink=sink)
        self.served.append(served)
        self._alive[request_id] = served
        try:
            self._submit(served.job)
        except TurretError as error:
            served.refusal = error
            del self._alive[request_id]
        if arrival.until is not None:
            self.at(arrival.until, lambda: self._give_up(request_id))
        return served

    def _submit(self, job: Request | PromptPin) -> None:
        if isinstance(job, PromptPin):
            self.engine.pin_prompt(job)
        else:
            self.engine.submit(job)

    def _give_up(self, request_id: int) -> None:
        self.engine.cancel(request_id)
        self.engine.unpin_prompt(request_id)

    # The device

    def run(self, step: Step) -> StepResult:
        result = self._device.run(step)
        self._advance(self.now + self._costs.of_step(step))
        return result

    def copy_to_device(
        self,
        spec: AdapterSpec,
        slab_pages: tuple[int, ...],
        prefix_pages: tuple[int, ...],
        done: Callable[[str | None], None],
    ) -> None:
        self._loading.add(spec.revision)

        def end() -> None:
            self._loading.remove(spec.revision)
            self._device.copy_to_device(spec, slab_pages, prefix_pages, done)

        start = max(self.now, heapq.heappop(self._loaders))
        end_at = start + self._load_seconds(spec.revision, len(slab_pages) + len(prefix_pages))
        heapq.heappush(self._loaders, end_at)
        self.at(end_at, end)

    def _load_seconds(self, revision: str, num_pages: int) -> float:
        self.loads[revision] += 1
        seconds = self._costs.host_load + self._costs.host_page * num_pages
        if revision not in self._host:
            self.disk_reads[revision] += 1
            seconds += self._costs.disk_load + self._costs.disk_page * num_pages
        self._host[revision] = num_pages
        self._host.move_to_end(revision)
        while sum(self._host.values()) > self._costs.host_pages:
            self._host.popitem(last=False)
        return seconds

    def forget(self, revision: str) -> None:
        assert revision not in self._loading, "its copy still runs"
        self._device.forget(revision)

    # Invariants

    def _on_stats(self, stats: EngineStats) -> None:
        self.num_preempted += stats.num_preempted
        self._watch(self.now, stats)
        if self._checks:
            assert sum(stats.pages.values()) == self.engine._scheduler.pool.num_pages
            assert min(stats.pages.values()) >= 0, stats.pages
            residents = list(self.engine._scheduler.residency)
            assert stats.pages["lora"] == sum(len(resident.slab_pages) for resident in residents)
            assert stats.pages["prefix"] == sum(len(resident.prefix_pages) for resident in residents)
            assert stats.num_running <= self.engine._scheduler.limits.max_batch_requests

    def check(self) -> None:
        """The books add up, and nobody is lost."""
        self.engine._scheduler.check_integrity()
        known = [*self.engine._arriving, *self.engine._scheduler.sequences]
        ids = {sequence.job.request_id for sequence in known}
        assert ids == self._alive.keys(), "a request is lost, or lives after its end"
        queued = sum(not sequence.dequeued for sequence in known)
        assert self.engine._admission.num_queued == queued

    def check_nothing_is_left(self) -> None:
        """With all ended, unpinned and dropped, only the cache has pages, and no adapter is placed."""
        scheduler = self.engine._scheduler
        assert not self._alive
        for sequence in list(scheduler.allocation.pinned_prompts):
            self.engine.unpin_prompt(sequence.job.request_id)
        for resident in list(scheduler.residency):
            self.engine.drop(resident.spec.revision)
        self.engine.step()
        self.engine._scheduler.check_integrity()
        assert not list(scheduler.residency)
        assert scheduler.pool.num_free + scheduler.cache.num_idle == scheduler.pool.num_pages
        assert self.engine._admission.num_queued == 0

    # What came of it

    def of(self, tenant: str) -> list[Served]:
        return [served for served in self.served if served.arrival.tenant == tenant]

    def service(self, tenant: str, start: float, end: float) -> float:
        """What was computed for a tenant's answers between two times, in prompt tokens (see `fairness`)."""
        return sum(cost for at, cost in self.services(tenant) if start <= at < end)

    def services(self, tenant: str) -> list[tuple[float, float]]:
        """Times and costs of all that a tenant was answered; a prompt counts at its first token."""
        costs = []
        for served in self.of(tenant):
            for index, at in enumerate(served.times[: len(served.tokens)]):
                costs.append((at, 2.0 + (0 if index else len(served.arrival.prompt))))
        return sorted(costs)


def hit_rate(served: Sequence[Served], loads: Counter[str]) -> float:
    """The share of requests that needed no load of their own."""
    named = [one.arrival.adapter.revision for one in served if one.arrival.adapter]
    return 1 - sum(loads[revision] for revision in set(named)) / len(named)
