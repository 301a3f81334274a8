"""An adapter's life: loaded, replaced, rolled back, unloaded, and served again after a restart.

Each change of a name has one order: hold the files, write the change down, serve it. So an error before
the last step changes nothing, and a process that is killed at any instant comes back with what it last
answered.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import IO

from turret_adapters.errors import AdapterError, AdapterNotFoundError, OwnerLimitError
from turret_adapters.host import HostAdapter
from turret_adapters.library import AdapterLibrary, without_secrets
from turret_adapters.registry import AdapterRegistry, AdapterStatus
from turret_adapters.spec import AdapterSpec, Split
from turret_adapters.store.names import NO_OWNER, Ownership, Published
from turret_adapters.store.records import settled_marks_of
from turret_adapters.store.uploads import Upload
from turret_server.engine.loop import Engine
from turret_server.engine.request import DEFAULT_TENANT
from turret_server.errors import QuotaExceededError, TurretError
from turret_server.lifecycle.cleanup import CleanupWorker
from turret_server.lifecycle.revisions import Revisions
from turret_server.tenancy.tenants import check_name

log = logging.getLogger(__name__)

# How often the log says how far many adapters are.
_PROGRESS_EVERY = 100

_UPLOAD_SOURCE = "upload"


class AdapterLifecycle:
    """Changes what names serve, on disk, in the registry and in the engine.

    Its methods wait for files, locks and SQLite, unless they say otherwise: call them from any thread but
    the event loop's.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        registry: AdapterRegistry,
        library: AdapterLibrary,
        revisions: Revisions,
        cleanup: CleanupWorker,
        pinned: Collection[str] = (),
    ) -> None:
        """The adapters that the names in `pinned` serve stay in the arena."""
        self._pinned = frozenset(pinned)
        self._engine = engine
        self._registry = registry
        self._library = library
        self._revisions = revisions
        self._cleanup = cleanup
        # Names change on disk and in the registry together, in the same order.
        self._publishing = threading.RLock()
        # Names that were loaded because a request named them, least recently used first.
        self._on_demand: OrderedDict[str, None] = OrderedDict()
        self._on_demand_lock = threading.Lock()

    def load(self, name: str, source: str, owner: Ownership = NO_OWNER, source_marks: str = "") -> None:
        """Fetch an adapter from its source and serve it under `name` from now on.

        Raises:
            AdapterError: it is not there, or cannot be served on this base.
            AdapterTooLargeError: it is larger than the arena.
            QuotaExceededError: a quota of its owner is used up.
        """
        with self._library.fetch(source, name=name) as adapter:
            self._publish(name, adapter, source, owner, source_marks)

    def load_on_demand(self, name: str, source: str, max_names: int) -> None:
        """Load a name that a request named, unless it has been loaded meanwhile. Of the names that were
        loaded so and never loaded, uploaded or rolled back explicitly, the least recently used beyond
        `max_names` are unloaded.

        Raises:
            AdapterError, AdapterTooLargeError: as for `load`.
        """
        with self._library.fetch(source, name=name) as adapter, self._publishing:
            if self._registry.knows(name):
                return
            self._publish(name, adapter, source, NO_OWNER)
            with self._on_demand_lock:
                self._on_demand[name] = None
        self._cleanup.run_now(
            "unloading adapters that were loaded on demand", partial(self._unload_least_used, max_names)
        )

    def mark_on_demand(self, source_of: Callable[[str], str]) -> None:
        """After a restart: recognise the names that were loaded on demand by their source and by having no
        owner.
        """
        for name, published in self._library.names.current().items():
            if not published.owner and published.source == without_secrets(source_of(name)):
                with self._on_demand_lock:
                    self._on_demand[name] = None

    def touch(self, name: str) -> None:
        """A request named an adapter. Changes memory only."""
        with self._on_demand_lock:
            if name in self._on_demand:
                self._on_demand.move_to_end(name)

    def _end_on_demand(self, name: str) -> None:
        """A name was changed explicitly: it is not unloaded for others any more."""
        with self._on_demand_lock:
            self._on_demand.pop(name, None)

    def _unload_least_used(self, max_names: int) -> None:
        while True:
            with self._publishing:
                with self._on_demand_lock:
                    if len(self._on_demand) <= max_names:
                        return
                    name = next(iter(self._on_demand))
                with suppress(AdapterNotFoundError):
                    self._unload(name)
            log.info("unloaded adapter %s, the least recently used of those that were loaded on demand", name)

    def load_archive(self, name: str, archive: IO[bytes], owner: Ownership = NO_OWNER) -> None:
        """Serve an adapter from an archive that was uploaded.

        Raises:
            AdapterError: it is no archive of an adapter, or cannot be served on this base.
            AdapterTooLargeError: it is larger than the arena.
            QuotaExceededError: a quota of its owner is used up.
        """
        with self._library.unpack(archive, name) as adapter:
            self._publish(name, adapter, _UPLOAD_SOURCE, owner)

    def load_upload(self, name: str, upload: Upload, owner: Ownership = NO_OWNER) -> None:
        """Serve an upload under `name` from now on.

        Raises:
            AdapterError: the bytes do not have the announced digest, or cannot be served on this base.
            AdapterTooLargeError: it is larger than the arena.
            QuotaExceededError: a quota of its owner is used up.
        """
        with self._library.finish(upload) as adapter:
            self._publish(name, adapter, _UPLOAD_SOURCE, owner)

    def _publish(
        self, name: str, adapter: HostAdapter, source: str, owner: Ownership, source_marks: str = ""
    ) -> None:
        self._engine.check_adapter(adapter.spec, owner.owner)
        with self._publishing, self._revisions.held(adapter):
            self._check_pin(name, adapter.spec)
            try:
                self._library.publish(name, adapter, source, owner, source_marks)
            except OwnerLimitError as error:
                raise QuotaExceededError(str(error), tenant=owner.owner, quota=error.limit) from error
            self._serve(name, adapter.spec, owner.owner)
            self._end_on_demand(name)
        revision = adapter.spec.revision
        log.info("loaded adapter %s, revision %s, from %s", name, revision, without_secrets(source))

    def interrupt(self) -> None:
        """End running fetches at their next bytes: the server stops."""
        self._library.interrupt()

    def rollback(self, name: str, revision: str | None = None) -> None:
        """Serve the revision before the current one again, or an earlier one that begins with `revision`.

        Raises:
            AdapterError: there is no such name or no such earlier revision, or the store has lost it.
        """
        while True:
            target = self._library.names.rollback_target(name, revision)
            adapter = self._revisions.read(target.revision)
            with self._publishing, self._revisions.held(adapter):
                if target == self._library.names.rollback_target(name, revision):
                    self._check_pin(name, adapter.spec)
                    self._library.rollback(target)
                    self._serve(name, adapter.spec, target.owner)
                    self._end_on_demand(name)
                    break
        log.info("rolled adapter %s back to revision %s", name, target.revision)

    def split(self, name: str, revision: str, percent: int) -> None:
        """Route `percent` of a name's requests to another revision of its history, which begins with
        `revision`; 0 ends the split.

        Raises:
            AdapterError: there is no such name, not exactly one such revision besides the current one, or
                the store has lost it.
        """
        with ExitStack() as held:
            if percent:
                revision = self._library.names.find(name, revision).revision
                self._revisions.hold(revision, held)
            with self._publishing:
                self._registry.split(name, self._library.names.split(name, revision, percent))
                self._end_on_demand(name)
        log.info("%d %% of the requests for adapter %s go to revision %s", percent, name, revision or "-")

    def unload(self, name: str) -> AdapterStatus:
        """Take a name away from new requests. Returns its last status.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        status = self._unload(name)
        log.info("unloaded adapter %s", name)
        return status

    def _unload(self, name: str) -> AdapterStatus:
        with self._publishing:
            self._library.names.remove(name)
            self._revisions.forget_recent(name)
            self._end_on_demand(name)
            status = self._registry.remove(name)
            if name in self._pinned:
                self._engine.pin_adapters(name, ())
        return status

    def start(self, folder: Path | None) -> None:
        """Serve what was served before, and every folder in `folder` under its name. An adapter that fails
        is listed as FAILED and stops no other; a name whose folder was deleted is forgotten.
        """
        folder = folder and folder.resolve()
        sources = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()} if folder else {}
        recorded, before = self._library.recorded(), self._library.names.current()
        for name, published in before.items():
            if name in sources:
                continue
            if folder and Path(published.source) == folder / name:
                self._library.names.remove(name)
            else:
                self._try(name, partial(self._restore, published, recorded.get(published.revision)))
        for number, path in enumerate(sources.values(), 1):
            current = before.get(path.name)
            spec = recorded.get(current.revision) if current else None
            if current and spec and _is_unchanged(path, current):
                self._try(path.name, partial(self._restore, current, spec))
            else:
                self.load_folder(path)
            if number % _PROGRESS_EVERY == 0 and number < len(sources):
                log.info("loaded %d of %d adapters in %s", number, len(sources), folder)
        for name, split in self._library.names.splits().items():
            self._restore_split(name, split)

    def _restore_split(self, name: str, split: Split) -> None:
        try:
            with ExitStack() as held:
                self._revisions.hold(split.revision, held)
                self._registry.split(name, split)
        except AdapterError as error:
            log.warning(
                "the traffic split of adapter %s to revision %s has ended: %s", name, split.revision, error
            )

    def load_folder(self, folder: Path) -> None:
        """Serve a folder under its name. A folder that fails is listed as FAILED."""
        marks = settled_marks_of(folder)
        self._try(folder.name, lambda: self.load(check_name(folder.name), str(folder), source_marks=marks))

    def forget_folder(self, folder: Path) -> None:
        """Unload the name of a deleted folder, unless something else was loaded under it since."""
        with self._publishing, suppress(AdapterNotFoundError):
            history = self._library.names.histories([folder.name])[folder.name]
            if not history or Path(history[0].source) == folder:
                self._unload(folder.name)
                log.info("unloaded adapter %s, whose folder was deleted", folder.name)

    def _restore(self, published: Published, spec: AdapterSpec | None) -> None:
        """Serve what a name served. With a recorded spec, the tensors are read when they are first needed."""
        name, revision = published.name, published.revision
        if spec is None:
            adapter = self._revisions.read(revision)
            self._check_pin(name, adapter.spec)
            with self._revisions.held(adapter):
                self._library.save_record(adapter.spec)
                self._serve(name, adapter.spec, published.owner)
        else:
            self._engine.check_adapter(spec)
            self._check_pin(name, spec)
            with self._revisions.kept(revision):
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

    def _serve(self, name: str, spec: AdapterSpec, owner: str) -> None:
        """Serve a revision whose files are held and whose change is written down."""
        self._registry.publish_unread(name, spec)
        self._revisions.forget_recent(name)
        if name in self._pinned:
            self._engine.pin_adapters(name, _residents(spec))
        elif not spec.num_tasks:
            self._engine.prefetch(spec, owner or DEFAULT_TENANT)
        if self._registry.status(name).split:
            self._cleanup.run_now(f"ending the traffic split of {name}", partial(self._end_split, name))

    def _end_split(self, name: str) -> None:
        """End a split in the registry that has ended on disk."""
        with self._publishing, suppress(AdapterNotFoundError):
            if name not in self._library.names.splits():
                self._registry.split(name, None)

    def _check_pin(self, name: str, spec: AdapterSpec) -> None:
        if name in self._pinned:
            self._engine.check_pin_adapters(name, _residents(spec))

    def missing_pins(self) -> list[str]:
        """The pinned names whose adapters are not in the arena yet; those that are loaded are copied
        there.
        """
        missing = [name for name in sorted(self._pinned) if not self._is_resident(name)]
        for name in missing:
            # An unload meanwhile must not be undone.
            with self._publishing:
                if spec := self._served_spec(name):
                    self._engine.pin_adapters(name, _residents(spec))
        return missing

    def _is_resident(self, name: str) -> bool:
        spec = self._served_spec(name)
        return spec is not None and all(map(self._engine.is_resident, spec.resident_revisions))

    def _served_spec(self, name: str) -> AdapterSpec | None:
        try:
            status = self._registry.status(name)
        except AdapterNotFoundError:
            return None
        return None if status.unloaded else status.spec


def _residents(spec: AdapterSpec) -> tuple[AdapterSpec, ...]:
    """What of an adapter has pages: itself, or each of its tasks."""
    return tuple(map(spec.of_task, range(spec.num_tasks))) or (spec,)


def _is_unchanged(folder: Path, published: Published) -> bool:
    """Whether a folder holds what was published from it."""
    marks = settled_marks_of(folder)
    return bool(marks) and marks == published.source_marks and Path(published.source) == folder
