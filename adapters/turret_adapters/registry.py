"""The names that are served, their revisions, and leases on them.

A name points at one revision. Publishing a new revision changes the name at once; in-flight requests finish
on theirs. A revision that neither a name nor a request needs is dropped. Nothing is changed in place.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from turret_adapters.errors import (
    AdapterBaseError,
    AdapterCompositionError,
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterTaskError,
    RevisionCorruptError,
    RevisionNotFoundError,
)
from turret_adapters.host import HostAdapter, join_prefixes, joined_spec
from turret_adapters.host_memory import HostMemory
from turret_adapters.spec import TASK_MARK, AdapterSpec, Part, Split

# Errors of reading a revision that a retry does not fix.
_LOST = (AdapterBaseError, AdapterFormatError, RevisionCorruptError, RevisionNotFoundError)
_LORA = {Part.LORA_A, Part.LORA_B}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStatus:
    """The state of a name. `spec` is None if it is not loaded, then `error` says why; `unloaded` names stay
    while requests run on them; `split` is the other revision that requests use.
    """

    name: str
    spec: AdapterSpec | None
    active_requests: int = 0
    draining_revisions: tuple[str, ...] = ()
    unloaded: bool = False
    error: str = ""
    split: Split | None = None


@dataclass(frozen=True, slots=True)
class Named:
    """An adapter as a request names it: the weight of its LoRA, its task, and its revision (None: the name's
    current one). `place` in [0, 1) orders the requests of the name: those below the percentage of a split use
    its revision.
    """

    name: str
    weight: float = 1.0
    task: int | None = None
    revision: str | None = None
    place: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The adapters of one request: `uses`, each with its weight; at most one of them has virtual tokens.

    `pins` are the names with their revisions, `joined` is the revision of prefixes that were joined to one.
    `revision` lists the revisions in the order of the request.
    """

    pins: tuple[tuple[str, AdapterSpec], ...]
    joined: str | None
    uses: tuple[tuple[AdapterSpec, float], ...]
    revision: str


@dataclass(slots=True)
class _Name:
    current: AdapterSpec | None = None
    split: Split | None = None
    error: str = ""
    requests: Counter[str] = field(default_factory=Counter)

    @property
    def served(self) -> set[str]:
        """The revisions for requests that do not name one."""
        served = {self.current.revision} if self.current else set()
        return served | {self.split.revision} if self.split else served


@dataclass(slots=True)
class _Joined:
    """Prefixes joined to one, for `num_requests` requests that name them together."""

    parts: tuple[str, ...]
    num_requests: int = 0


