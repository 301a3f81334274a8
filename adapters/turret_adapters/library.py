"""The adapters of one base model: brought from a source, kept in a store, named for the next start.

A name is written down before it is served, and a revision is held in the store for as long as it may be read
again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from turret_adapters.errors import AdapterNotFoundError
from turret_adapters.fetch import fetch
from turret_adapters.host import BaseWeights, HostAdapter
from turret_adapters.intake import Progress, untold
from turret_adapters.names import MAX_HISTORY, Names, Published, Split
from turret_adapters.peft import read_adapter
from turret_adapters.policy import Policy, public
from turret_adapters.spec import BaseSpec
from turret_adapters.store import AdapterStore
from turret_adapters.store_errors import (
    RevisionCorruptError,
    RevisionNotFoundError,
    SourceUnavailableError,
    StoreBusyError,
)
from turret_adapters.uploads import Upload


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
        self._closing = threading.Event()

    def close(self) -> None:
        """Ends what is being fetched, at its next bytes, and gives up what is kept."""
        self._closing.set()
        self._names.close()
        self._store.close()

    @contextmanager
    def fetch(self, source: str, progress: Progress = untold) -> Iterator[HostAdapter]:
        """An adapter from a source, see `turret_adapters.fetch`. Unless it is kept in the block, it may go.

        Raises:
            AdapterError: there is none, it may not be fetched, or it cannot be served on this base.
        """

        def told(done: int, total: int | None) -> None:
            if self._closing.is_set():
                raise SourceUnavailableError("the server stops; load the adapter again when it is back")
            progress(done, total)

        with self._held(fetch(source, self._store, self._policy, told)) as adapter:
            yield adapter

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
        with self._held(upload.finish()) as adapter:
            yield adapter

    @contextmanager
    def _held(self, revision: str) -> Iterator[HostAdapter]:
        served = False
        try:
            yield self.read(revision)
            served = True
        finally:
            self._store.release(revision)
            if not served and revision not in self._names.needed(MAX_HISTORY):
                with suppress(RevisionNotFoundError, StoreBusyError):
                    self._store.remove(revision)
            if self._store.max_bytes is not None:
                self._store.collect(self._names.needed)

    def read(self, revision: str) -> HostAdapter:
        """A revision from the store.

        Raises:
            AdapterError: it is not there, or its bytes have changed.
        """
        adapter = read_adapter(self._store.path(revision), self._base, self._weights)
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
            if revision in self._kept:
                self._kept.discard(revision)
                self._store.release(revision)

    def publish(self, name: str, revision: str, source: str) -> None:
        """Write down what a name serves from now on."""
        self._names.publish(name, revision, as_recorded(source))

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
