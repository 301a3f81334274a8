"""Uploads in pieces, over connections that may break: an upload is resumed where it stopped."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from turret_adapters.errors import (
    AdapterError,
    SourceTooLargeError,
    StoreBusyError,
    UploadError,
    UploadsFullError,
)
from turret_adapters.formats.files import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    MAX_FILE_BYTES,
    MAX_TENSORS_BYTES,
    OPTIONAL_FILES,
    TENSORS_NAME,
    digest_of_folder,
    write_whole,
)
from turret_adapters.store.disk import errors_of_the_store, make_private

KEPT_SECONDS = 24 * 3600
MAX_UPLOADS_BYTES = 32 << 30
MAX_UPLOADS = 256

_DIGEST = re.compile(r"[0-9a-f]{64}")
_OWNER_LENGTH = 16


class Upload:
    """An upload that is being received. Leaving its `with` block keeps the bytes so far, to resume later."""

    def __init__(
        self,
        folder: Path,
        digest: str,
        sizes: Mapping[str, int],
        *,
        adopt: Callable[[Path], str],
        on_close: Callable[[], None],
    ) -> None:
        """`sizes` are those of the files that are sent one after another."""
        self.size = sum(sizes.values())
        self._folder = folder
        self._digest = digest
        self._sizes = sizes
        self._adopt = adopt
        self._on_close = on_close
        self._files: dict[str, int] = {}
        try:
            for name in sizes:
                self._files[name] = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._drop_after_a_gap()
        except BaseException:
            self.close()
            raise
        self.offset = self._num_received

    def _drop_after_a_gap(self) -> None:
        """A server that was killed in `finish` may have left a file whole after one that is not."""
        whole = True
        for name, file in self._files.items():
            if not whole:
                os.ftruncate(file, 0)
            whole = whole and os.fstat(file).st_size == self._sizes[name]

    @property
    def _num_received(self) -> int:
        return sum(os.fstat(file).st_size for file in self._files.values())

    def write(self, offset: int, chunk: bytes) -> None:
        """Appends a chunk of the files, which begins at `offset` of all of them.

        Raises:
            UploadError: the chunk does not continue the bytes so far, or exceeds the size.
            StoreFullError, StoreFailedError
        """
        if offset != self.offset:
            raise UploadError(
                f"offset: expected {self.offset}, found {offset} (continue at the expected offset)"
            )
        if offset + len(chunk) > self.size:
            raise UploadError(
                f"size: expected {self.size} bytes, found {offset + len(chunk)} or more (begin the upload "
                "again with the size of the file)"
            )
        with errors_of_the_store(self._folder.parent.parent):
            try:
                for name, file in self._files.items():
                    room = self._sizes[name] - os.fstat(file).st_size
                    write_whole(file, chunk[:room])
                    chunk = chunk[room:]
            finally:
                self.offset = self._num_received

    def finish(self, prepare: Callable[[Path], None] | None = None) -> str:
        """Checks the bytes, lets `prepare` change the folder, and moves it to its revision, which is held
        once.

        Raises:
            UploadError: bytes are missing, or the digest differs; then they are deleted.
            AdapterError: `prepare` raises it; then they are deleted too, unless waiting helps.
            StoreFullError, StoreFailedError
        """
        if self.offset != self.size:
            raise UploadError(
                f"expected {self.size} bytes, found {self.offset} (continue at offset {self.offset})"
            )
        with errors_of_the_store(self._folder.parent.parent):
            found = digest_of_folder(self._folder)
            if found != self._digest:
                shutil.rmtree(self._folder)
                raise UploadError(f"digest: expected {self._digest}, found {found} (upload it again)")
            try:
                if prepare:
                    prepare(self._folder)
            except AdapterError as error:
                if error.retry_after is None:
                    shutil.rmtree(self._folder)
                raise
            revision = self._adopt(self._folder)
            shutil.rmtree(self._folder, ignore_errors=True)
        return revision

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Uploads:
    """The uploads of a store; each is a folder `<size>-<owner>-<key>`. The caller holds the store's lock."""

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        self._folder = folder
        self._max_bytes = min(MAX_UPLOADS_BYTES, MAX_UPLOADS_BYTES if max_bytes is None else max_bytes)
        self._receiving: set[Path] = set()

    def open(
        self,
        adopt: Callable[[Path], str],
        digest: str,
        config: bytes,
        size: int,
        tokenizer: Mapping[str, int],
        owner: str,
    ) -> Upload:
        """See `AdapterStore.receive`."""
        if not _DIGEST.fullmatch(digest):
            raise UploadError(f"digest: expected 64 hexadecimal digits, found {digest[:80]!r}")
        if (least := min([size, *tokenizer.values()])) < 0:
            raise UploadError(f"size: expected a number of bytes, found {least}")
        for name, num_bytes in tokenizer.items():
            if name not in OPTIONAL_FILES:
                raise UploadError(
                    f"tokenizer: expected files named {', '.join(OPTIONAL_FILES)}, found {name[:80]!r}"
                )
            if num_bytes > MAX_FILE_BYTES[name]:
                raise SourceTooLargeError(
                    f"{name}: expected at most {MAX_FILE_BYTES[name]} bytes, found {num_bytes}"
                )
        sizes = {TENSORS_NAME: size, **tokenizer}
        size = sum(sizes.values())
        max_size = min(MAX_TENSORS_BYTES, self._max_bytes)
        if len(config) > MAX_CONFIG_BYTES or size > max_size:
            raise SourceTooLargeError(
                f"expected at most {MAX_CONFIG_BYTES} bytes of config and {max_size} bytes of tensors, "
                f"found {len(config)} and {size}"
            )
        owner_key = hashlib.sha256(owner.encode()).hexdigest()[:_OWNER_LENGTH]
        what = (owner, digest, config, list(sizes.items())) if tokenizer else (owner, digest, config)
        key = hashlib.sha256(repr(what).encode()).hexdigest()
        folder = self._folder / f"{size}-{owner_key}-{key}"
        if folder in self._receiving:
            raise StoreBusyError("another call is receiving this upload; try again when that call has ended")
        self._make_room(folder, size, owner_key)
        make_private(folder)
        for path in folder.iterdir():  # read-only or prepared if the server was killed in `finish`
            if path.name == CONFIG_NAME or path.name in sizes:
                path.chmod(0o600)
            else:
                path.unlink()
        (folder / CONFIG_NAME).write_bytes(config)
        upload = Upload(folder, digest, sizes, adopt=adopt, on_close=lambda: self._receiving.discard(folder))
        self._receiving.add(folder)
        return upload

    def expire(self) -> None:
        """Deletes the uploads that have not been continued for `KEPT_SECONDS`."""
        for folder in self._oldest_first():
            # After a clock was set back, a time lies in the future.
            if abs(time.time() - _last_written(folder)) > KEPT_SECONDS:
                self._remove_if_idle(folder)

    def _make_room(self, wanted: Path, size: int, owner_key: str) -> None:
        """One owner's uploads take at most half of the room, unless it is a single one."""
        self.expire()
        own = [folder for folder in self._others(wanted) if folder.name.split("-")[1] == owner_key]
        if not self._free(own, size, 2) and own:
            raise UploadsFullError(
                f"expected at most {MAX_UPLOADS // 2} uploads of {self._max_bytes // 2} bytes in total of "
                f"one tenant, found {len(own)} others in progress (try again when they are finished)"
            )
        others = self._others(wanted)
        if not self._free(others, size, 1):
            raise UploadsFullError(
                f"expected at most {MAX_UPLOADS} uploads of {self._max_bytes} bytes in total, "
                f"found {len(others)} others in progress (try again when they are finished)"
            )

    def _free(self, others: list[Path], size: int, share: int) -> bool:
        """Deletes idle uploads, the oldest first, until one more fits into its share of the room."""
        for folder in list(others):
            if self._fits(others, size, share):
                return True
            if self._remove_if_idle(folder):
                others.remove(folder)
        return self._fits(others, size, share)

    def _fits(self, others: list[Path], size: int, share: int) -> bool:
        announced = sum(int(folder.name.partition("-")[0]) for folder in others)
        return len(others) < MAX_UPLOADS // share and announced + size <= self._max_bytes // share

    def _others(self, wanted: Path) -> list[Path]:
        return [folder for folder in self._oldest_first() if folder != wanted]

    def _oldest_first(self) -> list[Path]:
        return sorted(self._folder.iterdir(), key=_last_written)

    def _remove_if_idle(self, folder: Path) -> bool:
        if folder in self._receiving:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return True


def _last_written(folder: Path) -> float:
    try:
        return (folder / TENSORS_NAME).stat().st_mtime
    except FileNotFoundError:
        return 0.0
