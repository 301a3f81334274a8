"""Names, their revisions, and who still needs which.

A name points at one revision. Loading under a name that is in use makes it point at the new revision at
once; requests keep the one that they began with, and a revision that no name and no request needs is gone.
Nothing is ever changed in place.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from turret_adapters.compose import check_composition, join_prefixes
from turret_adapters.errors import AdapterNotFoundError, AdapterTaskError
from turret_adapters.host import HostAdapter
from turret_adapters.spec import TASK_MARK, AdapterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStatus:
    """What there is to say of a name. `spec` is None where `error` says why it could not be loaded;
    `unloaded` names live on while requests run on them.
    """

    name: str
    spec: AdapterSpec | None
    active_requests: int = 0
    draining_revisions: tuple[str, ...] = ()
    unloaded: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Named:
    """An adapter as a request names it: how much its LoRA counts, and which of its tasks."""

    name: str
    weight: float = 1.0
    task: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What one request runs on: `uses`, each with its weight, of which one at most has virtual tokens.

    `pins` are the names with the revisions that they had then, `joined` the revision of several prefixes in
    one. `revision` says what was named, in order.
    """

    pins: tuple[tuple[str, AdapterSpec], ...]
    joined: str | None
    uses: tuple[tuple[AdapterSpec, float], ...]
    revision: str


@dataclass(slots=True)
class _Name:
    current: AdapterSpec | None = None
    error: str = ""
    requests: Counter[str] = field(default_factory=Counter)


