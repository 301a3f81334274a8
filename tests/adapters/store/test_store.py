"""What is stored is whole, is what its revision says, and stays while somebody needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.adapter_files import add, digest, files, read_folder, revision, write_folder
from support.guarded import guard
from turret_adapters.errors import (
    AdapterFormatError,
    AdapterSourceError,
    RevisionCorruptError,
    RevisionNotFoundError,
    StoreBusyError,
    StoreFailedError,
    StoreFullError,
)
from turret_adapters.formats import peft
from turret_adapters.formats.files import TENSORS_NAME
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec
from turret_adapters.store.store import AdapterStore


def leftovers(store: AdapterStore) -> list[Path]:
    return [*(store.root / "staging").iterdir(), *(store.root / "uploads").iterdir()]


def spoil(store: AdapterStore, name: str) -> None:
    place = store.path(name) / "adapter_model.safetensors"
    place.chmod(0o644)
    place.write_bytes(b"tensorz")


def age(store: AdapterStore, name: str, seconds: int) -> None:
    os.utime(store.root / "adapters" / name, (seconds, seconds))


def nothing() -> set[str]:
    return set()


def test_a_stored_adapter_has_the_revision_that_its_reader_finds(
    sound: dict[str, Any], base: BaseSpec, weights: BaseWeights, store: AdapterStore, tmp_path: Path
) -> None:
    for method, written in sound.items():
        folder = written.write(tmp_path / method)
        found = add(store, folder)
        assert found == peft.read_adapter(folder, base, weights).spec.revision, method
        assert peft.read_adapter(store.path(found), base, weights).spec.revision == found, method


def test_a_pickle_is_refused_with_what_to_do_about_it(store: AdapterStore, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "source", b"x")
    (folder / TENSORS_NAME).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="safe_serialization=True"):
        add(store, folder)
    assert store.revisions() == {}


def test_the_two_files_are_stored_as_they_are(store: AdapterStore, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "source", b"x" * 3_000_000)
    (folder / "README.md").touch()
    seen: list[tuple[int, int | None]] = []
    found = add(store, folder, lambda *told: seen.append(told))
    assert found == revision(b"x" * 3_000_000)
    assert read_folder(store.path(found)) == files(b"x" * 3_000_000)
    assert seen[-1] == (3_000_021, 3_000_021)
    assert leftovers(store) == []


def test_a_source_that_is_rewritten_in_place_leaves_the_copy_alone(
    store: AdapterStore, tmp_path: Path
) -> None:
    found = add(store, write_folder(tmp_path / "source"))
    with (tmp_path / "source" / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"TENSORS")
    assert read_folder(store.path(found)) == files()
    assert add(store, tmp_path / "source") == revision(b"TENSORS")


def test_a_source_that_changes_under_the_copy_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "source", b"x" * 3_000_000)

    def change(_done: int, _total: int | None) -> None:
        with (folder / "adapter_model.safetensors").open("ab") as file:
            file.write(b"y")

    with pytest.raises(AdapterSourceError, match="changed while it was copied"):
        add(store, folder, change)
    assert store.revisions() == {}
    assert leftovers(store) == []


def test_an_aborted_copy_leaves_nothing(store: AdapterStore, tmp_path: Path) -> None:
    def give_up(_done: int, _total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add(store, write_folder(tmp_path / "source"), give_up)
    assert store.revisions() == {}
    assert leftovers(store) == []


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_adapter_is_not_stored(name: str, store: AdapterStore, tmp_path: Path) -> None:
    (write_folder(tmp_path / "source") / name).unlink()
    with pytest.raises(AdapterSourceError, match=name):
        add(store, tmp_path / "source")
    (tmp_path / "source" / name).symlink_to("/etc/hostname")
    with pytest.raises(AdapterSourceError, match="symbolic link"):
        add(store, tmp_path / "source")
    assert leftovers(store) == []


@pytest.mark.parametrize("wrong", ["0" * 32, "../staging", "", ".", "0" * 31, "G" * 32, "0" * 32 + "\n"])
def test_what_is_not_stored_is_not_found(wrong: str, store: AdapterStore) -> None:
    for call in (store.path, store.verify, store.hold, store.remove):
        with pytest.raises(RevisionNotFoundError, match="not in the store"):
            call(wrong)


def test_changed_bytes_are_found_and_repaired_by_adding_them_again(
    store: AdapterStore, tmp_path: Path
) -> None:
    found = add(store, write_folder(tmp_path / "source"))
    store.verify(found)
    spoil(store, found)
    with pytest.raises(RevisionCorruptError, match="repairs"):
        store.verify(found)
    assert add(store, tmp_path / "source") == found
    store.verify(found)
    (store.path(found) / "adapter_config.json").unlink()
    with pytest.raises(RevisionCorruptError):
        store.verify(found)
    assert add(store, tmp_path / "source") == found
    store.verify(found)
    assert leftovers(store) == []


def test_stored_files_are_read_only(store: AdapterStore, tmp_path: Path) -> None:
    folder = store.path(add(store, write_folder(tmp_path / "source")))
    assert {place.stat().st_mode & 0o777 for place in folder.iterdir()} == {0o400}


def test_collection_takes_what_was_used_longest_ago_and_no_more(
    open_store: Callable[..., AdapterStore], tmp_path: Path
) -> None:
    store = open_store(3 * 28)
    found = [add(store, write_folder(tmp_path / "source", b"tensor%d" % index)) for index in range(5)]
    for index, name in enumerate(found):
        age(store, name, index)
        store.release(name)
    store.path(found[0])
    assert store.collect(lambda: {found[1]}) == [found[2], found[3]]
    assert store.revisions().keys() == {found[0], found[1], found[4]}
    assert leftovers(store) == []


def test_collection_leaves_what_is_needed_even_beyond_the_budget(
    open_store: Callable[..., AdapterStore], tmp_path: Path
) -> None:
    store = open_store(28)
    held = add(store, write_folder(tmp_path / "source", b"tensor1"))
    named = add(store, write_folder(tmp_path / "source", b"tensor3"))
    free = add(store, write_folder(tmp_path / "source", b"tensor4"))
    store.release(named)
    store.release(free)
    assert store.collect(lambda: {named}) == [free]
    assert store.revisions().keys() == {held, named}
    assert leftovers(store) == []


def test_a_store_without_budget_keeps_everything(store: AdapterStore, tmp_path: Path) -> None:
    found = add(store, write_folder(tmp_path / "source"))
    store.release(found)
    assert store.collect(nothing) == []
    assert store.path(found).is_dir()


def test_a_revision_stays_until_it_is_released_as_often_as_held(
    open_store: Callable[..., AdapterStore], tmp_path: Path
) -> None:
    store = open_store(28)
    found = add(store, write_folder(tmp_path / "source"))
    add(store, tmp_path / "source")
    store.hold(found)
    other = add(store, write_folder(tmp_path / "source", b"tensor1"))
    store.release(other)
    for _ in range(3):
        with pytest.raises(StoreBusyError, match="unload"):
            store.remove(found)
        store.release(found)
    age(store, found, 0)
    assert store.collect(nothing) == [found]
    with pytest.raises(RevisionNotFoundError):
        store.hold(found)


def test_many_at_once_store_one_revision(open_store: Callable[..., AdapterStore], tmp_path: Path) -> None:
    store = open_store(10 * 28)
    folders = [write_folder(tmp_path / f"source{index}", b"tensor%d" % (index % 4)) for index in range(8)]

    def use(index: int) -> None:
        found = add(store, folders[index % 8])
        assert read_folder(store.path(found)) == files(b"tensor%d" % (index % 4))
        store.release(found)
        store.collect(nothing)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(60)))
    assert store.revisions() == {revision(b"tensor%d" % index): 28 for index in range(4)}
    assert leftovers(store) == []


def test_a_full_disk_is_reported_and_nothing_stays(
    open_store: Callable[..., AdapterStore], tmp_path: Path
) -> None:
    # The kernel refuses to write beyond the limit as it would on a full disk.
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from turret_adapters.store.store import AdapterStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from turret_adapters.errors import StoreFullError\n"
        "from support.adapter_files import add\n"
        "store = AdapterStore(Path(sys.argv[1]))\n"
        "try: add(store, Path(sys.argv[2]))\n"
        "except StoreFullError as error: print(error)\n"
        "with store.receive(sys.argv[3], b'', 200_000) as upload:\n"
        "    try: upload.write(0, bytes(200_000))\n"
        "    except StoreFullError as error: print(error, upload.offset)\n"
    )
    folder = write_folder(tmp_path / "source", bytes(200_000))
    result = subprocess.run(  # noqa: S603 -- our own code
        [sys.executable, "-c", script, tmp_path / "store", folder, digest(bytes(200_000), b"")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("free some space") == 2
    assert result.stdout.endswith(" 100000\n")
    store = open_store()
    assert list((store.root / "staging").iterdir()) == []
    assert store.revisions() == {}


def test_a_folder_that_is_not_writable_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreFailedError, match="write in that folder"):
        AdapterStore(tmp_path / "file" / "store")


def test_an_adapter_larger_than_the_budget_is_not_taken(
    open_store: Callable[..., AdapterStore],
) -> None:
    store = open_store(27)
    with store.staging() as staged, pytest.raises(StoreFullError, match="budget of 27 bytes"):
        store.adopt(write_folder(staged))
    assert store.revisions() == {}


def test_adding_a_revision_again_counts_as_using_it(
    open_store: Callable[..., AdapterStore], tmp_path: Path
) -> None:
    store = open_store(2 * 28)
    found = [add(store, write_folder(tmp_path / f"{index}", b"tensor%d" % index)) for index in range(3)]
    for seconds, name in enumerate(found):
        age(store, name, seconds)
        store.release(name)
    store.release(add(store, tmp_path / "0"))
    assert store.collect(nothing) == [found[1]]


def test_an_adapter_as_large_as_the_budget_is_taken_and_stays(
    open_store: Callable[..., AdapterStore], tmp_path: Path
) -> None:
    store = open_store(28)
    store.release(add(store, write_folder(tmp_path / "source")))
    assert store.collect(nothing) == []


def test_files_survive_a_power_failure_before_their_revision_appears(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synchronised: list[tuple[str, bool]] = []
    target = store.root / "adapters" / revision()

    def fsync(handle: int) -> None:
        synchronised.append((Path(f"/proc/self/fd/{handle}").readlink().name, target.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    add(store, write_folder(tmp_path / "source"))
    *before, (folder, staged), last = synchronised
    assert sorted(before) == [("adapter_config.json", False), ("adapter_model.safetensors", False)]
    assert not staged, f"{folder} is synchronised with its files, before it appears"
    assert last == ("adapters", True)


def test_a_collection_that_fails_half_way_leaves_nothing_in_staging(
    open_store: Callable[..., AdapterStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(28)
    for index in range(4):
        store.release(add(store, write_folder(tmp_path / f"{index}", b"tensor%d" % index)))
    hide, hidden = store._hide, []

    def fail_at_the_second(name: str) -> Path:
        if hidden:
            raise OSError(5, "Input/output error")
        hidden.append(name)
        return hide(name)

    monkeypatch.setattr(store, "_hide", fail_at_the_second)
    with pytest.raises(StoreFailedError):
        store.collect(nothing)
    assert leftovers(store) == []
    monkeypatch.undo()
    assert len(store.collect(nothing)) == 2


def use_staging(store: AdapterStore, _found: str, _staged: Path) -> None:
    with store.staging():
        pass


def lose(folder: Path) -> None:
    """A file takes its place: what is in it is neither read, written nor listed, not even by root."""
    folder.rename(folder.with_name(f"{folder.name}-gone"))
    folder.touch()


@pytest.mark.parametrize(
    ("lost", "use"),
    [
        ("staging", use_staging),
        ("adapters", lambda store, _, staged: store.adopt(staged)),
        ("uploads", lambda store, *_: store.receive(digest(), b"{}", 7)),
        ("adapters", lambda store, found, _: store.path(found)),
        ("adapters", lambda store, *_: store.revisions()),
        ("adapters", lambda store, found, _: store.verify(found)),
        ("adapters/{found}/adapter_config.json", lambda store, found, _: store.verify(found)),
        ("adapters", lambda store, found, _: store.hold(found)),
        ("adapters", lambda store, found, _: store.remove(found)),
        ("staging", lambda store, found, _: store.remove(found)),
        ("adapters", lambda store, *_: store.collect(nothing)),
        ("uploads", lambda store, *_: store.collect(nothing)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_disk_that_fails_is_told_with_the_stores_folder_and_holds_nothing(
    lost: str, use: Callable[..., object], store: AdapterStore, tmp_path: Path
) -> None:
    found = add(store, write_folder(tmp_path / "source"))
    store.release(found)
    if lost.endswith(".json"):
        place = store.root / lost.format(found=found)
        place.unlink()
        place.mkdir()
    else:
        lose(store.root / lost)
    with pytest.raises(StoreFailedError, match=f"^store {str(store.root)!r}: "):
        use(store, found, write_folder(tmp_path / "other", b"other"))
    assert not store._held
    assert store._lock._lock.acquire(blocking=False)


def test_nothing_comes_between_finding_a_revision_and_holding_or_deleting_it(
    open_store: Callable[..., AdapterStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(28)
    guard(store, store._lock._lock.locked, "_held")
    for name in ("_sizes", "_hide", "path"):
        monkeypatch.setattr(store, name, locked(store, getattr(store, name)))
    monkeypatch.setattr(store._uploads, "open", locked(store, store._uploads.open))
    monkeypatch.setattr(store._uploads, "expire", locked(store, store._uploads.expire))
    found = add(store, write_folder(tmp_path / "source"))
    (store.peek(found) / TENSORS_NAME).unlink()
    assert add(store, tmp_path / "source") == found, "a spoilt one is replaced"
    store.release(found)
    store.hold(found)
    assert store.revisions() == {found: 28}
    store.receive(digest(b"other"), b"{}", 5).close()
    store.release(found)
    store.release(found)
    store.remove(found)
    for index in range(2):
        store.release(add(store, write_folder(tmp_path / "source", b"tensor%d" % index)))
    assert store.collect(locked(store, nothing)) == [revision(b"tensor0")]


def locked(store: AdapterStore, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        assert store._lock._lock.locked()
        return function(*arguments)

    return call
