"""A watch sees every adapter, then every change in order, and ends in an error that says why."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from support import prompts
from support.guarded import guard
from turret_server.engine.admission import TenantLimits
from turret_server.errors import QuotaExceededError, ShuttingDownError, SlowWatcherError, TooManyCallsError
from turret_server.lifecycle import watches
from turret_server.lifecycle.adapter_info import AdapterState
from turret_server.tenancy.auth import Caller
from turret_server.tenancy.tenants import Tenant


def tenant(name: str = "acme", **limits) -> Tenant:
    return Tenant(name=name, limits=TenantLimits(), admin=True, **limits)


@pytest.fixture
def all_watches(site):
    return site.watches


async def until(changes, name: str, state: AdapterState):
    """The changes up to one."""
    seen = []
    async for info in changes:
        seen.append((info.name, info.state))
        if seen[-1] == (name, state):
            return seen
    raise AssertionError(seen)


async def test_what_is_there_comes_first_and_changes_follow(site, all_watches):
    revision = site.load("poet", 1)
    async with aclosing(all_watches.watch(tenant())) as changes:
        present = await anext(changes)
        assert (present.name, present.revision) == ("poet", revision)
        newer = site.load("poet", 2)
        assert (await anext(changes)).revision == newer
        site.lifecycle.unload("poet")
        await until(changes, "poet", AdapterState.UNLOADED)


async def test_who_leaves_the_arena_is_reported_though_a_look_failed(site, all_watches, monkeypatch, caplog):
    monkeypatch.setattr(watches, "POLL_SECONDS", 0.001)
    statuses, failures = site.registry.statuses, []

    def fail_once():
        if not failures:
            failures.append("once")
            raise ZeroDivisionError("one look")
        return statuses()

    async with aclosing(all_watches.watch(tenant())) as changes:
        first = asyncio.create_task(anext(changes))
        await asyncio.sleep(0)
        monkeypatch.setattr(site.registry, "statuses", fail_once)
        site.lifecycle.load("poet", site.source(1))
        info = await first
        if info.state is not AdapterState.RESIDENT:
            await until(changes, "poet", AdapterState.RESIDENT)
        site.engine.drop(info.revision)
        await until(changes, "poet", AdapterState.STAGED)
    assert "one look" in caplog.text


async def test_who_is_too_slow_gets_an_error_instead_of_a_gap(site, all_watches, monkeypatch):
    site.load("poet", 1)
    monkeypatch.setattr(watches, "MAX_PENDING", 2)
    async with aclosing(all_watches.watch(tenant())) as changes:
        await anext(changes)
        for _ in range(2):
            site.registry.tell("poet")
        for _ in range(2):
            assert (await anext(changes)).name == "poet"
        for _ in range(3):
            site.registry.tell("poet")
        with pytest.raises(SlowWatcherError, match="more than 2 changes"):
            await anext(changes)
    assert all_watches._watchers == set()


async def test_watches_are_counted_and_leave_nothing(site, all_watches, monkeypatch):
    site.load("poet", 1)
    monkeypatch.setattr(watches, "MAX_WATCHERS", 3)
    monkeypatch.setattr(watches, "MAX_WATCHERS_PER_TENANT", 2)
    for _ in range(2):
        opened = [all_watches.watch(who) for who in (tenant(), tenant(), tenant("bolt"))]
        for changes in opened:
            await anext(changes)
        for who in (tenant(), tenant("bolt"), tenant("coil")):
            with pytest.raises(TooManyCallsError):
                await anext(all_watches.watch(who))
        await opened[2].aclose()
        with pytest.raises(TooManyCallsError):
            await anext(all_watches.watch(tenant()))
        for changes in opened:
            await changes.aclose()
    assert all_watches._watchers == set()
    assert all_watches._reported == {}
    assert all_watches._polling is None


async def test_a_tenants_own_limit_comes_first(site, all_watches):
    site.load("poet", 1)
    who = tenant(max_watches=1)
    async with aclosing(all_watches.watch(who)) as changes:
        await anext(changes)
        with pytest.raises(QuotaExceededError) as refused:
            await anext(all_watches.watch(who))
    assert refused.value.metadata["quota"] == "max_watches"


async def test_the_end_of_the_server_ends_a_watch(site, all_watches):
    site.load("poet", 1)
    async with aclosing(all_watches.watch(tenant())) as changes:
        await anext(changes)
        waiting = asyncio.create_task(anext(changes))
        await asyncio.sleep(0)
        all_watches.close()
        with pytest.raises(ShuttingDownError):
            await waiting


async def test_permissions_that_are_taken_away_hold_for_the_rest_of_a_watch(site):
    site.load("acme-poet", 1)
    site.load("poet", 1)
    now = [Caller(tenant=Tenant(name="acme", limits=TenantLimits(), use=("*",)), request_id="r1")]
    async with aclosing(site.administration.watch(lambda: now[0])) as changes:
        names = [(await anext(changes)).name for _ in range(2)]
        assert names == ["acme-poet", "poet"]
        now[0] = Caller(tenant=Tenant(name="acme", limits=TenantLimits(), use=("acme-*",)), request_id="r1")
        site.registry.tell("poet")
        site.registry.tell("acme-poet")
        assert (await anext(changes)).name == "acme-poet"


async def polls(site, monkeypatch, number: int):
    """Wait until the registry has been looked at so often."""
    statuses, seen, loop = site.registry.statuses, asyncio.Queue(), asyncio.get_running_loop()

    def counted():
        loop.call_soon_threadsafe(seen.put_nowait, None)
        return statuses()

    with monkeypatch.context() as patched:
        patched.setattr(site.registry, "statuses", counted)
        for _ in range(number):
            await seen.get()


async def test_what_does_not_change_is_not_reported(site, all_watches, monkeypatch):
    """Neither for who watches from the beginning nor for who comes later."""
    monkeypatch.setattr(watches, "POLL_SECONDS", 0.001)
    revision = site.load("poet", 1)
    await asyncio.to_thread(prompts.until, lambda: site.engine.is_resident(revision))
    async with aclosing(all_watches.watch(tenant())) as first:
        assert (await anext(first)).state is AdapterState.RESIDENT
        change = asyncio.create_task(anext(first))
        async with aclosing(all_watches.watch(tenant())) as second:
            await anext(second)
            # The third begins after the changes of the second have been reported.
            await polls(site, monkeypatch, 3)
            assert not change.done()
            assert all_watches._watchers
        # One that leaves ends no other's.
        site.engine.drop(revision)
        assert (await asyncio.wait_for(change, 60)).state is AdapterState.STAGED


async def test_a_watch_that_comes_while_the_server_stops_ends_with_what_is_there(site, all_watches):
    site.load("poet", 1)
    all_watches.close()
    async with aclosing(all_watches.watch(tenant())) as changes:
        assert (await anext(changes)).name == "poet"
        with pytest.raises(ShuttingDownError):
            await anext(changes)
    assert all_watches._watchers == set()


async def test_watchers_and_what_was_reported_are_read_and_written_under_the_lock(site, all_watches):
    guard(all_watches, all_watches._lock.locked, "_watchers", "_reported")
    async with aclosing(all_watches.watch(tenant())) as changes:
        first = asyncio.create_task(anext(changes))
        await asyncio.sleep(0)
        site.load("poet", 1)
        assert (await first).name == "poet"
        all_watches._report_moves()
        site.lifecycle.unload("poet")
        all_watches.close()
