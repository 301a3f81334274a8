"""Folders are served as they are once they have stayed alike."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from support.adapter_files import write_folder
from turret_adapters.errors import StoreBusyError
from turret_server.lifecycle import folder_watch
from turret_server.lifecycle.folder_watch import SETTLE_SECONDS, FolderWatch


class Recorder:
    """In the place of the lifecycle: what it was told to do, and with what in the folder."""

    def __init__(self) -> None:
        self.done: list[tuple[str, bytes | None]] = []

    def load_folder(self, folder: Path) -> None:
        tensors = folder / "adapter_model.safetensors"
        self.done.append((folder.name, tensors.read_bytes() if tensors.exists() else None))

    def forget_folder(self, folder: Path) -> None:
        self.done.append((folder.name, b"gone"))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "adapters" / "there", b"before")
    return tmp_path / "adapters"


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watch(folder, recorder, clock):
    return FolderWatch(folder, recorder, clock)


@pytest.fixture
def settle(watch, clock):
    def settle() -> None:
        watch.scan()
        clock.now += SETTLE_SECONDS
        watch.scan()

    return settle


def test_what_is_served_already_is_left_alone(settle, recorder):
    settle()
    assert recorder.done == []


def test_a_folder_that_appears_is_loaded_once(settle, recorder, folder):
    write_folder(folder / "new", b"tensors")
    settle()
    settle()
    assert recorder.done == [("new", b"tensors")]


def test_a_folder_that_is_still_written_is_not_loaded(watch, clock, recorder, folder):
    new = write_folder(folder / "new", b"te")
    for number in range(20):
        watch.scan()
        clock.now += SETTLE_SECONDS * 0.9
        (new / "adapter_model.safetensors").write_bytes(b"te" + b"n" * number)
    assert recorder.done == []
    watch.scan()
    clock.now += SETTLE_SECONDS
    watch.scan()
    assert recorder.done == [("new", b"te" + b"n" * 19)]


def test_a_folder_that_has_not_been_alike_for_long_is_not_loaded(watch, clock, recorder, folder):
    write_folder(folder / "new", b"tensors")
    watch.scan()
    clock.now += SETTLE_SECONDS * 0.9
    watch.scan()
    assert recorder.done == []


def test_a_folder_that_changes_is_loaded_again(settle, recorder, folder):
    write_folder(folder / "there", b"behind")
    settle()
    assert recorder.done == [("there", b"behind")]


def test_a_folder_whose_labels_change_is_loaded_again(settle, recorder, folder):
    (folder / "there" / "config.json").write_text("{}")
    settle()
    assert recorder.done == [("there", b"before")]


def test_a_folder_that_is_replaced_as_a_whole_is_loaded_and_never_forgotten(watch, settle, recorder, folder):
    shutil.rmtree(folder / "there")
    watch.scan()
    write_folder(folder / "there", b"after")
    settle()
    assert recorder.done == [("there", b"after")]


def test_a_folder_that_is_gone_is_forgotten_once(settle, recorder, folder):
    shutil.rmtree(folder / "there")
    settle()
    settle()
    assert recorder.done == [("there", b"gone")]


def test_a_folder_that_fails_is_tried_again_when_it_changes_and_not_before(settle, recorder, folder):
    (folder / "new").mkdir()
    settle()
    settle()
    assert recorder.done == [("new", None)]
    write_folder(folder / "new", b"tensors")
    settle()
    assert recorder.done == [("new", None), ("new", b"tensors")]


def test_a_folder_that_appears_and_goes_at_once_is_nothing(watch, settle, recorder, folder):
    write_folder(folder / "new", b"tensors")
    watch.scan()
    shutil.rmtree(folder / "new")
    settle()
    assert recorder.done == []


def test_while_the_folder_of_all_is_away_everything_stays(settle, recorder, folder):
    folder.rename(folder.with_name("away"))
    settle()
    folder.with_name("away").rename(folder)
    settle()
    assert recorder.done == []


def test_a_deleted_folder_that_cannot_be_unloaded_is_tried_again(
    watch, settle, recorder, folder, monkeypatch
):
    forget = recorder.forget_folder

    def busy(_: Path) -> None:
        raise StoreBusyError("the database is locked")

    shutil.rmtree(folder / "there")
    monkeypatch.setattr(recorder, "forget_folder", busy)
    with pytest.raises(StoreBusyError):
        settle()
    monkeypatch.setattr(recorder, "forget_folder", forget)
    watch.scan()
    watch.scan()
    assert recorder.done == [("there", b"gone")]


def test_a_watch_that_fails_starts_again(watch, recorder, monkeypatch, caplog):
    monkeypatch.setattr(folder_watch, "_SCAN_SECONDS", 0.0)
    fails, started = [OSError("no inotify instances are left")], threading.Event()

    def fail_once(*arguments, **options):
        if fails:
            raise fails.pop()
        started.set()
        return original(*arguments, **options)

    original = folder_watch.watch
    monkeypatch.setattr(folder_watch, "watch", fail_once)
    watch.start()
    assert started.wait(60)
    watch.stop()
    assert "no inotify instances are left" in caplog.text
    assert recorder.done == []


def test_a_watch_scans_at_first_after_changes_until_all_is_settled_and_now_and_then(
    watch, clock, folder, monkeypatch
):
    scans, scan = [], watch.scan
    monkeypatch.setattr(watch, "scan", lambda: (scans.append(clock.now), scan()))

    def reports(watched, *, watch_filter, debounce, rust_timeout, yield_on_timeout, **_):
        assert watched == folder
        assert watch_filter is None, "an adapter may be called node_modules"
        assert yield_on_timeout
        assert debounce + rust_timeout <= 1000 * SETTLE_SECONDS
        yield set()  # changes from before the watch began are not reported
        assert len(scans) == 1
        yield set()
        assert len(scans) == 1
        write_folder(folder / "new", b"tensors")
        yield {"new"}
        assert len(scans) == 2
        clock.now += SETTLE_SECONDS
        yield set()
        assert len(scans) == 3
        yield set()
        assert len(scans) == 3
        clock.now += folder_watch._SCAN_SECONDS
        yield set()
        assert len(scans) == 4
        yield set()
        assert len(scans) == 4

    monkeypatch.setattr(folder_watch, "watch", reports)
    watch._watch()
    assert [name for name, _ in watch._lifecycle.done] == ["new"]


def test_a_program_that_ends_does_not_wait_for_changes(watch):
    assert watch._thread.daemon
