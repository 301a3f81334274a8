"""How many adapters are loaded at once, by all and by each tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from turret_server.errors import TooManyCallsError
from turret_server.tenancy.quotas import Places
from turret_server.tenancy.tenants import Tenant

MAX_LOADS = 4
MAX_WAITING = 64

# Nobody knows when a load ends; this is about as long as one from a disk takes.
_RETRY_SECONDS = 1.0

_Result = TypeVar("_Result")


class LoadQueue:
    """Runs loads in a few threads of their own: slow ones keep nothing but one another waiting."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_LOADS, "turret-load")
        self._num_calls = 0
        self._places = Places("max_concurrent_loads", "loads", _RETRY_SECONDS)

    @contextmanager
    def place(self, tenant: Tenant) -> Iterator[None]:
        """Counts as a load of the tenant's for as long as the block takes.

        Raises:
            QuotaExceededError: as many of the tenant's wait or run as may.
        """
        leave = self._places.take(tenant)
        try:
            yield
        finally:
            leave()

    def start(self, load: Callable[[], _Result], tenant: Tenant | None = None) -> asyncio.Future[_Result]:
        """Runs a load when it is its turn. Cancelled before, it is not begun; once begun, it runs to its end.

        Raises:
            QuotaExceededError: as many of the tenant's wait or run as may.
            TooManyCallsError: as many wait as may.
        """
        if self._num_calls >= MAX_LOADS + MAX_WAITING:
            raise TooManyCallsError(
                f"{MAX_LOADS} adapters are being loaded and {MAX_WAITING} wait; try again later",
                limit=MAX_LOADS + MAX_WAITING,
            )
        leave = self._places.take(tenant) if tenant else None
        self._num_calls += 1
        # With the context, so that its log lines say whose call it is.
        running = self._threads.submit(copy_context().run, load)
        running.add_done_callback(partial(self._ended, asyncio.get_running_loop(), leave))
        return asyncio.wrap_future(running)

    def _ended(self, loop: asyncio.AbstractEventLoop, leave: Callable[[], None] | None, _: object) -> None:
        # A loop that has closed starts no more.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._leave, leave)

    def _leave(self, leave: Callable[[], None] | None) -> None:
        self._num_calls -= 1
        if leave:
            leave()
