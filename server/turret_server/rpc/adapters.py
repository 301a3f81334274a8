"""AdapterService: load, swap, roll back and unload while requests run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc

from turret.v1 import adapters_pb2, adapters_pb2_grpc
from turret_adapters.registry import AdapterRegistry, AdapterStatus
from turret_server.errors import InvalidRequestError
from turret_server.lifecycle.loads import LoadQueue
from turret_server.lifecycle.publishing import AdapterLifecycle
from turret_server.lifecycle.watches import AdapterWatches
from turret_server.rpc.adapter_messages import AdapterMessages
from turret_server.rpc.auth import caller
from turret_server.rpc.uploads import AdapterUploads
from turret_server.serving.validation import check_path, check_revision
from turret_server.tenancy.access import check_change, check_source, check_unload, check_use, seen_by
from turret_server.tenancy.tenants import check_name

_DEFAULT_PAGE_SIZE = 100
_MAX_PAGE_SIZE = 1000


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    def __init__(
        self,
        *,
        registry: AdapterRegistry,
        lifecycle: AdapterLifecycle,
        messages: AdapterMessages,
        watches: AdapterWatches,
    ) -> None:
        self._loads = LoadQueue()
        self._uploads = AdapterUploads(lifecycle, self._loads)
        self._registry = registry
        self._lifecycle = lifecycle
        self._messages = messages
        self._watches = watches

    def states(self) -> list[str]:
        """The state of every adapter, in the short lower-case names of the metrics."""
        names = adapters_pb2.AdapterState.Name
        prefix = "ADAPTER_STATE_"
        states = map(self._messages.state, self._registry.statuses())
        return [names(state).removeprefix(prefix).lower() for state in states]

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.LoadAdapterResponse:
        name = check_name(request.name)
        check_change(caller().tenant, name)
        path = check_path(request.path)
        await asyncio.to_thread(check_source, caller().tenant, path)
        load = partial(self._lifecycle.load, name, path, caller().tenant.ownership)
        await self._loads.start(load, caller().tenant)
        return adapters_pb2.LoadAdapterResponse(adapter=await self._present(name))

    async def UploadAdapter(
        self,
        request_iterator: AsyncIterator[adapters_pb2.UploadAdapterRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncGenerator[adapters_pb2.UploadAdapterResponse]:
        async with aclosing(self._uploads.receive(request_iterator, caller().tenant)) as upload:
            _, offset = await anext(upload)
            yield adapters_pb2.UploadAdapterResponse(offset=offset)
            name, _ = await anext(upload)
            yield adapters_pb2.UploadAdapterResponse(adapter=await self._present(name))

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.UnloadAdapterResponse:
        name = check_name(request.name)
        check_unload(caller().tenant, name)
        status = await asyncio.to_thread(self._lifecycle.unload, name)
        return adapters_pb2.UnloadAdapterResponse(adapter=self._messages.of(status))

    async def RollbackAdapter(
        self, request: adapters_pb2.RollbackAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.RollbackAdapterResponse:
        name = check_name(request.name)
        check_change(caller().tenant, name)
        revision = check_revision(request.revision) if request.revision else None
        await self._loads.start(partial(self._lifecycle.rollback, name, revision), caller().tenant)
        return adapters_pb2.RollbackAdapterResponse(adapter=await self._present(name))

    async def SetTrafficSplit(
        self, request: adapters_pb2.SetTrafficSplitRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.SetTrafficSplitResponse:
        name = check_name(request.name)
        check_change(caller().tenant, name)
        if not 0 <= request.percent <= 100:
            raise InvalidRequestError(f"percent is from 0 to 100; found {request.percent}", field="percent")
        revision = check_revision(request.revision) if request.percent else ""
        await self._loads.start(
            partial(self._lifecycle.split, name, revision, request.percent), caller().tenant
        )
        return adapters_pb2.SetTrafficSplitResponse(adapter=await self._present(name))

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.GetAdapterResponse:
        name = check_name(request.name)
        check_use(caller().tenant, [name])
        return adapters_pb2.GetAdapterResponse(adapter=await self._present(name))

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.ListAdaptersResponse:
        if not 0 <= request.page_size <= _MAX_PAGE_SIZE:
            raise InvalidRequestError(
                f"page_size is 0 to {_MAX_PAGE_SIZE}; found {request.page_size}", field="page_size"
            )
        tenant, size = caller().tenant, request.page_size or _DEFAULT_PAGE_SIZE
        # The token is the last name of the page before: adapters that come and go do not shift the pages.
        rest = [
            status
            for status in self._registry.statuses()
            if status.name > request.page_token and tenant.may_use(status.name)
        ]
        page = rest[:size]
        return adapters_pb2.ListAdaptersResponse(
            adapters=await self._described(page),
            next_page_token=page[-1].name if len(rest) > size else "",
        )

    async def WatchAdapters(
        self, request: adapters_pb2.WatchAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[adapters_pb2.WatchAdaptersResponse]:
        async with aclosing(self._watches.watch(caller().tenant)) as changes:
            async for adapter in changes:
                if caller().tenant.may_use(adapter.name):
                    yield adapters_pb2.WatchAdaptersResponse(adapter=seen_by(caller().tenant, adapter))

    async def ListDownloads(
        self, request: adapters_pb2.ListDownloadsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.ListDownloadsResponse:
        tenant = caller().tenant
        return adapters_pb2.ListDownloadsResponse(
            downloads=[
                adapters_pb2.Download(name=each.name, done_bytes=each.num_done, total_bytes=each.num_total)
                for each in self._lifecycle.downloads()
                if tenant.may_load(each.name)
            ]
        )

    async def _present(self, name: str) -> adapters_pb2.Adapter:
        [message] = await self._described([self._registry.status(name)])
        return message

    async def _described(self, statuses: Sequence[AdapterStatus]) -> list[adapters_pb2.Adapter]:
        histories = await asyncio.to_thread(self._lifecycle.histories, [status.name for status in statuses])
        return [
            seen_by(caller().tenant, self._messages.of(status, histories[status.name])) for status in statuses
        ]
