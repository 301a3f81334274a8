"""The adapters of one base model: fetched from a source, kept in the store, read for serving.

A name is written down before it is served, and a revision is held in the store while it may be read.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from turret_adapters.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterSourceError,
    RevisionCorruptError,
    RevisionNotFoundError,
    SourceTooLargeError,
    SourceUnavailableError,
    StoreBusyError,
)
from turret_adapters.formats.files import (
    LABELS_NAME,
    OPTIONAL_FILES,
    TOKENIZER_NAME,
    Progress,
    no_progress,
)
from turret_adapters.formats.labels import read_labels
from turret_adapters.formats.peft import read_adapter, read_kept
from turret_adapters.formats.tokenizer import BaseTokenizer, OwnTokenizer, chat_template_of
from turret_adapters.host import BaseWeights, HostAdapter
from turret_adapters.sources.archive import archive_name, unpack
from turret_adapters.sources.fetch import Downloads, fetch
from turret_adapters.sources.intake import Intake
from turret_adapters.sources.policy import Deadline, Policy, public
from turret_adapters.spec import AdapterSpec, BaseSpec
from turret_adapters.store.names import MAX_HISTORY, NO_OWNER, Names, Ownership, Published, Record
from turret_adapters.store.records import decode, encode, marks_of, reader_of
from turret_adapters.store.store import AdapterStore
from turret_adapters.store.uploads import Upload

log = logging.getLogger(__name__)


class AdapterLibrary:
    """Thread-safe. `names` and `store` are public: use them for what concerns only one of them."""

    def __init__(
        self,
        *,
        store: AdapterStore,
        names: Names,
        policy: Policy,
        base: BaseSpec,
        weights: BaseWeights,
        tokenizer: BaseTokenizer,
    ) -> None:
        """Every adapter must fit the model with the spec `base`, the weights `weights` and the tokenizer."""
        self.store = store
        self.names = names
        self.downloads = Downloads()
        self._policy = policy
        self._base = base
        self._weights = weights
        self._tokenizer = tokenizer
        self._reader = reader_of(base)
        self._lock = threading.Lock()
        self._kept: set[str] = set()
        # Revisions that may not be needed by any name; if so, their files are deleted once they are not kept.
        self._unneeded: set[str] = set()
        self._interrupted = threading.Event()
        self._fetching = 0
        self._fetched = threading.Condition()

    def interrupt(self) -> None:
        """Ends all fetches at their next bytes, and refuses new ones."""
        self._interrupted.set()
        self._tokenizer.interrupt()

    def close(self) -> None:
        """Interrupts all fetches, waits until they have ended, and closes the names."""
        self.interrupt()
        with self._fetched:
            self._fetched.wait_for(lambda: not self._fetching)
        self.names.close()

    @contextmanager
    def fetch(self, source: str, progress: Progress = no_progress, name: str = "") -> Iterator[HostAdapter]:
        """Fetches an adapter from a source, see `sources.fetch`; `downloads` lists it under `name` meanwhile.
        Its files stay after the block only if the block publishes it.

        Raises:
            AdapterError: there is none, the policy does not allow it, or it does not fit the base.
        """
        with self._filled(partial(fetch, source), progress, name) as adapter:
            yield adapter

    @contextmanager
    def unpack(self, archive: IO[bytes], name: str) -> Iterator[HostAdapter]:
        """Reads an adapter from an archive that was uploaded, like `fetch`.

        Raises:
            AdapterError: it is no archive of an adapter, or does not fit the base.
        """

        def fill(folder: Path, policy: Policy, progress: Progress) -> None:
            intake = Intake(folder, policy.max_bytes, progress)
            unpack(archive, archive_name(archive), intake, policy.max_bytes)

        with self._filled(fill, no_progress, name) as adapter:
            yield adapter

    @property
    def max_bytes(self) -> int:
        """The limit of an adapter's files together, or of an archive of them."""
        return min(self._policy.max_bytes, self.store.max_bytes or self._policy.max_bytes)

    @contextmanager
    def _filled(
        self, fill: Callable[[Path, Policy, Progress], None], progress: Progress, name: str
    ) -> Iterator[HostAdapter]:
        """Takes the files that `fill` writes into a folder, within a policy, into the store."""

        def report(done: int, total: int | None) -> None:
            self._check_interrupted()
            progress(done, total)

        policy = replace(self._policy, max_bytes=self.max_bytes)
        with self._counted():
            with self.downloads.track(name, report) as counted, self.store.staging() as staged:
                fill(staged, policy, counted)
                self._keep_changes(staged)
                revision = self.store.adopt(staged)
            with self._held(revision) as adapter:
                yield adapter

    @contextmanager
    def finish(self, upload: Upload) -> Iterator[HostAdapter]:
        """Reads an adapter that was uploaded. Its files stay after the block only if the block publishes it.

        Raises:
            AdapterError: its bytes differ from those that were announced, or it does not fit the base.
        """
        with self._counted(), self._held(upload.finish(self._keep_changes)) as adapter:
            yield adapter

    def _keep_changes(self, folder: Path) -> None:
        """Replaces the files of an adapter's tokenizer by what they change of the base's, and the
        configuration of its model by the names of the head's outputs.
        """
        kept = {TOKENIZER_NAME: self._tokenizer.changes(folder), LABELS_NAME: read_labels(folder)}
        for name in OPTIONAL_FILES:
            (folder / name).unlink(missing_ok=True)
        for name, data in kept.items():
            if data:
                (folder / name).write_bytes(data)

    def tokenizer(self, revision: str) -> OwnTokenizer:
        """The tokenizer of a revision that has one of its own.

        Raises:
            RevisionNotFoundError: it is not in the store.
            RevisionCorruptError: its tokenizer is damaged.
        """
        with _repairable(revision):
            return self._tokenizer.changed(read_kept(self.store.path(revision), TOKENIZER_NAME))

    def chat_template(self, revision: str) -> str | dict[str, str] | None:
        """The chat template of a revision that has one of its own, or several by their names.

        Raises:
            RevisionNotFoundError: it is not in the store.
            RevisionCorruptError: its tokenizer is damaged.
        """
        with _repairable(revision):
            return chat_template_of(read_kept(self.store.path(revision), TOKENIZER_NAME))

    def _check_interrupted(self) -> None:
        if self._interrupted.is_set():
            raise SourceUnavailableError("the server is stopping; load the adapter again after its restart")

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

    @contextmanager
    def _held(self, revision: str) -> Iterator[HostAdapter]:
        try:
            yield self.read(revision)
        finally:
            self.store.release(revision)
            with self._lock:
                self._unneeded.add(revision)
            self._clean_up()

    def _clean_up(self) -> None:
        """Deletes what is not needed. What the caller did is done, so an error is logged, not raised."""
        try:
            self._remove_unneeded()
            if self.store.max_bytes is not None:
                self.store.collect(self.names.needed)
        except AdapterError as error:
            log.warning("files that are not needed stay in the store until the next load: %s", error)

    def read(self, revision: str) -> HostAdapter:
        """Reads a revision from the store.

        Raises:
            AdapterError: it is not there, its bytes have changed, or it is too large or too slow to read.
        """
        folder = self.store.path(revision)
        deadline = Deadline(self._policy.timeout)

        def check(_done: int, total: int | None) -> None:
            self._check_interrupted()
            deadline.left()
            if total is not None and total > self._policy.max_bytes:
                raise SourceTooLargeError(
                    f"revision {revision}: expected at most {self._policy.max_bytes} bytes, the limit for "
                    f"this machine's memory, found {total}"
                )

        try:
            adapter = read_adapter(folder, self._base, self._weights, check)
        except AdapterSourceError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise RevisionCorruptError(
                f"revision {revision} in the store: {error} (loading it from its source repairs it)"
            ) from error
        if adapter.spec.revision != revision:
            raise RevisionCorruptError(
                f"revision {revision} in the store: expected the bytes of its digest, found others "
                "(check the disk; loading it from its source repairs it)"
            )
        return adapter

    def keep(self, revision: str) -> bool:
        """Holds a revision in the store until `let_go`; False if it is kept already.

        Raises:
            RevisionNotFoundError: it is not in the store.
        """
        with self._lock:
            if revision in self._kept:
                return False
            self.store.hold(revision)
            self._kept.add(revision)
            return True

    def let_go(self, revision: str) -> None:
        """Undoes `keep`, and deletes the files of a revision that no name needs any more.

        Calling it again is harmless, and retries a deletion that failed.

        Raises:
            AdapterError: the files are not deleted; the revision is not kept any more all the same.
        """
        with self._lock:
            if revision in self._kept:
                self._kept.discard(revision)
                self.store.release(revision)
            unneeded = revision in self._unneeded
        if unneeded:
            self._remove_unneeded()

    def publish(
        self,
        name: str,
        adapter: HostAdapter,
        source: str,
        owner: Ownership = NO_OWNER,
        source_marks: str = "",
    ) -> None:
        """Writes down that a name serves an adapter from now on, within the block of `fetch` or `finish`. If
        the owner has a limit of bytes, the revisions that exceed it are deleted after the block.

        Raises:
            OwnerLimitError: the owner's adapters exceed the limits.
        """
        spec = adapter.spec
        owner = replace(owner, num_bytes=max(spec.file_bytes, adapter.num_bytes))
        before = set() if owner.max_bytes is None else self.names.owned(owner.owner)
        self.names.publish(
            name,
            spec.revision,
            without_secrets(source),
            owner,
            source_marks=source_marks,
            record=self._record_of(spec),
        )
        with self._lock:
            self._unneeded |= before

    def rollback(self, target: Published) -> None:
        """Writes down that a name serves an earlier revision again, which is kept from now on.

        It is kept first, so an error changes nothing.

        Raises:
            AdapterError: the revision is not in the store or not in the name's history.
        """
        newly_kept = self.keep(target.revision)
        try:
            self.names.rollback(target.name, target.revision)
        except BaseException:
            if newly_kept:
                self.let_go(target.revision)
            raise

    def _remove_unneeded(self) -> None:
        with self._lock:
            candidates = [*self._unneeded]
        needed = self.names.needed(MAX_HISTORY) if candidates else set()
        for revision in candidates:
            with self._lock:
                if revision in needed:
                    self._unneeded.discard(revision)
                if revision in needed or revision in self._kept:
                    continue
            with suppress(RevisionNotFoundError):
                try:
                    self.store.remove(revision)
                except StoreBusyError:
                    continue
            with self._lock:
                self._unneeded.discard(revision)

    def save_record(self, spec: AdapterSpec) -> None:
        """Saves the record of a revision that was read, for the next start. A failure only costs time
        there.
        """
        with suppress(AdapterError):
            self.names.save_record(spec.revision, self._record_of(spec))

    def recorded(self) -> dict[str, AdapterSpec]:
        """The specs of the revisions whose records are valid; they are read when their tensors are needed."""
        with suppress(AdapterError):
            self.names.tidy_records()
        found = {}
        for revision, record in self.names.records().items():
            marks = self._marks(revision) if record.reader == self._reader else ""
            spec = decode(record.spec) if marks and marks == record.marks else None
            if spec and spec.revision == revision:
                found[revision] = spec
        return found

    def forget_record(self, revision: str) -> None:
        """Deletes a record that turned out wrong, if possible, so that the next start reads the revision."""
        with suppress(AdapterError):
            self.names.forget_record(revision)

    def _record_of(self, spec: AdapterSpec) -> Record:
        return Record(self._reader, self._marks(spec.revision), encode(spec))

    def _marks(self, revision: str) -> str:
        return marks_of(self.store.peek(revision))


@contextmanager
def _repairable(revision: str) -> Iterator[None]:
    """A tokenizer that is unreadable in the block makes its revision corrupt."""
    try:
        yield
    except (AdapterFormatError, OSError) as error:
        raise RevisionCorruptError(
            f"revision {revision} in the store: {error} (loading it from its source repairs it)"
        ) from error


def without_secrets(source: str) -> str:
    """A source as it may be written down: a path as it is, a URL without user, password and query."""
    return public(source) if "://" in source else source
