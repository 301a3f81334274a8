from __future__ import annotations

from collections import deque

import pytest

from support.fake_device import PAGE_ELEMENTS, FakeDevice, make_spec
from turret_adapters.spec import PrefixKind
from turret_server.engine.kv.pages import PagePool
from turret_server.engine.kv.prefix_cache import PrefixCache
from turret_server.engine.residency.residency import MAX_LOADING, Absence, Residency
from turret_server.engine.residency.resident import Resident

BLOCK_SIZE = 4


class World(Residency):
    """Residency whose placements end when the test says so."""

    def __init__(self, num_pages: int, **weights: float) -> None:
        self.device = FakeDevice(num_pages, BLOCK_SIZE)
        self.inbox: deque = deque()
        super().__init__(
            pool=PagePool(num_pages),
            memory=self.device,
            page_elements=PAGE_ELEMENTS,
            block_size=BLOCK_SIZE,
            post=self.inbox.append,
            weight=lambda tenant: weights.get(tenant, 1.0),
        )
        self.pool.tick()

    def complete(self, index: int = 0, error: str | None = None) -> None:
        self.device.complete(index, error)
        self.inbox.popleft()()

    def tick(self) -> None:
        self.pool.tick()

    def ensure(self, spec, tenant="a"):
        return super().ensure(spec, tenant)

    def fill(self, spec, tenant="a"):
        resident = self.ensure(spec, tenant)
        self.complete()
        self.tick()
        return resident

    def check(self) -> None:
        self.pool.check_integrity([page for resident in self for page in resident.pages])
        assert self.num_slab_pages == sum(len(resident.slab_pages) for resident in self)
        assert self.num_prefix_pages == sum(len(resident.prefix_pages) for resident in self)


@pytest.fixture
def world():
    world = World(8)
    yield world
    world.check()


LORA = make_spec("lora", slab_pages=3)
OTHER = make_spec("other", slab_pages=3)
THIRD = make_spec("third", slab_pages=3)
KEY_VALUE = make_spec("key-value", num_virtual=5)
EMBEDDING = make_spec("embedding", num_virtual=5, kind=PrefixKind.EMBEDDING)


@pytest.mark.parametrize(
    ("num_virtual", "slab_pages", "expected"), [(0, 0, 0), (1, 0, 1), (4, 0, 1), (5, 0, 2), (8, 3, 5)]
)
def test_an_adapter_takes_the_pages_of_its_rows_and_of_its_virtual_tokens(
    world, num_virtual, slab_pages, expected
):
    spec = make_spec("r", slab_pages=slab_pages, num_virtual=num_virtual)
    assert world.num_pages(spec) == expected
    resident = world.ensure(spec)
    assert len(resident.slab_pages) == slab_pages
    assert len(resident.pages) == expected


def test_it_is_ready_when_its_copy_ends(world):
    resident = world.ensure(KEY_VALUE)
    assert not resident.ready
    world.complete()
    assert resident.ready
    assert world.to_compute() == []


def test_one_with_embeddings_is_computed_once_they_are_there(world):
    resident = world.ensure(EMBEDDING)
    assert world.to_compute() == []
    world.complete()
    assert world.to_compute() == [resident]
    resident.num_virtual_computed = 4
    assert world.to_compute() == [resident]
    resident.num_virtual_computed = 5
    assert resident.ready
    assert world.to_compute() == []


def test_repeated_requests_for_an_adapter_load_it_once(world):
    assert world.ensure(LORA) is world.ensure(LORA)
    assert len(world.device.pending) == 1


def test_the_one_used_longest_ago_makes_room(world):
    world.fill(LORA)
    world.fill(OTHER)
    world.ensure(LORA)
    world.tick()
    assert world.ensure(THIRD).pages
    assert world.get("other") is None
    assert world.get("lora")


