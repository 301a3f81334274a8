"""Pools that fill are told from threads that leak."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from soak.pools import Pools, count_pools, read_pools, write_pools
from soak.vitals import Sample, leaks


def _samples(*, threads, pooled, capacity=(10,) * 8):
    return [
        Sample(10.0 * index, 600 << 20, all_threads, 26, 0.0, 0, in_pools, may_have)
        for index, (all_threads, in_pools, may_have) in enumerate(zip(threads, pooled, capacity, strict=True))
    ]


def test_pools_may_fill_up_to_their_maxima():
    samples = _samples(threads=(20, 20, 21, 22, 23, 24, 26, 28), pooled=(2, 2, 3, 4, 5, 6, 8, 10))
    assert leaks(samples) == []


def test_threads_outside_pools_must_not_grow():
    samples = _samples(threads=(20, 20, 20, 20, 21, 21, 22, 22), pooled=(10,) * 8)
    assert [leak.split(" grew")[0] for leak in leaks(samples)] == ["threads outside pools"]


def test_pools_must_not_become_more():
    samples = _samples(
        threads=(20, 20, 21, 22, 23, 24, 25, 26),
        pooled=(10, 10, 11, 12, 13, 14, 15, 16),
        capacity=(10, 10, 11, 12, 13, 14, 15, 16),
    )
    assert [leak.split(" grew")[0] for leak in leaks(samples)] == ["threads that pools may have"]


def test_growth_before_the_last_three_quarters_is_the_start():
    samples = _samples(threads=(15, 18, 20, 20, 20, 20, 20, 20), pooled=(2,) * 8)
    assert leaks(samples) == []


@pytest.fixture
def count(monkeypatch):
    monkeypatch.setattr(ThreadPoolExecutor, "__init__", ThreadPoolExecutor.__init__)
    return count_pools()


def test_pools_are_counted_as_they_fill_and_until_they_are_shut_down(count, tmp_path):
    before = count()
    with ThreadPoolExecutor(3) as pool:
        assert count() == Pools(before.threads, before.capacity + 3)
        both = Barrier(3)
        for _ in range(2):
            pool.submit(both.wait)
        both.wait()
        assert count() == Pools(before.threads + 2, before.capacity + 3)
        write_pools(count(), tmp_path / "pools.json")
        assert read_pools(tmp_path / "pools.json") == count()
    assert count() == before
