from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from turret_server.observability.usage_metrics import OTHER, UsageMetrics

SERIES = 100
MINUTE = 61.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def usage(registry, clock):
    return UsageMetrics(registry, clock)


@pytest.fixture
def counted(registry) -> Callable[..., float | None]:
    def counted(tenant: str, adapter: str = "", kind: str = "generated") -> float | None:
        labels = {"tenant": tenant, "adapter": adapter}
        if kind == "requests":
            return registry.get_sample_value("turret_usage_requests_total", labels)
        return registry.get_sample_value("turret_usage_tokens_total", labels | {"kind": kind})

    return counted


def test_requests_and_tokens_are_counted_by_tenant_and_adapters(usage, counted):
    for _ in range(2):
        usage.add("acme", ["pirate"], prompt=3, generated=5)
    usage.add("acme", ["pirate", "formal"], prompt=1, generated=1)
    usage.add("bolt", [], prompt=7, generated=0)
    assert [counted("acme", "pirate", kind) for kind in ("requests", "prompt", "generated")] == [2, 6, 10]
    assert counted("acme", "pirate+formal", "requests") == 1
    assert counted("bolt", "", "prompt") == 7
    assert counted(OTHER, OTHER, "requests") == 0


def test_there_are_never_more_series_than_are_shown(usage, registry, clock, counted):
    for number in range(10_000):
        usage.add(f"tenant-{number}", [], prompt=1, generated=1)
        clock.now += 1
    samples = [sample for family in registry.collect() for sample in family.samples]
    assert len([sample for sample in samples if sample.name == "turret_usage_requests_total"]) == SERIES + 1
    assert len(usage._recent) <= 16 * SERIES
    assert counted(OTHER, OTHER, "requests") >= 9_000


def test_who_uses_much_more_takes_the_place_of_who_uses_little(usage, clock, counted):
    for number in range(SERIES):
        usage.add(f"small-{number}", [], prompt=0, generated=10 + number)
    usage.add("large", [], prompt=0, generated=1000)
    assert counted("large") is None
    assert counted(OTHER, OTHER) == 1000
    clock.now += MINUTE
    usage.add("small-50", [], prompt=0, generated=1)
    assert counted("small-0") is None
    usage.add("large", [], prompt=0, generated=7)
    # From here on: what was counted before stays where it was.
    assert counted("large") == 7
    assert counted(OTHER, OTHER) == 1000


def test_who_uses_about_as_much_takes_nobodys_place(usage, clock, counted):
    for number in range(SERIES):
        usage.add(f"shown-{number}", [], prompt=0, generated=10)
    usage.add("late", [], prompt=0, generated=15)
    clock.now += MINUTE
    usage.add("late", [], prompt=0, generated=1)
    assert counted("late") is None


def test_few_places_change_at_a_time(usage, clock, counted):
    for number in range(SERIES):
        usage.add(f"small-{number}", [], prompt=0, generated=1)
    for number in range(SERIES):
        usage.add(f"large-{number}", [], prompt=0, generated=1000)
    clock.now += MINUTE
    usage.add("large-0", [], prompt=0, generated=1)
    assert sum(counted(f"large-{number}") is not None for number in range(SERIES)) == 10


def test_who_was_large_once_does_not_keep_its_place_for_ever(usage, clock, counted):
    for number in range(SERIES):
        usage.add(f"old-{number}", [], prompt=0, generated=1000)
    for _ in range(15):
        clock.now += MINUTE
        usage.add("new", [], prompt=0, generated=10)
    assert counted("new") is not None


def test_tokens_of_prompts_count_for_a_place_as_well(usage, clock, counted):
    for number in range(SERIES):
        usage.add(f"small-{number}", [], prompt=0, generated=10)
    usage.add("large", [], prompt=1000, generated=0)
    clock.now += MINUTE
    usage.add("small-50", [], prompt=0, generated=1)
    usage.add("large", [], prompt=3, generated=2)
    assert (counted("large", kind="prompt"), counted("large")) == (3, 2)


@pytest.mark.parametrize(("tokens", "replaces"), [(20, False), (21, True)])
def test_a_place_is_taken_by_who_uses_more_than_twice_as_much(usage, clock, counted, tokens, replaces):
    for number in range(SERIES):
        usage.add(f"shown-{number}", [], prompt=4, generated=6)
    usage.add("late", [], prompt=0, generated=tokens)
    clock.now += MINUTE
    usage.add("shown-0", [], prompt=0, generated=0)
    usage.add("late", [], prompt=0, generated=1)
    assert (counted("late") is not None) == replaces


def test_places_change_once_a_minute(usage, clock, counted):
    for number in range(SERIES):
        usage.add(f"small-{number}", [], prompt=0, generated=1)
    usage.add("large", [], prompt=0, generated=1000)
    clock.now = 59.0
    usage.add("large", [], prompt=0, generated=1)
    assert counted("large") is None
    clock.now = 60.0
    usage.add("small-0", [], prompt=0, generated=1)
    usage.add("large", [], prompt=0, generated=1)
    assert counted("large") is not None
    usage.add("next", [], prompt=0, generated=10_000)
    clock.now = 119.0
    usage.add("next", [], prompt=0, generated=1)
    assert counted("next") is None


def test_who_uses_nothing_any_more_is_forgotten(usage, clock):
    usage.add("once", [], prompt=0, generated=3)
    for _ in range(4):
        clock.now += MINUTE
        usage.add("other", [], prompt=0, generated=0)
    assert ("once", "") not in usage._recent


def test_the_heaviest_take_the_places_of_the_lightest(usage, clock, counted):
    for number in range(SERIES):
        usage.add(f"small-{number}", [], prompt=0, generated=1 + number % 50)
    for number in range(30):
        usage.add(f"large-{number}", [], prompt=0, generated=1000 + number)
    clock.now += MINUTE
    usage.add("small-49", [], prompt=0, generated=1)
    for number in range(30):
        usage.add(f"large-{number}", [], prompt=0, generated=1)
    assert [number for number in range(30) if counted(f"large-{number}") is not None] == [*range(20, 30)]
    gone = [number for number in range(SERIES) if counted(f"small-{number}") is None]
    assert gone == [*range(5), *range(50, 55)]


def test_what_is_counted_and_what_is_read_is_under_the_lock():
    """Its clock is read while it counts, and its series while it is asked for them."""
    registry, locked = CollectorRegistry(), []

    class Shown(dict):
        def items(self):
            locked.append(usage._lock.locked())
            return super().items()

    usage = UsageMetrics(registry, lambda: 0.0)
    usage._clock = lambda: locked.append(usage._lock.locked()) or 0.0
    usage._shown = Shown()
    usage.add("acme", [], prompt=1, generated=1)
    assert locked == [True]
    list(registry.collect())
    assert locked == [True, True]
    assert not usage._lock.locked()


def test_to_register_it_asks_for_nothing(registry):
    """A registry asks a new collector for its families, to find names that are taken."""
    usage = UsageMetrics(registry, lambda: 0.0)
    assert [family.samples for family in usage.describe()] == [[], []]
    with pytest.raises(ValueError, match="Duplicated"):
        UsageMetrics(registry, lambda: 0.0)
