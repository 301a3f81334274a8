"""The order of service: of tenants, the one that received the least so far is first; of a tenant's sequences,
the earliest.

Every tenant has a virtual token counter (VTC, Sheng et al., arXiv 2401.00588): the cost of what was computed
for it, divided by its weight. Tenants with a backlog receive service in proportion to their weights, a tenant
with few requests is served at once, and the engine is never idle while a sequence waits.

While two tenants wait, the one with the higher counter starts nothing. So it gets ahead by no more than the
remaining cost of its running requests: B · C / w, if B requests run at once, the largest costs C, and its
weight is w. A request behind others of its tenant that cost Q starts after the engine has done at most
(Q + B · C) · W / w + B · C of work, where W is the sum of the weights of waiting tenants, and its adapter is
loaded.

A tenant of which nothing runs does not wait for others to end: the running tenant furthest ahead is preempted
once it is ahead of it by `YIELD_COST`, at a sequence that generates: a prompt that is half computed would be
computed again for nothing. If pages are short, the lead must also pay for what is computed again, since its
cached blocks may be gone. In a step a running tenant of weight w gets ahead by at least
`GENERATED_COST` / w. So a tenant that is not ahead of them itself and whose adapter is loaded starts after at
most `YIELD_COST` · w / `GENERATED_COST` + 1 steps for each tenant that waits likewise. A preempted sequence
keeps its place in its tenant's queue.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Container, Iterable, Iterator
from heapq import heapify, heappop, heappush, nsmallest

from turret_server.engine.sequence import Sequence

# The cost of a token. A generated one takes a step, which reads all weights; the ratio is the paper's.
PROMPT_COST = 1.0
GENERATED_COST = 2.0

# How far ahead a tenant must be to be preempted for one of which nothing runs: 64 generated tokens. With less
# tenants that cannot all run at once would take turns more often, and each turn computes some tokens again.
YIELD_COST = 64 * GENERATED_COST

# Tenants without a job whose counters are remembered.
MAX_IDLE_TENANTS = 1000


def _order(sequence: Sequence) -> tuple[float, int]:
    return sequence.order


class FairQueue:
    """The waiting sequences and the tenants' counters. `weight` is a tenant's, above 0."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._waiting: dict[str, list[Sequence]] = {}
        self._counters: dict[str, float] = {}
        # The lowest counter of the waiting tenants when one of them last had its queue emptied.
        self._floor = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for sequences in self._waiting.values():
            yield from sequences

    def counter(self, tenant: str) -> float:
        """The service that the tenant received, in prompt tokens at weight 1."""
        return self._counters.get(tenant, self._floor)

    def lead(self, tenant: str, running: Container[str]) -> float:
        """How far a tenant is ahead of another of which nothing runs, though it waits with its adapters
        loaded; of the one furthest behind. `running` are the tenants of which something runs.
        """
        idle = [
            self.counter(other)
            for other, queue in self._waiting.items()
            if other not in running and queue[0].job.times.ready is not None
        ]
        return self.counter(tenant) - min(idle, default=math.inf)

    def cost_of_recomputing(self, sequence: Sequence) -> float:
        """What it would cost its tenant to compute a sequence's tokens again."""
        return PROMPT_COST * sequence.num_computed / self._weight(sequence.tenant)

    def charge(self, tenant: str, cost: float) -> None:
        self._counters[tenant] = self.counter(tenant) + cost / self._weight(tenant)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. A tenant without any starts at least from the lowest counter of those that wait:
        service that it did not use is not saved up.
        """
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
        """Set all counters to zero. To be called when no job is left: no tenant is owed anything then."""
        assert not self._waiting
        self._counters.clear()
        self._floor = 0.0

    def forget_idle(self, active: Container[str]) -> None:
        """Remember at most `MAX_IDLE_TENANTS` tenants besides the `active` ones, which have jobs: the number
        of names is unbounded. Those with the lowest counters are forgotten, as they would restart close to
        them.
        """
        idle = [tenant for tenant in self._counters if tenant not in active]
        for tenant in nsmallest(len(idle) - MAX_IDLE_TENANTS, idle, key=self.counter):
            del self._counters[tenant]

    def in_order(self, started: Iterable[Sequence]) -> Iterator[Sequence]:
        """`started`, whose prompts are not computed yet, and all waiting sequences, in the order of service.

        The order assumes that each is served completely when it is yielded: a tenant whose sequences cannot
        start yet does not delay the others. The caller may remove a sequence once it was yielded.
        """
        ready: dict[str, list[Sequence]] = {}
        for sequence in sorted(started, key=_order):
            ready.setdefault(sequence.tenant, []).append(sequence)
        tenants = self._waiting.keys() | ready.keys()
        heap = [(self.counter(tenant), tenant) for tenant in tenants]
        heapify(heap)
        orders = {tenant: self._tenant_order(ready.get(tenant, []), tenant) for tenant in tenants}
        while heap:
            counter, tenant = heappop(heap)
            following = next(orders[tenant], None)
            if following is not None:
                cost = max(PROMPT_COST * following.num_remaining, GENERATED_COST) / self._weight(tenant)
                yield following
                heappush(heap, (counter + cost, tenant))

    def _tenant_order(self, ready: list[Sequence], tenant: str) -> Iterator[Sequence]:
        yield from ready
        last = (-math.inf, 0)
        while queue := self._waiting.get(tenant):
            # Searched again each time: the caller may have removed the last one.
            index = bisect_right(queue, last, key=_order)
            if index == len(queue):
                return
            last = queue[index].order
            yield queue[index]

    def _least(self) -> float:
        return min((self.counter(tenant) for tenant in self._waiting), default=self._floor)
