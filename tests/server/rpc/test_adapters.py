from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from turret.v1 import adapters_pb2
from turret_adapters.sources.fetch import Download
from turret_adapters.spec import Method, Split
from turret_server.lifecycle.adapter_info import AdapterInfo, AdapterRevision, AdapterState
from turret_server.lifecycle.administration import AdapterPage
from turret_server.lifecycle.uploads import UploadChunk, UploadStart
from turret_server.rpc.adapters import adapter_message

METADATA = (("turret-tenant", "acme"),)
PIRATE = AdapterInfo(
    name="pirate",
    state=AdapterState.RESIDENT,
    revision="r2",
    method=Method.LORA,
    num_parameters=1,
    max_rank=2,
    num_virtual_tokens=3,
    num_tasks=4,
    file_bytes=5,
    arena_bytes=6,
    active_requests=7,
    draining_revisions=("r0", "r1"),
    error="why",
    split=Split("r1", 10),
    history=(AdapterRevision(revision="r1", source="/srv/pirate", published_at=1.5004),),
)
FAILED = AdapterInfo(name="broken", state=AdapterState.FAILED)


def test_an_adapter_has_all_that_is_known_of_it():
    message = adapter_message(PIRATE)
    published = message.history[0].published_at
    assert (published.seconds, published.nanos) == (1, 500_000_000)
    message.history[0].ClearField("published_at")
    assert message == adapters_pb2.Adapter(
        name="pirate",
        revision="r2",
        state=adapters_pb2.ADAPTER_STATE_RESIDENT,
        method=adapters_pb2.ADAPTER_METHOD_LORA,
        num_parameters=1,
        max_rank=2,
        num_virtual_tokens=3,
        num_tasks=4,
        file_bytes=5,
        arena_bytes=6,
        active_requests=7,
        draining_revisions=["r0", "r1"],
        error="why",
        traffic_split=adapters_pb2.TrafficSplit(revision="r1", percent=10),
        history=[adapters_pb2.AdapterRevision(revision="r1", source="/srv/pirate")],
    )


def test_an_adapter_that_failed_has_no_method_and_no_split():
    message = adapter_message(FAILED)
    assert message == adapters_pb2.Adapter(name="broken", state=adapters_pb2.ADAPTER_STATE_FAILED)
    assert not message.HasField("traffic_split")


@pytest.mark.parametrize("state", AdapterState)
def test_a_state_has_the_same_name_in_the_protocol(state):
    message = adapter_message(AdapterInfo(name="x", state=state))
    assert adapters_pb2.AdapterState.Name(message.state) == f"ADAPTER_STATE_{state.name}"


@pytest.mark.parametrize("method", Method)
def test_a_method_has_the_same_name_in_the_protocol(method):
    message = adapter_message(AdapterInfo(name="x", state=AdapterState.STAGED, method=method))
    assert adapters_pb2.AdapterMethod.Name(message.method) == f"ADAPTER_METHOD_{method.name}"


