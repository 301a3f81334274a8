from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret_server.engine.kv.pages import PagePool


class Keeper:
    """A reclaimer that holds `count` pages of a pool, the first since `oldest`, each a tick newer."""

    def __init__(self, pool: PagePool, count: int, oldest: int = 0, at_once: int = 1) -> None:
        self.pool = pool
        self.pages = pool.allocate(count) or []
        self.next = oldest
        self.at_once = at_once
        pool.add_reclaimer(self)

    @property
    def num_idle(self) -> int:
        return len(self.pages)

    @property
    def oldest(self) -> float:
        return self.next if self.pages else math.inf

    def evict(self) -> int:
        gone, self.pages = self.pages[: self.at_once], self.pages[self.at_once :]
        self.pool.release(gone)
        self.next += 1
        return len(gone)


def test_a_page_is_handed_out_once():
    pool = PagePool(5)
    assert sorted([*pool.allocate(2), *pool.allocate(3)]) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0


def test_none_is_taken_when_there_are_too_few():
    pool = PagePool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3


def test_no_pages_are_always_there():
    assert PagePool(0).allocate(0) == []


def test_a_page_is_free_when_its_last_holder_lets_go():
    pool = PagePool(1)
    [page] = pool.allocate(1)
    pool.share([page])
    pool.release([page])
    assert (pool.num_free, pool.num_holders(page)) == (0, 1)
    pool.release([page])
    assert (pool.num_free, pool.num_holders(page)) == (1, 0)


def test_nobody_can_share_or_release_a_free_page():
    pool = PagePool(1)
    with pytest.raises(AssertionError, match="page 0 is free"):
        pool.share([0])
    with pytest.raises(AssertionError, match="page 0 is free"):
        pool.release([0])


def test_free_pages_go_before_kept_ones():
    pool = PagePool(4)
    keeper = Keeper(pool, 2)
    assert pool.allocate(2) is not None
    assert keeper.num_idle == 2


def test_what_was_used_longest_ago_is_reclaimed_and_no_more_than_needed():
    pool = PagePool(8)
    first, second = Keeper(pool, 4, oldest=10), Keeper(pool, 2, oldest=11)
    assert pool.allocate(5) is not None
    assert (first.num_idle, second.num_idle) == (2, 1)
    assert pool.allocate(3) is not None
    assert (first.num_idle, second.num_idle) == (0, 0)


def test_a_keeper_may_free_more_than_is_needed():
    pool = PagePool(4)
    keeper = Keeper(pool, 4, at_once=3)
    assert pool.allocate(1) is not None
    assert (keeper.num_idle, pool.num_free) == (1, 2)


def test_nothing_is_reclaimed_in_vain():
    pool = PagePool(6)
    keeper = Keeper(pool, 4)
    assert pool.allocate(7) is None
    assert keeper.num_idle == 4


@pytest.mark.parametrize(
    "held",
    [
        pytest.param([], id="a page leaked"),
        pytest.param([0, 0, 1], id="a holder was not counted"),
        pytest.param([0, 1, 2], id="a free page is held"),
        pytest.param([0], id="one of two leaked"),
        pytest.param([0, 1, 7], id="a page of somewhere else is held"),
    ],
)
def test_integrity_sees_when_the_books_do_not_add_up(held):
    pool = PagePool(4)
    assert pool.allocate(2) == [0, 1]
    pool.check_integrity([1, 0])
    with pytest.raises(AssertionError):
        pool.check_integrity(held)


def test_integrity_sees_a_page_that_is_free_twice():
    pool = PagePool(2)
    pool._free.append(0)
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity([])


def test_integrity_sees_a_page_that_is_neither_free_nor_held():
    pool = PagePool(2)
    pool._free.pop()
    with pytest.raises(AssertionError, match="add up"):
        pool.check_integrity([])


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 9))))
def test_the_books_add_up_whatever_is_done(actions):
    pool, held = PagePool(8), list[int]()
    for action, number in actions:
        if action == "allocate":
            pages = pool.allocate(number % 4)
            assert (pages is None) == (number % 4 > 8 - len(set(held)))
            held += pages or []
        elif held:
            page = held[number % len(held)]
            if action == "share":
                pool.share([page])
                held.append(page)
            else:
                pool.release([page])
                held.remove(page)
        pool.check_integrity(held)
        assert pool.num_free == 8 - len(set(held))
