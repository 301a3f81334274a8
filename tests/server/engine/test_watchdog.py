from __future__ import annotations

import pytest

from turret_server.engine.watchdog import Pace, Progress, Watchdog


class Watched:
    """An engine that is looked at every second."""

    def __init__(self, max_step_seconds: float = 0.5) -> None:
        self.now = 100.0
        self.progress = Progress()
        self.watchdog = Watchdog(self.progress, max_step_seconds, clock=lambda: self.now)

    def step(self, seconds: int) -> list[Pace]:
        """What is seen of a step that takes so long."""
        self.progress.begin()
        self.watchdog.look()
        return [self.look() for _ in range(seconds)]

    def look(self, after: float = 1.0) -> Pace:
        self.now += after
        return self.watchdog.look()


@pytest.fixture
def watched():
    return Watched()


def test_a_step_is_late_after_half_a_minute_and_hangs_after_five(watched):
    paces = watched.step(310)
    assert paces[:29] == [Pace.NORMAL] * 29
    assert paces[29:299] == [Pace.LATE] * 270
    assert set(paces[299:]) == {Pace.HUNG}
    assert watched.watchdog.age == 310
    watched.progress.begin()
    assert watched.look() is Pace.NORMAL
    assert watched.watchdog.age == 0


def test_steps_that_follow_each_other_are_never_late_nor_is_an_idle_engine(watched):
    assert {watched.look() for _ in range(400)} == {Pace.NORMAL}, "it has not begun"
    for _ in range(100):
        assert set(watched.step(1)) == {Pace.NORMAL}
    watched.progress.is_idle = True
    assert {watched.look() for _ in range(400)} == {Pace.NORMAL}


def test_parts_of_a_failed_step_that_are_computed_again_are_steps(watched):
    watched.step(20)
    watched.progress.begin()
    assert set(watched.step(20)) == {Pace.NORMAL}


def test_steps_may_take_ten_times_what_they_are_planned_for():
    paces = Watched(max_step_seconds=20.0).step(210)
    assert paces[:199] == [Pace.NORMAL] * 199
    assert paces[199] is Pace.LATE


def test_a_machine_is_late_once_before_it_is_known_to_be_slow(watched):
    assert Pace.LATE in watched.step(50)
    for _ in range(5):
        assert set(watched.step(60)) == {Pace.NORMAL}
    # What is unusual for it is late nevertheless.
    assert watched.step(650)[-1] is Pace.LATE


def test_a_long_step_is_forgotten(watched):
    watched.step(100)
    for _ in range(10_000):
        watched.step(1)
    assert watched.watchdog.limit == 30.0


def test_time_in_which_the_process_was_stopped_does_not_count(watched):
    watched.step(1)
    assert watched.look(after=3600.0) is Pace.NORMAL
