"""Adapters in the arena: which revisions have pages, who uses them, which may go.

A revision takes slab pages for its rows and prefix pages for the keys and values of its virtual
tokens. Filling them never holds up a step: a copy runs beside the batch, and virtual tokens that are
embeddings are computed by the batch itself, as the tokens of a sequence of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from turret_adapters.slab import slab_layout
from turret_adapters.spec import AdapterSpec, PrefixKind
from turret_server.engine.pages import PagePool


class AdapterMemory(Protocol):
    """The device's side: fills pages with an adapter and forgets it again."""

    def place(
        self,
        spec: AdapterSpec,
        slab_pages: tuple[int, ...],
        prefix_pages: tuple[int, ...],
        done: Callable[[str | None], None],
    ) -> None:
        """Copy rows and keys and values into the pages; call `done` with an error or None from any thread."""

    def forget(self, revision: str) -> None:
        """Its pages are about to be used for something else."""


@dataclass(slots=True, eq=False)
class Resident:
    """A revision that has pages. It is ready when neither its copy nor its virtual tokens are pending.

    With an `error`, filling them failed, and the pages are gone.
    """

    spec: AdapterSpec
    slab_pages: list[int]
    prefix_pages: list[int]
    copying: bool
    num_virtual_computed: int
    num_users: int = 0
    last_used: int = 0
    error: str | None = None

    @property
    def ready(self) -> bool:
        return not self.copying and self.num_virtual_computed == self.spec.num_virtual_tokens

    @property
    def pages(self) -> list[int]:
        return self.slab_pages + self.prefix_pages


@dataclass(slots=True)
class Residency:
    """Least recently used revisions give their pages up; one in use, or being filled, never does."""

    pool: PagePool
    memory: AdapterMemory
    page_elements: int
    block_size: int
    post: Callable[[Callable[[], None]], None]
    clock: int = 0
    _residents: dict[str, Resident] = field(default_factory=dict)
    _dropped: set[str] = field(default_factory=set)
    _num_pages: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool.add_reclaimer(self)

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._residents.values())

    def num_pages(self, spec: AdapterSpec) -> int:
        """Pages that a revision takes when resident."""
        num_pages = self._num_pages.get(spec.revision)
        if num_pages is None:
            slab = slab_layout(spec.rows, self.page_elements).num_pages
            num_pages = slab + -(-spec.num_virtual_tokens // self.block_size)
            self._num_pages[spec.revision] = num_pages
        return num_pages

    def tick(self) -> None:
        """A step begins: what is used from here on is newer than all before."""
        self.clock += 1

    def get(self, revision: str) -> Resident | None:
        return self._residents.get(revision)

    def ensure(self, spec: AdapterSpec) -> Resident | None:
        """The resident of a revision, being filled if it was not there; None when there is no room now."""
        resident = self._residents.get(spec.revision)
        if resident is None:
            pages = self.pool.allocate(self.num_pages(spec))
            if pages is None:
                return None
            resident = self._fill(spec, pages)
        resident.last_used = self.clock
        self._dropped.discard(spec.revision)
        return resident

    def ensure_all(self, specs: Sequence[AdapterSpec]) -> tuple[Resident, ...] | None:
        """The residents of several revisions; None when there is no room for all of them now."""
        residents = []
        for spec in specs:
            resident = self.ensure(spec)
            if resident is None:
                return None
            residents.append(resident)
        return tuple(residents)

    def _fill(self, spec: AdapterSpec, pages: list[int]) -> Resident:
        num_prefix = -(-spec.num_virtual_tokens // self.block_size)
        computed = spec.prefix is not None and spec.prefix.kind is PrefixKind.EMBEDDING
        resident = Resident(
            spec=spec,
            slab_pages=pages[: len(pages) - num_prefix],
            prefix_pages=pages[len(pages) - num_prefix :],
            copying=True,
            num_virtual_computed=0 if computed else spec.num_virtual_tokens,
        )
        self._residents[spec.revision] = resident
        self.memory.place(
            spec,
            tuple(resident.slab_pages),
            tuple(resident.prefix_pages),
            lambda error: self.post(lambda: self._copied(resident, error)),
        )
        return resident

    def _copied(self, resident: Resident, error: str | None) -> None:
        resident.copying = False
        if error is not None:
            self.fail(resident, error)
        elif resident.spec.revision in self._dropped:
            self._free(resident)

    def to_compute(self) -> list[Resident]:
        """Residents whose virtual tokens are still to be computed and whose embeddings have arrived."""
        return [r for r in self._residents.values() if not r.copying and not r.ready]

    def acquire(self, resident: Resident) -> None:
        assert resident.ready
        resident.num_users += 1
        resident.last_used = self.clock

    def release(self, resident: Resident) -> None:
        resident.num_users -= 1
        assert resident.num_users >= 0
        if not resident.num_users and resident.spec.revision in self._dropped:
            self._free(resident)

    def drop(self, revision: str) -> None:
        """Nobody will ask for this revision again: free it now, or when its copy or its last user ends."""
        self._num_pages.pop(revision, None)
        resident = self._residents.get(revision)
        if resident is None:
            return
        if resident.num_users or resident.copying:
            self._dropped.add(revision)
        else:
            self._free(resident)

    def fail(self, resident: Resident, error: str) -> None:
        """Filling it failed: free it, and leave the reason for those who wait for it."""
        resident.error = error
        self._free(resident)

    @property
    def num_idle(self) -> int:
        """Pages of idle revisions."""
        return sum(len(resident.pages) for resident in self._idle())

    def evict(self, count: int) -> None:
        """Free at least `count` pages of idle revisions, or all, the least recently used first."""
        for resident in sorted(self._idle(), key=lambda resident: resident.last_used):
            if count <= 0:
                break
            count -= len(resident.pages)
            self._free(resident)

    def _idle(self) -> list[Resident]:
        """Those that nobody uses, that are not being filled, and that this step has not looked at."""
        return [
            resident
            for resident in self._residents.values()
            if resident.ready and not resident.num_users and resident.last_used < self.clock
        ]

    def _free(self, resident: Resident) -> None:
        del self._residents[resident.spec.revision]
        self._dropped.discard(resident.spec.revision)
        self.memory.forget(resident.spec.revision)
        self.pool.release(resident.pages)
