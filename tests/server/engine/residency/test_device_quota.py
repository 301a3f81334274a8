"""A tenant's adapters have no more pages than it may have: its own give way first, and nobody else's do."""

from __future__ import annotations

import pytest

from support.fake_device import PAGE_ELEMENTS, FakeDevice, make_run, make_spec
from turret_server.engine.kv.allocation import Allocation
from turret_server.engine.kv.pages import PagePool
from turret_server.engine.kv.prefix_cache import PrefixCache
from turret_server.engine.residency.residency import Absence, Residency
from turret_server.engine.sequence import Sequence
from turret_server.errors import QuotaExceededError

BLOCK, MOST = 4, 6
A, B, C = (make_spec(name, slab_pages=3) for name in "abc")
LARGE = make_spec("large", slab_pages=7)
LARGE_ENOUGH = make_spec("large enough", slab_pages=MOST)


class World:
    """`acme` may have `MOST` pages, everybody else what there is."""

    def __init__(self) -> None:
        self.most: dict[str, int] = {"acme": MOST}
        self.posted: list = []
        self.pool = PagePool(32)
        self.residency = Residency(
            pool=self.pool,
            memory=FakeDevice(32, BLOCK, immediate=True),
            page_elements=PAGE_ELEMENTS,
            block_size=BLOCK,
            post=self.posted.append,
            max_pages=self.most.get,
        )
        self.allocation = Allocation(self.pool, PrefixCache(self.pool), self.residency, BLOCK)
        self.pool.tick()

    def bring(self, *specs, tenant="acme"):
        found = self.residency.ensure_all(specs, tenant)
        while self.posted:
            self.posted.pop()()
        self.pool.tick()
        return found

    def use(self, *specs, tenant="acme"):
        residents = self.bring(*specs, tenant=tenant)
        for resident in residents:
            self.residency.acquire(resident, tenant)
        return residents

    def end(self, residents, tenant="acme"):
        for resident in residents:
            self.residency.release(resident, tenant)
        self.pool.tick()

    def has_room(self, *specs, tenant="acme") -> bool:
        return not isinstance(self.bring(*specs, tenant=tenant), Absence)

    def there(self) -> set[str]:
        return {resident.spec.revision for resident in self.residency}

    def sequence(self, *specs, pinned=False, tenant="acme") -> Sequence:
        run = make_run(range(8), specs[0], max_tokens=1, pinned=pinned, tenant=tenant)
        return Sequence.of(run.job, 0.0)


@pytest.fixture
def world():
    world = World()
    yield world
    world.pool.check_integrity([page for resident in world.residency for page in resident.pages])


def test_what_it_uses_no_more_gives_way_to_what_it_asks_for(world):
    for spec in (A, B):
        world.end(world.use(spec))
    world.end(world.use(C, tenant="bolt"), tenant="bolt")
    assert world.there() == {"a", "b", "c"}
    world.use(make_spec("d", slab_pages=3))
    assert world.there() == {"b", "c", "d"}
    assert world.residency.num_evicted == 1


def test_where_all_of_its_own_are_in_use_it_waits_and_evicts_nobody(world):
    first = world.use(A)
    world.use(B)
    world.end(world.use(C, tenant="bolt"), tenant="bolt")
    other = make_spec("d", slab_pages=3)
    assert world.bring(other) is Absence.QUOTA
    assert world.there() == {"a", "b", "c"}
    world.end(first)
    assert world.has_room(other)
    assert world.there() == {"b", "c", "d"}


def test_others_go_on_while_it_waits(world):
    world.use(A)
    world.use(B)
    assert world.bring(C) is Absence.QUOTA
    assert world.has_room(C, tenant="bolt")


def test_adapters_that_others_loaded_count_while_they_are_in_use(world):
    world.end(world.use(C, tenant="bolt"), tenant="bolt")
    world.use(A)
    world.use(B)
    assert world.bring(C) is Absence.QUOTA


def test_what_another_uses_as_well_does_not_hold_it_up(world):
    world.end(world.use(A))
    world.use(A, tenant="bolt")
    world.use(B)
    # The last who asked for `a` was bolt, which keeps it: it is none of acme's pages.
    assert world.has_room(C)
    assert world.there() == {"a", "b", "c"}


def test_all_of_a_requests_adapters_are_allowed_or_none(world):
    world.use(A)
    assert world.bring(B, C) is Absence.QUOTA
    assert world.there() == {"a"}


def test_who_comes_behind_one_that_was_refused_waits_in_that_step_as_well(world):
    world.use(A)
    small = make_spec("small", slab_pages=1)
    assert world.residency.ensure_all([LARGE], "acme") is Absence.QUOTA
    assert world.residency.ensure_all([small], "acme") is Absence.QUOTA
    assert not isinstance(world.residency.ensure_all([C], "bolt"), Absence)
    world.pool.tick()
    assert world.has_room(small)


@pytest.mark.parametrize(("num_pages", "stay"), [(1, {"b"}), (3, {"b"}), (4, set()), (6, set())])
def test_no_more_of_its_own_give_way_than_must(world, num_pages, stay):
    for spec in (A, B):
        world.end(world.use(spec))
    assert world.has_room(make_spec("d", slab_pages=num_pages))
    assert world.there() == {*stay, "d"}


