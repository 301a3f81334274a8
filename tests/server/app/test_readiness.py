"""A server is ready once no pinned adapter is missing, whatever happens on the way."""

from __future__ import annotations

import asyncio

import pytest

from turret_server.app import readiness
from turret_server.app.readiness import report_ready


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
