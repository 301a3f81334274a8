"""An adapter's life: loaded, replaced, unloaded, and served again after a restart.

What a name serves is written down before it is served, so that a process that is killed at any instant comes
back with what it last said.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from turret_adapters.errors import AdapterError
from turret_adapters.host import HostAdapter
from turret_adapters.library import AdapterLibrary, as_recorded
from turret_adapters.names import Published
from turret_adapters.registry import AdapterRegistry, AdapterStatus, Lease, Named
from turret_server.engine.loop import Engine
from turret_server.errors import TurretError

log = logging.getLogger(__name__)

# How often the log says how far many adapters are.
_PROGRESS_EVERY = 100


class AdapterLifecycle:
    """All methods may be called from any thread."""

    def __init__(self, *, engine: Engine, registry: AdapterRegistry, library: AdapterLibrary) -> None:
        self._engine = engine
        self._registry = registry
        self._library = library
        # What is written down and what is served change together, in the same order.
        self._publishing = threading.Lock()
        # What is kept in the store is what is needed, and so it is when one goes as it comes again.
        self._keeping = threading.RLock()
        registry.on_gone = self._gone

    def load(self, name: str, source: str) -> None:
        """Bring an adapter from its source and serve it under `name` from now on.

        Raises:
            AdapterError: there is none, or it cannot be served on this base.
            AdapterTooLargeError: the arena could never hold it.
        """
        with self._library.fetch(source) as adapter:
            self._engine.check_adapter(adapter.spec)
            with self._publishing:
                self._library.publish(name, adapter.spec.revision, source)
                self._serve(name, adapter)
        log.info("loaded adapter %s, revision %s, from %s", name, adapter.spec.revision, as_recorded(source))

    def rollback(self, name: str, revision: str | None = None) -> None:
        """Serve the revision before the current one again, or an earlier one that begins with `revision`.

        Raises:
            AdapterError: there is no such name, none such before its current revision, or the store has lost
                it.
        """
        while True:
            target = self._library.rollback_target(name, revision)
            adapter = self._read(target.revision)
            with self._publishing:
                if target == self._library.rollback_target(name, revision):
                    self._library.rollback(target)
                    self._serve(name, adapter)
                    break
        log.info("rolled adapter %s back to revision %s", name, target.revision)

    def acquire(self, named: Sequence[Named]) -> Lease:
        """As the registry does, with revisions by their beginnings, which may have to be read first.

        Raises:
            AdapterError: an adapter or revision is not there, or they cannot be used like this.
        """
        with ExitStack() as held:
            return self._registry.acquire([self._whole(each, held) for each in named])

    def histories(self, names: Iterable[str]) -> dict[str, list[Published]]:
        """What each name serves and served, the latest first; of one that is not known, nothing."""
        return self._library.histories(names)

    def _whole(self, named: Named, held: ExitStack) -> Named:
        """The same with the whole of its revision, which is held."""
        if named.revision is None:
            return named
        revision = self._library.find(named.name, named.revision).revision
        if not self._registry.hold(revision):
            adapter = self._read(revision)
            with self._keeping:
                self._library.keep(revision)
                self._registry.add(adapter)
        held.callback(self._registry.unhold, revision)
        return replace(named, revision=revision)

    def _read(self, revision: str) -> HostAdapter:
        adapter = self._library.read(revision)
        self._engine.check_adapter(adapter.spec)
        return adapter

    def unload(self, name: str) -> AdapterStatus:
        """Take a name away from new requests, and say what it was.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._publishing:
            status = self._registry.remove(name)
            self._library.forget(name)
        log.info("unloaded adapter %s", name)
        return status

    def start(self, folder: Path | None, check_name: Callable[[str], str]) -> None:
        """Serve what was served before, and every folder in `folder` under its name. One that cannot be
        served is listed as FAILED and stops nothing; one whose folder was taken away is forgotten.
        """
        folder = folder and folder.resolve()
        sources = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()} if folder else {}
        before = {name: entry for name, entry in self._library.names().items() if name not in sources}
        for name, entry in before.items():
            if folder and Path(entry.source) == folder / name:
                self._library.forget(name)
            else:
                self._try(name, partial(self._restore, name, entry.revision))
        for number, (name, path) in enumerate(sources.items(), 1):
            self._try(name, partial(self._load_checked, check_name, name, path))
            if number % _PROGRESS_EVERY == 0 and number < len(sources):
                log.info("loaded %d of %d adapters in %s", number, len(sources), folder)

    def _load_checked(self, check_name: Callable[[str], str], name: str, path: Path) -> None:
        self.load(check_name(name), str(path))

    def _restore(self, name: str, revision: str) -> None:
        self._serve(name, self._read(revision))
        log.info("serving adapter %s, revision %s, as before", name, revision)

    def _try(self, name: str, serve: Callable[[], None]) -> None:
        try:
            serve()
        except (AdapterError, TurretError) as error:
            log.warning("adapter %s is not served: %s", name, error)
            self._registry.fail(name, str(error))

    def _serve(self, name: str, adapter: HostAdapter) -> None:
        with self._keeping:
            self._library.keep(adapter.spec.revision)
            self._registry.publish(name, adapter)
        if not adapter.tasks:
            self._engine.prefetch(adapter.spec)

    def _gone(self, revision: str) -> None:
        """Neither a name nor a request needed it a moment ago."""
        with self._keeping:
            if not self._registry.has(revision):
                self._library.let_go(revision)
                self._engine.drop(revision)
