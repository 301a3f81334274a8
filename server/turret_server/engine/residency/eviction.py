"""Which of the adapters that nobody uses goes first when pages run out.

What is large, was used long ago and seldom, and belongs to a tenant who has much of the arena for its weight:
a tenant that asks for one cold adapter after another evicts its own, and still what others have not touched
for long.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable

from turret_server.engine.residency.resident import Resident

# For how many steps an order is kept.
_KEPT_FOR = 16


class EvictionOrder:
    """`weight` is a tenant's.

    The order is kept for some steps, without those that are used in the meantime: to look at all adapters for
    every page would cost more than the best order is worth.
    """

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._worst: list[tuple[int, Resident]] = []
        self._made_at = -_KEPT_FOR

    def worst(self, residents: Iterable[Resident], clock: int) -> Resident | None:
        """The one that is to go first at this tick; None where nobody is idle."""
        if clock - self._made_at >= _KEPT_FOR:
            self._make(residents, clock)
        resident = self._last_unused(clock)
        if resident is None:
            self._make(residents, clock)
            resident = self._last_unused(clock)
        return resident

    def _last_unused(self, clock: int) -> Resident | None:
        while self._worst:
            last_used, resident = self._worst[-1]
            if resident.last_used == last_used and resident.is_idle(clock):
                return resident
            self._worst.pop()
        return None

    def _make(self, residents: Iterable[Resident], clock: int) -> None:
        """Put the worst quarter in order, the worst last: others change places before it is their turn."""
        residents = list(residents)
        held: Counter[str] = Counter()
        for resident in residents:
            held[resident.tenant] += resident.num_pages
        share = {tenant: num_pages / self._weight(tenant) for tenant, num_pages in held.items()}

        def waste(resident: Resident) -> float:
            return resident.age(clock) * resident.num_pages * share[resident.tenant]

        idle = [one for one in residents if one.num_pages and one.is_idle(clock)]
        worst = heapq.nlargest(-(-len(idle) // 4), idle, key=waste)
        self._worst = [(resident.last_used, resident) for resident in reversed(worst)]
        self._made_at = clock
