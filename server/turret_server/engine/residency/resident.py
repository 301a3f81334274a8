"""An adapter that has pages in the arena, and the order in which unused ones are evicted."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from turret_adapters.spec import AdapterSpec

# After how many steps a use counts half.
_HALF_LIFE_STEPS = 5000

# For how many steps the eviction order is reused.
_REORDER_STEPS = 16


@dataclass(slots=True, eq=False)
class Resident:
    """A revision in the arena. It is ready once its copy has ended and its virtual tokens are computed.

    `tenant` is the one that requested it last; `users` counts the running sequences by tenant. Times are
    ticks of the pool: a waiting sequence requested it at `last_requested`, and it was used until `last_used`.
    `num_uses` is the decayed number of sequences that started on it, as of `counted_at`. A `pinned` resident
    is never evicted. Once `freed` it has no pages; `error` says so if that is because it failed to load.
    """

    spec: AdapterSpec
    slab_pages: list[int]
    prefix_pages: list[int]
    tenant: str
    copying: bool
    num_virtual_computed: int = 0
    num_users: int = 0
    users: Counter[str] = field(default_factory=Counter)
    last_requested: int = 0
    last_used: int = 0
    counted_at: int = 0
    num_uses: float = 0.0
    pinned: bool = False
    freed: bool = False
    error: str | None = None

    @property
    def ready(self) -> bool:
        return not self.copying and not self.uncomputed

    @property
    def uncomputed(self) -> range:
        """The next virtual tokens whose keys and values are to be computed."""
        runs = self.spec.prefix.embedded if self.spec.prefix else ()
        rest = (range(max(run.start, self.num_virtual_computed), run.stop) for run in runs)
        return next(filter(None, rest), range(0))

    @property
    def pages(self) -> list[int]:
        return self.slab_pages + self.prefix_pages

    @property
    def num_pages(self) -> int:
        return len(self.slab_pages) + len(self.prefix_pages)

    def recent_uses(self, clock: int) -> float:
        """How many sequences started on it; each counts half after `_HALF_LIFE_STEPS`."""
        return self.num_uses * math.exp2((self.counted_at - clock) / _HALF_LIFE_STEPS)

    def staleness(self, clock: int) -> float:
        """Steps since its last use, divided by how often it is used (hyperbolic caching, Blankstein et al.,
        ATC 2017).
        """
        return (clock - self.last_used) / (1 + self.recent_uses(clock))

    def is_held_by(self, tenant: str) -> bool:
        """Whether its pages count against the tenant's quota: the tenant uses it, or was the last to request
        it and nobody uses it. Pinned residents count against no quota.
        """
        uses = self.users[tenant] > 0 or (self.tenant == tenant and not self.num_users)
        return uses and not self.pinned

    def is_idle(self, clock: int) -> bool:
        """Whether it may be evicted: it has no user, is not pinned, is loaded, and no waiting sequence
        requested it in this step.
        """
        return (
            not (self.num_users or self.pinned or self.freed) and self.last_requested < clock and self.ready
        )


class EvictionOrder:
    """Which idle resident is evicted next: staleness × pages × its tenant's share of the arena, the highest.

    The share is divided by the tenant's `weight`. So a tenant that loads one cold adapter after another
    mostly evicts its own. Ranking every resident for every page would be slow, so an order is reused for some
    steps; residents that are used in the meantime are skipped.
    """

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        # With `last_used` at the time of ranking, the next victim last.
        self._victims: list[tuple[int, Resident]] = []
        self._ranked_at = -_REORDER_STEPS

    def next_victim(self, residents: Iterable[Resident], clock: int) -> Resident | None:
        """The idle resident to evict first; None if none is idle."""
        if clock - self._ranked_at >= _REORDER_STEPS:
            self._rank(residents, clock)
        resident = self._last_unused(clock)
        if resident is None:
            self._rank(residents, clock)
            resident = self._last_unused(clock)
        return resident

    def _last_unused(self, clock: int) -> Resident | None:
        while self._victims:
            last_used, resident = self._victims[-1]
            if resident.last_used == last_used and resident.is_idle(clock):
                return resident
            self._victims.pop()
        return None

    def _rank(self, residents: Iterable[Resident], clock: int) -> None:
        """Order the worst quarter: the ranks of the others will have changed when their turn comes."""
        residents = list(residents)
        held: Counter[str] = Counter()
        for resident in residents:
            held[resident.tenant] += resident.num_pages
        share = {tenant: num_pages / self._weight(tenant) for tenant, num_pages in held.items()}

        def cost(resident: Resident) -> float:
            return resident.staleness(clock) * resident.num_pages * share[resident.tenant]

        idle = [one for one in residents if one.num_pages and one.is_idle(clock)]
        worst = heapq.nlargest(-(-len(idle) // 4), idle, key=cost)
        self._victims = [(resident.last_used, resident) for resident in reversed(worst)]
        self._ranked_at = clock
