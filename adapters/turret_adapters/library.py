"""The adapters of one base model: brought from a source, kept in a store, named for the next start.

A name is written down before it is served, and a revision is held in the store for as long as it may be read
again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from turret_adapters.errors import AdapterError, AdapterNotFoundError, AdapterSourceError
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import BaseWeights, HostAdapter
from turret_adapters.sources.downloads import Downloads
from turret_adapters.sources.fetch import fetch
from turret_adapters.sources.intake import Progress, untold
from turret_adapters.sources.policy import Deadline, Policy, public
from turret_adapters.spec import AdapterSpec, BaseSpec
from turret_adapters.store.names import MAX_HISTORY, Names, Published, Record, Split
from turret_adapters.store.ownership import Ownership
from turret_adapters.store.records import decode, encode, marks_of, reader_of
from turret_adapters.store.store import AdapterStore
from turret_adapters.store.store_errors import (
    RevisionCorruptError,
    RevisionNotFoundError,
    SourceTooLargeError,
    SourceUnavailableError,
    StoreBusyError,
)
from turret_adapters.store.uploads import Upload

_NOBODYS = Ownership()


class AdapterLibrary:
    """All methods may be called from any thread. `base` and `weights` are of the model they must fit."""

    def __init__(
        self, *, store: AdapterStore, names: Names, policy: Policy, base: BaseSpec, weights: BaseWeights
    ) -> None:
        self._store = store
        self._names = names
        self._policy = policy
        self._base = base
        self._weights = weights
        self._lock = threading.Lock()
        self._kept: set[str] = set()
        # Of those kept, which no name needs: their files go with the last that needs them.
        self._unwanted: set[str] = set()
        self._reader = reader_of(base)
        self.downloads = Downloads()
        self._interrupted = threading.Event()
        self._fetching = 0
        self._fetched = threading.Condition()

    def interrupt(self) -> None:
        """End what is being fetched, at its next bytes, and begin nothing more."""
        self._interrupted.set()

    def close(self) -> None:
        """The same; waits until all of it has ended, and gives up what is kept."""
        self.interrupt()
        with self._fetched:
            self._fetched.wait_for(lambda: not self._fetching)
        self._names.close()
        self._store.close()

    @contextmanager
    def fetch(self, source: str, progress: Progress = untold, name: str = "") -> Iterator[HostAdapter]:
        """An adapter from a source, see `sources.fetch`. Unless it is kept in the block, it may go.
        `downloads` has it under `name` meanwhile.

        Raises:
            AdapterError: there is none, it may not be fetched, or it cannot be served on this base.
        """

        def told(done: int, total: int | None) -> None:
            self._check_interrupted()
            progress(done, total)

        with self._counted():
            with self.downloads.one(name, told) as counted:
                revision = fetch(source, self._store, self._policy, counted)
            with self._held(revision) as adapter:
                yield adapter

    def _check_interrupted(self) -> None:
        if self._interrupted.is_set():
            raise SourceUnavailableError("the server stops; load the adapter again when it is back")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._fetched:
            self._check_interrupted()
            self._fetching += 1
        try:
            yield
        finally:
            with self._fetched:
                self._fetching -= 1
                self._fetched.notify_all()

    def receive(self, digest: str, config: bytes, size: int, owner: str) -> Upload:
        """Begins an upload or goes on with it, see `AdapterStore.receive`.

        Raises:
            AdapterError: it cannot be, or not now.
        """
        return self._store.receive(digest, config, size, owner)

    @contextmanager
    def finish(self, upload: Upload) -> Iterator[HostAdapter]:
        """The adapter that has come. Unless it is kept in the block, it may go.

        Raises:
            AdapterError: its bytes are not those that were announced, or it cannot be served on this base.
        """
        with self._counted(), self._held(upload.finish()) as adapter:
            yield adapter

    @contextmanager
    def _held(self, revision: str) -> Iterator[HostAdapter]:
        served = False
        try:
            yield self.read(revision)
            served = True
        finally:
            self._store.release(revision)
            if not served:
                self._remove_unneeded([revision])
            if self._store.max_bytes is not None:
                self._store.collect(self._names.needed)

    def read(self, revision: str) -> HostAdapter:
        """A revision from the store.

        Raises:
            AdapterError: it is not there, its bytes have changed, or reading it takes too much or too long.
        """
        folder = self._store.path(revision)
        deadline = Deadline(self._policy.timeout)

        def told(_done: int, total: int | None) -> None:
            self._check_interrupted()
            deadline.left()
            if total is not None and total > self._policy.max_bytes:
                raise SourceTooLargeError(
                    f"revision {revision}: expected at most {self._policy.max_bytes} bytes, for which this "
                    f"machine has the memory, found {total}"
                )

        try:
            adapter = read_adapter(folder, self._base, self._weights, told)
        except AdapterSourceError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise RevisionCorruptError(
                f"revision {revision} in the store: {error} (loading it from its source repairs it)"
            ) from error
        if adapter.spec.revision != revision:
            raise RevisionCorruptError(
                f"revision {revision} in the store: expected the bytes that it is named after, found others "
                "(check the disk; loading it from its source repairs it)"
            )
        return adapter

    def keep(self, revision: str) -> None:
        """Hold a revision in the store until it is let go.

        Raises:
            AdapterError: it is not there.
        """
        with self._lock:
            if revision not in self._kept:
                self._store.hold(revision)
                self._kept.add(revision)

    def let_go(self, revision: str) -> None:
        """Nothing reads it any more; one that is not kept is left alone."""
        with self._lock:
            if revision not in self._kept:
                return
            self._kept.discard(revision)
            self._store.release(revision)
            unwanted = revision in self._unwanted
            self._unwanted.discard(revision)
        if unwanted:
            self._remove_unneeded([revision])

    def publish(
        self,
        name: str,
        adapter: HostAdapter,
        source: str,
        owner: Ownership = _NOBODYS,
        source_marks: str = "",
    ) -> None:
        """Write down what a name serves from now on, and whose it is; `source_marks` are those of a folder
        that it came from. Earlier revisions of an owner who has no room for them go.

        Raises:
            OwnerLimitError: its owner may not have so much.
        """
        spec = adapter.spec
        owner = replace(owner, num_bytes=max(spec.file_bytes, adapter.num_bytes))
        before = set() if owner.max_bytes is None else self._names.owned(owner.owner)
        self._names.publish(
            name,
            spec.revision,
            as_recorded(source),
            owner,
            source_marks=source_marks,
            record=self._record_of(spec),
        )
        self._remove_unneeded(before)

    def _remove_unneeded(self, revisions: Iterable[str]) -> None:
        """Take away the files of those that no name of any base needs, once nothing reads them."""
        needed = self._names.needed(MAX_HISTORY) if revisions else set()
        for revision in revisions:
            if revision in needed:
                continue
            with self._lock:
                if revision in self._kept:
                    self._unwanted.add(revision)
                    continue
            with suppress(RevisionNotFoundError, StoreBusyError):
                self._store.remove(revision)

    def record(self, spec: AdapterSpec) -> None:
        """Write down what is known of a revision that was read, for the next start, if that can be."""
        with suppress(AdapterError):
            self._names.record(spec.revision, self._record_of(spec))

    def recorded(self) -> dict[str, AdapterSpec]:
        """What is known of revisions whose files look as they did when that was written down, by this version
        and for a base such as this. They need not be read before somebody needs their tensors.
        """
        with suppress(AdapterError):
            self._names.tidy_records()
        found = {}
        for revision, record in self._names.records().items():
            marks = self._marks(revision) if record.reader == self._reader else ""
            spec = decode(record.spec) if marks and marks == record.marks else None
            if spec and spec.revision == revision:
                found[revision] = spec
        return found

    def forget_record(self, revision: str) -> None:
        """What was known of a revision is not so: the next start reads it, if that can be written down."""
        with suppress(AdapterError):
            self._names.forget_record(revision)

    def _record_of(self, spec: AdapterSpec) -> Record:
        return Record(self._reader, self._marks(spec.revision), encode(spec))

    def _marks(self, revision: str) -> str:
        return marks_of(self._store.place(revision))

    def forget(self, name: str) -> None:
        """Write down that a name serves nothing; one that is not known is left alone."""
        with suppress(AdapterNotFoundError):
            self._names.remove(name)

    def find(self, name: str, beginning: str) -> Published:
        """The revision of a name, current or earlier, that begins like this.

        Raises:
            AdapterError: there is no such name, or not exactly one such revision.
        """
        return self._names.find(name, beginning)

    def rollback_target(self, name: str, beginning: str | None) -> Published:
        """What a name goes back to: the revision before its current one, or one that begins like this.

        Raises:
            AdapterError: there is no such name, or none such before its current revision.
        """
        return self._names.rollback_target(name, beginning)

    def rollback(self, target: Published) -> None:
        """Write down that a name serves an earlier revision again, and forget those after it."""
        self._names.rollback(target.name, target.revision)

    def split(self, name: str, beginning: str, percent: int) -> Split | None:
        """Write down which percent of a name's requests go to another revision of its history.

        Raises:
            AdapterError: there is no such name, or not exactly one such revision besides its current one.
        """
        return self._names.split(name, beginning, percent)

    def splits(self) -> dict[str, Split]:
        """The names of which some requests go to another revision than the current one."""
        return self._names.splits()

    def histories(self, names: Iterable[str]) -> dict[str, list[Published]]:
        """What each name serves and served, the latest first; of one that is not known, nothing."""
        return self._names.histories(names)

    def names(self) -> dict[str, Published]:
        """What every name served when that was last written down."""
        return self._names.current()


def as_recorded(source: str) -> str:
    """A source for records: a path as it is, a URL without what may be secret in it."""
    return public(source) if "://" in source else source
