"""Adapters in the host's memory, as many as a budget allows; the others are read again when they are needed.

What goes first is what was used longest ago for its size: of two that were used alike, the larger. An adapter
that is being copied stays alive for the copy, whatever goes meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from turret_adapters.errors import AdapterSourceError
from turret_adapters.host import HostAdapter
from turret_adapters.spec import AdapterSpec
from turret_adapters.store.store_errors import RevisionCorruptError


def _nowhere(revision: str) -> HostAdapter:
    raise AdapterSourceError(f"revision {revision} is not in memory and was kept nowhere else")


@dataclass(slots=True)
class _Kept:
    adapter: HostAdapter
    num_bytes: int
    last_used: int


class HostMemory:
    """All methods may be called from any thread. `read` brings a revision back; it may take its time, and may
    be asked for several at once, but never for one twice at the same time. With `page_locked`, tensors are
    kept where a GPU copies from while it computes.
    """

    def __init__(
        self,
        max_bytes: int | None = None,
        read: Callable[[str], HostAdapter] = _nowhere,
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
        # Every revision that may be asked for, and those of them that are in memory.
        self._known: dict[str, AdapterSpec] = {}
        self._kept: dict[str, _Kept] = {}
        self._reading: dict[str, threading.Lock] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, adapter: HostAdapter) -> None:
        """Know an adapter, and keep it until there is no room for it."""
        adapter = adapter.page_locked() if self._page_locked else adapter
        with self._lock:
            self._known[adapter.spec.revision] = adapter.spec
            self._keep(adapter)

    def know(self, spec: AdapterSpec) -> None:
        """Know an adapter that is read once somebody asks for it."""
        with self._lock:
            self._known.setdefault(spec.revision, spec)

    def get(self, revision: str) -> HostAdapter:
        """An adapter that is known, read again if it had to go.

        Raises:
            KeyError: it is not known.
            RevisionCorruptError: it is not what was known of it.
            AdapterError: it cannot be read again.
        """
        with self._lock:
            spec = self._known[revision]
            found = self._touch(revision)
            reading = self._reading.setdefault(revision, threading.Lock())
        if found is not None:
            return found
        with reading:
            with self._lock:
                found = self._touch(revision)
            return self._read_again(spec) if found is None else found

    def drop(self, revision: str) -> None:
        """Nobody will ask for it again."""
        with self._lock:
            self._known.pop(revision, None)
            self._reading.pop(revision, None)
            self._forget(revision)

    def _read_again(self, spec: AdapterSpec) -> HostAdapter:
        revision = spec.revision
        adapter = self._read(revision)
        if adapter.spec.revision != revision:
            raise AdapterSourceError(
                f"expected revision {revision} where it was kept, found {adapter.spec.revision}: its files "
                "have changed; load it again"
            )
        if adapter.spec != spec:
            # Pages were given to it by what was known.
            raise RevisionCorruptError(
                f"revision {revision}: its files hold something else than was written down of them when they "
                "were loaded; load it again"
            )
        adapter = adapter.page_locked() if self._page_locked else adapter
        with self._lock:
            self.num_reads += 1
            if revision in self._known:
                self._keep(adapter)
        return adapter

    def _touch(self, revision: str) -> HostAdapter | None:
        kept = self._kept.get(revision)
        if kept is None:
            return None
        self._clock += 1
        kept.last_used = self._clock
        return kept.adapter

    def _keep(self, adapter: HostAdapter) -> None:
        revision, num_bytes = adapter.spec.revision, adapter.num_bytes
        if revision in self._kept or (self.max_bytes is not None and num_bytes > self.max_bytes):
            return
        while self.max_bytes is not None and self.num_bytes + num_bytes > self.max_bytes:
            self._forget(max(self._kept, key=self._waste))
        self._clock += 1
        self._kept[revision] = _Kept(adapter, num_bytes, self._clock)
        self.num_bytes += num_bytes

    def _waste(self, revision: str) -> int:
        kept = self._kept[revision]
        return (self._clock - kept.last_used + 1) * kept.num_bytes

    def _forget(self, revision: str) -> None:
        kept = self._kept.pop(revision, None)
        if kept is not None:
            self.num_bytes -= kept.num_bytes