@pytest.mark.parametrize("state", ["in use", "copying", "computing", "just looked at"])
def test_one_that_is_needed_makes_no_room(world, state):
    spec = EMBEDDING if state == "computing" else LORA
    resident = world.ensure(spec)
    if state != "copying":
        world.complete()
    world.tick()
    if state == "in use":
        world.acquire(resident, "a")
    world.tick()
    if state == "just looked at":
        world.ensure(spec)
    assert world.num_idle == 0
    assert world.ensure(make_spec("large", slab_pages=7)) is Absence.NO_ROOM
    assert world.get(spec.revision) is resident


def test_one_that_was_needed_makes_room_afterwards(world):
    resident = world.fill(LORA)
    world.acquire(resident, "a")
    world.tick()
    world.release(resident, "a")
    assert world.num_idle == 3
    assert world.ensure(make_spec("large", slab_pages=7)).pages
    assert world.get("lora") is None
    assert world.device.placed == {}


def test_nobody_goes_when_there_would_still_be_too_little_room(world):
    world.fill(LORA)
    world.acquire(world.fill(OTHER), "a")
    assert world.ensure(make_spec("large", slab_pages=6)) is Absence.NO_ROOM
    assert world.get("lora")


def test_an_idle_one_that_is_dropped_is_freed_at_once(world):
    world.fill(LORA)
    world.drop("lora")
    assert world.pool.num_free == 8
    assert world.device.placed == {}


def test_one_that_is_computed_is_freed_at_once_too(world):
    world.fill(EMBEDDING)
    world.drop("embedding")
    assert world.pool.num_free == 8


def test_one_in_use_that_is_dropped_is_freed_after_its_last_user(world):
    resident = world.fill(LORA)
    world.acquire(resident, "a")
    world.acquire(resident, "a")
    world.drop("lora")
    world.release(resident, "a")
    assert world.get("lora") is resident
    world.release(resident, "a")
    assert world.get("lora") is None
    assert world.pool.num_free == 8


@pytest.mark.parametrize("error", [None, "no"])
def test_one_that_is_dropped_while_it_is_copied_is_freed_after_the_copy(world, error):
    world.ensure(LORA)
    world.drop("lora")
    assert world.pool.num_free == 5
    world.complete(error=error)
    assert world.pool.num_free == 8


def test_one_that_is_asked_for_again_is_not_dropped(world):
    resident = world.ensure(LORA)
    world.drop("lora")
    world.ensure(LORA)
    world.complete()
    assert world.get("lora") is resident
    assert resident.ready


def test_what_is_not_there_can_be_dropped(world):
    world.drop("lora")
    assert world.pool.num_free == 8


def test_a_copy_that_fails_leaves_its_reason_and_no_page(world):
    resident = world.ensure(LORA)
    world.complete(error="no memory")
    assert resident.error == "no memory"
    assert world.get("lora") is None
    assert world.pool.num_free == 8
    again = world.ensure(LORA)
    world.complete()
    assert again.ready
    assert again.error is None


def test_copies_may_end_in_any_order(world):
    first, second = world.ensure(LORA), world.ensure(OTHER)
    world.complete(1)
    assert (first.ready, second.ready) == (False, True)
    world.complete(0)
    assert first.ready


def test_users_that_are_let_go_too_often_are_noticed():
    world = World(8)
    with pytest.raises(AssertionError):
        world.release(world.fill(LORA), "a")


def test_concurrent_loads_are_limited():
    world = World(2 * MAX_LOADING)
    specs = [make_spec(f"r{index}", slab_pages=1) for index in range(MAX_LOADING + 1)]
    assert all(world.ensure(spec).pages for spec in specs[:-1])
    assert world.ensure(specs[-1]) is Absence.BUSY
    assert world.pool.num_free == MAX_LOADING
    world.complete(error="no")
    assert world.ensure(specs[-1]).pages


def test_all_or_none_of_a_requests_adapters_are_on_their_way(world):
    assert world.ensure_all([LORA, make_spec("large", slab_pages=7)], "a") is Absence.NO_ROOM
    lora, other = world.ensure_all([LORA, OTHER], "a")
    assert (lora.spec, other.spec) == (LORA, OTHER)


