"""What a name serves changes in one order: hold the files, write the change down, serve it."""

from __future__ import annotations

import logging
import shutil

import pytest

from support.guarded import guard, guard_calls
from support.prompts import until
from turret_adapters.errors import AdapterError, StoreFullError
from turret_adapters.store import records
from turret_adapters.store.names import Ownership
from turret_server.engine.request import DEFAULT_TENANT
from turret_server.errors import AdapterTooLargeError, QuotaExceededError
from turret_server.lifecycle import publishing

PATIENCE = 60


@pytest.fixture
def poet(site):
    """A name with two revisions; the second is current."""
    return [site.load("poet", seed) for seed in (1, 2)]


ENDS = {
    "unload": lambda site: site.lifecycle.unload("poet"),
    "swap": lambda site: site.load("poet", 3),
    "roll back": lambda site: site.lifecycle.rollback("poet"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_release_that_fails_is_retried_and_changes_no_answer(open_site, monkeypatch, caplog, end):
    site = open_site(pinned=("poet",))
    site.load("poet", 1)
    before = site.load("poet", 2)
    until(lambda: site.lifecycle.missing_pins() == [])
    let_go, failures = site.library.let_go, []

    def fail_twice(revision: str) -> None:
        if revision == before and len(failures) < 2:
            failures.append(revision)
            raise StoreFullError("the disk is full")
        let_go(revision)

    monkeypatch.setattr(site.library, "let_go", fail_twice)
    ENDS[end](site)
    expected = set(site.written("poet")[:1])
    assert {site.served("poet")} - {""} == expected
    assert before not in expected
    until(lambda: not site.engine.is_resident(before))
    until(lambda: site.lifecycle.missing_pins() == ([] if expected else ["poet"]))
    until(lambda: len(failures) == 2)
    site.settle()
    assert site.holds() == expected
    assert caplog.text.count(f"releasing the files of revision {before} failed") == 2


@pytest.mark.parametrize(
    ("refused", "change"),
    [
        ("INSERT ON published", lambda site: site.load("poet", 3)),
        ("INSERT ON published", lambda site: site.load("bard", 3)),
        ("DELETE ON published", lambda site: site.lifecycle.rollback("poet")),
        ("DELETE ON published", lambda site: site.lifecycle.unload("poet")),
        ("INSERT ON split", lambda site: site.lifecycle.split("poet", site.written("poet")[1], 50)),
    ],
    ids=["swap", "load", "roll back", "unload", "split"],
)
def test_a_change_that_cannot_be_written_down_is_not_served(site, poet, open_site, refused, change):
    site.refuse_to_write(refused)
    with pytest.raises(AdapterError):
        change(site)
    assert site.served("poet") == poet[1]
    assert site.served("bard") == ""
    assert site.registry.status("poet").split is None
    site.write_again()
    site.settle()
    assert site.holds() == {poet[1]}
    after = open_site()
    after.lifecycle.start(None)
    assert (after.served("poet"), after.served("bard")) == (poet[1], "")


@pytest.mark.parametrize("step", ["keep", "add"])
def test_a_rollback_whose_files_cannot_be_held_changes_nothing(site, poet, open_site, monkeypatch, step):
    def full(_: object) -> None:
        raise StoreFullError("no inodes are left")

    monkeypatch.setattr(*((site.library, "keep") if step == "keep" else (site.registry, "add")), full)
    with pytest.raises(StoreFullError):
        site.lifecycle.rollback("poet")
    monkeypatch.undo()
    assert site.served("poet") == poet[1]
    assert site.written("poet") == poet[::-1]
    site.settle()
    assert site.holds() == {poet[1]}
    after = open_site()
    after.lifecycle.start(None)
    assert after.served("poet") == poet[1]
    after.lifecycle.rollback("poet")
    assert after.served("poet") == poet[0]


def test_a_rollback_that_another_change_overtakes_goes_back_from_there(site, poet, monkeypatch):
    read, late = site.library.read, []

    def read_late(revision: str):
        if not late:
            late.append("poet")
            site.load("poet", 3)
        return read(revision)

    monkeypatch.setattr(site.library, "read", read_late)
    site.lifecycle.rollback("poet")
    assert site.served("poet") == poet[1]
    assert site.written("poet") == poet[::-1]


def test_a_split_ends_with_its_revision_even_if_that_cannot_be_looked_up_at_first(site, poet, monkeypatch):
    site.lifecycle.split("poet", poet[0][:8], 30)
    assert site.registry.status("poet").split.percent == 30
    splits, failures, is_locked = site.names.splits, [], site.lifecycle._publishing._is_owned

    def fail_once():
        assert is_locked()
        if not failures:
            failures.append("once")
            raise StoreFullError("the disk is full")
        return splits()

    monkeypatch.setattr(site.names, "splits", fail_once)
    site.lifecycle.rollback("poet")
    assert site.served("poet") == poet[0]
    site.settle()
    assert failures == ["once"]
    assert site.registry.status("poet").split is None
    assert site.holds() == {poet[0]}


def test_a_split_that_goes_on_survives_a_load(site, poet):
    site.lifecycle.split("poet", poet[0][:8], 30)
    site.load("poet", 3)
    split = site.registry.status("poet").split
    assert (split.revision, split.percent) == (poet[0], 30)


def test_what_is_unloaded_meanwhile_is_not_pinned_again(open_site, monkeypatch):
    site = open_site(pinned=("poet",))
    site.load("poet", 1)
    until(lambda: site.lifecycle.missing_pins() == [])

    def unload_first(_: str) -> bool:
        site.lifecycle.unload("poet")
        return False

    monkeypatch.setattr(site.engine, "is_resident", unload_first)
    assert site.lifecycle.missing_pins() == ["poet"]
    monkeypatch.undo()
    site.settle()
    assert site.engine._scheduler.residency.pinned() == []


def test_a_pinned_name_that_is_unloaded_during_the_look_is_missing(open_site, monkeypatch):
    site = open_site(pinned=("poet",))
    site.load("poet", 1)
    status = site.registry.status

    def unload_first(name: str):
        if site.served("poet"):
            site.lifecycle.unload("poet")
        return status(name)

    monkeypatch.setattr(site.registry, "status", unload_first)
    assert site.lifecycle.missing_pins() == ["poet"]


def test_a_pinned_name_that_only_drains_is_missing(open_site):
    site = open_site(pinned=("poet",))
    site.load("poet", 1)
    stream = site.generate("poet", 50)
    next(stream)
    site.lifecycle.unload("poet")
    assert site.lifecycle.missing_pins() == ["poet"]
    stream.close()


def test_a_folder_whose_name_is_invalid_is_listed_as_failed(site):
    folder = site.folder / "-bad"
    shutil.copytree(site.source(1), folder)
    site.lifecycle.load_folder(folder)
    assert "name" in site.registry.status("-bad").error


def test_the_name_of_a_deleted_folder_stays_if_something_else_was_loaded_since(site):
    folder = site.folder / "poet"
    shutil.copytree(site.source(1), folder)
    site.lifecycle.load_folder(folder)
    assert site.served("poet")
    site.load("poet", 2)
    site.lifecycle.forget_folder(folder)
    assert site.served("poet") == site.written("poet")[0]
    site.lifecycle.rollback("poet")
    site.lifecycle.forget_folder(folder)
    assert site.served("poet") == ""
    assert site.written("poet") == []


def test_a_start_serves_what_was_served_and_forgets_deleted_folders(open_site):
    site = open_site()
    adapters = site.folder / "adapters"
    for seed, name in ((1, "stays"), (2, "goes")):
        shutil.copytree(site.source(seed), adapters / name)
    site.lifecycle.start(adapters)
    other = [site.load("other", seed) for seed in (3, 4)]
    site.lifecycle.split("other", other[0][:8], 25)
    stays = site.served("stays")
    shutil.rmtree(adapters / "goes")
    shutil.copytree(site.source(5), adapters / "comes")
    after = open_site()
    after.lifecycle.start(adapters)
    assert sorted(status.name for status in after.registry.statuses()) == ["comes", "other", "stays"]
    assert (after.served("stays"), after.served("other")) == (stays, other[1])
    assert after.registry.status("other").split.revision == other[0]
    assert after.written("goes") == []
    assert after.holds() == {stays, after.served("comes"), *other}


def pinned(site) -> list[str]:
    """The revisions that are pinned, once the engine has heard of all that was asked."""
    site.settle()
    return [spec.revision for spec in site.engine._scheduler.residency.pinned()]


def notes_of(site, monkeypatch, method: str) -> list[tuple[object, ...]]:
    """The arguments with which a method of the engine is called, a spec as its revision."""
    called, call = [], getattr(site.engine, method)

    def noted(*arguments: object) -> object:
        called.append(tuple(getattr(each, "revision", each) for each in arguments))
        return call(*arguments)

    monkeypatch.setattr(site.engine, method, noted)
    return called


ACME = Ownership(owner="acme", max_names=1, max_bytes=None)


def test_an_adapter_is_checked_and_prefetched_for_its_owner(site, monkeypatch):
    checked, prefetched = (notes_of(site, monkeypatch, each) for each in ("check_adapter", "prefetch"))
    site.lifecycle.load("poet", site.source(1), ACME)
    mine = site.served("poet")
    nobodys = site.load("bard", 2)
    assert checked == [(mine, "acme"), (nobodys, "")]
    assert prefetched == [(mine, "acme"), (nobodys, DEFAULT_TENANT)]
    # No request has named them.
    until(lambda: site.engine.is_resident(mine) and site.engine.is_resident(nobodys))


def test_a_limit_of_its_owner_refuses_an_adapter_and_changes_nothing(site):
    site.lifecycle.load("poet", site.source(1), ACME)
    with pytest.raises(QuotaExceededError) as refused:
        site.lifecycle.load("bard", site.source(2), ACME)
    assert refused.value.metadata == {"tenant": "acme", "quota": "max_adapters"}
    assert site.served("bard") == ""
    site.settle()
    assert site.holds() == {site.served("poet")}


CHANGES = {
    "load": lambda site: site.load("bard", 3),
    "load anew": lambda site: site.load("poet", 3),
    "roll back": lambda site: site.lifecycle.rollback("poet"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_that_is_too_large_is_never_served(site, poet, monkeypatch, change):
    def too_large(*_: object) -> None:
        raise AdapterTooLargeError("it is too large")

    monkeypatch.setattr(site.engine, "check_adapter", too_large)
    with pytest.raises(AdapterTooLargeError):
        CHANGES[change](site)
    assert (site.served("poet"), site.served("bard")) == (poet[1], "")
    assert site.written("poet") == poet[::-1]
    site.settle()
    assert site.holds() == {poet[1]}


@pytest.mark.parametrize("change", ["load anew", "roll back"])
def test_an_adapter_that_cannot_be_pinned_does_not_replace_one_that_is(open_site, monkeypatch, change):
    site = open_site(pinned=("poet",))
    before = [site.load("poet", seed) for seed in (1, 2)]

    def too_large(name: str, _: object) -> None:
        raise AdapterTooLargeError(f"{name} is too large")

    monkeypatch.setattr(site.engine, "check_pin_adapters", too_large)
    with pytest.raises(AdapterTooLargeError, match="poet is too large"):
        CHANGES[change](site)
    assert (site.served("poet"), site.written("poet")) == (before[1], before[::-1])
    site.load("bard", 3)  # which is not to be pinned


@pytest.mark.parametrize("is_recorded", [True, False])
def test_after_a_restart_pins_are_pinned_and_those_that_do_not_fit_fail(open_site, monkeypatch, is_recorded):
    site = open_site()
    revision = site.load("poet", 1)
    if not is_recorded:
        site.library.forget_record(revision)
    site = open_site(pinned=("poet",))
    site.lifecycle.start(None)
    assert site.served("poet") == revision
    assert pinned(site) == [revision]
    site = open_site(pinned=("poet",))

    def too_large(*_: object) -> None:
        raise AdapterTooLargeError("it is too large")

    monkeypatch.setattr(site.engine, "check_pin_adapters", too_large)
    if not is_recorded:
        site.library.forget_record(revision)
    site.lifecycle.start(None)
    assert "too large" in site.registry.status("poet").error
    assert site.registry.status("poet").spec is None
    site.settle()
    assert site.holds() == set()


def test_a_restored_adapter_is_read_only_if_no_record_says_what_it_is(open_site, monkeypatch):
    revision = open_site().load("poet", 1)
    for is_recorded in (True, False, True):
        site = open_site()
        if not is_recorded:
            site.library.forget_record(revision)
        read, reads = site.library.read, []

        def noted(each: str, read=read, reads=reads):
            reads.append(each)
            return read(each)

        monkeypatch.setattr(site.library, "read", noted)
        checked = notes_of(site, monkeypatch, "check_adapter")
        monkeypatch.setattr(site.engine, "prefetch", lambda *_: None)  # which reads it
        site.lifecycle.start(None)
        assert reads == ([] if is_recorded else [revision])
        assert checked == [(revision,)]
        assert site.served("poet") == revision
        assert site.holds() == {revision}


def test_an_adapter_that_does_not_fit_after_a_restart_fails_alone(open_site, monkeypatch, caplog):
    site = open_site()
    revisions = [site.load(name, seed) for seed, name in enumerate(("bard", "poet"), 1)]
    site = open_site()

    def check(spec, *_: object) -> None:
        if spec.revision == revisions[0]:
            raise AdapterTooLargeError("it is too large")

    monkeypatch.setattr(site.engine, "check_adapter", check)
    site.lifecycle.start(None)
    assert (site.registry.status("bard").error, site.served("poet")) == ("it is too large", revisions[1])
    assert "adapter bard is not served: it is too large" in caplog.messages
    # What failed is not forgotten: a later start may have more memory.
    after = open_site()
    after.lifecycle.start(None)
    assert after.served("bard") == revisions[0]


def test_a_fault_while_a_folder_is_loaded_is_logged_with_its_trace_and_listed(site, monkeypatch, caplog):
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault")

    folder = site.folder / "poet"
    shutil.copytree(site.source(1), folder)
    monkeypatch.setattr(site.library, "fetch", fault)
    site.lifecycle.load_folder(folder)
    assert site.registry.status("poet").error == "ZeroDivisionError: a fault"
    assert [bool(record.exc_info) for record in caplog.records] == [True]


def test_a_folder_that_could_not_be_loaded_is_forgotten_with_it(site):
    folder = site.folder / "broken"
    folder.mkdir()
    site.lifecycle.load_folder(folder)
    assert site.registry.status("broken").error
    site.lifecycle.forget_folder(folder)
    assert site.registry.statuses() == []
    site.lifecycle.forget_folder(folder)  # and again, which is nothing


def test_a_start_loads_only_folders_that_have_changed(open_site, monkeypatch):
    monkeypatch.setattr(records, "SETTLED_SECONDS", -1)
    site = open_site()
    adapters = site.folder / "adapters"
    for seed, name in enumerate(("same", "changed", "elsewhere"), 1):
        shutil.copytree(site.source(seed), adapters / name)
    site.lifecycle.start(adapters)
    site.load("elsewhere", 4)
    shutil.rmtree(adapters / "changed")
    shutil.copytree(site.source(5), adapters / "changed")
    site = open_site()
    fetch, fetched = site.library.fetch, []

    def noted(source: str, **options: object):
        fetched.append(options["name"])
        return fetch(source, **options)

    monkeypatch.setattr(site.library, "fetch", noted)
    site.lifecycle.start(adapters)
    assert sorted(fetched) == ["changed", "elsewhere"]
    assert len({site.served(name) for name in ("same", "changed", "elsewhere")} - {""}) == 3


def test_a_start_with_many_folders_says_how_far_it_is(open_site, monkeypatch, caplog):
    monkeypatch.setattr(publishing, "_PROGRESS_EVERY", 2)
    site = open_site()
    adapters = site.folder / "adapters"
    for seed in range(1, 5):
        shutil.copytree(site.source(seed), adapters / f"a{seed}")
    (adapters / "readme.txt").touch()
    caplog.set_level("INFO")
    site.lifecycle.start(adapters)
    assert [each for each in caplog.messages if " of " in each] == [f"loaded 2 of 4 adapters in {adapters}"]


def test_a_split_whose_revision_is_lost_ends_and_others_are_restored(open_site, monkeypatch, caplog):
    site = open_site()
    revisions = {}
    for number, name in enumerate(("bard", "poet")):
        revisions[name] = [site.load(name, 2 * number + seed) for seed in (1, 2)]
        site.lifecycle.split(name, revisions[name][0][:8], 25)
    site = open_site()
    read = site.library.read

    def lost(revision: str):
        if revision == revisions["bard"][0]:
            raise StoreFullError("it is lost")
        return read(revision)

    monkeypatch.setattr(site.library, "read", lost)
    site.lifecycle.start(None)
    assert site.registry.status("bard").split is None
    assert site.registry.status("poet").split.revision == revisions["poet"][0]
    assert site.served("bard") == revisions["bard"][1]
    assert any("traffic split of adapter bard" in each and "it is lost" in each for each in caplog.messages)


def test_a_server_that_stops_refuses_new_fetches(site):
    site.lifecycle.interrupt()
    with pytest.raises(AdapterError):
        site.load("poet", 1)


def test_a_pin_ends_with_its_name(open_site):
    site = open_site(pinned=("poet",))
    revision = site.load("poet", 1)
    assert pinned(site) == [revision]
    newer = site.load("poet", 2)
    assert pinned(site) == [newer]
    site.lifecycle.unload("poet")
    assert pinned(site) == []


def test_secrets_of_a_source_are_not_logged(site, monkeypatch, caplog):
    fetch, folder = site.library.fetch, site.source(1)
    monkeypatch.setattr(site.library, "fetch", lambda _, **options: fetch(folder, **options))
    caplog.set_level("INFO")
    site.lifecycle.load("poet", "https://user:secret@models.example.com/poet?token=secret")
    assert "loaded adapter poet" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("change", ["load anew", "roll back", "start"])
def test_a_pin_that_is_larger_than_the_arena_is_refused_for_that_and_not_for_the_other_pins(
    open_site, monkeypatch, change
):
    site = open_site(pinned=("poet",))
    for seed in (1, 2):
        site.load("poet", seed)
    if change == "start":
        site = open_site(pinned=("poet",))

    def refuse(why: str):
        def check(*_: object) -> None:
            raise AdapterTooLargeError(why)

        return check

    monkeypatch.setattr(site.engine, "check_pin_adapters", refuse("the pins take too much"))
    monkeypatch.setattr(site.engine, "check_adapter", refuse("it is larger than the arena"))
    if change == "start":
        site.lifecycle.start(None)
        assert site.registry.status("poet").error == "it is larger than the arena"
    else:
        with pytest.raises(AdapterTooLargeError, match="larger than the arena"):
            CHANGES[change](site)


def test_names_change_on_disk_in_the_registry_and_in_the_engine_under_one_lock(
    open_site, monkeypatch, caplog
):
    site = open_site(pinned=("poet",))
    is_locked = site.lifecycle._publishing._is_owned
    guard_calls(site.library, is_locked, "publish", "rollback")
    guard_calls(site.names, is_locked, "remove", "split", "splits")
    guard_calls(site.registry, is_locked, "publish_unread", "remove", "split")
    guard_calls(site.engine, is_locked, "pin_adapters")
    first = site.load("poet", 1)
    monkeypatch.setattr(site.engine, "is_resident", lambda _: False)
    assert site.lifecycle.missing_pins() == ["poet"]
    site.load("poet", 2)
    site.lifecycle.split("poet", first[:8], 30)
    site.lifecycle.rollback("poet")
    site.lifecycle.unload("poet")
    folder = site.folder / "bard"
    shutil.copytree(site.source(3), folder)
    site.lifecycle.load_folder(folder)
    guard_calls(site.names, is_locked, "histories")
    site.lifecycle.forget_folder(folder)
    site.settle()
    assert site.registry.statuses() == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_what_was_loaded_on_demand_is_known_under_its_lock_and_changed_under_that_of_names(site, caplog):
    lifecycle, sources = site.lifecycle, {"poet": site.source(1), "bard": site.source(2)}
    guard(lifecycle, lifecycle._on_demand_lock.locked, "_on_demand")
    guard_calls(lifecycle, lifecycle._publishing._is_owned, "_publish", "_unload")
    lifecycle.load_on_demand("poet", sources["poet"], 1)
    lifecycle.touch("poet")
    lifecycle.mark_on_demand(sources.__getitem__)
    lifecycle.load_on_demand("bard", sources["bard"], 1)
    assert [status.name for status in site.registry.statuses()] == ["bard"]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
