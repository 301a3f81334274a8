"""AdapterService: load, swap, roll back and unload while requests run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from turret.v1 import adapters_pb2, adapters_pb2_grpc
from turret_adapters.registry import AdapterRegistry, AdapterStatus
from turret_server.api.adapter_messages import AdapterMessages
from turret_server.api.validation import check_name, check_revision
from turret_server.api.watches import AdapterWatches
from turret_server.errors import InvalidRequestError
from turret_server.lifecycle import AdapterLifecycle

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
        if not request.path:
            raise InvalidRequestError("path is empty; give the adapter's folder", field="path")
        await asyncio.to_thread(self._lifecycle.load, name, request.path)
        return adapters_pb2.LoadAdapterResponse(adapter=await self._present(name))

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.UnloadAdapterResponse:
        status = await asyncio.to_thread(self._lifecycle.unload, check_name(request.name))
        return adapters_pb2.UnloadAdapterResponse(adapter=self._messages.of(status))

    async def RollbackAdapter(
        self, request: adapters_pb2.RollbackAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.RollbackAdapterResponse:
        name = check_name(request.name)
        revision = check_revision(request.revision) if request.revision else None
        await asyncio.to_thread(self._lifecycle.rollback, name, revision)
        return adapters_pb2.RollbackAdapterResponse(adapter=await self._present(name))

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.GetAdapterResponse:
        return adapters_pb2.GetAdapterResponse(adapter=await self._present(check_name(request.name)))

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.ListAdaptersResponse:
        if not 0 <= request.page_size <= _MAX_PAGE_SIZE:
            raise InvalidRequestError(
                f"page_size is 0 to {_MAX_PAGE_SIZE}; found {request.page_size}", field="page_size"
            )
        size = request.page_size or _DEFAULT_PAGE_SIZE
        # The token is the last name of the page before: adapters that come and go do not shift the pages.
        rest = [status for status in self._registry.statuses() if status.name > request.page_token]
        page = rest[:size]
        return adapters_pb2.ListAdaptersResponse(
            adapters=await self._described(page),
            next_page_token=page[-1].name if len(rest) > size else "",
        )

    async def WatchAdapters(
        self, request: adapters_pb2.WatchAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[adapters_pb2.WatchAdaptersResponse]:
        async with aclosing(self._watches.watch()) as changes:
            async for adapter in changes:
                yield adapters_pb2.WatchAdaptersResponse(adapter=adapter)

    async def _present(self, name: str) -> adapters_pb2.Adapter:
        [message] = await self._described([self._registry.status(name)])
        return message

    async def _described(self, statuses: Sequence[AdapterStatus]) -> list[adapters_pb2.Adapter]:
        histories = await asyncio.to_thread(
            self._lifecycle.histories, [status.name for status in statuses]
        )
        return [self._messages.of(status, histories[status.name]) for status in statuses]
