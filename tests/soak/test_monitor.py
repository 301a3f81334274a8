"""The monitor distinguishes pools that start their threads from leaks of threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from soak.monitor import Sample, leaks
from soak.pools import Pools, count_pools, read_pools, write_pools


def _samples(*, threads, pooled, capacity=(10,) * 8):
    return [
        Sample(10.0 * index, 600 << 20, all_threads, 26, in_pools, maximum)
        for index, (all_threads, in_pools, maximum) in enumerate(zip(threads, pooled, capacity, strict=True))
    ]


def test_pools_may_grow_to_their_maxima():
    samples = _samples(threads=(20, 20, 21, 22, 23, 24, 26, 28), pooled=(2, 2, 3, 4, 5, 6, 8, 10))
    assert leaks(samples) == []


def test_threads_outside_pools_must_not_grow():
    samples = _samples(threads=(20, 20, 20, 20, 21, 21, 22, 22), pooled=(10,) * 8)
    assert [leak.split(" grew")[0] for leak in leaks(samples)] == ["threads outside pools"]


def test_maxima_of_pools_must_not_grow():
    samples = _samples(
        threads=(20, 20, 21, 22, 23, 24, 25, 26),
        pooled=(10, 10, 11, 12, 13, 14, 15, 16),
        capacity=(10, 10, 11, 12, 13, 14, 15, 16),
    )
    assert [leak.split(" grew")[0] for leak in leaks(samples)] == ["maximum pool threads"]


def test_growth_in_the_first_quarter_is_allowed():
    samples = _samples(threads=(15, 18, 20, 20, 20, 20, 20, 20), pooled=(2,) * 8)
    assert leaks(samples) == []


@pytest.fixture
def count(monkeypatch):
    monkeypatch.setattr(ThreadPoolExecutor, "__init__", ThreadPoolExecutor.__init__)
    return count_pools()


def test_threads_of_pools_are_counted_until_the_pool_is_shut_down(count, tmp_path):
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
