"""Quotas: how many requests and tokens a tenant may use at once and in a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from turret_server.errors import QuotaExceededError
from turret_server.tenancy.tenants import Tenant

# The end of a request is unknown; a short one takes about this long.
_RETRY_SECONDS = 1.0


@dataclass(slots=True)
class _Account:
    """A tenant's requests that wait or run, and its remaining tokens at `time`."""

    tokens: float
    time: float
    num_requests: int = 0


@dataclass(slots=True)
class Charge:
    """Tokens that one request takes from its tenant's quota.

    Prompt and maximum answer are taken at once; at the end, what was not generated is given back. So a tenant
    never exceeds its quota, however many requests run. A request that did not begin is free; one that began
    pays for its whole prompt, cached or not.
    """

    num_prompt: int
    max_tokens: int
    num_generated: int = 0
    begun: bool = False

    def begin(self) -> None:
        """The engine has accepted the request."""
        self.begun = True

    @property
    def num_most(self) -> int:
        return self.num_prompt + self.max_tokens

    @property
    def num_used(self) -> int:
        return self.num_prompt + self.num_generated if self.begun else 0


class Quotas:
    """The tenants' accounts. Tokens return evenly, up to those of a minute (a token bucket).

    All methods are called on one event loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @contextmanager
    def charge(self, tenant: Tenant, num_prompt: int, max_tokens: int) -> Iterator[Charge]:
        """Take the tokens of a request, and give back at the end of the block those that it did not use.

        Raises:
            QuotaExceededError: the tenant has too many requests, or too few tokens left.
        """
        charge = Charge(num_prompt, max_tokens)
        if tenant.max_concurrent_requests is None and tenant.tokens_per_minute is None:
            yield charge
            return
        account = self._account(tenant)
        if tenant.max_concurrent_requests is not None:
            self._check_requests(tenant, account, tenant.max_concurrent_requests)
        if tenant.tokens_per_minute is not None:
            self._check_tokens(tenant, account, charge, tenant.tokens_per_minute)
        account.num_requests += 1
        account.tokens -= charge.num_most
        try:
            yield charge
        finally:
            account.num_requests -= 1
            account.tokens += charge.num_most - charge.num_used

    def _account(self, tenant: Tenant) -> _Account:
        """With the tokens that have returned since it was last used."""
        now, per_minute = self._clock(), tenant.tokens_per_minute
        if per_minute is None:
            # Without a quota nothing is owed: one that the tenants file adds later begins full.
            return self._accounts.setdefault(tenant.name, _Account(math.inf, now))
        account = self._accounts.setdefault(tenant.name, _Account(per_minute, now))
        account.tokens = min(account.tokens + (now - account.time) * per_minute / 60, per_minute)
        account.time = now
        return account

    def _check_requests(self, tenant: Tenant, account: _Account, most: int) -> None:
        if account.num_requests >= most:
            raise QuotaExceededError(
                f"tenant {tenant.name!r} may have {most} requests at once, and {account.num_requests} wait "
                "or run; try again when one has ended",
                retry_after=_RETRY_SECONDS,
                tenant=tenant.name,
                quota="max_concurrent_requests",
            )

    def _check_tokens(self, tenant: Tenant, account: _Account, charge: Charge, per_minute: int) -> None:
        # A request larger than the quota takes all of it; the tenant's next request waits the longer.
        missing = min(charge.num_most, per_minute) - account.tokens
        if missing > 0:
            seconds = missing * 60 / per_minute
            raise QuotaExceededError(
                f"tenant {tenant.name!r} has {max(int(account.tokens), 0)} of its {per_minute} tokens a "
                f"minute left, and prompt and max_tokens of this request are {charge.num_most}; try again "
                f"in {seconds:.1f} s, or with fewer",
                retry_after=seconds,
                tenant=tenant.name,
                quota="tokens_per_minute",
            )
