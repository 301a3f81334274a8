"""What is on its way from its source to the store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from turret_adapters.sources.intake import Progress


@dataclass(frozen=True, slots=True)
class Download:
    """For which name, how many bytes have come, and of how many; None while nobody knows."""

    name: str
    num_done: int = 0
    num_total: int | None = None


class Downloads:
    """Counts them and their bytes. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[object, Download] = {}
        self.num_bytes = 0

    @property
    def running(self) -> list[Download]:
        """In the order of their names."""
        with self._lock:
            return sorted(self._running.values(), key=lambda download: download.name)

    @contextmanager
    def one(self, name: str, progress: Progress) -> Iterator[Progress]:
        """Counts one that runs in the block. What is yielded is to be told its progress, and hands it on."""
        key, most = object(), 0

        def told(done: int, total: int | None) -> None:
            nonlocal most
            # What came in an archive is told again as it is unpacked.
            if done > most:
                with self._lock:
                    self.num_bytes += done - most
                    self._running[key] = replace(self._running[key], num_done=done, num_total=total)
                most = done
            progress(done, total)

        with self._lock:
            self._running[key] = Download(name)
        try:
            yield told
        finally:
            with self._lock:
                del self._running[key]
