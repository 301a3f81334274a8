"""Who is served next: the tenant that was given least so far, and of a tenant's requests the earliest.

Every tenant has a virtual token counter (VTC, Sheng et al., arXiv 2401.00588): what was computed for it,
divided by its weight. Tenants that keep asking are given service in proportion to their weights, whatever
they ask for; one that asks for little is served at once; nothing is left undone while anybody waits.

While two tenants wait, the one that was given more starts nothing, so it gets ahead by no more than what its
running requests are still owed: B · C / w, if B requests run at once, the largest costs C, and its weight is
w. So a request with others of its tenant before it that cost Q starts after the engine has done at most
(Q + B · C) · W / w + B · C of work, where W is the weight of all who wait, and its adapter was loaded. One of
a tenant that has nothing else there waits for no more than B · C, which is what runs already.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Container, Iterable, Iterator
from heapq import heapify, heappop, heappush, nsmallest

from turret_server.engine.sequence import Sequence

# What a token costs. One that is generated takes a step, whose weights are read for it; the paper's ratio.
PROMPT_COST = 1.0
GENERATED_COST = 2.0

MAX_IDLE_TENANTS = 1000


def _order(sequence: Sequence) -> tuple[float, int]:
    return sequence.order


class FairQueue:
    """The sequences that wait, and what every tenant was given. `weight` is a tenant's, above 0."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._waiting: dict[str, list[Sequence]] = {}
        self._counters: dict[str, float] = {}
        # The least counter of those who wait; without any, that of the last who did.
        self._floor = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for sequences in self._waiting.values():
            yield from sequences

    def counter(self, tenant: str) -> float:
        """What the tenant was given, in prompt tokens at weight 1."""
        return self._counters.get(tenant, self._floor)

    def charge(self, tenant: str, cost: float) -> None:
        self._counters[tenant] = self.counter(tenant) + cost / self._weight(tenant)

    def add(self, sequence: Sequence) -> None:
        """Let it wait. A tenant that comes back has not saved up what it did not ask for."""
        tenant = sequence.tenant
        if tenant not in self._waiting:
            self._counters[tenant] = max(self.counter(tenant), self._least())
            self._waiting[tenant] = []
        insort(self._waiting[tenant], sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        queue = self._waiting[sequence.tenant]
        index = bisect_left(queue, sequence.order, key=_order)
        assert queue[index] is sequence
        del queue[index]
        if not queue:
            self._floor = self._least()
            del self._waiting[sequence.tenant]

    def reset(self) -> None:
        """Start from zero. Nobody waits or runs, so nobody is owed anything."""
        assert not self._waiting
        self._counters.clear()
        self._floor = 0.0

    def forget_idle(self, active: Container[str]) -> None:
        """Bound the tenants that are remembered without a job (those with one are `active`): callers may
        name any number. Those who were given least go, as they would start with about the same anew.
        """
        idle = [tenant for tenant in self._counters if tenant not in active]
        for tenant in nsmallest(len(idle) - MAX_IDLE_TENANTS, idle, key=self.counter):
            del self._counters[tenant]

    def in_order(self, started: Iterable[Sequence]) -> Iterator[Sequence]:
        """`started`, whose prompts are not computed yet, and all that wait, as they are to be served.

        Who comes after whom follows from each being served in whole, whether it is or not: a tenant whose
        requests cannot start yet does not hold up the others. The caller may remove what it is given.
        """
        ready: dict[str, list[Sequence]] = {}
        for sequence in sorted(started, key=_order):
            ready.setdefault(sequence.tenant, []).append(sequence)
        tenants = self._waiting.keys() | ready.keys()
        heap = [(self.counter(tenant), tenant) for tenant in tenants]
        heapify(heap)
        lines = {tenant: self._line(ready.get(tenant, []), tenant) for tenant in tenants}
        while heap:
            counter, tenant = heappop(heap)
            following = next(lines[tenant], None)
            if following is not None:
                cost = max(PROMPT_COST * following.num_remaining, GENERATED_COST) / self._weight(tenant)
                yield following
                heappush(heap, (counter + cost, tenant))

    def _line(self, ready: list[Sequence], tenant: str) -> Iterator[Sequence]:
        yield from ready
        place = (-math.inf, 0)
        while queue := self._waiting.get(tenant):
            # Found anew each time, since what was given out may have been removed.
            index = bisect_right(queue, place, key=_order)
            if index == len(queue):
                return
            place = queue[index].order
            yield queue[index]

    def _least(self) -> float:
        return min((self.counter(tenant) for tenant in self._waiting), default=self._floor)
