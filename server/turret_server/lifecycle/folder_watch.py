"""A folder of adapters that is watched: subfolders are loaded, replaced and unloaded while the server
runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from watchfiles import watch

from turret_adapters.formats.files import CONFIG_NAME, OPTIONAL_FILES, TENSORS_NAME
from turret_server.lifecycle.publishing import AdapterLifecycle

log = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0

# Not every file system reports changes, and none reports those before the watch began.
_SCAN_SECONDS = 10.0

# For each of an adapter's two files: inode, size and time of the last change; None where there is no file.
Signature = tuple[tuple[int, int, int] | None, ...]


class FolderWatch:
    """Serves every subfolder of `folder` under its name once its files have not changed for `SETTLE_SECONDS`.

    The subfolders at construction count as served. One that cannot be served is listed as FAILED, or its
    name keeps its revision, and it is tried again after its next change. While `folder` itself is missing,
    nothing changes.
    """

    def __init__(
        self, folder: Path, lifecycle: AdapterLifecycle, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder.resolve()
        self._lifecycle = lifecycle
        self._clock = clock
        self._served = self._signatures() or {}
        # The last signature that differs from the served one, and since when; None for a deleted folder.
        self._unsettled: dict[str, tuple[Signature | None, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="turret-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()

    def scan(self) -> None:
        """Load what has changed and settled, and unload what was deleted."""
        found = self._signatures()
        if found is None:
            log.warning("%s cannot be listed; its adapters stay as they are", self._folder)
            return
        for name in sorted(found.keys() | self._served.keys() | self._unsettled.keys()):
            signature = found.get(name)
            if self._has_settled(name, signature):
                self._apply(name, signature)

    def _has_settled(self, name: str, signature: Signature | None) -> bool:
        """Whether a subfolder differs from what is served, and has not changed for long enough."""
        if signature == self._served.get(name):
            self._unsettled.pop(name, None)
            return False
        now = self._clock()
        before, since = self._unsettled.get(name, (None, now))
        if name not in self._unsettled or before != signature:
            self._unsettled[name] = (signature, now)
            return False
        return now - since >= SETTLE_SECONDS

    def _apply(self, name: str, signature: Signature | None) -> None:
        if signature is None:
            self._lifecycle.forget_folder(self._folder / name)
            self._served.pop(name, None)
        else:
            self._served[name] = signature
            self._lifecycle.load_folder(self._folder / name)
        del self._unsettled[name]

    def _signatures(self) -> dict[str, Signature] | None:
        try:
            return {path.name: _signature(path) for path in self._folder.iterdir() if path.is_dir()}
        except OSError:
            return None

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._watch()
            except Exception:
                log.exception("%s: watching failed; retrying in %g s", self._folder, _SCAN_SECONDS)
                self._stop.wait(_SCAN_SECONDS)

    def _watch(self) -> None:
        scanned = self._clock() - _SCAN_SECONDS
        for changes in watch(
            self._folder,
            watch_filter=None,
            debounce=round(SETTLE_SECONDS * 500),
            rust_timeout=round(SETTLE_SECONDS * 500),
            yield_on_timeout=True,
            stop_event=self._stop,
        ):
            if changes or self._unsettled or self._clock() - scanned >= _SCAN_SECONDS:
                scanned = self._clock()
                self.scan()


def _signature(folder: Path) -> Signature:
    return tuple(_file_signature(folder / name) for name in (CONFIG_NAME, TENSORS_NAME, *OPTIONAL_FILES))


def _file_signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