class AdapterRegistry:
    """Thread-safe. The tensors are in `memory`.

    Set the callbacks before the first `publish`. `on_gone` gets each revision that is dropped, and
    `on_change` the state of a name after each change, both in the order of the changes. They run under the
    registry's lock, so they must not block and not call the registry. `on_lost` gets each revision whose
    files turned out changed or unreadable, and the error.
    """

    def __init__(self, memory: HostMemory | None = None) -> None:
        self.on_gone: Callable[[str], None] = lambda _: None
        self.on_lost: Callable[[str, AdapterError], None] = lambda *_: None
        self.on_change: Callable[[AdapterStatus], None] = lambda _: None
        self._memory = HostMemory() if memory is None else memory
        self._lock = threading.Lock()
        self._names: dict[str, _Name] = {}
        self._specs: dict[str, AdapterSpec] = {}
        # The number of names, requests and holds that need a revision.
        self._needed: Counter[str] = Counter()
        self._joined: dict[str, _Joined] = {}

    def publish(self, name: str, adapter: HostAdapter) -> None:
        """Makes `name` point at the adapter's revision."""
        adapter = self._memory.prepare(adapter)
        with self._lock:
            self._memory.put(adapter)
            self._point(name, adapter.spec)

    def publish_unread(self, name: str, spec: AdapterSpec) -> None:
        """`publish` for a revision whose tensors are read when they are needed. If they contradict the spec,
        the name fails then.
        """
        with self._lock:
            self._memory.know(spec)
            self._point(name, spec)

    def _point(self, name: str, spec: AdapterSpec) -> None:
        self._specs[spec.revision] = spec
        self._needed[spec.revision] += 1
        entry = self._names.setdefault(name, _Name())
        replaced, entry.current, entry.error = entry.current, spec, ""
        if replaced:
            self._let_go(replaced.revision)
        self.on_change(self._status(name, entry))

    def add(self, adapter: HostAdapter) -> None:
        """Adds a revision without a name, and holds it until `unhold`."""
        revision = adapter.spec.revision
        adapter = self._memory.prepare(adapter)
        with self._lock:
            self._memory.put(adapter)
            self._specs[revision] = adapter.spec
            self._needed[revision] += 1

    def hold(self, revision: str) -> bool:
        """Holds a revision until `unhold`; False if the registry does not have it."""
        with self._lock:
            if revision not in self._specs:
                return False
            self._needed[revision] += 1
            return True

    def unhold(self, revision: str) -> None:
        """Undoes one `add` or `hold`."""
        with self._lock:
            self._let_go(revision)

    def serves(self, name: str, revision: str) -> bool:
        """Whether a request that names no revision may use this one."""
        with self._lock:
            entry = self._names.get(name)
            return entry is not None and revision in entry.served

    def knows(self, name: str) -> bool:
        """Whether a name has a revision, or an error instead."""
        with self._lock:
            entry = self._names.get(name)
            return entry is not None and (entry.current is not None or bool(entry.error))

    def has(self, revision: str) -> bool:
        """Whether a revision, a task's revision or a joined one is needed."""
        with self._lock:
            return revision in self._joined or revision.partition(TASK_MARK)[0] in self._specs

    def split(self, name: str, split: Split | None) -> None:
        """Starts a split of a name, to a revision that the caller holds, or ends it with None."""
        with self._lock:
            entry = self._entry(name)
            if split:
                self._needed[split.revision] += 1
            self._end_split(entry)
            entry.split = split
            self.on_change(self._status(name, entry))

    def _end_split(self, entry: _Name) -> None:
        split, entry.split = entry.split, None
        if split:
            self._let_go(split.revision)

    def fail(self, name: str, error: str) -> None:
        """Sets the error of a name; a name with a revision keeps it instead."""
        with self._lock:
            entry = self._names.setdefault(name, _Name())
            if entry.current is None:
                entry.error = error
                self.on_change(self._status(name, entry))

    def remove(self, name: str) -> AdapterStatus:
        """Removes a name for new requests, and returns its last state.

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
            self._end_split(entry)
            if current:
                self._let_go(current.revision)
            self._tidy(name)
            self.on_change(self._status(name, entry) if name in self._names else status)
        return status

    def acquire(self, named: Sequence[Named]) -> Lease:
        """Leases the adapters of a request until `release`. A revision that `named` contains must be held by
        the caller.

        Raises:
            AdapterNotFoundError: there is no such name, or it could not be loaded.
            AdapterTaskError: a task is missing or out of range.
            AdapterCompositionError: the adapters do not work together in one request.
        """
        with self._lock:
            wholes = [self._whole(each) for each in named]
            parts = [_of_task(each, whole) for each, whole in zip(named, wholes, strict=True)]
            uses = [(part, each.weight) for each, part in zip(named, parts, strict=True)]
            check_composition([(each.name, *use) for each, use in zip(named, uses, strict=True)])
            prefixes = [part for part in parts if part.prefix]
            joined = joined_spec(prefixes) if len(prefixes) > 1 else None
            if joined:
                recipe = _Joined(tuple(prefix.revision for prefix in prefixes))
                self._joined.setdefault(joined.revision, recipe).num_requests += 1
                uses = [use for use in uses if not use[0].prefix] + [(joined, 1.0)]
            for each, whole in zip(named, wholes, strict=True):
                self._names[each.name].requests[whole.revision] += 1
                self._needed[whole.revision] += 1
        return Lease(
            pins=tuple((each.name, whole) for each, whole in zip(named, wholes, strict=True)),
            joined=joined.revision if joined else None,
            uses=tuple(uses),
            revision="+".join(part.revision for part in parts),
        )

    def release(self, lease: Lease) -> None:
        """Ends a lease, once. Changes memory only."""
        with self._lock:
            for name, spec in lease.pins:
                self._unpin(name, spec)
            if lease.joined:
                self._unjoin(lease.joined)

    def _unpin(self, name: str, spec: AdapterSpec) -> None:
        entry = self._names[name]
        entry.requests[spec.revision] -= 1
        assert entry.requests[spec.revision] >= 0, f"{name} was released more often than acquired"
        if not entry.requests[spec.revision]:
            del entry.requests[spec.revision]
            self._tidy(name)
            self._drained(name, entry, spec)
        self._let_go(spec.revision)

    def _drained(self, name: str, entry: _Name, spec: AdapterSpec) -> None:
        if name not in self._names:
            self.on_change(AdapterStatus(name=name, spec=spec, unloaded=True))
        elif spec.revision not in entry.served:
            self.on_change(self._status(name, entry))

    def _unjoin(self, revision: str) -> None:
        self._joined[revision].num_requests -= 1
        if not self._joined[revision].num_requests:
            del self._joined[revision]
            self.on_gone(revision)

    def _whole(self, named: Named) -> AdapterSpec:
        entry = self._entry(named.name)
        if named.revision is not None:
            return self._specs[named.revision]
        if entry.current is None:
            raise self._not_found(named.name, entry.error)
        if entry.split and named.place * 100 < entry.split.percent:
            return self._specs[entry.split.revision]
        return entry.current

    def tensors(self, revision: str) -> HostAdapter:
        """The tensors of a needed revision, of a task's or of a joined one; reads them if they are not in
        memory.

        Raises:
            AdapterError: they are not readable.
        """
        with self._lock:
            joined = self._joined.get(revision)
        if joined:
            return join_prefixes([self._find(part) for part in joined.parts])
        return self._find(revision)

    def _find(self, revision: str) -> HostAdapter:
        whole, _, task = revision.partition(TASK_MARK)
        try:
            adapter = self._memory.get(whole)
        except _LOST as error:
            self._lose(whole, error)
            raise
        return adapter.tasks[int(task)] if task else adapter

    def _lose(self, revision: str, error: AdapterError) -> None:
        """Removes a revision that is not readable from all names; those whose current one it is fail."""
        with self._lock:
            for name, entry in self._names.items():
                if revision not in entry.served:
                    continue
                if entry.split and entry.split.revision == revision:
                    self._end_split(entry)
                if entry.current and entry.current.revision == revision:
                    entry.current, entry.error = None, str(error)
                    self._let_go(revision)
                self.on_change(self._status(name, entry))
        self.on_lost(revision, error)

    def status(self, name: str) -> AdapterStatus:
        """The state of one name.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._lock:
            return self._status(name, self._entry(name))

    def statuses(self) -> list[AdapterStatus]:
        """The states of all names, sorted, including unloaded ones with requests."""
        with self._lock:
            return [self._status(name, entry) for name, entry in sorted(self._names.items())]

    def look(self, seen: Callable[[list[AdapterStatus]], None]) -> None:
        """Passes `statuses` to `seen` under the registry's lock, so no change comes between it and
        `on_change`. `seen` must not block and not call the registry.
        """
        with self._lock:
            seen([self._status(name, entry) for name, entry in sorted(self._names.items())])

    def tell(self, name: str) -> None:
        """Calls `on_change` with the state of a name, if it exists."""
        with self._lock:
            entry = self._names.get(name)
            if entry is not None:
                self.on_change(self._status(name, entry))

    def _status(self, name: str, entry: _Name) -> AdapterStatus:
        current = entry.current
        draining = sorted(entry.requests.keys() - entry.served)
        shown = current or (self._specs[draining[-1]] if draining else None)
        return AdapterStatus(
            name=name,
            spec=shown,
            active_requests=entry.requests[shown.revision] if shown else 0,
            draining_revisions=tuple(draining),
            unloaded=current is None and not entry.error,
            error=entry.error,
            split=entry.split,
        )

    def _entry(self, name: str) -> _Name:
        entry = self._names.get(name)
        if entry is None:
            raise self._not_found(name)
        return entry

    def _not_found(self, name: str, error: str = "") -> AdapterNotFoundError:
        if error:
            return AdapterNotFoundError(f"adapter {name!r} could not be loaded", name=name, why=error)
        return AdapterNotFoundError(
            f"no adapter is loaded under the name {name!r}; load it, or list those that are"
        )

    def _let_go(self, revision: str) -> None:
        """Counts one need of a revision less, and drops it with the last."""
        self._needed[revision] -= 1
        if self._needed[revision]:
            return
        del self._needed[revision]
        self._memory.drop(revision)
        for gone in sorted({revision, *self._specs.pop(revision).resident_revisions}):
            self.on_gone(gone)

    def _tidy(self, name: str) -> None:
        """Deletes a name without revision, error and requests."""
        entry = self._names[name]
        if entry.current is None and not entry.error and not entry.requests:
            del self._names[name]


