"""Names keep their revisions, each base its own, whoever writes at the same time."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from turret_adapters.errors import (
    AdapterNotFoundError,
    NamesCorruptError,
    RevisionNotFoundError,
    StoreBusyError,
    StoreFailedError,
    StoreFullError,
)
from turret_adapters.store import names_database as module
from turret_adapters.store.names import MAX_HISTORY, Names, Record, Split


@pytest.fixture
def open_names(tmp_path: Path) -> Iterator[Callable[..., Names]]:
    opened: list[Names] = []

    def open_names(base: str = "llama") -> Names:
        opened.append(Names(tmp_path / "names.sqlite", base))
        return opened[-1]

    yield open_names
    for names in opened:
        names.close()


@pytest.fixture
def names(open_names: Callable[..., Names]) -> Names:
    return open_names()


def serving(names: Names) -> dict[str, str]:
    return {name: published.revision for name, published in names.current().items()}


def revisions(names: Names, name: str = "poet") -> list[str]:
    return [published.revision for published in names.history(name)]


def test_names_are_the_same_after_a_restart(open_names: Callable[..., Names]) -> None:
    first = open_names()
    first.publish("poet", "r1", "/poet")
    first.publish("pirate", "r2", "hf://owner/pirate")
    first.publish("poet", "r3", "/poet")
    first.close()
    again = open_names()
    assert serving(again) == {"pirate": "r2", "poet": "r3"}
    assert again.current()["pirate"].source == "hf://owner/pirate"
    assert revisions(again) == ["r3", "r1"]


def test_bases_share_the_file_but_not_the_names(open_names: Callable[..., Names]) -> None:
    llama, qwen = open_names("llama"), open_names("qwen")
    llama.publish("poet", "r1", "")
    qwen.publish("poet", "r2", "")
    llama.remove("poet")
    assert serving(llama) == {}
    assert serving(qwen) == {"poet": "r2"}
    with pytest.raises(AdapterNotFoundError):
        llama.history("poet")


def test_a_revision_is_found_by_its_beginning(open_names: Callable[..., Names]) -> None:
    names = open_names()
    for revision in ("aaaa1111", "aaaa2222", "bbbb3333", "aaaa1111"):
        names.publish("poet", revision, "")
    assert names.find("poet", "bbbb").revision == "bbbb3333"
    assert names.find("poet", "aaaa1").number == names.history("poet")[0].number
    with pytest.raises(RevisionNotFoundError, match=r"one revision .* found aaaa1111, aaaa2222"):
        names.find("poet", "aaaa")
    with pytest.raises(RevisionNotFoundError, match="found aaaa1111, bbbb3333, aaaa2222"):
        names.find("poet", "cccc")
    with pytest.raises(AdapterNotFoundError):
        names.find("bard", "aaaa")
    assert names.rollback_target("poet", "aaaa2").revision == "aaaa2222"
    assert names.histories(["poet", "bard"]) == {"poet": names.history("poet"), "bard": []}


def test_a_split_is_the_same_after_a_restart(open_names: Callable[..., Names]) -> None:
    names = open_names()
    for revision in ("r1", "r2", "r3"):
        names.publish("poet", revision, "")
    assert names.split("poet", "r1", 30) == Split("r1", 30)
    assert names.needed(depth=1) == {"r1", "r3"}
    names.close()
    again = open_names()
    assert again.splits() == {"poet": Split("r1", 30)}
    assert again.split("poet", "r2", 5) == Split("r2", 5)
    assert again.splits() == {"poet": Split("r2", 5)}
    assert open_names("qwen").splits() == {}
    assert again.split("poet", "", 0) is None
    assert again.splits() == {}


def test_a_split_goes_to_an_earlier_revision_alone(names: Names) -> None:
    with pytest.raises(AdapterNotFoundError):
        names.split("poet", "r1", 30)
    names.publish("poet", "r1", "")
    names.publish("poet", "r2", "")
    names.split("poet", "r1", 30)
    for revision in ("r2", "r3"):
        with pytest.raises(RevisionNotFoundError, match=f"'{revision}', found r1"):
            names.split("poet", revision, 30)
    assert names.splits() == {"poet": Split("r1", 30)}


@pytest.mark.parametrize(
    "end",
    [
        lambda names: names.publish("poet", "r2", ""),
        lambda names: names.rollback("poet", "r2"),
        lambda names: names.rollback("poet", "r1"),
        lambda names: names.remove("poet"),
        lambda names: [names.publish("poet", f"s{number}", "") for number in range(MAX_HISTORY)],
    ],
    ids=["becomes current", "is gone back to", "is forgotten", "goes with its name", "is too old"],
)
def test_a_split_ends_when_its_revision(names: Names, end: Callable[[Names], object]) -> None:
    for revision in ("r1", "r2", "r3"):
        names.publish("poet", revision, "")
    names.split("poet", "r2", 30)
    names.publish("poet", "r4", "")
    assert names.splits() == {"poet": Split("r2", 30)}
    end(names)
    assert names.splits() == {}


def test_names_of_the_schema_before_splits_are_read(open_names: Callable[..., Names], tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "names.sqlite")
    database.executescript(f"{module._SCHEMA}PRAGMA user_version = 1;")
    database.execute(
        "INSERT INTO published (base, name, revision, source, published_at) "
        "VALUES ('llama', 'poet', 'r1', '', 1)"
    )
    database.commit()
    database.close()
    names = open_names()
    names.publish("poet", "r2", "")
    assert revisions(names) == ["r2", "r1"]
    assert names.split("poet", "r1", 50) == Split("r1", 50)
    names.close()
    assert revisions(open_names()) == ["r2", "r1"]


def test_what_any_base_names_is_needed(open_names: Callable[..., Names]) -> None:
    llama, qwen = open_names("llama"), open_names("qwen")
    for revision in ("r1", "r2", "r3"):
        llama.publish("poet", revision, "")
    qwen.publish("poet", "r4", "")
    assert llama.needed() == {"r2", "r3", "r4"}
    assert llama.needed(depth=1) == {"r3", "r4"}


def test_rolling_back_goes_back_step_by_step(names: Names) -> None:
    for revision in ("r1", "r2", "r3", "r4"):
        names.publish("poet", revision, f"/{revision}")
    assert names.rollback_target("poet").revision == "r3"
    assert revisions(names)[0] == "r4"
    assert names.rollback("poet").source == "/r3"
    assert names.rollback("poet", "r1").revision == "r1"
    assert serving(names) == {"poet": "r1"}
    with pytest.raises(RevisionNotFoundError, match="found none"):
        names.rollback("poet")
    names.publish("poet", "r5", "")
    assert revisions(names) == ["r5", "r1"]


def test_rolling_back_to_what_never_was_changes_nothing(names: Names) -> None:
    names.publish("poet", "r1", "")
    names.publish("poet", "r2", "")
    for revision in ("r2", "r3"):
        for call in (names.rollback, names.rollback_target):
            with pytest.raises(RevisionNotFoundError, match=f"'{revision}', found r1"):
                call("poet", revision)
    assert revisions(names) == ["r2", "r1"]


def test_a_name_that_is_not_there_is_not_found(names: Names) -> None:
    names.remove("poet")
    for call in (names.rollback, names.rollback_target, names.history):
        with pytest.raises(AdapterNotFoundError, match="'poet'"):
            call("poet")


def test_publishing_what_is_served_already_makes_no_history(names: Names) -> None:
    first = names.publish("poet", "r1", "/here")
    second = names.publish("poet", "r1", "/there")
    assert second.number == first.number
    assert [published.source for published in names.history("poet")] == ["/there"]


def test_numbers_grow_and_are_not_used_again(names: Names) -> None:
    first = names.publish("poet", "r1", "").number
    names.remove("poet")
    assert names.publish("poet", "r1", "").number > first


def test_history_is_bounded(names: Names) -> None:
    for index in range(MAX_HISTORY + 5):
        names.publish("poet", f"r{index}", "")
        names.publish("pirate", f"r{index}", "")
    assert revisions(names) == [f"r{index}" for index in range(MAX_HISTORY + 4, 4, -1)]


@pytest.mark.parametrize("name", ["", "'; DROP TABLE published; --", "poète", "a" * 5000])
def test_any_name_is_only_a_name(name: str, names: Names) -> None:
    names.publish(name, "r1", name)
    names.publish("poet", "r2", "")
    assert serving(names) == {name: "r1", "poet": "r2"}


def test_threads_write_at_once(names: Names) -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda index: names.publish(f"thread{index % 3}", f"r{index // 3}", ""), range(75)))
    for each in range(3):
        assert set(revisions(names, f"thread{each}")) == {f"r{index}" for index in range(25)}


def test_a_change_sees_what_no_other_changes_meanwhile(open_names: Callable[..., Names]) -> None:
    first, second = open_names(), open_names()
    with ThreadPoolExecutor(1) as pool:
        with first._database.transaction() as database:
            assert first._rows(database, "poet") == []
            waiting = pool.submit(second.publish, "poet", "r2", "")
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.1)
            database.execute("DELETE FROM published")
        assert waiting.result().revision == "r2"


@pytest.mark.parametrize("spoilt", ["beginning", "schema", "other", "page"])
def test_a_database_that_is_none_says_what_to_do(
    spoilt: str, open_names: Callable[..., Names], tmp_path: Path
) -> None:
    names = open_names()
    for index in range(200):
        names.publish(f"poet{index}", "r1", "x" * 100)
    names.close()
    place = tmp_path / "names.sqlite"
    data = bytearray(place.read_bytes())
    assert len(data) > 4096 * 4
    match spoilt:
        case "beginning":
            data[:100] = bytes(100)
        case "schema":
            data[100:4096] = b"\xff" * 3996
        case "page":
            data[3 * 4096 : 4 * 4096] = b"\xff" * 4096
        case "other":
            data = bytearray(b"these are no names\n" * 1000)
    place.write_bytes(data)
    with pytest.raises(NamesCorruptError, match=r"move it and its -wal and -shm files away"):
        open_names()
    place.unlink()
    assert serving(open_names()) == {}


def test_a_database_of_a_newer_turret_is_left_alone(open_names: Callable[..., Names], tmp_path: Path) -> None:
    open_names().close()
    database = sqlite3.connect(tmp_path / "names.sqlite")
    database.execute(f"PRAGMA user_version = {module.SCHEMA_VERSION + 1}")
    database.close()
    with pytest.raises(NamesCorruptError, match=r"expected schema 3, found 4 .*version of Turret"):
        open_names()


def test_a_database_that_somebody_keeps_locked_is_busy(names: Names, tmp_path: Path) -> None:
    names._database._connection.execute("PRAGMA busy_timeout = 10")
    other = sqlite3.connect(tmp_path / "names.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusyError, match="locked"):
        names.publish("poet", "r1", "")
    other.close()
    names.publish("poet", "r1", "")


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreFailedError):
        Names(tmp_path / "absent" / "names.sqlite", "llama")
    (tmp_path / "names.sqlite").mkdir()
    with pytest.raises(StoreFailedError, match="write in that folder"):
        Names(tmp_path / "names.sqlite", "llama")


def test_what_is_written_is_synchronised(names: Names) -> None:
    assert names._database._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert names._database._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_names_of_the_schema_before_owners_are_read(open_names: Callable[..., Names], tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "names.sqlite")
    database.executescript(f"{module._SCHEMA}{module._SCHEMA_SINCE_2}PRAGMA user_version = 2;")
    database.execute(
        "INSERT INTO published (base, name, revision, source, published_at) "
        "VALUES ('llama', 'poet', 'r1', '/poet', 1)"
    )
    database.commit()
    database.close()
    names = open_names()
    [poet] = names.history("poet")
    assert (poet.revision, poet.source, poet.owner, poet.source_marks) == ("r1", "/poet", "", "")
    assert names.records() == {}


def test_a_record_stays_as_long_as_a_name_has_its_revision(open_names: Callable[..., Names]) -> None:
    llama, qwen = open_names("llama"), open_names("qwen")
    record, other = Record("reader", "marks", b"spec"), Record("reader", "marks", b"other")
    llama.publish("poet", "r1", "", record=record)
    llama.publish("gone", "r2", "", record=other)
    qwen.save_record("r1", other)
    llama.remove("gone")
    llama.tidy_records()
    llama.close()
    llama = open_names("llama")
    assert llama.records() == {"r1": record}
    assert qwen.records() == {"r1": other}
    llama.forget_record("r1")
    assert llama.records() == {}
    assert qwen.records() == {"r1": other}


def test_a_disk_that_fills_up_is_told_and_changes_nothing(names: Names, tmp_path: Path) -> None:
    names.publish("poet", "r1", "")
    database = names._database._connection
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreFullError, match=f"names '{tmp_path}/names.sqlite': the disk is full"):
        names.publish("poet", "r2", "x" * 100_000)
    database.execute("PRAGMA max_page_count = 1000000")
    assert revisions(names) == ["r1"]
    names.publish("poet", "r2", "x" * 100_000)
    assert revisions(names) == ["r2", "r1"]


def test_a_database_that_is_not_writable_is_told(names: Names) -> None:
    names._database._connection.execute("PRAGMA query_only = 1")
    with pytest.raises(StoreFailedError, match=r"names\.sqlite': .*must be able to write in that folder"):
        names.publish("poet", "r1", "")
    names._database._connection.execute("PRAGMA query_only = 0")
    names.publish("poet", "r1", "")
    assert serving(names) == {"poet": "r1"}


def test_a_database_without_its_tables_is_corrupt(names: Names) -> None:
    names._database._connection.execute("DROP TABLE published")
    with pytest.raises(NamesCorruptError, match=r"no such table.*move it and its -wal and -shm files away"):
        names.current()


def test_a_file_system_without_shared_memory_is_refused_before_anything_is_written(
    open_names: Callable[..., Names], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect

    def without_shared_memory(path: Path, **options: Any) -> sqlite3.Connection:
        return connect(f"file:{path}?vfs=unix-dotfile", uri=True, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module.sqlite3, "connect", without_shared_memory)
        with pytest.raises(StoreFailedError, match="put the store on a local disk"):
            open_names()
    assert (tmp_path / "names.sqlite").stat().st_size == 0
    assert serving(open_names()) == {}


def test_a_closed_database_is_an_error_of_the_program(open_names: Callable[..., Names]) -> None:
    names = open_names()
    names.close()
    with pytest.raises(sqlite3.ProgrammingError):
        names.current()


def test_closing_waits_for_what_is_being_written(open_names: Callable[..., Names]) -> None:
    names = open_names()
    with ThreadPoolExecutor(1) as pool, names._database.transaction() as database:
        closing = pool.submit(names.close)
        database.execute("DELETE FROM published")
        assert not closing.done()
    closing.result()


def test_what_is_published_without_an_owner_or_marks_has_none(names: Names) -> None:
    published = names.publish("poet", "r1", "")
    assert (published.owner, published.source_marks) == ("", "")
    assert names.records() == {}
    assert names.history("poet") == [published] == [names.current()["poet"]]


def test_the_other_names_of_a_split_or_rolled_back_name_stay(names: Names) -> None:
    for name in ("poet", "bard"):
        for revision in ("r1", "r2", "r3"):
            names.publish(name, revision, "")
        names.split(name, "r1", 30)
    names.rollback("poet", "r1")
    assert (revisions(names, "poet"), revisions(names, "bard")) == (["r1"], ["r3", "r2", "r1"])
    assert names.splits() == {"bard": Split("r1", 30)}


def test_a_database_that_stays_locked_is_waited_for_as_long_as_the_error_says(
    names: Names, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    connection, tries = names._database._connection, list[str]()
    (wait,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute("PRAGMA busy_timeout = 1")
    other = sqlite3.connect(tmp_path / "names.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    connection.set_trace_callback(tries.append)
    with pytest.raises(StoreBusyError) as refused:
        names.publish("poet", "r1", "")
    connection.set_trace_callback(None)
    other.close()
    assert f"locked for {len(tries) * wait / 1000:g} s" in str(refused.value)
    assert len(caplog.records) == 1, "only the first wait is logged"


# Fills a small file system, and removes names on it.
FULL = """
import os, sys
from pathlib import Path
from turret_adapters.errors import StoreFullError
from turret_adapters.store.names import Names

