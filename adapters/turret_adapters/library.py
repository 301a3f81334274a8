"""The adapters of one base model: brought from a source, kept in a store, named for the next start.

A name is written down before it is served, and a revision is held in the store for as long as it may be read
again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from turret_adapters.errors import AdapterNotFoundError
from turret_adapters.fetch import fetch
from turret_adapters.host import BaseWeights, HostAdapter
from turret_adapters.intake import Progress, untold
from turret_adapters.names import Names, Published
from turret_adapters.peft import read_adapter
from turret_adapters.policy import Policy
from turret_adapters.spec import BaseSpec
from turret_adapters.store import AdapterStore
from turret_adapters.store_errors import RevisionCorruptError


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

    def close(self) -> None:
        self._names.close()
        self._store.close()

    @contextmanager
    def fetch(self, source: str, progress: Progress = untold) -> Iterator[HostAdapter]:
        """An adapter from a source, see `turret_adapters.fetch`. Unless it is kept in the block, it may go.

        Raises:
            AdapterError: there is none, it may not be fetched, or it cannot be served on this base.
        """
        revision = fetch(source, self._store, self._policy, progress)
        try:
            yield self.read(revision)
        finally:
            self._store.release(revision)
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
        self._names.publish(name, revision, source)

    def forget(self, name: str) -> None:
        """Write down that a name serves nothing; one that is not known is left alone."""
        with suppress(AdapterNotFoundError):
            self._names.remove(name)

    def names(self) -> dict[str, Published]:
        """What every name served when that was last written down."""
        return self._names.current()
