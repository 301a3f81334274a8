"""A server is ready once no pinned adapter is missing, whatever happens on the way."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from turret_server.app import readiness
from turret_server.app.readiness import report_ready, watch_steps
from turret_server.engine.watchdog import Pace
from turret_server.observability.metrics import WatchdogMetrics


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(readiness, "POLL_SECONDS", 0.0)


async def test_what_is_missing_is_logged_once_and_ready_is_reported_once(caplog):
    caplog.set_level("INFO")
    looks = [["bard", "poet"], ["bard", "poet"], ["poet"], []]
    reported = []

    async def ready() -> None:
        reported.append(len(looks))

    await asyncio.wait_for(report_ready(ready, lambda: looks.pop(0)), 60)
    assert reported == [0]
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == [
        "bard, poet",
        "poet",
        "ready",
    ]


async def test_a_look_that_fails_is_logged_and_repeated(caplog):
    looks = iter([ZeroDivisionError("one"), []])

    def missing() -> list[str]:
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    reported = asyncio.Event()

    async def ready() -> None:
        reported.set()

    await asyncio.wait_for(report_ready(ready, missing), 60)
    assert reported.is_set()
    assert "is repeated" in caplog.text
    assert "ZeroDivisionError: one" in caplog.text


async def test_health_log_and_metrics_follow_the_pace_of_the_steps(caplog):
    paces = [Pace.NORMAL, Pace.LATE, Pace.LATE, Pace.HUNG, Pace.LATE, Pace.NORMAL, Pace.NORMAL, Pace.LATE]
    registry, ended = CollectorRegistry(), asyncio.Event()
    judged = []

    class Watchdog:
        age = 0.0

        def look(self):
            self.age += 40.0
            return paces.pop(0)

    class Server:
        async def judge_engine(self, *, responsive, alive):
            judged.append((responsive, alive))
            if not paces:
                ended.set()

    watching = asyncio.create_task(watch_steps(Watchdog(), Server(), WatchdogMetrics(registry)))
    await ended.wait()
    watching.cancel()
    assert judged == [(False, True), (False, False), (False, True), (True, True), (False, True)]
    levels = [(record.levelname, record.message[:30]) for record in caplog.records]
    assert levels[:2] == [
        ("ERROR", "a step has not ended for 80 s;"),
        ("CRITICAL", "a step has not ended for 160 s"),
    ]
    assert levels[3] == ("WARNING", "the step that was late has end")
    assert registry.get_sample_value("turret_step_age_seconds") == 320
    assert registry.get_sample_value("turret_late_steps_total") == 2
