"""Folders of adapters that come, change and go while the server runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from watchfiles import watch

from turret_adapters.formats.files import CONFIG_NAME, TENSORS_NAME
from turret_server.lifecycle.publishing import AdapterLifecycle

log = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0

# Not every file system tells of its changes, and none of those before one listens.
_LOOK_EVERY_SECONDS = 10.0

# Of each of the two files: inode, size, and when it was last written; None where it is not there.
Signature = tuple[tuple[int, int, int] | None, ...]


class FolderWatch:
    """Serves every folder in `folder` under its name, as it is once it has stayed alike for `SETTLE_SECONDS`.

    What its folders are like when it is made is taken for served. A folder that cannot be served is listed
    as FAILED, or its name keeps what it has, and it is tried again when it changes. While `folder` itself is
    away, everything stays.
    """

    def __init__(
        self,
        folder: Path,
        lifecycle: AdapterLifecycle,
        check_name: Callable[[str], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder.resolve()
        self._lifecycle = lifecycle
        self._check_name = check_name
        self._clock = clock
        self._served = self._signatures() or {}
        self._unsettled: dict[str, tuple[Signature | None, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="turret-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()

    def look(self) -> None:
        """Load what has changed and settled since, and unload what is gone."""
        found = self._signatures()
        if found is None:
            log.warning("%s cannot be listed; its adapters stay as they are", self._folder)
            return
        for name in sorted(found.keys() | self._served.keys() | self._unsettled.keys()):
            signature = found.get(name)
            if self._has_settled(name, signature):
                self._apply(name, signature)

    def _has_settled(self, name: str, signature: Signature | None) -> bool:
        """Whether a folder is not what is served, and stayed alike for long enough."""
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
        del self._unsettled[name]
        if signature is None:
            self._served.pop(name, None)
            self._lifecycle.forget_folder(self._folder / name)
        else:
            self._served[name] = signature
            self._lifecycle.load_folder(self._folder / name, self._check_name)

    def _signatures(self) -> dict[str, Signature] | None:
        try:
            return {path.name: _signature(path) for path in self._folder.iterdir() if path.is_dir()}
        except OSError:
            return None

    def _run(self) -> None:
        looked = -_LOOK_EVERY_SECONDS
        for changes in watch(
            self._folder,
            watch_filter=None,
            debounce=round(SETTLE_SECONDS * 500),
            rust_timeout=round(SETTLE_SECONDS * 500),
            yield_on_timeout=True,
            stop_event=self._stop,
            raise_interrupt=False,
        ):
            if changes or self._unsettled or self._clock() - looked >= _LOOK_EVERY_SECONDS:
                looked = self._clock()
                try:
                    self.look()
                except Exception:
                    log.exception("%s: a look at its adapters failed", self._folder)


def _signature(folder: Path) -> Signature:
    return tuple(_of_file(folder / name) for name in (CONFIG_NAME, TENSORS_NAME))


def _of_file(place: Path) -> tuple[int, int, int] | None:
    try:
        status = place.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
