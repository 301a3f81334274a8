"""Copies an adapter's files into a folder, within limits, and reports the progress."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from io import BufferedReader
from pathlib import Path

from turret_adapters.errors import AdapterSourceError, SourceTooLargeError
from turret_adapters.formats.files import (
    CHUNK_BYTES,
    CONFIG_NAME,
    MAX_FILE_BYTES,
    OPTIONAL_FILES,
    TENSORS_NAME,
    TOKENIZER_FILES,
    Progress,
    describe,
    open_inside,
    write_whole,
)
from turret_adapters.formats.labels import has_labels

_FICLONE = 0x40049409  # linux/fs.h


def take_files(intake: Intake, take: Callable[[str], None]) -> None:
    """Calls `take`, which writes with the intake, for each file of an adapter.

    Raises:
        AdapterSourceError: `take` raises it for a file that must be there.
    """
    for name in (CONFIG_NAME, TENSORS_NAME):
        take(name)
    for name in intake.optional_files:
        with suppress(AdapterSourceError):
            take(name)


class Intake:
    """Writes at most `max_bytes` in total into `folder`. `progress` is called on the thread that writes."""

    def __init__(self, folder: Path, max_bytes: int, progress: Progress) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._progress = progress
        self._done = 0

    @property
    def optional_files(self) -> tuple[str, ...]:
        """The files that the adapter may lack, once its config is written."""
        config = (self.folder / CONFIG_NAME).read_bytes()
        return OPTIONAL_FILES if has_labels(config) else TOKENIZER_FILES

    def take(self, name: str, chunks: Iterable[bytes], size: int | None) -> None:
        """Writes a file from chunks of bytes. `size` is the size that the source announces, if it does.

        Raises:
            SourceTooLargeError: it has more bytes than the limit.
            OSError: the file is not writable.
        """
        if size is not None:
            self._check(name, size)
        try:
            with (self.folder / name).open("wb", buffering=0) as file:
                for chunk in self._counted(name, chunks, size):
                    write_whole(file.fileno(), chunk)
        except BaseException:
            (self.folder / name).unlink(missing_ok=True)
            raise

    def copy(self, folder: Path, name: str) -> None:
        """Copies a file from a folder on this machine, sharing its blocks where the file system can.

        Raises:
            AdapterSourceError: it is unreadable, not a regular file in `folder`, or changed during the copy.
            SourceTooLargeError: it has more bytes than the limit.
            OSError: the copy is not writable.
        """
        with ExitStack() as stack:
            try:
                file, size = stack.enter_context(open_inside(folder, name, MAX_FILE_BYTES[name]))
            except OSError as error:
                raise _unreadable(name, error) from error
            before = os.fstat(file.fileno())
            self._check(name, size)
            if self._clone(file, self.folder / name):
                self._done += size
                self._progress(self._done, self._done)
            else:
                self.take(name, _read(name, file, size), size)
            after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise AdapterSourceError(
                f"{name}: expected a file that does not change, found that it changed while it was copied "
                "(load it again once it is complete)"
            )

    def _clone(self, file: BufferedReader, target: Path) -> bool:
        # Never a hard link: a program that rewrites the source in place would rewrite the copy.
        with target.open("wb") as copy:
            try:
                fcntl.ioctl(copy.fileno(), _FICLONE, file.fileno())
            except OSError:
                return False
        return True

    def _counted(self, name: str, chunks: Iterable[bytes], size: int | None) -> Iterator[bytes]:
        before = self._done
        total = None if size is None else before + size
        for chunk in chunks:
            self._check(name, self._done - before + len(chunk), before)
            yield chunk
            self._done += len(chunk)
            self._progress(self._done, total)

    def _check(self, name: str, size: int, before: int | None = None) -> None:
        most = min(MAX_FILE_BYTES[name], self._max_bytes - (self._done if before is None else before))
        if size > most:
            raise SourceTooLargeError(f"{name}: expected at most {max(most, 0)} bytes, found {size} or more")


def _read(name: str, file: BufferedReader, size: int) -> Iterator[bytes]:
    # Only the size at the beginning: another program may append faster than this reads.
    while size:
        try:
            chunk = file.read(min(CHUNK_BYTES, size))
        except OSError as error:
            raise _unreadable(name, error) from error
        if not chunk:
            return
        size -= len(chunk)
        yield chunk


def _unreadable(name: str, error: OSError) -> AdapterSourceError:
    return AdapterSourceError(f"{name}: expected a readable file, found {describe(error)}")
