"""Adapters that come in pieces, over a connection that may break: each goes on where it stopped."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from turret_adapters.formats.digest import MAX_CONFIG_BYTES, MAX_TENSORS_BYTES, digest_of_folder
from turret_adapters.sources.folder import CONFIG_NAME, TENSORS_NAME
from turret_adapters.store.staging import try_lock, write_whole
from turret_adapters.store.store_errors import (
    SourceTooLargeError,
    StoreBusyError,
    StoreFullError,
    UploadError,
    errors_of_the_store,
)

KEPT_SECONDS = 24 * 3600
MAX_UPLOADS_BYTES = 32 << 30
MAX_UPLOADS = 256

_DIGEST = re.compile(r"[0-9a-f]{64}")
_OWNER_LENGTH = 16


class Upload:
    """One upload that is being received. Leaving its `with` block keeps what has come, for a later try."""

    def __init__(
        self, folder: Path, handle: int, digest: str, size: int, adopt: Callable[[Path], str]
    ) -> None:
        self.size = size
        self._folder = folder
        self._lock = handle
        self._digest = digest
        self._adopt = adopt
        self._file = os.open(folder / TENSORS_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.offset = os.fstat(self._file).st_size

    def write(self, offset: int, chunk: bytes) -> None:
        """Appends the bytes of the tensors' file that stand at `offset`.

        Raises:
            UploadError: they do not follow what has come, or go beyond the size.
            StoreFullError, StoreFailedError
        """
        if offset != self.offset:
            raise UploadError(
                f"offset: expected {self.offset}, where the upload goes on, found {offset} (go on from there)"
            )
        if offset + len(chunk) > self.size:
            raise UploadError(f"expected {self.size} bytes, found {offset + len(chunk)} or more")
        with errors_of_the_store(self._folder.parent.parent):
            try:
                write_whole(self._file, chunk)
            finally:
                self.offset = os.fstat(self._file).st_size

    def finish(self) -> str:
        """Checks the bytes, and moves them to their revision, which is held once.

        Raises:
            UploadError: they are not all there, or have another digest; then they are thrown away.
            StoreFullError, StoreFailedError
        """
        if self.offset != self.size:
            raise UploadError(f"expected {self.size} bytes, found {self.offset} (go on from there)")
        with errors_of_the_store(self._folder.parent.parent):
            found = digest_of_folder(self._folder)
            if found != self._digest:
                shutil.rmtree(self._folder)
                raise UploadError(f"digest: expected {self._digest}, found {found} (upload it again)")
            revision = self._adopt(self._folder)
            shutil.rmtree(self._folder, ignore_errors=True)
        return revision

    def close(self) -> None:
        os.close(self._file)
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Uploads:
    """Those of a store, each a folder `<size>-<owner>-<key>`. Called under the store's lock."""

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        self._folder = folder
        self._max_bytes = min(MAX_UPLOADS_BYTES, MAX_UPLOADS_BYTES if max_bytes is None else max_bytes)

    def open(self, adopt: Callable[[Path], str], digest: str, config: bytes, size: int, owner: str) -> Upload:
        if not _DIGEST.fullmatch(digest):
            raise UploadError(f"digest: expected 64 hexadecimal digits, found {digest[:80]!r}")
        if size < 0:
            raise UploadError(f"size: expected a number of bytes, found {size}")
        if len(config) > MAX_CONFIG_BYTES or size > min(MAX_TENSORS_BYTES, self._max_bytes):
            raise SourceTooLargeError(
                f"expected at most {MAX_CONFIG_BYTES} bytes of config and "
                f"{min(MAX_TENSORS_BYTES, self._max_bytes)} bytes of tensors, found {len(config)} and {size}"
            )
        whose = hashlib.sha256(owner.encode()).hexdigest()[:_OWNER_LENGTH]
        key = hashlib.sha256(repr((owner, digest, config)).encode()).hexdigest()
        folder = self._folder / f"{size}-{whose}-{key}"
        self._make_room(folder, size, whose)
        folder.mkdir(exist_ok=True)
        handle = try_lock(folder)
        if handle is None:
            raise StoreBusyError("this upload is being received by another call; try again when that ends")
        try:
            for place in folder.iterdir():
                place.chmod(0o644)  # sealed, if `finish` was killed
            (folder / CONFIG_NAME).write_bytes(config)
            return Upload(folder, handle, digest, size, adopt)
        except BaseException:
            os.close(handle)
            raise

    def expire(self) -> None:
        """Removes what nobody went on with for `KEPT_SECONDS`."""
        for folder in self._oldest_first():
            # A clock that was set back makes times of the future.
            if abs(time.time() - _last_written(folder)) > KEPT_SECONDS:
                _remove_if_idle(folder)

    def _make_room(self, wanted: Path, size: int, whose: str) -> None:
        """Nobody takes more than half of the room with several uploads: others come in beside it."""
        self.expire()
        own = [folder for folder in self._others(wanted) if folder.name.split("-")[1] == whose]
        if not self._free(own, size, 2) and own:
            raise StoreFullError(
                f"expected at most {MAX_UPLOADS // 2} uploads of {self._max_bytes // 2} bytes of one tenant "
                f"at a time, found {len(own)} others (try again when they are done)"
            )
        others = self._others(wanted)
        if not self._free(others, size, 1):
            raise StoreFullError(
                f"expected at most {MAX_UPLOADS} uploads of {self._max_bytes} bytes at a time, "
                f"found {len(others)} others (try again when they are done)"
            )

    def _free(self, others: list[Path], size: int, share: int) -> bool:
        """Removes idle ones, the oldest first, until one more fits into its share of the room."""
        for folder in list(others):
            if self._fits(others, size, share):
                return True
            if _remove_if_idle(folder):
                others.remove(folder)
        return self._fits(others, size, share)

    def _fits(self, others: list[Path], size: int, share: int) -> bool:
        announced = sum(int(folder.name.partition("-")[0]) for folder in others)
        return len(others) < MAX_UPLOADS // share and announced + size <= self._max_bytes // share

    def _others(self, wanted: Path) -> list[Path]:
        return [folder for folder in self._oldest_first() if folder != wanted]

    def _oldest_first(self) -> list[Path]:
        return sorted(self._folder.iterdir(), key=_last_written)


def _last_written(folder: Path) -> float:
    try:
        return (folder / TENSORS_NAME).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_if_idle(folder: Path) -> bool:
    try:
        handle = try_lock(folder)
    except FileNotFoundError:
        return True
    if handle is None:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)
    return True
