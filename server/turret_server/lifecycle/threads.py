"""Work that waits for the disk or the network, done on threads for callers on the event loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from turret_server.errors import QuotaExceededError, TooManyCallsError
from turret_server.tenancy.tenants import Tenant

MAX_LOADS = 4
MAX_WAITING = 64

# About as long as a load from a local disk takes; how long another one takes is unknown.
_RETRY_SECONDS = 1.0

_Result = TypeVar("_Result")


def _keep(_: object) -> None:
    """The `undo` of a result that needs none."""


async def run_to_completion(
    call: Callable[[], _Result],
    *,
    undo: Callable[[_Result], None] = _keep,
    executor: Executor | None = None,
) -> _Result:
    """Run a call on a thread and wait until it ends, even if this coroutine is cancelled: the caller can
    then close what the call works on. If cancelled, the result is passed to `undo`.
    """
    # With the context, so that the call's log lines name the request.
    inside = partial(copy_context().run, call)
    return await wait_to_completion(asyncio.get_running_loop().run_in_executor(executor, inside), undo)


async def wait_to_completion(
    future: asyncio.Future[_Result], undo: Callable[[_Result], None] = _keep
) -> _Result:
    """Like `run_to_completion`, for a call that runs already."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            cancelled = True
    if not cancelled:
        return future.result()
    if not future.exception():
        undo(future.result())
    raise asyncio.CancelledError


class LoadQueue:
    """Runs loads on a few threads of their own, so that slow ones delay only each other. Used on one event
    loop.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_LOADS, "turret-load")
        self._num_loads = 0
        self._num_of_tenant: Counter[str] = Counter()

    @contextmanager
    def slot(self, tenant: Tenant) -> Iterator[None]:
        """Counts as a load of the tenant while the block runs.

        Raises:
            QuotaExceededError: the tenant's limit of loads is reached.
        """
        self._count(tenant)
        try:
            yield
        finally:
            self._uncount(tenant)

    def submit(self, load: Callable[[], _Result], tenant: Tenant | None = None) -> asyncio.Future[_Result]:
        """Queue a load, which counts for the tenant until it ends. If the result is cancelled before the
        load begins, it never begins; afterwards it runs to its end.

        Raises:
            QuotaExceededError: the tenant's limit of loads is reached.
            TooManyCallsError: the queue is full.
        """
        if self._num_loads >= MAX_LOADS + MAX_WAITING:
            raise TooManyCallsError(
                f"{MAX_LOADS} adapters are being loaded and {MAX_WAITING} are queued, which is the limit; "
                "try again later",
                limit=MAX_LOADS + MAX_WAITING,
            )
        if tenant:
            self._count(tenant)
        self._num_loads += 1
        # With the context, so that the load's log lines name the request.
        running = self._threads.submit(copy_context().run, load)
        running.add_done_callback(partial(self._on_done, asyncio.get_running_loop(), tenant))
        return asyncio.wrap_future(running)

    def _on_done(self, loop: asyncio.AbstractEventLoop, tenant: Tenant | None, _: object) -> None:
        # The loop may be closed; then it submits no more.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._leave, tenant)

    def _leave(self, tenant: Tenant | None) -> None:
        self._num_loads -= 1
        if tenant:
            self._uncount(tenant)

    def _count(self, tenant: Tenant) -> None:
        limit, running = tenant.max_concurrent_loads, self._num_of_tenant[tenant.name]
        if limit is not None and running >= limit:
            raise QuotaExceededError(
                f"{running} loads of tenant {tenant.name!r} are queued or running, which is its limit "
                "(max_concurrent_loads); try again when one has ended",
                retry_after=_RETRY_SECONDS,
                tenant=tenant.name,
                quota="max_concurrent_loads",
            )
        self._num_of_tenant[tenant.name] += 1

    def _uncount(self, tenant: Tenant) -> None:
        self._num_of_tenant[tenant.name] -= 1
        if not self._num_of_tenant[tenant.name]:
            del self._num_of_tenant[tenant.name]