def test_what_nobody_asked_for_yet_takes_only_free_pages(world):
    world.fill(LORA)
    world.prefetch(make_spec("large", slab_pages=6))
    assert world.get("lora")
    assert world.get("large") is None
    world.prefetch(make_spec("small", slab_pages=5))
    assert world.get("small")


def begin(world, resident, times=1, tenant="a"):
    for _ in range(times):
        world.ensure(resident.spec, tenant)
        world.acquire(resident, tenant)
        world.tick()
        world.release(resident, tenant)
        world.tick()


def test_one_that_is_used_often_stays_for_longer(world):
    often, seldom = world.fill(LORA), world.fill(OTHER)
    begin(world, often, times=5)
    begin(world, seldom)
    for _ in range(3):
        world.tick()
    world.ensure(THIRD)
    assert world.get("lora")
    assert world.get("other") is None


def test_uses_long_ago_count_for_little(world):
    old, new = world.fill(LORA), world.fill(OTHER)
    begin(world, old, times=5)
    world.pool.clock += 100_000
    begin(world, new)
    begin(world, old)
    assert new.num_uses == 1
    assert 1 < old.num_uses < 1.001


def test_of_equals_the_large_one_goes():
    world = World(8)
    world.fill(make_spec("large", slab_pages=4))
    world.fill(make_spec("small", slab_pages=3))
    world.pool.clock += 100
    world.ensure(make_spec("new", slab_pages=3))
    assert world.get("small")
    assert world.get("large") is None


@pytest.mark.parametrize("weights", [{}, {"few": 1.0, "many": 1.0}, {"few": 3.0, "many": 3.0}])
def test_a_tenant_with_a_thousand_cold_adapters_evicts_its_own(weights):
    world = World(20, **weights)
    hot = [world.fill(make_spec(f"hot{index}", slab_pages=1), "few") for index in range(4)]
    for index in range(1000):
        begin(world, hot[index % 4], tenant="few")
        cold = world.fill(make_spec(f"cold{index}", slab_pages=1), "many")
        begin(world, cold, tenant="many")
        assert all(world.get(resident.spec.revision) for resident in hot)
    world.check()


def test_what_an_absent_tenant_left_behind_goes_in_the_end():
    world = World(20)
    for index in range(10):
        world.fill(make_spec(f"left{index}", slab_pages=1), "absent")
    for index in range(300):
        begin(world, world.fill(make_spec(f"cold{index}", slab_pages=1), "many"), tenant="many")
    assert {resident.tenant for resident in world} == {"many"}


def test_a_tenant_with_more_weight_keeps_more():
    world = World(24, light=1.0, heavy=3.0)
    for index in range(600):
        for tenant in ("light", "heavy"):
            begin(world, world.fill(make_spec(f"{tenant}{index}", slab_pages=1), tenant), tenant=tenant)
    held = [resident.tenant for resident in world]
    assert held.count("heavy") > 1.3 * held.count("light")


def test_one_that_is_used_often_outlives_cached_blocks_that_were_used_later():
    """Those are seldom asked for again. In the end it goes all the same."""
    world = World(8)
    cache = PrefixCache(world.pool)
    begin(world, world.fill(LORA), times=9)
    stayed = 0
    while world.get("lora"):
        [page] = world.pool.allocate(1)
        key = bytes([stayed])
        cache.insert(key, page)
        world.pool.release([page])
        cache.mark_released([key])
        world.tick()
        stayed += 1
    assert 3 * (world.pool.num_pages - 3) < stayed < 100


def test_one_that_was_evicted_and_came_back_is_not_taken_for_what_it_was():
    world = World(12)
    old = [world.fill(make_spec(f"r{index}", slab_pages=1)) for index in range(12)]
    world.tick()
    assert world.pool.allocate(1)
    gone = next(one for one in old if world.get(one.spec.revision) is None)
    world.drop("r11" if gone.spec.revision != "r11" else "r10")
    again = world.fill(gone.spec)
    assert again is not gone
    while world.num_idle:
        world.evict()
    assert list(world) == []


