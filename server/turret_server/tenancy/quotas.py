"""What a tenant may have at once, and how much in a minute, whatever the server could do beyond."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from turret_server.errors import QuotaExceededError
from turret_server.tenancy.tenants import Tenant

# Nobody knows when a request ends; this is about as long as a short one takes.
_RETRY_SECONDS = 1.0


@dataclass(slots=True)
class _Account:
    """A tenant's requests that wait or run, and the tokens that it has left, as of `time`."""

    tokens: float
    time: float
    num_requests: int = 0


@dataclass(slots=True)
class Charge:
    """What one request takes of its tenant's tokens.

    All that it may generate is taken at once, and given back at its end as far as it was not generated. So a
    tenant never has more than its tokens, however many requests run at a time. One that never began is free;
    one that began pays for its prompt, whatever of it was found in the cache.
    """

    num_prompt: int
    max_tokens: int
    num_generated: int = 0
    begun: bool = False

    @property
    def num_most(self) -> int:
        return self.num_prompt + self.max_tokens

    @property
    def num_used(self) -> int:
        return self.num_prompt + self.num_generated if self.begun else 0


class Quotas:
    """Keeps the tenants' accounts. Tokens come back evenly, up to those of a minute (a token bucket).

    All methods are called from one event loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def enter(self, tenant: Tenant, charge: Charge) -> Callable[[], None]:
        """Take what a request may use; who has it gives back the rest by calling the result, once.

        Raises:
            QuotaExceededError: the tenant has that much no more, or not yet again.
        """
        if tenant.max_concurrent_requests is None and tenant.tokens_per_minute is None:
            return _nothing
        account = self._account(tenant)
        if tenant.max_concurrent_requests is not None:
            self._check_requests(tenant, account, tenant.max_concurrent_requests)
        if tenant.tokens_per_minute is not None:
            self._check_tokens(tenant, account, charge, tenant.tokens_per_minute)
        account.num_requests += 1
        account.tokens -= charge.num_most

        def leave() -> None:
            account.num_requests -= 1
            account.tokens += charge.num_most - charge.num_used

        return leave

    def _account(self, tenant: Tenant) -> _Account:
        """With the tokens that came back since it was last looked at."""
        now, per_minute = self._clock(), tenant.tokens_per_minute or 0
        account = self._accounts.setdefault(tenant.name, _Account(per_minute, now))
        account.tokens = min(account.tokens + (now - account.time) * per_minute / 60, per_minute)
        account.time = now
        return account

    def _check_requests(self, tenant: Tenant, account: _Account, most: int) -> None:
        if account.num_requests >= most:
            raise QuotaExceededError(
                f"{account.num_requests} requests of tenant {tenant.name!r} wait or run, as many as may; try "
                f"again when one has ended",
                retry_after=_RETRY_SECONDS,
                tenant=tenant.name,
                quota="max_concurrent_requests",
            )

    def _check_tokens(self, tenant: Tenant, account: _Account, charge: Charge, per_minute: int) -> None:
        # One that needs more than there ever is gets all of it, and the tenant waits the longer for the next.
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


class Places:
    """How many of a kind each tenant has at once; `quota` is the setting that says how many may be.

    All methods are called from one event loop.
    """

    def __init__(self, quota: str, kind: str, retry_after: float | None = None) -> None:
        self._quota = quota
        self._kind = kind
        self._retry_after = retry_after
        self._taken: Counter[str] = Counter()

    def take(self, tenant: Tenant) -> Callable[[], None]:
        """Take a place; who has it gives it back by calling the result, once.

        Raises:
            QuotaExceededError: the tenant has as many as may be.
        """
        most: int | None = getattr(tenant, self._quota)
        if most is not None and self._taken[tenant.name] >= most:
            raise QuotaExceededError(
                f"{most} {self._kind} of tenant {tenant.name!r} are under way, as many as may; try again "
                "when one has ended",
                retry_after=self._retry_after,
                tenant=tenant.name,
                quota=self._quota,
            )
        self._taken[tenant.name] += 1

        def leave() -> None:
            self._taken[tenant.name] -= 1
            if not self._taken[tenant.name]:
                del self._taken[tenant.name]

        return leave


def _nothing() -> None:
    """To give back for who has no quota."""
