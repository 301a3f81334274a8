"""What a name serves changes in one order: hold the files, write the change down, serve it."""

from __future__ import annotations

import shutil

import pytest

from support.prompts import until
from turret_adapters.errors import AdapterError, StoreFullError

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
    splits, failures = site.names.splits, []

    def fail_once():
        if not failures:
            failures.append("once")
            raise StoreFullError("the disk is full")
        return splits()

    monkeypatch.setattr(site.names, "splits", fail_once)
    site.lifecycle.rollback("poet")
    assert site.served("poet") == poet[0]
    site.settle()
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
