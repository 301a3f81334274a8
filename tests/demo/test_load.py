"""Streams of the demo end when they should."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from turret_demo.load import Ask, stream_during


class StubClient:
    def __init__(self):
        self.num_streams = 0

    def stream(self, prompt, *, adapter, **_):
        self.num_streams += 1
        yield SimpleNamespace(text=prompt, revision=adapter)


def test_streams_run_before_and_after_the_event():
    client, num_streams = StubClient(), []
    asks = [Ask("poet", "Hello", "")]
    streamed = stream_during(client, asks, lambda: num_streams.append(client.num_streams), 2)
    assert num_streams[0] >= 2
    assert len(streamed) >= num_streams[0] + 2
    assert {(each.text, each.revision, each.error) for each in streamed} == {("Hello", "poet", "")}


def test_streams_stop_when_the_event_fails():
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        stream_during(StubClient(), [Ask(None, "Hello", "")], lambda: 1 / 0, 3)
    assert set(threading.enumerate()) <= before
