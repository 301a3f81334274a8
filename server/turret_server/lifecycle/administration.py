"""Administration of adapters, whatever door it is asked through: permissions, limits, and plain data in
and out.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from turret_adapters.library import AdapterLibrary
from turret_adapters.registry import AdapterRegistry, AdapterStatus
from turret_adapters.sources.fetch import Download
from turret_server.errors import InvalidRequestError
from turret_server.lifecycle.adapter_info import AdapterDescriber, AdapterInfo, AdapterState
from turret_server.lifecycle.publishing import AdapterLifecycle
from turret_server.lifecycle.revisions import check_revision
from turret_server.lifecycle.threads import LoadQueue
from turret_server.lifecycle.uploads import AdapterUploads, UploadParts
from turret_server.lifecycle.watches import AdapterWatches
from turret_server.observability.vllm_metrics import RoutedAdapters
from turret_server.tenancy.access import check_change, check_source, check_unload, check_use
from turret_server.tenancy.auth import Caller
from turret_server.tenancy.tenants import check_name

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

# The longest path of Linux. To look up a longer one takes time that grows with the square of its length.
MAX_PATH_LENGTH = 4096

# Reads of the database, and unloads, which must not wait for slow loads.
_NUM_THREADS = 4

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPage:
    """Adapters in the order of their names. `next_page_token` is empty on the last page."""

    adapters: tuple[AdapterInfo, ...]
    next_page_token: str


class AdapterAdministration:
    """Used on one event loop, which none of its methods blocks.

    An adapter that the caller may not use is answered like one that does not exist. Every method that
    takes a name raises InvalidRequestError for an invalid one and AdapterNotFoundError for an unknown one.
    """

    def __init__(
        self,
        *,
        registry: AdapterRegistry,
        library: AdapterLibrary,
        lifecycle: AdapterLifecycle,
        describer: AdapterDescriber,
        watches: AdapterWatches,
    ) -> None:
        self._registry = registry
        self._library = library
        self._lifecycle = lifecycle
        self._describer = describer
        self._watches = watches
        self._loads = LoadQueue()
        self._uploads = AdapterUploads(lifecycle, library.store, self._loads)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "turret-admin")

    async def load(self, name: str, path: str, caller: Caller) -> AdapterInfo:
        """Fetch an adapter from `path`, a folder or URL, and serve it under `name`.

        Raises:
            InvalidRequestError: the path is empty or too long.
            PermissionDeniedError: the tenant may not load this name.
            AdapterError: the source is not allowed, has no adapter, or has one that cannot be served.
            QuotaExceededError: a quota of the tenant is used up.
            TooManyCallsError: the queue of loads is full.
        """
        check_change(caller.tenant, check_name(name))
        if not 0 < len(path) <= MAX_PATH_LENGTH:
            raise InvalidRequestError(
                f"path must be a folder or URL of 1 to {MAX_PATH_LENGTH} characters; found {len(path)}",
                field="path",
            )
        await self._in_thread(partial(check_source, caller.tenant, path))
        load = partial(self._lifecycle.load, name, path, caller.tenant.ownership)
        await self._loads.submit(load, caller.tenant)
        return await self._present(name, caller)

    async def upload(self, parts: UploadParts, caller: Caller) -> AsyncGenerator[int | AdapterInfo]:
        """Receive an adapter and serve it. Yields the offset from which the tensors are wanted, then the
        adapter.

        Raises:
            TurretError, AdapterError: see `AdapterUploads.receive`.
        """
        async with aclosing(self._uploads.receive(parts, caller.tenant)) as events:
            async for event in events:
                yield event if isinstance(event, int) else await self._present(event, caller)

    async def upload_archive(self, name: str, chunks: AsyncIterator[bytes], caller: Caller) -> AdapterInfo:
        """Receive an archive of an adapter, .zip or .tar.gz, and serve it.

        Raises:
            TurretError, AdapterError: see `AdapterUploads.receive_archive`.
        """
        await self._uploads.receive_archive(name, chunks, self._library.max_bytes, caller.tenant)
        return await self._present(name, caller)

    async def unload(self, name: str, caller: Caller) -> AdapterInfo:
        """Take a name away from new requests. Returns its last state.

        Raises:
            PermissionDeniedError: the tenant may not unload it.
        """
        check_unload(caller.tenant, check_name(name))
        status = await self._in_thread(partial(self._lifecycle.unload, name))
        return self._describer.describe(status)

    async def rollback(self, name: str, revision: str | None, caller: Caller) -> AdapterInfo:
        """Serve the revision before the current one again, or an earlier one that begins with `revision`.

        Raises:
            PermissionDeniedError: the tenant may not load this name.
            AdapterError: there is no such earlier revision.
        """
        check_change(caller.tenant, check_name(name))
        beginning = None if revision is None else check_revision(revision)
        await self._loads.submit(partial(self._lifecycle.rollback, name, beginning), caller.tenant)
        return await self._present(name, caller)

    async def split(self, name: str, revision: str, percent: int, caller: Caller) -> AdapterInfo:
        """Route `percent` of a name's requests to another revision of its history, which begins with
        `revision`; 0 ends the split, and needs no revision.

        Raises:
            InvalidRequestError: the percentage is not from 0 to 100.
            PermissionDeniedError: the tenant may not load this name.
            AdapterError: there is no such revision besides the current one.
        """
        check_change(caller.tenant, check_name(name))
        if not 0 <= percent <= 100:
            raise InvalidRequestError(f"percent must be from 0 to 100; found {percent}", field="percent")
        beginning = check_revision(revision) if percent else ""
        await self._loads.submit(partial(self._lifecycle.split, name, beginning, percent), caller.tenant)
        return await self._present(name, caller)

    async def get(self, name: str, caller: Caller) -> AdapterInfo:
        check_use(caller.tenant, [check_name(name)])
        return await self._present(name, caller)

    async def list(self, page_size: int, page_token: str, caller: Caller) -> AdapterPage:
        """A page of the adapters that the tenant may use. `page_size` 0 means `DEFAULT_PAGE_SIZE`.

        Raises:
            InvalidRequestError: the page size is out of range.
        """
        if not 0 <= page_size <= MAX_PAGE_SIZE:
            raise InvalidRequestError(
                f"page_size must be from 0 to {MAX_PAGE_SIZE}; found {page_size}", field="page_size"
            )
        size = page_size or DEFAULT_PAGE_SIZE
        # The token is the last name of the previous page, so adapters that come and go do not shift the
        # pages.
        rest = [
            status
            for status in self._registry.statuses()
            if status.name > page_token and caller.tenant.may_use(status.name)
        ]
        return AdapterPage(
            adapters=tuple(await self._describe(rest[:size], caller)),
            next_page_token=rest[size - 1].name if len(rest) > size else "",
        )

    async def watch(self, caller: Callable[[], Caller]) -> AsyncGenerator[AdapterInfo]:
        """Every adapter as it is now, then each adapter after every change, without its history.

        `caller` is called for every change, for permissions may be taken away while a watch runs.

        Raises:
            TurretError: see `AdapterWatches.watch`.
        """
        async with aclosing(self._watches.watch(caller().tenant)) as changes:
            async for info in changes:
                if caller().tenant.may_use(info.name):
                    yield info.visible_to(caller().tenant)

    def downloads(self, caller: Caller) -> Sequence[Download]:
        """Running fetches of the adapters that the tenant may load, in the order of their names."""
        return [each for each in self._library.downloads.running if caller.tenant.may_load(each.name)]

    def count_states(self) -> Mapping[str, int]:
        """Adapters by state, for the metrics: every state that a loaded adapter may have."""
        found = Counter(self._describer.state(status) for status in self._registry.statuses())
        return {state.value: found[state] for state in AdapterState if state is not AdapterState.UNLOADED}

    def routed(self) -> RoutedAdapters:
        """What routers in front of several servers must know."""
        states = [(status, self._describer.state(status)) for status in self._registry.statuses()]
        return RoutedAdapters(
            resident=[each.name for each, state in states if state is AdapterState.RESIDENT],
            awaited=[
                each.name for each, state in states if state is AdapterState.STAGED and each.active_requests
            ],
        )

    async def _present(self, name: str, caller: Caller) -> AdapterInfo:
        [info] = await self._describe([self._registry.status(name)], caller)
        return info

    async def _describe(self, statuses: Sequence[AdapterStatus], caller: Caller) -> Sequence[AdapterInfo]:
        names = [status.name for status in statuses]
        histories = await self._in_thread(partial(self._library.names.histories, names))
        return [
            self._describer.describe(status, histories[status.name]).visible_to(caller.tenant)
            for status in statuses
        ]

    def _in_thread(self, call: Callable[[], _Result]) -> asyncio.Future[_Result]:
        """Run a call that may wait for the disk; with the context, so that its log lines name the request."""
        return asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, call)
