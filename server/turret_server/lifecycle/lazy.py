"""Adapters that are loaded when a request first names them."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from turret_adapters.errors import AdapterError, AdapterNotFoundError
from turret_adapters.library import without_secrets
from turret_server.lifecycle.loads import LoadQueue
from turret_server.lifecycle.publishing import AdapterLifecycle

MAX_BROUGHT = 1024
MAX_MISSING = 4096
MISSING_SECONDS = 60.0

NAME_MARK = "{name}"


class LazyAdapters:
    """Loads a name that is not known from `source`, in which the name takes the place of `{name}`.

    What is there is kept like anything that was loaded, up to `MAX_BROUGHT` names; then the one goes that was
    asked for longest ago. That there is nothing is remembered for `MISSING_SECONDS`. Used on one event loop.
    """

    def __init__(
        self, lifecycle: AdapterLifecycle, source: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lifecycle = lifecycle
        self._source = source
        self._clock = clock
        # Of its own: what strangers name keeps no `LoadAdapter` waiting.
        self._loads = LoadQueue()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._missing: OrderedDict[str, tuple[float, AdapterError]] = OrderedDict()
        # Those of before a restart are told by their source.
        self._brought = OrderedDict.fromkeys(
            name
            for name, source in lifecycle.sources().items()
            if source == without_secrets(self._source_of(name))
        )

    async def bring(self, names: Iterable[str]) -> None:
        """See that every name is served.

        Raises:
            AdapterError: one cannot be, or could not be a moment ago.
            TooManyCallsError: too many others are being loaded.
        """
        for name in names:
            if name in self._brought:
                self._brought.move_to_end(name)
            if not self._lifecycle.knows(name):
                await self._load_once(name)

    async def _load_once(self, name: str) -> None:
        until, error = self._missing.get(name, (0.0, None))
        if error and self._clock() < until:
            raise _not_found(name, error)
        if name not in self._loading:
            self._loading[name] = asyncio.create_task(self._load(name))
            self._loading[name].add_done_callback(partial(self._loaded, name))
        # Others wait for it, too.
        await asyncio.shield(self._loading[name])

    def _loaded(self, name: str, task: asyncio.Task[None]) -> None:
        del self._loading[name]
        if not task.cancelled():
            task.exception()  # nobody may be left to ask

    async def _load(self, name: str) -> None:
        try:
            await self._loads.start(partial(self._lifecycle.load, name, self._source_of(name)))
        except AdapterError as error:
            self._missing[name] = (self._clock() + MISSING_SECONDS, error)
            self._missing.move_to_end(name)
            while len(self._missing) > MAX_MISSING:
                self._missing.popitem(last=False)
            raise _not_found(name, error) from error
        self._missing.pop(name, None)
        self._brought[name] = None
        self._brought.move_to_end(name)
        while len(self._brought) > MAX_BROUGHT:
            oldest, _ = self._brought.popitem(last=False)
            with suppress(AdapterNotFoundError):
                await asyncio.to_thread(self._lifecycle.unload, oldest)

    def _source_of(self, name: str) -> str:
        return self._source.replace(NAME_MARK, name)


def _not_found(name: str, error: AdapterError) -> AdapterNotFoundError:
    return AdapterNotFoundError(
        f"no adapter is loaded under the name {name!r}, nor found", name=name, why=str(error)
    )
