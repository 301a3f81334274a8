"""Names, their revisions, and who still needs which.

A name points at one revision. Loading under a name that is in use makes it point at the new revision at
once; requests keep the one that they began with, and a revision that no name and no request needs is gone.
Nothing is ever changed in place.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from turret_adapters.errors import AdapterNotFoundError
from turret_adapters.peft import HostAdapter
from turret_adapters.spec import AdapterSpec


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

    def acquire(self, name: str) -> AdapterSpec:
        """The name's revision, which stays until it is released as often as it was acquired.

        Raises:
            AdapterNotFoundError: there is no such name, or it could not be loaded.
        """
        with self._lock:
            entry = self._entry(name)
            if entry.current is None:
                raise self._not_found(name, entry.error)
            entry.requests[entry.current.revision] += 1
            return entry.current

    def release(self, name: str, spec: AdapterSpec) -> None:
        with self._lock:
            entry = self._names[name]
            entry.requests[spec.revision] -= 1
            assert entry.requests[spec.revision] >= 0, f"{name} was released more often than acquired"
            if entry.requests[spec.revision]:
                return
            del entry.requests[spec.revision]
            gone = self._collect() if entry.current != spec else []
        self._tell(gone)

    def tensors(self, revision: str) -> HostAdapter:
        """The tensors of a revision that a name or a request needs."""
        with self._lock:
            return self._tensors[revision]

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
        for revision in gone:
            del self._tensors[revision]
        return sorted(gone)

    def _tell(self, gone: list[str]) -> None:
        for revision in gone:
            self.on_gone(revision)
