"""An adapter's life: loaded, replaced, unloaded, and served again after a restart.

What a name serves is written down before it is served, so that a process that is killed at any instant comes
back with what it last said.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from turret_adapters.errors import AdapterError, AdapterNotFoundError, OwnerLimitError
from turret_adapters.host import HostAdapter
from turret_adapters.library import AdapterLibrary, without_secrets
from turret_adapters.registry import AdapterRegistry, AdapterStatus, Lease, Named
from turret_adapters.sources.fetch import Download
from turret_adapters.spec import AdapterSpec, Split
from turret_adapters.store.names import NO_OWNER, Ownership, Published
from turret_adapters.store.records import settled_marks_of
from turret_adapters.store.uploads import Upload
from turret_server.engine.loop import Engine
from turret_server.engine.request import DEFAULT_TENANT
from turret_server.errors import QuotaExceededError, TurretError

log = logging.getLogger(__name__)

# How often the log says how far many adapters are.
_PROGRESS_EVERY = 100

# How many earlier revisions that requests named are kept for the next.
MAX_RECENT = 64

# The source of what a client sent.
_UPLOADED = "upload"


class AdapterLifecycle:
    """All methods may be called from any thread."""

    def __init__(
        self,
        *,
        engine: Engine,
        registry: AdapterRegistry,
        library: AdapterLibrary,
        pinned: Collection[str] = (),
    ) -> None:
        """What the `pinned` names serve stays in the arena."""
        self._pinned = frozenset(pinned)
        self._engine = engine
        self._registry = registry
        self._library = library
        # What is written down and what is served change together, in the same order.
        self._publishing = threading.Lock()
        # What is kept in the store is what is needed, and so it is when one goes as it comes again.
        self._keeping = threading.RLock()
        # Names with earlier revisions that requests named lately, the latest last; each is held.
        self._recent: OrderedDict[tuple[str, str], None] = OrderedDict()
        registry.on_gone = self._gone
        registry.on_lost = self._lost

    def load(self, name: str, source: str, owner: Ownership = NO_OWNER, source_marks: str = "") -> None:
        """Bring an adapter from its source and serve it under `name` from now on.

        Raises:
            AdapterError: there is none, or it cannot be served on this base.
            AdapterTooLargeError: the arena could never hold it.
            QuotaExceededError: its owner may not have so much.
        """
        with self._library.fetch(source, name=name) as adapter:
            self._publish(name, adapter, source, owner, source_marks)

    def receive(self, digest: str, config: bytes, size: int, owner: str) -> Upload:
        """Begin an upload or go on with it, see `AdapterStore.receive`.

        Raises:
            AdapterError: it cannot be, or not now.
        """
        return self._library.store.receive(digest, config, size, owner)

    def load_upload(self, name: str, upload: Upload, owner: Ownership = NO_OWNER) -> None:
        """Serve what was uploaded under `name` from now on.

        Raises:
            AdapterError: its bytes are not those that were announced, or it cannot be served on this base.
            AdapterTooLargeError: the arena could never hold it.
            QuotaExceededError: its owner may not have so much.
        """
        with self._library.finish(upload) as adapter:
            self._publish(name, adapter, _UPLOADED, owner)

    def _publish(
        self, name: str, adapter: HostAdapter, source: str, owner: Ownership, source_marks: str = ""
    ) -> None:
        self._engine.check_adapter(adapter.spec, owner.owner)
        with self._publishing:
            self._check_pin(name, adapter.spec)
            try:
                self._library.publish(name, adapter, source, owner, source_marks)
            except OwnerLimitError as error:
                raise QuotaExceededError(str(error), tenant=owner.owner, quota=error.limit) from error
            self._serve(name, adapter, owner.owner)
        log.info(
            "loaded adapter %s, revision %s, from %s", name, adapter.spec.revision, without_secrets(source)
        )

    def interrupt(self) -> None:
        """The server stops: end what is being fetched, at its next bytes."""
        self._library.interrupt()

    def rollback(self, name: str, revision: str | None = None) -> None:
        """Serve the revision before the current one again, or an earlier one that begins with `revision`.

        Raises:
            AdapterError: there is no such name, none such before its current revision, or the store has lost
                it.
        """
        while True:
            target = self._library.names.rollback_target(name, revision)
            adapter = self._read(target.revision)
            with self._publishing:
                if target == self._library.names.rollback_target(name, revision):
                    self._check_pin(name, adapter.spec)
                    self._library.rollback(target)
                    self._serve(name, adapter, target.owner)
                    break
        log.info("rolled adapter %s back to revision %s", name, target.revision)

    def split(self, name: str, revision: str, percent: int) -> None:
        """Make `percent` of a name's requests go to another revision of its history, which begins with
        `revision`; 0 of them ends that.

        Raises:
            AdapterError: there is no such name, or not exactly one such revision besides its current one, or
                the store has lost it.
        """
        with ExitStack() as held:
            if percent:
                revision = self._hold(self._library.names.find(name, revision).revision, held)
            with self._publishing:
                self._registry.split(name, self._library.names.split(name, revision, percent))
        log.info("%d %% of the requests for adapter %s go to revision %s", percent, name, revision or "-")

    def acquire(self, named: Sequence[Named]) -> Lease:
        """As the registry does, with revisions by their beginnings, which may have to be read first.

        Raises:
            AdapterError: an adapter or revision is not there, or they cannot be used like this.
        """
        with ExitStack() as held:
            return self._registry.acquire([self._whole(each, held) for each in named])

    def histories(self, names: Iterable[str]) -> dict[str, list[Published]]:
        """What each name serves and served, the latest first; of one that is not known, nothing."""
        return self._library.names.histories(names)

    def knows(self, name: str) -> bool:
        """Whether a name is served, or is known to be broken."""
        return self._registry.knows(name)

    def downloads(self) -> list[Download]:
        """What is on its way from its source, in the order of the names that it is for."""
        return self._library.downloads.running

    def sources(self) -> dict[str, str]:
        """Where what each name serves came from, as it was written down."""
        return {name: published.source for name, published in self._library.names.current().items()}

    def _whole(self, named: Named, held: ExitStack) -> Named:
        """The same with the whole of its revision, which is held."""
        if named.revision is None:
            return named
        revision = self._library.names.find(named.name, named.revision).revision
        self._hold(revision, held)
        if not self._registry.serves(named.name, revision):
            self._remember(named.name, revision)
        return replace(named, revision=revision)

    def _remember(self, name: str, revision: str) -> None:
        """Keep a revision for the next request that names it: the memory that it takes goes where there is
        need, as with every other.
        """
        with self._keeping:
            if (name, revision) not in self._recent and self._registry.hold(revision):
                self._recent[name, revision] = None
            self._recent.move_to_end((name, revision))
            while len(self._recent) > MAX_RECENT:
                (_, oldest), _ = self._recent.popitem(last=False)
                self._registry.unhold(oldest)

    def _forget_recent(self, name: str) -> None:
        """The name serves something else, or nothing."""
        with self._keeping:
            for key in [key for key in self._recent if key[0] == name]:
                del self._recent[key]
                self._registry.unhold(key[1])

    def _hold(self, revision: str, held: ExitStack) -> str:
        if not self._registry.hold(revision):
            adapter = self._read(revision)
            with self._keeping:
                self._library.keep(revision)
                self._registry.add(adapter)
        held.callback(self._registry.unhold, revision)
        return revision

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
            status = self._forget(name)
        log.info("unloaded adapter %s", name)
        return status

    def _forget(self, name: str) -> AdapterStatus:
        # Written down first: where that fails, the name goes on.
        self._library.names.remove(name)
        status = self._registry.remove(name)
        self._forget_recent(name)
        if name in self._pinned:
            self._engine.pin_adapters(name, ())
        return status

    def start(self, folder: Path | None, check_name: Callable[[str], str]) -> None:
        """Serve what was served before, and every folder in `folder` under its name. One that cannot be
        served is listed as FAILED and stops nothing; one whose folder was taken away is forgotten.
        """
        folder = folder and folder.resolve()
        sources = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()} if folder else {}
        recorded, before = self._library.recorded(), self._library.names.current()
        for name, entry in before.items():
            if name in sources:
                continue
            if folder and Path(entry.source) == folder / name:
                self._library.names.remove(name)
            else:
                self._try(name, partial(self._restore, entry, recorded.get(entry.revision)))
        for number, path in enumerate(sources.values(), 1):
            published = before.get(path.name)
            spec = recorded.get(published.revision) if published else None
            if published and spec and _is_unchanged(path, published):
                self._try(path.name, partial(self._restore, published, spec))
            else:
                self.load_folder(path, check_name)
            if number % _PROGRESS_EVERY == 0 and number < len(sources):
                log.info("loaded %d of %d adapters in %s", number, len(sources), folder)
        for name, split in self._library.names.splits().items():
            self._split_again(name, split)

    def _split_again(self, name: str, split: Split) -> None:
        try:
            with ExitStack() as held:
                self._hold(split.revision, held)
                self._registry.split(name, split)
        except AdapterError as error:
            log.warning("no requests for adapter %s go to revision %s: %s", name, split.revision, error)

    def load_folder(self, folder: Path, check_name: Callable[[str], str]) -> None:
        """Serve a folder under its name. One that cannot be served is listed as FAILED."""
        marks = settled_marks_of(folder)
        self._try(folder.name, lambda: self.load(check_name(folder.name), str(folder), source_marks=marks))

    def forget_folder(self, folder: Path) -> None:
        """Unload the name of a folder that is gone, unless something else was loaded under it since."""
        with self._publishing, suppress(AdapterNotFoundError):
            history = self._library.names.histories([folder.name])[folder.name]
            if not history or Path(history[0].source) == folder:
                self._forget(folder.name)
                log.info("unloaded adapter %s, whose folder is gone", folder.name)

    def _restore(self, published: Published, spec: AdapterSpec | None) -> None:
        """Serve what a name served; one whose spec is known is read once somebody needs it."""
        name, revision = published.name, published.revision
        if spec is None:
            adapter = self._read(revision)
            self._check_pin(name, adapter.spec)
            self._library.save_record(adapter.spec)
            self._serve(name, adapter, published.owner)
        else:
            self._engine.check_adapter(spec)
            self._check_pin(name, spec)
            self._serve(name, spec, published.owner)
        log.info("serving adapter %s, revision %s, as before", name, revision)

    def _try(self, name: str, serve: Callable[[], None]) -> None:
        try:
            serve()
        except (AdapterError, TurretError) as error:
            log.warning("adapter %s is not served: %s", name, error)
            self._registry.fail(name, str(error))
        except Exception as error:
            log.exception("adapter %s is not served", name)
            self._registry.fail(name, f"{type(error).__name__}: {error}")

    def _serve(self, name: str, adapter: HostAdapter | AdapterSpec, owner: str) -> None:
        spec = adapter if isinstance(adapter, AdapterSpec) else adapter.spec
        with self._keeping:
            self._library.keep(spec.revision)
            if isinstance(adapter, AdapterSpec):
                self._registry.publish_unread(name, adapter)
            else:
                self._registry.publish(name, adapter)
        self._forget_recent(name)
        if self._registry.status(name).split and name not in self._library.names.splits():
            self._registry.split(name, None)
        if name in self._pinned:
            self._engine.pin_adapters(name, _resident(spec))
        elif not spec.num_tasks:
            self._engine.prefetch(spec, owner or DEFAULT_TENANT)

    def _lost(self, revision: str, error: AdapterError) -> None:
        log.error("revision %s is served no more: %s", revision, error)
        self._library.forget_record(revision)

    def _check_pin(self, name: str, spec: AdapterSpec) -> None:
        if name in self._pinned:
            self._engine.check_pin_adapters(name, _resident(spec))

    def pin_missing(self) -> list[str]:
        """The pinned names whose adapters are not in the arena; those that are known are brought there."""
        missing = []
        for name in sorted(self._pinned):
            spec = self._registry.status(name).spec if self._registry.knows(name) else None
            if spec is None:
                missing.append(name)
            elif not all(map(self._engine.is_resident, spec.resident_revisions)):
                missing.append(name)
                self._engine.pin_adapters(name, _resident(spec))
        return missing

    def _gone(self, revision: str) -> None:
        """Neither a name nor a request needed it a moment ago."""
        with self._keeping:
            if not self._registry.has(revision):
                self._library.let_go(revision)
                self._engine.drop(revision)


def _resident(spec: AdapterSpec) -> tuple[AdapterSpec, ...]:
    """What of an adapter has pages: itself, or each of its tasks."""
    return tuple(map(spec.of_task, range(spec.num_tasks))) or (spec,)


def _is_unchanged(folder: Path, published: Published) -> bool:
    """Whether a folder holds what was published from it."""
    marks = settled_marks_of(folder)
    return bool(marks) and marks == published.source_marks and Path(published.source) == folder
