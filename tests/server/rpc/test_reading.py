from __future__ import annotations

import asyncio

import pytest

from turret.v1 import inference_pb2
from turret_server.errors import DeadlineError, InvalidRequestError
from turret_server.rpc import reading
from turret_server.rpc.reading import RequestReader

MESSAGE = inference_pb2.GenerateRequest(text="Hello")
DATA = MESSAGE.SerializeToString()


async def stream(*items):
    for item in items:
        yield item


@pytest.fixture
def reader():
    return RequestReader(inference_pb2.GenerateRequest.FromString)


async def test_one_request_is_read_and_the_rest_is_left(reader):
    requests = stream(DATA, DATA)
    assert await reader.one(requests) == MESSAGE
    assert await anext(requests) == DATA


async def test_requests_are_read_as_they_come(reader):
    requests = stream(DATA, b"", DATA)
    assert [message.text async for message in reader.many(requests)] == ["Hello", "", "Hello"]


async def test_a_call_without_a_request_is_refused(reader):
    with pytest.raises(InvalidRequestError, match="has no request"):
        await reader.one(stream())


async def test_bytes_that_are_no_message_are_refused(reader):
    with pytest.raises(InvalidRequestError, match="valid protobuf"):
        await reader.one(stream(b"\xff\xff"))
    with pytest.raises(InvalidRequestError, match="valid protobuf"):
        await anext(reader.many(stream(b"\xff\xff")))


async def test_a_message_may_be_as_long_as_the_limit_and_no_longer():
    exact = RequestReader(inference_pb2.GenerateRequest.FromString, len(DATA))
    assert await exact.one(stream(DATA)) == MESSAGE
    short = RequestReader(inference_pb2.GenerateRequest.FromString, len(DATA) - 1)
    with pytest.raises(InvalidRequestError, match=f"at most {len(DATA) - 1} bytes; found {len(DATA)}"):
        await short.one(stream(DATA))


async def test_a_request_that_does_not_come_ends_the_call(reader, monkeypatch):
    monkeypatch.setattr(reading, "READ_SECONDS", 0.01)
    closed = asyncio.Event()

    async def silent():
        try:
            await asyncio.Event().wait()
            yield DATA
        finally:
            closed.set()

    with pytest.raises(DeadlineError, match=r"within 0\.01 s"):
        await reader.one(silent())
    assert closed.is_set()


@pytest.mark.parametrize("turns", range(4))
async def test_a_cancellation_that_comes_with_the_request_is_not_lost(reader, turns):
    sent: asyncio.Queue[bytes] = asyncio.Queue()

    async def requests():
        yield await sent.get()

    async def handler():
        await reader.one(requests())
        await asyncio.Event().wait()

    task = asyncio.create_task(handler())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    sent.put_nowait(DATA)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    for _ in range(8):
        await asyncio.sleep(0)
    assert task.cancelled()
