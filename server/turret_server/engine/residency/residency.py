"""Adapters in the arena: which revisions have pages, who uses them, which may be evicted.

A revision takes slab pages for its rows, and prefix pages for the keys and values of its virtual tokens.
Loading never delays a step: the copy runs beside the batch, and virtual tokens that are embeddings are
computed by the batch itself, as a sequence of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from turret_adapters.spec import AdapterSpec
from turret_server.engine.kv.pages import PagePool
from turret_server.engine.request import DEFAULT_TENANT
from turret_server.engine.residency.resident import EvictionOrder, Resident

# Adapters that are loaded at the same time. Copies run one after another, and one that waits for its copy
# needs no pages yet.
MAX_LOADING = 8


class AdapterMemory(Protocol):
    """The device's copies of adapters."""

    def copy_to_device(
        self,
        spec: AdapterSpec,
        slab_pages: tuple[int, ...],
        prefix_pages: tuple[int, ...],
        done: Callable[[str | None], None],
    ) -> None:
        """Start to copy rows, keys and values into the pages; call `done` from any thread when the copy has
        ended, with None or an error.
        """

    def forget(self, revision: str) -> None:
        """Drop a copy: its pages are about to be reused."""


class Absence(Enum):
    """Why an adapter is not even being loaded."""

    NO_ROOM = "too few free pages"
    BUSY = "the maximum number of adapters is being loaded"
    QUOTA = "the tenant's adapters in use take all pages that it may have"


