"""Serving in this process: a server that only records its calls, between real signals and shutdown."""

from __future__ import annotations

import asyncio
import urllib.request
from contextlib import closing
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter

from turret_server.app import doors, run
from turret_server.app.signals import StopSignals
from turret_server.config import ServerConfig
from turret_server.doors.running import RunningCalls
from turret_server.engine.watchdog import Progress
from turret_server.errors import GenerationFailedError

CONFIG = ServerConfig(model="m", listen="127.0.0.1:0", grace=7.0)


class Server:
    def __init__(self) -> None:
        self.calls = RunningCalls()
        self.told: list[str] = []
        self.is_ready = asyncio.Event()

    async def start(self, address: str) -> int:
        self.told.append(f"start {address}")
        return 50051

    async def ready(self) -> None:
        self.told.append("ready")
        self.is_ready.set()

    async def drain(self) -> None:
        self.told.append("drain")

    async def stop(self, _: float) -> None:
        self.told.append("stop")


class Serving:
    def __init__(self, monkeypatch, *, missing_pins=()):
        self.server, self.signals = Server(), StopSignals()
        monkeypatch.setattr(doors, "make_doors", lambda *_: (self.server, None))
        self.looked = asyncio.Event()
        loop = asyncio.get_running_loop()

        def look():
            loop.call_soon_threadsafe(self.looked.set)
            return list(missing_pins)

        self.engine = SimpleNamespace(
            failed=False, on_failure=None, stop=lambda _: self.stops, progress=Progress()
        )
        self.stops = True
        parts = SimpleNamespace(
            engine=self.engine,
            metrics=CollectorRegistry(),
            lifecycle=SimpleNamespace(missing_pins=look, interrupt=lambda: None),
            watches=SimpleNamespace(close=lambda: None),
        )
        self.task = asyncio.create_task(run._serve(CONFIG, parts, self.signals))


async def test_a_server_is_ready_until_a_signal_and_then_drains(monkeypatch, caplog):
    caplog.set_level("INFO")
    serving = Serving(monkeypatch)
    await serving.server.is_ready.wait()
    assert "serving on 127.0.0.1:50051" in caplog.messages
    serving.signals._handle(0, None)
    await serving.task
    assert serving.server.told == ["start 127.0.0.1:0", "ready", "drain", "stop"]
    assert "stopping: 0 running calls have 7 s to finish" in caplog.messages
    serving.signals._handle(0, None)  # which changes nothing any more


async def test_a_server_that_stops_before_its_pins_are_there_is_never_ready(monkeypatch):
    serving = Serving(monkeypatch, missing_pins=["poet"])
    await serving.looked.wait()
    serving.signals._handle(0, None)
    await serving.task
    assert serving.server.told == ["start 127.0.0.1:0", "drain", "stop"]
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert all(task.cancelling() for task in others)  # none of them waits for pins
    await asyncio.gather(*others, return_exceptions=True)


async def test_a_server_whose_engine_fails_ends_with_an_error(monkeypatch):
    serving = Serving(monkeypatch)
    await serving.server.is_ready.wait()
    serving.engine.failed = True
    await asyncio.to_thread(serving.engine.on_failure)
    with pytest.raises(GenerationFailedError):
        await serving.task
    assert serving.server.told[-2:] == ["drain", "stop"]


def test_metrics_are_served_where_the_log_says(caplog):
    caplog.set_level("INFO")
    registry = CollectorRegistry()
    Counter("turret_of_this_test", "A test's.", registry=registry)
    with closing(run._serve_metrics("127.0.0.1:0", registry)):
        [message] = caplog.messages
        with urllib.request.urlopen(message.removeprefix("metrics on ")) as response:  # noqa: S310 (loopback)
            assert b"turret_of_this_test_total 0.0" in response.read()
