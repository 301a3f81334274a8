"""Adapters are administered with plain data, and no transport in sight."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from support.adapter_files import digest
from turret_adapters.errors import (
    AdapterNotFoundError,
    AdapterSourceError,
    RevisionNotFoundError,
    SourceForbiddenError,
)
from turret_adapters.spec import Method, Split
from turret_server import logs
from turret_server.engine.admission import TenantLimits
from turret_server.errors import InvalidRequestError, PermissionDeniedError, QuotaExceededError
from turret_server.lifecycle.adapter_info import AdapterState
from turret_server.lifecycle.administration import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, MAX_PATH_LENGTH
from turret_server.lifecycle.uploads import UploadChunk, UploadStart
from turret_server.tenancy.auth import Caller
from turret_server.tenancy.tenants import Tenant

PATIENCE = 60


def caller(**permissions) -> Caller:
    return Caller(tenant=Tenant(name="acme", limits=TenantLimits(), **permissions), request_id="r1")


ADMIN = caller(admin=True)
# May use what an operator loads, and load under names of its own.
GUEST = caller(use=("acme-*", "shared"), load=("acme-*",), unload=("acme-*",))


@pytest.fixture
def admin(site):
    return site.administration


async def upload_of(site, name: str, seed: int, chunk_size: int = 100):
    folder = Path(site.source(seed))
    config = (folder / "adapter_config.json").read_bytes()
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    yield UploadStart(name=name, digest=digest(tensors, config), config=config, size=len(tensors))
    for offset in range(0, len(tensors), chunk_size):
        yield UploadChunk(offset=offset, data=tensors[offset : offset + chunk_size])


def test_it_needs_no_grpc_and_no_messages():
    program = (
        "import sys; import turret_server.lifecycle.administration, turret_server.lifecycle.lazy, "
        "turret_server.lifecycle.folder_watch; "
        "print([name for name in sys.modules if name.partition('.')[0] in ('grpc', 'turret', 'google')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "[]"


async def test_an_adapter_is_loaded_replaced_split_rolled_back_and_unloaded(site, admin):
    first = await admin.load("poet", site.source(1), ADMIN)
    assert first.method is Method.LORA
    assert (first.max_rank, first.num_virtual_tokens, first.num_tasks) == (2, 0, 0)
    assert first.num_parameters == 32
    assert first.arena_bytes > 0
    assert first.file_bytes == site.size(1)
    assert first.state in (AdapterState.STAGED, AdapterState.RESIDENT)
    second = await admin.load("poet", site.source(2), ADMIN)
    assert [each.revision for each in second.history] == [second.revision, first.revision]
    assert [each.source for each in second.history] == [site.source(2), site.source(1)]
    split = await admin.split("poet", first.revision[:8], 30, ADMIN)
    assert split.split == Split(first.revision, 30)
    assert (await admin.split("poet", "", 0, ADMIN)).split is None
    back = await admin.rollback("poet", None, ADMIN)
    assert back.revision == first.revision
    assert replace(back, state=first.state, history=first.history) == first
    gone = await admin.unload("poet", ADMIN)
    assert (gone.name, gone.state) == ("poet", AdapterState.UNLOADED)
    with pytest.raises(AdapterNotFoundError):
        await admin.get("poet", ADMIN)


async def test_a_name_drains_while_its_requests_run(site, admin):
    info = await admin.load("poet", site.source(1), ADMIN)
    stream = site.generate("poet", 50)
    next(stream)
    assert (await admin.get("poet", ADMIN)).active_requests == 1
    newer = await admin.load("poet", site.source(2), ADMIN)
    assert newer.draining_revisions == (info.revision,)
    stream.close()
    stream = site.generate("poet", 50)
    next(stream)
    drains = await admin.unload("poet", ADMIN)
    assert (drains.state, drains.active_requests) == (AdapterState.DRAINING, 1)
    none = {"staged": 0, "resident": 0, "draining": 0, "failed": 0}
    assert admin.count_states() == none | {"draining": 1}
    stream.close()
    assert admin.count_states() == none


async def test_an_upload_is_answered_with_its_offset_and_then_with_the_adapter(site, admin):
    events = [event async for event in admin.upload(upload_of(site, "poet", 1), ADMIN)]
    assert events[0] == 0
    assert events[1].revision == site.served("poet")
    assert events[1].history[0].source == "upload"
    assert len(events) == 2


async def test_an_upload_continues_where_it_stopped(site, admin):
    parts = upload_of(site, "poet", 1)
    async with aclosing(admin.upload(_first(parts, 3), ADMIN)) as events:
        assert await anext(events) == 0
        with pytest.raises(ValueError, match="found 200"):
            await anext(events)

    async def rest():
        yield await anext(again)
        async for chunk in again:
            if chunk.offset >= 200:
                yield chunk

    again = upload_of(site, "poet", 1)
    events = [event async for event in admin.upload(rest(), ADMIN)]
    assert events[0] == 200
    assert events[1].name == "poet"


async def _first(parts, number: int):
    for _ in range(number):
        yield await anext(parts)


async def test_pages_are_in_order_and_of_a_size(site, admin):
    for number in range(3):
        await admin.load(f"poet-{number}", site.source(1), ADMIN)
    page = await admin.list(2, "", ADMIN)
    assert [info.name for info in page.adapters] == ["poet-0", "poet-1"]
    assert [len(info.history) for info in page.adapters] == [1, 1]
    await admin.unload("poet-1", ADMIN)
    rest = await admin.list(2, page.next_page_token, ADMIN)
    assert [info.name for info in rest.adapters] == ["poet-2"]
    assert rest.next_page_token == ""
    assert (await admin.list(2, "", ADMIN)).next_page_token == ""
    again = await admin.list(2, "poet-0", ADMIN)
    assert [info.name for info in again.adapters] == ["poet-2"]
    assert (await admin.list(1, "", ADMIN)).next_page_token == "poet-0"


@pytest.mark.parametrize("size", [-1, MAX_PAGE_SIZE + 1])
async def test_a_page_size_out_of_range_is_refused(admin, size):
    with pytest.raises(InvalidRequestError, match=f"from 0 to {MAX_PAGE_SIZE}; found {size}") as refused:
        await admin.list(size, "", ADMIN)
    assert refused.value.metadata == {"field": "page_size"}


async def test_without_a_size_a_page_has_the_default_one(site, admin):
    for number in range(DEFAULT_PAGE_SIZE + 1):
        site.registry.fail(f"broken-{number:03}", "no such folder")
    assert len((await admin.list(0, "", ADMIN)).adapters) == DEFAULT_PAGE_SIZE
    assert len((await admin.list(MAX_PAGE_SIZE, "", ADMIN)).adapters) == DEFAULT_PAGE_SIZE + 1


CALLS = {
    "load": lambda admin, name, who: admin.load(name, "/nowhere", who),
    "unload": lambda admin, name, who: admin.unload(name, who),
    "rollback": lambda admin, name, who: admin.rollback(name, None, who),
    "split": lambda admin, name, who: admin.split(name, "0" * 8, 10, who),
    "get": lambda admin, name, who: admin.get(name, who),
    "upload": lambda admin, name, who: anext(
        admin.upload(_only(UploadStart(name=name, digest="", config=b"", size=0)), who)
    ),
}


async def _only(part):
    yield part


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_what_a_tenant_may_not_use_does_not_exist_for_it(site, admin, call):
    await admin.load("secret", site.source(1), ADMIN)
    said = []
    for name in ("secret", "nobody"):
        with pytest.raises(AdapterNotFoundError) as refused:
            await call(admin, name, GUEST)
        said.append(str(refused.value).replace(name, "NAME"))
    assert said[0] == said[1]
    assert site.served("secret")


@pytest.mark.parametrize("call", [call for name, call in CALLS.items() if name != "get"])
async def test_what_a_tenant_may_only_use_it_may_not_change(site, admin, call):
    before = await admin.load("shared", site.source(1), ADMIN)
    with pytest.raises(PermissionDeniedError):
        await call(admin, "shared", GUEST)
    assert (await admin.get("shared", ADMIN)).revision == before.revision


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["", "../up", "x" * 129])
async def test_an_invalid_name_is_refused(admin, call, name):
    with pytest.raises(InvalidRequestError) as refused:
        await call(admin, name, ADMIN)
    assert refused.value.metadata == {"field": "name"}


async def test_who_may_only_use_an_adapter_does_not_see_where_it_comes_from(site, admin):
    await admin.load("shared", site.source(1), ADMIN)
    await admin.load("acme-own", site.source(1), ADMIN)
    await admin.load("secret", site.source(1), ADMIN)
    shown = {info.name: info for info in (await admin.list(0, "", GUEST)).adapters}
    assert list(shown) == ["acme-own", "shared"]
    assert [each.source for each in shown["shared"].history] == [""]
    assert [each.source for each in shown["acme-own"].history] == [site.source(1)]
    assert (await admin.get("shared", GUEST)) == shown["shared"]
    await admin.unload("shared", ADMIN)
    site.registry.fail("shared", "no folder /srv/secret")
    failed = await admin.get("shared", GUEST)
    assert failed.state is AdapterState.FAILED
    assert "/srv" not in failed.error
    assert failed.error
    assert "/srv" in (await admin.get("shared", ADMIN)).error


async def test_a_tenant_loads_only_from_its_own_sources(site, admin):
    guest = caller(load=("acme-*",), use=("acme-*",), sources=(str(site.folder / "own"),))
    with pytest.raises(SourceForbiddenError):
        await admin.load("acme-own", site.source(1), guest)
    shutil.copytree(site.source(1), site.folder / "own" / "poet")
    assert (await admin.load("acme-own", str(site.folder / "own" / "poet"), guest)).revision


@pytest.mark.parametrize("path", ["", "/" + "x" * MAX_PATH_LENGTH])
async def test_an_empty_path_or_one_that_is_too_long_is_refused(site, admin, path):
    with pytest.raises(InvalidRequestError, match=f"1 to {MAX_PATH_LENGTH}") as refused:
        await admin.load("poet", path, ADMIN)
    assert refused.value.metadata == {"field": "path"}
    longest = f"{site.folder}/" + "x/" * MAX_PATH_LENGTH
    with pytest.raises(AdapterSourceError):
        await admin.load("poet", longest[:MAX_PATH_LENGTH], ADMIN)


@pytest.mark.parametrize("percent", [-1, 101])
async def test_a_percentage_out_of_range_is_refused(site, admin, percent):
    await admin.load("poet", site.source(1), ADMIN)
    with pytest.raises(InvalidRequestError, match="from 0 to 100") as refused:
        await admin.split("poet", "0" * 8, percent, ADMIN)
    assert refused.value.metadata == {"field": "percent"}


@pytest.mark.parametrize("revision", ["", "1234567", "0" * 33, "G" * 8])
async def test_a_revision_that_is_too_short_or_no_number_is_refused(site, admin, revision):
    await admin.load("poet", site.source(1), ADMIN)
    for call in (admin.rollback("poet", revision, ADMIN), admin.split("poet", revision, 1, ADMIN)):
        with pytest.raises(InvalidRequestError, match="first 8 to 32 digits") as refused:
            await call
        assert refused.value.metadata == {"field": "revision"}
    for allowed in ("0" * 8, "0" * 32):
        with pytest.raises(RevisionNotFoundError):
            await admin.rollback("poet", allowed, ADMIN)


async def test_every_percentage_of_the_range_is_taken(site, admin):
    first = await admin.load("poet", site.source(1), ADMIN)
    await admin.load("poet", site.source(2), ADMIN)
    for percent in (1, 100):
        info = await admin.split("poet", first.revision, percent, ADMIN)
        assert info.split == Split(first.revision, percent)


async def test_loads_count_for_their_tenant_and_unloads_do_not_wait_for_them(site, admin, monkeypatch):
    await admin.load("acme-a", site.source(1), ADMIN)
    fetch, begun, gate = site.library.fetch, threading.Event(), threading.Event()

    def slow(source: str, **options):
        begun.set()
        assert gate.wait(PATIENCE)
        return fetch(source, **options)

    monkeypatch.setattr(site.library, "fetch", slow)
    one = caller(admin=True, max_concurrent_loads=1)
    loading = asyncio.create_task(admin.load("acme-b", site.source(2), one))
    await asyncio.to_thread(begun.wait)
    for call in (admin.load("acme-c", site.source(3), one), admin.rollback("acme-a", None, one),
                 admin.split("acme-a", "", 0, one)):  # fmt: skip
        with pytest.raises(QuotaExceededError, match="loads of tenant"):
            await call
    assert (await admin.unload("acme-a", one)).state is AdapterState.UNLOADED
    gate.set()
    assert (await loading).name == "acme-b"


async def test_a_download_is_listed_for_those_who_may_load_it(site, admin, monkeypatch):
    begun, gate = threading.Event(), threading.Event()
    check = site.library._check_interrupted

    def slow() -> None:
        check()
        if site.library.downloads.running:
            begun.set()
            assert gate.wait(PATIENCE)

    monkeypatch.setattr(site.library, "_check_interrupted", slow)
    loading = asyncio.create_task(admin.load("acme-own", site.source(1), ADMIN))
    await asyncio.to_thread(begun.wait)
    assert [each.name for each in admin.downloads(ADMIN)] == ["acme-own"]
    assert [each.name for each in admin.downloads(GUEST)] == ["acme-own"]
    assert list(admin.downloads(caller(use=("acme-*",)))) == []
    gate.set()
    await loading
    assert list(admin.downloads(ADMIN)) == []


async def test_log_lines_name_the_call_that_they_come_from(site, admin, monkeypatch):
    about = {}

    def noted(what, call):
        def run(*arguments, **options):
            about[what] = logs.bound().get("request_id")
            return call(*arguments, **options)

        return run

    for what in ("load", "rollback", "split", "unload", "load_upload"):
        monkeypatch.setattr(site.lifecycle, what, noted(what, getattr(site.lifecycle, what)))
    with logs.about({"request_id": "request-1"}):
        for seed in (1, 2):
            await admin.load("poet", site.source(seed), ADMIN)
        await admin.rollback("poet", None, ADMIN)
        await admin.split("poet", "", 0, ADMIN)
        await admin.unload("poet", ADMIN)
        async with aclosing(admin.upload(upload_of(site, "poet", 3), ADMIN)) as events:
            assert len([event async for event in events]) == 2
    assert set(about) == {"load", "rollback", "split", "unload", "load_upload"}
    assert set(about.values()) == {"request-1"}


async def test_a_page_is_filled_with_what_the_tenant_may_use(site, admin):
    for name in ("acme-a", "acme-b", "acme-c", "bolt-a", "bolt-b", "shared"):
        site.registry.fail(name, "no such folder")
    page = await admin.list(3, "", GUEST)
    assert [info.name for info in page.adapters] == ["acme-a", "acme-b", "acme-c"]
    assert page.next_page_token == "acme-c"
    last = await admin.list(3, page.next_page_token, GUEST)
    assert ([info.name for info in last.adapters], last.next_page_token) == (["shared"], "")


async def test_a_watch_shows_no_more_of_an_adapter_than_a_look_at_it(site, admin):
    site.registry.fail("acme-own", "no folder /srv/own")
    site.registry.fail("shared", "no folder /srv/secret")
    async with aclosing(admin.watch(lambda: GUEST)) as changes:
        present = [await anext(changes) for _ in range(2)]
        site.registry.tell("shared")
        changed = await anext(changes)
    own, shared = [await admin.get(name, GUEST) for name in ("acme-own", "shared")]
    assert present == [own, shared]
    assert changed == shared
    assert "/srv" in own.error
    assert "/srv" not in shared.error


async def test_a_watch_that_is_closed_counts_no_more(site, admin):
    site.registry.fail("poet", "no such folder")
    async with aclosing(admin.watch(lambda: ADMIN)) as changes:
        await anext(changes)
        assert len(site.watches._watchers) == 1
    assert site.watches._watchers == set()
