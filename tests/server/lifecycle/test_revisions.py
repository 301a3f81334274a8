"""Files are held for what the registry has, and released by a worker, whatever the disk does."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import threading
from contextlib import contextmanager
from functools import partial

import pytest

from support.guarded import guard, guard_calls
from support.prompts import until
from turret_adapters.errors import AdapterNotFoundError, RevisionNotFoundError
from turret_adapters.registry import Named
from turret_server.errors import InvalidRequestError
from turret_server.lifecycle import revisions
from turret_server.lifecycle.revisions import check_revision

PATIENCE = 60


@pytest.fixture
def poet(site):
    """A name with two revisions; the second is current."""
    return [site.load("poet", seed) for seed in (1, 2)]


@contextmanager
def no_more_files():
    """Every file that is opened within the block fails, as where connections have taken all descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def in_a_thread(call) -> None:
    """Run a call that must not wait for anything that this test holds."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it waits"


@pytest.mark.parametrize("lock", ["store_locked", "database_locked"])
def test_the_end_of_a_request_on_a_replaced_revision_waits_for_no_lock(site, lock):
    first = site.load("poet", 1)
    ending, other = site.generate("poet", 200), site.generate("poet", 200)
    next(ending)
    next(other)
    second = site.load("poet", 2)
    with getattr(site, lock)():
        in_a_thread(ending.close)
        assert len([next(other) for _ in range(100)]) == 100
        in_a_thread(other.close)
        until(lambda: not site.engine.is_resident(first))
    site.settle()
    assert site.holds() == {second}


def test_releases_that_fail_leak_neither_pages_nor_files(site):
    first = site.load("poet", 1)
    streams = [site.generate("poet", 50) for _ in range(3)]
    for stream in streams:
        next(stream)
    site.load("poet", 2)
    with no_more_files():
        for stream in streams:
            stream.close()
        until(lambda: not site.engine.is_resident(first))
    site.settle()
    assert not site.registry.has(first)
    assert site.holds() == {site.served("poet")}


def test_a_revision_that_comes_again_as_it_goes_keeps_its_files_and_pages(site):
    gate = threading.Event()
    site.cleanup.submit("stuck", partial(gate.wait, PATIENCE))
    first = site.load("poet", 1)
    site.lifecycle.unload("poet")
    assert site.load("bard", 1) == first
    until(lambda: site.engine.is_resident(first))
    gate.set()
    site.settle()
    assert site.engine.is_resident(first)
    assert site.holds() == {first}


def test_a_named_revision_is_held_until_its_requests_have_ended(site, poet, monkeypatch):
    monkeypatch.setattr("turret_server.lifecycle.revisions.MAX_RECENT", 0)
    lease = site.revisions.acquire([Named("poet", revision=poet[0][:8])])
    assert lease.revision == poet[0]
    site.settle()
    assert site.holds() == set(poet)
    site.registry.release(lease)
    site.settle()
    assert site.holds() == {poet[1]}


def test_a_revision_that_no_longer_belongs_to_a_name_is_not_held(site, poet):
    with pytest.raises(RevisionNotFoundError):
        site.revisions.acquire([Named("poet", revision="0" * 8)])
    with pytest.raises(AdapterNotFoundError):
        site.lifecycle.unload("nobody")
    site.settle()
    assert site.holds() == {poet[1]}


def test_files_that_turn_out_to_be_lost_are_not_known_at_the_next_start(open_site):
    site = open_site(host_bytes=1)
    revision = site.load("poet", 1)
    assert revision in site.library.recorded()
    shutil.rmtree(site.root / "adapters" / revision)
    with pytest.raises(RevisionNotFoundError):
        site.registry.tensors(revision)
    site.settle()
    assert revision not in site.names.records()
    assert site.registry.status("poet").error


def test_a_named_revision_stays_loaded_until_others_were_named(site, monkeypatch):
    monkeypatch.setattr(revisions, "MAX_RECENT", 1)
    poet = [site.load("poet", seed) for seed in (1, 2, 3)]

    def name(revision: str) -> None:
        site.registry.release(site.revisions.acquire([Named("poet", revision=revision)]))

    name(poet[0])
    name(poet[2])
    assert site.registry.has(poet[0])
    name(poet[1])
    assert not site.registry.has(poet[0])
    assert site.registry.has(poet[1])
    site.settle()
    assert site.holds() == {poet[1], poet[2]}


@pytest.mark.parametrize("end", ["load", "roll back", "unload"])
def test_a_named_revision_goes_when_its_name_changes(site, end):
    poet = [site.load("poet", seed) for seed in (1, 2, 3)]
    other = [site.load("other", seed) for seed in (5, 6)]
    for name, revision in (("poet", poet[0]), ("other", other[0])):
        site.registry.release(site.revisions.acquire([Named(name, revision=revision)]))
    if end == "load":
        site.load("poet", 4)
    elif end == "roll back":
        site.lifecycle.rollback("poet")
    else:
        site.lifecycle.unload("poet")
    assert not site.registry.has(poet[0])
    assert site.registry.has(other[0])


def test_an_acquisition_that_fails_holds_nothing(site, poet, monkeypatch):
    monkeypatch.setattr(revisions, "MAX_RECENT", 0)
    with pytest.raises(AdapterNotFoundError):
        site.revisions.acquire([Named("poet", revision=poet[0]), Named("nobody")])
    site.settle()
    assert site.holds() == {poet[1]}


def test_an_adapter_that_the_registry_does_not_take_is_not_held(site, poet, monkeypatch):
    def no_memory(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(site.registry, "add", no_memory)
    with pytest.raises(MemoryError):
        site.load("bard", 3)
    site.settle()
    assert site.holds() == {poet[1]}
    assert site.written("bard") == []


def name_revision(site, revision: str, name: str = "poet") -> None:
    """A request that names a revision comes and ends."""
    site.registry.release(site.revisions.acquire([Named(name, revision=revision)]))


def test_of_the_named_revisions_the_least_recently_named_goes_first(site, monkeypatch):
    monkeypatch.setattr(revisions, "MAX_RECENT", 2)
    first, second, third, _ = (site.load("poet", seed) for seed in (1, 2, 3, 4))
    for revision in (first, second, first, third):
        name_revision(site, revision)
    assert [site.registry.has(each) for each in (first, second, third)] == [True, False, True]
    site.settle()
    assert site.holds() == {first, third, site.served("poet")}


def test_a_revision_that_went_with_a_change_is_kept_again_when_it_is_named_again(site):
    first, _ = (site.load("poet", seed) for seed in (1, 2))
    for seed in (3, 4):
        name_revision(site, first)
        assert site.registry.has(first)
        site.load("poet", seed)
        assert not site.registry.has(first)
    site.settle()
    assert site.holds() == {site.served("poet")}


def test_a_request_that_names_the_current_revision_keeps_nothing_for_later(site):
    first = site.load("poet", 1)
    name_revision(site, first)
    site.load("poet", 2)
    assert not site.registry.has(first)


def test_a_revision_that_two_names_had_stays_for_the_other_name(site):
    first, _ = (site.load("poet", seed) for seed in (1, 2))
    assert site.load("bard", 1) == first
    site.load("bard", 3)
    for name in ("poet", "bard"):
        name_revision(site, first, name)
    site.lifecycle.unload("poet")
    assert site.registry.has(first)
    site.lifecycle.unload("bard")
    assert not site.registry.has(first)
    site.settle()
    assert site.holds() == set()


def test_a_named_revision_must_be_of_the_name(site, poet):
    site.load("bard", 3)
    with pytest.raises(RevisionNotFoundError):
        site.revisions.acquire([Named("bard", revision=poet[0])])


@pytest.mark.parametrize("beginning", ["3f9a1c0", "3f9a1c0" * 5, "3f9a1c0G", "3F9A1C07", "", "3f9a1c07\n"])
def test_the_beginning_of_a_revision_has_8_to_32_digits(beginning):
    with pytest.raises(InvalidRequestError, match="first 8 to 32 digits") as refused:
        check_revision(beginning, "adapters")
    assert refused.value.metadata == {"field": "adapters"}
    with pytest.raises(InvalidRequestError) as refused:
        check_revision(beginning)
    assert refused.value.metadata == {"field": "revision"}
    for allowed in ("3f9a1c07", "3" * 32):
        assert check_revision(allowed) == allowed


def test_recent_revisions_and_files_that_are_held_change_under_their_locks(site, poet, caplog, monkeypatch):
    monkeypatch.setattr(revisions, "MAX_RECENT", 1)
    guard(site.revisions, site.revisions._recent_lock.locked, "_recent")
    guard_calls(site.library, site.revisions._keeping.locked, "keep", "let_go")
    newest = site.load("poet", 3)
    for revision in poet:
        site.registry.release(site.revisions.acquire([Named("poet", revision=revision[:8])]))
    site.settle()
    assert site.holds() == {poet[1], newest}
    site.lifecycle.unload("poet")
    site.settle()
    assert site.holds() == set()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
