"""The store's lock and permissions on disk, and its errors."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from turret_adapters.errors import StoreBusyError, StoreFailedError, StoreFullError
from turret_adapters.formats.files import sync

LOG_AFTER_SECONDS = 3.0

log = logging.getLogger(__name__)

_LOCK_NAME = "lock"
_NAMES = ("names.sqlite", "names.sqlite-wal", "names.sqlite-shm", "names.sqlite-reserve")
_ENTRIES = {_LOCK_NAME, *_NAMES, "adapters", "staging", "uploads", "leases"}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def errors_of_the_store(root: Path) -> Iterator[None]:
    """Turns the system's errors about the store's files into StoreFullError or StoreFailedError."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StoreFullError(
                f"store {str(root)!r}: {str(error.strerror).lower()} "
                "(free some space, lower the store's budget, or unload adapters)"
            ) from error
        raise StoreFailedError(
            f"store {str(root)!r}: {str(error.strerror or error).lower()} "
            "(the server must be able to write in that folder)"
        ) from error


def make_root(root: Path) -> None:
    """Makes the root of a store. It becomes private unless it is somebody's folder with other contents, such
    as /tmp; the folders and files of the store in it are private in any case.
    """
    if not root.exists() or {place.name for place in root.iterdir()} <= _ENTRIES:
        make_private(root)


def make_private(folder: Path) -> Path:
    """Makes a folder, and takes it from all users but this process's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The root may be a mounted volume of another owner; then its folders, which are ours, protect the files.
    with suppress(PermissionError):
        folder.chmod(0o700)
    return folder


def lock_store(root: Path) -> int:
    """Locks a store for this process, until the handle that is returned is closed or the process ends.

    Raises:
        StoreBusyError: another server uses the store.
        OSError: the lock file is not writable.
    """
    handle = os.open(root / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _refuse_other_server(root, handle)
        os.ftruncate(handle, 0)
        os.write(handle, b"%d" % os.getpid())
    except BaseException:
        os.close(handle)
        raise
    return handle


def _refuse_other_server(root: Path, handle: int) -> None:
    if not _try_flock(handle):
        process = os.read(handle, 20).decode(errors="replace")
        raise _busy(root, f" (process {process})" if process.isdecimal() else "")
    # Older versions shared a store: each server kept a folder in `leases` locked while it ran.
    leases = root / "leases"
    for lease in leases.iterdir() if leases.is_dir() else ():
        lock = os.open(lease, os.O_RDONLY)
        runs = not _try_flock(lock)
        os.close(lock)
        if runs:
            raise _busy(root, " of an older version")


def _try_flock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _busy(root: Path, which: str) -> StoreBusyError:
    return StoreBusyError(
        f"store {str(root)!r}: another server{which} uses it; stop that server, or choose another folder "
        "with --store"
    )


class LoggedLock:
    """A lock whose waiters log what they wait for once it takes longer than `LOG_AFTER_SECONDS`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=LOG_AFTER_SECONDS):
            log.warning(
                "waiting for %s, which another thread has kept locked for %g s", self._path, LOG_AFTER_SECONDS
            )
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def seal(folder: Path) -> None:
    """Makes the folder's files read-only and private, and makes them survive a power failure."""
    for path in folder.iterdir():
        path.chmod(0o400)
        sync(path)
    sync(folder)