def test_nobody_gives_way_while_the_quota_has_room(world):
    world.end(world.use(A))
    assert world.has_room(B)
    assert world.there() == {"a", "b"}


def test_of_its_own_the_large_one_gives_way_before_one_that_is_a_little_older(world):
    for spec in (make_spec("small", slab_pages=1), make_spec("large", slab_pages=4)):
        world.end(world.use(spec))
    for _ in range(9):
        world.pool.tick()
    assert world.has_room(make_spec("d", slab_pages=2))
    assert world.there() == {"small", "d"}


def test_nothing_is_evicted_in_vain(world):
    world.end(world.use(A))
    world.use(B)
    assert world.bring(make_spec("d", slab_pages=4)) is Absence.QUOTA
    assert world.there() == {"a", "b"}


def test_a_prefetch_stays_within_the_quota(world):
    for spec in (A, B, C):
        world.residency.prefetch(spec, "acme")
    assert world.there() == {"a", "b"}


def test_what_is_pinned_for_everybody_is_none_of_its_pages(world):
    world.residency.pin("a", (A,))
    world.use(A)
    world.use(B)
    world.use(C)
    assert world.there() == {"a", "b", "c"}


def test_a_request_that_could_never_be_is_refused(world):
    with pytest.raises(QuotaExceededError, match=r"'acme' may take 6 .* need 7") as refused:
        world.allocation.check_fits(world.sequence(LARGE))
    assert refused.value.metadata == {"tenant": "acme", "quota": "max_device_bytes"}
    assert refused.value.retry_after is None
    world.allocation.check_fits(world.sequence(LARGE, tenant="bolt"))


def test_a_request_beside_its_own_pinned_prompts_is_refused_and_beside_others_not(world):
    for tenant, refused in (("bolt", False), ("acme", True)):
        sequence = world.sequence(make_spec(f"of {tenant}", slab_pages=4), pinned=True, tenant=tenant)
        residents = world.bring(sequence.job.adapters[0].spec, tenant=tenant)
        assert world.allocation.allocate(sequence, residents) is not None
        world.allocation.commit(sequence, sequence.num_remaining)
        world.allocation.pin_prompt(sequence, beside=[])
        if refused:
            with pytest.raises(QuotaExceededError, match="pinned prompts take 4"):
                world.allocation.check_fits(world.sequence(A))
        else:
            world.allocation.check_fits(world.sequence(A))
        world.allocation.unpin_prompt(sequence.job.request_id)
    release_cache(world)


def pin_prompt(world, spec, tenant="acme") -> Sequence:
    sequence = world.sequence(spec, pinned=True, tenant=tenant)
    assert world.allocation.allocate(sequence, world.bring(spec, tenant=tenant)) is not None
    world.allocation.commit(sequence, sequence.num_remaining)
    world.allocation.pin_prompt(sequence, beside=[])
    return sequence


def release_cache(world) -> None:
    for page in list(world.allocation._cache.pages):
        world.pool.release([page])


def test_the_adapter_of_a_pinned_prompt_does_not_count_twice_for_its_own_requests(world):
    pinned = pin_prompt(world, make_spec("four", slab_pages=4))
    world.allocation.check_fits(world.sequence(make_spec("four", slab_pages=4)))
    world.allocation.unpin_prompt(pinned.job.request_id)
    release_cache(world)


def test_a_pinned_prompt_whose_adapter_is_pinned_takes_nothing_of_the_quota(world):
    spec = make_spec("four", slab_pages=4)
    world.residency.pin("name", (spec,))
    pinned = pin_prompt(world, spec)
    world.allocation.check_fits(world.sequence(LARGE_ENOUGH))
    world.allocation.unpin_prompt(pinned.job.request_id)
    release_cache(world)


def test_a_request_for_a_pinned_adapter_is_checked_against_no_quota(world):
    world.residency.pin("name", (LARGE,))
    world.allocation.check_fits(world.sequence(LARGE))


def test_a_request_without_adapters_is_refused_for_no_quota(world):
    """Also where the quota was lowered below what a pinned prompt takes."""
    pinned = pin_prompt(world, make_spec("four", slab_pages=4))
    world.most["acme"] = 2
    run = make_run(range(8), max_tokens=1, tenant="acme")
    world.allocation.check_fits(Sequence.of(run.job))
    world.allocation.unpin_prompt(pinned.job.request_id)
    release_cache(world)


def test_a_prompt_is_not_pinned_where_its_adapter_leaves_no_quota_for_those_who_wait(world):
    pinned, waits = world.sequence(make_spec("four", slab_pages=4), pinned=True), world.sequence(A)
    world.allocation.allocate(pinned, world.bring(pinned.job.adapters[0].spec))
    world.allocation.commit(pinned, pinned.num_remaining)
    with pytest.raises(QuotaExceededError, match="need 3, and those of its pinned prompts take 4"):
        world.allocation.pin_prompt(pinned, beside=[pinned, waits])
    assert not world.allocation.is_prompt_pinned(pinned.job.request_id)
    world.allocation.release(pinned)
    release_cache(world)


def test_a_prompt_is_not_pinned_beyond_the_quota(world):
    with pytest.raises(QuotaExceededError):
        world.allocation.check_pin_prompt(world.sequence(LARGE, pinned=True))
