"""Names that requests bring in: loaded once for all who ask, unloaded unless also loaded explicitly."""

from __future__ import annotations

import asyncio
import shutil
import threading

import pytest

from turret_adapters.errors import AdapterNotFoundError
from turret_server.lifecycle import lazy
from turret_server.lifecycle.lazy import LazyAdapters

PATIENCE = 60


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def hub(site):
    """Makes a name available at the lazy source."""

    def put(name: str, seed: int) -> None:
        shutil.copytree(site.source(seed), site.folder / "hub" / name)

    for number, name in enumerate(("poet", "bard", "seer"), 1):
        put(name, number)
    return put


def lazy_of(site, clock=lambda: 100.0) -> LazyAdapters:
    return LazyAdapters(site.lifecycle, site.registry, f"{site.folder}/hub/{{name}}", clock)


@pytest.fixture
def adapters(site, clock, hub):  # noqa: ARG001 (its folders)
    return lazy_of(site, clock)


def names(site) -> list[str]:
    return [status.name for status in site.registry.statuses() if not status.unloaded]


async def test_a_name_that_a_request_names_is_loaded_and_stays(site, adapters):
    await adapters.ensure_loaded(["poet"])
    served = site.served("poet")
    shutil.rmtree(site.folder / "hub" / "poet")
    await adapters.ensure_loaded(["poet"])
    assert site.served("poet") == served
    assert names(site) == ["poet"]


async def test_one_load_serves_all_who_wait_and_outlives_each_of_them(site, adapters, monkeypatch):
    fetch, begun, gate, fetched = site.library.fetch, threading.Event(), threading.Event(), []

    def slow(source: str, **options):
        fetched.append(source)
        begun.set()
        assert gate.wait(PATIENCE)
        return fetch(source, **options)

    monkeypatch.setattr(site.library, "fetch", slow)
    first = asyncio.create_task(adapters.ensure_loaded(["poet"]))
    second = asyncio.create_task(adapters.ensure_loaded(["poet"]))
    await asyncio.to_thread(begun.wait)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.set()
    await second
    assert site.served("poet")
    assert len(fetched) == 1


async def test_a_name_that_the_source_does_not_have_is_asked_for_again_after_a_while(
    site, adapters, clock, hub
):
    with pytest.raises(AdapterNotFoundError, match="'late'") as missing:
        await adapters.ensure_loaded(["late"])
    assert missing.value.why
    assert missing.value.name == "late"
    hub("late", 4)
    clock.now += lazy.MISSING_SECONDS * 0.99
    with pytest.raises(AdapterNotFoundError):
        await adapters.ensure_loaded(["late"])
    clock.now += lazy.MISSING_SECONDS * 0.01
    await adapters.ensure_loaded(["late"])
    assert names(site) == ["late"]
    assert adapters._missing == {}


async def test_missing_names_are_remembered_up_to_a_number(adapters, monkeypatch):
    monkeypatch.setattr(lazy, "MAX_MISSING", 2)
    for number in (1, 2, 1, 3):
        with pytest.raises(AdapterNotFoundError):
            await adapters.ensure_loaded([f"missing-{number}"])
    assert list(adapters._missing) == ["missing-2", "missing-3"]
    assert adapters._loading == {}


async def test_the_least_recently_used_name_is_unloaded(site, adapters, monkeypatch):
    monkeypatch.setattr(lazy, "MAX_ON_DEMAND", 2)
    for name in ("poet", "bard", "poet", "seer"):
        await adapters.ensure_loaded([name])
    assert names(site) == ["poet", "seer"]
    assert site.written("bard") == []


EXPLICIT = {
    "load": lambda site: site.load("poet", 1),
    "load of something else": lambda site: site.load("poet", 9),
    "upload": lambda site: site.upload("poet", 1),
    "rollback": lambda site: (site.load("poet", 9), site.lifecycle.rollback("poet")),
    "split": lambda site: site.lifecycle.split("poet", "", 0),
}


@pytest.mark.parametrize("explicit", EXPLICIT.values(), ids=EXPLICIT)
async def test_a_name_that_was_also_loaded_explicitly_stays(site, adapters, monkeypatch, explicit):
    monkeypatch.setattr(lazy, "MAX_ON_DEMAND", 1)
    await adapters.ensure_loaded(["poet"])
    explicit(site)
    before = site.written("poet")
    for name in ("bard", "seer"):
        await adapters.ensure_loaded([name])
    assert names(site) == ["poet", "seer"]
    assert site.written("poet") == before


async def test_a_name_that_was_unloaded_explicitly_is_off_the_list(site, adapters, monkeypatch):
    monkeypatch.setattr(lazy, "MAX_ON_DEMAND", 2)
    for name in ("poet", "bard"):
        await adapters.ensure_loaded([name])
    site.lifecycle.unload("poet")
    site.load("poet", 1)
    await adapters.ensure_loaded(["seer"])
    assert names(site) == ["bard", "poet", "seer"]


async def test_an_explicit_load_that_comes_first_is_not_replaced(site, adapters, monkeypatch):
    fetch = site.library.fetch

    def overtaken(source: str, **options):
        if "hub" in source:
            site.load("poet", 9)
        return fetch(source, **options)

    monkeypatch.setattr(site.library, "fetch", overtaken)
    await adapters.ensure_loaded(["poet"])
    assert len(site.written("poet")) == 1
    monkeypatch.setattr(lazy, "MAX_ON_DEMAND", 0)
    await adapters.ensure_loaded(["bard"])
    assert names(site) == ["poet"]


async def test_after_a_restart_names_count_that_were_loaded_on_demand(open_site, site, hub, monkeypatch):
    monkeypatch.setattr(lazy, "MAX_ON_DEMAND", 2)
    before = lazy_of(site)
    for name in ("poet", "bard"):
        await before.ensure_loaded([name])
    site.load("poet", 1)
    site.lifecycle.load("other", str(site.folder / "hub" / "seer"))
    after = open_site()
    adapters = lazy_of(after)
    after.lifecycle.start(None)
    assert names(after) == ["bard", "other", "poet"]
    await adapters.ensure_loaded(["seer"])
    assert names(after) == ["bard", "other", "poet", "seer"]
    hub("late", 5)
    await adapters.ensure_loaded(["late"])
    assert names(after) == ["late", "other", "poet", "seer"]


async def test_a_name_that_cannot_be_unloaded_at_once_fails_no_load(site, adapters, monkeypatch):
    monkeypatch.setattr(lazy, "MAX_ON_DEMAND", 1)
    await adapters.ensure_loaded(["poet"])
    site.refuse_to_write("DELETE ON published")
    await adapters.ensure_loaded(["bard"])
    assert site.served("bard")
    assert site.served("poet")
    site.write_again()
    site.settle()
    assert names(site) == ["bard"]


async def test_why_a_name_is_missing_is_kept_as_text_without_what_was_read_of_it(site, adapters):
    """An error holds the frames that raised it, and these the tensors."""
    (site.folder / "hub" / "poet" / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdapterNotFoundError, match="poet"):
        await adapters.ensure_loaded(["poet"])
    [(_, why)] = adapters._missing.values()
    assert type(why) is str
    with pytest.raises(AdapterNotFoundError, match="poet"):
        await adapters.ensure_loaded(["poet"])
