"""The channel of a client in this process."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from turret_server.doors.running import RunningCalls
from turret_server.rpc.calls import CallInterceptor
from turret_server.rpc.local import LocalChannel, Methods


def test_a_call_that_begins_after_closing_ends_though_its_loop_does_not_run():
    loop = asyncio.new_event_loop()
    channel = LocalChannel(Methods(), CallInterceptor(None, RunningCalls()), loop)
    channel.close()
    call = channel.unary_unary("/turret.v1.Inference/Generate", bytes)(b"")
    assert call.code() is grpc.StatusCode.CANCELLED
    with pytest.raises(grpc.RpcError):
        call.result()
    call.cancel()
    loop.close()
