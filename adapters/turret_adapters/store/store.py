"""Adapters' files on this machine's disk, kept by what is in them.

    <root>/adapters/<revision>/   the two files as peft wrote them, read-only, whole
    <root>/staging/<random>/      on the way in or out, locked by who is at it
    <root>/uploads/<key>/         what has come of an upload; goes on where it stopped
    <root>/leases/<random>/       a running process's, locked by it: an empty file a revision that it needs

A revision appears by one `rename` and goes by one, so it is whole or not there at any instant. Several
processes may share a store: each change is made under one lock, and what a killed process left is told by its
locks being free.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from turret_adapters.formats.digest import REVISION_LENGTH, digest_of_folder
from turret_adapters.sources.folder import CONFIG_NAME, TENSORS_NAME, refuse_pickle, resolve
from turret_adapters.sources.intake import Intake, Progress, untold
from turret_adapters.store.staging import exclusive, make_locked, remove_abandoned, seal, sync
from turret_adapters.store.store_errors import (
    RevisionCorruptError,
    RevisionNotFoundError,
    StoreBusyError,
    StoreFullError,
    errors_of_the_store,
)
from turret_adapters.store.uploads import Upload, Uploads

_REVISION = re.compile(rf"[0-9a-f]{{{REVISION_LENGTH}}}")


class AdapterStore:
    """All methods may be called from any thread. Close it when the process needs no revision any more.

    A revision stays while some process holds it, or while `collect` is told that it is needed. What adds a
    revision holds it once for the caller, who releases it when the revision is named or not wanted.
    """

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        """Opens the store, makes it if need be, and cleans up after killed processes.

        Args:
            root: its folder, on a file system with `flock`.
            max_bytes: how much `collect` leaves; None for as much as the disk has.

        Raises:
            StoreFullError, StoreFailedError: the folder cannot be made or written.
        """
        self.root = root
        self.max_bytes = max_bytes
        with errors_of_the_store(root):
            self._adapters = self._folder("adapters")
            self._staging = self._folder("staging")
            self._leases = self._folder("leases")
            self._uploads = Uploads(self._folder("uploads"), max_bytes)
            with exclusive(root):
                self._uploads.expire()
                remove_abandoned(self._staging)
                remove_abandoned(self._leases)
                self._lease, self._lease_lock = make_locked(self._leases)
        self._held: Counter[str] = Counter()

    def close(self) -> None:
        """Gives up everything that this process holds."""
        shutil.rmtree(self._lease, ignore_errors=True)
        os.close(self._lease_lock)

    def add(self, folder: Path, progress: Progress = untold, max_bytes: int = sys.maxsize) -> str:
        """Copies an adapter's folder into the store, and holds it once.

        The digest is that of the copy, so a folder that changes meanwhile cannot be stored under the
        revision of something else.

        Returns:
            The revision: what `read_adapter` finds for the same files.

        Raises:
            AdapterSourceError: there is no adapter, it cannot be read, or it changes.
            AdapterFormatError: its tensors are a pickle.
            SourceTooLargeError, StoreFullError, StoreFailedError
        """
        source = resolve(str(folder))
        with self.staging() as staged:
            refuse_pickle(source)
            intake = Intake(staged, min(max_bytes, self._most()), progress)
            for name in (CONFIG_NAME, TENSORS_NAME):
                intake.copy(source, name)
            return self.adopt(staged)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder on the store's disk to make an adapter in; it is gone afterwards unless adopted.

        Raises:
            StoreFullError, StoreFailedError: what the system reports in the block, too.
        """
        with errors_of_the_store(self.root):
            with exclusive(self.root):
                folder, handle = make_locked(self._staging)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)

    def adopt(self, staged: Path) -> str:
        """Moves a folder that `staging` gave, and that holds the two files alone, to its revision.

        Holds the revision once. If it is there already it stays, unless its bytes have changed.
        """
        with errors_of_the_store(self.root):
            size = _size(staged)
            if size > self._most():
                raise StoreFullError(
                    f"store {str(self.root)!r}: expected at most its budget of {self.max_bytes} bytes, "
                    f"found an adapter of {size} bytes"
                )
            revision = digest_of_folder(staged)[:REVISION_LENGTH]
            seal(staged)
            target = self._adapters / revision
            replace = target.exists() and not _is_sound(target)
            with exclusive(self.root):
                if replace and target.exists():
                    self._hide(revision)
                if not target.exists():
                    staged.rename(target)
                    sync(self._adapters)
                os.utime(target)
                self._hold(revision)
            if replace:
                self._sweep()
        return revision

    def receive(self, digest: str, config: bytes, size: int, owner: str = "") -> Upload:
        """Begins an upload or goes on with it: write from `upload.offset` on, then `finish`.

        Nothing is told of what is stored already: to get a revision by upload, its bytes must be had.

        Args:
            digest: 64 hexadecimal digits, as `digest_of_folder` says.
            config: the bytes of `adapter_config.json`.
            size: the bytes of `adapter_model.safetensors`.
            owner: whose it is; nobody else can go on with it.

        Raises:
            UploadError: an argument cannot be.
            SourceTooLargeError: there are more bytes than may be.
            StoreBusyError: the same upload is being received, or too many others are.
            StoreFullError, StoreFailedError
        """
        with errors_of_the_store(self.root), exclusive(self.root):
            return self._uploads.open(self.adopt, digest, config, size, owner)

    def path(self, revision: str) -> Path:
        """The folder of a revision, which counts as used now. It stays while somebody holds it.

        Raises:
            RevisionNotFoundError: it is not in the store.
        """
        folder = self._adapters / revision
        with errors_of_the_store(self.root), suppress(FileNotFoundError):
            if _REVISION.fullmatch(revision):
                os.utime(folder)
                return folder
        raise RevisionNotFoundError(
            f"revision {revision!r} is not in the store {str(self.root)!r}; load it from its source again"
        )

    def place(self, revision: str) -> Path:
        """Where a revision is, if it is there; nothing is noted of that somebody looked."""
        return self._adapters / revision

    def revisions(self) -> dict[str, int]:
        """Every revision in the store, that used longest ago first, with its bytes."""
        with errors_of_the_store(self.root), exclusive(self.root):
            return self._sizes()

    def verify(self, revision: str) -> None:
        """Reads a revision and compares it with its name.

        Raises:
            RevisionNotFoundError: it is not in the store.
            RevisionCorruptError: its bytes have changed, or a file is missing.
        """
        folder = self.path(revision)
        with errors_of_the_store(self.root):
            if not _is_sound(folder):
                raise RevisionCorruptError(
                    f"revision {revision} in the store {str(self.root)!r}: expected the bytes that it is "
                    "named after, found others (check the disk; loading it from its source repairs it)"
                )

    def hold(self, revision: str) -> None:
        """Keeps a revision until it is released as often as it was held, or this process ends.

        Raises:
            RevisionNotFoundError: it is not in the store.
        """
        with errors_of_the_store(self.root), exclusive(self.root):
            self.path(revision)
            self._hold(revision)

    def release(self, revision: str) -> None:
        with errors_of_the_store(self.root), exclusive(self.root):
            assert self._held[revision], f"{revision} was released more often than held"
            self._held[revision] -= 1
            if not self._held[revision]:
                (self._lease / revision).unlink()

    def remove(self, revision: str) -> None:
        """Takes a revision away.

        Raises:
            RevisionNotFoundError: it is not in the store.
            StoreBusyError: a running process holds it.
        """
        with errors_of_the_store(self.root):
            with exclusive(self.root):
                self.path(revision)
                if revision in self._needed_by_processes():
                    raise StoreBusyError(f"revision {revision} is in use; unload what serves it first")
                self._hide(revision)
            self._sweep()

    def collect(self, needed: Callable[[], Collection[str]]) -> list[str]:
        """Takes away what nobody needs, that used longest ago first, until the budget is kept.

        Args:
            needed: the revisions that names of any base point at. It is asked after the processes' holds are
                read: whoever names a revision does so before releasing it, so it is seen in one of the two.

        Returns:
            The revisions that are gone. Without a budget there are none.
        """
        with errors_of_the_store(self.root):
            with exclusive(self.root):
                self._uploads.expire()
                keep = self._needed_by_processes()
                keep.update(needed())
                sizes = self._sizes()
                excess = sum(sizes.values()) - self._most()
                gone: list[str] = []
                for revision in [revision for revision in sizes if revision not in keep]:
                    if excess <= 0:
                        break
                    self._hide(revision)
                    excess -= sizes[revision]
                    gone.append(revision)
            self._sweep()
        return gone

    def _folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _sizes(self) -> dict[str, int]:
        folders = sorted(self._adapters.iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
        return {folder.name: _size(folder) for folder in folders}

    def _hide(self, revision: str) -> None:
        """Moves a revision where nobody has it locked, for `_sweep` to delete."""
        (self._adapters / revision).rename(self._staging / uuid.uuid4().hex)

    def _sweep(self) -> None:
        with exclusive(self.root):
            remove_abandoned(self._staging)

    def _hold(self, revision: str) -> None:
        (self._lease / revision).touch()
        self._held[revision] += 1

    def _needed_by_processes(self) -> set[str]:
        remove_abandoned(self._leases)
        return {place.name for lease in self._leases.iterdir() for place in lease.iterdir()}

    def _most(self) -> int:
        return sys.maxsize if self.max_bytes is None else self.max_bytes


def _size(folder: Path) -> int:
    return sum(place.stat().st_size for place in folder.iterdir())


def _is_sound(folder: Path) -> bool:
    try:
        return digest_of_folder(folder)[:REVISION_LENGTH] == folder.name
    except FileNotFoundError:
        return False
