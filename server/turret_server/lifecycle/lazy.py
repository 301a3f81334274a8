"""Adapters that are loaded when a request first names them."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial

from turret_adapters.errors import AdapterError, AdapterNotFoundError
from turret_adapters.registry import AdapterRegistry
from turret_server.config import NAME_MARK
from turret_server.lifecycle.publishing import AdapterLifecycle
from turret_server.lifecycle.threads import LoadQueue

MAX_ON_DEMAND = 1024
MAX_MISSING = 4096
MISSING_SECONDS = 60.0


class LazyAdapters:
    """Loads an unknown name from `source`, a template in which `{name}` stands for the name.

    At most `MAX_ON_DEMAND` names stay that were loaded so; the least recently used is unloaded. An
    explicit load, upload or rollback makes a name stay for good. A name that the source does not have is
    remembered for `MISSING_SECONDS`. Used on one event loop.
    """

    def __init__(
        self,
        lifecycle: AdapterLifecycle,
        registry: AdapterRegistry,
        source: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lifecycle = lifecycle
        self._registry = registry
        self._source = source
        self._clock = clock
        # A queue of its own: names in requests of strangers do not delay explicit loads.
        self._loads = LoadQueue()
        self._loading: dict[str, asyncio.Task[None]] = {}
        # Until when a name counts as missing, and why: a text, for an error keeps the frames that raised it.
        self._missing: OrderedDict[str, tuple[float, str]] = OrderedDict()
        lifecycle.mark_on_demand(self._source_of)

    async def ensure_loaded(self, names: Iterable[str]) -> None:
        """Load the names that are unknown.

        Raises:
            AdapterNotFoundError: one cannot be loaded, or could not a moment ago.
            TooManyCallsError: the queue of loads is full.
        """
        for name in names:
            self._lifecycle.touch(name)
            if not self._registry.knows(name):
                await self._load_once(name)

    async def _load_once(self, name: str) -> None:
        until, why = self._missing.get(name, (0.0, ""))
        if self._clock() < until:
            raise _not_found(name, why)
        if name not in self._loading:
            self._loading[name] = asyncio.create_task(self._load(name))
            self._loading[name].add_done_callback(partial(self._loaded, name))
        # Several callers wait for one load: the end of one call must not cancel it.
        await asyncio.shield(self._loading[name])

    def _loaded(self, name: str, task: asyncio.Task[None]) -> None:
        del self._loading[name]
        if not task.cancelled():
            task.exception()  # retrieved here, for all callers may be gone

    async def _load(self, name: str) -> None:
        load = partial(self._lifecycle.load_on_demand, name, self._source_of(name), MAX_ON_DEMAND)
        try:
            await self._loads.submit(load)
        except AdapterError as error:
            self._missing[name] = (self._clock() + MISSING_SECONDS, str(error))
            self._missing.move_to_end(name)
            while len(self._missing) > MAX_MISSING:
                self._missing.popitem(last=False)
            raise _not_found(name, str(error)) from error
        self._missing.pop(name, None)

    def _source_of(self, name: str) -> str:
        return self._source.replace(NAME_MARK, name)


def _not_found(name: str, why: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(
        f"no adapter is loaded under the name {name!r}, and its source has none", name=name, why=why
    )
