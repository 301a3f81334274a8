"""Revisions in use: their files are held in the store as long as the registry has them."""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from turret_adapters.errors import AdapterError
from turret_adapters.host import HostAdapter
from turret_adapters.library import AdapterLibrary
from turret_adapters.registry import AdapterRegistry, Lease, Named
from turret_server.engine.loop import Engine
from turret_server.errors import InvalidRequestError
from turret_server.lifecycle.cleanup import CleanupWorker

log = logging.getLogger(__name__)

# Earlier revisions named by requests that stay loaded for the next request.
MAX_RECENT = 64

_BEGINNING = re.compile(r"[0-9a-f]{8,32}")


def check_revision(beginning: str, field: str = "revision") -> str:
    """Return the first digits of a revision if they are long enough to tell it from others.

    Raises:
        InvalidRequestError: they are not, or are no hexadecimal digits.
    """
    if not _BEGINNING.fullmatch(beginning):
        raise InvalidRequestError(
            f"a revision must be given by its first 8 to 32 digits of 0-9 a-f; found {beginning[:40]!r}",
            field=field,
        )
    return beginning


class Revisions:
    """Holds revisions for names and requests, and releases those that nothing needs any more.

    Releasing a lease in the registry changes memory only: the engine drops the revision at once, and the
    clean-up worker releases its files. The other methods wait for the disk: call them from any thread but
    the event loop's.
    """

    def __init__(
        self, *, engine: Engine, registry: AdapterRegistry, library: AdapterLibrary, cleanup: CleanupWorker
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._library = library
        self._cleanup = cleanup
        # Guards that files are held for what the registry has, also for a revision that goes as it comes
        # again.
        self._keeping = threading.Lock()
        # (name, revision) of earlier revisions that requests named, least recently used first; each is held.
        self._recent: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._recent_lock = threading.Lock()
        registry.on_gone = self._on_gone
        registry.on_lost = self._on_lost

    def acquire(self, named: Sequence[Named]) -> Lease:
        """Like the registry's `acquire`; earlier revisions may be given by their first digits and are read if
        needed.

        Raises:
            AdapterError: an adapter or revision is not there, or they do not combine.
        """
        with ExitStack() as held:
            return self._registry.acquire([self._resolve(each, held) for each in named])

    def _resolve(self, named: Named, held: ExitStack) -> Named:
        """The same with its whole revision, which is held."""
        if named.revision is None:
            return named
        revision = self._library.names.find(named.name, named.revision).revision
        self.hold(revision, held)
        if not self._registry.serves(named.name, revision):
            self._remember(named.name, revision)
        return replace(named, revision=revision)

    def _remember(self, name: str, revision: str) -> None:
        """Keep an earlier revision loaded for the next request that names it."""
        with self._recent_lock:
            if (name, revision) not in self._recent and self._registry.hold(revision):
                self._recent[name, revision] = None
            self._recent.move_to_end((name, revision))
            while len(self._recent) > MAX_RECENT:
                (_, oldest), _ = self._recent.popitem(last=False)
                self._registry.unhold(oldest)

    def forget_recent(self, name: str) -> None:
        """Let go of the earlier revisions of a name that now serves something else, or nothing. Changes
        memory only.
        """
        with self._recent_lock:
            for key in [key for key in self._recent if key[0] == name]:
                del self._recent[key]
                self._registry.unhold(key[1])

    def hold(self, revision: str, held: ExitStack) -> None:
        """Have a revision in the registry until `held` is closed; read it if it is not there.

        Raises:
            AdapterError: it cannot be read, or the store has lost it.
        """
        if self._registry.hold(revision):
            held.callback(self._registry.unhold, revision)
        else:
            held.enter_context(self.held(self.read(revision)))

    @contextmanager
    def held(self, adapter: HostAdapter) -> Iterator[None]:
        """Have an adapter's files held in the store, and its tensors in the registry, within the block."""
        revision = adapter.spec.revision
        with self.kept(revision):
            self._registry.add(adapter)
        try:
            yield
        finally:
            self._registry.unhold(revision)

    @contextmanager
    def kept(self, revision: str) -> Iterator[None]:
        """Hold the files of a revision that the block adds to the registry.

        Raises:
            AdapterError: the store has lost it, or cannot hold it; then nothing is held.
        """
        with self._keeping:
            try:
                self._library.keep(revision)
                yield
            except BaseException:
                self._release_later(revision)
                raise

    def read(self, revision: str) -> HostAdapter:
        """Read a revision from the store.

        Raises:
            AdapterError: the store has lost it, or it does not fit.
        """
        adapter = self._library.read(revision)
        self._engine.check_adapter(adapter.spec)
        return adapter

    def _on_gone(self, revision: str) -> None:
        """Nothing needs a revision any more. The registry calls this while it is locked, so that the
        engine drops a revision before it can be published again.
        """
        self._engine.drop(revision)
        self._release_later(revision)

    def _release_later(self, revision: str) -> None:
        self._cleanup.submit(
            f"releasing the files of revision {revision}", partial(self._release_files, revision)
        )

    def _release_files(self, revision: str) -> None:
        with self._keeping:
            if not self._registry.has(revision):
                self._library.let_go(revision)

    def _on_lost(self, revision: str, error: AdapterError) -> None:
        log.error("revision %s is no longer served: %s", revision, error)
        self._cleanup.submit(
            f"forgetting the record of revision {revision}", partial(self._library.forget_record, revision)
        )
