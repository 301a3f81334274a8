"""A store belongs to one server and to its user; long waits are logged; the disk's errors are typed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from support.adapter_files import add, write_folder
from turret_adapters.errors import StoreBusyError, StoreFailedError, StoreFullError
from turret_adapters.store import disk, names_database
from turret_adapters.store.disk import LoggedLock, errors_of_the_store, make_private
from turret_adapters.store.names import Names
from turret_adapters.store.store import AdapterStore

OPEN_AND_WAIT = (
    "import sys; from pathlib import Path; from turret_adapters.store.store import AdapterStore\n"
    "store = AdapterStore(Path(sys.argv[1]))\n"
    "print('open', flush=True); sys.stdin.read()"
)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def modes(root: Path) -> dict[str, int]:
    return {path.name: mode(path) for path in (root, *root.iterdir())}


def test_a_second_server_is_refused_until_the_first_has_ended_however_it_ends(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with subprocess.Popen(  # noqa: S603 -- our own code
        [sys.executable, "-c", OPEN_AND_WAIT, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(StoreBusyError) as refusal:
            AdapterStore(root)
        assert str(refusal.value) == (
            f"store {str(root)!r}: another server (process {process.pid}) uses it; stop that server, "
            "or choose another folder with --store"
        )
        process.kill()
    AdapterStore(root).close()


def test_a_store_that_was_closed_is_opened_again(tmp_path: Path) -> None:
    for _ in range(2):
        store = AdapterStore(tmp_path)
        with pytest.raises(StoreBusyError, match=rf"process {os.getpid()}\)"):
            AdapterStore(tmp_path)
        store.close()


def test_the_lock_file_has_this_process_in_the_place_of_any_before(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"9" * 20)
    store = AdapterStore(tmp_path)
    assert (tmp_path / "lock").read_text() == str(os.getpid())
    store.close()


def test_what_is_in_the_lock_file_is_shown_only_if_it_is_a_process(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    (tmp_path / "lock").write_bytes(b"\xff\n; stop \x1b[2J")
    with pytest.raises(StoreBusyError, match="another server uses it"):
        AdapterStore(tmp_path)
    store.close()


def test_a_refused_start_leaves_no_file_open_and_no_lock(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    before = open_files()
    for _ in range(3):
        with pytest.raises(StoreBusyError):
            AdapterStore(tmp_path)
    assert open_files() == before
    store.close()
    (tmp_path / "staging").rmdir()
    (tmp_path / "staging").touch()
    with pytest.raises(StoreFailedError, match="file exists"):
        AdapterStore(tmp_path)
    (tmp_path / "staging").unlink()
    AdapterStore(tmp_path).close()
    assert open_files() == before - 1


def test_a_running_server_of_a_version_that_shared_its_store_is_respected(tmp_path: Path) -> None:
    lease = tmp_path / "leases" / "0123"
    lease.mkdir(parents=True)
    handle = os.open(lease, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(StoreBusyError, match="another server of an older version uses it; stop"):
        AdapterStore(tmp_path)
    assert lease.is_dir()
    os.close(handle)
    AdapterStore(tmp_path).close()
    assert not (tmp_path / "leases").exists()


def test_a_new_store_is_private(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        store = AdapterStore(tmp_path / "store")
        names = Names(store.root / "names.sqlite", "llama")
        names.publish("poet", "r1", "")
        assert modes(store.root) == {
            "store": 0o700,
            "lock": 0o600,
            "adapters": 0o700,
            "staging": 0o700,
            "uploads": 0o700,
            "names.sqlite": 0o600,
            "names.sqlite-wal": 0o600,
            "names.sqlite-shm": 0o600,
            "names.sqlite-reserve": 0o600,
        }
        stored = store.path(add(store, write_folder(tmp_path / "poet")))
        assert modes(stored) == {
            stored.name: 0o700,
            "adapter_config.json": 0o400,
            "adapter_model.safetensors": 0o400,
        }
        names.close()
        store.close()
    finally:
        os.umask(umask)


def test_a_store_that_others_could_read_is_taken_from_them(tmp_path: Path) -> None:
    for folder in ("adapters", "staging", "uploads"):
        (tmp_path / folder).mkdir()
    for file in ("names.sqlite", "names.sqlite-wal"):
        (tmp_path / file).touch()
    for path in (tmp_path, *tmp_path.iterdir()):
        path.chmod(0o777 if path.is_dir() else 0o666)
    store = AdapterStore(tmp_path)
    names = Names(tmp_path / "names.sqlite", "llama")
    assert mode(tmp_path) == 0o700
    for path in tmp_path.iterdir():
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path
    names.close()
    store.close()


def test_a_volume_of_another_owner_serves_as_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = Path.chmod

    def chmod(path: Path, *arguments: int) -> None:
        if path == tmp_path:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        change(path, *arguments)

    change(tmp_path, 0o777)
    monkeypatch.setattr(Path, "chmod", chmod)
    AdapterStore(tmp_path).close()
    assert mode(tmp_path) == 0o777
    assert mode(tmp_path / "adapters") == 0o700


def test_waiting_long_for_a_lock_is_logged_with_its_path_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk, "LOG_AFTER_SECONDS", 0.01)
    lock, logged = LoggedLock(tmp_path), threading.Event()

    class Seen(logging.Handler):
        def emit(self, _record: logging.LogRecord) -> None:
            logged.set()

    handler = Seen()
    disk.log.addHandler(handler)
    entered = threading.Event()

    def enter() -> None:
        with lock:
            entered.set()

    with lock:
        thread = threading.Thread(target=enter)
        thread.start()
        assert logged.wait(60)
        assert not entered.is_set()
    thread.join()
    assert entered.is_set()
    disk.log.removeHandler(handler)
    [record] = caplog.records
    assert str(tmp_path) in record.message
    with lock:
        pass
    assert len(caplog.records) == 1, "a free lock is not logged"


def test_waiting_long_for_sqlites_lock_is_logged_with_its_path_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = Names(tmp_path / "names.sqlite", "llama")
    other = sqlite3.connect(tmp_path / "names.sqlite", isolation_level=None, check_same_thread=False)
    names._database._connection.execute("PRAGMA busy_timeout = 1")

    def give_up_the_lock(message: str, *arguments: object) -> None:
        logging.getLogger("test").warning(message, *arguments)
        other.execute("ROLLBACK")

    monkeypatch.setattr(names_database.log, "warning", give_up_the_lock)
    other.execute("BEGIN IMMEDIATE")
    names.publish("poet", "r1", "")
    assert names.current()["poet"].revision == "r1"
    [record] = caplog.records
    assert str(tmp_path / "names.sqlite") in record.message
    names.close()
    other.close()


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (errno.ENOSPC, StoreFullError, "free some space"),
        (errno.EDQUOT, StoreFullError, "free some space"),
        (errno.EACCES, StoreFailedError, "must be able to write"),
    ],
)
def test_errors_of_the_system_say_what_to_do(
    number: int, error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said) as refusal, errors_of_the_store(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in str(refusal.value)


def test_a_private_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    assert mode(make_private(tmp_path / "a" / "b")) == 0o700


def test_holding_and_releasing_touch_no_file(open_store: Callable[..., AdapterStore], tmp_path: Path) -> None:
    store = open_store()
    found = add(store, write_folder(tmp_path / "source"))
    store.hold(found)
    (store.root / "adapters").rename(tmp_path / "gone")
    store.release(found)
    store.release(found)
    (tmp_path / "gone").rename(store.root / "adapters")
    store.remove(found)
    assert store.revisions() == {}


def test_a_folder_with_other_contents_stays_as_it_is_and_the_store_in_it_is_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "somebodys").mkdir()
    AdapterStore(tmp_path).close()
    found = modes(tmp_path)
    assert found.pop(tmp_path.name) == 0o755
    assert {name: found[name] for name in ("adapters", "staging", "uploads")} == {
        "adapters": 0o700,
        "staging": 0o700,
        "uploads": 0o700,
    }
    assert found["lock"] == 0o600


def test_what_is_made_is_private_from_its_first_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only once its permissions are set: another user may open it before."""
    change, before = Path.chmod, dict[str, int]()

    def chmod(path: Path, new: int) -> None:
        before.setdefault(path.name, mode(path))
        change(path, new)

    monkeypatch.setattr(Path, "chmod", chmod)
    umask = os.umask(0)
    try:
        store = AdapterStore(tmp_path / "store")
        Names(store.root / "names.sqlite", "llama").close()
        store.close()
    finally:
        os.umask(umask)
    folders = dict.fromkeys(("store", "adapters", "staging", "uploads"), 0o700)
    assert before == {**folders, "names.sqlite": 0o600}