@dataclass(slots=True)
class Residency:
    """Evicts revisions without users when pages run out, in the order of `EvictionOrder`; never one that is
    in use, being loaded, or pinned. `max_pages` is the most pages that the adapters of a tenant may take, see
    `Resident.is_held_by`. `post` runs a callback on the engine's thread.
    """

    pool: PagePool
    memory: AdapterMemory
    page_elements: int
    block_size: int
    post: Callable[[Callable[[], None]], None]
    weight: Callable[[str], float] = lambda _: 1.0
    max_pages: Callable[[str], int | None] = lambda _: None
    num_evicted: int = 0
    num_loading: int = 0
    num_slab_pages: int = 0
    num_prefix_pages: int = 0
    _residents: dict[str, Resident] = field(default_factory=dict)
    # Dropped revisions that are still in use or being copied.
    _dropped: set[str] = field(default_factory=set)
    # Residents whose virtual tokens are still to be computed from embeddings.
    _embedding_prefixes: list[Resident] = field(default_factory=list)
    # By name. Replaced as a whole, never changed: other threads read it.
    _pins: Mapping[str, tuple[AdapterSpec, ...]] = field(default_factory=dict)
    # Pinned revisions that failed to load. They are loaded again when a request names them or they are pinned
    # again: retrying in every step would keep the copying thread busy.
    _failed_pins: set[str] = field(default_factory=set)
    # Tenants that were refused pages at the tick `_refused_at`: their other requests wait in that step, too.
    _refused: set[str] = field(default_factory=set)
    _refused_at: int = 0
    _order: EvictionOrder = field(init=False)

    def __post_init__(self) -> None:
        self._order = EvictionOrder(self.weight)
        self.pool.add_reclaimer(self)

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._residents.values())

    def num_pages(self, spec: AdapterSpec) -> int:
        """Pages that a revision takes when resident."""
        return spec.num_pages(self.page_elements, self.block_size)

    def get(self, revision: str) -> Resident | None:
        return self._residents.get(revision)

    def prefetch(self, spec: AdapterSpec, tenant: str = DEFAULT_TENANT) -> None:
        """Load an adapter before a request names it, if that evicts nothing and exceeds no quota."""
        num_pages, quota = self.num_pages(spec), self.max_pages(tenant)
        if num_pages > self.pool.num_free:
            return
        if quota is None or num_pages + sum(one.num_pages for one in self._held_by(tenant)) <= quota:
            self.ensure(spec, tenant)

    def pin(self, name: str, specs: tuple[AdapterSpec, ...]) -> None:
        """Pin revisions under a name, instead of those that were pinned under it. Each is loaded as soon as
        there is room.
        """
        self._pins = {**self._pins, name: specs}
        pinned = {spec.revision for spec in self.pinned()}
        self._failed_pins.clear()
        for resident in self:
            resident.pinned = resident.spec.revision in pinned

    def pinned(self, but: str | None = None) -> list[AdapterSpec]:
        """Every pinned revision once, without those that are pinned only under the name `but`."""
        named = (specs for name, specs in self._pins.items() if name != but)
        return list({spec.revision: spec for specs in named for spec in specs}.values())

    def load_pinned(self) -> bool:
        """Start to load pinned revisions. False if one finds too few pages: nobody else may take any then."""
        missing = (spec for spec in self.pinned() if spec.revision not in self._residents)
        wanted = [spec for spec in missing if spec.revision not in self._failed_pins]
        return all(self.ensure(spec, DEFAULT_TENANT) is not Absence.NO_ROOM for spec in wanted)

    def ensure(self, spec: AdapterSpec, tenant: str) -> Resident | Absence:
        """The resident of a revision, which starts to load if it was absent, or why it cannot now."""
        resident = self._residents.get(spec.revision)
        if resident is None:
            if self.num_loading >= MAX_LOADING:
                return Absence.BUSY
            pages = self.pool.allocate(self.num_pages(spec))
            if pages is None:
                return Absence.NO_ROOM
            resident = self._load(spec, tenant, pages)
        resident.last_requested = resident.last_used = self.pool.clock
        self._dropped.discard(spec.revision)
        return resident

    def ensure_all(self, specs: Sequence[AdapterSpec], tenant: str) -> tuple[Resident, ...] | Absence:
        """The residents of several revisions, or why not all of them can be loaded now."""
        if not self._allow(specs, tenant):
            return Absence.QUOTA
        residents = []
        for spec in specs:
            resident = self.ensure(spec, tenant)
            if isinstance(resident, Absence):
                return resident
            residents.append(resident)
        return tuple(residents)

    def _allow(self, specs: Sequence[AdapterSpec], tenant: str) -> bool:
        """Whether the tenant's quota has room for these, after evicting idle ones of its own."""
        quota = self.max_pages(tenant)
        pinned = {spec.revision for spec in self.pinned()}
        wanted = {spec.revision: self.num_pages(spec) for spec in specs if spec.revision not in pinned}
        if quota is None or all(self._holds(tenant, revision) for revision in wanted):
            return True
        if self._refused_at != self.pool.clock:
            self._refused.clear()
            self._refused_at = self.pool.clock
        if tenant in self._refused:
            return False
        others = [one for one in self._held_by(tenant) if one.spec.revision not in wanted]
        excess = sum(wanted.values()) + sum(one.num_pages for one in others) - quota
        idle = [one for one in others if one.is_idle(self.pool.clock)]
        if excess > sum(one.num_pages for one in idle):
            self._refused.add(tenant)
            return False
        for one in sorted(idle, key=lambda one: -one.staleness(self.pool.clock) * one.num_pages):
            if excess > 0:
                excess -= one.num_pages
                self._evict(one)
        return True

    def _held_by(self, tenant: str) -> Iterator[Resident]:
        return (resident for resident in self._residents.values() if resident.is_held_by(tenant))

    def _holds(self, tenant: str, revision: str) -> bool:
        resident = self._residents.get(revision)
        return resident is not None and resident.is_held_by(tenant)

    def _load(self, spec: AdapterSpec, tenant: str, pages: list[int]) -> Resident:
        num_prefix = -(-spec.num_prefix_tokens // self.block_size)
        embeddings = spec.prefix is not None and bool(spec.prefix.embedded)
        resident = Resident(
            spec=spec,
            slab_pages=pages[: len(pages) - num_prefix],
            prefix_pages=pages[len(pages) - num_prefix :],
            tenant=tenant,
            pinned=any(pinned.revision == spec.revision for pinned in self.pinned()),
            copying=True,
        )
        self._residents[spec.revision] = resident
        self.num_slab_pages += len(resident.slab_pages)
        self.num_prefix_pages += len(resident.prefix_pages)
        if embeddings:
            self._embedding_prefixes.append(resident)
        self.num_loading += 1
        self.memory.copy_to_device(
            spec,
            tuple(resident.slab_pages),
            tuple(resident.prefix_pages),
            lambda error: self.post(lambda: self._copied(resident, error)),
        )
        return resident

    def _copied(self, resident: Resident, error: str | None) -> None:
        resident.copying = False
        self.num_loading -= 1
        if error is not None:
            self.fail(resident, error)
        elif resident.spec.revision in self._dropped:
            self._free(resident)

    def to_compute(self) -> list[Resident]:
        """Residents whose embeddings are copied and whose virtual tokens are still to be computed."""
        self._embedding_prefixes = [one for one in self._embedding_prefixes if not (one.freed or one.ready)]
        return [resident for resident in self._embedding_prefixes if not resident.copying]

    def acquire(self, resident: Resident, tenant: str) -> None:
        """Count a sequence of the tenant that starts on it."""
        assert resident.ready
        resident.num_uses = 1 + resident.recent_uses(self.pool.clock)
        resident.counted_at = self.pool.clock
        resident.num_users += 1
        resident.users[tenant] += 1
        resident.tenant = tenant

    def release(self, resident: Resident, tenant: str) -> None:
        """Count a sequence of the tenant that has ended or was preempted."""
        resident.num_users -= 1
        resident.users[tenant] -= 1
        if not resident.users[tenant]:
            del resident.users[tenant]
        resident.last_used = self.pool.clock
        assert resident.num_users >= 0
        if not resident.num_users and resident.spec.revision in self._dropped:
            self._free(resident)

    def drop(self, revision: str) -> None:
        """Free a revision that no new request names, at once or when its copy or its last user has ended."""
        resident = self._residents.get(revision)
        if resident is None:
            return
        if resident.num_users or resident.copying:
            self._dropped.add(revision)
        else:
            self._free(resident)

    def fail(self, resident: Resident, error: str) -> None:
        """Free a resident that failed to load, and keep the reason for the sequences that wait for it."""
        resident.error = error
        if resident.pinned:
            self._failed_pins.add(resident.spec.revision)
        self._free(resident)

    @property
    def num_idle(self) -> int:
        """Pages of idle revisions."""
        clock = self.pool.clock
        return sum(resident.num_pages for resident in self._residents.values() if resident.is_idle(clock))

    @property
    def oldest(self) -> float:
        """The tick at which the next victim was last used, moved forward if it is used often."""
        resident = self._order.next_victim(self._residents.values(), self.pool.clock)
        return math.inf if resident is None else self.pool.clock - resident.staleness(self.pool.clock)

    def evict(self) -> int:
        """Free the pages of the next victim, and return their number."""
        resident = self._order.next_victim(self._residents.values(), self.pool.clock)
        assert resident is not None
        self._evict(resident)
        return resident.num_pages

    def _evict(self, resident: Resident) -> None:
        self._free(resident)
        self.num_evicted += 1

    def _free(self, resident: Resident) -> None:
        del self._residents[resident.spec.revision]
        resident.freed = True
        self._dropped.discard(resident.spec.revision)
        self.num_slab_pages -= len(resident.slab_pages)
        self.num_prefix_pages -= len(resident.prefix_pages)
        self.memory.forget(resident.spec.revision)
        self.pool.release(resident.pages)
