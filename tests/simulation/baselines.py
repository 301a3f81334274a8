"""What the engine's choices are compared with, put in their place for a while. The server has neither."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

from turret_server.engine.fairness import FairQueue
from turret_server.engine.residency.resident import EvictionOrder, Resident
from turret_server.engine.sequence import Sequence


def first_come_first_served() -> AbstractContextManager[object]:
    """Requests are served in the order of their arrival, whoever they belong to."""

    def in_order(queue: FairQueue, started: Iterable[Sequence]) -> Iterator[Sequence]:
        yield from sorted(started, key=lambda sequence: sequence.order)
        yield from sorted(queue, key=lambda sequence: sequence.order)

    return patch.object(FairQueue, "in_order", in_order)


@contextmanager
def least_recently_used() -> Iterator[None]:
    """Of adapters and cached blocks alike, what was used longest ago goes first."""

    def next_victim(_order: EvictionOrder, residents: Iterable[Resident], clock: int) -> Resident | None:
        idle = [one for one in residents if one.num_pages and one.is_idle(clock)]
        return min(idle, key=lambda resident: resident.last_used, default=None)

    def staleness(resident: Resident, clock: int) -> float:
        return clock - resident.last_used

    with (
        patch.object(EvictionOrder, "next_victim", next_victim),
        patch.object(Resident, "staleness", staleness),
    ):
        yield
