"""Folders in the making: each is locked by who fills it, so that what a killed process left can be told.

The lock is `flock` on the folder itself. It ends with the process whatever ends it, goes along when the
folder is renamed, and leaves no file behind.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Waits until no other thread or process is in this block for the same folder."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def try_lock(place: Path) -> int | None:
    """Locks a file or folder until the handle that is returned is closed; None if another has it locked.

    Raises:
        FileNotFoundError: it is gone.
    """
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except BaseException:
        os.close(handle)
        raise
    return handle


def make_locked(parent: Path) -> tuple[Path, int]:
    """A new folder below `parent` and the handle that locks it. The caller keeps `remove_abandoned` away."""
    folder = parent / uuid.uuid4().hex
    folder.mkdir()
    handle = try_lock(folder)
    assert handle is not None, "nobody else knows the folder yet"
    return folder, handle


def remove_abandoned(parent: Path) -> None:
    """Removes each folder below `parent` that nobody has locked. The caller keeps `make_locked` away."""
    for folder in parent.iterdir():
        with suppress(FileNotFoundError):
            handle = try_lock(folder)
            if handle is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)


def write_file(target: Path, chunks: Iterable[bytes]) -> None:
    with target.open("wb", buffering=0) as file:
        for chunk in chunks:
            write_whole(file.fileno(), chunk)


def write_whole(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def seal(folder: Path) -> None:
    """Makes the folder's files read-only, and all of it survive a loss of power."""
    for place in folder.iterdir():
        place.chmod(0o444)
        sync(place)
    sync(folder)


def sync(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
