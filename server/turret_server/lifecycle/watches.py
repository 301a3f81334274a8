"""Who watches adapters come and go."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial

from turret.v1 import adapters_pb2
from turret_adapters.registry import AdapterRegistry, AdapterStatus
from turret_server.errors import QuotaExceededError, ShuttingDownError, SlowWatcherError, TooManyCallsError
from turret_server.rpc.adapter_messages import AdapterMessages
from turret_server.tenancy.tenants import Tenant

MAX_WATCHERS = 64
MAX_WATCHERS_OF_TENANT = 32
MAX_PENDING = 1024

# The engine does not tell when an adapter gets its pages or gives them up, so that is looked at.
_LOOK_SECONDS = 0.5


class AdapterWatches:
    """Hands every change of the registry to everybody who watches, in the order of the changes."""

    def __init__(self, registry: AdapterRegistry, messages: AdapterMessages) -> None:
        self._registry = registry
        self._messages = messages
        self._lock = threading.Lock()
        self._watchers: set[_Watcher] = set()
        self._closed = False
        self._looking: asyncio.Task[None] | None = None
        # Revision and state of every name, as they were last told.
        self._told: dict[str, tuple[str, int]] = {}
        registry.on_change = self._changed

    def close(self) -> None:
        """The server stops: end every watch."""
        with self._lock:
            self._closed = True
            for watcher in self._watchers:
                watcher.wake()

    async def watch(self, tenant: Tenant) -> AsyncGenerator[adapters_pb2.Adapter]:
        """Every adapter as it is now, then each as it is after every change of it.

        Raises:
            QuotaExceededError: as many of the tenant's calls watch as may.
            TooManyCallsError: as many watch as may.
            SlowWatcherError: changes came faster than they were taken.
            ShuttingDownError: the server stops.
        """
        watcher = self._enter(tenant)
        try:
            for status in watcher.present:
                yield self._messages.of(status)
            while not self._closed:
                for message in watcher.take():
                    yield message
                await watcher.something.wait()
            raise ShuttingDownError("the server is shutting down; watch another")
        finally:
            self._leave(watcher)

    def _enter(self, tenant: Tenant) -> _Watcher:
        watcher = _Watcher(asyncio.get_running_loop(), tenant)
        self._registry.look(partial(self._begin, watcher))
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        return watcher

    def _begin(self, watcher: _Watcher, present: list[AdapterStatus]) -> None:
        """Called by the registry, which changes nothing meanwhile, as `_changed` is."""
        with self._lock:
            tenant = watcher.tenant
            of_tenant = sum(each.tenant.name == tenant.name for each in self._watchers)
            if tenant.max_watches is not None and of_tenant >= tenant.max_watches:
                raise QuotaExceededError(
                    f"{of_tenant} calls of tenant {tenant.name!r} watch adapters, as many as may; end one",
                    tenant=tenant.name,
                    quota="max_watches",
                )
            if len(self._watchers) >= MAX_WATCHERS or of_tenant >= MAX_WATCHERS_OF_TENANT:
                raise TooManyCallsError(
                    f"at most {MAX_WATCHERS} calls watch adapters at once, {MAX_WATCHERS_OF_TENANT} of one "
                    "tenant; end one",
                    limit=MAX_WATCHERS,
                )
            self._watchers.add(watcher)
            watcher.present = present
            for status in present:
                self._told.setdefault(status.name, self._short(status))

    def _leave(self, watcher: _Watcher) -> None:
        with self._lock:
            self._watchers.discard(watcher)
            if self._watchers:
                return
            self._told.clear()
        if self._looking:
            self._looking.cancel()
            self._looking = None

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await asyncio.to_thread(self._tell_where_they_are)

    def _tell_where_they_are(self) -> None:
        statuses = self._registry.statuses()
        with self._lock:
            changed = [each.name for each in statuses if self._told.get(each.name) != self._short(each)]
        for name in changed:
            self._registry.tell(name)

    def _changed(self, status: AdapterStatus) -> None:
        with self._lock:
            if not self._watchers:
                return
            message = self._messages.of(status)
            if message.state == adapters_pb2.ADAPTER_STATE_UNLOADED:
                self._told.pop(status.name, None)
            else:
                self._told[status.name] = (message.revision, message.state)
            for watcher in self._watchers:
                watcher.offer(message)

    def _short(self, status: AdapterStatus) -> tuple[str, int]:
        return status.spec.revision if status.spec else "", self._messages.state(status)


class _Watcher:
    """What one call has not been told yet."""

    def __init__(self, loop: asyncio.AbstractEventLoop, tenant: Tenant) -> None:
        self.tenant = tenant
        self.present: list[AdapterStatus] = []
        self.something = asyncio.Event()
        self._loop = loop
        self._pending: deque[adapters_pb2.Adapter] = deque()
        self._lost = False

    def offer(self, message: adapters_pb2.Adapter) -> None:
        """From any thread."""
        self._lost = self._lost or len(self._pending) >= MAX_PENDING
        if not self._lost:
            self._pending.append(message)
        self.wake()

    def wake(self) -> None:
        # A loop that has closed has nobody waiting.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.something.set)

    def take(self) -> list[adapters_pb2.Adapter]:
        if self._lost:
            raise SlowWatcherError(
                f"more than {MAX_PENDING} changes waited to be taken; watch again, and take them faster",
                limit=MAX_PENDING,
            )
        self.something.clear()
        taken = list(self._pending)
        for _ in taken:
            self._pending.popleft()
        return taken