def _of_task(named: Named, spec: AdapterSpec) -> AdapterSpec:
    if not spec.num_tasks and named.task is None:
        return spec
    if not spec.num_tasks:
        raise AdapterTaskError(
            f"adapter {named.name!r}: expected no task, since it is not a multitask adapter, found "
            f"{named.task}"
        )
    if named.task is None or not 0 <= named.task < spec.num_tasks:
        found = "none" if named.task is None else named.task
        raise AdapterTaskError(
            f"adapter {named.name!r}: expected a task from 0 to {spec.num_tasks - 1}, found {found}"
        )
    return spec.of_task(named.task)


def check_composition(named: Sequence[tuple[str, AdapterSpec, float]]) -> None:
    """Checks that adapters, given with their names and weights, work together in one request.

    LoRAs add up, each with its weight (peft's `add_weighted_adapter(combination_type="cat")`); prefixes are
    joined, unless one's embeddings are computed with each text, as on an encoder. An adapter with a
    vocabulary or a head of its own is alone, and tokenizers must be the same.

    Raises:
        AdapterCompositionError: they do not.
    """
    for name, spec, weight in named:
        additive = not (spec.invocation_tokens or spec.vocab_size) and all(
            group.part in _LORA for group in spec.rows
        )
        if len(named) > 1 and not additive:
            raise AdapterCompositionError(
                f"adapter {name!r} ({spec.method.value}): expected only plain LoRAs and prefixes in a "
                f"request with {len(named)} adapters; request this one alone"
            )
        if weight != 1 and not (spec.rows and additive):
            raise AdapterCompositionError(
                f"adapter {name!r} ({spec.method.value}): expected weight 1, since only a plain LoRA is "
                f"scaled, found {weight:g}"
            )
    prefixes = {name: spec.prefix for name, spec, _ in named if spec.prefix}
    per_request = [name for name, prefix in prefixes.items() if prefix.per_request]
    if per_request and sum(spec.prefix is not None for _, spec, _ in named) > 1:
        raise AdapterCompositionError(
            f"adapter {per_request[0]!r}: expected no other adapter with virtual tokens beside it, as an "
            "encoder computes its embeddings with the text; request them separately"
        )
    if len({spec.tokenizer for _, spec, _ in named if spec.tokenizer}) > 1:
        raise AdapterCompositionError(
            "expected adapters with one tokenizer in a request, found adapters whose folders have different "
            "ones; request them separately"
        )
