"""Adapters in the arena: which revisions have pages, who uses them, which may go.

A revision takes slab pages for its rows and prefix pages for the keys and values of its virtual
tokens. Filling them never holds up a step: a copy runs beside the batch, and virtual tokens that are
embeddings are computed by the batch itself, as the tokens of a sequence of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from turret_adapters.spec import AdapterSpec, PrefixKind
from turret_server.engine.kv.pages import PagePool
from turret_server.engine.request import DEFAULT_TENANT
from turret_server.engine.residency.eviction import EvictionOrder
from turret_server.engine.residency.resident import Resident

# How many adapters are filled at once. One that waits for its turn to be read needs no pages yet.
MAX_FILLING = 8


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


class Absence(Enum):
    """Why an adapter is not even on its way."""

    NO_ROOM = "no room"
    BUSY = "as many are being filled as may be at once"
    QUOTA = "the tenant uses as many pages as it may"


@dataclass(slots=True)
class Residency:
    """Revisions that nobody uses give their pages up, in the order of `eviction`; one in use, being
    filled, or pinned never does. `max_pages` says how many pages those may have that a tenant holds: that it
    uses now, or was the last to use.
    """

    pool: PagePool
    memory: AdapterMemory
    page_elements: int
    block_size: int
    post: Callable[[Callable[[], None]], None]
    weight: Callable[[str], float] = lambda _: 1.0
    max_pages: Callable[[str], int | None] = lambda _: None
    num_evicted: int = 0
    num_filling: int = 0
    num_slab_pages: int = 0
    num_prefix_pages: int = 0
    _residents: dict[str, Resident] = field(default_factory=dict)
    _dropped: set[str] = field(default_factory=set)
    _computed: list[Resident] = field(default_factory=list)
    # By who pins them. It is replaced, never changed: other threads look at it, too.
    _pins: Mapping[str, tuple[AdapterSpec, ...]] = field(default_factory=dict)
    # Pinned ones whose filling failed: they are filled when somebody needs them, or pins them again.
    _unfillable: set[str] = field(default_factory=set)
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
        return spec.num_slab_pages(self.page_elements) + -(-spec.num_virtual_tokens // self.block_size)

    def get(self, revision: str) -> Resident | None:
        return self._residents.get(revision)

    def prefetch(self, spec: AdapterSpec, tenant: str = DEFAULT_TENANT) -> None:
        """Fill an adapter that nobody has asked for yet, if there is room that nobody else uses."""
        num_pages, most = self.num_pages(spec), self.max_pages(tenant)
        if num_pages > self.pool.num_free:
            return
        if most is None or num_pages + sum(one.num_pages for one in self._held_by(tenant)) <= most:
            self.ensure(spec, tenant)

    def pin(self, name: str, specs: tuple[AdapterSpec, ...]) -> None:
        """Keep these revisions, in place of those that were pinned under the name, until others are. Each is
        filled as soon as there is room.
        """
        self._pins = {**{other: pins for other, pins in self._pins.items() if other != name}, name: specs}
        pinned = {spec.revision for spec in self.pinned()}
        self._unfillable.clear()
        for resident in self:
            resident.pinned = resident.spec.revision in pinned

    def pinned(self, but: str | None = None) -> list[AdapterSpec]:
        """Every revision that is pinned, or only those under other names than this."""
        named = (specs for name, specs in self._pins.items() if name != but)
        return list({spec.revision: spec for specs in named for spec in specs}.values())

    def fill_pinned(self) -> bool:
        """Have what is pinned filled; False where one finds no room, which nobody else is to take then."""
        missing = (spec for spec in self.pinned() if spec.revision not in self._residents)
        wanted = [spec for spec in missing if spec.revision not in self._unfillable]
        return all(self.ensure(spec, DEFAULT_TENANT) is not Absence.NO_ROOM for spec in wanted)

    def ensure(self, spec: AdapterSpec, tenant: str) -> Resident | Absence:
        """The resident of a revision, being filled if it was not there, or why it cannot be now."""
        resident = self._residents.get(spec.revision)
        if resident is None:
            if self.num_filling >= MAX_FILLING:
                return Absence.BUSY
            pages = self.pool.allocate(self.num_pages(spec))
            if pages is None:
                return Absence.NO_ROOM
            resident = self._fill(spec, tenant, pages)
        resident.needed = resident.last_used = self.pool.clock
        self._dropped.discard(spec.revision)
        return resident

    def ensure_all(self, specs: Sequence[AdapterSpec], tenant: str) -> tuple[Resident, ...] | Absence:
        """The residents of several revisions, or why not all of them can be on their way now."""
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
        """Whether a tenant may hold these as well, once idle ones of its own gave way."""
        most = self.max_pages(tenant)
        # What is pinned is there for everybody.
        pinned = {spec.revision for spec in self.pinned()}
        wanted = {spec.revision: self.num_pages(spec) for spec in specs if spec.revision not in pinned}
        if most is None or all(self._holds(tenant, revision) for revision in wanted):
            return True
        if self._refused_at != self.pool.clock:
            self._refused.clear()
            self._refused_at = self.pool.clock
        if tenant in self._refused:
            return False
        others = [one for one in self._held_by(tenant) if one.spec.revision not in wanted]
        excess = sum(wanted.values()) + sum(one.num_pages for one in others) - most
        idle = [one for one in others if one.is_idle(self.pool.clock)]
        if excess > sum(one.num_pages for one in idle):
            self._refused.add(tenant)
            return False
        for one in sorted(idle, key=lambda one: -one.age(self.pool.clock) * one.num_pages):
            if excess > 0:
                excess -= one.num_pages
                self._evict(one)
        return True

    def _held_by(self, tenant: str) -> Iterator[Resident]:
        return (resident for resident in self._residents.values() if resident.is_held_by(tenant))

    def _holds(self, tenant: str, revision: str) -> bool:
        resident = self._residents.get(revision)
        return resident is not None and resident.is_held_by(tenant)

    def _fill(self, spec: AdapterSpec, tenant: str, pages: list[int]) -> Resident:
        num_prefix = -(-spec.num_virtual_tokens // self.block_size)
        computed = spec.prefix is not None and spec.prefix.kind is PrefixKind.EMBEDDING
        resident = Resident(
            spec=spec,
            slab_pages=pages[: len(pages) - num_prefix],
            prefix_pages=pages[len(pages) - num_prefix :],
            tenant=tenant,
            pinned=any(pinned.revision == spec.revision for pinned in self.pinned()),
            copying=True,
            num_virtual_computed=0 if computed else spec.num_virtual_tokens,
        )
        self._residents[spec.revision] = resident
        self.num_slab_pages += len(resident.slab_pages)
        self.num_prefix_pages += len(resident.prefix_pages)
        if computed:
            self._computed.append(resident)
        self.num_filling += 1
        self.memory.place(
            spec,
            tuple(resident.slab_pages),
            tuple(resident.prefix_pages),
            lambda error: self.post(lambda: self._copied(resident, error)),
        )
        return resident

    def _copied(self, resident: Resident, error: str | None) -> None:
        resident.copying = False
        self.num_filling -= 1
        if error is not None:
            self.fail(resident, error)
        elif resident.spec.revision in self._dropped:
            self._free(resident)

    def to_compute(self) -> list[Resident]:
        """Residents whose virtual tokens are still to be computed and whose embeddings have arrived."""
        self._computed = [resident for resident in self._computed if not resident.gone and not resident.ready]
        return [resident for resident in self._computed if not resident.copying]

    def acquire(self, resident: Resident, tenant: str) -> None:
        """A request of the tenant begins on it."""
        assert resident.ready
        resident.num_begun = 1 + resident.uses(self.pool.clock)
        resident.last_begun = self.pool.clock
        resident.num_users += 1
        resident.users[tenant] += 1
        resident.tenant = tenant

    def release(self, resident: Resident, tenant: str) -> None:
        """A request of the tenant ends on it."""
        resident.num_users -= 1
        resident.users[tenant] -= 1
        if not resident.users[tenant]:
            del resident.users[tenant]
        resident.last_used = self.pool.clock
        assert resident.num_users >= 0
        if not resident.num_users and resident.spec.revision in self._dropped:
            self._free(resident)

    def drop(self, revision: str) -> None:
        """Nobody will ask for this revision again: free it now, or when its copy or its last user ends."""
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
        if resident.pinned:
            self._unfillable.add(resident.spec.revision)
        self._free(resident)

    @property
    def num_idle(self) -> int:
        """Pages of idle revisions."""
        return sum(
            resident.num_pages for resident in self._residents.values() if resident.is_idle(self.pool.clock)
        )

    @property
    def oldest(self) -> float:
        resident = self._order.worst(self._residents.values(), self.pool.clock)
        return math.inf if resident is None else self.pool.clock - resident.age(self.pool.clock)

    def evict(self) -> int:
        """Free the pages of the idle revision that is to go first."""
        resident = self._order.worst(self._residents.values(), self.pool.clock)
        assert resident is not None
        self._evict(resident)
        return resident.num_pages

    def _evict(self, resident: Resident) -> None:
        self._free(resident)
        self.num_evicted += 1

    def _free(self, resident: Resident) -> None:
        del self._residents[resident.spec.revision]
        resident.gone = True
        self._dropped.discard(resident.spec.revision)
        self.num_slab_pages -= len(resident.slab_pages)
        self.num_prefix_pages -= len(resident.prefix_pages)
        self.memory.forget(resident.spec.revision)
        self.pool.release(resident.pages)
