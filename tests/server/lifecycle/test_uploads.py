"""An upload has as much time as its bytes earn, and leaves nothing open however it ends."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import aclosing
from pathlib import Path

import pytest

from support.adapter_files import digest
from turret_adapters.errors import AdapterError, AdapterNotFoundError, SourceTooLargeError, UploadError
from turret_server.engine.admission import TenantLimits
from turret_server.errors import (
    DeadlineError,
    InvalidRequestError,
    PermissionDeniedError,
    QuotaExceededError,
    TooManyCallsError,
)
from turret_server.lifecycle import uploads
from turret_server.lifecycle.threads import LoadQueue
from turret_server.lifecycle.uploads import IDLE_SECONDS, AdapterUploads, UploadChunk, UploadStart
from turret_server.tenancy.tenants import Tenant

CHUNK = 50


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def tenant(**limits) -> Tenant:
    return Tenant(name="acme", limits=TenantLimits(), admin=True, **limits)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def receiver(site, clock):
    return AdapterUploads(site.lifecycle, site.store, LoadQueue(), clock)


class Sent:
    """An adapter as a client sends it, with pauses between its chunks."""

    def __init__(self, site, clock: Clock) -> None:
        folder = Path(site.source(1))
        self.config = (folder / "adapter_config.json").read_bytes()
        self.tensors = (folder / "adapter_model.safetensors").read_bytes()
        self.clock = clock

    def start(self, **changes) -> UploadStart:
        fields = {
            "name": "poet",
            "digest": digest(self.tensors, self.config),
            "config": self.config,
            "size": len(self.tensors),
        }
        return UploadStart(**(fields | changes))

    async def parts(self, seconds: float = 0.0, **changes):
        yield self.start(**changes)
        for offset in range(0, len(self.tensors), CHUNK):
            self.clock.now += seconds
            yield UploadChunk(offset=offset, data=self.tensors[offset : offset + CHUNK])


@pytest.fixture
def sent(site, clock):
    return Sent(site, clock)


async def receive(receiver, parts, who=None):
    return [event async for event in receiver.receive(parts, who or tenant())]


async def sequence(*parts):
    for part in parts:
        yield part


async def test_bytes_that_come_earn_the_time_for_more(site, receiver, sent, clock, monkeypatch):
    # Each chunk comes in time for the slowest pace allowed, and the whole takes far more than the idle time.
    monkeypatch.setattr(uploads, "MIN_BYTES_PER_SECOND", 1)
    began = clock.now
    assert await receive(receiver, sent.parts(seconds=CHUNK)) == [0, "poet"]
    assert clock.now - began > 5 * IDLE_SECONDS
    assert site.served("poet")


async def test_who_sends_slower_than_the_slowest_pace_is_cut_off(site, receiver, sent, monkeypatch):
    monkeypatch.setattr(uploads, "MIN_BYTES_PER_SECOND", 10)
    with pytest.raises(DeadlineError, match="fewer than 10 a second"):
        await receive(receiver, sent.parts(seconds=CHUNK / 2))
    assert not site.served("poet")


async def test_time_that_was_earned_before_a_resumption_does_not_count(receiver, sent, clock, monkeypatch):
    monkeypatch.setattr(uploads, "MIN_BYTES_PER_SECOND", 1)
    half = len(sent.tensors) // 2
    with pytest.raises(UploadError, match=f"found {half}"):
        await receive(receiver, sequence(sent.start(), UploadChunk(offset=0, data=sent.tensors[:half])))

    async def late():
        yield sent.start()
        clock.now += IDLE_SECONDS + 2
        yield UploadChunk(offset=half, data=sent.tensors[half : half + 1])
        yield UploadChunk(offset=half + 1, data=sent.tensors[half + 1 :])

    with pytest.raises(DeadlineError):
        await receive(receiver, late())


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        (lambda _: sequence(), "start"),
        (lambda _: sequence(UploadChunk(offset=0, data=b"x")), "start"),
        (lambda sent: sequence(sent.start(), sent.start()), "chunk"),
        (lambda sent: sequence(sent.start(), UploadChunk(offset=0, data=b"")), "chunk"),
    ],
    ids=["nothing", "no start", "two starts", "an empty chunk"],
)
async def test_parts_out_of_order_are_refused(receiver, sent, parts, field):
    with pytest.raises(InvalidRequestError) as refused:
        await receive(receiver, parts(sent))
    assert refused.value.metadata == {"field": field}


async def test_an_adapter_above_the_tenants_limit_is_refused_before_its_bytes(receiver, sent):
    size = len(sent.config) + len(sent.tensors)
    with pytest.raises(QuotaExceededError) as refused:
        await receive(receiver, sequence(sent.start()), tenant(max_adapter_bytes=size - 1))
    assert refused.value.metadata["quota"] == "max_adapter_bytes"
    async with aclosing(receiver.receive(sequence(sent.start()), tenant(max_adapter_bytes=size))) as events:
        assert await anext(events) == 0


async def test_uploads_of_a_tenant_are_counted_while_they_run(receiver, sent, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_UPLOADS_PER_TENANT", 1)
    for _ in range(3):
        async with aclosing(receiver.receive(sent.parts(), tenant())) as events:
            assert await anext(events) == 0
            with pytest.raises(TooManyCallsError):
                await receive(receiver, sent.parts())
            other = Tenant(name="bolt", limits=TenantLimits(), admin=True)
            async with aclosing(receiver.receive(sent.parts(), other)) as others:
                assert await anext(others) == 0
    assert await receive(receiver, sent.parts()) == [0, "poet"]
    assert receiver._num_open == {}


async def test_an_upload_counts_as_a_load_of_its_tenant(receiver, sent):
    who = tenant(max_concurrent_loads=1)
    async with aclosing(receiver.receive(sent.parts(), who)) as events:
        assert await anext(events) == 0
        with pytest.raises(QuotaExceededError):
            await receive(receiver, sent.parts(name="bard"), who)
    assert await receive(receiver, sent.parts(), who) == [0, "poet"]


@pytest.mark.parametrize("end", ["hang up", "cancel"])
async def test_an_upload_that_ends_early_can_be_resumed_at_once(receiver, sent, end):
    waiting = asyncio.Event()

    async def stuck():
        yield sent.start()
        yield UploadChunk(offset=0, data=sent.tensors[:CHUNK])
        waiting.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(receive(receiver, stuck() if end == "cancel" else _broken(sent)))
    if end == "cancel":
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        with pytest.raises(ConnectionError):
            await task
    async with aclosing(receiver.receive(sent.parts(), tenant())) as events:
        assert await anext(events) == CHUNK


async def _broken(sent):
    yield sent.start()
    yield UploadChunk(offset=0, data=sent.tensors[:CHUNK])
    raise ConnectionError


async def test_bytes_with_another_digest_are_not_served(site, receiver, sent):
    with pytest.raises(AdapterError, match="digest"):
        await receive(receiver, sent.parts(digest="0" * 64))
    assert not site.served("poet")
    assert site.holds() == set()


async def test_uploads_that_wait_for_the_disk_delay_nothing_else(site, receiver, sent):
    tenants = [Tenant(name=f"tenant-{number}", limits=TenantLimits(), admin=True) for number in range(40)]
    with site.store_locked():
        waiting = [asyncio.create_task(receive(receiver, sent.parts(), who)) for who in tenants]
        while len(receiver._loads._num_of_tenant) < len(tenants):  # noqa: ASYNC110 (each then waits)
            await asyncio.sleep(0)
        # In the default executor they would leave it no thread.
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 60) == "done"
    assert await asyncio.gather(*waiting) == [[0, "poet"]] * len(tenants)


@pytest.mark.parametrize("sends_start", [False, True])
async def test_who_sends_nothing_is_cut_off(receiver, sent, monkeypatch, sends_start):
    monkeypatch.setattr(uploads, "IDLE_SECONDS", 0.01)

    async def silent():
        if sends_start:
            yield sent.start()
        await asyncio.Event().wait()

    with pytest.raises(DeadlineError, match="no bytes came"):
        await receive(receiver, silent())
    assert receiver._num_open == {}
    assert receiver._loads._num_of_tenant == {}


@pytest.mark.parametrize(
    ("name", "error"),
    [("a b", InvalidRequestError), ("shared", PermissionDeniedError), ("others", AdapterNotFoundError)],
)
async def test_who_may_not_load_a_name_uploads_nothing(receiver, sent, name, error):
    who = Tenant(name="acme", limits=TenantLimits(), use=("shared",), load=("acme-*",))
    with pytest.raises(error):
        await receive(receiver, sequence(sent.start(name=name)), who)


async def test_an_upload_is_its_tenants(site, receiver, sent):
    who = tenant(max_adapters=1)
    assert await receive(receiver, sent.parts(), who) == [0, "poet"]
    with pytest.raises(QuotaExceededError) as refused:
        await receive(receiver, sent.parts(name="bard"), who)
    assert refused.value.metadata == {"tenant": "acme", "quota": "max_adapters"}
    assert [each.source for each in site.names.histories(["poet"])["poet"]] == ["upload"]


async def test_each_tenant_continues_its_own_upload(receiver, sent):
    other = Tenant(name="bolt", limits=TenantLimits(), admin=True)
    with pytest.raises(UploadError):
        await receive(receiver, sequence(sent.start(), UploadChunk(offset=0, data=sent.tensors[:CHUNK])))
    for who, offset in ((other, 0), (tenant(), CHUNK)):
        async with aclosing(receiver.receive(sent.parts(), who)) as events:
            assert await anext(events) == offset


@pytest.fixture
def archive(site, tmp_path) -> bytes:
    return Path(shutil.make_archive(str(tmp_path / "poet"), "zip", site.source(1))).read_bytes()


async def bytes_of(archive: bytes, clock: Clock | None = None, seconds: float = 0.0):
    for offset in range(0, len(archive), CHUNK):
        if clock:
            clock.now += seconds
        yield archive[offset : offset + CHUNK]


async def test_an_archive_is_received_and_served(site, receiver, archive):
    await receiver.receive_archive("poet", bytes_of(archive), len(archive), tenant())
    assert site.served("poet")
    assert list((site.store.root / "staging").iterdir()) == []


async def test_an_archive_that_is_too_large_is_refused(site, receiver, archive):
    with pytest.raises(SourceTooLargeError):
        await receiver.receive_archive("poet", bytes_of(archive), len(archive) - 1, tenant())
    assert not site.served("poet")


async def test_an_archive_comes_at_a_pace(site, receiver, archive, clock, monkeypatch):
    monkeypatch.setattr(uploads, "MIN_BYTES_PER_SECOND", 10)
    with pytest.raises(DeadlineError, match="fewer than 10 a second"):
        await receiver.receive_archive("poet", bytes_of(archive, clock, CHUNK), len(archive), tenant())
    assert not site.served("poet")


async def test_archives_are_received_a_few_at_a_time(receiver, archive, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_ARCHIVES", 0)
    with pytest.raises(TooManyCallsError, match="0 archives"):
        await receiver.receive_archive("poet", bytes_of(archive), len(archive), tenant())


async def test_the_disk_is_waited_for_on_threads_of_its_own(receiver, sent, archive, monkeypatch):
    used, run = [], uploads.run_to_completion

    async def noted(call, **options):
        used.append(options.get("executor"))
        return await run(call, **options)

    monkeypatch.setattr(uploads, "run_to_completion", noted)
    await receive(receiver, sent.parts())
    await receiver.receive_archive("bard", bytes_of(archive), len(archive), tenant())
    assert set(used) == {receiver._threads}


async def test_an_archive_needs_the_permission_to_load(receiver, archive):
    with pytest.raises(AdapterNotFoundError):
        await receiver.receive_archive(
            "poet", bytes_of(archive), len(archive), Tenant(name="acme", limits=TenantLimits())
        )
