from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fake_device import block_keys
from turret_server.engine.kv.pages import PagePool
from turret_server.engine.kv.prefix_cache import PrefixCache


@pytest.fixture
def pool() -> PagePool:
    return PagePool(8)


@pytest.fixture
def cache(pool) -> PrefixCache:
    return PrefixCache(pool)


def keep(pool: PagePool, cache: PrefixCache, keys: list[bytes]) -> list[int]:
    """What a sequence does that computes a chain and ends."""
    pages = pool.allocate(len(keys))
    for key, page in zip(keys, pages, strict=True):
        cache.insert(key, page)
    pool.release(pages)
    cache.mark_released(keys)
    return pages


def evict(cache: PrefixCache, count: int) -> None:
    """Evict so many pages, or all that are idle."""
    for _ in range(min(count, cache.num_idle)):
        assert cache.evict() == 1


def test_only_whole_blocks_have_keys():
    assert [len(list(block_keys(b"", [1] * n, 4))) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_a_key_depends_on_every_token_before_it_and_on_the_salt():
    prompts = [list(prompt) for prompt in product([1, 2], repeat=6)]
    chains = {
        (salt, tuple(prompt[:end])): key
        for salt in (b"", b"revision", b"revisiom")
        for prompt in prompts
        for end, key in zip((2, 4, 6), block_keys(salt, prompt, 2), strict=True)
    }
    assert len(set(chains.values())) == len(chains) == 3 * (4 + 16 + 64)
    assert {8 * len(key) for key in chains.values()} == {128}, "nobody finds two prompts with the same key"


def test_a_chain_goes_on_from_any_block():
    tokens = [*range(100, 112)]
    whole = list(block_keys(b"salt", tokens, 4))
    assert list(block_keys(whole[0], tokens[4:], 4)) == whole[1:]


def test_virtual_tokens_and_large_ids_have_keys():
    assert len(set(block_keys(b"", [-1, 0, 2**40, 2**40 + 1], 1))) == 4


def test_the_longest_run_from_the_start_is_found(pool, cache):
    pages = keep(pool, cache, [b"a", b"b", b"c"])
    assert cache.match([b"a", b"b", b"x", b"c"]) == pages[:2]
    assert cache.match([b"b", b"c"]) == pages[1:]
    assert cache.match([b"x", b"a"]) == []
    assert cache.match([]) == []


def test_what_is_found_is_held(pool, cache):
    pages = keep(pool, cache, [b"a"])
    cache.match([b"a"])
    evict(cache, 8)
    assert cache.match([b"a"]) == pages


def test_a_key_keeps_its_first_page(pool, cache):
    [first] = keep(pool, cache, [b"a"])
    keep(pool, cache, [b"a"])
    assert cache.pages == (first,)
    assert pool.num_free == 7


def test_a_page_that_somebody_holds_is_not_evicted(pool, cache):
    [page] = pool.allocate(1)
    cache.insert(b"a", page)
    evict(cache, 8)
    assert cache.pages == (page,)
    assert cache.num_idle == 0


def test_the_end_of_a_chain_goes_before_its_start(pool, cache):
    keep(pool, cache, [b"a", b"b", b"c"])
    evict(cache, 1)
    assert len(cache.match([b"a", b"b", b"c"])) == 2


def test_the_chain_that_was_used_last_goes_last(pool, cache):
    keep(pool, cache, [b"a1", b"a2"])
    keep(pool, cache, [b"b1", b"b2"])
    pool.release(cache.match([b"a1", b"a2"]))
    cache.mark_released([b"a1", b"a2"])
    evict(cache, 2)
    assert len(cache.match([b"a1", b"a2"])) == 2
    assert cache.match([b"b1"]) == []


def test_a_beginning_that_two_chains_share_outlives_their_ends(pool, cache):
    keep(pool, cache, [b"a", b"b1"])
    found = cache.match([b"a"])
    [page] = pool.allocate(1)
    cache.insert(b"b2", page)
    pool.release([*found, page])
    cache.mark_released([b"a", b"b2"])
    evict(cache, 2)
    assert len(cache.match([b"a"])) == 1


def test_a_block_that_is_invalidated_is_neither_found_nor_evicted(pool, cache):
    keep(pool, cache, [b"a", b"b"])
    held = cache.match([b"a"])
    cache.invalidate([b"a", b"b", b"x"])
    cache.check_integrity()
    assert cache.match([b"a"]) == []
    assert pool.num_free == 7
    pool.release(held)
    assert pool.num_free == 8


def test_a_block_that_was_computed_again_was_used_again(pool, cache):
    keep(pool, cache, [b"a"])
    keep(pool, cache, [b"b"])
    keep(pool, cache, [b"a"])
    evict(cache, 1)
    assert cache.match([b"a"])


def test_a_block_is_idle_once_its_last_holder_has_released_it(pool, cache):
    keep(pool, cache, [b"a"])
    first, second = cache.match([b"a"]), cache.match([b"a"])
    for pages, num_idle in ((first, 0), (second, 1)):
        pool.release(pages)
        cache.mark_released([b"a"])
        assert cache.num_idle == num_idle


def test_pages_that_run_out_are_taken_from_the_cache(pool, cache):
    keep(pool, cache, [b"a", b"b"])
    assert pool.allocate(8) is not None
    assert cache.pages == ()


def test_integrity_sees_a_page_that_could_never_go(pool, cache):
    [page] = pool.allocate(1)
    cache.insert(b"a", page)
    cache.check_integrity()
    pool.release([page])
    with pytest.raises(AssertionError):
        cache.check_integrity()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.booleans()), max_size=30), st.data())
def test_chains_that_come_and_go_leave_nothing_behind(chains, data):
    pool = PagePool(12)
    cache = PrefixCache(pool)
    held: list[tuple[list[bytes], list[int]]] = []
    for start, length, ends in chains:
        keys = list(block_keys(bytes([start]), range(length), 1))
        pages = cache.match(keys)
        fresh = pool.allocate(length - len(pages))
        if fresh is None:
            pool.release(pages)
            cache.mark_released(keys[: len(pages)])
        else:
            pages += fresh
            for key, page in zip(keys, pages, strict=True):
                cache.insert(key, page)
            held.append((keys, pages))
        if held and ends:
            keys, pages = held.pop(data.draw(st.integers(0, len(held) - 1)))
            pool.release(pages)
            cache.mark_released(keys)
        cache.check_integrity()
        pool.check_integrity([*cache.pages, *(page for _, pages in held for page in pages)])
    for keys, pages in held:
        pool.release(pages)
        cache.mark_released(keys)
    evict(cache, 12)
    assert pool.num_free == 12