class AdapterRegistry:
    """All methods may be called from any thread. `on_gone` is told each revision that nothing needs any
    more, on the thread that gave it up; whoever keeps copies elsewhere sets it before the first `publish`.
    """

    def __init__(self) -> None:
        self.on_gone: Callable[[str], None] = lambda _: None
        self._lock = threading.Lock()
        self._names: dict[str, _Name] = {}
        self._tensors: dict[str, HostAdapter] = {}
        self._joined: dict[str, HostAdapter] = {}
        self._num_joined: Counter[str] = Counter()

    def publish(self, name: str, adapter: HostAdapter) -> None:
        """Make `name` point at this revision from now on."""
        spec = adapter.spec
        with self._lock:
            self._tensors.setdefault(spec.revision, adapter)
            entry = self._names.setdefault(name, _Name())
            entry.current, entry.error = spec, ""
            gone = self._collect()
        self._tell(gone)

    def fail(self, name: str, error: str) -> None:
        """Record why there is no adapter of this name; a name that has one keeps it."""
        with self._lock:
            entry = self._names.setdefault(name, _Name())
            if entry.current is None:
                entry.error = error

    def remove(self, name: str) -> AdapterStatus:
        """Take the name away from new requests, and say what it was.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._lock:
            entry = self._entry(name)
            if entry.current is None and not entry.error:
                raise self._not_found(name)
            current, entry.current, entry.error = entry.current, None, ""
            status = AdapterStatus(
                name=name,
                spec=current,
                active_requests=entry.requests[current.revision] if current else 0,
                draining_revisions=tuple(sorted(entry.requests)),
                unloaded=True,
            )
            gone = self._collect()
        self._tell(gone)
        return status

    def acquire(self, named: Sequence[Named]) -> Lease:
        """What a request that names these adapters runs on; it stays until the lease is released.

        Raises:
            AdapterNotFoundError: there is no such name, or it could not be loaded.
            AdapterTaskError: a task is missing, or not one of the adapter's.
            AdapterCompositionError: they cannot be in one request.
        """
        with self._lock:
            wholes = [self._loaded(each.name) for each in named]
            parts = [
                _of_task(each, self._tensors[whole.revision])
                for each, whole in zip(named, wholes, strict=True)
            ]
            uses = [(part.spec, each.weight) for each, part in zip(named, parts, strict=True)]
            check_composition([(each.name, *use) for each, use in zip(named, uses, strict=True)])
            prefixes = [part for part in parts if part.spec.prefix]
            joined = join_prefixes(prefixes) if len(prefixes) > 1 else None
            if joined:
                self._joined[joined.spec.revision] = joined
                self._num_joined[joined.spec.revision] += 1
                uses = [use for use in uses if not use[0].prefix] + [(joined.spec, 1.0)]
            for each, whole in zip(named, wholes, strict=True):
                self._names[each.name].requests[whole.revision] += 1
        return Lease(
            pins=tuple((each.name, whole) for each, whole in zip(named, wholes, strict=True)),
            joined=joined.spec.revision if joined else None,
            uses=tuple(uses),
            revision="+".join(part.spec.revision for part in parts),
        )

    def release(self, lease: Lease) -> None:
        gone: list[str] = []
        with self._lock:
            for name, spec in lease.pins:
                gone += self._unpin(name, spec)
            if lease.joined:
                gone += self._unjoin(lease.joined)
        self._tell(gone)

    def _unpin(self, name: str, spec: AdapterSpec) -> list[str]:
        entry = self._names[name]
        entry.requests[spec.revision] -= 1
        assert entry.requests[spec.revision] >= 0, f"{name} was released more often than acquired"
        if entry.requests[spec.revision]:
            return []
        del entry.requests[spec.revision]
        return self._collect() if entry.current != spec else []

    def _unjoin(self, revision: str) -> list[str]:
        self._num_joined[revision] -= 1
        if self._num_joined[revision]:
            return []
        del self._num_joined[revision], self._joined[revision]
        return [revision]

    def _loaded(self, name: str) -> AdapterSpec:
        entry = self._entry(name)
        if entry.current is None:
            raise self._not_found(name, entry.error)
        return entry.current

    def tensors(self, revision: str) -> HostAdapter:
        """The tensors of a revision, or of a task of one, that a name or a request needs."""
        with self._lock:
            return self._find(revision)

    def _find(self, revision: str) -> HostAdapter:
        if revision in self._joined:
            return self._joined[revision]
        whole, _, task = revision.partition(TASK_MARK)
        return self._tensors[whole].tasks[int(task)] if task else self._tensors[whole]

    def status(self, name: str) -> AdapterStatus:
        """What there is to say of one name.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._lock:
            return self._status(name, self._entry(name))

    def statuses(self) -> list[AdapterStatus]:
        """Every name in order, those that only drain included."""
        with self._lock:
            return [self._status(name, entry) for name, entry in sorted(self._names.items())]

    def _status(self, name: str, entry: _Name) -> AdapterStatus:
        current = entry.current
        draining = sorted(entry.requests.keys() - {current.revision if current else None})
        shown = current or (self._tensors[draining[-1]].spec if draining else None)
        return AdapterStatus(
            name=name,
            spec=shown,
            active_requests=entry.requests[shown.revision] if shown else 0,
            draining_revisions=tuple(draining),
            unloaded=current is None and not entry.error,
            error=entry.error,
        )

    def _entry(self, name: str) -> _Name:
        entry = self._names.get(name)
        if entry is None:
            raise self._not_found(name)
        return entry

    def _not_found(self, name: str, error: str = "") -> AdapterNotFoundError:
        if error:
            return AdapterNotFoundError(f"adapter {name!r} could not be loaded: {error}")
        return AdapterNotFoundError(f"no adapter is loaded under the name {name!r}")

    def _collect(self) -> list[str]:
        """Forget what nothing needs: names without revision, error and requests; revisions without both."""
        for name, entry in list(self._names.items()):
            if entry.current is None and not entry.error and not entry.requests:
                del self._names[name]
        needed = {entry.current.revision for entry in self._names.values() if entry.current}
        needed.update(revision for entry in self._names.values() for revision in entry.requests)
        gone = self._tensors.keys() - needed
        of_tasks = [task.spec.revision for revision in gone for task in self._tensors[revision].tasks]
        for revision in gone:
            del self._tensors[revision]
        return sorted([*gone, *of_tasks])

    def _tell(self, gone: list[str]) -> None:
        for revision in gone:
            self.on_gone(revision)


def _of_task(named: Named, adapter: HostAdapter) -> HostAdapter:
    num_tasks = adapter.spec.num_tasks
    if not num_tasks and named.task is None:
        return adapter
    if not num_tasks:
        raise AdapterTaskError(f"adapter {named.name!r} has no tasks; name it without one")
    if named.task is None or not 0 <= named.task < num_tasks:
        found = "none" if named.task is None else named.task
        raise AdapterTaskError(f"adapter {named.name!r} has the tasks 0 to {num_tasks - 1}; found {found}")
    return adapter.tasks[named.task]
