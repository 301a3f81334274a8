from __future__ import annotations

import asyncio
import signal
from contextlib import ExitStack, suppress

import pytest

from turret_server.app.signals import StopSignals

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_start_and_what_was_constructed_is_closed(number):
    closed = []

    def build() -> None:
        with StopSignals().handled(), ExitStack() as stack:
            stack.callback(closed.append, "part")
            signal.raise_signal(number)

    with pytest.raises(SystemExit) as ended:
        build()
    assert (ended.value.code, closed) == (0, ["part"])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_delivered_on_the_event_loop(number):
    async def serve() -> int:
        called = asyncio.Event()
        with signals.on_event_loop(called.set):
            signal.raise_signal(number)
            await called.wait()
        return 7

    signals = StopSignals()
    with signals.handled():
        assert asyncio.run(serve()) == 7


def test_a_signal_of_the_start_that_a_library_swallowed_ends_the_server_when_it_serves():
    async def serve() -> None:
        called = asyncio.Event()
        with signals.on_event_loop(called.set):
            await called.wait()

    signals = StopSignals()
    with signals.handled():
        with suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        asyncio.run(asyncio.wait_for(serve(), timeout=60))


def test_a_signal_while_the_parts_are_closed_changes_nothing():
    async def serve() -> None:
        with signals.on_event_loop(lambda: None):
            pass

    signals = StopSignals()
    with signals.handled():
        asyncio.run(serve())
        for number in SIGNALS:
            signal.raise_signal(number)


def test_the_handlers_from_before_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals().handled():
        assert all(signal.getsignal(number) not in before for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before
