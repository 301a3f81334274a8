"""Calls that watch adapters change."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial

from turret_adapters.registry import AdapterRegistry, AdapterStatus
from turret_server.errors import QuotaExceededError, ShuttingDownError, SlowWatcherError, TooManyCallsError
from turret_server.lifecycle.adapter_info import AdapterDescriber, AdapterInfo, AdapterState
from turret_server.tenancy.tenants import Tenant

log = logging.getLogger(__name__)

MAX_WATCHERS = 64
MAX_WATCHERS_PER_TENANT = 32
MAX_PENDING = 1024

# The engine does not report when an adapter enters or leaves the arena, so that is polled.
POLL_SECONDS = 0.5


class AdapterWatches:
    """Hands every change of the registry to every watcher, in the order of the changes."""

    def __init__(self, registry: AdapterRegistry, describer: AdapterDescriber) -> None:
        self._registry = registry
        self._describer = describer
        self._lock = threading.Lock()
        self._watchers: set[_Watcher] = set()
        self._closed = False
        self._polling: asyncio.Task[None] | None = None
        # Revision and state of every name as last reported.
        self._reported: dict[str, tuple[str, AdapterState]] = {}
        registry.on_change = self._on_change

    def close(self) -> None:
        """End every watch: the server stops."""
        with self._lock:
            self._closed = True
            for watcher in self._watchers:
                watcher.wake()

    async def watch(self, tenant: Tenant) -> AsyncGenerator[AdapterInfo]:
        """Every adapter as it is now, then each adapter after every change, without its history.

        Raises:
            QuotaExceededError: the tenant's limit of watches is reached.
            TooManyCallsError: the server's limit of watches is reached.
            SlowWatcherError: changes came faster than they were taken.
            ShuttingDownError: the server stops.
        """
        watcher = self._enter(tenant)
        try:
            for status in watcher.present:
                yield self._describer.describe(status)
            while not self._closed:
                for info in watcher.take():
                    yield info
                await watcher.changed.wait()
            raise ShuttingDownError("the server is shutting down; watch another server")
        finally:
            self._leave(watcher)

    def _enter(self, tenant: Tenant) -> _Watcher:
        watcher = _Watcher(asyncio.get_running_loop(), tenant)
        self._registry.look(partial(self._begin, watcher))
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll())
        return watcher

    def _begin(self, watcher: _Watcher, present: list[AdapterStatus]) -> None:
        """Called while the registry is locked, so no change falls between `present` and what is reported
        next.
        """
        with self._lock:
            self._check_limits(watcher.tenant)
            self._watchers.add(watcher)
            watcher.present = present
            for status in present:
                self._reported.setdefault(status.name, self._brief(status))

    def _check_limits(self, tenant: Tenant) -> None:
        of_tenant = sum(each.tenant.name == tenant.name for each in self._watchers)
        if tenant.max_watches is not None and of_tenant >= tenant.max_watches:
            raise QuotaExceededError(
                f"{of_tenant} calls of tenant {tenant.name!r} watch adapters, which is its limit "
                "(max_watches); end one first",
                tenant=tenant.name,
                quota="max_watches",
            )
        if len(self._watchers) >= MAX_WATCHERS or of_tenant >= MAX_WATCHERS_PER_TENANT:
            raise TooManyCallsError(
                f"at most {MAX_WATCHERS} calls watch adapters at once, {MAX_WATCHERS_PER_TENANT} of one "
                "tenant; end one first",
                limit=MAX_WATCHERS,
            )

    def _leave(self, watcher: _Watcher) -> None:
        with self._lock:
            self._watchers.discard(watcher)
            if self._watchers:
                return
            self._reported.clear()
        if self._polling:
            self._polling.cancel()
            self._polling = None

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await asyncio.to_thread(self._report_moves)
            except Exception:
                log.exception("the look for adapters that entered or left the arena failed and is repeated")

    def _report_moves(self) -> None:
        statuses = self._registry.statuses()
        with self._lock:
            moved = [each.name for each in statuses if self._reported.get(each.name) != self._brief(each)]
        for name in moved:
            self._registry.tell(name)

    def _on_change(self, status: AdapterStatus) -> None:
        with self._lock:
            if not self._watchers:
                return
            info = self._describer.describe(status)
            if info.state is AdapterState.UNLOADED:
                self._reported.pop(status.name, None)
            else:
                self._reported[status.name] = (info.revision, info.state)
            for watcher in self._watchers:
                watcher.offer(info)

    def _brief(self, status: AdapterStatus) -> tuple[str, AdapterState]:
        return status.spec.revision if status.spec else "", self._describer.state(status)


class _Watcher:
    """Changes that one call has not taken yet."""

    def __init__(self, loop: asyncio.AbstractEventLoop, tenant: Tenant) -> None:
        self.tenant = tenant
        self.present: list[AdapterStatus] = []
        self.changed = asyncio.Event()
        self._loop = loop
        self._pending: deque[AdapterInfo] = deque()
        self._overflowed = False

    def offer(self, info: AdapterInfo) -> None:
        """From any thread."""
        self._overflowed = self._overflowed or len(self._pending) >= MAX_PENDING
        if not self._overflowed:
            self._pending.append(info)
        self.wake()

    def wake(self) -> None:
        # The loop may be closed; then no call waits.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.changed.set)

    def take(self) -> list[AdapterInfo]:
        if self._overflowed:
            raise SlowWatcherError(
                f"more than {MAX_PENDING} changes were not taken in time; watch again, and take them faster",
                limit=MAX_PENDING,
            )
        self.changed.clear()
        taken = list(self._pending)
        for _ in taken:
            self._pending.popleft()
        return taken
