"""A cache of adapters in host memory within a budget; adapters that it evicted are read again when needed.

Evicted first is the adapter with the largest product of size and time since its last use. An evicted adapter
that is being copied to the device stays alive until the copy ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from turret_adapters.errors import AdapterSourceError, RevisionCorruptError
from turret_adapters.host import HostAdapter
from turret_adapters.spec import AdapterSpec


def _no_store(revision: str) -> HostAdapter:
    raise AdapterSourceError(
        f"revision {revision} is not in host memory and there is no store; load it again"
    )


@dataclass(slots=True)
class _Cached:
    adapter: HostAdapter
    num_bytes: int
    last_used: int


class HostMemory:
    """Thread-safe. `read` reads a revision again; it may be called for several revisions at once, but for
    each by only one thread at a time. With `page_locked`, tensors are in memory that a GPU copies from
    asynchronously.
    """

    def __init__(
        self,
        max_bytes: int | None = None,
        read: Callable[[str], HostAdapter] = _no_store,
        *,
        page_locked: bool = False,
    ) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_reads = 0
        self._read = read
        self._page_locked = page_locked
        self._lock = threading.Lock()
        self._clock = 0
        # Every revision that `get` accepts, and those of them that are in memory.
        self._known: dict[str, AdapterSpec] = {}
        self._cached: dict[str, _Cached] = {}
        self._reading: dict[str, threading.Lock] = {}

    def __len__(self) -> int:
        return len(self._cached)

    def prepare(self, adapter: HostAdapter) -> HostAdapter:
        """Returns the adapter in page-locked memory if that is used here. It copies, so hold no lock."""
        return adapter.page_locked() if self._page_locked else adapter

    def put(self, adapter: HostAdapter) -> None:
        """Adds a prepared adapter, which stays in memory until it is evicted."""
        with self._lock:
            self._known[adapter.spec.revision] = adapter.spec
            self._cache(adapter)

    def know(self, spec: AdapterSpec) -> None:
        """Adds an adapter that the first `get` reads."""
        with self._lock:
            self._known.setdefault(spec.revision, spec)

    def get(self, revision: str) -> HostAdapter:
        """Returns an adapter that was added, and reads it if it is not in memory.

        Raises:
            KeyError: it was not added, or dropped.
            RevisionCorruptError: the files no longer match the spec that was added.
            AdapterError: it is not readable.
        """
        with self._lock:
            spec = self._known[revision]
            found = self._find(revision)
            reading = self._reading.setdefault(revision, threading.Lock())
        if found is not None:
            return found
        with reading:
            with self._lock:
                found = self._find(revision)
            return self._read_again(spec) if found is None else found

    def drop(self, revision: str) -> None:
        """Removes an adapter: `get` no longer accepts it."""
        with self._lock:
            self._known.pop(revision, None)
            self._reading.pop(revision, None)
            self._evict(revision)

    def _read_again(self, spec: AdapterSpec) -> HostAdapter:
        revision = spec.revision
        adapter = self._read(revision)
        if adapter.spec.revision != revision:
            raise AdapterSourceError(
                f"expected revision {revision} in the store, found {adapter.spec.revision}: its files have "
                "changed; load it again"
            )
        if adapter.spec != spec:
            # Its pages were planned from the spec that was added.
            raise RevisionCorruptError(
                f"revision {revision}: expected the shapes that were recorded when it was loaded, found "
                "others; load it again"
            )
        adapter = self.prepare(adapter)
        with self._lock:
            self.num_reads += 1
            if revision in self._known:
                self._cache(adapter)
        return adapter

    def _find(self, revision: str) -> HostAdapter | None:
        cached = self._cached.get(revision)
        if cached is None:
            return None
        self._clock += 1
        cached.last_used = self._clock
        return cached.adapter

    def _cache(self, adapter: HostAdapter) -> None:
        revision, num_bytes = adapter.spec.revision, adapter.num_bytes
        if revision in self._cached or (self.max_bytes is not None and num_bytes > self.max_bytes):
            return
        while self.max_bytes is not None and self.num_bytes + num_bytes > self.max_bytes:
            self._evict(max(self._cached, key=self._cost))
        self._clock += 1
        self._cached[revision] = _Cached(adapter, num_bytes, self._clock)
        self.num_bytes += num_bytes

    def _cost(self, revision: str) -> int:
        cached = self._cached[revision]
        return (self._clock - cached.last_used + 1) * cached.num_bytes

    def _evict(self, revision: str) -> None:
        cached = self._cached.pop(revision, None)
        if cached is not None:
            self.num_bytes -= cached.num_bytes