folder = Path(sys.argv[1])

def fill(name):
    with open(folder / name, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass

for reserved in (True, False):
    names = Names(folder / "names.sqlite", "base")
    names.publish("other", "r0", "")
    for number in range(20):
        names.publish(f"poet-{number}", "r1", "x" * 1000)
    names.close()
    names = Names(folder / "names.sqlite", "base")
    fill("filler")
    if not reserved:
        (folder / "names.sqlite-reserve").unlink()
        fill("another")
    try:
        names.publish("bard", "r1", "x" * 100_000)
        raise SystemExit("the disk is not full")
    except StoreFullError:
        pass
    try:
        for number in range(20):
            names.remove(f"poet-{number}")
    except StoreFullError:
        print("full", sorted(names.current())[:2])
    else:
        print("removed", sorted(names.current()))
    (folder / "filler").unlink()
    names.remove("nobody")
    print((folder / "names.sqlite-reserve").stat().st_blocks * 512)
    names.close()
"""


def test_names_are_removed_on_a_full_disk_in_the_room_of_the_reserve(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=3m none {tmp_path}"
    unshared = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*unshared, mount], capture_output=True, check=False).returncode:  # noqa: S603
        pytest.skip("this user may not mount a file system")
    command = [*unshared, f'{mount} && "$0" -c "$1" {tmp_path}', sys.executable, FULL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "removed ['other']",
        str(module.RESERVE_BYTES),
        "full ['other', 'poet-0']",
        str(module.RESERVE_BYTES),
    ]
