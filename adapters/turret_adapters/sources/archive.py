"""Reads an adapter's files from an archive of unknown origin.

The files are found by their names and written under them, never under a path from the archive. An archive
with a path out of itself, a link or a device is refused as a whole. Limits on what is read, in total and at
once, hold whatever the archive announces, so neither disk nor memory fills.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from turret_adapters.errors import AdapterError, AdapterSourceError, SourceTooLargeError
from turret_adapters.formats.files import (
    CHUNK_BYTES,
    CONFIG_NAME,
    OPTIONAL_FILES,
    TENSORS_NAME,
    write_whole,
)
from turret_adapters.sources.intake import Intake

MAX_MEMBERS = 1000
SUFFIXES = (".zip", ".tar.gz", ".tgz")

_BEGINNINGS = {b"PK": "archive.zip", b"\x1f\x8b": "archive.tar.gz"}

# The libraries read directories and long names at once; a valid archive of two files has less of them.
_MAX_READ = 4 << 20
_BROKEN = (
    EOFError, NotImplementedError, ValueError, gzip.BadGzipFile, struct.error, tarfile.TarError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Member:
    """A file or folder in an archive. `is_plain` is false for links, devices and unreadable files."""

    path: str
    is_plain: bool
    is_folder: bool
    size: int
    open: Callable[[], IO[bytes] | None]


def unpack(archive: IO[bytes], name: str, intake: Intake, max_bytes: int) -> None:
    """Reads an adapter's files from an archive.

    Args:
        archive: a seekable file.
        name: the archive's name, which ends with one of `SUFFIXES`.
        intake: writes the files.
        max_bytes: the limit of decompressed bytes.

    Raises:
        AdapterSourceError: it is broken or hostile, or does not contain exactly one adapter.
        SourceTooLargeError: it exceeds a limit.
        OSError: a file is not writable.
    """
    members = _zip_members if name.endswith(".zip") else _tar_members
    with _translated(name), members(archive, intake.folder, max_bytes) as found:
        chosen = _choose(name, found)

        def take(wanted: str) -> None:
            intake.take(wanted, _chunks(name, chosen[wanted]), chosen[wanted].size)

        for wanted in (CONFIG_NAME, TENSORS_NAME):
            take(wanted)
        for wanted in intake.optional_files:
            if wanted in chosen:
                take(wanted)


def archive_name(archive: IO[bytes]) -> str:
    """A name for `unpack` of an archive that has none, by what it begins with.

    Raises:
        AdapterSourceError: it is no archive.
    """
    archive.seek(0)
    beginning = archive.read(2)
    archive.seek(0)
    if beginning not in _BEGINNINGS:
        raise AdapterSourceError(f"expected a .zip or .tar.gz, found bytes that begin with {beginning!r}")
    return _BEGINNINGS[beginning]


def _choose(name: str, members: Iterable[Member]) -> dict[str, Member]:
    chosen: dict[str, Member] = {}
    optional: dict[tuple[PurePosixPath, str], Member] = {}
    for number, member in enumerate(members, 1):
        if number > MAX_MEMBERS:
            raise SourceTooLargeError(f"{name}: expected at most {MAX_MEMBERS} members, found more")
        path = PurePosixPath(member.path)
        if path.is_absolute() or ".." in path.parts or "\\" in member.path or "\0" in member.path:
            raise AdapterSourceError(
                f"{name}: expected paths inside the archive, found {member.path[:200]!r}"
            )
        if not member.is_plain:
            raise AdapterSourceError(
                f"{name}: expected files and folders, found a link, device or encrypted file "
                f"{member.path[:200]!r}"
            )
        if path.name in OPTIONAL_FILES and not member.is_folder:
            optional[path.parent, path.name] = member
        if path.name in (CONFIG_NAME, TENSORS_NAME) and not member.is_folder:
            if path.name in chosen:
                raise AdapterSourceError(f"{name}: expected one {path.name}, found several")
            chosen[path.name] = member
    folders = {PurePosixPath(member.path).parent for member in chosen.values()}
    if chosen.keys() != {CONFIG_NAME, TENSORS_NAME} or len(folders) != 1:
        found = ", ".join(repr(member.path[:200]) for member in chosen.values()) or "neither"
        raise AdapterSourceError(
            f"{name}: expected {CONFIG_NAME} and {TENSORS_NAME} in one folder, found {found}"
        )
    [folder] = folders
    return chosen | {file: member for (parent, file), member in optional.items() if parent == folder}


@contextmanager
def _zip_members(archive: IO[bytes], _folder: Path, _max_bytes: int) -> Iterator[Sequence[Member]]:
    with zipfile.ZipFile(_Bounded(archive)) as opened:
        yield [
            Member(
                path=info.filename,
                is_plain=_is_plain(info),
                is_folder=info.filename.endswith("/"),
                size=info.file_size,
                open=partial(opened.open, info),
            )
            for info in opened.infolist()
        ]


def _is_plain(info: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(info.external_attr >> 16)
    # The other methods can turn a megabyte into many gigabytes before the size is checked.
    method = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    return kind in (0, stat.S_IFREG, stat.S_IFDIR) and method and not info.flag_bits & 1


@contextmanager
def _tar_members(archive: IO[bytes], folder: Path, max_bytes: int) -> Iterator[Iterable[Member]]:
    # Decompressed first: seeking in a compressed stream reads it again each time.
    with (
        tempfile.TemporaryFile(buffering=0, dir=folder) as plain,
        gzip.GzipFile(fileobj=archive) as compressed,
    ):
        done = 0
        while chunk := compressed.read(CHUNK_BYTES):
            done += len(chunk)
            if done > max_bytes:
                raise SourceTooLargeError(f"expected at most {max_bytes} bytes in the archive, found more")
            write_whole(plain.fileno(), chunk)
        plain.seek(0)
        with tarfile.open(fileobj=_Bounded(plain), mode="r:") as opened:
            yield (
                Member(
                    path=info.name,
                    is_plain=info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE),
                    is_folder=info.isdir(),
                    size=info.size,
                    open=partial(opened.extractfile, info),
                )
                for info in opened
            )


def _chunks(name: str, member: Member) -> Iterator[bytes]:
    with _translated(name):
        file = member.open()
        assert file is not None, "it is a regular file"
        with file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


@contextmanager
def _translated(name: str) -> Iterator[None]:
    try:
        yield
    except AdapterError:
        raise
    except _BROKEN as error:
        raise AdapterSourceError(
            f"{name}: expected a valid archive, found: {error} (make it again with zip or tar -czf)"
        ) from error


class _Bounded(io.RawIOBase):
    """A file that refuses to read much at once, for zipfile and tarfile."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            here = self._file.tell()
            size = self._file.seek(0, os.SEEK_END) - here
            self._file.seek(here)
            if size > _MAX_READ:
                raise AdapterSourceError(
                    f"expected headers of at most {_MAX_READ} bytes in the archive, found longer ones"
                )
        return self._file.read(size)
