"""Pages of sequences by themselves; `test_scheduler` and `test_simulation` see them at work."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fake_device import PAGE_ELEMENTS, FakeDevice, make_run, make_spec
from turret_server.engine.kv.allocation import Allocation
from turret_server.engine.kv.pages import PagePool
from turret_server.engine.kv.prefix_cache import PrefixCache
from turret_server.engine.request import PromptPin
from turret_server.engine.residency.residency import Absence, Residency
from turret_server.engine.sequence import Sequence
from turret_server.engine.step import PageCopy
from turret_server.errors import AdapterTooLargeError, RequestTooLargeError

BLOCK = 4
LORA = make_spec("lora", slab_pages=3)
PREFIX = make_spec("prefix", num_virtual=6)


class World:
    def __init__(self, num_pages: int = 32) -> None:
        self.posted: list = []
        self.pool = PagePool(num_pages)
        self.cache = PrefixCache(self.pool)
        self.residency = Residency(
            pool=self.pool,
            memory=FakeDevice(num_pages, BLOCK, immediate=True),
            page_elements=PAGE_ELEMENTS,
            block_size=BLOCK,
            post=self.posted.append,
        )
        self.allocation = Allocation(self.pool, self.cache, self.residency, BLOCK)
        self.sequences: list[Sequence] = []
        self.pool.tick()

    def take(self, sequence: Sequence) -> list[PageCopy] | None:
        specs = [use.spec for use in sequence.job.adapters]
        residents = self.residency.ensure_all(specs, sequence.tenant)
        while self.posted:
            self.posted.pop()()
        copies = self.allocation.allocate(sequence, residents)
        if copies is not None:
            self.sequences.append(sequence)
        return copies

    def started(self, prompt, adapter=None, **options) -> Sequence:
        sequence = make_sequence(prompt, adapter, **options)
        assert self.take(sequence) is not None
        return sequence

    def computed(self, prompt, adapter=None, **options) -> Sequence:
        sequence = self.started(prompt, adapter, **options)
        self.allocation.commit(sequence, sequence.num_remaining)
        return sequence

    def pinned(self, prompt, adapter=None, **options) -> Sequence:
        sequence = self.computed(prompt, adapter, pinned=True, **options)
        self.allocation.pin_prompt(sequence, beside=[])
        self.sequences.remove(sequence)
        self.check()
        return sequence

    def release(self, sequence: Sequence) -> None:
        self.allocation.release(sequence)
        self.sequences.remove(sequence)
        self.check()

    def check(self) -> None:
        holders = [*self.sequences, *self.allocation.pinned_prompts]
        held = [page for sequence in holders for page in sequence.block_table]
        held += [page for resident in self.residency for page in resident.pages]
        self.pool.check_integrity([*held, *self.cache.pages])
        self.cache.check_integrity()


def make_sequence(prompt, adapter=None, **options) -> Sequence:
    return Sequence.of(make_run(prompt, adapter, **options).job)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "adapter", "expected"),
    [(1, 1, None, 1), (4, 1, None, 1), (4, 2, None, 2), (5, 4, LORA, 2 + 3), (2, 1, PREFIX, 1 + 2)],
)
def test_a_sequence_takes_the_pages_of_its_tokens_and_of_its_adapters(
    num_prompt, max_tokens, adapter, expected
):
    sequence = make_sequence(range(num_prompt), adapter, max_tokens=max_tokens)
    assert World().allocation.num_pages(sequence) == expected


def test_a_sequence_has_a_place_for_every_token_and_grows_by_one_page():
    world = World(3)
    sequence = world.started(range(8))
    assert len(sequence.block_table) == 2
    assert not world.allocation.needs_page(sequence)
    sequence.tokens.append(9)
    assert world.allocation.needs_page(sequence)
    assert world.allocation.grow(sequence)
    assert not world.allocation.needs_page(sequence)
    assert not world.allocation.grow(sequence)
    world.check()


def test_where_pages_are_too_few_nothing_is_taken():
    world = World(4)
    world.release(world.computed(range(4)))
    world.started(range(100, 104))
    sequence = make_sequence([*range(4), *range(50, 62)])
    assert world.take(sequence) is None
    assert sequence.block_table == []
    assert world.cache.num_idle == 1, "what was found stays, and can be evicted"
    world.check()


def test_what_was_computed_is_shared_and_not_computed_again():
    world = World()
    first = world.computed(range(10))
    second = world.started([*range(8), 99])
    assert second.block_table[:2] == first.block_table[:2]
    assert (second.num_computed, second.num_cached) == (8, 8)
    world.check()


def test_only_whole_blocks_are_kept():
    world = World()
    sequence = world.started(range(10))
    for num_tokens, kept in [(3, 0), (1, 1), (5, 2), (1, 2)]:
        world.allocation.commit(sequence, num_tokens)
        assert len(world.cache.pages) == kept
    world.release(sequence)
    assert world.cache.num_idle == 2


def test_a_salt_finds_only_its_own():
    world = World()
    world.release(world.computed(range(10), cache_salt="x"))
    for salt, cached in [("", 0), ("y", 0), ("x", 8)]:
        assert world.started(range(10), cache_salt=salt).num_cached == cached


@pytest.mark.parametrize(("num_virtual", "copied"), [(4, False), (6, True)])
def test_whole_pages_of_a_prefix_are_shared_and_the_last_is_copied(num_virtual, copied):
    world = World()
    sequence = make_sequence([1, 2], make_spec("p", num_virtual=num_virtual))
    copies = world.take(sequence)
    [resident] = world.residency
    assert sequence.block_table[0] == resident.prefix_pages[0]
    assert copies == ([PageCopy(resident.prefix_pages[1], sequence.block_table[1])] if copied else [])
    assert sequence.num_computed == num_virtual
    world.check()


def test_adapters_are_in_use_until_the_release():
    world = World()
    sequence = world.started([1], LORA)
    [resident] = world.residency
    assert resident.num_users == 1
    world.release(sequence)
    assert resident.num_users == 0


# Pinned prompts


def test_a_pinned_prompt_keeps_its_whole_blocks():
    world = World()
    sequence = world.pinned(range(10))
    assert world.allocation.is_prompt_pinned(sequence.job.request_id)
    assert world.allocation.num_pinned == 2
    while world.cache.num_idle:
        world.cache.evict()
    assert world.started(range(10)).num_cached == 8


def test_an_unpinned_prompt_goes_like_any_other():
    world = World()
    sequence = world.pinned(range(10), LORA)
    world.allocation.unpin_prompt(sequence.job.request_id)
    world.allocation.unpin_prompt(sequence.job.request_id)
    assert world.allocation.num_pinned == 0
    assert world.cache.num_idle == 2
    assert [resident.num_users for resident in world.residency] == [0]
    world.check()


def test_a_pinned_prompt_keeps_its_adapter_whose_pages_count_as_the_adapters():
    world = World()
    world.pinned(range(10), PREFIX)
    [resident] = world.residency
    assert resident.num_users == 1
    # Of sixteen tokens, the first four lie in the adapter's page.
    assert world.allocation.num_pinned == 3


def test_a_page_that_two_pinned_prompts_share_counts_once():
    world = World()
    world.pinned(range(8))
    world.pinned([*range(4), *range(50, 54)])
    assert world.allocation.num_pinned == 3


def test_pinned_prompts_that_were_computed_at_the_same_time_share_one_copy():
    world = World()
    first = world.started(range(8), pinned=True)
    second = world.started(range(8), pinned=True)
    for sequence in (first, second):
        world.allocation.commit(sequence, 8)
    for sequence in (first, second):
        world.allocation.pin_prompt(sequence, beside=[])
        world.sequences.remove(sequence)
        world.check()
    assert first.block_table == second.block_table
    assert world.allocation.num_pinned == 2


def test_a_prompt_is_pinned_in_whole_although_the_copy_that_the_cache_knew_was_evicted():
    world = World()
    first, second = world.started(range(8)), world.started(range(8), pinned=True)
    for sequence in (first, second):
        world.allocation.commit(sequence, 8)
    world.release(first)
    while world.cache.num_idle:
        world.cache.evict()
    world.allocation.pin_prompt(second, beside=[])
    world.sequences.remove(second)
    world.check()
    assert world.allocation.num_pinned == 2
    assert world.started([*range(8), 9]).num_cached == 8


def test_half_of_the_arena_may_be_pinned():
    world = World(8)
    world.pinned(range(8))
    world.allocation.check_pin_prompt(make_sequence(range(50, 58), pinned=True))
    with pytest.raises(
        RequestTooLargeError, match="may take 4 of the arena's 8 pages; this prompt and its adapters need 3"
    ) as refused:
        world.allocation.check_pin_prompt(make_sequence(range(50, 59), pinned=True))
    assert refused.value.metadata == {"needed_pages": "3", "arena_pages": "8", "pinned_pages": "2"}


def test_what_is_pinned_counts_against_what_can_fit():
    world = World(8)
    world.allocation.check_fits(make_sequence(range(32), max_tokens=1))
    with pytest.raises(RequestTooLargeError) as alone:
        world.allocation.check_fits(make_sequence(range(33), max_tokens=1))
    assert alone.value.metadata == {"needed_pages": "9", "arena_pages": "8", "pinned_pages": "0"}
    assert "pin" not in str(alone.value), "there is nothing to unpin"
    pinned = world.pinned(range(8))
    world.allocation.check_fits(make_sequence(range(24), max_tokens=1))
    said = r"of which pinned prompts and adapters take 2; .*unpin a prompt"
    with pytest.raises(RequestTooLargeError, match=said) as beside:
        world.allocation.check_fits(make_sequence(range(25), max_tokens=1))
    assert beside.value.metadata == {"needed_pages": "7", "arena_pages": "8", "pinned_pages": "2"}
    world.allocation.unpin_prompt(pinned.job.request_id)
    world.allocation.check_fits(make_sequence(range(25), max_tokens=1))


def test_the_adapter_of_a_pinned_prompt_does_not_count_twice_for_its_own_requests():
    world = World(12)
    world.pinned(range(4), LORA)
    world.allocation.check_fits(make_sequence(range(32), LORA, max_tokens=1))
    with pytest.raises(RequestTooLargeError):
        world.allocation.check_fits(make_sequence(range(33), max_tokens=1))


def test_a_prompt_is_not_pinned_where_it_leaves_no_room_for_those_who_wait():
    world = World(8)
    waits = make_sequence(range(28), max_tokens=1)
    world.allocation.check_fits(waits)
    sequence = world.computed(range(50, 58), pinned=True)
    with pytest.raises(RequestTooLargeError):
        world.allocation.pin_prompt(sequence, beside=[sequence, waits])
    assert world.allocation.num_pinned == 0
    world.release(sequence)


def test_a_prompt_is_pinned_only_where_it_leaves_its_share_for_requests():
    """Others may have been pinned since it was submitted."""
    world = World(8)
    sequence = world.computed(range(12), pinned=True)
    world.allocation.check_pin_prompt(sequence)
    world.pinned(range(50, 58))
    with pytest.raises(RequestTooLargeError, match="others take 2"):
        world.allocation.pin_prompt(sequence, beside=[])
    assert not world.allocation.is_prompt_pinned(sequence.job.request_id)
    world.release(sequence)


def test_a_request_that_runs_needs_no_more_than_when_it_was_let_in():
    world = World(8)
    sequence = world.computed(range(8), max_tokens=25)
    world.allocation.check_fits(sequence)
    sequence.tokens += range(20)
    world.allocation.check_fits(sequence)


def test_a_pinned_adapter_with_a_pinned_prompt_counts_once():
    world = World(16)
    world.residency.pin("poet", (LORA,))
    world.pinned(range(8), LORA)
    # Two blocks of the prompt and three pages of the adapter.
    world.allocation.check_fits(make_sequence(range(50, 50 + 4 * 11), max_tokens=1))
    with pytest.raises(RequestTooLargeError, match="pinned prompts and adapters take 5;"):
        world.allocation.check_fits(make_sequence(range(50, 51 + 4 * 11), max_tokens=1))
    # Of the adapter's own requests, only the prompt's blocks are in the way.
    world.allocation.check_fits(make_sequence(range(50, 50 + 4 * 11), LORA, max_tokens=1))
    with pytest.raises(RequestTooLargeError, match="pinned prompts and adapters take 2;"):
        world.allocation.check_fits(make_sequence(range(50, 51 + 4 * 11), LORA, max_tokens=1))


def test_a_pinned_adapter_under_another_name_counts_once_beside_a_pinned_prompt():
    world = World(16)
    world.residency.pin("poet", (LORA,))
    world.pinned(range(8), LORA)
    other = make_spec("other", slab_pages=3)
    world.allocation.check_pin_adapters("bard", [other])
    with pytest.raises(AdapterTooLargeError, match="needs 4 and others take 5"):
        world.allocation.check_pin_adapters("bard", [make_spec("other", slab_pages=4)])
    # In place of what is pinned under the name, the prompt's adapter stays all the same.
    with pytest.raises(AdapterTooLargeError, match="needs 4 and others take 5"):
        world.allocation.check_pin_adapters("poet", [make_spec("other", slab_pages=4)])


def test_a_sequence_that_failed_is_found_in_no_cache_and_its_prefix_is():
    world = World()
    sequence = world.computed(range(10), PREFIX)
    assert len(world.cache.pages) == 3
    world.allocation.invalidate(sequence)
    assert world.cache.pages == ()
    world.release(sequence)
    assert world.started(range(10), PREFIX).num_cached == PREFIX.num_virtual_tokens


def test_a_revision_that_goes_takes_its_pinned_prompts_along():
    world = World()
    gone, stays = world.pinned(range(8), LORA), world.pinned(range(8))
    world.allocation.drop("lora")
    assert not world.allocation.is_prompt_pinned(gone.job.request_id)
    assert world.allocation.is_prompt_pinned(stays.job.request_id)
    assert list(world.allocation.pinned_prompts) == [stays]
    world.check()


def test_whether_a_request_fits_may_be_asked_while_another_thread_unpins():
    world = World()
    first, second = world.pinned(range(8)), world.pinned(range(50, 58))

    class Meanwhile(list):
        def __iter__(self):
            world.allocation._pinned.pop(second.job.request_id, None)
            return super().__iter__()

    first.block_table = Meanwhile(first.block_table)
    world.allocation.check_fits(make_sequence([1]))


KINDS = st.sampled_from(
    [None, LORA, PREFIX, make_spec("large", slab_pages=5, num_virtual=3), make_spec("e", num_virtual=8)]
)


def start(world: World, sequence: Sequence) -> None:
    """Compute it, and pin it if it is to be pinned, if there is room now."""
    pins = isinstance(sequence.job, PromptPin)
    try:
        (world.allocation.check_pin_prompt if pins else world.allocation.check_fits)(sequence)
    except RequestTooLargeError:
        return
    specs = [use.spec for use in sequence.job.adapters]
    if isinstance(world.residency.ensure_all(specs, "a"), Absence) or world.take(sequence) is None:
        return
    world.allocation.commit(sequence, sequence.num_remaining)
    if pins:
        world.allocation.pin_prompt(sequence, beside=[])
        world.sequences.remove(sequence)


def grow(world: World, sequence: Sequence) -> None:
    sequence.tokens.append(7)
    if not world.allocation.needs_page(sequence) or world.allocation.grow(sequence):
        world.allocation.commit(sequence, 1)
    else:
        world.release(sequence)


@settings(max_examples=200, deadline=None)
@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["start", "pin", "grow", "release", "unpin"]),
            KINDS,
            st.integers(1, 20),
            st.integers(0, 99),
        ),
        max_size=30,
    )
)
def test_no_page_is_lost_whatever_comes_and_goes(events):
    world = World(24)
    for what, adapter, num_prompt, choice in events:
        world.pool.tick()
        running, pinned = world.sequences, list(world.allocation.pinned_prompts)
        if what in ("start", "pin"):
            first = choice % 2
            start(world, make_sequence(range(first, first + num_prompt), adapter, pinned=what == "pin"))
        elif what == "grow" and running:
            grow(world, running[choice % len(running)])
        elif what == "release" and running:
            world.release(running[choice % len(running)])
        elif what == "unpin" and pinned:
            world.allocation.unpin_prompt(pinned[choice % len(pinned)].job.request_id)
        world.check()
        assert world.allocation.num_pinned <= 12
    for sequence in list(world.sequences):
        world.release(sequence)
    for sequence in list(world.allocation.pinned_prompts):
        world.allocation.unpin_prompt(sequence.job.request_id)
    for resident in list(world.residency):
        world.residency.drop(resident.spec.revision)
    assert world.pool.num_free + world.cache.num_idle == 24


def test_pinned_adapters_count_against_what_can_fit():
    world = World(8)
    world.allocation.check_pin_adapters("poet", [LORA])
    world.residency.pin("poet", (LORA,))
    needed = world.residency.num_pages(LORA)
    fits = BLOCK * (8 - needed)
    world.allocation.check_fits(make_sequence(range(fits), max_tokens=1))
    with pytest.raises(RequestTooLargeError, match=f"of which pinned prompts and adapters take {needed}"):
        world.allocation.check_fits(make_sequence(range(fits + 1), max_tokens=1))
    # It is counted once for a request of its own.
    world.allocation.check_fits(make_sequence(range(fits), LORA, max_tokens=1))


def test_pinned_adapters_leave_half_of_the_arena():
    world = World(8)
    first, second = make_spec("first", slab_pages=3), make_spec("second", slab_pages=2)
    world.allocation.check_pin_adapters("poet", [first])
    world.residency.pin("poet", (first,))
    said = r"may take 4 of the arena's 8 pages; adapter 'bard' needs 2 and others take 3; pin fewer"
    with pytest.raises(AdapterTooLargeError, match=said) as refused:
        world.allocation.check_pin_adapters("bard", [second])
    assert refused.value.metadata == {"adapter_pages": "2", "arena_pages": "8", "pinned_pages": "3"}
    # In its place it may be, and under two names it counts once.
    world.allocation.check_pin_adapters("poet", [second])
    world.allocation.check_pin_adapters("bard", [first])
