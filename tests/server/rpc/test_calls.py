from __future__ import annotations

from contextlib import ExitStack

import pytest

from turret_server.errors import TooManyCallsError
from turret_server.rpc import calls
from turret_server.rpc.calls import CallInterceptor


def test_streams_without_authentication_are_bounded_and_give_their_places_back(monkeypatch):
    monkeypatch.setattr(calls, "MAX_OPEN_STREAMS", 2)
    interceptor = CallInterceptor(authenticator=None, running=None)
    for _ in range(2):
        with ExitStack() as streams:
            streams.enter_context(interceptor._open_stream())
            streams.enter_context(interceptor._open_stream())
            with pytest.raises(TooManyCallsError) as refused:
                streams.enter_context(interceptor._open_stream())
            assert (refused.value.metadata, refused.value.retry_after) == ({"limit": "2"}, 1.0)
