"""What comes and goes leaves nothing behind: every container of the engine is as large as before."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator

import pytest

from support.fake_device import PAGE_ELEMENTS, FakeDevice, Run, make_run, make_spec
from turret_adapters.spec import AdapterSpec, PrefixKind
from turret_server.engine.admission import TenantLimits
from turret_server.engine.loop import Engine
from turret_server.engine.request import PromptPin
from turret_server.engine.scheduler import Limits
from turret_server.errors import QueueFullError, QuotaExceededError

NUM_PAGES, BLOCK_SIZE = 32, 4


class World:
    """An engine stepped by hand. Each tenant may have 8 pages for adapters and 3 requests in the queue."""

    def __init__(self) -> None:
        self.device = FakeDevice(NUM_PAGES, BLOCK_SIZE, immediate=True)
        self.numbers = itertools.count()
        self.shared = make_spec("shared", slab_pages=1)
        self.now = 0.0
        self.engine = Engine(
            runner=self.device,
            memory=self.device,
            num_pages=NUM_PAGES,
            page_elements=PAGE_ELEMENTS,
            block_size=BLOCK_SIZE,
            limits=Limits(max_batch_tokens=64, max_batch_requests=2, max_step_seconds=1.0),
            tenants=lambda _: TenantLimits(max_queued_requests=3),
            max_adapter_pages=lambda _: 8,
            on_stats=lambda _: None,
            clock=lambda: self.now,
        )

    def adapter(self, **options) -> AdapterSpec:
        """One of a revision that never was before."""
        return make_spec(f"r{next(self.numbers)}", **{"slab_pages": 3, **options})

    def tenant(self) -> str:
        return f"tenant{next(self.numbers)}"

    def submit(self, *prompt: int, adapter=None, **options) -> Run:
        run = make_run(prompt or (1, 2, 3, 4, 5), adapter, **options)
        submit = self.engine.pin_prompt if isinstance(run.job, PromptPin) else self.engine.submit
        submit(run.job)
        return run

    def steps(self, count: int = 12) -> None:
        for _ in range(count):
            self.engine.step()


def finishes(world: World) -> None:
    spec = world.adapter(num_virtual=3, kind=PrefixKind.EMBEDDING)
    world.submit(adapter=spec, tenant=world.tenant())
    world.steps()
    world.engine.drop(spec.revision)


def is_cancelled_while_it_waits(world: World) -> None:
    runs = [world.submit(tenant=world.tenant()) for _ in range(4)]
    world.steps(1)
    for run in runs:
        world.engine.cancel(run.job.request_id)


def passes_its_deadline_while_it_waits(world: World) -> None:
    for _ in range(4):
        world.submit(tenant=world.tenant(), deadline=world.now + 1)
    world.steps(1)
    world.now += 2


def uses_an_adapter_that_stays(world: World) -> None:
    world.engine.pin_adapters("shared", (world.shared,))
    world.submit(adapter=world.shared, tenant=world.tenant())


def is_refused_by_the_queue(world: World) -> None:
    tenant = world.tenant()
    for _ in range(3):
        world.submit(tenant=tenant)
    with pytest.raises(QueueFullError):
        world.submit(tenant=tenant)


def is_refused_by_the_quota(world: World) -> None:
    with pytest.raises(QuotaExceededError):
        world.submit(adapter=world.adapter(slab_pages=9), tenant=world.tenant())


def waits_for_the_quota(world: World) -> None:
    tenant, specs = world.tenant(), [world.adapter() for _ in range(3)]
    for spec in specs:
        world.submit(adapter=spec, tenant=tenant)
    world.steps()
    for spec in specs:
        world.engine.drop(spec.revision)


def is_asked_for_after_its_revision_was_dropped(world: World) -> None:
    spec = world.adapter()
    world.engine.drop(spec.revision)
    world.steps(1)
    world.engine.num_pages(spec)
    world.engine.check_adapter(spec)


def is_dropped_while_it_is_used(world: World) -> None:
    spec = world.adapter()
    world.submit(adapter=spec)
    world.steps(1)
    world.engine.drop(spec.revision)


def fails_to_load(world: World) -> None:
    world.device.immediate = False
    world.submit(adapter=world.adapter())
    world.steps(1)
    world.device.complete(error="no memory")
    world.device.immediate = True


def is_dropped_while_it_is_loaded(world: World) -> None:
    world.device.immediate = False
    spec = world.adapter()
    world.engine.prefetch(spec)
    world.steps(1)
    world.engine.drop(spec.revision)
    world.steps(1)
    world.device.complete()
    world.device.immediate = True


def is_pinned_and_fails_to_load(world: World) -> None:
    world.device.immediate = False
    spec = world.adapter()
    world.engine.pin_adapters("name", (spec,))
    world.steps(1)
    world.device.complete(error="no memory")
    world.steps(1)
    world.engine.pin_adapters("name", ())
    world.engine.drop(spec.revision)
    world.device.immediate = True


def is_pinned_and_unpinned(world: World) -> None:
    pin = world.submit(adapter=world.adapter(), pinned=True)
    world.steps()
    world.engine.unpin_prompt(pin.job.request_id)


def is_pinned_until_its_revision_is_dropped(world: World) -> None:
    spec = world.adapter()
    world.submit(adapter=spec, pinned=True)
    world.steps()
    world.engine.drop(spec.revision)


def fails_in_a_step(world: World) -> None:
    def run(_: object) -> None:
        raise ValueError("no such page")

    world.submit(adapter=world.adapter(), tenant=world.tenant())
    world.device.run = run
    world.steps()
    del world.device.run


LIVES = (
    finishes,
    is_cancelled_while_it_waits,
    passes_its_deadline_while_it_waits,
    uses_an_adapter_that_stays,
    is_refused_by_the_queue,
    is_refused_by_the_quota,
    waits_for_the_quota,
    is_asked_for_after_its_revision_was_dropped,
    is_dropped_while_it_is_used,
    fails_to_load,
    is_dropped_while_it_is_loaded,
    is_pinned_and_fails_to_load,
    is_pinned_and_unpinned,
    is_pinned_until_its_revision_is_dropped,
    fails_in_a_step,
)


def containers(root: object) -> Iterator[tuple[str, int]]:
    """The path and the size of every container that the engine's objects hold."""
    seen: set[int] = set()
    queue = deque([("engine", root)])
    while queue:
        path, found = queue.popleft()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, dict | list | set | deque):
            yield path, len(found)
            values = found.values() if isinstance(found, dict) else found
            queue.extend((f"{path}[]", each) for each in values)
        elif type(found).__module__.startswith("turret_server.engine"):
            slots = [name for kind in type(found).__mro__ for name in getattr(kind, "__slots__", ())]
            for name in {*slots, *getattr(found, "__dict__", {})}:
                queue.append((f"{path}.{name}", getattr(found, name)))


def test_tenants_are_forgotten_although_the_engine_is_never_idle(monkeypatch):
    monkeypatch.setattr("turret_server.engine.scheduler._FORGET_EVERY", 10)
    monkeypatch.setattr("turret_server.engine.fairness.MAX_IDLE_TENANTS", 3)
    world = World()
    stream = world.submit(tenant="always", max_tokens=110)
    for _ in range(40):
        world.submit(tenant=world.tenant(), max_tokens=1)
        world.steps(2)
    assert stream.end is None
    assert len(world.engine._scheduler.waiting._counters) < 10


@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
def test_nothing_is_left_of_a_request_that(life):
    world = World()

    def sizes() -> dict[str, int]:
        world.steps(40)
        # Cached blocks and idle adapters fill the arena and no more.
        for reclaimer in (scheduler.cache, scheduler.residency):
            while reclaimer.num_idle:
                reclaimer.evict()
        return dict(containers(world.engine))

    scheduler = world.engine._scheduler
    life(world)
    before = sizes()
    for _ in range(3):
        life(world)
    assert sizes() == before