class Administration:
    """Notes what it is asked, the caller as its tenant's name, and answers with one adapter."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        async def answer(*arguments):
            *values, caller = arguments
            self.asked.append((name, *values, caller.tenant.name))
            return PIRATE

        return answer

    async def list(self, page_size, page_token, caller):
        self.asked.append((page_size, page_token, caller.tenant.name))
        return AdapterPage(adapters=(PIRATE, FAILED), next_page_token="pirate")

    def downloads(self, caller):
        self.asked.append(caller.tenant.name)
        return [
            Download("whole", num_done=1, num_total=2),
            Download("unknown", num_done=3),
        ]


@pytest.fixture
def administration():
    return Administration()


@pytest.mark.parametrize(
    ("method", "fields", "asked"),
    [
        ("LoadAdapter", {"name": "a", "path": "/srv/a"}, ("load", "a", "/srv/a")),
        ("UnloadAdapter", {"name": "a"}, ("unload", "a")),
        ("RollbackAdapter", {"name": "a"}, ("rollback", "a", None)),
        ("RollbackAdapter", {"name": "a", "revision": "r1"}, ("rollback", "a", "r1")),
        (
            "SetTrafficSplit",
            {"name": "a", "revision": "r1", "percent": 10},
            ("split", "a", "r1", 10),
        ),
        ("GetAdapter", {"name": "a"}, ("get", "a")),
    ],
)
async def test_a_call_is_passed_on_and_answered_with_the_adapter(
    open_door, administration, method, fields, asked
):
    door = await open_door(administration=administration)
    request = getattr(adapters_pb2, f"{method}Request")(**fields)
    answer = await getattr(door.adapters, method)(request, metadata=METADATA)
    assert answer.adapter == adapter_message(PIRATE)
    assert administration.asked == [(*asked, "acme")]


async def test_adapters_are_listed_in_pages(open_door, administration):
    door = await open_door(administration=administration)
    request = adapters_pb2.ListAdaptersRequest(page_size=2, page_token="a")
    page = await door.adapters.ListAdapters(request, metadata=METADATA)
    assert list(page.adapters) == [adapter_message(PIRATE), adapter_message(FAILED)]
    assert page.next_page_token == "pirate"
    assert administration.asked == [(2, "a", "acme")]


async def test_a_download_of_unknown_size_has_none(open_door, administration):
    door = await open_door(administration=administration)
    listed = await door.adapters.ListDownloads(adapters_pb2.ListDownloadsRequest(), metadata=METADATA)
    assert list(listed.downloads) == [
        adapters_pb2.Download(name="whole", done_bytes=1, total_bytes=2),
        adapters_pb2.Download(name="unknown", done_bytes=3),
    ]
    assert not listed.downloads[1].HasField("total_bytes")
    assert administration.asked == ["acme"]


async def test_the_parts_of_an_upload_are_passed_on_in_their_order_and_its_events_back(open_door):
    received, tenants = [], []

    async def upload(parts, caller):
        tenants.append(caller.tenant.name)
        received.append(await anext(parts))
        yield 0
        received.extend([part async for part in parts])
        yield PIRATE

    door = await open_door(administration=SimpleNamespace(upload=upload))
    call = door.adapters.UploadAdapter(metadata=METADATA)
    start = adapters_pb2.UploadStart(name="a", digest="d", config=b"{}", size=4)
    await call.write(adapters_pb2.UploadAdapterRequest(start=start))
    first = await call.read()
    assert (first.WhichOneof("event"), first.offset) == ("offset", 0)
    for offset, data in ((0, b"ab"), (2, b"cd")):
        chunk = adapters_pb2.UploadChunk(offset=offset, data=data)
        await call.write(adapters_pb2.UploadAdapterRequest(chunk=chunk))
    await call.done_writing()
    assert (await call.read()).adapter == adapter_message(PIRATE)
    assert received == [
        UploadStart(name="a", digest="d", config=b"{}", size=4),
        UploadChunk(offset=0, data=b"ab"),
        UploadChunk(offset=2, data=b"cd"),
    ]
    assert tenants == ["acme"]


async def test_a_watch_asks_for_its_caller_at_each_change(open_door):
    tenants = []

    async def watch(caller):
        for info in (PIRATE, FAILED):
            tenants.append(caller().tenant.name)
            yield info

    door = await open_door(administration=SimpleNamespace(watch=watch))
    call = door.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(), metadata=METADATA)
    assert [each.adapter for each in [each async for each in call]] == [
        adapter_message(PIRATE),
        adapter_message(FAILED),
    ]
    assert tenants == ["acme", "acme"]


@pytest.mark.parametrize("method", ["UploadAdapter", "WatchAdapters"])
async def test_a_client_that_leaves_closes_its_stream(open_door, scripted, method):
    closing = asyncio.Event()

    async def never():
        try:
            await asyncio.Event().wait()
        finally:
            closing.set()

    stream = scripted(0 if method == "UploadAdapter" else PIRATE, never)
    door = await open_door(administration=SimpleNamespace(upload=stream, watch=stream))
    if method == "UploadAdapter":
        call = door.adapters.UploadAdapter()
    else:
        call = door.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest())
    await call.read()
    call.cancel()
    await closing.wait()
    await door.server.calls.wait(600)
    assert stream.closed
