"""The files of adapters on this machine's disk, addressed by their content.

    <root>/lock                   locked by the server that uses the store; contains its process id
    <root>/adapters/<revision>/   an adapter's two files as peft wrote them, and what its tokenizer changes,
                                  complete and read-only
    <root>/staging/<random>/      adapters that are being written or deleted
    <root>/uploads/<key>/         partial uploads, which can be resumed
    <root>/names.sqlite           see `names`

A revision appears and disappears by one `rename`, so at every instant it is complete or absent. A store
belongs to one process at a time and to its user alone.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from turret_adapters.errors import (
    RevisionCorruptError,
    RevisionNotFoundError,
    StoreBusyError,
    StoreFullError,
)
from turret_adapters.formats.files import REVISION_LENGTH, digest_of_folder, sync
from turret_adapters.store.disk import (
    LoggedLock,
    errors_of_the_store,
    lock_store,
    make_private,
    make_root,
    seal,
)
from turret_adapters.store.uploads import Upload, Uploads

_REVISION = re.compile(rf"[0-9a-f]{{{REVISION_LENGTH}}}")


class AdapterStore:
    """A store, opened by the one process that may use it. Thread-safe.

    A revision stays while it is held, or while the `needed` of `collect` contains it. `adopt` and
    `Upload.finish` hold the revision once for the caller, who releases it when a name has it or when it is
    not needed.
    """

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        """Opens the store, creates it if necessary, and removes what a killed server left unfinished.

        Args:
            root: its folder, on a file system with `flock`.
            max_bytes: the budget that `collect` keeps; None for no limit.

        Raises:
            StoreBusyError: another server uses it.
            StoreFullError, StoreFailedError: the folder is not writable.
        """
        self.root = root
        self.max_bytes = max_bytes
        self._lock = LoggedLock(root)
        self._held: Counter[str] = Counter()
        with errors_of_the_store(root):
            make_root(root)
            self._process_lock = lock_store(root)
            try:
                self._adapters = make_private(root / "adapters")
                self._staging = make_private(root / "staging")
                self._uploads = Uploads(make_private(root / "uploads"), max_bytes)
                self._uploads.expire()
                for left in self._staging.iterdir():
                    shutil.rmtree(left, ignore_errors=True)
                # Versions that shared a store listed here what each process held.
                shutil.rmtree(root / "leases", ignore_errors=True)
            except BaseException:
                os.close(self._process_lock)
                raise

    def close(self) -> None:
        """Lets another server open the store."""
        os.close(self._process_lock)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yields an empty folder on the store's disk; it is deleted after the block unless it was adopted.

        Raises:
            StoreFullError, StoreFailedError: also for an OSError in the block.
        """
        with errors_of_the_store(self.root):
            folder = make_private(self._staging / uuid.uuid4().hex)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def spool(self) -> IO[bytes]:
        """An empty file on the store's disk, which is gone once it is closed.

        Raises:
            StoreFullError, StoreFailedError
        """
        with errors_of_the_store(self.root):
            return tempfile.TemporaryFile(buffering=0, dir=self._staging)

    def adopt(self, staged: Path) -> str:
        """Moves a folder of this disk, which has the files of a revision and nothing else, to its revision.

        A revision that is there already stays, unless its bytes have changed.

        Returns:
            The revision, held once: the one that `read_adapter` computes for the same files.

        Raises:
            StoreFullError, StoreFailedError
        """
        with errors_of_the_store(self.root):
            size = _size(staged)
            if size > self._budget:
                raise StoreFullError(
                    f"store {str(self.root)!r}: expected at most its budget of {self.max_bytes} bytes, "
                    f"found an adapter of {size} bytes"
                )
            revision = digest_of_folder(staged)[:REVISION_LENGTH]
            seal(staged)
            target = self._adapters / revision
            corrupt = target.exists() and not _is_sound(target)
            with self._lock:
                replaced = self._hide(revision) if corrupt and target.exists() else None
                if not target.exists():
                    staged.rename(target)
                    sync(self._adapters)
                os.utime(target)
                self._held[revision] += 1
            if replaced:
                shutil.rmtree(replaced, ignore_errors=True)
        return revision

    def receive(
        self,
        digest: str,
        config: bytes,
        size: int,
        owner: str = "",
        tokenizer: Mapping[str, int] | None = None,
    ) -> Upload:
        """Begins or resumes an upload: write from `upload.offset` on, then `finish`.

        Whether the store has the revision already is not revealed: a caller gets it only by sending the
        bytes.

        Args:
            digest: 64 hexadecimal digits, see `digest_of_folder`.
            config: the bytes of `adapter_config.json`.
            size: the number of bytes of `adapter_model.safetensors`.
            owner: the owner, who alone can resume it.
            tokenizer: the bytes of each file of a tokenizer, in the order in which they follow the tensors.

        Raises:
            UploadError: an argument is invalid.
            SourceTooLargeError: the config or the size is above its limit.
            StoreBusyError: the same upload is being received.
            StoreFullError, StoreFailedError
        """
        with errors_of_the_store(self.root), self._lock:
            return self._uploads.open(self.adopt, digest, config, size, tokenizer or {}, owner)

    def path(self, revision: str) -> Path:
        """The folder of a revision, which is marked as used now. It stays while the revision is held.

        Raises:
            RevisionNotFoundError: it is not in the store.
        """
        folder = self._adapters / revision
        with errors_of_the_store(self.root), suppress(FileNotFoundError):
            if _REVISION.fullmatch(revision):
                os.utime(folder)
                return folder
        raise RevisionNotFoundError(
            f"revision {revision!r} is not in the store; load it from its source again"
        )

    def peek(self, revision: str) -> Path:
        """The folder of a revision, which may not exist, without marking it as used."""
        return self._adapters / revision

    def revisions(self) -> dict[str, int]:
        """The bytes of every revision in the store, least recently used first."""
        with errors_of_the_store(self.root), self._lock:
            return self._sizes()

    def verify(self, revision: str) -> None:
        """Compares a revision's bytes with its digest.

        Raises:
            RevisionNotFoundError: it is not in the store.
            RevisionCorruptError: its bytes have changed, or a file is missing.
        """
        folder = self.path(revision)
        with errors_of_the_store(self.root):
            if not _is_sound(folder):
                raise RevisionCorruptError(
                    f"revision {revision} in the store {str(self.root)!r}: expected the bytes of its digest, "
                    "found others (check the disk; loading it from its source repairs it)"
                )

    def hold(self, revision: str) -> None:
        """Keeps a revision until it is released as often as it was held.

        Raises:
            RevisionNotFoundError: it is not in the store.
        """
        with self._lock:
            self.path(revision)
            self._held[revision] += 1

    def release(self, revision: str) -> None:
        """Undoes one `hold`. Changes memory only; `remove` and `collect` delete files."""
        with self._lock:
            assert self._held[revision], f"{revision} was released more often than held"
            self._held[revision] -= 1
            if not self._held[revision]:
                del self._held[revision]

    def remove(self, revision: str) -> None:
        """Deletes a revision.

        Raises:
            RevisionNotFoundError: it is not in the store.
            StoreBusyError: it is held.
        """
        with errors_of_the_store(self.root):
            with self._lock:
                self.path(revision)
                if revision in self._held:
                    raise StoreBusyError(
                        f"revision {revision} is in use; unload the adapters that use it first"
                    )
                hidden = self._hide(revision)
            shutil.rmtree(hidden, ignore_errors=True)

    def collect(self, needed: Callable[[], Collection[str]]) -> list[str]:
        """Deletes revisions that are neither held nor needed, least recently used first, to keep the budget.

        Args:
            needed: returns the revisions that names of any base use. Called after the held ones are listed: a
                revision gets a name before it is released, so it is in one of the two.

        Returns:
            The deleted revisions; none if the store has no budget.
        """
        hidden: dict[str, Path] = {}
        with errors_of_the_store(self.root):
            try:
                with self._lock:
                    self._uploads.expire()
                    keep = {*self._held}
                    keep.update(needed())
                    sizes = self._sizes()
                    excess = sum(sizes.values()) - self._budget
                    for revision in [revision for revision in sizes if revision not in keep]:
                        if excess <= 0:
                            break
                        hidden[revision] = self._hide(revision)
                        excess -= sizes[revision]
            finally:
                for folder in hidden.values():
                    shutil.rmtree(folder, ignore_errors=True)
        return list(hidden)

    def _sizes(self) -> dict[str, int]:
        folders = sorted(self._adapters.iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
        return {folder.name: _size(folder) for folder in folders}

    def _hide(self, revision: str) -> Path:
        """Takes a revision out of the store by one rename, for the caller to delete without the lock."""
        return (self._adapters / revision).rename(self._staging / uuid.uuid4().hex)

    @property
    def _budget(self) -> int:
        return sys.maxsize if self.max_bytes is None else self.max_bytes


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _is_sound(folder: Path) -> bool:
    try:
        return digest_of_folder(folder)[:REVISION_LENGTH] == folder.name
    except FileNotFoundError:
        return False