def test_to_evict_many_does_not_look_at_all_for_each(monkeypatch):
    world = World(1000)
    for index in range(1000):
        world.fill(make_spec(f"r{index}", slab_pages=1))
    looked_at = 0
    staleness = Resident.staleness

    def count(resident, clock):
        nonlocal looked_at
        looked_at += 1
        return staleness(resident, clock)

    monkeypatch.setattr(Resident, "staleness", count)
    for index in range(500):
        assert world.fill(make_spec(f"new{index}", slab_pages=1))
    # Every sixteen steps all are put in order, and each eviction looks at the first of them.
    assert looked_at < 1000 * (500 / 16 + 2) + 2 * 500


def test_every_idle_one_can_be_evicted_however_old_the_order_is():
    world = World(16)
    residents = [world.fill(make_spec(f"r{index}", slab_pages=1)) for index in range(16)]
    assert world.pool.allocate(1)
    # All of those that were to go next are used, and those after them must go.
    for resident in residents[1:8]:
        world.ensure(resident.spec)
    assert world.pool.allocate(8)
    assert {resident.spec.revision for resident in world} == {f"r{index}" for index in range(1, 8)}
    world.tick()
    assert world.num_idle == 7


def test_a_pinned_adapter_is_loaded_and_not_evicted(world):
    world.pin("poet", (LORA,))
    assert world.load_pinned()
    world.complete()
    world.tick()
    world.fill(OTHER)
    assert world.ensure(THIRD, "a").pages
    assert world.get("lora").ready
    assert world.get("other") is None
    world.pin("poet", ())
    world.complete()
    world.tick()
    assert world.ensure(make_spec("large", slab_pages=5), "a") is not Absence.NO_ROOM
    assert world.get("lora") is None


def test_what_is_pinned_under_a_name_takes_the_place_of_what_was(world):
    world.pin("poet", (LORA,))
    world.pin("bard", (LORA, OTHER))
    assert world.load_pinned()
    world.pin("bard", (OTHER,))
    world.pin("poet", (OTHER,))
    assert [spec.revision for spec in world.pinned()] == ["other"]
    assert [resident.pinned for resident in world] == [False, True]
    assert [spec.revision for spec in world.pinned(but="poet")] == ["other"]
    world.complete()
    world.complete()


def test_what_is_pinned_only_under_a_name_is_left_out_with_it(world):
    world.pin("poet", (LORA,))
    world.pin("bard", (OTHER,))
    assert [spec.revision for spec in world.pinned(but="poet")] == ["other"]


def test_it_belongs_to_the_tenant_that_used_it_last(world):
    resident = world.fill(LORA, "a")
    begin(world, resident, tenant="b")
    assert resident.is_held_by("b")
    assert not resident.is_held_by("a")


def test_one_was_last_used_when_its_last_request_ended(world):
    resident = world.fill(LORA)
    world.acquire(resident, "a")
    begin(world, world.fill(OTHER))
    for _ in range(9):
        world.tick()
    world.release(resident, "a")
    world.tick()
    assert world.ensure(THIRD).pages
    assert world.get("lora")
    assert world.get("other") is None
    world.complete()


def test_a_pinned_adapter_without_room_is_loaded_once_there_is_room(world):
    user = world.fill(make_spec("large", slab_pages=6))
    world.acquire(user, "a")
    world.pin("poet", (LORA,))
    assert not world.load_pinned()
    world.release(user, "a")
    world.tick()
    assert world.load_pinned()
    world.complete()
    assert world.get("lora").pinned


def test_a_failed_load_of_a_pinned_adapter_is_retried_when_it_is_pinned_again(world):
    world.pin("poet", (LORA,))
    world.load_pinned()
    world.complete(error="no memory")
    world.load_pinned()
    assert not world.device.pending
    world.pin("poet", (LORA,))
    world.load_pinned()
    world.complete()
    assert world.get("lora").ready


def test_what_is_pinned_is_held_by_no_tenant(world):
    resident = world.fill(LORA)
    assert resident.is_held_by("a")
    world.pin("poet", (LORA,))
    assert not resident.is_held_by("a")
