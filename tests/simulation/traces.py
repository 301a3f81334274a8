"""Synthetic loads, drawn from a seed: who asks for what, when, and how long they have patience."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from support.fake_device import make_spec
from turret_adapters.spec import AdapterSpec, PrefixKind
from turret_server.engine.admission import TenantLimits

# Pages of a LoRA by its rank: as if a page held the rows of rank 8.
RANK_PAGES = {8: 1, 16: 2, 32: 4, 64: 8, 128: 16}

# A tenant's share is as large as anybody's, and its queue endless.
NO_LIMITS = TenantLimits(max_queued_requests=10**6, max_queued_tokens=10**9)

# How long the bursts of a bursty tenant last on the average, in seconds.
_BURST_SECONDS = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Someone's load.

    Requests arrive as a Poisson process of `rate` per second from `start` to `end`. With `burst` above 1
    they come only in bursts, in which the rate is so many times as high, and which take the rest of the
    time off. The k-th adapter is asked for in proportion to 1 / k**skew; each request names one, or none
    where there are none. Lengths are log-uniform between two bounds, both included.
    """

    name: str
    rate: float
    start: float = 0.0
    end: float = 10.0
    burst: float = 1.0
    adapters: Sequence[AdapterSpec] = ()
    skew: float = 1.0
    prompt: tuple[int, int] = (8, 64)
    answer: tuple[int, int] = (4, 64)
    # The share of requests whose prompt begins as some others do.
    alike: float = 0.3
    priorities: Sequence[int] = (0,)
    salts: Sequence[str] = ("",)
    # The shares of requests that are given up, have a deadline, and are prompts to be pinned for a while.
    gives_up: float = 0.0
    has_deadline: float = 0.0
    pins: float = 0.0
    # For how many seconds those have patience, on the average.
    patience: float = 2.0
    limits: TenantLimits = NO_LIMITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request of a tenant at a time. At `until`, it is cancelled, or unpinned if it is `pinned`."""

    at: float
    tenant: str
    prompt: tuple[int, ...]
    adapter: AdapterSpec | None
    max_tokens: int
    seed: int
    priority: int = 0
    cache_salt: str = ""
    deadline: float | None = None
    until: float | None = None
    pinned: bool = False


def make_adapters(
    name: str, count: int, numbers: random.Random, *, prefixes: float = 0.0
) -> list[AdapterSpec]:
    """LoRAs of ranks 8 to 128, and a share of adapters that bring virtual tokens."""
    adapters = []
    for index in range(count):
        revision = f"{name}/{index}"
        if numbers.random() < prefixes:
            kind = numbers.choice(list(PrefixKind))
            adapters.append(make_spec(revision, num_virtual=numbers.randint(1, 40), kind=kind))
        else:
            adapters.append(make_spec(revision, slab_pages=numbers.choice(list(RANK_PAGES.values()))))
    return adapters


def make_trace(tenants: Sequence[Tenant], seed: int) -> list[Arrival]:
    """All arrivals in their order; those of a tenant do not depend on who else is there."""
    arrivals = [
        arrival for tenant in tenants for arrival in _arrivals(tenant, random.Random(f"{seed}/{tenant.name}"))
    ]
    return sorted(arrivals, key=lambda arrival: arrival.at)


def _arrivals(tenant: Tenant, numbers: random.Random) -> Iterator[Arrival]:
    popularity = list(
        itertools.accumulate((index + 1) ** -tenant.skew for index in range(len(tenant.adapters)))
    )
    for at in _times(tenant, numbers):
        adapter = None
        if popularity:
            drawn = numbers.random() * popularity[-1]
            adapter = tenant.adapters[bisect.bisect_right(popularity, drawn)]
        gives_up, late, pinned = (
            numbers.random() < share for share in (tenant.gives_up, tenant.has_deadline, tenant.pins)
        )
        until = at + numbers.expovariate(1 / tenant.patience)
        yield Arrival(
            at=at,
            tenant=tenant.name,
            prompt=_prompt(tenant, numbers),
            adapter=adapter,
            max_tokens=_length(tenant.answer, numbers),
            seed=numbers.randrange(4),
            priority=numbers.choice(tenant.priorities),
            cache_salt=numbers.choice(tenant.salts),
            deadline=until if late else None,
            until=until if gives_up or pinned else None,
            pinned=pinned,
        )


def _times(tenant: Tenant, numbers: random.Random) -> Iterator[float]:
    at, burst_end = tenant.start, math.inf if tenant.burst == 1 else tenant.start
    while True:
        at += numbers.expovariate(tenant.rate * tenant.burst)
        while at > burst_end:
            # What is left of the wait is spent in the next burst.
            pause = numbers.expovariate(1 / (_BURST_SECONDS * (tenant.burst - 1)))
            at += pause
            burst_end += pause + numbers.expovariate(1 / _BURST_SECONDS)
        if at >= tenant.end:
            return
        yield at


def _prompt(tenant: Tenant, numbers: random.Random) -> tuple[int, ...]:
    length = _length(tenant.prompt, numbers)
    if numbers.random() < tenant.alike:
        beginning = numbers.randrange(3)
        return tuple(beginning if at < length * 0.8 else numbers.randrange(1000) for at in range(length))
    return tuple(numbers.randrange(1000) for _ in range(length))


def _length(bounds: tuple[int, int], numbers: random.Random) -> int:
    low, high = bounds
    return min(high, int(math.exp(numbers.uniform(math.log(low), math.log(high + 1)))))
